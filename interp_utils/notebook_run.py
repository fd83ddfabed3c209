"""One run of one notebook: the guard of its child process, and the verdict on the executed copy.

The child is never asked for its opinion, because it may be dead: memory, limits and verdict are the guard's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nbformat
import psutil

from interp_utils.claims import read_claims
from interp_utils.pages import write
from interp_utils.paths import ROOT

THREADS = ("OMP_NUM", "MKL_NUM", "OPENBLAS_NUM", "NUMEXPR_NUM", "RAYON_NUM", "VECLIB_MAXIMUM")


@dataclass
class Job:
    """A notebook and what it runs with; `key` changes with anything that could change its result."""

    stem: str
    source: str
    parameters: dict[str, Any]
    claims: list[str]
    key: str
    cells: int


class Run:
    """A child that executes `job`, in a session of its own so that it can be ended as a whole.

    Limits are in seconds; 0 means none.
    """

    def __init__(
        self, job: Job, folder: Path, threads: int, cell_limit: float, notebook_limit: float
    ) -> None:
        self.job, self.folder = job, folder
        self.cell_limit, self.notebook_limit = cell_limit, notebook_limit
        self.status: dict[str, Any] = {"kernel": None, "cell": None, "error": None}
        self.peak_mb, self.stopped = 0, ""
        self.started = self.cell_started = time.monotonic()
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps(asdict(job) | {"parent": os.getpid()}), encoding="utf-8")
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "interp_utils.notebook_worker", str(folder)],
                env=child_environment(threads, folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def alive(self) -> bool:
        """Refresh status and memory and enforce the limits; False once everything has ended."""
        ended = self.process.poll() is not None
        self._refresh()
        if not ended:
            self.stopped = self._limit_passed()
            if self.stopped:
                self.process.terminate()  # the child saves what it has
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(3)
        if ended or self.stopped:
            self.end()
        return not (ended or self.stopped)

    def _refresh(self) -> None:
        status = self.status
        with contextlib.suppress(OSError):
            self.status = json.loads((self.folder / "status.json").read_text(encoding="utf-8"))
        if self.status["cell"] != status["cell"]:
            self.cell_started = time.monotonic()
        if self.status["kernel"]:
            self.peak_mb = max(self.peak_mb, peak_mb(self.status["kernel"]))

    def _limit_passed(self) -> str:
        cell = self.status["cell"]
        where = "at start-up" if cell is None else f"in cell {cell + 1}"
        if 0 < self.notebook_limit < self.seconds:
            return f"passed the notebook limit of {self.notebook_limit:g} s {where}"
        if cell is not None and 0 < self.cell_limit < time.monotonic() - self.cell_started:
            return f"passed the cell limit of {self.cell_limit:g} s {where}"
        return ""

    def end(self) -> None:
        """Kill what is left of the child, of its kernel, and of whatever they started."""
        # The kernel leads a session of its own: to end the child's group would leave it running.
        groups = {self.process.pid, self.status["kernel"] or self.process.pid}
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            family = psutil.Process(self.process.pid).children(recursive=True)
            groups |= {os.getpgid(member.pid) for member in family}
        for group in groups - {os.getpgrp()}:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        self.process.wait()

    def finish(self, build: Path) -> dict[str, Any]:
        """Put the executed copy, whole or partial, into `build`; return the record of this run."""
        copy = self.folder / "copy.ipynb"
        notebook = nbformat.read(copy if copy.exists() else self.job.source, as_version=4)
        tidy(notebook)
        write(build / f"{self.job.stem}.ipynb", nbformat.writes(notebook) + "\n")
        reasons = verdict(notebook, set(self.job.claims), self.stopped or self._death())
        return {
            "status": "failed" if reasons else "ok",
            "reasons": reasons,
            "seconds": round(self.seconds, 1),
            "peak_mb": self.peak_mb,
            "cell_seconds": [cell.metadata.get("papermill", {}).get("duration") for cell in notebook.cells],
            "parameters": self.job.parameters,
            "key": self.job.key,
        }

    def _death(self) -> str:
        if self.status["error"] or self.process.returncode == 0:
            return self.status["error"] or ""
        log = (self.folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"the worker ended with code {self.process.returncode}: {log[-1] if log else 'no output'}"


def child_environment(threads: int, folder: Path) -> dict[str, str]:
    """The environment of one worker: few threads, a fixed hash seed, and no personal Jupyter profile."""
    env = dict(os.environ) | {f"{name}_THREADS": str(threads) for name in THREADS}
    env |= {"PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    env |= {"JUPYTER_RUNTIME_DIR": str(folder), "IPYTHONDIR": str(folder / "ipython")}
    if (ROOT / "pyproject.toml").exists():  # a clone, which need not be installed
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return env


def peak_mb(pid: int) -> int:
    """Largest resident memory of a process so far, in MB (where the system does not tell: the present one)."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        return round(int(found[1]) * 1024 / 1e6) if found else 0
    with contextlib.suppress(psutil.Error):
        return round(psutil.Process(pid).memory_info().rss / 1e6)
    return 0


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Drop what papermill adds besides results: its banners, which shift the cells, and local paths."""
    banner = "papermill-error-cell-tag"
    notebook.cells = [cell for cell in notebook.cells if banner not in cell.metadata.get("tags", [])]
    for name in ("input_path", "output_path"):
        notebook.metadata.get("papermill", {}).pop(name, None)


def verdict(notebook: nbformat.NotebookNode, expected: set[str], stopped: str = "") -> list[str]:
    """Everything that is wrong with an executed copy, in words; empty if nothing is.

    Claims can only be missing, and cells only be skipped, where nothing stopped the run.
    """
    faults = [fault(index, cell) for index, cell in enumerate(notebook.cells)]
    reasons = [text for text in (stopped, *faults) if text]
    rows = read_claims(notebook)
    made = {str(row.get("id")) for row in rows}
    if not reasons:
        idle = [str(index + 1) for index, cell in enumerate(notebook.cells) if _idle(cell)]
        missing = [f"claim {name!r} is missing" for name in sorted(expected - made)]
        reasons = [f"did not execute: cell {', '.join(idle)}"] if idle else missing
    reasons += [f"claim {name!r} is not registered for this notebook" for name in sorted(made - expected)]
    return reasons + [_contradiction(row) for row in rows if row.get("contradicted")]


def fault(index: int, cell: nbformat.NotebookNode) -> str:
    """The error a cell ended with, unless its tag announces one."""
    if cell.cell_type != "code" or "raises-exception" in cell.metadata.get("tags", []):
        return ""
    errors = [f"{out.ename}: {out.evalue}" for out in cell.outputs if out.output_type == "error"]
    if not errors and not cell.metadata.get("papermill", {}).get("exception"):
        return ""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", errors[-1] if errors else "an error").split())
    text = text if len(text) <= 300 else f"{text[:140]} ... {text[-140:]}"
    return f"cell {index + 1} ({cell.source.strip().splitlines()[0][:60]}): {text}"


def _idle(cell: nbformat.NotebookNode) -> bool:
    return cell.cell_type == "code" and bool(cell.source.strip()) and cell.execution_count is None


def _contradiction(row: dict[str, Any]) -> str:
    known = row.get("recorded") or {}
    here, before = (f"{entry.get('value')} {entry.get('ci')}" for entry in (row, known))
    return f"claim {row.get('id')!r} contradicts its record: here {here}, recorded {before}"
