"""`load_model`: every source of weights, uniform names, and every name that cannot be loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig

from interp_utils import models, weights
from interp_utils.activations import next_token_logits, top_tokens
from interp_utils.errors import InterpError
from interp_utils.models import ModelInfo, load_model
from interp_utils.paths import ROOT
from tests import families

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_every_family_has_the_same_names(family: str, model: Any, tiny_folder: Callable[[str], Path]) -> None:
    raw = families.raw_model(tiny_folder(family))
    assert len(model.layers) == len(families.raw_blocks(raw))
    assert torch.equal(model.embed._module.weight, raw.get_input_embeddings().weight)
    assert torch.equal(model.unembed._module.weight, raw.get_output_embeddings().weight)
    assert model.final_norm._module.weight.shape == (32,)


def test_info_of_a_local_folder_follows_its_weights(tmp_path: Path, model: Any, family: str) -> None:
    folder = families.build(tmp_path / "same", family)
    again = load_model(str(folder)).info
    assert again == ModelInfo("same", model.info.weights, "", str(folder), False)
    assert again.weights.startswith("local:") and len(again.weights) == 18
    other = load_model(str(families.build(tmp_path / "other", family, initializer_range=0.1)))
    assert other.info.weights != again.weights


def test_weights_are_frozen_and_of_the_asked_type(tiny_folder: Callable[[str], Path]) -> None:
    for dtype in ("bfloat16", torch.bfloat16):
        model = load_model(str(tiny_folder("llama")), dtype=dtype, device="cpu")
        assert {p.dtype for p in model._module.parameters()} == {torch.bfloat16}
    assert not model._module.training and not any(p.requires_grad for p in model._module.parameters())


def test_unembedding_is_never_without_a_padding_token(model: Any) -> None:
    assert model.tokenizer.pad_token_id is not None


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in offline mode, but nobody answers."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)


def test_a_cached_hub_id_loads_offline(
    hub_cache: Path, tiny_folder: Callable[[str], Path], llama: Any
) -> None:
    families.as_hub_cache(hub_cache, "org/tiny-llama", tiny_folder("llama"), COMMIT)
    found = load_model("org/tiny-llama")
    assert found.info == ModelInfo("org/tiny-llama", f"hub:{COMMIT[:12]}", "", "org/tiny-llama", False)
    assert torch.equal(next_token_logits(found, "the cat"), next_token_logits(llama, "the cat"))


@pytest.mark.usefixtures("unreachable")
def test_a_cached_hub_id_loads_when_the_hub_does_not_answer(
    hub_cache: Path, tiny_folder: Callable[[str], Path]
) -> None:
    families.as_hub_cache(hub_cache, "org/tiny-llama", tiny_folder("llama"), COMMIT)
    assert load_model("org/tiny-llama").info.weights == f"hub:{COMMIT[:12]}"


def test_weights_hub_prefers_the_hub_to_the_package(
    hub_cache: Path, tiny_folder: Callable[[str], Path]
) -> None:
    spec = weights.REGISTRY["smollm2-135m-instruct"]
    families.as_hub_cache(hub_cache, spec.hub_id, tiny_folder("llama"), COMMIT)
    info = load_model(spec.name, weights="hub").info
    assert info == ModelInfo(spec.name, f"hub:{COMMIT[:12]}", spec.licence, spec.hub_id, False)


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_id_offline_is_refused_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(InterpError, match="'org/none' is not in the local hub cache.*connect to the network"):
        load_model("org/none")
    assert time.monotonic() - began < 5


@pytest.mark.usefixtures("hub_cache", "unreachable")
def test_a_hub_that_does_not_answer_is_given_up_soon() -> None:
    began = time.monotonic()
    with pytest.raises(InterpError, match="'org/none' is not in the local hub cache"):
        load_model("org/none")
    with pytest.raises(InterpError, match="or install its packaged weights"):
        load_model("smollm2-135m-instruct", weights="hub")
    assert time.monotonic() - began < 5


@pytest.mark.usefixtures("hub_cache", "unreachable")
def test_a_hub_that_hangs_is_given_up_after_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_session", lambda: time.sleep(30))
    began = time.monotonic()
    assert models.online(timeout=0.2) is False
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("name", ["org/none/extra", "org/bad name", "/no/such/folder", "./none"])
@pytest.mark.usefixtures("hub_cache")
def test_what_is_no_hub_id_is_refused(name: str) -> None:
    with pytest.raises(InterpError):
        load_model(name)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("gemma-3-270", {}, "No model is called 'gemma-3-270'.*Did you mean 'gemma-3-270m'"),
        ("SmolLM2", {}, "Did you mean 'smollm2-135m-instruct'"),
        ("zzzz", {}, "Known: gemma-3-270m, smollm2-135m-instruct"),
        ("", {}, "No model is called ''"),
        ("org/model", {"weights": "packaged"}, "org/model has no packaged weights; these have: gemma-3-270m"),
        ("gemma-3-270m", {"weights": "gguf"}, "weights='gguf' is not known; use 'auto', 'packaged' or 'hub'"),
        ("gemma-3-270m", {"dtype": "float31"}, "dtype='float31' is not known"),
        ("gemma-270", {"remote": True}, "remote=True needs a hub id.*Did you mean 'gemma-3-270m'"),
        ("gemma-3-270m", {"remote": True}, "remote=True needs a key for NDIF; set NDIF_API_KEY"),
    ],
)
def test_bad_arguments_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], sentence: str
) -> None:
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    monkeypatch.setattr("nnsight.CONFIG.API.APIKEY", None)
    unchecked: Any = getattr(load_model, "__wrapped__", load_model)
    with pytest.raises(InterpError, match=sentence):
        unchecked(name, **options)


def test_remote_without_a_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NDIF_API_KEY", "a key")
    with pytest.raises(InterpError, match="remote=True needs a network for 'google/gemma-3-270m'"):
        load_model("gemma-3-270m", remote=True)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InterpError, match="not a Hugging Face model: config.json and .*safetensors are needed"
    ):
        load_model(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = families.build(tmp_path, "llama")
    torch.save(families.raw_model(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InterpError, match="pickled weights are never loaded"):
        load_model(str(folder))


def test_pickled_weights_of_a_hub_model_are_refused(hub_cache: Path, tmp_path: Path) -> None:
    folder = families.build(tmp_path / "model", "llama")
    torch.save(families.raw_model(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    families.as_hub_cache(hub_cache, "org/pickled", folder, COMMIT)
    with pytest.raises(InterpError, match="org/pickled cannot be loaded"):
        load_model("org/pickled")


def test_remote_code_is_never_trusted(tmp_path: Path) -> None:
    folder = families.build(tmp_path, "llama")
    config = (folder / "config.json").read_text()
    own = '"auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}, "model_type": "own"'
    (folder / "config.json").write_text(config.replace('"model_type": "llama"', own))
    (folder / "own.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(InterpError, match="cannot be loaded"):
        load_model(str(folder))


@pytest.mark.parametrize("keep", [0, 5, 5000])
def test_truncated_weights_of_a_folder_are_one_sentence(tmp_path: Path, keep: int) -> None:
    folder = families.build(tmp_path, "llama")
    os.truncate(folder / "model.safetensors", keep)
    with pytest.raises(InterpError, match="cannot be loaded"):
        load_model(str(folder))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_broken_json_file_is_one_sentence(tmp_path: Path, file: str) -> None:
    folder = families.build(tmp_path, "llama")
    (folder / file).write_text("{")
    with pytest.raises(InterpError, match="cannot be loaded"):
        load_model(str(folder))


@pytest.mark.filterwarnings("ignore:Module .* has a submodule named")
def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InterpError, match="an architecture without layers, .*Gemma 3, Llama-style, GPT-2"):
        load_model(str(families.build_bert(tmp_path)))


@pytest.mark.parametrize(
    ("config", "key"), [(GraniteConfig, "logits_scaling"), (CohereConfig, "logit_scale")]
)
def test_scaled_logits_are_refused(tmp_path: Path, config: Any, key: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    for factor in (0.5, 1.0):
        folder = tmp_path / str(factor)
        raw = AutoModelForCausalLM.from_config(config(vocab_size=280, **sizes, **special, **{key: factor}))
        raw.save_pretrained(folder)
        families.tiny_tokenizer().save_pretrained(folder)
    load_model(str(tmp_path / "1.0"))
    with pytest.raises(InterpError, match=rf"its logits \({key}=0.5\).*choose another model"):
        load_model(str(tmp_path / "0.5"))


def test_a_strided_slice_reaches_the_unembedding_contiguous(llama: Any) -> None:
    seen: list[tuple[torch.Size, bool]] = []
    unembed = llama.unembed._module
    hook = unembed.register_forward_pre_hook(
        lambda _, args: seen.append((args[0].shape, args[0].is_contiguous()))
    )
    resid = torch.randn(3, 5, 32)
    try:
        found = unembed(resid[:, -1:])
    finally:
        hook.remove()
    assert not resid[:, -1:].is_contiguous() and seen == [((3, 1, 32), True)]
    torch.testing.assert_close(found, resid[:, -1:] @ unembed.weight.T)


def test_ipython_shows_one_sentence() -> None:
    code = (
        "from IPython.core.interactiveshell import InteractiveShell as Shell\n"
        "cell = 'from interp_utils.models import load_model\\nload_model(\"gemma-3-270\")'\n"
        "Shell.instance(colors='nocolor').run_cell(cell)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-c", code]
    shown = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=120)
    lines = [line for line in (shown.stdout + shown.stderr).splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("InterpError: No model is called 'gemma-3-270'")


@pytest.mark.model
def test_smollm2_knows_the_capital_of_france(smollm2: Any) -> None:
    best = top_tokens(smollm2, next_token_logits(smollm2, "The capital of France is")[0])
    assert best[0][0] == " Paris"


@pytest.mark.model
@pytest.mark.parametrize(
    ("fixture", "name", "seconds"),
    [("smollm2", "smollm2-135m-instruct", 3), ("gemma", "gemma-3-270m", 8)],
)
def test_a_second_load_is_quick(
    fixture: str, name: str, seconds: float, request: pytest.FixtureRequest
) -> None:
    first = request.getfixturevalue(fixture)
    began = time.monotonic()
    again = load_model(name)
    assert time.monotonic() - began < 2 * seconds  # machines are shared
    assert again.info == first.info and again.info.weights == weights.REGISTRY[name].label
