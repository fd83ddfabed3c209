"""The ledger, the verdicts, the bootstrap, and claims read back from executed notebooks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest

from interp_utils import claims
from interp_utils.claims import (
    MIME,
    claim,
    cluster_bootstrap,
    contradicts,
    load_ledger,
    read_claims,
    record_verdicts,
    verdict,
)
from interp_utils.errors import InterpError

RULE = {"reproduced": "> 0.02", "partly": "> 0", "not_reproduced": "<= 0"}
LEDGER = """
# a comment that stays
[early-layers]
notebook = "09_entities"
source = "A paper, section 4"
claim = "Early layers matter"
published = ".37 at layer 2"
quantity = "difference of scores"
control = "shuffled <names>"
predicted = "reproduced"
rule = { reproduced = "> 0.02", partly = "> 0", not_reproduced = "<= 0" }
"""
MODEL = SimpleNamespace(info=SimpleNamespace(name="tiny", weights="packaged:00ff"))
GOOD: dict[str, Any] = {"id": "early-layers", "value": 0.1, "model": MODEL}
THREE_ROWS: dict[str, Any] = {"values": [1.0, 2.0, 3.0], "clusters": [0, 1, 2]}
RECORDED = {"value": 0.1, "ci": [0.05, 0.15], "verdict": "reproduced"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INTERP_DATA", str(tmp_path))
    (tmp_path / "claims.toml").write_text(LEDGER)
    return tmp_path


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    bundles: list[dict[str, Any]] = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: bundles.append(data))
    return bundles


def executed(*bundles: dict[str, Any]) -> nbformat.NotebookNode:
    cell = nbformat.v4.new_code_cell("claim(...)")
    cell.outputs = [nbformat.v4.new_output("stream", text="text")]
    cell.outputs += [nbformat.v4.new_output("display_data", data=bundle) for bundle in bundles]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), cell])


@pytest.mark.parametrize(
    ("ci", "expected"),
    [
        ((0.03, 0.05), "reproduced"),
        ((0.02, 0.05), "partly"),
        ((0.0, 0.05), "undecided"),
        ((-0.1, 0.0), "not reproduced"),
        ((-0.1, 0.1), "undecided"),
    ],
)
def test_whole_interval_must_satisfy_the_rule(ci: tuple[float, float], expected: str) -> None:
    assert verdict(RULE, sum(ci) / 2, ci) == expected


def test_operators_and_ranges() -> None:
    inside = {"reproduced": "0.4 .. 0.6", "partly": ">= -1e-1", "not_reproduced": "<-.1"}
    assert verdict(inside, 0.5, (0.4, 0.6)) == "reproduced"
    assert verdict(inside, 0.5, (0.4, 0.61)) == "partly"
    assert verdict(inside, -0.1) == "partly"
    assert verdict(inside, -0.2) == "not reproduced"
    assert verdict({"reproduced": "-2..-1", "not_reproduced": ">= 0"}, -1.5) == "reproduced"


@pytest.mark.parametrize("condition", ["", "0.3", "=> 1", "> x", "> nan", "0.6 .. 0.4", "> 1 or < 0"])
def test_malformed_condition_names_itself(condition: str) -> None:
    with pytest.raises(InterpError, match="is no condition"):
        verdict({"reproduced": condition}, 1.0)


def test_contradiction_needs_disjoint_intervals() -> None:
    assert not contradicts(RECORDED, (0.15, 0.2))
    assert contradicts(RECORDED, (0.1501, 0.2))
    assert contradicts(RECORDED, (-0.2, 0.0499))
    exact = {"ci": [100.0, 100.0]}
    assert not contradicts(exact, (100.05, 100.05))
    assert contradicts(exact, (100.2, 100.2))
    assert contradicts(exact, (100.05, 100.06))
    assert not contradicts({"ci": [0.0, 0.0]}, (0.0, 0.0))


def test_a_value_from_the_recorded_table_does_not_pass_for_live(
    folder: Path, shown: list[dict[str, Any]]
) -> None:
    row = claim("early-layers", 0.1, model=MODEL, ci=(0.05, 0.15), from_record=True)
    assert row["from_record"] and "Here, live" not in shown[0]["text/html"]
    assert "Here, from the recorded table" in shown[0]["text/html"]
    claim("early-layers", 0.1, model=MODEL, ci=(0.05, 0.15))
    assert "Here, live" in shown[1]["text/html"]


def test_claim_returns_and_displays_its_row(folder: Path, shown: list[dict[str, Any]]) -> None:
    row = claim("early-layers", np.float32(1 / 3), model=MODEL, ci=(0.3, 0.4), control=-0.0, n=np.int64(80))
    assert row["value"] == 0.333333 and row["ci"] == [0.3, 0.4] and row["n"] == 80
    assert math.copysign(1, row["control"]) == 1
    assert (row["model"], row["weights"]) == ("tiny", "packaged:00ff")
    assert (row["verdict"], row["recorded"], row["contradicted"]) == ("reproduced", None, False)
    assert shown[0][MIME] == row
    assert shown[0]["text/plain"] == "early-layers on tiny: 0.3333 [0.3, 0.4], control 0: reproduced"
    assert "shuffled &lt;names&gt;" in shown[0]["text/html"] and "0.3333 [0.3, 0.4]" in shown[0]["text/html"]
    assert "<names>" not in shown[0]["text/html"]


def test_exact_value_is_its_own_interval(folder: Path, shown: list[dict[str, Any]]) -> None:
    row = claim("early-layers", 0.01, model=MODEL)
    assert row["ci"] == [0.01, 0.01] and row["verdict"] == "partly"


def test_claim_is_compared_with_its_own_record_only(folder: Path, shown: list[dict[str, Any]]) -> None:
    full = claim("early-layers", 0.1, model=MODEL, ci=(0.05, 0.15), live=False)
    record_verdicts([full])
    agreeing = claim("early-layers", 0.2, model=MODEL, ci=(0.1, 0.3))
    assert agreeing["recorded"] == RECORDED and not agreeing["contradicted"]
    against = claim("early-layers", -0.2, model=MODEL, ci=(-0.3, -0.1))
    assert against["contradicted"] and "contradicts the record" in shown[-1]["text/html"]
    assert not claim("early-layers", -0.2, model=MODEL, ci=(-0.3, -0.1), live=False)["contradicted"]
    other = SimpleNamespace(info=SimpleNamespace(name="tiny", weights="packaged:11ee"))
    assert claim("early-layers", -0.2, model=other)["recorded"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"id": "early-layer"}, "Did you mean 'early-layers'"),
        ({"value": float("nan")}, "not finite"),
        ({"ci": (0.0, float("inf"))}, "not finite"),
        ({"ci": (0.2, 0.1)}, "must lie in its interval"),
        ({"ci": (0.3, 0.4)}, "must lie in its interval"),
        ({"ci": (0.3,)}, "expected a number and an interval"),
        ({"value": "much"}, "expected a number"),
        ({"control": float("inf")}, "control"),
        ({"model": "tiny"}, "what load_model returned"),
    ],
)
def test_bad_claims_say_what_is_wrong(folder: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InterpError, match=words):
        claim(**(GOOD | arguments))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('control = "shuffled <names>"', "", "'early-layers': the field 'control'"),
        ('claim = "Early layers matter"', "claim = 3", "the field 'claim'"),
        ('published = ".37 at layer 2"', 'published = " "', "the field 'published'"),
        ('predicted = "reproduced"', 'predicted = "surely"', "'predicted' must be one of"),
        ('predicted = "reproduced"', 'predicted = "partly"\namended = ""', "the field 'amended'"),
        ("quantity", "quantities", "unknown field 'quantities'. Did you mean 'quantity'"),
        (', not_reproduced = "<= 0"', "", "'rule' needs reproduced and not_reproduced"),
        ("partly = ", "party = ", "'rule' needs"),
        ('partly = "> 0"', 'partly = "about 0"', "'early-layers': the field 'rule', partly: 'about 0'"),
        ('partly = "> 0"', "partly = 0", "the field 'rule', partly: 0 is no condition"),
        ("[early-layers]", "early-layers = 1\n[x]", "'early-layers' must be a table"),
        ("[early-layers]", "[early-layers", "not valid TOML"),
    ],
)
def test_ledger_is_validated(folder: Path, old: str, new: str, words: str) -> None:
    assert old in LEDGER
    (folder / "claims.toml").write_text(LEDGER.replace(old, new))
    with pytest.raises(InterpError, match=words):
        load_ledger()


def test_missing_ledger_names_the_variable(tmp_path: Path) -> None:
    with pytest.raises(InterpError, match="INTERP_DATA"):
        load_ledger(tmp_path / "claims.toml")


def full_row(**changes: Any) -> dict[str, Any]:
    row = {"id": "early-layers", "model": "tiny", "weights": "packaged:00ff", "control": None, "n": 80}
    return row | {"value": 0.1, "ci": [0.05, 0.15], "verdict": "reproduced"} | changes


def test_record_is_sorted_merged_and_leaves_the_rules_alone(folder: Path) -> None:
    record_verdicts([full_row(model='odd "name"'), full_row(control=1e-7)])
    first = (folder / "recorded.toml").read_bytes()
    record_verdicts([full_row(control=1e-7)])
    assert (folder / "recorded.toml").read_bytes() == first
    record_verdicts([full_row(value=0.01, ci=[0.005, 0.015], verdict="partly")])
    recorded = load_ledger()["early-layers"].recorded
    assert list(recorded) == ['odd "name"', "tiny"]
    assert recorded["tiny"]["packaged:00ff"]["verdict"] == "partly"
    assert recorded['odd "name"']["packaged:00ff"] == RECORDED | {"n": 80}
    assert (folder / "claims.toml").read_text() == LEDGER
    assert sorted(path.name for path in folder.iterdir()) == ["claims.toml", "recorded.toml"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([full_row(), full_row(value=0.11)], "disagree"),
        ([full_row(verdict="partly")], "does not follow from the rule"),
        ([full_row(id="early-layer")], "Did you mean 'early-layers'"),
        ([full_row(ci=None)], "expected a number and an interval"),
        ([full_row(value=0.5)], "must lie in its interval"),
    ],
)
def test_bad_rows_never_reach_the_record(folder: Path, rows: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(InterpError, match=words):
        record_verdicts(rows)
    assert not (folder / "recorded.toml").exists()


def test_amended_rule_makes_an_old_verdict_an_error(folder: Path) -> None:
    record_verdicts([full_row()])
    (folder / "claims.toml").write_text(LEDGER.replace("> 0.02", "> 0.2"))
    with pytest.raises(InterpError, match="early-layers.*does not follow from the rule"):
        load_ledger()


def test_broken_record_names_the_claim(folder: Path) -> None:
    (folder / "recorded.toml").write_text("[early-layers]\ntiny = 3\n")
    with pytest.raises(InterpError, match="recorded.toml, claim 'early-layers'"):
        load_ledger()


def test_command_records_only_full_studies(
    folder: Path, shown: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    claim("early-layers", 0.1, model=MODEL, ci=(0.05, 0.15), live=False, n=900)
    claim("early-layers", 0.3, model=MODEL, ci=(0.2, 0.4), n=9)
    build = folder / "build" / "notebooks"
    build.mkdir(parents=True)
    nbformat.write(executed(*shown), build / "09_entities.ipynb")
    claims.main(["record", str(folder / "build")])
    assert capsys.readouterr().out.startswith("recorded early-layers on tiny: 0.1 [0.05, 0.15]")
    assert load_ledger()["early-layers"].recorded["tiny"]["packaged:00ff"] == RECORDED | {"n": 900}


@pytest.mark.parametrize(("content", "words"), [(None, "make study"), ("{", "not a readable notebook")])
def test_command_fails_in_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], content: str | None, words: str
) -> None:
    if content:
        (folder / "09_entities.ipynb").write_text(content)
    with pytest.raises(SystemExit) as stop:
        claims.main(["record", str(folder)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_rows_survive_a_real_kernel(folder: Path) -> None:
    from nbclient import NotebookClient

    source = (
        "from types import SimpleNamespace\nfrom interp_utils.claims import claim\n"
        "model = SimpleNamespace(info=SimpleNamespace(name='tiny', weights='w'))\n"
        "row = claim('early-layers', 0.1, model=model, ci=(0.05, 0.15))\n"
        "try:\n    claim('late-layers', 0.1, model=model)\nexcept ValueError as error:\n    print(error)"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, kernel_name="python3").execute()
    (row,) = read_claims(nbformat.reads(nbformat.writes(notebook), as_version=4))
    assert type(row) is dict and row["verdict"] == "reproduced"
    assert json.loads(json.dumps(row)) == row
    assert "no claim 'late-layers'" in notebook.cells[0].outputs[1].text


def slow_bootstrap(values: Any, clusters: Any, statistic: Any, n: int, seed: int) -> tuple[float, float]:
    """The definition, one row at a time."""
    names = list(dict.fromkeys(clusters))
    rng, results = np.random.default_rng(seed), []
    for _ in range(n):
        sample = []
        for drawn in rng.integers(len(names), size=len(names)):
            sample += [
                value for value, cluster in zip(values, clusters, strict=True) if cluster == names[drawn]
            ]
        results.append(statistic(sample))
    return tuple(float(np.quantile(results, q)) for q in (0.025, 0.975))  # type: ignore[return-value]


def test_bootstrap_equals_the_slow_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=60)
    clusters = [f"entity {i * i % 13}" for i in range(60)]
    mean = slow_bootstrap(values, clusters, np.mean, 200, 3)
    assert cluster_bootstrap(values, clusters, n=200, seed=3) == pytest.approx(mean, abs=1e-12)
    monkeypatch.setattr("interp_utils.intervals.BLOCK", 50)  # several blocks, the last one shorter
    assert cluster_bootstrap(list(values), clusters, n=200, seed=3) == pytest.approx(mean, abs=1e-12)
    median = slow_bootstrap(values, clusters, np.median, 200, 3)
    assert cluster_bootstrap(values, clusters, np.median, n=200, seed=3) == pytest.approx(median, abs=1e-12)
    frame = pd.DataFrame({"score": values, "entity": clusters}, index=range(100, 160))
    by_frame = cluster_bootstrap(frame, frame["entity"], lambda rows: rows["score"].mean(), n=200, seed=3)
    assert by_frame == pytest.approx(mean, abs=1e-12)


def test_bootstrap_covers_the_truth_where_single_rows_do_not() -> None:
    rng, entities, rows = np.random.default_rng(0), np.repeat(np.arange(40), 10), np.arange(400)
    hits = naive = 0
    for seed in range(200):
        scores = rng.normal(size=40)[entities] + rng.normal(size=400)
        low, high = cluster_bootstrap(scores, entities, n=300, seed=seed)
        hits += low <= 0 <= high
        low, high = cluster_bootstrap(scores, rows, n=300, seed=seed)
        naive += low <= 0 <= high
    assert 0.89 < hits / 200 < 0.99
    assert naive / 200 < 0.75


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"clusters": [0, 1]}, "3 rows and 2 labels"),
        ({"clusters": [0, 0, 0]}, "at least two clusters"),
        ({"clusters": [0, 1, float("nan")]}, "no missing label"),
        ({"values": [], "clusters": []}, "at least two clusters"),
        ({"values": [1, float("nan"), 2]}, "not finite in"),
        ({"level": 95}, "level between 0 and 1"),
        ({"n": 0}, "n >= 1"),
    ],
)
def test_bad_bootstraps_say_what_is_wrong(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InterpError, match=words):
        cluster_bootstrap(**(THREE_ROWS | arguments))
