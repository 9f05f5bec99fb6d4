"""The curves of metrics: which of them belong together, by their names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pytorch_accelerated._hints.meaning import nearest
from pytorch_accelerated._history.records import Record
from pytorch_accelerated._measuring.comparison import one_number

Axis = Literal["update", "epoch", "samples", "time"]

_TRAINING, _EVALUATION = ("train", "training"), ("eval", "val", "valid", "validation")
_WORDS_OF_STAGES = (*_TRAINING, *_EVALUATION, "evaluation", "intermediate", "ema", "model")
_ENDINGS = ("epoch", "step")
_STAGE = re.compile(
    rf"^(?:(?P<train>{'|'.join(_TRAINING)})|(?:(?P<dataset>.+)_)?(?P<eval>{'|'.join(_EVALUATION)}))_(?P<metric>.+)$"
)


class Curve(NamedTuple):
    """The values of one metric."""

    epochs: list[float]
    """When each value was recorded: the number of the epoch, from 1, a fraction within an epoch; or the place on
    another axis."""

    values: list[float]


@dataclass
class MetricCurves:
    """The curves of one metric: in training, and in evaluations by the name of the dataset."""

    name: str
    """What it is called without the name of the stage, such as ``loss``."""

    train: Curve | None = None
    evaluations: dict[str, Curve] = field(default_factory=dict)
    """By the name of the dataset; ``""`` for the only one."""

    steps: Curve | None = None
    """The values of steps, if the run recorded them: means over a few updates of training."""

    other: Curve | None = None
    """The curve of a metric that belongs to no stage, such as a learning rate."""

    @property
    def evaluation(self) -> Curve | None:
        """The first of the evaluations."""
        return next(iter(self.evaluations.values()), None)


def group_by_metric(curves: Mapping[str, Curve]) -> dict[str, MetricCurves]:
    """Return the curves by plain names of metrics, the loss first: ``train_accuracy`` and ``eval_accuracy`` as one.

    Single values that `Trainer.evaluate` has recorded are left out.

    Example:
        >>> grouped = group_by_metric({"train_loss_epoch": Curve([1], [0.5]), "eval_loss_epoch": Curve([1], [0.75])})
        >>> list(grouped), grouped["loss"].evaluations
        (['loss'], {'': Curve(epochs=[1], values=[0.75])})
    """
    grouped: dict[str, MetricCurves] = {}
    matches = {name: _STAGE.match(name) for name in curves}
    evaluated = {_plain(match["metric"]) for match in matches.values() if match is not None and match["eval"]}
    for name, curve in curves.items():
        match = matches[name]
        metric = _plain(name if match is None else match["metric"])
        if name.startswith("evaluation_") or "_evaluation_" in name:
            continue
        of_steps = _metric_of_steps(name, curves)
        of_metric = grouped.setdefault(of_steps or metric, MetricCurves(of_steps or metric))
        if of_steps is not None:
            of_metric.steps = curve
        elif match is not None and match["eval"]:
            of_metric.evaluations[match["dataset"] or ""] = curve
        elif match is not None or metric in evaluated:  # Keras calls the loss of training `loss`
            of_metric.train = curve
        else:
            of_metric.other = curve
    return dict(sorted(grouped.items(), key=lambda item: item[0] != "loss"))


def _metric_of_steps(name: str, curves: Mapping[str, Curve]) -> str | None:
    """Return the metric of which a curve has the values of steps; ``None`` if it is another curve."""
    of_pass = name.removesuffix("_step")
    is_of_steps = of_pass != name and (of_pass in curves or f"{of_pass}_epoch" in curves)
    return _plain_name(of_pass) if is_of_steps else None


def choose_metrics(curves: Mapping[str, MetricCurves], metrics: Sequence[str] | None) -> list[MetricCurves]:
    """Return the curves of some metrics, in the order of their names; by default of all that belong to a stage.

    Args:
        curves: The curves by plain names.
        metrics: Plain names, such as ``loss``, or those that are recorded, such as ``eval_loss_epoch``.

    Raises:
        ValueError: There is no metric of this name, or none at all.
    """
    if not curves:
        raise ValueError("Nothing was recorded, so there are no curves. Train for an epoch first.")
    plain_names = [_plain_name(name) for name in metrics or ()]
    for name in plain_names:
        if name not in curves:
            meant = nearest(name, curves)
            raise ValueError(
                f"There are no curves of {name!r}. Expected one of {list(curves)}."
                + ("" if meant is None else f" Did you mean {meant!r}?")
            )
    if metrics is not None:
        return [curves[name] for name in dict.fromkeys(plain_names)]
    with_stage = [each for each in curves.values() if each.train is not None or each.evaluations]
    return with_stage or list(curves.values())


def _plain_name(name: str) -> str:
    match = _STAGE.match(name)
    return _plain(name if match is None else match["metric"])


def _plain(metric: str) -> str:
    return "loss" if metric == "loss_epoch" else metric


def finite(curve: Curve) -> Curve:
    """Return a curve without values that are NaN or infinite."""
    pairs = [pair for pair in zip(*curve, strict=True) if math.isfinite(pair[1])]
    return Curve([epoch for epoch, _ in pairs], [value for _, value in pairs])


def quantity_of(name: str) -> str:
    """Return what a metric measures, without the pass that it belongs to.

    Example:
        >>> quantity_of("train_loss_epoch"), quantity_of("test_eval_top_5"), quantity_of("learning_rate_0")
        ('loss', 'top_5', 'learning_rate')
    """
    words = name.split("_")
    last_stage = max((place for place, word in enumerate(words) if word in _WORDS_OF_STAGES), default=-1)
    words = words[last_stage + 1 :] or words
    if last_stage < 0 and words[-1].isdigit():  # one of several groups of the optimizer
        words = words[:-1]
    return "_".join(words[:-1] if len(words) > 1 and words[-1] in _ENDINGS else words)


def curves_of_records(records: Iterable[Record], names: Sequence[str] | None, x: Axis) -> dict[str, Curve]:
    """Return the curve of each series that is recorded as single numbers, over any axis.

    Args:
        records: The values with their moments, oldest first.
        names: The series to return; ``None`` for all.
        x: The axis; ``"time"`` is in seconds since the first value.
    """
    curves: dict[str, Curve] = {}
    start: float | None = None
    for record in records:
        place, value = getattr(record.moment, x), one_number(record.value)
        if place is None or value is None or (names is not None and record.name not in names):
            continue
        start = place if start is None and x == "time" else start
        curve = curves.setdefault(record.name, Curve([], []))
        curve.epochs.append(place - (start or 0.0))
        curve.values.append(float(value))
    if names is None:
        curves.pop("intermediate_update", None)  # is the place of other values
    return curves
