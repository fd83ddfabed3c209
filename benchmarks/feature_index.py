"""Index a shipped dictionary over a million cached rows, against the plain way, and time a query.

python benchmarks/feature_index.py [PARTS]     # 110 rows each; those the dictionary was trained on if not given

More than a million rows are left aside.
The plain way encodes every row densely and keeps running counts, maxima and the twenty strongest rows of each
latent with torch.topk; it is timed on the first twentieth of the rows. Both use the same threads. It fails when a
million rows take 3 minutes or 4 GB, or a query .2 seconds.
"""

from __future__ import annotations

import resource
import sys
import time

import torch

from interp_utils.activation_store import ActivationStore
from interp_utils.artifacts import harvest_mix
from interp_utils.dictionaries import Dictionary
from interp_utils.dictionaries.files import load_for
from interp_utils.features import build_index, sparse_activations
from interp_utils.features.index import INDEXED
from interp_utils.models import load_model

ROWS = 1_000_000
SECONDS, GIGABYTES, QUERY = 180, 4.0, 0.2  # targets, the first per million rows


@torch.no_grad()
def plain(sae: Dictionary, store: ActivationStore, n_rows: int, batch_size: int = 2048) -> torch.Tensor:
    """The twenty largest activations of each latent, "20 latent"."""
    best, counts = torch.zeros(20, sae.width), torch.zeros(sae.width)
    for first in range(0, n_rows, batch_size):
        acts = sae.encode(store.read(slice(first, min(first + batch_size, n_rows))))
        counts += (acts > 0).sum(0)
        best = torch.cat([best, acts]).topk(20, dim=0).values
    return best


def main() -> None:
    parts = int(sys.argv[1]) if len(sys.argv) > 1 else None
    model = load_model("gemma-3-270m")
    sae, site = load_for(model, INDEXED)
    store = harvest_mix(model, site, parts=parts)
    n_rows = min(len(store), ROWS)
    began = time.perf_counter()
    acts = sparse_activations(sae, store, slice(0, n_rows))
    encoded = time.perf_counter() - began
    index = build_index(acts, store)
    whole = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(
        f"{n_rows:,} rows, {acts.nnz:,} activations, {torch.get_num_threads()} threads: {whole:.0f} s "
        f"({encoded:.0f} s encoding), peak memory {peak:.1f} GB"
    )
    few = n_rows // 20
    began = time.perf_counter()
    best = plain(sae, store, few)
    ratio = (time.perf_counter() - began) / few * n_rows / whole
    own = torch.from_numpy(acts[:few].max(axis=0).toarray()).flatten()
    torch.testing.assert_close(own, best[0], rtol=1e-3, atol=1e-2)
    print(f"the plain way would take {ratio:.1f} times as long; the same maxima")
    began = time.perf_counter()
    latent = int(index.by_token(model.tokenizer.encode(" London", add_special_tokens=False)[0]).latent[0])
    by_token = time.perf_counter() - began
    began = time.perf_counter()
    examples = index.examples(latent)
    by_number = time.perf_counter() - began
    print(f"by token {by_token:.3f} s, {len(examples)} examples of a latent {by_number:.3f} s")
    problems = failures(whole / n_rows * ROWS, peak, max(by_token, by_number))
    if problems:
        sys.exit("\n".join(problems))


def failures(seconds: float, gigabytes: float, query: float) -> list[str]:
    """One sentence for each target that is missed; the seconds are per million rows."""
    measured = (
        ("A million rows take", seconds, SECONDS, "s"),
        ("Memory reaches", gigabytes, GIGABYTES, "GB"),
        ("A query takes", query, QUERY, "s"),
    )
    return [
        f"{what} {value:.3g} {unit}, not {most:g} at most."
        for what, value, most, unit in measured
        if value > most
    ]


if __name__ == "__main__":
    main()
