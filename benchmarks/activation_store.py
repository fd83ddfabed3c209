"""Harvesting activations against a bare forward of the same batches that stops at the same layer: what does keeping cost?

Many short rounds of both, in turn, over the same windows; the ratio is the median over the rounds, of the time that
passes and of the processor's time (which other work on the machine disturbs less). A round ends a shard, and so waits
for the disk more often than a real harvest. Beside it: what a harvest costs once (model in the computing type, outlier
threshold), tokenizing, and rows per second that come back shuffled.

It fails when the ratio misses its target; with another model, sites or types it only reports.

    python benchmarks/activation_store.py --model gemma-3-270m --threads 1
    python benchmarks/activation_store.py --sites mlp_in.{0..17} mlp_out.{0..17}
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from interp_utils.activation_store import ActivationStore
from interp_utils.corpora import load_corpus
from interp_utils.harvest import harvest
from interp_utils.models import load_model
from interp_utils.paths import build_folder, writable
from interp_utils.recorder import Recorder
from interp_utils.sites import check_site, forward_to
from interp_utils.windows import draw_windows

TARGET = 0.9  # of the bare forward's tokens per second


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def bare(recorder: Recorder, batches: list[torch.Tensor]) -> list[float]:
    start = clocks()
    for ids in batches:
        forward_to(recorder.body, recorder.sites, ids)
    return [end - begun for begun, end in zip(start, clocks(), strict=True)]


def kept(recorder: Recorder, windows: list, index: int) -> list[float]:
    start = clocks()
    with tqdm(disable=True) as bar:
        recorder.write(index, windows, bar)
    return [end - begun for begun, end in zip(start, clocks(), strict=True)]


def served(store: ActivationStore, batch_size: int, at_least: float = 2.0) -> float:
    """Shuffled normalised rows per second."""
    start, rows = time.perf_counter(), 0
    for batch in store.batches(batch_size, seed=0, epochs=10**6, site=store.sites[:1]):
        rows += len(batch[0])
        if (spent := time.perf_counter() - start) > at_least:
            return rows / spent
    raise AssertionError


def failures(result: dict) -> list[str]:
    """A sentence when keeping costs too much."""
    if result["target"] is None or result["ratio"] >= result["target"]:
        return []
    return [f"Keeping runs at {result['ratio']} of the bare forward's speed; the target is {TARGET}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--sites", nargs="+", default=["resid_post.9"])
    parser.add_argument("--corpus", default="news")
    parser.add_argument("--tokens", type=int, default=6_000, help="per round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--compute", default="bfloat16")
    parser.add_argument("--rows", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    usual = all(
        getattr(args, name) == parser.get_default(name) for name in ("model", "sites", "compute", "rows")
    )

    model = load_model(args.model)
    corpora = {args.corpus: load_corpus(args.corpus)}
    options = {"compute": args.compute, "rows": args.rows, "batch_size": args.batch_size, "progress": False}
    with tempfile.TemporaryDirectory(dir=writable(build_folder(), "build folder", "INTERP_BUILD")) as scratch:
        few = args.batch_size * 127
        small = harvest(model, corpora, Path(scratch) / "small", sites=args.sites, tokens=few, **options)
        began = time.perf_counter()
        windows = draw_windows(model, corpora, args.tokens, context=128, seed=0)
        tokenizing = time.perf_counter() - began
        folder = Path(scratch) / "timed"
        folder.mkdir()
        sites = [check_site(model, site) for site in small.sites]
        began = time.perf_counter()
        recorder = Recorder(model, folder, small.card, sites, windows)
        once = time.perf_counter() - began
        batches = [ids for ids, _, _ in recorder.padded(windows)]
        pairs = [
            (bare(recorder, batches), kept(recorder, windows, index))
            for index in tqdm(range(args.rounds + 1), desc="rounds")
        ][1:]
        rows_served = served(small, min(2048, len(small)))
    n_tokens = sum(len(window.ids) for window in windows)
    wall, processor = ([(one[i], other[i]) for one, other in pairs] for i in (0, 1))
    result = {
        "model": model.info.name,
        "weights": model.info.weights,
        "sites": len(small.sites),
        "last site": small.sites[-1],
        "compute": args.compute,
        "rows": args.rows,
        "threads": args.threads,
        "batch": f"{args.batch_size} x 128",
        "rounds": args.rounds,
        "tokens per round": n_tokens,
        "tokens/s bare": round(n_tokens / statistics.median(one for one, _ in wall)),
        "tokens/s kept": round(n_tokens / statistics.median(other for _, other in wall)),
        "ratio": round(statistics.median(one / other for one, other in wall), 3),
        "target": TARGET if usual else None,
        "ratio of processor time": round(statistics.median(one / other for one, other in processor), 3),
        "tokenizing, tokens/s": round(n_tokens / tokenizing),
        "once, seconds": round(once, 1),
        "shuffled rows/s": round(rows_served),
        "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    out = writable(build_folder() / "benchmarks", "build folder", "INTERP_BUILD")
    text = json.dumps(result, indent=1)
    (out / f"activation_store-{model.info.name}-{len(small.sites)}.json").write_text(text + "\n")
    print(text)
    sys.exit("\n".join(failures(result)) or 0)


if __name__ == "__main__":
    main()
