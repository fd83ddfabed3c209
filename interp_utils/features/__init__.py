"""Find, show and search what the latents of a dictionary stand for."""

from interp_utils.features.activations import prompt_latents, sparse_activations
from interp_utils.features.index import FeatureIndex, build_index, load_index, save_index

__all__ = ["FeatureIndex", "build_index", "load_index", "prompt_latents", "save_index", "sparse_activations"]
