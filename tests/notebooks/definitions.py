"""Take functions and constants out of a notebook, so that tests check what a reader copies."""

from __future__ import annotations

import ast
from types import SimpleNamespace
from typing import Any

import nbformat

from interp_utils.paths import ROOT


def definitions(stem: str, *names: str, **given: Any) -> SimpleNamespace:
    """The named top-level functions and constants of a notebook, with `given` as its other globals."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
    wanted, found = [], set()
    for cell in notebook.cells:
        if cell.cell_type != "code" or "%pip" in cell.source:
            continue
        for node in ast.parse(cell.source).body:
            own = {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()
            if isinstance(node, ast.Assign):
                own = {
                    name.id
                    for name in ast.walk(node)
                    if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
                }
            if own & set(names):
                wanted.append(node)
                found |= own & set(names)
    missing = set(names) - found
    assert not missing, f"{stem} defines no {', '.join(sorted(missing))}"
    scope = dict(given)
    exec(compile(ast.Module(wanted, []), f"{stem}.ipynb", "exec"), scope)
    return SimpleNamespace(**{name: scope[name] for name in names})
