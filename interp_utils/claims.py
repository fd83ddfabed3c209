"""Claims in notebooks: measured, judged by the registered rule, displayed as a row, read back from the outputs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interp_utils.errors import InterpError, nearest
from interp_utils.intervals import cluster_bootstrap
from interp_utils.ledger import (
    VERDICTS,
    ClaimSpec,
    checked_numbers,
    contradicts,
    load_ledger,
    record_verdicts,
    verdict,
)

__all__ = [
    "MIME",
    "VERDICTS",
    "ClaimSpec",
    "claim",
    "cluster_bootstrap",
    "contradicts",
    "load_ledger",
    "read_claims",
    "record_verdicts",
    "verdict",
]

MIME = "application/vnd.interp.claim+json"


def claim(
    id: str,
    value: float,
    *,
    model: Any,
    ci: Sequence[float] | None = None,
    control: float | None = None,
    live: bool = True,
    from_record: bool = False,
    n: int | None = None,
) -> dict[str, Any]:
    """Judge a measured value by the registered rule, display it as one row and return the row.

    Args:
        id: the claim's name in `data/claims.toml`.
        value: what was measured.
        model: what `load_model` returned; its name and weights are kept with the value.
        ci: 95 % interval (low, high) that holds the value; none for an exact quantity.
        control: the same quantity under the registered control.
        live: False for a value of the full study, which is not compared with the record but may become it.
        from_record: the value was computed from the recorded table, of which only a sample was run again.
        n: the number of cases behind the value.

    Raises:
        InterpError: an unknown id, a number that is not finite, or a value outside its interval.
    """
    ledger = load_ledger()
    if id not in ledger:
        raise InterpError(f"There is no claim {id!r} in claims.toml.{nearest(id, ledger)}")
    if not hasattr(model, "info"):
        raise InterpError(
            f"Claim {id!r}: model must be what load_model returned, got a {type(model).__name__}."
        )
    spec, name, weights = ledger[id], model.info.name, model.info.weights
    value, low, high = checked_numbers(repr(id), value, ci)
    recorded = spec.recorded.get(name, {}).get(weights)
    row = {
        "id": id,
        "notebook": spec.notebook,
        "source": spec.source,
        "claim": spec.claim,
        "published": spec.published,
        "control_description": spec.control,
        "model": name,
        "weights": weights,
        "value": value,
        "ci": [low, high],
        "control": None if control is None else checked_numbers(f"{id!r}, control", control)[0],
        "n": None if n is None else int(n),
        "verdict": verdict(spec.rule, value, (low, high)),
        "predicted": spec.predicted,
        "live": live,
        "from_record": from_record,
        "recorded": recorded,
        "contradicted": bool(live and recorded and contradicts(recorded, (low, high))),
    }
    _show(row, spec.quantity)
    return row


def read_claims(nb: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that `claim` displayed in an executed notebook, in order."""
    outputs = [output for cell in nb["cells"] for output in cell.get("outputs", [])]
    rows = [output["data"][MIME] for output in outputs if MIME in output.get("data", {})]
    return json.loads(json.dumps(rows))  # plain dictionaries instead of notebook nodes


def main(arguments: Sequence[str] | None = None) -> None:
    """`record BUILD_FOLDER`: take the rows of full studies from executed notebooks into the record."""
    parser = argparse.ArgumentParser(prog="python -m interp_utils.claims")
    command = parser.add_subparsers(required=True).add_parser("record", help="write data/recorded.toml")
    command.add_argument("build", type=Path, help="folder with executed notebooks")
    try:
        rows = _study_rows(parser.parse_args(arguments).build)
        record_verdicts(rows)
    except InterpError as error:
        parser.exit(2, f"{error}\n")
    for row in rows:
        print(f"recorded {_line(row)}")


def _study_rows(build: Path) -> list[dict[str, Any]]:
    import nbformat

    rows: list[dict[str, Any]] = []
    for path in sorted(build.rglob("*.ipynb")):
        try:
            notebook = nbformat.read(path, as_version=4)
        except (nbformat.reader.NotJSONError, OSError):
            raise InterpError(f"{path} is not a readable notebook; remove it or run it again.") from None
        rows += [row for row in read_claims(notebook) if not row["live"]]
    if not rows:
        raise InterpError(f"No notebook in {build} holds a claim of a full study; run `make study` first.")
    return rows


def _show(row: Mapping[str, Any], quantity: str) -> None:
    import pandas as pd
    from IPython.display import display

    from interp_utils.tables import table_html

    recorded = row["recorded"]
    cells = {
        "Claim": row["claim"],
        "Published": row["published"],
        _basis(row): _measured(row),
        "Control": row["control"],
        "Recorded": _measured(recorded) if recorded else None,
        "Verdict": _verdict_text(row),
    }
    parts = (
        row["source"],
        f"Measured on {row['model']}: {quantity}",
        f"Control: {row['control_description']}",
    )
    caption = " ".join(part.rstrip(". ") + "." for part in parts)
    html = table_html(pd.DataFrame([cells], dtype=object), caption=caption)
    display({MIME: dict(row), "text/html": html, "text/plain": _line(row)}, raw=True)


def _verdict_text(row: Mapping[str, Any]) -> str:
    """The full study's verdict where there is one, since a small live sample decides less."""
    recorded, live = row["recorded"] if row["live"] else None, row["verdict"]
    alarm = ", but contradicts the record" if row["contradicted"] else ""
    basis = "from its table" if row["from_record"] else "live sample"
    return f"{recorded['verdict']} ({basis}: {live}{alarm})" if recorded else live


def _basis(row: Mapping[str, Any]) -> str:
    if not row["live"]:
        return "Here, full study"
    return "Here, from the recorded table" if row["from_record"] else "Here, live"


def _measured(row: Mapping[str, Any]) -> str:
    low, high = row["ci"]
    return f"{row['value']:.4g}" if low == high else f"{row['value']:.4g} [{low:.4g}, {high:.4g}]"


def _line(row: Mapping[str, Any]) -> str:
    control = "" if row["control"] is None else f", control {row['control']:.4g}"
    return f"{row['id']} on {row['model']}: {_measured(row)}{control}: {_verdict_text(row)}"


if __name__ == "__main__":
    main()
