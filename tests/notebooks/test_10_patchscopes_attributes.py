"""The definitions of 10_patchscopes_attributes against slow, obvious versions."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import permutation_test
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.preprocessing import StandardScaler

from interp_utils.activations import logit_lens, residual_stream, tokenize
from interp_utils.errors import InterpError
from interp_utils.facts import load_relation, relation_names
from interp_utils.patchscopes import Patchscope, distinguishing, grid
from tests.notebooks.definitions import definitions
from tests.oracle import Oracle

STEM = "10_patchscopes_attributes"
ANSWERS = [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3]  # sizes 3, 3, 2, 4


def relation(answers: list[int], kind: str = "classes") -> SimpleNamespace:
    """A relation of made-up words that the tiny tokenizer can write."""
    words = ["cat", "dog", "mat", "the"]
    table = pd.DataFrame({"subject": [f"s{i}" for i in range(len(answers))]})
    table["answer"] = [words[a] for a in answers] if kind == "classes" else [f"a{i}" for i in answers]
    found = sorted(set(table.answer))
    return SimpleNamespace(
        title="a test", kind=kind, table=table, answers=found, target="the cat is x and sat",
        prompt=lambda s: f"the cat is {s} and sat", sources=lambda s: [f"{c} {s}" for c in "abcde"],
    )  # fmt: skip


def book(
    *names: str, model: Any = None, answers: list[int] = ANSWERS, kind: str = "classes", **given: Any
) -> Any:
    own = relation(answers, kind)
    right = np.array([own.answers.index(a) for a in own.table.answer])
    scope = {
        "np": np, "pd": pd, "torch": torch, "re": re, "KFold": KFold, "StratifiedKFold": StratifiedKFold,
        "Ridge": Ridge, "LogisticRegression": LogisticRegression, "StandardScaler": StandardScaler,
        "permutation_test": permutation_test, "Patchscope": Patchscope, "distinguishing": distinguishing,
        "grid": grid, "tokenize": tokenize, "logit_lens": logit_lens, "residual_stream": residual_stream,
        "InterpError": InterpError, "SEED": 0, "model": model, "relations": {"r": own}, "right": {"r": right},
        "titles": {"r": own.title}, "candidates": {"r": [f" {a}" for a in own.answers]},
        "drawn": {"r": list(range(len(answers)))}, "one_to_one": {"r": kind == "one-to-one"},
    }  # fmt: skip
    if hasattr(model, "layers"):
        scope |= {"n_layers": len(model.layers), "layers": list(range(len(model.layers)))}
    return definitions(STEM, *names, **{**scope, **given})


def test_text_scores_are_the_teacher_forced_probabilities(model: Any, oracle: Oracle) -> None:
    prompts = ["the dog sat on", "the cat"]
    options = [" cat z", " cat y", " dog"]  # two begin alike
    log_p, top = book("text_scores", model=model).text_scores(prompts, options)
    for row, prompt in enumerate(prompts):
        ids, scores = tokenize(model, prompt), []
        for path in distinguishing(model, options):
            steps = [oracle.logits(ids + path[:i]).log_softmax(-1)[token] for i, token in enumerate(path)]
            scores.append(sum(steps))
        torch.testing.assert_close(log_p[row], torch.stack(scores).log_softmax(-1), rtol=1e-4, atol=1e-4)
        assert int(top[row]) == int(oracle.logits(ids).argmax())
    assert max(map(len, distinguishing(model, options))) > 1


def test_ask_in_text_keeps_the_order_of_its_jobs(llama: Any) -> None:
    own = book("text_scores", "ask_in_text", model=llama)
    jobs = pd.DataFrame({"relation": "r", "subject": [4, 0, 7]}, index=[9, 2, 5]).sort_index()
    asked = own.ask_in_text(jobs)
    assert list(asked.index) == [2, 5, 9] and list(asked.subject) == [0, 7, 4]
    relation_ = relation(ANSWERS)
    options = [f" {a}" for a in relation_.answers]
    for row in asked.itertuples():
        log_p, top = own.text_scores([relation_.prompt(f"s{row.subject}")], options)
        answer = f" {relation_.table.answer[row.subject]}"
        assert row.choice == int(log_p.argmax())
        assert row.log_prob == pytest.approx(float(log_p[0, options.index(answer)]), abs=0.006)
        assert row.top1 == int(int(top[0]) == llama.tokenizer(answer, add_special_tokens=False).input_ids[0])


def asked(n_right: int) -> pd.DataFrame:
    right = [relation(ANSWERS).answers.index(a) for a in relation(ANSWERS).table.answer]
    choice = [r if i < n_right else (r + 1) % 4 for i, r in enumerate(right)]
    return pd.DataFrame({"relation": "r", "subject": range(len(right)), "choice": choice})


def test_keep_takes_the_right_ones_or_says_who_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    own = book("keep", MIN_KEPT=5, model=SimpleNamespace(info=SimpleNamespace(name="m")))
    assert own.keep(asked(7)) == {"r": list(range(7))}
    with pytest.raises(InterpError, match="No relation has 5 subjects"):
        own.keep(asked(4))
    assert "left out: a test, 4 known of the 5 needed" in capsys.readouterr().out


def test_draw_takes_whole_classes_first_and_at_most_cap() -> None:
    own = book("class_sizes", "draw", CAP=10)
    assert own.class_sizes("r", [0, 1, 2, 3, 6, 7]).tolist() == [3, 3, 3, 1, 2, 2]
    assert own.draw("r", list(range(12))) == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11]  # the class of two waits
    assert len(book("class_sizes", "draw", CAP=4).draw("r", list(range(12)))) == 4
    assert own.draw("r", [6, 7]) == [6, 7]


def test_comparable_and_ceiling() -> None:
    own = book("class_sizes", "comparable", "ceiling", kept={"r": list(range(12))})
    assert own.comparable("r") == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11]
    assert own.ceiling("r", [0, 3, 6, 8]) == 0  # every class once: nothing held out was trained on
    assert own.ceiling("r", [0, 1, 2]) == 1
    single = book(
        "class_sizes", "comparable", "ceiling", kept={"r": [0, 2]}, answers=[0, 1, 2], kind="one-to-one"
    )
    assert single.comparable("r") == [0, 2]
    lone = book(
        "class_sizes", "comparable", kept={"r": [0, 1, 2, 3, 6]}
    )  # one class of three is nothing to tell apart
    assert lone.comparable("r") == []


def test_nearest_unseen_is_the_best_cosine_of_the_others() -> None:
    rng = np.random.default_rng(0)
    said, vectors, seen = rng.normal(size=(6, 5)), rng.normal(size=(8, 5)), np.array([1, 4, 4])
    found = book("nearest_unseen").nearest_unseen(said, vectors, seen)
    for row, answer in zip(said, found, strict=True):
        cosine = {
            i: row @ v / np.linalg.norm(row) / np.linalg.norm(v)
            for i, v in enumerate(vectors)
            if i not in seen
        }
        assert answer == max(cosine, key=cosine.__getitem__)


def planted(shape: tuple[int, int, int, int], answers: list[int]) -> np.ndarray:
    """States whose second layer holds the answer and whose first is noise of the subject's own."""
    rng = np.random.default_rng(1)
    states = rng.normal(size=shape)
    states[:, :, 0] += 20 * rng.normal(
        size=(shape[0], 1, shape[3])
    )  # known only to those who saw the subject
    for i, answer in enumerate(answers):
        states[i, :, 1, answer] += 30
    return states


def test_probe_finds_a_planted_class_and_never_sees_the_subject() -> None:
    answers = [0] * 9 + [1] * 9 + [3] * 9
    own = book("answer_vectors", "nearest_unseen", "probe_choices", answers=answers)
    own.probe_choices.__globals__["answer_vectors"] = lambda name: np.eye(4)
    subjects = list(range(27))
    right = own.probe_choices.__globals__["right"]["r"]
    said = own.probe_choices("r", subjects, planted((27, 5, 2, 12), list(right)))
    assert said.shape == (27, 5, 2) and (said[:, :, 1] == right[:, None]).all()
    assert (said[:, :, 0] == right[:, None]).mean() < 0.7  # a leak between contexts would give 1
    assert ((said[:, :, 0] == said[:, :1, 0]).mean()) > 0.9  # contexts stay together


def test_ridge_probe_finds_a_planted_map_onto_unseen_answers() -> None:
    n, rng = 60, np.random.default_rng(2)
    own = book(
        "nearest_unseen", "probe_choices", answers=list(range(n)), kind="one-to-one", answer_vectors=None
    )
    scope = own.probe_choices.__globals__
    vectors = rng.normal(size=(n, 6))
    scope["answer_vectors"] = lambda name: vectors
    states = np.repeat((vectors[scope["right"]["r"]] @ rng.normal(size=(6, 16)))[:, None, None], 5, axis=1)
    said = own.probe_choices(
        "r", list(range(n)), np.concatenate([states, rng.normal(size=states.shape)], axis=2)
    )
    hits = (said == scope["right"]["r"][:, None, None]).mean((0, 1))
    assert hits[0] > 0.8 and hits[1] < 0.2


def test_answer_vectors_are_centred_means_of_unembedding_rows(model: Any) -> None:
    own = book("answer_vectors", model=model)
    weight = model.unembed._module.weight.float()
    rows = []
    for answer in relation(ANSWERS).answers:
        ids = model.tokenizer(f" {answer}", add_special_tokens=False).input_ids
        rows.append(sum(weight[i] for i in ids) / len(ids))
    expected = torch.stack(rows) - torch.stack(rows).mean(0)
    torch.testing.assert_close(torch.tensor(own.answer_vectors("r")), expected.detach(), rtol=1e-4, atol=1e-5)


def test_random_vectors_keep_norms_only() -> None:
    states = torch.randn(3, 2, 4, 64) * 100
    noise = book("random_vectors").random_vectors(states)
    torch.testing.assert_close(noise.norm(dim=-1), states.norm(dim=-1))
    assert torch.nn.functional.cosine_similarity(noise, states, dim=-1).abs().max() < 0.6


def test_source_states_are_those_of_the_last_token(llama: Any) -> None:
    states = book("source_states", model=llama).source_states("r", [2, 5], 3, [1, 3])
    assert states.shape[:3] == (2, 3, 2)
    one = residual_stream(llama, "c s5", positions=-1, layers=[3])[0, 0, 0]
    torch.testing.assert_close(states[1, 2, 1], one, rtol=1e-4, atol=1e-4)


def test_cross_puts_every_choice_in_its_row(llama: Any, tiny_folder: Any) -> None:
    from tests.families import raw_model

    own, oracle = book("source_states", "tidy", "cross", model=llama), Oracle(raw_model(tiny_folder("llama")))
    made, which = relation(ANSWERS), [0, 2]
    states = own.source_states("r", [1, 9], 2, which)
    cells = own.cross("r", [1, 9], states, which)
    assert len(cells) == 2 * 2 * len(llama.layers) and {"c0", "c1"} <= set(cells) and "c2" not in cells
    scope = Patchscope(llama, made.target)
    ids = tokenize(llama, made.target)
    first = [llama.tokenizer(f" {a}", add_special_tokens=False).input_ids[0] for a in made.answers]
    for row in cells.itertuples():
        log_p = []
        for context in range(2):
            state = states[[1, 9].index(row.subject), context, which.index(row.layer)]
            change = (row.into, len(ids) + scope.position, lambda _, state=state: state)
            log_p.append(oracle.logits(ids, [change])[first].log_softmax(-1))
            best = log_p[-1].topk(2).values
            near_tie = float(best[0] - best[1]) < 1e-3
            assert near_tie or getattr(row, f"c{context}") == int(log_p[-1].argmax())
        wanted = made.answers.index(made.table.answer[row.subject])
        assert row.log_prob == pytest.approx(float(sum(p[wanted] for p in log_p) / 2), abs=0.006)


RNG = np.random.default_rng(3)
CHOICE = RNG.integers(0, 4, (12, 5, 3, 4))  # subject, context, layer, into
WANTED = np.array([relation(ANSWERS).answers.index(a) for a in relation(ANSWERS).table.answer])


def test_one_try_and_any_try_equal_their_definitions() -> None:
    own = book("one_try", "any_try")
    count = np.bincount(WANTED, minlength=4)
    one, any_ = own.one_try(CHOICE, WANTED, count), own.any_try(CHOICE, WANTED, count)
    assert one[0].shape == CHOICE.shape and any_[0].shape == CHOICE.shape[:-1]
    for s, c, l_ in np.ndindex(12, 5, 3):
        others = [WANTED[o] for o in range(12) if o != s]
        said = list(CHOICE[s, c, l_])
        assert any_[0][s, c, l_] == (WANTED[s] in said)
        assert any_[1][s, c, l_] == pytest.approx(np.mean([o in said for o in others]))
        for t in range(4):
            assert one[0][s, c, l_, t] == (said[t] == WANTED[s])
            assert one[1][s, c, l_, t] == pytest.approx(np.mean([said[t] == o for o in others]))
    probe = own.one_try(CHOICE[..., 0], WANTED, count)
    np.testing.assert_array_equal(probe[0], one[0][..., 0])


def cells_table() -> pd.DataFrame:
    """The random choices as a shuffled record, with a probe that says the first target layer's choice."""
    rows = [
        {"state": "subject", "subject": s, "layer": 2 * l_, "into": 2 * t}
        | {f"c{c}": CHOICE[s, c, l_, t] for c in range(5)}
        for s, l_, t in np.ndindex(12, 3, 4)
    ]
    rows += [
        {"state": "probe", "subject": s, "layer": 2 * l_, "into": -1}
        | {f"c{c}": CHOICE[s, c, l_, 0] for c in range(5)}
        for s, l_ in np.ndindex(12, 3)
    ]
    return pd.DataFrame(rows).assign(relation="r", log_prob=0.0).sample(frac=1, random_state=0)


def test_scores_put_means_over_contexts_in_their_rows() -> None:
    own = book("one_try", "any_try", "scores")
    cells = cells_table()
    by_cell = own.scores(cells, "subject", own.one_try, ["layer", "into"])
    assert len(by_cell) == 12 * 3 * 4
    for row in by_cell.itertuples():
        said = CHOICE[row.subject, :, row.layer // 2, row.into // 2]
        assert row.hit == pytest.approx((said == WANTED[row.subject]).mean())
    by_layer = own.scores(cells, "subject", own.any_try, ["layer"])
    for row in by_layer.itertuples():
        said = CHOICE[row.subject, :, row.layer // 2]
        assert row.hit == pytest.approx((said == WANTED[row.subject]).any(-1).mean())
    probe = own.scores(cells, "probe", own.one_try, ["layer"])
    first = by_cell[by_cell["into"] == 0].set_index(["subject", "layer"]).hit
    assert (probe.set_index(["subject", "layer"]).hit - first).abs().max() < 1e-12


def test_strict_judges_each_half_at_the_other_halfs_best_cell() -> None:
    own = book("one_try", "scores", "strict")
    by_cell = own.scores(cells_table(), "subject", own.one_try, ["layer", "into"])
    judged, chosen = own.strict(by_cell, ["layer", "into"])
    assert sorted(judged.subject) == list(range(12))
    half = set(np.random.default_rng(0).permutation(12)[::2].tolist())
    for dev, cell in zip((half, set(range(12)) - half), chosen, strict=True):
        mean = by_cell[by_cell.subject.isin(dev)].groupby(["layer", "into"]).hit.mean()
        assert mean[cell] == mean.max()
        rest = judged[~judged.subject.isin(dev)]
        assert set(zip(rest.layer, rest["into"], strict=True)) == {cell}


def test_holm_and_sign_flip() -> None:
    own = book("holm", "sign_flip")
    p = [0.01, 0.04, 0.03, 0.005, 0.9]
    assert own.holm(p) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.9])
    assert own.sign_flip(np.array([1.0] * 5)) == pytest.approx(2 / 32)  # few enough to count exactly
    assert own.sign_flip(np.zeros(6)) == 1
    assert own.sign_flip(np.array([1.0, -1, 2, -2, 0.5, -0.5])) > 0.9


@pytest.mark.parametrize(
    ("text", "answer", "word", "substring"),
    [
        (" Madrid. The capital", "Madrid", True, True),
        (" madrid,", "Madrid", True, False),
        (" Madridistas", "Madrid", False, True),
        (" Newyork", "New York", False, False),
        (" NewYork", "New York", False, True),
        (" the euro", "euro", True, True),
        (" Europe", "euro", False, False),
        (" N'Djamena.", "N'Djamena", True, True),
        ("", "red", False, False),
    ],
)
def test_reading_of_generated_text(text: str, answer: str, word: bool, substring: bool) -> None:
    own = book("as_word", "as_substring")
    assert own.as_word(text, answer) is word
    assert own.as_substring(text, answer) is substring


def test_the_relations_are_what_the_text_says() -> None:
    every = [load_relation(name) for name in relation_names()]
    assert len(every) >= 10 and all(len(r.contexts) == 5 and len(r.table) >= 60 for r in every)
    assert "Spain" in set(load_relation("country_largest_city").table.subject)
    assert all(r.target.rstrip()[-1] != "x" for r in every)  # tokens follow the placeholder
