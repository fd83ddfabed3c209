"""Recorded studies: resumed after an interruption, kept exactly, sampled and verified."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from interp_utils import records
from interp_utils.errors import InterpError
from interp_utils.interventions import Generation
from interp_utils.records import Record, load_record, read_table, run_study, study_card, verify_texts

CARD = {"command": "make study NB=09", "seed": 0, "model": "tiny"}
TEXTS = [
    "NA",
    "",
    "nan",
    "None",
    'a "quoted", word',
    "two\nlines",
    " spaces ",
    "\r",
    "a\r\nb",
    "é�\t",
    "007",
    "1",
]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INTERP_BUILD", str(tmp_path / "build"))
    monkeypatch.setenv("INTERP_DATA", str(tmp_path / "data"))
    return tmp_path


def jobs(n: int = 10) -> pd.DataFrame:
    return pd.DataFrame({"name": [f"n{i}" for i in range(n)], "layer": range(n)})


class Worker:
    """Doubles the layer, remembers its calls, and breaks down at the given call."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[list[int]] = []
        self.fail_at = fail_at

    def __call__(self, some: pd.DataFrame) -> list[int]:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(some["layer"].tolist())
        return [2 * layer for layer in some["layer"]]


def test_a_study_is_its_jobs_with_their_values() -> None:
    record = run_study("s/tiny", jobs(), Worker(), card=CARD, column="twice", chunk=4)
    expected = jobs().assign(twice=[2 * i for i in range(10)])
    pd.testing.assert_frame_equal(record.table, expected, check_dtype=False)
    again = load_record("s/tiny")
    assert again is not None and again.card == record.card
    pd.testing.assert_frame_equal(again.table, record.table)


def test_an_interrupted_study_computes_only_what_is_left() -> None:
    with pytest.raises(KeyboardInterrupt):
        run_study("s", jobs(), Worker(fail_at=1), card=CARD, chunk=4)
    assert load_record("s") is None
    second = Worker()
    record = run_study("s", jobs(), second, card=CARD, chunk=4)
    assert second.calls == [[4, 5, 6, 7], [8, 9]]
    assert record.table["text"].tolist() == [2 * i for i in range(10)]


@pytest.mark.parametrize(("card", "n"), [({**CARD, "seed": 1}, 10), (CARD, 9)])
def test_other_jobs_or_another_card_start_anew(card: dict[str, Any], n: int) -> None:
    run_study("s", jobs(), Worker(), card=CARD, chunk=4)
    second = Worker()
    run_study("s", jobs(n), second, card=card, chunk=4)
    assert sum(map(len, second.calls)) == n


@pytest.mark.parametrize(("first", "second"), [(4, 2), (2, 4), (3, 4), (10, 3)])
def test_another_chunk_size_after_an_interruption_repeats_no_row(first: int, second: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_study("s", jobs(), Worker(fail_at=2 if first < 10 else 0), card=CARD, chunk=first)
    record = run_study("s", jobs(), Worker(), card=CARD, chunk=second)
    assert record.table["layer"].tolist() == list(range(10))


def test_another_source_or_column_starts_anew() -> None:
    def double(some: pd.DataFrame) -> list[int]:
        return [2 * layer for layer in some["layer"]]

    def triple(some: pd.DataFrame, times: int = 3) -> list[int]:
        return [times * layer for layer in some["layer"]]

    run_study("s", jobs(), double, card=CARD)
    assert run_study("s", jobs(), triple, card=CARD).table["text"].tolist() == list(range(0, 30, 3))
    five = run_study("s", jobs(), partial(triple, times=5), card={**CARD, "times": 5}, column="five")
    assert five.table["five"].tolist() == list(range(0, 50, 5))
    assert "2 * layer" in records._source(double) and "times * layer" in records._source(partial(triple))
    assert records._source(len) == "" and "class Worker" in records._source(Worker())


def test_parts_with_other_columns_are_refused() -> None:
    def compute(some: pd.DataFrame) -> pd.DataFrame:
        made = some.assign(a=1, b=2)
        return made if 0 in set(some["layer"]) else made[[*some, "b", "a"]]

    with pytest.raises(InterpError, match="other columns"):
        run_study("s", jobs(), compute, card=CARD, chunk=4)


def test_no_jobs_are_one_sentence() -> None:
    with pytest.raises(InterpError, match="'s' has no jobs; give at least one row"):
        run_study("s", jobs(0), Worker(), card=CARD)


def test_the_code_hash_knows_every_module_that_decides_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(records.__file__).parent
    shutil.copytree(package, tmp_path / "interp_utils", ignore=shutil.ignore_patterns("__pycache__"))
    before = records.code_hash()
    monkeypatch.setattr(records, "ROOT", tmp_path)
    hashes = {before} if records.code_hash() == before else set()
    decide = (
        "greedy candidates quintuplet cell_measures patchscopes corpora facts shared_prefix models".split()
    )
    decide += ["harvest", "artifacts", "dictionaries/steps"]
    for name in decide:
        with (tmp_path / "interp_utils" / f"{name}.py").open("a") as file:
            file.write("#")
        hashes.add(records.code_hash())
    assert len(hashes) == 1 + len(decide)


def test_two_studies_of_one_name_do_not_mix() -> None:
    run_study("a/b", jobs(3), Worker(), card=CARD)
    run_study("a-b", jobs(4), Worker(), card=CARD)
    assert [len(record.table) for name in ("a/b", "a-b") if (record := load_record(name))] == [3, 4]


@pytest.mark.parametrize("chunk", [1, 5, 128])
def test_texts_survive_as_they_are(chunk: int) -> None:
    given = pd.DataFrame({"name": TEXTS[::-1], "layer": range(len(TEXTS))})
    record = run_study("s", given, lambda some: [TEXTS[i] for i in some["layer"]], card=CARD, chunk=chunk)
    again = load_record("s")
    assert again is not None
    for table in (record.table, again.table):
        assert table["text"].tolist() == TEXTS and table["name"].tolist() == TEXTS[::-1]


def test_numbers_survive_exactly() -> None:
    values = [0.1, 1e-17, 1 / 3, 88_000.0625]
    record = run_study("s", jobs(4), lambda some: [values[i] for i in some["layer"]], card=CARD, chunk=3)
    assert record.table["text"].tolist() == values


def test_the_card_keeps_what_decided_the_values(folders: Path) -> None:
    record = run_study("s", jobs(), Worker(), card=CARD)
    card = json.loads((folders / "data" / "records" / "s" / "card.json").read_text())
    assert card == record.card and {**card, **CARD} == card
    assert card["rows"] == 10 and card["seconds"] == 0
    assert card["table_sha256"] == records.file_hash(folders / "data" / "records" / "s" / "table.csv.gz")


def test_the_same_study_gives_the_same_bytes(folders: Path) -> None:
    path = folders / "data" / "records" / "s" / "table.csv.gz"
    run_study("s", jobs(), Worker(), card=CARD)
    first = path.read_bytes()
    run_study("s", jobs(), Worker(), card={**CARD, "seed": 1})
    assert path.read_bytes() == first


def test_study_card_names_model_versions_and_hashes(tmp_path: Path) -> None:
    (tmp_path / "entities.csv").write_text("name\n")
    model: Any = SimpleNamespace(info=SimpleNamespace(name="tiny", weights="local:00"))
    make: Any = getattr(study_card, "__wrapped__", study_card)
    card = make(model, command="c", seed=3, data=[tmp_path / "entities.csv"])
    assert (card["model"], card["weights"], card["seed"], card["command"]) == ("tiny", "local:00", 3, "c")
    assert card["versions"]["torch"] == torch.__version__.split("+")[0]
    assert card["data_sha256"] == {"entities.csv": records.file_hash(tmp_path / "entities.csv")}
    assert card["code_sha256"] == records.code_hash() and len(card["code_sha256"]) == 64
    json.dumps(card)


@pytest.mark.parametrize("harm", [lambda p: p.write_bytes(p.read_bytes() + b" "), lambda p: p.unlink()])
def test_a_damaged_table_is_refused(folders: Path, harm: Any) -> None:
    run_study("s", jobs(), Worker(), card=CARD)
    harm(folders / "data" / "records" / "s" / "table.csv.gz")
    with pytest.raises(InterpError, match="table.csv.gz is missing or damaged; restore it from git or run"):
        load_record("s")


def test_a_study_that_was_never_made_has_no_record() -> None:
    assert load_record("none") is None


@pytest.mark.parametrize(
    ("variable", "what"), [("INTERP_BUILD", "build folder"), ("INTERP_DATA", "data folder")]
)
def test_a_folder_that_cannot_be_written_is_named(
    folders: Path, monkeypatch: pytest.MonkeyPatch, variable: str, what: str
) -> None:
    (folders / "file").write_text("")
    monkeypatch.setenv(variable, str(folders / "file" / "x"))
    with pytest.raises(InterpError, match=f"The {what} .* cannot be written .*set {variable}"):
        run_study("s", jobs(), Worker(), card=CARD)


def test_a_sample_follows_its_seed() -> None:
    record = Record(jobs(100), {})
    one, same, other = record.sample(10, 1), record.sample(10, 1), record.sample(10, 2)
    pd.testing.assert_frame_equal(one, same)
    assert one.index.is_monotonic_increasing and one.index.is_unique and len(one) == 10
    assert one.index.tolist() != other.index.tolist()


def test_read_table_reads_what_others_wrote(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('a,b\nNA,1\n"",2\n')
    table = read_table(tmp_path / "t.csv")
    assert table["a"].tolist() == ["NA", ""] and table["b"].tolist() == [1, 2]


def generation(model: Any, texts: list[str], gaps: list[list[float]]) -> Generation:
    ids = [model.tokenizer(text).input_ids for text in texts]
    width = max(map(len, ids))
    pad = model.tokenizer.pad_token_id
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in ids])
    return Generation(tokens, texts, torch.tensor(gaps))


OLD = ["the cat sat", "the dog sat"]


def test_equal_texts_are_accepted(llama: Any) -> None:
    assert verify_texts(OLD, generation(llama, OLD, [[1e-9] * 3] * 2), llama) == 0


@pytest.mark.parametrize("gaps", [[1.0, 0.0009, 1.0], [0.0001, 1.0, 1.0]])
def test_a_difference_from_a_near_tie_on_is_counted(llama: Any, gaps: list[float]) -> None:
    fresh = generation(llama, ["the cat sat", "the cat mat"], [[1.0] * 3, gaps])
    assert verify_texts(OLD, fresh, llama) == 1


@pytest.mark.parametrize("gaps", [[1.0, 0.0011, 1.0], [1.0, 1.0, 0.0001], [float("nan")] * 3])
def test_any_other_difference_is_refused(llama: Any, gaps: list[float]) -> None:
    fresh = generation(llama, ["the cat sat", "the cat mat"], [[1.0] * 3, gaps])
    with pytest.raises(
        InterpError, match="Row 1 of the sample reads 'the cat mat' but 'the dog sat' was recorded"
    ):
        verify_texts(OLD, fresh, llama)


def test_a_text_that_ends_earlier_is_a_difference(llama: Any) -> None:
    fresh = generation(llama, ["the cat sat", "the dog"], [[1.0] * 3, [1.0, 1.0, 1.0]])
    with pytest.raises(InterpError, match="Row 1"):
        verify_texts(OLD, fresh, llama)
    tie = generation(llama, ["the cat sat", "the dog"], [[1.0] * 3, [1.0, 1.0, 0.0]])
    assert verify_texts(OLD, tie, llama) == 1
