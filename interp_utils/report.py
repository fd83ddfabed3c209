"""All pages, the index with the claims table, `claims.json` and `timings.json`, from what lies in `build/`.

`python -m interp_utils.report` rebuilds them from the executed notebooks and the records beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
from html import escape
from pathlib import Path
from typing import Any

import nbformat

from interp_utils.claims import read_claims
from interp_utils.errors import InterpError
from interp_utils.pages import POLICY, page, title, word, write
from interp_utils.paths import build_folder, writable

STYLE = """
:root{color-scheme:light dark;--line:#8886;--head:#eee;--soft:#5a5a5a}
@media(prefers-color-scheme:dark){:root{--head:#2a2a2a;--soft:#b0b0b0}}
body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;padding:0 1rem;max-width:100rem}
table{border-collapse:collapse;width:100%;margin:1.5rem 0 2.5rem}
caption{text-align:left;font-size:1.25rem;font-weight:600;padding:.4rem 0}
th,td{text-align:left;vertical-align:top;padding:.45rem .7rem;border-bottom:1px solid var(--line)}
thead th{position:sticky;top:0;background:var(--head)}
tbody th{font-weight:400;min-width:16rem}
td{font-variant-numeric:tabular-nums}
small{color:var(--soft);display:block}
b{white-space:nowrap}
"""
SHOWN = ("status", "reasons", "seconds", "peak_mb", "cell_seconds", "parameters")


def to_json(value: Any) -> str:
    """Stable text: sorted keys, one line per entry."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def record_path(build: Path, stem: str) -> Path:
    """Where the runner keeps the outcome of a notebook's last run."""
    return build / f"{stem}.run.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def executed(build: Path) -> dict[str, nbformat.NotebookNode]:
    """The executed notebooks in `build`, by stem, in order.

    Raises:
        InterpError: a file is not a notebook.
    """
    return {path.stem: read_notebook(path) for path in sorted(build.glob("[!.]*.ipynb"))}


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook in format 4.

    Raises:
        InterpError: the file is missing or not a notebook.
    """
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:
        raise InterpError(f"{path} cannot be read as a notebook ({type(error).__name__}).") from None


def index(build: Path) -> None:
    """Write `index.html`, `claims.json` and `timings.json` from what lies in `build`."""
    notebooks = executed(build)
    records = {stem: read_json(record_path(build, stem)) for stem in notebooks}
    rows = [row for notebook in notebooks.values() for row in read_claims(notebook)]
    rows.sort(key=lambda row: (str(row.get("notebook")), str(row.get("id")), to_json(row)))
    write(build / "claims.json", to_json(rows))
    timings = {stem: {key: record.get(key) for key in SHOWN} for stem, record in records.items() if record}
    write(build / "timings.json", to_json(timings))
    runs = [_run_cells(build, stem, notebook, records[stem]) for stem, notebook in notebooks.items()]
    write(build / "index.html", _index_page(runs, [_claim_cells(row) for row in rows]))


def _index_page(runs: list[list[str]], claims: list[list[str]]) -> str:
    name = "Notebooks and claims"
    head = ["Claim", "Source", "Published", "Here, live", "Here, recorded", "Control", "Verdict"]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{POLICY}<title>{name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body><main><h1>{name}</h1>\n"
        + _table("Notebooks", ["Notebook", "Status", "Duration", "Peak memory"], runs)
        + _table(f"Claims ({len(claims)}), with 95 % intervals in brackets", head, claims)
        + "</main></body></html>\n"
    )


def _table(caption: str, head: list[str], rows: list[list[str]]) -> str:
    """A table whose first column names the row; the cells are HTML already."""
    top = "".join(f'<th scope="col">{name}</th>' for name in head)
    lines = [
        f'<tr><th scope="row">{first}</th><td>{"</td><td>".join(rest)}</td></tr>\n' for first, *rest in rows
    ]
    body = "".join(lines)
    return (
        f"<table><caption>{caption}</caption><thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table>\n"
    )


def _run_cells(build: Path, stem: str, notebook: nbformat.NotebookNode, record: dict[str, Any]) -> list[str]:
    name, link = escape(title(notebook, stem)), escape(stem)
    if (build / f"{stem}.html").exists():
        name = f'<a href="{link}.html">{name}</a>'
    reasons = "".join(f"<small>{escape(reason)}</small>" for reason in record.get("reasons", []))
    memory = record.get("peak_mb")
    return [
        f"{name}<small>{link}</small>",
        f"<b>{word(record.get('status', 'unknown'))}</b>{reasons}",
        clock(record["seconds"]) if "seconds" in record else "–",
        f"{memory:,} MB" if memory else "–",
    ]


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s" if seconds >= 60 else f"{seconds:.0f} s"


def _claim_cells(row: dict[str, Any]) -> list[str]:
    text = {key: "" if value is None else escape(str(value)) for key, value in row.items()}
    alarm = "<small>⚠ contradicts its record</small>" if row.get("contradicted") else ""
    link = f'<a href="{text.get("notebook", "")}.html">{text.get("id", "")}</a>'
    recorded = row.get("recorded") if row.get("live", True) else None
    study = recorded or row  # a small live sample decides less than the full study
    basis = "from its table" if row.get("from_record") else "live sample"
    live = f"<small>{basis}: {text.get('verdict', '')}</small>" if recorded else ""
    note = "<small>from the recorded table; a sample was run again</small>" if row.get("from_record") else ""
    predicted = f"<small>predicted: {text.get('predicted', '')}</small>"
    return [
        f"{text.get('claim', '')}<small>{link}</small>",
        text.get("source", ""),
        text.get("published", ""),
        f"{_measured(row)}{note}<small>{text.get('model', '')}, {text.get('weights', '')}</small>",
        _measured(row.get("recorded") or {}),
        f"{_number(row.get('control'))}<small>{text.get('control_description', '')}</small>",
        f"<b>{word(str(study.get('verdict')))}</b>{live}{predicted}{alarm}",
    ]


def _measured(entry: dict[str, Any]) -> str:
    value, ci = entry.get("value"), entry.get("ci")
    if not ci or ci[0] == ci[1]:
        return _number(value)
    return f"{_number(value)} <small>[{_number(ci[0])}, {_number(ci[1])}]</small>"


def _number(value: Any) -> str:
    """At most four significant digits; a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, int | float) else escape(str(value))


def main(argv: list[str] | None = None) -> int:
    """Rebuild everything; 0 if every page passes its checks, 1 if not, 2 if there is nothing to build from."""
    argparse.ArgumentParser(prog="python -m interp_utils.report", description=__doc__).parse_args(argv)
    try:
        build = writable(build_folder(), "build folder", "INTERP_BUILD")
        notebooks = executed(build)
        if not notebooks:
            raise InterpError(f"There are no executed notebooks in {build}; run `make reproduce` first.")
        found = []
        for stem, notebook in notebooks.items():
            record = read_json(record_path(build, stem))
            found += [f"{stem}: {text}" for text in page(build, stem, notebook, record)]
        index(build)
    except InterpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([*found, str(build / "index.html")]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
