"""Activations of a dictionary's latents: on all rows of a store in one pass, or on prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_utils.activation_store import ActivationStore
from interp_utils.activations import Prompt, as_list, tokenize
from interp_utils.dictionaries.dictionary import Dictionary
from interp_utils.dictionaries.kernels import Screen, fast_screen, pair_products, pairs_above
from interp_utils.errors import InterpError
from interp_utils.sites import check_site, forward_to

if TYPE_CHECKING:
    from nnsight import TransformersModel
    from scipy.sparse import csc_array


@torch.no_grad()
def sparse_activations(
    dictionary: Dictionary,
    store: ActivationStore,
    rows: slice = slice(None),
    *,
    batch_size: int = 8192,
    screen: bool = True,
) -> csc_array:
    """Activations of all latents on all these rows of a store, "row latent", in one pass.

    What is kept is 8 bytes for each active latent of each row: 300 MB for a million rows of 32.

    Args:
        dictionary: with its units set (`set_units`), or raw.
        store: of the dictionary's site; in whatever units, its rows are brought to the dictionary's.
        rows: which.
        batch_size: rows encoded at a time.
        screen: whether a bfloat16 product may choose what is computed in float32, where the processor is fast at
            it; about 1 in 100,000 active pairs, at the edge of activity, is then lost.

    Raises:
        InterpError: another width than the store's, or a slice that leaves rows out.
    """
    from scipy.sparse import csr_array

    if store.d() != dictionary.d_in:
        raise InterpError(
            f"The store's rows are {store.d()} wide but the dictionary reads {dictionary.d_in}."
        )
    chosen = range(len(store))[rows]
    if chosen.step != 1:
        raise InterpError(
            f"Rows are taken in a stretch, not in steps of {chosen.step}; give slice(first, end)."
        )
    starts, latents, values = [np.zeros(1, np.int64)], [np.empty(0, np.int32)], [np.empty(0, np.float32)]
    for first in range(chosen.start, chosen.stop, batch_size):
        x = store.read(slice(first, min(first + batch_size, chosen.stop)), normalised=False)
        x = (x - dictionary.mean) * dictionary.scale
        counts, own_latents, own_values = _active(dictionary, x, fast_screen() if screen else None)
        starts.append(starts[-1][-1] + counts.cumsum(0).numpy())
        latents.append(own_latents.numpy().astype(np.int32))
        values.append(own_values.numpy())
    by_row = np.concatenate(values), np.concatenate(latents), np.concatenate(starts)
    return csr_array(by_row, shape=(len(chosen), dictionary.width)).tocsc()


def _active(
    dictionary: Dictionary, x: Float[Tensor, "row d"], screen: Screen
) -> tuple[Int[Tensor, " row"], Int[Tensor, " pair"], Float[Tensor, " pair"]]:
    """How many latents are active on each row, which, and how much."""
    if dictionary.kind == "topk":  # latents compete: all are needed
        acts = dictionary.encode(x)
        _, latent = acts.nonzero(as_tuple=True)
        return (acts > 0).sum(1), latent, acts[acts > 0]
    floor = dictionary.threshold.clamp(min=0).expand(dictionary.width)
    pairs = pairs_above(x, dictionary.W_enc, dictionary.b_enc, floor, screen)
    values = pair_products(pairs, x, dictionary.W_enc, dictionary.b_enc)
    kept = (values > floor[pairs.latent]).nonzero()[:, 0]
    pairs, values = pairs.keep(kept), values[kept]
    return pairs.start.diff(), pairs.latent, values


@torch.no_grad()
def prompt_latents(
    model: TransformersModel, dictionary: Dictionary, site: str, prompts: Prompt | Sequence[Prompt]
) -> list[Float[Tensor, "pos width"]]:
    """Activations of all latents at every position of each prompt, zero at the first.

    Raises:
        InterpError: no prompt, an empty or too long one, no such site, or a dictionary of another site or width.
    """
    place = check_site(model, site)
    dictionary.check_site(str(place))
    found = []
    for ids in [tokenize(model, prompt) for prompt in as_list(prompts)]:
        states = forward_to(model._module.base_model, [place], torch.tensor([ids]))[place][0].float()
        if states.shape[1] != dictionary.d_in:
            raise InterpError(
                f"Rows at {site} are {states.shape[1]} wide but the dictionary reads {dictionary.d_in}."
            )
        acts = dictionary.encode((states.clone() - dictionary.mean) * dictionary.scale)
        acts[0] = 0  # a giant state, the same in every text, on which no dictionary was trained
        found.append(acts)
    return found
