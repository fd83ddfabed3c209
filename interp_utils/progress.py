"""What a run shows while it lasts."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any

from tqdm import tqdm

from interp_utils.notebook_run import Job, Run
from interp_utils.report import clock

HEARTBEAT = 30.0  # seconds between two lines about a running notebook where there is no terminal


class Progress:
    """One bar per running notebook on a terminal; elsewhere a line at start, at the end and every 30 s."""

    def __init__(self, total: int) -> None:
        self.live, self.total, self.ended = sys.stdout.isatty(), total, 0
        self.bars: dict[str, tqdm] = {}
        self.spoken: dict[str, float] = {}

    def start(self, job: Job) -> None:
        self.spoken[job.stem] = time.monotonic()
        if self.live:
            look = "{desc} {bar:20} cell {n_fmt}/{total_fmt} {elapsed}{postfix}"
            columns, rows = shutil.get_terminal_size()  # never 0, unlike what tqdm finds in some containers
            size = {"total": job.cells, "ncols": columns, "nrows": rows}
            self.bars[job.stem] = tqdm(desc=job.stem, leave=False, bar_format=look, **size)
        else:
            print(f"{job.stem}: started, {job.cells} cells", flush=True)

    def update(self, run: Run) -> None:
        stem, cell = run.job.stem, 0 if run.status["cell"] is None else run.status["cell"] + 1
        if self.live:
            self.bars[stem].n = cell
            self.bars[stem].set_postfix_str(f"{run.peak_mb:,} MB")
        elif time.monotonic() - self.spoken[stem] >= HEARTBEAT:
            self.spoken[stem] = time.monotonic()
            print(
                f"{stem}: cell {cell}/{run.job.cells}, {clock(run.seconds)}, {run.peak_mb:,} MB", flush=True
            )

    def end(self, stem: str, record: dict[str, Any], note: str = "") -> None:
        if stem in self.bars:
            self.bars.pop(stem).close()
        self.ended += 1
        state = "FAILED" if record["reasons"] else "ok"
        spent = f"{clock(record['seconds'])}, {record['peak_mb']:,} MB"
        lines = [f"[{self.ended}/{self.total}] {stem}: {state}, {spent}{note}", *record["reasons"]]
        tqdm.write("\n    ".join(lines), file=sys.stdout)
        sys.stdout.flush()
