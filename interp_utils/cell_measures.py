"""What can be measured at a cell of a Patchscopes grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_utils.activations import check_finite, logit_lens
from interp_utils.candidates import Rows, candidate_log_probs, distinguishing
from interp_utils.errors import InterpError

if TYPE_CHECKING:
    from nnsight import TransformersModel


@dataclass(frozen=True)
class Measures:
    """The measurements asked of a grid; the arguments of `patchscopes.grid` of the same names."""

    candidates: Sequence[str] | None = None
    answers: Sequence[str] | None = None
    top_k: int = 0
    final: Float[Tensor, "_ final_width"] | None = None
    source_model: TransformersModel | None = None
    max_new_tokens: int = 0

    @property
    def reads(self) -> bool:
        """Whether anything but generated text is asked."""
        return bool(self.candidates is not None or self.top_k or self.final is not None)

    def check(self, n_sources: int) -> None:
        """Complain before any heavy work.

        Raises:
            InterpError: nothing to measure or less, answers without candidates or not among them, other
                lengths than the sources', NaN.
        """
        if self.max_new_tokens < 0:
            raise InterpError(f"max_new_tokens is {self.max_new_tokens}; give 0 for no text, or more.")
        if isinstance(self.candidates, str):
            raise InterpError(f"The candidates are one text, {self.candidates!r}; give a list of texts.")
        if not self.reads and not self.max_new_tokens:
            raise InterpError("Nothing to measure; give candidates, top_k, final or max_new_tokens.")
        if self.answers is not None:
            strange = set(self.answers) - set(self.candidates or ())
            if strange:
                raise InterpError(f"The answer {min(strange)!r} is not among the candidates; add it.")
        for name, given in (("answers", self.answers), ("final states", self.final)):
            if given is not None and len(given) != n_sources:
                raise InterpError(f"{len(given)} {name} for {n_sources} sources; give one each.")
        if self.final is not None:
            check_finite(self.final, "final states")

    def check_model(self, model: TransformersModel) -> None:
        """Raise InterpError for what M* or the source model cannot give: tokens, width, the same vocabulary."""
        vocab, source = model.config.vocab_size, self.source_model or model
        if not 0 <= self.top_k <= vocab:
            raise InterpError(f"top_k is {self.top_k} but the vocabulary has {vocab} tokens; give 0 to that.")
        if self.final is None:
            return
        if self.final.shape[1:] != (source.config.hidden_size,):
            raise InterpError(
                f"The final states have width {self.final.shape[-1]} but the d_model of the model that reads "
                f"them is {source.config.hidden_size}; give M as source_model."
            )
        if source is not model and source.tokenizer.get_vocab() != model.tokenizer.get_vocab():
            raise InterpError(
                "Source and target model have different vocabularies, so that their next tokens cannot be "
                "compared; leave `final` out and compare texts."
            )

    def columns(self, paths: list[list[int]] | None) -> int | None:
        """How many columns of the vocabulary are read; None is all."""
        whole = self.top_k or self.final is not None or self.new_tokens(paths)
        return None if paths is None or whole else len(paths)

    def new_tokens(self, paths: list[list[int]] | None) -> int:
        """How many tokens are run after T: of a text, or of the longest candidate but its last."""
        return max(self.max_new_tokens, *(len(path) - 1 for path in paths or [[0]]))

    def of(
        self, model: TransformersModel, rows: Rows, sources: Sequence[int], paths: list[list[int]] | None
    ) -> dict[str, Any]:
        """Columns of the result table for some cells, all but the generated text."""
        out: dict[str, Any] = {}
        if paths:
            out |= self._choices(candidate_log_probs(rows, paths), sources)
        if self.final is None and not self.top_k:
            return out
        logits = rows.logits()
        if self.top_k:
            best = logits.softmax(-1).topk(self.top_k)
            out["top"] = [[model.tokenizer.decode([i]) for i in row] for row in best.indices.tolist()]
            out["top_prob"] = [[round(p, 6) for p in row] for row in best.values.tolist()]
        if self.final is not None:
            out |= self._next_token(model, logits.argmax(-1), torch.as_tensor(list(sources)))
        return out

    def paths(self, model: TransformersModel) -> list[list[int]] | None:
        """Tokens by which the candidates are told apart."""
        return None if self.candidates is None else distinguishing(model, self.candidates)

    def _choices(self, log_probs: Float[Tensor, "row candidate"], sources: Sequence[int]) -> dict[str, Any]:
        assert self.candidates is not None
        names = list(self.candidates)
        chosen = [names[i] for i in log_probs.argmax(-1).tolist()]
        if self.answers is None:
            return {"choice": chosen}
        right = [self.answers[source] for source in sources]
        column = torch.tensor([names.index(answer) for answer in right])
        own = log_probs[torch.arange(len(right)), column].tolist()
        correct = [a == b for a, b in zip(chosen, right, strict=True)]
        return {"choice": chosen, "log_prob": own, "correct": correct}

    def _next_token(self, model: TransformersModel, token: Tensor, sources: Tensor) -> dict[str, Any]:
        """Precision@1 and surprisal against the source run (section 4.1)."""
        assert self.final is not None
        own, where = sources.unique(return_inverse=True)
        log_p = logit_lens(self.source_model or model, self.final[own]).log_softmax(-1)
        return {
            "token": token.tolist(),
            "precision": (token == log_p.argmax(-1)[where]).tolist(),
            "surprisal": (-log_p[where, token]).tolist(),
        }
