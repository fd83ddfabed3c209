"""Read the activations that `harvest` kept: shuffled batches, single rows, and the text each row belongs to."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor

from interp_utils.errors import InterpError, nearest
from interp_utils.shards import (
    LABELS,
    MappedShards,
    damages,
    decode_int8,
    row_numbers,
    shard_name,
    shard_record,
)
from interp_utils.weights import sha256


class ActivationStore:
    """Rows of activations at one or more sites, memory-mapped from the folder of a `harvest`.

    Attributes:
        folder: where the files are.
        card: model, weights, sites, corpora and their hashes, rows by source, outlier rule and how many rows it
            dropped, and how all was made.
        sites: names of the sites.
        mean: by site, the mean row "d", float64.
        scale: by site, the factor that makes E||(x - mean) * scale||^2 equal to d.

    Raises:
        InterpError: no complete harvest in the folder, or a file of it is damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not (self.folder / "card.json").is_file():
            begun = (self.folder / "plan.json").is_file()
            state = "a harvest that is not finished; run it again" if begun else "no harvested activations"
            raise InterpError(f"In {self.folder} there is {state}.")
        self.card: dict[str, Any] = json.loads((self.folder / "card.json").read_text())
        self.sites: list[str] = self.card["sites"]
        self._check()
        records = [shard_record(self.folder, index) for index in range(self.card["n_shards"])]
        self._dropped = [record["dropped"] for record in records]
        self._shards = MappedShards(self.folder, [record["rows"] for record in records])
        moments = load_file(self.folder / "moments.safetensors")
        self.mean: dict[str, Tensor] = {site: moments[f"{site}.mean"] for site in self.sites}
        self.scale: dict[str, float] = {site: float(moments[f"{site}.scale"]) for site in self.sites}

    def __len__(self) -> int:
        return self.card["n_rows"]

    @property
    def source_names(self) -> list[str]:
        """The corpora, in the order of the numbers in `source`."""
        return list(self.card["sources"])

    def d(self, site: str | None = None) -> int:
        """Width of a row."""
        return len(self.mean[self._site(site)])

    @cached_property
    def token_ids(self) -> Int[Tensor, " row"]:
        """Token of each row."""
        return self._labels("token_ids")

    @cached_property
    def document(self) -> Int[Tensor, " row"]:
        """Index of each row's document in its corpus."""
        return self._labels("document")

    @cached_property
    def position(self) -> Int[Tensor, " row"]:
        """Position of each row's token in its document, in tokens."""
        return self._labels("position")

    @cached_property
    def source(self) -> Int[Tensor, " row"]:
        """Which of `source_names` each row comes from."""
        return self._labels("source")

    def like(self, other: ActivationStore) -> ActivationStore:
        """This store, normalised as another one is: held-out rows as those of the training.

        Raises:
            InterpError: it is of another model, or lacks one of the sites.
        """
        same = all(self.card[key] == other.card[key] for key in ("model", "weights"))
        if not same or not set(self.sites) <= set(other.sites):
            raise InterpError(
                f"The store {other.folder} is of another model or lacks sites of {self.folder}."
            )
        twin = copy.copy(self)
        twin.mean = {site: other.mean[site] for site in self.sites}
        twin.scale = {site: other.scale[site] for site in self.sites}
        return twin

    def read(
        self,
        rows: slice | Sequence[int] | Int[Tensor, " row"] | Bool[Tensor, " n_rows"],
        site: str | None = None,
        *,
        normalised: bool = True,
    ) -> Float[Tensor, "row d"]:
        """Rows in the order asked for, float32: (x - mean) * scale, or as the model computed them.

        Raises:
            InterpError: a row out of range, a mask of another length, or no such site.
        """
        site = self._site(site)
        if isinstance(rows, slice):
            rows = torch.arange(*rows.indices(len(self)))
        found = self._kept(row_numbers(rows, len(self)), site)
        if not normalised:
            return found.float()
        return torch.sub(found, self.mean[site].float()).mul_(self.scale[site])

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epochs: int = 1,
        start: int = 0,
        site: str | Sequence[str] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Any]:
        """Shuffled normalised batches "row d", or one for each of several sites, of the same rows.

        Batch number s is the same for the same seed whatever `start` is, so a training resumes exactly. Every
        epoch is another permutation of all rows; what does not fill a batch at its end is left out.

        Args:
            batch_size: rows over all processes.
            seed: of the permutations.
            epochs: how often every row is seen.
            start: number of the first batch.
            site: one, several (then a tuple of batches), or None where the store has just one.
            rank: which part of each batch is given,
            world: of how many.

        Raises:
            InterpError: a batch larger than the store or not divisible by `world`, or no such site.
        """
        names = list(site) if isinstance(site, (list, tuple)) else [self._site(site)]  # type: ignore[arg-type]
        for name in names:
            self._site(name)
        if not 0 < batch_size <= len(self):
            raise InterpError(
                f"batch_size={batch_size:,} is out of range; this store has {len(self):,} rows."
            )
        if batch_size % world or not 0 <= rank < world:
            raise InterpError(f"A batch of {batch_size} cannot be shared by rank {rank} of {world}.")

        def generate() -> Iterator[Any]:
            for rows in self._rows_of_batches(batch_size, seed, epochs, start, rank, world):
                parts = [self.read(rows, name) for name in names]
                yield tuple(parts) if isinstance(site, (list, tuple)) else parts[0]

        return generate()

    def _rows_of_batches(
        self, size: int, seed: int, epochs: int, start: int, rank: int, world: int
    ) -> Iterator[Int[Tensor, " row"]]:
        """Rows of each batch in the order of the store, which is also that of the disk."""
        per_epoch, share = len(self) // size, size // world
        order, shown = torch.empty(0, dtype=torch.int64), -1
        for number in range(start, epochs * per_epoch):
            epoch, first = number // per_epoch, number % per_epoch * size + rank * share
            if epoch != shown:
                order, shown = _permutation(len(self), seed, epoch), epoch
            yield order[first : first + share].sort().values

    def tokens_around(self, row: int, before: int = 16, after: int = 16) -> tuple[list[int], int]:
        """Tokens that the model saw around a row's token, and where that token is among them.

        The start token is not given; tokens whose rows were dropped as outliers are.

        Raises:
            InterpError: a row out of range.
        """
        row_numbers([row], len(self))
        shard, first, end = self._shards.of(row)
        near = range(max(first, row - before), min(end, row + after + 1))
        columns = (self.source, self.document, self.position, self.token_ids)
        labels = [[int(column[at]) for column in columns] for at in near]
        own = labels[row - near.start]
        tokens = {
            position: token
            for *text, position, token in [*labels, *(dropped[1:] for dropped in self._dropped[shard])]
            if [*text, position // self._body] == [*own[:2], own[2] // self._body]  # of the same window
        }
        kept = [at for at in range(own[2] - before, own[2] + after + 1) if at in tokens]
        return [tokens[at] for at in kept], kept.index(own[2])

    def verify(self) -> None:
        """Compare every file with its sha256; reads everything once.

        Raises:
            InterpError: a file has changed.
        """
        self._check()
        for index in range(self.card["n_shards"]):
            for name, expected in shard_record(self.folder, index)["files"].items():
                if sha256(self.folder / name) != expected["sha256"]:
                    raise InterpError(
                        f"{self.folder / name} has another sha256 than in {shard_name(index)}; delete it and "
                        "run its harvest again, which makes that shard anew."
                    )

    def _check(self) -> None:
        if problem := next(damages(self.folder, self.card["n_shards"]), None):
            raise InterpError(f"In {self.folder}, {problem}; run its harvest again, which mends that.")

    @property
    def _body(self) -> int:
        """Tokens of a whole window without the start token."""
        return self.card["context"] - 1

    def _site(self, site: str | None) -> str:
        if site is None and len(self.sites) == 1:
            return self.sites[0]
        if site is None:
            raise InterpError(f"This store has several sites; say which: {', '.join(self.sites)}.")
        if site not in self.sites:
            raise InterpError(f"This store has no site {site!r}.{nearest(site, self.sites)}")
        return site

    def _labels(self, what: str) -> Tensor:
        return torch.from_numpy(self._shards.whole(what, LABELS[what]))

    def _kept(self, rows: Int[Tensor, " row"], site: str) -> Float[Tensor, "row d"]:
        """Rows as they were kept, bfloat16 or decoded to float32."""
        if self.card["rows"] == "bfloat16":
            return self._shards.gather(rows, site, np.int16, self.d(site)).view(torch.bfloat16)
        codes = self._shards.gather(rows, site, np.int8, self.d(site))
        scales = self._shards.gather(rows, f"{site}.scales", np.float16, 1)
        return decode_int8(codes, scales, self._pilot[f"{site}.mean"], self._pilot[f"{site}.std"])

    @cached_property
    def _pilot(self) -> dict[str, Tensor]:
        return load_file(self.folder / "pilot.safetensors")


def _permutation(n: int, seed: int, epoch: int) -> Int[Tensor, " row"]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(n, generator=generator)
