"""How a dictionary is trained, and what the recipes fill in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from interp_utils.dictionaries.dictionary import Dictionary
from interp_utils.dictionaries.kernels import Screen, fast_screen
from interp_utils.errors import InterpError

TOPK = ("topk", "batchtopk")


def _named(value: Any) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2
    return all(isinstance(name, str) for name in (value if pair else (value,)))


# What a field must be, None aside where that is its default, and the words for it.
CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("steps", "batch_size", "log_every", "epochs"), (lambda n: n >= 1, "at least 1")),
    **dict.fromkeys(("lr", "clip_norm", "dead_tokens"), (lambda v: 0 < v < math.inf, "above 0")),
    **dict.fromkeys(("warmup_steps", "aux_k"), (lambda n: n >= 0, "at least 0")),
    "l1": (lambda v: 0 <= v < math.inf, "at least 0"),
    **dict.fromkeys(("decay", "l1_warmup"), (lambda share: 0 <= share <= 1, "between 0 and 1")),
    "betas": (lambda pair: len(pair) == 2 and all(0 <= b < 1 for b in pair), "two numbers from 0 to below 1"),
    "screen": (lambda name: name in ("auto", "bfloat16"), "'auto', 'bfloat16' or None"),
    "site": (_named, "the name of a site or a pair of them, (input, target)"),
}
OPTIONAL = ("lr", "l1", "l1_warmup", "clip_norm", "aux_k", "screen", "site", "epochs")


@dataclass(frozen=True)
class TrainConfig:
    """How to train; a field left at None takes the recipe of the dictionary's kind.

    Attributes:
        steps: updates in all.
        batch_size: rows per update, of all processes together.
        lr: Adam's learning rate; recipe: relu 5e-5 (April 2024), topk kinds 2e-4 sqrt(16384 / width) (Gao et
            al. 2024), jumprelu 2e-4. Runs of a few thousand steps want more for relu: 4e-4 to 1e-3.
        warmup_steps: over which lr rises from 0.
        decay: last share of the steps, over which lr falls linearly to 0; 0 keeps it constant.
        l1: coefficient of the sparsity penalty: the paper's lambda for relu (5), that of L0 for jumprelu (2),
            none for the topk kinds.
        l1_warmup: first share of the steps, over which l1 rises; recipe: .05.
        clip_norm: of the joint gradient; None does not clip.
        aux_k: dead latents per row that may explain the residual; recipe: d_out / 2 for the topk kinds, else 0.
        dead_tokens: a latent silent for so many tokens is dead, for aux_k and the log.
        screen: "bfloat16" lets a bfloat16 product choose the latents, whose values and gradients are then
            computed in float32; only while a relu dictionary has more than 1 in 32 latents active are its five
            dense products bfloat16 throughout, with float32 weights and sums. None: everything in float32.
            "auto": the former where the processor is fast at it.
        betas: Adam's.
        freeze_decoder: leave W_dec as it is (the random-decoder control).
        seed: of the order of the data.
        site: of a store with several sites: one, or (input, target) for a transcoder.
        epochs: passes over a store or tensor that may be begun; more steps than they hold is an error. None: as
            many as the steps need.
        log_every: steps per row of the log.
    """

    steps: int
    batch_size: int = 2048
    lr: float | None = None
    warmup_steps: int = 0
    decay: float = 0.2
    l1: float | None = None
    l1_warmup: float | None = None
    clip_norm: float | None = 1.0
    aux_k: int | None = None
    dead_tokens: int = 200_000
    screen: Screen | Literal["auto"] = "auto"
    betas: tuple[float, float] = (0.9, 0.999)
    freeze_decoder: bool = False
    seed: int = 0
    site: str | tuple[str, str] | None = None
    epochs: int | None = None
    log_every: int = 50

    def __post_init__(self) -> None:
        for name, (right, wanted) in CHECKS.items():
            value = getattr(self, name)
            if not (right(value) if value is not None else name in OPTIONAL):
                raise InterpError(f"{name} is {value!r} but must be {wanted}.")

    def filled(self, dictionary: Dictionary) -> dict[str, Any]:
        """All fields, the recipe's values in place of None."""
        kind, width = dictionary.kind, dictionary.width
        topk = kind in TOPK
        recipe = {
            "lr": {"relu": 5e-5, "jumprelu": 2e-4}.get(kind, 2e-4 * math.sqrt(16384 / width)),
            "l1": {"relu": 5.0, "jumprelu": 2.0}.get(kind, 0.0),
            "l1_warmup": 0.0 if topk else 0.05,
            "aux_k": min(dictionary.d_out // 2, width) if topk else 0,
        }
        screen = fast_screen() if self.screen == "auto" else self.screen
        given = {**vars(self), "screen": screen}
        return {**given, **{name: value for name, value in recipe.items() if given[name] is None}}

    def rate(self, step: int, peak: float) -> float:
        """The learning rate of a step, counted from 0."""
        rising = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        falling = min(1.0, (self.steps - step) / (self.decay * self.steps)) if self.decay else 1.0
        return peak * rising * falling
