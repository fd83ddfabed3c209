"""Trainings that are killed, disks that fill, and training from an activation store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from interp_utils.dictionaries import Dictionary, TrainConfig, adam, checkpoints, train
from interp_utils.dictionaries.adam import Adam
from interp_utils.errors import InterpError
from interp_utils.paths import ROOT
from tests.test_dictionaries import D_IN, ROWS, WIDTH, K, data, made

CONFIG = TrainConfig(20, ROWS, lr=1e-2, log_every=4)

KILLED = """
import os, signal, sys
from pathlib import Path
from interp_utils.dictionaries import train
from tests.test_dictionaries_runs import CONFIG, data, made
def stop(step, *_):
    if step == 14:
        os.kill(os.getpid(), signal.SIGKILL)
train(made("batchtopk"), data(600), CONFIG, checkpoint=Path(sys.argv[1]), checkpoint_seconds=0, on_step=stop)
"""


def test_a_killed_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    file, whole, rest = tmp_path / "run.safetensors", made("batchtopk"), made("batchtopk", seed=5)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(file)]
    ended = subprocess.run(command, env=environment, capture_output=True, timeout=100)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    steps: list[int] = []
    options: dict[str, Any] = {"checkpoint": file, "progress": False}
    log = train(rest, data(600), CONFIG, on_step=lambda step, *_: steps.append(step), **options)
    expected = train(whole, data(600), CONFIG, progress=False)
    assert steps[0] in (14, 15) and steps[-1] == 20, "only what came after the last checkpoint is done again"
    assert log.drop(columns="seconds").equals(expected.drop(columns="seconds"))
    for own, other in zip(rest.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(own, other)


def test_a_full_disk_spoils_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real, calls = tmp_path / "run.safetensors", checkpoints.save_file, []

    def fails(tensors: Any, path: Path, metadata: Any) -> None:
        calls.append(path)
        real(tensors, path, metadata=metadata)
        if len(calls) == 3:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", fails)
    options: dict[str, Any] = {"checkpoint": file, "checkpoint_seconds": 0, "progress": False}
    dictionary, whole = made("topk"), made("topk")
    with pytest.raises(InterpError, match="could not be written .*No space left.*older checkpoint"):
        train(dictionary, data(600), CONFIG, **options)
    assert [path.name for path in tmp_path.iterdir()] == [file.name], "no scratch file is left"
    resumed = made("topk", seed=3)
    train(resumed, data(600), CONFIG, **options)
    train(whole, data(600), CONFIG, progress=False)
    assert torch.equal(resumed.W_enc, whole.W_enc)


class Store:
    """What `train` asks of an activation store."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.asked = x, []
        self.mean = {"mlp_in.1": torch.ones(D_IN), "mlp_out.1": torch.zeros(16)}
        self.scale = {"mlp_in.1": 0.5, "mlp_out.1": 2.0}

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, batch_size: int, **options: Any) -> Any:
        self.asked.append(SimpleNamespace(size=batch_size, **options))
        per_epoch = len(self) // batch_size
        for number in range(options["start"], options["epochs"] * per_epoch):
            rows = self.x[number % per_epoch * batch_size :][:batch_size]
            yield (rows, rows[:, :16]) if isinstance(options["site"], tuple) else rows


def test_a_store_is_asked_for_its_sites_and_its_units_are_kept() -> None:
    store, sites = Store(data(300)), ("mlp_in.1", "mlp_out.1")
    transcoder = Dictionary.create("topk", D_IN, WIDTH, 16, k=K)
    train(transcoder, store, TrainConfig(10, ROWS, seed=7, site=sites), progress=False)
    assert store.asked == [SimpleNamespace(size=ROWS, seed=7, epochs=4, start=0, rank=0, world=1, site=sites)]
    assert transcoder.mean.eq(1).all() and transcoder.target_mean.eq(0).all()
    assert float(transcoder.scale) == 0.5 and float(transcoder.target_scale) == 2
    assert transcoder.W_dec.norm(dim=1).max() < 0.5, "a transcoder's rows are free"
    with pytest.raises(InterpError, match="shape .64, 24. but .64, 8. is needed"):
        train(
            Dictionary.create("topk", 8, WIDTH, k=K),
            store,
            TrainConfig(10, ROWS, site="mlp_in.1"),
            progress=False,
        )


def test_means_of_silent_latents_never_become_denormal() -> None:
    dictionary = made("relu")
    optimiser = Adam(dictionary, (0.9, 0.999))
    zero = {name: torch.zeros_like(p) for name, p in optimiser.parameters.items()}
    with torch.no_grad():
        optimiser.step({n: torch.full_like(g, 0.1) for n, g in zero.items()}, 1e-3, None)
        start = dictionary.W_enc.clone()
        for _ in range(3 * adam.SWEEP):
            optimiser.step({n: g.clone() for n, g in zero.items()}, 1e-3, None)
            assert not any(((m != 0) & (m.abs() < 1e-38)).any() for m in optimiser.means.values())
        assert (dictionary.W_enc - start).abs().max() > 1e-3, "until then they move on as Adam says"
        for _ in range(6 * adam.SWEEP):
            optimiser.step({n: g.clone() for n, g in zero.items()}, 1e-3, None)
    assert not any(m.any() for m in optimiser.means.values())
