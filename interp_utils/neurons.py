"""Activations of MLP neurons on the text of a store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp_utils.activation_store import ActivationStore
from interp_utils.errors import InterpError
from interp_utils.sites import blocks, body_in, check_site, forward_to
from interp_utils.windows import start_token

if TYPE_CHECKING:
    from nnsight import TransformersModel

DOWN = ("down_proj", "c_proj", "dense_4h_to_h")  # what reads the neurons, by family


def neuron_batches(
    model: TransformersModel,
    store: ActivationStore,
    layers: int,
    stop: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    batch_size: int = 16,
) -> Iterator[tuple[slice, Float[Tensor, "row neuron"]]]:
    """What the MLPs of the first layers hand to their last matrix: act(gate) * up in gated ones, else act.

    One forward pass over the windows of the store's first rows, a batch at a time; neuron n of layer l is column
    l * (neurons per layer) + n.

    Args:
        model: that the store is of.
        store: whose rows; only its tokens are read.
        layers: how many, from the first.
        stop: how many rows, from the first.
        dtype: in which the model computes.
        batch_size: windows per forward.

    Raises:
        InterpError: a store of other weights, too many layers or rows, or an MLP of an unknown form.
    """
    if store.card["weights"] != model.info.weights:
        raise InterpError(f"The store in {store.folder} is of other weights than {model.info.name}.")
    if not 0 < stop <= len(store):
        raise InterpError(f"stop={stop:,} is out of range; this store has {len(store):,} rows.")
    if layers < 1:
        raise InterpError(f"layers={layers} is out of range; give at least 1.")
    place = check_site(model, f"resid_post.{layers - 1}")
    body = body_in(model, dtype)
    readers = [_reader(block) for block in blocks(body)[:layers]]
    seen: dict[int, Tensor] = {}
    hooks = [
        reader.register_forward_pre_hook(lambda _, args, i=i: seen.update({i: args[0]}))
        for i, reader in enumerate(readers)
    ]
    first, offset = _windows(store, stop)
    try:
        for start in range(0, len(first) - 1, batch_size):
            begin, end = first[start], first[min(start + batch_size, len(first) - 1)]
            forward_to(body, [place], _inputs(model, store, first[start:-1][:batch_size]))
            rows = np.arange(begin, end)
            window = np.searchsorted(first[start:], rows, side="right") - 1
            at = torch.from_numpy(window), torch.from_numpy(offset[rows] + 1)
            yield slice(int(begin), int(end)), torch.cat([seen[i][at] for i in range(layers)], dim=1)
    finally:
        for hook in hooks:
            hook.remove()


def _reader(block: torch.nn.Module) -> torch.nn.Module:
    for name, module in block.get_submodule("mlp").named_children():
        if name in DOWN:
            return module
    raise InterpError(f"The MLPs of this model have none of {', '.join(DOWN)}; their neurons cannot be read.")


def _windows(store: ActivationStore, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each window and `stop`, and each row's place in its window."""
    body = store.card["context"] - 1
    position = store.position[:stop].numpy().astype(np.int64)
    labels = np.stack([store.source[:stop].numpy(), store.document[:stop].numpy(), position // body])
    new = np.append(True, (np.diff(labels) != 0).any(axis=0))
    return np.append(np.flatnonzero(new), stop), position % body


def _inputs(model: TransformersModel, store: ActivationStore, rows: np.ndarray) -> Tensor:
    """Tokens of the windows of these rows, with their start token, padded on the right."""
    body = store.card["context"] - 1
    texts = [[start_token(model), *store.tokens_around(int(row), body, body)[0]] for row in rows]
    inputs = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    for i, ids in enumerate(texts):
        inputs[i, : len(ids)] = torch.tensor(ids)
    return inputs
