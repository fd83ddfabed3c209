"""Steering against the full encode, decode and error term by plain hooks, one prompt at a time, nothing cached."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from interp_utils.activations import next_token_logits, residual_stream, tokenize
from interp_utils.dictionaries import Dictionary
from interp_utils.errors import InterpError
from interp_utils.interventions import add, edited_logits, generate
from interp_utils.steering import Clamp, Push, Steer, steered_generate, steered_logits, steered_steps
from tests.oracle import Change, Oracle, relative, same_but_for_ties

LAYER, SITE = 1, "resid_post.1"
SHORT, MIDDLE, LONG = "the cat", "x y z; the dog", "the cat sat on the mat; the dog sat on the cat"
PROMPTS = [SHORT, LONG, MIDDLE]
KINDS = ("relu", "topk", "batchtopk", "jumprelu")
STEPS = 6
NAN = float("nan")


def dictionary(kind: str = "batchtopk", width: int = 40, d_in: int = 32) -> Dictionary:
    """Random weights and biases, rows that are not unit, and units far from 0 and 1."""
    k = 8 if "topk" in kind else None
    made = Dictionary.create(kind, d_in, width, k=k).requires_grad_(False)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for weight in (made.W_enc, made.W_dec, made.b_enc, made.b_dec):
        weight += torch.randn(weight.shape, generator=generator) / 4
    if kind == "batchtopk":
        made.set_threshold(torch.tensor(0.4))
    if kind == "jumprelu":
        made.set_threshold(torch.rand(width, generator=generator))
    return made.set_units(torch.randn(d_in, generator=generator), 0.25)


def vector(seed: int = 0) -> Tensor:
    return 2 * torch.randn(32, generator=torch.Generator().manual_seed(seed))


def slowly(sae: Dictionary, steers: Steer | Sequence[Steer]) -> Callable[[Tensor], Tensor]:
    """One state through the whole dictionary: latents replaced, decoded, plus what it had left over."""

    own = [steers] if isinstance(steers, Clamp | Push) else steers

    def change(x: Tensor) -> Tensor:
        x = x.double()
        normed = ((x - sae.mean) * sae.scale).float()
        acts = sae.encode(normed)
        error = normed - sae.decode(acts)
        for steer in own:
            if isinstance(steer, Clamp):
                acts[steer.latent] = steer.value
        new = (sae.decode(acts) + error).double() / sae.scale + sae.mean
        for steer in own:
            if isinstance(steer, Push):
                new = new + steer.vector
        return new.float()

    return change


def changes(sae: Dictionary, steers: Steer | Sequence[Steer], positions: Sequence[int]) -> list[Change]:
    return [(LAYER, position, slowly(sae, steers)) for position in positions]


ROWS: list[Steer | list[Steer]] = [
    [Clamp(3, 6.0)],
    [],
    [Clamp(0, -5.0), Clamp(7, 4.0), Clamp(20, 0.0)],
    Push(vector()),
    [Push(vector(1)), Clamp(5, 3.0), Push(vector(2))],
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_clamp_is_the_reconstruction_with_the_latent_replaced_plus_the_error(
    kind: str, llama: Any, tiny_folder: Callable[..., Any]
) -> None:
    from tests.families import raw_model

    sae, oracle = dictionary(kind), Oracle(raw_model(tiny_folder("llama")))
    ids = tokenize(llama, LONG)
    found = steered_logits(llama, sae, SITE, LONG, ROWS, batch_size=3)
    for row, steers in zip(found, ROWS, strict=True):
        expected = oracle.logits(ids, changes(sae, steers, range(1, len(ids))))
        assert relative(row, expected) <= 1e-5
    assert min(relative(row, found[1]) for row in (found[0], found[2], found[3])) > 1e-3


def test_prompts_of_other_lengths_are_steered_as_if_alone(model: Any, oracle: Oracle) -> None:
    sae, prompts = dictionary(), [LONG, SHORT, MIDDLE, SHORT, LONG]
    found = steered_logits(model, sae, SITE, prompts, ROWS)
    for row, prompt, steers in zip(found, prompts, ROWS, strict=True):
        ids = tokenize(model, prompt)
        assert relative(row, oracle.logits(ids, changes(sae, steers, range(1, len(ids))))) <= 1e-5
        assert relative(row[None], steered_logits(model, sae, SITE, prompt, [steers])) <= 1e-5


def test_no_steer_changes_nothing_and_hooks_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, none = dictionary(), [[], [], []]
    mixed = steered_logits(model, sae, SITE, PROMPTS, [[], [Clamp(3, 9.0)], []])
    plain = next_token_logits(model, PROMPTS)
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]]) and not torch.equal(mixed[1], plain[1])
    monkeypatch.setattr("interp_utils.steers.Hook.__call__", lambda *_: pytest.fail("a hook ran"))
    assert torch.equal(steered_logits(model, sae, SITE, PROMPTS, none), plain)
    found = steered_generate(model, sae, SITE, PROMPTS, none, max_new_tokens=STEPS)
    expected = generate(model, PROMPTS, none, max_new_tokens=STEPS)
    assert found.texts == expected.texts and torch.equal(found.tokens, expected.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clamp_at_its_own_activation_changes_nothing(kind: str, llama: Any) -> None:
    sae, plain = dictionary(kind), next_token_logits(llama, LONG)
    state = residual_stream(llama, LONG, positions=-1, layers=[LAYER])[0, 0, 0]
    acts = sae.encode((state - sae.mean) * sae.scale)
    active, silent = int(acts.argmax()), int(acts.argmin())
    assert acts[active] > 0 and acts[silent] == 0
    own = [[Clamp(active, float(acts[active]))], [Clamp(silent, 0.0)], [Clamp(active, 0.0)]]
    found = steered_logits(llama, sae, SITE, LONG, own, positions=-1)
    assert relative(found[:2], plain.expand(2, -1)) <= 1e-5 < relative(found[2:], plain)


def test_only_the_given_positions_change(model: Any, oracle: Oracle) -> None:
    sae, prompts = dictionary(), [LONG, MIDDLE]
    found = steered_logits(model, sae, SITE, prompts, [ROWS[2], ROWS[4]], positions=[2, -1])
    for row, prompt, steers in zip(found, prompts, (ROWS[2], ROWS[4]), strict=True):
        ids = tokenize(model, prompt)
        assert relative(row, oracle.logits(ids, changes(sae, steers, [2, len(ids) - 1]))) <= 1e-5


def test_a_push_is_an_edit_that_adds(model: Any) -> None:
    prompts = [LONG, MIDDLE]
    found = steered_logits(model, dictionary(), SITE, prompts, [[Push(vector())]] * 2, positions=-2)
    expected = edited_logits(model, prompts, [add(LAYER, -2, vector())] * 2)
    assert relative(found, expected) <= 1e-5


@pytest.mark.parametrize("positions", [None, [1, -1]])
def test_generation_with_a_cache_is_recomputing_everything_at_each_step(
    positions: list[int] | None, model: Any, oracle: Oracle
) -> None:
    sae, prompts = dictionary(), [LONG, SHORT, MIDDLE, SHORT, LONG]
    given = {"positions": positions, "max_new_tokens": STEPS}
    found = steered_generate(model, sae, SITE, prompts, ROWS, batch_size=3, **given)
    assert found.tokens.shape == found.gaps.shape == (5, STEPS)
    for row, prompt, steers in zip(found.tokens.tolist(), prompts, ROWS, strict=True):
        tokens, gaps = tokenize(model, prompt), []
        n = len(tokens)
        for _ in range(STEPS):
            where = range(1, len(tokens)) if positions is None else [p % n for p in positions]
            best = oracle.logits(tokens, changes(sae, steers, where)).topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            if tokens[-1] == model.tokenizer.eos_token_id:
                break
        assert same_but_for_ties(row[: len(gaps)], tokens[n:], gaps)


def test_steps_are_those_of_the_generation_and_leave_no_hook(llama: Any) -> None:
    sae, rows = dictionary(), ROWS[:3]
    whole = steered_generate(llama, sae, SITE, PROMPTS, rows, max_new_tokens=STEPS)
    steps = steered_steps(llama, sae, SITE, PROMPTS, rows, max_new_tokens=STEPS)
    first = next(steps)
    assert not llama._module.get_submodule(f"model.layers.{LAYER}")._forward_hooks
    assert relative(first.logits, steered_logits(llama, sae, SITE, PROMPTS, rows)) <= 1e-5
    tokens = torch.stack([first.tokens, *(step.tokens for step in steps)], dim=1)
    assert torch.equal(tokens, whole.tokens[:, : tokens.shape[1]])


def test_a_row_that_ends_is_padded_and_no_longer_going(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, rows = dictionary(), [[], [Clamp(3, 9.0)]]
    free = steered_generate(llama, sae, SITE, LONG, rows, max_new_tokens=STEPS).tokens
    assert free[0, 0] not in free[1], "choose another clamp: both rows would end"
    monkeypatch.setattr(llama._module.generation_config, "eos_token_id", int(free[0, 0]))
    ended = steered_generate(llama, sae, SITE, LONG, rows, max_new_tokens=STEPS)
    assert set(ended.tokens[0, 1:].tolist()) == {llama.tokenizer.pad_token_id}
    assert ended.gaps[0, 1:].isinf().all() and torch.equal(ended.tokens[1], free[1])
    going = [step.going.tolist() for step in steered_steps(llama, sae, SITE, LONG, rows, max_new_tokens=2)]
    assert going == [[True, True], [False, True]]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"site": "mlp_out.1"}, "residual stream"),
    ({"site": "resid_post.9"}, "Layer 9 is out of range"),
    ({"dictionary": dictionary(d_in=31)}, "width 31"),
    ({"dictionary": Dictionary.create("relu", 32, 40, 32)}, "transcoder"),
    ({"steers": []}, "list of steers is empty"),
    ({"steers": [[Clamp(40, 1.0)]]}, "Latent 40 is out of range"),
    ({"steers": [[Clamp(-1, 1.0)]]}, "Latent -1 is out of range"),
    ({"steers": [[Clamp(1, NAN)]]}, "clamped to nan"),
    ({"steers": [[Clamp(1, -math.inf)]]}, "clamped to -inf"),
    ({"steers": [[Clamp(1, 1.0), Clamp(1, 2.0)]]}, "clamps a latent twice"),
    ({"steers": [[Push(torch.full((32,), NAN))]]}, "NaN or infinity"),
    ({"steers": [[Push(torch.zeros(31))]]}, r"shape \(31,\)"),
    ({"prompts": [SHORT, LONG, MIDDLE]}, "3 prompts and 1 rows"),
    ({"prompts": ""}, "prompt is empty"),
    ({"prompts": [5]}, "only one token"),
    ({"positions": 0}, "Position 0"),
    ({"positions": 60}, "Position 60 is out of range"),
    ({"positions": []}, "list of positions is empty"),
    ({"batch_size": 0}, "batch_size is 0"),
]


@pytest.mark.parametrize(("bad", "said"), BAD)
def test_bad_input_is_one_sentence_before_the_model_runs(
    bad: dict[str, Any], said: str, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    good: dict[str, Any] = {
        "dictionary": dictionary(), "site": SITE, "prompts": SHORT, "steers": [[Clamp(1, 1.0)]],
    }  # fmt: skip
    monkeypatch.setattr(llama._module, "forward", lambda **_: pytest.fail("the model ran"))
    with pytest.raises(InterpError, match=said):
        steered_logits(llama, **{**good, **bad})


def test_a_remote_model_and_no_new_token_are_refused(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InterpError, match="max_new_tokens is 0"):
        steered_steps(llama, dictionary(), SITE, SHORT, [[]], max_new_tokens=0)
    monkeypatch.setattr(llama, "info", replace(llama.info, remote=True))
    with pytest.raises(InterpError, match="remote model"):
        steered_generate(llama, dictionary(), SITE, SHORT, [[]])


@pytest.mark.model
def test_gemma_with_the_shipped_dictionary(gemma: Any) -> None:
    """Positions after the giant start token; the slow version encodes all 8,192 latents."""
    from interp_utils.dictionaries.files import load

    sae, _ = load("sae-batchtopk-8192")
    prompt, value = "My favourite thing about the weekend is", 60.0
    state = residual_stream(gemma, prompt, layers=[9])[0, 0]
    latent = int(sae.encode((state[-1] - sae.mean) * sae.scale).argmax())
    found = steered_logits(gemma, sae, "resid_post.9", prompt, [[Clamp(latent, value)], []])
    oracle = Oracle(gemma._module)
    ids = tokenize(gemma, prompt)
    edits = [(9, position, slowly(sae, [Clamp(latent, value)])) for position in range(1, len(ids))]
    assert relative(found[0], oracle.logits(ids, edits)) <= 1e-5
    assert relative(found[0], found[1]) > 1e-3
