"""How far a run is, and how long the rest takes."""

from __future__ import annotations

import pytest

from pytorch_accelerated._console.pace import Pace, fraction_done


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_the_time_left_is_that_of_the_rest_at_the_present_pace():
    clock = Clock()
    pace = Pace(0, clock, window=3)
    for clock.now, num_done in ((110.0, 1), (120.0, 2), (121.0, 12), (122.0, 22)):
        pace.mark(num_done)
    assert pace.per_second() == 10, "the slow start is forgotten"
    assert pace.seconds_left(32) == 1
    assert pace.seconds_left(20) == 0, "a loader may yield more batches than its length says"


def test_a_pace_since_the_start_counts_only_what_was_done_since():
    clock = Clock()
    pace = Pace(0.5, clock, window=None)  # as of a run that is resumed half-way
    for clock.now, num_done in ((110.0, 0.6), (120.0, 0.7), (130.0, 0.8)):
        pace.mark(num_done)
    assert pace.seconds_left(1.0) == pytest.approx(20)


@pytest.mark.parametrize("num_total", [None, 100])
def test_the_time_left_is_unknown_without_a_pace_or_a_total(num_total):
    clock = Clock()
    pace = Pace(0, clock)
    assert pace.seconds_left(num_total) is None
    pace.mark(5)
    assert pace.seconds_left(num_total) is None, "the clock stands still"
    clock.now += 1
    pace.mark(5)
    assert (pace.seconds_left(num_total) is None) == (num_total is None)


@pytest.mark.parametrize(
    ("arguments", "fraction"),
    [((1, 4, 10, None), 0.25), ((1, 4, 10, 20), 0.5), ((0, 0, 0, None), 0.0), ((5, 4, 0, None), 1.0)],
)
def test_a_run_ends_with_its_epochs_or_at_the_limit_of_updates(arguments, fraction):
    assert fraction_done(*arguments) == fraction
