"""One training step's loss and gradients, written by hand: no graph is kept, and sparse parts stay sparse.

Losses are sums over d_out and means over rows. With e = y_hat - y and c = 2 / rows the gradients are
    W_dec: c f^T e   b_dec: c sum e   W_enc: g^T x   b_enc: sum g   with g = (c e W_dec^T + dS/df) act'(pre)
and what the sparsity term S adds. The tests compare every one with autograd.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_utils.dictionaries import kernels
from interp_utils.dictionaries.dictionary import Dictionary
from interp_utils.dictionaries.kernels import Pairs, Screen
from interp_utils.dictionaries.parallel import Ranks

# Share of active latents under which sparse float32 kernels take over from dense products, by the latters' type:
# about where both cost the same.
SPARSE_BELOW: dict[Screen, float] = {None: 1 / 16, "bfloat16": 1 / 32}
AUX_WEIGHT = 1 / 32  # alpha of Gao et al. 2024
BANDWIDTH = 0.5  # around a threshold, within which a pair moves it
SLACK = 0.8  # a batch's own threshold is looked for above this share of the running one
TINY = 1e-20

Gradients = dict[str, Tensor]


@dataclass
class Step:
    """What one step computed on this rank's rows; losses and l0 are already divided by all ranks' rows."""

    mse: float
    sparsity: float  # what is penalised, without the coefficient: sum f ||W_dec||, or L0 for jumprelu
    loss: float
    l0: float
    fired: Bool[Tensor, " width"]
    gradients: Gradients = field(repr=False)
    radial: Float[Tensor, " width"] | None = None  # gradient of W_dec along its own rows, where that is cheap
    error: Float[Tensor, "row d_out"] | None = None  # y_hat - y
    by_f: Float[Tensor, " pair"] | None = None  # gradient of the reconstruction by each pair's activation
    smallest: float | None = None  # activation that batchtopk kept


def relu_step(
    dictionary: Dictionary,
    x: Tensor,
    y: Tensor,
    l1: float,
    *,
    sparse: bool,
    screen: Screen,
    rows: int,
    into: Gradients,
) -> Step:
    """E[||y - y_hat||^2 + l1 sum_i f_i ||W_dec_i||] (Scaling Monosemanticity), dense or over active pairs.

    Args:
        x: "row d_in". y: "row d_out". rows: of all ranks together. into: memory for the large gradients.
    """
    W_dec, norms = dictionary.W_dec, dictionary.W_dec.norm(dim=1)
    push = norms * (l1 / rows)
    if sparse:
        pairs = kernels.pairs_above(x, dictionary.W_enc, dictionary.b_enc, screen=screen)
        f = kernels.pair_products(pairs, x, dictionary.W_enc, dictionary.b_enc).relu_()
        totals = kernels.add_by_latent(pairs, f)
        step = _sparse_step(dictionary, x, y, pairs, f, rows, into, push[pairs.latent])
    else:
        step, totals = _dense_relu(dictionary, x, y, screen, rows, into, push)
    step.gradients["W_dec"].addcmul_(W_dec, (totals / norms.clamp(min=TINY) * (l1 / rows))[:, None])
    step.radial = None
    step.sparsity = float(totals @ norms) / rows
    step.loss = step.mse + l1 * step.sparsity
    return step


def topk_step(
    dictionary: Dictionary, x: Tensor, y: Tensor, *, screen: Screen, rows: int, into: Gradients
) -> Step:
    """E[||y - y_hat||^2] over the k largest pre-activations of each row (Gao et al. 2024)."""
    assert dictionary.k
    pairs = kernels.top_candidates(x, dictionary.W_enc, dictionary.b_enc, dictionary.k, screen)
    pre = kernels.pair_products(pairs, x, dictionary.W_enc, dictionary.b_enc)
    chosen = kernels.largest(pairs, pre, dictionary.k)
    return _sparse_step(dictionary, x, y, pairs.keep(chosen), pre[chosen].relu_(), rows, into)


def batchtopk_step(
    dictionary: Dictionary,
    x: Tensor,
    y: Tensor,
    *,
    screen: Screen,
    rows: int,
    into: Gradients,
    ranks: Ranks,
) -> Step:
    """E[||y - y_hat||^2] over the k * rows largest activations of the whole batch (Bussmann et al. 2024)."""
    assert dictionary.k
    keep, floor = dictionary.k * rows, SLACK * float(dictionary.threshold)
    pairs, f = _above(dictionary, x, floor, screen) if floor else (None, torch.zeros(0))
    if ranks.total(int((f > floor).sum())) < keep:  # the first step, or the data has changed
        floor = kernels.kth_pre_activation(x, dictionary.W_enc, dictionary.b_enc, keep, screen)
        pairs, f = _above(dictionary, x, max(SLACK * floor, 0.0), screen)
    assert pairs is not None
    smallest = ranks.kth_largest(f, keep)
    chosen = (f >= smallest).nonzero().flatten()
    step = _sparse_step(dictionary, x, y, pairs.keep(chosen), f[chosen], rows, into)
    step.smallest = smallest
    return step


def jumprelu_step(
    dictionary: Dictionary,
    x: Tensor,
    y: Tensor,
    weight: float,
    *,
    sparse: bool,
    screen: Screen,
    rows: int,
    into: Gradients,
) -> Step:
    """E[||y - y_hat||^2 + weight * L0], so that a latent is worth its place if it explains more than `weight`.

    f = pre H(pre - theta), L0 = sum_i H(pre_i - theta_i). Thresholds learn from pairs within half a bandwidth e
    of them (Rajamanoharan et al. 2024, eq. 11 and 12): dH/dtheta = -1/e there, df/dtheta = -theta/e, and nothing
    passes through H towards pre.
    """
    W_dec, theta = dictionary.W_dec, dictionary.thresholds
    if sparse:
        floor = (theta - BANDWIDTH / 2).clamp(min=0)
        pairs = kernels.pairs_above(x, dictionary.W_enc, dictionary.b_enc, floor, screen)
        pre, own = kernels.pair_products(pairs, x, dictionary.W_enc, dictionary.b_enc), theta[pairs.latent]
        f = pre * (pre > own)
        step = _sparse_step(dictionary, x, y, pairs, f, rows, into)
        assert step.by_f is not None
        near = ((pre - own).abs() < BANDWIDTH / 2) * (pre > 0)
        pull = kernels.add_by_latent(pairs, near * (step.by_f * own + weight / rows))
    else:
        pre = dictionary.pre_activations(x)
        f = pre * (pre > theta)
        error, mse = _residual(torch.addmm(dictionary.b_dec, f, W_dec), y, rows)
        by_f = torch.mm(error, W_dec.T).mul_(2 / rows)
        near = ((pre - theta).abs() < BANDWIDTH / 2) * (pre > 0)
        pull = (near * (by_f * theta + weight / rows)).sum(0)
        step = _dense_step(f, by_f.mul_(f > 0), x, error, mse, rows, into)
    step.gradients["thresholds"] = pull / -BANDWIDTH
    step.sparsity = step.l0
    step.loss = step.mse + weight * step.l0
    return step


def add_auxk(step: Step, dictionary: Dictionary, x: Tensor, dead: Tensor, k: int, rows: int) -> None:
    """Let the k most active dead latents of each row explain what the living leave over (Gao et al. 2024, A.2).

    Adds 1/32 E||(y - y_hat) - z W_dec||^2, z the activations of the dead and y_hat held fixed.
    """
    W_enc, W_dec = dictionary.W_enc[dead], dictionary.W_dec[dead]
    pre = torch.addmm(dictionary.b_enc[dead], x, W_enc.T)
    if k < len(dead):
        values, ids = pre.topk(k, dim=1, sorted=False)
        z = torch.zeros_like(pre).scatter_(1, ids, values.relu_())
    else:
        z = pre.relu_()
    assert step.error is not None
    left = torch.addmm(step.error, z, W_dec)
    step.loss += AUX_WEIGHT * float(left.square().sum()) / rows
    left *= 2 * AUX_WEIGHT / rows
    by_z = left @ W_dec.T
    if step.radial is not None:
        step.radial[dead] += (z * by_z).sum(0)
    g = by_z * (z > 0)
    step.gradients["W_dec"][dead] += z.T @ left
    step.gradients["W_enc"][dead] += g.T @ x
    step.gradients["b_enc"][dead] += g.sum(0)


def _above(dictionary: Dictionary, x: Tensor, floor: float, screen: Screen) -> tuple[Pairs, Tensor]:
    pairs = kernels.pairs_above(x, dictionary.W_enc, dictionary.b_enc, floor, screen)
    return pairs, kernels.pair_products(pairs, x, dictionary.W_enc, dictionary.b_enc).relu_()


def _residual(y_hat: Tensor, y: Tensor, rows: int) -> tuple[Tensor, float]:
    error = y_hat.sub_(y)
    # Norms by row first: one float32 sum over the whole batch loses a part in 10^5.
    return error, float(torch.linalg.vector_norm(error, dim=1).double().square().sum()) / rows


def _sparse_step(
    dictionary: Dictionary,
    x: Tensor,
    y: Tensor,
    pairs: Pairs,
    f: Tensor,
    rows: int,
    into: Gradients,
    extra: Tensor | None = None,
) -> Step:
    y_hat = kernels.weighted_rows(pairs, f, dictionary.W_dec).add_(dictionary.b_dec)
    error, mse = _residual(y_hat, y, rows)
    by_f = kernels.pair_products(pairs, error, dictionary.W_dec).mul_(2 / rows)
    radial = kernels.add_by_latent(pairs, f * by_f)
    on = f > 0
    g = (by_f if extra is None else by_f + extra) * on
    flipped, order = kernels.transposed(pairs)
    gradients = {
        "W_enc": kernels.by_latent(flipped, g[order], x, into.get("W_enc")),
        "b_enc": kernels.add_by_latent(pairs, g),
        "W_dec": kernels.by_latent(flipped, f[order] * (2 / rows), error, into.get("W_dec")),
        "b_dec": error.sum(0) * (2 / rows),
    }
    fired = kernels.add_by_latent(pairs, f) > 0
    return Step(mse, 0.0, mse, float(on.sum()) / rows, fired, gradients, radial, error, by_f)


def _dense_relu(
    dictionary: Dictionary, x: Tensor, y: Tensor, screen: Screen, rows: int, into: Gradients, push: Tensor
) -> tuple[Step, Tensor]:
    """Five dense products, and the sum of each latent's activations; in bfloat16 under a screen.

    Sums are float32 either way, and so are the weights that the gradients move.
    """
    low = torch.bfloat16 if screen else torch.float32
    W_enc, W_dec, near = dictionary.W_enc.to(low), dictionary.W_dec.to(low), x.to(low)
    f = torch.addmm(dictionary.b_enc.to(low), near, W_enc.T).relu_()
    totals = f.sum(0, dtype=torch.float32)
    y_hat = torch.mm(f, W_dec).to(torch.float32, copy=True).add_(dictionary.b_dec)
    error, mse = _residual(y_hat, y, rows)
    g = torch.addmm(push.to(low), error.to(low), W_dec.T, alpha=2 / rows)
    g = torch.ops.aten.threshold_backward(g, f, 0)
    step = _dense_step(f, g, near, error, mse, rows, into)
    return step, totals


def _dense_step(
    f: Tensor, g: Tensor, x: Tensor, error: Tensor, mse: float, rows: int, into: Gradients
) -> Step:
    """Gradients from the activations f and the gradients g of their pre-activations, both dense."""
    gradients = {
        "W_enc": _product(g, x, into.get("W_enc")),
        "b_enc": g.sum(0, dtype=torch.float32),
        "W_dec": _product(f, error.to(f.dtype), into.get("W_dec")).mul_(2 / rows),
        "b_dec": error.sum(0) * (2 / rows),
    }
    fired = f.sum(0, dtype=torch.float32) > 0
    return Step(mse, 0.0, mse, kernels.count_positive(f) / rows, fired, gradients, error=error)


def _product(acts: Tensor, x: Tensor, out: Tensor | None) -> Float[Tensor, "width d"]:
    """acts^T x in float32, into `out` if there is one."""
    if acts.dtype == torch.float32:
        return torch.mm(acts.T, x, out=out)
    made = torch.mm(acts.T, x)
    return made.float() if out is None else out.copy_(made)
