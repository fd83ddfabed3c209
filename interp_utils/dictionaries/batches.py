"""Where batches come from, and what is refused in them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp_utils.dictionaries.dictionary import Dictionary
from interp_utils.dictionaries.parallel import Ranks
from interp_utils.errors import InterpError, nearest

if TYPE_CHECKING:
    from interp_utils.dictionaries.config import TrainConfig

# An activation store, a tensor or a pair of them, or a function from the first step to an iterator.
Batches = Any
ROWS = 16  # of a tensor that stand for all in its fingerprint
ABOUT = ("model", "weights", "sites", "sources", "n_rows")  # of a store's card


def check_data(data: Batches, config: TrainConfig, ranks: Ranks) -> None:
    """Refuse what no batch could be drawn from, before any work.

    Raises:
        InterpError: another type, fewer rows than a batch, rows that do not agree, no such site, or a batch size
            that the processes cannot share.
    """
    if config.batch_size % ranks.world:
        raise InterpError(
            f"batch_size {config.batch_size} cannot be shared equally by {ranks.world} processes; "
            "choose a multiple."
        )
    tensors = tensors_of(data)
    if not (hasattr(data, "batches") or tensors or callable(data)):
        raise InterpError(
            f"Data of type {type(data).__name__} cannot be trained on; give an activation store, a tensor, a pair "
            "of tensors (input, target), or a function from the first step to an iterator over batches."
        )
    if tensors and len(tensors[0]) != len(tensors[-1]):
        raise InterpError(
            f"Input has {len(tensors[0]):,} rows but the target {len(tensors[-1]):,}; they must agree."
        )
    if not callable(data) and (rows := len(tensors[0] if tensors else data)) < config.batch_size:
        raise InterpError(f"The data has {rows:,} rows, fewer than one batch of {config.batch_size:,}.")
    for site in [config.site] if isinstance(config.site, str) else config.site or ():
        if site not in (known := getattr(data, "scale", {site: 1})):
            raise InterpError(f"This store has no site {site!r}.{nearest(site, known)}")


def fingerprint(data: Batches) -> str | None:
    """By which a checkpoint knows its data again.

    Of a store the model, weights, sites, sources, number of rows, and the means and scales it normalises with; of
    tensors the shapes and a few rows. A function has none: that it gives the same batches again is the caller's
    care.
    """
    if tensors := tensors_of(data):
        about: Any = [list(part.shape) for part in tensors]
        places = torch.linspace(0, len(tensors[0]) - 1, ROWS).long()
        numbers = [part[places] for part in tensors]
        name = " and ".join(" x ".join(map(str, shape)) for shape in about)
    elif hasattr(data, "batches"):
        card = getattr(data, "card", {})
        mean = getattr(data, "mean", {})
        about = [{key: card.get(key) for key in ABOUT}, len(data), dict(getattr(data, "scale", {}))]
        numbers, name = list(mean.values()), f"{len(data)} rows at {', '.join(mean)}"
    else:
        return None
    hashed = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for part in numbers:
        hashed.update(part.detach().double().numpy().tobytes())
    return f"{name}, hash {hashed.hexdigest()[:16]}"


def source(data: Batches, config: TrainConfig, start: int, ranks: Ranks) -> Iterator[Any]:
    """Batches from step `start` on, of this rank's rows."""
    if hasattr(data, "batches"):
        epochs = config.epochs or math.ceil(config.steps / (len(data) // config.batch_size))
        share = {"rank": ranks.rank, "world": ranks.world, "site": config.site}
        return data.batches(config.batch_size, seed=config.seed, epochs=epochs, start=start, **share)
    if tensors := tensors_of(data):
        return _of_tensors(tensors, config, start, ranks)
    return iter(data(start))


def remember_units(dictionary: Dictionary, data: Batches, config: TrainConfig) -> None:
    """Keep a store's means and scales with the dictionary that is trained on it."""
    if hasattr(data, "batches") and hasattr(data, "scale"):
        sites = config.site or next(iter(data.scale))
        first, last = (sites, sites) if isinstance(sites, str) else sites
        if len(data.mean[first]) == dictionary.d_in and len(data.mean[last]) == dictionary.d_out:
            dictionary.set_units(data.mean[first], data.scale[first], data.mean[last], data.scale[last])


def tensors_of(data: Any) -> tuple[Tensor, ...]:
    """The tensor or the pair of them, if data is that."""
    parts = data if isinstance(data, tuple) and len(data) in (1, 2) else (data,)
    return parts if all(isinstance(part, Tensor) and part.dim() for part in parts) else ()


def _of_tensors(
    parts: tuple[Tensor, ...], config: TrainConfig, start: int, ranks: Ranks
) -> Iterator[tuple[Tensor, ...]]:
    """Every epoch in another order, drawn from (seed, epoch); what does not fill a batch is left out."""
    size, share = config.batch_size, config.batch_size // ranks.world
    per_epoch, step = len(parts[0]) // size, start
    while config.epochs is None or step < config.epochs * per_epoch:
        epoch, place = divmod(step, per_epoch)
        if step == start or place == 0:
            generator = torch.Generator().manual_seed((config.seed << 20) + epoch)
            order = torch.randperm(len(parts[0]), generator=generator)
        first = place * size + ranks.rank * share
        rows = order[first : first + share]
        yield tuple(part[rows] for part in parts)
        step += 1


def as_pair(batch: Any, dictionary: Dictionary, where: str, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """A batch's input and target in float32: one object for an autoencoder that is given a lone tensor.

    Args:
        where: the batch, in the words of a message.
        rows: how many there must be; any number if not given.

    Raises:
        InterpError: something else than tensors of real numbers, other shapes, or values that are not finite.
    """
    parts = batch if isinstance(batch, (tuple, list)) else (batch,)
    real = all(isinstance(part, Tensor) and part.is_floating_point() for part in parts)
    if len(parts) not in (1, 2) or not real:
        kinds = ", ".join(f"{type(part).__name__} {getattr(part, 'dtype', '')}".strip() for part in parts)
        raise InterpError(
            f"{where.capitalize()} holds ({kinds}), but a floating-point tensor 'row d' or a pair of them is needed."
        )
    if dictionary.transcoder and len(parts) == 1:
        raise InterpError(
            f"{where.capitalize()} is one tensor, but a transcoder needs its input and its target; give pairs (x, y) of tensors, "
            "or site=(input, target) of a store."
        )
    pair = [part.float() for part in parts]
    rows = math.prod(pair[0].shape[:-1]) if rows is None else rows
    widths = (("input", dictionary.d_in), ("target", dictionary.d_out))
    for tensor, (what, width) in zip(pair, widths, strict=False):
        if tuple(tensor.shape) != (rows, width):
            raise InterpError(
                f"The {what} of {where} has shape {tuple(tensor.shape)} but ({rows}, {width}) is needed: "
                "batch size and widths of data and dictionary must agree."
            )
        if not torch.isfinite(tensor.sum()):  # passes over the data once and keeps NaN and infinity
            bad = (~torch.isfinite(tensor)).any(1).nonzero().flatten()
            if len(bad):  # else only the sum was too large
                raise InterpError(
                    f"The {what} of {where} has NaN or infinite values in {len(bad)} rows, the first is row "
                    f"{int(bad[0])}; harvest again or leave those rows out."
                )
    return pair[0], pair[-1]


def checked(
    batches: Iterator[Any], dictionary: Dictionary, config: TrainConfig, step: int, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """The next (input, target), of the right shape, finite and not constant."""
    batch = next(batches, None)
    if batch is None:
        raise InterpError(
            f"The data ended after {step:,} of {config.steps:,} steps; ask for fewer, or for more epochs."
        )
    rows = config.batch_size // ranks.world
    x, y = as_pair(batch, dictionary, f"step {step}", rows)
    for what, tensor in (("input", x), ("target", y))[: 1 + (y is not x)]:
        if rows > 1 and torch.equal(tensor, tensor[:1].expand_as(tensor)):
            raise InterpError(
                f"All rows of the {what} of step {step} are equal; there is nothing to learn from constant "
                "activations: check layer and site."
            )
    return x, y
