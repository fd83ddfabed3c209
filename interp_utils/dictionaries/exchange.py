"""Dictionaries of other libraries: SAELens in both directions, Gemma Scope 2 to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp_utils.dictionaries.dictionary import Dictionary, Kind
from interp_utils.dictionaries.files import readable, replace
from interp_utils.errors import InterpError

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.54.12"  # of SAELens, whose layout this is
ARCHITECTURES: dict[str, Kind] = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}


def to_saelens(
    folder: str | Path,
    dictionary: Dictionary,
    *,
    model_name: str,
    hook_name: str,
    context: int = 128,
    prepend_bos: bool = True,
) -> None:
    """Write `cfg.json` and `sae_weights.safetensors`, which `sae_lens.SAE.load_from_disk` reads.

    What is written acts on activations as the model has them: mean and scale are folded in. relu becomes
    "standard", topk "topk", and jumprelu and batchtopk, with its one threshold for all latents, "jumprelu".

    Args:
        model_name: as TransformerLens names it, such as "google/gemma-3-270m".
        hook_name: such as "blocks.9.hook_resid_post".

    Raises:
        InterpError: a transcoder, or a folder that cannot be written.
    """
    if dictionary.transcoder:
        raise InterpError("A transcoder has no SAELens form here; only autoencoders are exported.")
    folder, raw = Path(folder), dictionary.raw()
    tensors = {
        "W_enc": raw.W_enc.detach().T.contiguous(),
        "b_enc": raw.b_enc.detach(),
        "W_dec": raw.W_dec.detach().contiguous(),
        "b_dec": raw.b_dec.detach(),
    }
    config: dict[str, Any] = {
        "architecture": {"relu": "standard", "topk": "topk"}.get(raw.kind, "jumprelu"),
        "d_in": raw.d_in,
        "d_sae": raw.width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": VERSION,
            "model_name": model_name,
            "hook_name": hook_name,
            "context_size": context,
            "prepend_bos": prepend_bos,
        },
    }
    if raw.kind == "topk":
        config |= {"k": raw.k, "rescale_acts_by_decoder_norm": False}
    elif config["architecture"] == "jumprelu":
        tensors["threshold"] = raw.threshold.detach().expand(raw.width).contiguous()
    try:
        replace(folder / WEIGHTS, lambda path: save_file(tensors, path))
        replace(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=1) + "\n"))
    except (OSError, SafetensorError) as error:
        raise InterpError(f"The dictionary could not be written to {folder} ({error}).") from None


def from_saelens(folder: str | Path) -> Dictionary:
    """Read what SAELens 6 saved: "standard", "topk" or "jumprelu" (its form of BatchTopK too).

    A decoder bias that SAELens takes from the input is folded into b_enc, decoder norms that it divides by into
    both matrices; the dictionary acts on activations as the model has them.

    Raises:
        InterpError: a file is missing or damaged, another architecture, or an option with no equal here.
    """
    folder = Path(folder)
    with readable(f"{folder / CONFIG} with {WEIGHTS}", "save the SAE with SAELens 6"):
        config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
        _check_config(config)
        kind = ARCHITECTURES[config["architecture"]]
        W_enc, W_dec = tensors["W_enc"].float().mT, tensors["W_dec"].float()
        b_enc, b_dec = tensors["b_enc"].float(), tensors["b_dec"].float()
        if config.get("apply_b_dec_to_input", True):
            b_enc = (b_enc.double() - W_enc.double() @ b_dec.double()).float()
        if config.get("rescale_acts_by_decoder_norm", False):
            norms = W_dec.norm(dim=1)
            W_enc, b_enc = W_enc * norms[:, None], b_enc * norms
            W_dec = W_dec / norms.where(norms > 0, 1)[:, None]  # a row of zeros stays one
        parts = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        return _filled(
            kind, parts, k=config["k"] if kind == "topk" else None, threshold=tensors.get("threshold")
        )


def from_gemma_scope(file: str | Path, *, transcoder: bool = False) -> Dictionary:
    """Read a `params.safetensors` of Gemma Scope 2: JumpReLU, on activations as the model has them.

    Args:
        file: with w_enc "d_in width", w_dec "width d_out", b_enc, b_dec and threshold.
        transcoder: whether its target is not its input.

    Raises:
        InterpError: the file is missing or damaged, or holds anything else, such as an affine skip connection.
    """
    with readable(str(file), "download it again"):
        tensors = {name.lower(): tensor for name, tensor in load_file(file).items()}
        expected = {"w_enc", "b_enc", "w_dec", "b_dec", "threshold"}
        if set(tensors) != expected:
            raise InterpError(f"It holds {sorted(tensors)}, but {sorted(expected)} are needed.")
        parts = {"W_enc": tensors["w_enc"].mT, "b_enc": tensors["b_enc"]}
        parts |= {"W_dec": tensors["w_dec"], "b_dec": tensors["b_dec"]}
        return _filled("jumprelu", parts, threshold=tensors["threshold"], transcoder=transcoder)


def _check_config(config: dict[str, Any]) -> None:
    version = str((config.get("metadata") or {}).get("sae_lens_version", "0"))
    if not version.split(".")[0].isdigit() or int(version.split(".")[0]) < 6:
        raise InterpError("It was saved before SAELens 6; load and save it with SAELens 6 first.")
    if config.get("architecture") == "batchtopk":
        raise InterpError(
            "A batchtopk SAE in the form of its training is not read; save it with SAELens's "
            "`save_inference_model`, which makes it a jumprelu one."
        )
    if config.get("architecture") not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InterpError(
            f"It has the architecture {config.get('architecture')!r}, but only {known} are read."
        )
    for option in ("normalize_activations", "reshape_activations"):
        if config.get(option, "none") != "none":
            raise InterpError(f"It has {option} {config[option]!r}, for which there is no equal here.")


@torch.no_grad()
def _filled(
    kind: Kind,
    parts: dict[str, Tensor],
    *,
    k: int | None = None,
    threshold: Tensor | None = None,
    transcoder: bool = False,
) -> Dictionary:
    (width, d_in), d_out = parts["W_enc"].shape, parts["W_dec"].shape[1]
    made = Dictionary(kind, d_in, width, d_out if transcoder else None, k)
    for name, tensor in parts.items():
        own = getattr(made, name)
        if own.shape != tensor.shape:
            raise InterpError(f"{name} has shape {tuple(tensor.shape)} but {tuple(own.shape)} is needed.")
        own.copy_(tensor)
    if kind == "jumprelu":
        if threshold is None or threshold.shape != (width,):
            raise InterpError(f"A jumprelu dictionary needs a threshold of shape ({width},).")
        made.set_threshold(threshold.float())
    return made
