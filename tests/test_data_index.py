"""The index of data files holds what lies below `data/`, and its check names every difference."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "data_index.py"
specification = importlib.util.spec_from_file_location("data_index", SCRIPT)
assert specification and specification.loader
data_index = importlib.util.module_from_spec(specification)
specification.loader.exec_module(data_index)


def test_the_index_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert data_index.main(["--check"]) == 0, capsys.readouterr().out


def test_the_index_names_what_changed_and_is_renewed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b.csv", "a/c.toml", "a/README.md", "a/.c.toml", ".hidden/d.csv", "e.toml.part"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")
    (tmp_path / "interp_utils").mkdir()
    assert data_index.main(["--check"], tmp_path) == 1
    assert data_index.main([], tmp_path) == 0
    index = json.loads((tmp_path / "interp_utils" / "data_index.json").read_text(encoding="utf-8"))
    assert list(index) == ["a/c.toml", "b.csv"]
    assert index["b.csv"] == hashlib.sha256(b"b.csv").hexdigest()
    assert data_index.main(["--check"], tmp_path) == 0
    capsys.readouterr()
    (tmp_path / "data" / "b.csv").write_text("other", encoding="utf-8")
    (tmp_path / "data" / "a" / "c.toml").rename(tmp_path / "data" / "a" / "d.toml")
    assert data_index.main(["--check"], tmp_path) == 1
    assert capsys.readouterr().out.splitlines() == [
        "data/a/c.toml: is registered but gone",
        "data/a/d.toml: is not registered",
        "data/b.csv: has changed",
        "run `make format`",
    ]
