"""Patchscopes (Ghandeharioun et al. 2024): inspect a hidden state by patching it into another prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp_utils.activations import tokenize
from interp_utils.errors import InterpError

if TYPE_CHECKING:
    from nnsight import TransformersModel


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
