"""Whether a metric improves, how long it has not, and its best value so far."""

from __future__ import annotations

import pytest

from pytorch_accelerated._measuring.comparison import (
    BestMetric,
    NewValues,
    PatienceCounter,
    is_better,
    is_greater_better,
)

NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "best", "greater_is_better", "threshold", "expected"),
    [
        (1.0, 2.0, False, 0.0, True),
        (2.0, 1.0, False, 0.0, False),
        (1.0, 1.0, False, 0.0, False),
        (2.0, 1.0, True, 0.0, True),
        (1.0, 2.0, True, 0.0, False),
        (1.5, 2.0, False, 0.5, False),
        (1.25, 2.0, False, 0.5, True),
        (2.75, 2.0, True, 0.5, True),
        (5.0, None, False, 9.0, True),
        (NAN, None, False, 0.0, False),
        (NAN, 1.0, True, 0.0, False),
        (1.0, float("inf"), False, 0.0, True),
    ],
)
def test_is_better_respects_direction_and_threshold(value, best, greater_is_better, threshold, expected):
    assert is_better(value, best, greater_is_better, threshold) is expected


def test_the_patience_is_used_up_by_evaluations_in_a_row_without_improvement():
    counter = PatienceCounter(patience=2, greater_is_better=True, threshold=0.1)
    values = [0.5, 0.55, 0.7, 0.7, NAN]
    assert [counter.update(value) for value in values] == [False, False, False, False, True]
    assert (counter.best.value, counter.num_without_improvement) == (0.7, 2)
    counter.reset()
    assert (counter.best.value, counter.num_without_improvement) == (None, 0)


def test_the_best_metric_keeps_the_value_and_the_epoch_of_the_last_record():
    best = BestMetric()
    assert best.is_improved_by(3.0, greater_is_better=False)
    best.record(3.0, epoch=1)
    assert not best.is_improved_by(3.0, greater_is_better=False)
    assert not best.is_improved_by(2.5, greater_is_better=False, threshold=0.5)
    assert best.is_improved_by(2.0, greater_is_better=False, threshold=0.5)
    assert best.is_improved_by(4.0, greater_is_better=True)
    best.record(2.0, epoch=3)
    assert best.state_dict() == {"best_metric": 2.0, "best_metric_epoch": 3}
    best.reset()
    assert best.state_dict() == {"best_metric": None, "best_metric_epoch": None}


def test_the_best_metric_is_restored_from_its_state_and_ignores_other_entries():
    best = BestMetric()
    best.load_state_dict({"best_metric": 0.5, "best_metric_epoch": 4, "has_saved": True})
    assert best == BestMetric(0.5, 4)


def test_values_are_new_once_and_those_of_earlier_runs_are_not():
    new_values = NewValues()
    new_values.start_run(num_values=3)
    assert [new_values.look(num_values) for num_values in (3, 4, 4, 6)] == [False, True, False, True]
    new_values.start_run(num_values=8)
    assert not new_values.look(8)


@pytest.mark.parametrize(
    ("state", "expected"),
    [pytest.param({"num_values_seen": 1}, True, id="saved before the look"), pytest.param({}, False, id="old state")],
)
def test_a_resumed_run_looks_at_what_its_state_has_not_seen(state, expected):
    new_values = NewValues()
    new_values.load_state_dict(state)
    new_values.start_run(num_values=2, is_resumed=True)
    assert new_values.look(2) == expected


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        *[("accuracy", True), ("top_5_acc", True), ("macro_f1", True), ("mIoU", True), ("loss", False)],
        *[("rmse", False), ("error_rate", False), ("accuracy_loss", False), ("lr", None), ("maple", None)],
    ],
)
def test_the_name_of_a_metric_may_tell_what_is_better(metric, expected):
    assert is_greater_better(metric) is expected
