"""What a model loses when a dictionary's output stands in for what it computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_utils.activations import softcapped
from interp_utils.dictionaries.dictionary import Dictionary
from interp_utils.errors import InterpError
from interp_utils.recorder import OUTLIER
from interp_utils.sites import Site, blocks, check_site, forward_to

if TYPE_CHECKING:
    from nnsight import TransformersModel

TOKENS = 256  # whose logits are held at a time
RUNS = ("clean", "spliced", "mean", "zero")


def ce_metrics(
    model: TransformersModel,
    dictionary: Dictionary,
    windows: Sequence[Sequence[int]],
    site: str,
    *,
    batch_size: int = 8,
) -> dict[str, float]:
    """Cross-entropy of the model as it is and with its state at one site replaced.

    Replaced is what stands at every position but the first (the start token) and outliers, rows whose norm
    exceeds 6 medians. Scored are the tokens predicted from those positions on, all but the first two of each
    window. The median, and the mean for mean ablation, are those of all the windows, from one more run of the
    model as it is, so that neither depends on the order of the batches or on the dictionary's units. With CE the
    mean of -ln p(next token), in nats:
        ce: the model as it is.
        ce_spliced: the state replaced by the dictionary's output, brought back to the model's units.
        ce_mean_ablated, ce_zero_ablated: replaced by the mean of what is replaced, by zeros.
        ce_increase: ce_spliced - ce.
        recovered_mean: (ce_mean_ablated - ce_spliced) / (ce_mean_ablated - ce); recovered_zero likewise. Zeros
            break a residual stream, so that the latter is near 1 for almost any dictionary.
        kl: mean of KL(p_model || p_spliced) over the scored positions.
        tokens, replaced_share: how many are scored, and the share of rows after the first that are replaced.

    Args:
        model: from `load_model`.
        dictionary: with its units set (`set_units`).
        windows: token ids, each window beginning with the start token.
        site: of the input, such as "resid_post.9". A transcoder at "mlp_in.9" replaces "mlp_out.9".

    Raises:
        InterpError: no window of at least three tokens, no such site, another width, or a transcoder at a site
            that is not "mlp_in".
    """
    place = check_site(model, site)
    usable = [list(map(int, window)) for window in windows if len(window) > 2]
    if not usable:
        raise InterpError("There is no window of at least three tokens; give windows of token ids.")
    batches = [_padded(usable[start : start + batch_size]) for start in range(0, len(usable), batch_size)]
    sums = dict.fromkeys((*RUNS, "kl"), 0.0)
    with torch.inference_mode():
        splice = _Splice(model, dictionary, place, batches)
        for (ids, counted), chosen in zip(batches, splice.chosen, strict=True):
            states = {run: splice.run(run, ids, chosen) for run in RUNS}
            for run, value in _scores(model, states, ids, counted).items():
                sums[run] += value
    scored = sum(int(counted[:, 2:].sum()) for _, counted in batches)
    means = {name: value / scored for name, value in sums.items()}
    ce, spliced, mean, zero = (means[run] for run in RUNS)
    return {
        "ce": ce,
        "ce_spliced": spliced,
        "ce_mean_ablated": mean,
        "ce_zero_ablated": zero,
        "ce_increase": spliced - ce,
        "recovered_mean": (mean - spliced) / (mean - ce),
        "recovered_zero": (zero - spliced) / (zero - ce),
        "kl": means["kl"],
        "tokens": scored,
        "replaced_share": splice.share,
    }


class _Splice:
    """Runs of the model with some rows of the target site replaced.

    Attributes:
        chosen: of each batch, "batch pos", the positions that are replaced.
        share: of the rows after the first that are.
        mean: "d_out", of what the model has at the target there.

    Raises:
        InterpError: a transcoder that does not read the MLP's input, or another width.
    """

    def __init__(
        self,
        model: TransformersModel,
        dictionary: Dictionary,
        place: Site,
        batches: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        if dictionary.transcoder and place.kind != "mlp_in":
            raise InterpError(
                f"A transcoder stands in for an MLP and reads its input, not {place}; "
                f"name the site 'mlp_in.{place.layer}'."
            )
        self.body, self.dictionary, self.source = model._module.base_model, dictionary, place
        self.target = Site("mlp_out", place.layer) if dictionary.transcoder else place
        norms, rows = self._clean(batches)
        limit = OUTLIER * float(torch.cat([n[n.isfinite()] for n in norms]).median())
        self.chosen = [n <= limit for n in norms]
        kept = torch.cat([row[c] for row, c in zip(rows, self.chosen, strict=True)])
        self.share = len(kept) / sum(int(n.isfinite().sum()) for n in norms)
        self.mean = kept.mean(0, dtype=torch.float64)

    def _clean(self, batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """Of each batch the norms at the source, infinite where no row counts, and the states at the target."""
        sites = list(dict.fromkeys((self.source, self.target)))
        wanted = ((self.source, self.dictionary.d_in, "reads"), (self.target, self.dictionary.d_out, "gives"))
        norms, rows = [], []
        for ids, counted in batches:
            states = forward_to(self.body, sites, ids)
            for site, width, verb in wanted:
                if states[site].shape[-1] != width:
                    raise InterpError(
                        f"Rows at {site} are {states[site].shape[-1]} wide but the dictionary {verb} {width}."
                    )
            after_first = counted.clone()
            after_first[:, 0] = False
            norms.append(states[self.source].float().norm(dim=-1).masked_fill(~after_first, torch.inf))
            rows.append(states[self.target])
        return norms, rows

    def run(
        self, what: str, ids: Int[Tensor, "batch pos"], chosen: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Final hidden states."""
        apart, inputs = self.source != self.target, []

        def source(value: Tensor) -> None:
            inputs.append(value)

        def target(value: Tensor) -> Tensor | None:
            if what == "clean":
                return None
            new = self._new(what, (inputs[0] if apart else value)[chosen])
            return value.clone().index_put_((chosen,), new.to(value.dtype))

        with _hooked(self.body, self.source, source, apart), _hooked(self.body, self.target, target, True):
            return self.body(input_ids=ids, use_cache=False).last_hidden_state

    def _new(self, what: str, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_out"]:
        dictionary = self.dictionary
        if what == "zero":
            return x.new_zeros(len(x), dictionary.d_out)
        if what == "mean":
            return self.mean.expand(len(x), -1)
        y_hat = dictionary((x.float() - dictionary.mean) * dictionary.scale)
        return y_hat / dictionary.target_scale + dictionary.target_mean


@contextmanager
def _hooked(
    body: torch.nn.Module, site: Site, call: Callable[[Tensor], Tensor | None], wanted: bool
) -> Iterator[None]:
    """Hand what stands at a site to `call`, whose answer, if any, replaces it."""
    if not wanted:
        yield
        return
    block = blocks(body)[site.layer]

    def after(_module: Any, _args: Any, output: Any) -> Any:
        first = output if isinstance(output, Tensor) else output[0]
        new = call(first)
        if new is None or isinstance(output, Tensor):
            return new
        return (new, *output[1:])

    if site.kind == "mlp_in":
        handle = block.get_submodule("mlp").register_forward_pre_hook(lambda _module, args: call(args[0]))
    elif site.kind == "resid_post":
        handle = block.register_forward_hook(after)
    else:
        name = "post_feedforward_layernorm" if hasattr(block, "post_feedforward_layernorm") else "mlp"
        handle = block.get_submodule(name).register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and which of them are real; no token reads padding that comes after it."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    counted = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return ids, counted


def _scores(
    model: TransformersModel, states: dict[str, Tensor], ids: Tensor, counted: Tensor
) -> dict[str, float]:
    """Sums of -ln p(next token) of every run and of KL(clean || spliced), a few tokens' logits at a time."""
    predicted = counted[:, 2:]
    wanted = ids[:, 2:][predicted]
    rows = {run: state[:, 1:-1][predicted].split(TOKENS) for run, state in states.items()}
    sums = dict.fromkeys((*RUNS, "kl"), 0.0)
    for i, some in enumerate(wanted.split(TOKENS)):
        logs = {}
        for run in RUNS:
            logits = softcapped(model, model.unembed._module(rows[run][i]))
            logs[run] = logits.float().log_softmax(-1)
            sums[run] -= float(logs[run].gather(1, some[:, None]).double().sum())
            if run == "spliced":
                kl = (logs["clean"].exp() * (logs["clean"] - logs["spliced"])).sum(-1)
                sums["kl"] += float(kl.double().sum())
                del logs["clean"]
    return sums
