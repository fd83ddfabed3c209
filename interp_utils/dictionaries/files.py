"""Dictionaries on disk: safetensors with int8 rows and fp16 scales, and a card that says how they were made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp_utils.dictionaries.dictionary import Dictionary
from interp_utils.errors import InterpError
from interp_utils.paths import find_data
from interp_utils.records import file_hash
from interp_utils.sites import check_site

if TYPE_CHECKING:
    from nnsight import TransformersModel

FILE, CARD = "dictionary.safetensors", "card.json"
LARGEST = 127
MATRICES = ("W_enc", "W_dec")
# What reading a file that is no safetensors, no JSON or not ours raises.
BROKEN = (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError)


def save(folder: str | Path, dictionary: Dictionary, card: dict[str, Any]) -> None:
    """Write `dictionary.safetensors` and `card.json`; about 2 * width * d bytes.

    Each row of both matrices becomes int8 times a fp16 scale times the matrix's float32 `unit`, which keeps the
    scales of small rows out of fp16's subnormal numbers. Everything else stays float32.

    Args:
        card: what is worth knowing of the training; the shape and the file's hash are added.

    Raises:
        InterpError: weights that are not finite, or a folder that cannot be written.
    """
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in dictionary.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise InterpError(f"{name} of the dictionary is not finite; train it again before saving it.")
        tensors |= _quantised(name, tensor) if name in MATRICES else {name: tensor.float().contiguous()}
    try:
        replace(folder / FILE, lambda path: save_file(tensors, path))
        whole = {**card, "dictionary": _shape(dictionary), "sha256": file_hash(folder / FILE)}
        text = json.dumps(whole, indent=1, sort_keys=True) + "\n"
        replace(folder / CARD, lambda path: path.write_text(text))
    except (OSError, SafetensorError) as error:
        raise InterpError(f"The dictionary could not be written to {folder} ({error}).") from None


def load(source: str | Path) -> tuple[Dictionary, dict[str, Any]]:
    """The dictionary and its card.

    Args:
        source: a folder, or the name of one of the shipped below `data/artifacts/`.

    Raises:
        InterpError: no such folder or artifact, a card that cannot be read, or a file whose hash is not the
            card's.
    """
    file, about = _find(source)
    advice = "restore both from where they came or train again"
    with readable(f"The card {about}", advice):
        card = json.loads(about.read_text())
        expected, shape = card["sha256"], card["dictionary"]
    if file_hash(file) != expected:
        raise InterpError(f"{file} does not have the hash of its card; {advice}.")
    with readable(f"{file} with its card", advice):
        d_out = shape["d_out"] if shape["transcoder"] else None
        dictionary = Dictionary(shape["kind"], shape["d_in"], shape["width"], d_out, shape["k"])
        tensors = load_file(file)
        state = {name: _restored(name, tensors) for name in dictionary.state_dict()}
        if shape["unit_rows"]:
            state["W_dec"] = torch.nn.functional.normalize(state["W_dec"])
        dictionary.load_state_dict(state)
    return dictionary, card


def load_for(model: TransformersModel, source: str | Path) -> tuple[Dictionary, str]:
    """The dictionary and the site it reads, checked against the model.

    Args:
        model: from `load_model`.
        source: as for `load`; the card must say whose activations it was trained on, as shipped ones do.

    Raises:
        InterpError: what `load` raises, or a dictionary of other weights, of another site or without such a card.
    """
    dictionary, card = load(source)
    data = card.get("data", {})
    made_for, site = (data.get("model"), data.get("weights")), (data.get("sites") or [None])[0]
    if site is None:
        raise InterpError(
            f"The card of {str(source)!r} does not say what it was trained on; load it with `load`."
        )
    if made_for != (model.info.name, model.info.weights):
        raise InterpError(
            f"{str(source)!r} was trained on {made_for[0]} ({made_for[1]}), not on {model.info.name} "
            f"({model.info.weights}); load that model, or train a dictionary for this one (notebook 02)."
        )
    dictionary.site = str(check_site(model, site))
    return dictionary, dictionary.site


def _find(source: str | Path) -> tuple[Path, Path]:
    folder = Path(source)
    if (folder / CARD).is_file() and (folder / FILE).is_file():
        return folder / FILE, folder / CARD
    found = [find_data(f"artifacts/{source}/{name}") for name in (FILE, CARD)]
    if found[0] is None or found[1] is None:
        raise InterpError(
            f"There is no dictionary {str(source)!r}: neither a folder with {FILE} and {CARD} nor one of the "
            "shipped below data/artifacts/; `make artifacts` trains those."
        )
    return found[0], found[1]


def _shape(dictionary: Dictionary) -> dict[str, Any]:
    names = ("kind", "d_in", "d_out", "width", "k", "transcoder")
    shape = {name: getattr(dictionary, name) for name in names}
    return shape | {"unit_rows": dictionary.has_unit_rows()}


def _quantised(name: str, matrix: Tensor) -> dict[str, Tensor]:
    scales = matrix.float().abs().amax(dim=1) / LARGEST
    unit = scales.max().clamp(min=torch.finfo(torch.float32).tiny)
    small = (scales / unit).half()
    per_row = (small.float() * unit).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    rows = (matrix.float() / per_row).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return {name: rows, f"{name}.scale": small, f"{name}.unit": unit.reshape(())}


def _restored(name: str, tensors: dict[str, Tensor]) -> Tensor:
    if name not in MATRICES:
        return tensors[name]
    return tensors[name].float() * (tensors[f"{name}.scale"].float() * tensors[f"{name}.unit"])[:, None]


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside `path`, then rename it, so that there is never half a file.

    What a process that was killed while writing the same file left beside it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = f".{path.name}."
    for left in path.parent.iterdir():
        if left.name.startswith(hidden) and left.name.removeprefix(hidden).isdigit():
            left.unlink(missing_ok=True)
    scratch = path.with_name(f"{hidden}{os.getpid()}")
    try:
        write(scratch)
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def readable(what: str, advice: str) -> Iterator[None]:
    """Whatever goes wrong while a file is read, from no such file to a foreign one, in one sentence."""
    try:
        yield
    except InterpError as error:
        raise InterpError(f"{what}: {error}") from None
    except BROKEN as error:
        problem = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise InterpError(f"{what} is missing, damaged or of another form ({problem}); {advice}.") from None
