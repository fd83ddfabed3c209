"""Relations between a subject and an answer, such as the capital of a country, with the prompts that ask for them.

The tables are our own: `data/facts/relations.toml` holds the prompts, `data/facts/relations/<name>.csv` the facts.
A reader's own folder of the same shape can take their place.
"""

from __future__ import annotations

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
        return _find_placeholder(PLACEHOLDER).sub(lambda _: subject, self.target)

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
        folder: a folder with your own `relations.toml` and `relations/<name>.csv`, instead of `data/facts`.

    Raises:
        InterpError: no such relation; a file, a field or a column is missing; a cell is empty; a subject stands
            in two rows or in a demonstration; a target without its one placeholder; a context that does not
            end in "{}".
    """
    relations = _relations(folder)
    if name not in (names := relation_names(folder)):
        raise InterpError(f"There is no relation {name!r}.{nearest(name, names)}")
    about = relations[name]
    if missing := [key for key in TEXTS if not str(about.get(key, "")).strip()]:
        raise InterpError(f"The relation {name!r} has no {missing[0]!r} in relations.toml; add it.")
    if about["kind"] not in KINDS:
        raise InterpError(f"The kind of relation {name!r} is {about['kind']!r}; use one of {', '.join(KINDS)}.")
    for key in ("target", "paper_target"):
        _check_target(name, key, about[key])
    table = _table(name, folder)
    for subject in table["subject"]:
        if _find_placeholder(subject).search(about["target"]):
            raise InterpError(
                f"The subject {subject!r} of relation {name!r} stands in its own target prompt, which would give "
                "the answer away; take it out of the table or use another demonstration."
            )
    contexts = _contexts(name, about["contexts"], relations.get("contexts", {}))
    return Relation(name, about["title"], about["target"], about["paper_target"], about["kind"], contexts, table)


def _find_placeholder(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")


def _file(relative: str, folder: Path | str | None) -> Path:
    if folder is None:
        return data_file(f"facts/{relative}")
    if not (path := Path(folder) / relative).is_file():
        raise InterpError(f"There is no file {relative!r} in {folder}; a folder of relations needs it.")
    return path


def _relations(folder: Path | str | None) -> dict[str, Any]:
    path = _file("relations.toml", folder)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InterpError(f"{path} is not a TOML file ({error}); mend it.") from None


def _check_target(name: str, key: str, target: str) -> None:
    """The placeholder stands once, and no letter x after it: the state goes to the last `x`."""
    found = [match.start() for match in _find_placeholder(PLACEHOLDER).finditer(target)]
    if len(found) != 1 or target.rfind(PLACEHOLDER) != found[0]:
        raise InterpError(
            f"The {key} of relation {name!r} needs the placeholder {PLACEHOLDER!r} exactly once as a word, and no "
            f"other {PLACEHOLDER!r} after it; it reads {target!r}."
        )


def _table(name: str, folder: Path | str | None) -> pd.DataFrame:
    import pandas as pd

    table = pd.read_csv(_file(f"relations/{name}.csv", folder), dtype=str, keep_default_na=False)
    if missing := [column for column in COLUMNS if column not in table.columns]:
        raise InterpError(
            f"The table of relation {name!r} has no column {missing[0]!r}; it needs {' and '.join(COLUMNS)}."
        )
    table = table[COLUMNS].apply(lambda column: column.str.strip())
    empty = table.index[(table == "").any(axis=1)]
    if len(empty):
        raise InterpError(f"Row {empty[0] + 1} of relation {name!r} has an empty cell; fill it or delete the row.")
    twice = table.loc[table["subject"].duplicated(), "subject"]
    if len(twice):
        raise InterpError(f"The subject {twice.iloc[0]!r} stands twice in relation {name!r}; keep one row of it.")
    return table


def _contexts(name: str, which: str, lists: dict[str, list[str]]) -> tuple[str, ...]:
    if which not in lists:
        raise InterpError(f"Relation {name!r} asks for unknown contexts {which!r}.{nearest(which, lists)}")
    for context in lists[which]:
        if not context.endswith(" {}") or context.count("{}") != 1:
            raise InterpError(
                f"The context {context!r} must end in ' {{}}', where the subject goes, and have no other '{{}}'."
            )
    return tuple(lists[which])
