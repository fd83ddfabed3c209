"""Training state in one safetensors file, written beside and renamed, so that a kill never spoils it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from interp_utils.dictionaries.adam import Adam
from interp_utils.dictionaries.dictionary import Dictionary
from interp_utils.errors import InterpError


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds besides counters: live tensors, filled in place when it is restored."""

    dictionary: Dictionary
    adam: Adam
    silent: Tensor
    plan: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        state = {f"dictionary.{name}": t.detach() for name, t in self.dictionary.state_dict().items()}
        for moment in ("means", "squares"):
            state |= {f"{moment}.{name}": t for name, t in getattr(self.adam, moment).items()}
        return state | {"count": self.adam.count, "silent": self.silent}

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to go on: the dictionary's shape and the whole plan."""
        d = self.dictionary
        shape = {"kind": d.kind, "d_in": d.d_in, "d_out": d.d_out, "width": d.width, "k": d.k}
        return json.loads(json.dumps({**shape, "transcoder": d.transcoder, **self.plan}))


def store(path: Path, saved: Saved, counters: dict[str, Any]) -> None:
    """Write a checkpoint.

    Raises:
        InterpError: the file cannot be written; the checkpoint before it is left as it was.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    metadata = {"identity": json.dumps(saved.identity()), "counters": json.dumps(counters)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(saved.tensors(), scratch, metadata=metadata)
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        scratch.unlink(missing_ok=True)
        raise InterpError(
            f"The checkpoint {path} could not be written ({error}); free some space or name another file. "
            "An older checkpoint there is untouched."
        ) from None


def restore(path: Path, saved: Saved) -> dict[str, Any] | None:
    """Fill the live tensors from a checkpoint and return its counters; None when there is none yet.

    Raises:
        InterpError: it belongs to another dictionary or configuration, or is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}
        identity, counters = json.loads(about["identity"]), json.loads(about["counters"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InterpError(f"The checkpoint {path} is damaged ({error}); delete it to start again.") from None
    own = saved.identity()
    if other := [name for name in own if identity.get(name) != own[name]]:
        was = ", ".join(f"{name} {identity.get(name)!r}, not {own[name]!r}" for name in other)
        raise InterpError(
            f"The checkpoint {path} is of another run ({was}); call with its configuration, name another file "
            "or delete it."
        )
    for name, tensor in saved.tensors().items():
        tensor.copy_(stored[name])
    return counters
