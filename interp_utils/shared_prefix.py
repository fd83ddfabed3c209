"""Go on from patched states: many rows over one run of a target prompt.

The cells of a Patchscopes grid share their target prompt. So the keys and values of the tokens
before the patch, and every layer below it, are computed once, and a cell costs only the blocks
above its patch for the tokens from the patch on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_utils.activations import Prompt, check_layer, from_end, pad, softcapped, tokenize
from interp_utils.errors import InterpError

if TYPE_CHECKING:
    from nnsight import TransformersModel


class SharedPrefix:
    """One run of a prompt, kept so that rows can go on from `position` with another state there.

    Attributes:
        resid: unpatched residual stream of the tail, the tokens from `position` on, "layer tail d_model".

    Raises:
        InterpError: a remote model, an empty prompt, a position out of range, or a prompt longer
            than a layer's sliding window.
    """

    def __init__(self, model: TransformersModel, prompt: Prompt, position: int) -> None:
        if model.info.remote:
            raise InterpError("Keys and values of a remote model cannot be kept; use edited_logits instead.")
        ids = tokenize(model, prompt)
        if not fits_window(model, ids):
            raise InterpError(f"Some layers see less than the {len(ids):,} tokens of the prompt; shorten it.")
        self.model = model
        self.length = len(ids)
        self.start = len(ids) + from_end(len(ids), position)
        self.blocks = [block._module for block in model.layers]
        with torch.no_grad():
            self._record(ids)

    def _record(self, ids: list[int]) -> None:
        """Run prefix and tail; keep what each block of the tail was called with, and what it gave."""
        cache = new_cache(self.model)
        first = pad(self.model, [ids[: self.start]]) if self.start else None
        if first:
            self.model._module(**first, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.prefix = [(layer.keys, layer.values) for layer in cache.layers] if first else []
        calls: list[tuple[Any, dict[str, Any]]] = []
        outputs: list[Tensor] = []
        handles = [
            block.register_forward_pre_hook(
                lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
            )
            for block in self.blocks
        ]
        handles += [
            block.register_forward_hook(lambda _, args, out: outputs.append(_resid(out)[0].clone()))
            for block in self.blocks
        ]
        try:
            tail = pad(self.model, [ids[self.start :]])["input_ids"]
            self.model._module(input_ids=tail, past_key_values=cache, use_cache=True, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        self.tail = [(k[:, :, self.start :], v[:, :, self.start :]) for k, v in _keys_values(cache)]
        self.resid = torch.stack(outputs)
        self._calls, self._cache = calls, cache

    def run(self, states: Float[Tensor, "row d_model"], into: Sequence[int]) -> PatchedRows:
        """Put each row's state at the position, after its own layer, and go on to the last layer.

        Raises:
            InterpError: no row, another width than the model's, a layer missing or out of range.
        """
        check_rows(self.model, states, into)
        layers = torch.tensor([check_layer(self.model, layer) for layer in into])
        order = torch.argsort(layers, stable=True)
        rows = _Rows(self.prefix)
        resid = self.resid[0, None][:0]
        with torch.no_grad():
            for layer in range(len(self.blocks)):
                if len(resid):
                    resid = self._block(layer, resid, rows)
                new = states[order[layers[order] == layer]]
                patched = self.resid[layer].repeat(len(new), 1, 1)
                patched[:, 0] = new.to(patched)
                resid = torch.cat([resid, patched])
        return PatchedRows(self, resid[:, -1], torch.argsort(order), rows.own)

    def _block(
        self, layer: int, resid: Float[Tensor, "row tail d_model"], rows: _Rows
    ) -> Float[Tensor, "row tail d_model"]:
        """A block with the arguments of the recorded run, but other rows and their own cache."""
        args, kwargs = self._calls[layer]
        args = [rows if a is self._cache else a for a in args]
        kwargs = {name: rows if value is self._cache else value for name, value in kwargs.items()}
        if args:
            args[0] = resid
        else:
            kwargs["hidden_states"] = resid
        return _resid(self.blocks[layer](*args, **kwargs))


class PatchedRows:
    """Rows that went on from their patches, in the order they were given.

    Attributes:
        resid: last layer, last token, before the final norm, "row d_model".
    """

    def __init__(
        self,
        shared: SharedPrefix,
        resid: Float[Tensor, "row d_model"],
        order: Int[Tensor, " row"],
        own: dict[int, tuple[Tensor, Tensor]],
    ) -> None:
        self.shared, self.order, self._own = shared, order, own
        self.resid = resid[order]

    def logits(self, tokens: Sequence[int] | None = None) -> Float[Tensor, "row vocab"]:
        """Next-token logits, of all tokens or of some: the unembedding is most of a cell's cost."""
        model = self.shared.model
        unembed = model.unembed._module
        with torch.no_grad():
            x = model.final_norm._module(self.resid)
            if tokens is None:
                return softcapped(model, unembed(x))
            bias = getattr(unembed, "bias", None)
            columns = torch.as_tensor(tokens, device=x.device)
            some = None if bias is None else bias[columns]
            return softcapped(model, torch.nn.functional.linear(x, unembed.weight[columns], some))

    def log_probs_after(self, path: Sequence[int]) -> Float[Tensor, "row vocab"]:
        """Log-probabilities of the token after `path`, which follows the prompt in every row."""
        tokens = torch.tensor([list(path)] * len(self.resid), device=self.resid.device)
        with torch.no_grad():
            logits = self.shared.model._module(
                input_ids=tokens, past_key_values=self.cache(), use_cache=True, logits_to_keep=1
            ).logits[:, -1]
        return logits.log_softmax(-1)

    def cache(self) -> Any:
        """Keys and values of the whole prompt in every row, for tokens that follow it."""
        cache = new_cache(self.shared.model)
        for layer in range(len(self.shared.blocks)):
            cache.update(*(self._whole(layer, i) for i in range(2)), layer)
        return cache

    def _whole(self, layer: int, i: int) -> Tensor:
        """Keys (0) or values (1) of one layer: the shared prefix, then each row's own tail."""
        n_rows = len(self.resid)
        tail = self.shared.tail[layer][i]
        if layer in self._own:  # rows that were patched above this layer still have the shared tail
            own = self._own[layer][i]
            tail = torch.cat([own, _repeat(tail, n_rows - len(own))])[self.order]
        else:
            tail = _repeat(tail, n_rows)
        before = [_repeat(self.shared.prefix[layer][i], n_rows)] if self.shared.prefix else []
        return torch.cat([*before, tail], dim=2)


class _Rows:
    """The cache that blocks see: the shared prefix before each row's own keys and values."""

    def __init__(self, prefix: list[tuple[Tensor, Tensor]]) -> None:
        self.prefix = prefix
        self.own: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *unused: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.own[layer] = keys, values
        if not self.prefix:
            return keys, values
        before = [_repeat(shared, len(keys)) for shared in self.prefix[layer]]
        return torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)


def check_rows(
    model: TransformersModel, states: Float[Tensor, "row d_model"], into: Sequence[int] | None = None
) -> None:
    """Raise InterpError unless there are states, of the model's width and, where given, with a layer each."""
    width = model.config.hidden_size
    if states.shape[-1] != width:
        raise InterpError(
            f"The states have width {states.shape[-1]} but the target model's d_model is {width}; "
            "give the Patchscope a mapping from one to the other."
        )
    if not len(states):
        raise InterpError("There are no states to patch; give at least one row.")
    if into is not None and len(into) != len(states):
        raise InterpError(f"{len(states)} states but {len(into)} target layers; give one each per row.")


def kept_per_token(model: TransformersModel) -> int:
    """How many numbers the keys and values of one token are, over all layers."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * len(model.layers) * heads * width


def fits_window(model: TransformersModel, prompt: Prompt) -> bool:
    """Whether every layer sees the whole prompt and a few tokens more (Gemma's sliding window)."""
    window = getattr(model.config, "sliding_window", None)
    return not window or len(tokenize(model, prompt)) + 8 <= window


def new_cache(model: TransformersModel) -> Any:
    """An empty cache of keys and values for this model."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _keys_values(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _repeat(one: Tensor, n_rows: int) -> Tensor:
    return one.expand(n_rows, *one.shape[1:])


def _resid(output: Any) -> Tensor:
    """A block's output: some families wrap it in a tuple."""
    return output if isinstance(output, Tensor) else output[0]
