"""Does NDIF's code path give the same on this machine? Run by test_interventions in a process of its own,
since functions under the runtime type checker cannot be serialised.
"""

from __future__ import annotations

import sys

import torch

from interp_utils.activations import next_token_logits, residual_stream
from interp_utils.interventions import add, edited_logits, generate, patch, project, scale
from interp_utils.models import load_model
from interp_utils.patchscopes import Patchscope, grid

PROMPTS = ["the cat sat on the mat", "x y z", "the dog"]


def rehearse(folder: str) -> None:
    """Raise AssertionError where the local and the rehearsed remote path differ."""
    here, there = load_model(folder), load_model(folder, remote="local")
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    edits = [[add(1, -1, vectors[0]), scale(1, -1, 2.0)], patch(2, 1, vectors[1]), project(0, -1, vectors)]
    for one, other in (
        (residual_stream(here, PROMPTS, positions=-1), residual_stream(there, PROMPTS, positions=-1)),
        (next_token_logits(here, PROMPTS), next_token_logits(there, PROMPTS)),
        (edited_logits(here, PROMPTS, edits), edited_logits(there, PROMPTS, edits)),
    ):
        assert torch.equal(one, other), f"{folder}: a difference of {(one - other).abs().max()}"
    assert not torch.equal(next_token_logits(here, PROMPTS), edited_logits(there, PROMPTS, edits))
    shared, whole = (
        grid(
            Patchscope(model, "the cat; x", "x"),
            vectors[:, None],
            into=[0, 2],
            candidates=[" mat", " the cat", " the dog"],
            top_k=2,
        )
        for model in (here, there)
    )
    assert shared.choice.equals(whole.choice) and shared.top.equals(whole.top)
    texts = [generate(model, PROMPTS, edits, max_new_tokens=5).texts for model in (here, there)]
    assert texts[0] == texts[1], f"{folder}: {texts}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[1:]:
        rehearse(argument)
