"""One error class for everything a reader can get wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InterpError(ValueError):
    """What was wrong, what was expected and what to do, in one sentence.

    IPython shows only that sentence, without the traceback.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


def nearest(name: str, options: Iterable[str]) -> str:
    """A hint such as " Did you mean 'gpt2'?", or the whole list if nothing is near."""
    options = sorted(options)
    near = difflib.get_close_matches(name.lower(), options, n=3, cutoff=0.5)
    if near:
        return " Did you mean " + " or ".join(repr(option) for option in near) + "?"
    return " Known: " + ", ".join(options) + "."
