"""Rows are marked as the rules say; the table of concepts is well formed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interp_utils import corpora
from interp_utils.concepts import KINDS, Concept, load_concepts, mark_rows
from interp_utils.errors import InterpError
from interp_utils.harvest import harvest
from interp_utils.word_lists import load_words
from tests.test_activation_store import CORPORA, OPTIONS

CODE = "def find(the, cat):\n    return the  # on a mat\n\n\n" * 8
TEXTS = {**CORPORA, "python": [CODE, CODE.replace("cat", "dog")]}
CONCEPTS = [
    Concept("animals", "cat", "words", "the cat|cat"),
    Concept("animals", "dog", "words", "dog"),
    Concept("text", "after the", "rule", r"(?<!\w)the (\w+)"),
    Concept("text", "after on, in two", "rule", r"(?<!\w)on (\w+)", "two"),
    Concept("python", "parameters", "python", "parameter of a function"),
    Concept("source", "all of one", "source", "one"),
]


@pytest.fixture(scope="module")
def store(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return harvest(tiny_model("gemma3"), TEXTS, tmp_path_factory.mktemp("store"), **OPTIONS)


def text_of(source: int, document: int) -> str:
    return list(TEXTS.values())[source][document]


def test_marks_are_those_of_a_search_by_hand(tiny_model: Callable[..., Any], store: Any) -> None:
    model, stop = tiny_model("gemma3"), len(store) - 7
    marks = mark_rows(store, model, text_of, CONCEPTS, stop).toarray()
    n = len(CONCEPTS)
    assert marks.shape == (2 * n + 1, stop) and set(np.unique(marks)) == {0, 1} and (marks[-1] == 1).all()
    for row in range(stop):
        source, document = int(store.source[row]), int(store.document[row])
        text, name = text_of(source, document), list(TEXTS)[source]
        read = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        last = read.offset_mapping[int(store.position[row])][1] - 1

        def inside(pattern: str, text: str = text, last: int = last) -> bool:
            return any(m.start(1) <= last < m.end(1) for m in re.finditer(pattern, text))

        assert marks[2, row] == (name != "python" and inside(r"(?<!\w)the (\w+)"))
        assert marks[3, row] == (name == "two" and inside(r"(?<!\w)on (\w+)"))
        assert marks[4, row] == (name == "python" and inside(r"(?:\(|, )(the|cat|dog)"))
        assert marks[5, row] == (name == "one")
    assert marks[0].sum() and marks[1].sum() and not (marks[0] * marks[n]).any()
    ids = store.token_ids[:stop].numpy()
    ends = {model.tokenizer.decode([i]).strip()[-1:] for i in ids[marks[1] > 0].tolist()}
    assert ends == {"g"}
    before = store.token_ids[:stop].numpy()[marks[n] > 0]  # "the" of "the cat"
    assert len(before) and not (marks[1] * marks[n]).any()
    np.testing.assert_array_equal(marks[n], marks[n + 1])  # one list of words: other tokens are shared


def test_other_documents_are_noticed(tiny_model: Callable[..., Any], store: Any) -> None:
    with pytest.raises(InterpError, match="is not the one of"):
        mark_rows(store, tiny_model("gemma3"), lambda s, d: text_of(s, d)[1:], CONCEPTS[5:], 50)


def test_the_shipped_table_fits_the_word_lists_and_the_corpora() -> None:
    table = load_concepts()
    assert len(table) >= 70 and len({concept.category for concept in table}) >= 8
    assert {concept.kind for concept in table} == set(KINDS)
    for concept in table:
        if concept.kind == "list":
            assert load_words(concept.rule)
        elif concept.kind == "rule":
            assert re.compile(concept.rule) and concept.source in ("", *corpora.CORPORA)
        elif concept.kind == "source":
            assert concept.rule in corpora.CORPORA


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "There are no concepts"),
        ("a,b,rule,x", "needs a category"),
        ("a,b,rule,,", "needs a category"),
        ("a,b,rule,x,\na,b,rule,y,", "stands twice"),
        ("a,b,wrods,x,", "no kind 'wrods'.*words"),
        ("a,b,python,comments,", "no Python structure 'comments'.*comment"),
    ],
)
def test_a_malformed_table_is_refused(tmp_path: Path, rows: str, message: str) -> None:
    path = tmp_path / "own.csv"
    path.write_text("category,concept,kind,rule,source\n" + rows, encoding="utf-8")
    with pytest.raises(InterpError, match=message):
        load_concepts(path)
    path.write_text("concept,rule\n", encoding="utf-8")
    with pytest.raises(InterpError, match="columns"):
        load_concepts(path)
