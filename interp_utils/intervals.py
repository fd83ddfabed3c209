"""Intervals from a cluster bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from interp_utils.errors import InterpError

BLOCK = 2**22  # drawn clusters held at once


def cluster_bootstrap(
    values: Any,
    clusters: Any,
    statistic: Callable[[Any], float] = np.mean,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a statistic when rows of one cluster depend on each other.

    Draws as many clusters as there are, with replacement and with all their rows, `n` times. Choose as
    cluster what would be drawn afresh in a new experiment (an entity, a seed), not the single row. With fewer
    than about 20 clusters the interval is somewhat too narrow.

    Args:
        values: one value per row, or a DataFrame.
        clusters: the cluster of each row (list, array or Series of labels).
        statistic: of an array or DataFrame of resampled rows, as `values` is; the mean is computed quickly.
        n: number of resamples.
        level: share of the resampled statistics inside the interval.

    Returns:
        (low, high)

    Raises:
        InterpError: lengths differ, a label is missing, fewer than two clusters, a level outside (0, 1), or a
            statistic that is not finite.
    """
    import pandas as pd

    rows = values if isinstance(values, pd.DataFrame) else np.asarray(values)
    if len(rows) != len(clusters):
        raise InterpError(
            f"Each row needs a cluster, but there are {len(rows)} rows and {len(clusters)} labels."
        )
    codes, names = pd.factorize(np.asarray(clusters))
    if len(names) < 2 or (codes < 0).any():
        raise InterpError(
            f"The bootstrap needs at least two clusters and no missing label, got {len(names)}."
        )
    if n < 1 or not 0 < level < 1:
        raise InterpError(f"The bootstrap needs n >= 1 and a level between 0 and 1, got {n} and {level}.")
    quick = statistic is np.mean and isinstance(rows, np.ndarray) and rows.ndim == 1
    resample = _means if quick else _statistics
    results = np.fromiter(resample(rows, codes, statistic, n, np.random.default_rng(seed)), float, n)
    if not np.isfinite(results).all():
        bad = int((~np.isfinite(results)).sum())
        raise InterpError(
            f"The statistic is not finite in {bad} of {n} resamples; drop missing values first."
        )
    low, high = np.quantile(results, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _means(rows: Any, codes: Any, statistic: Any, n: int, rng: np.random.Generator) -> Iterator[float]:
    """Means of resamples: only the sum and the size of each cluster matter."""
    sums, sizes = np.bincount(codes, weights=rows), np.bincount(codes)
    block = max(1, BLOCK // len(sizes))
    for start in range(0, n, block):
        drawn = rng.integers(len(sizes), size=(min(block, n - start), len(sizes)))
        yield from sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)


def _statistics(rows: Any, codes: Any, statistic: Any, n: int, rng: np.random.Generator) -> Iterator[float]:
    """Any statistic, of the rows of the drawn clusters."""
    members = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    take = rows.__getitem__ if isinstance(rows, np.ndarray) else rows.iloc.__getitem__
    for _ in range(n):
        drawn = rng.integers(len(members), size=len(members))
        yield float(statistic(take(np.concatenate([members[cluster] for cluster in drawn]))))
