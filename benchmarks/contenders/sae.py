"""One contender of `../sae_training.py`, in its own interpreter: trains as its library does and reports seconds.

Reads a line with a number of steps, takes so many, answers with a line of JSON, and so on; an empty line ends
the training, and the last answer has the quality on held-out rows. Batches are made outside the clock.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file

# Rows -> their reconstructions, and activations times decoder norms.
Reconstruct = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def main() -> None:
    plan = json.loads(sys.argv[1])
    torch.set_num_threads(plan["threads"])
    torch.manual_seed(plan["seed"])
    data = load_file(plan["data"])
    out, sys.stdout = sys.stdout, sys.stderr  # libraries print

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=out, flush=True)

    batches = feed(data["train"], plan, say)
    reconstruct = CONTENDERS[plan["contender"]](plan, batches)
    next(batches, None)  # a loop that counts steps has not asked once more, which stops the clock
    if plan["contender"] == "kernels":
        return say(plan["kernels"])
    answer = quality(reconstruct, data["held_out"])
    if plan["contender"] == "ours" and plan["task"] == "topk":
        answer["rows_that_differ"] = rows_that_differ(plan["dictionary"], data["held_out"])
    say(answer)


def feed(rows: torch.Tensor, plan: dict[str, Any], say: Callable[[dict], None]) -> Iterator[torch.Tensor]:
    """Batches in a fixed order; the time between handing one out and being asked for the next is a step's."""
    size, seconds, left = plan["batch_size"], [], 0
    for step in range(plan["steps"]):
        if not left:
            if step:
                say({"seconds": seconds})
            seconds = []
            left = int(sys.stdin.readline())
        epoch, place = divmod(step, len(rows) // size)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
        batch = rows[order[place * size : (place + 1) * size]].contiguous()
        began = time.perf_counter()
        yield batch
        seconds.append(time.perf_counter() - began)
        left -= 1
    say({"seconds": seconds})


def falling(plan: dict[str, Any]) -> Callable[[int], float]:
    """Constant, then linearly to 0 over the last fifth: the schedule of every contender."""
    return lambda step: min(1.0, (plan["steps"] - step) / (0.2 * plan["steps"]))


@torch.no_grad()
def quality(reconstruct: Reconstruct, held_out: torch.Tensor) -> dict[str, float]:
    """Explained variance about the mean, active latents per row, mean squared error and weighted L1."""
    error = spread = active = weighted = 0.0
    mean = held_out.double().mean(0)
    for rows in held_out.split(1024):
        found, acts = reconstruct(rows)
        error += float((rows - found).double().square().sum())
        spread += float((rows.double() - mean).square().sum())
        acts = acts.to_dense() if acts.is_sparse else acts
        active += float((acts > 0).sum())
        weighted += float(acts.double().sum())
    rows = len(held_out)
    return {
        "explained_variance": 1 - error / spread,
        "l0": active / rows,
        "mse": error / rows,
        "l1": weighted / rows,
    }


def ours(plan: dict[str, Any], batches: Iterator[torch.Tensor]) -> Reconstruct:
    from interp_utils.dictionaries import Dictionary, TrainConfig, train

    kind = "topk" if plan["task"] == "topk" else "relu"
    dictionary = Dictionary.create(kind, plan["d"], plan["width"], k=plan["k"] if kind == "topk" else None)
    config = TrainConfig(
        plan["steps"],
        plan["batch_size"],
        lr=plan["lr"],
        l1=plan["l1"] if kind == "relu" else None,
        screen="auto" if plan["contender"] == "ours" else None,
    )
    train(dictionary, lambda _: batches, config, progress=False)
    plan["dictionary"] = dictionary

    def reconstruct(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        acts = dictionary.encode(x)
        return dictionary.decode(acts), acts * dictionary.W_dec.norm(dim=1)

    return reconstruct


@torch.no_grad()
def rows_that_differ(dictionary: Any, x: torch.Tensor) -> float:
    """Share of rows for which the screen that training uses makes another choice of latents than float32."""
    from interp_utils.dictionaries import kernels

    chosen = []
    for screen in (kernels.fast_screen(), None):
        pairs = kernels.top_candidates(x, dictionary.W_enc, dictionary.b_enc, dictionary.k, screen)
        pre = kernels.pair_products(pairs, x, dictionary.W_enc, dictionary.b_enc)
        kept = pairs.keep(kernels.largest(pairs, pre, dictionary.k))
        chosen.append(torch.zeros(len(x), dictionary.width, dtype=torch.bool))
        chosen[-1][kept.rows(), kept.latent] = True
    return float((chosen[0] != chosen[1]).any(1).float().mean())


def sparsify(plan: dict[str, Any], batches: Iterator[torch.Tensor]) -> Reconstruct:
    """The body of its `Trainer.fit` for one SAE on given activations, with Adam as it builds it."""
    from sparsify import SaeConfig, SparseCoder

    torch.set_float32_matmul_precision("high")  # as fit does
    sae = SparseCoder(plan["d"], SaeConfig(num_latents=plan["width"], k=plan["k"]), dtype=torch.float32)
    adam = torch.optim.Adam(sae.parameters(), lr=plan["lr"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(adam, falling(plan))
    silent = torch.zeros(plan["width"], dtype=torch.long)
    for step, x in enumerate(batches):
        if step == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        variance = (x - x.mean(0)).pow(2).sum()
        out = sae(x, x, dead_mask=None, total_variance=variance)
        fired = torch.zeros(plan["width"], dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        scheduler.step()
        silent += len(x)
        silent[fired] = 0

    def reconstruct(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = sae(x)
        return out.sae_out, out.latent_acts

    return reconstruct


def sae_lens(plan: dict[str, Any], batches: Iterator[torch.Tensor]) -> Reconstruct:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    shape: dict[str, Any] = {"d_in": plan["d"], "d_sae": plan["width"], "dtype": "float32", "device": "cpu"}
    sae: Any
    if plan["task"] == "topk":
        sparse = plan["contender"] == "sae-lens sparse"
        # Its sparse mode fails on a CPU unless the rescaling is off.
        options = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False} if sparse else {}
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**shape, k=plan["k"], **options))
    else:
        warm_up = math.ceil(0.05 * plan["steps"])
        options = {"l1_coefficient": plan["l1"], "l1_warm_up_steps": warm_up, "apply_b_dec_to_input": False}
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(**shape, **options))
    config = SAETrainerConfig(
        total_training_samples=plan["steps"] * plan["batch_size"],
        train_batch_size_samples=plan["batch_size"],
        lr=plan["lr"],
        lr_end=plan["lr"] / 10,
        lr_decay_steps=plan["steps"] // 5,
    )
    trainer: Any = SAETrainer(config, sae, batches)
    trainer.fit()

    def reconstruct(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        acts = sae.encode(x)
        return sae.decode(acts), acts if acts.is_sparse else acts * sae.W_dec.norm(dim=1)

    return reconstruct


def dictionary_learning(plan: dict[str, Any], batches: Iterator[torch.Tensor]) -> Reconstruct:
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer

    shared = {
        "steps": plan["steps"],
        "activation_dim": plan["d"],
        "dict_size": plan["width"],
        "lr": plan["lr"],
        "warmup_steps": 1,
        "decay_start": int(0.8 * plan["steps"]),
        "layer": 0,
        "lm_name": "none",
        "device": "cpu",
        "seed": plan["seed"],
    }
    trainer: Any
    if plan["task"] == "topk":
        trainer = TopKTrainer(**shared, k=plan["k"])
    else:
        trainer = StandardTrainerAprilUpdate(
            **shared, l1_penalty=plan["l1"], sparsity_warmup_steps=math.ceil(0.05 * plan["steps"])
        )
    for step, x in enumerate(batches):
        trainer.update(step, x)

    def reconstruct(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found, acts = trainer.ae(x, output_features=True)
        return found, acts * trainer.ae.decoder.weight.norm(dim=0)

    return reconstruct


def kernels(plan: dict[str, Any], batches: Iterator[torch.Tensor]) -> Reconstruct:
    """One TopK step's kernels alone, as an upper bound: what remains is glue."""
    d, width, k = plan["d"], plan["width"], plan["k"]
    W_enc, W_dec = (torch.nn.functional.normalize(torch.randn(width, d)) for _ in range(2))
    parameters = [W_enc, torch.zeros(width), W_dec, torch.zeros(d)]
    moments = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    gradients, counts = [torch.zeros_like(p) for p in parameters], [torch.ones(()) for _ in parameters]
    weights, outs = W_enc.bfloat16(), [torch.empty(width, d) for _ in range(2)]
    pre = torch.empty(plan["batch_size"], width, dtype=torch.bfloat16)
    parts: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = call()
        parts.setdefault(name, []).append(time.perf_counter() - began)
        return result

    with torch.no_grad():
        for x in batches:
            rows = len(x)
            low = x.bfloat16()
            timed("encoder", lambda low=low: torch.mm(low, weights.T, out=pre))
            values, ids = timed("topk", lambda: pre.topk(k, sorted=False))
            values = values.float()
            timed("decode", lambda v=values, i=ids: bag(i, W_dec, v))
            starts = torch.arange(0, rows * k + 1, k)
            zeros = torch.sparse_csr_tensor(starts, ids.flatten(), torch.zeros(rows * k), (rows, width))
            timed("chosen", lambda z=zeros, x=x: torch.sparse.sampled_addmm(z, x, W_dec.T, beta=0.0))
            order = ids.flatten().argsort(stable=True)
            counted = torch.bincount(ids.flatten(), minlength=width).cumsum(0)
            lists = torch.cat([torch.zeros(1, dtype=torch.int64), counted]), order // k
            flipped = torch.sparse_csr_tensor(*lists, values.flatten()[order], (width, rows))
            for out in outs:
                timed("weights", lambda f=flipped, x=x, o=out: torch.addmm(o, f, x, beta=0, out=o))
            timed("adam", lambda: adam(parameters, gradients, moments, counts))
    plan["kernels"] = {name: statistics.median(t) * len(t) / plan["steps"] for name, t in parts.items()}
    return lambda x: (x, x)


def bag(ids: torch.Tensor, W: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.embedding_bag(ids, W, per_sample_weights=values, mode="sum")


def adam(parameters: list, gradients: list, moments: list, counts: list) -> None:
    settings = {"lr": 1e-9, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8}
    torch._fused_adam_(parameters, gradients, *moments, [], counts, amsgrad=False, maximize=False, **settings)


CONTENDERS: dict[str, Callable[[dict[str, Any], Iterator[torch.Tensor]], Reconstruct]] = {
    "ours": ours,
    "ours, float32": ours,
    "sparsify": sparsify,
    "sae-lens": sae_lens,
    "sae-lens sparse": sae_lens,
    "dictionary-learning": dictionary_learning,
    "kernels": kernels,
}

if __name__ == "__main__":
    main()
