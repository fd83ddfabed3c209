"""Neurons are what the last matrix of each MLP reads, row by row of a store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from interp_utils.errors import InterpError
from interp_utils.harvest import harvest
from interp_utils.neurons import DOWN, neuron_batches
from interp_utils.windows import start_token
from tests.families import FAMILIES
from tests.test_activation_store import CORPORA, OPTIONS


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_a_whole_forward(
    tiny_model: Callable[..., Any], family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    store = harvest(model, CORPORA, tmp_path, **OPTIONS)
    stop, body = min(len(store), 60), store.card["context"] - 1
    batches = list(neuron_batches(model, store, 2, stop, dtype=torch.float32, batch_size=2))
    assert [rows.start for rows, _ in batches] == [0, *(rows.stop for rows, _ in batches[:-1])]
    assert batches[-1][0].stop == stop
    values = torch.cat([own for _, own in batches])
    seen: list[torch.Tensor] = []
    modules = [m for n, m in model._module.named_modules() if n.split(".")[-1] in DOWN and "mlp" in n][:2]
    hooks = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for module in modules]
    for row in (0, 1, stop // 2, stop - 1):
        ids, at = store.tokens_around(row, body, body)
        seen.clear()
        with torch.no_grad():
            model._module(input_ids=torch.tensor([[start_token(model), *ids]]))
        slow = torch.cat([own[0, at + 1] for own in seen])
        torch.testing.assert_close(values[row], slow, rtol=1e-4, atol=1e-5)
    for hook in hooks:
        hook.remove()


def test_bad_input_is_refused(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("llama")
    store = harvest(model, CORPORA, tmp_path, **OPTIONS)
    with pytest.raises(InterpError, match="other weights"):
        next(neuron_batches(tiny_model("gemma3"), store, 2, 10))
    for stop in (0, len(store) + 1):
        with pytest.raises(InterpError, match="out of range"):
            next(neuron_batches(model, store, 2, stop))
    with pytest.raises(InterpError):
        next(neuron_batches(model, store, 99, 10))
