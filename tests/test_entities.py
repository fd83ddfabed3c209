"""The entity table of the Patchscopes notebooks keeps the promises of data/facts/README.md."""

from __future__ import annotations

import re
import tomllib

import pandas as pd
import pytest

from interp_utils.paths import data_folder

COLUMNS = ["pair", "name", "known", "category", "description", "mentions", "tokens_gemma", "tokens_smollm2"]
# Words of the target prompt's three examples: a description that held one could be scored right by copying.
PROMPT_WORDS = (
    "syria country middle east leonardo dicaprio american actor samsung south korean multinational major appliance "
    "consumer electronics corporation"
).split()


def holds(text: str, word: str) -> bool:
    """Whether `word`, or `word` with a trailing s, stands in `text` as a whole word."""
    return re.search(rf"(?<!\w){re.escape(word)}s?(?!\w)", text.casefold()) is not None


@pytest.fixture(scope="module")
def entities() -> pd.DataFrame:
    return pd.read_csv(data_folder() / "facts" / "entities.csv")


@pytest.fixture(scope="module")
def lists() -> dict[str, list[str]]:
    path = data_folder() / "word_lists" / "entity_categories.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


def test_columns_and_pairs(entities: pd.DataFrame) -> None:
    assert list(entities.columns) == COLUMNS
    assert not entities.isna().to_numpy().any()
    assert sorted(entities["pair"]) == sorted(list(range(44)) * 2)
    assert entities["name"].is_unique
    assert (entities["name"] == entities["name"].str.strip()).all()


def test_each_pair_is_matched(entities: pd.DataFrame) -> None:
    for pair, rows in entities.groupby("pair"):
        assert sorted(rows["known"]) == [0, 1], pair
        assert len(set(rows["category"])) == 1, pair
        assert len(set(rows["tokens_gemma"])) == 1, pair


def test_popularity_criterion(entities: pd.DataFrame) -> None:
    assert entities.loc[entities["known"] == 1, "mentions"].min() >= 3
    assert entities.loc[entities["known"] == 0, "mentions"].between(0, 1).all()


def test_lengths_are_spread(entities: pd.DataFrame) -> None:
    pairs = entities.drop_duplicates("pair")["tokens_gemma"].value_counts()
    assert pairs.reindex([2, 3, 4, 5], fill_value=0).min() >= 5
    assert entities["tokens_smollm2"].min() >= 1


def test_categories(entities: pd.DataFrame, lists: dict[str, list[str]]) -> None:
    assert set(entities["category"]) == set(lists)
    assert entities.drop_duplicates("pair")["category"].value_counts().min() >= 5


def test_descriptions_name_their_category(entities: pd.DataFrame, lists: dict[str, list[str]]) -> None:
    for row in entities.itertuples():
        description = str(row.description)
        assert 2 <= len(description.split()) <= 9, row.name
        assert any(holds(description, word) for word in lists[str(row.category)]), row.name
        assert not [word for word in PROMPT_WORDS if holds(description, word)], row.name


def test_names_do_not_give_the_category_away(entities: pd.DataFrame, lists: dict[str, list[str]]) -> None:
    for row in entities.itertuples():
        assert not [word for word in lists[str(row.category)] if holds(str(row.name), word)], row.name


def test_word_lists_are_disjoint(lists: dict[str, list[str]]) -> None:
    words = [word for category in lists.values() for word in category]
    assert len(words) == len(set(words))
    assert all(word == word.lower() and 1 <= len(word.split()) <= 2 for word in words)
    assert all(8 <= len(category) <= 20 for category in lists.values())
    assert not {part for word in words for part in word.split()} & set(PROMPT_WORDS)
