"""What the package must agree with: plain transformers, one prompt at a time, plain forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.families import raw_blocks

Change = tuple[int, int, Callable[[Tensor], Tensor]]  # layer, position from the start, what happens to it


class Oracle:
    """One model; nothing is batched, padded, cached or traced."""

    def __init__(self, raw: PreTrainedModel) -> None:
        self.raw = raw
        self.blocks = raw_blocks(raw)

    def forward(self, changes: Sequence[Change] = (), **inputs: Any) -> tuple[Tensor, list[Tensor]]:
        """Logits "batch pos vocab" and the output of every block."""
        seen: list[Tensor] = []
        handles = [
            block.register_forward_hook(self._hook([c for c in changes if c[0] == layer], seen))
            for layer, block in enumerate(self.blocks)
        ]
        try:
            with torch.no_grad():
                logits = self.raw(**inputs).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits, seen

    @staticmethod
    def _hook(changes: Sequence[Change], seen: list[Tensor]) -> Callable[..., Any]:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            state = (output if isinstance(output, Tensor) else output[0]).clone()
            for _, position, change in changes:
                state[0, position] = change(state[0, position].clone())
            seen.append(state)
            return state if isinstance(output, Tensor) else (state, *output[1:])

        return hook

    def logits(self, ids: Sequence[int], changes: Sequence[Change] = ()) -> Tensor:
        """Next-token logits after one prompt."""
        return self.forward(changes, input_ids=torch.tensor([list(ids)]))[0][0, -1]

    def stream(self, ids: Sequence[int]) -> Tensor:
        """Residual stream "layer pos d_model" of one prompt."""
        return torch.cat(self.forward(input_ids=torch.tensor([list(ids)]))[1])

    def greedy(
        self, ids: Sequence[int], changes: Sequence[Change], steps: int
    ) -> tuple[list[int], list[float]]:
        """Greedy continuation, everything computed anew at each step, and the top-2 gap of each step."""
        tokens, gaps = list(ids), []
        for _ in range(steps):
            best = self.logits(tokens, changes).topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
        return tokens[len(ids) :], gaps


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the norm of its row."""
    return float(((found - expected).abs().amax(-1) / expected.norm(dim=-1)).max())


def same_but_for_ties(found: Sequence[int], expected: Sequence[int], gaps: Sequence[float]) -> bool:
    """Whether two greedy continuations are equal up to a step whose top two logits nearly tie."""
    for one, other, gap in zip(found, expected, gaps, strict=True):
        if one != other:
            return gap < 1e-3
    return True
