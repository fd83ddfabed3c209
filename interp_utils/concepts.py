"""Concepts with exact rules: which tokens of a store belong to each of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from interp_utils.errors import InterpError, nearest
from interp_utils.paths import data_file
from interp_utils.structure import PYTHON, Spans, python_spans, rows_by_document, rule_spans, token_labels
from interp_utils.word_lists import Word, label_rows, load_words

if TYPE_CHECKING:
    from nnsight import TransformersModel
    from scipy.sparse import csc_array

    from interp_utils.activation_store import ActivationStore

KINDS = ("list", "words", "rule", "python", "source")
COLUMNS = ["category", "concept", "kind", "rule", "source"]


@dataclass(frozen=True)
class Concept:
    """What a set of tokens has in common, with the rule that decides.

    Attributes:
        category: of similar concepts.
        name: unlike any other's.
        kind: "list" (a word list), "words", "rule" (a regular expression for prose), "python" (one of
            `structure.PYTHON`) or "source" (all tokens of a corpus).
        rule: name of the word list, forms with "|" between them, the expression, or the name.
        source: the only corpus in which a "rule" holds; all prose if empty.
    """

    category: str
    name: str
    kind: str
    rule: str
    source: str = ""


def load_concepts(path: Path | str | None = None) -> list[Concept]:
    """The concepts of a table, in its order; `data/concepts.csv` if no other is given.

    Raises:
        InterpError: other columns, an empty or doubled name, a kind or a Python structure that is not known, or
            an empty rule.
    """
    text = Path(path or data_file("concepts.csv")).read_text(encoding="utf-8")
    header, *rows = list(csv.reader(io.StringIO(text))) or [[]]
    if header != COLUMNS:
        raise InterpError(f"The columns of the concepts are {header} but must be {COLUMNS}.")
    found: dict[str, Concept] = {}
    for row in rows:
        if len(row) != len(COLUMNS) or not all(row[:4]):
            raise InterpError(f"The concept {row} needs a category, a name, a kind and a rule.")
        concept = Concept(*row)
        if concept.name in found:
            raise InterpError(f"The concept {concept.name!r} stands twice; delete one.")
        for what, one, known in (("kind", concept.kind, KINDS), ("Python structure", concept.rule, PYTHON)):
            if (what == "kind" or concept.kind == "python") and one not in known:
                raise InterpError(f"{concept.name!r}: there is no {what} {one!r}.{nearest(one, known)}")
        found[concept.name] = concept
    if not found:
        raise InterpError("There are no concepts; write at least one.")
    return list(found.values())


def mark_rows(
    store: ActivationStore,
    model: TransformersModel,
    documents: Callable[[int, int], str],
    concepts: Sequence[Concept],
    stop: int,
) -> csc_array:
    """Which of the first rows of a store belong to which concept, "2 concept + 1, row", as 0 and 1.

    Line i: the row belongs to concepts[i]. A word is marked at its last token, structure at every token whose last
    character lies in it. Line i + the number of concepts: the row is neither in nor out, as another token of a
    mention. The last line is 1 everywhere, so that a product with this matrix also counts all rows.

    Args:
        store: from `harvest`.
        model: whose tokenizer made its tokens.
        documents: text of a document, from the number of its source and its own.
        concepts: from `load_concepts`.
        stop: how many rows.

    Raises:
        InterpError: Python that cannot be read, documents that are not those of the store, a word that two
            concepts share.
    """
    from scipy.sparse import coo_array

    number, n = {concept.name: i for i, concept in enumerate(concepts)}, len(concepts)
    lines: list[list[np.ndarray]] = [[np.empty(0, np.int64)] for _ in range(2 * n)] + [[np.arange(stop)]]
    for (source, document), rows in rows_by_document(store, stop).items():
        text = documents(source, document)
        spans = _spans(text, store.source_names[source], concepts)
        ids, labels = token_labels(model, text, spans)
        position = store.position[rows].numpy()
        if position.max() >= len(ids) or (ids[position] != store.token_ids[rows].numpy()).any():
            raise InterpError(f"Document {document} of source {source} is not the one of {store.folder}.")
        where = np.full(len(ids), -1)
        where[position] = rows
        for name, tokens in labels.items():
            own = where[tokens]
            lines[number[name]].append(own[own >= 0])
    for words, owners in _word_lists(concepts):
        label = label_rows(store, model, words)[:stop]
        for name, k in owners.items():
            hit = label >= 0 if k is None else label == k
            lines[number[name]].append(np.flatnonzero(hit))
            lines[number[name] + n].append(np.flatnonzero(label == -2))
    joined = [np.concatenate(own) for own in lines]
    place = np.repeat(np.arange(2 * n + 1), [len(own) for own in joined]), np.concatenate(joined)
    return coo_array((np.ones(len(place[0]), np.float32), place), (2 * n + 1, stop)).tocsc()


def _spans(text: str, source: str, concepts: Sequence[Concept]) -> Spans:
    """Structure in a document. Code has no rules for prose, and prose none for code."""
    spans: Spans = {c.name: [(0, len(text))] for c in concepts if c.kind == "source" and c.rule == source}
    if source == "python":
        found = python_spans(text)
        return spans | {c.name: found[c.rule] for c in concepts if c.kind == "python"}
    rules = {c.name: c.rule for c in concepts if c.kind == "rule" and c.source in ("", source)}
    return spans | rule_spans(text, rules)


def _word_lists(concepts: Sequence[Concept]) -> list[tuple[list[Word], dict[str, int | None]]]:
    """Lists to look for, each with the concepts that are one of its words, or any of them (None)."""
    own = [c for c in concepts if c.kind == "words"]
    words = [Word(c.name, tuple(c.rule.split("|"))) for c in own]
    single: list[tuple[list[Word], dict[str, int | None]]] = []
    if words:
        single.append((words, {c.name: k for k, c in enumerate(own)}))
    return single + [(load_words(c.rule), {c.name: None}) for c in concepts if c.kind == "list"]
