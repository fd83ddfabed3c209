"""The benchmarks of the grid and of the index fail when they should."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from interp_utils.paths import ROOT


def module_of(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return module_of("patchscope_grid")


def result(targets: dict[str, float], model: str = "gemma-3-270m", factor: float = 1.0) -> dict[str, Any]:
    return {
        "model": model,
        "next token": {"cells that differ": {"batched": 0, "package": 0}},
        "generated": {"cells that differ": 0},
        "times faster": {name: factor * target for name, target in targets.items()},
    }


def test_targets(benchmark: Any) -> None:
    targets = benchmark.TARGETS
    assert sorted(targets.values()) == [0.95, 4, 12, 30]
    assert benchmark.failures(result(targets)) == []
    slow = benchmark.failures(result(targets, factor=0.9))
    assert len(slow) == 4 and slow[0].startswith(
        "27.00 times faster next token, against one cell per forward"
    )
    assert benchmark.failures(result(targets, "smollm2-135m-instruct", factor=0.9)) == []


@pytest.mark.parametrize("model", ["gemma-3-270m", "smollm2-135m-instruct"])
def test_cells_that_differ(benchmark: Any, model: str) -> None:
    differing = result(benchmark.TARGETS, model)
    differing["next token"]["cells that differ"]["batched"] = 2
    differing["generated"]["cells that differ"] = 1
    assert benchmark.failures(differing) == ["2 cells differ: batched.", "1 cells differ: generated."]


def test_targets_of_the_index() -> None:
    index = module_of("feature_index")
    assert index.failures(180, 4.0, 0.2) == []
    slow = index.failures(181, 4.1, 0.3)
    assert slow[0] == "A million rows take 181 s, not 180 at most." and len(slow) == 3
