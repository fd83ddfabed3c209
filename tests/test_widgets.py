"""Controls without a browser: values are set and the button is clicked from here."""

from __future__ import annotations

from typing import Any

import pytest

from interp_utils.errors import InterpError
from interp_utils.widgets import NOTE, VIEW, Choice, Slider, defaults, explorer, panel

CALLS: list[dict[str, Any]] = []


def record(text: str, word: str, layer: int = 0) -> None:
    if not text:
        raise InterpError("The text is empty.")
    CALLS.append({"text": text, "word": word, "layer": layer})
    print(f"result for {word}")


def words(values: dict[str, Any]) -> list[str]:
    if not values["text"]:
        raise InterpError("The text is empty.")
    return values["text"].split()


CONTROLS = {"text": "one two\nthree", "word": Choice(words, start=-1), "layer": Choice(range(4), start=2)}


@pytest.fixture(autouse=True)
def fresh() -> None:
    CALLS.clear()


def parts() -> list[Any]:
    return list(panel(record, CONTROLS).children)


def test_defaults_see_the_controls_before() -> None:
    assert defaults(CONTROLS) == {"text": "one two\nthree", "word": "three", "layer": 2}
    pairs = Choice([("the first", 10), ("the second", 20)], start=1)
    assert defaults({"layer": pairs}) == {"layer": 20}


def test_the_default_result_stands_alone_and_the_controls_have_a_fallback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    explorer(record, CONTROLS)
    assert "result for three" in capsys.readouterr().out
    (bundle,) = shown
    assert bundle[VIEW]["model_id"]
    assert NOTE in bundle["text/html"] and NOTE == bundle["text/plain"]
    assert CALLS == [{"text": "one two\nthree", "word": "three", "layer": 2}]


def test_the_button_runs_with_what_was_chosen() -> None:
    _, word, layer, run, _ = parts()
    word.value, layer.value = "two", 0
    assert not CALLS
    run.click()
    assert CALLS == [{"text": "one two\nthree", "word": "two", "layer": 0}]


def test_a_list_that_depends_on_a_text_follows_it() -> None:
    text, word, _, run, _ = parts()
    text.value = "four five"
    assert [label for label, _ in word.options] == ["four", "five"] and word.value == "five"
    word.value = "four"
    text.value = "four five"  # nothing changed: the choice stays
    assert word.value == "four"
    run.click()
    assert CALLS[-1]["word"] == "four"


def test_an_error_is_one_sentence_and_leaves_the_controls_usable(capsys: pytest.CaptureFixture[str]) -> None:
    text, word, _, run, _ = parts()
    text.value = ""  # half typed: the old list stays
    assert word.value == "three"
    run.click()
    assert "The text is empty." in capsys.readouterr().out and not CALLS
    text.value = "six"
    run.click()
    assert CALLS[-1]["word"] == "six"


def test_a_slider_runs_when_it_is_moved() -> None:
    slider = {**CONTROLS, "layer": Slider(-2, 3, 0.5, 1)}
    assert defaults(slider)["layer"] == 1
    _, word, moved, *_ = panel(record, slider).children
    assert (moved.min, moved.max, moved.step, moved.value, moved.continuous_update) == (-2, 3, 0.5, 1, False)
    word.value = "two"
    assert not CALLS
    moved.value = 2.5
    assert CALLS == [{"text": "one two\nthree", "word": "two", "layer": 2.5}]


@pytest.mark.parametrize("numbers", [(0, 1, 0.1, 2), (1, 0, 0.1, 0.5), (0, 1, 0, 0.5), (0, 1, 2, 0.5)])
def test_a_slider_that_cannot_be(numbers: tuple[float, float, float, float]) -> None:
    with pytest.raises(InterpError, match="slider"):
        Slider(*numbers)


@pytest.mark.parametrize(
    ("controls", "said"),
    [({"layr": Choice(range(3))}, "Did you mean 'layer'"), ({"layer": Choice([])}, "no options")],
)
def test_bad_controls(controls: dict[str, Any], said: str) -> None:
    with pytest.raises(InterpError, match=said):
        panel(record, controls)
    assert not CALLS


def test_a_panel_without_parameters_of_its_own_has_only_the_button() -> None:
    run, result = panel(lambda: print("ran"), {}).children
    run.click()
    assert type(result).__name__ == "Output"
