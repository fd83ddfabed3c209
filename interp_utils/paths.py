"""Where things lie: data, build output and the model cache."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from interp_utils.errors import InterpError

ROOT = Path(__file__).resolve().parent.parent


def data_folder() -> Path:
    """`INTERP_DATA`, or `data/` beside the package."""
    return Path(os.environ.get("INTERP_DATA") or ROOT / "data")


def build_folder() -> Path:
    """`INTERP_BUILD`, or `build/` beside the package."""
    return Path(os.environ.get("INTERP_BUILD") or ROOT / "build")


def cache_folder() -> Path:
    """`INTERP_CACHE`, or a folder in the user's cache."""
    if os.environ.get("INTERP_CACHE"):
        return Path(os.environ["INTERP_CACHE"])
    from platformdirs import user_cache_path

    return user_cache_path("interp-notebooks")


def writable(folder: Path, what: str, variable: str) -> Path:
    """Create `folder` and prove that a file can be written there.

    Raises:
        InterpError: it cannot; names the folder and the variable that moves it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InterpError(
            f"The {what} {folder} cannot be written ({error.strerror}); set {variable} to a folder that can."
        ) from None
    return folder
