"""The definitions of 02_train_sae against slow, obvious versions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from interp_utils.dictionaries import Dictionary
from tests.notebooks.definitions import definitions

STEM = "02_train_sae"


def book(*names: str, **given: Any) -> Any:
    scope = {
        "np": np, "pd": pd, "torch": torch, "nn": nn, "Dictionary": Dictionary, "SEED": 0, "d_model": 8,
        "linear_sum_assignment": linear_sum_assignment,
    }  # fmt: skip
    return definitions(STEM, *names, **{**scope, **given})


def sae(kind: str = "relu", width: int = 12, seed: int = 0, **options: Any) -> Dictionary:
    made = Dictionary.create(kind, 8, width, seed=seed, **options).requires_grad_(False)
    return made.set_units(torch.full((8,), 0.5), 2.0)


def test_the_loss_in_the_open_is_the_papers() -> None:
    own = book("SparseAutoencoder").SparseAutoencoder(8, 12, seed=0).requires_grad_(False)
    own.W_dec.data *= torch.arange(1, 13)[:, None]
    x, total = torch.randn(5, 8), 0.0
    for row in x:
        acts = [max(float(own.W_enc[i] @ row + own.b_enc[i]), 0.0) for i in range(12)]
        x_hat = own.b_dec + sum(acts[i] * own.W_dec[i] for i in range(12))
        total += float((row - x_hat).square().sum())
        total += 5 * sum(acts[i] * float(own.W_dec[i].norm()) for i in range(12))
    assert float(own.loss(x, 5.0)) == pytest.approx(total / 5, rel=1e-5)


def test_sums_by_document_give_the_plain_numbers() -> None:
    own, dictionary, raw = book("by_document", "summary"), sae(), torch.randn(40, 8)
    labels = pd.DataFrame({"source": ["a", "b"] * 20, "document": np.arange(40) % 6})
    sums = own.by_document(dictionary, raw, labels)
    x = (raw - 0.5) * 2
    acts = dictionary.encode(x)
    ev = 1 - (dictionary.decode(acts) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert sums.n.sum() == 40 and len(sums) == labels.drop_duplicates().shape[0]
    assert own.summary(sums) == pytest.approx({"l0": float((acts > 0).sum()) / 40, "ev": float(ev)}, rel=1e-5)


def test_refitting_is_least_squares_on_the_active_latents() -> None:
    dictionary, x = sae(), torch.randn(4, 8)
    found = book("refitted").refitted(dictionary, x)
    for row, own in zip(found, x, strict=True):
        atoms = dictionary.W_dec[dictionary.encode(own[None])[0] > 0].double().T
        values = torch.linalg.lstsq(atoms, own.double()[:, None]).solution
        torch.testing.assert_close(row.double(), (atoms @ values)[:, 0], rtol=1e-2, atol=1e-2)


def test_a_dictionary_is_its_own_partner_and_a_rotated_one_is_not() -> None:
    own, one = book("partners", "rotated"), sae("batchtopk", k=3)
    order = torch.randperm(12)
    other = sae("batchtopk", k=3)
    other.W_enc.data, other.W_dec.data = one.W_enc[order], one.W_dec[order]
    torch.testing.assert_close(
        torch.tensor(own.partners(one, other).to_numpy()), torch.ones(12, 2), check_dtype=False
    )
    turned = own.rotated(one)
    torch.testing.assert_close(turned.W_dec @ turned.W_dec.T, one.W_dec @ one.W_dec.T)
    assert own.partners(one, turned).decoder.mean() < 0.9


def test_noise_has_the_covariance_of_the_rows_and_comes_again() -> None:
    class Store:
        def read(self, rows: slice) -> torch.Tensor:
            return torch.randn(5000, 8, generator=torch.Generator().manual_seed(1)) @ mix

    mix = torch.diag(torch.arange(1.0, 9.0)) + 0.5
    batches = book("gaussian").gaussian(Store(), 20_000, seed=2)
    first = next(batches(0))
    torch.testing.assert_close(first.T.cov(), mix.T @ mix, rtol=0.15, atol=2.0)
    second = next(batches(1))
    again = batches(0)
    next(again)
    assert torch.equal(next(again), second) and not torch.equal(first, second)


def test_pca_is_the_best_subspace() -> None:
    class Store:
        def read(self, rows: slice) -> torch.Tensor:
            return data

    data = torch.randn(400, 8) @ torch.diag(torch.arange(1.0, 9.0))
    values = torch.linalg.svdvals(data - data.mean(0)).square()
    found = book("pca_ev").pca_ev(Store(), Store(), 3)
    assert found == pytest.approx(float(values[:3].sum() / values.sum()), rel=1e-4)


def test_equal_l0_interpolates_on_the_logarithm() -> None:
    rows = []
    for kind, k, l1, active, error in [
        ("relu", 0, 1, 16, 0.30), ("relu", 0, 2, 64, 0.10), ("batchtopk", 32, 0, 32, 0.15),
        ("batchtopk", 8, 0, 8, 0.5),
    ]:  # fmt: skip
        rows.append(
            {"group": "frontier", "size": "large", "kind": kind, "k": k, "l1": l1, "n": 1.0, "active": active,
             "error": error, "total": 1.0, "refitted": 1 - error}
        )  # fmt: skip
    own = book("runs_of", "summary", "curve", "at_equal_l0")
    assert own.at_equal_l0(pd.DataFrame(rows)) == pytest.approx(0.85 - 0.80)
