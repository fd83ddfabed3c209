"""Greedy text after rows that share a prefix: one forward of one token per step for all rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_utils.interventions import Generation
from interp_utils.shared_prefix import PatchedRows

if TYPE_CHECKING:
    from nnsight import TransformersModel

BLOCK = 1024  # columns; the best two of a large vocabulary lie in the best two blocks


def continue_greedily(rows: PatchedRows, max_new_tokens: int) -> Generation:
    """The tokens, texts and top-2 gaps that `interventions.generate` gives for the same patches.

    Plainly the arg max, as there. It runs no prompt: keys and values of the shared prefix and of the rows'
    own tokens are at hand. What it gives is on the CPU.
    """
    model = rows.shared.model
    fill = model.tokenizer.pad_token_id or 0
    cache = rows.cache()
    logits = rows.logits()
    ends = end_tokens(model, logits.device)
    going = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    tokens, gaps = [], []
    for step in range(max_new_tokens):
        best, ids = top_two(logits)
        chosen = torch.where(going, ids[:, 0], fill)
        tokens.append(chosen)
        gaps.append(torch.where(going, best[:, 0] - best[:, 1], torch.inf))
        going = going & ~torch.isin(chosen, ends)
        if step + 1 == max_new_tokens or not going.any():
            break
        with torch.no_grad():
            logits = model._module(
                input_ids=chosen[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]
    missing = max_new_tokens - len(tokens)
    together = torch.nn.functional.pad(torch.stack(tokens, dim=1).cpu(), (0, missing), value=fill)
    gap = torch.nn.functional.pad(torch.stack(gaps, dim=1).cpu(), (0, missing), value=torch.inf)
    return Generation(together, model.tokenizer.batch_decode(together, skip_special_tokens=True), gap)


def top_two(
    logits: Float[Tensor, "row vocab"],
) -> tuple[Float[Tensor, "row two"], Int[Tensor, "row two"]]:
    """`topk(2)`, eight times faster on a large vocabulary: block maxima first."""
    n_rows, vocab = logits.shape
    if vocab % BLOCK or vocab < 4 * BLOCK:
        found = logits.topk(2)
        return found.values, found.indices
    blocks = logits.view(n_rows, -1, BLOCK)
    best = blocks.amax(-1).topk(2).indices  # (row, 2)
    few = blocks[torch.arange(n_rows, device=best.device)[:, None], best].flatten(1)
    values, at = few.topk(2)
    return values, best.gather(1, at // BLOCK) * BLOCK + at % BLOCK


def end_tokens(model: TransformersModel, device: torch.device) -> Int[Tensor, " end"]:
    """The tokens that end a text."""
    ends = model._module.generation_config.eos_token_id
    return torch.tensor([] if ends is None else ends, device=device).reshape(-1).long()
