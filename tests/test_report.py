from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from interp_utils import pages, report
from interp_utils.errors import InterpError

MIME = "application/vnd.interp.claim+json"
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
BADGE = "[![Open in Colab](https://colab.example/badge.svg)](https://colab.example/nb)"
ROW = {
    "id": "grows",
    "notebook": "00_first",
    "source": "A paper <2024>",
    "claim": "Bigger & better <b>models</b>",
    "published": ".37 at layer 2",
    "control_description": "shuffled labels",
    "model": "small",
    "weights": "packaged:1",
    "value": 0.123456,
    "ci": [0.1, 0.15],
    "control": 0.001,
    "n": 40,
    "verdict": "not reproduced",
    "predicted": "reproduced",
    "recorded": {"value": 0.9, "ci": [0.9, 0.9], "verdict": "reproduced"},
    "contradicted": True,
}


def shown(html: str) -> nbformat.NotebookNode:
    return new_code_cell(
        "f()", execution_count=1, outputs=[new_output("display_data", data={"text/html": html})]
    )


def notebook(*cells: Any) -> nbformat.NotebookNode:
    return new_notebook(
        cells=[
            new_markdown_cell(f"{BADGE}\n\n# Where is *it* `x_1`?\n\n$a^2$ and $$\\frac{{b}}{{c}}$$"),
            *cells,
        ]
    )


def build_with(folder: Path, monkeypatch: pytest.MonkeyPatch, *cells: Any) -> Path:
    monkeypatch.setenv("INTERP_BUILD", str(folder))
    nbformat.write(notebook(*cells), folder / "00_first.ipynb")
    return folder


class Loads(HTMLParser):
    """Whatever a browser would ask a network for, found independently of the code under test."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster") or (tag == "link" and name == "href"):
                if not (value or "").startswith("data:"):
                    self.found.append(f"{tag} {name}={value}")
        if tag == "iframe":
            self.found.append(tag)

    def handle_data(self, data: str) -> None:
        self.found += re.findall(r"@import[^;]*|url\(\s*[\"']?http|fetch\(|import\s*\(|XMLHttpRequest", data)


def test_pages_load_nothing_and_are_titled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = shown(f'<figure><img alt="A rising line" src="{PIXEL}"></figure>')
    build_with(tmp_path, monkeypatch, figure)
    assert report.main([]) == 0
    page = (tmp_path / "00_first.html").read_text(encoding="utf-8")
    for name in ("00_first.html", "index.html"):
        html = (tmp_path / name).read_text(encoding="utf-8")
        assert Loads(html).found == []
        assert "default-src 'none'" in html and '<html lang="en">' in html
    assert "<title>Where is it x_1?</title>" in page
    assert re.search(r'<a href="https://colab\.example/nb">Open in Colab</a>', page)
    assert 'alt="A rising line"' in page
    assert "$$" not in page and ("<math" in page or "<pre>\\frac{b}{c}</pre>" in page)


@pytest.mark.parametrize(
    ("html", "word"),
    [
        (f'<img src="{PIXEL}">', "alt text"),
        (f'<img alt=" " src="{PIXEL}">', "alt text"),
        ('<script src="https://cdn.example/a.js"></script>', "cdn.example"),
        ('<script src="//cdn.example/a.js"></script>', "cdn.example"),
        ('<link rel="stylesheet" href="http://cdn.example/a.css">', "cdn.example"),
        ('<iframe src="https://cdn.example/"></iframe>', "cdn.example"),
        ("<style>@import 'a.css';</style>", "style"),
        ('<p style="background:url(https://cdn.example/a.png)">x</p>', "style"),
        ("<script>fetch('/x')</script>", "script"),
        ("<script type=module>import x from 'https://cdn.example/a.mjs'</script>", "script"),
    ],
)
def test_a_page_that_breaks_the_rules_fails_and_says_where(
    html: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = shown(html)
    build_with(tmp_path, monkeypatch, cell)
    assert report.main([]) == 1
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("00_first: ") and word in line and cell.id in line
    assert "✗ failed" in (tmp_path / "00_first.html").read_text(encoding="utf-8")


def test_a_bare_png_output_needs_alt_text_too(tmp_path: Path) -> None:
    picture = new_code_cell("plot()", outputs=[new_output("display_data", data={"image/png": PIXEL[22:]})])
    (problem,) = pages.page(tmp_path, "00_first", notebook(picture), {})
    assert "alt text" in problem


def test_ordinary_links_and_inline_pictures_are_fine() -> None:
    fine = '<a href="https://paper.example">p</a><svg><use href="#a"/></svg><style>a{b:url(data:x)}</style>'
    assert pages.problems(fine) == []


def test_saved_widget_state_does_not_hide_the_static_form(tmp_path: Path) -> None:
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/html": "<p>static form</p>"}
    nb = notebook(new_code_cell("w", outputs=[new_output("display_data", data=view)]))
    state = {"state": {"1": {}}, "version_major": 2, "version_minor": 0}
    nb.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": state}
    assert pages.page(tmp_path, "00_first", nb, {}) == []
    assert "static form" in (tmp_path / "00_first.html").read_text(encoding="utf-8")
    assert "widgets" in nb.metadata


def test_a_title_falls_back_to_the_stem() -> None:
    assert pages.title(new_notebook(cells=[new_markdown_cell("## Part")]), "03_x") == "03_x"
    assert pages.title(notebook(), "03_x") == "Where is it x_1?"


def test_the_index_shows_claims_escaped_with_words_for_every_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_with(tmp_path, monkeypatch, shown("x"))
    claim = new_code_cell("c()", outputs=[new_output("display_data", data={MIME: ROW, "text/plain": "row"})])
    nbformat.write(notebook(claim), tmp_path / "00_first.ipynb")
    reasons = ["cell 3 (f(<x>)): E: boom"]
    run = {"status": "failed", "reasons": reasons, "seconds": 61.0, "peak_mb": 2100, "cell_seconds": []}
    report.record_path(tmp_path, "00_first").write_text(json.dumps(run))
    assert report.main([]) == 0
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    for part in (
        "Bigger &amp; better &lt;b&gt;models&lt;/b&gt;",
        "A paper &lt;2024&gt;",
        "cell 3 (f(&lt;x&gt;)): E: boom",
        "✗ failed",
        "1 min 01 s",
        "2,100 MB",
        "✓ reproduced",
        "live sample: not reproduced",
        "0.1235 <small>[0.1, 0.15]</small>",
        "<td>0.9</td>",
        "shuffled labels",
        "⚠ contradicts its record",
        'href="00_first.html"',
    ):
        assert part in html, part
    assert html.count("<caption>") == 2 and '<th scope="col">' in html and '<th scope="row">' in html
    assert json.loads((tmp_path / "claims.json").read_text(encoding="utf-8")) == [ROW]


def test_no_executed_notebooks_and_damaged_ones_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INTERP_BUILD", str(tmp_path))
    assert report.main([]) == 2
    assert "make reproduce" in capsys.readouterr().err
    (tmp_path / "00_first.ipynb").write_text("[]")
    assert report.main([]) == 2
    assert "00_first.ipynb" in capsys.readouterr().err


def test_a_damaged_record_counts_as_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_with(tmp_path, monkeypatch)
    report.record_path(tmp_path, "00_first").write_text('{"status": "o')
    assert report.main([]) == 0
    assert "– unknown" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    pages.write(path, "old")
    with pytest.raises(UnicodeEncodeError):
        pages.write(path, "new \ud800")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_missing_notebook_is_named(tmp_path: Path) -> None:
    with pytest.raises(InterpError, match="05_gone"):
        report.read_notebook(tmp_path / "05_gone.ipynb")
