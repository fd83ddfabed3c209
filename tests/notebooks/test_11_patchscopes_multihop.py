"""The definitions of 11_patchscopes_multihop against slow, obvious versions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from interp_utils.activations import next_token_logits, residual_stream, tokenize
from interp_utils.candidates import candidate_log_probs
from interp_utils.facts import load_relation
from interp_utils.interventions import edited_logits, patch
from interp_utils.patchscopes import Patchscope, distinguishing, grid
from tests.notebooks.definitions import definitions

STEM = "11_patchscopes_multihop"
N = 3  # layers of the made-up grids
data = definitions(
    STEM, "PHRASES", "OF_COUNTRIES", "SECOND", "pairs", "relation", "compose", "questions", "stepwise", "asked", "mentions",
    pd=pd, np=np, re=re, load_relation=load_relation,
)  # fmt: skip
QUESTIONS = data.questions
scoring = definitions(
    STEM, "HOPS", "DIRECT", "right", "keep", "choices", "one_cell", "strangers", "lent", "success", "any_cell", "per_question",
    "SOURCES", "lucky", "noise_like", "said", "rules", "mentions",
    pd=pd, np=np, re=re, torch=torch, questions=QUESTIONS, relation=data.relation, layers=list(range(N)), SEED=0, THIN=[0, 2],
    UNPATCHED={name: 0 for name in data.relation},
)  # fmt: skip
CAPITALS = QUESTIONS.index[QUESTIONS.second == "country_capital"]


def test_questions_join_two_relations_and_give_nothing_away() -> None:
    facts = {name: dict(r.table[["subject", "answer"]].to_numpy()) for name, r in data.relation.items()}
    assert len(QUESTIONS) >= 200 and len(QUESTIONS.groupby(["first", "second"])) >= 5
    for q in QUESTIONS.itertuples():
        assert facts[q.first][q.subject] == q.bridge and facts[q.second][q.bridge] == q.answer
        assert q.phrase.endswith(q.subject)
        for hidden in (q.bridge, q.answer):
            assert hidden.lower() not in q.phrase.lower()
        assert q.bridge.lower() not in q.answer.lower()
    for name, group in QUESTIONS.groupby("second"):
        assert [data.relation[name].answers[code] for code in group.code] == list(group.answer)
    for name, group in QUESTIONS.groupby("first"):
        assert [data.relation[name].answers[code] for code in group.bridge_code] == list(group.bridge)
    assert not QUESTIONS.duplicated(["subject", "second"]).any()


def test_no_phrase_stands_among_the_worked_sentences() -> None:
    for q in QUESTIONS.itertuples():
        target = data.relation[q.second].target
        assert q.subject not in target and not re.search(rf"\b{re.escape(q.bridge)}\b", target)


@pytest.mark.parametrize("how", ["hop 1", "hop 2", "plain", "steps"])
def test_asked_fills_the_relations_own_prompt(how: str) -> None:
    part = QUESTIONS.sample(20, random_state=0)
    for q, prompt in data.asked(part, how).items():
        own = part.loc[q]
        one, two = data.relation[own["first"]], data.relation[own.second]
        expected = {"hop 1": one.prompt(own.subject), "hop 2": two.prompt(own.bridge)}
        assert prompt == expected.get(
            how, data.stepwise(two.prompt(own.phrase)) if how == "steps" else two.prompt(own.phrase)
        )


def test_stepwise_puts_the_prefix_before_the_last_sentence() -> None:
    assert data.stepwise("A is B. C is D. E is") == "A is B. C is D. Let's think step by step. E is"


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [("is Rome.", "Rome", True), ("ROME is", "Rome", True), ("Romeo", "Rome", False), ("Jerome", "Rome", False),
     ("the euro-dollar", "euro", True), ("", "Rome", False)],
)  # fmt: skip
def test_mentions_whole_words(text: str, answer: str, found: bool) -> None:
    assert data.mentions(text, answer) is found


def rows_of(chosen: np.ndarray, ids: pd.Index, source: str) -> pd.DataFrame:
    """Long table, in a scrambled order, of choices (question, layer, into)."""
    cells = [
        (q, source, a, b, chosen[i, a, b])
        for i, q in enumerate(ids)
        for a, b in itertools.product(range(N), repeat=2)
    ]
    table = pd.DataFrame(cells, columns=["question", "source", "layer", "into", "choice"])
    return table.sample(frac=1, random_state=3)


def test_choices_puts_every_row_in_its_cell() -> None:
    rng = np.random.default_rng(0)
    chosen, ids = rng.integers(0, 9, (5, N, N)), CAPITALS[[7, 3, 11, 2, 5]]
    rows = pd.concat([rows_of(chosen, ids, "phrase"), rows_of(chosen + 100, ids, "random")])
    assert (scoring.choices(rows, "phrase", ids) == chosen).all()
    below = rows[rows["into"] < rows["layer"]]
    found = scoring.choices(below, "random", ids)
    for a, b in itertools.product(range(N), repeat=2):
        assert (found[:, a, b] == (chosen[:, a, b] + 100 if b < a else -1)).all()


def test_one_cell_never_looks_at_questions_of_the_same_bridge() -> None:
    rng = np.random.default_rng(1)
    hits, bridge = rng.random((12, 6)) < 0.4, rng.choice(list("abcd"), 12)
    found = scoring.one_cell(hits, bridge)
    for i in range(12):
        dev = [j for j in range(12) if bridge[j] != bridge[i]]
        rates = [np.mean([hits[j, c] for j in dev]) for c in range(6)]
        best = [c for c in range(6) if np.isclose(rates[c], max(rates))]
        assert found[i] == pytest.approx(np.mean([hits[i, c] for c in best]))
        changed = hits.copy()
        changed[bridge == bridge[i]] = ~changed[bridge == bridge[i]]
        assert scoring.one_cell(changed, bridge)[i] == pytest.approx(
            1 - found[i]
        )  # the same cells were chosen


def test_one_cell_finds_a_cell_that_is_always_right() -> None:
    hits = np.zeros((6, 4), bool)
    hits[:, 2] = True
    assert (scoring.one_cell(hits, np.array(list("aabbcc"))) == 1).all()


def test_strangers_share_hop_2_and_differ_in_the_answer() -> None:
    ids = QUESTIONS.sample(30, random_state=2).index
    found = scoring.strangers(ids)
    for (i, a), (j, b) in itertools.product(enumerate(ids), repeat=2):
        one, two = QUESTIONS.loc[a], QUESTIONS.loc[b]
        assert found[i, j] == (one.second == two.second and one.answer != two.answer)


def test_lent_reads_the_lenders_choices_for_my_answer() -> None:
    rng = np.random.default_rng(4)
    ids = CAPITALS[:8]
    code = QUESTIONS.code[ids].to_numpy()
    chosen = rng.choice(code, (8, N, N))
    lenders, rows = scoring.strangers(ids), rows_of(chosen, ids, "phrase")
    found = scoring.lent(chosen, ids)
    means, own = scoring.success(rows, "other", ids), scoring.success(rows, "phrase", ids)
    for i in range(8):
        others = [j for j in range(8) if lenders[i, j]]
        assert found[i].shape == (len(others), N * N)
        for a, b in itertools.product(range(N), repeat=2):
            expected = [chosen[j, a, b] == code[i] for j in others]
            assert list(found[i][:, a * N + b]) == expected
            assert means[i, a * N + b] == pytest.approx(np.mean(expected))
            assert own[i, a * N + b] == (chosen[i, a, b] == code[i])
        some = np.mean([(chosen[j] == code[i]).any() for j in others])
        assert scoring.any_cell(rows, "other", ids)[i] == pytest.approx(some)
        assert scoring.any_cell(rows, "phrase", ids)[i] == (chosen[i] == code[i]).any()


def asked_rows(ids: pd.Index, source: str, wrong: tuple[int, ...] = ()) -> pd.DataFrame:
    """Text rows, right but for the questions at the places `wrong`."""
    column = "bridge_code" if source == "hop 1" else "code"
    rows = pd.DataFrame(
        {"question": ids, "source": source, "layer": -1, "into": -1, "choice": QUESTIONS[column][ids]}
    )
    rows["strict"] = 1
    rows.iloc[list(wrong), 4:] = 0, 0
    rows.iloc[list(wrong), 4] = -1
    return rows.reset_index(drop=True)


def test_right_compares_hop_1_with_the_bridge() -> None:
    ids = QUESTIONS.sample(15, random_state=5).index
    rows = pd.concat([asked_rows(ids, "hop 1", (3,)), asked_rows(ids, "plain", (0,))], ignore_index=True)
    assert list(np.flatnonzero(~scoring.right(rows))) == [3, 15]


def test_per_question_keeps_known_questions_and_scores_both_rules() -> None:
    ids = CAPITALS[[0, 4, 9, 20, 40, 50]]
    rng = np.random.default_rng(8)
    code = QUESTIONS.code[ids].to_numpy()
    chosen = np.where(rng.random((6, N, N)) < 0.4, code[:, None, None], rng.choice(code, (6, N, N)))
    parts = [
        asked_rows(ids, "hop 1", (1,)),
        asked_rows(ids, "hop 2"),
        asked_rows(ids, "plain", (0,)),
        asked_rows(ids, "steps", (2,)),
    ]
    rows = pd.concat([*parts, rows_of(chosen, ids, "phrase")], ignore_index=True)
    found, places = scoring.per_question(rows), [0, 2, 3, 4, 5]
    assert list(found.index) == [ids[i] for i in places]  # question 1 misses hop 1
    assert list(found.plain) == [0, 1, 1, 1, 1] and list(found.steps) == [1, 0, 1, 1, 1]
    hits = (chosen == code[:, None, None])[places].reshape(5, -1)
    assert list(found["any phrase"]) == list(hits.any(axis=1))
    assert list(found["one phrase"]) == list(scoring.one_cell(hits, found.bridge.to_numpy()))
    assert "any random" not in found and found["any other"].between(0, 1).all()
    assert list(found.unpatched) == [float(c == 0) for c in found.code]


def test_keep_needs_both_hops() -> None:
    ids = CAPITALS[:5]
    rows = pd.concat([asked_rows(ids, "hop 1", (0,)), asked_rows(ids, "hop 2", (3,))], ignore_index=True)
    rows.loc[[0, 8], "strict"] = 1
    rows.loc[[2, 6], "strict"] = 0
    rows = rows.drop(index=9)  # a question with one hop only
    assert list(scoring.keep(rows)) == [ids[1], ids[2]]
    assert list(scoring.keep(rows, strict=True)) == [ids[0], ids[3]]


def test_lucky_counts_all_draws() -> None:
    rng = np.random.default_rng(6)
    hits = rng.random((4, 5)) < 0.3
    found = scoring.lucky(hits)
    for k in range(1, 6):
        draws = list(itertools.combinations(range(5), k))
        expected = np.mean([[row[list(d)].any() for d in draws] for row in hits])
        assert found[k - 1] == pytest.approx(expected)


def test_noise_has_the_norms_and_depends_on_the_question_alone() -> None:
    states = torch.randn(3, N, 8, generator=torch.Generator().manual_seed(0)) * 7
    one = scoring.noise_like(states, pd.Index([5, 9, 4]))
    torch.testing.assert_close(one.norm(dim=-1), states.norm(dim=-1))
    two = scoring.noise_like(states[[2, 0]], pd.Index([4, 5]))
    torch.testing.assert_close(two, one[[2, 0]])


def test_region_is_inside_minus_outside() -> None:
    ids = CAPITALS[:4]
    chosen = np.where(
        np.random.default_rng(7).random((4, N, N)) < 0.5, QUESTIONS.code[ids].to_numpy()[:, None, None], -1
    )
    inside = np.tri(N, dtype=bool)
    own = definitions(
        STEM, "region", success=scoring.success, basis=rows_of(chosen, ids, "phrase"), scores=SimpleNamespace(index=ids), pd=pd
    )  # fmt: skip
    for i, value in enumerate(own.region("phrase", inside)):
        right = chosen[i] >= 0
        assert value == pytest.approx(right[inside].mean() - right[~inside].mean())


def test_said_and_rules_read_the_texts() -> None:
    ids = CAPITALS[[0, 10, 30]]
    answers = list(QUESTIONS.answer[ids])
    cells = list(itertools.product([0, 2], repeat=2))
    texts = [(q, "said", a, b, f" {answers[(i + a) % 3]}.") for i, q in enumerate(ids) for a, b in cells]
    said = pd.DataFrame(texts, columns=["question", "source", "layer", "into", "text"])
    plain = [(q, "said plain", -1, -1, "", c) for q, c in zip(ids, [1, 0, 1], strict=True)]
    steps = [(q, "said steps", -1, -1, "", c) for q, c in zip(ids, [0, 0, 1], strict=True)]
    whole = pd.DataFrame(plain + steps, columns=["question", "source", "layer", "into", "text", "choice"])
    asked = [asked_rows(ids, "plain", (1,)), asked_rows(ids, "steps", (0, 1))]
    code = np.broadcast_to(QUESTIONS.code[ids].to_numpy()[:, None, None], (3, N, N))
    top = rows_of(code, ids, "top")
    rows = pd.concat([said, whole, *asked, rows_of(code, ids, "phrase"), top], ignore_index=True)
    direct, hits, wrong = scoring.said(rows.sample(frac=1, random_state=0), ids)
    assert direct.tolist() == [[True, False], [False, False], [True, True]]
    assert (hits == [[a == 0 for a, _ in cells]] * 3).all()
    for i, lent in enumerate(wrong):
        lenders = [j for j in range(3) if answers[j] != answers[i]]
        assert lent.tolist() == [[answers[(j + a) % 3] == answers[i] for a, _ in cells] for j in lenders]
    found = scoring.rules(rows)
    assert list(found["steps"].round(3)) == [0.333] * 3
    assert list(found["plain"].round(3)) == [0.667] * 3 and list(found["any phrase"]) == [1, 1, 1]
    assert found.loc["first of the candidates", "any other"] == 0


ANSWERS = ["cat", "dog", "mud", "mug"]  # the last two begin alike
FAKE = {
    "one": SimpleNamespace(answers=["sat", "the"], prompt=lambda x: f"the {x} on", target="the x on"),
    "two": SimpleNamespace(
        answers=ANSWERS, prompt=lambda x: f"the cat sat on {x};", target="the cat sat on x;"
    ),
}


MADE_UP = pd.DataFrame({
    "subject": ["dog", "z"], "bridge": ["sat", "the"], "answer": ["mud", "dog"], "first": "one", "second": "two",
    "phrase": ["the mat of dog", "y z"], "bridge_code": [0, 1], "code": [2, 1], "other": [7, 40],
}, index=pd.Index([40, 7], name="question"))  # fmt: skip


@pytest.fixture
def tiny(tiny_model: Callable[..., Any]) -> SimpleNamespace:
    """The notebook's experiment on a random model of four layers."""
    model = tiny_model("llama")
    scope = {"two": Patchscope(model, FAKE["two"].target)}
    made = definitions(
        STEM, "choose", "first_token", "text_rows", "asked", "stepwise", "with_start", "BOS", "source_states", "noise_like",
        "patch_rows", "BACK", "back_rows",
        layers=list(range(4)), questions=MADE_UP, relation=FAKE, model=model, scope=scope, np=np, pd=pd, torch=torch, SEED=0,
        distinguishing=distinguishing, tokenize=tokenize, grid=grid, Patchscope=Patchscope,
        next_token_logits=next_token_logits, residual_stream=residual_stream, candidate_log_probs=candidate_log_probs,
    )  # fmt: skip
    made.model, made.scope = model, scope
    return made


def whole_log_probs(model: Any, prompt: list[int], edits: list[Any]) -> np.ndarray:
    """Among the candidates: probability of all tokens that tell each from the others, one forward per token."""
    scores = []
    for path in distinguishing(model, [f" {a}" for a in ANSWERS]):
        score = 0.0
        for end in range(len(path)):
            shifted = [patch(e.layer, e.position - end, e.change(torch.zeros(32))) for e in edits]
            logits = edited_logits(model, [*prompt, *path[:end]], [shifted], expect_change=False)[0]
            score += float(logits.log_softmax(-1)[path[end]])
        scores.append(score)
    return np.array(scores) - np.logaddexp.reduce(scores)


def test_choose_scores_the_tokens_that_tell_candidates_apart(tiny: SimpleNamespace) -> None:
    prompts = ["the cat sat on dog;", "the cat;"]
    found, top = tiny.choose(prompts, ANSWERS)
    for i, prompt in enumerate(prompts):
        ids = tokenize(tiny.model, prompt)
        np.testing.assert_allclose(found[i], whole_log_probs(tiny.model, ids, []), atol=1e-4)
        assert top[i] == int(next_token_logits(tiny.model, [ids])[0].argmax())


def test_patch_rows_hold_every_cell_of_every_source(tiny: SimpleNamespace) -> None:
    rows = tiny.patch_rows(MADE_UP, ["phrase", "subject"])
    assert len(rows) == 2 * 3 * 16 and not rows.duplicated(["question", "source", "layer", "into"]).any()
    target = tokenize(tiny.model, FAKE["two"].target)
    for row in rows.sample(12, random_state=0).itertuples():
        q = MADE_UP.loc[row.question]
        state = tiny.source_states([q.phrase if row.source == "random" else q[row.source]], [row.layer])[:, 0]
        if row.source == "random":
            whole = tiny.source_states([q.phrase], [0, 1, 2, 3])
            state = tiny.noise_like(whole, pd.Index([row.question]))[:, row.layer]
        edit = patch(row.into, tiny.scope["two"].position, state[0])
        expected = whole_log_probs(tiny.model, target, [edit])
        assert row.choice == expected.argmax() and row.log_prob == pytest.approx(expected[q.code], abs=6e-3)


def test_back_rows_put_later_states_into_earlier_layers(tiny: SimpleNamespace) -> None:
    rows = tiny.back_rows(MADE_UP)
    assert (rows["into"] < rows["layer"]).all() and len(rows) == 2 * 2 * 6
    at = tiny.scope["two"].position
    for row in rows.sample(8, random_state=0).itertuples():
        q = MADE_UP.loc[row.question]
        prompt = FAKE["two"].prompt(q.phrase)
        source = prompt if row.source == "back" else FAKE["two"].prompt(MADE_UP.phrase[q.other])
        state = residual_stream(tiny.model, source, positions=at)[0, row.layer, 0]
        expected = whole_log_probs(tiny.model, tokenize(tiny.model, prompt), [patch(row.into, at, state)])
        assert row.choice == expected.argmax() and row.log_prob == pytest.approx(expected[q.code], abs=6e-3)


def test_text_rows_ask_hop_1_of_its_own_relation(tiny: SimpleNamespace) -> None:
    rows = tiny.text_rows(MADE_UP, "hop 1").set_index("question")
    for q in MADE_UP.itertuples():
        scores, top = tiny.choose([FAKE["one"].prompt(q.subject)], FAKE["one"].answers)
        assert rows.choice[q.Index] == int(scores[0].argmax())
        assert rows.strict[q.Index] == (top[0] == tiny.first_token(q.bridge))


def test_a_source_starts_with_one_start_token(tiny: SimpleNamespace) -> None:
    assert tiny.with_start("the cat")[0] == tiny.BOS != tokenize(tiny.model, "the cat")[0]
    assert tiny.with_start("the cat")[1:] == tokenize(tiny.model, "the cat")
