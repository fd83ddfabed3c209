"""Windows of tokens -> shards of activations: the part of a harvest that computes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from interp_utils.errors import InterpError
from interp_utils.shards import LABELS, ShardFiles, card_hash, encode_int8, intact, shard_name, write_whole
from interp_utils.sites import Site, body_in, forward_to
from interp_utils.windows import Window

if TYPE_CHECKING:
    from nnsight import TransformersModel

OUTLIER = 6.0  # medians of the norm
PILOT = 8_192  # tokens, about


class Recorder:
    """Computes and writes shards, in the way that a harvest's plan says.

    Attributes:
        pilot: by site, `<site>.median` of the norms over the first tokens, and `<site>.mean` and `<site>.std` of
            every dimension without outliers.
    """

    def __init__(
        self,
        model: TransformersModel,
        folder: Path,
        plan: Mapping[str, Any],
        sites: Sequence[Site],
        first: Sequence[Window],
    ) -> None:
        self.folder, self.plan, self.sites = folder, plan, sites
        self.body = body_in(model, getattr(torch, plan["compute"]))
        self.device = next(self.body.parameters()).device
        # One float32 buffer for all sums and norms: fresh memory for each costs more than the arithmetic.
        self.buffer = torch.empty(plan["batch_size"] * (plan["context"] - 1), plan["d"])
        path = folder / "pilot.safetensors"
        if not intact(folder, path.name):
            sizes = np.cumsum([len(window.ids) for window in first])
            made = save(self._pilot(first[: int(np.searchsorted(sizes, PILOT)) + 1]))
            begun = any(folder.glob("[0-9]*.json"))  # shards that were made with the one that is lost
            if begun and hashlib.sha256(made).hexdigest() != card_hash(folder, path.name):
                raise InterpError(
                    f"{path} is missing or damaged, and it is not certain that the same can be made again; delete "
                    "the folder and run the harvest again."
                )
            write_whole(path, made)
        self.pilot = load_file(path)

    def padded(
        self, windows: Sequence[Window]
    ) -> Iterator[tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"], list[Window]]]:
        """Batches of windows of similar length: ids with the start token, which of them are tokens of a window."""
        ordered = sorted(windows, key=lambda window: -len(window.ids))
        size = self.plan["batch_size"]
        for batch in (ordered[at : at + size] for at in range(0, len(ordered), size)):
            ids = torch.full((len(batch), 1 + len(batch[0].ids)), self.plan["start_token"])
            real = torch.zeros(ids.shape, dtype=torch.bool)
            for row, window in enumerate(batch):
                ids[row, 1 : 1 + len(window.ids)] = torch.from_numpy(window.ids)
                real[row, 1 : 1 + len(window.ids)] = True
            yield ids.to(self.device), real.to(self.device), batch

    def rows(self, windows: Sequence[Window]) -> Iterator[tuple[list[Window], dict[Site, Tensor]]]:
        """Batches of windows, and the rows "token d" of all their tokens at each site."""
        for ids, real, batch in self.padded(windows):
            states, own = forward_to(self.body, self.sites, ids), real.flatten().nonzero()[:, 0]
            yield batch, {site: states[site].flatten(0, 1).index_select(0, own).cpu() for site in self.sites}

    def write(self, index: int, windows: Sequence[Window], bar: tqdm) -> None:
        """One shard. Beside the rows it keeps the sums from which the mean and the scale are computed."""
        files, count = ShardFiles(self.folder, index), 0
        dropped: list[list[int]] = []
        sums = {str(site): torch.zeros(self.plan["d"] + 1, dtype=torch.float64) for site in self.sites}
        try:
            for batch, states in self.rows(windows):
                labels, fair = _labels(batch), self._fair(states)
                for at in (~fair).nonzero()[:, 0].tolist():
                    dropped.append([count + int(fair[:at].sum()), *(int(labels[key][at]) for key in LABELS)])
                for what, values in labels.items():
                    files.append(what, values[fair])
                for site, rows in states.items():
                    sums[str(site)] += self._keep(files, str(site), rows if bool(fair.all()) else rows[fair])
                count += int(fair.sum())
                bar.update(len(fair))
            files.append("sums", torch.cat(list(sums.values())))
            files.finish({"rows": count, "dropped": dropped})
        finally:
            files.discard()

    def write_moments(self, n_shards: int, n_rows: int) -> None:
        """By site, the mean row and the scale that makes E||(x - mean) * scale||^2 = d, from the shards' sums."""
        d = self.plan["d"]
        sums = sum(
            torch.from_numpy(np.fromfile(self.folder / shard_name(i, "sums"))) for i in range(n_shards)
        )
        moments: dict[str, Tensor] = {}
        for site, row in zip(self.plan["sites"], torch.as_tensor(sums).view(-1, d + 1) / n_rows, strict=True):
            variance = row[-1] - row[:-1].square().sum()
            moments[f"{site}.mean"] = self.pilot[f"{site}.mean"] + row[:-1]
            moments[f"{site}.scale"] = (d / variance).sqrt()
        write_whole(self.folder / "moments.safetensors", save(moments))

    def _keep(self, files: ShardFiles, site: str, rows: Float[Tensor, "row d"]) -> Float[Tensor, " d_plus_1"]:
        """Write rows; returns the sum of what will be read, less the pilot's mean, and of its squares."""
        mean, std = self.pilot[f"{site}.mean"], self.pilot[f"{site}.std"]
        if self.plan["rows"] == "bfloat16":
            kept = rows.to(torch.bfloat16)
            files.append(site, kept)
            centred = self._float(kept).sub_(mean)
        else:
            centred = self._float(rows)
            codes, scales = encode_int8(centred, mean, std)
            files.append(site, codes)
            files.append(f"{site}.scales", scales)
        squares = torch.linalg.vector_norm(centred, dim=-1).double().square()
        return torch.cat([centred.sum(0).double(), squares.sum()[None]])

    def _float(self, rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
        """A copy in the buffer, good until the next one."""
        return self.buffer[: len(rows)].copy_(rows)

    def _pilot(self, windows: Sequence[Window]) -> dict[str, Tensor]:
        parts = [states for _, states in self.rows(windows)]
        made: dict[str, Tensor] = {}
        for site in self.sites:
            rows = torch.cat([part[site] for part in parts]).double()
            norms = _norms(rows, site)
            fair = rows[norms <= OUTLIER * norms.median()]
            spread = fair.std(0)
            if not spread.any():
                raise InterpError(f"The activations at {site} are constant; check the model's weights.")
            made[f"{site}.median"] = norms.median().float()
            made[f"{site}.mean"] = fair.mean(0).float()
            made[f"{site}.std"] = spread.clamp(min=float(spread.max()) * 1e-6).float()
        return made

    def _fair(self, states: Mapping[Site, Float[Tensor, "row d"]]) -> Bool[Tensor, " row"]:
        """Which tokens are no outliers at any site."""
        limits = {site: OUTLIER * self.pilot[f"{site}.median"] for site in states}
        fair = [_norms(self._float(rows), site) <= limits[site] for site, rows in states.items()]
        return torch.stack(fair).all(0)


def _norms(rows: Float[Tensor, "row d"], site: Site) -> Float[Tensor, " row"]:
    norms = torch.linalg.vector_norm(rows, dim=-1)
    if not norms.isfinite().all():
        raise InterpError(
            f"Some activations at {site} are not finite; compute in float32, or check the weights."
        )
    return norms


def _labels(batch: Sequence[Window]) -> dict[str, Tensor]:
    """Which token of which text each row belongs to."""
    sizes = [len(window.ids) for window in batch]
    columns = {
        "source": np.repeat([window.source for window in batch], sizes),
        "document": np.repeat([window.document for window in batch], sizes),
        "position": np.concatenate([window.position + np.arange(len(window.ids)) for window in batch]),
        "token_ids": np.concatenate([window.ids for window in batch]),
    }
    return {what: torch.from_numpy(columns[what].astype(kind)) for what, kind in LABELS.items()}
