"""Plumbing for the notebooks: models, activations, interventions, claims and figures."""

__version__ = "0.1.0"
