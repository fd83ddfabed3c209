"""All activations in one pass equal the plain encoder's; the index says where they are; bad input is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from interp_utils.activation_store import ActivationStore
from interp_utils.dictionaries import Dictionary, train_small
from interp_utils.dictionaries.files import load_for, save
from interp_utils.dictionaries.kernels import pairs_above
from interp_utils.errors import InterpError
from interp_utils.features import (
    FeatureIndex,
    build_index,
    load_index,
    prompt_latents,
    save_index,
    sparse_activations,
)
from interp_utils.features.index import BUCKETS, INDEXED, PER_BUCKET, TOP
from interp_utils.harvest import harvest
from interp_utils.paths import find_data
from tests.test_activation_store import CORPORA, OPTIONS

SITE, WIDTH = "resid_post.1", 48


@pytest.fixture(scope="module")
def store(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return harvest(tiny_model("gemma3"), CORPORA, tmp_path_factory.mktemp("store"), **OPTIONS)


def dictionary(store: ActivationStore, kind: Any = "batchtopk") -> Dictionary:
    """Random, with biases and a threshold; one latent never fires."""
    made = Dictionary.create(kind, store.d(), WIDTH, k=8 if "topk" in kind else None, seed=3)
    with torch.no_grad():
        made.b_enc.copy_(torch.randn(WIDTH, generator=torch.Generator().manual_seed(4)) * 0.2 - 1.0)
        made.b_enc[7] = -1e4
        if kind == "relu":
            made.W_enc.mul_(10)  # its rows start at a norm of a tenth
    if kind in ("batchtopk", "jumprelu"):
        made.set_threshold(torch.tensor(0.5).expand(made.threshold.shape))
    return made.set_units(store.mean[SITE].float(), store.scale[SITE])


@pytest.fixture(scope="module")
def sae(store: ActivationStore) -> Dictionary:
    return dictionary(store)


@pytest.fixture(scope="module")
def index(store: ActivationStore, sae: Dictionary) -> FeatureIndex:
    return build_index(sparse_activations(sae, store, screen=False), store, dictionary="tiny")


def test_a_small_dictionary_is_trained_on_the_spot(store: ActivationStore) -> None:
    with torch.no_grad():
        small = train_small(store, SITE, WIDTH, seed=1)
    made = Dictionary.create("batchtopk", store.d(), WIDTH, k=32, seed=1)
    made.set_units(store.mean[SITE].float(), store.scale[SITE])
    x = store.read(slice(0, 512))
    lost, before = ((x - own(x)).square().sum() for own in (small, made))
    assert torch.equal(small.mean, made.mean) and lost < 0.5 * before


@pytest.mark.parametrize("kind", ["relu", "topk", "batchtopk", "jumprelu"])
def test_one_pass_gives_what_the_encoder_gives(store: ActivationStore, kind: Any) -> None:
    sae = dictionary(store, kind)
    found = sparse_activations(sae, store, slice(100, 900), batch_size=64, screen=False)
    wanted = sae.encode(store.read(slice(100, 900))).detach()
    assert found.shape == wanted.shape and 0 < found.nnz < wanted.numel()
    torch.testing.assert_close(torch.from_numpy(found.toarray()), wanted, rtol=1e-5, atol=1e-5)


def test_the_screen_loses_next_to_nothing(
    store: ActivationStore, sae: Dictionary, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = sparse_activations(sae, store, screen=False)
    screens = []

    def spy(*given: Any) -> Any:
        screens.append(given[-1])
        return pairs_above(*given)

    monkeypatch.setattr("interp_utils.features.activations.fast_screen", lambda: "bfloat16")
    monkeypatch.setattr("interp_utils.features.activations.pairs_above", spy)
    lost = abs(plain - sparse_activations(sae, store, screen=True))
    assert set(screens) == {"bfloat16"}
    assert lost.count_nonzero() <= 0.001 * plain.nnz and lost.max() < 0.6  # no larger than what barely fires


def test_the_index_agrees_with_a_plain_search(
    store: ActivationStore, sae: Dictionary, index: FeatureIndex
) -> None:
    acts = sae.encode(store.read(slice(None))).detach().numpy()
    np.testing.assert_allclose(index.density, (acts > 0).mean(0), atol=1e-6)
    np.testing.assert_allclose(index.maximum, acts.max(0), rtol=1e-5)
    np.testing.assert_array_equal(index.histogram.sum(1), (acts > 0).sum(0))
    for latent in (int((acts > 0).sum(0).argmax()), 5):
        share = acts[:, latent] / acts[:, latent].max()
        counts = np.histogram(share[share > 0], bins=20, range=(0, 1))[0]
        assert np.abs(counts - index.histogram[latent]).sum() <= 2  # rounding at the edges of bins
        strongest: dict[tuple[int, int], float] = {}
        for row in np.argsort(-acts[:, latent], kind="stable"):
            text = int(store.source[row]), int(store.document[row])
            if acts[row, latent] > 0:
                strongest.setdefault(text, float(acts[row, latent]))
        top = index.examples(latent).query("bucket == 'top'")
        assert len(top) == min(TOP, len(strongest))
        np.testing.assert_allclose(top.value, list(strongest.values())[: len(top)], rtol=1e-5)


def test_examples_are_where_they_say_and_in_their_part_of_the_range(
    store: ActivationStore, sae: Dictionary, index: FeatureIndex
) -> None:
    latent = int(index.density.argmax())
    rows = {
        (store.source_names[int(s)], int(d), int(p)): i
        for i, (s, d, p) in enumerate(zip(store.source, store.document, store.position, strict=True))
    }
    table = index.examples(latent)
    assert set(table.bucket) > {"top", "3"} and len(table) <= TOP + BUCKETS * PER_BUCKET
    for example in table.itertuples():
        row = rows[example.source, example.document, example.position]
        assert int(store.token_ids[row]) == example.token
        assert float(sae.encode(store.read([row]))[0, latent].detach()) == pytest.approx(
            example.value, rel=1e-4
        )
        if example.bucket != "top":
            part = BUCKETS - min(int(example.value / index.maximum[latent] * BUCKETS), BUCKETS - 1)
            assert str(part) == example.bucket


def test_a_latent_that_never_fires_has_no_example(index: FeatureIndex) -> None:
    assert index.examples(7).empty and index.maximum[7] == index.density[7] == 0


def test_search_by_token(index: FeatureIndex) -> None:
    token = int(index.examples(5).token.mode()[0])
    found = index.by_token(token, n=WIDTH)
    for row in found.itertuples():
        top = index.examples(row.latent).query("bucket == 'top'").token
        assert (top == token).mean() == pytest.approx(row.share)
    assert 5 in set(found.latent)
    with pytest.raises(InterpError, match="No latent"):
        index.by_token(10**6)


def test_it_comes_back_from_disk(index: FeatureIndex, tmp_path: Path) -> None:
    save_index(tmp_path, index)
    back = load_index(tmp_path)
    for latent in (5, 7):
        before, after = index.examples(latent), back.examples(latent)
        assert before.drop(columns="value").astype(str).equals(after.drop(columns="value").astype(str))
        np.testing.assert_allclose(before.value, after.value, rtol=1e-3)
    np.testing.assert_array_equal(index.histogram, back.histogram)
    assert back.card["dictionary"] == "tiny" and back.card["rows"] == index.card["rows"]
    (tmp_path / "index.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InterpError, match="hash"):
        load_index(tmp_path)


def test_prompt_latents_skip_the_start_token(
    tiny_model: Callable[..., Any], store: ActivationStore, sae: Dictionary
) -> None:
    model = tiny_model("gemma3")
    row = 37
    tokens, place = store.tokens_around(row, before=60, after=0)
    ids = [model.tokenizer.bos_token_id, *tokens]
    [acts] = prompt_latents(model, sae, SITE, [ids])
    assert acts.shape == (len(ids), WIDTH) and not acts[0].any()
    wanted = sae.encode(store.read([row]))[0]
    torch.testing.assert_close(acts[1 + place], wanted, rtol=0.05, atol=0.05)  # rows are kept in bfloat16


@pytest.mark.parametrize("latent", [-1, WIDTH])
def test_a_latent_out_of_range_is_refused(index: FeatureIndex, latent: int) -> None:
    with pytest.raises(InterpError, match=f"no latent {latent}.*0 to {WIDTH - 1}"):
        index.examples(latent)


def test_what_does_not_fit_is_refused(
    tiny_model: Callable[..., Any], store: ActivationStore, index: FeatureIndex, tmp_path: Path
) -> None:
    narrow = Dictionary.create("relu", 4, 8)
    with pytest.raises(InterpError, match="reads 4"):
        sparse_activations(narrow, store)
    with pytest.raises(InterpError, match="4"):
        prompt_latents(tiny_model("gemma3"), narrow, SITE, "the cat")
    with pytest.raises(InterpError, match="no index 'index-of-nothing'"):
        load_index("index-of-nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(InterpError, match="in steps of 2"):
        sparse_activations(dictionary(store), store, slice(0, 10, 2))
    with pytest.raises(InterpError, match="could not be written"):
        save_index(tmp_path / "file", index)


def test_a_dictionary_of_another_model_or_layer_is_refused(
    tiny_model: Callable[..., Any], sae: Dictionary, tmp_path: Path
) -> None:
    model, other = tiny_model("gemma3"), tiny_model("llama")
    data = {"model": model.info.name, "weights": model.info.weights, "sites": [SITE]}
    save(tmp_path / "own", sae, {"data": data})
    own, site = load_for(model, tmp_path / "own")
    assert site == own.site == own.raw().site == own.normalised().site == SITE
    with pytest.raises(InterpError, match="reads resid_post.1, not resid_post.0"):
        prompt_latents(model, own, "resid_post.0", "the cat")
    with pytest.raises(InterpError, match="was trained on"):
        load_for(other, tmp_path / "own")
    save(tmp_path / "deep", sae, {"data": data | {"sites": ["resid_post.99"]}})
    with pytest.raises(InterpError, match="out of range"):
        load_for(model, tmp_path / "deep")
    save(tmp_path / "bare", sae, {})
    with pytest.raises(InterpError, match="does not say"):
        load_for(model, tmp_path / "bare")


@pytest.mark.skipif(not find_data(f"artifacts/index-{INDEXED}/card.json"), reason="not made")
def test_the_shipped_index_is_of_the_shipped_dictionary() -> None:
    from interp_utils.dictionaries.files import load

    index, (sae, card) = load_index(f"index-{INDEXED}"), load(INDEXED)
    assert len(index) == sae.width and index.card["dictionary_sha256"] == card["sha256"]
    assert index.card["rows"] >= 1_000_000
    assert (index.maximum == 0).sum() == card["never_fired"]


def test_units_are_the_dictionarys_whatever_those_of_the_store(
    store: ActivationStore, sae: Dictionary
) -> None:
    other = store.like(store)
    other.mean, other.scale = {SITE: store.mean[SITE] + 1}, {SITE: 2.0}
    wanted = sparse_activations(sae, store, screen=False)
    for dictionary_, own in ((sae, other), (sae.raw(), store)):
        found = sparse_activations(dictionary_, own, screen=False)
        np.testing.assert_allclose(found.toarray(), wanted.toarray(), rtol=1e-3, atol=1e-3)


def test_the_first_position_is_left_out_without_a_start_token(
    tiny_model: Callable[..., Any], sae: Dictionary
) -> None:
    model = tiny_model("gpt2")
    acts = prompt_latents(model, sae, SITE, ["the cat sat", "the dog"])
    assert not any(own[0].any() for own in acts) and any(own[1:].any() for own in acts)
