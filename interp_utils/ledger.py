"""The files of the claims ledger: what was registered, what full studies recorded, and the rules between.

`data/claims.toml` is written by hand before anything is measured. `data/recorded.toml` is written by
`python -m interp_utils.claims record`, so that no measurement ever touches a rule.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp_utils.errors import InterpError, nearest
from interp_utils.paths import data_file, data_folder, find_data

RULES = {"reproduced": "reproduced", "partly": "partly", "not_reproduced": "not reproduced"}
VERDICTS = (*RULES.values(), "undecided")
TEXTS = ("notebook", "source", "claim", "published", "quantity", "control", "predicted")
DRIFT = 1e-3  # relative difference that two exact values may show on different machines
_NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
_BOUND = re.compile(rf"\s*(>=|<=|>|<)\s*{_NUMBER}\s*")
_RANGE = re.compile(rf"\s*{_NUMBER}\s*\.\.\s*{_NUMBER}\s*")


@dataclass(frozen=True)
class ClaimSpec:
    """One registered claim; `recorded` is model -> weights -> value, ci, control, n and verdict."""

    id: str
    notebook: str
    source: str
    claim: str
    published: str
    quantity: str
    control: str
    predicted: str
    rule: dict[str, str]
    amended: str = ""
    recorded: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)


def load_ledger(path: Path | None = None) -> dict[str, ClaimSpec]:
    """The registered claims by id, each with what `recorded.toml` in the same folder says about it.

    Args:
        path: the registration; the data file `claims.toml` if not given.

    Raises:
        InterpError: a file that cannot be found or read, or a field that is missing, unknown or malformed;
            names the claim and the field.
    """
    record = Path(path).with_name("recorded.toml") if path else find_data("recorded.toml")
    registered = _read(Path(path or data_file("claims.toml")))
    ledger = {id: _spec(id, fields) for id, fields in registered.items()}
    if record and record.exists():
        _attach(ledger, _read(record))
    return ledger


def verdict(rule: Mapping[str, str], value: float, ci: Sequence[float] | None = None) -> str:
    """The strongest verdict whose condition holds on the whole interval, or "undecided".

    A condition is `> x`, `>= x`, `< x`, `<= x` or `a .. b` (ends included). Without an interval the value
    alone is judged.

    Raises:
        InterpError: a malformed condition.
    """
    low, high = (value, value) if ci is None else ci
    for key, name in RULES.items():
        if key in rule and _holds(rule[key], low, high):
            return name
    return "undecided"


def contradicts(recorded: Mapping[str, Any], ci: Sequence[float]) -> bool:
    """Whether the interval has nothing in common with the recorded one.

    Two exact values (intervals of no width) may differ by a relative 1e-3.
    """
    (low, high), (old_low, old_high) = ci, recorded["ci"]
    gap = max(low - old_high, old_low - high)
    exact = low == high and old_low == old_high
    return gap > (DRIFT * max(abs(low), abs(old_low)) if exact else 0)


def record_verdicts(rows: Iterable[Mapping[str, Any]], path: Path | None = None) -> None:
    """Write rows into the record, replacing those of the same claim, model and weights.

    Args:
        rows: what `claim` returned.
        path: the record; `recorded.toml` in the data folder if not given. `claims.toml` lies beside it.

    Raises:
        InterpError: two rows disagree, or one does not follow from the registered rule; nothing is written.
    """
    path = Path(path or data_folder() / "recorded.toml")
    record: dict[str, Any] = _read(path) if path.exists() else {}
    seen: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        keys = ("value", "ci", "control", "n", "verdict")
        entry = {key: row[key] for key in keys if row.get(key) is not None}
        place = row["id"], row["model"], row["weights"]
        if seen.setdefault(place, entry) != entry:
            raise InterpError(f"Two full-study rows of {' / '.join(place)} disagree; remove the older run.")
        record.setdefault(place[0], {}).setdefault(place[1], {})[place[2]] = entry
    _attach({id: _spec(id, fields) for id, fields in _read(path.with_name("claims.toml")).items()}, record)
    part = path.with_name(path.name + ".part")
    part.write_text(_toml(record), encoding="utf-8")
    os.replace(part, path)


def checked_numbers(claim: str, value: Any, ci: Any = None) -> tuple[float, float, float]:
    """Value, low and high as floats of six significant digits, so that records are byte-stable.

    Raises:
        InterpError: something is no number or not finite, or the interval does not hold the value.
    """
    try:
        low, high = (value, value) if ci is None else ci
        # Adding 0.0 turns -0.0 into 0.0.
        value, low, high = (float(f"{float(number):.6g}") + 0.0 for number in (value, low, high))
    except (TypeError, ValueError):
        got = f"{value!r}" if ci is None else f"{value!r} and {ci!r}"
        raise InterpError(
            f"Claim {claim}: expected a number and an interval (low, high), got {got}."
        ) from None
    if not all(map(math.isfinite, (value, low, high))):
        raise InterpError(f"Claim {claim}: {value} [{low}, {high}] is not finite; was anything measured?")
    if not low <= value <= high:
        raise InterpError(f"Claim {claim}: the value {value} must lie in its interval [{low}, {high}].")
    return value, low, high


def _spec(id: str, fields: Any) -> ClaimSpec:
    """Validate one table of `claims.toml`."""
    where = f"claims.toml, claim {id!r}"
    if not isinstance(fields, dict):
        raise InterpError(f"{where} must be a table, [{id}], with the fields of a claim.")
    for key in fields.keys() - {*TEXTS, "rule", "amended"}:
        raise InterpError(f"{where}: unknown field {key!r}.{nearest(key, (*TEXTS, 'rule', 'amended'))}")
    for key in (*TEXTS, *({"amended"} & fields.keys())):
        if not isinstance(fields.get(key), str) or not fields[key].strip():
            raise InterpError(f"{where}: the field {key!r} must be a text that is not empty.")
    if fields["predicted"] not in VERDICTS:
        raise InterpError(f"{where}: the field 'predicted' must be one of {', '.join(VERDICTS)}.")
    rule = fields.get("rule")
    # A rule that cannot fail registers nothing.
    if not isinstance(rule, dict) or not {"reproduced", "not_reproduced"} <= rule.keys() <= RULES.keys():
        raise InterpError(
            f"{where}: the field 'rule' needs reproduced and not_reproduced, and may have partly."
        )
    for key, condition in rule.items():
        try:
            _holds(condition, 0, 0)
        except InterpError as error:
            raise InterpError(f"{where}: the field 'rule', {key}: {error}") from None
    return ClaimSpec(id=id, **fields)


def _holds(condition: str, low: float, high: float) -> bool:
    """Whether the condition is true on all of [low, high]."""
    if match := _BOUND.fullmatch(str(condition)):
        bound = float(match[2])
        return {">": low > bound, ">=": low >= bound, "<": high < bound, "<=": high <= bound}[match[1]]
    match = _RANGE.fullmatch(str(condition))
    if match and float(match[1]) <= float(match[2]):
        return float(match[1]) <= low and high <= float(match[2])
    raise InterpError(f"{condition!r} is no condition such as '> 0.1', '<= 0.1' or '0.1 .. 0.2'.")


def _attach(ledger: Mapping[str, ClaimSpec], record: Mapping[str, Any]) -> None:
    """Put the record into the ledger, after proving that each verdict follows from its registered rule."""
    for id, model, weights, entry in _entries(record):
        if id not in ledger:
            raise InterpError(f"recorded.toml: there is no claim {id!r} in claims.toml.{nearest(id, ledger)}")
        where = f"{id!r} in recorded.toml, {model}, {weights}"
        value, low, high = checked_numbers(where, entry.get("value"), entry.get("ci", ()))
        if verdict(ledger[id].rule, value, (low, high)) != entry.get("verdict"):
            raise InterpError(
                f"Claim {where}: the verdict does not follow from the rule; remove it and run the study again."
            )
        ledger[id].recorded.setdefault(model, {})[weights] = entry


def _entries(record: Mapping[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Claim, model, weights and numbers of each entry, sorted."""
    try:
        for id, models in sorted(record.items()):
            for model, entries in sorted(models.items()):
                for weights, entry in sorted(entries.items()):
                    yield id, model, weights, dict(entry.items())
    except AttributeError:
        raise InterpError(
            f'recorded.toml, claim {id!r}: expected tables ["claim"."model"."weights"].'
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InterpError(
            f"{path} cannot be read ({error.strerror}); INTERP_DATA names its folder."
        ) from None
    except ValueError as error:
        raise InterpError(f"{path} is not valid TOML: {error}.") from None


def _toml(record: Mapping[str, Any]) -> str:
    lines = ["# Written by `python -m interp_utils.claims record`; rules are in claims.toml."]
    for id, model, weights, entry in _entries(record):
        # A JSON string is a TOML string, and so are numbers and lists of them.
        names = ".".join(json.dumps(name, ensure_ascii=False) for name in (id, model, weights))
        lines += ["", f"[{names}]", *(f"{key} = {json.dumps(item)}" for key, item in entry.items())]
    return "\n".join(lines) + "\n"
