"""The definitions of 03_sae_scaling_laws against slow, obvious versions and planted laws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from interp_utils.dictionaries import Dictionary, TrainConfig, train
from tests.notebooks.definitions import definitions

STEM = "03_sae_scaling_laws"
CONSTANTS = ("WIDTHS", "STEPS", "FIRST", "SEEDS", "BATCH", "BLOCK", "HELD_OUT", "LAMBDA", "RATE", "RATES")


def book(*names: str, **given: Any) -> Any:
    scope = {
        "np": np, "pd": pd, "torch": torch, "Dictionary": Dictionary, "TrainConfig": TrainConfig, "train": train,
        "SEED": 0,
    }  # fmt: skip
    return definitions(STEM, *CONSTANTS, *names, **{**scope, **given})


def law(a: float, b: float) -> pd.DataFrame:
    own = book("planted")
    return own.planted(a, b, noise=0.0)


@pytest.mark.parametrize(("a", "b"), [(0.25, 0.25), (0.2, 0.3), (0.35, 0.2)])
def test_planted_exponents_come_back(a: float, b: float) -> None:
    own = book("best_splits", "exponents")
    found = own.exponents(own.best_splits(law(a, b)))
    truth = {"loss": a * b / (a + b), "width": b / (a + b), "steps": a / (a + b), "curvature": 0.0}
    assert found == pytest.approx(truth, abs=0.03)


def test_the_two_shares_of_compute_sum_to_one() -> None:
    own = book("best_splits", "exponents")
    found = own.exponents(own.best_splits(law(0.3, 0.2)))
    assert found["width"] + found["steps"] == pytest.approx(1)


def test_an_optimum_at_the_edge_is_not_believed() -> None:
    own = book("best_splits")
    best = own.best_splits(law(0.0, 0.3))  # width does not help: the narrowest wins everywhere
    assert best.width.isna().all() and best.loss.notna().all()


def test_bootstrap_without_noise_varies_only_with_the_lines() -> None:
    own = book("best_splits", "exponents", "bootstrap")
    spread = own.bootstrap(law(0.25, 0.25), n=20)
    assert len(spread) == 20 and spread.width.std() < 0.02


def test_the_loss_is_the_papers() -> None:
    own = book("paper_loss")
    sae = Dictionary.create("relu", 6, 9, seed=1).requires_grad_(False)
    sae.W_dec.data *= torch.arange(1, 10)[:, None]
    x = torch.randn(5, 6)
    total = mse = active = 0.0
    for row in x:
        acts = [max(float(sae.W_enc[i] @ row + sae.b_enc[i]), 0.0) for i in range(9)]
        x_hat = sae.b_dec + sum(acts[i] * sae.W_dec[i] for i in range(9))
        error = float((row - x_hat).square().sum())
        mse += error / 5
        total += (error + own.LAMBDA * sum(acts[i] * float(sae.W_dec[i].norm()) for i in range(9))) / 5
        active += sum(a > 0 for a in acts) / 5
    found = own.paper_loss(sae, x)
    assert found == pytest.approx({"loss": total, "mse": mse, "l0": active}, rel=1e-5)


def test_batches_go_block_by_block_and_start_anywhere() -> None:
    class Store:
        """29 rows that are their own numbers: three blocks and a rest that is left out."""

        def __len__(self) -> int:
            return 29

        def read(self, rows: torch.Tensor, normalised: bool) -> torch.Tensor:
            assert not normalised
            return rows[:, None].float()

    own = definitions(STEM, "Rows", np=np, torch=torch, BLOCK=8, BATCH=4)
    rows = object.__new__(own.Rows)
    rows.store, rows.mean, rows.scale = Store(), 0.0, 1.0
    whole = torch.cat(list(rows.batches(0, seed=3)))[:, 0]
    for block in range(3):
        assert sorted(whole[8 * block : 8 * block + 8].tolist()) == list(range(8 * block, 8 * block + 8))
    for start in range(6):
        assert torch.equal(torch.cat(list(rows.batches(start, seed=3)))[:, 0], whole[4 * start :])


def test_a_parabola_finds_the_best_rate() -> None:
    own = book("best_rates", "rate_exponent")
    runs = [
        {"width": w, "steps": 64, "rate": rate, "loss": 10 ** (np.log2(rate / best) ** 2 / 50), "seed": 0}
        for w, best in [(64, 2e-3), (1024, 1e-3)]
        for rate in own.RATES
    ]
    found = own.best_rates(pd.DataFrame(runs))
    assert found.rate.to_list() == pytest.approx([2e-3, 1e-3], rel=1e-6)
    assert own.rate_exponent(pd.DataFrame(runs)) == pytest.approx(-np.log10(2) / np.log10(16))
