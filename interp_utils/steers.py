"""What steering changes: clamped latents and pushes, checked, and the forward hook that carries them out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_utils.activations import Prompt, as_list, check_finite, from_end, tokenize
from interp_utils.dictionaries.dictionary import Dictionary
from interp_utils.errors import InterpError
from interp_utils.sites import blocks, check_site

if TYPE_CHECKING:
    from nnsight import TransformersModel


@dataclass(frozen=True)
class Clamp:
    """Hold a latent at `value`, in units of the dictionary's activations, whatever it would be."""

    latent: int
    value: float


@dataclass(frozen=True, eq=False)
class Push:
    """Add a vector to the state, in the model's own units."""

    vector: Float[Tensor, " width"]


Steer = Clamp | Push
Steers = Sequence[Steer | Sequence[Steer]]


class Plan:
    """Checked prompts and steers, and where each row is steered; see `steered_logits`.

    Attributes:
        rows: token ids of each row.
        steers: those of each row.
        columns: steered positions of each row, counted from its end; None is all after the start token.
        block: whose output is steered.
    """

    def __init__(
        self,
        model: TransformersModel,
        dictionary: Dictionary,
        site: str,
        prompts: Prompt | Sequence[Prompt],
        steers: Steers,
        positions: int | Sequence[int] | None,
        new: int | None = None,
    ) -> None:
        if model.info.remote:
            raise InterpError("A remote model cannot be steered by a hook of this machine; load it here.")
        if new is not None and new < 1:
            raise InterpError(f"max_new_tokens is {new} but must be at least 1.")
        place = check_site(model, site)
        if place.kind != "resid_post":
            raise InterpError(f"Steering acts on the residual stream, as in 'resid_post.9', not on {site!r}.")
        _check_dictionary(dictionary, model.config.hidden_size)
        dictionary.check_site(str(place))
        self.model, self.dictionary, self.steers = model, dictionary, _checked(steers, dictionary)
        self.block = blocks(model._module.base_model)[place.layer]
        ids = [tokenize(model, prompt, new or 0) for prompt in as_list(prompts)]
        if len(ids) not in (1, len(steers)):
            raise InterpError(
                f"{len(ids)} prompts and {len(steers)} rows of steers; give one, or one per row."
            )
        self.rows = ids * len(steers) if len(ids) == 1 else ids
        wanted = [positions] if isinstance(positions, int) else positions
        self.columns = None if wanted is None else [_columns(len(row), wanted) for row in self.rows]
        if new is None and any(
            own and len(row) == 1 for row, own in zip(self.rows, self.steers, strict=True)
        ):
            raise InterpError("A prompt has only one token, and the first is never steered; add some text.")

    def batches(self, size: int) -> Iterator[slice]:
        """The rows, `size` at a time."""
        if size < 1:
            raise InterpError(f"batch_size is {size} but must be at least 1.")
        return (slice(start, start + size) for start in range(0, len(self.rows), size))

    def steered(self, rows: slice) -> Bool[Tensor, "row 1"]:
        """Which rows have steers at all."""
        return torch.tensor([bool(own) for own in self.steers[rows]])[:, None]

    def in_prompt(self, rows: slice, real: Int[Tensor, "row pos"]) -> Bool[Tensor, "row pos"]:
        """Which states of left-padded prompts are steered, from their attention mask."""
        mask = real.bool() & (real.cumsum(-1) > 1)  # not the start token, whose state is a giant
        if self.columns is not None:
            columns = real.shape[1] + torch.tensor(self.columns[rows], device=real.device)
            mask &= torch.zeros_like(mask).scatter_(1, columns, True)
        return mask & self.steered(rows).to(real.device)


class Hook:
    """Forward hook that changes each row's states by what its steers ask for."""

    def __init__(self, plan: Plan, rows: slice, device: torch.device) -> None:
        steers, dictionary = plan.steers[rows], plan.dictionary
        clamps = [(r, s.latent, s.value) for r, own in enumerate(steers) for s in own if isinstance(s, Clamp)]
        owner, latents, values = zip(*clamps, strict=True) if clamps else ((), (), ())
        self.block, self.dictionary, self.any = plan.block, dictionary, any(steers)
        self.owner = torch.tensor(owner, dtype=torch.long, device=device)  # (clamp), its row
        self.latents = torch.tensor(latents, dtype=torch.long, device=dictionary.W_enc.device)
        self.values = torch.tensor(values, dtype=torch.float32, device=device)
        self.mean, self.scale = dictionary.mean.to(device), dictionary.scale.to(device)
        self.W_enc = dictionary.W_enc.detach()[self.latents].to(device)  # (clamp, d_model)
        self.b_enc = dictionary.b_enc.detach()[self.latents].to(device)
        self.W_dec = (dictionary.W_dec.detach()[self.latents] / dictionary.target_scale).to(device)
        thresholds = dictionary.threshold.detach().expand(dictionary.width)[self.latents]
        self.threshold = thresholds.clamp(min=0).to(device)
        self.push = torch.zeros(len(steers), dictionary.d_in, device=device)
        for row, own in enumerate(steers):
            for steer in own:
                if isinstance(steer, Push):
                    self.push[row] += steer.vector.to(self.push)

    @contextmanager
    def at(self, mask: Bool[Tensor, "row pos"] | None) -> Iterator[None]:
        """Steer where `mask` says while the context lasts; None, or no steer in any row, hooks nothing."""
        if mask is None or not self.any:
            yield
            return
        self.mask = mask
        handle = self.block.register_forward_hook(self)
        try:
            yield
        finally:
            handle.remove()

    def __call__(self, _module: Any, _args: Any, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]  # (row, pos, d_model)
        new = torch.where(self.mask[..., None], x + self._change(x.float()).to(x.dtype), x)
        return new if isinstance(output, Tensor) else (new, *output[1:])

    def _change(self, x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        change = self.push[:, None].expand_as(x)
        if not len(self.owner):
            return change
        step = self.values[:, None] - self._acts((x[self.owner] - self.mean) * self.scale)
        return change.index_add(0, self.owner, step[..., None] * self.W_dec[:, None])

    def _acts(self, x: Float[Tensor, "clamp pos d_model"]) -> Float[Tensor, "clamp pos"]:
        """Activations of each clamp's latent, as `encode` gives them; only topk needs the other latents."""
        if self.dictionary.kind == "topk":
            found = self.dictionary.encode(x.to(self.dictionary.W_enc)).detach()
            own = self.latents[:, None, None].expand(-1, x.shape[1], 1)
            return found.gather(-1, own)[..., 0].to(x)
        pre = (x @ self.W_enc[..., None])[..., 0] + self.b_enc[:, None]
        return pre * (pre > self.threshold[:, None])


def _check_dictionary(dictionary: Dictionary, d_model: int) -> None:
    if dictionary.transcoder:
        raise InterpError("A transcoder does not write where it reads; steer with an autoencoder.")
    if dictionary.d_in != d_model:
        raise InterpError(
            f"The dictionary reads rows of width {dictionary.d_in} but the model's d_model is {d_model}."
        )


def _checked(steers: Steers, dictionary: Dictionary) -> list[list[Steer]]:
    """The steers of each row."""
    if not len(steers):
        raise InterpError("The list of steers is empty; give one list per row.")
    rows = [[own] if isinstance(own, Clamp | Push) else list(own) for own in steers]
    for row, own in enumerate(rows):
        for steer in own:
            _check_steer(steer, dictionary)
        latents = [steer.latent for steer in own if isinstance(steer, Clamp)]
        if len(set(latents)) < len(latents):
            raise InterpError(f"Row {row} clamps a latent twice; give each latent one value.")
    return rows


def _check_steer(steer: Steer, dictionary: Dictionary) -> None:
    if isinstance(steer, Push):
        check_finite(steer.vector, "entries of a push's vector")
        if steer.vector.shape != (dictionary.d_in,):
            raise InterpError(
                f"A push has the shape {tuple(steer.vector.shape)} but the model's states have "
                f"({dictionary.d_in},)."
            )
    elif not 0 <= steer.latent < dictionary.width:
        raise InterpError(
            f"Latent {steer.latent} is out of range; this dictionary has latents 0 to {dictionary.width - 1}."
        )
    elif not math.isfinite(steer.value):
        raise InterpError(f"Latent {steer.latent} is clamped to {steer.value}; give a finite number.")


def _columns(length: int, positions: Sequence[int]) -> list[int]:
    """Positions of one prompt, counted from its end."""
    if not len(positions):
        raise InterpError("The list of positions is empty; give at least one, or None for all.")
    found = [from_end(length, position) for position in positions]
    if -length in found:
        raise InterpError("Position 0 is the start token, whose state is never changed; leave it out.")
    return found
