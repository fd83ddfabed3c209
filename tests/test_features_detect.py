"""Detectors are chosen and counted as plain loops would; presence is held-out F1 against exchanged labels."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from interp_utils.features import detect
from interp_utils.features.presence import STEPS, list_presence

ROWS, UNITS, CONCEPTS = 300, 14, 3
rng = np.random.default_rng(0)


def f1_of(on: np.ndarray, flags: np.ndarray) -> float:
    return 2 * (on & flags).sum() / max(on.sum() + flags.sum(), 1)


@pytest.fixture
def values() -> np.ndarray:
    own = rng.normal(size=(ROWS, UNITS)).clip(0).astype(np.float32)
    own[:, 5] = 0  # never fires
    return own


@pytest.fixture
def lines() -> sparse.csc_array:
    """Three concepts, some rows that are neither in nor out, and the line of ones."""
    flags = (rng.random((CONCEPTS, ROWS)) < 0.2).astype(np.float32)
    aside = (rng.random((CONCEPTS, ROWS)) < 0.1) * (1 - flags)
    return sparse.csc_array(np.vstack([flags, aside, np.ones(ROWS)]).astype(np.float32))


def slow_best(values: np.ndarray, levels: np.ndarray, lines: sparse.csc_array, i: int) -> float:
    flags, kept = lines.toarray()[i] > 0, lines.toarray()[CONCEPTS + i] == 0
    return max(
        f1_of((values[:, unit] > level[unit]) & kept, flags)
        for level in levels
        for unit in range(values.shape[1])
    )


def test_latents_are_chosen_as_by_loops(values: np.ndarray, lines: sparse.csc_array) -> None:
    chosen = detect.choose_latents(sparse.csr_array(values), lines)
    levels = detect.LEVELS[:, None] * values.max(0)
    for i in range(CONCEPTS):
        own = chosen.iloc[i]
        assert own.chosen_f1 == pytest.approx(slow_best(values, levels, lines, i))
        assert own.maximum == pytest.approx(values[:, int(own.unit)].max(), rel=1e-5)
        flags, kept = lines.toarray()[i] > 0, lines.toarray()[CONCEPTS + i] == 0
        again = f1_of((values[:, int(own.unit)] > own.level) & kept, flags)
        assert again == pytest.approx(own.chosen_f1, abs=0.02)  # the level has six digits


def test_sparse_and_dense_values_in_any_batches_count_alike(
    values: np.ndarray, lines: sparse.csc_array
) -> None:
    levels = detect.LEVELS[:, None] * values.max(0)
    whole = detect.count_firings([(slice(0, ROWS), sparse.csr_array(values))], levels, lines)
    pieces = [(slice(a, b), values[a:b]) for a, b in ((0, 100), (100, 101), (101, ROWS))]
    np.testing.assert_array_equal(whole, detect.count_firings(pieces, levels, lines))
    assert whole[3, 1, 2] == ((values[:, 2] > levels[3, 2]) & (lines.toarray()[1] > 0)).sum()


def test_streamed_units_take_either_sign(lines: sparse.csc_array) -> None:
    values = rng.normal(size=(ROWS, UNITS)).astype(np.float32)
    flags = lines.toarray()[:CONCEPTS] > 0
    values[flags[1], 4] = -5 - rng.random(flags[1].sum()).astype(
        np.float32
    )  # says yes by its negative values
    batches = [(slice(a, a + 100), torch.tensor(values[a : a + 100]).bfloat16()) for a in (0, 100, 200)]
    chosen = detect.choose_dense(iter(batches), lines, signs=(1, -1))
    assert chosen.unit[1] == UNITS + 4 and chosen.chosen_f1[1] > 0.6
    assert chosen.maximum[1] == pytest.approx(-values[:, 4].min(), rel=0.01)
    rounded = torch.tensor(values).bfloat16().float().numpy()
    both = np.hstack([rounded, -rounded])
    ordered = np.sort(rounded.T)
    levels = np.hstack([detect._quantiles(ordered, sign) for sign in (1, -1)])
    for i in range(CONCEPTS):
        assert chosen.chosen_f1[i] == pytest.approx(slow_best(both, levels, lines, i))
    assert len(detect.choose_dense(iter([(slice(0, ROWS), values)]), lines)) == CONCEPTS


@pytest.mark.parametrize("ties", [False, True])
def test_the_best_level_is_that_of_all(ties: bool) -> None:
    values = rng.normal(size=80).round(0 if ties else 9)
    flags = rng.random(80) < 0.3
    level, f1 = detect.best_level(values, flags)
    slow = max(f1_of(values > t, flags) for t in [*values, values.min() - 1])
    assert f1 == pytest.approx(slow) == f1_of(values > level, flags)


def test_own_detectors_leave_out_what_is_aside(lines: sparse.csc_array) -> None:
    values = lines.toarray()[:CONCEPTS].T + 5 * lines.toarray()[CONCEPTS : 2 * CONCEPTS].T
    chosen = detect.choose_levels(values, lines)
    assert (chosen.chosen_f1 == 1).all() and chosen.unit.tolist() == [0, 1, 2]


def test_scores_add_up_over_pieces(values: np.ndarray, lines: sparse.csc_array) -> None:
    chosen = pd.DataFrame({"unit": [0, 1, 2], "level": [0.5, 0.1, 1.0], "maximum": values[:, :3].max(0)})
    whole = detect.score(chosen, values[:, :3], lines, ROWS)
    pieces = detect.score(chosen, values[:, :3], lines, 70)
    assert pieces.chunk.max() == 4
    counts = [name for name in whole if name.startswith(("fired", "right", "tokens"))]
    np.testing.assert_array_equal(pieces.groupby("unit")[counts].sum(), whole[counts])
    flags, kept = lines.toarray()[0] > 0, lines.toarray()[CONCEPTS] == 0
    on = (values[:, 0] > 0.5) & kept
    assert (whole.fired[0], whole.right[0]) == (on.sum(), (on & flags).sum())
    on = (values[:, 0] > 0.7 * np.float64(chosen.maximum[0])) & kept
    assert whole.fired_7[0] == on.sum() and whole.right_7[0] == (on & flags).sum()


def slow_presence(values: np.ndarray, word: np.ndarray, half: np.ndarray) -> float:
    best = (0.0, 0.0)
    for latent in range(values.shape[1]):
        for step in range(STEPS):
            on = values[:, latent] > step / STEPS * values[:, latent].max()
            f1 = [f1_of(on & (half == h), word & (half == h)) for h in (0, 1)]
            best = max(best, (f1[0], f1[1]), key=lambda pair: pair[0])
    return best[1]


def test_presence_is_held_out_f1_of_the_best_latent(values: np.ndarray) -> None:
    labels = rng.choice([-2, -1, 0, 1, 2, 3], size=ROWS, p=[0.1, 0.4, 0.2, 0.2, 0.09, 0.01])
    labels[labels == 3] = -1
    labels[:1] = 3  # one mention: too few
    half = rng.integers(2, size=ROWS)
    values[labels == 1, 6] += 4
    made = list_presence(sparse.csc_array(values), labels, half, times=30)
    assert made.words.tolist() == [0, 1, 2]
    assert made.mentions.tolist() == [(labels == k).sum() for k in range(3)]
    for k in range(3):
        assert made.f1[k] == pytest.approx(slow_presence(values, labels == k, half), abs=1e-6)
    assert made.f1[1] > np.quantile(made.exchanged[:, 1], 0.95)
    assert made.exchanged.shape == (30, 3) and made.exchanged.std(axis=0).min() > 0
    again = list_presence(sparse.csc_array(values), labels, half, times=30)
    np.testing.assert_array_equal(made.exchanged, again.exchanged)


def test_exchanged_labels_are_chosen_anew(values: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of latents change nothing, and an exchange is the same count with permuted labels."""
    labels, half = rng.integers(0, 3, size=ROWS), rng.integers(2, size=ROWS)
    whole = list_presence(sparse.csc_array(values), labels, half, times=3, seed=5)
    order = np.random.default_rng(5).permutation(labels)
    for k in range(3):
        assert whole.exchanged[0, k] == pytest.approx(slow_presence(values, order == k, half), abs=1e-6)
    monkeypatch.setattr("interp_utils.features.presence.BLOCK", 4)
    pieces = list_presence(sparse.csc_array(values), labels, half, times=3, seed=5)
    np.testing.assert_allclose(pieces.f1, whole.f1)
    np.testing.assert_allclose(pieces.exchanged, whole.exchanged)


def test_a_list_without_mentions_has_nothing_to_say(values: np.ndarray) -> None:
    made = list_presence(sparse.csc_array(values), np.full(ROWS, -1), np.zeros(ROWS, int), times=2)
    assert not len(made.words) and made.exchanged.shape == (2, 0)
