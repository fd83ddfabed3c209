"""Score given answers by teacher forcing, after rows that went on from patched states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from interp_utils.errors import InterpError

if TYPE_CHECKING:
    from nnsight import TransformersModel


@runtime_checkable
class Rows(Protocol):
    """What a score is read from: `PatchedRows`, or anything with the same two readings."""

    def logits(self, tokens: Sequence[int] | None = None) -> Float[Tensor, "row vocab"]: ...
    def log_probs_after(self, path: Sequence[int]) -> Float[Tensor, "row vocab"]: ...


def distinguishing(model: TransformersModel, candidates: Sequence[str]) -> list[list[int]]:
    """For each candidate the shortest beginning, in tokens, that no other candidate shares.

    Give candidates as they continue the prompt, usually with a leading space.

    Raises:
        InterpError: fewer than two, one twice, or one that is the beginning of another.
    """
    whole = [model.tokenizer(c, add_special_tokens=False).input_ids for c in candidates]
    if len(whole) < 2:
        raise InterpError(f"{len(whole)} candidates were given; at least two are needed to choose between.")
    paths = []
    for i, ids in enumerate(whole):
        others = whole[:i] + whole[i + 1 :]
        length = 1 + max(_shared(ids, other) for other in others)
        if length > len(ids):
            raise InterpError(
                f"The candidate {candidates[i]!r} is, in tokens, the beginning of another or given twice; "
                "the two cannot be told apart: leave one out."
            )
        paths.append(list(ids[:length]))
    return paths


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two candidates have in common."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))


def candidate_log_probs(rows: Rows, paths: Sequence[Sequence[int]]) -> Float[Tensor, "row candidate"]:
    """Log-probability of each path of tokens, normalised over the paths (nats).

    The first tokens share one normaliser, which cancels, so only their own logits are computed;
    each longer path costs one more run of the rows per token it shares with another.
    """
    first = rows.logits([path[0] for path in paths])
    scores = first.clone()
    inner = {tuple(path[:end]) for path in paths for end in range(1, len(path))}
    for node in sorted(inner):
        after = rows.log_probs_after(node)
        for i, path in enumerate(paths):
            if len(path) > len(node) and tuple(path[: len(node)]) == node:
                scores[:, i] += after[:, path[len(node)]]
    return torch.log_softmax(scores, dim=-1)
