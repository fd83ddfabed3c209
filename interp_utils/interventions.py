"""Change the residual stream while a model runs: patch, add, scale, project, ablate.

One row of a batch carries one list of edits, so many interventions cost one forward or generation.
In a generation edits act on the prompt (prefill) only, never on generated tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from interp_utils.activations import Prompt, as_list, check_layer, from_end, hidden, pad, softcapped, tokenize
from interp_utils.errors import InterpError

if TYPE_CHECKING:
    from nnsight import TransformersModel


# What a model's generation_config may ask for beyond the arg max, switched off.
OFF = (
    "min_length min_new_tokens stop_strings repetition_penalty no_repeat_ngram_size bad_words_ids guidance_scale "
    "forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty suppress_tokens sequence_bias "
    "begin_suppress_tokens watermarking_config renormalize_logits remove_invalid_values"
).split()


@dataclass(frozen=True, eq=False)
class Edit:
    """One change of one residual state: `change` maps "d_model" to "d_model"."""

    layer: int
    position: int
    change: Callable[[Float[Tensor, " d_model"]], Float[Tensor, " d_model"]]
    width: int | None = None


def patch(layer: int, position: int, vector: Float[Tensor, " d_model"]) -> Edit:
    """Replace the state by `vector`."""
    return Edit(layer, position, lambda x: vector.to(x), vector.shape[-1])


def add(layer: int, position: int, vector: Float[Tensor, " d_model"]) -> Edit:
    """Add `vector` to the state (activation steering)."""
    return Edit(layer, position, lambda x: x + vector.to(x), vector.shape[-1])


def scale(layer: int, position: int, factor: float) -> Edit:
    """Multiply the state by `factor`."""
    return Edit(layer, position, lambda x: x * factor)


def project(layer: int, position: int, directions: Float[Tensor, "*k d_model"]) -> Edit:
    """Keep only the part of the state in the span of `directions`, which may be any vectors."""
    basis = _orthonormal(directions)
    return Edit(layer, position, lambda x: basis.to(x).T @ (basis.to(x) @ x), basis.shape[-1])


def ablate(layer: int, position: int, directions: Float[Tensor, "*k d_model"] | None = None) -> Edit:
    """Remove the part in the span of `directions`; without any, the whole state becomes zero."""
    if directions is None:
        return Edit(layer, position, torch.zeros_like)
    basis = _orthonormal(directions)
    return Edit(layer, position, lambda x: x - basis.to(x).T @ (basis.to(x) @ x), basis.shape[-1])


def _orthonormal(directions: Float[Tensor, "*k d_model"]) -> Float[Tensor, "rank d_model"]:
    """Basis of the span; directions that depend on the others, or are zero, add nothing to it."""
    _, sizes, basis = torch.linalg.svd(torch.atleast_2d(directions).double(), full_matrices=False)
    return basis[sizes > 1e-6 * sizes.max()]


Edits = Edit | Sequence[Edit]


@dataclass(frozen=True)
class Generation:
    """Greedy continuations.

    Attributes:
        tokens: generated ids, padded after the end of text.
        texts: the same as text, without special tokens.
        gaps: logit of the chosen token minus the runner-up's, per step. A step below 1e-3 is a
            near-tie that another batch shape may decide otherwise. NaN when the model runs remotely.
    """

    tokens: Int[Tensor, "row step"]
    texts: list[str]
    gaps: Float[Tensor, "row step"]


def edited_logits(
    model: TransformersModel,
    prompts: Prompt | Sequence[Prompt],
    edits: Sequence[Edits],
    *,
    expect_change: bool = True,
    batch_size: int = 64,
) -> Float[Tensor, "row vocab"]:
    """Next-token logits with one row per entry of `edits`.

    Args:
        model: from `load_model`.
        prompts: one prompt for all rows, or one per row.
        edits: for each row one edit or several; several at one state apply in order.
        expect_change: raise when an edit leaves its state as it was.
        batch_size: rows per forward.

    Raises:
        InterpError: bad prompt, layer, position or width; an edit that changed nothing.
    """
    rows, plan = _plan(model, prompts, edits)
    parts = []
    for start in range(0, len(rows), batch_size):
        chunk = slice(start, start + batch_size)
        inputs = pad(model, rows[chunk])
        with torch.no_grad(), model.trace(inputs, logits_to_keep=1, remote=model.info.remote):
            unchanged = nnsight.save([])
            _apply(model, plan[chunk], unchanged)
            logits = model.unembed.output[:, -1].save()
        _complain(unchanged, start, expect_change)
        parts.append(logits)
    return softcapped(model, torch.cat(parts))


def generate(
    model: TransformersModel,
    prompts: Prompt | Sequence[Prompt],
    edits: Sequence[Edits],
    *,
    max_new_tokens: int = 20,
    expect_change: bool = True,
    batch_size: int = 64,
    progress: bool = False,
) -> Generation:
    """Greedy generation with one row per entry of `edits`; edits act in prefill only.

    Plainly the arg max: penalties, suppressed tokens and the like of the model's generation_config are off.
    When all rows share their prompt, the tokens before the first edited position run once and
    their keys and values are shared.

    Args, Raises: as `edited_logits`.
    """
    rows, plan = _plan(model, prompts, edits, max_new_tokens)
    tokens, gaps = [], []
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, desc="generating", unit="batch", disable=not progress):
        chunk = slice(start, start + batch_size)
        ids, gap, unchanged = _generate(model, rows[chunk], plan[chunk], max_new_tokens)
        _complain(unchanged, start, expect_change)
        tokens.append(_widen(ids, max_new_tokens, model.tokenizer.pad_token_id))
        gaps.append(_widen(gap, max_new_tokens, torch.inf))
    together = torch.cat(tokens)
    texts = model.tokenizer.batch_decode(together, skip_special_tokens=True)
    return Generation(together, texts, torch.cat(gaps))


def _generate(
    model: TransformersModel, rows: list[list[int]], plan: list[list[Edit]], max_new_tokens: int
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    inputs: dict[str, Any] = pad(model, rows)
    del inputs["position_ids"]  # generation derives them from the mask
    width = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    options |= dict.fromkeys(OFF)
    remote = model.info.remote
    gaps = _Gaps()
    if not remote:  # a processor and a cache cannot travel
        options["logits_processor"] = [gaps]
        options["past_key_values"] = _shared_prefix(model, rows, plan)
    with torch.no_grad(), model.generate(inputs, remote=remote, **options) as tracer:
        unchanged = nnsight.save([])
        _apply(model, plan, unchanged)
        ids = tracer.result.save()
    new = ids[:, width:]
    gap = torch.stack(gaps.steps, dim=1) if gaps.steps else torch.full(new.shape, torch.nan)
    return new, gap, unchanged


class _Gaps:
    """Logits processor that only looks: top-1 minus top-2 at every step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best = scores.topk(2).values
        self.steps.append(best[:, 0] - best[:, 1])
        return scores


def _shared_prefix(model: TransformersModel, rows: list[list[int]], plan: list[list[Edit]]) -> Any:
    """Keys and values of the tokens before the first edit, repeated per row; None if prompts differ."""
    first = min((len(rows[0]) + e.position for edits in plan for e in edits), default=len(rows[0]) - 1)
    if first < 1 or any(row != rows[0] for row in rows):
        return None
    prefix = pad(model, [rows[0][:first]])
    with torch.no_grad():
        cache = model._module(**prefix, use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(len(rows))
    return cache


def _plan(
    model: TransformersModel, prompts: Prompt | Sequence[Prompt], edits: Sequence[Edits], new: int = 0
) -> tuple[list[list[int]], list[list[Edit]]]:
    """Token rows and checked edits, layers from 0 and positions from the end, before any heavy work."""
    if not len(edits):
        raise InterpError("The list of edits is empty; give one entry per row.")
    ids = [tokenize(model, prompt, new) for prompt in as_list(prompts)]
    if len(ids) not in (1, len(edits)):
        raise InterpError(
            f"{len(ids)} prompts and {len(edits)} rows of edits; give one prompt, or one per row."
        )
    rows = ids * len(edits) if len(ids) == 1 else ids
    d_model = model.config.hidden_size
    plan = []
    for row, own in zip(rows, edits, strict=True):
        checked = []
        for edit in [own] if isinstance(own, Edit) else own:
            if edit.width not in (None, d_model):
                raise InterpError(f"The vector has width {edit.width} but the model's d_model is {d_model}.")
            layer, position = check_layer(model, edit.layer), from_end(len(row), edit.position)
            checked.append(Edit(layer, position, edit.change, edit.width))
        plan.append(checked)
    return rows, plan


def _apply(model: TransformersModel, plan: list[list[Edit]], unchanged: list[tuple[int, int]]) -> None:
    """Inside a trace: make all edits, layer by layer in the order of the forward pass."""
    for layer in sorted({edit.layer for edits in plan for edit in edits}):
        resid = hidden(model.layers[layer])
        for row, edits in enumerate(plan):
            for edit in edits:
                if edit.layer == layer:
                    before = resid[row, edit.position].clone()
                    resid[row, edit.position] = edit.change(before)
                    if torch.equal(before, resid[row, edit.position]):
                        unchanged.append((row, layer))


def _complain(unchanged: list[tuple[int, int]], start: int, expect_change: bool) -> None:
    if unchanged and expect_change:
        row, layer = unchanged[0]
        raise InterpError(
            f"The edit of row {start + row} at layer {layer} changed nothing ({len(unchanged)} such edits); "
            "check its layer and value, or pass expect_change=False if that is intended."
        )


def _widen(values: Tensor, width: int, fill: float) -> Tensor:
    """Generation stops early when every row has ended: pad to the asked width."""
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)
