"""Pictures of a run: learning curves, schedules, losses over steps, layer statistics and confusion matrices.

Each function returns a `matplotlib.figure.Figure`, which ``figure.savefig("curves.png")`` writes to a file, and a
notebook shows. Nothing is shown by itself, and no setting of matplotlib is changed. Matplotlib comes with the extra
``plots``: ``pip install 'pytorch-accelerated[plots]'``. The colors can be told apart with any kind of color vision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch

from pytorch_accelerated._arguments.numbers import check_positive_integer
from pytorch_accelerated._history.curves import choose_metrics, group_by_metric
from pytorch_accelerated._history.sources import CurveSource, read_curves
from pytorch_accelerated._measuring.comparison import is_greater_better
from pytorch_accelerated._plots.curves import draw_stages, mark_best
from pytorch_accelerated._plots.panels import (
    BLUE,
    COLORS,
    GRAY,
    STYLES,
    check_has_matplotlib,
    figure_with_panels,
    readable,
    scale_axes,
)
from pytorch_accelerated._scheduling.preview import learning_rates_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch.optim import Optimizer

    from pytorch_accelerated._scheduling.stepping import Interval
    from pytorch_accelerated._types import SchedulerFactory

__all__ = [
    "confusion_matrix",
    "plot_confusion_matrix",
    "plot_layer_statistics",
    "plot_learning_curves",
    "plot_schedule",
    "plot_step_losses",
]

ArrayLike: TypeAlias = Any
"""Numbers in a list, a NumPy array or a tensor. Open: whatever `numpy.asarray` takes."""


_MAX_CLASSES_WITH_NUMBERS = 20
_MAX_TICKS = 25


# --- learning curves ---------------------------------------------------------------------------------------------


def plot_learning_curves(
    source: CurveSource,
    metrics: Sequence[str] | None = None,
    *,
    log_scale: bool | Sequence[str] = False,
    greater_is_better: Mapping[str, bool] | None = None,
    best_epoch: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw each metric over the epochs: training against evaluation, with the best epoch marked.

    Args:
        source: A run history, the path of a CSV or JSONL file that a run has written, rows, or a mapping from metrics
            to their values.
        metrics: The metrics to draw, without their stage, such as ``["loss", "accuracy"]``. ``None`` for all that were
            recorded in training or evaluation.
        log_scale: Whether the vertical axis is logarithmic; or the metrics for which it is. A curve without positive
            values stays linear.
        greater_is_better: For each metric, whether larger values are better. Without an entry it is guessed from the
            name; if the name says nothing, no value is marked as the best.
        best_epoch: The epoch to mark in all panels, such as that of a model that was saved. ``None`` to mark the best
            evaluation of each metric.
        title: The title of the figure.

    Returns:
        A figure with one panel per metric.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        FileNotFoundError: There is no such file.
        ValueError: There are no curves, or none of this name.
        TypeError: The source is of another type.
    """
    chosen = choose_metrics(group_by_metric(read_curves(source)), metrics)
    figure, panels = figure_with_panels(len(chosen), title)
    for axes, curves in zip(panels, chosen, strict=True):
        draw_stages(axes, curves)
        if best_epoch is None:
            is_greater = (greater_is_better or {}).get(curves.name, is_greater_better(curves.name))
            mark_best(axes, curves, is_greater)
        else:
            axes.axvline(best_epoch, color=GRAY, linestyle=":", label=f"best model (epoch {best_epoch})", zorder=1)
        is_log = log_scale if isinstance(log_scale, bool) else curves.name in log_scale
        scale_axes(axes, is_log=is_log)
        axes.set(title=readable(curves.name), xlabel="epoch")
        axes.legend(framealpha=0.9)
    return figure


# --- schedules ---------------------------------------------------------------------------------------------------


def plot_schedule(
    create_scheduler_fn: SchedulerFactory,
    num_updates: int,
    *,
    num_epochs: int = 1,
    optimizer: Optimizer | None = None,
    lr: float = 1.0,
    step_scheduler: Interval = "update",
    log_scale: bool = False,
    title: str | None = None,
) -> Figure:
    """Draw the learning rate that a scheduler sets for each update, before training.

    The scheduler is created for a stand-in with the parameter groups of the optimizer, which is not touched.

    Args:
        create_scheduler_fn: As for `Trainer.train`. Placeholders in it get the numbers below.
        num_updates: Updates in the run.
        num_epochs: Epochs in the run, over which the updates are divided evenly.
        optimizer: The optimizer, for its learning rates and other settings. ``None`` for a single parameter group.
        lr: The learning rate of that parameter group, without ``optimizer``.
        step_scheduler: As for `Trainer.train`: when schedulers are stepped that take neither a metric nor an epoch.
        log_scale: Whether the vertical axis is logarithmic.
        title: The title of the figure.

    Returns:
        A figure with a curve for each parameter group that differs from those before.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: A number is not an integer.
        ValueError: A number is below 1, or the schedule depends on a metric, so that it is not known before training.
    """
    rates = learning_rates_of(create_scheduler_fn, num_updates, num_epochs, optimizer, lr, step_scheduler)
    figure, (axes,) = figure_with_panels(1, title)
    groups = {tuple(rates[:, group]): group for group in reversed(range(rates.shape[1]))}
    for index, (values, group) in enumerate(sorted(groups.items(), key=lambda item: item[1])):
        style: dict[str, Any] = {"color": COLORS[index % len(COLORS)], "linestyle": STYLES[index % len(STYLES)]}
        axes.plot(range(1, num_updates + 1), values, linewidth=1.8, label=f"parameter group {group}", **style)
    scale_axes(axes, is_log=log_scale)
    axes.set(xlabel="update", ylabel="learning rate", title="Learning rate" if title is None else "")
    if len(groups) > 1:
        axes.legend(framealpha=0.9)
    if num_epochs > 1:
        top = axes.secondary_xaxis("top", functions=_proportional(num_updates / num_epochs))
        top.set_xlabel("epochs done")
        axes.set_title("")
    return figure


def _proportional(factor: float) -> tuple[Any, Any]:
    return lambda value: value / factor, lambda value: value * factor


# --- losses over steps -------------------------------------------------------------------------------------------


def plot_step_losses(
    losses: ArrayLike,
    steps: ArrayLike = None,
    *,
    num_bins: int = 60,
    log_scale: bool = False,
    name: str = "loss",
    title: str | None = None,
) -> Figure:
    """Draw the loss of each step, with its median and the band in which most values are: how noisy is it?

    The steps are divided into bins with the same number of values. The band reaches from the 10th to the 90th
    percentile of each bin.

    Args:
        losses: The losses, shape ``(num_steps,)``. Values that are not finite are left out, and counted in the legend.
        steps: The number of each step or update, shape ``(num_steps,)``; ``None`` for 1, 2, ...
        num_bins: The number of bins; fewer if a bin would have less than five values.
        log_scale: Whether the vertical axis is logarithmic.
        name: What the values are.
        title: The title of the figure.

    Returns:
        A figure with one panel.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: ``num_bins`` is not an integer.
        ValueError: There are no finite losses, ``num_bins`` is below 1, or shapes do not fit together.
    """
    check_positive_integer("num_bins", num_bins, "bins")
    values = _as_array("losses", losses, num_dimensions=1).astype(float)
    at = np.arange(1, len(values) + 1) if steps is None else _as_array("steps", steps, num_dimensions=1)
    _check_length("steps", len(at), "losses", len(values))
    is_finite = np.isfinite(values)
    if not is_finite.any():
        raise ValueError(f"None of the {len(values)} `losses` is finite, so there is nothing to draw.")
    kept, kept_at = values[is_finite], at[is_finite]
    num_bins = max(min(num_bins, len(kept) // 5), 1)
    bins = [
        (part, part_at)
        for part, part_at in zip(*(np.array_split(each, num_bins) for each in (kept, kept_at)), strict=True)
    ]
    low, middle, high = np.array([np.quantile(part, [0.1, 0.5, 0.9]) for part, _ in bins]).T
    centers = [part_at.mean() for _, part_at in bins]
    figure, (axes,) = figure_with_panels(1, title)
    num_missing = len(values) - len(kept)
    missing = f" ({num_missing} not finite)" if num_missing else ""
    axes.plot(kept_at, kept, ".", color=GRAY, markersize=2, alpha=0.25, label=f"each step{missing}", rasterized=True)
    band: dict[str, Any] = {"color": BLUE, "alpha": 0.35, "linewidth": 0, "zorder": 2.5}
    axes.fill_between(centers, low, high, label="10th to 90th percentile", **band)
    axes.plot(centers, middle, color=BLUE, linewidth=1.8, label="median", zorder=3)
    scale_axes(axes, is_log=log_scale)
    axes.set(
        xlabel="step" if steps is None else "update", ylabel=name, title="Loss over steps" if title is None else ""
    )
    axes.legend(framealpha=0.9, markerscale=4)
    return figure


# --- layer statistics --------------------------------------------------------------------------------------------


def plot_layer_statistics(
    values: ArrayLike,
    layer_names: Sequence[str] | None = None,
    steps: ArrayLike = None,
    *,
    statistic: str = "",
    log_scale: bool = False,
    title: str | None = None,
) -> Figure:
    """Draw a statistic of each layer over the course of training, such as the norm of its gradient, as a heat map.

    Positive values go from dark blue to yellow. If there are negative ones, 0 is white. Values that are not finite, or
    not positive on a logarithmic scale, are gray.

    Args:
        values: The values, shape ``(num_layers, num_steps)``.
        layer_names: The names of the layers, from input to output; ``None`` for their indices.
        steps: The number of the step or update of each column, shape ``(num_steps,)``; ``None`` for 1, 2, ...
        statistic: What the values are, such as ``"gradient norm"``.
        log_scale: Whether the colors are those of the logarithm.
        title: The title of the figure.

    Returns:
        A figure with one panel and a color bar. The first layer is at the top.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: Shapes do not fit together, there is nothing to draw, or ``log_scale`` with negative values.
    """
    array = _as_array("values", values, num_dimensions=2).astype(float)
    names = [str(index) for index in range(len(array))] if layer_names is None else list(map(str, layer_names))
    at = np.arange(1, array.shape[1] + 1) if steps is None else _as_array("steps", steps, num_dimensions=1)
    _check_length("layer_names", len(names), "rows of `values`", len(array))
    _check_length("steps", len(at), "columns of `values`", array.shape[1])
    if array.size == 0:
        raise ValueError(
            f"`values` has the shape {array.shape}, so there is nothing to draw. Expected at least one value."
        )
    check_has_matplotlib()
    norm, colors = _norm_and_colors(array, log_scale)
    height = min(max(1.6 + 0.26 * len(array), 2.8), 12)
    figure, (axes,) = figure_with_panels(1, title, size=(8.0, height))
    mesh = axes.pcolormesh(_edges(at), np.arange(len(array) + 1), np.ma.masked_invalid(array), norm=norm, cmap=colors)
    axes.set_facecolor("#BDBDBD")
    axes.invert_yaxis()
    ticks = _ticks_for(names)
    axes.set_yticks([tick + 0.5 for tick in ticks], [names[tick] for tick in ticks])
    axes.set(xlabel="step" if steps is None else "update", title="Layer statistics" if title is None else "")
    axes.tick_params(axis="y", length=0)
    figure.colorbar(mesh, ax=axes, label=statistic)
    return figure


def _norm_and_colors(array: np.ndarray, log_scale: bool) -> tuple[Any, str]:
    from matplotlib.colors import LogNorm, Normalize

    known = array[np.isfinite(array)]
    lowest, highest = (known.min(), known.max()) if known.size else (0.0, 1.0)
    if not log_scale and lowest < 0:
        bound = max(-lowest, highest)
        return Normalize(-bound, bound), "PuOr"
    if not log_scale:
        return Normalize(lowest, highest if highest > lowest else lowest + 1), "cividis"
    positive = known[known > 0]
    if lowest < 0 or not positive.size:
        raise ValueError(
            f"`log_scale` is True, but the values are between {lowest:.3g} and {highest:.3g}. Expected positive ones. "
            "Pass `log_scale=False`, or absolute values."
        )
    return LogNorm(positive.min(), max(highest, positive.min() * (1 + 1e-6))), "cividis"


def _edges(at: np.ndarray) -> np.ndarray:
    """Return the edges of columns whose centers are at increasing places."""
    if len(at) == 1:
        return np.array([at[0] - 0.5, at[0] + 0.5])
    between = (at[:-1] + at[1:]) / 2
    edges: np.ndarray = np.concatenate([[at[0] - (between[0] - at[0])], between, [at[-1] + (at[-1] - between[-1])]])
    return edges


# --- confusion matrix --------------------------------------------------------------------------------------------


def plot_confusion_matrix(
    predictions: ArrayLike,
    targets: ArrayLike = None,
    *,
    class_names: Sequence[str] | None = None,
    normalize: Literal["target", "prediction"] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw how often each class was predicted for each class.

    Args:
        predictions: The predicted classes, shape ``(num_samples,)``, or scores of all classes, such as logits, shape
            ``(num_samples, num_classes)``. Without ``targets``, a matrix of counts, shape ``(num_classes,
            num_classes)``, with a row for each true class.
        targets: The true classes, shape ``(num_samples,)``: integers from 0.
        class_names: The names of the classes; ``None`` for their numbers.
        normalize: What a cell shows: the share of the samples of its true class (``"target"``), that of its predicted
            class (``"prediction"``), or their number (``None``). Without it, colors are shares of the true class too,
            so that rare classes can be seen.
        title: The title of the figure. By default it has the accuracy.

    Returns:
        A figure with one panel. Up to 20 classes have a number in each cell.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: Shapes do not fit together, or a class is negative.
        TypeError: The classes are no integers.
    """
    matrix = confusion_matrix(predictions, targets, None if class_names is None else len(class_names))
    names = list(map(str, range(len(matrix)) if class_names is None else class_names))
    _check_length("class_names", len(names), "classes", len(matrix))
    if normalize not in (None, "target", "prediction"):
        raise ValueError(f"`normalize` is {normalize!r}. Expected 'target', 'prediction' or None.")
    axis = 0 if normalize == "prediction" else 1
    totals = matrix.sum(axis=axis, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    side = min(max(3.2 + 0.42 * len(matrix), 4.2), 12)
    total = matrix.sum()
    accuracy = f"Accuracy {np.trace(matrix) / total:.1%} of {total:,} samples" if total else "No samples"
    figure, (axes,) = figure_with_panels(1, None, size=(side + 0.8, side))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=shares.max() or 1)
    if len(matrix) <= _MAX_CLASSES_WITH_NUMBERS:
        _write_numbers(axes, shares, matrix if normalize is None else None)
    ticks = _ticks_for(names)
    slanted: dict[str, Any] = {"rotation": 45, "ha": "right"} if max(map(len, names)) > 3 else {}
    axes.set_xticks(ticks, [names[tick] for tick in ticks], **slanted)
    axes.set_yticks(ticks, [names[tick] for tick in ticks])
    axes.set(xlabel="predicted class", ylabel="true class", title=accuracy if title is None else title)
    axes.grid(visible=False)
    of = "predicted" if normalize == "prediction" else "true"
    figure.colorbar(image, ax=axes, label=f"share of the {of} class", shrink=0.8)
    return figure


def confusion_matrix(predictions: ArrayLike, targets: ArrayLike = None, num_classes: int | None = None) -> np.ndarray:
    """Return how often each class was predicted for each class.

    Args:
        predictions: As for `plot_confusion_matrix`.
        targets: As for `plot_confusion_matrix`.
        num_classes: The number of classes; ``None`` for as many as occur.

    Returns:
        The counts, shape ``(num_classes, num_classes)``: a row for each true class, a column for each predicted one.

    Example:
        >>> confusion_matrix([0, 1, 1, 1], targets=[0, 0, 1, 1])
        array([[1, 1],
               [0, 2]])
    """
    given = _as_array("predictions", predictions)
    if targets is None:
        if given.ndim != 2 or given.shape[0] != given.shape[1] or given.size == 0:
            raise ValueError(
                f"`predictions` has the shape {given.shape}, and there are no `targets`. Expected a matrix of counts, "
                "with as many rows as columns; or pass the `targets`."
            )
        return given
    true = _as_classes("targets", _as_array("targets", targets, num_dimensions=1))
    predicted = _as_classes("predictions", given.argmax(axis=1) if given.ndim == 2 else given)
    _check_length("predictions", len(predicted), "targets", len(true))
    num_seen = max([*true, *predicted], default=0) + 1
    num_classes = max(num_seen, given.shape[1] if given.ndim == 2 else 1, num_classes or 1)
    matrix = np.zeros((num_classes, num_classes), dtype=int)
    np.add.at(matrix, (true, predicted), 1)
    return matrix


def _as_classes(name: str, classes: np.ndarray) -> np.ndarray:
    if classes.ndim != 1:
        raise ValueError(f"`{name}` has the shape {classes.shape}. Expected (num_samples,), or scores of all classes.")
    if classes.size and classes.dtype.kind not in "iub":
        raise TypeError(
            f"`{name}` has the type {classes.dtype}. Expected the numbers of classes, which are integers from 0."
        )
    if classes.size and classes.min() < 0:
        raise ValueError(
            f"`{name}` has the class {classes.min()}. Expected integers from 0. Leave out ignored samples."
        )
    return classes.astype(int)


def _write_numbers(axes: Axes, shares: np.ndarray, counts: np.ndarray | None) -> None:
    size = 9 if len(shares) <= 12 else 7
    for (row, column), share in np.ndenumerate(shares):
        text = f"{share:.0%}" if counts is None else f"{counts[row, column]:g}"
        if share > 0:
            color = "white" if share > 0.55 * shares.max() else "black"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=size)


def _ticks_for(names: Sequence[str]) -> range:
    """Return the indices of the names that there is room for, at equal distances."""
    return range(0, len(names), -(-len(names) // _MAX_TICKS))


def _as_array(name: str, values: ArrayLike, num_dimensions: int | None = None) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
    array = np.asarray(values)
    if num_dimensions is not None and array.ndim != num_dimensions:
        raise ValueError(f"`{name}` has the shape {array.shape}. Expected {num_dimensions} dimensions.")
    return array


def _check_length(name: str, length: int, other: str, expected: int) -> None:
    if length != expected:
        raise ValueError(f"There are {length} `{name}`, but {expected} {other}. Expected one for each.")
