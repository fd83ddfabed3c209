"""Adam (Kingma and Ba 2015) on all parameters at once, with the gradient's norm clipped on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from interp_utils.dictionaries.dictionary import Dictionary

EPSILON = 1e-8
# The mean gradient of a silent latent shrinks by a tenth a step until it is a denormal number, with which the
# update takes seventeen times as long. Below this size it moves no weight, and every so many steps it becomes 0.
NOTHING, SWEEP = 1e-30, 128


class Adam:
    """Dense fused Adam, so that rows without a gradient move on as the algorithm says.

    Attributes:
        parameters, means, squares: by parameter name; the moments have the parameter's shape.
        count: steps taken, a float tensor as the fused kernel wants it.
    """

    def __init__(self, dictionary: Dictionary, betas: tuple[float, float], frozen: tuple[str, ...] = ()):
        named = dictionary.named_parameters()
        self.parameters = {name: p.detach() for name, p in named if name not in frozen}
        self.means = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.squares = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.count = torch.zeros(())
        self.betas = betas

    def step(self, gradients: dict[str, Tensor], lr: float, clip_norm: float | None) -> None:
        """One update; gradients above `clip_norm` in joint norm are scaled down to it."""
        names = list(self.parameters)
        grads = [gradients[name] for name in names]
        scale = None
        if clip_norm is not None:
            norm = torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).norm()
            scale = ((norm + 1e-6) / clip_norm).clamp(min=1)  # the kernel divides by it
        self.count += 1
        if int(self.count) % SWEEP == 0:
            for mean in self.means.values():
                mean.masked_fill_(mean.abs() < NOTHING, 0)
        torch._fused_adam_(
            [self.parameters[name] for name in names],
            grads,
            [self.means[name] for name in names],
            [self.squares[name] for name in names],
            [],
            [self.count for _ in names],
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=0.0,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
            grad_scale=scale,
        )


def without_radial(gradient: Tensor, W_dec: Tensor, radial: Tensor | None) -> None:
    """Take out what would only change the length of a unit decoder row (Towards Monosemanticity, appendix)."""
    if radial is None:
        radial = torch.linalg.vecdot(gradient, W_dec)
    gradient.addcmul_(W_dec, radial[:, None], value=-1)


def unit_rows(W_dec: Tensor) -> None:
    """Make every decoder row a unit row again."""
    W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_(min=1e-12))
