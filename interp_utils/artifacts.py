"""Trained weights that notebooks share: what they are and how each is made again.

python -m interp_utils.artifacts            # all, resumable
python -m interp_utils.artifacts sae-l1-512 # some
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch

from interp_utils.activation_store import ActivationStore
from interp_utils.corpora import corpus_hash, load_corpus, split_documents
from interp_utils.dictionaries import Dictionary, TrainConfig, train
from interp_utils.dictionaries.files import load, save
from interp_utils.dictionaries.metrics import evaluate
from interp_utils.dictionaries.splice import ce_metrics
from interp_utils.errors import InterpError, nearest
from interp_utils.harvest import harvest
from interp_utils.paths import cache_folder, data_folder, writable
from interp_utils.windows import draw_windows, start_token

if TYPE_CHECKING:
    from nnsight import TransformersModel

# Tokens of each source in one part of the mix; a harvest of fewer parts is the beginning of a longer one.
MIX = {"news": 46, "encyclopaedia": 27, "parliament": 10, "python": 27}
PARTS = {"train": 20_000, "held_out": 900}  # what the shipped dictionaries are trained and judged on
CE_PARTS = 30  # of held-out text on which the model's loss is measured
MODEL, SITE = "gemma-3-270m", "resid_post.9"  # the middle layer
MASSIVE = (163, 87)  # dimensions of that site with by far the most variance
NOTICE = (
    "Made from activations of Gemma 3 270M; the Gemma Terms of Use apply (https://ai.google.dev/gemma/terms)."
)


@dataclass(frozen=True)
class Recipe:
    """A shipped sparse autoencoder.

    Attributes:
        kind: "relu" (the paper's L1) or "batchtopk".
        width: latents.
        k: latents per row on average, batchtopk only.
        lr: peak learning rate.
        epochs: passes over the training rows.
    """

    kind: Literal["relu", "batchtopk"]
    width: int
    k: int | None
    lr: float
    epochs: int = 3

    @property
    def name(self) -> str:
        return f"sae-{'l1' if self.kind == 'relu' else self.kind}-{self.width}"


WIDTHS = (512, 2048, 8192)
SAES = {
    recipe.name: recipe
    for recipe in (
        *(Recipe("batchtopk", width, 32, 2e-3) for width in WIDTHS),
        *(Recipe("relu", width, None, 3e-3) for width in WIDTHS),
    )
}


def harvest_mix(
    model: TransformersModel,
    site: str = SITE,
    *,
    split: Literal["train", "held_out"] = "train",
    parts: int | None = None,
    **options: Any,
) -> ActivationStore:
    """Activations of news, encyclopaedia, parliament and Python code, kept in the cache folder.

    Other weights, another Python's code and other options have folders of their own.

    Args:
        model: from `load_model`.
        site: see `sites`.
        split: documents to train on, or those held out (a tenth of each source).
        parts: length, in parts of 110 tokens (see `MIX`); those of the shipped dictionaries if not given.
        options: further ones of `harvest`.

    Raises:
        InterpError: a text package that is missing, and what `harvest` raises.
    """
    n_parts = PARTS[split] if parts is None else parts
    corpora = {name: split_documents(load_corpus(name))[split != "train"] for name in MIX}
    usual = inspect.signature(harvest).parameters
    own = {k: v for k, v in options.items() if k in usual and k != "progress" and v != usual[k].default}
    made_of = [model.info.weights, {name: corpus_hash(texts) for name, texts in corpora.items()}, own]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:8]
    weights = model.info.weights.replace(":", "-").replace(" ", "-")[-40:]
    root = writable(cache_folder() / "activations", "activation cache", "INTERP_CACHE")
    folder = root / f"{model.info.name}-{weights}-{site}-{split}-{n_parts}-{key}"
    tokens = {name: share * n_parts for name, share in MIX.items()}
    return harvest(model, corpora, folder, sites=[site], tokens=tokens, **options)


def make_sae(
    recipe: Recipe, model: TransformersModel, store: ActivationStore, held_out: ActivationStore
) -> Dictionary:
    """Train a shipped dictionary from nothing, or go on where training was stopped, and write it with its card.

    The checkpoint of a training goes when its dictionary is written, so that the next call trains from nothing.
    """
    corpora = {name: split_documents(load_corpus(name))[1] for name in MIX}
    drawn = draw_windows(
        model, corpora, {n: CE_PARTS * share for n, share in MIX.items()}, context=128, seed=1
    )
    windows = [[start_token(model), *map(int, window.ids)] for window in drawn]
    mean, scale = store.mean[SITE].float(), store.scale[SITE]
    sae = Dictionary.create(recipe.kind, store.d(), recipe.width, k=recipe.k, seed=0).set_units(mean, scale)
    steps = recipe.epochs * (len(store) // 2048)
    config = TrainConfig(steps=steps, lr=recipe.lr, warmup_steps=100, epochs=recipe.epochs)
    kept = writable(cache_folder() / "checkpoints", "checkpoint folder", "INTERP_CACHE")
    checkpoint = kept / f"{recipe.name}.safetensors"
    log = train(sae, store, config, checkpoint=checkpoint)
    unit = sae.normalised()
    with TemporaryDirectory() as folder:  # what is measured is what is shipped
        save(folder, unit, {})
        sae, _ = load(folder)
    card = {
        "name": recipe.name,
        "command": f"python -m interp_utils.artifacts {recipe.name}",
        "notice": NOTICE,
        "recipe": asdict(recipe),
        "config": config.filled(sae),
        "tokens": steps * config.batch_size,
        "seconds": round(float(log.seconds.iloc[-1])),
        "data": {
            key: store.card[key] for key in ("model", "weights", "sites", "sources", "n_rows", "outlier_rule")
        },
        "never_fired": int((~ever_fired(sae, store)).sum()),
        "held_out": measured(sae, held_out),
        "spliced": {name: round(value, 5) for name, value in ce_metrics(model, sae, windows, SITE).items()},
    }
    save(data_folder() / "artifacts" / recipe.name, unit, card)
    checkpoint.unlink()
    return sae


@torch.no_grad()
def ever_fired(sae: Dictionary, store: ActivationStore, batch_size: int = 8192) -> torch.Tensor:
    """Bool "width": which latents are active anywhere in the store.

    Raises:
        InterpError: a topk dictionary, whose latents compete, so that none can be judged alone.
    """
    if sae.kind == "topk":
        raise InterpError("Latents of a topk dictionary compete; count those that fire with `evaluate`.")
    fired = torch.zeros(sae.width, dtype=torch.bool)
    floor = sae.threshold.clamp(min=0).expand(sae.width)
    for start in range(0, len(store), batch_size):
        left = (~fired).nonzero()[:, 0]  # few after the first batches
        if not len(left):
            break
        x = store.read(slice(start, start + batch_size))
        pre = torch.addmm(sae.b_enc[left], x, sae.W_enc[left].T)
        fired[left] = (pre > floor[left]).any(0)
    return fired


def measured(sae: Dictionary, held_out: ActivationStore) -> dict[str, dict[str, float]]:
    """The numbers of `evaluate` on held-out rows: all, all without the massive dimensions, and by source."""
    rows = {name: (held_out.source == i).nonzero()[:, 0] for i, name in enumerate(held_out.source_names)}
    everything = torch.arange(len(held_out))
    found = {"all": evaluate(sae, held_out.read(everything))}
    found["without massive dimensions"] = evaluate(sae, held_out.read(everything), without=MASSIVE)
    found |= {name: evaluate(sae, held_out.read(own)) for name, own in rows.items()}
    return {name: {k: round(v, 5) for k, v in result.as_dict().items()} for name, result in found.items()}


def main(arguments: list[str] | None = None) -> None:
    from interp_utils.models import load_model

    parser = argparse.ArgumentParser(description="Train the shipped weights again; stopped runs go on.")
    parser.add_argument("names", nargs="*", help=f"which; all if none is given: {', '.join(SAES)}")
    names = parser.parse_args(arguments).names or list(SAES)
    for name in names:
        if name not in SAES:
            raise InterpError(f"There is no artifact {name!r}.{nearest(name, SAES)}")
    model = load_model(MODEL)
    store = harvest_mix(model)
    held_out = harvest_mix(model, split="held_out").like(store)
    for name in names:
        make_sae(SAES[name], model, store, held_out)


if __name__ == "__main__":
    main()
