"""Training state in one safetensors file, which a kill never spoils."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from interp_utils.dictionaries.adam import Adam
from interp_utils.dictionaries.dictionary import Dictionary
from interp_utils.dictionaries.files import readable, replace
from interp_utils.dictionaries.parallel import Ranks
from interp_utils.errors import InterpError


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds besides counters: live tensors, filled in place when it is restored."""

    dictionary: Dictionary
    adam: Adam
    silent: Tensor
    plan: dict[str, Any]
    data: str | None  # see `batches.fingerprint`

    def tensors(self) -> dict[str, Tensor]:
        state = {f"dictionary.{name}": t.detach() for name, t in self.dictionary.state_dict().items()}
        for moment in ("means", "squares"):
            state |= {f"{moment}.{name}": t for name, t in getattr(self.adam, moment).items()}
        return state | {"count": self.adam.count, "silent": self.silent}

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to go on: the dictionary's shape, the whole plan and the data."""
        d = self.dictionary
        shape = {"kind": d.kind, "d_in": d.d_in, "d_out": d.d_out, "width": d.width, "k": d.k}
        return json.loads(json.dumps({**shape, "transcoder": d.transcoder, **self.plan, "data": self.data}))


def store(path: Path, saved: Saved, counters: dict[str, Any]) -> None:
    """Write a checkpoint.

    Raises:
        InterpError: the file cannot be written; the checkpoint before it is left as it was.
    """
    metadata = {"identity": json.dumps(saved.identity()), "counters": json.dumps(counters)}
    try:
        replace(path, lambda scratch: save_file(saved.tensors(), scratch, metadata=metadata))
    except (OSError, SafetensorError) as error:
        raise InterpError(
            f"The checkpoint {path} could not be written ({error}); free some space or name another file. "
            "An older checkpoint there is untouched."
        ) from None


def restore(path: Path | None, saved: Saved) -> dict[str, Any] | None:
    """Fill the live tensors from a checkpoint and return its counters; None when there is none yet.

    Raises:
        InterpError: it belongs to another dictionary, configuration or data, or is damaged.
    """
    if path is None or not path.exists():
        return None
    own, live = saved.identity(), saved.tensors()
    with readable(f"The checkpoint {path}", "delete it to start again"):
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            identity, counters = dict(json.loads(about["identity"])), dict(json.loads(about["counters"]))
            other = [name for name in own if identity.get(name) != own[name]]
            for name, tensor in ({} if other else live).items():
                tensor.copy_(file.get_tensor(name))
    if other:
        was = ", ".join(f"{name} {identity.get(name)!r}, not {own[name]!r}" for name in other)
        raise InterpError(
            f"The checkpoint {path} is of another run ({was}); call with its configuration and data, name "
            "another file or delete it."
        )
    return counters


def resume(path: Path | None, saved: Saved, ranks: Ranks) -> dict[str, Any] | None:
    """`restore` by the first process, whose state and counters all others then take over.

    Raises:
        InterpError: as `restore`, in every process; or the processes are not given the same run.
    """
    found, problem = None, None
    if ranks.rank == 0:
        try:
            found = restore(path, saved)
        except InterpError as error:
            problem = error
    everyone = ranks.gather((saved.identity(), found, problem))
    own, found, problem = everyone[0]
    if problem:
        raise problem
    if other := sorted({name for his, *_ in everyone for name in own if his[name] != own[name]}):
        raise InterpError(
            f"The processes differ in {', '.join(other)}; call train with the same in all of them."
        )
    ranks.copy_first(*saved.tensors().values())
    return found
