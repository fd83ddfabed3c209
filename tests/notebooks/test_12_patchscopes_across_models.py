"""The definitions of 12_patchscopes_across_models against slow, obvious versions."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from interp_utils.claims import cluster_bootstrap
from interp_utils.errors import InterpError
from interp_utils.patchscopes import Patchscope, grid, patched_logits
from interp_utils.paths import data_folder
from tests.families import tiny_tokenizer
from tests.notebooks.definitions import definitions

STEM = "12_patchscopes_across_models"
WORDS = tomllib.loads((data_folder() / "word_lists" / "entity_categories.toml").read_text("utf-8"))
TEXT = " ".join(f"word{i}" for i in range(60))
book = definitions(
    STEM, "N_WORDS", "PER_TEXT", "STRENGTHS", "FIT", "DEV", "TEST", "NEXT_ITEM", "CATEGORY", "IDENTITY_PROMPT",
    "word_ends", "layer_grid", "fit_maps", "r2", "first_word", "hit", "scorable", "draw", "prefix", "scored",
    "interval", "best_cell", "first_minus_last", "two_fold", "description", "judged",
    FULL=False, SEED=0, re=re, np=np, pd=pd, torch=torch, texts=[TEXT] * 300, lists=WORDS,
    cluster_bootstrap=cluster_bootstrap, Callable=Callable, Map=Callable,
    entities=pd.DataFrame({"pair": [0, 1], "name": ["A", "B"], "category": ["musician", "city"],
                           "other": ["city", "musician"]}),
)  # fmt: skip


# Words and articles


class Words:
    """A tokenizer that cuts after every n letters and never across a space."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, text: str, **options: Any) -> SimpleNamespace:
        pieces = [m.span() for m in re.finditer(rf" ?\S{{1,{self.n}}}", text)]
        return SimpleNamespace(offset_mapping=[(0, 0), *pieces])  # an empty one as BOS


class Pairs:
    """A tokenizer that cuts every two characters, words or not."""

    def __call__(self, text: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(offset_mapping=[(i, min(i + 2, len(text))) for i in range(0, len(text), 2)])


def model_with(tokenizer: Any) -> SimpleNamespace:
    return SimpleNamespace(tokenizer=tokenizer)


def test_word_ends_are_tokens_that_end_with_the_word() -> None:
    text = "Ann sees three cats"
    found = book.word_ends([model_with(Words(3)), model_with(Words(2))], text)
    # Ann | sees: " se" counts as three characters with its space ... written out:
    for which, n in enumerate((3, 2)):
        spans = Words(n)(text).offset_mapping
        for pair, word in zip(found, ("sees", "three", "cats"), strict=True):
            assert text[: spans[pair[which]][1]].split()[-1] == word


def test_words_without_a_common_border_and_the_first_word_are_left_out() -> None:
    text = "ab cd efgh i"  # borders after an even number of characters: 2, 4, 6, 8, 10, 12
    ends = [m.end() for m in re.finditer(r"\S+", text)]
    expected = [(end // 2 - 1) for end in ends[1:] if end % 2 == 0 or end == len(text)]
    found = book.word_ends([model_with(Words(9)), model_with(Pairs())], text)
    assert [pair[1] for pair in found] == expected and len(found) == 2
    assert book.word_ends([model_with(Words(9))], "alone") == []


def test_word_ends_skip_the_bos_token_of_a_real_fast_tokenizer() -> None:
    text = "the cat sat on the mat"
    models = [model_with(tiny_tokenizer(bos=True)), model_with(tiny_tokenizer())]
    for pair in book.word_ends(models, text):
        read = {m.tokenizer.decode(m.tokenizer(text).input_ids[: i + 1], skip_special_tokens=True)
                for m, i in zip(models, pair, strict=True)}  # fmt: skip
        assert len(read) == 1 and text.startswith(read.pop())
    assert [b - a for a, b in book.word_ends(models, text)] == [-1] * 5


def test_the_groups_of_articles_do_not_overlap_and_are_large_enough() -> None:
    assert not set(book.FIT) & set(book.DEV) and not set(book.FIT + book.DEV) & set(book.TEST)
    words = len(book.FIT) * (book.N_WORDS - 1)
    assert words >= 6000 and words >= 10 * 576


@pytest.mark.parametrize("n_layers", [1, 3, 12, 18, 30, 48])
def test_layer_grids_hold_both_ends_and_the_coarse_one_lies_in_the_fine_one(n_layers: int) -> None:
    fine, coarse = book.layer_grid(n_layers, True), book.layer_grid(n_layers, False)
    assert set(coarse) <= set(fine) <= set(range(n_layers))
    assert {0, n_layers - 1} <= set(coarse) and coarse == sorted(coarse)
    assert len(fine) <= 12


def test_drawn_words_do_not_depend_on_what_else_is_drawn() -> None:
    both, one = book.draw([3, 7]), book.draw([7])
    assert both[both.text == 7].reset_index(drop=True).equals(one)
    assert len(one) == book.PER_TEXT == one.word.nunique()
    assert one.word.min() >= 8 and one.word.max() < book.N_WORDS - 1


def test_prefix_ends_with_the_word_that_the_state_is_of() -> None:
    words = TEXT.split()
    pairs = book.word_ends([model_with(Words(99))], TEXT)
    spans = Words(99)(TEXT).offset_mapping
    for w in (0, 8, 58):
        assert book.prefix(0, w).split() == words[: w + 2]  # one more for the first word, which has no number
        assert len(book.prefix(0, w)) == spans[pairs[w][0]][1]


# Maps


def test_fit_maps_is_ridge_in_centred_and_scaled_coordinates() -> None:
    rng = torch.Generator().manual_seed(0)
    source = torch.randn(200, 2, 7, generator=rng) * torch.logspace(-2, 3, 7) + 5
    target = torch.randn(200, 3, 4, generator=rng) + source[:, :1, :4] * 0.1 - 9
    strength = 0.3
    f = book.fit_maps(source, target, [2, 5], [0, 4, 9], strength)
    new = source[:10] * 1.1
    for a, layer in enumerate((2, 5)):
        x = source[:, a].double().numpy()
        z = (x - x.mean(0)) / x.std(0, ddof=1)
        for b, into in enumerate((0, 4, 9)):
            y = target[:, b].double().numpy()
            w = np.linalg.inv(z.T @ z + strength * 200 * np.eye(7)) @ z.T @ (y - y.mean(0))
            expected = (new[:, a].double().numpy() - x.mean(0)) / x.std(0, ddof=1) @ w + y.mean(0)
            np.testing.assert_allclose(f(new[:, a], layer, into).numpy(), expected, rtol=2e-4, atol=1e-4)


def test_a_weak_ridge_finds_a_planted_map_and_a_strong_one_gives_the_mean() -> None:
    rng = torch.Generator().manual_seed(1)
    source = torch.randn(300, 1, 6, generator=rng)
    target = (source[:, 0] @ torch.randn(6, 3, generator=rng) + 2)[:, None]
    weak, strong = (book.fit_maps(source, target, [0], [0], s) for s in (1e-6, 1e6))
    torch.testing.assert_close(weak(source[:, 0], 0, 0), target[:, 0], rtol=1e-3, atol=1e-3)
    mean = target[:, 0].mean(0).expand(300, -1)
    torch.testing.assert_close(strong(source[:, 0], 0, 0), mean, rtol=1e-3, atol=1e-3)


def test_r2_is_one_zero_and_the_mean_over_coordinates() -> None:
    y = torch.tensor([[1.0, 10.0], [3.0, 20.0], [2.0, 60.0]])
    mean = y.mean(0)
    assert book.r2(y, y, mean) == pytest.approx(1)
    assert book.r2(y, mean.expand(3, -1), mean) == pytest.approx(0)
    half = torch.stack([y[:, 0], mean[1].expand(3)], dim=1)  # the first exactly, the second not at all
    assert book.r2(y, half, mean) == pytest.approx(0.5)


# Scores


@pytest.mark.parametrize(
    ("decoded", "predicted", "expected"),
    [
        (" House", " House", True),
        ("House of", " House", True),
        (" Houses", " House", True),
        (" Hou", " House", False),  # a shorter piece is a miss
        (" house", " House", False),
        ("\n House", "House", True),
        (" the House", "House", False),  # only the first word counts
        ("", "House", False),
        ("  ", "House", False),
        (" ->", " ", False),  # an empty prediction is never met
        (" 1135", " 1", True),
    ],
)
def test_the_rule(decoded: str, predicted: str, expected: bool) -> None:
    assert book.hit(decoded, predicted) is expected


def test_scorable_predictions_have_a_letter_or_a_digit() -> None:
    given = pd.Series([" the", ",", "\n", " \u201c", "'s", " 3", "\u00e9", "_", " ->", ""])
    assert list(book.scorable(given)) == [True, False, False, False, True, True, True, False, False, False]


def test_scored_compares_with_the_prediction_of_the_same_word() -> None:
    rows = [
        (book.TEST[0], 9, "predicted", -1, -1, " cat"), (book.TEST[0], 9, "map", 0, 0, " cats"),
        (book.TEST[0], 10, "predicted", -1, -1, " dog"), (book.TEST[0], 10, "map", 0, 0, " cats"),
        (book.DEV[0], 9, "predicted", -1, -1, ","), (book.DEV[0], 9, "map", 0, 0, ","),
    ]  # fmt: skip
    cells = pd.DataFrame(rows, columns=["text", "word", "scope", "layer", "into", "said"])
    found = book.scored(cells)
    assert list(found.hit) == [1.0, 0.0] and list(found.word) == [9, 10] and not found.dev.any()


def test_interval_holds_the_mean_and_has_width_when_all_values_are_alike() -> None:
    mean, (low, high) = book.interval(pd.Series([0.0] * 12), pd.Series([1, 2, 3, 4] * 3))
    assert (mean, low, high) == (0.0, -0.75, 0.75)
    values = pd.Series(np.random.default_rng(0).random(60))
    mean, (low, high) = book.interval(values, values.index)
    assert low < mean < high < 1 and mean == pytest.approx(values.mean())


def test_first_minus_last_takes_the_outer_thirds_per_word() -> None:
    rows = [
        (t, w, layer, float(layer < 4) * (w + 1)) for t in (1, 2) for w in (0, 1) for layer in range(0, 12, 2)
    ]
    cells = pd.DataFrame(rows, columns=["text", "word", "into", "hit"])
    gain = book.first_minus_last(cells, "into", 12)
    assert list(gain.gain) == [1.0, 2.0, 1.0, 2.0]
    flipped = cells.assign(into=11 - cells["into"])
    assert list(book.first_minus_last(flipped, "into", 12).gain) == [-1.0, -2.0, -1.0, -2.0]


def test_two_fold_never_scores_a_name_at_a_cell_chosen_with_it() -> None:
    rows = [(n, p, layer, 0) for p, n in enumerate("abcd") for layer in (0, 1)]
    cells = pd.DataFrame(rows, columns=["name", "pair", "layer", "into"])
    # a and c are best at layer 0, b and d at layer 1: each half must be scored at the other's best.
    cells["gain"] = [float((r.name in "ac") == (r.layer == 0)) for r in cells.itertuples(index=False)]
    found = book.two_fold(cells, cells)
    assert sorted(found.index) == list("abcd") and (found.gain == 0).all()
    assert dict(found.layer) == {"a": 1, "b": 0, "c": 1, "d": 0}


def test_two_fold_chooses_among_the_layers_it_can_score() -> None:
    rows = [(n, p, layer, 0) for p, n in enumerate("abcd") for layer in (0, 1, 2)]
    judges = pd.DataFrame(rows, columns=["name", "pair", "layer", "into"])
    judges["gain"] = judges.layer / 10.0  # layer 2 is best, but was not measured for `cells`
    cells = judges[(judges.layer < 2) & judges.name.isin(["a", "b"])]
    found = book.two_fold(cells, judges)
    assert dict(found.layer) == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (": English singer, Madonna: American", "English singer"),
        (": British actor, singer, and host\nx: y", "British actor, singer, and host"),
        (" and more", "and more"),
        ("", ""),
    ],
)
def test_description(text: str, expected: str) -> None:
    assert book.description(text) == expected


def test_judged_looks_for_the_own_and_for_the_exchanged_category() -> None:
    answers = pd.DataFrame(
        {"pair": [0, 1, 1], "text": [": English singer", ": pop band", ": capital of Kenya"]}
    )
    found = book.judged(answers)
    assert list(found.names) == [1, 0, 1] and list(found.names_other) == [0, 1, 0]
    assert list(found.gain) == [1, -1, 1]


# Across two models


@pytest.fixture
def pair(tiny_model: Callable[..., Any]) -> list[Any]:
    return [tiny_model("gemma3"), tiny_model("gpt2")]


def test_cut_and_mean_state_have_the_readers_width(pair: list[Any]) -> None:
    fitting = [torch.randn(9, 2, 32), torch.randn(9, 3, 32)]
    own = definitions(
        STEM, "cut", "mean_state", models=pair, fitting=fitting, layers=[[0, 3], [0, 1, 2]], torch=torch,
        Map=Callable,
    )  # fmt: skip
    wide, narrow = torch.randn(4, 40), torch.randn(4, 20)
    assert torch.equal(own.cut(1)(wide, 0, 0), wide[:, :32])
    padded = own.cut(1)(narrow, 0, 0)
    assert torch.equal(padded[:, :20], narrow) and not padded[:, 20:].any()
    means = own.mean_state(1)(wide, 0, 2)
    assert means.shape == (4, 32)
    torch.testing.assert_close(means[3], fitting[1][:, 2].mean(0))


def test_other_widths_without_a_map_are_refused(pair: list[Any]) -> None:
    with pytest.raises(InterpError, match="width 20 but the target model's d_model is 32.*mapping"):
        patched_logits(Patchscope(pair[1], "the cat x", "x"), torch.randn(2, 20), [0, 1])


def test_a_map_reaches_the_reader_as_the_mapped_state_itself(pair: list[Any]) -> None:
    source, target = torch.randn(50, 2, 20), torch.randn(50, 3, 32)
    f = book.fit_maps(source, target, [0, 3], [0, 1, 2], 0.1)
    states = torch.randn(4, 2, 20)
    cells = grid(
        Patchscope(pair[1], "the cat x", "x", mapping=f), states, layers=[0, 3], into=[0, 1, 2], top_k=1
    )
    plain = Patchscope(pair[1], "the cat x", "x")
    for row in cells.itertuples():
        state = f(states[row.source, [0, 3].index(row.layer)][None], row.layer, row.into)
        expected = grid(plain, state[:, None], layers=[row.into], top_k=1)
        assert expected.top[0] == row.top and expected.top_prob[0] == pytest.approx(row.top_prob, abs=1e-4)


@pytest.mark.model
def test_every_word_end_of_a_text_is_one_in_both_models(smollm2: Any, gemma: Any) -> None:
    text = "Ms. O’Neill’s café in São Paulo sold 1,135 naïve tarts — “good ones”, she said."
    models = [gemma, smollm2]
    found = book.word_ends(models, text)
    ends = [m.end() for m in re.finditer(r"\S+", text)][1:]
    assert len(found) == len(ends)
    for pair, end in zip(found, ends, strict=True):
        for m, i in zip(models, pair, strict=True):
            ids = m.tokenizer(text).input_ids[: i + 1]
            assert m.tokenizer.decode(ids, skip_special_tokens=True) == text[:end]
    assert all(min(pair) > 0 for pair in found)  # the attention sinks are not among them


@pytest.mark.model
def test_the_identity_prompt_ends_in_one_token_in_both_models(smollm2: Any, gemma: Any) -> None:
    assert all(Patchscope(m, book.IDENTITY_PROMPT, "?").position == -1 for m in (smollm2, gemma))
