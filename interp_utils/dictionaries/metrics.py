"""How well a dictionary does on data it was not trained on, each number with its formula."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_utils.dictionaries.batches import as_pair, tensors_of
from interp_utils.dictionaries.dictionary import Dictionary
from interp_utils.errors import InterpError

CHUNK = 1024  # rows encoded at a time
CONSTANT = 1e-12  # share of sum ||y||^2 below which the spread is a rounding error


@dataclass(frozen=True)
class Evaluation:
    """Sums run over all rows in float64, ||.|| over d_out; ratios are of sums, but the cosine is a mean over rows.

    A ratio whose denominator is zero is NaN: the explained variance of a constant target, every ratio of zeros.

    Attributes:
        rows: how many; also the window in which a latent counts as dead.
        l0: active latents per row.
        explained_variance: 1 - sum ||y - y_hat||^2 / sum ||y - mean(y)||^2, the mean over these rows.
        normalised_mse: sum ||y - y_hat||^2 / sum ||y||^2.
        cosine: mean of y . y_hat / (||y|| ||y_hat||).
        norm_ratio: sum ||y_hat|| / sum ||y||; below 1 where sparsity shrinks.
        dead_share: share of latents active in none of the rows.
        density: "width", share of the rows in which each latent is active.
    """

    rows: int
    l0: float
    explained_variance: float
    normalised_mse: float
    cosine: float
    norm_ratio: float
    dead_share: float
    density: Float[Tensor, " width"]

    def as_dict(self) -> dict[str, Any]:
        """Every number, without the density."""
        return {name: value for name, value in vars(self).items() if name != "density"}


@torch.no_grad()
def evaluate(dictionary: Dictionary, batches: Any, *, without: Sequence[int] = ()) -> Evaluation:
    """Encode and decode every batch and compare with the target.

    Args:
        dictionary: any.
        batches: tensors "row d_in", or pairs (input, target), in the dictionary's units (a store's `batches`
            from held-out text); one tensor is also taken, and a tuple of two is one pair. A transcoder needs
            pairs.
        without: dimensions of the target left out of every comparison, such as the massive ones.

    Raises:
        InterpError: there is no row, or a batch is no tensor or pair, has another width or is not finite.
    """
    kept = torch.ones(dictionary.d_out, dtype=torch.bool)
    kept[list(without)] = False
    counts = torch.zeros(dictionary.width, dtype=torch.int64)
    total, sums = torch.zeros(int(kept.sum()), dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    rows = 0
    if one := tensors_of(batches):
        batches = [one]
    if not isinstance(batches, Iterable):
        raise InterpError(
            f"Data of type {type(batches).__name__} cannot be evaluated on; give a tensor, a pair of them, or the "
            "batches of a store."
        )
    for number, batch in enumerate(batches):
        x, y = as_pair(batch, dictionary, "the data" if one else f"batch {number}")
        for own, target in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            acts = dictionary.encode(own)
            counts += (acts > 0).sum(0)
            wanted, found = target[:, kept].double(), dictionary.decode(acts)[:, kept].double()
            total += wanted.sum(0)
            sums += _sums(wanted, found)
            rows += len(own)
    if not rows:
        raise InterpError("There is no row to evaluate; give at least one batch.")
    error, square, cosine, norm, found_norm = sums.tolist()
    about_mean = square - float(total.square().sum()) / rows
    return Evaluation(
        rows=rows,
        l0=float(counts.sum()) / rows,
        explained_variance=1 - _ratio(error, about_mean if about_mean > CONSTANT * square else 0.0),
        normalised_mse=_ratio(error, square),
        cosine=cosine / rows,
        norm_ratio=_ratio(found_norm, norm),
        dead_share=float((counts == 0).double().mean()),
        density=(counts / rows).float(),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _sums(y: Tensor, y_hat: Tensor) -> Tensor:
    norms, found = y.norm(dim=1), y_hat.norm(dim=1)
    cosines = (y * y_hat).sum(1) / (norms * found).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.stack(
        [(y - y_hat).square().sum(), y.square().sum(), cosines.sum(), norms.sum(), found.sum()]
    )
