"""The structure check accepts a complete notebook and names each part that is missing or wrong."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "check_notebooks.py"
specification = importlib.util.spec_from_file_location("check_notebooks", SCRIPT)
assert specification and specification.loader
check_notebooks = importlib.util.module_from_spec(specification)
sys.modules["check_notebooks"] = check_notebooks
specification.loader.exec_module(check_notebooks)

PROJECT = check_notebooks.Project("https://github.com/some/where", "1.2.3")
NAME = "01_example.ipynb"
BADGE = "https://colab.research.google.com/github/some/where/blob/v1.2.3/notebooks/01_example.ipynb"

HEADER = f"""# Does the example work?

[![Open in Colab](https://example.org/badge.svg)]({BADGE})

Paper: [Examples (Author 2024)](https://example.org/paper). Time and memory: 1 minute, 1 GB.

## What you will learn

That it does."""
PARAMETERS = 'MODEL: str = "small"  # which model\nSEED: int = 0\nPROFILE: str = "quick"'
SETUP = """import sys

if "google.colab" in sys.modules:
    %pip install -q "git+https://github.com/some/where@v1.2.3"
    %pip install -q --no-deps -r https://github.com/some/where/raw/v1.2.3/requirements-models.txt

from interp_utils import seed_everything

seed_everything(SEED)"""
EXERCISE = (
    "### Exercise: change it\n\nEasy, 5 minutes.\n\n<details><summary>Solution</summary>Change it.</details>"
)

# Cells of a complete notebook, by the name under which the cases below change them.
CELLS: dict[str, nbformat.NotebookNode] = {
    "header": new_markdown_cell(HEADER),
    "parameters": new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
    "setup": new_code_cell(SETUP),
    "prediction": new_markdown_cell("## Experiment\n\n**Prediction.** It works."),
    "figure": new_code_cell('show(figure, alt="A line that rises", caption="It rises")'),
    "claim": new_code_cell('claim("example", 1.0, model=model)'),
    "limits": new_markdown_cell("## Limits\n\nOne example."),
    "exercises": new_markdown_cell(f"## Exercises\n\n{EXERCISE}"),
    "second exercise": new_markdown_cell("### Exercise: break it\n\nHard, 20 min."),
    "solution": new_code_cell("broken = True", metadata={"tags": ["solution"]}),
    "references": new_markdown_cell("## References\n\nAuthor 2024."),
}
Cells = dict[str, nbformat.NotebookNode]


def problems(folder: Path, cells: Cells) -> list[str]:
    path = folder / NAME
    path.write_text(json.dumps({**new_notebook(), "cells": list(cells.values())}), encoding="utf-8")
    return check_notebooks.check(path, PROJECT)


@pytest.fixture
def cells() -> Cells:
    return {name: nbformat.from_dict(dict(cell)) for name, cell in CELLS.items()}


def test_a_complete_notebook_has_no_problems(tmp_path: Path, cells: Cells) -> None:
    assert problems(tmp_path, cells) == []


def replace(name: str, old: str, new: str) -> Callable[[Cells], None]:
    def change(cells: Cells) -> None:
        assert old in cells[name].source
        cells[name].source = cells[name].source.replace(old, new)

    return change


def drop(name: str) -> Callable[[Cells], None]:
    return lambda cells: cells.pop(name) and None


def metadata(name: str, **fields: object) -> Callable[[Cells], None]:
    return lambda cells: cells[name].update(fields)


def late_prediction(cells: Cells) -> None:
    cells["late"] = cells.pop("prediction")
    cells["late"].source = "**Prediction.** Said afterwards."


def many_cells(cells: Cells) -> None:
    cells.update({f"more {n}": new_markdown_cell("More.") for n in range(40)})


def many_exercises(cells: Cells) -> None:
    cells.update({f"more {n}": new_markdown_cell(EXERCISE) for n in range(3)})


BROKEN: list[tuple[Callable[[Cells], None], str]] = [
    (replace("header", "# Does", "Does"), "cell 1: must start with a title"),
    (drop("header"), "cell 1: must start with a title"),
    (replace("header", "work?", "work"), "cell 1: must ask exactly one question"),
    (replace("header", "That it does.", "Is it so?"), "cell 1: must ask exactly one question"),
    (replace("limits", "## Limits", "# Limits"), "cell 7: has a second title"),
    (replace("header", "v1.2.3/notebooks/01", "main/notebooks/01"), "cell 1: needs a Colab badge"),
    (replace("header", "01_example.ipynb", "02_other.ipynb"), "cell 1: needs a Colab badge"),
    (replace("header", "(https://example.org/paper)", ""), "cell 1: needs a link to the paper"),
    (replace("header", "Time and memory", "Cost"), "cell 1: must say 'Time and memory'"),
    (replace("header", "What you will learn", "Aims"), "cell 1: needs a heading 'What you will learn'"),
    (metadata("parameters", metadata={}), "whole notebook: needs one cell tagged 'parameters', has 0"),
    (replace("parameters", "MODEL: str", "MODEL"), "cell 2: must define MODEL with a type"),
    (replace("parameters", "SEED: int = 0", ""), "cell 2: must define SEED with a type"),
    (replace("parameters", "PROFILE", "SIZE"), "cell 2: must define PROFILE with a type"),
    (replace("setup", "@v1.2.3", "@v1.2.2"), "whole notebook: the set-up cell needs the lines"),
    (replace("setup", "raw/v1.2.3", "raw/v1.2.2"), "whole notebook: the set-up cell needs the lines"),
    (replace("setup", "--no-deps ", ""), "whole notebook: the set-up cell needs the lines"),
    (replace("setup", "seed_everything(SEED)", "seed_everything(1)"), "must call seed_everything(SEED)"),
    (drop("figure"), "whole notebook: has no figure"),
    (replace("figure", "alt=", "title="), "cell 5: show() without alt"),
    (replace("figure", ', caption="It rises"', ""), "cell 5: show() without caption"),
    (replace("limits", "One", "![](a.png) One"), "cell 7: has an image without alt text"),
    (replace("limits", "One", '<img src="a.png"> One'), "cell 7: has an image without alt text"),
    (drop("claim"), "whole notebook: makes no claim"),
    (replace("prediction", "**Prediction.**", "Perhaps"), "whole notebook: needs a prediction"),
    (late_prediction, "whole notebook: needs a prediction"),
    (drop("limits"), "whole notebook: needs a heading 'Limits'"),
    (replace("exercises", "## Exercises", "## Tasks"), "whole notebook: needs a heading 'Exercises'"),
    (drop("references"), "whole notebook: needs a heading 'References'"),
    (replace("limits", "## Limits", "#### Limits"), "cell 7: heading 'Limits' skips a level"),
    (drop("second exercise"), "needs two to four headings '### Exercise', has 1"),
    (many_exercises, "needs two to four headings '### Exercise', has 5"),
    (replace("exercises", "Easy", "Simple"), "cell 8: an exercise must say easy, medium or hard"),
    (replace("exercises", "5 minutes", "a moment"), "cell 8: an exercise must say how many minutes"),
    (replace("exercises", "<details>", "<p>"), "cell 8: an exercise needs a solution"),
    (drop("solution"), "cell 9: an exercise needs a solution"),
    (metadata("claim", outputs=[new_output("stream", text="1")]), "cell 6: has outputs"),
    (metadata("claim", execution_count=3), "cell 6: has outputs or an execution count"),
    (replace("claim", "claim(", "%%time\nclaim("), "cell 6: uses %%time"),
    (replace("claim", "claim(", "%%timeit -n 1\nclaim("), "cell 6: uses %%time"),
    (replace("claim", "claim(", "x = 1\n" * 40 + "claim("), "cell 6: has 41 lines, at most 40"),
    (replace("claim", "claim(", "def claim(:\n("), "cell 6: is not valid Python"),
    (many_cells, "whole notebook: has 51 cells, at most 45"),
    (lambda cells: cells["claim"].update(id=cells["figure"].id), "cell 6: has no cell id of its own"),
    (lambda cells: cells["claim"].pop("id") and None, "cell 6: has no cell id of its own"),
]


@pytest.mark.parametrize(
    ("change", "message"), BROKEN, ids=[f"{n}: {m[:50]}" for n, (_, m) in enumerate(BROKEN)]
)
def test_each_fault_is_named(
    tmp_path: Path, cells: Cells, change: Callable[[Cells], None], message: str
) -> None:
    change(cells)
    found = problems(tmp_path, cells)
    assert any(line.startswith(f"{NAME}: ") and message in line for line in found), found


def test_headings_in_code_fences_and_images_with_alt_are_left_alone(tmp_path: Path, cells: Cells) -> None:
    cells[
        "limits"
    ].source += '\n\n```python\n# a comment\n```\n\n![A dot](a.png) <img src="b.png" alt="A line">'
    assert problems(tmp_path, cells) == []


def test_magics_and_shell_lines_are_read(tmp_path: Path, cells: Cells) -> None:
    cells["claim"].source = "%matplotlib inline\n!ls\n" + cells["claim"].source
    assert problems(tmp_path, cells) == []


def test_a_file_that_is_no_notebook_is_named(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("{", encoding="utf-8")
    assert check_notebooks.check(tmp_path / NAME, PROJECT)[0].startswith(f"{NAME}: is not a notebook")


def test_badges_and_install_lines_are_renewed(tmp_path: Path, cells: Cells) -> None:
    replace("header", "some/where/blob/v1.2.3", "old/place/blob/main")(cells)
    replace("setup", "some/where@v1.2.3", "old/place@v0.9")(cells)
    replace("setup", "some/where/raw/v1.2.3", "old/place/raw/v0.9")(cells)
    path = tmp_path / NAME
    path.write_text(json.dumps({**new_notebook(), "cells": list(cells.values())}), encoding="utf-8")
    assert len(check_notebooks.check(path, PROJECT)) == 2
    path.write_text(PROJECT.renew(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert check_notebooks.check(path, PROJECT) == []
