"""The runtime type checker of the tests: jaxtyping's shapes and beartype's types, where an int is a float."""

from __future__ import annotations

import sys

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# Not the claims and figures, whose tests hand in wrong types to see the sentence they get.
NAMES = (
    "errors",
    "weights",
    "models",
    "activations",
    "interventions",
    "candidates",
    "shared_prefix",
    "greedy",
    "quintuplet",
    "cell_measures",
    "patchscopes",
    "records",
    "seeds",
    "facts",
    "word_lists",
    "wikitext",
    "corpora",
    "windows",
    "sites",
    "shards",
    "recorder",
    "harvest",
    "activation_store",
    "dictionaries",
    "controls",
    "steers",
    "steering",
    "structure",
    "concepts",
    "neurons",
    *(
        f"features.{m}"
        for m in ("activations", "detect", "index", "presence", "contexts", "effects", "excerpts", "cards")
    ),
    "artifacts",
)
check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def install() -> None:
    """Check the annotations of these modules from their first import on."""
    modules = [f"interp_utils.{name}" for name in NAMES]
    early = [name for name in modules if name in sys.modules]
    assert not early, f"{early} came before the checker"
    install_import_hook(modules, "tests.checked.check")
