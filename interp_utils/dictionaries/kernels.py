"""Sparse products on a CPU, written for matrices with one row per latent.

Which latents of which rows are active is kept as `Pairs` (compressed rows); their values travel beside it as a
flat tensor in the same order. A bfloat16 product, two to eight times faster where the processor has the
instructions for it, may choose the pairs; their values are always recomputed in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

Screen = Literal["bfloat16"] | None
CHUNK = 256  # rows searched at a time: their pre-activations stay in the second-level cache
BUFFER = 1 << 23  # pre-activations computed at a time
GROUP = 8  # latents whose maximum stands for them
SLACK_BITS = 2  # units in the last place of a bfloat16 by which a candidate may fall short
# Of a latent's encoder norm, added where a bfloat16 product screens: 3.3 times the standard deviation of its error
# near the floor, on 8,192 real rows (Gemma 3 270M, middle layer), where it lost 2 in 265,000 active pairs at most.
MARGIN = 2.0**-7


def fast_screen() -> Screen:
    """ "bfloat16" where the processor multiplies it natively; elsewhere it would be slower than float32."""
    return "bfloat16" if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else None


@dataclass(frozen=True)
class Pairs:
    """Chosen (row, latent) pairs: `start[r]` to `start[r + 1]` are those of row r in `latent`."""

    start: Int[Tensor, " row_plus_1"]
    latent: Int[Tensor, " pair"]
    width: int

    @property
    def n_rows(self) -> int:
        return len(self.start) - 1

    def rows(self) -> Int[Tensor, " pair"]:
        """The row of every pair."""
        return torch.repeat_interleave(torch.arange(self.n_rows), self.start.diff())

    def keep(self, which: Tensor) -> Pairs:
        """The pairs at these places, given in increasing order."""
        counts = torch.bincount(self.rows()[which], minlength=self.n_rows)
        return Pairs(_starts(counts), self.latent[which], self.width)


def top_candidates(
    x: Float[Tensor, "row d"],
    W_enc: Float[Tensor, "width d"],
    b_enc: Float[Tensor, " width"],
    k: int,
    screen: Screen = None,
) -> Pairs:
    """The positive ones among the k largest pre-activations of every row, and a few that come close.

    The k-th largest of the maxima of `GROUP` latents each is at most the k-th largest of all. Pre-activations
    are compared by their bits, whose order as whole numbers is that of positive floats. With a screen the last
    candidates may be others than in float32, and what is within its rounding error of zero may be lost.
    """
    width = len(W_enc)
    group = next(g for g in (GROUP, 4, 2, 1) if width % g == 0 and width // g >= k)
    slack = SLACK_BITS if screen else 0
    found: list[Tensor] = []
    counts: list[Tensor] = []
    for block in _blocks(x, W_enc, b_enc, screen):
        bits = _bits(block)
        maxima = bits.reshape(len(bits), group, -1).max(axis=1)
        place = maxima.shape[1] - k
        maxima.partition(place, axis=1)
        floor = np.maximum(maxima[:, place], slack + 1) - slack
        _collect(bits >= floor[:, None], found, counts)
    return Pairs(_starts(torch.cat(counts)), torch.cat(found), width)


def largest(pairs: Pairs, values: Float[Tensor, " pair"], k: int) -> Int[Tensor, " place"]:
    """Where the k largest values of every row are, in increasing order; equal ones all stay."""
    counts = pairs.start.diff()
    if int(counts.max()) <= k:
        return torch.arange(len(values))
    rows = pairs.rows()
    table = torch.full((pairs.n_rows, int(counts.max())), -torch.inf)
    table[rows, torch.arange(len(values)) - pairs.start[rows]] = values
    plain = table.numpy()
    plain.partition(plain.shape[1] - k, axis=1)
    return (values >= table[rows, -k]).nonzero().flatten()


def pairs_above(
    x: Float[Tensor, "row d"],
    W_enc: Float[Tensor, "width d"],
    b_enc: Float[Tensor, " width"],
    floor: float | Float[Tensor, " width"] = 0.0,
    screen: Screen = None,
) -> Pairs:
    """Every pair whose pre-activation exceeds the (latent's) floor; with a screen also some that just do not."""
    width = len(W_enc)
    bias = b_enc - floor
    if screen:
        bias = bias + MARGIN * W_enc.norm(dim=1)
    found: list[Tensor] = []
    counts: list[Tensor] = []
    for block in _blocks(x, W_enc, bias, screen):
        _collect(_bits(block) > 0, found, counts)
    return Pairs(_starts(torch.cat(counts)), torch.cat(found), width)


def kth_pre_activation(
    x: Float[Tensor, "row d"],
    W_enc: Float[Tensor, "width d"],
    b_enc: Float[Tensor, " width"],
    k: int,
    screen: Screen = None,
) -> float:
    """The k-th largest pre-activation of all rows together, as exact as the screen; 0 if it is negative."""
    everything = np.concatenate([_bits(block).flatten() for block in _blocks(x, W_enc, b_enc, screen)])
    place = max(len(everything) - k, 0)
    kth = torch.tensor(np.partition(everything, place)[place])
    return max(float(kth.view(torch.bfloat16 if screen else torch.float32)), 0.0)


def pair_products(
    pairs: Pairs,
    x: Float[Tensor, "row d"],
    W: Float[Tensor, "width d"],
    bias: Float[Tensor, " width"] | None = None,
) -> Float[Tensor, " pair"]:
    """x_row . W_latent (+ bias_latent) of every pair."""
    base = torch.zeros(len(pairs.latent)) if bias is None else bias[pairs.latent]
    return torch.sparse.sampled_addmm(_csr(pairs, base), x, W.T, beta=float(bias is not None)).values()


def weighted_rows(
    pairs: Pairs, values: Float[Tensor, " pair"], W: Float[Tensor, "width d"]
) -> Float[Tensor, "row d"]:
    """Sum over the pairs of each row of value * W_latent: the sparse decoder."""
    return torch.nn.functional.embedding_bag(
        pairs.latent, W, pairs.start[:-1], mode="sum", per_sample_weights=values
    )


def transposed(pairs: Pairs) -> tuple[Pairs, Int[Tensor, " pair"]]:
    """The same pairs listed by latent, and the order that brings values into that list."""
    small = torch.int16 if pairs.width < 1 << 15 else torch.int32  # sorting by radix: bytes cost time
    order = pairs.latent.to(small).argsort(stable=True)
    counts = torch.bincount(pairs.latent, minlength=pairs.width)
    return Pairs(_starts(counts), pairs.rows()[order], pairs.n_rows), order


def by_latent(
    flipped: Pairs,
    values: Float[Tensor, " pair"],
    x: Float[Tensor, "row d"],
    out: Float[Tensor, "width d"] | None = None,
) -> Float[Tensor, "width d"]:
    """Sum over the pairs of each latent of value * x_row: a weight gradient, values in transposed order."""
    # A fresh result of this size costs more in page faults than the product.
    out = x.new_empty(flipped.n_rows, x.shape[1]) if out is None else out
    return torch.addmm(out, _csr(flipped, values), x, beta=0, out=out)


def add_by_latent(pairs: Pairs, values: Float[Tensor, " pair"]) -> Float[Tensor, " width"]:
    """Sum of the values of each latent's pairs."""
    return torch.zeros(pairs.width).index_add_(0, pairs.latent, values)


def count_positive(dense: Tensor) -> int:
    """How many entries are above zero."""
    return int(np.count_nonzero(_bits(dense) > 0))


def _blocks(x: Tensor, W_enc: Tensor, bias: Tensor, screen: Screen) -> Iterator[Tensor]:
    """Pre-activations of a few rows at a time; the product runs over more of them, into one buffer."""
    dtype = torch.bfloat16 if screen else torch.float32
    x, W_enc, bias = x.to(dtype), W_enc.to(dtype), bias.to(dtype)
    at_once = max(CHUNK, BUFFER // len(W_enc))
    buffer = torch.empty(min(at_once, len(x)), len(W_enc), dtype=dtype)
    for part in x.split(at_once):
        whole = buffer[: len(part)]
        torch.addmm(bias, part, W_enc.T, out=whole)
        yield from whole.split(CHUNK)


def _bits(block: Tensor) -> np.ndarray:
    """The block as whole numbers, for numpy, which compares and searches several times faster than torch."""
    return block.view(torch.int16 if block.dtype == torch.bfloat16 else torch.int32).numpy()


def _collect(mask: np.ndarray, found: list[Tensor], counts: list[Tensor]) -> None:
    flat = torch.from_numpy(np.flatnonzero(mask))
    width = mask.shape[1]
    counts.append(torch.bincount(flat // width, minlength=len(mask)))
    found.append(flat % width)


def _starts(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _csr(pairs: Pairs, values: Tensor) -> Tensor:
    shape = (pairs.n_rows, pairs.width)
    return torch.sparse_csr_tensor(pairs.start, pairs.latent, values, shape, check_invariants=False)


with warnings.catch_warnings():  # torch says once that these tensors are in beta: here, unheard
    warnings.simplefilter("ignore")
    _csr(Pairs(torch.tensor([0, 1]), torch.tensor([0]), 1), torch.ones(1))
