"""The definitions of 09_patchscopes_entities against slow, obvious versions."""

from __future__ import annotations

import re
import tomllib

import numpy as np
import pandas as pd
import pytest
from rouge_score.rouge_scorer import RougeScorer

from interp_utils.paths import data_folder
from tests.notebooks.definitions import definitions

STEM = "09_patchscopes_entities"
WORDS = tomllib.loads((data_folder() / "word_lists" / "entity_categories.toml").read_text("utf-8"))
ENTITIES = pd.read_csv(data_folder() / "facts" / "entities.csv").assign(
    tokens=lambda table: table.tokens_gemma, other=lambda table: np.roll(table.index, 3)
)
scoring = definitions(
    STEM, "EXAMPLES", "PLACEHOLDERS", "NEXT_ITEM", "CATEGORY", "PROMPT_TEXT", "scorer", "trigrams", "read", "rouge",
    "score", "target_prompt", "crossing", "by_entity", "first_layers", "slope",
    re=re, pd=pd, np=np, words=WORDS, RougeScorer=RougeScorer, entities=ENTITIES,
)  # fmt: skip


def test_the_prompt_is_the_papers_and_ends_in_the_placeholder() -> None:
    assert scoring.target_prompt("x") == (
        "Syria: Country in the Middle East, Leonardo DiCaprio: American actor, Samsung: South Korean "
        "multinational major appliance and consumer electronics corporation, x"
    )
    assert len(scoring.PLACEHOLDERS) >= 3


@pytest.mark.parametrize(
    ("text", "description", "contaminated"),
    [
        (": English soul singer, Madonna: American singer", "English soul singer", False),
        (": British actor, singer, and TV presenter, David Beckham: x", "British actor, singer, and TV presenter", False),
        (", Samsung: South Korean multinational major appliance, Sony: Japanese",
         "South Korean multinational major appliance", True),
        (": Country in the Middle East", "Country in the Middle East", True),
        (": Country in the north", "Country in the north", True),  # "country in the" is three running words
        (": South Korean singer", "South Korean singer", False),  # two are not
        (": American actor\nSyria: Country", "American actor", False),  # what the models say of anybody
        (" and the rest", "and the rest", False),
        ("", "", False),
    ],
)  # fmt: skip
def test_read(text: str, description: str, contaminated: bool) -> None:
    assert scoring.read(text) == (description, contaminated)


def lcs(a: list[str], b: list[str]) -> int:
    """Longest common subsequence, by definition."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + lcs(a[1:], b[1:])
    return max(lcs(a[1:], b), lcs(a, b[1:]))


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("English soul singer", "English pop singer"),
        ("River in Bosnia", "city in Norway"),
        ("Dutch poet", ""),
    ],
)
def test_rouge_is_the_f_of_the_longest_common_subsequence(reference: str, text: str) -> None:
    a, b = reference.lower().split(), text.lower().split()
    common = lcs(a, b)
    expected = 2 * common / (len(a) + len(b)) if common else 0.0
    assert scoring.rouge(reference, text) == pytest.approx(expected)


def test_score_uses_own_and_exchanged_description_and_category() -> None:
    name, other = ENTITIES.name[10], ENTITIES.loc[ENTITIES.other[10]]
    own = ENTITIES.iloc[10]
    cells = pd.DataFrame(
        {"name": [name, name], "layer": [0, 1], "text": [f": {own.description}", f": {other.description}"]}
    )
    scored = scoring.score(cells)
    assert list(scored.rouge == 1) == [True, own.description == other.description]
    assert scored.rouge_other[1] == 1
    assert bool(scored.names[0]) and bool(scored.names_other[1])


def test_every_description_names_its_own_category_and_no_other() -> None:
    for entity in ENTITIES.itertuples():
        named = [c for c, pattern in scoring.CATEGORY.items() if pattern.search(entity.description)]
        assert entity.category in named, entity.name


def test_crossing_keeps_each_cell_once() -> None:
    cells = scoring.crossing(["a", "b"], [0, 1, 2], ["entity", "random"], ["same", "first"])
    assert not cells.duplicated().any()
    assert len(cells) == 3 * 2 * 2 * (3 + 2)
    assert not ((cells["into"] == "first") & (cells.layer == 0)).any()


def test_by_entity_averages_the_chosen_layers_only() -> None:
    cells = pd.DataFrame(
        {"name": ["a"] * 4 + ["b"] * 4, "pair": 0, "known": [1] * 4 + [0] * 4, "layer": [0, 0, 1, 2] * 2}
    )
    value = pd.Series([1.0, 3.0, 5.0, 100.0, 0.0, 0.0, 0.0, 7.0])
    means = scoring.by_entity(cells, value, [0, 1])
    assert means[(0, 1, "a")] == pytest.approx(3.0) and means[(0, 0, "b")] == 0


def test_first_layers_leaves_out_names_that_never_resolve() -> None:
    names = list(ENTITIES.name[:3])
    rows = [(n, p, layer) for n in names for p in "x?" for layer in range(4)]
    cells = pd.DataFrame(rows, columns=["name", "placeholder", "layer"])
    cells["names"] = [
        (n == names[0] and layer >= 2) or (n == names[1] and p == "x" and layer == 3) for n, p, layer in rows
    ]
    first = scoring.first_layers(cells, "names")
    assert first.layer.to_dict() == {names[0]: 2.0, names[1]: 3.0}
    assert list(first.columns) == ["tokens", "layer"]


def test_slope_is_least_squares_and_zero_without_spread() -> None:
    rng = np.random.default_rng(1)
    rows = rng.uniform(0, 9, (20, 2))
    assert scoring.slope(rows) == pytest.approx(np.polyfit(rows[:, 0], rows[:, 1], 1)[0])
    assert scoring.slope(np.array([[2.0, 1.0], [2.0, 5.0]])) == pytest.approx(0)
