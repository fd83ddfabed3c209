"""A feature card: what is known of one latent on one page of plain HTML, without scripts and without a network."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from interp_utils.dictionaries.dictionary import Dictionary
from interp_utils.errors import InterpError
from interp_utils.features.contexts import Contexts
from interp_utils.features.effects import Ablation, ablation, logit_weights, neighbours, top_tokens_of
from interp_utils.features.excerpts import Excerpt, excerpts
from interp_utils.features.index import BUCKETS, FeatureIndex
from interp_utils.figures import ink, visible
from interp_utils.tables import table_html

if TYPE_CHECKING:
    from nnsight import TransformersModel

WORDS, NEAR = 6, 5  # tokens of a list, neighbours
SHADES = ("#fdf1d0", "#fbdc92", "#f6bb55", "#e98f2c", "#c75b12")  # of fifths of the maximum
_CELL = "padding:.2em .6em;border-bottom:1px solid #8888;vertical-align:top;text-align:left"
_BOX = "border:1px solid #8888;border-radius:6px;padding:.4em 1em;margin:.8em 0;font-size:10.5pt;line-height:1.45"
_ROW = "display:flex;flex-wrap:wrap;gap:.4em 2.4em;align-items:flex-start"
_CODE = "font-family:monospace;overflow-wrap:anywhere;unicode-bidi:isolate"


def feature_card(
    latent: int,
    model: TransformersModel,
    dictionary: Dictionary,
    site: str,
    index: FeatureIndex,
    contexts: Contexts,
    *,
    title: str = "",
) -> str:
    """One latent as HTML: density, histogram, examples, logit weights, neighbours and what its ablation does.

    Numbers and places come from the index; activations in the examples, logit weights and the ablation are
    computed now. After the feature pages of Scaling Monosemanticity.

    Args:
        latent: its number.
        model: from `load_model`.
        dictionary: whose latent it is.
        site: which activations it reads.
        index: of this dictionary.
        contexts: of this index.
        title: what the reader may call it.

    Raises:
        InterpError: no such latent, an index of another width or site, or a site outside the residual stream.
    """
    index.check(latent)
    shown = excerpts(latent, model, dictionary, site, index, contexts)
    effect = logit_weights(model, dictionary, latent)
    up, down = effect.topk(WORDS), (-effect).topk(WORDS)
    weights = [(up.indices.tolist(), up.values.tolist()), (down.indices.tolist(), (-down.values).tolist())]
    near = neighbours(dictionary, latent, NEAR)
    strongest = [e for e in shown if e.bucket == "top"]
    heading = f"Latent {latent}" + (f": {html.escape(title)}" if title else "")
    parts = [
        f'<p style="margin:.2em 0"><strong>{heading}</strong></p>',
        f'<div style="{_ROW}">{histogram_svg(index, latent)}{_facts(index, latent, site)}</div>',
        _examples(shown, float(index.maximum[latent]), contexts.note),
        f'<div style="{_ROW}">{_weights(model, weights)}{_neighbours(model, index, near)}</div>',
    ]
    if strongest:
        peaks = [e.values[e.peak] for e in strongest]
        found = ablation(model, dictionary, site, latent, [e.window for e in strongest], peaks)
        parts.append(_ablation(model, found, len(strongest)))
    return f'<section aria-label="Feature card of latent {latent}" style="{_BOX}">{"".join(parts)}</section>'


def feature_rows(
    latents: Mapping[str, int],
    model: TransformersModel,
    dictionary: Dictionary,
    site: str,
    index: FeatureIndex,
    contexts: Contexts,
    *,
    caption: str,
    top: int = 3,
) -> str:
    """Several latents in short, as HTML: name given to each, number, density, maximum, strongest examples.

    Raises:
        InterpError: as for `feature_card`, or no latents.
    """
    heads = ("looked for", "latent", "active on", "maximum", "strongest examples")
    body = []
    for name, latent in latents.items():
        shown = excerpts(latent, model, dictionary, site, index, contexts, top=top, per_bucket=0)
        maximum = float(index.maximum[latent])
        quoted = (f"{excerpt_html(e, maximum)} <small>({html.escape(e.source)})</small>" for e in shown)
        lines = "<br>".join(quoted) or "no text to show"
        numbers = f"{latent}", f"{100 * float(index.density[latent]):.3g} %", f"{maximum:.1f}"
        body.append([html.escape(name), *numbers, lines])
    if not body:
        raise InterpError("There are no latents to show; give at least one.")
    return _table(heads, body, f"{caption} {contexts.note}")


def histogram_svg(index: FeatureIndex, latent: int) -> str:
    """Rows by activation as inline SVG with a text alternative; the height is the logarithm of the count.

    Raises:
        InterpError: no such latent.
    """
    counts = index.histogram[index.check(latent)].tolist()
    width, height, left, bottom = 260, 96, 44, 20
    tallest = math.log10(max(counts) + 1) or 1.0
    step = (width - left) / len(counts)
    bars = []
    for i, count in enumerate(counts):
        tall = height * math.log10(count + 1) / tallest
        bars.append(
            f'<rect x="{left + i * step:.1f}" y="{height - tall + 6:.1f}" width="{step - 1:.1f}" '
            f'height="{tall:.1f}" fill="#2f7fb8"/>'
        )
    text = 'fill="currentColor" font-size="11" font-family="sans-serif"'
    labels = [
        f'<text x="{left - 4}" y="14" text-anchor="end" {text}>{max(counts):,}</text>',
        f'<text x="{left - 4}" y="{height + 6}" text-anchor="end" {text}>0</text>',
        f'<text x="{left}" y="{height + bottom}" {text}>0</text>',
        f'<text x="{width}" y="{height + bottom}" text-anchor="end" {text}>{index.maximum[latent]:.1f}</text>',
        f'<line x1="{left}" x2="{width}" y1="{height + 6}" y2="{height + 6}" stroke="currentColor"/>',
    ]
    alt = (
        f"Histogram of the activations of latent {latent} in {len(counts)} equal bins from 0 to "
        f"{index.maximum[latent]:.1f}: {', '.join(map(str, counts))} rows."
    )
    box = f'viewBox="0 0 {width} {height + bottom + 4}" width="{width}" height="{height + bottom + 4}"'
    return f'<svg role="img" aria-label="{alt}" {box}>{"".join(bars)}{"".join(labels)}</svg>'


def excerpt_html(excerpt: Excerpt, maximum: float) -> str:
    """The tokens of an excerpt, shaded by activation, with the number at the example's own token."""
    pieces = []
    for i, (token, value) in enumerate(zip(excerpt.tokens, excerpt.values, strict=True)):
        text = html.escape(" ".join(visible(part) if part else "" for part in token.split(" ")))
        word = text.lstrip(" ") or text
        space = text[
            : len(text) - len(word)
        ]  # outside the mark, or it would be left behind where a line breaks
        if value > 0:
            shade = SHADES[min(int(len(SHADES) * value / (maximum or 1.0)), len(SHADES) - 1)]
            style = f"background:{shade};color:{ink(shade)};print-color-adjust:exact"
            word = f'<mark style="{style}" title="{value:.1f}">{word}</mark>'
        if i == excerpt.peak:
            word = f"<b>{word}</b><sub>{value:.1f}</sub>"
        pieces.append(space + word)
    return f'<span style="{_CODE};white-space:pre-wrap">{"".join(pieces)}</span>'


def _facts(index: FeatureIndex, latent: int, site: str) -> str:
    card = index.card
    lines = [
        f"active on {100 * float(index.density[latent]):.3g} % of {card['rows']:,} rows",
        f"largest activation {index.maximum[latent]:.1f}",
        f"{card['model']}, {site}" + (f", {card['dictionary']}" if card.get("dictionary") else ""),
        "the histogram counts rows by activation; heights are logarithmic",
    ]
    return '<ul style="margin:.2em 0">' + "".join(f"<li>{html.escape(str(x))}</li>" for x in lines) + "</ul>"


def _examples(shown: Sequence[Excerpt], maximum: float, note: str) -> str:
    caption = (
        f"The strongest rows of different documents, then random rows of each fifth of the range (1 the highest of "
        f"{BUCKETS}). Shade: activation, to the maximum; the number is that of the bold token, computed now. {note}"
    )
    rows = [[_bucket(e.bucket), html.escape(e.source), excerpt_html(e, maximum)] for e in shown]
    if not rows:
        return f'<p style="margin:.4em 0">There is no example to show. {html.escape(note)}</p>'
    return _table(("example", "source", "excerpt"), rows, caption)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table of markup; `tables.table_html` would escape it. The first column gives the row headers."""
    head = "".join(f'<th scope="col" style="{_CELL}">{name}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row" style="{_CELL};font-weight:normal">{first}</th>'
        + "".join(f'<td style="{_CELL}">{cell}</td>' for cell in cells)
        + "</tr>"
        for first, *cells in rows
    )
    title = f'<caption style="text-align:left;padding:.3em 0">{html.escape(caption.strip())}</caption>'
    style = "border-collapse:collapse;margin:.5em 0;font-size:10.5pt"
    return f'<table style="{style}">{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _bucket(name: str) -> str:
    return "strongest" if name == "top" else f"fifth {name}"


def _shown(model: TransformersModel, token: int) -> str:
    return visible(model.tokenizer.decode([token]))


def _weights(model: TransformersModel, weights: Sequence[tuple[Sequence[int], Sequence[float]]]) -> str:
    import pandas as pd

    (up, more), (down, less) = weights
    columns = {
        "up": [_shown(model, i) for i in up],
        "weight": more,
        "down": [_shown(model, i) for i in down],
        "weight ": less,
    }
    caption = "Logit weights: what the direction says by itself, in standard deviations over the vocabulary. "
    caption += "What later layers make of it is left out."
    return table_html(pd.DataFrame(columns), caption=caption, fmt="{:.1f}")


def _neighbours(model: TransformersModel, index: FeatureIndex, near: Sequence[tuple[int, float]]) -> str:
    import pandas as pd

    rows = [
        {
            "latent": latent,
            "cosine": cosine,
            "strongest on": " ".join(_shown(model, i) for i in top_tokens_of(index, latent)) or "nothing",
        }
        for latent, cosine in near
    ]
    return table_html(pd.DataFrame(rows), caption="Nearest latents by decoder direction.", fmt="{:.2f}")


def _ablation(model: TransformersModel, found: Ablation, n: int) -> str:
    def listed(pairs: Sequence[tuple[int, float]]) -> str:
        return (
            ", ".join(
                f'<span style="{_CODE}">{html.escape(_shown(model, token))}</span> {value:+.2f}'
                for token, value in pairs
            )
            or "none"
        )

    follows = (
        f"the token that follows changes by {found.next_token:+.2f} nats on average over {found.n} places; "
        if found.next_token is not None
        else ""
    )
    return (
        f'<p style="margin:.4em 0">Without the latent at the bold token of the {n} strongest examples, {follows}'
        f"log-probabilities fall most for {listed(found.most(WORDS, fall=True))}; rise most for "
        f"{listed(found.most(WORDS, fall=False))}.</p>"
    )
