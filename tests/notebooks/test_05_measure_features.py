"""The definitions of 05_measure_features against slow, obvious versions."""

from __future__ import annotations

import re
from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from torch.nn.functional import normalize

from interp_utils.dictionaries import Dictionary
from interp_utils.features.presence import list_presence
from tests.notebooks.definitions import definitions

STEM = "05_measure_features"
N, ROWS, D = 3, 120, 6
rng = np.random.default_rng(0)
FLAGS = (rng.random((N, ROWS)) < 0.3).astype(np.float32)
ASIDE = (rng.random((N, ROWS)) < 0.2) * (1 - FLAGS)
LINES = sparse.csc_array(np.vstack([FLAGS, ASIDE, np.ones(ROWS)]).astype(np.float32))
X = rng.normal(size=(ROWS, D)).astype(np.float32)
TOKENS = rng.integers(0, 9, size=ROWS)


class Store:
    token_ids = torch.tensor(TOKENS)

    def read(self, rows: slice) -> torch.Tensor:
        return torch.tensor(X[rows])


def book(*names: str, **given: Any) -> Any:
    scope = {
        "np": np, "pd": pd, "torch": torch, "re": re, "sparse": sparse, "normalize": normalize, "SEED": 0, "N": N,
        "Dictionary": Dictionary, "cache": lambda f: f, "marks": lambda *_: LINES, "rows_of": lambda *_: Store(),
        "model": SimpleNamespace(config=SimpleNamespace(vocab_size=9)), "list_presence": list_presence,
    }  # fmt: skip
    return definitions(STEM, *names, **{**scope, **given})


def f1_of(on: np.ndarray, flags: np.ndarray) -> float:
    return 2 * (on & flags).sum() / max(on.sum() + flags.sum(), 1)


def test_f1_of_every_latent_and_level() -> None:
    values = rng.normal(size=(ROWS, 4)).clip(0).astype(np.float32)
    found = book("f1_of_latents").f1_of_latents(sparse.csr_array(values), LINES.tocsr(), 1)
    for level in range(10):
        for latent in range(4):
            on = (values[:, latent] > level / 10 * values[:, latent].max()) & (ASIDE[1] == 0)
            assert found[level, latent] == pytest.approx(f1_of(on, FLAGS[1] > 0))


def test_the_difference_of_means_leaves_out_what_is_aside() -> None:
    own = book("mean_differences")
    plain, whitened = own.mean_differences("small", False), own.mean_differences("small", True)
    for i in range(N):
        inside, outside = FLAGS[i] > 0, (FLAGS[i] == 0) & (ASIDE[i] == 0)
        slow = X[inside].mean(0) - X[outside].mean(0)
        np.testing.assert_allclose(plain[i], slow, atol=1e-5)
        spread = np.cov(X.T, bias=True) + 1e-3 * np.eye(D)
        np.testing.assert_allclose(spread @ whitened[i], slow, atol=1e-4)


def test_the_share_of_a_token_and_the_best_one() -> None:
    share, best = book("token_shares").token_shares("small")
    for i in range(N):
        kept = ASIDE[i] == 0
        f1 = [f1_of((token == TOKENS) & kept, FLAGS[i] > 0) for token in range(9)]
        assert f1[best[i]] == pytest.approx(max(f1))
        for token in range(9):
            inside = ((token == TOKENS) & (FLAGS[i] > 0)).sum()
            assert share[i, token] == pytest.approx(inside / (((token == TOKENS) & kept).sum() + 1))


def test_token_entropy_in_bits() -> None:
    acts = np.zeros((ROWS, 2), np.float32)
    acts[:8, 0] = 1.0
    acts[8:20, 0] = 0.4  # below half of the maximum
    store = SimpleNamespace(token_ids=torch.tensor([1, 1, 2, 2, 3, 3, 4, 4] + [5] * (ROWS - 8)))
    given = {"activations": lambda *_: sparse.csr_array(acts), "rows_of": lambda *_: store}
    chosen = pd.DataFrame({"unit": [0, 1], "maximum": [1.0, 1.0]})
    assert book("entropies", **given).entropies(chosen, "trained", "small") == [2.0, 0.0]


def test_results_add_up_and_drop_rare_concepts() -> None:
    rows = []
    for detector in ("latent", "neuron"):
        for concept, tokens in (("often", 30), ("rare", 2)):
            for chunk in (0, 1):
                own = {"size": "small", "detector": detector, "concept": concept, "chunk": chunk, "unit": 7}
                own |= {
                    "maximum": 1.0,
                    "entropy": 0.0,
                    "chosen_on": 50,
                    "tokens": tokens,
                    "fired": 40,
                    "right": 20,
                }
                own |= {f"fired_{k}": 10 - k for k in range(10)} | {f"right_{k}": 8 - k for k in range(10)}
                rows.append(own | {"fired_9": 0, "right_9": 0})
    given = {"CATEGORY": {"often": "a", "rare": "b"}}
    found = book("results", **given).results(pd.DataFrame(rows), "small")
    assert set(found.concept) == {"often"} and len(found) == 2
    one = found.iloc[0]
    assert one.f1 == pytest.approx(2 * 40 / (80 + 60)) and one.category == "a"
    assert one.precision_5 == pytest.approx(3 / 5) and one.recall_5 == pytest.approx(6 / 60)
    assert np.isnan(one.precision_9)


def test_correlations_over_batches() -> None:
    values, y = rng.normal(size=(ROWS, 3)), rng.normal(size=(ROWS, 5)).astype(np.float32)
    batches = [(slice(0, 50), torch.tensor(y[:50])), (slice(50, ROWS), torch.tensor(y[50:]))]
    r, which = book("strongest").strongest(values, batches)
    slow = np.abs(np.corrcoef(values.T, y.T)[:3, 3:])
    np.testing.assert_allclose(r, slow.max(1), rtol=1e-4)
    np.testing.assert_array_equal(which, slow.argmax(1))


def test_children_point_alike_and_fire_with_their_parent() -> None:
    narrow, wide = (Dictionary.create("batchtopk", D, width, k=2, seed=1) for width in (2, 4))
    narrow.W_dec.data = torch.eye(D)[:2]
    wide.W_dec.data = normalize(torch.eye(D)[[0, 0, 0, 3]] + 0.1 * torch.eye(D)[[1, 4, 5, 4]])
    for own in (narrow, wide):
        own.requires_grad_(False)
    acts = sparse.csr_array(np.array([[1, 0], [1, 0], [0, 1], [0, 0]], np.float32))
    # the second fires mostly without its parent, the third never, the fourth points elsewhere
    wide_acts = sparse.csr_array(
        np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 1, 0, 0], [1, 1, 0, 0]], np.float32)
    )
    children = book("children").children
    assert children(narrow, wide, acts, wide_acts).tolist() == [1, 0]
    turn = np.roll(np.eye(D, dtype=np.float32), 1, axis=0)
    assert children(narrow, wide, acts, wide_acts, turn).tolist()[0] == 0


def test_the_logistic_fit_finds_the_curve() -> None:
    at = np.linspace(-3, 3, 4000)
    present = rng.random(4000) < 1 / (1 + np.exp(-2.0 * (at + 0.5)))
    slope, middle = book("logistic").logistic(pd.DataFrame({"at": at, "present": present}))
    assert slope == pytest.approx(2.0, abs=0.2) and middle == pytest.approx(-0.5, abs=0.1)
    slope, middle = book("logistic").logistic(pd.DataFrame({"at": at, "present": True}))
    assert np.isfinite([slope, middle]).all()


def test_the_open_presence_is_the_packages() -> None:
    values = rng.normal(size=(ROWS, 4)).clip(0).astype(np.float32)
    labels, half = rng.integers(-1, 3, size=ROWS), rng.integers(2, size=ROWS)
    made = list_presence(sparse.csc_array(values), labels, half, times=1)
    for k in range(3):
        own = book("word_f1").word_f1(sparse.csc_array(values), labels, half, k)
        assert own == pytest.approx(made.f1[k], abs=1e-6)


def test_ratings() -> None:
    items = pd.DataFrame({"answer": [3, 3, 0, 0], "x": [2.0, 1.0, 1.0, 0.0]})
    assert book("auroc").auroc(items, "x") == pytest.approx((3 + 0.5) / 4)
    Context = namedtuple("Context", "row before token after")
    seen = [Context(0, "a Country ", "x", ""), Context(1, "a ", "city", "")]
    assert book("word_rival").word_rival(seen, "any country").tolist() == [1.0, 0.0]
    flags = np.zeros((1, 40))
    flags[0, [3, 30]] = 1
    text = np.array([0] * 20 + [1] * 5 + [2] * 15)
    given = {"held_lines": sparse.csr_array(flags), "text_of_row": text, "CONCEPTS": ["c"]}
    own = [Context(row, "", "", "") for row in (3, 7, 15, 22, 26, 30)]
    assert book("by_rule", **given).by_rule(own, "c").tolist() == [3, 2, 1, 0, 2, 3]
