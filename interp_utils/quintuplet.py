"""The quintuplet of a Patchscope as a value, and where a state goes in its target prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp_utils.activations import check_finite, check_layer, from_end, tokenize
from interp_utils.candidates import Rows
from interp_utils.errors import InterpError
from interp_utils.interventions import Edit, Generation, edited_logits, generate, patch
from interp_utils.shared_prefix import SharedPrefix, check_rows, fits_window

if TYPE_CHECKING:
    from nnsight import TransformersModel

StateMap = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True, eq=False)
class Patchscope:
    """The quintuplet (T, i*, f, M*, l*), to be applied to a state of (S, i, M, l); section 3 of the paper.

    T runs once, when the first cell is computed, and its run is kept: after a change of M*'s weights make
    a new Patchscope.

    Attributes:
        model: M*, which reads the target prompt.
        target: T.
        placeholder: i*, as a text that is one token of T (its last occurrence counts) or a position.
        mapping: f(states "row d_model", l, l*) -> "row d_model" of M*, each row by itself (a grid maps chunk by
            chunk); None is the identity.
        layer: l*; None is l* = l.

    Raises:
        InterpError: no such placeholder, or it is several tokens; a position or layer out of range.
    """

    model: TransformersModel
    target: str
    placeholder: str | int = "x"
    mapping: StateMap | None = None
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.layer is not None:
            check_layer(self.model, self.layer)
        _ = self.position

    @cached_property
    def position(self) -> int:
        """i*, counted from the end of T."""
        if isinstance(self.placeholder, str):
            return find_placeholder(self.model, self.target, self.placeholder)
        return from_end(len(tokenize(self.model, self.target)), self.placeholder)

    @cached_property
    def shared(self) -> SharedPrefix:
        """The run of T that all cells share."""
        return SharedPrefix(self.model, self.target, self.position)

    @property
    def shares(self) -> bool:
        """Whether T runs once: keys and values cannot be kept on another machine or beyond a sliding window."""
        return not self.model.info.remote and fits_window(self.model, self.target)

    def rows(self, vectors: Float[Tensor, "row d_model"], into: Sequence[int]) -> Rows:
        """Run T with each row's mapped state at i*, after its own l*."""
        return self.shared.run(vectors, into) if self.shares else EditedRows(self, vectors, into)

    def mapped(
        self, states: Float[Tensor, "row source_width"], layers: Sequence[int], into: Sequence[int]
    ) -> Float[Tensor, "row d_model"]:
        """f of each row's state, from its l to its l*."""
        check_finite(states)
        if self.mapping is None:
            check_rows(self.model, states)
            return states
        d_model = self.model.config.hidden_size
        out = states.new_empty(len(states), d_model)
        cells = torch.tensor([list(layers), list(into)]).T
        for layer, to in cells.unique(dim=0).tolist():
            own = ((cells[:, 0] == layer) & (cells[:, 1] == to)).nonzero()[:, 0]
            new = self.mapping(states[own], layer, to)
            if new.shape != (len(own), d_model):
                raise InterpError(
                    f"The mapping from layer {layer} to {to} gave shape {tuple(new.shape)} where "
                    f"{(len(own), d_model)} was expected."
                )
            out[own] = new.to(out)
        check_finite(out, "mapped states")
        return out


class EditedRows:
    """The readings of `PatchedRows` from whole forward passes: slower, for any prompt, also remotely."""

    def __init__(self, scope: Patchscope, vectors: Float[Tensor, "row d_model"], into: Sequence[int]) -> None:
        check_rows(scope.model, vectors, into)
        self.scope, self.vectors, self.into = scope, vectors, list(into)

    def logits(self, tokens: Sequence[int] | None = None) -> Float[Tensor, "row vocab"]:
        logits = self._after([])
        return logits if tokens is None else logits[:, list(tokens)]

    def log_probs_after(self, path: Sequence[int]) -> Float[Tensor, "row vocab"]:
        return self._after(list(path)).log_softmax(-1)

    def generate(self, max_new_tokens: int) -> Generation:
        scope, limit = self.scope, max_new_tokens
        return generate(scope.model, scope.target, self._edits(), max_new_tokens=limit, expect_change=False)

    def _edits(self, new: int = 0) -> list[Edit]:
        at = self.scope.position - new
        return [patch(layer, at, v) for layer, v in zip(self.into, self.vectors, strict=True)]

    def _after(self, path: list[int]) -> Float[Tensor, "row vocab"]:
        model, edits = self.scope.model, self._edits(len(path))
        return edited_logits(model, tokenize(model, self.scope.target) + path, edits, expect_change=False)


def find_placeholder(model: TransformersModel, prompt: str, placeholder: str) -> int:
    """Position i* of the placeholder's last occurrence in a target prompt, counted from the end.

    The placeholder must be one token there, since one state replaces it.

    Raises:
        InterpError: the placeholder is absent, or the tokenizer splits it.
    """
    at = prompt.rfind(placeholder) if placeholder else -1
    if at < 0:
        raise InterpError(
            f"The target prompt has no placeholder {placeholder!r}; add it where the state goes."
        )
    ids = tokenize(model, prompt)
    before, through = (model.tokenizer(prompt[:end]).input_ids for end in (at, at + len(placeholder)))
    position = len(through) - 1
    piece = model.tokenizer.decode(through[len(before) :] if len(through) > len(before) else through[-1:])
    joined = ids[: len(through)] == through
    if not joined or len(through) - len(before) > 1 or piece.strip() != placeholder.strip():
        shown = [model.tokenizer.decode([i]) for i in through[-3:]]
        raise InterpError(
            f"The placeholder {placeholder!r} is not one token of the target prompt (it ends in {shown}); "
            "choose another, or set it apart with spaces."
        )
    return position - len(ids)
