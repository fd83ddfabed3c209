"""Relations load as `data/facts/README.md` promises, and a damaged table or prompt is named in one sentence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from interp_utils.errors import InterpError
from interp_utils.facts import load_relation, relation_names

NAMES = (
    "country_capital country_language country_currency country_continent country_largest_city landmark_country "
    "city_country word_opposite thing_colour thing_category product_company company_founder work_author "
    "author_country"
).split()
ONE_TO_ONE = {"country_capital", "country_largest_city", "word_opposite", "company_founder"}

PROMPTS = """
[contexts]
country = ["We flew to {}", "A map of {}"]

[capital]
title = "capital"
target = "The capital of Finland is Helsinki. The capital of x is"
paper_target = "The capital of x"
kind = "one-to-one"
contexts = "country"
"""
TABLE = "subject,answer\nFrance,Paris\nChad,N'Djamena\n"

Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    def write(prompts: str = PROMPTS, table: str | None = TABLE) -> Path:
        (tmp_path / "relations").mkdir()
        (tmp_path / "relations.toml").write_text(prompts, encoding="utf-8")
        if table is not None:
            (tmp_path / "relations" / "capital.csv").write_text(table, encoding="utf-8")
        return tmp_path

    return write


def test_all_relations_are_there() -> None:
    assert relation_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_relation(name: str) -> None:
    relation = load_relation(name)
    table = relation.table
    assert len(table) >= 60
    assert table["subject"].is_unique
    assert (table != "").all(axis=None)
    assert not table.apply(lambda column: column.str.contains(r"^\s|\s$|\s\s|,")).any(axis=None)
    assert relation.answers == sorted(set(table["answer"]))
    assert len(relation.contexts) == 5
    assert relation.paper_target.endswith(" x")
    assert (relation.kind == "one-to-one") == (name in ONE_TO_ONE)
    assert (len(relation.answers) == len(table)) == (relation.kind == "one-to-one")


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_names_a_subject(name: str) -> None:
    relation = load_relation(name)
    texts = [relation.target, relation.paper_target, *relation.contexts]
    for subject in relation.table["subject"]:
        word = re.compile(rf"(?<!\w){re.escape(subject)}(?!\w)")
        assert not [text for text in texts if word.search(text)], subject


@pytest.mark.parametrize("name", NAMES)
def test_contexts_do_not_give_an_answer(name: str) -> None:
    relation = load_relation(name)
    for row in relation.table.itertuples():
        word = re.compile(rf"(?<!\w){re.escape(str(row.answer))}(?!\w)", re.IGNORECASE)
        told = [context for context in relation.contexts if word.search(context)]
        assert len(told) <= (row.subject == "first"), told  # "The last word of the poem is first"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ONE_TO_ONE])
def test_enough_subjects_in_large_classes(name: str) -> None:
    counts = Counter(load_relation(name).table["answer"])
    assert sum(count for count in counts.values() if count >= 3) >= 45


def test_relations_compose() -> None:
    def answers(name: str) -> set[str]:
        return set(load_relation(name).answers)

    def subjects(name: str) -> set[str]:
        return set(load_relation(name).table["subject"])

    for hop in ("country_capital", "country_currency", "country_language", "country_continent"):
        assert len(answers("landmark_country") & subjects(hop)) >= 14, hop
        assert len(answers("city_country") & subjects(hop)) >= 14, hop
    assert answers("work_author") <= subjects("author_country")


def test_spain_of_the_paper() -> None:
    table = load_relation("country_largest_city").table.set_index("subject")
    assert table.loc["Spain", "answer"] == "Madrid"


def test_own_folder(folder: Folder) -> None:
    relation = load_relation("capital", folder())
    assert relation.answers == ["N'Djamena", "Paris"]
    assert relation.prompt("Chad") == "The capital of Finland is Helsinki. The capital of Chad is"
    assert relation.prompt(r"a\1") == r"The capital of Finland is Helsinki. The capital of a\1 is"
    assert relation.sources("Chad") == ["We flew to Chad", "A map of Chad"]


def test_numbers_and_missing_values_stay_text(folder: Folder) -> None:
    relation = load_relation("capital", folder(table="subject,answer\n 747 ,NA\n"))
    assert relation.table.to_numpy().tolist() == [["747", "NA"]]


def test_unknown_relation() -> None:
    with pytest.raises(InterpError, match="no relation 'country_capitol'.*country_capital"):
        load_relation("country_capitol")
    with pytest.raises(InterpError, match="no relation 'contexts'"):
        load_relation("contexts")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("subject,reply\nFrance,Paris\n", "no column 'answer'"),
        ("subject,answer\nFrance,Paris\nFrance,Lyon\n", "'France' stands twice"),
        ("subject,answer\nFrance,Paris\nChad, \n", "Row 2.*empty cell"),
        ("subject,answer\nFinland,Helsinki\n", "'Finland'.*its target"),
        ("subject,answer\nNauru,Yaren, in effect\nChad,A\n", "Row 1.*has not the header's 2 cells; quote"),
        ("subject,answer\nFrance,Paris\nChad\n", "Row 2.*has not the header's 2 cells"),
        ('subject,answer\nFrance,"Paris\n', "not valid CSV"),
        ("", "no column 'subject'"),
        ("subject,answer\n", "has no rows"),
        ("subject,answer\nFrance,Paris\nGaul,Paris\n", "answer 'Paris' stands twice"),
        ("subject,answer\nmap,Paris\n", "'map'.*its contexts"),
        ("subject,answer\ncapital,Paris\n", "'capital'.*its target"),
        (None, "no 'relations/capital.csv'"),
    ],
)
def test_damaged_table(folder: Folder, table: str | None, message: str) -> None:
    with pytest.raises(InterpError, match=message):
        load_relation("capital", folder(table=table))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("The capital of x is", "The capital of it is", "target.*placeholder 'x' exactly once"),
        ("The capital of x is", "The capital of x, x is", "exactly once"),
        ("The capital of x is", "The capital of x in its text is", "no 'x' after it"),
        ('"The capital of x"', '"The capital of y"', "paper_target.*placeholder"),
        ('"We flew to {}"', '"We flew to {} again"', "must end in"),
        ('"We flew to {}"', '"We flew to {} and {}"', "must end in"),
        ('contexts = "country"', 'contexts = "countries"', "unknown contexts 'countries'.*'country'"),
        ('kind = "one-to-one"', 'kind = "pairs"', "kind 'pairs'"),
        ('title = "capital"\n', "", "no 'title'"),
        ("[capital]", "[capital", "not valid TOML"),
        ('"The capital of x"', '"The city of Chad is the capital of x"', "'Chad'.*its paper_target"),
        ('["We flew to {}", "A map of {}"]', "[]", "'country' are not a list of texts; give at least one"),
        ('["We flew to {}", "A map of {}"]', '"We flew to {}"', "'country' are not a list of texts"),
        ('["We flew to {}", "A map of {}"]', "[3]", "'country' are not a list of texts"),
        ('contexts = "country"', 'contexts = ["We flew to {}"]', "no 'contexts' as a text"),
        ("[contexts]", "version = 1\n[contexts]", "key 'version' of .* stands in no table"),
    ],
)
def test_damaged_prompts(folder: Folder, old: str, new: str, message: str) -> None:
    assert old in PROMPTS
    with pytest.raises(InterpError, match=message):
        load_relation("capital", folder(PROMPTS.replace(old, new)))


@pytest.mark.parametrize("file", ["relations.toml", "relations/capital.csv"])
def test_only_utf_8_is_read(folder: Folder, file: str) -> None:
    path = folder() / file
    path.write_bytes(path.read_bytes() + "# été".encode("latin-1"))
    with pytest.raises(InterpError, match=f"{file} is not UTF-8"):
        load_relation("capital", path.parents[len(Path(file).parts) - 1])


def test_a_comma_in_quotes_and_a_byte_order_mark_are_read(folder: Folder) -> None:
    table = '\ufeffsubject,note,answer\n"Paris, Texas",a,"one, two"\n\n'
    found = load_relation("capital", folder(table=table)).table
    assert found.to_numpy().tolist() == [["Paris, Texas", "one, two"]]


def test_folder_without_relations(tmp_path: Path) -> None:
    with pytest.raises(InterpError, match="no 'relations.toml'"):
        relation_names(tmp_path)
