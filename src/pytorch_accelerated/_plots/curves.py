"""Draws curves: a single one, those of one metric, or all that a history has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytorch_accelerated._history.curves import Curve, MetricCurves, finite, quantity_of
from pytorch_accelerated._plots.panels import BLUE, COLORS, STYLES, figure_with_panels, readable, scale_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_MARKED = 40  # values of a curve that are marked one by one


def draw_stages(axes: Axes, curves: MetricCurves) -> None:
    """Draw the curves of one metric: that of training and those of evaluations."""
    if curves.steps is not None:
        draw_curve(axes, curves.steps, "training steps", BLUE, "", is_faint=True)
    if curves.train is not None:
        draw_curve(axes, curves.train, "training", BLUE, "o")
    if curves.other is not None:
        draw_curve(axes, curves.other, readable(curves.name), BLUE, "o")
    for index, (name, curve) in enumerate(curves.evaluations.items()):
        label = f"evaluation ({name})" if name else "evaluation"
        draw_curve(axes, curve, label, COLORS[1 + index % (len(COLORS) - 1)], "s", STYLES[index % len(STYLES)])


def draw_curve(
    axes: Axes, curve: Curve, label: str, color: str, marker: str, style: str = "-", *, is_faint: bool = False
) -> None:
    """Draw one curve; the legend counts the values that are not finite.

    Args:
        axes: Where to draw it.
        curve: The curve.
        label: What the legend calls it.
        color: Its color.
        marker: What marks each value, unless there are too many.
        style: The style of its line.
        is_faint: Whether it stays in the background, as noisy values do.
    """
    known = finite(curve)
    num_missing = len(curve.values) - len(known.values)
    if num_missing:
        label += f" ({num_missing} not finite)"
    mark = marker if len(curve.values) <= _MAX_MARKED else ""
    width: dict[str, Any] = {"linewidth": 1.0, "alpha": 0.4} if is_faint else {"linewidth": 1.6}
    axes.plot(*curve, color=color, linestyle=style, marker=mark, markersize=3.5, label=label, **width)


def mark_best(axes: Axes, curves: MetricCurves, greater_is_better: bool | None) -> None:
    """Mark the best value of the first evaluation, if it is known which values are better."""
    if greater_is_better is None or curves.evaluation is None:
        return
    epochs, values = finite(curves.evaluation)
    if not values:
        return
    best = (max if greater_is_better else min)(range(len(values)), key=values.__getitem__)
    axes.plot(
        epochs[best],
        values[best],
        marker="o",
        markersize=11,
        markerfacecolor="none",
        markeredgecolor="black",
        markeredgewidth=1.5,
        linestyle="none",
        label=f"best: {values[best]:.4g} (epoch {epochs[best]:g})",
        zorder=4,
    )


def plot_series(series: Mapping[str, Curve], x: str) -> Figure:
    """Draw the curves of recorded series, those of the same quantity into one panel; see `RunHistory.plot`.

    Args:
        series: The curves, by the names under which they are recorded; at least one.
        x: What the horizontal axis is called.
    """
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in series:
        groups[quantity_of(name)].append(name)
    figure, panels = figure_with_panels(len(groups), None)
    for axes, (quantity, names) in zip(panels, groups.items(), strict=True):
        for index, name in enumerate(names):
            is_of_steps = name.endswith("_step")
            marker, color = "" if is_of_steps else "o", COLORS[index % len(COLORS)]
            draw_curve(axes, series[name], name, color, marker, is_faint=is_of_steps)
        if x != "time":
            scale_axes(axes, is_log=False)
        axes.set(xlabel=x, ylabel=quantity.replace("_", " "))
        axes.legend(framealpha=0.9)
    return figure
