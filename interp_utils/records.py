"""Recorded studies: run resumably, keep as a table with a card, sample and re-verify.

A study lives in `data/records/<name>/` as `table.csv.gz` and `card.json`.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import inspect
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm.auto import tqdm

from interp_utils.errors import InterpError
from interp_utils.paths import ROOT, build_folder, data_folder, find_data, writable

if TYPE_CHECKING:
    from nnsight import TransformersModel

    from interp_utils.interventions import Generation

NEAR_TIE = 1e-3  # logits; below this gap another batch shape may choose the other token
DECIDING = (
    *("weights", "models", "activations", "interventions", "shared_prefix", "greedy", "candidates"),
    *("quintuplet", "cell_measures", "patchscopes", "corpora", "facts"),
    *(
        "wikitext",
        "windows",
        "sites",
        "shards",
        "recorder",
        "harvest",
        "activation_store",
        "artifacts",
        "controls",
    ),
    *(
        f"dictionaries/{m}"
        for m in ("adam", "batches", "config", "dictionary", "kernels", "metrics", "splice")
    ),
    *(f"dictionaries/{m}" for m in ("files", "steps", "train")),
    *(f"features/{m}" for m in ("activations", "detect", "index", "presence")),
    *("word_lists", "concepts", "structure", "neurons", "steers", "steering"),
)


@dataclass(frozen=True)
class Record:
    """A finished study: one row per job, and the card that says how it was made."""

    table: pd.DataFrame
    card: dict[str, Any]

    def sample(self, n: int, seed: int) -> pd.DataFrame:
        """`n` random rows, the same for the same seed."""
        return self.table.sample(n, random_state=seed).sort_index()


def load_record(name: str) -> Record | None:
    """The record, or None when the study was never made for this model.

    Raises:
        InterpError: the table does not have the hash of its card, or a file cannot be fetched.
    """
    if not (made := find_data(f"records/{name}/card.json")):
        return None
    card = json.loads(made.read_text())
    path = find_data(f"records/{name}/table.csv.gz")
    if not path or file_hash(path) != card["table_sha256"]:
        raise InterpError(
            f"The record {made.with_name('table.csv.gz')} is missing or damaged; "
            "restore it from git or run the study again."
        )
    return Record(read_table(path), card)


def read_table(path: Path | BytesIO) -> pd.DataFrame:
    """A table of ours: texts stay texts, an empty one included ("NA" is one too)."""
    return pd.read_csv(path, keep_default_na=False, low_memory=False)


def run_study(
    name: str,
    jobs: pd.DataFrame,
    compute: Callable[[pd.DataFrame], Sequence[Any] | pd.DataFrame],
    *,
    card: Mapping[str, Any],
    column: str = "text",
    chunk: int = 128,
) -> Record:
    """Compute a value or a table per job, a chunk at a time, and write the record.

    An interrupted study goes on from its last chunk: those of the same jobs, card, chunk size and source
    of `compute` stay in the build folder until `make clean`. What `compute` calls in turn is not compared.

    Args:
        name: folder below `data/records`.
        jobs: one row per piece of work.
        compute: maps some of the jobs to their values, one each, or to a table of any number of rows.
        card: what decides the values: command, seeds, model, weights, hashes.
        column: name of the values' column, where `compute` gives values.
        chunk: jobs per call of `compute`.

    Raises:
        InterpError: there are no jobs, `compute` gives different columns for different jobs, or the build or data
            folder cannot be written.
    """
    if not len(jobs):
        raise InterpError(f"The study {name!r} has no jobs; give at least one row.")
    made_by = [dict(card), chunk, column, _source(compute)]
    identity = json.dumps(made_by, sort_keys=True) + jobs.to_csv(index=False)
    run = name.replace("/", "-") + "-" + hashlib.sha256(identity.encode()).hexdigest()[:12]
    parts = writable(build_folder() / "studies" / run, "build folder", "INTERP_BUILD")
    for start in tqdm(range(0, len(jobs), chunk), desc=name, unit="chunk"):
        path = parts / f"{start:07}.csv"
        if not path.exists():
            began = time.monotonic()
            own = jobs.iloc[start : start + chunk]
            made = compute(own)
            part = made if isinstance(made, pd.DataFrame) else own.assign(**{column: list(made)})
            part = part.assign(part=start, seconds=time.monotonic() - began)
            _write(path, part.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC).encode())
    table = _join([parts / f"{start:07}.csv" for start in range(0, len(jobs), chunk)])
    seconds = table.pop("seconds").groupby(table.pop("part")).first().sum()
    return _save(name, table, {**card, "rows": len(table), "seconds": round(float(seconds))})


def _source(compute: Callable[..., Any]) -> str:
    """Source of a function, of the one that a partial wraps or of an object's class; empty if not known."""
    function = getattr(compute, "func", compute)
    try:
        return inspect.getsource(function if inspect.isroutine(function) else type(function))
    except (OSError, TypeError):
        return ""


def _join(parts: Sequence[Path]) -> pd.DataFrame:
    """The parts as one table, read in one go: a part alone may hold only texts that look like numbers."""
    first, *others = (part.read_bytes() for part in parts)
    header = first.split(b"\n", 1)[0]
    for part, other in zip(parts[1:], others, strict=True):
        if other.split(b"\n", 1)[0] != header:
            raise InterpError(
                f"The part {part} has other columns than {parts[0].name}, or another order of them; "
                "make `compute` give the same for all jobs and run the study again."
            )
    return read_table(BytesIO(first + b"".join(other.split(b"\n", 1)[1] for other in others)))


def _save(name: str, table: pd.DataFrame, card: dict[str, Any]) -> Record:
    folder = writable(data_folder() / "records" / name, "data folder", "INTERP_DATA")
    path, scratch = folder / "table.csv.gz", folder / ".table.csv.gz"
    quoted = csv.QUOTE_NONNUMERIC  # a lone carriage return in a text would end its row otherwise
    table.to_csv(scratch, index=False, quoting=quoted, compression={"method": "gzip", "mtime": 0})
    os.replace(scratch, path)
    card["table_sha256"] = file_hash(path)
    _write(folder / "card.json", (json.dumps(card, indent=1, sort_keys=True) + "\n").encode())
    return Record(read_table(path), card)


def _write(path: Path, content: bytes) -> None:
    scratch = path.with_name("." + path.name)
    scratch.write_bytes(content)
    os.replace(scratch, path)


def study_card(model: TransformersModel, *, command: str, seed: int, data: Sequence[Path]) -> dict[str, Any]:
    """The card's fixed part: command, seed, model, weights, versions, hashes of code and data."""
    versions = {p: importlib.metadata.version(p).split("+")[0] for p in ("torch", "transformers", "nnsight")}
    return {
        "command": command,
        "seed": seed,
        "model": model.info.name,
        "weights": model.info.weights,
        "versions": versions,
        "code_sha256": code_hash(),
        "data_sha256": {path.name: file_hash(path) for path in data},
    }


def code_hash() -> str:
    """Hash of the modules that decide a study's values."""
    text = b"".join((ROOT / "interp_utils" / f"{module}.py").read_bytes() for module in DECIDING)
    return hashlib.sha256(text).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verify_texts(recorded: Sequence[str], fresh: Generation, model: TransformersModel) -> int:
    """Check that a fresh generation gives the recorded texts; returns how many near-ties parted them.

    A text may differ only from a step whose top two logits are closer than 1e-3.

    Raises:
        InterpError: a text differs elsewhere.
    """
    ties = 0
    for row, (old, new) in enumerate(zip(recorded, fresh.texts, strict=True)):
        if old != new:
            step = first_difference(old, fresh.tokens[row].tolist(), model)
            if not fresh.gaps[row, : step + 1].min() < NEAR_TIE:  # nor when gaps are not known: NaN
                raise InterpError(
                    f"Row {row} of the sample reads {new!r} but {old!r} was recorded; "
                    "code, weights or versions have changed: run the study again."
                )
            ties += 1
    return ties


def verify_numbers(recorded: Sequence[float], fresh: Sequence[float], tolerance: float = 1e-2) -> int:
    """Check that numbers computed again equal the recorded ones; returns how many were compared.

    Args:
        recorded: as they stand in the table, rounded.
        fresh: the same cells now.
        tolerance: largest difference, relative above 1 and absolute below.

    Raises:
        InterpError: a number differs by more, or there is none to compare.
    """
    pairs = list(zip(recorded, fresh, strict=True))
    if not pairs:
        raise InterpError("No recorded number was computed again; draw a larger sample.")
    for row, (old, new) in enumerate(pairs):
        if not abs(old - new) <= tolerance * max(1.0, abs(old)):
            raise InterpError(
                f"Number {row} of the sample is {new:.6g} but {old:.6g} was recorded; "
                "code, weights or versions have changed: run the study again."
            )
    return len(pairs)


def first_difference(text: str, ids: Sequence[int], model: TransformersModel) -> int:
    """First step at which the decoded ids are no longer a beginning of `text`."""
    for step in range(len(ids)):
        if not text.startswith(model.tokenizer.decode(ids[: step + 1], skip_special_tokens=True)):
            return step
    return len(ids) - 1
