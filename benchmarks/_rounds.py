"""Fair timing on a busy machine: the candidates take turns, and the medians of their times are compared."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping


def interleaved(candidates: Mapping[str, Callable[[], float]], num_rounds: int) -> dict[str, list[float]]:
    """Call each candidate once per round, after a round that does not count, and return the seconds each reported."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(num_rounds + 1):
        for name, run in candidates.items():
            seconds = run()
            if round_number > 0:
                times[name].append(seconds)
    return times


def print_ratios(times: Mapping[str, list[float]], baseline: str) -> None:
    """Print the median of each candidate, with the extremes, and the median of its ratios to the baseline by round."""
    width = max(map(len, times))
    for name, seconds in times.items():
        ratio = statistics.median(own / base for own, base in zip(seconds, times[baseline], strict=True))
        low, middle, high = (1e3 * value for value in (min(seconds), statistics.median(seconds), max(seconds)))
        print(f"{name:<{width}}  {middle:9.2f} ms  ({low:.2f} to {high:.2f})  ratio {ratio:.3f}", flush=True)
