"""What a grid refuses before it runs, what it keeps in memory, and what it never runs twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp_utils import patchscopes
from interp_utils.activations import residual_stream, tokenize
from interp_utils.candidates import distinguishing
from interp_utils.cell_measures import Measures
from interp_utils.errors import InterpError
from interp_utils.greedy import continue_greedily
from interp_utils.interventions import generate, patch
from interp_utils.patchscopes import Patchscope, chunk_rows, grid, patched_logits
from interp_utils.quintuplet import EditedRows
from interp_utils.shared_prefix import PatchedRows, SharedPrefix, kept_per_token
from tests import families

TARGET = "the cat; x y"
SOURCES = ["the dog sat on the mat", "x y z", "the cat"]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def wide_gemma(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gemma with a window that holds the prompts, so that keys and values are shared."""
    from interp_utils.models import load_model

    folder = tmp_path_factory.mktemp("gemma") / "wide"
    return load_model(str(families.build(folder, "gemma3", sliding_window=60)))


@pytest.fixture(scope="module")
def other_words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Llama of the same width whose tokenizer has one more word."""
    from interp_utils.models import load_model

    folder = families.build(tmp_path_factory.mktemp("llama") / "other", "llama")
    tokenizer = families.tiny_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    return load_model(str(folder))


def states_of(model: Any) -> Tensor:
    return residual_stream(model, SOURCES, positions=-1)[:, :, 0]


def spoilt(states: Tensor, value: float) -> Tensor:
    """The same with one number of the last source replaced."""
    out = states.clone()
    out[..., -1, 3] = value
    return out


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running a Patchscope's rows fails the test."""

    def ran(*_: Any) -> Any:
        raise AssertionError("rows were run before the input was checked")

    monkeypatch.setattr(Patchscope, "rows", ran)


def bad_input(model: Any, other: Any) -> list[tuple[str, Callable[[], Any]]]:
    states, scope = states_of(model), Patchscope(model, TARGET)
    final = states[:, -1]
    wide = torch.zeros(3, 48)
    nan_map = Patchscope(model, TARGET, mapping=lambda h, layer, to: h * NAN)
    narrow = Patchscope(model, TARGET, mapping=lambda h, layer, to: h[:, :8])
    full = "the cat " * 15 + "x"  # the context holds 64
    return [
        ("The states hold NaN or infinity", lambda: grid(scope, spoilt(states, NAN), top_k=1)),
        ("The states hold NaN or infinity", lambda: grid(scope, spoilt(states, -INF), max_new_tokens=1)),
        ("The final states hold NaN or infinity", lambda: grid(scope, states, final=spoilt(final, INF))),
        ("The states hold NaN", lambda: patched_logits(scope, spoilt(final, NAN), [0, 1, 2])),
        ("The mapped states hold NaN", lambda: grid({"a": scope, "b": nan_map}, states, top_k=1)),
        ("gave shape .* where", lambda: grid({"a": scope, "b": narrow}, states, top_k=1)),
        ("are to follow, but the context", lambda: grid(Patchscope(model, full), states, max_new_tokens=40)),
        ("final states have width 48 but", lambda: grid(scope, states, final=wide)),
        ("top_k is 281 but the vocabulary has 280", lambda: grid(scope, states, top_k=281)),
        ("top_k is -1 but", lambda: grid(scope, states, top_k=-1)),
        ("max_new_tokens is -2; give 0", lambda: grid(scope, states, max_new_tokens=-2)),
        ("There is no Patchscope", lambda: grid({}, states, top_k=1)),
        ("The candidates are one text, ' mat'", lambda: grid(scope, states, candidates=" mat")),
        (
            "Layer 9 is out of range",
            lambda: grid({"a": scope, "b": scope}, states, into=[0, 9], top_k=1),
        ),
        (
            "needs 0.000 GB but memory_gb",
            lambda: grid({"a": scope, "b": Patchscope(model, full)}, states, top_k=1, memory_gb=3e-5),
        ),
        ("different vocabularies", lambda: grid(scope, states, final=final, source_model=other)),
    ]


@pytest.mark.usefixtures("no_work")
def test_bad_input_gets_a_sentence_before_any_row_is_run(wide_gemma: Any, other_words: Any) -> None:
    for sentence, call in bad_input(wide_gemma, other_words):
        with pytest.raises(InterpError, match=sentence):
            call()


def test_a_candidate_that_outgrows_the_context_is_refused(wide_gemma: Any) -> None:
    target = "x " * 27 + "x"
    room = 64 - len(tokenize(wide_gemma, target))
    states, scope = states_of(wide_gemma), Patchscope(wide_gemma, target, -1)
    long = " the" * (room + 1)
    with pytest.raises(InterpError, match="are to follow, but the context"):
        grid(scope, states, candidates=[long + " the", long + " mat"])
    grid(scope, states[:1, :1], candidates=[" the" * room + " the", " the" * room + " mat"])


def test_a_source_model_of_the_same_vocabulary_is_taken(
    wide_gemma: Any, tiny_model: Callable[..., Any]
) -> None:
    states, source = states_of(wide_gemma), tiny_model("llama")
    final = residual_stream(source, SOURCES, positions=-1)[:, -1, 0]
    table = grid(Patchscope(wide_gemma, TARGET), states, final=final, source_model=source)
    assert table.surprisal.gt(0).all()


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # shared prefix, and beyond the window
def test_rows_need_a_layer_each(family: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(family)
    scope, states = Patchscope(model, "the cat; x", "x"), states_of(model)[0]
    for into in ([0], [0] * 9):
        with pytest.raises(InterpError, match=f"4 states but {len(into)} target layers"):
            scope.rows(states, into)
    with pytest.raises(InterpError, match="1 states but 2 target layers"):
        SharedPrefix(tiny_model("llama"), "x y", -1).run(states[:1], [0, 1])


@pytest.mark.parametrize("into", [None, [1, 2]])
def test_a_layer_given_twice_keeps_its_own_states(wide_gemma: Any, into: list[int] | None) -> None:
    states, scope = states_of(wide_gemma), Patchscope(wide_gemma, TARGET)
    pair = torch.stack([states[:, 1], states[:, 3]], dim=1)
    both = grid(scope, pair, layers=[2, 2], into=into, top_k=1)
    alone = [grid(scope, pair[:, [i]], layers=[2], into=into, top_k=1) for i in range(2)]
    size = 1 if into is None else 2
    second = both.groupby("source").cumcount() >= size
    for part, expected in zip((both[~second], both[second]), alone, strict=True):
        assert part.top.tolist() == expected.top.tolist()
    assert both.columns.tolist() == ["source", "layer", "into", "top", "top_prob"]


def test_states_are_mapped_chunk_by_chunk_and_blocks_run_once(
    wide_gemma: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    runs: list[int] = []

    def half(rows: Tensor, layer: int, into: int) -> Tensor:
        seen.append(len(rows))
        return rows / 2

    run = SharedPrefix.run
    monkeypatch.setattr(SharedPrefix, "run", lambda *args: runs.append(len(args[1])) or run(*args))
    monkeypatch.setattr(patchscopes, "chunk_rows", lambda *_: 7)
    states, scope = states_of(wide_gemma), Patchscope(wide_gemma, TARGET, mapping=half)
    table = grid(scope, states, layers=[0] * 4, into=[2], top_k=1, max_new_tokens=2, progress=False)
    assert len(table) == 12 and runs == [7, 5]
    assert seen == [1, 7, 5]  # the first is the check


@pytest.mark.parametrize("family", families.FAMILIES)
def test_keys_and_values_take_what_is_counted(family: str, tmp_path: Path) -> None:
    from interp_utils.models import load_model

    change = {"sliding_window": 60} if family == "gemma3" else {}
    model = load_model(str(families.build(tmp_path / family, family, **change)))
    scope, states = Patchscope(model, TARGET), states_of(model)[0]
    rows = scope.rows(states, range(len(states)))
    assert isinstance(rows, PatchedRows)
    layers = rows.cache().layers
    measured = sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values))
    n_tokens = len(tokenize(model, TARGET))
    assert measured == 4 * len(states) * n_tokens * kept_per_token(model)
    for new in (1, 20):  # what a chunk of cells keeps is below its limit, and counted for each cell
        cells = chunk_rows(scope, 2e-3, new=new)
        assert cells * (n_tokens + new) * measured / len(states) / n_tokens < 2e6
    per_cell = [2e6 / chunk_rows(scope, 2e-3, 5, new) for new in (0, 40)]
    longer = 4 * (n_tokens + 40) * kept_per_token(model)
    assert per_cell[1] - per_cell[0] == pytest.approx(longer, rel=0.1)


def test_whole_prompts_and_whole_vocabularies_are_counted(
    wide_gemma: Any, tiny_model: Callable[..., Any]
) -> None:
    beyond = Patchscope(tiny_model("gemma3"), TARGET)
    assert not beyond.shares and isinstance(beyond.rows(states_of(wide_gemma)[0], range(4)), EditedRows)
    fast, slow = (chunk_rows(scope, 2e-3, 5) for scope in (Patchscope(wide_gemma, TARGET), beyond))
    assert slow < fast / 2 and slow == chunk_rows(beyond, 2e-3)
    short, long = ([" mat", " x"], [" the cat", " the dog"])
    for candidates, wanted, columns, new in (
        (short, {}, 2, 0),
        (short, {"max_new_tokens": 3}, None, 3),
        (short, {"top_k": 1}, None, 0),
        (long, {}, None, 1),
        (long, {"max_new_tokens": 9}, None, 9),
    ):
        measures = Measures(candidates, **wanted)
        paths = distinguishing(wide_gemma, candidates)
        assert (measures.columns(paths), measures.new_tokens(paths)) == (columns, new)
    assert (Measures(top_k=1).columns(None), Measures(top_k=1).new_tokens(None)) == (None, 0)


PENALTIES: dict[str, Callable[[int], Any]] = {  # from the second token of the plain text
    "repetition_penalty": lambda token: 5.0,
    "no_repeat_ngram_size": lambda token: 1,
    "suppress_tokens": lambda token: [token],
    "bad_words_ids": lambda token: [[token]],
    "forced_eos_token_id": lambda token: 5,
}


@pytest.mark.parametrize("option", PENALTIES)
def test_both_paths_are_plainly_greedy(wide_gemma: Any, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = states_of(wide_gemma).flatten(0, 1)
    into = [row % 4 for row in range(len(states))]
    edits = [patch(layer, -2, state) for layer, state in zip(into, states, strict=True)]
    rows = Patchscope(wide_gemma, TARGET).rows(states, into)
    assert isinstance(rows, PatchedRows)
    plain = continue_greedily(rows, 8).tokens
    value = PENALTIES[option](int(plain[0, 1]))
    monkeypatch.setattr(wide_gemma._module.generation_config, option, value)
    assert continue_greedily(rows, 8).tokens.tolist() == plain.tolist()
    made = generate(wide_gemma, TARGET, edits, max_new_tokens=8, expect_change=False)
    assert made.tokens.tolist() == plain.tolist()


def test_greedy_text_is_made_on_the_device_of_the_logits(llama: Any) -> None:
    """A default device that holds no data stands for the CPU beside a GPU."""
    rows = Patchscope(llama, TARGET).rows(states_of(llama)[0], range(4))
    expected = continue_greedily(rows, 4)
    with torch.device("meta"):
        found = continue_greedily(rows, 4)
    assert found.tokens.device.type == found.gaps.device.type == "cpu"
    assert found.tokens.tolist() == expected.tokens.tolist() and found.texts == expected.texts
