"""Steer a model at one site: clamp latents of a dictionary to chosen values, or push states along a vector.

One row of a batch carries one list of steers, so that many strengths cost one forward or one generation.
Unlike edits of `interventions`, steers act on every position after the start token, generated ones included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from interp_utils.activations import Prompt, pad
from interp_utils.dictionaries.dictionary import Dictionary
from interp_utils.greedy import end_tokens, top_two
from interp_utils.interventions import Generation
from interp_utils.shared_prefix import new_cache
from interp_utils.steers import Clamp, Hook, Plan, Push, Steer, Steers

if TYPE_CHECKING:
    from nnsight import TransformersModel

__all__ = ["Clamp", "Push", "Steer", "Step", "steered_generate", "steered_logits", "steered_steps"]


@dataclass(frozen=True)
class Step:
    """One step of a greedy generation.

    Attributes:
        logits: next-token logits under steering.
        tokens: the arg max; padding in rows that have ended.
        gaps: its logit minus the runner-up's; infinite in rows that have ended.
        going: rows that had not ended before this step.
    """

    logits: Float[Tensor, "row vocab"]
    tokens: Int[Tensor, " row"]
    gaps: Float[Tensor, " row"]
    going: Bool[Tensor, " row"]


def steered_logits(
    model: TransformersModel,
    dictionary: Dictionary,
    site: str,
    prompts: Prompt | Sequence[Prompt],
    steers: Steers,
    *,
    positions: int | Sequence[int] | None = None,
    batch_size: int = 64,
) -> Float[Tensor, "row vocab"]:
    """Next-token logits with one row per entry of `steers`.

    With x_norm = (x - mean) * scale in the dictionary's units and a = encode(x_norm), a row's state becomes
    x + sum_i (value_i - a_i) W_dec_i / scale: the reconstruction with its latents i replaced, plus the error
    x - x_hat as it was (Scaling Monosemanticity, methods of steering). Pushes are added; no steer sees another.

    Args:
        model: from `load_model`, on this machine.
        dictionary: an autoencoder of the site, with its units set.
        site: "resid_post.<layer>".
        prompts: one prompt for all rows, or one per row.
        steers: for each row one steer or several; an empty list changes nothing.
        positions: where in the prompt to steer, the same in every row; None is everywhere after position 0.
        batch_size: rows per forward.

    Raises:
        InterpError: a remote model, a site that is not the residual stream, a dictionary that does not fit,
            a latent out of range or clamped twice, a number that is not finite, a bad prompt, or position 0.
    """
    plan = Plan(model, dictionary, site, prompts, steers, positions)
    parts = []
    for rows in plan.batches(batch_size):
        inputs = pad(model, plan.rows[rows])
        real = inputs["attention_mask"]
        with torch.no_grad(), Hook(plan, rows, real.device).at(plan.in_prompt(rows, real)):
            parts.append(model._module(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1])
    return torch.cat(parts)


def steered_generate(
    model: TransformersModel,
    dictionary: Dictionary,
    site: str,
    prompts: Prompt | Sequence[Prompt],
    steers: Steers,
    *,
    positions: int | Sequence[int] | None = None,
    max_new_tokens: int = 20,
    batch_size: int = 64,
    progress: bool = False,
) -> Generation:
    """Greedy generation with one row per entry of `steers`; generated positions are steered, too.

    Where `positions` are given, only they are, and no generated one. Otherwise as `steered_logits`.
    """
    plan = Plan(model, dictionary, site, prompts, steers, positions, max_new_tokens)
    fill, tokens, gaps = model.tokenizer.pad_token_id or 0, [], []
    for rows in tqdm(list(plan.batches(batch_size)), desc="generating", unit="batch", disable=not progress):
        steps = [(step.tokens.cpu(), step.gaps.cpu()) for step in _steps(plan, rows, max_new_tokens)]
        short = (0, max_new_tokens - len(steps))  # every row has ended
        tokens.append(torch.nn.functional.pad(torch.stack([s[0] for s in steps], 1), short, value=fill))
        gaps.append(torch.nn.functional.pad(torch.stack([s[1] for s in steps], 1), short, value=torch.inf))
    together = torch.cat(tokens)
    texts = model.tokenizer.batch_decode(together, skip_special_tokens=True)
    return Generation(together, texts, torch.cat(gaps))


def steered_steps(
    model: TransformersModel,
    dictionary: Dictionary,
    site: str,
    prompts: Prompt | Sequence[Prompt],
    steers: Steers,
    *,
    positions: int | Sequence[int] | None = None,
    max_new_tokens: int = 20,
) -> Iterator[Step]:
    """The steps of `steered_generate`, all rows in one batch: to measure what the model might have said.

    Ends early when every row has ended. Bad input is refused at once, not at the first step.
    """
    plan = Plan(model, dictionary, site, prompts, steers, positions, max_new_tokens)
    return _steps(plan, slice(0, len(plan.rows)), max_new_tokens)


def _steps(plan: Plan, rows: slice, max_new_tokens: int) -> Iterator[Step]:
    model, cache = plan.model, new_cache(plan.model)
    inputs = pad(model, plan.rows[rows])
    real = inputs["attention_mask"]  # (row, pos)
    length = real.sum(-1, keepdim=True)
    hook = Hook(plan, rows, real.device)
    mask: Tensor | None = plan.in_prompt(rows, real)
    fill, ends = model.tokenizer.pad_token_id or 0, end_tokens(model, real.device)
    going = real.new_ones(len(real), dtype=torch.bool)
    for step in range(max_new_tokens):
        # The hook stands only while the model runs: whoever takes the steps may stop between two of them.
        with torch.no_grad(), hook.at(mask):
            logits = model._module(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = logits.logits[:, -1]
        best, ids = top_two(logits)
        tokens = torch.where(going, ids[:, 0], fill)
        yield Step(logits, tokens, torch.where(going, best[:, 0] - best[:, 1], torch.inf), going)
        going = going & ~torch.isin(tokens, ends)
        if not going.any():
            return
        real = torch.nn.functional.pad(real, (0, 1), value=1)
        inputs = {"input_ids": tokens[:, None], "attention_mask": real, "position_ids": length + step}
        mask = plan.steered(rows).to(real.device) if plan.columns is None else None
