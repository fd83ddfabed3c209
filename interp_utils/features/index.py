"""Where each latent of a dictionary is active, small enough to ship: numbers and places, no text.

python -m interp_utils.features.index  # builds the shipped index again: 70 million activations, 2 GB, some minutes
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load_file, save_file

from interp_utils.activation_store import ActivationStore
from interp_utils.dictionaries.files import readable, replace
from interp_utils.errors import InterpError
from interp_utils.paths import data_folder, find_data
from interp_utils.records import file_hash

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csc_array

INDEXED = "sae-batchtopk-8192"  # the dictionary whose index is shipped
BINS = 20  # of a histogram, from 0 to the latent's maximum
TOP, BUCKETS, PER_BUCKET = 20, 5, 2  # examples of a latent
FILE, CARD = "index.safetensors", "card.json"


@dataclass(frozen=True, eq=False)
class FeatureIndex:
    """Where each latent of a dictionary is active, without the text.

    Attributes:
        density: "latent", share of the rows on which it is active.
        maximum: "latent", its largest activation.
        histogram: "latent bin", rows in `BINS` equal bins from 0 (not counted itself) to the maximum.
        source, document, position, token: "latent example", the strongest row of each of the `TOP` documents with
            the strongest ones, then `PER_BUCKET` random rows from each of `BUCKETS` equal parts of the range, the
            highest first; -1 where there are none.
        value: "latent example", activations there.
        card: rows, sources with their hashes, model, weights, site, dictionary.
    """

    density: Float[np.ndarray, " latent"]
    maximum: Float[np.ndarray, " latent"]
    histogram: Int[np.ndarray, "latent bin"]
    source: Int[np.ndarray, "latent example"]
    document: Int[np.ndarray, "latent example"]
    position: Int[np.ndarray, "latent example"]
    token: Int[np.ndarray, "latent example"]
    value: Float[np.ndarray, "latent example"]
    card: dict[str, Any]

    def __len__(self) -> int:
        return len(self.density)

    def check(self, latent: int) -> int:
        """The latent's number.

        Raises:
            InterpError: out of range.
        """
        if not 0 <= latent < len(self):
            raise InterpError(f"There is no latent {latent}; this dictionary has 0 to {len(self) - 1}.")
        return latent

    def examples(self, latent: int) -> pd.DataFrame:
        """Columns bucket ("top" or "1" to "5", 1 the highest), source (its name), document, position, token, value.

        Raises:
            InterpError: no such latent.
        """
        import pandas as pd

        self.check(latent)
        buckets = ["top"] * TOP + [str(1 + i // PER_BUCKET) for i in range(BUCKETS * PER_BUCKET)]
        columns = {name: getattr(self, name)[latent] for name in ("document", "position", "token", "value")}
        names = [*self.card["sources"], None]
        own = pd.DataFrame({"bucket": buckets, "source": [names[i] for i in self.source[latent]], **columns})
        return own[own.document >= 0].reset_index(drop=True)

    def by_token(self, token: int, n: int = 10) -> pd.DataFrame:
        """Latents whose strongest examples stand most often on a token: columns latent, share, maximum, density.

        Raises:
            InterpError: no latent has it among its strongest examples.
        """
        import pandas as pd

        top = self.token[:, :TOP]
        hits = (top == token).sum(1)
        share = hits / np.maximum((top >= 0).sum(1), 1)
        if not share.any():
            raise InterpError(
                f"No latent is strongest on token {token}; try a commoner word, or with a space before."
            )
        best = np.lexsort((-self.maximum, -share, -hits))[
            :n
        ]  # three of three is less than nineteen of twenty
        best = best[share[best] > 0]
        found = {"latent": best, "share": share[best], "maximum": self.maximum[best]}
        return pd.DataFrame({**found, "density": self.density[best]})


def build_index(acts: csc_array, store: ActivationStore, *, seed: int = 0, **card: Any) -> FeatureIndex:
    """The index of these activations of a store's first rows.

    Args:
        acts: "row latent", from `sparse_activations`.
        store: whose rows these are.
        seed: of the random examples.
        card: what else the card should say, such as the dictionary's name and hash.

    Raises:
        InterpError: more rows than the store has, or none.
    """
    n_rows, width = acts.shape
    if not 0 < n_rows <= len(store):
        raise InterpError(f"There are activations of {n_rows:,} rows but the store has {len(store):,}.")
    rng = np.random.default_rng(seed)
    counts = np.diff(acts.indptr)
    maximum = np.zeros(width, np.float32)
    alive = counts > 0
    maximum[alive] = np.maximum.reduceat(acts.data, acts.indptr[:-1][alive])
    labels = {name: getattr(store, name)[:n_rows].numpy() for name in ("source", "document", "position")}
    text = labels["source"].astype(np.int64) << 32 | labels["document"]
    rows = np.full((width, TOP + BUCKETS * PER_BUCKET), -1, np.int64)
    value = np.zeros(rows.shape, np.float32)
    histogram = np.zeros((width, BINS), np.int64)
    for latent in np.flatnonzero(alive):
        own = slice(acts.indptr[latent], acts.indptr[latent + 1])
        where, values = acts.indices[own], acts.data[own]
        share = values / maximum[latent]
        histogram[latent] = np.bincount(np.minimum((share * BINS).astype(int), BINS - 1), minlength=BINS)
        chosen = _examples(values, share, text[where], rng)
        rows[latent], value[latent] = (
            np.where(chosen < 0, -1, where[chosen]),
            np.where(chosen < 0, 0, values[chosen]),
        )
    found = {name: np.where(rows < 0, -1, column[rows]) for name, column in labels.items()}
    token = np.where(rows < 0, -1, store.token_ids[:n_rows].numpy()[rows])
    about = {key: store.card[key] for key in ("model", "weights", "sites", "sources", "context")}
    made = {"rows": n_rows, "seed": seed, **about, **card}
    return FeatureIndex(
        (counts / n_rows).astype(np.float32), maximum, histogram, **found, token=token, value=value, card=made
    )


def _examples(
    values: np.ndarray, share: np.ndarray, text: np.ndarray, rng: np.random.Generator
) -> Int[np.ndarray, " example"]:
    """Places among a latent's active rows: the strongest of each text, then some of each part of the range."""
    chosen = np.full(TOP + BUCKETS * PER_BUCKET, -1)
    order = np.argsort(-values, kind="stable")
    _, first = np.unique(text[order], return_index=True)
    best = order[np.sort(first)[:TOP]]
    chosen[: len(best)] = best
    part = np.minimum((share * BUCKETS).astype(int), BUCKETS - 1)
    for bucket in range(BUCKETS):
        inside = np.flatnonzero(part == BUCKETS - 1 - bucket)
        some = rng.choice(inside, min(PER_BUCKET, len(inside)), replace=False)
        chosen[TOP + bucket * PER_BUCKET :][: len(some)] = some
    return chosen


def save_index(folder: str | Path, index: FeatureIndex) -> None:
    """Write `index.safetensors` and `card.json`; values in half precision, numbers in the smallest type that fits.

    Raises:
        InterpError: the folder cannot be written.
    """
    folder = Path(folder)
    tensors = {
        field.name: _small(getattr(index, field.name)) for field in fields(index) if field.name != "card"
    }
    try:
        replace(folder / FILE, lambda path: save_file(tensors, path))
        card = (
            json.dumps({**index.card, "sha256": file_hash(folder / FILE)}, indent=1) + "\n"
        )  # order of sources
        replace(folder / CARD, lambda path: path.write_text(card))
    except OSError as error:
        raise InterpError(f"The index could not be written to {folder} ({error}).") from None


def load_index(source: str | Path) -> FeatureIndex:
    """The index in a folder, or the shipped one of that name below `data/artifacts/`.

    Raises:
        InterpError: no such index, or its file does not have the hash of its card.
    """
    file, about = (Path(source) / name for name in (FILE, CARD))
    if not file.is_file():
        found = [find_data(f"artifacts/{source}/{name}") for name in (FILE, CARD)]
        if found[0] is None or found[1] is None:
            raise InterpError(f"There is no index {str(source)!r}; `build_index` makes one.")
        file, about = found[0], found[1]
    with readable(f"The index {file}", "restore it from where it came or build it again"):
        card = json.loads(about.read_text())
        if file_hash(file) != card["sha256"]:
            raise InterpError("it does not have the hash of its card")
        tensors = load_file(file)
        exact = {"density", "maximum"}
        wide = {
            n: t if n in exact else t.astype(np.float32 if n == "value" else np.int64)
            for n, t in tensors.items()
        }
        return FeatureIndex(**wide, card=card)


def _small(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "f":
        return array.astype(np.float16) if array.ndim == 2 else array.astype(np.float32)
    kinds = (np.int8, np.int16, np.int32, np.int64)
    low, high = int(array.min(initial=0)), int(array.max(initial=0))
    return array.astype(next(k for k in kinds if np.iinfo(k).min <= low and high <= np.iinfo(k).max))


def main() -> None:
    from interp_utils.artifacts import MODEL, harvest_mix
    from interp_utils.dictionaries.files import load, load_for
    from interp_utils.features.activations import sparse_activations
    from interp_utils.models import load_model

    model = load_model(MODEL)
    sae, site = load_for(model, INDEXED)
    store = harvest_mix(model, site)
    sha256 = load(INDEXED)[1]["sha256"]
    index = build_index(sparse_activations(sae, store), store, dictionary=INDEXED, dictionary_sha256=sha256)
    save_index(data_folder() / "artifacts" / f"index-{INDEXED}", index)


if __name__ == "__main__":
    main()
