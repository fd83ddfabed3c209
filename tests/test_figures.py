"""Figures, token strips, tables and text grids: what reaches the page, and what is refused."""

from __future__ import annotations

import base64
import colorsys
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from interp_utils import figures, tables
from interp_utils.errors import InterpError
from interp_utils.figures import contrast, ink, show, table, text_grid, token_strip, use_style, visible

ALT = "A line that rises from 0 to 1"
NASTY = '<script>alert("x & y")</script>'
PNG = re.compile(r'src="data:image/png;base64,([^"]+)"')


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    shown: list[str] = []
    monkeypatch.setattr("IPython.display.display", lambda item: shown.append(item.data))
    return shown


@pytest.fixture
def style() -> Iterator[None]:
    with matplotlib.rc_context():
        use_style()
        yield
    plt.close("all")


def drawing() -> Any:
    fig, axes = plt.subplots()
    axes.plot([0, 1], label="rise")
    axes.legend(title="lines")
    axes.set(xlabel="layer", title="a title")
    return fig


class Page(HTMLParser):
    """Tags with their attributes and the text, as a browser would read them; complains of unbalanced tags."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(markup)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_show_displays_once_closes_and_escapes(page: list[str], style: None) -> None:
    fig = drawing()
    show(fig, alt=f"Look at this {NASTY}", caption=NASTY)
    (markup,) = page
    read = Page(markup)
    assert read.attributes("img")[0]["alt"] == f"Look at this {NASTY}" and read.text == NASTY
    assert not read.attributes("script")
    png = base64.b64decode(PNG.findall(markup)[0])
    assert png.startswith(b"\x89PNG") and b"tEXt" not in png and b"matplotlib" not in png
    assert not plt.fignum_exists(fig.number)


def test_same_drawing_gives_same_bytes(page: list[str], style: None) -> None:
    for _ in range(2):
        show(drawing(), alt=ALT, caption="A rise.")
        token_strip(["a", "b"], [0.1, -0.2], alt=ALT)
    assert page[:2] == page[2:]


@pytest.mark.parametrize(
    ("alt", "caption"), [("", "text"), ("a line", "text"), (" " * 30, "text"), (ALT, " ")]
)
def test_figures_without_words_are_refused(page: list[str], style: None, alt: str, caption: str) -> None:
    with pytest.raises(InterpError, match="alt text|caption is empty"):
        show(drawing(), alt=alt, caption=caption)
    assert page == []


def test_show_takes_axes_and_refuses_other_things(page: list[str], style: None) -> None:
    show(drawing().axes[0], alt=ALT, caption="A rise.")
    assert len(page) == 1
    with pytest.raises(InterpError, match="got a list"):
        show([1, 2], alt=ALT, caption="A rise.")


def test_pictures_are_also_written_where_asked(
    page: list[str], style: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERP_FIGURES", str(tmp_path / "new"))
    monkeypatch.setenv("INTERP_NOTEBOOK", "09_entities")
    monkeypatch.setattr(figures, "_counter", iter([1, 2]))
    for _ in range(2):
        show(drawing(), alt=ALT, caption="A rise.")
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["09_entities-1.png", "09_entities-2.png"]
    assert (tmp_path / "new" / names[0]).read_bytes() == base64.b64decode(PNG.findall(page[0])[0])


def test_style_is_readable(style: None) -> None:
    axes = drawing().axes[0]
    words = [axes.xaxis.label, axes.title, *axes.get_xticklabels(), *axes.get_legend().get_texts()]
    assert min(word.get_fontsize() for word in words) >= 10
    assert axes.get_legend().get_title().get_fontsize() >= 10
    assert not axes.spines["top"].get_visible() and not axes.spines["right"].get_visible()
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    assert len(set(colours)) == 10
    assert min(contrast(matplotlib.colors.to_hex(colour), "#ffffff") for colour in colours[:4]) >= 3


def test_contrast_is_that_of_wcag() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#ffffff", "#767676") == pytest.approx(4.54, abs=0.01)
    assert contrast("#777777", "#777777") == 1


def test_ink_reads_on_every_colour() -> None:
    grid = np.linspace(0, 1, 12)
    for hue in grid:
        for saturation in grid:
            for light in grid:
                rgb = colorsys.hls_to_rgb(hue, light, saturation)
                colour = matplotlib.colors.to_hex(rgb)
                assert contrast(ink(colour), colour) >= 4.5


@pytest.mark.parametrize("low", [0.0, -1.0, -0.1])
def test_token_text_reads_on_its_box(page: list[str], low: float) -> None:
    values = np.linspace(low, 1.0, 201)
    token_strip(["t"] * 201, list(values), alt=ALT)
    boxes = re.findall(r"background:(#\w{6});color:(#\w{6})", page[0])
    assert len(boxes) == 201
    assert min(contrast(background, colour) for background, colour in boxes) >= 4.5


def test_token_strip_prints_values_and_hidden_characters(page: list[str]) -> None:
    token_strip([" a", "\n", "<b>", ""], [0.25, 1, 0, 0.5], alt=f'{ALT} "quoted"', caption="By <layer>.")
    read = Page(page[0])
    assert read.text == "·a0.25⏎1.00<b>0.00∅0.50By <layer>. Colour: 0 (dark blue) to 1.00 (yellow)."
    assert read.attributes("div")[0] | {"style": None} == {
        "role": "img",
        "aria-label": f'{ALT} "quoted"',
        "style": None,
    }


def test_both_signs_are_coloured_symmetrically(page: list[str]) -> None:
    token_strip(["a", "b", "c", "d"], [-2, 0, 1, 0.001], alt=ALT, fmt="{:+.1f}")
    colours = re.findall(r"background:(#\w{6})", page[0])
    red, green, blue = (int(colours[1][start : start + 2], 16) for start in (1, 3, 5))
    assert max(red, green, blue) - min(red, green, blue) < 6  # zero is neutral
    assert colours[0] == matplotlib.colors.to_hex(matplotlib.colormaps["RdBu_r"](0.0))
    assert colours[2] == matplotlib.colors.to_hex(matplotlib.colormaps["RdBu_r"](0.75))
    assert "Colour: -2.0 (blue) to +2.0 (red)." in Page(page[0]).text


def test_one_sign_is_coloured_by_magnitude(page: list[str]) -> None:
    token_strip(["a", "b"], [-4, -1], alt=ALT)
    token_strip(["a", "b"], [4, 1], alt=ALT)
    token_strip(["a", "b"], [0, 0], alt=ALT)
    colours = [re.findall(r"background:(#\w{6})", markup) for markup in page]
    assert colours[0] == colours[1] and colours[2][0] == colours[2][1]
    assert "Colour: 0 (dark blue) to -4.00 (yellow)." in Page(page[0]).text


@pytest.mark.parametrize(
    ("tokens", "values", "words"),
    [([], [], "0 and 0"), (["a"], [1, 2], "1 and 2"), (["a"], [float("nan")], "not finite")],
)
def test_bad_strips_say_what_is_wrong(tokens: list[str], values: list[float], words: str) -> None:
    with pytest.raises(InterpError, match=words):
        token_strip(tokens, values, alt=ALT)
    with pytest.raises(InterpError, match="alt text"):
        token_strip(["a"], [1.0], alt="short")


def test_visible_leaves_letters_and_shows_the_rest() -> None:
    assert visible("Ġcafé 東京") == "Ġcafé·東京"
    assert visible("\t\u00a0\u200b\x07\ud800") == "⇥\\u00a0\\u200b\\u0007\\ud800"


def test_table_has_scopes_alignment_and_formats(page: list[str]) -> None:
    frame = pd.DataFrame(
        {"n": [12345678, 2], "share": [0.123456, None], "word": [NASTY, "b"], "ok": [True, False]}
    )
    frame.index = pd.Index(["<one>", "two"], name="layer")
    table(frame, caption="A & B", fmt={"share": "{:.1%}"})
    read = Page(page[0])
    scopes = [attributes["scope"] for attributes in read.attributes("th")]
    assert scopes == ["col"] * 5 + ["row"] * 2
    heads = [str(head["style"]).endswith("right") for head in read.attributes("th")]
    assert heads == [False, True, True, False, False, False, False]
    sides = [re.findall("text-align:(\\w+)", str(cell["style"]))[-1] for cell in read.attributes("td")[:4]]
    assert sides == ["right", "right", "left", "left"]
    assert read.text == f"A & Blayernsharewordok<one>1234567812.3%{NASTY}Truetwo2–bFalse"


def test_default_index_gives_way_to_the_first_column(page: list[str]) -> None:
    frame = pd.DataFrame({"layer": [0, 1], "score": [1 / 3, 1e-9]})
    table(frame, caption="Scores")
    table(frame, caption="Scores", fmt="{:.2f}")
    table(frame.set_index("layer").T, caption="Scores")
    assert Page(page[0]).text == "Scoreslayerscore00.333311e-09"
    assert Page(page[1]).text == "Scoreslayerscore00.3310.00"
    assert Page(page[2]).text == "Scores01score0.33331e-09"
    assert [attributes["scope"] for attributes in Page(page[0]).attributes("th")] == [
        "col",
        "col",
        "row",
        "row",
    ]


def test_several_levels_stay_readable(page: list[str]) -> None:
    index = pd.MultiIndex.from_tuples([("a", 0), ("b", 1)], names=["kind", "layer"])
    columns = pd.MultiIndex.from_tuples([("score", "mean"), ("score", "sd")])
    table(pd.DataFrame([[1.5, 2.0], [3.0, np.nan]], index=index, columns=columns), caption="Levels")
    assert Page(page[0]).text == "Levelskindlayerscore / meanscore / sda01.52b13–"


@pytest.mark.parametrize("draw", [table, text_grid])
def test_empty_tables_and_captions_are_refused(draw: Any) -> None:
    with pytest.raises(InterpError, match="table is empty"):
        draw(pd.DataFrame({"a": []}), caption="text")
    with pytest.raises(InterpError, match="caption is empty"):
        draw(pd.DataFrame({"a": ["b"]}), caption="")


def test_format_of_an_absent_column_is_refused() -> None:
    with pytest.raises(InterpError, match="no column 'scor'. Did you mean 'score'"):
        table(pd.DataFrame({"score": [1.0]}), caption="text", fmt={"scor": "{:.1f}"})


def test_text_grid_marks_with_words_and_colour(page: list[str]) -> None:
    frame = pd.DataFrame({"x": ["Diana, Princess <of> Wales", "a+b"]}, index=pd.Index([0, 5], name="layer"))
    text_grid(frame, caption="Texts", highlight={"Diana": "name", "Diana, Princess": "title", "+": "<sign>"})
    read = Page(page[0])
    assert read.text == "Textslayerx0Diana, Princess [title] <of> Wales5a+ [<sign>]b"
    marks = read.attributes("mark")
    assert len(marks) == 2 and marks[0]["style"] != marks[1]["style"]
    assert page[0].count("color:#000") == 2
    assert min(contrast(background, "#000000") for background in tables.MARKS) >= 4.5
    for empty in ({"": "name"}, {"Diana": ""}):
        with pytest.raises(InterpError, match="neither may be empty"):
            text_grid(frame, caption="Texts", highlight=empty)


def test_a_kernel_shows_each_figure_once() -> None:
    from nbclient import NotebookClient

    source = (
        "%matplotlib inline\nfrom matplotlib import pyplot as plt\nfrom interp_utils.figures import show\n"
        "fig, axes = plt.subplots()\naxes.plot([0, 1])\n"
        f"show(fig, alt={ALT!r}, caption='A rise.')"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    assert output.output_type == "display_data" and output.data["text/html"].startswith("<figure>")


def test_the_package_does_not_import_matplotlib() -> None:
    code = "import sys, interp_utils, interp_utils.figures; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
