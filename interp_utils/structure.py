"""Exact labels for structure in text: rules for prose, and what Python's own tokenizer and parser say of code."""

from __future__ import annotations

import ast
import io
import keyword
import re
import tokenize
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from interp_utils.errors import InterpError

if TYPE_CHECKING:
    from nnsight import TransformersModel

    from interp_utils.activation_store import ActivationStore

Spans = dict[str, list[tuple[int, int]]]  # name -> where it begins and ends, in characters, in order

STRING, EXCEPTION = "string that is no docstring", "exception class that is raised or caught"
PYTHON = (
    *("comment", STRING, "docstring", "number", "keyword", "operator", "closing bracket"),
    *("colon that opens a block", "name after def", "name after class", "name before a call's bracket"),
    *("attribute after a dot", "parameter of a function", "name of a keyword argument", "import statement"),
    *("decorator", EXCEPTION, "condition of an if"),
)


def rule_spans(text: str, rules: Mapping[str, str]) -> Spans:
    """Where regular expressions match: their first group, if they have one.

    Raises:
        InterpError: a rule that is no regular expression.
    """
    found: Spans = {}
    for name, rule in rules.items():
        try:
            pattern = re.compile(rule)
        except re.error as error:
            raise InterpError(f"The rule {name!r} is no regular expression: {error}.") from None
        group = min(pattern.groups, 1)
        found[name] = [match.span(group) for match in pattern.finditer(text) if match[group]]
    return found


def python_spans(text: str) -> Spans:
    """Where each of `PYTHON` stands in a file.

    Raises:
        InterpError: the text is not Python.
    """
    lines = text.split("\n")
    starts = np.cumsum([0, *(len(line) + 1 for line in lines)])
    try:
        found = _token_spans(text, starts) | _syntax_spans(text, lines, starts)
    except (SyntaxError, ValueError, tokenize.TokenError) as error:
        raise InterpError(f"The text cannot be read as Python: {error}.") from None
    documented = set(found["docstring"])
    found[STRING] = [span for span in found[STRING] if span not in documented]
    return {name: sorted(set(found[name])) for name in PYTHON}


def _token_spans(text: str, starts: Int[np.ndarray, " line"]) -> Spans:
    found: Spans = defaultdict(list)
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    before = ""
    for token, after in pairwise([*tokens, tokens[-1]]):
        first, end = (int(starts[line - 1]) + column for line, column in (token.start, token.end))
        for name in _names(before, token, after):
            found[name].append((first, end))
        before = token.string
    return found


def _names(before: str, token: tokenize.TokenInfo, after: tokenize.TokenInfo) -> list[str]:
    """What a token is, by itself and by its neighbours."""
    kind, own = tokenize.tok_name[token.type], token.string
    if "STRING" in kind:  # whole, or a part of an f-string
        return [STRING]
    if kind == "NAME" and not keyword.iskeyword(own):
        called = after.string == "(" and before not in ("def", "class")
        return [
            *([f"name after {before}"] if before in ("def", "class") else []),
            *(["name before a call's bracket"] if called else []),
            *(["attribute after a dot"] if before == "." else []),
        ]
    if kind == "OP":
        opens = own == ":" and tokenize.tok_name[after.type] in ("NEWLINE", "COMMENT")
        plain = own not in ("(", "[", "{", ")", "]", "}", ":", ",", ".", ";", "@", "->")
        return [
            name
            for name, holds in (
                ("closing bracket", own in (")", "]", "}")),
                ("colon that opens a block", opens),
                ("operator", plain),
            )
            if holds
        ]
    return {"COMMENT": ["comment"], "NUMBER": ["number"], "NAME": ["keyword"]}.get(kind, [])


def _syntax_spans(text: str, lines: Sequence[str], starts: Int[np.ndarray, " line"]) -> Spans:
    """What the parser says; it counts columns in bytes."""
    found: Spans = defaultdict(list)

    def place(line: int, column: int) -> int:
        return int(starts[line - 1]) + len(lines[line - 1].encode()[:column].decode())

    def add(name: str, node: Any, length: int = 0) -> None:
        first = place(node.lineno, node.col_offset)
        found[name].append((first, first + length if length else place(node.end_lineno, node.end_col_offset)))

    documented = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            add("docstring", node.body[0])
        for decorator in getattr(node, "decorator_list", []):
            add("decorator", decorator)
        if isinstance(node, ast.arg):
            add("parameter of a function", node, len(node.arg))
        elif isinstance(node, ast.keyword) and node.arg:
            add("name of a keyword argument", node, len(node.arg))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            add("import statement", node)
        elif isinstance(node, ast.Raise) and node.exc:
            add(EXCEPTION, getattr(node.exc, "func", node.exc))
        elif isinstance(node, ast.ExceptHandler) and node.type:
            add(EXCEPTION, node.type)
        elif isinstance(node, ast.If):
            add("condition of an if", node.test)
    return found


def token_labels(
    model: TransformersModel, text: str, spans: Spans
) -> tuple[Int[np.ndarray, " token"], dict[str, Int[np.ndarray, " labelled"]]]:
    """The tokens of a text, and for each name those whose last character lies in one of its spans."""
    read = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    last = np.array(read.offset_mapping, dtype=np.int64).reshape(-1, 2)[:, 1] - 1
    found = {}
    for name, own in spans.items():
        first, end = np.array(own or [(0, 0)]).T
        at = np.searchsorted(first, last, side="right") - 1
        reach = np.maximum.accumulate(end)[at]  # spans may lie within one another
        found[name] = np.flatnonzero((at >= 0) & (last < reach))
    return np.array(read.input_ids), found


def rows_by_document(store: ActivationStore, stop: int) -> dict[tuple[int, int], Int[np.ndarray, " row"]]:
    """(source, document) -> its rows among the first `stop` of a store."""
    key = store.source[:stop].numpy().astype(np.int64) << 32 | store.document[:stop].numpy()
    order = np.argsort(key, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(key[order])) + 1)
    return {(int(key[own[0]] >> 32), int(key[own[0]] & 0xFFFFFFFF)): own for own in groups}
