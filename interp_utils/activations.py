"""Read a model's residual stream and its logits.

Conventions, used everywhere: layers are 0-based and "layer l" is the output of block l, before any
final norm. Positions count from the start of a prompt (0 is the BOS token where the model has one)
or, when negative, from its end. Batches are padded on the left; padding is never addressed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor

from interp_utils.errors import InterpError

if TYPE_CHECKING:
    from nnsight import TransformersModel

Prompt = str | Sequence[int]  # text, or token ids


def tokenize(model: TransformersModel, prompt: Prompt, new: int = 0) -> list[int]:
    """Token ids of one prompt, with the model's own special tokens (Gemma's BOS).

    Raises:
        InterpError: the prompt is empty, or longer than the context with its `new` tokens to come.
    """
    tokenizer = model.tokenizer
    empty = not prompt
    ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else [int(i) for i in prompt]
    if empty or not ids:
        raise InterpError("The prompt is empty; give at least one token of text.")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and len(ids) + new > limit:
        tokens = f"{len(ids):,} tokens" + (f" and {new:,} are to follow," if new else "")
        raise InterpError(f"The prompt has {tokens} but the context holds {limit:,}; shorten it.")
    return ids


def str_tokens(model: TransformersModel, prompt: Prompt) -> list[str]:
    """The prompt's tokens as text, one string each."""
    return [model.tokenizer.decode([i]) for i in tokenize(model, prompt)]


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many -> list of prompts.

    Raises:
        InterpError: there is none.
    """
    if isinstance(prompts, str):
        return [prompts]
    many: list[Any] = list(prompts)
    if not many:
        raise InterpError("The list of prompts is empty; give at least one.")
    return [many] if isinstance(many[0], int) else many


def pad(model: TransformersModel, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Left-padded `input_ids`, `attention_mask` and `position_ids`, each "batch pos".

    Position ids start at 0 with the first real token, so that a prompt is computed as if alone.
    """
    width = max(map(len, ids))
    fill = model.tokenizer.pad_token_id or 0
    tokens = torch.tensor([[fill] * (width - len(row)) + list(row) for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    device = next(model._module.parameters()).device
    return {
        "input_ids": tokens.to(device),
        "attention_mask": mask.to(device),
        "position_ids": where.to(device),
    }


def check_layer(model: TransformersModel, layer: int) -> int:
    """The layer as 0..n_layers-1; negative counts from the last.

    Raises:
        InterpError: out of range.
    """
    n_layers = len(model.layers)
    if not -n_layers <= layer < n_layers:
        raise InterpError(f"Layer {layer} is out of range; this model has layers 0 to {n_layers - 1}.")
    return layer % n_layers


def check_finite(states: Tensor, what: str = "states") -> None:
    """Raise InterpError for NaN or infinity, whose arg max would pass for an answer."""
    if not states.isfinite().all():
        raise InterpError(f"The {what} hold NaN or infinity (padding is NaN); give finite numbers only.")


def from_end(length: int, position: int) -> int:
    """A position of a prompt of `length` tokens as a negative number, safe under left padding.

    Raises:
        InterpError: out of range.
    """
    if not -length <= position < length:
        raise InterpError(
            f"Position {position} is out of range; the prompt has {length} tokens, 0 to {length - 1}."
        )
    return position - length if position >= 0 else position


def hidden(block: Any) -> Tensor:
    """A block's output "batch pos d_model" inside a trace: some families wrap it in a tuple."""
    out = block.output
    return out if isinstance(out, torch.Tensor) else out[0]


def residual_stream(
    model: TransformersModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    positions: int | Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    batch_size: int = 32,
) -> Float[Tensor, "batch layer pos d_model"]:
    """Residual stream after the given layers, from one forward per batch that stops at the deepest.

    Args:
        model: from `load_model`.
        prompts: one prompt or many, of any lengths.
        positions: the same positions in every prompt; None is all of them, left-padded with NaN.
        layers: which, in which order; None is all.
        batch_size: prompts per forward.

    Raises:
        InterpError: no prompt, an empty or too long one, a layer or position out of range.
    """
    rows = [tokenize(model, prompt) for prompt in as_list(prompts)]
    which = [check_layer(model, layer) for layer in (range(len(model.layers)) if layers is None else layers)]
    if not which:
        raise InterpError("The list of layers is empty; give at least one, or None for all.")
    wanted = [positions] if isinstance(positions, int) else positions
    columns = None if wanted is None else [[from_end(len(row), p) for p in wanted] for row in rows]
    parts = []
    for start in range(0, len(rows), batch_size):
        chunk = slice(start, start + batch_size)
        parts.append(_read(model, rows[chunk], which, columns[chunk] if columns else None))
    if columns is None:
        parts = _nan_pad(parts, rows, batch_size)
    return torch.cat(parts)


def _read(
    model: TransformersModel, rows: list[list[int]], which: list[int], columns: list[list[int]] | None
) -> Float[Tensor, "batch layer pos d_model"]:
    inputs = pad(model, rows)
    pick = torch.arange(len(rows))[:, None]
    with torch.no_grad(), model.trace(inputs, remote=model.info.remote) as tracer:
        states = nnsight.save({})
        for layer in sorted(set(which)):
            out = hidden(model.layers[layer])
            states[layer] = out.clone() if columns is None else out[pick, torch.tensor(columns)]
        tracer.stop()  # later layers and the unembedding are not needed
    return torch.stack([states[layer] for layer in which], dim=1)


def _nan_pad(parts: list[Tensor], rows: list[list[int]], batch_size: int) -> list[Tensor]:
    """All positions of all prompts at one width, with NaN where a prompt has no token."""
    width = max(map(len, rows))
    wide = [torch.nn.functional.pad(p, (0, 0, width - p.shape[2], 0), value=torch.nan) for p in parts]
    for i, row in enumerate(rows):
        wide[i // batch_size][i % batch_size, :, : width - len(row)] = torch.nan
    return wide


def next_token_logits(
    model: TransformersModel, prompts: Prompt | Sequence[Prompt], *, batch_size: int = 32
) -> Float[Tensor, "batch vocab"]:
    """Logits after each prompt; the unembedding runs at the last position only.

    Raises:
        InterpError: no prompt, an empty or too long one.
    """
    rows = [tokenize(model, prompt) for prompt in as_list(prompts)]
    parts = []
    for start in range(0, len(rows), batch_size):
        inputs = pad(model, rows[start : start + batch_size])
        with torch.no_grad(), model.trace(inputs, logits_to_keep=1, remote=model.info.remote):
            logits = model.unembed.output[:, -1].save()
        parts.append(logits)
    return softcapped(model, torch.cat(parts))


def softcapped(
    model: TransformersModel, logits: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch vocab"]:
    """What a model such as Gemma 2 does to its logits after the unembedding; nothing for most."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def logit_lens(
    model: TransformersModel, resid: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch vocab"]:
    """Final norm and unembedding applied to a residual state of any layer (nostalgebraist 2020).

    Equal to patching the state into the last layer (Patchscopes, table 1: l* = L).
    """
    with torch.no_grad():
        return softcapped(model, model.unembed._module(model.final_norm._module(resid)))


def top_tokens(
    model: TransformersModel, logits: Float[Tensor, " vocab"], k: int = 5
) -> list[tuple[str, float]]:
    """The k most probable next tokens as (text, probability)."""
    values, ids = logits.softmax(-1).topk(k)
    return [
        (model.tokenizer.decode([i]), round(v, 4)) for v, i in zip(values.tolist(), ids.tolist(), strict=True)
    ]
