"""Where a state goes in the target prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from interp_utils.activations import str_tokens
from interp_utils.errors import InterpError
from interp_utils.patchscopes import find_placeholder


@pytest.mark.parametrize(
    ("prompt", "placeholder", "expected"),
    [
        ("the cat; x", "x", -1),
        ("the cat; x", " x", -1),
        ("the x; y; z", "x", -5),
        ("x; the x; the x y", "x", -2),  # the last of several
        ("x", "x", -1),
        ("x y z", "x", -3),
        ("the dog; the cat, the cat;", "cat", -2),
    ],
)
@pytest.mark.parametrize("family", ["gemma3", "llama"])  # with and without BOS
def test_position_counts_from_the_end(
    family: str, tiny_model: Callable[..., Any], prompt: str, placeholder: str, expected: int
) -> None:
    model = tiny_model(family)
    found = find_placeholder(model, prompt, placeholder)
    assert found == expected
    assert str_tokens(model, prompt)[found].strip() == placeholder.strip()


@pytest.mark.parametrize(
    ("prompt", "placeholder", "sentence"),
    [
        ("the cat", "x", "has no placeholder 'x'; add it where the state goes"),
        ("the cat", "", "has no placeholder ''"),
        ("", "x", "has no placeholder 'x'"),
        ("the cat; zebra", "zebra", "'zebra' is not one token"),
        ("the cat; x y", "x y", "'x y' is not one token"),
        ("the cat", "he", "'he' is not one token"),  # inside a longer token
        ("the cat", "ca", "'ca' is not one token"),
        ("the xcat", "cat ", "has no placeholder"),
    ],
)
@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_placeholder_must_be_there_as_one_token(
    family: str, tiny_model: Callable[..., Any], prompt: str, placeholder: str, sentence: str
) -> None:
    with pytest.raises(InterpError, match=sentence):
        find_placeholder(tiny_model(family), prompt, placeholder)


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_real_tokenizers(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    prompt = "Syria: country in the Middle East, Leonardo DiCaprio: American actor, x"
    assert find_placeholder(model, prompt, "x") == -1
    assert str_tokens(model, prompt + ": a")[find_placeholder(model, prompt + ": a", "x")] == " x"
    with pytest.raises(InterpError, match="is not one token"):
        find_placeholder(
            model, "Syria: country, antidisestablishmentarianism", "antidisestablishmentarianism"
        )
