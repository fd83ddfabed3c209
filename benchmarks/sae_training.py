"""Training speed of sparse autoencoders on a CPU against the three libraries, on the same batches.

Every contender trains in an interpreter of its own, its library in a virtual environment of its own that shares
this one's torch; they take turns of a few steps each, so that a busy machine slows all alike. Compared are the
medians of the steps' seconds, batches made outside the clock, and the variance explained on held-out rows.
Rows come from an activation store (`--store`, `--held-out`), or are drawn with a power-law spectrum.

    python benchmarks/sae_training.py --task topk --threads 1
    python benchmarks/sae_training.py --task l1 --threads 1 --steps 400
    python benchmarks/sae_training.py --profile
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from interp_utils.activation_store import ActivationStore
from interp_utils.dictionaries import Dictionary, TrainConfig, train
from interp_utils.paths import ROOT, build_folder, writable

RIVALS = {
    "sparsify": ("eai-sparsify==1.3.3",),
    "sae-lens": ("sae-lens==6.54.12",),
    # Its pins are years old; training needs no more than this.
    "dictionary-learning": ("--no-deps", "dictionary-learning==0.1.0", "einops", "circuitsvis"),
}
TASKS = {
    "topk": (
        "ours",
        "ours, float32",
        "sparsify",
        "sae-lens",
        "sae-lens sparse",
        "dictionary-learning",
        "kernels",
    ),
    "l1": ("ours", "ours, float32", "sae-lens", "dictionary-learning"),
}
TARGETS = {
    "topk": {"sparsify": 2.7, "sae-lens": 6, "sae-lens sparse": 4.5, "dictionary-learning": 6},
    "l1": {"sae-lens": 2, "dictionary-learning": 2},
}
HELD_OUT = 8192
WORSE = 0.005  # of the variance explained, by which a rival may not be better
KERNELS = 0.8  # of our step that its kernels alone take


def interpreter(contender: str) -> str:
    """The contender's Python: this one, or a virtual environment made on first use."""
    name = contender.removesuffix(" sparse")
    if name not in RIVALS:
        return sys.executable
    folder = build_folder() / "rivals" / name
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        writable(folder, "build folder", "INTERP_BUILD")
        venv.create(folder, with_pip=True, clear=True)
        inside = next(folder.glob("lib/python*/site-packages"))
        (inside / "shared.pth").write_text(sysconfig.get_path("purelib"))  # torch and what else is there
        subprocess.run([python, "-m", "pip", "install", "-q", *RIVALS[name]], check=True)
        (folder / "ready").touch()
    return str(python)


def rows_of(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Training and held-out rows, centred and scaled so that E||x||^2 = d."""
    if args.store:
        store = ActivationStore(args.store)
        held_out = ActivationStore(args.held_out).like(store) if args.held_out else store
        generator = torch.Generator().manual_seed(args.seed)
        kept = min(args.rows, len(store) - HELD_OUT)
        ids = torch.randperm(len(store), generator=generator)
        last = torch.randperm(len(held_out), generator=generator) if args.held_out else ids.flip(0)
        return {
            "train": store.read(ids[:kept].sort().values),
            "held_out": held_out.read(last[:HELD_OUT].sort().values),
        }
    generator = torch.Generator().manual_seed(args.seed)
    spectrum = torch.arange(1, args.d + 1) ** -0.5
    x = torch.randn(args.rows + HELD_OUT, args.d, generator=generator) * spectrum
    x *= (args.d / x.square().sum(1).mean()).sqrt()
    return {"train": x[:-HELD_OUT].contiguous(), "held_out": x[-HELD_OUT:].contiguous()}


class Contender:
    """A process that trains on demand."""

    def __init__(self, name: str, plan: dict[str, Any]) -> None:
        plan = {**plan, "contender": name}
        environment = {**os.environ, "OMP_NUM_THREADS": str(plan["threads"]), "PYTHONWARNINGS": "ignore"}
        if interpreter(name) == sys.executable:
            environment["PYTHONPATH"] = str(ROOT)
        log = Path(plan["data"]).with_name(f"{name.replace(' ', '_')}.log").open("w")
        self.process = subprocess.Popen(
            [interpreter(name), str(Path(__file__).with_name("contenders") / "sae.py"), json.dumps(plan)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        self.name, self.log, self.seconds = name, log.name, []

    def take(self, steps: int) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        self.seconds += self.hear()["seconds"]

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} failed:\n{Path(self.log).read_text()[-2000:]}")
        return json.loads(line)


def race(args: argparse.Namespace) -> dict[str, Any]:
    folder = writable(build_folder() / "sae_training", "build folder", "INTERP_BUILD")
    data = rows_of(args)
    save_file(data, folder / "rows.safetensors")
    names = [n for n in TASKS[args.task] if not args.only or n in args.only]
    plan = {
        **{
            name: getattr(args, name)
            for name in ("task", "threads", "seed", "steps", "batch_size", "width", "k")
        },
        **{"lr": args.lr, "l1": args.l1, "d": data["train"].shape[1]},
        "data": str(folder / "rows.safetensors"),
    }
    contenders = [Contender(name, plan) for name in names]
    for start in range(0, args.steps, args.turn):
        for contender in contenders:
            contender.take(min(args.turn, args.steps - start))
    result: dict[str, Any] = {}
    for contender in contenders:
        usual = contender.seconds[2:] or contender.seconds  # the first steps warm up
        speed = args.batch_size * len(usual) / sum(usual)
        median = statistics.median(usual)
        result[contender.name] = {"tokens/s": round(speed), "median ms": round(median * 1e3, 1)}
        result[contender.name] |= contender.hear()
        contender.process.wait()
    return result


def ratio(task: str, own: dict[str, Any], row: dict[str, Any]) -> float:
    """How many times as fast ours is: whole runs where steps change, else by the median step."""
    return own["tokens/s"] / row["tokens/s"] if task == "l1" else row["median ms"] / own["median ms"]


def kernel_ratio(result: dict[str, Any]) -> float:
    return sum(kernel_times(result).values()) / result["ours"]["median ms"]


def kernel_times(result: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of each kernel."""
    return {n: v * 1e3 for n, v in result["kernels"].items() if n not in ("tokens/s", "median ms")}


def failures(task: str, result: dict[str, Any]) -> list[str]:
    """What misses its target, a sentence each."""
    own, found = result["ours"], []
    for name, target in TARGETS[task].items():
        if name not in result:
            continue
        if (times := ratio(task, own, result[name])) < target:
            found.append(f"Against {name} training is {times:.2f} times as fast, not {target}.")
        if (gap := result[name]["explained_variance"] - own["explained_variance"]) > WORSE:
            found.append(f"The variance explained is {gap:.4f} below that of {name}.")
    if "kernels" in result and kernel_ratio(result) < KERNELS:
        found.append(f"The kernels alone take {kernel_ratio(result):.2f} of a step, not {KERNELS}.")
    return found


def report(args: argparse.Namespace, result: dict[str, Any]) -> None:
    own, weight = result["ours"], args.l1 if args.task == "l1" else 0
    print(f"{args.task}, {args.threads} thread(s), {args.steps} steps, torch {torch.__version__}")
    print(
        f"{'':22}{'tokens/s':>10}{'step, ms':>10}{'ours is':>9}{'target':>8}{'expl. var.':>12}{'L0':>8}{'loss':>9}"
    )
    for name, row in result.items():
        if name == "kernels":
            continue
        target = TARGETS[args.task].get(name, "")
        print(
            f"{name:22}{row['tokens/s']:10,}{row['median ms']:10.1f}{ratio(args.task, own, row):8.2f}x{target:>8}"
            f"{row['explained_variance']:12.4f}{row['l0']:8.1f}{row['mse'] + weight * row['l1']:9.2f}"
        )
    if "rows_that_differ" in own:
        print(f"rows for which the bfloat16 screen chooses other latents: {own['rows_that_differ']:.2%}")
    if "kernels" in result:
        print("kernels, ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in kernel_times(result).items()))
        print(f"they take {kernel_ratio(result):.2f} of our step (target {KERNELS})")


def profile(args: argparse.Namespace) -> None:
    """Where the time of a step goes, by torch's own operations; the rest of the wall clock is numpy."""
    x = rows_of(args)["train"]
    kind = "topk" if args.task == "topk" else "relu"
    dictionary = Dictionary.create(kind, x.shape[1], args.width, k=args.k if kind == "topk" else None)
    config = TrainConfig(args.steps, args.batch_size, lr=args.lr, l1=args.l1 if kind == "relu" else None)
    last = args.steps - 5
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def on_step(step: int, *_: Any) -> None:
        if step == last:
            profiler.start()

    train(dictionary, x, config, progress=False, on_step=on_step)
    profiler.stop()
    print(
        profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=36)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--task", choices=sorted(TASKS), default="topk")
    parser.add_argument("--only", nargs="*", help="some of the contenders; ours must be one")
    parser.add_argument("--profile", action="store_true", help="profile five of our steps instead")
    parser.add_argument("--store", type=Path, help="folder of an activation store")
    parser.add_argument("--held-out", type=Path, help="folder of another, from held-out text")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--turn", type=int, default=5, help="steps before the next contender's turn")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--d", type=int, default=640)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--l1", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.profile:
        return profile(args)
    result = race(args)
    report(args, result)
    (build_folder() / "sae_training" / f"{args.task}.json").write_text(json.dumps(result, indent=1))
    if missed := failures(args.task, result):
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    main()
