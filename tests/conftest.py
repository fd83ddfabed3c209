"""Tests never ask a model hub for anything, use one thread, and check shapes and types at run time."""

from __future__ import annotations

import os
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import checked, families
from tests.oracle import Oracle

checked.install()  # before the package's first import, so `load_model` is imported where it is called
torch.set_num_threads(1)


def load(name: str | Path, **options: Any) -> Any:
    from interp_utils.models import load_model

    return load_model(str(name), **options)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "model: needs the real packaged models (deselect with -m 'not model')")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Convert the packaged models, if they are not yet, beside the tests that need none."""
    code = "from interp_utils.weights import REGISTRY, converted; [converted(s) for s in REGISTRY.values()]"
    subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("model") is not None)  # stable: real models last


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the tiny model of a family, built once."""
    root = tmp_path_factory.mktemp("families")

    def folder(family: str) -> Path:
        path = root / family
        return path if path.exists() else families.build(path, family)

    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Callable[[str], Path]) -> Callable[..., Any]:
    """Tiny model of a family through `load_model`, loaded once."""
    loaded: dict[tuple[str, Any], Any] = {}

    def model(family: str, remote: Any = False) -> Any:
        key = (family, remote)
        if key not in loaded:
            loaded[key] = load(tiny_folder(family), remote=remote)
        return loaded[key]

    return model


@pytest.fixture(params=families.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str, tiny_model: Callable[..., Any]) -> Any:
    """The tiny model of each family in turn."""
    return tiny_model(family)


@pytest.fixture
def oracle(family: str, tiny_folder: Callable[[str], Path]) -> Oracle:
    """The same weights as plain transformers, edited by plain forward hooks."""
    return Oracle(families.raw_model(tiny_folder(family)))


@pytest.fixture
def llama(tiny_model: Callable[..., Any]) -> Any:
    """One tiny model, where the family does not matter."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def smollm2() -> Any:
    return load("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def gemma() -> Any:
    return load("gemma-3-270m")
