"""The definitions of 07_features_as_causes against slow, obvious versions."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from interp_utils.activations import softcapped, tokenize
from interp_utils.dictionaries import Dictionary
from interp_utils.models import load_model
from interp_utils.sites import blocks
from interp_utils.steering import Clamp, steered_logits
from tests.families import build
from tests.notebooks.definitions import definitions

STEM = "07_features_as_causes"
LAYER = 1
TEXT = "The capital of France is"
ENGINE = ("token", "last_state", "difference", "Reading", "read", "prefix", "without", "drops")


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random model whose prompts fit the sliding window, with a random dictionary in its own units."""
    family = request.param
    window = {"sliding_window": 64} if family == "gemma3" else {}
    folder: Path = build(tmp_path_factory.mktemp(family), family, **window)
    model = load_model(str(folder))
    made = Dictionary.create("batchtopk", 32, 48, k=8, seed=0).requires_grad_(False)
    made.set_units(torch.full((32,), 0.1), 0.7)
    made.set_threshold(torch.tensor(0.3))
    return model, made


def book(*names: str, **given: Any) -> Any:
    scope = {
        "np": np, "pd": pd, "torch": torch, "dataclass": dataclass, "SEED": 0, "layer": LAYER, "blocks": blocks,
        "tokenize": tokenize, "softcapped": softcapped, "N_TYPICAL": 2,
    }  # fmt: skip
    return definitions(STEM, *names, **{**scope, **given})


def engine(tiny: Any) -> tuple[Any, Any]:
    model, dictionary = tiny
    own = book(*ENGINE, model=model, sae=dictionary.raw().requires_grad_(False))
    with torch.no_grad():
        return own, own.read(TEXT, " a", " b")


def test_the_logit_difference_is_that_of_the_whole_model(tiny: Any) -> None:
    own, reading = engine(tiny)
    with torch.no_grad():
        logits = tiny[0]._module(torch.tensor([reading.ids])).logits[0, -1]
    expected = float(logits[reading.answer] - logits[reading.baseline])
    assert reading.base == pytest.approx(expected, rel=1e-3, abs=1e-4)


@torch.no_grad()
def test_ablations_are_the_clamps_of_the_package(tiny: Any) -> None:
    (own, reading), (model, dictionary) = engine(tiny), tiny
    cells = reading.active()[::17]
    assert len(cells) > 7 and all(p > 0 for p, _ in cells)
    singles = own.drops(reading, [[cell] for cell in cells], batch_size=7)
    for (p, i), value in zip(cells, singles, strict=True):
        logits = steered_logits(
            model, dictionary, f"resid_post.{LAYER}", TEXT, [[Clamp(i, 0.0)]], positions=p
        )
        drop = reading.base - float(logits[0, reading.answer] - logits[0, reading.baseline])
        assert float(value) == pytest.approx(drop, rel=1e-3, abs=1e-4)


@torch.no_grad()
def test_a_set_acts_together_and_an_empty_one_not_at_all(tiny: Any) -> None:
    (own, reading), (model, dictionary) = engine(tiny), tiny
    last = len(reading.ids) - 1
    cells = [(p, i) for p, i in reading.active() if p == last]
    found = own.drops(reading, [[], cells, []])
    clamps = [[Clamp(i, 0.0) for _, i in cells]]
    logits = steered_logits(model, dictionary, f"resid_post.{LAYER}", TEXT, clamps, positions=last)
    drop = reading.base - float(logits[0, reading.answer] - logits[0, reading.baseline])
    expected = torch.tensor([0.0, drop, 0.0])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(own.drops(reading, [[], []]), torch.zeros(2))


@torch.no_grad()
def test_attribution_is_the_slope_and_adds_up(tiny: Any) -> None:
    own, reading = engine(tiny)
    sae = tiny[1].raw()
    error = reading.state - sae.decode(reading.acts)
    parts = reading.attribution.sum(1) + ((error + sae.b_dec) * reading.gradient).sum(1)
    torch.testing.assert_close(parts, (reading.state * reading.gradient).sum(1), rtol=1e-3, atol=1e-3)
    for p, i in reading.active()[::23]:
        sides = []
        for sign in (1, -1):
            taken = sign * 1e-2 * reading.acts[p, i] * sae.W_dec[i][None]
            change = own.without((torch.tensor([0]), torch.tensor([p])), taken, 1)
            final = own.last_state(reading.ids, change)
            sides.append(float(own.difference(final, reading.answer, reading.baseline)))
        slope = (sides[1] - sides[0]) / 2e-2
        assert float(reading.attribution[p, i]) == pytest.approx(slope, rel=0.05, abs=1e-3)


Sketch = namedtuple("Sketch", "ids acts gradient")


def test_an_exchanged_gradient_is_aligned_at_the_end() -> None:
    sae = Dictionary.create("relu", 4, 3, seed=1).requires_grad_(False)
    exchanged = book("exchanged", sae=sae, Reading=Sketch).exchanged
    long = Sketch(list(range(5)), torch.rand(5, 3), torch.randn(5, 4))
    short = Sketch(list(range(3)), torch.rand(3, 3), torch.randn(3, 4))
    down, up = exchanged(short, long), exchanged(long, short)
    assert float(down[2, 1]) == pytest.approx(float(short.acts[2, 1] * (sae.W_dec[1] @ long.gradient[4])))
    assert float(up[3, 0]) == pytest.approx(float(long.acts[3, 0] * (sae.W_dec[0] @ short.gradient[1])))
    assert float(up[0, 2]) == pytest.approx(float(long.acts[0, 2] * (sae.W_dec[2] @ short.gradient[1])))


def test_typical_latents_are_those_that_tell_a_group_apart() -> None:
    groups = {name: torch.zeros(4, 6) for name in "abc"}
    groups["a"][:, 0] = 1.0  # only a, weakly
    groups["b"][:, 3] = 1.0
    groups["c"][0, 4] = 9.0  # only c, once
    for own in groups.values():
        own[:, 5] = 20.0 + torch.rand(4)  # everywhere, strongly
    found = book("typical").typical(groups, n=1)
    assert found == {"a": [0], "b": [3], "c": [4]}


def test_matched_latents_are_others_at_the_same_positions() -> None:
    acts = torch.zeros(3, 20)
    acts[1, :10] = torch.arange(1.0, 11.0)
    acts[2, 5:8] = 2.0
    own = book("like", "among")
    reading = namedtuple("R", "acts active")(acts, lambda: [(int(p), int(i)) for p, i in acts.nonzero()])
    cells = own.among([4, 5, 19], reading)
    assert cells == [(1, 4), (1, 5), (2, 5)]
    near = {tuple(own.like(cells, reading, np.random.default_rng(seed), near=1)) for seed in range(3)}
    assert near == {((1, 3), (1, 6), (2, 6))}
    for seed in range(20):
        drawn = own.like(cells, reading, np.random.default_rng(seed))
        assert len(set(drawn)) == 3 and not {i for _, i in drawn} & {4, 5}
        assert [p for p, _ in drawn] == [1, 1, 2] and all(acts[cell] > 0 for cell in drawn)


def test_the_scores_of_a_prompt_are_plain_correlations() -> None:
    rng = np.random.default_rng(0)
    own = pd.DataFrame(rng.normal(size=(60, 4)), columns=["attribution", "activation", "exchanged", "effect"])
    own["attribution"] += 2 * own.effect
    scored = book("scored", "NUMBERS").scored(own)
    r = {name: np.corrcoef(own[name], own.effect)[0, 1] for name in ("attribution", "activation")}
    assert scored.attribution == pytest.approx(r["attribution"])
    assert scored.gap == pytest.approx(r["attribution"] - r["activation"])
    best = set(own.effect.argsort()[-10:]) & set(own.attribution.argsort()[-10:])
    assert scored["top 10 by attribution"] == len(best)


def test_questions_do_not_give_the_country_or_the_answer_away() -> None:
    tables = {
        "country_capital": pd.DataFrame({"subject": ["China", "Japan"], "answer": ["Beijing", "Tokyo"]}),
        "landmark_country": pd.DataFrame(
            {"subject": ["the Wall of China", "Tokyo Tower", "Mount Fuji", "the Nile"],
             "answer": ["China", "Japan", "Japan", "Egypt"]}
        ),
    }  # fmt: skip

    class Relation:
        def __init__(self, name: str) -> None:
            self.table = tables[name]

    found = book("questions", load_relation=Relation).questions("landmark", "capital", "Capital of {}?")
    assert found == [("landmark, capital", "Capital of Mount Fuji?", "Japan", " Tokyo")]


def test_parts_of_a_study_have_the_same_columns_whatever_was_got_wrong() -> None:
    prompts = pd.DataFrame({"prompt": [0, 1], "rival": [1, 0], "base": [-1.0, 2.0]})
    made = pd.DataFrame(
        {"activation": [1.0], "position": [1], "latent": [3], "attribution": 2.0, "effect": 2.5}
    )
    own = book(
        "measure",
        "NUMBERS",
        PROMPTS=prompts,
        reading_of=lambda job: job,
        effects=lambda reading: made,
        exchanged=lambda reading, other: torch.ones(2, 4),
    )
    parts = [own.measure(prompts.iloc[[i]]) for i in (0, 1)]
    assert list(parts[0].columns) == list(parts[1].columns)
    assert parts[0].effect.tolist() == [0] and parts[1].effect.tolist() == [2.5]


def test_parts_of_the_second_study_have_the_same_columns() -> None:
    texts = {"text": "a", "answer": "x", "baseline": "y", "question": "q", "group": "g", "rival": "h"}
    jobs = pd.DataFrame([{"number": 0, **texts}, {"number": 1, **texts}])
    names = ("rival's", "own", "like own", "own active", "like rival's", "rival's active")
    bases = iter([-1.0, 1.0, 1.0, -1.0])
    own = book(
        "measure_steps",
        "DROPS",
        SCENES={},
        TYPICAL={"g": [1], "h": [2]},
        with_runner_up=lambda jobs: jobs.assign(first=0),
        compared=lambda *_, seed: dict.fromkeys(names, 1.0),
        read=lambda *_: namedtuple("R", "base")(next(bases)),
    )
    first, second = own.measure_steps(jobs), own.measure_steps(jobs)
    assert list(first.columns) == list(second.columns)
    assert first["own active"].tolist() == [0, 1] and second["like rival's"].tolist() == [1, 0]
