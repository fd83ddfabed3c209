"""The sparse kernels against dense products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from interp_utils.dictionaries import kernels
from interp_utils.dictionaries.kernels import Pairs
from interp_utils.dictionaries.parallel import Ranks
from tests.test_dictionaries import close


def problem(width: int, rows: int = 40, d: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W_enc, b_enc and their pre-activations."""
    generator = torch.Generator().manual_seed(width)
    x, W = torch.randn(rows, d, generator=generator), torch.randn(width, d, generator=generator)
    b = torch.randn(width, generator=generator) - 1
    return x, W, b, x @ W.T + b


def dense(pairs: Pairs, values: Tensor) -> Tensor:
    out = torch.zeros(pairs.n_rows, pairs.width)
    for row in range(pairs.n_rows):
        mine = slice(int(pairs.start[row]), int(pairs.start[row + 1]))
        out[row, pairs.latent[mine]] += values[mine]
    return out


@pytest.mark.parametrize("screen", [None, "bfloat16"])
@pytest.mark.parametrize("width,k", [(96, 6), (97, 6), (8, 8), (64, 10), (33_000, 5)])
def test_the_k_largest_are_found(width: int, k: int, screen: Any) -> None:
    x, W, b, pre = problem(width)
    pairs = kernels.top_candidates(x, W, b, k, screen)
    values = kernels.pair_products(pairs, x, W, b)
    chosen = kernels.largest(pairs, values, k)
    kept = torch.topk(pre, k)
    expected = torch.zeros_like(pre).scatter(1, kept.indices, kept.values.relu())
    close(dense(pairs.keep(chosen), values[chosen].relu()), expected)
    assert len(chosen) == int((kept.values > 0).sum())
    assert len(pairs.latent) < 2 * len(chosen) + 10 * len(x)


@pytest.mark.parametrize("screen", [None, "bfloat16"])
def test_all_above_a_floor_are_found(screen: Any) -> None:
    x, W, b, pre = problem(96, rows=300)
    for floor in (0.0, 1.5, torch.linspace(0, 3, 96)):
        pairs = kernels.pairs_above(x, W, b, floor, screen)
        found = dense(pairs, torch.ones(len(pairs.latent))) > 0
        assert found[pre > floor].all()
        assert (
            found.sum() == (pre > floor).sum() if screen is None else found.sum() < 1.2 * (pre > floor).sum()
        )
    kth = kernels.kth_pre_activation(x, W, b, 500, screen)
    assert kth == pytest.approx(float(pre.flatten().topk(500).values[-1]), rel=0.02 if screen else 1e-6)


def test_products_and_sums_equal_dense_ones() -> None:
    x, W, b, pre = problem(40_000, rows=30)  # wide enough for the sort by 32 bits
    pairs = kernels.pairs_above(x, W, b, 5.0)
    values = kernels.pair_products(pairs, x, W, b)
    acts = dense(pairs, values)
    close(acts, pre * (pre > 5))
    close(kernels.weighted_rows(pairs, values, W), acts @ W)
    flipped, order = kernels.transposed(pairs)
    close(kernels.by_latent(flipped, values[order], x), acts.T @ x)
    memory = torch.full_like(W, torch.nan)
    assert kernels.by_latent(flipped, values[order], x, memory) is memory and memory.isfinite().all()
    close(kernels.add_by_latent(pairs, values), acts.sum(0))


def test_a_batch_in_which_nothing_is_active_has_no_pairs() -> None:
    x, W, b, _ = problem(96)
    for screen in (None, "bfloat16"):
        pairs = kernels.top_candidates(x, W, b - 100, 6, screen)
        values = kernels.pair_products(pairs, x, W, b - 100)
        assert len(values) == len(kernels.largest(pairs, values, 6)) == 0
        assert not kernels.weighted_rows(pairs, values, W).any()
        flipped, order = kernels.transposed(pairs)
        assert not kernels.by_latent(flipped, values[order], x).any()
    assert kernels.kth_pre_activation(x, W, b - 100, 5) == 0
    assert Ranks().kth_largest(torch.zeros(0), 5) == float("inf")
    assert Ranks().kth_largest(torch.tensor([1.0, 3, 0]), 5) == 1
