"""Tables and grids of text as plain HTML: headers are marked, text is escaped, colour never carries meaning alone."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Callable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

from interp_utils.errors import InterpError, nearest

if TYPE_CHECKING:
    import pandas as pd

MARKS = ("#ffe08a", "#b5e2ff", "#ffc9de", "#c9f2c7")  # light enough for black text
_CELL = "padding:.25em .6em;border-bottom:1px solid #8888;vertical-align:top"
_TEXT = "text-align:left;white-space:pre-wrap;overflow-wrap:anywhere;max-width:32em;font-family:monospace"


def table(df: pd.DataFrame, *, caption: str, fmt: str | Mapping[str, str] | None = None) -> None:
    """Display a small table; see `table_html`."""
    display_html(table_html(df, caption=caption, fmt=fmt))


def table_html(df: pd.DataFrame, *, caption: str, fmt: str | Mapping[str, str] | None = None) -> str:
    """A small accessible HTML table.

    The index gives the row headers; if it is the default 0, 1, 2..., the first column does instead.

    Args:
        fmt: how fractions are written, such as "{:.3f}", or a format for each column that needs its own;
            four significant digits where nothing is said.

    Raises:
        InterpError: the table or the caption is empty, or `fmt` names an absent column.
    """
    columns = {} if fmt is None or isinstance(fmt, str) else dict(fmt)
    for column in columns:
        if column not in df.columns:
            raise InterpError(
                f"The table has no column {column!r}.{nearest(str(column), map(str, df.columns))}"
            )
    default = fmt if isinstance(fmt, str) else None

    def cell(value: Any, column: Any) -> tuple[str, str]:
        style = "text-align:right" if is_number(value) else "text-align:left"
        whole = hasattr(value, "__index__")
        return format_value(value, columns.get(column) or (None if whole else default)), style

    return _grid(df, caption, cell)


def text_grid(df: pd.DataFrame, *, caption: str, highlight: Mapping[str, str] | None = None) -> None:
    """Display generated texts, one row per label (such as a layer) and one column per condition.

    Args:
        highlight: substring -> label; each occurrence is marked and followed by its label in brackets.

    Raises:
        InterpError: the table or the caption is empty, or a substring to highlight or its label is.
    """
    labels = dict(highlight or {})
    if not all(labels) or not all(labels.values()):
        raise InterpError("highlight maps a piece of text to its label, and neither may be empty.")
    display_html(_grid(df, caption, lambda value, column: (_mark(str(value), labels), _TEXT)))


def is_number(value: Any) -> bool:
    """Whether the value is a real number, of Python or numpy; truth values are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def format_value(value: Any, fmt: str | None = None) -> str:
    """Escaped text of a value; a missing one becomes a dash, a whole number keeps all its digits."""
    if value is None or str(value) in ("nan", "<NA>", "NaT"):
        return "\u2013"
    if not is_number(value) or (fmt is None and hasattr(value, "__index__")):
        return html.escape(str(value))
    return html.escape((fmt or "{:.4g}").format(value))


def caption_html(caption: str) -> str:
    """The caption, escaped.

    Raises:
        InterpError: it is empty.
    """
    if not caption.strip():
        raise InterpError("The caption is empty; say in a sentence what is shown.")
    return html.escape(caption.strip())


def display_html(markup: str) -> None:
    """Show markup as the output of the running cell."""
    from IPython.display import HTML, display

    display(HTML(markup))


def _grid(df: pd.DataFrame, caption: str, cell: Callable[[Any, Any], tuple[str, str]]) -> str:
    """The table; `cell(value, column)` gives the markup and the style of one cell."""
    import pandas as pd

    if df.empty:
        raise InterpError("The table is empty; give it at least one row and one column.")
    plain = isinstance(df.index, pd.RangeIndex) and df.index.name is None
    names = [] if plain else ["" if name is None else str(name) for name in df.index.names]
    columns = [" / ".join(map(str, c)) if isinstance(c, tuple) else str(c) for c in df.columns]
    # Headings stand over their numbers; the row headers are always on the left.
    sides = ["right" if dtype.kind in "iuf" else "left" for dtype in df.dtypes]
    sides = ["left"] + sides[1:] if plain else ["left"] * len(names) + sides
    heads = zip([*names, *columns], sides, strict=True)
    head = "".join(_header("col", html.escape(name), side) for name, side in heads)
    body = []
    for key, values in zip(df.index, df.itertuples(index=False, name=None), strict=True):
        cells = [cell(value, column) for value, column in zip(values, df.columns, strict=True)]
        keys = key if isinstance(key, tuple) else (key,)
        labels = [cells.pop(0)[0]] if plain else [format_value(label) for label in keys]
        row = [_header("row", label) for label in labels]
        row += [f'<td style="{_CELL};{style}">{text}</td>' for text, style in cells]
        body.append(f"<tr>{''.join(row)}</tr>")
    title = f'<caption style="text-align:left;padding:.3em 0">{caption_html(caption)}</caption>'
    style = "border-collapse:collapse;margin:.5em 0;font-size:10.5pt"
    return (
        f'<table style="{style}">{title}<thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    )


def _header(scope: str, text: str, side: str = "left") -> str:
    return f'<th scope="{scope}" style="{_CELL};text-align:{side}">{text}</th>'


def _mark(text: str, labels: Mapping[str, str]) -> str:
    """Escaped text in which each labelled piece is marked by colour and by its label."""
    if not labels:
        return html.escape(text)
    colours = dict(zip(dict.fromkeys(labels.values()), itertools.cycle(MARKS), strict=False))
    # The longest first: "Diana, Princess" must win over "Diana".
    pattern = "|".join(map(re.escape, sorted(labels, key=len, reverse=True)))
    pieces = []
    for index, piece in enumerate(re.split(f"({pattern})", text)):
        if index % 2:  # the odd pieces are the matches
            style, note = f"background:{colours[labels[piece]]};color:#000", html.escape(labels[piece])
            pieces.append(f'<mark style="{style}">{html.escape(piece)} <small>[{note}]</small></mark>')
        else:
            pieces.append(html.escape(piece))
    return "".join(pieces)
