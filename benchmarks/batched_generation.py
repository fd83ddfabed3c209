"""Batched generation with one patch per row against one generation per patch: same tokens, and how much faster?

Draws random cells (name, source layer, target layer, placeholder) of the entity Patchscope. The rival is nnsight
at its plainest: one `generate` per cell, the whole prompt each time. Texts may part only from a step whose top
two logits are closer than 1e-3; such cells are counted.

    python benchmarks/batched_generation.py --model gemma-3-270m --cells 2000
"""

from __future__ import annotations

import argparse
import json
import random
import time

import pandas as pd
import torch
from tqdm.auto import tqdm

from interp_utils.activations import residual_stream
from interp_utils.interventions import generate, patch
from interp_utils.models import load_model
from interp_utils.paths import build_folder, data_file, writable

PROMPT = (
    "Syria: Country in the Middle East, Leonardo DiCaprio: American actor, Samsung: South Korean "
    "multinational major appliance and consumer electronics corporation, {}"
)


def one_at_a_time(model, prompt: str, layer: int, state: torch.Tensor, n_tokens: int) -> list[int]:
    width = len(model.tokenizer(prompt).input_ids)
    with torch.no_grad(), model.generate(prompt, max_new_tokens=n_tokens, do_sample=False) as tracer:
        model.layers[layer].output[0, -1] = state
        ids = tracer.result.save()
    return ids[0, width:].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = load_model(args.model)
    names = list(pd.read_csv(data_file("facts/entities.csv")).name)
    states = residual_stream(model, names, positions=-1)[:, :, 0]
    draw, n_layers = random.Random(args.seed), len(model.layers)
    cells = [
        (draw.choice("x?_"), draw.randrange(len(names)), draw.randrange(n_layers), draw.randrange(n_layers))
        for _ in range(args.cells)
    ]
    cells.sort()  # rows of one batch share their prompt
    times, ties, wrong = {"batched": 0.0, "single": 0.0}, 0, 0
    for placeholder in "x?_":
        own = [cell for cell in cells if cell[0] == placeholder]
        if not own:
            continue
        prompt = PROMPT.format(placeholder)
        start = time.perf_counter()
        edits = [patch(target, -1, states[name, source]) for _, name, source, target in own]
        batched = generate(model, prompt, edits, max_new_tokens=args.tokens, batch_size=args.batch_size)
        times["batched"] += time.perf_counter() - start
        for row, (_, name, source, target) in enumerate(tqdm(own, desc=f"one at a time, {placeholder}")):
            start = time.perf_counter()
            ids = one_at_a_time(model, prompt, target, states[name, source], args.tokens)
            times["single"] += time.perf_counter() - start
            mine = batched.tokens[row].tolist()[: len(ids)]
            if mine != ids:
                step = next(i for i, (a, b) in enumerate(zip(mine, ids, strict=True)) if a != b)
                near = batched.gaps[row, step] < 1e-3
                ties, wrong = ties + int(near), wrong + int(not near)
    result = {
        "model": model.info.name,
        "weights": model.info.weights,
        "cells": args.cells,
        "tokens": args.tokens,
        "threads": args.threads,
        "batch_size": args.batch_size,
        "parted by a near-tie": ties,
        "parted otherwise": wrong,
        "seconds batched": round(times["batched"], 1),
        "seconds one at a time": round(times["single"], 1),
        "ratio": round(times["single"] / times["batched"], 1),
    }
    folder = writable(build_folder() / "benchmarks", "build folder", "INTERP_BUILD")
    text = json.dumps(result, indent=1)
    (folder / f"batched_generation-{model.info.name}.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
