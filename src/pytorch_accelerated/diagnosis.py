"""What learning curves show, in words: still falling, over-fitting, under-fitting, diverging, flat, or noisy.

Each finding says which numbers it rests on, and what to try. It describes the curve so far: a schedule that
restarts, or a drop of the learning rate to come, may change it. A trend counts only if it is larger than the noise from
epoch to epoch, so short and noisy curves yield few findings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Literal

from pytorch_accelerated._history.curves import Curve, choose_metrics, finite, group_by_metric
from pytorch_accelerated._history.sources import CurveSource, read_curves
from pytorch_accelerated._history.trends import (
    MIN_VALUES_FOR_NOISE,
    medians_of_three,
    needed_certainty,
    noise_of,
    trend_of,
)
from pytorch_accelerated._measuring.comparison import is_greater_better

Kind = Literal[
    "diverging", "over-fitting", "noisy", "under-fitting", "still falling", "still rising", "flat", "too short"
]

__all__ = ["Diagnosis", "Finding", "Kind", "diagnose", "diagnose_curves"]

_MIN_EPOCHS = 4
_SHARE_OF_CHANGE = 0.02
"""The smallest change that counts, as a share of what was gained in the whole run."""

_SHARE_OF_LEVEL = 0.05
"""The smallest change that counts, as a share of a value above zero, if it is no such share of the gain."""


@dataclass(frozen=True)
class Finding:
    """One thing that a curve shows."""

    kind: Kind
    text: str
    """What the numbers show, as a sentence."""

    advice: str
    """What to try."""

    numbers: Mapping[str, float]
    """The numbers that the finding rests on."""

    since_epoch: int | None = None
    """The epoch from which on it holds; ``None`` if it is about the whole curve."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.text} {self.advice}".rstrip()


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """All findings about one metric. Printed, or shown in a notebook, it has a line for each.

    Example:
        >>> diagnosis = diagnose({"train_loss": [4, 3, 2, 1, 0.5], "eval_loss": [4, 3.5, 3, 2.5, 2]})
        >>> print(diagnosis)
        still falling: The evaluation loss fell by about 2 in the last 4 epochs, to 2. Train longer.
    """

    findings: tuple[Finding, ...]
    metric: str
    num_epochs: int

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of the findings."""
        return [finding.kind for finding in self.findings]

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __repr__(self) -> str:
        nothing = f"Nothing stands out in the {self.num_epochs} epochs of the {self.metric}."
        return "\n".join(map(str, self.findings)) or nothing


def diagnose(
    source: CurveSource,
    metric: str = "loss",
    *,
    greater_is_better: bool | None = None,
    baseline: float | None = None,
) -> Diagnosis:
    """Say in words what the curves of a metric show.

    Args:
        source: A run history, the path of a CSV or JSONL file that a run has written, rows, or a mapping from metrics
            to their values.
        metric: The metric without its stage, such as ``loss`` or ``accuracy``. With several evaluation sets, the first
            counts.
        greater_is_better: Whether larger values are better. ``None`` to go by the name: yes for ``accuracy``, ``f1``
            and the like.
        baseline: The value of a trivial guess, such as ``log(10)`` for the cross-entropy of ten classes. With it,
            under-fitting is measured against this value, and otherwise against the first epoch.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There are no curves of this metric.
        TypeError: The source is of another type.
    """
    curves = choose_metrics(group_by_metric(read_curves(source)), [metric])[0]
    if greater_is_better is None:
        greater_is_better = is_greater_better(curves.name) or False
    train = curves.train or curves.other or Curve([], [])
    evaluation = curves.evaluation or Curve([], [])
    findings = _find(train, evaluation, _Words(curves.name, greater_is_better, train, evaluation), baseline)
    return Diagnosis(tuple(findings), curves.name, max(len(train.values), len(evaluation.values)))


def diagnose_curves(
    train: Sequence[float],
    evaluation: Sequence[float] = (),
    *,
    metric: str = "loss",
    greater_is_better: bool = False,
    baseline: float | None = None,
) -> list[Finding]:
    """Say what two lists of numbers show, one number per epoch.

    Args:
        train: The values in training; may be empty.
        evaluation: The values in evaluation; may be empty.
        metric: What to call the metric.
        greater_is_better: Whether larger values are better.
        baseline: The value of a trivial guess; see `diagnose`.

    Returns:
        The findings, the most urgent first; none if nothing stands out.

    Example:
        >>> findings = diagnose_curves([1.0, 0.5, 0.3, 0.2, 0.1, 0.05], [1.0, 0.6, 0.5, 0.6, 0.7, 0.8])
        >>> findings[0].kind, findings[0].since_epoch
        ('over-fitting', 4)
    """
    curves = [Curve([float(epoch) for epoch in range(1, len(each) + 1)], list(each)) for each in (train, evaluation)]
    return _find(curves[0], curves[1], _Words(metric, greater_is_better, *curves), baseline)


# --- the findings ------------------------------------------------------------------------------------------------


def _find(train: Curve, evaluation: Curve, words: _Words, baseline: float | None) -> list[Finding]:
    num_epochs = max(len(train.values), len(evaluation.values))
    non_finite = _find_non_finite(train, "training", words) or _find_non_finite(evaluation, "evaluation", words)
    if non_finite is not None:
        return [non_finite]
    if num_epochs < _MIN_EPOCHS:
        text = f"{num_epochs} {'epoch is' if num_epochs == 1 else 'epochs are'} too few to tell a trend from noise."
        return [Finding("too short", text, "Train for at least 4 epochs.", {"epochs": num_epochs})]
    costs = _Costs.of(train, "training", words), _Costs.of(evaluation, "evaluation", words)
    of_train, of_eval = (each if len(each.values) >= _MIN_EPOCHS else None for each in costs)
    found: list[Finding | None] = []
    if of_train is not None:
        found.append(_find_divergence(of_train, words))
    if of_train is not None and of_eval is not None and not any(found):
        found.append(_find_over_fitting(of_train, of_eval, words))
    watched = of_eval or of_train
    if watched is not None:
        found.append(_find_noise(watched, words))
        if not any(each is not None and each.kind in ("diverging", "over-fitting") for each in found):
            trend = _find_trend(watched, words)
            found.append(trend or _find_plateau(watched, words))
            if of_train is not None and trend is None:
                found.append(_find_under_fitting(of_train, of_eval, words, baseline))
    return sorted((each for each in found if each is not None), key=lambda each: _URGENCY.index(each.kind))


def _find_non_finite(curve: Curve, stage: str, words: _Words) -> Finding | None:
    bad = [(epoch, value) for epoch, value in zip(*curve, strict=True) if not math.isfinite(value)]
    if not bad:
        return None
    epoch, value = bad[0]
    before = [each for at, each in zip(*finite(curve), strict=True) if at < epoch]
    last = f" It was {words.show(before[-1])} before." if before else ""
    return Finding(
        "diverging",
        f"The {stage} {words.metric} is {value} in epoch {_epoch(epoch)}.{last}",
        "Lower the learning rate, warm it up, or clip the gradients, and check the data for invalid values.",
        {"value": value, **({"last finite value": before[-1]} if before else {})},
        since_epoch=int(epoch),
    )


def _find_divergence(train: _Costs, words: _Words) -> Finding | None:
    """A rise of the training loss that undoes half of what was gained, and is no noise."""
    lowest, end = train.lowest(), train.end()
    rise, gain = end - train.smooth[lowest], train.smooth[0] - train.smooth[lowest]
    share_of_level = 0.1 if train.noise else 0.5  # without an estimate of the noise, more is needed
    enough = max(0.5 * gain, 5 * train.noise, share_of_level * train.level(train.smooth[lowest]))
    if rise <= enough or train.trend_of(lowest)[0] <= 0:
        return None
    best, last = words.value(train.smooth[lowest]), words.value(end)
    return Finding(
        "diverging",
        f"The training {words.metric} {words.worsened} from {words.show(best)} in epoch {train.epoch(lowest)} to "
        f"{words.show(last)} at the end.",
        "Lower the learning rate, warm it up, or clip the gradients; resume from a state of that epoch.",
        {"best": best, "end": last, "noise": train.noise},
        since_epoch=train.epoch(lowest + 1),
    )


def _find_over_fitting(train: _Costs, evaluation: _Costs, words: _Words) -> Finding | None:
    """The evaluation gets worse from some epoch on, while training still gets better."""
    lowest = evaluation.lowest()
    num_after = len(evaluation.values) - 1 - lowest
    best, end = evaluation.smooth[lowest], evaluation.end()
    gain = max(evaluation.smooth[: lowest + 1]) - best
    enough = max(3 * evaluation.noise, 0.05 * gain if gain > 3 * evaluation.noise else 0.02 * evaluation.level(best))
    slope, certainty = evaluation.trend_of(lowest)
    epoch = evaluation.epochs[lowest]
    train_then, train_end = train.near(epoch), train.end()
    improved = train_then - train_end
    still_improves = improved > max(2 * train.noise, _SHARE_OF_CHANGE * (max(train.smooth) - min(train.smooth)), 0)
    if end - best <= enough or slope <= 0 or certainty < needed_certainty(num_after + 1) or not still_improves:
        return None
    numbers = {
        "best evaluation": words.value(best),
        "last evaluation": words.value(end),
        "training then": words.value(train_then),
        "last training": words.value(train_end),
        "noise": evaluation.noise,
    }
    return Finding(
        "over-fitting",
        f"The evaluation {words.metric} {words.worsened} from {words.show(words.value(best))} in epoch "
        f"{evaluation.epoch(lowest)} to {words.show(words.value(end))}, while that of training {words.improved} from "
        f"{words.show(words.value(train_then))} to {words.show(words.value(train_end))}.",
        "Keep the model of that epoch, or stop there; try more data, augmentation, weight decay or dropout.",
        numbers,
        since_epoch=evaluation.epoch(lowest + 1),
    )


def _find_noise(costs: _Costs, words: _Words) -> Finding | None:
    """Jumps from epoch to epoch that are a large part of all that was gained."""
    if len(costs.values) < MIN_VALUES_FOR_NOISE:
        return None
    gain = costs.smooth[0] - min(costs.smooth)
    level = costs.level(median(costs.values))
    if costs.noise <= max(0.2 * gain, 0.05 * level):
        return None
    return Finding(
        "noisy",
        f"The {costs.stage} {words.metric} jumps by about {words.show(costs.noise)} from epoch to epoch, and has "
        f"{words.gained} by {words.show(max(gain, 0.0))} in all.",
        "Compare means over several epochs. Try a larger evaluation set, larger batches, a lower learning rate at the "
        "end, or an average of the weights.",
        {"noise": costs.noise, "gain": gain},
    )


def _find_trend(costs: _Costs, words: _Words) -> Finding | None:
    """A gain in the last quarter that is no noise, and not negligible."""
    num = max(5, math.ceil(len(costs.values) / 4))
    first = max(len(costs.values) - num, 0)
    slope, certainty = costs.trend_of(first)
    num_steps = len(costs.values) - 1 - first
    gain, num_epochs = -slope * num_steps, costs.epoch(len(costs.values)) - costs.epoch(first)
    is_certain = certainty >= needed_certainty(num_steps + 1) or costs.falls_every_time(first)
    if gain <= 0 or not is_certain or not costs.is_material(gain, first) or not costs.is_lowest_at_end():
        return None
    last = words.value(costs.values[-1])
    return Finding(
        "still rising" if words.greater_is_better else "still falling",
        f"The {costs.stage} {words.metric} {words.improved} by about {words.show(gain)} in the last "
        f"{num_epochs} epochs, to {words.show(last)}.",
        "Train longer.",
        {"gain": gain, "epochs": num_epochs, "last": last, "noise": costs.noise},
    )


def _find_plateau(costs: _Costs, words: _Words) -> Finding | None:
    """No gain in the last epochs that is more than noise."""
    level = fmean(costs.values[-_MIN_EPOCHS:])
    gain = costs.smooth[0] - min(costs.smooth)
    band = max(2.5 * costs.noise, _SHARE_OF_CHANGE * gain, 1e-3 * costs.level(level), 1e-9 * abs(level))
    first = len(costs.values)
    while first > 0 and abs(costs.smooth[first - 1] - level) <= band:
        first -= 1
    num_epochs = len(costs.values) - first
    if num_epochs < max(_MIN_EPOCHS, math.ceil(len(costs.values) / 5)):
        return None
    shown = words.show(words.value(level))
    if first == 0:
        text = f"The {costs.stage} {words.metric} has stayed at {shown} in all {num_epochs} epochs with a value."
        advice = (
            "If it should get better, check that gradients reach the parameters, that inputs and targets belong "
            "together, and try other learning rates."
        )
    else:
        text = f"The {costs.stage} {words.metric} has stayed at {shown} since epoch {costs.epoch(first)}."
        advice = "More epochs at this learning rate will change little. Lower it, or stop."
    numbers = {"level": words.value(level), "band": band, "epochs": num_epochs, "noise": costs.noise}
    return Finding("flat", text, advice, numbers, since_epoch=costs.epoch(first))


def _find_under_fitting(
    train: _Costs, evaluation: _Costs | None, words: _Words, baseline: float | None
) -> Finding | None:
    """Training has stopped getting better at a high level, and evaluation is about as good."""
    plateau = _find_plateau(train, words)
    reference = train.smooth[0] if baseline is None else words.cost(baseline)
    level = train.end()
    if plateau is None or _find_trend(train, words) is not None or not min(train.level(level), reference) > 0:
        return None
    gap = 0.0 if evaluation is None else evaluation.end() - level
    if level < 0.7 * reference or gap > max(0.1 * level, 2 * train.noise):
        return None
    if baseline is None and reference - level <= max(3 * train.noise, 0.01 * level):
        return None  # it is flat from the beginning, which may be as good as it gets
    named = "its value in the first epoch" if baseline is None else "the given baseline"
    shown = words.show(words.value(reference))
    also = "" if evaluation is None else f", and that of evaluation at {words.show(words.value(evaluation.end()))}"
    return Finding(
        "under-fitting",
        f"The training {words.metric} has stayed at {words.show(words.value(level))}{also}. That is close to {named}, "
        f"{shown}.",
        "Unless the data allow no better, try a higher learning rate, a larger model, or less regularization.",
        {"training": words.value(level), "reference": words.value(reference), "gap": gap},
        since_epoch=plateau.since_epoch,
    )


_URGENCY: tuple[Kind, ...] = (
    "diverging",
    "over-fitting",
    "under-fitting",
    "flat",
    "still falling",
    "still rising",
    "noisy",
    "too short",
)


# --- numbers -----------------------------------------------------------------------------------------------------


class _Words:
    """How a metric is spoken of, and how it becomes a cost, of which less is better.

    A metric between 0 and 1 of which more is better, such as an accuracy, becomes its distance from 1; any other of
    which more is better changes its sign.
    """

    def __init__(self, metric: str, greater_is_better: bool, *curves: Curve) -> None:
        values = [value for curve in curves for value in finite(curve).values]
        is_share = greater_is_better and all(0 <= value <= 1 for value in values)
        self.has_level = is_share or (not greater_is_better and min(values, default=0.0) >= 0)
        """Whether 0 is the lowest possible cost, so that a cost can be compared with its distance from 0."""

        self._origin = 1.0 if is_share else 0.0
        self.metric, self.greater_is_better = metric, greater_is_better
        self.improved, self.worsened = ("rose", "fell") if greater_is_better else ("fell", "rose")
        self.gained = "risen" if greater_is_better else "fallen"

    def cost(self, value: float) -> float:
        return self._origin - value if self.greater_is_better else value

    value = cost  # which is its own inverse

    def show(self, value: float) -> str:
        return f"{value:.3g}"


class _Costs:
    """The values of a curve as costs."""

    def __init__(self, epochs: Sequence[float], values: Sequence[float], stage: str, *, has_level: bool) -> None:
        self.epochs, self.values, self.stage, self.has_level = epochs, values, stage, has_level
        self.noise = noise_of(values)
        self.smooth = medians_of_three(values)

    @classmethod
    def of(cls, curve: Curve, stage: str, words: _Words) -> _Costs:
        return cls(curve.epochs, [words.cost(value) for value in curve.values], stage, has_level=words.has_level)

    def epoch(self, index: int) -> int:
        return int(self.epochs[min(index, len(self.epochs) - 1)])

    def level(self, cost: float) -> float:
        """Return the distance of a cost from 0, if that is the lowest possible one; otherwise 0."""
        return cost if self.has_level else 0.0

    def end(self) -> float:
        """Return the level at the end: the mean of the last three values if there are many, or the last."""
        return fmean(self.values[-3:]) if len(self.values) > 2 * _MIN_EPOCHS else self.values[-1]

    def lowest(self) -> int:
        """Return the index of the lowest value, whose neighbors are low too."""
        found = min(range(len(self.smooth)), key=self.smooth.__getitem__)
        neighbors = range(max(found - 1, 0), min(found + 2, len(self.values)))
        return min(neighbors, key=self.values.__getitem__)

    def is_lowest_at_end(self) -> bool:
        """Tell whether the mean of a few values is lowest at the end, or near it."""
        num = max(len(self.values) // 12, 1)
        means = [fmean(self.values[first : first + num]) for first in range(len(self.values) - num + 1)]
        return min(means[-1 - num :]) <= min(means)

    def falls_every_time(self, first: int) -> bool:
        """Tell whether there are at least five values from an index on, each lower than the one before."""
        values = self.values[first:]
        always = len(values) >= 5 and all(after < before for before, after in pairwise(values))
        return always and self._is_share(values[-2] - values[-1], values[-2])

    def near(self, epoch: float) -> float:
        """Return the smoothed value of the last epoch that is not after a given one."""
        earlier = [value for at, value in zip(self.epochs, self.smooth, strict=True) if at <= epoch]
        return earlier[-1] if earlier else self.smooth[0]

    def trend_of(self, first: int) -> tuple[float, float]:
        """Return the slope of the values from an index on, per value, and how many standard errors it is from 0."""
        return trend_of(self.values[first:])

    def is_material(self, gain: float, first: int) -> bool:
        """Tell whether a gain since an index counts, compared with all that was gained, or with the value itself."""
        return gain > 2 * self.noise and self._is_share(gain, self.smooth[first])

    def _is_share(self, gain: float, start: float) -> bool:
        """Tell whether a gain is large enough compared with the whole, or with the positive value it starts from."""
        is_share_of_level = self.has_level and gain >= _SHARE_OF_LEVEL * start > 0
        return gain >= _SHARE_OF_CHANGE * (max(self.smooth) - min(self.smooth)) or is_share_of_level


def _epoch(epoch: float) -> str:
    return f"{epoch:.3g}" if epoch % 1 else str(int(epoch))
