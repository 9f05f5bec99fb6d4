"""The measurements: one file per kind of case, each with a function ``measure(case, framework)``."""

from __future__ import annotations

import gc
import importlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from _common import Job
from frameworks import FRAMEWORKS, HAND_WRITTEN

Measurement = Callable[[Any], float]
"""Runs something with a framework's module, and returns its duration in seconds."""


@dataclass(frozen=True)
class Figure:
    """A measured value of a row or a curve."""

    row: str
    value: float
    seconds: float | None = None
    """The numerator, if the value is a ratio."""
    baseline: float | None = None
    """Seconds of the hand-written loop in the same process."""
    at: int | None = None
    """Position of the value on a curve."""


def load_framework(name: str) -> Any:
    """Import the file that defines how a framework trains."""
    return importlib.import_module(f"frameworks.{FRAMEWORKS[name].module or name}")


def do(job: Job, action: Callable[[Job], None]) -> Any:
    """Run a job after collecting the garbage of the previous one, and return its probe."""
    gc.collect()
    return job.do(action)


def compare(row: str, framework: str, measurement: Measurement, num_pairs: int, at: int | None = None) -> Figure:
    """Measure a framework and the hand-written loop alternately.

    Both run once before the measurement starts. Each time of the framework is divided by the mean of the times right
    before and after it, because the speed of a shared machine changes within seconds.
    """
    tested, by_hand = load_framework(framework), load_framework(HAND_WRITTEN)
    for module in (tested, by_hand):
        measurement(module)
    baselines, seconds = [measurement(by_hand)], []
    for _ in range(num_pairs):
        seconds.append(measurement(tested))
        baselines.append(measurement(by_hand))
    ratios = [2 * taken / (before + after) for taken, (before, after) in zip(seconds, pairwise(baselines), strict=True)]
    return Figure(row, statistics.median(ratios), statistics.median(seconds), statistics.median(baselines), at)


def added_seconds(with_it: Callable[[], float], without: Callable[[], float], num_pairs: int) -> float:
    """Measure with and without an addition alternately, and return the cost of the addition in seconds."""
    bare, added = [without()], []
    for _ in range(num_pairs):
        seconds = with_it()
        bare.append(without())
        added.append(seconds - (bare[-2] + bare[-1]) / 2)
    return statistics.median(added)
