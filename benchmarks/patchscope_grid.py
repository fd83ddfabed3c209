"""All (l, l*) cells of one source: the shared-prefix grid against plain transformers with forward hooks.

Three comparisons in one run, at equal answers:
  next token, one cell per forward    every cell runs the whole target prompt, as the official code does
  next token, one batched forward     the same rows in one forward, logits at the last position only;
                                      against the package without prefix sharing, and with it
  20 generated tokens, one at a time  one `generate` per cell with a hook that patches the prompt
The rivals that run one cell at a time are timed on a random sample of cells and scaled to the grid. The hook
rivals are given the source state; the official code would compute it again for every cell.

It fails when a cell differs beyond near-ties or when the default model misses a target; another model only reports
its times.

    python benchmarks/patchscope_grid.py --model gemma-3-270m --threads 1
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch

from interp_utils.activations import residual_stream
from interp_utils.interventions import edited_logits, patch
from interp_utils.models import load_model
from interp_utils.patchscopes import Patchscope, grid, patched_logits
from interp_utils.paths import build_folder, writable

IDENTITY = "cat -> cat\n1135 -> 1135\nhello -> hello\n?"
ENTITY = (
    "Syria: Country in the Middle East, Leonardo DiCaprio: American actor, Samsung: South Korean "
    "multinational major appliance and consumer electronics corporation, x"
)
NEW_TOKENS = 20
MODEL = "gemma-3-270m"
TARGETS = {  # times faster, at least; without sharing nothing may be lost but noise
    "next token, against one cell per forward": 30,
    "next token, against one batched forward": 4,
    "without sharing, against one batched forward": 0.95,
    f"{NEW_TOKENS} tokens, against one at a time": 12,
}


@contextmanager
def hooked(model: Any, patches: list[tuple[int, torch.Tensor]]):
    """Plain forward hooks: row i gets its state at the last position after its layer, on the first pass only."""

    def hook_for(layer: int) -> Callable[..., Any]:
        rows = [i for i, (to, _) in enumerate(patches) if to == layer]
        states = torch.stack([patches[i][1] for i in rows])
        done = []

        def hook(_block: Any, _inputs: Any, output: Any) -> None:
            if not done:
                (output if isinstance(output, torch.Tensor) else output[0])[rows, -1] = states
                done.append(True)

        return hook

    layers = sorted({layer for layer, _ in patches})
    handles = [model.layers[layer]._module.register_forward_hook(hook_for(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    with torch.no_grad():
        result = call()
    return time.perf_counter() - start, result


def next_token(model: Any, states: torch.Tensor, cells: list[tuple[int, int]], sample: list[int]) -> dict:
    scope, inputs = Patchscope(model, IDENTITY, "?"), model.tokenizer(IDENTITY, return_tensors="pt")
    layers, into = [layer for layer, _ in cells], [to for _, to in cells]
    rows = states[layers]
    patches = list(zip(into, rows, strict=True))

    def single(i: int) -> torch.Tensor:
        with hooked(model, patches[i : i + 1]):
            return model._module(**inputs).logits[0, -1]  # logits at every position, as by default

    def batched() -> torch.Tensor:
        many = {name: value.repeat(len(rows), 1) for name, value in inputs.items()}
        with hooked(model, patches):
            return model._module(**many, logits_to_keep=1).logits[:, -1]

    def unshared() -> torch.Tensor:
        edits = [patch(to, -1, row) for to, row in patches]
        return edited_logits(model, IDENTITY, edits, expect_change=False, batch_size=len(rows))

    def shared() -> torch.Tensor:
        return patched_logits(Patchscope(model, IDENTITY, "?"), rows, layers, into, memory_gb=8)

    shared(), single(0)  # warm up
    seconds, best = {}, {}
    for name, call in (("batched", batched), ("package, unshared", unshared), ("package", shared)):
        seconds[name], logits = min((timed(call) for _ in range(3)), key=lambda pair: pair[0])
        best[name] = logits.argmax(-1)
        gaps = logits.topk(2).values.diff(dim=-1).abs()[:, 0]
    one, logits = timed(lambda: torch.stack([single(i) for i in sample]))
    seconds["one cell per forward"] = one * len(cells) / len(sample)
    wrong = {name: int(((own != best["package"]) & (gaps > 1e-3)).sum()) for name, own in best.items()}
    wrong["one cell per forward"] = int(
        ((logits.argmax(-1) != best["package"][sample]) & (gaps[sample] > 1e-3)).sum()
    )
    assert scope.position == -1
    return {"seconds": seconds, "cells that differ": wrong, "near-ties": int((gaps < 1e-3).sum())}


def generated(model: Any, states: torch.Tensor, cells: list[tuple[int, int]], sample: list[int]) -> dict:
    inputs = model.tokenizer(ENTITY, return_tensors="pt")
    width, n = inputs.input_ids.shape[1], len(model.layers)

    def single(i: int) -> str:
        with hooked(model, [(cells[i][1], states[cells[i][0]])]):
            ids = model._module.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        return model.tokenizer.decode(ids[0, width:], skip_special_tokens=True)

    def package() -> Any:
        scope = Patchscope(model, ENTITY)
        return grid(
            scope, states[None], into=range(n), max_new_tokens=NEW_TOKENS, memory_gb=2, progress=False
        )

    single(0)
    ours, table = timed(package)
    one, texts = timed(lambda: [single(i) for i in sample])
    near = [table.gap[i] < 1e-3 for i in sample]
    different = [text != table.text[i] for i, text in zip(sample, texts, strict=True)]
    return {
        "seconds": {"package": ours, "one at a time": one * len(cells) / len(sample)},
        "cells that differ": sum(bool(d and not n) for d, n in zip(different, near, strict=True)),
        "near-ties": int(sum(near)),
    }


def failures(result: dict) -> list[str]:
    """A sentence for everything that differs or, with the default model, is too slow."""
    differing = result["next token"]["cells that differ"] | {
        "generated": result["generated"]["cells that differ"]
    }
    found = [f"{number} cells differ: {name}." for name, number in differing.items() if number]
    for name, target in TARGETS.items() if result["model"] == MODEL else ():
        if not (measured := result["times faster"][name]) >= target:
            found.append(f"{measured:.2f} times faster {name}; the target is {target}.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--sample", type=int, default=40, help="cells run one at a time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = load_model(args.model)
    n = len(model.layers)
    states = residual_stream(model, "Alexander the Great", positions=-1)[0, :, 0]
    cells = [(layer, to) for layer in range(n) for to in range(n)]
    sample = random.Random(args.seed).sample(range(len(cells)), args.sample)
    first, second = next_token(model, states, cells, sample), generated(model, states, cells, sample)
    took, text = first["seconds"], second["seconds"]
    result = {
        "model": model.info.name,
        "threads": args.threads,
        "cells": len(cells),
        "next token": first,
        "generated": second,
        "times faster": {
            "next token, against one cell per forward": took["one cell per forward"] / took["package"],
            "next token, against one batched forward": took["batched"] / took["package"],
            "without sharing, against one batched forward": took["batched"] / took["package, unshared"],
            f"{NEW_TOKENS} tokens, against one at a time": text["one at a time"] / text["package"],
        },
    }
    print(json.dumps(result, indent=1))
    folder = writable(build_folder() / "benchmarks", "build folder", "INTERP_BUILD")
    (folder / f"patchscope_grid-{args.model}.json").write_text(json.dumps(result, indent=1))
    sys.exit("\n".join(failures(result)) or 0)


if __name__ == "__main__":
    main()
