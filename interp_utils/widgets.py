"""Controls for one function, which displays its own result; the default one stands still in any page."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interp_utils.errors import InterpError, nearest

if TYPE_CHECKING:
    import ipywidgets

VIEW = "application/vnd.jupyter.widget-view+json"
NOTE = "In a running notebook, controls for these settings stand here."
Values = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """One of some options: labels or pairs (label, value), or a function of the other controls' values.

    `start` is the place in the list of the option chosen first, and again when the list changes.
    """

    options: Sequence[Any] | Callable[[Values], Sequence[Any]]
    start: int = 0

    def pairs(self, values: Values) -> list[tuple[str, Any]]:
        """The options as (label, value)."""
        made = self.options(values) if callable(self.options) else self.options
        if not made:
            raise InterpError("A choice has no options; give at least one.")
        return [option if isinstance(option, tuple) else (str(option), option) for option in made]


@dataclass(frozen=True)
class Slider:
    """A number from `low` to `high`; moving it runs the function at once, on release of the mouse."""

    low: float
    high: float
    step: float
    start: float

    def __post_init__(self) -> None:
        if not self.low <= self.start <= self.high or not 0 < self.step <= self.high - self.low:
            raise InterpError(
                f"A slider from {self.low} to {self.high} in steps of {self.step} cannot start at {self.start}; "
                "give low <= start <= high and a step that fits between them."
            )


Controls = Mapping[str, str | Choice | Slider]


def explorer(function: Callable[..., None], controls: Controls) -> None:
    """Show what `function` displays for the default values, and below it the controls.

    Args:
        function: takes the controls' values by name and displays its result.
        controls: parameter name -> its default text, a `Choice` or a `Slider`; in the order shown, names are
            labels.

    Raises:
        InterpError: a control's name is no parameter, or a choice has no options.
    """
    from IPython.display import display

    box = panel(function, controls)
    function(**defaults(controls))
    view = {"model_id": box.model_id, "version_major": 2, "version_minor": 0}
    display({VIEW: view, "text/html": f"<p><em>{NOTE}</em></p>", "text/plain": NOTE}, raw=True)


def defaults(controls: Controls) -> Values:
    """The value that each control starts with; a list of options sees those of the controls before it."""
    values: Values = {}
    for name, control in controls.items():
        if isinstance(control, Choice):
            values[name] = control.pairs(values)[control.start][1]
        else:
            values[name] = control.start if isinstance(control, Slider) else control
    return values


def panel(function: Callable[..., None], controls: Controls) -> ipywidgets.VBox:
    """The controls, a button and the place of the result, not yet displayed; see `explorer`."""
    import ipywidgets

    known = inspect.signature(function).parameters
    for name in controls:
        if name not in known:
            raise InterpError(f"The function has no parameter {name!r}.{nearest(name, known)}")
    start = defaults(controls)
    parts = {name: _widget(name, control, start) for name, control in controls.items()}
    result, run = ipywidgets.Output(), ipywidgets.Button(description="Run")

    def values() -> Values:
        return {name: part.value for name, part in parts.items()}

    def show(_: Any) -> None:
        result.clear_output(wait=True)
        with result:
            try:
                function(**values())
            except InterpError as error:
                print(error)

    def renew(_: Any) -> None:
        """Make the lists again that depend on other controls; a half-typed text may allow none."""
        for name, control in controls.items():
            if isinstance(control, Choice) and callable(control.options):
                with contextlib.suppress(InterpError):
                    if (pairs := control.pairs(values())) != list(parts[name].options):
                        parts[name].options, parts[name].index = pairs, control.start % len(pairs)

    for name, part in parts.items():
        part.observe(renew, "value")
        if isinstance(controls[name], Slider):
            part.observe(show, "value")
    run.on_click(show)
    return ipywidgets.VBox([*parts.values(), run, result])


def _widget(name: str, control: str | Choice | Slider, values: Values) -> Any:
    import ipywidgets

    look: Values = {"description": name.replace("_", " "), "layout": {"width": "44em"}}
    look |= {"style": {"description_width": "9em"}, "value": values[name]}
    if isinstance(control, Choice):
        return ipywidgets.Dropdown(options=control.pairs(values), **look)
    if isinstance(control, Slider):
        limits = {"min": control.low, "max": control.high, "step": control.step}
        return ipywidgets.FloatSlider(continuous_update=False, **limits, **look)
    return ipywidgets.Textarea(rows=control.count("\n") + 1, **look)
