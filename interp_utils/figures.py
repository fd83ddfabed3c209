"""One exit for figures, and strips of tokens; tables and text grids come from `tables`.

Everything ends in one `text/html` output that needs no JavaScript and no network and reads on a light or a
dark page. Matplotlib is imported only where something is drawn.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interp_utils.errors import InterpError
from interp_utils.tables import caption_html, display_html, format_value, table, table_html, text_grid

__all__ = [
    "contrast",
    "ink",
    "show",
    "table",
    "table_html",
    "text_grid",
    "token_strip",
    "use_style",
    "visible",
]

SHORTEST_ALT = 20
SIGNS = {" ": "\u00b7", "\n": "\u23ce", "\t": "\u21e5"}  # middle dot, return arrow, tab arrow
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"}  # Unicode categories of what leaves no ink
_BOX = (
    "display:inline-block;margin:1px;padding:2px 5px;border:1px solid #8888;border-radius:3px;text-align:center;"
    "unicode-bidi:isolate;font:10.5pt/1.35 monospace"
)
_counter = itertools.count(1)


def use_style() -> None:
    """Set the house style: colour-blind-safe, text of at least 10 points, the same bytes on every run."""
    import seaborn as sns

    colours = sns.color_palette("colorblind").as_hex()
    # Colours that stand out from white (3:1, WCAG 1.4.11) come first; otherwise seaborn's order stays.
    palette = sorted(colours, key=lambda colour: contrast(colour, "#ffffff") < 3)
    sizes = dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 10)
    sizes |= dict.fromkeys(("font.size", "axes.labelsize", "legend.title_fontsize"), 11)
    style = {
        "axes.titlesize": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
        "figure.dpi": 110,
        "figure.figsize": (7.0, 4.0),
        "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same letters
        "image.cmap": "cividis",
        "savefig.dpi": "figure",
    }
    sns.set_theme(style="ticks", palette=palette, rc=sizes | style)


def show(fig: Any, *, alt: str, caption: str) -> None:
    """Display a figure once, with its description and caption, and close it.

    Args:
        fig: a matplotlib figure, or anything that has one as `.figure` (axes, seaborn grids).
        alt: what a reader who cannot see the figure needs to know, at least 20 characters.
        caption: one or two sentences printed under the figure.

    With `INTERP_FIGURES` set to a folder, the PNG is also written there, named after `INTERP_NOTEBOOK`.

    Raises:
        InterpError: the description is too short, the caption is empty, or `fig` is no figure.
    """
    from matplotlib import pyplot as plt
    from matplotlib.figure import Figure

    figure = getattr(fig, "figure", fig)
    if not isinstance(figure, Figure):
        raise InterpError(
            f"show expects a matplotlib figure but got a {type(fig).__name__}; pass `fig` itself."
        )
    label, text = _alt(alt), caption_html(caption)
    buffer = io.BytesIO()
    # Without the Software entry the bytes do not name the version that wrote them.
    figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    plt.close(figure)  # or the inline backend would show it a second time
    _save(buffer.getvalue())
    data = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img alt="{label}" src="data:image/png;base64,{data}" style="max-width:100%">'
    display_html(f"<figure>{image}<figcaption>{text}</figcaption></figure>")


def token_strip(
    tokens: Sequence[str], values: Sequence[float], *, alt: str, caption: str = "", fmt: str = "{:.2f}"
) -> None:
    """Display tokens in a row, each on a colour for its value and with the value printed below it.

    Values of one sign are coloured by magnitude, from 0 (dark blue) to the largest (yellow); values of both
    signs from blue over white at 0 to red, symmetrically. Spaces and control characters are made visible.

    Raises:
        InterpError: there are no tokens, not one value for each, a value that is not finite, or too short
            an `alt`.
    """
    numbers, label = [float(value) for value in values], _alt(alt)
    if not numbers or len(tokens) != len(numbers):
        raise InterpError(f"token_strip needs one value per token but got {len(tokens)} and {len(numbers)}.")
    if not all(map(math.isfinite, numbers)):
        raise InterpError("token_strip got a value that is not finite; drop or replace it first.")
    boxes = []
    for token, number, colour in zip(tokens, numbers, _colours(numbers), strict=True):
        style = f"{_BOX};background:{colour};color:{ink(colour)}"
        boxes.append(
            f'<span style="{style}">{html.escape(visible(token))}<br>{format_value(number, fmt)}</span>'
        )
    text = " ".join(filter(None, [html.escape(caption.strip()), _scale(numbers, fmt)]))
    strip = f'<div role="img" aria-label="{label}">{"".join(boxes)}</div>'
    display_html(f"<figure>{strip}<figcaption>{text}</figcaption></figure>")


def visible(token: str) -> str:
    """The token with spaces, line breaks and invisible characters written as visible signs."""

    def sign(char: str) -> str:
        hidden = unicodedata.category(char) in HIDDEN
        return SIGNS.get(char) or (f"\\u{ord(char):04x}" if hidden else char)

    return "".join(map(sign, token)) or "\u2205"


def contrast(first: str, second: str) -> float:
    """WCAG contrast ratio of two "#rrggbb" colours, from 1 to 21."""
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


def ink(background: str) -> str:
    """Black or white, whichever reads better on the background: at least 4.58:1 on any colour."""
    return max("#000000", "#ffffff", key=lambda colour: contrast(colour, background))


def _luminance(colour: str) -> float:
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _colours(values: Sequence[float]) -> list[str]:
    import matplotlib
    from matplotlib.colors import to_hex

    limit = max(map(abs, values)) or 1.0
    if min(values) < 0 < max(values):
        return [to_hex(matplotlib.colormaps["RdBu_r"](0.5 + value / limit / 2)) for value in values]
    return [to_hex(matplotlib.colormaps["cividis"](abs(value) / limit)) for value in values]


def _scale(values: Sequence[float], fmt: str) -> str:
    limit = max(map(abs, values))
    if min(values) < 0 < max(values):
        return f"Colour: {format_value(-limit, fmt)} (blue) to {format_value(limit, fmt)} (red)."
    return f"Colour: 0 (dark blue) to {format_value(max(values, key=abs), fmt)} (yellow)."


def _alt(alt: str) -> str:
    if len(alt.strip()) < SHORTEST_ALT:
        raise InterpError(
            f"The alt text {alt!r} is too short; say in at least {SHORTEST_ALT} characters what is to be seen."
        )
    return html.escape(alt.strip())


def _save(png: bytes) -> None:
    if folder := os.environ.get("INTERP_FIGURES"):
        name = f"{os.environ.get('INTERP_NOTEBOOK') or 'figure'}-{next(_counter)}.png"
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / name).write_bytes(png)
