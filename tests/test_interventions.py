"""Edits against plain forward hooks, one prompt at a time, on tiny models of four families."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp_utils import interventions
from interp_utils.activations import logit_lens, next_token_logits, residual_stream, tokenize
from interp_utils.errors import InterpError
from interp_utils.interventions import Edit, ablate, add, edited_logits, generate, patch, project, scale
from interp_utils.paths import ROOT
from tests import families
from tests.oracle import Change, Oracle, relative, same_but_for_ties

SHORT, MIDDLE, LONG = "the cat", "x y z; the dog", "the cat sat on the mat; the dog sat on the cat"
STEPS = 6


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def span(x: Tensor, directions: Tensor) -> Tensor:
    """The part of x in the span, by least squares."""
    return directions.T @ torch.linalg.lstsq(directions.T, x[:, None], driver="gelsd").solution[:, 0]


def kinds(layer: int, position: int, absolute: int) -> list[tuple[Edit, Change]]:
    """Each kind of edit beside what it means, written again."""
    v, few = vectors(32), vectors(3, 32, seed=1)
    return [
        (patch(layer, position, v), (layer, absolute, lambda x: v)),
        (add(layer, position, v), (layer, absolute, lambda x: x + v)),
        (scale(layer, position, -1.5), (layer, absolute, lambda x: -1.5 * x)),
        (project(layer, position, few), (layer, absolute, lambda x: span(x, few))),
        (ablate(layer, position, few), (layer, absolute, lambda x: x - span(x, few))),
        (ablate(layer, position), (layer, absolute, lambda x: 0 * x)),
    ]


def test_self_patch_changes_nothing_at_any_layer(model: Any) -> None:
    own = residual_stream(model, LONG, positions=[0, 2, -1])[0]
    for position, column in ((0, 0), (2, 1), (-1, 2)):
        edits = [patch(layer, position, own[layer, column]) for layer in range(len(model.layers))]
        for edit in edits:
            found = edited_logits(model, LONG, [edit], expect_change=False)
            assert torch.equal(found, next_token_logits(model, LONG))


def test_last_layer_patch_is_logit_lens(model: Any) -> None:
    states = residual_stream(model, MIDDLE, positions=-1)[0, :, 0]
    for state in states:
        found = edited_logits(model, LONG, [patch(-1, -1, state)], expect_change=False)
        assert torch.equal(found[0], logit_lens(model, state[None, None])[0, 0])


@pytest.mark.parametrize("prompt", [SHORT, LONG])
@pytest.mark.parametrize("layer", [0, 1])
def test_one_edit_per_row_is_what_hooks_do_row_by_row(
    model: Any, oracle: Oracle, prompt: str, layer: int
) -> None:
    ids = tokenize(model, prompt)
    pairs = kinds(layer, 1, 1) + kinds(layer, -1, len(ids) - 1)
    found = edited_logits(model, prompt, [edit for edit, _ in pairs], batch_size=5)
    for row, (_, change) in zip(found, pairs, strict=True):
        assert relative(row, oracle.logits(ids, [change])) <= 1e-5


def test_rows_may_have_prompts_of_their_own(model: Any, oracle: Oracle) -> None:
    prompts = [SHORT, LONG, MIDDLE, LONG, SHORT, MIDDLE]
    rows = [tokenize(model, prompt) for prompt in prompts]
    pairs = [kinds(1, -2, len(row) - 2)[i] for i, row in enumerate(rows)]
    found = edited_logits(model, prompts, [edit for edit, _ in pairs])
    for row, ids, (_, change) in zip(found, rows, pairs, strict=True):
        assert relative(row, oracle.logits(ids, [change])) <= 1e-5


def test_several_edits_of_one_state_apply_in_order(model: Any, oracle: Oracle) -> None:
    ids, v = tokenize(model, LONG), vectors(32)
    one = [patch(1, 2, v), scale(1, 2, 2.0), add(1, 2, v), patch(0, 0, v)]
    other = [scale(1, 2, 2.0), add(1, 2, v), patch(0, 0, v)]
    found = edited_logits(model, LONG, [one, other, []])
    changes: list[list[Change]] = [
        [(1, 2, lambda x: 3 * v), (0, 0, lambda x: v)],
        [(1, 2, lambda x: 2 * x + v), (0, 0, lambda x: v)],
        [],
    ]
    for row, own in zip(found, changes, strict=True):
        assert relative(row, oracle.logits(ids, own)) <= 1e-5


def test_project_and_ablate_add_up_to_the_state() -> None:
    x, few = vectors(32, seed=2), vectors(3, 32, seed=1)
    kept, removed = project(0, 0, few).change(x), ablate(0, 0, few).change(x)
    torch.testing.assert_close(kept + removed, x)
    torch.testing.assert_close(few @ removed, torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(kept, span(x, few))


def test_directions_may_depend_on_each_other() -> None:
    x, v = vectors(32, seed=2), vectors(32)
    torch.testing.assert_close(
        project(0, 0, torch.stack([v, 2 * v, v])).change(x), project(0, 0, v[None]).change(x)
    )
    torch.testing.assert_close(ablate(0, 0, vectors(40, 32)).change(x), torch.zeros(32), atol=1e-4, rtol=0)
    assert torch.equal(ablate(0, 0, torch.zeros(1, 32)).change(x), x)


def test_a_single_direction_needs_no_second_axis() -> None:
    x, v = vectors(32, seed=2), vectors(32)
    assert torch.equal(project(0, 0, v).change(x), project(0, 0, v[None]).change(x))


def check_generation(
    model: Any, oracle: Oracle, prompts: list[str], edits: Any, changes: list[list[Change]]
) -> list[list[int]]:
    """Tokens and gaps of every row against the oracle's."""
    shared = prompts[0] if len(set(prompts)) == 1 else prompts
    found = generate(model, shared, edits, max_new_tokens=STEPS)
    assert found.tokens.shape == found.gaps.shape == (len(prompts), STEPS)
    for row, (prompt, own) in enumerate(zip(prompts, changes, strict=True)):
        tokens, gaps = oracle.greedy(tokenize(model, prompt), own, STEPS)
        assert same_but_for_ties(found.tokens[row].tolist(), tokens, gaps)
        if found.tokens[row].tolist() == tokens:
            torch.testing.assert_close(found.gaps[row], torch.tensor(gaps), atol=1e-3, rtol=1e-3)
            assert found.texts[row] == model.tokenizer.decode(tokens, skip_special_tokens=True)
    return found.tokens.tolist()


def test_generation_edits_the_prompt_only(model: Any, oracle: Oracle) -> None:
    at = len(tokenize(model, LONG)) - 3
    pairs = kinds(1, -3, at)
    rows = check_generation(
        model, oracle, [LONG] * len(pairs), [edit for edit, _ in pairs], [[change] for _, change in pairs]
    )
    assert len({tuple(row) for row in rows}) > 1


def test_generation_with_a_prompt_per_row(model: Any, oracle: Oracle) -> None:
    prompts, v = [LONG, SHORT, MIDDLE, SHORT], vectors(32)
    edits = [patch(0, 1, v), [add(2, -1, v), scale(0, 1, 2.0)], [], add(1, 0, v)]
    changes: list[list[Change]] = [
        [(0, 1, lambda x: v)],
        [(2, len(tokenize(model, SHORT)) - 1, lambda x: x + v), (0, 1, lambda x: 2 * x)],
        [],
        [(1, 0, lambda x: x + v)],
    ]
    check_generation(model, oracle, prompts, edits, changes)


def test_prompts_of_one_length_share_nothing(model: Any, oracle: Oracle) -> None:
    prompts, v = ["the cat sat on the mat", "the dog sat on the cat", "x y z the cat the"], vectors(32)
    last = [len(tokenize(model, prompt)) - 1 for prompt in prompts]
    assert len(set(last)) == 1
    changes: list[list[Change]] = [[(1, last[0], lambda x: x + v)]] * 3
    check_generation(model, oracle, prompts, [add(1, -1, v)] * 3, changes)


@pytest.mark.parametrize("position", [0, 1, 6, -1])
def test_a_shared_prefix_gives_the_same_as_none(
    model: Any, monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    edits = [patch(1, position, v) for v in vectors(3, 32)] + [add(0, -1, vectors(32))]
    caches = []
    sharing = interventions._shared_prefix
    monkeypatch.setattr(interventions, "_shared_prefix", lambda *a: caches.append(sharing(*a)) or caches[-1])
    shared = generate(model, LONG, edits, max_new_tokens=STEPS)
    monkeypatch.setattr(interventions, "_shared_prefix", lambda *_: None)
    unshared = generate(model, LONG, edits, max_new_tokens=STEPS)
    assert (caches[0] is None) == (position == 0)
    for row in range(4):
        gaps = shared.gaps[row].tolist()
        assert same_but_for_ties(shared.tokens[row].tolist(), unshared.tokens[row].tolist(), gaps)


def test_a_generation_without_edits_is_the_models_own(model: Any, oracle: Oracle) -> None:
    check_generation(model, oracle, [LONG, LONG], [[], []], [[], []])
    single = generate(model, SHORT, [[]], max_new_tokens=1)
    assert single.tokens[0, 0] == next_token_logits(model, SHORT)[0].argmax()


def test_batches_of_a_generation_are_joined(llama: Any) -> None:
    edits = [add(1, -1, v) for v in vectors(5, 32)]
    whole = generate(llama, LONG, edits, max_new_tokens=STEPS)
    parts = generate(llama, LONG, edits, max_new_tokens=STEPS, batch_size=2)
    for row in range(5):
        gaps = whole.gaps[row].tolist()
        assert same_but_for_ties(parts.tokens[row].tolist(), whole.tokens[row].tolist(), gaps)


def test_rows_that_end_early_are_padded(llama: Any) -> None:
    eos, pad = llama.tokenizer.eos_token_id, llama.tokenizer.pad_token_id
    ending = patch(-1, -1, 100 * llama.unembed._module.weight[eos])
    together = generate(llama, LONG, [ending, add(0, -1, vectors(32))], max_new_tokens=STEPS)
    assert together.tokens[0].tolist()[0] == eos and together.texts[0] == ""
    assert {t for t in together.tokens[0, 1:].tolist()} <= {
        eos,
        pad,
        llama._module.generation_config.pad_token_id,
    }
    alone = generate(llama, LONG, [add(0, -1, vectors(32))], max_new_tokens=STEPS)
    assert together.texts[1] == alone.texts[0] != ""
    ended = generate(llama, LONG, [ending, ending], max_new_tokens=STEPS)
    assert ended.texts == ["", ""] and ended.tokens.shape == (2, STEPS)
    assert ended.tokens[:, 1:].eq(pad).all() and ended.gaps[:, 1:].isinf().all()


@pytest.mark.parametrize("run", [edited_logits, generate])
@pytest.mark.parametrize(
    ("prompts", "edits", "sentence"),
    [
        (SHORT, [], "The list of edits is empty"),
        ([], [scale(0, 0, 2.0)], "The list of prompts is empty"),
        ("", [scale(0, 0, 2.0)], "The prompt is empty"),
        ("x" * 65, [scale(0, 0, 2.0)], "The prompt has 65 tokens .*but the context holds 64"),
        ([SHORT, SHORT], [scale(0, 0, 2.0)] * 3, "2 prompts and 3 rows of edits"),
        (SHORT, [scale(4, 0, 2.0)], "Layer 4 is out of range"),
        (
            SHORT,
            [[scale(0, 0, 2.0), scale(0, 2, 2.0)]],
            "Position 2 is out of range; the prompt has 2 tokens",
        ),
        ([LONG, SHORT], [scale(0, -3, 2.0)] * 2, "Position -3 is out of range"),
        (SHORT, [patch(0, 0, torch.ones(31))], "The vector has width 31 but the model's d_model is 32"),
        (SHORT, [add(0, 0, torch.ones(33))], "width 33"),
        (SHORT, [project(0, 0, torch.ones(2, 16))], "width 16"),
        (SHORT, [ablate(0, 0, torch.ones(2, 64))], "width 64"),
    ],
)
def test_bad_input_is_one_sentence_before_any_forward(
    llama: Any,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., Any],
    prompts: Any,
    edits: Any,
    sentence: str,
) -> None:
    for method in ("trace", "generate"):
        monkeypatch.setattr(llama, method, lambda *_a, **_k: pytest.fail("a forward pass was started"))
    with pytest.raises(InterpError, match=sentence):
        run(llama, prompts, edits)


def test_generating_beyond_the_context_is_refused(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(InterpError, match="60 tokens and 5 are to follow, but the context holds 64"):
        generate(tiny_model("gpt2"), "x" * 60, [[]], max_new_tokens=5)
    generate(tiny_model("gpt2"), "x" * 60, [[]], max_new_tokens=4)


@pytest.mark.parametrize("run", [edited_logits, generate])
def test_an_edit_that_changed_nothing_raises(llama: Any, run: Callable[..., Any]) -> None:
    edits = [scale(0, 3, 2.0), scale(1, 3, 1.0), add(2, -1, torch.zeros(32))]
    with pytest.raises(InterpError, match=r"row 1 at layer 1 changed nothing \(2 such edits\)"):
        run(llama, LONG, edits)
    with pytest.raises(InterpError, match="row 2 at layer 2 changed nothing"):
        run(llama, LONG, [edits[0], edits[0], edits[2]])
    run(llama, LONG, edits, expect_change=False)


def test_a_self_patch_raises_unless_it_is_expected(llama: Any) -> None:
    own = residual_stream(llama, LONG, positions=3, layers=[1])[0, 0, 0]
    with pytest.raises(InterpError, match="pass expect_change=False if that is intended"):
        edited_logits(llama, LONG, [patch(1, 3, own)])


def test_row_numbers_count_through_all_batches(llama: Any) -> None:
    edits = [scale(0, 0, 2.0)] * 4 + [scale(0, 0, 1.0)]
    with pytest.raises(InterpError, match="The edit of row 4 at layer 0"):
        edited_logits(llama, SHORT, edits, batch_size=2)


def test_remote_path_gives_the_same_on_this_machine(tiny_folder: Callable[[str], Path]) -> None:
    folders = [str(tiny_folder(family)) for family in families.FAMILIES]
    command = [sys.executable, "-m", "tests.remote_rehearsal", *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_real_model_batched_generation_equals_one_at_a_time(
    name: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    source, target, n_layers = (
        "Diana, Princess of Wales",
        "Syria: a country, Leonardo: an actor, x",
        len(model.layers),
    )
    states = residual_stream(model, source)[0]
    draw = torch.Generator().manual_seed(0)
    cells = [
        [int(torch.randint(high, (), generator=draw)) for high in (n_layers, states.shape[1], n_layers)]
        for _ in range(24)
    ]
    edits = [patch(into, -1, states[layer, position]) for layer, position, into in cells]
    together = generate(model, target, edits, max_new_tokens=4)
    for row, edit in enumerate(edits):
        alone = generate(model, target, [edit], max_new_tokens=4)
        gaps = alone.gaps[0].tolist()
        assert same_but_for_ties(together.tokens[row].tolist(), alone.tokens[0].tolist(), gaps)


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_real_model_identities(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    prompt = "The Eiffel Tower is in the city of"
    own = residual_stream(model, prompt, positions=3)[0, :, 0]
    plain = next_token_logits(model, prompt)
    for layer in range(0, len(model.layers), 6):
        assert torch.equal(
            edited_logits(model, prompt, [patch(layer, 3, own[layer])], expect_change=False), plain
        )
    state = residual_stream(model, "Paris", positions=-1)[0, 4, 0]
    assert torch.equal(
        edited_logits(model, prompt, [patch(-1, -1, state)])[0], logit_lens(model, state[None, None])[0, 0]
    )
