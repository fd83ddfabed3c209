"""Where things lie: data, build output and the model cache."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from interp_utils.errors import InterpError, nearest

ROOT = Path(__file__).resolve().parent.parent


def data_folder() -> Path:
    """`INTERP_DATA`, or `data/` beside the package."""
    return Path(os.environ.get("INTERP_DATA") or ROOT / "data")


def data_file(relative: str) -> Path:
    """A file below `data/`: from the data folder or, in a bare installation, from the release.

    A bare installation has neither a clone's `data/` beside the package nor `INTERP_DATA`; there the file is
    fetched once into the cache and verified against `data_index.json`.

    Args:
        relative: path below `data/`, with slashes, such as "facts/entities.csv".

    Raises:
        InterpError: no such file, or it cannot be fetched, or what arrives has the wrong hash.
    """
    if path := find_data(relative):
        return path
    if relative in (index := _index()):
        raise InterpError(
            f"The data file {relative!r} is missing from {data_folder()}; restore it from git or set "
            "INTERP_DATA to a complete data folder."
        )
    where = f"in {data_folder()}" if _has_data_folder() else "among those of the release"
    raise InterpError(f"There is no data file {relative!r} {where}.{nearest(relative, index)}")


def find_data(relative: str) -> Path | None:
    """Like `data_file`, but None where there is no such file.

    Raises:
        InterpError: a registered file cannot be fetched, or what arrives has the wrong hash.
    """
    # What a study wrote in a bare installation comes before what the release has.
    if (path := data_folder() / relative).is_file():
        return path
    sha256 = None if _has_data_folder() else _index().get(relative)
    return _fetch(relative, sha256) if sha256 else None


def release() -> tuple[str, str]:
    """The repository's address and the version, as the installed package states them.

    Raises:
        InterpError: the package is imported without being installed.
    """
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        about = metadata("interp_utils")
    except PackageNotFoundError:
        raise InterpError(
            "interp_utils is not installed, so its release is unknown; install it, clone the repository "
            "or set INTERP_DATA to its data folder."
        ) from None
    addresses = dict(line.split(", ", 1) for line in about.get_all("Project-URL") or [])
    return addresses["Repository"], about["Version"]


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


def _has_data_folder() -> bool:
    # Some packages install a stray folder `data` beside ours, so the folder alone proves nothing.
    return bool(os.environ.get("INTERP_DATA")) or (ROOT / "data" / "claims.toml").is_file()


def _index() -> dict[str, str]:
    """sha256 of every file below `data/`, by its path; written by `.ci/data_index.py`."""
    return json.loads(Path(__file__).with_name("data_index.json").read_text(encoding="utf-8"))


def _fetch(relative: str, sha256: str) -> Path:
    """The release's copy of a data file, downloaded unless the cache has it intact."""
    import pooch

    address, version = release()
    url = f"{address}/raw/v{version}/data/{relative}"
    path = cache_folder() / "data" / version / relative
    if path.is_file() and pooch.file_hash(str(path)) == sha256:
        return path
    writable(path.parent, "cache folder", "INTERP_CACHE")
    pooch.get_logger().setLevel("WARNING")
    advice = "clone the repository or set INTERP_DATA to its data folder"
    try:
        print(f"fetching data/{relative} of release {version}", file=sys.stderr)
        pooch.retrieve(url, f"sha256:{sha256}", path.name, path.parent, downloader=pooch.HTTPDownloader())
    except OSError as error:
        # The errors of requests are OSErrors too, and have a response if the server gave one.
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"HTTP {status}" if status else error.strerror or type(error).__name__
        raise InterpError(
            f"The data file {relative!r} could not be fetched from {url} ({reason}); "
            f"check the network, {advice}."
        ) from None
    except ValueError:
        raise InterpError(
            f"The data file {relative!r} from {url} does not have its registered sha256; try again, {advice}."
        ) from None
    return path
