"""The definitions of 08_patchscopes_next_token against slow, obvious versions."""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.notebooks.definitions import definitions
from tests.oracle import Oracle, relative

STEM = "08_patchscopes_next_token"
plain = definitions(
    STEM, "affine_fits", "one_token_words", "demonstrations", "judge", "value", "spread", "MEASURES", "random_spots",
    np=np, pd=pd, torch=torch, re=re, SEED=3, PER_DOC=3, CONTEXT=20, rng=np.random.default_rng(0),
    model=None,
)  # fmt: skip


# Affine maps


@pytest.fixture
def xy() -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    x = (
        torch.randn(200, 7, generator=gen) * torch.logspace(-2, 3, 7) + 50
    )  # far from the origin, unequal spread
    return x, torch.randn(200, 4, generator=gen) + x[:, :4] / 20


def test_least_squares_is_that_of_lstsq_with_a_column_of_ones(xy: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = xy
    weight, bias = plain.affine_fits(x, y, [0.0])[0]
    ones = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    expected = torch.linalg.lstsq(ones, y.double()).solution.float()
    torch.testing.assert_close(x @ weight + bias, x @ expected[:-1] + expected[-1], rtol=1e-4, atol=1e-3)


def test_ridge_is_that_of_scikit_learn_which_leaves_the_intercept_free(
    xy: tuple[torch.Tensor, torch.Tensor],
) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = (part.double().numpy() for part in xy)
    centred = x - x.mean(0)
    unit = np.trace(centred.T @ centred) / x.shape[1]  # mean spread, the unit of our penalties
    for penalty, (weight, bias) in zip([1e-3, 0.1], plain.affine_fits(*xy, [1e-3, 0.1]), strict=True):
        expected = linear_model.Ridge(alpha=penalty * unit).fit(x, y)
        np.testing.assert_allclose(weight.numpy(), expected.coef_.T, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(bias.numpy(), expected.intercept_, rtol=1e-3)


def test_a_map_of_a_state_to_itself_is_the_identity(xy: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, bias = plain.affine_fits(xy[0], xy[0], [0.0])[0]
    torch.testing.assert_close(xy[0] @ weight + bias, xy[0], rtol=1e-5, atol=1e-3)


# Prompts and positions


def test_demonstrations_repeat_one_to_ten_different_words_and_end_in_the_placeholder() -> None:
    words = [f"w{i}" for i in range(40)]
    lengths = set()
    for draw in range(60):
        *lines, end = plain.demonstrations(draw, words).split("\n")
        assert end == "?" and 1 <= len(lines) <= 10 and len(set(lines)) == len(lines)
        assert all(a == b and a in words for a, b in (line.split(" -> ") for line in lines))
        lengths.add(len(lines))
    assert lengths == set(range(1, 11))
    assert plain.demonstrations(4, words) == plain.demonstrations(4, words) != plain.demonstrations(5, words)


def test_one_token_words_are_single_in_both_forms(llama: Any) -> None:
    own = definitions(STEM, "one_token_words", re=re, model=llama)
    found = own.one_token_words("the cat sat on the mat; The dog, a zebra")
    expected = [
        word
        for word in ("cat", "dog", "mat", "sat", "the", "zebra")
        if len(llama.tokenizer(word).input_ids) == len(llama.tokenizer(" " + word).input_ids) == 1
    ]
    assert found == expected and "zebra" not in found


def test_partners_are_positions_of_the_next_document() -> None:
    spots = plain.random_spots([7, 5, 9])
    assert len(spots) == 9 and list(spots.doc) == [7] * 3 + [5] * 3 + [9] * 3
    assert spots.token.between(1, 19).all() and not spots.duplicated(["doc", "token"]).any()
    assert list(spots.doc[spots.partner]) == [5] * 3 + [9] * 3 + [7] * 3


# Reading states and judging what they say

TEXTS = ["the cat sat on the mat the dog", "x y z; the mat; the dog, the", "the dog sat on the cat; x y z"]


@pytest.fixture
def study(model: Any) -> SimpleNamespace:
    """The notebook's functions around a tiny model, with two decoders."""
    from interp_utils import activations
    from interp_utils.activations import logit_lens, residual_stream, tokenize
    from interp_utils.patchscopes import Patchscope, patched_logits

    n_layers = len(model.layers)
    identity = Patchscope(model, "the cat?", "?")
    scopes = {"ti0": identity, "arrow": Patchscope(model, "the mat ? the", "?")}
    fact = residual_stream(model, TEXTS[0])[0]
    given = {
        "np": np, "pd": pd, "torch": torch, "functools": functools, "model": model, "documents": TEXTS, "SEED": 1,
        "PER_DOC": 2, "CONTEXT": 6, "rng": np.random.default_rng(0), "fact": fact, "n_layers": n_layers,
        "last": n_layers - 1, "IDENTITY": "the cat?", "Patchscope": Patchscope, "tokenize": tokenize,
        "residual_stream": residual_stream, "logit_lens": logit_lens, "activations": activations,
        "TARGETS": {name: scope.target for name, scope in scopes.items()}, "maps": {},
        "DECODERS": {name: functools.partial(patched_logits, scope) for name, scope in scopes.items()},
    }  # fmt: skip
    first = definitions(STEM, "context", "random_spots", **given)
    held = first.random_spots([0, 1, 2])
    names = (
        "context harvest every_position random_like decode judge MEASURES mapped unembedded final_norm errors"
    )
    own = definitions(STEM, *names.split(), held=held, **given)
    own.held, own.maps = held, given["maps"]
    return own


def test_harvest_reads_each_spot_as_if_alone(study: SimpleNamespace, oracle: Oracle) -> None:
    spots = study.held.iloc[[5, 0, 3, 1]]
    states = study.harvest(spots, [0, 2])
    for state, spot in zip(states, spots.itertuples(), strict=True):
        assert relative(state, oracle.stream(study.context(spot.doc))[[0, 2], spot.token]) < 1e-5


def test_every_position_leaves_out_the_first(study: SimpleNamespace) -> None:
    spots = study.every_position([2, 0])
    assert list(spots.doc) == [2] * 5 + [0] * 5 and list(spots.token) == [1, 2, 3, 4, 5] * 2


def test_random_vectors_have_the_states_norms_and_belong_to_their_position(study: SimpleNamespace) -> None:
    states = study.harvest(study.held, [0, 2])
    noise = study.random_like(states, list(study.held.index), [0, 2])
    torch.testing.assert_close(noise.norm(dim=-1), states.norm(dim=-1))
    again = study.random_like(states[3:4, 1:], [3], [2])
    torch.testing.assert_close(again[0, 0], noise[3, 1])


def test_decode_is_one_cell_at_a_time(study: SimpleNamespace, model: Any, oracle: Oracle) -> None:
    at = [0, oracle.blocks.__len__() - 1]
    rows = study.decode(study.held, at, margins=True).set_index(["position", "layer"])
    targets = {"ti0": ("the cat?", -1), "arrow": ("the mat ? the", None)}
    for (position, layer), row in rows.iterrows():
        spot = study.held.loc[position]
        ids = study.context(spot.doc)[: spot.token + 1]
        truth = oracle.logits(ids).log_softmax(-1)
        partner = study.held.loc[spot.partner]
        other = oracle.stream(study.context(partner.doc)[: partner.token + 1])[layer, -1]
        own = oracle.stream(ids)[layer, -1]
        for name, scope, state in (("ti0", "ti0", own), ("arrow", "arrow", own), ("swap", "arrow", other)):
            text, at_position = targets[scope]
            target = model.tokenizer(text).input_ids
            place = len(target) - 1 if at_position == -1 else next_placeholder(model, target)
            logits = oracle.logits(target, [(layer, place, lambda x, s=state: s)])
            best = logits.topk(2)
            if row[f"{name}_margin"] < 1e-3:
                continue
            token = int(best.indices[0])
            assert row[f"{name}_hit"] == (token == int(truth.argmax()))
            assert row[f"{name}_surprisal"] == pytest.approx(-float(truth[token]), abs=0.006)
            same = model.tokenizer.decode([token]).strip() == model.tokenizer.decode([ids[-1]]).strip()
            assert row[f"{name}_current"] == same
            assert row[f"{name}_margin"] == pytest.approx(float(best.values[0] - best.values[1]), abs=1e-3)
    end = rows.xs(at[-1], level="layer")
    assert end.ti0_hit.all()  # nothing follows the last layer but norm and unembedding
    assert rows.groupby("position").none_surprisal.nunique().eq(1).all()  # unpatched: the same at all layers


def next_placeholder(model: Any, ids: list[int]) -> int:
    return max(i for i, token in enumerate(ids) if "?" in model.tokenizer.decode([token]))


def test_mapped_states_go_into_the_last_layer_or_straight_into_the_unembedding(
    study: SimpleNamespace, model: Any
) -> None:
    from interp_utils.activations import logit_lens
    from interp_utils.patchscopes import patched_logits

    states = study.harvest(study.held, [1])[:, 0]
    gen = torch.Generator().manual_seed(2)
    weight, bias = (torch.randn(size, generator=gen) for size in ((32, 32), (32,)))
    study.maps |= {("ols", "pre", 1): (weight, bias), ("ols", "post", 1): (weight, bias)}
    into_last = patched_logits(study.mapped("ols", "pre"), states, [1] * len(states))
    assert relative(into_last, logit_lens(model, states @ weight + bias)) < 1e-5
    direct = study.unembedded("ols", states, [1] * len(states))
    assert relative(study.final_norm(states @ weight + bias), states @ weight + bias) > 1e-3  # the norm acts
    torch.testing.assert_close(direct, model.unembed._module(states @ weight + bias))


def test_errors_are_read_after_the_norm(study: SimpleNamespace) -> None:
    y = study.harvest(study.held, [2])[:, 0]
    exact = (torch.eye(32), torch.zeros(32))
    assert study.errors(y, y, "pre", [exact])[0] == pytest.approx(0, abs=1e-6)
    assert study.errors(study.final_norm(y), y, "post", [exact])[0] == pytest.approx(0, abs=1e-6)
    assert study.errors(y, y, "post", [exact])[0] > 1


# Numbers of the claims


def test_value_and_spread() -> None:
    cells = pd.DataFrame({"a_hit": [1, 0], "b_hit": [0, 0], "a_surprisal": [1.5, 2.5]})
    assert list(plain.value(cells, ["a", "b"], "hit")) == [0.5, 0.0]
    assert list(plain.value(cells, "a", "surprisal")) == [1.5, 2.5]
    assert plain.spread(pd.DataFrame({"a": [0.0, 1.0], "b": [1.0, 1.0], "c": [0.2, 0.2]})) == pytest.approx(
        0.8
    )


def test_difference_averages_layers_within_a_position_and_keeps_its_document() -> None:
    basis = pd.DataFrame(
        {"doc": [4, 4, 4, 4, 9, 9], "position": [0, 0, 1, 1, 2, 2], "layer": [0, 1] * 3,
         "a_hit": [1, 0, 1, 1, 0, 1], "b_hit": [0, 0, 0, 0, 0, 1]}
    )  # fmt: skip
    own = definitions(STEM, "value", "per_position", "difference", basis=basis, pd=pd)
    both = own.difference("a", "b", "hit", [0, 1])
    assert list(both) == [0.5, 1.0, 0.0] and list(both.index) == [4, 4, 9]
    assert list(own.difference("a", "b", "hit", [1])) == [0.0, 1.0, 0.0]
