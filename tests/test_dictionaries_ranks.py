"""The same training under `torchrun`: two gloo processes against one, at the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from interp_utils.dictionaries import Dictionary, TrainConfig, train
from interp_utils.errors import InterpError
from interp_utils.paths import ROOT
from tests.test_dictionaries import KINDS, ROWS, K, close, data, made

STEPS = 12

SCRIPT = """
import sys, torch
import torch.distributed as dist
from pathlib import Path
from safetensors.torch import load_file, save_file
from tests.test_dictionaries_ranks import whole_run
torch.set_num_threads(1)
start, out = load_file(sys.argv[1]), {}
for kind in sys.argv[3].split(","):
    dictionary, losses = whole_run(kind, start, Path(sys.argv[2]).with_suffix(f".{kind}"))
    out |= {f"{kind}/{name}": t for name, t in dictionary.state_dict().items()} | {f"{kind}/losses": losses}
if dist.get_rank() == 0:
    save_file(out, sys.argv[2])
dist.barrier()
dist.destroy_process_group()
"""


def whole_run(
    kind: str, start: dict[str, torch.Tensor], checkpoint: Path | None = None
) -> tuple[Dictionary, torch.Tensor]:
    """A training from given weights, on this process's share of the batches."""
    dictionary = made(kind)
    dictionary.load_state_dict({n.split("/")[1]: t for n, t in start.items() if n.startswith(f"{kind}/")})
    l1 = 2.0 if kind == "relu" else None
    # In bfloat16 every process would round its own part of a dense product.
    config = TrainConfig(STEPS, ROWS, lr=1e-3, dead_tokens=3 * ROWS, log_every=1, screen=None, l1=l1)
    log = train(dictionary, data(600), config, progress=False, checkpoint=checkpoint, checkpoint_seconds=0)
    return dictionary, torch.tensor(log["loss"].tolist())


def test_two_processes_equal_one(tmp_path: Path) -> None:
    start = {f"{kind}/{name}": t for kind in KINDS for name, t in made(kind).state_dict().items()}
    save_file(start, tmp_path / "start")
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(tmp_path / "run.py")]
    command += [str(tmp_path / "start"), str(tmp_path / "out"), ",".join(KINDS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    both = load_file(tmp_path / "out")
    for kind in KINDS:
        alone, losses = whole_run(kind, start)
        torch.testing.assert_close(both[f"{kind}/losses"], losses, rtol=1e-5, atol=0)
        for name, tensor in alone.state_dict().items():
            close(both[f"{kind}/{name}"], tensor)
        stored = load_file((tmp_path / "out").with_suffix(f".{kind}"))
        assert torch.equal(stored["dictionary.W_dec"], both[f"{kind}/W_dec"]), (
            "the first process keeps the state"
        )


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "interp_utils.dictionaries.parallel.Ranks.__init__", lambda self: vars(self).update(rank=0, world=3)
    )
    with pytest.raises(InterpError, match="batch_size 64 cannot be shared equally by 3 processes"):
        train(Dictionary.create("topk", 24, 96, k=K), data(200), TrainConfig(2, ROWS), progress=False)
