"""The residual stream and logits against plain forward hooks, on tiny models of four families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from interp_utils.activations import (
    logit_lens,
    next_token_logits,
    pad,
    residual_stream,
    str_tokens,
    tokenize,
    top_tokens,
)
from interp_utils.errors import InterpError
from interp_utils.models import load_model
from tests import families
from tests.oracle import Oracle, relative

SHORT, MIDDLE, LONG = "the cat", "x y z; the dog", "the cat sat on the mat; the dog sat on the cat"
PROMPTS = [MIDDLE, LONG, SHORT]


def count_calls(model: Any) -> dict[str, int]:
    """Counts, from now on, how often each block and the unembedding run."""
    calls: dict[str, int] = {}
    named = {f"layer {i}": layer for i, layer in enumerate(model.layers)} | {"unembed": model.unembed}
    for name, envoy in named.items():
        calls[name] = 0

        def hook(*_: Any, name: str = name) -> None:
            calls[name] += 1

        envoy._module.register_forward_pre_hook(hook)
    return calls


def test_all_layers_are_exactly_those_of_forward_hooks(model: Any, oracle: Oracle) -> None:
    for prompts in ([LONG], PROMPTS):
        rows = [tokenize(model, prompt) for prompt in prompts]
        _, seen = oracle.forward(**pad(model, rows))
        found = residual_stream(model, prompts)
        for i, row in enumerate(rows):
            for layer, state in enumerate(seen):
                assert torch.equal(found[i, layer, -len(row) :], state[i, -len(row) :])


def test_one_prompt_needs_no_mask_or_position_ids_to_be_the_same(model: Any, oracle: Oracle) -> None:
    assert torch.equal(residual_stream(model, LONG)[0], oracle.stream(tokenize(model, LONG)))


def test_batches_of_different_lengths_agree_with_single_prompts(model: Any, oracle: Oracle) -> None:
    batch = residual_stream(model, PROMPTS, positions=[-1, 1])
    logits = next_token_logits(model, PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        ids = tokenize(model, prompt)
        assert relative(batch[i], oracle.stream(ids)[:, [-1, 1]]) <= 1e-5
        assert relative(logits[i], oracle.logits(ids)) <= 1e-5


def test_logits_are_those_of_the_whole_forward_pass(model: Any, oracle: Oracle) -> None:
    inputs = pad(model, [tokenize(model, p) for p in PROMPTS])
    assert relative(next_token_logits(model, PROMPTS), oracle.forward(**inputs)[0][:, -1]) <= 1e-6


def test_forward_stops_after_the_deepest_layer_and_never_unembeds(
    family: str, tiny_folder: Callable[[str], Path]
) -> None:
    model = load_model(str(tiny_folder(family)))
    calls = count_calls(model)
    residual_stream(model, PROMPTS, layers=[1, 0], positions=-1, batch_size=2)
    later = [f"layer {i}" for i in range(2, len(model.layers))]
    assert calls == {"layer 0": 2, "layer 1": 2, **dict.fromkeys(later, 0), "unembed": 0}
    residual_stream(model, PROMPTS)
    assert calls["unembed"] == 0 and calls[later[-1]] == 1


def test_the_unembedding_sees_one_position_only(family: str, tiny_folder: Callable[[str], Path]) -> None:
    model = load_model(str(tiny_folder(family)))
    widths: list[int] = []
    model.unembed._module.register_forward_hook(lambda _m, inputs, _o: widths.append(inputs[0].shape[1]))
    next_token_logits(model, LONG)
    assert widths == [1]


def test_positive_and_negative_positions_agree(model: Any) -> None:
    lengths = {len(tokenize(model, p)) for p in PROMPTS}
    assert len(lengths) == 3
    for prompt in PROMPTS:
        n = len(tokenize(model, prompt))
        both = residual_stream(model, [prompt, LONG], positions=[0, n - 1])[0]
        assert torch.equal(both, residual_stream(model, [prompt, LONG], positions=[-n, n - 1])[0])
        assert torch.equal(both[:, 1], residual_stream(model, [prompt, LONG], positions=-1)[0, :, 0])


def test_all_positions_are_padded_with_nan_on_the_left(model: Any) -> None:
    found = residual_stream(model, PROMPTS, batch_size=2)
    lengths = [len(tokenize(model, p)) for p in PROMPTS]
    assert found.shape == (3, len(model.layers), max(lengths), 32)
    for row, length in zip(found, lengths, strict=True):
        real = torch.arange(max(lengths)) >= max(lengths) - length
        assert not row[:, real].isnan().any() and row[:, ~real].isnan().all()
    alone = residual_stream(model, SHORT)[0]
    assert relative(found[2, :, -lengths[2] :], alone) <= 1e-5


def test_layers_come_in_the_order_asked_for_with_repeats(llama: Any) -> None:
    every = residual_stream(llama, LONG)
    assert torch.equal(residual_stream(llama, LONG, layers=[2, 0, -1, 2]), every[:, [2, 0, 3, 2]])


def test_batch_size_changes_nothing_that_matters(llama: Any) -> None:
    assert (
        relative(next_token_logits(llama, PROMPTS, batch_size=1), next_token_logits(llama, PROMPTS)) <= 1e-5
    )


def test_prompts_may_be_token_ids(llama: Any) -> None:
    ids = tokenize(llama, MIDDLE)
    assert torch.equal(residual_stream(llama, ids), residual_stream(llama, MIDDLE))
    assert torch.equal(residual_stream(llama, [ids, ids]), residual_stream(llama, [MIDDLE, MIDDLE]))


def test_gemma_prompts_begin_with_bos(tiny_model: Callable[..., Any]) -> None:
    assert str_tokens(tiny_model("gemma3"), SHORT) == ["<bos>", "the", " cat"]
    assert str_tokens(tiny_model("llama"), SHORT) == ["the", " cat"]


def test_logit_lens_of_the_last_layer_is_the_prediction(model: Any) -> None:
    last = residual_stream(model, LONG, positions=-1, layers=[-1])[:, 0, 0]
    assert relative(logit_lens(model, last), next_token_logits(model, LONG)) <= 1e-6


def test_logit_softcapping_is_applied_everywhere(tmp_path: Path) -> None:
    folder = families.build(tmp_path, "gemma3", final_logit_softcapping=2.0)
    model, oracle = load_model(str(folder)), Oracle(families.raw_model(folder))
    expected = oracle.logits(tokenize(model, LONG))
    assert expected.abs().max() <= 2
    last = residual_stream(model, LONG, positions=-1, layers=[-1])[:, 0, 0]
    assert relative(logit_lens(model, last)[0], expected) <= 1e-6
    assert relative(next_token_logits(model, LONG)[0], expected) <= 1e-6


def test_top_tokens_are_texts_with_probabilities(llama: Any) -> None:
    logits = torch.full((280,), -torch.inf)
    logits[tokenize(llama, " cat")[0]], logits[tokenize(llama, " dog")[0]] = 1.0, 0.0
    assert top_tokens(llama, logits, k=2) == [(" cat", 0.7311), (" dog", 0.2689)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prompts": ""}, "The prompt is empty"),
        ({"prompts": ["the cat", ""]}, "The prompt is empty"),
        ({"prompts": []}, "The list of prompts is empty"),
        ({"prompts": "x" * 65}, "The prompt has 65 tokens but the context holds 64"),
        ({"prompts": SHORT, "layers": [4]}, "Layer 4 is out of range; this model has layers 0 to 3"),
        ({"prompts": SHORT, "layers": [-5]}, "Layer -5 is out of range"),
        ({"prompts": SHORT, "layers": []}, "The list of layers is empty"),
        ({"prompts": [LONG, SHORT], "positions": 2}, "Position 2 is out of range; the prompt has 2 tokens"),
        ({"prompts": SHORT, "positions": [-3]}, "Position -3 is out of range"),
    ],
)
def test_bad_input_is_one_sentence_before_any_forward(
    llama: Any, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setattr(llama, "trace", lambda *_a, **_k: pytest.fail("a forward pass was started"))
    with pytest.raises(InterpError, match=sentence):
        residual_stream(llama, **arguments)


def test_an_empty_prompt_is_refused_where_the_tokenizer_adds_bos(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(InterpError, match="The prompt is empty"):
        next_token_logits(tiny_model("gemma3"), "")


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_real_model_equals_forward_hooks(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    oracle = Oracle(model._module)
    prompts = ["The Eiffel Tower is in the city of", "Hello"]
    rows = [tokenize(model, prompt) for prompt in prompts]
    _, seen = oracle.forward(**pad(model, rows))
    found = residual_stream(model, prompts)
    for i, row in enumerate(rows):
        assert torch.equal(found[i, :, -len(row) :], torch.stack(seen, 1)[i, :, -len(row) :])
