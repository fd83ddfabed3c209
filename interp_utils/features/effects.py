"""What a latent writes: towards which tokens its direction points, which latents are near, what goes without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp_utils.activations import next_token_logits
from interp_utils.dictionaries.dictionary import Dictionary
from interp_utils.errors import InterpError
from interp_utils.features.contexts import Window
from interp_utils.features.index import TOP, FeatureIndex
from interp_utils.interventions import add, edited_logits
from interp_utils.sites import check_site

if TYPE_CHECKING:
    from nnsight import TransformersModel

PROBABLE = 1e-3  # tokens less probable than this everywhere are not listed: their log-probabilities are noise


@torch.no_grad()
def logit_weights(model: TransformersModel, dictionary: Dictionary, latent: int) -> Float[Tensor, " vocab"]:
    """Logits of the latent's direction alone: unit decoder row -> final norm -> unembedding, standardised.

    The direct path only: what later layers make of the direction is left out (Scaling Monosemanticity's "logit
    weights" of a feature). In standard deviations over the vocabulary: the final norm divides by a length, so that
    only ratios mean something.

    Raises:
        InterpError: no such latent, or a decoder of another width than the model's.
    """
    rows = _unit_rows(dictionary, [latent])
    if rows.shape[1] != model.config.hidden_size:
        raise InterpError(
            f"The decoder's rows are {rows.shape[1]} wide but the model's d_model is {model.config.hidden_size}."
        )
    norm, unembed = model.final_norm._module, model.unembed._module
    both = torch.cat([rows, torch.zeros_like(rows)])[None].to(next(unembed.parameters()))
    direction, nothing = unembed(norm(both))[0].float()  # the zeros give the biases, which are no effect
    effect = direction - nothing
    return (effect - effect.mean()) / effect.std().clamp(
        min=torch.finfo(effect.dtype).tiny
    )  # of a row of zeros


def neighbours(dictionary: Dictionary, latent: int, n: int = 5) -> list[tuple[int, float]]:
    """The latents whose decoder rows point most nearly the same way, with the cosine, the nearest first.

    Raises:
        InterpError: no such latent.
    """
    cosine = (_unit_rows(dictionary) @ _unit_rows(dictionary, [latent]).T)[:, 0]
    cosine[latent] = -torch.inf
    best = cosine.topk(min(n, dictionary.width - 1))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def top_tokens_of(index: FeatureIndex, latent: int, n: int = 3) -> list[int]:
    """The tokens on which the latent's strongest examples stand, the most frequent first.

    Raises:
        InterpError: no such latent.
    """
    own = index.token[index.check(latent), :TOP]
    return [token for token, _ in Counter(own[own >= 0].tolist()).most_common(n)]


@dataclass(frozen=True)
class Ablation:
    """What happens to the next token's log-probability without the latent.

    Attributes:
        next_token: mean change of that of the token that does follow, nats; None if none follows anywhere.
        n: places where one follows.
        change: "vocab", mean change by token.
        probable: "vocab", whether the token has a probability above `PROBABLE` at one of the places, with the
            latent or without.
    """

    next_token: float | None
    n: int
    change: Float[Tensor, " vocab"]
    probable: Tensor

    def most(self, k: int, *, fall: bool) -> list[tuple[int, float]]:
        """The probable tokens whose log-probability falls (or rises) most, with the change."""
        order = self.change.masked_fill(~self.probable, 0).sort(descending=not fall)
        pairs = zip(order.indices[:k].tolist(), order.values[:k].tolist(), strict=True)
        return [(token, value) for token, value in pairs if (value < 0 if fall else value > 0)]


def ablation(
    model: TransformersModel,
    dictionary: Dictionary,
    site: str,
    latent: int,
    windows: Sequence[Window],
    activations: Sequence[float],
) -> Ablation:
    """Set the latent to zero at the token in question of each window: x - a d, all else of x untouched.

    Args:
        site: in the residual stream, "resid_post.<layer>".
        activations: a, the latent's activation at that token of each window.

    Raises:
        InterpError: no window, no such latent, a site that is not in the residual stream.
    """
    where = check_site(model, site)
    if where.kind != "resid_post":
        raise InterpError(f"Ablation subtracts from the residual stream; {site} is not a part of it.")
    if not windows or len(windows) != len(activations):
        raise InterpError(f"There are {len(windows)} windows for {len(activations)} activations.")
    check_latent(dictionary, latent)
    row = dictionary.W_dec[latent].detach() / dictionary.target_scale  # in the model's own units
    prompts = [window.ids[: window.place + 1] for window in windows]
    without = [add(where.layer, -1, -a * row) for a in activations]
    before = next_token_logits(model, prompts).log_softmax(-1)
    after = edited_logits(model, prompts, without, expect_change=False).log_softmax(-1)
    change = after - before
    following = [(i, w.next_id) for i, w in enumerate(windows) if w.next_id is not None]
    own = [float(change[i, token]) for i, token in following]
    probable = (torch.maximum(before, after).exp() > PROBABLE).any(0)
    return Ablation(sum(own) / len(own) if own else None, len(own), change.mean(0), probable)


def _unit_rows(dictionary: Dictionary, latents: Sequence[int] | None = None) -> Float[Tensor, "latent d"]:
    for latent in latents or []:
        check_latent(dictionary, latent)
    rows = dictionary.W_dec.detach()
    return torch.nn.functional.normalize(rows if latents is None else rows[list(latents)])


def check_latent(dictionary: Dictionary, latent: int) -> None:
    """That the dictionary has it.

    Raises:
        InterpError: out of range.
    """
    if not 0 <= latent < dictionary.width:
        raise InterpError(f"There is no latent {latent}; this dictionary has 0 to {dictionary.width - 1}.")
