"""The text around an example of a `FeatureIndex`, put together again from the packages it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interp_utils.corpora import corpus_hash, load_corpus, split_documents
from interp_utils.errors import InterpError, nearest
from interp_utils.windows import start_token

if TYPE_CHECKING:
    from nnsight import TransformersModel

QUOTED = 15  # tokens at most of other people's text in one quotation: executed copies are published
BEFORE, AFTER = 10, 4  # tokens shown around the one in question


@dataclass(frozen=True)
class Window:
    """A token of a document with what the model saw of it.

    Attributes:
        ids: the start token, the document's tokens from the beginning of the window up to the one in question, and
            at most `AFTER` more of the same window.
        place: of the token in question in `ids`.
        next_id: the document's token after it, None at its end.
    """

    ids: list[int]
    place: int
    next_id: int | None

    @property
    def shown(self) -> slice:
        """The part of `ids` that may be quoted, never the start token."""
        return slice(max(1, self.place - BEFORE), self.place - BEFORE + QUOTED)


class Contexts:
    """Text of the rows that an index or a store was made of: training documents of `load_corpus`.

    A source whose text is another one on this machine (the standard library of another Python), or is not
    installed, has no windows; `note` says so.

    Args:
        model: whose tokenizer made the rows.
        card: of a `FeatureIndex` or an `ActivationStore`.

    Raises:
        InterpError: the card is of another model or other weights.
    """

    def __init__(self, model: TransformersModel, card: Mapping[str, Any]) -> None:
        check_model(model, card)
        self.model = model
        self.sources: dict[str, dict[str, Any]] = card["sources"]
        self._body = card["context"] - 1
        self._texts: dict[str, list[str] | None] = {}
        self._ids: dict[tuple[str, int], list[int]] = {}
        self._start = start_token(model)

    def window(self, source: str, document: int, position: int) -> Window | None:
        """What the model saw of a document at a token; None where the source's text differs here.

        Raises:
            InterpError: no such source, document or position.
        """
        ids = self._tokens(source, document)
        if ids is None:
            return None
        if not 0 <= position < len(ids):
            raise InterpError(
                f"Document {document} of {source!r} has tokens 0 to {len(ids) - 1}, not {position}."
            )
        first = position - position % self._body
        end = min(position + 1 + AFTER, first + self._body)
        following = ids[position + 1] if position + 1 < len(ids) else None
        return Window([self._start, *ids[first:end]], position - first + 1, following)

    def has(self, source: str) -> bool:
        """Whether the source's text here is the one that the rows were made of.

        Raises:
            InterpError: no such source.
        """
        return self._documents(source) is not None

    @property
    def note(self) -> str:
        """One sentence on sources that cannot be shown here; empty if there are none."""
        lost = [name for name in self.sources if not self.has(name)]
        if not lost:
            return ""
        return f"Examples from {' and '.join(lost)} are not shown: that text is missing here, or another version."

    def _documents(self, source: str) -> list[str] | None:
        if source not in self.sources:
            raise InterpError(f"The rows have no source {source!r}.{nearest(source, self.sources)}")
        if source not in self._texts:
            try:
                texts = split_documents(load_corpus(source))[0]
            except InterpError:  # not installed; a card can do without
                texts = []
            same = corpus_hash(texts) == self.sources[source]["hash"]
            self._texts[source] = texts if same else None
        return self._texts[source]

    def _tokens(self, source: str, document: int) -> list[int] | None:
        texts = self._documents(source)
        if texts is None:
            return None
        if not 0 <= document < len(texts):
            raise InterpError(f"{source!r} has documents 0 to {len(texts) - 1}, not {document}.")
        key = (source, document)
        if key not in self._ids:
            made = self.model.tokenizer(texts[document], add_special_tokens=False, verbose=False)
            self._ids[key] = made.input_ids
        return self._ids[key]


def check_model(model: TransformersModel, card: Mapping[str, Any]) -> None:
    """That a card is of this model.

    Raises:
        InterpError: it is of another one, or of other weights.
    """
    made_for = card.get("model"), card.get("weights")
    if made_for != (model.info.name, model.info.weights):
        raise InterpError(
            f"This index was made with {made_for[0]} ({made_for[1]}), not with {model.info.name} "
            f"({model.info.weights}); load that model, or build an index for this one."
        )
