"""Examples of a latent with some of the text around them, and its activation at every token, computed now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp_utils.dictionaries.dictionary import Dictionary
from interp_utils.errors import InterpError
from interp_utils.features.contexts import Contexts, Window
from interp_utils.features.effects import check_latent
from interp_utils.features.index import FeatureIndex
from interp_utils.sites import check_site, forward_to

if TYPE_CHECKING:
    from nnsight import TransformersModel

BATCH = 8  # windows to a forward


@dataclass(frozen=True)
class Excerpt:
    """A few tokens around an example, with the latent's activation at each, computed now.

    Attributes:
        bucket: "top", or "1" (the highest fifth of the range) to "5".
        source: name of the text.
        tokens, values: what may be quoted.
        peak: the example's place among them.
        window: what the model saw.
    """

    bucket: str
    source: str
    tokens: list[str]
    values: list[float]
    peak: int
    window: Window


def excerpts(
    latent: int,
    model: TransformersModel,
    dictionary: Dictionary,
    site: str,
    index: FeatureIndex,
    contexts: Contexts,
    *,
    top: int = 8,
    per_bucket: int = 2,
) -> list[Excerpt]:
    """The strongest examples and some of each fifth of the range, of those whose text is the same here.

    Raises:
        InterpError: no such latent, or an index of a dictionary of another width or of another site.
    """
    if len(index) != dictionary.width:
        raise InterpError(
            f"The index has {len(index)} latents but the dictionary {dictionary.width}; they do not belong together."
        )
    if site not in index.card["sites"]:
        raise InterpError(f"The index was made at {', '.join(index.card['sites'])}, not at {site}.")
    found = index.examples(latent)
    found = found[found.source.map(contexts.has).astype(bool)]
    allowed = found.bucket.eq("top").map({True: top, False: per_bucket})
    kept = list(found[found.groupby("bucket").cumcount() < allowed].itertuples())
    places = [contexts.window(row.source, int(row.document), int(row.position)) for row in kept]
    windows = [window for window in places if window]  # all, as their texts are here
    acts = latent_on_windows(model, dictionary, site, latent, windows)
    made = []
    for row, window, values in zip(kept, windows, acts, strict=True):
        tokens = [model.tokenizer.decode([i]) for i in window.ids[window.shown]]
        peak = window.place - window.shown.start
        own = values[window.shown].tolist()
        made.append(Excerpt(row.bucket, row.source, tokens, own, peak, window))
    return made


def latent_on_windows(
    model: TransformersModel, dictionary: Dictionary, site: str, latent: int, windows: Sequence[Window]
) -> list[Float[Tensor, " pos"]]:
    """Activation of one latent at every token of each window, zero at the start token; computed in float32.

    Raises:
        InterpError: no such site or latent, or rows of another width.
    """
    place = check_site(model, site)
    check_latent(dictionary, latent)
    by_length = sorted(range(len(windows)), key=lambda i: len(windows[i].ids))
    found: dict[int, Tensor] = {}
    for start in range(0, len(by_length), BATCH):
        own = by_length[start : start + BATCH]
        longest = len(windows[own[-1]].ids)
        ids = torch.tensor([windows[i].ids + [0] * (longest - len(windows[i].ids)) for i in own])
        states = forward_to(model._module.base_model, [place], ids)[place].float().clone()
        if states.shape[-1] != dictionary.d_in:
            raise InterpError(
                f"Rows at {site} are {states.shape[-1]} wide but the dictionary reads {dictionary.d_in}."
            )
        with torch.no_grad():
            acts = _encoded(dictionary, (states - dictionary.mean) * dictionary.scale, latent)
        acts[:, 0] = 0  # its state is the same in every text, and no dictionary was trained on it
        found |= {i: acts[row, : len(windows[i].ids)] for row, i in enumerate(own)}
    return [found[i] for i in range(len(windows))]


def _encoded(
    dictionary: Dictionary, x: Float[Tensor, "batch pos d_in"], latent: int
) -> Float[Tensor, "batch pos"]:
    """One column of `dictionary.encode`, without the others where they do not matter."""
    if dictionary.kind == "topk":  # latents compete: all are needed
        return dictionary.encode(x)[..., latent]
    pre = x @ dictionary.W_enc[latent] + dictionary.b_enc[latent]
    floor = dictionary.threshold.expand(dictionary.width)[latent].clamp(min=0)
    return pre * (pre > floor)
