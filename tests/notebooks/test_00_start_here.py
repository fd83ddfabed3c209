"""The definitions of 00_start_here against slow, obvious versions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.notebooks.definitions import definitions

book = definitions("00_start_here", "growth", "settles", "TEMPLATES", "COUNTRIES", np=np)


@pytest.mark.parametrize(
    ("top", "answer", "layer"),
    [
        ([1, 2, 3, 7, 7], 7, 3),
        ([7, 7, 7, 7, 7], 7, 0),
        ([7, 7, 1, 7, 7], 7, 3),  # on top early, lost again
        ([1, 1, 1, 1, 7], 7, 4),
        ([1, 1, 1, 1, 2], 7, 4),  # never
        ([7, 7, 7, 7, 2], 7, 4),  # lost at the end
    ],
)
def test_settles_is_the_start_of_the_last_run(top: list[int], answer: int, layer: int) -> None:
    slow = next((i for i in range(len(top)) if all(t == answer for t in top[i:])), len(top) - 1)
    assert slow == layer
    assert book.settles(np.array(top), answer) == layer / (len(top) - 1)


def test_growth_finds_a_planted_factor_and_ignores_one_odd_prompt() -> None:
    rows = np.array([[3 * 1.1**layer for layer in range(12)]] * 5)
    rows[0] *= 1e6
    assert math.isclose(book.growth(rows), 1.1, rel_tol=1e-9)


def test_growth_equals_the_normal_equations() -> None:
    rows = np.random.default_rng(0).uniform(1, 9, (7, 10))
    y = [math.log(sorted(rows[:, layer])[3]) for layer in range(10)]
    mean_x, mean_y = 4.5, sum(y) / 10
    slope = sum((x - mean_x) * (v - mean_y) for x, v in enumerate(y)) / sum(
        (x - mean_x) ** 2 for x in range(10)
    )
    assert math.isclose(book.growth(rows), math.exp(slope), rel_tol=1e-9)


def test_prompts_are_as_many_as_the_text_says() -> None:
    assert len(book.TEMPLATES) * len(book.COUNTRIES) == 24
    assert len({t.format(c) for t in book.TEMPLATES for c in book.COUNTRIES}) == 24
