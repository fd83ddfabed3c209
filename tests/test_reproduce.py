from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from interp_utils import progress, reproduce
from interp_utils.errors import InterpError
from interp_utils.notebook_run import Job, child_environment, verdict

PARAMETERS = (
    'MODEL: str = "small"  # which model\nPROFILE: str = "quick"\nSEED: int = 0\nRATE = 0.5\nLAYER = None'
)
MIME = "application/vnd.interp.claim+json"
ENTRY = """[{id}]
notebook = "{stem}"
source = "A paper, section 2"
claim = "Something grows"
published = "0.3"
quantity = "a share"
control = "shuffled"
predicted = "reproduced"
rule = {{ reproduced = "> 0.1", not_reproduced = "<= 0.1" }}
"""


def row(id: str, stem: str, **changes: Any) -> dict[str, Any]:
    fixed = {"id": id, "notebook": stem, "value": 0.25, "ci": [0.2, 0.3], "verdict": "reproduced"}
    return fixed | {"contradicted": False, "recorded": None} | changes


def making(id: str, stem: str) -> str:
    """Source of a cell that makes a claim."""
    return f"from IPython.display import display\ndisplay({{{MIME!r}: {row(id, stem)!r}, 'text/plain': 'a claim'}}, raw=True)"


def save(folder: Path, stem: str, *sources: str, tags: tuple[str, ...] = ()) -> None:
    """A notebook with a parameters cell, the sources, and `tags` on the last cell."""
    cells = [new_markdown_cell(f"# {stem}"), new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    cells += [new_code_cell(source) for source in sources]
    if tags:
        cells[-1].metadata["tags"] = list(tags)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    folder.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / f"{stem}.ipynb")


def ledger(folder: Path, **claims: str) -> None:
    """A ledger that maps claim names to notebooks."""
    folder.mkdir(exist_ok=True)
    text = "\n".join(ENTRY.format(id=id, stem=stem) for id, stem in claims.items())
    (folder / "claims.toml").write_text(text, encoding="utf-8")


def point_to(patch: pytest.MonkeyPatch, root: Path) -> None:
    for name, folder in (("NOTEBOOKS", "nb"), ("BUILD", "build"), ("DATA", "data")):
        patch.setenv(f"INTERP_{name}", str(root / folder))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two notebooks, one claim, and the environment that points to them."""
    point_to(monkeypatch, tmp_path)
    ledger(tmp_path / "data", grows="00_first")
    save(tmp_path / "nb", "00_first", making("grows", "00_first"))
    save(tmp_path / "nb", "01_second", "print(SEED)")
    return tmp_path


def gone(pid: int, within: float = 8) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


# --- what a run of many notebooks leaves behind --------------------------------------------------------------

SLEEPER = (
    "import os, subprocess, time\nchild = subprocess.Popen(['sleep', '300'])\n"
    "open('pids', 'w').write(f'{os.getpid()} {child.pid}')\nprint('before the end', flush=True)\ntime.sleep(300)"
)
THREADS = "import os, sys\nprint(sys.executable, os.environ['OMP_NUM_THREADS'], os.environ['PYTHONHASHSEED'])"
MEMORY = "block = bytearray(300_000_000)\nblock[::4096] = b'x' * len(block[::4096])\ndel block"
CAUSES = {
    "03_error": "ZeroDivisionError: division by zero",
    "04_dead": "the kernel died in cell 3",
    "05_orphan": "the worker ended with code -9",
    "06_slow": "passed the cell limit of 5 s in cell 3",
    "07_skipped": "did not execute: cell 4",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """One run of notebooks that end in every way, beside a kernel of the same name that does not work."""
    root = tmp_path_factory.mktemp("many")
    nb = root / "nb"
    ledger(root / "data", one="00_one", two="01_two")
    save(nb, "00_one", making("one", "00_one"), THREADS, MEMORY)
    save(nb, "01_two", making("two", "01_two"), THREADS)
    save(nb, "02_expected", "raise ValueError", "", tags=())
    notebook = nbformat.read(nb / "02_expected.ipynb", as_version=4)
    notebook.cells[2].metadata["tags"] = ["raises-exception"]
    nbformat.write(notebook, nb / "02_expected.ipynb")
    save(nb, "03_error", "x = 1\ny = x / 0", "never = 1")
    save(nb, "04_dead", "import os\nos._exit(3)", "never = 1")
    save(nb, "05_orphan", "import os, signal, time\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(300)")
    save(nb, "06_slow", SLEEPER)
    save(nb, "07_skipped", "x = 1", "y = 1", tags=("skip-execution",))
    broken = root / "jupyter" / "kernels" / "python3"
    broken.mkdir(parents=True)
    spec = {"argv": ["false"], "display_name": "broken", "language": "python"}
    (broken / "kernel.json").write_text(json.dumps(spec))
    with pytest.MonkeyPatch.context() as patch:
        point_to(patch, root)
        patch.setenv("JUPYTER_PATH", str(root / "jupyter"))
        code = reproduce.main(["--cell-limit", "5"])
        yield SimpleNamespace(root=root, nb=nb, build=root / "build", code=code)


def record(build: Path, stem: str) -> dict[str, Any]:
    return json.loads((build / f"{stem}.run.json").read_text())


def test_a_failure_is_named_with_its_cause_and_costs_no_other_notebook(run: SimpleNamespace) -> None:
    assert run.code == 1
    for stem in ("00_one", "01_two", "02_expected"):
        assert (record(run.build, stem)["status"], record(run.build, stem)["reasons"]) == ("ok", [])
    for stem, cause in CAUSES.items():
        (reason,) = record(run.build, stem)["reasons"]
        assert cause in reason, stem
    assert record(run.build, "03_error")["reasons"][0].startswith("cell 3 (x = 1)")


@pytest.mark.parametrize("stem", CAUSES)
def test_every_failure_leaves_its_copy_and_its_page(run: SimpleNamespace, stem: str) -> None:
    copy = nbformat.read(run.build / f"{stem}.ipynb", as_version=4)
    nbformat.validate(copy)
    assert copy.cells[1].execution_count == 1
    assert str(run.root) not in nbformat.writes(copy)
    assert "✗ failed" in (run.build / f"{stem}.html").read_text(encoding="utf-8")


def test_a_stopped_cell_keeps_what_it_printed_and_leaves_no_process(run: SimpleNamespace) -> None:
    copy = nbformat.read(run.build / "06_slow.ipynb", as_version=4)
    assert copy.cells[2].outputs[0].text == "before the end\n"
    for pid in (run.nb / "pids").read_text().split():
        assert gone(int(pid))


def test_each_kernel_is_this_interpreter_with_one_thread(run: SimpleNamespace) -> None:
    for stem in ("00_one", "01_two"):
        copy = nbformat.read(run.build / f"{stem}.ipynb", as_version=4)
        assert copy.cells[3].outputs[0].text.split() == [sys.executable, "1", "0"]


def test_duration_and_peak_memory_are_kept_apart_from_the_claims(run: SimpleNamespace) -> None:
    timings = json.loads((run.build / "timings.json").read_text())
    assert 300 < timings["00_one"]["peak_mb"] < 800 and timings["01_two"]["peak_mb"] < 300
    assert 0 < max(timings["00_one"]["cell_seconds"]) < timings["00_one"]["seconds"]
    rows = json.loads((run.build / "claims.json").read_text())
    assert [claim["id"] for claim in rows] == ["one", "two"] and not {"seconds", "time"} & rows[0].keys()


def test_a_second_run_writes_the_same_claims_byte_by_byte(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INTERP_BUILD", str(run.root / "again"))
    chosen = ["--notebooks", "01, 0", "--no-html"]
    assert reproduce.main(chosen) == 0
    assert (run.root / "again" / "claims.json").read_bytes() == (run.build / "claims.json").read_bytes()
    before = (run.root / "again" / "00_one.ipynb").stat().st_mtime_ns
    save(run.nb, "01_two", making("two", "01_two"), THREADS, "print('edited')")
    capsys.readouterr()
    assert reproduce.main([*chosen, "--resume"]) == 0
    shown = capsys.readouterr().out
    assert "00_one: ok" in shown and shown.count("completed before") == 1
    assert (run.root / "again" / "00_one.ipynb").stat().st_mtime_ns == before
    assert "edited" in (run.root / "again" / "01_two.ipynb").read_text()


# --- limits and interruptions --------------------------------------------------------------------------------


def test_the_notebook_limit_counts_all_cells(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(place / "nb", "01_second", *["import time\ntime.sleep(1.5)"] * 20)
    options = ["--notebooks", "01", "--notebook-limit", "7", "--cell-limit", "0", "--no-html"]
    assert reproduce.main(options) == 1
    assert "passed the notebook limit of 7 s in cell" in capsys.readouterr().out
    copy = nbformat.read(place / "build" / "01_second.ipynb", as_version=4)
    assert copy.cells[2].execution_count == 2 and copy.cells[-1].execution_count is None


def program(*options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "interp_utils.reproduce", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=reproduce.ROOT)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def interrupted(place: Path, number: signal.Signals, *options: str) -> tuple[int, str]:
    """Exit code and output of a run that gets a signal while `01_second` sleeps; all its processes are gone."""
    save(place / "nb", "01_second", SLEEPER)
    process = program("--workers", "1", *options)
    wait_for((place / "nb" / "pids").exists)
    time.sleep(0.2)
    pids = [int(pid) for pid in (place / "nb" / "pids").read_text().split()]
    process.send_signal(number)
    shown = process.communicate(timeout=30)[0]
    assert all(gone(pid) for pid in pids)
    return process.returncode, shown


def test_ctrl_c_keeps_what_was_completed_and_ends_the_rest(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown = interrupted(place, signal.SIGINT)
    assert code == 130 and "--resume" in shown
    assert (place / "build" / "00_first.html").exists()
    assert not (place / "build" / "01_second.ipynb").exists()
    assert "00_first" in (place / "build" / "index.html").read_text(encoding="utf-8")
    assert reproduce.main(["--notebooks", "00", "--resume"]) == 0
    assert "completed before" in capsys.readouterr().out


def test_nothing_keeps_running_when_the_runner_is_killed(place: Path) -> None:
    assert interrupted(place, signal.SIGKILL, "--notebooks", "01")[0] == -signal.SIGKILL


# --- requests that cannot be met -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--notebooks", "00_frist"], "no notebook '00_frist'. Did you mean '00_first'?"),
        (["--notebooks", "77"], "Known: 00_first, 01_second."),
        (["-p", "SEDE", "1"], "no parameter 'SEDE'; its parameters: MODEL, PROFILE, SEED, RATE, LAYER."),
        (["-p", "SEED", "one"], "SEED must be like its default 0, but is 'one'"),
    ],
)
def test_a_wrong_request_is_one_sentence_before_anything_runs(
    place: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce.main(options) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err and shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert not (place / "build").exists()


def test_a_model_is_refused_where_a_notebook_takes_none(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nbformat.write(new_notebook(cells=[new_code_cell("x = 1")]), place / "nb" / "02_bare.ipynb")
    assert reproduce.main(["--model", "other"]) == 2
    assert "02_bare has no parameter 'MODEL'" in capsys.readouterr().err


def test_a_build_folder_that_cannot_be_written_is_one_sentence(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "file").write_text("")
    monkeypatch.setenv("INTERP_BUILD", str(place / "file" / "build"))
    assert reproduce.main([]) == 2
    shown = capsys.readouterr().err
    assert "INTERP_BUILD" in shown and shown.count("\n") == 1


def test_damaged_notebooks_and_ledgers_are_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "nb" / "02_broken.ipynb").write_text('{"cells": [')
    assert reproduce.main([]) == 2
    assert "02_broken.ipynb" in capsys.readouterr().err
    (place / "data" / "claims.toml").write_text("[grows\n")
    assert reproduce.main([]) == 2
    assert "claims.toml" in capsys.readouterr().err


def test_usage_errors_exit_with_2() -> None:
    with pytest.raises(SystemExit) as ended:
        reproduce.main(["--workers", "0"])
    assert ended.value.code == 2


# --- planning ------------------------------------------------------------------------------------------------


def test_values_take_the_type_of_the_default(place: Path) -> None:
    given = [("SEED", "3"), ("RATE", "2"), ("LAYER", "[1, 2]"), ("MODEL", "7"), ("PROFILE", "full")]
    (path,) = reproduce.select("00")
    values = reproduce.check_parameters(path, given)
    assert values == {"SEED": 3, "RATE": 2, "LAYER": [1, 2], "MODEL": "7", "PROFILE": "full"}


def test_model_and_profile_are_parameters_and_full_lifts_the_limits(place: Path) -> None:
    options = reproduce.parse(["--model", "big", "--profile", "full"])
    assert [job.parameters for job in reproduce.plan(options)] == [{"MODEL": "big", "PROFILE": "full"}] * 2
    assert (options.cell_limit, options.notebook_limit) == (0, 0)
    assert reproduce.parse([]).cell_limit > 0 and reproduce.parse([]).notebook_limit > 0


def test_the_key_changes_with_source_parameters_and_data_but_not_with_outputs(place: Path) -> None:
    def keys(*options: str) -> list[str]:
        return [job.key for job in reproduce.plan(reproduce.parse(list(options)))]

    first = keys()
    assert keys() == first
    notebook = nbformat.read(place / "nb" / "00_first.ipynb", as_version=4)
    notebook.cells[2].execution_count = 9
    nbformat.write(notebook, place / "nb" / "00_first.ipynb")
    assert keys() == first
    notebook.cells[2].source += "\n"
    nbformat.write(notebook, place / "nb" / "00_first.ipynb")
    assert keys()[0] != first[0] and keys()[1] == first[1]
    assert keys("-p", "SEED", "1")[1] != first[1]
    (place / "data" / "facts.csv").write_text("a,b\n")
    assert keys()[1] != first[1]


def test_the_longest_known_notebook_starts_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    class Instant:
        def __init__(self, job: Job, *_: Any) -> None:
            self.job = job
            started.append(job.stem)

        def alive(self) -> bool:
            return False

    monkeypatch.setattr(reproduce, "Run", Instant)
    monkeypatch.setattr(reproduce, "settle", lambda *_: True)
    (place / "build").mkdir()
    (place / "build" / "timings.json").write_text('{"01_second": {"seconds": 9}}')
    options = reproduce.parse([])
    assert reproduce.schedule(reproduce.plan(options), options, place / "build", progress.Progress(2))
    assert started == ["01_second", "00_first"]


def test_a_page_that_cannot_be_made_is_a_failure_of_its_notebook_only(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> list[str]:
        raise RuntimeError("template lost")

    (place / "build").mkdir()
    monkeypatch.setattr(reproduce, "page", refuse)
    ended = SimpleNamespace(
        job=fake_run().job,
        finish=lambda build: {"status": "ok", "reasons": [], "seconds": 1, "peak_mb": 1},
    )
    (place / "build" / "00_first.ipynb").write_text(nbformat.writes(new_notebook()))
    assert reproduce.settle(ended, True, place / "build", progress.Progress(1)) is False  # type: ignore[arg-type]
    assert record(place / "build", "00_first")["status"] == "failed"
    assert "template lost" in capsys.readouterr().out


def test_a_full_disk_is_one_sentence(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reproduce, "schedule", full)
    assert reproduce.main([]) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


def test_a_worker_gets_its_threads_and_nobodys_profile(tmp_path: Path) -> None:
    env = child_environment(3, tmp_path)
    assert (env["OMP_NUM_THREADS"], env["MKL_NUM_THREADS"], env["PYTHONHASHSEED"]) == ("3", "3", "0")
    assert env["IPYTHONDIR"].startswith(str(tmp_path)) and "PATH" in env


def test_the_runner_does_not_import_torch() -> None:
    code = "import sys, interp_utils.reproduce; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=reproduce.ROOT).returncode == 0


# --- the verdict ---------------------------------------------------------------------------------------------


def executed(*rows: dict[str, Any], outputs: list[Any] | None = None) -> nbformat.NotebookNode:
    shown = [new_output("display_data", data={MIME: claim}) for claim in rows]
    return new_notebook(cells=[new_code_cell("f()", execution_count=1, outputs=[*shown, *(outputs or [])])])


def test_claims_must_be_made_registered_and_uncontradicted() -> None:
    assert verdict(executed(row("a", "nb")), {"a"}) == []
    assert verdict(executed(), {"a"}) == ["claim 'a' is missing"]
    assert verdict(executed(row("b", "nb")), set()) == ["claim 'b' is not registered for this notebook"]
    against = row("a", "nb", contradicted=True, recorded={"value": 0.9, "ci": [0.8, 1.0]})
    (reason,) = verdict(executed(against), {"a"})
    assert "contradicts" in reason and "0.25 [0.2, 0.3]" in reason and "0.9 [0.8, 1.0]" in reason


def test_what_stopped_a_run_explains_missing_claims() -> None:
    assert verdict(executed(), {"a"}, "passed the limit") == ["passed the limit"]


def test_a_long_coloured_error_is_one_readable_line() -> None:
    error = new_output(
        "error", ename="E", evalue="\x1b[31mfirst\x1b[0m\n" + "x " * 400 + "\nlast", traceback=[]
    )
    (reason,) = verdict(executed(outputs=[error]), set())
    assert "\n" not in reason and "\x1b" not in reason and len(reason) < 350
    assert "first" in reason and reason.endswith("last")


# --- progress ------------------------------------------------------------------------------------------------


def fake_run(seconds: float = 75) -> Any:
    job = Job("00_first", "", {}, [], "", 9)
    return SimpleNamespace(job=job, status={"cell": 3}, seconds=seconds, peak_mb=2100)


def test_without_a_terminal_a_heartbeat_comes_every_so_often(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = progress.Progress(1)
    shown.start(fake_run().job)
    shown.update(fake_run())
    monkeypatch.setattr(progress, "HEARTBEAT", 0.0)
    shown.update(fake_run())
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["00_first: started, 9 cells", "00_first: cell 4/9, 1 min 15 s, 2,100 MB"]


def test_on_a_terminal_a_bar_moves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    shown = progress.Progress(1)
    shown.start(fake_run().job)
    shown.update(fake_run())
    shown.end("00_first", {"reasons": ["it broke"], "seconds": 75, "peak_mb": 2100})
    captured = capsys.readouterr()
    assert "cell 4/9" in captured.err and "2,100 MB" in captured.err
    assert captured.out == "[1/1] 00_first: FAILED, 1 min 15 s, 2,100 MB\n    it broke\n"


def test_select_refuses_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(monkeypatch, tmp_path)
    with pytest.raises(InterpError, match="INTERP_NOTEBOOKS"):
        reproduce.select("")
