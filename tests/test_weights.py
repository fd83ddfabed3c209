"""Packaged weights: found, verified, converted once, and every way in which that goes wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from interp_utils import models, weights
from interp_utils.activations import str_tokens
from interp_utils.errors import InterpError
from interp_utils.interventions import generate
from interp_utils.paths import ROOT
from interp_utils.weights import Packaged, converted, find_parts, sha256
from tests import families

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def packages(gguf: Path, tmp_path: Path) -> Path:
    """Two packages that hold half of the file each, and fail when they are imported."""
    content = gguf.read_bytes()
    half = len(content) // 2
    for name, part in (("tiny_gguf_part1", content[:half]), ("tiny_gguf_part2", content[half:])):
        folder = tmp_path / "site" / name
        (folder / "data").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
        (folder / "data" / "tiny.part").write_bytes(part)
    return tmp_path / "site"


@pytest.fixture
def spec(gguf: Path, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packaged:
    """A packaged model, registered, with an empty cache."""
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))
    spec = Packaged(
        name="tiny",
        hub_id="org/tiny",
        licence="Apache-2.0",
        source="tiny-gguf 1.0",
        file="tiny.gguf",
        parts=tuple((f"tiny_gguf_part{i}", "data/tiny.part") for i in (1, 2)),
        sha256=sha256(gguf),
        gigabytes=0.001,
    )
    monkeypatch.setitem(weights.REGISTRY, "tiny", spec)
    return spec


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which models were converted."""
    made: list[str] = []
    convert = weights._convert
    monkeypatch.setattr(weights, "_convert", lambda *a: (made.append(a[2].name), convert(*a)))
    return made


def cache_entries() -> set[str]:
    folder = Path(os.environ["INTERP_CACHE"]) / "models"
    return {entry.name for entry in folder.iterdir() if entry.suffix != ".lock"}


def test_parts_are_found_without_importing_the_package(spec: Packaged) -> None:
    assert [part.name for part in find_parts(spec) or []] == ["tiny.part"] * 2
    assert not [name for name in sys.modules if name.startswith("tiny_gguf")]
    assert find_parts(replace(spec, parts=(*spec.parts, ("no_such_package_here", "x")))) is None
    assert find_parts(replace(spec, parts=((spec.parts[0][0], "data/other"),))) is None


def test_converted_model_holds_the_packages_numbers(spec: Packaged, gguf: Path) -> None:
    from gguf import GGUFReader

    model = models.load_model("tiny")
    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    expected = torch.tensor(tensors["token_embd.weight"].data.copy())
    assert torch.equal(model.embed._module.weight, expected) and expected.dtype == torch.float32
    assert str_tokens(model, "the cat sat") == ["the", " cat", " sat"]
    assert model.info.weights == f"packaged:{spec.sha256[:12]}" == spec.label
    assert (model.info.name, model.info.licence, model.info.source) == ("tiny", "Apache-2.0", "tiny-gguf 1.0")
    assert generate(model, "the cat", [[]], max_new_tokens=2).tokens.shape == (1, 2)


def test_conversion_happens_once_and_leaves_only_the_folder(spec: Packaged, conversions: list[str]) -> None:
    first, second = converted(spec), converted(spec)
    assert first == second and conversions == ["tiny"]
    assert cache_entries() == {f"tiny-{spec.sha256[:12]}"}
    names = {path.name for path in first.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "source.json"} <= names
    assert not [name for name in names if "gguf" in name]


def test_card_says_where_the_weights_come_from(spec: Packaged) -> None:
    folder = converted(spec)
    card = json.loads((folder / "source.json").read_text())
    assert (card["gguf_sha256"], card["source"], card["hub_id"]) == (spec.sha256, "tiny-gguf 1.0", "org/tiny")
    expected = {"bytes": (folder / "model.safetensors").stat().st_size}
    assert card["files"]["model.safetensors"] == {**expected, "sha256": sha256(folder / "model.safetensors")}


def test_converted_model_loads_when_the_package_is_gone(spec: Packaged, packages: Path) -> None:
    converted(spec)
    shutil.rmtree(packages)
    assert models.load_model("tiny").info.weights == spec.label


def test_hub_id_of_a_packaged_model_means_the_package(spec: Packaged) -> None:
    assert models.load_model("org/tiny").info.weights == spec.label


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (
            lambda f: os.truncate(f / "model.safetensors", 1000),
            "model.safetensors has 1,000 bytes instead of",
        ),
        (lambda f: flip_last_byte(f / "model.safetensors"), "model.safetensors has another sha256"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "source.json").unlink(), "source.json is missing"),
        (lambda f: (f / "source.json").write_text("{"), "source.json cannot be read"),
        (lambda f: (f / "source.json").write_text("[]"), "source.json cannot be read"),
    ],
)
def test_a_damaged_cache_warns_in_one_sentence_and_is_converted_again(
    spec: Packaged, conversions: list[str], harm: Any, what: str
) -> None:
    folder = converted(spec)
    sound = sha256(folder / "model.safetensors")
    harm(folder)
    with pytest.warns(UserWarning, match=f"^Cached weights of tiny: {what}.*; converting again.$") as caught:
        converted(spec)
    assert len([w for w in caught if "Cached" in str(w.message)]) == 1
    assert conversions == ["tiny", "tiny"] and sha256(folder / "model.safetensors") == sound
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted(spec)


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_wrong_hash_says_to_reinstall(spec: Packaged, packages: Path) -> None:
    flip_last_byte(packages / "tiny_gguf_part2" / "data" / "tiny.part")
    with pytest.raises(
        InterpError, match=f"tiny have sha256 .* instead of {spec.sha256[:12]}.*force-reinstall"
    ):
        models.load_model("tiny")
    assert cache_entries() == set()


def test_missing_package_says_what_to_install(spec: Packaged, packages: Path) -> None:
    shutil.rmtree(packages / "tiny_gguf_part2")
    sentence = (
        "weights of tiny are not installed; run .*requirements-models.txt.*tiny-gguf 1.0.*weights='hub'"
    )
    with pytest.raises(InterpError, match=sentence):
        models.load_model("tiny", weights="packaged")
    with pytest.raises(
        InterpError, match="'org/tiny' is not in the local hub cache.*install its packaged weights"
    ):
        models.load_model("tiny")


def test_a_full_disk_is_noticed_before_the_conversion(
    spec: Packaged, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**5, 10**5))
    with pytest.raises(InterpError, match="needs 0.001 GB in .* but 0.0 GB are free.*INTERP_CACHE"):
        converted(spec)
    assert conversions == [] and cache_entries() == set()


@pytest.mark.parametrize(
    "error", [FULL, SafetensorError(f"Error while serializing: I/O error: {FULL.strerror} (os error 28)")]
)
def test_a_disk_that_fills_up_leaves_nothing_behind(
    spec: Packaged, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(folder: Path, _spec: Packaged) -> None:
        assert (folder / "model.safetensors").exists()  # the work is nearly done
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(weights, "_write_card", fail)
        with pytest.raises(InterpError, match="filled up while converting tiny.*removed.*INTERP_CACHE"):
            converted(spec)
    assert cache_entries() == set()
    converted(spec)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("something else")])
def test_an_interrupted_conversion_leaves_nothing_behind(
    spec: Packaged, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(weights, "_write_card", fail)
    with pytest.raises(type(error)):
        converted(spec)
    assert cache_entries() == set()


def test_what_a_killed_conversion_left_is_removed_by_the_next(spec: Packaged) -> None:
    left = Path(os.environ["INTERP_CACHE"]) / "models" / f".tiny-{spec.sha256[:12]}.4194305"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    converted(spec)
    assert cache_entries() == {f"tiny-{spec.sha256[:12]}"}


def test_an_unwritable_cache_is_named(
    spec: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        InterpError, match="model cache .*file/cache/models cannot be written.*set INTERP_CACHE"
    ):
        models.load_model("tiny", weights="packaged")


def test_two_threads_convert_once(spec: Packaged, conversions: list[str]) -> None:
    threads = [threading.Thread(target=converted, args=(spec,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert conversions == ["tiny"]


def test_two_processes_convert_once(spec: Packaged, packages: Path) -> None:
    code = (
        "from interp_utils import weights as w; from pathlib import Path; import sys\n"
        "convert = w._convert\n"
        "w._convert = lambda *a: (print('converted'), convert(*a))\n"
        f"print(w.converted(w.{spec!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(packages), str(ROOT)])}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sum(output.count("converted") for output in outputs) == 1
    assert len({output[-1] for output in outputs}) == 1


@pytest.mark.model
@pytest.mark.parametrize("name", list(weights.REGISTRY))
def test_real_packages_are_installed_and_their_labels_recorded(name: str) -> None:
    spec = weights.REGISTRY[name]
    parts = find_parts(spec)
    assert parts and len(parts) == len(spec.parts)
    assert spec.label.startswith("packaged:") and len(spec.label) == 21
