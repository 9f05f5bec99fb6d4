"""A run history as curves."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pytorch_accelerated._console.screen import show_figures
from pytorch_accelerated._history.records import Record
from pytorch_accelerated._metrics import one_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STAGES = ("train", "intermediate", "ema", "model", "eval", "evaluation")
_ENDINGS = ("epoch", "step")
_WIDTH, _HEIGHT = 5.0, 3.5  # inches

Axis = Literal["update", "epoch", "samples", "time"]


def plot_records(records: Iterable[Record], names: Sequence[str] | None, x: Axis) -> Figure:
    """Draw the series of records, those of the same quantity into one diagram; see `RunHistory.plot`.

    Raises:
        ModuleNotFoundError: ``matplotlib`` is not installed.
        ValueError: There is nothing to draw.
    """
    curves = _curves(records, names, x)
    if not curves:
        wanted = "any metric" if names is None else f"{list(names)}"
        raise ValueError(f"Nothing was recorded of {wanted} that can be drawn over `{x}`. Expected numbers.")
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in curves:
        groups[quantity_of(name)].append(name)
    figure = new_figure(_WIDTH * len(groups), _HEIGHT)
    (diagrams,) = figure.subplots(1, len(groups), squeeze=False)
    for diagram, (quantity, members) in zip(diagrams, groups.items(), strict=True):
        for name in members:
            diagram.plot(*curves[name], label=name, **_style(name, len(curves[name][0])))
        diagram.set(xlabel=x, ylabel=quantity.replace("_", " "))
        diagram.legend()
    return figure


def quantity_of(name: str) -> str:
    """Return what a metric measures, without the pass that it belongs to.

    Example:
        >>> quantity_of("train_loss_epoch"), quantity_of("test_eval_top_5"), quantity_of("learning_rate_0")
        ('loss', 'top_5', 'learning_rate')
    """
    words = name.split("_")
    last_stage = max((place for place, word in enumerate(words) if word in _STAGES), default=-1)
    words = words[last_stage + 1 :] or words
    if last_stage < 0 and words[-1].isdigit():  # one of several groups of the optimizer
        words = words[:-1]
    return "_".join(words[:-1] if len(words) > 1 and words[-1] in _ENDINGS else words)


def _curves(
    records: Iterable[Record], names: Sequence[str] | None, x: Axis
) -> dict[str, tuple[list[float], list[float]]]:
    curves: dict[str, tuple[list[float], list[float]]] = {}
    start: float | None = None
    for record in records:
        place, value = getattr(record.moment, x), one_number(record.value)
        if place is None or value is None or (names is not None and record.name not in names):
            continue
        start = place if start is None and x == "time" else start
        places, values = curves.setdefault(record.name, ([], []))
        places.append(place - (start or 0.0))
        values.append(float(value))
    if names is None:
        curves.pop("intermediate_update", None)  # is the place of other values
    return curves


def _style(name: str, num_points: int) -> dict[str, Any]:
    if name.endswith("_step"):
        return {"alpha": 0.4, "linewidth": 1.0}
    return {"marker": "o", "markersize": 3.0} if num_points < 50 else {}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, which no state of matplotlib refers to, and which a notebook shows.

    Args:
        width: In inches.
        height: In inches.

    Raises:
        ModuleNotFoundError: ``matplotlib`` is not installed.
    """
    figure_class = _figure_class()
    show_figures(figure_class)
    figure: Figure = figure_class(figsize=(width, height), layout="constrained")
    return figure


def _figure_class() -> Any:
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`plot` needs the package `matplotlib`. Install it with `pip install 'pytorch-accelerated[plots]'`.",
            name=error.name,
        ) from error
