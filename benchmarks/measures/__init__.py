"""What is measured: one file for each kind of case, with a function ``measure(case, framework)``."""

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
"""Lets a framework's module do something, and returns the seconds it took."""


@dataclass(frozen=True)
class Figure:
    """One measured value of a row, or of a curve."""

    row: str
    value: float
    seconds: float | None = None
    """What a ratio was formed of."""
    baseline: float | None = None
    """The seconds of the loop written by hand in the same process."""
    at: int | None = None
    """Where on a curve the value belongs."""


def load_framework(name: str) -> Any:
    """Import the file that says how a framework trains."""
    return importlib.import_module(f"frameworks.{FRAMEWORKS[name].module or name}")


def do(job: Job, action: Callable[[Job], None]) -> Any:
    """Let a framework do a job, without the garbage of the one before, and return what the probe saw."""
    gc.collect()
    return job.do(action)


def compare(row: str, framework: str, measurement: Measurement, num_pairs: int, at: int | None = None) -> Figure:
    """Measure a framework and the loop written by hand in turn, each time between two of the other.

    Both run once before it counts. A ratio is formed with the mean of the two neighbours in time, since the speed of a
    shared machine changes within seconds.
    """
    own, by_hand = load_framework(framework), load_framework(HAND_WRITTEN)
    for module in (own, by_hand):
        measurement(module)
    baselines, seconds = [measurement(by_hand)], []
    for _ in range(num_pairs):
        seconds.append(measurement(own))
        baselines.append(measurement(by_hand))
    ratios = [2 * taken / (before + after) for taken, (before, after) in zip(seconds, pairwise(baselines), strict=True)]
    return Figure(row, statistics.median(ratios), statistics.median(seconds), statistics.median(baselines), at)


def added_seconds(with_it: Callable[[], float], without: Callable[[], float], num_pairs: int) -> float:
    """Measure something with and without an addition in turn, and return what the addition costs."""
    bare, added = [without()], []
    for _ in range(num_pairs):
        seconds = with_it()
        bare.append(without())
        added.append(seconds - (bare[-2] + bare[-1]) / 2)
    return statistics.median(added)
