"""Trend and noise of a series of values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

MIN_VALUES_FOR_NOISE = 6


def noise_of(values: Sequence[float]) -> float:
    r"""Return the standard deviation of the noise from value to value, whatever the trend.

    It is estimated from the median of the second differences :math:`v_{i-1} - 2 v_i + v_{i+1}` in the later half, whose
    standard deviation is :math:`\sqrt 6` times that of independent noise. 0 for fewer than six values.

    Example:
        >>> noise_of([1.0, 0.9, 0.8, 0.7, 0.6, 0.5]) < 1e-12
        True
    """
    if len(values) < MIN_VALUES_FOR_NOISE:
        return 0.0
    later = values[-max(MIN_VALUES_FOR_NOISE, math.ceil(len(values) / 2)) :]
    differences = [abs(a - 2 * b + c) for a, b, c in zip(later, later[1:], later[2:], strict=False)]
    noise: float = 1.4826 * median(differences) / math.sqrt(6)
    return noise


def trend_of(values: Sequence[float]) -> tuple[float, float]:
    """Return the slope of the line of least squares through equidistant values, and its distance from 0.

    The distance is in standard errors; infinite if all values are on the line, and 0 if there is no line.
    """
    num = len(values)
    if num < 3:
        return 0.0, 0.0
    center, mean = (num - 1) / 2, fmean(values)
    spread = sum((index - center) ** 2 for index in range(num))
    slope = sum((index - center) * (value - mean) for index, value in enumerate(values)) / spread
    rest = sum((value - mean - slope * (index - center)) ** 2 for index, value in enumerate(values))
    error = math.sqrt(rest / (num - 2) / spread)
    if error <= 1e-12 * abs(slope):
        return slope, math.inf if slope else 0.0
    return slope, abs(slope) / error


def needed_certainty(num_values: int) -> float:
    """Return how many standard errors a slope must be from 0: a chance of about 1 in 100 that noise alone does it."""
    degrees_of_freedom = float(max(num_values - 2, 1))
    return 2.6 + 10 / math.pow(degrees_of_freedom, 1.1)


def medians_of_three(values: Sequence[float]) -> list[float]:
    """Return the values with the median of each and its neighbors; the first and the last stay."""
    if len(values) < 3:
        return list(values)
    inner = [median(triple) for triple in zip(values, values[1:], values[2:], strict=False)]
    return [values[0], *inner, values[-1]]
