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
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from interp_utils.activation_store import ActivationStore
from interp_utils.corpora import corpus_hash
from interp_utils.errors import InterpError
from interp_utils.paths import ROOT
from interp_utils.recorder import OUTLIER, PILOT, Recorder, save_tensors
from interp_utils.shards import LABEL_BYTES, ROW_BYTES, damage, shard_name, shard_record, write_json
from interp_utils.sites import Site, check_site
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
    (medians of the first 8,192 tokens). Called again with the same arguments after it was killed, it goes on
    with the next shard and ends with the same bytes (on the same machine and number of threads).

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
            centred and divided by its standard deviation (both of the first 8,192 tokens).
        shard_tokens: tokens per shard, before outliers are dropped; what a kill can cost.
        seed: of the order of documents and windows.
        progress: show a bar.

    Raises:
        InterpError: an unknown site, an empty corpus or too small a one, a folder that holds another harvest,
            a model that is elsewhere, a disk that is full, activations that are constant or not finite.
    """
    folder = Path(folder)
    where = _checked(model, corpora, sites, context, batch_size, compute, rows)
    plan = {
        "format": 1,
        "model": model.info.name,
        "weights": model.info.weights,
        "sites": [str(site) for site in where],
        "d": model.config.hidden_size,
        "sources": {n: {"documents": len(texts), "hash": corpus_hash(texts)} for n, texts in corpora.items()},
        "tokens": dict(tokens) if isinstance(tokens, Mapping) else tokens,
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
    limit = getattr(model.config, "max_position_embeddings", None) or context
    if not SHORTEST < context <= limit:
        raise InterpError(f"context={context} is out of range; this model takes {SHORTEST + 1} to {limit:,}.")
    if batch_size < 1:
        raise InterpError(f"batch_size={batch_size} is too small; give at least 1.")
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
            if path.exists() and (old := json.loads(path.read_text())) != plan:
                other = ", ".join(key for key in plan if old.get(key) != plan[key])
                raise InterpError(f"{folder} holds a harvest with another {other}; choose another folder.")
            if not path.exists():
                write_json(path, plan)
            yield
    except Timeout:
        raise InterpError(f"Another process is writing to {folder}; wait for it.") from None
    except (OSError, SafetensorError) as error:
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            raise InterpError(
                f"{folder} cannot be written ({error.strerror}); choose another folder."
            ) from None
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and "No space left" not in str(error):
            raise
        raise InterpError(
            f"The disk with {folder} filled up; the finished shards are kept: free some space and run this again."
        ) from None


def _complete(folder: Path) -> bool:
    try:
        n_shards = json.loads((folder / "card.json").read_text())["n_shards"]
    except FileNotFoundError:
        return False
    return not any(damage(folder, index) for index in range(n_shards))


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
    _finish(folder, plan, len(shards), list(corpora))


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


def _finish(folder: Path, plan: Mapping[str, Any], n_shards: int, sources: Sequence[str]) -> None:
    """Moments of all rows, then the card, which makes the store complete."""
    records = [shard_record(folder, index) for index in range(n_shards)]
    n_rows = sum(record["rows"] for record in records)
    parts = (folder / shard_name(index, "source") for index in range(n_shards))
    by_source = sum(np.bincount(np.fromfile(part, np.int8), minlength=len(sources)) for part in parts)
    save_tensors(folder / "moments.safetensors", _moments(folder, plan, n_shards, n_rows))
    card = {
        **plan,
        "n_rows": n_rows,
        "n_shards": n_shards,
        "n_dropped": sum(len(record["dropped"]) for record in records),
        "rows_by_source": dict(zip(sources, np.asarray(by_source).tolist(), strict=True)),
        "threads": torch.get_num_threads(),
        "versions": {p: importlib.metadata.version(p).split("+")[0] for p in ("torch", "transformers")},
        "code_sha256": hashlib.sha256(
            b"".join((ROOT / "interp_utils" / file).read_bytes() for file in CODE)
        ).hexdigest(),
    }
    write_json(folder / "card.json", card)


def _moments(folder: Path, plan: Mapping[str, Any], n_shards: int, n_rows: int) -> dict[str, Tensor]:
    """By site, the mean row and the scale that makes E||(x - mean) * scale||^2 = d, from the shards' sums."""
    sums = sum(torch.from_numpy(np.fromfile(folder / shard_name(i, "sums"))) for i in range(n_shards))
    pilot = load_file(folder / "pilot.safetensors")
    moments: dict[str, Tensor] = {}
    for site, row in zip(plan["sites"], torch.as_tensor(sums).view(-1, plan["d"] + 1) / n_rows, strict=True):
        variance = row[-1] - row[:-1].square().sum()
        moments[f"{site}.mean"] = pilot[f"{site}.mean"] + row[:-1]
        moments[f"{site}.scale"] = (plan["d"] / variance).sqrt()
    return moments
