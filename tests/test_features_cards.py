"""Cards show what the model saw and what plain code computes; text that differs here is left out, not an error."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch

from interp_utils.activation_store import ActivationStore
from interp_utils.activations import next_token_logits
from interp_utils.corpora import corpus_hash, split_documents
from interp_utils.dictionaries import Dictionary
from interp_utils.errors import InterpError
from interp_utils.features import FeatureIndex, build_index, prompt_latents, sparse_activations
from interp_utils.features import contexts as contexts_module
from interp_utils.features.cards import excerpt_html, feature_card, feature_rows, histogram_svg
from interp_utils.features.contexts import QUOTED, Contexts, Window
from interp_utils.features.effects import ablation, logit_weights, neighbours, top_tokens_of
from interp_utils.features.excerpts import Excerpt, excerpts, latent_on_windows
from interp_utils.harvest import harvest
from tests.families import raw_model

SITE, CONTEXT = "resid_post.1", 24
WORDS = "the cat sat on the mat; the dog, the cat <b> x y z".split()


def documents(seed: int, n: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(30, 60))) for _ in range(n)]


TEXTS = {"one": documents(1, 40), "two": documents(2, 40)}


@pytest.fixture(autouse=True)
def texts(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The corpora by name, which a test may change."""
    here = {name: list(own) for name, own in TEXTS.items()}
    monkeypatch.setattr(contexts_module, "load_corpus", here.__getitem__)
    return here


@pytest.fixture(scope="module")
def gemma3(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("gemma3")


@pytest.fixture(scope="module")
def store(gemma3: Any, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    train = {name: split_documents(own)[0] for name, own in TEXTS.items()}
    folder = tmp_path_factory.mktemp("cards")
    options: dict[str, Any] = {"context": CONTEXT, "compute": "float32", "progress": False}
    return harvest(gemma3, train, folder, sites=[SITE], tokens=3000, **options)


@pytest.fixture(scope="module")
def sae(store: ActivationStore) -> Dictionary:
    made = Dictionary.create("batchtopk", store.d(), 40, k=4, seed=3)
    made.set_threshold(torch.tensor(0.1))
    return made.set_units(store.mean[SITE].float(), store.scale[SITE]).requires_grad_(False)


@pytest.fixture(scope="module")
def index(store: ActivationStore, sae: Dictionary) -> FeatureIndex:
    return build_index(sparse_activations(sae, store, screen=False), store, dictionary="tiny")


@pytest.fixture(scope="module")
def latent(index: FeatureIndex) -> int:
    """One with examples in all fifths of its range."""
    full = [i for i in range(len(index)) if index.examples(i).bucket.nunique() == 6]
    return full[0]


@pytest.fixture
def contexts(gemma3: Any, index: FeatureIndex) -> Contexts:
    return Contexts(gemma3, index.card)


class Reader(HTMLParser):
    """Text and tags of a page; fails on tags that are not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("br", "rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_windows_are_what_the_store_was_made_of(
    store: ActivationStore, contexts: Contexts, gemma3: Any
) -> None:
    ids, names = store.token_ids.tolist(), store.source_names
    for row in range(0, len(store), 97):
        place = names[store.source[row]], int(store.document[row]), int(store.position[row])
        window = contexts.window(*place)
        assert window is not None and window.ids[0] == gemma3.tokenizer.bos_token_id
        assert window.ids[window.place] == ids[row]
        assert window.place == 1 + place[2] % (CONTEXT - 1) and len(window.ids) <= CONTEXT
        near, at = store.tokens_around(row, before=window.place - 1, after=len(window.ids) - window.place - 1)
        assert near == window.ids[1:] and near[at] == ids[row]
        if row + 1 < len(store) and store.position[row + 1] == place[2] + 1:
            assert window.next_id == ids[row + 1]


def test_quotations_are_short_and_hold_the_token() -> None:
    for place in (1, 5, 30):
        window = Window(list(range(100, 100 + place + 5)), place, None)
        shown = window.ids[window.shown]
        assert window.ids[place] in shown and window.ids[0] not in shown and len(shown) <= QUOTED


def test_activations_on_windows_are_the_stores(
    store: ActivationStore, contexts: Contexts, gemma3: Any, sae: Dictionary, index: FeatureIndex, latent: int
) -> None:
    own = index.examples(latent)
    windows = [contexts.window(r.source, r.document, r.position) for r in own.itertuples()]
    assert all(windows)
    found = latent_on_windows(gemma3, sae, SITE, latent, windows)  # type: ignore[arg-type]
    now = [float(acts[w.place]) for acts, w in zip(found, windows, strict=True)]  # type: ignore[union-attr]
    np.testing.assert_allclose(now, own.value, rtol=0.02, atol=0.02)  # rows are kept in bfloat16
    alone = prompt_latents(gemma3, sae, SITE, windows[0].ids)[0][:, latent]  # type: ignore[union-attr]
    torch.testing.assert_close(found[0], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu"])
def test_one_column_is_that_of_the_encoder(gemma3: Any, kind: Any) -> None:
    other = Dictionary.create(kind, 32, 12, k=2 if kind == "topk" else None, seed=1).requires_grad_(False)
    window = Window([2, *range(20, 40)], 3, None)
    for latent in range(12):
        wanted = prompt_latents(gemma3, other, SITE, window.ids)[0][:, latent]
        found = latent_on_windows(gemma3, other, SITE, latent, [window])[0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_card_has_all_its_parts(
    gemma3: Any, sae: Dictionary, index: FeatureIndex, contexts: Contexts, latent: int
) -> None:
    page = Reader(feature_card(latent, gemma3, sae, SITE, index, contexts, title="<i>cats</i>"))
    assert f"Latent {latent}: <i>cats</i>" in page.text and not {"script", "i", "img", "link"} & {
        tag for tag, _ in page.seen
    }
    for part in (
        "largest activation",
        "Logit weights",
        "Nearest latents",
        "log-probabilities fall most",
        "fifth 5",
    ):
        assert part in page.text
    alts = [attrs.get("aria-label", "") for tag, attrs in page.seen if tag == "svg"]
    assert len(alts) == 1 and ", ".join(map(str, index.histogram[latent])) in alts[0]
    assert not any("http" in str(attrs) for _, attrs in page.seen)
    assert all("color" in attrs["style"] for tag, attrs in page.seen if tag == "mark")


def test_the_number_at_the_peak_is_printed_and_text_is_escaped() -> None:
    shown = Excerpt("top", "one", ["<b>", " cat", "\n"], [0.0, 2.0, 0.7], 1, Window([2, 3, 4, 5], 2, None))
    page = Reader(excerpt_html(shown, 2.0))
    assert page.text == "<b> cat2.0⏎" and [tag for tag, _ in page.seen].count("mark") == 2


def test_the_histogram_has_a_bar_for_each_bin(index: FeatureIndex, latent: int) -> None:
    page = Reader(histogram_svg(index, latent))
    tall = [float(attrs["height"]) for tag, attrs in page.seen if tag == "rect"]
    counts = index.histogram[latent]
    wanted = 96 * np.log10(counts + 1) / np.log10(counts.max() + 1)
    np.testing.assert_allclose(tall, wanted, atol=0.06)


def test_excerpts_are_the_strongest_ones(
    gemma3: Any, sae: Dictionary, index: FeatureIndex, contexts: Contexts, latent: int
) -> None:
    found = excerpts(latent, gemma3, sae, SITE, index, contexts, top=3, per_bucket=1)
    assert [e.bucket for e in found] == ["top"] * 3 + ["1", "2", "3", "4", "5"]
    own = index.examples(latent)
    now = [e.values[e.peak] for e in found[:3]]
    np.testing.assert_allclose(now, own.value[:3], rtol=0.02, atol=0.02)  # rows are kept in bfloat16
    for e, token in zip(found[:3], own.token, strict=False):
        assert (
            e.tokens[e.peak] == gemma3.tokenizer.decode([token]) and len(e.tokens) == len(e.values) <= QUOTED
        )


def test_logit_weights_are_the_norm_and_the_unembedding(
    tiny_model: Callable[..., Any], tiny_folder: Callable[[str], Any]
) -> None:
    for family in ("gemma3", "gpt2", "llama"):
        raw, made = raw_model(tiny_folder(family)), Dictionary.create("relu", 32, 6, seed=1)
        name = {"gpt2": "transformer.ln_f"}.get(family, "model.norm")
        weight = raw.get_submodule(name).weight
        gain = 1 + weight if family == "gemma3" else weight
        row = made.W_dec[2] / made.W_dec[2].norm()
        if family == "gpt2":
            row = row - row.mean()
        slow = raw.get_output_embeddings().weight @ (gain * row)
        slow = (slow - slow.mean()) / slow.std()
        found = logit_weights(tiny_model(family), made, 2)
        torch.testing.assert_close(found, slow.detach(), rtol=1e-3, atol=1e-3)


def test_neighbours_are_the_largest_cosines(sae: Dictionary) -> None:
    rows = sae.W_dec
    cosine = {i: float(torch.cosine_similarity(rows[4], rows[i], dim=0)) for i in range(40) if i != 4}
    best = sorted(cosine, key=lambda i: -cosine[i])[:3]
    assert [i for i, _ in neighbours(sae, 4, 3)] == best
    assert neighbours(sae, 4, 1)[0][1] == pytest.approx(cosine[best[0]], abs=1e-6)


def test_ablation_takes_the_latents_own_part_away(
    gemma3: Any, sae: Dictionary, contexts: Contexts, store: ActivationStore, oracle_of: Callable[[str], Any]
) -> None:
    windows = [contexts.window("one", 3, 12), contexts.window("two", 1, 4)]
    acts = [2.0, 3.0]
    found = ablation(gemma3, sae, SITE, 5, windows, acts)  # type: ignore[arg-type]
    change = []
    for window, a in zip(windows, acts, strict=True):
        ids = window.ids[: window.place + 1]  # type: ignore[union-attr]
        before = next_token_logits(gemma3, [ids])[0].log_softmax(-1)
        after = oracle_of("gemma3")(ids, -a * sae.W_dec[5] / sae.scale).log_softmax(-1)
        change.append(after - before)
    torch.testing.assert_close(found.change, torch.stack(change).mean(0), rtol=1e-3, atol=1e-4)
    own = [float(c[w.next_id]) for c, w in zip(change, windows, strict=True)]  # type: ignore[union-attr,index]
    assert found.n == 2 and found.next_token == pytest.approx(np.mean(own), abs=1e-4)
    falls = [value for _, value in found.most(3, fall=True)]
    assert falls == sorted(falls) and all(value < 0 for value in falls)
    assert float(found.change.abs().max()) > 1e-3


@pytest.fixture
def oracle_of(tiny_folder: Callable[[str], Any]) -> Callable[[str], Any]:
    """Next-token logits with a vector added to the last state of layer 1, by a plain hook."""

    def of(family: str) -> Any:
        raw = raw_model(tiny_folder(family))

        def run(ids: list[int], vector: torch.Tensor) -> torch.Tensor:
            def hook(_m: Any, _a: Any, output: torch.Tensor) -> torch.Tensor:
                output[0, -1] += vector
                return output

            handle = raw.model.layers[1].register_forward_hook(hook)
            with torch.no_grad():
                logits = raw(input_ids=torch.tensor([ids])).logits[0, -1]
            handle.remove()
            return logits

        return run

    return of


def test_text_that_differs_here_is_left_out_and_said_once(
    gemma3: Any, sae: Dictionary, index: FeatureIndex, latent: int, texts: dict[str, list[str]]
) -> None:
    texts["two"] = documents(9, 40)
    here = Contexts(gemma3, index.card)
    assert here.note.count("two") == 1 and "one" not in here.note
    assert here.window("two", 0, 0) is None and here.window("one", 0, 0) is not None
    shown = excerpts(latent, gemma3, sae, SITE, index, here)
    assert {e.source for e in shown} == {"one"}
    own = index.examples(latent).query("source == 'one'").groupby("bucket").size()
    wanted = {bucket: min(n, 8 if bucket == "top" else 2) for bucket, n in own.items()}
    assert {
        bucket: sum(e.bucket == bucket for e in shown) for bucket in wanted
    } == wanted  # the next take their place
    page = feature_card(latent, gemma3, sae, SITE, index, here)
    assert page.count(here.note) == 1
    texts["one"] = []
    nothing = Contexts(gemma3, index.card)
    page = feature_card(latent, gemma3, sae, SITE, index, nothing)
    assert nothing.note in page and "no example" in page and "Nearest latents" in page


def test_a_text_that_is_not_installed_is_left_out(
    gemma3: Any, index: FeatureIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> list[str]:
        raise InterpError("its package is not installed")

    monkeypatch.setattr(contexts_module, "load_corpus", missing)
    here = Contexts(gemma3, index.card)
    assert here.window("one", 0, 0) is None and "one and two" in here.note


def test_rows_in_short(
    gemma3: Any, sae: Dictionary, index: FeatureIndex, contexts: Contexts, latent: int
) -> None:
    page = Reader(feature_rows({"a & b": latent}, gemma3, sae, SITE, index, contexts, caption="Some."))
    assert "a & b" in page.text and str(latent) in page.text and "Some." in page.text
    assert page.text.count("(one)") + page.text.count("(two)") == 3  # each quotation with its source
    with pytest.raises(InterpError, match="no latents"):
        feature_rows({}, gemma3, sae, SITE, index, contexts, caption="None.")


def test_a_latent_that_never_fires_has_a_card(
    gemma3: Any, sae: Dictionary, store: ActivationStore, contexts: Contexts
) -> None:
    acts = sparse_activations(sae, store, screen=False).tolil()
    acts[:, 6] = 0
    silent = build_index(acts.tocsc(), store)
    assert top_tokens_of(silent, 6) == [] and silent.maximum[6] == 0
    assert "no example" in feature_card(6, gemma3, sae, SITE, silent, contexts)


def test_text_and_names_from_elsewhere_are_escaped(
    gemma3: Any, sae: Dictionary, index: FeatureIndex, contexts: Contexts, latent: int
) -> None:
    """Nothing of a text, a source, a card or a caption becomes markup."""
    bad = "</td><script>alert(1)</script><b title='x' onclick=\"y\">"
    shown = Excerpt("top", "one", [bad, bad], [1.0, 0.0], 0, Window([2, 3, 4], 1, None))
    assert {tag for tag, _ in Reader(excerpt_html(shown, 2.0)).seen} == {"span", "mark", "b", "sub"}
    named = replace(index, card={**index.card, "dictionary": bad, "model": bad})
    pages = [
        feature_card(latent, gemma3, sae, SITE, named, contexts, title=bad),
        feature_rows({bad: latent}, gemma3, sae, SITE, index, contexts, caption=bad),
    ]
    for page in map(Reader, pages):
        assert bad in page.text and not any(tag == "script" or "onclick" in attrs for tag, attrs in page.seen)


def test_a_direction_of_zeros_says_nothing(gemma3: Any) -> None:
    made = Dictionary.create("relu", 32, 6, 32)  # a transcoder's decoder starts at zero
    assert not logit_weights(gemma3, made, 2).any()


def test_what_does_not_belong_together_is_refused(
    gemma3: Any, llama: Any, sae: Dictionary, index: FeatureIndex, contexts: Contexts
) -> None:
    with pytest.raises(InterpError, match="no latent 40"):
        feature_card(40, gemma3, sae, SITE, index, contexts)
    with pytest.raises(InterpError, match="no latent -1"):
        feature_card(-1, gemma3, sae, SITE, index, contexts)
    with pytest.raises(InterpError, match="made with"):
        Contexts(llama, index.card)
    with pytest.raises(InterpError, match="not at resid_post.2"):
        feature_card(0, gemma3, sae, "resid_post.2", index, contexts)
    with pytest.raises(InterpError, match="do not belong together"):
        feature_card(0, gemma3, Dictionary.create("relu", 32, 8), SITE, index, contexts)
    with pytest.raises(InterpError, match="no source 'three'"):
        contexts.window("three", 0, 0)
    with pytest.raises(InterpError, match="documents 0 to"):
        contexts.window("one", 999, 0)
    with pytest.raises(InterpError, match="tokens 0 to"):
        contexts.window("one", 0, 99_999)
    with pytest.raises(InterpError, match="not a part of it"):
        ablation(gemma3, sae, "mlp_in.1", 0, [], [])
    with pytest.raises(InterpError, match="There is no latent"):
        logit_weights(gemma3, sae, 40)
    with pytest.raises(InterpError, match="strongest on token"):
        index.by_token(int(1e6))


def test_the_hash_of_the_training_documents_is_compared(gemma3: Any, index: FeatureIndex) -> None:
    wanted = index.card["sources"]["one"]["hash"]
    assert corpus_hash(split_documents(TEXTS["one"])[0]) == wanted != corpus_hash(TEXTS["one"])
    assert re.fullmatch("[0-9a-f]{12}", wanted)
