"""The re-initialised control: same shapes and scales, nothing learnt, repeatable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from interp_utils.activations import next_token_logits
from interp_utils.controls import reinitialise
from interp_utils.errors import InterpError
from tests.conftest import load


def test_scales_stay_and_values_go(tiny_folder: Callable[[str], Path]) -> None:
    trained, other = load(tiny_folder("gemma3")), load(tiny_folder("gemma3"))
    weights = dict(trained._module.named_parameters())
    assert reinitialise(other, seed=1) is other
    for name, weight in other._module.named_parameters():
        if weight.numel() < 500:
            continue
        assert not torch.isclose(weight, weights[name]).float().mean() > 0.1
        torch.testing.assert_close(weight.std(), weights[name].std(), rtol=0.2, atol=1e-4)
    assert other.info.weights == f"{trained.info.weights} reinitialised:1"


def test_a_seed_gives_one_model(tiny_folder: Callable[[str], Path]) -> None:
    logits = [next_token_logits(reinitialise(load(tiny_folder("llama")), s), "the cat") for s in (3, 3, 4)]
    assert torch.equal(logits[0], logits[1]) and not torch.allclose(logits[0], logits[2])


def test_tied_weights_stay_tied(tiny_folder: Callable[[str], Path]) -> None:
    model = load(tiny_folder("gemma3"))
    tied = model._module.lm_head.weight is model._module.model.embed_tokens.weight
    reinitialise(model)
    assert (model._module.lm_head.weight is model._module.model.embed_tokens.weight) == tied


def test_not_twice(tiny_folder: Callable[[str], Path]) -> None:
    model = reinitialise(load(tiny_folder("llama")))
    with pytest.raises(InterpError, match="load it again"):
        reinitialise(model)
