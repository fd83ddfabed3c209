"""Run a corpus through a model and keep its activations on disk, shard by shard; `activation_store` reads them."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from interp_utils.activation_store import ActivationStore
from interp_utils.corpora import corpus_hash
from interp_utils.errors import InterpError
from interp_utils.paths import ROOT
from interp_utils.recorder import OUTLIER, PILOT, Recorder
from interp_utils.shards import (
    LABEL_BYTES,
    ROW_BYTES,
    SUMMARIES,
    damage,
    damages,
    shard_name,
    shard_record,
    write_json,
)
from interp_utils.sites import Site, check_site
from interp_utils.weights import sha256
from interp_utils.windows import SHORTEST, Window, draw_windows, start_token

if TYPE_CHECKING:
    from nnsight import TransformersModel

CODE = ("windows.py", "sites.py", "shards.py", "recorder.py", "harvest.py")


def harvest(
    model: TransformersModel,
    corpora: Mapping[str, Sequence[str]],
    folder: Path | str,
    *,
    sites: Sequence[str],
    tokens: int | Mapping[str, int],
    context: int = 128,
    batch_size: int = 16,
    compute: Literal["float32", "bfloat16"] = "bfloat16",
    rows: Literal["bfloat16", "int8"] = "bfloat16",
    shard_tokens: int = 65_536,
    seed: int = 0,
    progress: bool = True,
) -> ActivationStore:
    """Activations of a corpus at some sites, on disk, with the token that each belongs to.

    Every window is the start token and up to `context - 1` tokens of one document. The start token's rows are
    left out, and so is, at all sites, a token whose norm at any site is above 6 times the median norm there
    (medians of the first 8,192 tokens, of the first shard's if those are fewer). Called again with the same
    arguments after it was killed, it goes on with the next shard and ends with the same bytes (on the same
    machine and number of threads).

    Args:
        model: from `load_model`, on this machine.
        corpora: documents by source.
        folder: where to; made when it is missing.
        sites: such as "resid_post.9", "mlp_in.9", "mlp_out.9".
        tokens: how many, in all or by source (see `draw_windows`), before outliers are dropped.
        context: tokens per window with the start token.
        batch_size: windows per forward.
        compute: type in which the model computes.
        rows: how a row is kept: "bfloat16", or "int8" with a scale for each row after every dimension was
            centred and divided by its standard deviation (both of the same first tokens).
        shard_tokens: tokens per shard, before outliers are dropped; what a kill can cost.
        seed: of the order of documents and windows.
        progress: show a bar.

    Raises:
        InterpError: an unknown site, an empty corpus or too small a one, a folder that holds another harvest,
            or a damaged one; a model that is elsewhere, a disk that is full, activations that are constant or not
            finite.
    """
    folder = Path(folder)
    where = _checked(model, corpora, sites, context, batch_size, shard_tokens, compute, rows)
    plan = {
        "format": 1,
        "model": model.info.name,
        "weights": model.info.weights,
        "sites": [str(site) for site in where],
        "d": model.config.hidden_size,
        "sources": {n: {"documents": len(texts), "hash": corpus_hash(texts)} for n, texts in corpora.items()},
        "tokens": {n: int(m) for n, m in tokens.items()} if isinstance(tokens, Mapping) else int(tokens),
        "context": context,
        "batch_size": batch_size,
        "compute": compute,
        "rows": rows,
        "shard_tokens": shard_tokens,
        "seed": seed,
        "start_token": start_token(model),
        "shortest_window": SHORTEST,
        "outlier_rule": f"norm above {OUTLIER:g} x the median of the first {PILOT:,} tokens, at any site",
    }
    with _alone(folder, plan):
        if not _complete(folder):
            _run(model, corpora, folder, plan, where, progress)
    return ActivationStore(folder)


def _checked(
    model: TransformersModel,
    corpora: Mapping[str, Sequence[str]],
    sites: Sequence[str],
    context: int,
    batch_size: int,
    shard_tokens: int,
    compute: str,
    rows: str,
) -> list[Site]:
    """The sites in the order in which they are computed, after everything that can be checked without work."""
    if model.info.remote:
        raise InterpError("Activations are collected on this machine; load the model without remote.")
    if not sites or isinstance(sites, str):
        raise InterpError("sites is a list of names; give at least one, as in ['resid_post.9'].")
    if not corpora:
        raise InterpError("There is no source; give at least one, as in {'news': load_corpus('news')}.")
    if empty := [name for name, documents in corpora.items() if not documents]:
        raise InterpError(f"The source {empty[0]!r} has no documents; leave it out.")
    if len(corpora) > 128:  # numbered in int8
        raise InterpError(f"There are {len(corpora):,} sources; a store takes at most 128: join some.")
    limit = getattr(model.config, "max_position_embeddings", None) or context
    if not SHORTEST < context <= limit:
        raise InterpError(f"context={context} is out of range; this model takes {SHORTEST + 1} to {limit:,}.")
    if min(batch_size, shard_tokens) < 1:
        raise InterpError(f"{batch_size=} with {shard_tokens=} is too small; give at least 1 of each.")
    if compute not in ("float32", "bfloat16") or rows not in ROW_BYTES:
        raise InterpError(
            f"compute={compute!r} with rows={rows!r} is not known; compute is 'float32' or 'bfloat16', "
            "rows are 'bfloat16' or 'int8'."
        )
    return sorted({check_site(model, site) for site in sites}, key=lambda site: (site.layer, site.kind))


@contextmanager
def _alone(folder: Path, plan: Mapping[str, Any]) -> Iterator[None]:
    """Holds the folder for one process, makes sure that it belongs to this plan, and explains a full disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            path = folder / "plan.json"
            old = json.loads(path.read_text()) if path.exists() else plan
            other = [key for key in plan if old.get(key) != plan[key]]
            if not other and list(old["sources"]) != list(plan["sources"]):
                other = ["order of the sources"]
            if other:
                raise InterpError(
                    f"{folder} holds a harvest with another {', '.join(other)}; choose another folder."
                )
            if old is plan:
                write_json(path, plan)
            yield
    except Timeout:
        raise InterpError(f"Another process is writing to {folder}; wait for it.") from None
    except OSError as error:
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            raise InterpError(
                f"{folder} cannot be written ({error.strerror}); choose another folder."
            ) from None
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InterpError(
            f"The disk with {folder} filled up; the finished shards are kept: free some space and run this again."
        ) from None


def _complete(folder: Path) -> bool:
    try:
        n_shards = json.loads((folder / "card.json").read_text())["n_shards"]
    except FileNotFoundError:
        return False
    return not any(damages(folder, n_shards))


def _run(
    model: TransformersModel,
    corpora: Mapping[str, Sequence[str]],
    folder: Path,
    plan: Mapping[str, Any],
    sites: Sequence[Site],
    progress: bool,
) -> None:
    windows = draw_windows(model, corpora, plan["tokens"], context=plan["context"], seed=plan["seed"])
    shards = _shards(windows, plan["shard_tokens"])
    missing = [index for index in range(len(shards)) if damage(folder, index)]
    left = sum(len(window.ids) for index in missing for window in shards[index])
    _room(folder, left * (len(sites) * plan["d"] * ROW_BYTES[plan["rows"]] + LABEL_BYTES))
    for path in folder.glob(".*.tmp"):  # of a harvest that was killed
        path.unlink()
    total = sum(len(window.ids) for window in windows)
    with tqdm(total=total, initial=total - left, desc=folder.name, unit="token", disable=not progress) as bar:
        recorder = Recorder(model, folder, plan, sites, shards[0])
        for index in missing:
            recorder.write(index, shards[index], bar)
    _finish(recorder, len(shards), list(corpora))


def _shards(windows: Sequence[Window], shard_tokens: int) -> list[list[Window]]:
    """Consecutive windows, cut where a shard has its tokens."""
    shards: list[list[Window]] = [[]]
    full = 0
    for window in windows:
        if full >= shard_tokens:
            shards.append([])
            full = 0
        shards[-1].append(window)
        full += len(window.ids)
    return shards


def _room(folder: Path, needed: float) -> None:
    free = shutil.disk_usage(folder).free
    if free < 1.02 * needed:
        raise InterpError(
            f"The harvest needs {needed / 1e9:.1f} GB in {folder} but {free / 1e9:.1f} GB are free; "
            "free some space, ask for fewer tokens or sites, or keep rows='int8'."
        )


def _finish(recorder: Recorder, n_shards: int, sources: Sequence[str]) -> None:
    """Moments of all rows, then the card, which makes the store complete."""
    folder = recorder.folder
    records = [shard_record(folder, index) for index in range(n_shards)]
    n_rows = sum(record["rows"] for record in records)
    parts = (folder / shard_name(index, "source") for index in range(n_shards))
    by_source = sum(np.bincount(np.fromfile(part, np.int8), minlength=len(sources)) for part in parts)
    recorder.write_moments(n_shards, n_rows)
    card = {
        **recorder.plan,
        "n_rows": n_rows,
        "n_shards": n_shards,
        "n_dropped": sum(len(record["dropped"]) for record in records),
        "sha256": {name: sha256(folder / name) for name in SUMMARIES},
        "rows_by_source": dict(zip(sources, np.asarray(by_source).tolist(), strict=True)),
        "threads": torch.get_num_threads(),
        "versions": {p: importlib.metadata.version(p).split("+")[0] for p in ("torch", "transformers")},
        "code_sha256": hashlib.sha256(
            b"".join((ROOT / "interp_utils" / file).read_bytes() for file in CODE)
        ).hexdigest(),
    }
    write_json(folder / "card.json", card)
