"""Structure in prose and in Python is found where it stands, in characters and in tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from interp_utils.errors import InterpError
from interp_utils.structure import PYTHON, python_spans, rule_spans, token_labels

CODE = '''"""Über alles."""
import os, re
from a import (b,
               c)

@cache
def find(one, *rest, key: str = "é") -> int:  # why
    \'\'\'Inner
    docstring.\'\'\'
    if one > 3 and rest:
        raise ValueError(f"no {one}")
    x = {"ü": self.name(one, end=2.5)}
    try: pass
    except (KeyError, OSError): return x[0]

class Thing(Base): pass
'''


def found(text: str = CODE) -> dict[str, list[str]]:
    return {name: [text[a:b] for a, b in spans] for name, spans in python_spans(text).items()}


def test_python_structures_are_what_the_language_says() -> None:
    own = found()
    assert set(own) == set(PYTHON)
    assert own["comment"] == ["# why"]
    assert own["docstring"] == ['"""Über alles."""', "'''Inner\n    docstring.'''"]
    assert own["string that is no docstring"][:1] == ['"é"'] and '"ü"' in own["string that is no docstring"]
    assert not set(own["docstring"]) & set(own["string that is no docstring"])
    assert own["number"] == ["3", "2.5", "0"]
    assert own["name after def"] == ["find"] and own["name after class"] == ["Thing"]
    assert own["parameter of a function"] == ["one", "rest", "key"]
    assert own["name of a keyword argument"] == ["end"]  # its column is behind a letter of two bytes
    assert own["import statement"] == ["import os, re", "from a import (b,\n               c)"]
    assert own["decorator"] == ["cache"]
    assert own["exception class that is raised or caught"] == ["ValueError", "(KeyError, OSError)"]
    assert own["condition of an if"] == ["one > 3 and rest"]
    assert own["attribute after a dot"] == ["name"]
    assert set(own["name before a call's bracket"]) == {"ValueError", "name"}
    assert own["colon that opens a block"] == [":", ":"]  # those before a comment or the end of a line
    assert CODE[python_spans(CODE)["colon that opens a block"][0][0] - 3 :].startswith("int:  # why")
    assert {"def", "if", "and", "raise", "class"} <= set(own["keyword"])
    assert "=" in own["operator"] and ">" in own["operator"] and "->" not in own["operator"]
    brackets = sum(map(CODE.count, ")]}"))
    inside = sys.version_info < (3, 12)  # there {one} in an f-string is text, not code
    assert len(own["closing bracket"]) == brackets - inside


def test_form_feeds_and_empty_files_are_no_obstacle() -> None:
    assert found("x = 1\n\f\ndef f():\n    pass\n")["name after def"] == ["f"]
    assert not any(found("").values())


def test_text_that_is_not_python_is_refused() -> None:
    for text in ("def f(:", "x = (1", "  x\n y"):
        with pytest.raises(InterpError, match="cannot be read as Python"):
            python_spans(text)


def test_a_rule_marks_its_group_or_all_of_itself() -> None:
    spans = rule_spans("Mr Smith paid $5.", {"name": r"Mr ([A-Z]\w+)", "title": "Mr", "none": "x+"})
    assert spans == {"name": [(3, 8)], "title": [(0, 2)], "none": []}
    with pytest.raises(InterpError, match="'bad' is no regular expression"):
        rule_spans("", {"bad": "("})


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_a_token_has_the_label_of_its_last_character(tiny_model: Callable[..., Any], family: str) -> None:
    model, text = tiny_model(family), "the cat (sat on) the mat; é"
    spans = {
        "inside": [(9, 15)],
        "nested": [(0, 20), (4, 7)],
        "none": [],
        "late": [(len(text) - 1, len(text))],
    }
    ids, labels = token_labels(model, text, spans)
    read = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert ids.tolist() == read.input_ids
    for name, own in spans.items():
        slow = [i for i, (_, end) in enumerate(read.offset_mapping) if any(a <= end - 1 < b for a, b in own)]
        assert labels[name].tolist() == slow, name
