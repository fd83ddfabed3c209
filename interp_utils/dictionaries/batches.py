"""Where batches come from, and what is refused in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp_utils.dictionaries.dictionary import Dictionary
from interp_utils.dictionaries.parallel import Ranks
from interp_utils.errors import InterpError

if TYPE_CHECKING:
    from interp_utils.dictionaries.config import TrainConfig

# An activation store, a tensor or a pair of them, or a function from the first step to an iterator.
Batches = Any


def source(data: Batches, config: TrainConfig, start: int, ranks: Ranks) -> Iterator[Any]:
    """Batches from step `start` on, of this rank's rows."""
    if config.batch_size % ranks.world:
        raise InterpError(
            f"batch_size {config.batch_size} cannot be shared equally by {ranks.world} processes; "
            "choose a multiple."
        )
    if hasattr(data, "batches"):
        epochs = config.epochs or -(-config.steps * config.batch_size // max(len(data), 1)) + 1
        share = {"rank": ranks.rank, "world": ranks.world, "site": config.site}
        return data.batches(config.batch_size, seed=config.seed, epochs=epochs, start=start, **share)
    if isinstance(data, Callable):  # type: ignore[arg-type]
        return data(start)
    parts = data if isinstance(data, tuple) else (data,)
    return _of_tensors(parts, config, start, ranks)


def remember_units(dictionary: Dictionary, data: Batches, config: TrainConfig) -> None:
    """Keep a store's means and scales with the dictionary that is trained on it."""
    if hasattr(data, "batches") and hasattr(data, "scale"):
        sites = config.site or next(iter(data.scale))
        first, last = (sites, sites) if isinstance(sites, str) else sites
        if len(data.mean[first]) == dictionary.d_in and len(data.mean[last]) == dictionary.d_out:
            dictionary.set_units(data.mean[first], data.scale[first], data.mean[last], data.scale[last])


def _of_tensors(
    parts: tuple[Tensor, ...], config: TrainConfig, start: int, ranks: Ranks
) -> Iterator[tuple[Tensor, ...]]:
    """Every epoch in another order, drawn from (seed, epoch); what does not fill a batch is left out."""
    size, share = config.batch_size, config.batch_size // ranks.world
    per_epoch = len(parts[0]) // size
    if any(len(part) != len(parts[0]) for part in parts):
        raise InterpError(
            f"Input has {len(parts[0]):,} rows but the target {len(parts[-1]):,}; they must agree."
        )
    if not per_epoch:
        raise InterpError(f"The data has {len(parts[0]):,} rows, fewer than one batch of {size:,}.")
    step = start
    while config.epochs is None or step < config.epochs * per_epoch:
        epoch, place = divmod(step, per_epoch)
        if step == start or place == 0:
            generator = torch.Generator().manual_seed((config.seed << 20) + epoch)
            order = torch.randperm(len(parts[0]), generator=generator)
        first = place * size + ranks.rank * share
        rows = order[first : first + share]
        yield tuple(part[rows].float() for part in parts)
        step += 1


def checked(
    batches: Iterator[Any], dictionary: Dictionary, config: TrainConfig, step: int, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """The next (input, target), of the right shape, finite and not constant."""
    batch = next(batches, None)
    if batch is None:
        raise InterpError(
            f"The data ended after {step:,} of {config.steps:,} steps; ask for fewer, or for more epochs."
        )
    x, y = (batch, batch) if isinstance(batch, Tensor) else (batch[0], batch[-1])
    rows = config.batch_size // ranks.world
    wanted = (("input", x, dictionary.d_in), ("target", y, dictionary.d_out))
    for what, tensor, width in wanted:
        if tuple(tensor.shape) != (rows, width):
            raise InterpError(
                f"The {what} of step {step} has shape {tuple(tensor.shape)} but ({rows}, {width}) is needed: "
                "batch size and widths of data and dictionary must agree."
            )
        if not torch.isfinite(tensor.sum()):  # a sum passes over the data once and keeps NaN and infinity
            bad = (~torch.isfinite(tensor)).any(1).nonzero().flatten()
            raise InterpError(
                f"The {what} of step {step} has NaN or infinite values in {len(bad)} rows, the first is row "
                f"{int(bad[0]) if len(bad) else 0}; harvest again or leave those rows out."
            )
        if rows > 1 and torch.equal(tensor, tensor[:1].expand_as(tensor)):
            raise InterpError(
                f"All rows of the {what} of step {step} are equal; there is nothing to learn from constant "
                "activations: check layer and site."
            )
    return x, y
