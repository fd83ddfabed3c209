"""Control models: the same architecture without what was learnt."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from interp_utils.errors import InterpError

if TYPE_CHECKING:
    from nnsight import TransformersModel


def reinitialise(model: TransformersModel, seed: int = 0) -> TransformersModel:
    """Replace every weight, in place, by Gaussian noise with the mean and deviation of its tensor.

    Embeddings are drawn, too, so nothing learnt is left but the scale of each tensor (the "re-randomised"
    control of Heap et al. 2025, 2501.17727). The same seed gives the same model.

    Returns:
        The model; `info.weights` says "reinitialised:<seed>" after the weights it had.

    Raises:
        InterpError: a remote model, or one that was re-initialised before.
    """
    if model.info.remote:
        raise InterpError("The weights of a remote model cannot be replaced; load it here.")
    if "reinitialised" in model.info.weights:
        raise InterpError("This model was re-initialised before; load it again first.")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model._module.parameters():  # tied ones come once
            noise = torch.randn(weight.shape, generator=generator) * weight.std(correction=0) + weight.mean()
            weight.copy_(noise)
    model.info = replace(model.info, weights=f"{model.info.weights} reinitialised:{seed}")
    return model
