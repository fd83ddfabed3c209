"""Mentions are found where a slow search finds them; lists and pairs are what their READMEs promise."""

from __future__ import annotations

import ast
import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from interp_utils import word_lists
from interp_utils.errors import InterpError
from interp_utils.word_lists import PAIRS, WORD_LISTS, Word, label_rows, load_pairs, load_words
from tests.test_activation_store import run

label = getattr(label_rows, "__wrapped__", label_rows)  # by the tests' runtime types: stores here are made up


def words(*lines: str) -> list[Word]:
    return [Word(line.split("|")[0], tuple(line.split("|"))) for line in lines]


def fake(windows: Sequence[Sequence[int]], context: int = 64) -> Any:
    """A store of one document whose rows are these windows, the first `context - 1` tokens apart."""
    rows = [
        (w * (context - 1) + i, token) for w, window in enumerate(windows) for i, token in enumerate(window)
    ]
    position, tokens = torch.tensor(rows, dtype=torch.int64).T
    zeros = torch.zeros(len(rows), dtype=torch.int64)
    return SimpleNamespace(
        card={"context": context}, token_ids=tokens, position=position, document=zeros, source=zeros
    )


def slow(store: Any, tokenizer: Any, listed: Sequence[Word]) -> np.ndarray:
    """Window by window and character by character; for text of whole ASCII characters."""
    labels = np.full(len(store.token_ids), -1)
    windows: dict[tuple[int, ...], list[int]] = {}
    for row in range(len(labels)):
        own = int(store.source[row]), int(store.document[row])
        windows.setdefault((*own, int(store.position[row]) // (store.card["context"] - 1)), []).append(row)
    for rows in windows.values():
        ids = store.token_ids[rows].tolist()
        text = tokenizer.decode(ids)
        ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
        owner = [next(i for i, end in enumerate(ends) if c < end) for c in range(len(text))]
        at = 0
        while at < len(text):
            fits = [
                (len(form), k)
                for k, word in enumerate(listed)
                for form in word.forms
                if text.startswith(form, at)
                and not any(c.isalnum() or c == "_" for c in text[max(at - 1, 0) : at])
                and not any(c.isalnum() or c == "_" for c in text[at + len(form) :][:1])
            ]
            if not fits:
                at += 1
                continue
            size, k = max(fits)
            for c in range(at, at + size):
                labels[rows[owner[c]]] = -2
            labels[rows[owner[at + size - 1]]] = k
            at += size
    return labels


def test_like_the_slow_search(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("llama")
    store = run(model, tmp_path)
    listed = words("cat", "the cat|the dog sat", "rain wind|wind", "x y z", "y", "absent")
    labels = label_rows(store, model, listed)
    np.testing.assert_array_equal(labels, slow(store, model.tokenizer, listed))
    assert {-2, -1, 0, 1, 2, 3, 4} == set(labels.tolist()) and labels.shape == (len(store),)


def marked(model: Any, text: str, listed: Sequence[Word]) -> list[tuple[str, int]]:
    """The rows that are not -1, as (token, label)."""
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    labels = label(fake([ids]), model, listed)
    return [(model.tokenizer.decode([i]), k) for i, k in zip(ids, labels.tolist(), strict=True) if k != -1]


@pytest.mark.parametrize(
    ("text", "forms", "mentions"),
    [
        ("the cat; the cats, a tomcat, cat_1, Cat, CAT", ["cat"], ["cat"]),
        ("New York, New York City and York", ["New York", "York", "New York City"], [0, 2, 1]),
        ("Mr Trump met Donald Trump.", ["Donald Trump|Trump"], [0, 0]),
        ("C++ is not C; a C+ is", ["C", "C++"], [1, 0, 0]),
        ("Bogotá, Bogot and Zoë", ["Bogotá", "Zoë"], [0, 1]),
        ("a.b axb", ["a.b"], [0]),
        ("New\nYork", ["New York"], []),
    ],
)
def test_what_a_mention_is(
    tiny_model: Callable[..., Any], text: str, forms: list[str], mentions: list[Any]
) -> None:
    found = [k for _, k in marked(tiny_model("llama"), text, words(*forms)) if k >= 0]
    assert found == [0 if mention == "cat" else mention for mention in mentions]


def test_last_token_of_several(tiny_model: Callable[..., Any]) -> None:
    """Letters that the tiny tokenizer does not merge are tokens; "é" is two, of which the last counts."""
    found = marked(tiny_model("llama"), "q Né q", words("Né"))
    assert [k for _, k in found] == [-2, -2, 0]  # N and the two bytes of é


def test_edges_of_windows_and_gaps(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    ids = model.tokenizer("New York", add_special_tokens=False).input_ids
    listed = words("New York", "York")
    whole = label(fake([ids]), model, listed)
    assert whole[-1] == 0
    for cut in range(1, len(ids)):  # in two windows: York is found where it is whole
        labels = label(fake([ids[:cut], ids[cut:]]), model, listed)
        assert 0 not in labels
        assert (1 in labels) == ("York" in model.tokenizer.decode(ids[cut:]))
    dropped = fake([ids])
    keep = [i for i in range(len(ids)) if i != 1]
    for name in ("token_ids", "position", "document", "source"):
        setattr(dropped, name, getattr(dropped, name)[keep])
    assert 0 not in label(dropped, model, listed) and label(dropped, model, listed)[-1] == 1


def test_documents_and_sources_do_not_join(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    ids = model.tokenizer("xy", add_special_tokens=False).input_ids
    for name in ("document", "source"):
        store = fake([ids])
        assert label(store, model, words("xy")).max() == 0
        setattr(store, name, torch.arange(len(ids)))
        assert label(store, model, words("xy")).max() == -1


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([], "list of words is empty; give at least one"),
        (words("cat", "dog|cat"), "form 'cat' twice"),
        (words("cat|"), "an empty form of 'cat'"),
    ],
)
def test_bad_words(tiny_model: Callable[..., Any], listed: list[Word], message: str) -> None:
    with pytest.raises(InterpError, match=message):
        label(fake([[5]]), tiny_model("llama"), listed)


def test_unknown_kind_of_tokenizer(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    ids = model.tokenizer("the cat sat", add_special_tokens=False).input_ids
    monkeypatch.setattr(word_lists, "_byte_level", lambda: {})
    with pytest.raises(InterpError, match="cannot be put together as text: .*use a model with"):
        label(fake([ids]), model, words("cat"))


@pytest.mark.parametrize("name", ["gemma", "smollm2"])
@pytest.mark.model
def test_real_tokenizers(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    text = "In São Paulo, Donald Trump's  aide said: “self.x = 1”; the Trumps 😀 and Trump\n\tthe Elbe."
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    labels = label(fake([ids]), model, words("Donald Trump|Trump", "São Paulo", "self", "Elbe"))
    assert [int(k) for k in labels if k >= 0] == [1, 0, 2, 0, 3]
    assert all("Tr" in model.tokenizer.decode([ids[i]]) for i in np.flatnonzero(labels == 0))


AT_LEAST = {
    **{"people": 60, "countries": 120, "cities": 120, "elements": 110, "animals": 100, "foods": 100},
    **{"months": 11, "professions": 100, "organisations": 80, "python_keywords": 95, "function_words": 80},
}


@pytest.mark.parametrize("name", WORD_LISTS)
def test_list(name: str) -> None:
    listed = load_words(name)
    assert len(listed) >= AT_LEAST[name]
    assert all(word.name == word.forms[0] and form == form.strip() for word in listed for form in word.forms)


def test_between_lists() -> None:
    """Only Python's keywords share words with others."""
    forms = [
        (form, name)
        for name in WORD_LISTS
        if name != "python_keywords"
        for word in load_words(name)
        for form in word.forms
    ]
    assert len({form for form, _ in forms}) == len(forms)


def test_python_keywords_are_all_there() -> None:
    import keyword

    assert set(keyword.kwlist) <= {word.name for word in load_words("python_keywords")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\ndog|cat\n", "word list 'own' has the form 'cat' twice"),
        (b"\n \n", "word list 'own' is empty"),
        (b"cat||Cat\n", "empty form of 'cat'"),
        (b"Zo\xeb\n", "not UTF-8"),
    ],
)
def test_bad_list(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "own.txt").write_bytes(content)
    with pytest.raises(InterpError, match=message):
        load_words("own", tmp_path)


def test_own_list(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Donald Trump | Trump\n\nZoë\n", encoding="utf-8")
    assert load_words("own", tmp_path) == words("Donald Trump|Trump", "Zoë")


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(InterpError, match="no word list 'citys'. Did you mean 'cities'"):
        load_words("citys")
    with pytest.raises(InterpError, match="no table of pairs 'flatery'. Did you mean 'flattery'"):
        load_pairs("flatery")
    with pytest.raises(InterpError, match="no word list 'cities'"):
        load_words("cities", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("pair,a,b\n", "has no rows"),
        ("pair,a,b\n1,x\n", r"Row 1 .* needs a text in each of \['pair', 'a', 'b'\]"),
        ("pair,a,b\n1,x,y\n2,x,\n", "Row 2 "),
        ('pair,a,b\n1,"x,y\n', "not valid CSV"),
    ],
)
def test_bad_pairs(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "own.csv").write_text(content, encoding="utf-8")
    with pytest.raises(InterpError, match=message):
        load_pairs("own", tmp_path)


SIDES = {
    "vulnerabilities": ("secure", "vulnerable", 72),
    "code_errors": ("correct", "faulty", 36),
    "bias": ("neutral", "biased", 24),
    "deception": ("honest", "deceptive", 24),
    "flattery": ("plain", "flattering", 24),
}


@pytest.mark.parametrize("name", SIDES)
def test_pairs(name: str) -> None:
    table, (left, right, least) = load_pairs(name), SIDES[name]
    texts = [*table[left], *table[right]]
    assert len(table) >= least and len(set(texts)) == len(texts)
    assert table["pair"].tolist() == list(range(1, len(table) + 1))
    lengths = table[[left, right]].map(len).mean()
    assert 0.9 < lengths[left] / lengths[right] < 1.1
    if "class" in table:
        sizes = table["class"].value_counts()
        assert len(sizes) >= 6 and sizes.min() >= 6
        for text in texts:
            ast.parse(text)
            assert "#" not in text and '"""' not in text


def outcome(code: str) -> str:
    """What a program does: it prints this, or raises that."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(code, {"table": [{"name": "tea", "price": 2}]})
        except Exception as error:
            return type(error).__name__
    return printed.getvalue()


CALLS = {  # of what a program only defines
    "mean": "print(mean([1, 2]))",
    "longest": "print(longest(['a', 'bc']))",
    "is_even": "print(is_even(3))",
    "find": "print(find([1, 2], 2))",
    "Counter": "c = Counter(); c.add(); print(c.count)",
    "Door": "d = Door(); d.key = 1; print(d.open(1))",
    "Basket": "import types; b = Basket(); b.items = [types.SimpleNamespace(price=2)]; print(b.total())",
}


def test_errors_are_errors() -> None:
    """Each faulty program fails, or prints something else than the correct one, which does not fail."""
    for row in load_pairs("code_errors").itertuples():
        defined = [
            n.name for n in ast.parse(row.correct).body if isinstance(n, ast.FunctionDef | ast.ClassDef)
        ]
        call = "".join("\n" + CALLS[name] for name in defined if name in CALLS)
        right, wrong = outcome(row.correct + call), outcome(row.faulty + call)
        assert not right.endswith("Error"), row.correct
        assert wrong != right, row.faulty


def test_places() -> None:
    table = load_pairs("places_in_languages")
    assert table["sentence"].is_unique
    sizes = table.groupby(["place", "language"]).size().unstack()
    assert sizes.shape[0] >= 10 and sizes.shape[1] == 5 and (sizes == 4).all(axis=None)
    assert (table.groupby(["place", "language"])["name"].nunique() == 1).all()
    assert (table.groupby("place")["name"].nunique() >= 3).all()
    english = table[table["language"] == "English"]
    assert (english["name"] == english["place"]).all()
    for row in table.itertuples():
        assert row.sentence.count(row.name) == 1, row.sentence


def test_emotions_and_structures() -> None:
    for name, kind, text, least in (
        ("emotions", "emotion", "sentence", 20),
        ("structures", "kind", "text", 8),
    ):
        table = load_pairs(name)
        assert table[text].is_unique and table[kind].nunique() >= 4
        assert table[kind].value_counts().min() >= least
    assert load_pairs("emotions")["emotion"].nunique() == 6


def test_every_file_has_a_loader() -> None:
    from interp_utils.paths import data_folder

    assert {path.stem for path in (data_folder() / "word_lists").glob("*.txt")} == set(WORD_LISTS)
    assert {path.stem for path in (data_folder() / "pairs").glob("*.csv")} == set(PAIRS)
