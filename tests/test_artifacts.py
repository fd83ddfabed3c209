"""The pipeline of the shipped dictionaries, on a tiny model; and the shipped ones themselves."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from interp_utils import artifacts
from interp_utils.artifacts import MIX, SAES, Recipe, ever_fired, harvest_mix, make_sae, measured
from interp_utils.corpora import load_corpus, split_documents
from interp_utils.dictionaries import Dictionary, train
from interp_utils.dictionaries.files import load
from interp_utils.dictionaries.splice import ce_metrics
from interp_utils.errors import InterpError
from interp_utils.paths import find_data
from interp_utils.windows import draw_windows, start_token
from tests.conftest import load as load_tiny

SITE = "resid_post.1"


def texts(name: str) -> list[str]:
    draw = random.Random(name)
    words = "the cat sat on mat dog x y z rain wind".split()
    return [" ".join(draw.choices(words, k=60)) for _ in range(400)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Any:
    """A tiny model for which the artifacts are quickly made, and folders of its own."""
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("INTERP_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(artifacts, "load_corpus", texts)
    for name, value in {"SITE": SITE, "CE_PARTS": 1, "MASSIVE": (0, 1)}.items():
        monkeypatch.setattr(artifacts, name, value)
    return load_tiny(tiny_folder("llama"))


def stopped(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def without_time(card: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in card.items() if name != "seconds"}


def test_an_artifact_is_made_again_from_nothing_or_from_its_checkpoint(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = harvest_mix(small, SITE, parts=60, context=40, progress=False)
    held_out = harvest_mix(small, SITE, split="held_out", parts=10, context=40, progress=False).like(store)
    recipe = Recipe("batchtopk", 32, 4, 1e-2, epochs=2)
    sae = make_sae(recipe, small, store, held_out)
    folder = tmp_path / "data" / "artifacts" / "sae-batchtopk-32"
    first = (folder / "dictionary.safetensors").read_bytes()
    card = json.loads((folder / "card.json").read_text())
    assert card["data"]["n_rows"] == len(store) and card["tokens"] == 2 * (len(store) // 2048) * 2048
    assert set(card["held_out"]) == {"all", "without massive dimensions", *MIX}
    assert 0 < card["held_out"]["all"]["explained_variance"] <= 1 and "Gemma" in card["notice"]
    checkpoint = tmp_path / "cache" / "checkpoints" / "sae-batchtopk-32.safetensors"
    assert not checkpoint.exists(), "the next one begins from nothing"
    (folder / "card.json").unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(artifacts, "ce_metrics", stopped)
        make_sae(recipe, small, store, held_out)
    assert checkpoint.exists() and not (folder / "card.json").exists(), "no half of an artifact is written"
    trained = []
    monkeypatch.setattr(artifacts, "train", lambda *a, **o: trained.append(train(*a, **o)) or trained[-1])
    for _ in range(2):  # from the finished training's checkpoint, then from nothing
        make_sae(recipe, small, store, held_out)
        assert (folder / "dictionary.safetensors").read_bytes() == first
        assert without_time(json.loads((folder / "card.json").read_text())) == without_time(card)
    assert len(trained) == 2 and not checkpoint.exists()
    shipped, _ = load(folder)
    x = held_out.read(slice(0, 50))
    assert shipped(x).equal(sae(x)) and measured(shipped, held_out) == card["held_out"]


def test_a_shorter_harvest_is_the_beginning_of_a_longer_one(small: Any) -> None:
    short = harvest_mix(small, SITE, parts=20, context=40, progress=False)
    longer = harvest_mix(small, SITE, parts=40, context=40, progress=False)
    n = len(short) // 2
    assert short.token_ids[:n].equal(longer.token_ids[:n])
    shares = torch.bincount(longer.source.long()).float() / len(longer)
    expected = torch.tensor([float(v) for v in MIX.values()])
    torch.testing.assert_close(shares, expected / expected.sum(), atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", ["relu", "batchtopk", "jumprelu"])
def test_latents_that_ever_fire(small: Any, kind: Any) -> None:
    store = harvest_mix(small, SITE, parts=20, context=40, progress=False)
    sae = Dictionary.create(kind, store.d(), 64, k=4 if kind == "batchtopk" else None)
    with torch.no_grad():
        sae.b_enc.copy_(torch.linspace(-40, 0, 64))  # some can never fire
    if kind != "relu":
        sae.set_threshold(torch.tensor(1.5) if kind == "batchtopk" else torch.linspace(0, 3, 64))
    every = (sae.encode(store.read(slice(None))) > 0).any(0)
    assert ever_fired(sae, store, batch_size=64).equal(every) and 0 < every.sum() < 64
    with pytest.raises(InterpError, match="Latents of a topk dictionary compete"):
        ever_fired(Dictionary.create("topk", store.d(), 64, k=4), store)


def test_an_unknown_artifact_is_refused() -> None:
    with pytest.raises(InterpError, match=r"no artifact 'sae-l1-511'\. .*sae-l1-512"):
        artifacts.main(["sae-l1-511"])


SHIPPED = [name for name in SAES if find_data(f"artifacts/{name}/card.json")]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_dictionaries_load(name: str) -> None:
    sae, card = load(name)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.width), rtol=0, atol=1e-5)
    assert sae.normalised().kind == SAES[name].kind and card["tokens"] > 2e6


@pytest.mark.model
def test_a_shipped_dictionary_does_what_its_card_says(gemma: Any) -> None:
    """On other windows than the card's: the model's loss recovers as said, give or take the text."""
    sae, card = load("sae-batchtopk-8192")
    assert card["data"]["weights"] == gemma.info.weights
    held_out = {source: split_documents(load_corpus(source))[1] for source in MIX}
    drawn = draw_windows(gemma, held_out, {n: 3 * share for n, share in MIX.items()}, context=128, seed=0)
    windows = [[start_token(gemma), *map(int, window.ids)] for window in drawn]
    found = ce_metrics(gemma, sae, windows, card["data"]["sites"][0])
    assert found["recovered_mean"] == pytest.approx(card["spliced"]["recovered_mean"], abs=0.1)
    assert found["recovered_zero"] > found["recovered_mean"]
