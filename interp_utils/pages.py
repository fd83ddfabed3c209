"""An executed notebook as one HTML page that opens from disk, offline, with a description for every image."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat

# The browser itself then refuses whatever would need a network.
POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; font-src data:; '
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
)
# nbconvert's page without the scripts it would load from elsewhere.
TEMPLATE = f"""{{%- extends 'lab/index.html.j2' -%}}
{{% block html_head_js %}}{{% endblock %}}
{{% block html_head_js_mathjax %}}{{% endblock %}}
{{% block html_head_js_mermaidjs %}}{{% endblock %}}
{{% block html_head_css %}}{POLICY}<style>
.jp-RenderedHTMLCommon img, svg {{ max-width: 100% }}
body > main {{ max-width: 68rem; margin: auto }}
.run-bar {{ font: 15px/1.5 system-ui, sans-serif; padding: .6em 1em; border-bottom: 1px solid #bbb }}
.run-bar a {{ color: #0b57d0; text-decoration: underline }}
</style>{{% endblock %}}
{{% block body_header %}}{{{{ super() }}}}@@bar@@{{% endblock %}}"""
SYMBOLS = {"reproduced": "✓", "partly": "◐", "not reproduced": "✗", "undecided": "?"}
SYMBOLS |= {"ok": "✓", "failed": "✗"}
NO_ALT = ("", "No description has been provided for this image")  # the second is nbconvert's filler
REMOTE = re.compile(r"\s*(https?:)?//")


def write(path: Path, text: str) -> None:
    """Replace a text file in one step, so that nobody ever reads half of it."""
    descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    try:
        with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def title(notebook: nbformat.NotebookNode, stem: str) -> str:
    """The notebook's H1 without its markup, or the stem."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (found := re.search(r"^#[ \t]+(.+)$", cell.source, re.M)):
            return re.sub(r"([*`])(\S.*?)\1", r"\2", found[1]).strip()
    return stem


def word(state: str) -> str:
    """A status or verdict as a symbol and its word, so that nothing depends on colour."""
    return f"{SYMBOLS.get(state, '–')} {escape(state)}"


def page(build: Path, stem: str, notebook: nbformat.NotebookNode, record: dict[str, Any]) -> list[str]:
    """Write `build/<stem>.html`, its status on top; return what is wrong with the page itself."""
    html = _export(notebook, title(notebook, stem))
    found = problems(html)
    reasons = list(dict.fromkeys([*record.get("reasons", []), *found]))
    state = word("failed" if reasons else record.get("status", "unknown"))
    lines = "".join(f"<br>{escape(reason)}" for reason in reasons)
    bar = f'<nav class="run-bar"><a href="index.html">All notebooks and claims</a> · {state}{lines}</nav>'
    write(build / f"{stem}.html", html.replace("@@bar@@", bar, 1))
    return found


def problems(html: str) -> list[str]:
    """Images without alt text, and references which a browser would follow by itself; both must be none."""
    check = _Check()
    check.feed(html)
    return check.problems


class _Check(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.cell, self.inside = "?", ""

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.inside = tag
        if attributes.get("id", "").startswith("cell-id="):
            self.cell = attributes["id"].removeprefix("cell-id=")
        if tag == "img" and attributes.get("alt", "").strip() in NO_ALT:
            self.problems.append(f"an image has no alt text (cell id {self.cell})")
        link = [] if tag in ("a", "area") else ["href", "xlink:href"]
        for name in ("src", "srcset", "poster", "data", *link):
            if REMOTE.match(attributes.get(name, "")):
                self.problems.append(f"<{tag}> loads {attributes[name].strip()[:80]} (cell id {self.cell})")
        self._style(attributes.get("style", ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "style":
            self._style(data)
        if self.inside == "script" and re.search(r"\bfetch\(|XMLHttpRequest|\bimport\b|WebSocket\(", data):
            self.problems.append(f"a script asks for the network (cell id {self.cell})")

    def _style(self, css: str) -> None:
        if re.search(r"@import|url\(\s*[\"']?(https?:)?//", css):
            self.problems.append(f"a style loads from the network (cell id {self.cell})")


def _export(notebook: nbformat.NotebookNode, name: str) -> str:
    from jinja2 import pass_context
    from nbconvert.exporters import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def block_math(self, body: str) -> str:
            return _formula(body, "block")

        def inline_math(self, body: str) -> str:
            return _formula(body, "inline")

        def latex_environment(self, name: str, body: str) -> str:
            return _formula(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")

    class Exporter(HTMLExporter):
        @pass_context
        def markdown2html(self, context: Any, source: str) -> str:
            attachments = context.get("cell", {}).get("attachments", {})
            renderer = Renderer(escape=False, attachments=attachments, exclude_anchor_links=True)
            return MarkdownWithMath(renderer=renderer).render(source)

    notebook = nbformat.from_dict(notebook)
    notebook.metadata.pop("widgets", None)  # with the saved state nbconvert hides every static fallback
    notebook.metadata["title"] = name
    html, _ = Exporter(raw_template=TEMPLATE).from_notebook_node(notebook)
    return re.sub(r'<img\b[^>]*\bsrc="(?:https?:)?//[^>]*>', _badge_text, html)


def _badge_text(tag: re.Match[str]) -> str:
    alt = re.search(r'\balt="([^"]*)"', tag[0])
    return alt[1] if alt else "(remote image)"


def _formula(latex: str, display: str) -> str:
    """A formula as MathML, which browsers draw by themselves; its LaTeX where there is no converter."""
    try:
        from latex2mathml.converter import convert

        return convert(latex.strip(), display=display)
    except Exception:
        tag = "pre" if display == "block" else "code"
        return f"<{tag}>{escape(latex.strip())}</{tag}>"
