"""The dictionary itself: an encoder, an activation function that keeps few latents, and a decoder."""

from __future__ import annotations

import copy
import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp_utils.errors import InterpError, nearest

Kind = Literal["relu", "topk", "batchtopk", "jumprelu"]
DECODER_NORM = 0.1  # of the ReLU kind at the start (April 2024 recipe: 0.05 to 1)
FIRST_THRESHOLD = 1.0  # of the JumpReLU kind at the start
UNIT = 1e-4  # how far from 1 a decoder row's norm may be and still count as 1


class Dictionary(nn.Module):
    """f(x) = act(W_enc x + b_enc), y_hat = sum_i f_i(x) W_dec_i + b_dec; one row per latent in both matrices.

    Activation functions, with pre = W_enc x + b_enc:
        relu: max(pre, 0) (Scaling Monosemanticity, methods).
        topk: max(pre, 0) of the k largest of each row (Gao et al. 2024).
        batchtopk: in training the k * rows largest of the batch; here pre where it exceeds `threshold`, the
            running mean of the smallest value that training kept (Bussmann et al. 2024).
        jumprelu: pre where it exceeds the latent's own `threshold` (Rajamanoharan et al. 2024).

    Inputs are what the activation store serves: (activation - mean) * scale, so that E||x||^2 = d_in; targets
    likewise. `set_units` keeps these numbers with the dictionary, `raw` folds them into its weights.

    Attributes:
        W_enc: "width d_in". b_enc: "width". W_dec: "width d_out". b_dec: "d_out".
        thresholds: "width", jumprelu only.
        mean: "d_in". scale: a scalar. target_mean: "d_out". target_scale: a scalar; 0 and 1 until set.
        transcoder: whether d_out was given, even if equal to d_in: the target is then not the input.
        threshold: a scalar for batchtopk, "width" for jumprelu, zero otherwise.
        site: where it reads, such as "resid_post.9"; None if nobody said (`load_for` does).

    Raises:
        InterpError: an unknown kind, a size below 1, or a k that does not fit the kind or the width.
    """

    def __init__(self, kind: Kind, d_in: int, width: int, d_out: int | None = None, k: int | None = None):
        super().__init__()
        self.transcoder = d_out is not None
        self.site: str | None = None
        d_out = d_in if d_out is None else d_out
        _check(kind, d_in, width, d_out, k)
        self.kind, self.d_in, self.width, self.d_out, self.k = kind, d_in, width, d_out, k
        self.W_enc = nn.Parameter(torch.zeros(width, d_in))
        self.b_enc = nn.Parameter(torch.zeros(width))
        self.W_dec = nn.Parameter(torch.zeros(width, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        for name, size in (("mean", d_in), ("target_mean", self.d_out)):
            self.register_buffer(name, torch.zeros(size))
        for name in ("scale", "target_scale"):
            self.register_buffer(name, torch.ones(()))
        if kind == "jumprelu":
            self.thresholds = nn.Parameter(torch.full((width,), FIRST_THRESHOLD))
        else:
            self.register_buffer("_threshold", torch.zeros(()), persistent=kind == "batchtopk")

    @classmethod
    def create(
        cls,
        kind: Kind,
        d_in: int,
        width: int,
        d_out: int | None = None,
        *,
        k: int | None = None,
        seed: int = 0,
    ) -> Dictionary:
        """A dictionary as its recipe starts it, the same for the same seed.

        relu: random decoder rows of norm 0.1, W_enc = W_dec, biases 0 (April 2024 update). The others: random
        unit rows, W_enc = W_dec, biases 0: Gao et al. 2024 start b_dec at the mean of the data, which is zero
        here because data are centred; jumprelu thresholds of 1. A transcoder, made by giving d_out, has nothing
        to tie: its decoder starts at zero.

        Raises:
            InterpError: as for the class.
        """
        made = cls(kind, d_in, width, d_out, k)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            norm = DECODER_NORM if kind == "relu" else 1.0
            rows = nn.functional.normalize(torch.randn(width, d_in, generator=generator)) * norm
            made.W_enc.copy_(rows)
            if not made.transcoder:
                made.W_dec.copy_(rows)
        return made

    mean: Tensor
    scale: Tensor
    target_mean: Tensor
    target_scale: Tensor
    _threshold: Tensor

    @property
    def threshold(self) -> Float[Tensor, "*latent"]:
        return self.thresholds if self.kind == "jumprelu" else self._threshold

    def pre_activations(self, x: Float[Tensor, "*row d_in"]) -> Float[Tensor, "*row width"]:
        """W_enc x + b_enc."""
        return nn.functional.linear(x, self.W_enc, self.b_enc)

    def encode(self, x: Float[Tensor, "*row d_in"]) -> Float[Tensor, "*row width"]:
        """Activations of all latents, most of them zero."""
        pre = self.pre_activations(x)
        if self.kind == "topk" and self.k:
            values, ids = pre.topk(self.k, dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter_(-1, ids, values.relu())
        return pre.relu() if self.kind == "relu" else pre.relu() * (pre > self.threshold)

    def check_site(self, site: str) -> None:
        """Refuse a site that is known not to be this dictionary's.

        Raises:
            InterpError: it reads another one.
        """
        if self.site not in (None, site):
            raise InterpError(f"The dictionary reads {self.site}, not {site}; give its own site.")

    def has_unit_rows(self) -> bool:
        """Whether all decoder rows are unit rows; one of zeros, which no length would change, counts as one."""
        norms = self.W_dec.detach().norm(dim=1)
        return bool((((norms - 1).abs() < UNIT) | (norms == 0)).all())

    def decode(self, acts: Float[Tensor, "*row width"]) -> Float[Tensor, "*row d_out"]:
        """acts W_dec + b_dec."""
        return acts @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*row d_in"]) -> Float[Tensor, "*row d_out"]:
        """The reconstruction, or the predicted target."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def normalised(self) -> Dictionary:
        """The same function with unit decoder rows, the norms folded into encoder and thresholds.

        Activations become f_i ||W_dec_i||, the paper's "feature activation". A batchtopk dictionary whose rows
        are not unit yet becomes a jumprelu one, because every latent then has its own threshold.

        Raises:
            InterpError: a topk dictionary with rows that are not unit; folding would change which are kept.
        """
        norms = self.W_dec.norm(dim=1)
        unit = self.has_unit_rows()
        if self.kind == "topk" and not unit:
            raise InterpError(
                "The decoder rows of this topk dictionary are not unit; folding their norms into the encoder "
                "would change which latents are kept."
            )
        kind: Kind = "jumprelu" if self.kind == "batchtopk" and not unit else self.kind
        if unit and kind in ("topk", "batchtopk"):
            norms = torch.ones_like(norms)
        scale = norms.clamp(min=torch.finfo(norms.dtype).tiny)
        d_out = self.d_out if self.transcoder else None
        made = Dictionary(kind, self.d_in, self.width, d_out, None if kind == "jumprelu" else self.k)
        made.W_enc.copy_(self.W_enc * scale[:, None])
        made.b_enc.copy_(self.b_enc * scale)
        made.W_dec.copy_(self.W_dec / scale[:, None])
        made.b_dec.copy_(self.b_dec)
        made.set_units(self.mean, float(self.scale), self.target_mean, float(self.target_scale))
        made.site = self.site
        if kind == "batchtopk":
            made.set_threshold(self.threshold)
        elif kind == "jumprelu":
            made.set_threshold(self.threshold * scale)
        return made

    @torch.no_grad()
    def set_units(
        self,
        mean: Float[Tensor, " d_in"],
        scale: float,
        target_mean: Float[Tensor, " d_out"] | None = None,
        target_scale: float | None = None,
    ) -> Dictionary:
        """Remember what was taken from activations before training; the target's default to the input's.

        Raises:
            InterpError: a scale that is not above 0 and finite.
        """
        for factor in (scale, scale if target_scale is None else target_scale):
            if not 0 < factor < math.inf:
                raise InterpError(
                    f"A scale of {factor} is no unit; give a factor above 0, such as a store's `scale`."
                )
        self.mean.copy_(mean)
        self.scale.fill_(scale)
        self.target_mean.copy_(mean if target_mean is None else target_mean)
        self.target_scale.fill_(scale if target_scale is None else target_scale)
        return self

    @torch.no_grad()
    def raw(self) -> Dictionary:
        """The dictionary that maps activations as the model has them; its latents' activations are the same."""
        made = copy.deepcopy(self)
        made.W_enc.mul_(self.scale)
        made.b_enc.copy_(self.b_enc.double() - made.W_enc.double() @ self.mean.double())
        made.W_dec.div_(self.target_scale)
        made.b_dec.copy_(self.b_dec / self.target_scale + self.target_mean)
        return made.set_units(torch.zeros_like(self.mean), 1.0, torch.zeros_like(self.target_mean), 1.0)

    @torch.no_grad()
    def set_threshold(self, threshold: Float[Tensor, "*latent"]) -> None:
        """Set what `threshold` gives: a scalar for batchtopk, one per latent for jumprelu."""
        (self.thresholds if self.kind == "jumprelu" else self._threshold).copy_(threshold)


def _check(kind: str, d_in: int, width: int, d_out: int, k: int | None) -> None:
    if kind not in get_args(Kind):
        raise InterpError(f"There is no kind of dictionary {kind!r}.{nearest(str(kind), get_args(Kind))}")
    if min(d_in, width, d_out) < 1:
        raise InterpError(
            f"A dictionary needs d_in, width and d_out of at least 1, not {d_in}, {width} and {d_out}."
        )
    needs_k = kind in ("topk", "batchtopk")
    if needs_k and k is None:
        raise InterpError(f"A dictionary of kind {kind!r} needs k, the number of latents per row.")
    if not needs_k and k is not None:
        raise InterpError(f"A dictionary of kind {kind!r} has no k; leave it out.")
    if k is not None and not 1 <= k <= width:
        raise InterpError(f"k is {k} but must lie between 1 and the width, {width}.")
