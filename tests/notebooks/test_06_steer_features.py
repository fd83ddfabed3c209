"""The definitions of 06_steer_features against slow, obvious versions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from interp_utils.activations import next_token_logits, pad, residual_stream, tokenize
from interp_utils.claims import cluster_bootstrap
from interp_utils.dictionaries import Dictionary
from interp_utils.steering import Clamp, Push, steered_generate, steered_logits, steered_steps
from tests.notebooks.definitions import definitions

STEM = "06_steer_features"
SITE, PROMPTS = "resid_post.1", ["the cat sat", "x y z; the dog sat on"]
IDS = {"cat": torch.tensor([5, 9]), "dog": torch.tensor([7])}
UNITS = {"detection": (3, 4.0), "output": (8, 2.0), "random latent": (11, 9.0)}


@pytest.fixture(scope="module")
def sae() -> Dictionary:
    made = Dictionary.create("batchtopk", 32, 40, k=8).requires_grad_(False)
    made.b_enc += 0.3
    made.set_threshold(torch.tensor(0.2))
    return made.set_units(torch.full((32,), 0.1), 0.5)


def book(*names: str, **given: Any) -> Any:
    scope = {
        "np": np, "pd": pd, "torch": torch, "tokenize": tokenize, "pad": pad, "Clamp": Clamp, "Push": Push,
        "next_token_logits": next_token_logits, "residual_stream": residual_stream, "SEED": 0, "layer": 1,
        "steered_steps": steered_steps, "steered_generate": steered_generate, "SITE": SITE, "NEW": 4,
        "cluster_bootstrap": cluster_bootstrap,
    }  # fmt: skip
    return definitions(STEM, *names, **{**scope, **given})


def test_the_clamp_in_the_open_is_the_packages(llama: Any, sae: Dictionary) -> None:
    own = book("clamped_logits", model=llama, sae=sae)
    fast = steered_logits(llama, sae, SITE, PROMPTS[1], [[Clamp(3, 8.0)], []])
    torch.testing.assert_close(fast[0], own.clamped_logits(PROMPTS[1], 3, 8.0), rtol=1e-4, atol=1e-4)
    assert (fast[0] - fast[1]).abs().max() > 1e-2
    torch.testing.assert_close(fast[1], next_token_logits(llama, PROMPTS[1])[0])


def test_states_are_those_after_the_first_position(llama: Any) -> None:
    states, tokens = book("states_of", model=llama).states_of(PROMPTS)
    rows = [tokenize(llama, prompt) for prompt in PROMPTS]
    assert tokens.tolist() == rows[0][1:] + rows[1][1:]
    alone = residual_stream(llama, PROMPTS[1], layers=[1])[0, 0, 1:]
    torch.testing.assert_close(states[len(rows[0]) - 1 :], alone, rtol=1e-4, atol=1e-4)


def test_f1_counts_hits_and_alarms() -> None:
    acts = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 1.0], [1.0, 3.0, 0.0], [0.0, 1.0, 0.0]])
    positive, negative = torch.tensor([True, True, False, False]), torch.tensor([False, False, True, True])
    found = book("f1_scores").f1_scores(acts, positive, negative)
    assert found.tolist() == pytest.approx([2 * (2 / 3) / (2 / 3 + 1), 0.0, 2 / 3])


def test_output_score_is_the_direct_effect_through_norm_and_unembedding(llama: Any, sae: Dictionary) -> None:
    norm = llama.final_norm._module
    gain = torch.rand(32) + 0.5
    norm.weight.data, old = gain, norm.weight.data
    try:
        every = torch.tensor([5, 7, 9])
        found = book("output_scores", model=llama).output_scores(sae.W_dec, IDS["cat"], every)
        unembed = llama.unembed._module
        logits = torch.stack([unembed(gain * row) for row in sae.W_dec])
    finally:
        norm.weight.data = old
    expected = logits[:, IDS["cat"]].mean(1) - logits[:, every].mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def rival(sae: Dictionary, *names: str, **given: Any) -> Any:
    means = {name: torch.randn(32) for name in IDS}

    def latent_of(concept: str, method: str = "detection") -> tuple[int, float]:
        return UNITS[method]

    return book("steer_of", *names, means=means, latent_of=latent_of, CONCEPTS=IDS, sae=sae, **given), means


def test_pushes_have_the_norm_of_the_clamps_own_change(sae: Dictionary) -> None:
    own, means = rival(sae)
    assert own.steer_of("cat", "unsteered", 0.0) == own.steer_of("cat", "prompt", 0.0) == []
    assert own.steer_of("cat", "detection", -2.0) == [Clamp(3, -8.0)]
    assert own.steer_of("cat", "output", 2.0) == [Clamp(8, 4.0)]
    assert own.steer_of("cat", "random latent", 2.0) == [Clamp(11, 8.0)]  # the detection latent's unit
    for method in ("difference of means", "random direction"):
        (push,) = own.steer_of("dog", method, 2.0)
        change = float((2 * 4.0 * sae.W_dec[3] / sae.scale).norm())
        assert float(push.vector.norm()) == pytest.approx(change, rel=1e-5)
    (push,) = own.steer_of("dog", "difference of means", -2.0)
    assert torch.nn.functional.cosine_similarity(push.vector, means["dog"], dim=0) < -0.999
    other = own.steer_of("cat", "random direction", 2.0)[0].vector
    assert torch.equal(other, own.steer_of("cat", "random direction", 2.0)[0].vector)
    assert not torch.equal(other, own.steer_of("dog", "random direction", 2.0)[0].vector)


def test_measures_are_those_of_one_row_at_a_time(llama: Any, sae: Dictionary) -> None:
    names = (
        "measure", "prompt_of", "text_before", "unsteered_nll", "off_target", "word_log_prob", "distinct_2",
    )  # fmt: skip
    own, _ = rival(
        sae,
        *names,
        model=llama,
        IDS=IDS,
        NAMES={"cat": "x"},
        NEUTRAL=PROMPTS,
        LEADING={"dog": ["z; the mat"]},
    )
    columns = ["concept", "method", "strength", "kind", "prompt"]
    jobs = [("cat", "detection", 2.0, "neutral", 1), ("cat", "prompt", 0.0, "neutral", 0),
            ("dog", "random direction", 1.0, "leading", 0)]  # fmt: skip
    found = own.measure(pd.DataFrame(jobs, columns=columns))
    for row, (concept, method, strength, _, _) in zip(found.itertuples(), jobs, strict=True):
        prompt = PROMPTS[row.prompt] if row.kind == "neutral" else "z; the mat"
        before = "This text is about x. " if method == "prompt" else ""
        steer = own.steer_of(concept, method, strength)
        text, clean = tokenize(llama, before + prompt), tokenize(llama, prompt)
        targets, nll, gaps, new = [], [], [], []
        for _ in range(4):
            logits = steered_logits(llama, sae, SITE, text + new, [steer])[0]
            p = logits.softmax(-1)
            targets.append(math.log(sum(float(p[i]) for i in IDS[concept].tolist())))
            token = int(logits.argmax())
            nll.append(-float(next_token_logits(llama, clean + new)[0].log_softmax(-1)[token]))
            best = logits.topk(2).values
            gaps.append(float(best[0] - best[1]))
            if not new:
                old, keep = next_token_logits(llama, clean)[0], torch.ones(len(p), dtype=torch.bool)
                keep[IDS[concept]] = False
                a, b = old[keep].softmax(-1), logits[keep].softmax(-1)
                assert row.off == pytest.approx(float((a * (a.log() - b.log())).sum()), abs=2e-3)
            new.append(token)
            if token == llama.tokenizer.eos_token_id:
                break
        assert min(gaps) > 1e-3, "a near-tie: choose other prompts"
        assert row.target == pytest.approx(np.mean(targets), abs=2e-3)
        assert row.nll == pytest.approx(np.mean(nll), abs=2e-3)
        assert row.gap == pytest.approx(min(gaps), abs=2e-3)
        assert row.words == sum(token in IDS[concept].tolist() for token in new)
        pairs = [tuple(new[i : i + 2]) for i in range(len(new) - 1)]
        assert row.distinct2 == pytest.approx(len(set(pairs)) / max(len(pairs), 1), abs=1e-3)


def test_plan_has_every_setting_once() -> None:
    own = book("plan", METHODS=["detection", "random direction"])
    jobs = own.plan(["cat"], [1, 2], [-5, 0], [100], [0, 3], [1])
    assert not jobs.duplicated().any()
    counts = jobs.groupby(["kind", "method"]).strength.agg(list)
    assert counts["neutral", "detection"] == [1, 1, 2, 2, 100, 100]
    assert counts["neutral", "random direction"] == [1, 1, 2, 2]
    assert counts["leading", "detection"] == [-5, 0] and counts["leading", "random direction"] == [-5]
    assert all(counts["neutral", method] == [0, 0] for method in ("unsteered", "prompt"))
    assert counts["leading", "unsteered"] == [0]


def row(method: str, strength: float, prompt: int, target: float, nll: float) -> dict[str, Any]:
    return {
        "concept": "cat", "method": method, "strength": strength, "kind": "neutral", "prompt": prompt,
        "target": target, "nll": nll, "words": 0.0, "distinct2": 1.0, "off": 0.0,
    }  # fmt: skip


def test_a_sweet_spot_is_chosen_on_one_half_and_measured_on_the_other() -> None:
    rows = [row("unsteered", 0.0, p, -10.0, 1.0) for p in range(4)]
    for strength, first, second, nll in [
        (1.0, -8.0, -9.5, 1.5),
        (2.0, -6.0, -9.0, 2.0),
        (4.0, -2.0, 0.0, 3.0),
    ]:
        rows += [row("detection", strength, p, first if p % 2 == 0 else second, nll) for p in range(4)]
    rows += [row("random direction", 1.0, p, -12.0, 1.0) for p in range(4)]
    rows += [row("prompt", 0.0, p, -5.0, 9.0) for p in range(4)]
    own = book("KEYS", "against_unsteered", "curves", "sweet_spots")
    found = own.sweet_spots(pd.DataFrame(rows)).set_index("method")
    assert found.strength["detection"] == 2.0 and found.effect["detection"] == pytest.approx(1.0)
    assert found.ratio["detection"] == pytest.approx(math.e)
    # no strength helps: the unsteered model, whose effect is zero
    assert found.strength["random direction"] == 0.0 and found.effect["random direction"] == 0.0
    assert found.effect["prompt"] == pytest.approx(5.0)  # taken as it is


def test_a_band_is_geometric_for_ratios() -> None:
    rows = pd.DataFrame({"strength": 1.0, "concept": ["a", "b"], "ratio": [1.0, 4.0], "effect": [1.0, 4.0]})
    own = book("band")
    assert own.band(rows, "ratio")["mean"].tolist() == pytest.approx([2.0])
    assert own.band(rows, "effect")["mean"].tolist() == pytest.approx([2.5])
    assert own.band(rows, "ratio")["high"][0] <= 4.0


def test_the_concepts_are_whole(llama: Any) -> None:
    made = book("CONCEPTS")
    parts = [text.split("\n") for text in made.CONCEPTS.values()]
    assert len(parts) == 12 and all(len(own) == 4 for own in parts)
    for _, words, sentences, leading in parts:
        assert 6 <= len(set(words.split())) == len(words.split()) <= 12
        assert len(sentences.split("|")) == len(leading.split("|")) == 3
        assert all("{}" in sentence for sentence in sentences.split("|"))
        assert not any(word.lower() in leading.lower().split() for word in words.split() if len(word) > 3)


def test_steered_texts_come_row_by_row(llama: Any, sae: Dictionary) -> None:
    def latent_of(concept: str, method: str = "detection") -> tuple[int, float]:
        return UNITS[method]

    own = book("continuations", model=llama, sae=sae, latent_of=latent_of)
    rows = [("cat", PROMPTS[0], math.nan, "detection"), ("cat", PROMPTS[1], 2.0, "output")]
    steers = [[], [Clamp(8, 4.0)]]
    expected = [
        steered_generate(llama, sae, SITE, prompt, [own_steers], max_new_tokens=18).texts[0]
        for (_, prompt, _, _), own_steers in zip(rows, steers, strict=True)
    ]
    assert own.continuations(rows) == expected
