"""The definitions of 04_find_features against slow, obvious versions."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from scipy.sparse import csc_array
from sklearn.linear_model import LogisticRegression

from interp_utils.activations import residual_stream
from interp_utils.claims import cluster_bootstrap
from interp_utils.dictionaries import Dictionary
from interp_utils.features import prompt_latents
from tests.notebooks.definitions import definitions

STEM, LEVELS = "04_find_features", 10


def book(*names: str, **given: Any) -> Any:
    scope = {
        "np": np,
        "pd": pd,
        "torch": torch,
        "LogisticRegression": LogisticRegression,
        "cluster_bootstrap": cluster_bootstrap,
    }
    return definitions(STEM, *names, **{**scope, "SEED": 0, "LEVELS": LEVELS, **given})


@pytest.fixture
def acts() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.random((200, 12)) * (rng.random((200, 12)) < 0.3)).astype(np.float32)


@pytest.fixture
def labels() -> np.ndarray:
    return np.random.default_rng(1).choice([-2, -1, 0, 1, 2], 200, p=[0.1, 0.5, 0.2, 0.1, 0.1])


def test_tallies_count_rows_at_or_above_each_level(acts: np.ndarray, labels: np.ndarray) -> None:
    maximum = acts.max(0)
    hits, fired = book("tallies").tallies(csc_array(acts), labels, 3, maximum)
    kept = labels != -2
    for latent in range(12):
        share = LEVELS * acts[:, latent] / maximum[latent]
        for level in range(LEVELS):
            on = (acts[:, latent] > 0) & (share >= level) & kept
            assert fired[latent, level] == on.sum()
            assert [hits[k, latent, level] for k in range(3)] == [
                (on & (labels == k)).sum() for k in range(3)
            ]


def test_the_chosen_latent_and_level_have_the_best_f1(acts: np.ndarray, labels: np.ndarray) -> None:
    maximum = acts.max(0)
    chosen = book("tallies", "choose").choose(csc_array(acts), labels, 3, maximum)
    kept = labels != -2
    for k in range(3):
        best = {}
        for latent in range(12):
            for level in range(LEVELS):
                on = (acts[:, latent] > 0) & (LEVELS * acts[:, latent] / maximum[latent] >= level) & kept
                best[latent, level] = 2 * (on & (labels == k)).sum() / (on.sum() + (labels == k).sum())
        assert best[chosen[k]] == pytest.approx(max(best.values()))


def test_scores_by_chunk_add_up_to_the_f1_of_the_whole(acts: np.ndarray, labels: np.ndarray) -> None:
    own, maximum = book("scored", "f1_by_name"), acts.max(0)
    chosen = [(3, 2), (5, 0), (7, 9)]
    rows = own.scored(csc_array(acts), labels, chosen, maximum, chunk=64)
    assert rows.groupby("k").chunk.apply(list).tolist() == [[0, 1, 2, 3]] * 3
    found = own.f1_by_name(rows.assign(name=rows.k))
    first = labels[:64] == 0
    assert rows[(rows.k == 0) & (rows.chunk == 0)][["tp", "fn"]].sum(axis=1).item() == first.sum()
    for k, (latent, level) in enumerate(chosen):
        on = (acts[:, latent] > 0) & (LEVELS * acts[:, latent] / maximum[latent] >= level)
        tp, fn = (on & (labels == k)).sum(), (~on & (labels == k)).sum()
        fp = (on & (labels != k) & (labels != -2)).sum()
        assert found[k] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert len(own.scored(csc_array(acts), labels, [], maximum, chunk=64)) == 0


def test_a_name_without_a_mention_has_no_f1() -> None:
    rows = pd.DataFrame({"name": ["a", "b"], "tp": [0, 3], "fp": [2, 1], "fn": [0, 1]})
    assert book("f1_by_name").f1_by_name(rows).to_dict() == {"b": pytest.approx(6 / 8)}


def test_other_names_become_ordinary_rows() -> None:
    found = book("renumber").renumber(np.array([-2, -1, 0, 1, 2, 3]), np.array([1, 3]), 4)
    assert found.tolist() == [-2, -1, -1, 0, -1, 1]


def test_intervals_hold_the_mean_and_say_nothing_of_one_name() -> None:
    own = book("interval").interval
    mean, (low, high) = own([0.0, 1.0, 1.0, 0.5])
    assert mean == 0.625 and low <= mean <= high and high - low > 0.2
    assert own([0.7]) == (pytest.approx(0.7), (0.0, 1.0)) and own([]) == (0.0, (0.0, 1.0))


def test_the_best_latent_wins_most_pairs() -> None:
    own = book("best_latent", "either_sign")
    a, b = np.random.default_rng(2).random((2, 15, 30))
    a[:3], b[:3] = 0, 0  # ties
    wins = [sum(np.sign(a[i, j] - b[i, j]) for i in range(15)) for j in range(30)]
    weights = own.best_latent(a, b)
    assert weights.sum() == 1 and wins[weights.argmax()] == max(wins)
    either = own.either_sign(b, a + (np.arange(30) == 4))  # latent 4 is always larger on the second side
    assert either[4] == -1 and np.abs(either).sum() == 1


def test_the_logistic_regression_is_at_its_minimum_and_parts_what_can_be_parted() -> None:
    own = book("logistic", "on_texts", "on_differences")
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(40, 6)), rng.choice([-1.0, 1.0], 40)
    found = own.logistic(x, y, penalty=0.5)

    def loss(w: np.ndarray, bias: float) -> float:
        return float(np.log1p(np.exp(-y * (x @ w + bias))).sum() + 0.25 * w @ w)

    bias = minimize(lambda b: loss(found, b[0]), [0.0]).x[0]
    for i in range(6):
        for step in (-0.02, 0.02):
            assert loss(found + step * (np.arange(6) == i), bias) > loss(found, bias)
    a, b = rng.normal(size=(2, 20, 6))
    a[:, 2] += 5
    assert own.on_texts(a, b).argmax() == 2 and own.on_differences(a, b).argmax() == 2


def test_turning_all_rows_leaves_the_fit_as_it_was() -> None:
    own = book("logistic", "on_texts", "left_out")
    x = np.random.default_rng(4).normal(size=(24, 50))
    turned = x @ np.linalg.svd(x, full_matrices=False)[2].T
    folds = np.arange(12) % 3
    one, other = (own.left_out(z[:12], z[12:], folds, own.on_texts) for z in (x, turned))
    assert one.tolist() == other.tolist() and 0 < one.mean() < 1


def test_a_pair_is_judged_by_the_other_folds_only() -> None:
    a, b, folds = np.eye(4), np.zeros((4, 4)), np.array([0, 0, 1, 1])
    seen = []

    def fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        seen.append(x)
        return x.sum(0)

    assert (
        book("left_out").left_out(a, b, folds, fit).tolist() == [0.5] * 4
    )  # its own row is never in the sum
    assert [len(x) for x in seen] == [2, 2]
    assert book("left_out").left_out(a, b, folds, lambda x, y: np.array([1, -1, 0, 2])).tolist() == [
        1,
        0,
        0.5,
        1,
    ]


def test_a_latent_for_a_place_is_chosen_on_english_alone() -> None:
    rows = [("Germany", "Deutschland"), ("Rome", "Roma"), ("London", "London")]
    table = []
    for place, german in rows:
        for language, name in (("English", place), ("German", german)):
            table += [{"place": place, "language": language, "name": name}] * 2
    sentences, acts = pd.DataFrame(table), np.zeros((12, 5), np.float32)
    acts[[0, 1, 2], 3] = 1  # Germany in English, and in one of two German sentences
    acts[:, 0] = 5  # active everywhere
    acts[[4, 5], 1] = 2  # Rome in English only
    acts[[6, 7], 2] = 9  # Roma in German only
    found = book("in_languages").in_languages(sentences, acts).set_index("place")
    assert found.index.tolist() == ["Germany", "Rome"]  # London is written alike
    assert found.latent.tolist() == [3, 1] and found.active.tolist() == [0.5, 0.0]
    assert found.others.tolist() == [0.0, 0.0] and found["in English"].tolist() == [1.0, 1.0]


@pytest.fixture
def small(llama: Any) -> dict[str, Any]:
    sae = Dictionary.create("relu", 32, 20, seed=1).set_units(torch.full((32,), 0.1), 0.5)
    made = {"model": llama, "sae": sae.requires_grad_(False), "SITE": "resid_post.1", "layer": 1}
    return made | {"prompt_latents": prompt_latents, "residual_stream": residual_stream}


def test_attribution_is_the_slope_of_the_logit_difference(
    small: dict[str, Any], tiny_folder: Callable[[str], Any]
) -> None:
    from tests.families import raw_model

    llama, sae, prompt = small["model"], small["sae"], "the cat sat on"
    found = book("attribution", **small).attribution(prompt, " the", " mat")
    raw, ids = raw_model(tiny_folder("llama")).double(), llama.tokenizer(prompt).input_ids
    one, other = (llama.tokenizer(w, add_special_tokens=False).input_ids[0] for w in (" the", " mat"))
    acts = prompt_latents(llama, sae, "resid_post.1", prompt)[0]
    assert found.shape == acts.shape

    def difference(position: int, vector: torch.Tensor) -> float:
        def hook(_m: Any, _a: Any, output: torch.Tensor) -> torch.Tensor:
            output[0, position] += vector
            return output

        handle = raw.model.layers[1].register_forward_hook(hook)
        with torch.no_grad():
            logits = raw(input_ids=torch.tensor([ids])).logits[0, -1]
        handle.remove()
        return float(logits[one] - logits[other])

    for position, latent in acts.nonzero().tolist()[::15]:
        row = (sae.W_dec[latent] / 0.5).double()
        slope = (difference(position, 5e-3 * row) - difference(position, -5e-3 * row)) / 1e-2
        wanted = float(acts[position, latent]) * slope
        assert float(found[position, latent]) == pytest.approx(wanted, rel=2e-2, abs=1e-3)


def test_peaks_are_the_largest_activations_on_the_text_and_on_a_span(small: dict[str, Any]) -> None:
    texts = ["the cat sat on the mat", "the dog", "x y z; the cat"]
    own = book("peaks", **small)
    found = own.peaks(texts)
    alone = prompt_latents(small["model"], small["sae"], "resid_post.1", texts)
    wanted = torch.stack([acts.max(0).values for acts in alone])
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
    ends = small["model"].tokenizer(texts[0], return_offsets_mapping=True).offset_mapping
    inside = [i for i, (a, b) in enumerate(ends) if a < 7 and b > 4]  # "cat"
    span = own.peaks(texts[:1], [(4, 7)])
    np.testing.assert_allclose(span[0], alone[0][inside].max(0).values, rtol=1e-3, atol=1e-3)
    assert 0 < len(inside) < len(ends)


def test_separating_latents_are_on_all_and_on_none(small: dict[str, Any]) -> None:
    index = SimpleNamespace(maximum=np.ones(20), density=np.full(20, 0.1))
    own = book("separating", **small, index=index, tokens_of=str)
    positive, negative = ["the cat sat", "the cat"], ["x y z"]
    found = own.separating(positive, negative).latent.tolist()
    peaks = book("peaks", **small).peaks(positive + negative) > 0
    wanted = np.flatnonzero(peaks[:2].all(0) & ~peaks[2])
    assert sorted(found) == wanted.tolist() and len(wanted)


def test_a_word_is_no_city_when_it_is_a_country() -> None:
    from interp_utils.word_lists import load_words

    words = book("word_list", load_words=load_words).word_list("places")
    forms = [form for word in words for form in word.forms]
    assert len(forms) == len(set(forms)) and {"France", "Paris"} <= {word.name for word in words}


def test_the_bag_knows_which_tokens_occur(llama: Any) -> None:
    found = book("bag", model=llama).bag(["the cat", "the the dog"])
    ids = [
        set(llama.tokenizer(text, add_special_tokens=False).input_ids) for text in ("the cat", "the the dog")
    ]
    assert found.sum(1).tolist() == [len(own) for own in ids] and found.shape[1] == len(ids[0] | ids[1])
