"""Our own word lists and pairs of sentences, and where in stored text the words of a list are mentioned.

`data/word_lists/<name>.txt` has one word a line; `data/pairs/<name>.csv` has texts that differ in one thing.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int

from interp_utils.errors import InterpError, nearest
from interp_utils.paths import data_file

if TYPE_CHECKING:
    import pandas as pd
    from nnsight import TransformersModel

    from interp_utils.activation_store import ActivationStore

WORD_LISTS = (
    *("animals", "cities", "countries", "elements", "foods", "function_words", "months", "organisations"),
    *("people", "professions", "python_keywords"),
)
PAIRS = (
    *("bias", "code_errors", "deception", "emotions", "flattery", "places_in_languages", "structures"),
    "vulnerabilities",
)
BETWEEN = b"\0"  # stands between texts that do not continue each other; no letter, and in no word
PROBE = 2_000  # rows on which the pieces of tokens are compared with the tokenizer's own decoding


@dataclass(frozen=True)
class Word:
    """A word of a list.

    Attributes:
        name: its first form.
        forms: all ways to write it that count as a mention.
    """

    name: str
    forms: tuple[str, ...]


def load_words(name: str, folder: Path | str | None = None) -> list[Word]:
    """The words of a list, in the order of its file.

    Args:
        name: one of `WORD_LISTS`, or of your own folder.
        folder: your own folder with `<name>.txt`, instead of `data/word_lists`. One word a line, its forms with
            "|" between them: "Donald Trump|Trump".

    Raises:
        InterpError: no such list, a file that is not UTF-8, an empty list or form, or a form that stands twice.
    """
    known = WORD_LISTS if folder is None else sorted(path.stem for path in Path(folder).glob("*.txt"))
    text = _text(name, "word list", known, f"word_lists/{name}.txt", folder and Path(folder) / f"{name}.txt")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    words = [Word(forms[0], forms) for line in lines if (forms := tuple(map(str.strip, line.split("|"))))]
    _check(words, f"The word list {name!r}")
    return words


def label_rows(
    store: ActivationStore, model: TransformersModel, words: Sequence[Word]
) -> Int[np.ndarray, " row"]:
    """Which word, if any, each row of a store is a mention of.

    A mention is exactly one of the forms, in the case given, with no letter, digit or underscore on either side;
    so a plural is another word. Where forms overlap, the one that begins first is taken, then the longest. The
    text is put together window by window: what crosses the edge of a window is not found, and a word that is cut
    there may be mistaken for a shorter one.

    Args:
        store: from `harvest`.
        model: whose tokenizer made its tokens.
        words: from `load_words`.

    Returns:
        k where a row's token has the last character of a mention of words[k]; -2 at the other tokens of a
        mention; -1 elsewhere.

    Raises:
        InterpError: no words, a form that stands twice, or a tokenizer whose tokens cannot be put together.
    """
    _check(words, "The list of words")
    ids = store.token_ids.numpy()
    text, characters, tokens = _joined(ids, _breaks(store), model)
    owner = {form: k for k, word in enumerate(words) for form in word.forms}
    longest_first = sorted(owner, key=len, reverse=True)
    mention = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")
    found = [(*match.span(), owner[match[0]]) for match in mention.finditer(text)]
    labels = np.full(len(ids), -1, dtype=np.int32)
    if not found:
        return labels
    start, end, which = np.array(found).T
    first = np.searchsorted(tokens, characters[start], side="right") - 1
    last = np.searchsorted(tokens, characters[end] - 1, side="right") - 1
    for offset in range(int((last - first).max()) + 1):
        labels[(first + offset)[first + offset < last]] = -2
    labels[last] = which
    return labels


def load_pairs(name: str, folder: Path | str | None = None) -> pd.DataFrame:
    """A table of `data/pairs`; its README says what the columns are.

    Args:
        name: one of `PAIRS`, or of your own folder.
        folder: your own folder with `<name>.csv`, instead of `data/pairs`.

    Raises:
        InterpError: no such table, a file that is not UTF-8 or not CSV, no rows, or a cell that is missing,
            empty or one too many.
    """
    import pandas as pd

    known = PAIRS if folder is None else sorted(path.stem for path in Path(folder).glob("*.csv"))
    text = _text(name, "table of pairs", known, f"pairs/{name}.csv", folder and Path(folder) / f"{name}.csv")
    try:
        header, *rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row] or [[]]
    except csv.Error as error:
        raise InterpError(f"The table of pairs {name!r} is not valid CSV: {error}; correct it.") from None
    if not rows:
        raise InterpError(f"The table of pairs {name!r} has no rows; add some.")
    for number, row in enumerate(rows, 1):
        if len(row) != len(header) or not all(cell.strip() for cell in row):
            raise InterpError(
                f"Row {number} of the table of pairs {name!r} needs a text in each of {header}; mend it."
            )
    table = pd.DataFrame(rows, columns=header, dtype=str)
    return table.astype({"pair": int}) if "pair" in header else table


def _text(name: str, what: str, known: Sequence[str], shipped: str, own: Path | str | None) -> str:
    if name not in known:
        raise InterpError(f"There is no {what} {name!r}.{nearest(name, known)}")
    path = Path(own) if own else data_file(shipped)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InterpError(f"{path} is not UTF-8; save it with that encoding.") from None


def _check(words: Sequence[Word], what: str) -> None:
    if not words:
        raise InterpError(f"{what} is empty; give at least one word.")
    seen: set[str] = set()
    for word in words:
        for form in word.forms:
            if not form.strip():
                raise InterpError(f"{what} has an empty form of {word.name!r}; delete it.")
            if form in seen:
                raise InterpError(f"{what} has the form {form!r} twice; delete one.")
            seen.add(form)


def _breaks(store: ActivationStore) -> Bool[np.ndarray, " row"]:
    """Where a row's token does not follow that of the row before: another window, or an outlier was dropped."""
    body = store.card["context"] - 1  # tokens of a window without the start token
    source, document, position = (x.numpy() for x in (store.source, store.document, store.position))
    same = (np.diff(source) == 0) & (np.diff(document) == 0) & (np.diff(position // body) == 0)
    return np.append(True, ~(same & (np.diff(position) == 1)))


def _joined(
    ids: Int[np.ndarray, " row"], breaks: Bool[np.ndarray, " row"], model: TransformersModel
) -> tuple[str, Int[np.ndarray, " boundary"], Int[np.ndarray, " row"]]:
    """The text of all rows, and the byte at which each of its characters begins (and the end), and each token.

    A token can be a part of a character, so tokens are joined as bytes. A byte that belongs to no whole character
    becomes a character of its own.
    """
    distinct, index = np.unique(ids, return_inverse=True)
    pieces = _pieces(distinct.tolist(), model)
    _check_pieces(ids[:PROBE], breaks[:PROBE], dict(zip(distinct.tolist(), pieces, strict=True)), model)
    parts = [pieces[i] for i in index.tolist()]
    for row in breaks.nonzero()[0].tolist():
        parts[row] = BETWEEN + parts[row]
    tokens = np.cumsum([0, *map(len, parts[:-1])])
    text = b"".join(parts).decode("utf-8", "surrogateescape")
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    sizes = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    sizes[(codes >= 0xDC80) & (codes <= 0xDCFF)] = 1  # the bytes of no whole character
    return text, np.append(0, np.cumsum(sizes)), tokens


def _pieces(ids: Sequence[int], model: TransformersModel) -> list[bytes]:
    """What each token stands for within a text.

    Not `decode`: it shows a part of a character as a mark, and some tokenizers' leaves out a first space.
    """
    names = model.tokenizer.convert_ids_to_tokens(ids)
    if "ByteLevel" in repr(model.tokenizer.backend_tokenizer.decoder):
        alphabet = _byte_level()
        return [
            bytes(alphabet[c] for c in name) if set(name) <= alphabet.keys() else name.encode()
            for name in names
        ]
    single = re.compile(r"<0x([0-9A-F]{2})>")
    return [
        bytes.fromhex(byte[1]) if (byte := single.fullmatch(name)) else name.replace("▁", " ").encode()
        for name in names
    ]


@cache
def _byte_level() -> dict[str, int]:
    """The characters by which GPT-2 and its kin write bytes: printable ones as themselves, others moved up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}


def _check_pieces(
    ids: Int[np.ndarray, " row"],
    breaks: Bool[np.ndarray, " row"],
    pieces: dict[int, bytes],
    model: TransformersModel,
) -> None:
    """Pieces joined are what the tokenizer decodes, wherever it decodes whole characters.

    Raises:
        InterpError: they are not.
    """
    for run in np.split(ids, breaks.nonzero()[0][1:]):
        own = b"".join(pieces[i] for i in run.tolist()).decode("utf-8", "replace")
        usual = model.tokenizer.decode(run.tolist(), clean_up_tokenization_spaces=False)
        if "\N{REPLACEMENT CHARACTER}" not in own + usual and own.strip() != usual.strip():
            raise InterpError(
                f"The tokens of {model.info.name!r} cannot be put together as text: {own[:40]!r} is decoded as "
                f"{usual[:40]!r}; use a model with a byte-level or SentencePiece tokenizer."
            )
