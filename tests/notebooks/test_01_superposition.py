"""The definitions of 01_superposition against slow, obvious versions."""

from __future__ import annotations

from collections import namedtuple
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import bootstrap, ttest_1samp
from scipy.stats import t as student_t
from torch.nn.functional import normalize

from interp_utils.dictionaries import Dictionary, TrainConfig, train
from interp_utils.dictionaries.metrics import evaluate
from tests.notebooks.definitions import definitions

STEM = "01_superposition"
D, N = 8, 12


def book(*names: str, **given: Any) -> Any:
    scope = {
        "np": np, "pd": pd, "torch": torch, "namedtuple": namedtuple, "deepcopy": deepcopy, "replace": replace,
        "lru_cache": lru_cache, "linear_sum_assignment": linear_sum_assignment, "student_t": student_t,
        "normalize": normalize, "Dictionary": Dictionary, "train": train, "D_MODEL": D, "N_FEATURES": N,
        "ROWS": 4096, "HELD_OUT": 1024, "SEED": 0, "L1": 1.0,
        "config": TrainConfig(60, 128, lr=3e-3, l1=1.0, screen=None),
    }  # fmt: skip
    return definitions(STEM, *names, **{**scope, **given})


PLANT = ("Planted", "TRUTH", "unit_rows", "coefficients", "frequencies", "plant")
MATCH = ("match", "detection", "by_feature", "explained")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_directions_and_strengths_are_what_the_text_says() -> None:
    own = book("unit_rows", "coefficients")
    assert torch.allclose(own.unit_rows(50, 7, rng()).norm(dim=1), torch.ones(50))
    p = torch.tensor([0.0, 0.1, 0.5, 1.0])
    f = own.coefficients(p, 20_000, rng())
    assert f.min() >= 0 and f.max() < 1
    torch.testing.assert_close((f > 0).float().mean(0), p, atol=0.02, rtol=0)
    for column in (1, 2, 3):
        assert float(f[:, column][f[:, column] > 0].mean()) == pytest.approx(0.5, abs=0.03)


def test_reading_error_follows_the_number_present() -> None:
    own = book("unit_rows", "coefficients", "reading_error")
    for stored in (32, 128):
        assert own.reading_error(stored, 4) == pytest.approx((4 / 3 / D) ** 0.5, rel=0.1)


def test_toy_output_is_the_formula_for_every_model() -> None:
    own = book("toy_output")
    W, b = torch.randn(3, 2, 5, generator=rng()), torch.randn(3, 1, 5, generator=rng(1))
    x = torch.rand(3, 4, 5, generator=rng(2))
    for relu in (True, False):
        out = own.toy_output(W, b, x, relu)
        for m in range(3):
            for r in range(4):
                expected = W[m].T @ (W[m] @ x[m, r]) + b[m, 0]
                torch.testing.assert_close(out[m, r], expected.relu() if relu else expected)


def test_train_toy_trains_each_model_as_if_alone_and_repeatably() -> None:
    own = book("toy_output", "train_toy")
    importance = 0.8 ** torch.arange(4.0)[None]
    W, b, loss = own.train_toy(torch.tensor([0.3, 0.3]), importance, 2, steps=40, rows=32)
    again = own.train_toy(torch.tensor([0.3, 0.3]), importance, 2, steps=40, rows=32)
    assert torch.equal(W, again[0]) and torch.equal(loss, again[2])
    # by hand: the first model, the same numbers, one parameter set
    generator = rng()
    mine = (torch.randn(2, 2, 4, generator=generator) * (2 / 6) ** 0.5)[0].requires_grad_()
    bias = torch.zeros(4, requires_grad=True)
    adam = torch.optim.Adam([mine, bias], lr=0.01)
    for step in range(40):
        adam.param_groups[0]["lr"] = 0.01 * min(1, 2 * (1 - step / 40))
        strength, chance = torch.rand(2, 32, 4, generator=generator)
        x = torch.where(chance < 0.3, strength, torch.zeros(()))
        error = (x - torch.relu(x @ mine.T @ mine + bias)) ** 2
        adam.zero_grad()
        (error.mean(0) * importance[0]).sum().backward()
        adam.step()
    torch.testing.assert_close(W[0], mine.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(b[0, 0], bias.detach(), rtol=1e-3, atol=1e-5)


def test_a_dense_linear_toy_keeps_the_most_important() -> None:
    own = book("toy_output", "train_toy")
    importance = 0.6 ** torch.arange(5.0)[None]
    W, _, loss = own.train_toy(torch.ones(2), importance, 2, relu=False, steps=2500, rows=64)
    squared = W.square().sum(1)
    assert (squared[:, :2] > 0.9).all() and (squared[:, 2:] < 0.1).all()
    assert float(loss.mean()) == pytest.approx(float(importance[0, 2:].sum()) / 12, rel=0.1)


def test_seed_interval_is_the_t_interval() -> None:
    own = book("seed_interval")
    values = [0.2, 0.5, 0.4, 0.9]
    mean, (low, high) = own.seed_interval(values)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean == pytest.approx(0.5)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert own.seed_interval([1.0, 1.0, 1.0]) == (1.0, (1.0, 1.0))
    spread = bootstrap((values,), np.mean, random_state=0).confidence_interval
    assert low < spread.low and high > spread.high  # wider, as few seeds ask for


def test_frequencies_fall_by_a_percent_and_sum_to_the_number_present() -> None:
    p = book("frequencies").frequencies(256, 5)
    assert float(p.sum()) == pytest.approx(5, rel=1e-5)
    torch.testing.assert_close(p[1:] / p[:-1], torch.full((255,), 0.99))
    assert 12 < p[0] / p[-1] < 14
    assert float(book("frequencies").frequencies(256, 40)[0]) < 1


def test_planted_samples_are_scaled_sums_of_the_directions() -> None:
    own = book(*PLANT)
    data = own.plant(3, 0)
    assert data.x.shape == (4096, D) and data.held_out.shape == (1024, D)
    assert data.directions.shape == (N, D) and data.strength.shape == (1024, N)
    assert float(data.x.square().sum(1).mean()) == pytest.approx(D, rel=1e-4)
    assert data.x.mean(0).abs().max() < 1e-4
    # held-out rows are the same affine map of f G: what remains after fitting scale and shift is nothing
    pure = data.strength @ data.directions
    moved, plain = data.held_out - data.held_out[0], pure - pure[0]
    scale = float((moved * plain).sum() / plain.square().sum())
    torch.testing.assert_close(moved, scale * plain, rtol=1e-4, atol=1e-4)


def test_the_truth_is_not_the_start_of_any_dictionary() -> None:
    own = book(*PLANT, *MATCH)
    for seed in range(3):
        truth = own.plant(3, seed).directions
        for other in range(3):
            start = Dictionary.create("relu", D, N, seed=other).W_dec.detach()
            assert own.match(start, truth)[1].max() < 0.999
            assert not torch.allclose(normalize(start), truth, atol=0.1)


def test_sae_loss_is_the_papers_sum() -> None:
    own = book("unit_rows", "sae_loss", "new_sae")
    sae = own.new_sae(D, N, rng())
    assert torch.equal(sae["W_enc"], sae["W_dec"]) and sae["W_dec"].norm(dim=1).allclose(torch.tensor(0.1))
    weights = {name: torch.randn(w.shape, generator=rng(i)) for i, (name, w) in enumerate(sae.items())}
    x = torch.randn(5, D, generator=rng(9))
    total = 0.0
    for row in x:
        f = [max(0.0, float(weights["W_enc"][i] @ row + weights["b_enc"][i])) for i in range(N)]
        x_hat = sum(f[i] * weights["W_dec"][i] for i in range(N)) + weights["b_dec"]
        price = sum(f[i] * float(weights["W_dec"][i].norm()) for i in range(N))
        total += float(((row - x_hat) ** 2).sum()) + 0.7 * price
    assert float(own.sae_loss(x, **weights, l1=0.7)) == pytest.approx(total / 5, rel=1e-5)
    # shrinking activations and stretching the decoder gains nothing
    cheat = {**weights, "W_enc": weights["W_enc"] / 3, "b_enc": weights["b_enc"] / 3}
    cheat["W_dec"] = 3 * weights["W_dec"]
    assert float(own.sae_loss(x, **cheat, l1=0.7)) == pytest.approx(total / 5, rel=1e-5)


def test_train_sae_equals_the_package() -> None:
    own = book("unit_rows", "sae_loss", "new_sae", "train_sae")
    batches = list(torch.randn(25 * 64, D, generator=rng(3)).split(64))
    mine = own.new_sae(D, N, rng(1))
    theirs = Dictionary.create("relu", D, N, seed=5)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.copy_(mine[name])
    losses = own.train_sae(mine, batches, 0.5, 3e-3)
    plan = TrainConfig(25, 64, lr=3e-3, l1=0.5, l1_warmup=0, decay=0, log_every=1, screen=None)
    log = train(theirs, lambda start: iter(batches[start:]), plan, progress=False)
    np.testing.assert_allclose(log.loss, losses, rtol=1e-4)
    for name, weight in theirs.named_parameters():
        torch.testing.assert_close(weight.detach(), mine[name].detach(), rtol=1e-3, atol=1e-5)


def test_match_is_the_best_of_all_pairings() -> None:
    own = book(*MATCH)
    truth = normalize(torch.randn(5, D, generator=rng(4)))
    rows = torch.randn(5, D, generator=rng(5)) * torch.tensor([0.1, 1, 2, 3, 4])[:, None]
    cosine = normalize(rows) @ truth.T
    best = max(sum(float(cosine[p[i], i]) for i in range(5)) for p in permutations(range(5)))
    owner, found = own.match(rows, truth)
    assert sorted(owner.tolist()) == list(range(5)) and float(found.sum()) == pytest.approx(best, rel=1e-5)
    for feature in range(5):
        assert found[feature] == pytest.approx(float(cosine[owner[feature], feature]), rel=1e-5)
    owner, found = own.match(rows[:3], truth)  # too few latents
    assert sorted(owner.tolist())[:2] == [-1, -1] and (found[owner < 0] == 0).all()
    assert sorted(owner[owner >= 0].tolist()) == [0, 1, 2]


def test_detection_counts_by_hand() -> None:
    own = book(*MATCH)
    generator = np.random.default_rng(0)
    fires, there = generator.random((40, 6)) < 0.3, generator.random((40, 6)) < 0.4
    fires[:, 0] = False
    there[:, 1] = False
    scores = own.detection(torch.tensor(fires), torch.tensor(there))
    for i in range(6):
        hit = sum(fires[r, i] and there[r, i] for r in range(40))
        precision = hit / fires[:, i].sum() if fires[:, i].any() else 0
        recall = hit / there[:, i].sum() if there[:, i].any() else 0
        f1 = 2 * precision * recall / (precision + recall) if hit else 0
        assert scores.iloc[i].tolist() == pytest.approx([precision, recall, f1], abs=1e-6)


def test_by_feature_follows_a_permutation_and_gives_nothing_for_missing_latents() -> None:
    own = book(*PLANT, *MATCH)
    data = own.plant(3, 1)
    order, there = torch.randperm(N, generator=rng()), data.strength > 0
    perfect = own.by_feature(data.directions[order], there[:, order], data)
    assert perfect.recovered.all() and perfect[["precision", "recall", "f1"]].to_numpy().min() > 0.999
    half = own.by_feature(data.directions[order][: N // 2], there[:, order][:, : N // 2], data)
    missing = ~np.isin(np.arange(N), order[: N // 2].numpy())
    assert (half.f1[missing] == 0).all() and half.recovered.sum() == N // 2
    assert (half.f1[~missing] > 0.999).all()


def test_pca_rows_are_components_of_both_signs_that_fire_as_often_as_their_feature() -> None:
    own = book(*PLANT, *MATCH, "pca", "measure_pca")
    data = own.plant(3, 2)
    rows, scores = own.pca(data)
    torch.testing.assert_close(rows[::2], -rows[1::2])
    torch.testing.assert_close(rows[::2] @ rows[::2].T, torch.eye(D), rtol=0, atol=1e-4)
    variance = (data.x @ rows[::2].T).var(0)
    assert (variance[:-1] >= variance[1:] - 1e-3).all()
    torch.testing.assert_close(scores, data.held_out @ rows.T)
    found, whole = own.measure_pca(data)
    matched = own.match(rows, data.directions)[0].numpy() >= 0
    gap = (found.precision - found.recall)[matched].abs()
    assert gap.max() < 1e-6  # as often as present: the two are equal
    three = np.linalg.eigh(np.cov(data.x.numpy().T))[1][:, -3:]  # the largest come last
    x = data.held_out.numpy()
    expected = own.explained(data.held_out, torch.tensor(x @ three @ three.T))
    assert whole["ev"] == pytest.approx(expected, abs=1e-4)


def test_measure_agrees_with_the_package_and_the_loss_in_the_open() -> None:
    own = book(*PLANT, *MATCH, "measure", "sae_loss")
    data = own.plant(3, 0)
    sae = Dictionary.create("relu", D, N, seed=1)
    train(sae, data.x, TrainConfig(40, 128, lr=5e-3, l1=1.0), progress=False)
    found, whole = own.measure(sae, data)
    packaged = evaluate(sae, data.held_out)
    assert whole["ev"] == pytest.approx(packaged.explained_variance, abs=1e-4)
    assert whole["l0"] == pytest.approx(packaged.l0, rel=1e-4)
    weights = {name: weight.detach() for name, weight in sae.named_parameters()}
    assert whole["loss"] == pytest.approx(float(own.sae_loss(data.held_out, **weights, l1=1.0)), rel=1e-4)
    assert len(found) == N and found.cosine.between(-1, 1.0001).all()


def test_fit_freezes_what_it_says() -> None:
    own = book(*PLANT, "fit")
    data = own.plant(3, 0)
    frozen = own.fit("frozen", data, 0, N)["frozen"]
    start = Dictionary.create("relu", D, N, seed=0).W_dec.detach()
    torch.testing.assert_close(frozen.W_dec.detach(), normalize(start))
    assert not torch.allclose(frozen.W_enc.detach(), normalize(start), atol=1e-2)
    planted = own.fit("planted", data, 0, N)
    assert list(planted) == ["fixed", "planted"]
    torch.testing.assert_close(planted["fixed"].W_dec.detach(), data.directions)
    assert not torch.equal(planted["planted"].W_dec.detach(), data.directions)
    assert own.fit("topk", data, 0, N)["topk"].k == 3
    assert own.fit("sae", data, 0, 2 * N)["sae"].width == 2 * N
