"""What all pictures have in common: figures with panels, colors, scales."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from pytorch_accelerated._console.screen import show_figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GRAY = "#0072B2", "#D55E00", "#6F6F6F"
COLORS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""The palette of Okabe and Ito, 2008, without the yellow, which is too light for lines on white."""

STYLES = ("-", "--", "-.", ":")
_PANEL_SIZE = (5.5, 3.8)  # inches
_MAX_COLUMNS = 3


def check_has_matplotlib() -> None:
    """Raise unless matplotlib is installed.

    Raises:
        ModuleNotFoundError: It is not.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Plots need the package `matplotlib`. Install it with `pip install 'pytorch-accelerated[plots]'`.",
            name=error.name,
        ) from error


def figure_with_panels(
    num: int, title: str | None, size: tuple[float, float] | None = None
) -> tuple[Figure, list[Axes]]:
    """Return a new figure, which no state of matplotlib refers to, and its panels."""
    check_has_matplotlib()
    from matplotlib.figure import Figure

    show_figures(Figure)
    num_columns = min(num, _MAX_COLUMNS)
    num_rows = math.ceil(num / num_columns)
    width, height = size or (_PANEL_SIZE[0] * num_columns, _PANEL_SIZE[1] * num_rows)
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for unused in panels[num:]:
        unused.remove()
    for axes in panels[:num]:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if title is not None:
        figure.suptitle(title, fontsize="x-large")
    return figure, panels[:num]


def scale_axes(axes: Axes, *, is_log: bool) -> None:
    """Choose whole numbers for the horizontal axis, and a logarithmic vertical one if there are positive values."""
    from matplotlib.ticker import MaxNLocator

    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    if is_log and (values[np.isfinite(values)] > 0).any():
        axes.set_yscale("log", nonpositive="mask")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def readable(name: str) -> str:
    """Return the name of a metric as a title.

    Example:
        >>> readable("top_5_accuracy")
        'Top 5 accuracy'
    """
    text = name.replace("_", " ").strip()
    return text[:1].upper() + text[1:]
