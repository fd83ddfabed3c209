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


IN_THE_WRITE = """
import os, signal, sys
from interp_utils.dictionaries import files, train
from tests.test_dictionaries_runs import CONFIG, data, made
calls = []
def dies(*_):
    calls.append(1)
    if len(calls) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
files.os.{where} = dies if "{where}" == "fsync" else lambda *a, real=os.replace: (dies(), real(*a))
train(made("topk"), data(600), CONFIG, checkpoint=sys.argv[1], checkpoint_seconds=0, progress=False)
"""


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_kill_inside_the_write_leaves_the_checkpoint_before(where: str, tmp_path: Path) -> None:
    file, steps = tmp_path / "run.safetensors", []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = IN_THE_WRITE.replace("{where}", where)
    ended = subprocess.run(
        [sys.executable, "-c", script, str(file)], env=environment, capture_output=True, timeout=100
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert len(list(tmp_path.iterdir())) == 2, "what was being written lies beside it"
    others = (tmp_path / ".run.safetensors.new", tmp_path / ".run.safetensors.b.7")
    for other in others:
        other.touch()  # not ours to remove; the second is a scratch file of "run.safetensors.b"
    rest, whole = made("topk", seed=5), made("topk")
    options: dict[str, Any] = {"checkpoint": str(file), "progress": False}
    train(rest, data(600), CONFIG, on_step=lambda step, *_: steps.append(step), **options)
    train(whole, data(600), CONFIG, progress=False)
    assert steps[0] == 9 and torch.equal(rest.W_enc, whole.W_enc)
    assert sorted(tmp_path.iterdir()) == sorted([file, *others]), "it is gone"


def test_a_full_disk_spoils_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real, calls = tmp_path / "run.safetensors", checkpoints.save_file, []

    def fails(tensors: Any, path: Any, metadata: Any) -> None:
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
        self.x, self.asked, self.card = x, [], {"model": "tiny", "n_rows": len(x), "seconds": 3}
        self.mean = {"mlp_in.1": torch.ones(D_IN), "mlp_out.1": torch.zeros(16)}
        self.scale = {"mlp_in.1": 0.5, "mlp_out.1": 2.0}

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, batch_size: int, **options: Any) -> Any:
        self.asked.append(SimpleNamespace(size=batch_size, **options))
        per_epoch, share = len(self) // batch_size, batch_size // options["world"]
        for number in range(options["start"], options["epochs"] * per_epoch):
            rows = self.x[number % per_epoch * batch_size + options["rank"] * share :][:share]
            yield (rows, rows[:, :16]) if isinstance(options["site"], tuple) else rows


def test_a_store_is_asked_for_its_sites_and_its_units_are_kept() -> None:
    store, sites = Store(data(300)), ("mlp_in.1", "mlp_out.1")
    transcoder = Dictionary.create("topk", D_IN, WIDTH, 16, k=K)
    train(transcoder, store, TrainConfig(10, ROWS, seed=7, site=sites), progress=False)
    assert store.asked == [SimpleNamespace(size=ROWS, seed=7, epochs=3, start=0, rank=0, world=1, site=sites)]
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
    for site, message in (
        ("mlp_on.1", "no site 'mlp_on.1'.*mlp_in.1"),
        (("mlp_in.1", "x"), "no site 'x'.*mlp_out"),
    ):
        with pytest.raises(InterpError, match=message):
            train(transcoder, store, TrainConfig(10, ROWS, site=site), progress=False)
    with pytest.raises(InterpError, match="a transcoder needs its input and its target.*site="):
        train(Dictionary("topk", D_IN, WIDTH, D_IN, k=K), store, TrainConfig(10, ROWS, site="mlp_in.1"))
    with pytest.raises(InterpError, match="The data has 300 rows, fewer than one batch of 301"):
        train(transcoder, store, TrainConfig(10, 301, site=sites), progress=False)


def test_a_long_training_on_a_short_store_has_the_epochs_it_needs() -> None:
    dictionary = made("topk")
    log = train(dictionary, Store(data(ROWS + 60)), TrainConfig(20, ROWS, log_every=1), progress=False)
    assert len(log) == 20


def test_a_checkpoint_knows_its_store(tmp_path: Path) -> None:
    def run(x: Tensor, scale: float = 0.5, **card: Any) -> None:
        store = Store(x)
        store.scale["mlp_in.1"] = scale
        store.card |= card
        config = TrainConfig(4, ROWS, site="mlp_in.1")
        train(made("topk"), store, config, checkpoint=tmp_path / "run", progress=False)

    run(data(300))
    run(data(300), seconds=7)
    for changed in ({"scale": 0.6}, {"weights": "reinitialised"}, {"sources": {"news": "hash"}}):
        with pytest.raises(InterpError, match="of another run .data '300 rows at mlp_in.1.* not '300 rows"):
            run(data(300), **changed)
    with pytest.raises(InterpError, match="data '300 rows .* not '280 rows"):
        run(data(280))


def test_a_checkpoint_does_not_know_a_function(tmp_path: Path) -> None:
    for seed in (0, 1):
        batches = data(600, seed=seed).split(ROWS)
        config = TrainConfig(4, ROWS)
        log = train(
            made("topk"),
            lambda s, b=batches: iter(b[s:]),
            config,
            checkpoint=tmp_path / "run",
            progress=False,
        )
        assert len(log) == 1


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
