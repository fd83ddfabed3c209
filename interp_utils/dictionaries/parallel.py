"""Several processes that share every batch (`torchrun`), or one that has it whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """This process among its equals; alone unless `torchrun` started it.

    Attributes:
        rank: this process's number.
        world: how many there are.
    """

    def __init__(self) -> None:
        if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
            dist.init_process_group("gloo")
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    def add(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def gather(self, one: Any) -> list[Any]:
        """What each process has, in the order of their numbers."""
        everyone = [one] * self.world
        if self.world > 1:
            dist.all_gather_object(everyone, one)
        return everyone

    def copy_first(self, *tensors: Tensor) -> None:
        """Replace each tensor by the first process's."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def total(self, count: int) -> int:
        """The sum of a whole number over the processes."""
        sums = torch.tensor(count)
        self.add(sums)
        return int(sums)

    def kth_largest(self, values: Tensor, k: int) -> float:
        """The k-th largest of all processes' values, or the smallest positive one if there are fewer."""
        if self.world > 1:
            values = self._gather(values.topk(min(k, len(values))).values, k)
        plain = values[values > 0].numpy()
        if not len(plain):
            return float("inf")
        place = max(len(plain) - k, 0)
        return float(np.partition(plain, place)[place])

    def _gather(self, values: Tensor, size: int) -> Tensor:
        own = torch.zeros(size)  # padded: gloo gathers equal shapes
        own[: len(values)] = values
        parts = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(parts, own)
        return torch.cat(parts)
