"""The grid against plain hooks, one cell at a time, and against identities that need no reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from interp_utils.activations import logit_lens, next_token_logits, residual_stream, tokenize
from interp_utils.candidates import candidate_log_probs, distinguishing
from interp_utils.errors import InterpError
from interp_utils.greedy import continue_greedily, top_two
from interp_utils.interventions import generate, patch
from interp_utils.patchscopes import Patchscope, chunk_rows, grid, patched_logits
from interp_utils.quintuplet import EditedRows
from interp_utils.shared_prefix import SharedPrefix, fits_window
from tests import families
from tests.oracle import Oracle, relative, same_but_for_ties

TARGETS = [
    ("the cat; x", -1),  # the placeholder is last: one token a cell
    ("the cat; x y z", -3),  # a tail of tokens after it
    ("x y z; the dog", 0),  # no prefix at all
]
SOURCES = ["the dog sat on the mat", "x y z", "the cat"]


@pytest.fixture(scope="module")
def wide_gemma(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gemma with a window that holds the prompts, so that keys and values are shared."""
    from interp_utils.models import load_model

    folder = tmp_path_factory.mktemp("gemma") / "wide"
    return load_model(str(families.build(folder, "gemma3", sliding_window=60)))


@pytest.fixture(params=["gemma3 wide", *families.FAMILIES])
def any_model(request: pytest.FixtureRequest, tiny_model: Callable[..., Any], wide_gemma: Any) -> Any:
    return wide_gemma if request.param == "gemma3 wide" else tiny_model(request.param)


def oracle_of(model: Any) -> Oracle:
    return Oracle(families.raw_model(model.info.source))


def states_of(model: Any) -> Tensor:
    return residual_stream(model, SOURCES, positions=-1)[:, :, 0]


def cell_logits(oracle: Oracle, ids: list[int], position: int, layer: int, vector: Tensor) -> Tensor:
    """One cell, whole forward, plain hook."""
    return oracle.logits(ids, [(layer, len(ids) + position, lambda _: vector)])


@pytest.mark.parametrize(("target", "position"), TARGETS)
def test_every_cell_is_the_patched_forward(any_model: Any, target: str, position: int) -> None:
    oracle, states, n = oracle_of(any_model), states_of(any_model), len(any_model.layers)
    ids = tokenize(any_model, target)
    at = position if position < 0 else position - len(ids)
    scope = Patchscope(any_model, target, at)
    rows, layers, into = zip(
        *[(states[s, layer], layer, to) for s in range(3) for layer in range(n) for to in range(n)],
        strict=True,
    )
    found = patched_logits(scope, torch.stack(rows), layers, into)
    expected = torch.stack(
        [cell_logits(oracle, ids, at, to, row) for row, to in zip(rows, into, strict=True)]
    )
    assert relative(found, expected) < 1e-5
    some = [5, 200, 7]
    assert (
        relative(patched_logits(scope, torch.stack(rows), layers, into, tokens=some), expected[:, some])
        < 1e-5
    )


def test_rows_come_back_in_their_order(any_model: Any) -> None:
    states, n = states_of(any_model), len(any_model.layers)
    scope = Patchscope(any_model, "the cat; x", "x")
    layers = [0, 1, 2, 0, 1, 2]
    into = [n - 1, 0, 1, 1, n - 1, 0]
    rows = states[[0, 1, 2, 2, 1, 0], layers]
    together = patched_logits(scope, rows, layers, into)
    for i in range(6):
        alone = patched_logits(scope, rows[i : i + 1], layers[i : i + 1], into[i : i + 1])
        assert relative(together[i : i + 1], alone) < 1e-5


def test_self_patch_and_last_layer(any_model: Any) -> None:
    target, n = "the cat; x y", len(any_model.layers)
    own = residual_stream(any_model, target, positions=-2)[0, :, 0]
    found = patched_logits(Patchscope(any_model, target, "x"), own, range(n))
    assert relative(found, next_token_logits(any_model, target).expand_as(found)) < 1e-5
    states = states_of(any_model)[0]
    lens = patched_logits(Patchscope(any_model, "the cat; x", "x", layer=-1), states, range(n))
    assert relative(lens, logit_lens(any_model, states)) < 1e-5
    other = patched_logits(Patchscope(any_model, "x y z; the dog", -1, layer=n - 1), states, range(n))
    assert relative(lens, other) < 1e-5  # the target prompt does not matter


def test_last_layer_of_a_source_predicts_its_next_token_exactly(any_model: Any) -> None:
    states = states_of(any_model)
    for layer in (None, -1):
        table = grid(Patchscope(any_model, "the cat; x", "x", layer=layer), states, final=states[:, -1])
        last = table[table.layer == len(any_model.layers) - 1]
        assert last.precision.all() and len(last) == 3
        for source, token in zip(last.source, last.token, strict=True):
            log_p = next_token_logits(any_model, SOURCES[source])[0].log_softmax(-1)
            assert token == int(log_p.argmax())
            assert last.surprisal[last.source == source].item() == pytest.approx(
                -float(log_p.max()), abs=1e-4
            )


def test_table_against_a_loop(any_model: Any) -> None:
    """Columns, nesting and values of a whole grid."""
    oracle, states, n = oracle_of(any_model), states_of(any_model), len(any_model.layers)
    ids = tokenize(any_model, "the cat; x y")
    scopes = {
        "plain": Patchscope(any_model, "the cat; x y", "x"),
        "half": Patchscope(any_model, "the cat; x y", "x", mapping=lambda h, layer, to: h / 2),
    }
    table = grid(
        scopes,
        states[:, [2, 0]],
        layers=[2, 0],
        into=[0, n - 1],
        top_k=3,
        final=states[:, -1],
        max_new_tokens=3,
    )
    keys = [(s, i, k, to) for s in scopes for i in range(3) for k in (2, 0) for to in (0, n - 1)]
    assert list(table[["scope", "source", "layer", "into"]].itertuples(index=False, name=None)) == keys
    tokenizer = any_model.tokenizer
    for row in table.itertuples():
        vector = states[row.source, row.layer] / (2 if row.scope == "half" else 1)
        change = (row.into, len(ids) - 2, lambda _, v=vector: v)
        logits = oracle.logits(ids, [change])
        log_p = logit_lens(any_model, states[row.source, -1]).log_softmax(-1)
        assert row.token == int(logits.argmax()) and row.precision == (row.token == int(log_p.argmax()))
        assert row.surprisal == pytest.approx(-float(log_p[row.token]), abs=1e-3)
        assert row.top == [tokenizer.decode([i]) for i in logits.topk(3).indices.tolist()]
        assert row.top_prob == pytest.approx(logits.softmax(-1).topk(3).values.tolist(), abs=1e-5)
        text, gaps = oracle.greedy(ids, [change], 3)
        assert row.text == tokenizer.decode(text, skip_special_tokens=True) or min(gaps) < 1e-3
        assert row.gap == pytest.approx(min(gaps), abs=1e-3)


CANDIDATES = [" mat", " the cat", " the dog", " x", " x; y", " x; z"]


def test_candidates_are_teacher_forced_up_to_where_they_differ(any_model: Any) -> None:
    oracle, states, n = oracle_of(any_model), states_of(any_model), len(any_model.layers)
    candidates = CANDIDATES[:3] + CANDIDATES[4:]  # " x" is the beginning of " x; y"
    paths = distinguishing(any_model, candidates)
    assert {len(path) for path in paths} == {1, 2, 3}
    ids = tokenize(any_model, "the cat; x y")
    scope = Patchscope(any_model, "the cat; x y", "x")
    table = grid(scope, states, into=range(n), candidates=candidates, answers=candidates[:3])
    for row in table.itertuples():
        change = [(row.into, len(ids) - 2, lambda _, v=states[row.source, row.layer]: v)]
        scores = []
        for path in paths:
            steps = range(len(path))
            log_ps = [oracle.logits(ids + path[:k], change).log_softmax(-1)[path[k]] for k in steps]
            scores.append(float(sum(log_ps)))
        expected = torch.tensor(scores).log_softmax(-1)
        assert row.log_prob == pytest.approx(float(expected[row.source]), abs=1e-3)
        assert row.choice == candidates[int(expected.argmax())]
        assert row.correct == (row.choice == candidates[row.source])


@pytest.mark.parametrize(("target", "position"), TARGETS)
def test_greedy_text_is_what_generate_gives(any_model: Any, target: str, position: int) -> None:
    """Ends of text included: the tiny models say <eos> now and then, some rows before others."""
    if not fits_window(any_model, target):
        pytest.skip("beyond the window whole prompts are run, by generate itself")
    ids, n = tokenize(any_model, target), len(any_model.layers)
    at = position if position < 0 else position - len(ids)
    states = states_of(any_model).flatten(0, 1)
    into = [row % n for row in range(len(states))]
    scope = Patchscope(any_model, target, at)
    found = continue_greedily(scope.rows(states, into), 12)
    edits = [patch(layer, at, state) for layer, state in zip(into, states, strict=True)]
    expected = generate(any_model, target, edits, max_new_tokens=12, expect_change=False)
    assert found.tokens.shape == expected.tokens.shape
    for row in range(len(states)):
        mine, theirs = found.tokens[row].tolist(), expected.tokens[row].tolist()
        assert same_but_for_ties(mine, theirs, expected.gaps[row].tolist())
        if mine == theirs:
            assert found.texts[row] == expected.texts[row]
            before_end = expected.gaps[row][found.gaps[row].isfinite()]
            assert found.gaps[row][found.gaps[row].isfinite()] == pytest.approx(before_end, abs=1e-3)


def test_rows_stop_at_the_end_of_text(wide_gemma: Any) -> None:
    rows = Patchscope(wide_gemma, "the cat; x", "x").rows(states_of(wide_gemma)[0], [0, 1, 2, 3])
    free = continue_greedily(rows, 6).tokens
    generation = wide_gemma._module.generation_config
    before, stop = generation.eos_token_id, int(free[0, 2])
    try:
        generation.eos_token_id = [stop, 1]
        ended = continue_greedily(rows, 6)
    finally:
        generation.eos_token_id = before
    first = free[0].tolist().index(stop)
    assert ended.tokens[0].tolist() == [*free[0, : first + 1].tolist(), *[0] * (5 - first)]
    assert ended.gaps[0, first + 1 :].isinf().all() and ended.gaps[0, : first + 1].isfinite().all()


@pytest.mark.parametrize("vocab", [280, 4096, 8192, 5000])
def test_top_two_is_topk(vocab: int) -> None:
    logits = torch.randn(7, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[0, :2] = 9.0  # both in one block, and equal
    values, indices = top_two(logits)
    expected = logits.topk(2)
    assert torch.equal(values, expected.values)
    assert torch.equal(indices[1:], expected.indices[1:]) and set(indices[0].tolist()) == {0, 1}


def test_slow_rows_read_the_same(wide_gemma: Any) -> None:
    states = states_of(wide_gemma)
    scope = Patchscope(wide_gemma, "the cat; x y", "x")
    into = [0, 3, 1, 2]
    fast, slow = scope.rows(states[0], into), EditedRows(scope, states[0], into)
    assert isinstance(fast, type(SharedPrefix(wide_gemma, "x", -1).run(states[0], into)))
    assert relative(fast.logits(), slow.logits()) < 1e-5
    assert relative(fast.logits([3, 4]), slow.logits([3, 4])) < 1e-5
    paths = distinguishing(wide_gemma, CANDIDATES[:3])
    torch.testing.assert_close(
        candidate_log_probs(fast, paths), candidate_log_probs(slow, paths), atol=1e-4, rtol=0
    )


def test_chunks_give_the_same_table(wide_gemma: Any, capsys: pytest.CaptureFixture[str]) -> None:
    states, scope = states_of(wide_gemma), Patchscope(wide_gemma, "the cat; x", "x")
    whole = grid(scope, states, into=range(4), final=states[:, -1], top_k=2)
    assert capsys.readouterr().err == ""  # one chunk needs no bar
    limit = next(gb for gb in (k * 1e-5 for k in range(1, 1000)) if _fits(scope, gb, 5))
    parts = grid(scope, states, into=range(4), final=states[:, -1], top_k=2, memory_gb=limit)
    assert f"48 cells, {chunk_rows(scope, limit)} at a time" in capsys.readouterr().err
    assert whole.drop(columns=["surprisal", "top_prob"]).equals(parts.drop(columns=["surprisal", "top_prob"]))
    assert whole.surprisal.to_numpy() == pytest.approx(parts.surprisal.to_numpy(), abs=1e-4)


def _fits(scope: Patchscope, gb: float, rows: int) -> bool:
    try:
        return chunk_rows(scope, gb) >= rows
    except InterpError:
        return False


def test_fewer_columns_allow_more_cells(wide_gemma: Any) -> None:
    scope = Patchscope(wide_gemma, "the cat; x", "x")
    assert chunk_rows(scope, 2e-3, 5) > chunk_rows(scope, 2e-3)
    assert chunk_rows(scope, 2e-3) < chunk_rows(scope, 4e-3) <= 512 == chunk_rows(scope, 1e3)


def test_distinguishing(wide_gemma: Any) -> None:
    paths = distinguishing(wide_gemma, [" the cat", " the dog", " mat"])
    the, cat = wide_gemma.tokenizer(" the cat", add_special_tokens=False).input_ids
    assert paths[0] == [the, cat] and len(paths[1]) == 2 and len(paths[2]) == 1
    for bad, sentence in (
        ([" the"], "1 candidates were given; at least two"),
        ([" the", " the cat"], "' the' is, in tokens, the beginning of another"),
        ([" mat", " mat"], "' mat' is, in tokens, the beginning of another or given twice"),
    ):
        with pytest.raises(InterpError, match=sentence):
            distinguishing(wide_gemma, bad)


def test_bad_input_gets_a_sentence_before_work(any_model: Any) -> None:
    states, scope = states_of(any_model), Patchscope(any_model, "the cat; x", "x")
    wide = torch.zeros(3, states.shape[1], 48)
    bad: list[tuple[str, Callable[[], Any]]] = [
        ("has no placeholder 'q'", lambda: Patchscope(any_model, "the cat; x", "q")),
        ("Position 40 is out of range", lambda: Patchscope(any_model, "the cat; x", 40)),
        ("Layer 9 is out of range", lambda: Patchscope(any_model, "the cat; x", "x", layer=9)),
        ("Layer 11 is out of range", lambda: grid(scope, states, into=[11], top_k=1)),
        ("Nothing to measure", lambda: grid(scope, states)),
        ("width 48 but the target model's d_model is 32", lambda: grid(scope, wide, top_k=1)),
        (
            r"mapping from layer 0 to 0 gave shape \(3, 48\)",
            lambda: grid(
                Patchscope(any_model, "x y", "x", mapping=lambda h, layer, to: wide[:, 0]), states, top_k=1
            ),
        ),
        ("layers of states but 1 layer numbers", lambda: grid(scope, states, layers=[0], top_k=1)),
        (
            "answer ' dog' is not among",
            lambda: grid(scope, states, candidates=[" cat", " mat"], answers=[" dog"] * 3),
        ),
        (
            "2 answers for 3 sources",
            lambda: grid(scope, states, candidates=[" cat", " mat"], answers=[" cat"] * 2),
        ),
        ("1 final states for 3 sources", lambda: grid(scope, states, final=states[:1, -1])),
        ("needs 0.000 GB but memory_gb is 1e-09", lambda: grid(scope, states, top_k=1, memory_gb=1e-9)),
        ("The grid is empty", lambda: grid(scope, states, into=[], top_k=1)),
        ("2 states, 1 layers and 1 target layers", lambda: patched_logits(scope, states[:2, 0], [0])),
        ("no states to patch", lambda: patched_logits(scope, states[0, :0], [])),
    ]
    for sentence, call in bad:
        with pytest.raises(InterpError, match=sentence):
            call()


def test_shared_prefix_has_its_limits(tiny_model: Callable[..., Any], wide_gemma: Any) -> None:
    with pytest.raises(InterpError, match="remote model cannot be kept"):
        SharedPrefix(tiny_model("llama", remote="local"), "x y", -1)
    with pytest.raises(InterpError, match="Some layers see less than the"):
        SharedPrefix(tiny_model("gemma3"), "the cat sat on the mat; the dog", -1)
    with pytest.raises(InterpError, match="width 16 but the target model's d_model is 32"):
        SharedPrefix(wide_gemma, "x y", -1).run(torch.zeros(1, 16), [0])
    with pytest.raises(InterpError, match="no states to patch"):
        SharedPrefix(wide_gemma, "x y", -1).run(torch.zeros(0, 32), [])


def test_hooks_are_gone_after_a_run_and_after_a_crash(
    wide_gemma: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count() -> int:
        return sum(
            len(b._module._forward_hooks) + len(b._module._forward_pre_hooks) for b in wide_gemma.layers
        )

    before = count()
    SharedPrefix(wide_gemma, "the cat; x", -1)
    assert count() == before
    monkeypatch.setattr("interp_utils.shared_prefix._resid", lambda out: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        SharedPrefix(wide_gemma, "the cat; x", -1)
    assert count() == before


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_real_cells_equal_one_at_a_time(name: str, request: pytest.FixtureRequest) -> None:
    """Random cells of the identity prompt: tokens of the batch against the plain loop; near-ties counted."""
    model = request.getfixturevalue(name)
    oracle = Oracle(model._module)
    target = "cat -> cat\n1135 -> 1135\nhello -> hello\n?"
    ids, n = tokenize(model, target), len(model.layers)
    states = residual_stream(model, "The tower stands in Paris", positions=-1)[:, :, 0]
    table = grid(Patchscope(model, target, "?"), states, into=range(n), final=states[:, -1], progress=False)
    assert len(table) == n * n
    ties = 0
    for row in table.sample(24, random_state=0).itertuples():
        logits = cell_logits(oracle, ids, -1, row.into, states[0, row.layer])
        best = logits.topk(2)
        ties += row.token != int(best.indices[0])
        assert same_but_for_ties(
            [row.token], [int(best.indices[0])], [float(best.values[0] - best.values[1])]
        )
    assert ties <= 1
    last = table[table["into"] == n - 1]
    assert last.token.tolist() == logit_lens(model, states[0]).argmax(-1).tolist()
