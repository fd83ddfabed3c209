"""How activations lie on disk.

A shard is a set of plain binary files `<number>.<what>.bin`, one for each site and label, and `<number>.json`,
which lists them with their sizes and hashes. The list is written last: a shard without it does not exist.
Beside the shards lie the pilot, with which they were made, and the moments, made from them: the card, which is
written at the end of the harvest, has their hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int, Int8, Shaped
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from interp_utils.errors import InterpError
from interp_utils.weights import sha256

# What a row belongs to: which source, which document of it, which token of that, counted from 0, and its id.
LABELS = {"source": np.int8, "document": np.int32, "position": np.int32, "token_ids": np.int32}
LABEL_BYTES = sum(np.dtype(kind).itemsize for kind in LABELS.values())
ROW_BYTES = {"bfloat16": 2, "int8": 1}  # per dimension
SUMMARIES = ("moments.safetensors", "pilot.safetensors")


def shard_name(index: int, what: str | None = None) -> str:
    """Name of a shard's list of files, or of one of these."""
    return f"{index:05}.json" if what is None else f"{index:05}.{what}.bin"


def shard_record(folder: Path, index: int) -> dict[str, Any]:
    """A shard's list: number of rows, rows that were dropped, files."""
    return json.loads((folder / shard_name(index)).read_text())


def damage(folder: Path, index: int) -> str | None:
    """What is wrong with a shard, judged by the sizes of its files; None when it is complete."""
    try:
        files = shard_record(folder, index)["files"]
    except (OSError, ValueError, KeyError):
        return f"{shard_name(index)} is missing or cannot be read"
    for name, expected in files.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if size != expected["bytes"]:
            return f"{name} has {size:,} bytes instead of {expected['bytes']:,}"
    return None


def card_hash(folder: Path, name: str) -> str | None:
    """What the card says about one of `SUMMARIES`; None when there is no card, or an older one without hashes."""
    path = folder / "card.json"
    return json.loads(path.read_text()).get("sha256", {}).get(name) if path.exists() else None


def intact(folder: Path, name: str) -> bool:
    """Whether one of `SUMMARIES` can be read and is what the card says."""
    try:
        load_file(folder / name)
    except (OSError, SafetensorError):
        return False
    return card_hash(folder, name) in (None, sha256(folder / name))


def damages(folder: Path, n_shards: int) -> Iterator[str]:
    """What is wrong with the files of a finished harvest."""
    yield from (f"{name} is missing or damaged" for name in SUMMARIES if not intact(folder, name))
    yield from filter(None, (damage(folder, index) for index in range(n_shards)))


def write_whole(path: Path, content: bytes) -> None:
    """Atomically."""
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Atomically."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


class ShardFiles:
    """The files of one shard: appended to under hidden names, renamed when all are complete."""

    def __init__(self, folder: Path, index: int) -> None:
        self.folder, self.index = folder, index
        self.files: dict[str, IO[bytes]] = {}
        self.hashes: dict[str, Any] = {}

    def append(self, what: str, values: Tensor) -> None:
        """More of one file."""
        name = shard_name(self.index, what)
        if name not in self.files:
            self.files[name] = (self.folder / f".{name}.tmp").open("wb")
            self.hashes[name] = hashlib.sha256()
        plain = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
        content = np.ascontiguousarray(plain.numpy()).data.cast("B")
        self.files[name].write(content)
        self.hashes[name].update(content)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Make the shard exist."""
        listed = {}
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            listed[name] = {"bytes": file.tell(), "sha256": self.hashes[name].hexdigest()}
            file.close()
        for name in self.files:
            os.replace(self.folder / f".{name}.tmp", self.folder / name)
        write_json(self.folder / shard_name(self.index), {**record, "files": listed})

    def discard(self) -> None:
        """Close and remove what was not finished."""
        for name, file in self.files.items():
            with suppress(OSError):  # a full disk refuses what is still to be written
                file.close()
            (self.folder / f".{name}.tmp").unlink(missing_ok=True)


class MappedShards:
    """The shards of a complete harvest as one long table per kind of file, memory-mapped."""

    def __init__(self, folder: Path, rows: Sequence[int]) -> None:
        self.folder = folder
        self.ends = torch.tensor(list(rows)).cumsum(0)
        self.maps: dict[tuple[str, int], np.ndarray] = {}

    def of(self, row: int) -> tuple[int, int, int]:
        """(shard, its first row, the row after its last) of a row."""
        index = int(torch.searchsorted(self.ends, row, right=True))
        return index, int(self.ends[index - 1]) if index else 0, int(self.ends[index])

    def whole(self, what: str, kind: Any) -> np.ndarray:
        """All rows of a kind of file that has one number a row, copied."""
        return np.concatenate([self._map(what, index, kind, 1)[:, 0] for index in range(len(self.ends))])

    def gather(
        self, rows: Int[Tensor, " row"], what: str, kind: Any, width: int
    ) -> Shaped[Tensor, "row width"]:
        """Some rows, in the order asked for. By numpy: such copies gain nothing from threads."""
        ordered, places = rows.sort(stable=True)
        out = np.empty((len(rows), width), kind)
        begin = first = 0
        bounds = torch.searchsorted(ordered, self.ends).tolist()
        for index, (bound, end) in enumerate(zip(bounds, self.ends.tolist(), strict=True)):
            if bound > begin:
                inside = (ordered[begin:bound] - first).numpy()
                # Any mode but "raise" writes straight into `out`.
                self._map(what, index, kind, width).take(inside, axis=0, out=out[begin:bound], mode="clip")
            begin, first = bound, end
        found = torch.from_numpy(out)
        return found if torch.equal(ordered, rows) else found[places.argsort()]

    def _map(self, what: str, index: int, kind: Any, width: int) -> np.ndarray:
        if (what, index) not in self.maps:
            path = self.folder / shard_name(index, what)
            self.maps[what, index] = np.memmap(path, kind, mode="r").reshape(-1, width)
        return self.maps[what, index]


def row_numbers(rows: Sequence[int] | Shaped[Tensor, " given"], n_rows: int) -> Int[Tensor, " row"]:
    """Rows by number, from their numbers or from a mask of all.

    Raises:
        InterpError: a row out of range, a mask of another length, or numbers that are not whole.
    """
    found = torch.as_tensor(rows)
    mask = found.dtype == torch.bool
    if len(found) != n_rows if mask else len(found) and found.is_floating_point():
        raise InterpError(
            f"Rows are whole numbers or a mask of all {n_rows:,}; {len(found):,} of {found.dtype} were given."
        )
    found = found.nonzero()[:, 0] if mask else found.long()
    if len(found) and not (0 <= int(found.min()) and int(found.max()) < n_rows):
        raise InterpError(f"A row is out of range; this store has rows 0 to {n_rows - 1:,}.")
    return found


def encode_int8(
    rows: Float32[Tensor, "row d"], mean: Float[Tensor, " d"], std: Float[Tensor, " d"]
) -> tuple[Int8[Tensor, "row d"], Float16[Tensor, "row 1"]]:
    """Rows as int8 codes with one scale each, after every dimension is centred and divided by its deviation.

    Without that the few dimensions that are a hundred times larger than the others would take all the codes.
    Works in the memory of `rows`, which end as what `decode_int8` gives, less the mean.
    """
    rows.sub_(mean).div_(std)
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True)
    scales = (largest / 127).clamp(min=2**-14).half()
    codes = rows.div_(scales.float()).round_().to(torch.int8)
    rows.mul_(scales.float()).mul_(std)
    return codes, scales


def decode_int8(
    codes: Int8[Tensor, "row d"],
    scales: Float16[Tensor, "row 1"],
    mean: Float[Tensor, " d"],
    std: Float[Tensor, " d"],
) -> Float[Tensor, "row d"]:
    """The rows that `encode_int8` kept."""
    return codes * scales.float() * std + mean
