"""Relations between a subject and an answer, such as the capital of a country, with the prompts that ask for them.

`data/facts/relations.toml` has the prompts, `data/facts/relations/<name>.csv` the facts; both are our own.
"""

from __future__ import annotations

import csv
import io
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_utils.errors import InterpError, nearest
from interp_utils.paths import data_file

if TYPE_CHECKING:
    import pandas as pd

PLACEHOLDER = "x"
KINDS = ("classes", "one-to-one")
COLUMNS = ["subject", "answer"]
TEXTS = ("title", "target", "paper_target", "kind", "contexts")


@dataclass(frozen=True, eq=False)
class Relation:
    """Facts of one kind and the prompts for them.

    Attributes:
        name: its table in `relations.toml`.
        title: what the answer is, in words.
        target: T of a Patchscope: demonstrations, then the relation about `x`, ending right before the answer.
        paper_target: T in the style of Patchscopes 4.2: no demonstration, the placeholder last.
        kind: "classes" (subjects share answers) or "one-to-one".
        contexts: source prompts with "{}" for the subject at the end.
        table: columns subject and answer, one row per subject.
    """

    name: str
    title: str
    target: str
    paper_target: str
    kind: str
    contexts: tuple[str, ...]
    table: pd.DataFrame

    @property
    def answers(self) -> list[str]:
        """The distinct answers, sorted: the candidates."""
        return sorted(set(self.table["answer"]))

    def prompt(self, subject: str) -> str:
        """The target with the subject in place of `x`: the question in plain text."""
        return _word(PLACEHOLDER).sub(lambda _: subject, self.target)

    def sources(self, subject: str) -> list[str]:
        """The contexts with the subject at their end: source prompts whose last token is the subject's."""
        return [context.replace("{}", subject) for context in self.contexts]


def relation_names(folder: Path | str | None = None) -> list[str]:
    """The names of all relations, in the order of `relations.toml`."""
    return [name for name in _relations(folder) if name != "contexts"]


def load_relation(name: str, folder: Path | str | None = None) -> Relation:
    """One relation, checked.

    Args:
        name: one of `relation_names()`.
        folder: your own folder with `relations.toml` and `relations/<name>.csv`, instead of `data/facts`.

    Raises:
        InterpError: no such relation; a file that is missing or not UTF-8; a field, column or cell that is
            missing or one too many; a subject, or a one-to-one answer, in two rows; a subject in a prompt; a
            target without its one placeholder; a context that does not end in "{}".
    """
    relations = _relations(folder)
    if name not in (names := relation_names(folder)):
        raise InterpError(f"There is no relation {name!r}.{nearest(name, names)}")
    about = relations[name]
    if missing := [key for key in TEXTS if not (about.get(key) and isinstance(about[key], str))]:
        raise InterpError(f"The relation {name!r} has no {missing[0]!r} as a text in relations.toml; add it.")
    if about["kind"] not in KINDS:
        raise InterpError(f"Relation {name!r} has kind {about['kind']!r}; use {' or '.join(KINDS)}.")
    for key in ("target", "paper_target"):
        found = [match.start() for match in _word(PLACEHOLDER).finditer(about[key])]
        if len(found) != 1 or about[key].rfind(PLACEHOLDER) != found[0]:  # the engine takes the last "x"
            raise InterpError(
                f"The {key} of relation {name!r} needs the placeholder {PLACEHOLDER!r} exactly once as a word and "
                f"no {PLACEHOLDER!r} after it; it is {about[key]!r}."
            )
    contexts = _contexts(name, about["contexts"], relations.get("contexts", {}))
    table = _table(name, folder, COLUMNS if about["kind"] == "one-to-one" else COLUMNS[:1])
    texts = {key: about[key] for key in TEXTS} | {"contexts": contexts}
    _check_leaks(name, table, texts)
    return Relation(name, table=table, **texts)


def _check_leaks(name: str, table: pd.DataFrame, texts: dict[str, Any]) -> None:
    for key in ("target", "paper_target", "contexts"):
        text = "\n".join(texts[key]) if key == "contexts" else texts[key]
        for subject in table["subject"]:
            if subject in text and _word(subject).search(text):
                raise InterpError(
                    f"The subject {subject!r} of relation {name!r} stands in its {key}; delete its row."
                )


def _word(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")


def _file(relative: str, folder: Path | str | None) -> Path:
    path = data_file(f"facts/{relative}") if folder is None else Path(folder) / relative
    if path.is_file():
        return path
    raise InterpError(f"The folder {folder} has no {relative!r}; add it or give another folder.")


def _relations(folder: Path | str | None) -> dict[str, Any]:
    path = _file("relations.toml", folder)
    try:
        relations = tomllib.loads(_text(path))
    except tomllib.TOMLDecodeError as error:
        raise InterpError(f"{path} is not valid TOML: {error}; correct it.") from None
    if stray := [key for key, value in relations.items() if not isinstance(value, dict)]:
        raise InterpError(f"The key {stray[0]!r} of {path} stands in no table; move or delete it.")
    return relations


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InterpError(f"{path} is not UTF-8; save it with that encoding.") from None


def _table(name: str, folder: Path | str | None, unique: list[str]) -> pd.DataFrame:
    import pandas as pd

    lines = io.StringIO(_text(_file(f"relations/{name}.csv", folder)))
    try:
        header, *rows = [row for row in csv.reader(lines, strict=True) if row] or [[]]
    except csv.Error as error:
        raise InterpError(f"The table of relation {name!r} is not valid CSV: {error}; correct it.") from None
    if missing := [column for column in COLUMNS if column not in header]:
        raise InterpError(f"The table of relation {name!r} has no column {missing[0]!r}; it needs {COLUMNS}.")
    if not rows:
        raise InterpError(f"The table of relation {name!r} has no rows; add a subject and its answer.")
    if ragged := [i for i, row in enumerate(rows, 1) if len(row) != len(header)]:
        raise InterpError(
            f"Row {ragged[0]} of relation {name!r} has not the header's {len(header)} cells; quote commas."
        )
    cells = [[row[header.index(column)].strip() for column in COLUMNS] for row in rows]
    table = pd.DataFrame(cells, columns=COLUMNS, dtype=str)
    if len(empty := table.index[(table == "").any(axis=1)]):
        raise InterpError(f"Row {empty[0] + 1} of relation {name!r} has an empty cell; fill it.")
    for key in unique:
        if len(twice := table.loc[table[key].duplicated(), key]):
            raise InterpError(
                f"The {key} {twice.iloc[0]!r} stands twice in relation {name!r}; delete one row."
            )
    return table


def _contexts(name: str, which: str, lists: dict[str, Any]) -> tuple[str, ...]:
    if which not in lists:
        raise InterpError(f"Relation {name!r} asks for unknown contexts {which!r}.{nearest(which, lists)}")
    if not (lists[which] and isinstance(lists[which], list) and {type(c) for c in lists[which]} == {str}):
        raise InterpError(f"The contexts {which!r} are not a list of texts; give at least one.")
    if wrong := [context for context in lists[which] if context.find("{}") != len(context) - 2]:
        raise InterpError(f"The context {wrong[0]!r} must end in '{{}}', where the subject goes.")
    return tuple(lists[which])
