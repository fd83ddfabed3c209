"""Places in a model whose activations are collected, and a forward that ends after the last of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from interp_utils.activations import check_layer
from interp_utils.errors import InterpError

if TYPE_CHECKING:
    from nnsight import TransformersModel

KINDS = ("mlp_in", "mlp_out", "resid_post")  # in the order in which a block computes them


@dataclass(frozen=True)
class Site:
    """A place: "resid_post.9", the residual stream after block 9; "mlp_in.9", what its MLP reads (the output of
    the norm before it); "mlp_out.9", what its MLP adds to the stream (after Gemma's norm behind it)."""

    kind: str
    layer: int

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"


def check_site(model: TransformersModel, site: str) -> Site:
    """The site of that name; a negative layer counts from the last.

    Raises:
        InterpError: no such kind or layer, or the model's blocks have no `mlp`.
    """
    found = re.fullmatch(rf"({'|'.join(KINDS)})\.(-?\d+)", site)
    if not found:
        raise InterpError(
            f"There is no site {site!r}; write one of {', '.join(KINDS)} and a layer, as in 'resid_post.9'."
        )
    known = Site(found[1], check_layer(model, int(found[2])))
    if known.kind != "resid_post" and not hasattr(blocks(model._module.base_model)[known.layer], "mlp"):
        raise InterpError(
            f"The blocks of {model.info.name} have no module 'mlp'; only resid_post can be read."
        )
    return known


def blocks(body: torch.nn.Module) -> Any:
    """The transformer blocks of a model without its head, whatever the family calls them."""
    return body.get_submodule("h" if hasattr(body, "h") else "layers")


def body_in(model: TransformersModel, dtype: torch.dtype) -> torch.nn.Module:
    """The model without its head, computing in `dtype`; a copy unless its weights have that type already."""
    body = model._module.base_model
    if all(p.dtype == dtype for p in body.parameters()):
        return body
    # Buffers keep their type, as when a model is loaded in `dtype`: rotary frequencies need float32.
    cast = {id(p): torch.nn.Parameter(p.to(dtype), requires_grad=False) for p in body.parameters()}
    return copy.deepcopy(body, cast)


class _Enough(Exception):
    """The last site has been computed."""


def forward_to(
    body: torch.nn.Module, sites: Sequence[Site], ids: Int[Tensor, "batch pos"]
) -> dict[Site, Float[Tensor, "batch pos d"]]:
    """Activations at the sites, from one forward that ends after the last of them.

    Shorter rows are padded on the right: no token reads one that comes after it, so none needs a mask.
    """
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, value: Any) -> None:
        seen[site] = value if isinstance(value, Tensor) else value[0]
        if len(seen) == len(sites):
            raise _Enough

    handles = [_hook(blocks(body)[site.layer], site, keep) for site in sites]
    try:
        with torch.inference_mode():
            body(input_ids=ids, use_cache=False)
    except _Enough:
        return seen
    finally:
        for handle in handles:
            handle.remove()
    raise AssertionError("a site was not reached")


def _hook(block: torch.nn.Module, site: Site, keep: Callable[[Site, Any], None]) -> RemovableHandle:
    if site.kind == "mlp_in":
        mlp = block.get_submodule("mlp")
        return mlp.register_forward_pre_hook(lambda _module, args: keep(site, args[0]))
    name = "post_feedforward_layernorm" if hasattr(block, "post_feedforward_layernorm") else "mlp"
    module = block if site.kind == "resid_post" else block.get_submodule(name)
    return module.register_forward_hook(lambda _module, _args, output: keep(site, output))
