"""The same training under `torchrun`: two gloo processes against one, at the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from interp_utils.dictionaries import Dictionary, TrainConfig, train
from interp_utils.errors import InterpError
from interp_utils.paths import ROOT
from tests.test_dictionaries import KINDS, ROWS, WIDTH, K, close, data, made, with_silent
from tests.test_dictionaries_runs import Store

STEPS = 12

SCRIPT = """
import sys, torch
import torch.distributed as dist
from pathlib import Path
from safetensors.torch import load_file, save_file
from tests.test_dictionaries_ranks import refused, resumed, whole_run
torch.set_num_threads(1)
start, out = load_file(sys.argv[1]), {}
for name in sys.argv[3].split(","):
    own = Path(sys.argv[2]).with_name(f"{name}.{dist.get_rank() if dist.is_initialized() else 0}")
    dictionary, losses = whole_run(name, start, own)
    out |= {f"{name}/{key}": t for key, t in dictionary.state_dict().items()} | {f"{name}/losses": losses}
    out |= {f"{name}/resumed/{key}": t for key, t in resumed(name, start, own).items()}
print(*refused(Path(sys.argv[2]).parent), sep=chr(10), flush=True)
if dist.get_rank() == 0:
    save_file(out, sys.argv[2])
dist.barrier()
dist.destroy_process_group()
"""


# A kind, on a tensor and all in float32 (in bfloat16 every process would round its own part of a dense product), or
# on a store and with a screen.
RUNS = (*KINDS, "topk-store", "batchtopk-store")


def whole_run(
    name: str, start: dict[str, torch.Tensor], checkpoint: Path | None = None, stop: int = STEPS
) -> tuple[Dictionary, torch.Tensor]:
    """A training from given weights, which only the first process has, on this process's share of the batches."""
    kind, _, store = name.partition("-")
    dictionary = made(kind, seed=rank_here())
    if not rank_here():
        dictionary.load_state_dict({n.split("/")[1]: t for n, t in start.items() if n.startswith(f"{kind}/")})
    l1, screen = 2.0 if kind == "relu" else None, "bfloat16" if store else None
    config = TrainConfig(STEPS, ROWS, lr=1e-3, dead_tokens=3 * ROWS, log_every=1, screen=screen, l1=l1)

    def stopped(step: int, *_: Any) -> None:
        if step > stop:
            raise KeyboardInterrupt

    options = {"progress": False, "checkpoint": checkpoint, "checkpoint_seconds": 0, "on_step": stopped}
    log = train(dictionary, Store(data(600)) if store else data(600), config, **options)
    if kind in ("topk", "batchtopk"):
        assert log["dead_share"].iloc[-1] > 0.1, "AuxK is to be at work"
    return dictionary, torch.tensor(log["loss"].tolist())


def rank_here() -> int:
    return int(os.environ.get("RANK", 0))


def resumed(name: str, start: dict[str, torch.Tensor], checkpoint: Path) -> dict[str, torch.Tensor]:
    """The same, stopped and continued: every process looks for a checkpoint of its own, and only one has it."""
    checkpoint = checkpoint.with_suffix(f".stopped{rank_here()}")
    with suppress(KeyboardInterrupt):
        whole_run(name, start, checkpoint, stop=6)
    assert checkpoint.exists() == (rank_here() == 0)
    return whole_run(name, {k: torch.zeros_like(t) for k, t in start.items()}, checkpoint)[0].state_dict()


def refused(folder: Path) -> list[str]:
    """What every process says of a run that is not the checkpoint's, and of one that not all are given."""
    said = []
    for width, steps, name in ((WIDTH, 3, "refused"), (48, 3, "refused"), (48, 3 + rank_here(), "other")):
        config = TrainConfig(steps, ROWS, screen=None)
        try:
            train(made("relu", width=width), data(600), config, checkpoint=folder / name, progress=False)
        except InterpError as error:
            said.append(f"{rank_here()}: {error}")
    return said


def test_two_processes_equal_one(tmp_path: Path) -> None:
    start = {
        f"{kind}/{name}": t for kind in KINDS for name, t in with_silent(made(kind)).state_dict().items()
    }
    save_file(start, tmp_path / "start")
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(tmp_path / "run.py")]
    command += [str(tmp_path / "start"), str(tmp_path / "out"), ",".join(RUNS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    both = load_file(tmp_path / "out")
    for run in RUNS:
        alone, losses = whole_run(run, start)
        torch.testing.assert_close(both[f"{run}/losses"], losses, rtol=1e-5, atol=0)
        for name, tensor in alone.state_dict().items():
            close(both[f"{run}/{name}"], tensor)
            assert torch.equal(both[f"{run}/resumed/{name}"], both[f"{run}/{name}"])
    for rank in (0, 1):
        assert (
            f"{rank}: The checkpoint {tmp_path / 'refused'} is of another run (width 96, not 48)"
            in done.stdout
        )
        assert f"{rank}: The processes differ in steps; call train with the same" in done.stdout


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "interp_utils.dictionaries.parallel.Ranks.__init__", lambda self: vars(self).update(rank=0, world=3)
    )
    with pytest.raises(InterpError, match="batch_size 64 cannot be shared equally by 3 processes"):
        train(Dictionary.create("topk", 24, 96, k=K), data(200), TrainConfig(2, ROWS), progress=False)
