"""Detectors: a number for each row and a level above which it says yes; chosen on one text, scored on another.

What belongs to which concept is said by `concepts.mark_rows`: for n concepts, 2 n + 1 lines of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from scipy import sparse

if TYPE_CHECKING:
    import pandas as pd

LEVELS = np.arange(10) / 10  # of latents, shares of the maximum
QUANTILES = np.array([0.9, 0.97, 0.99, 0.997, 0.999])  # of other units, besides 0
PILOT = 4_000  # rows from which those are taken
Batches = Iterable[tuple[slice, Any]]  # rows, and their values "row unit"


def count_firings(
    batches: Batches, levels: Float[np.ndarray, "level unit"], lines: sparse.csc_array
) -> Float32[np.ndarray, "level line unit"]:
    """How many of each line's rows exceed each level of each unit.

    Args:
        batches: rows, and their values: an array, or, where none is negative, a sparse one by rows.
        levels: of each unit, not negative for sparse values.
        lines: "line row", from `mark_rows`.
    """
    total = np.zeros((len(levels), lines.shape[0], levels.shape[1]), np.float32)
    for rows, values in batches:
        own = lines[:, rows].tocsr()
        for i, level in enumerate(levels):
            if sparse.issparse(values):
                on = (values.data > level[values.indices]).astype(np.float32)
                fired = sparse.csr_array((on, values.indices, values.indptr), values.shape)
                total[i] += (own @ fired).toarray()
            else:  # written as numbers at once, which saves a pass over memory
                total[i] += own @ np.greater(values, level, out=np.empty(values.shape, np.float32))
    return total


def best_units(
    total: Float32[np.ndarray, "level line unit"],
    levels: Float[np.ndarray, "level unit"],
    rows: Float[np.ndarray, " concept"],
) -> pd.DataFrame:
    """For each concept the unit and level with the best F1 = 2 TP / (firings + rows of the concept).

    Args:
        total: from `count_firings`.
        levels: the same.
        rows: how many rows each concept has.

    Returns:
        Columns unit, level, chosen_f1; a row per concept.
    """
    import pandas as pd

    found = []
    for i, n in enumerate(rows):
        fired = total[:, -1] - total[:, len(rows) + i]  # rows that are neither in nor out are no error
        f1 = 2 * total[:, i] / np.maximum(fired + n, 1)
        level, unit = np.unravel_index(int(f1.argmax()), f1.shape)
        found.append((int(unit), _short(levels[level, unit]), float(f1[level, unit])))
    return pd.DataFrame(found, columns=["unit", "level", "chosen_f1"])


def choose_latents(acts: sparse.csr_array, lines: sparse.csc_array) -> pd.DataFrame:
    """The latent and the share of its maximum that suit each concept best.

    Args:
        acts: "row latent", from `sparse_activations`, by rows.
        lines: from `mark_rows`, of the same rows.

    Returns:
        Columns unit, level, chosen_f1, maximum; a row per concept.
    """
    maximum = acts.max(axis=0).toarray()
    levels = LEVELS[:, None] * maximum
    total = count_firings([(slice(0, acts.shape[0]), acts)], levels, lines)
    found = best_units(total, levels, _rows(lines))
    return found.assign(maximum=[_short(value) for value in maximum[found.unit]])


def choose_dense(batches: Batches, lines: sparse.csc_array, signs: Sequence[int] = (1,)) -> pd.DataFrame:
    """The unit and level that suit each concept best, in one pass over values that do not fit in memory.

    Levels are 0 and `QUANTILES` of the first `PILOT` rows.

    Args:
        batches: rows, and their values "row unit", arrays or tensors; they are overwritten.
        lines: from `mark_rows`.
        signs: (1, -1) also takes units by their negative values; those are numbered after all others.

    Returns:
        As `choose_latents`.
    """
    stream = ((rows, torch.as_tensor(values).float().numpy()) for rows, values in batches)
    first = []
    for batch in stream:
        first.append(batch)
        if batch[0].stop >= PILOT:
            break
    ordered = np.sort(np.concatenate([values for _, values in first]).T.copy())  # (unit, row)
    levels = [_quantiles(ordered, sign) for sign in signs]
    totals: list[Any] = [0] * len(signs)
    maximum: list[Any] = [-np.inf] * len(signs)
    for rows, values in chain(first, stream):
        for i, sign in enumerate(signs):
            values *= sign
            totals[i] += count_firings([(rows, values)], levels[i], lines)
            maximum[i] = np.maximum(maximum[i], values.max(axis=0))
    found = best_units(np.concatenate(totals, axis=2), np.hstack(levels), _rows(lines))
    return found.assign(maximum=[_short(value) for value in np.concatenate(maximum)[found.unit]])


def choose_levels(values: Float[np.ndarray, "row concept"], lines: sparse.csc_array) -> pd.DataFrame:
    """The best level of each concept's own detector, among all.

    Returns:
        As `choose_latents`; the unit is the concept's number.
    """
    import pandas as pd

    by_line, n, found = lines.tocsr(), values.shape[1], []
    for i in range(n):
        kept = by_line[[n + i]].toarray()[0] == 0
        level, f1 = best_level(values[kept, i], by_line[[i]].toarray()[0][kept] > 0)
        found.append((i, _short(level), f1, _short(values[:, i].max())))
    return pd.DataFrame(found, columns=["unit", "level", "chosen_f1", "maximum"])


def best_level(values: Float[np.ndarray, " row"], flags: Any) -> tuple[float, float]:
    """The level with the best F1 among all, and that F1, by sorting."""
    order = np.argsort(-values, kind="stable")
    ranked = np.append(values[order], -np.inf).astype(float)
    f1 = 2 * np.cumsum(flags[order]) / (np.arange(1, len(values) + 1) + max(int(flags.sum()), 1))
    f1[ranked[1:] == ranked[:-1]] = 0  # equal values cannot be parted
    at = int(f1.argmax())
    below = ranked[at + 1] if np.isfinite(ranked[at + 1]) else ranked[at] - 1
    return float((ranked[at] + below) / 2), float(f1[at])


def score(
    chosen: pd.DataFrame, values: Float[np.ndarray, "row concept"], lines: sparse.csc_array, chunk: int
) -> pd.DataFrame:
    """Firings and hits on other text, in pieces of so many rows, from which precision and recall follow.

    Args:
        chosen: columns unit, level and maximum, a row per concept.
        values: of each concept's unit.
        lines: from `mark_rows`.
        chunk: rows of a piece.

    Returns:
        `chosen` for each piece, with chunk, tokens (rows of the concept), fired and right (at the level), fired_k
        and right_k (above k / 10 of the maximum).
    """
    import pandas as pd

    n, found = len(chosen), []
    for start in range(0, lines.shape[1], chunk):
        own = lines[:, start : start + chunk].toarray()
        flags, counted = own[:n].T > 0, own[n : 2 * n].T == 0  # (row, concept)
        counts: dict[str, Int[np.ndarray, " concept"]] = {"tokens": flags.sum(0)}
        levels = {"": chosen.level, **{f"_{k}": k / 10 * chosen.maximum for k in range(10)}}
        for name, level in levels.items():
            on = (values[start : start + chunk] > level.to_numpy()) & counted
            counts |= {f"fired{name}": on.sum(0), f"right{name}": (on & flags).sum(0)}
        found.append(chosen.assign(chunk=start // chunk, **counts))
    return pd.concat(found)


def _quantiles(ordered: Float32[np.ndarray, "unit row"], sign: int) -> Float32[np.ndarray, "level unit"]:
    """0 and some quantiles of the values times the sign."""
    places = (QUANTILES * (ordered.shape[1] - 1)).astype(int)
    chosen = ordered[:, places] if sign > 0 else -ordered[:, -1 - places]
    return np.vstack([0 * chosen[:, 0], chosen.T])


def _rows(lines: sparse.csc_array) -> Float32[np.ndarray, " concept"]:
    return lines[: lines.shape[0] // 2].sum(axis=1)


def _short(value: float | np.floating[Any]) -> float:
    """With as many digits as a record keeps, so that it decides as it did."""
    return float(f"{value:.6g}")
