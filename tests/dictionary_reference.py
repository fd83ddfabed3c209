"""Slow, obvious training of dictionaries by autograd, to hold against the package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interp_utils.dictionaries import Dictionary, TrainConfig

BAND = 0.5


class Step(torch.autograd.Function):
    """1 where pre exceeds theta; backwards -1 / band towards theta for pairs within half a band of it."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor) -> Tensor:
        ctx.save_for_backward(pre, theta)
        return (pre > theta).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        pre, theta = ctx.saved_tensors
        near = ((pre - theta).abs() < BAND / 2) & (pre > 0)
        return None, -(grad * near).sum(0) / BAND


class Jump(torch.autograd.Function):
    """pre where it exceeds theta; the step stands at height theta."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor) -> Tensor:
        ctx.save_for_backward(pre, theta)
        return pre * (pre > theta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        pre, theta = ctx.saved_tensors
        near = ((pre - theta).abs() < BAND / 2) & (pre > 0)
        return grad * (pre > theta), -(grad * near * theta).sum(0) / BAND


def activations(dictionary: Dictionary, pre: Tensor) -> Tensor:
    if dictionary.kind == "jumprelu":
        return Jump.apply(pre, dictionary.thresholds)
    if dictionary.kind == "topk":
        kept = pre >= pre.topk(dictionary.k, dim=1).values[:, -1:]
        return pre.relu() * kept
    if dictionary.kind == "batchtopk":
        flat = pre.relu().flatten()
        kept = flat >= flat.topk(dictionary.k * len(pre)).values[-1]
        return (flat * kept).view_as(pre)
    return pre.relu()


def loss(
    dictionary: Dictionary,
    x: Tensor,
    y: Tensor,
    weight: float = 0.0,
    dead: Tensor | None = None,
    aux_k: int = 0,
) -> tuple[Tensor, Tensor]:
    """(loss, activations) of the kind's own loss, graph kept."""
    pre = x @ dictionary.W_enc.T + dictionary.b_enc
    f = activations(dictionary, pre)
    y_hat = f @ dictionary.W_dec + dictionary.b_dec
    total = (y_hat - y).square().sum(1).mean()
    norms = dictionary.W_dec.norm(dim=1)
    if dictionary.kind == "relu":
        total = total + weight * (f * norms).sum(1).mean()
    if dictionary.kind == "jumprelu":
        total = total + weight * Step.apply(pre, dictionary.thresholds).sum(1).mean()
    if dead is not None and len(dead) and aux_k:
        some = pre[:, dead]
        kept = some >= some.topk(min(aux_k, len(dead)), dim=1).values[:, -1:]
        z = some.relu() * kept
        left = (y - y_hat).detach() - z @ dictionary.W_dec[dead]
        total = total + left.square().sum(1).mean() / 32
    return total, f


def train(dictionary: Dictionary, batches: list[tuple[Tensor, Tensor]], config: TrainConfig) -> list[float]:
    """Plain loop with torch's own Adam and clipping; returns the losses."""
    plan = config.filled(dictionary)
    named = dict(dictionary.named_parameters())
    frozen = {"W_dec"} if config.freeze_decoder else set()
    trained = [p for name, p in named.items() if name not in frozen]
    adam = torch.optim.Adam(trained, lr=1.0, betas=config.betas, eps=1e-8)
    silent = torch.zeros(dictionary.width, dtype=torch.int64)
    unit = dictionary.kind != "relu" and not dictionary.transcoder and not frozen
    losses = []
    for step, (x, y) in enumerate(batches):
        warmup = plan["l1_warmup"] * config.steps
        weight = plan["l1"] * (min(1.0, (step + 1) / warmup) if warmup else 1.0)
        dead = (silent > config.dead_tokens).nonzero().flatten()
        total, f = loss(dictionary, x, y, weight, dead, plan["aux_k"])
        adam.zero_grad()
        total.backward()
        with torch.no_grad():
            W, grad = dictionary.W_dec, dictionary.W_dec.grad
            if unit:
                grad -= (grad * W).sum(1, keepdim=True) * W
            if config.clip_norm:
                torch.nn.utils.clip_grad_norm_(trained, config.clip_norm)
            adam.param_groups[0]["lr"] = config.rate(step, plan["lr"])
            adam.step()
            if unit:
                W /= W.norm(dim=1, keepdim=True)
            if dictionary.kind == "jumprelu":
                dictionary.thresholds.clamp_(min=0)
        silent += len(x)
        silent[(f > 0).any(0)] = 0
        losses.append(float(total.detach()))
    return losses
