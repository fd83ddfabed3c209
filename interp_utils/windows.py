"""Documents -> windows of tokens, a fair mix of the sources in every stretch of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from interp_utils.errors import InterpError

if TYPE_CHECKING:
    from nnsight import TransformersModel

SHORTEST = 16  # tokens; what is left of a document after its last whole window is dropped below this
TOGETHER = 32  # documents per call of the tokenizer


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one document, without the start token.

    Attributes:
        source: index of the corpus.
        document: index in the corpus.
        position: of the first token in its document, in tokens.
        ids: the tokens.
    """

    source: int
    document: int
    position: int
    ids: np.ndarray


def start_token(model: TransformersModel) -> int:
    """What every window begins with: what the tokenizer puts first, else its mark between documents.

    Raises:
        InterpError: the tokenizer has neither.
    """
    tokenizer = model.tokenizer
    first = tokenizer("a").input_ids[0]
    if first == tokenizer.bos_token_id:
        return first
    # SmolLM2 Instruct names a chat mark as its BOS; documents were parted by this one in training.
    between = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.bos_token_id)
    if between is None:
        raise InterpError("The tokenizer has no token that begins a text; use a model that has one.")
    return between


def draw_windows(
    model: TransformersModel,
    corpora: Mapping[str, Sequence[str]],
    tokens: int | Mapping[str, int],
    *,
    context: int,
    seed: int,
) -> list[Window]:
    """Windows of up to `context - 1` tokens, from documents in random order, the sources interleaved.

    Windows of 32 documents of a source are shuffled together, so that a short stretch has many documents. A draw
    of fewer tokens in the same proportions is the beginning of a longer one.

    Args:
        model: whose tokenizer is used.
        corpora: documents by source.
        tokens: how many in all, shared evenly among the sources (what a small one lacks comes from the
            others), or how many by source. The last window of a source is not cut, so there may be a few more.
        context: tokens per window with the start token.
        seed: of the order of documents and of their windows.

    Raises:
        InterpError: the documents have too few tokens, or a source is not named on both sides.
    """
    wanted = dict(tokens) if isinstance(tokens, Mapping) else dict.fromkeys(corpora, 1)
    if set(wanted) != set(corpora):
        raise InterpError(
            f"tokens names the sources {sorted(wanted)} but corpora has {sorted(corpora)}; name the same."
        )
    if not any(count > 0 for count in (wanted.values() if isinstance(tokens, Mapping) else [tokens])):
        raise InterpError(f"No tokens were asked for (tokens={tokens}); ask for at least one.")
    streams = {
        name: _stream(model, corpora[name], index, context, np.random.default_rng([seed, index]))
        for index, name in enumerate(corpora)
    }
    drawn: list[Window] = []
    have = dict.fromkeys(corpora, 0)
    open_sources = [name for name in corpora if wanted[name] > 0]
    while not _enough(have, tokens):
        if not open_sources:
            raise InterpError(
                f"The documents have only {sum(have.values()):,} tokens; ask for fewer than {_numbers(tokens)}."
            )
        name = min(open_sources, key=lambda source: have[source] / wanted[source])
        window = next(streams[name], None)
        if window is None and isinstance(tokens, Mapping) and have[name] < wanted[name]:
            raise InterpError(
                f"The source {name!r} has only {have[name]:,} tokens, not {wanted[name]:,}; ask for fewer."
            )
        if window is None:
            open_sources.remove(name)
            continue
        drawn.append(window)
        have[name] += len(window.ids)
    return drawn


def _enough(have: Mapping[str, int], tokens: int | Mapping[str, int]) -> bool:
    if isinstance(tokens, Mapping):
        return all(have[name] >= tokens[name] for name in have)
    return sum(have.values()) >= tokens


def _numbers(tokens: int | Mapping[str, int]) -> str:
    if isinstance(tokens, Mapping):
        return ", ".join(f"{name} {n:,}" for name, n in tokens.items())
    return f"{tokens:,}"


def _stream(
    model: TransformersModel, documents: Sequence[str], source: int, context: int, rng: np.random.Generator
) -> Iterator[Window]:
    """All windows of a source; documents in random order, a few tokenized and shuffled at a time."""
    order = rng.permutation(len(documents))
    for start in range(0, len(order), TOGETHER):
        some = order[start : start + TOGETHER]
        rows = model.tokenizer(
            [documents[i] for i in some], add_special_tokens=False, verbose=False
        ).input_ids
        together = [
            Window(source, int(document), position, np.asarray(piece, dtype=np.int32))
            for document, row in zip(some, rows, strict=True)
            for position in range(0, len(row), context - 1)
            if len(piece := row[position : position + context - 1]) >= SHORTEST
        ]
        yield from (together[i] for i in rng.permutation(len(together)))
