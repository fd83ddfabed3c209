"""One seed decides every draw."""

from __future__ import annotations

import random

import numpy as np
import torch

from interp_utils.seeds import seed_everything


def draws(seed: int) -> list[float]:
    generator = seed_everything(seed)
    legacy = np.random.rand()  # noqa: NPY002 - what older libraries use
    return [random.random(), legacy, torch.rand(()).item(), torch.rand((), generator=generator).item()]


def test_same_seed_same_draws_and_another_seed_others() -> None:
    assert draws(3) == draws(3)
    assert all(one != other for one, other in zip(draws(3), draws(4), strict=True))


def test_the_generator_is_independent_of_global_draws() -> None:
    generator = seed_everything(3)
    torch.rand(10)
    assert torch.rand((), generator=generator).item() == draws(3)[3]
