"""The child process that executes one notebook: `python -m interp_utils.notebook_worker FOLDER`.

FOLDER holds `job.json`; the child keeps `status.json` and the executed copy, `copy.ipynb`, up to date in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from interp_utils.pages import write


def execute(folder: Path) -> None:
    """Execute the notebook which `folder/job.json` names; whatever happens is told by the files left behind."""
    import papermill
    from papermill.engines import NBClientEngine, papermill_engines
    from papermill.exceptions import PapermillExecutionError
    from papermill.iorw import LocalHandler, papermill_io

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    status: dict[str, Any] = {"kernel": None, "cell": None, "error": None}
    kernel_class, kernels = _own_kernel(folder)

    def note(**news: Any) -> None:
        status.update(news)
        write(folder / "status.json", json.dumps(status))

    class WholeFiles(LocalHandler):
        def write(self, text: str, path: str) -> None:
            write(Path(path), text)  # in one step: the child may be killed at any moment

    class Stoppable(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, manager: Any, *arguments: Any, **options: Any) -> Any:
            def stop(*_: Any) -> None:
                manager.save()  # with what the unfinished cell has printed
                os._exit(1)

            signal.signal(signal.SIGTERM, stop)
            return super().execute_managed_notebook(manager, *arguments, **options)

    papermill_io.register(os.sep, WholeFiles())
    papermill_engines.register("stoppable", Stoppable)
    threading.Thread(target=_end_with_parent, args=(job["parent"], status), daemon=True).start()
    try:
        papermill.execute_notebook(
            job["source"],
            str(folder / "copy.ipynb"),
            job["parameters"],
            engine_name="stoppable",
            kernel_name="python3",
            language="python",
            progress_bar=False,
            start_timeout=120,
            iopub_timeout=60,
            cwd=str(Path(job["source"]).parent),
            kernel_manager_class=kernel_class,
            on_cell_start=lambda cell, cell_index: note(kernel=kernels[-1].provisioner.pid, cell=cell_index),
        )
    except PapermillExecutionError:
        pass  # the copy holds the error
    except Exception as error:
        where = "before the first cell" if status["cell"] is None else f"in cell {status['cell'] + 1}"
        died = type(error).__name__ == "DeadKernelError"
        note(error=f"the kernel died {where}" if died else f"{type(error).__name__} {where}: {error}")


def _own_kernel(folder: Path) -> tuple[type, list[Any]]:
    """A kernel of this very interpreter, whatever the machine calls python3, with its sockets in `folder`.

    Ports could be taken by another notebook between choosing and opening them; paths cannot.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernels: list[Any] = []

    class OwnKernel(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=command, display_name="Python 3", language="python")

        def __init__(self, **options: Any) -> None:
            super().__init__(transport="ipc", ip=str(folder / "k"), **options)
            kernels.append(self)

    return OwnKernel, kernels


def _end_with_parent(parent: int, status: dict[str, Any]) -> None:
    """Leave nothing running when the runner itself is killed."""
    while os.getppid() == parent:
        time.sleep(1)
    if status["kernel"]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(status["kernel"], signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    execute(Path(sys.argv[1]))
