"""Train a dictionary on a CPU: hand-written gradients, fused Adam, checkpoints that go on bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from interp_utils.dictionaries import steps
from interp_utils.dictionaries.adam import Adam, unit_rows, without_radial
from interp_utils.dictionaries.batches import (
    Batches,
    check_data,
    checked,
    fingerprint,
    remember_units,
    source,
)
from interp_utils.dictionaries.checkpoints import Saved, resume, store
from interp_utils.dictionaries.config import TrainConfig
from interp_utils.dictionaries.dictionary import Dictionary
from interp_utils.dictionaries.parallel import Ranks
from interp_utils.errors import InterpError

if TYPE_CHECKING:
    from interp_utils.activation_store import ActivationStore

THRESHOLD_MEMORY = 0.95  # of batchtopk's running threshold
OnStep = Callable[[int, Dictionary, steps.Step], None]


class _Run:
    """The state of a training run between two steps."""

    def __init__(self, dictionary: Dictionary, config: TrainConfig) -> None:
        self.dictionary, self.config = dictionary, config
        self.plan, self.ranks = config.filled(dictionary), Ranks()
        self.unit = dictionary.kind != "relu" and not dictionary.transcoder and not config.freeze_decoder
        self.adam = Adam(dictionary, config.betas, ("W_dec",) if config.freeze_decoder else ())
        self.memory = {
            name: torch.empty_like(getattr(dictionary, name).detach()) for name in ("W_enc", "W_dec")
        }
        self.step = 0
        self.silent = torch.zeros(dictionary.width, dtype=torch.int64)  # tokens since a latent last fired
        self.last_l0 = float(dictionary.width)
        self.sums: dict[str, float] = {}
        self.log: list[dict[str, float]] = []
        self.seconds = 0.0

    def advance(self, x: Tensor, y: Tensor) -> steps.Step:
        """One update."""
        dictionary, config, plan = self.dictionary, self.config, self.plan
        made = self._compute(x, y)
        dead = (self.silent > config.dead_tokens).nonzero().flatten()
        if plan["aux_k"] and len(dead):
            steps.add_auxk(made, dictionary, x, dead, plan["aux_k"], config.batch_size)
        self._share(made)
        if not math.isfinite(made.loss):
            raise InterpError(
                f"The loss of step {self.step} is {made.loss}; the batch is finite, so lower lr ({plan['lr']:g}) "
                "or check the scale of the data."
            )
        if self.unit:
            without_radial(made.gradients["W_dec"], dictionary.W_dec, made.radial)
        lr = config.rate(self.step, plan["lr"])
        self.adam.step(made.gradients, lr, config.clip_norm)
        if self.unit:
            unit_rows(dictionary.W_dec)
        if dictionary.kind == "jumprelu":
            dictionary.thresholds.clamp_(min=0)
        self._account(made, lr, len(dead))
        return made

    def _compute(self, x: Tensor, y: Tensor) -> steps.Step:
        dictionary, config = self.dictionary, self.config
        rows = config.batch_size
        options: dict[str, Any] = {"screen": self.plan["screen"], "into": self.memory}
        if dictionary.kind == "topk":
            return steps.topk_step(dictionary, x, y, rows=rows, **options)
        if dictionary.kind == "batchtopk":
            return steps.batchtopk_step(dictionary, x, y, rows=rows, ranks=self.ranks, **options)
        warmup = self.plan["l1_warmup"] * config.steps
        weight = self.plan["l1"] * (min(1.0, (self.step + 1) / warmup) if warmup else 1.0)
        step = steps.jumprelu_step if dictionary.kind == "jumprelu" else steps.relu_step
        sparse = self.last_l0 < steps.SPARSE_BELOW[self.plan["screen"]] * dictionary.width
        return step(dictionary, x, y, weight, sparse=sparse, rows=rows, **options)

    def _share(self, made: steps.Step) -> None:
        """Sum over the processes what each computed on its own rows."""
        if self.ranks.world == 1:
            return
        numbers = torch.tensor([made.mse, made.sparsity, made.loss, made.l0], dtype=torch.float64)
        fired = made.fired.to(torch.int32)
        radial = [made.radial] if made.radial is not None else []
        self.ranks.add(numbers, fired, *made.gradients.values(), *radial)
        made.mse, made.sparsity, made.loss, made.l0 = numbers.tolist()
        made.fired = fired > 0

    def _account(self, made: steps.Step, lr: float, dead: int) -> None:
        config = self.config
        self.silent += config.batch_size
        self.silent[made.fired] = 0
        self.last_l0 = made.l0
        if made.smallest is not None and math.isfinite(made.smallest):  # else nothing was active
            old = float(self.dictionary.threshold)
            mean = THRESHOLD_MEMORY * old + (1 - THRESHOLD_MEMORY) * made.smallest if old else made.smallest
            self.dictionary.set_threshold(torch.tensor(mean))
        self.step += 1
        now = {"loss": made.loss, "mse": made.mse, "l1": made.sparsity, "l0": made.l0, "steps": 1}
        self.sums = {name: self.sums.get(name, 0) + value for name, value in now.items()}
        if self.step % config.log_every == 0 or self.step == config.steps:
            n = self.sums.pop("steps")
            means = {name: value / n for name, value in self.sums.items()}
            tokens, share = self.step * config.batch_size, dead / self.dictionary.width
            self.log.append({"step": self.step, "tokens": tokens, **means, "dead_share": share, "lr": lr})
            self.sums = {}


def train(
    dictionary: Dictionary,
    data: Batches,
    config: TrainConfig,
    *,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    progress: bool = True,
    on_step: OnStep | None = None,
) -> pd.DataFrame:
    """Train `dictionary` in place; returns the log.

    Gradients are those of the kind's loss (see `steps`), clipped, then Adam. All kinds but relu keep unit decoder
    rows: the gradient along a row is taken out before clipping and the rows are renormalised after the step, as
    sparsify and dictionary_learning do; not for transcoders, whose decoder starts at zero. There is no random
    draw in training, and batch s is a function of (seed, s), so a run that is stopped and called again with the
    same arguments ends in the same bits, on the same machine with the same number of threads. Under `torchrun`
    every process computes its share of each batch and begins with the first one's state.

    Args:
        dictionary: from `Dictionary.create`.
        data: an activation store, whose mean and scale the dictionary then remembers; a tensor "row d" (or two,
            input and target); or a function from the first step's number to an iterator over batches, each a
            tensor or such a pair, of this process's rows. A transcoder needs pairs.
        config: see `TrainConfig`.
        checkpoint: a file to resume from and to write to every `checkpoint_seconds` and at the end; only the
            first process reads and writes it. It knows a store or tensors again, but not a function.
        progress: show a bar.
        on_step: called after each step with its number (from 1), the dictionary and what the step computed.

    Returns:
        Means over `log_every` steps: step, tokens, loss, mse (sum over d_out), l1 (without its coefficient),
        l0, dead_share, lr, seconds since the start.

    Raises:
        InterpError: data of another type, rows of another width, NaN or constant activations, too little data, a
            checkpoint of another dictionary, configuration or data, a loss that is not finite.
    """
    run = _Run(dictionary, config)
    check_data(data, config, run.ranks)
    remember_units(dictionary, data, config)
    saved = Saved(dictionary, run.adam, run.silent, run.plan, fingerprint(data))
    checkpoint = None if checkpoint is None else Path(checkpoint)
    if state := resume(checkpoint, saved, run.ranks):
        run.step, run.last_l0, run.sums, run.log, run.seconds = (
            state[name] for name in ("step", "last_l0", "sums", "log", "seconds")
        )
    if run.step < config.steps:
        batches = source(data, config, run.step, run.ranks)
        _loop(run, batches, checkpoint, checkpoint_seconds, saved, progress, on_step)
    return pd.DataFrame(run.log)


@torch.no_grad()
def _loop(
    run: _Run,
    batches: Iterator[Any],
    checkpoint: Path | None,
    every: float,
    saved: Saved,
    progress: bool,
    on_step: OnStep | None,
) -> None:
    config, began = run.config, time.monotonic() - run.seconds
    wrote = time.monotonic()
    quiet = not progress or run.ranks.rank > 0
    with tqdm(total=config.steps, initial=run.step, unit="step", disable=quiet, desc="training") as bar:
        while run.step < config.steps:
            x, y = checked(batches, run.dictionary, config, run.step, run.ranks)
            entries = len(run.log)
            made = run.advance(x, y)
            run.seconds = time.monotonic() - began
            if len(run.log) > entries:
                run.log[-1]["seconds"] = round(run.seconds, 3)
                last = run.log[-1]
                bar.set_postfix(
                    mse=f"{last['mse']:.1f}", l0=f"{last['l0']:.1f}", dead=f"{last['dead_share']:.1%}"
                )
            bar.update()
            if on_step is not None:
                on_step(run.step, run.dictionary, made)
            late = time.monotonic() - wrote > every
            if checkpoint is not None and run.ranks.rank == 0 and (late or run.step == config.steps):
                names = ("step", "last_l0", "sums", "log", "seconds")
                store(checkpoint, saved, {name: getattr(run, name) for name in names})
                wrote = time.monotonic()


def train_small(harvest: ActivationStore, site: str, width: int, *, seed: int = 0) -> Dictionary:
    """A BatchTopK autoencoder trained within a minute, for a model without a shipped one.

    Units are those of `harvest`, which holds `site`; 384 steps of 512 rows, k = 32 (arXiv 2412.06410).
    """
    made = Dictionary.create("batchtopk", harvest.d(), width, k=32, seed=seed)
    made.set_units(harvest.mean[site].float(), harvest.scale[site])
    config = TrainConfig(steps=384, batch_size=512, lr=2e-3, seed=seed, log_every=384)
    train(made, harvest, config, progress=False)
    return made
