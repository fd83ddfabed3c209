"""Write interp_utils/data_index.json: the sha256 of every file below data/, by its path.

A bare installation verifies with it what it fetches from the release. With `--check`, nothing is written: one
line per file that the index lacks, no longer needs or has with another hash, and exit code 1 if there is any.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def indexed(path: Path) -> bool:
    """Whether the package may ask for this file: neither a page for readers nor hidden or half written."""
    return path.suffix not in {".md", ".part"} and not any(part.startswith(".") for part in path.parts)


def hashes(data: Path) -> dict[str, str]:
    """The hash of each file below `data`, sorted by path."""
    below = {path.relative_to(data): path for path in data.rglob("*") if path.is_file()}
    return {
        name.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in sorted(below.items(), key=lambda item: item[0].as_posix())
        if indexed(name)
    }


def differences(registered: dict[str, str], present: dict[str, str]) -> list[str]:
    """One line per file on which the index and the data disagree."""
    lines = []
    for name in sorted(registered.keys() | present.keys()):
        if name not in registered:
            lines.append(f"data/{name}: is not registered")
        elif name not in present:
            lines.append(f"data/{name}: is registered but gone")
        elif registered[name] != present[name]:
            lines.append(f"data/{name}: has changed")
    return lines


def main(arguments: list[str], root: Path = ROOT) -> int:
    index, present = root / "interp_utils" / "data_index.json", hashes(root / "data")
    if "--check" not in arguments:
        index.write_text(json.dumps(present, indent=1) + "\n", encoding="utf-8")
        return 0
    registered = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    lines = differences(registered, present)
    print(
        "\n".join([*lines, "run `make format`"] if lines else [f"{len(present)} data files are registered"])
    )
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
