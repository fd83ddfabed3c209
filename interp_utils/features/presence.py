"""Which words of a list a dictionary has a latent for, against the same with labels exchanged."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

STEPS = 5  # levels: 0, .2 ... .8 of a latent's maximum
FEWEST = 2  # mentions in each half; a rarer word cannot be both chosen and scored
BLOCK = 512  # latents at a time


class _Pairs(NamedTuple):
    """Active latents of mentions: which mention, which latent, and the highest level it exceeds."""

    mention: Int[np.ndarray, " pair"]
    latent: Int[np.ndarray, " pair"]
    level: Int[np.ndarray, " pair"]


class Presence(NamedTuple):
    """Words with enough mentions.

    Attributes:
        words: their numbers.
        mentions: how many of each.
        f1: of the best latent, on the half on which it was not chosen.
        exchanged: the same with the labels exchanged, a row for each time.
    """

    words: Int[np.ndarray, " word"]
    mentions: Int[np.ndarray, " word"]
    f1: Float[np.ndarray, " word"]
    exchanged: Float[np.ndarray, "time word"]


def list_presence(
    acts: sparse.csc_array,
    labels: Int[np.ndarray, " row"],
    half: Int[np.ndarray, " row"],
    *,
    times: int = 40,
    seed: int = 0,
) -> Presence:
    """F1 of each word's best latent: latent and level chosen on half 0, scored on half 1.

    For the comparison the labels are exchanged among all mentions of the list, and latents chosen anew. Exchanged
    labels leave firings as they are, so only the active latents of mentions are counted again. Every firing off a
    mention's last token is a false one, on its other tokens, too.

    Args:
        acts: "row latent", from `sparse_activations`.
        labels: number of the word that a row is the end of a mention of, from `label_rows`; else negative.
        half: 0 or 1.
        times: how often labels are exchanged.
        seed: of the exchanges.
    """
    at = np.flatnonzero(labels >= 0)
    every = int(labels.max(initial=0)) + 1
    n = np.stack([np.bincount(labels[at][half[at] == h], minlength=every) for h in (0, 1)])
    words = np.flatnonzero((n >= FEWEST).all(axis=0))
    if not len(words):
        return Presence(words, words, np.empty(0), np.empty((times, 0)))
    number = np.full(every, -1)
    number[words] = np.arange(len(words))
    at = at[number[labels[at]] >= 0]
    mention = np.full(len(labels), -1)
    mention[at] = np.arange(len(at))
    rng, own = np.random.default_rng(seed), number[labels[at]]
    variants = [own, *(rng.permutation(own) for _ in range(times))]
    best, held_out = np.zeros((2, len(variants), len(words)))
    for first in range(0, acts.shape[1], BLOCK):
        pairs, fired = _block(acts[:, first : first + BLOCK], half, mention)
        if not len(pairs.mention):
            continue
        for i, variant in enumerate(variants):
            chosen, scored = _f1(variant, half[at], pairs, fired, len(words))
            better = chosen > best[i]
            best[i][better], held_out[i][better] = chosen[better], scored[better]
    return Presence(words, n.sum(axis=0)[words], held_out[0], held_out[1:])


def _block(
    acts: sparse.csc_array, half: Int[np.ndarray, " row"], mention: Int[np.ndarray, " row"]
) -> tuple[_Pairs, Int[np.ndarray, "half latent level"]]:
    """Active pairs on mentions, latents numbered anew, and how often each exceeds each level on either half."""
    width = acts.shape[1]
    latent = np.repeat(np.arange(width), np.diff(acts.indptr))
    top = acts.max(axis=0).toarray().clip(1e-9)
    level = (np.ceil(acts.data / top[latent] * STEPS) - 1).clip(0, STEPS - 1).astype(np.int64)
    place = (half[acts.indices].astype(np.int64) * width + latent) * STEPS + level
    exactly = np.bincount(place, minlength=2 * width * STEPS).reshape(2, width, STEPS)
    own = mention[acts.indices]
    on = own >= 0
    used, which = np.unique(latent[on], return_inverse=True)  # the others are no mention's
    return _Pairs(own[on], which, level[on]), exactly[:, used, ::-1].cumsum(-1)[..., ::-1]


def _f1(
    label: Int[np.ndarray, " mention"],
    half: Int[np.ndarray, " mention"],
    pairs: _Pairs,
    fired: Int[np.ndarray, "half latent level"],
    words: int,
) -> tuple[Float[np.ndarray, " word"], Float[np.ndarray, " word"]]:
    """Best F1 of each word on half 0 over latents and levels, and the F1 of that choice on half 1."""
    width = fired.shape[1]
    line = half[pairs.mention].astype(np.int64) * words + label[pairs.mention]
    place = (line * width + pairs.latent) * STEPS + pairs.level
    counts = np.bincount(place, minlength=2 * words * width * STEPS)
    exactly = counts.reshape(2, words, width, STEPS).astype(np.float32)
    right = exactly[..., ::-1].cumsum(-1)[..., ::-1]
    n = np.bincount(half.astype(np.int64) * words + label, minlength=2 * words).reshape(2, words)
    f1 = (2 * right / (fired[:, None] + n[:, :, None, None]).clip(1)).reshape(2, words, -1)
    at = f1[0].argmax(axis=1)
    return f1[0].max(axis=1), f1[1][np.arange(words), at]
