"""Patchscopes (Ghandeharioun et al. 2024): inspect a hidden state by patching it into another prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp_utils.activations import check_finite, check_layer, tokenize
from interp_utils.candidates import Rows, distinguishing
from interp_utils.cell_measures import Measures
from interp_utils.errors import InterpError
from interp_utils.greedy import continue_greedily
from interp_utils.quintuplet import EditedRows, Patchscope, find_placeholder
from interp_utils.shared_prefix import PatchedRows, kept_per_token

if TYPE_CHECKING:
    from nnsight import TransformersModel

__all__ = ["Patchscope", "distinguishing", "find_placeholder", "grid", "patched_logits"]


def patched_logits(
    scope: Patchscope,
    states: Float[Tensor, "row source_width"],
    layers: Sequence[int],
    into: Sequence[int] | None = None,
    *,
    tokens: Sequence[int] | None = None,
    memory_gb: float = 1.0,
) -> Float[Tensor, "row vocab"]:
    """Next-token logits at the end of T, one row per state.

    Args:
        scope: T, i*, f and M*.
        states: one state per row.
        layers: l of each row.
        into: l* of each row; None follows the scope.
        tokens: only these columns, much cheaper where the vocabulary is large.
        memory_gb: most memory that a chunk of rows may take.

    Raises:
        InterpError: mismatched widths or lengths, a layer out of range, NaN, a limit that no row fits in.
    """
    into = [_target(scope, layer) for layer in layers] if into is None else into
    if not len(states) == len(layers) == len(into):
        raise InterpError(
            f"{len(states)} states, {len(layers)} layers and {len(into)} target layers; give one each per row."
        )
    into = [check_layer(scope.model, layer) for layer in into]
    vectors = scope.mapped(states, layers, into)
    chunk = chunk_rows(scope, memory_gb, None if tokens is None else len(tokens))
    starts = range(0, len(vectors), chunk)
    parts = [scope.rows(vectors[i : i + chunk], into[i : i + chunk]).logits(tokens) for i in starts]
    if not parts:
        raise InterpError("There are no states to patch; give at least one row.")
    return torch.cat(parts)


def grid(
    scopes: Patchscope | Mapping[str, Patchscope],
    states: Float[Tensor, "source layer source_width"],
    *,
    layers: Sequence[int] | None = None,
    into: Sequence[int] | None = None,
    candidates: Sequence[str] | None = None,
    answers: Sequence[str] | None = None,
    top_k: int = 0,
    final: Float[Tensor, "_ final_width"] | None = None,
    source_model: TransformersModel | None = None,
    max_new_tokens: int = 0,
    memory_gb: float = 1.0,
    progress: bool = True,
) -> pd.DataFrame:
    """Run a Patchscope at every (source, l, l*) and measure what is asked; one row per cell.

    Candidates are teacher-forced up to where they differ from each other (`distinguishing`).

    Args:
        scopes: one, or several by name (a column `scope`), with other targets, maps or models.
        states: residual states of the sources, one column per source layer.
        layers: what l those columns are; None counts from 0.
        into: every l* to cross with every l; None follows the scope (its layer, or l* = l).
        candidates: texts that may follow T; the column `choice` is the most probable of them.
        answers: the right candidate of each source: `log_prob` among the candidates (nats), `correct`.
        top_k: lists `top` and `top_prob` of the most probable next tokens.
        final: last-layer states of the sources: `token` (top-1 of the patched run), `precision` (is it
            top-1 of the source run too? its mean is precision@1) and `surprisal` (-log p of that token
            in the source run, nats); section 4.1.
        source_model: M, with the vocabulary of M*, whose unembedding reads `final`; None is M*.
        max_new_tokens: greedy continuation `text`, and `gap`, the smallest lead of the best token over
            the second (below 1e-3 another batch shape may decide otherwise).
        memory_gb: most memory that a chunk of cells may take; the progress bar says what chunks that makes.
        progress: show the bar where there is more than one chunk.

    Raises:
        InterpError: nothing to measure, mismatched lengths, widths or vocabularies, NaN, candidates that
            cannot be told apart, a layer out of range, a text that outgrows M*'s context, a memory limit
            that no cell fits in.
    """
    named = {"": scopes} if isinstance(scopes, Patchscope) else dict(scopes)
    if not named:
        raise InterpError("There is no Patchscope; give at least one.")
    measures = Measures(candidates, answers, top_k, final, source_model, max_new_tokens)
    measures.check(len(states))
    which = list(range(states.shape[1])) if layers is None else [int(layer) for layer in layers]
    if len(which) != states.shape[1]:
        raise InterpError(
            f"{states.shape[1]} layers of states but {len(which)} layer numbers; give one each."
        )
    check_finite(states)
    plans = [_plan(scope, states, which, into, measures, memory_gb) for scope in named.values()]
    tables = []
    for (name, scope), plan in zip(named.items(), plans, strict=True):
        table = _measured(scope, states, *plan, measures, name or "grid", progress)
        tables.append(table.assign(scope=name)[["scope", *table]] if name else table)
    return pd.concat(tables, ignore_index=True)


def _plan(
    scope: Patchscope,
    states: Float[Tensor, "source layer source_width"],
    layers: Sequence[int],
    into: Sequence[int] | None,
    measures: Measures,
    memory_gb: float,
) -> tuple[pd.DataFrame, list[list[int]] | None, int]:
    """Cells, tokens of the candidates and cells per chunk, with all that can be checked beforehand."""
    measures.check_model(scope.model)
    paths = measures.paths(scope.model)
    new = measures.new_tokens(paths)
    tokenize(scope.model, scope.target, new)
    cells = _cells(scope, len(states), layers, into)
    _vectors(scope, states, cells[:1])
    return cells, paths, chunk_rows(scope, memory_gb, measures.columns(paths), new)


def _vectors(
    scope: Patchscope, states: Float[Tensor, "source layer source_width"], cells: pd.DataFrame
) -> Float[Tensor, "row d_model"]:
    own = states[torch.tensor(list(cells.source)), torch.tensor(list(cells.column))]
    return scope.mapped(own, list(cells.layer), list(cells["into"]))


def _measured(
    scope: Patchscope,
    states: Float[Tensor, "source layer source_width"],
    cells: pd.DataFrame,
    paths: list[list[int]] | None,
    chunk: int,
    measures: Measures,
    label: str,
    progress: bool,
) -> pd.DataFrame:
    """The cells of one Patchscope with their measurements, chunk by chunk."""
    starts = range(0, len(cells), chunk)
    label = f"{label}: {len(cells):,} cells, {chunk} at a time"
    parts = []
    for start in tqdm(starts, desc=label, unit="chunk", disable=not progress or len(starts) == 1):
        part = cells.iloc[start : start + chunk]
        rows = scope.rows(_vectors(scope, states, part), [int(layer) for layer in part["into"]])
        values = measures.of(scope.model, rows, list(part.source), paths)
        if measures.max_new_tokens:
            values |= _texts(rows, measures.max_new_tokens)
        parts.append(part.drop(columns="column").assign(**values))
    return pd.concat(parts)


def _texts(rows: Rows, max_new_tokens: int) -> dict[str, Any]:
    if isinstance(rows, PatchedRows):
        made = continue_greedily(rows, max_new_tokens)
    else:
        assert isinstance(rows, EditedRows)
        made = rows.generate(max_new_tokens)
    return {"text": made.texts, "gap": made.gaps.min(dim=-1).values.tolist()}


def _target(scope: Patchscope, layer: int) -> int:
    return layer if scope.layer is None else scope.layer


def _cells(
    scope: Patchscope, n_sources: int, layers: Sequence[int], into: Sequence[int] | None
) -> pd.DataFrame:
    """All (source, layer, into), in that nesting, with l* checked against M*, and the states' column."""
    rows = [
        (source, layer, check_layer(scope.model, to), column)
        for source in range(n_sources)
        for column, layer in enumerate(layers)
        for to in ([_target(scope, layer)] if into is None else into)
    ]
    if not rows:
        raise InterpError("The grid is empty; give at least one source, one layer and one target layer.")
    return pd.DataFrame(rows, columns=["source", "layer", "into", "column"])


def chunk_rows(scope: Patchscope, memory_gb: float, columns: int | None = None, new: int = 0) -> int:
    """How many cells at a time keep their logits, keys and values and activations below the limit.

    Args:
        scope: its target and model decide the size of a cell.
        memory_gb: the limit, in 10^9 bytes.
        columns: columns of the vocabulary that are read; None is all.
        new: tokens that are run after T, over keys and values of its whole length.

    Raises:
        InterpError: not even one cell fits.
    """
    config, kept = scope.model.config, kept_per_token(scope.model)
    n_tokens = len(tokenize(scope.model, scope.target))
    tail, columns = (-scope.position, columns) if scope.shares else (n_tokens, None)
    widest = 4 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    per_cell = 3 * (config.vocab_size if columns is None else columns)  # logits, and two copies
    per_cell += tail * (widest + kept) + ((n_tokens + new) * kept if new else 0)
    per_cell += 8 * n_tokens * config.hidden_size  # the shared prefix, repeated in one layer at a time
    rows = int(memory_gb * 1e9 // (4 * per_cell))
    if rows < 1:
        raise InterpError(
            f"One cell of this grid needs {4 * per_cell / 1e9:.3f} GB but memory_gb is {memory_gb:g}; allow at "
            "least that much, and the grid runs in chunks of as many cells as fit."
        )
    return min(rows, 512)
