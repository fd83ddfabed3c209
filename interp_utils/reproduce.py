"""Run the notebooks, one process each, and judge every one of them.

Executed copies, their pages, `index.html`, `claims.json` and `timings.json` go to the build folder.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from interp_utils.errors import InterpError, nearest
from interp_utils.ledger import load_ledger
from interp_utils.notebook_run import Job, Run
from interp_utils.pages import page, write
from interp_utils.paths import ROOT, build_folder, data_folder, writable
from interp_utils.progress import Progress
from interp_utils.report import index, read_json, read_notebook, record_path, to_json


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m interp_utils.reproduce", description=__doc__)
    add = parser.add_argument
    add("--notebooks", default="", metavar='"00 09"', help="numbers or names; all if not given")
    add("--workers", type=int, choices=range(1, 257), metavar="N", default=2, help="notebooks at a time (2)")
    add("--threads", type=int, choices=range(1, 257), metavar="N", default=1, help="threads of each (1)")
    add("--model", help="the MODEL parameter of every notebook")
    add("--profile", choices=("quick", "full"), help="the PROFILE parameter of every notebook")
    add("-p", dest="parameters", action="append", nargs=2, default=[], metavar=("NAME", "VALUE"))
    add("--resume", action="store_true", help="skip what was completed before and has not changed since")
    add("--cell-limit", type=float, help="seconds per cell, 0 for none (900; full profile: none)")
    add("--notebook-limit", type=float, help="seconds per notebook, 0 for none (1800; full profile: none)")
    add("--no-html", dest="html", action="store_false", help="no pages of the notebooks")
    options = parser.parse_args(argv)
    for name, usual in (("cell_limit", 900.0), ("notebook_limit", 1800.0)):
        if getattr(options, name) is None:
            setattr(options, name, 0.0 if options.profile == "full" else usual)
    return options


def plan(options: argparse.Namespace) -> list[Job]:
    """The notebooks to run, with checked parameters.

    Raises:
        InterpError: an unknown notebook or parameter, a value of the wrong type, or a faulty ledger.
    """
    given = list(options.parameters)
    given += [(name, value) for name in ("MODEL", "PROFILE") if (value := getattr(options, name.lower()))]
    ledger, code = load_ledger(), code_hash()
    jobs = []
    for path in select(options.notebooks):
        notebook = read_notebook(path)
        parameters = check_parameters(path, given)
        cells = [(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in notebook.cells]
        key = hashlib.sha256(json.dumps([cells, parameters, code]).encode()).hexdigest()
        claims = [name for name, spec in ledger.items() if spec.notebook == path.stem]
        total = len(cells) + bool(parameters)  # papermill adds a cell that sets them
        jobs.append(Job(path.stem, str(path.resolve()), parameters, claims, key, total))
    return jobs


def select(names: str) -> list[Path]:
    """Notebooks by number or name, in order; all for an empty string.

    Raises:
        InterpError: there is no such notebook, or none at all.
    """
    folder = Path(os.environ.get("INTERP_NOTEBOOKS") or ROOT / "notebooks")
    found = {path.stem: path for path in sorted(folder.glob("[!.]*.ipynb"))}
    if not found:
        raise InterpError(f"There are no notebooks in {folder}; set INTERP_NOTEBOOKS to their folder.")
    chosen = set()
    for name in names.replace(",", " ").split():
        stem = name.removesuffix(".ipynb")
        hits = {known for known in found if known == stem or known.startswith(stem.zfill(2) + "_")}
        if not hits:
            raise InterpError(f"There is no notebook {name!r}.{nearest(name, found)}")
        chosen |= hits
    return [path for stem, path in found.items() if stem in chosen or not chosen]


def check_parameters(path: Path, given: list[tuple[str, str]]) -> dict[str, Any]:
    """Values for the notebook's parameters, typed like their defaults.

    Raises:
        InterpError: the notebook has no such parameter, or the value has another type than its default.
    """
    if not given:
        return {}
    import papermill

    known = papermill.inspect_notebook(path)
    for name, _ in given:
        if name not in known:
            has = ", ".join(known) or "none"
            raise InterpError(f"The notebook {path.stem} has no parameter {name!r}; its parameters: {has}.")
    return {name: _value(name, text, _literal(known[name]["default"])) for name, text in given}


def _value(name: str, text: str, default: Any) -> Any:
    value = _literal(text)
    if isinstance(default, str):
        return value if isinstance(value, str) else text
    types = (int, float) if type(default) is float else type(default)
    if default is not None and value is not None and not isinstance(value, types):
        raise InterpError(f"The parameter {name} must be like its default {default!r}, but is {text!r}.")
    return value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def code_hash() -> str:
    """Hash of the package and of the data that notebooks read; the card of an artifact stands for its weights."""
    digest = hashlib.sha256()
    files = [*Path(__file__).parent.rglob("*.py"), *data_folder().rglob("*.*")]
    for path in sorted(path for path in files if path.is_file() and path.suffix != ".safetensors"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def schedule(jobs: list[Job], options: argparse.Namespace, build: Path, progress: Progress) -> bool:
    """Run the jobs, `options.workers` at a time, and settle each as it ends; True if none failed.

    The longest known starts first. However this is left, nothing keeps running.
    """
    known = read_json(build / "timings.json")
    waiting = sorted(jobs, key=lambda job: -(known.get(job.stem, {}).get("seconds") or 0))
    limits = options.threads, options.cell_limit, options.notebook_limit
    running: list[Run] = []
    good = True
    # Names of sockets hold about 100 characters, less than some systems' own temporary folders need.
    short = "/tmp" if os.path.isdir("/tmp") else None
    with tempfile.TemporaryDirectory(prefix="nb-", dir=short, ignore_cleanup_errors=True) as scratch:
        try:
            while waiting or running:
                while waiting and len(running) < options.workers:
                    job = waiting.pop(0)
                    running.append(Run(job, Path(scratch) / str(len(waiting)), *limits))
                    progress.start(job)
                for run in [run for run in running if not run.alive()]:
                    running.remove(run)
                    good &= settle(run, options.html, build, progress)
                for run in running:
                    progress.update(run)
                time.sleep(0.1)
        finally:
            for run in running:
                run.end()
    return good


def settle(run: Run, html: bool, build: Path, progress: Progress) -> bool:
    """Keep the copy, the record and the page of a run that ended; True if nothing is wrong with it."""
    stem = run.job.stem
    record_path(build, stem).unlink(missing_ok=True)  # never an old record beside a new copy
    record = run.finish(build)
    if html:
        try:
            record["reasons"] += page(build, stem, read_notebook(build / f"{stem}.ipynb"), record)
        except Exception as error:  # a page that cannot be made must not take the other notebooks down
            record["reasons"].append(f"no page could be made: {type(error).__name__}: {error}")
        record["status"] = "failed" if record["reasons"] else "ok"
    write(record_path(build, stem), to_json(record))
    progress.end(stem, record)
    return not record["reasons"]


def completed(job: Job, build: Path) -> bool:
    """Whether `build` holds a good run of the same notebook, parameters, code and data."""
    record = read_json(record_path(build, job.stem))
    copy = build / f"{job.stem}.ipynb"
    return record.get("key") == job.key and record.get("status") == "ok" and copy.exists()


def reproduce(options: argparse.Namespace) -> int:
    """Plan, run and report; 0 if all is well, 1 if a notebook failed, 130 after Ctrl-C.

    Raises:
        InterpError: something asked for does not exist, or the build folder cannot be written.
    """
    jobs = plan(options)
    build = writable(build_folder(), "build folder", "INTERP_BUILD")
    progress = Progress(len(jobs))
    done = [job for job in jobs if options.resume and completed(job, build)]
    for job in done:
        progress.end(job.stem, read_json(record_path(build, job.stem)), " (completed before)")
    try:
        good = schedule([job for job in jobs if job not in done], options, build, progress)
    except KeyboardInterrupt:
        print(
            f"\nInterrupted; what was completed is kept in {build}. To go on, add --resume (make: RESUME=1)."
        )
        return 130
    finally:
        index(build)
    print(f"{'All is well' if good else 'Something failed'}: {build / 'index.html'}")
    return 0 if good else 1


def main(argv: list[str] | None = None) -> int:
    """`reproduce` from the command line; 2 for a mistake in the request or a system that refuses, say a full disk."""
    try:
        return reproduce(parse(argv))
    except (InterpError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell lets background jobs ignore Ctrl-C
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
