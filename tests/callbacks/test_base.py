"""`TrainerCallback`: a plain class whose methods are the events; and the default callbacks."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from pytorch_accelerated.callbacks import (
    EVENTS,
    ConvertSyncBatchNormCallback,
    EarlyStoppingCallback,
    LimitBatchesCallback,
    LimitEvalStepsCallback,
    LogMetricsCallback,
    MoveModulesToDeviceCallback,
    PrintProgressCallback,
    ProgressBarCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    TerminateOnNaNCallback,
    TrainerCallback,
    get_default_callbacks,
)


class Counter(TrainerCallback):
    """Does not call ``super().__init__()``, which the base class allows."""

    def __init__(self, values):
        self.values = values

    def on_train_epoch_end(self, trainer, **kwargs):
        self.values.append(1)


ROUND_TRIPS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda callback: pickle.loads(pickle.dumps(callback)),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_callback_can_be_copied_and_pickled(name):
    original = Counter([1, 2])
    other = ROUND_TRIPS[name](original)
    assert type(other) is Counter
    assert other is not original
    assert other.values == [1, 2]
    assert (other.values is original.values) == (name == "copy")
    other.on_train_epoch_end(None)
    assert other.values == [1, 2, 1]


@pytest.mark.parametrize("name", ROUND_TRIPS)
@pytest.mark.parametrize(
    "callback",
    [
        ConvertSyncBatchNormCallback(),
        EarlyStoppingCallback(early_stopping_patience=3),
        LimitBatchesCallback(2),
        LimitEvalStepsCallback(2),
        LogMetricsCallback(),
        MoveModulesToDeviceCallback(),
        PrintProgressCallback(),
        ProgressBarCallback(),
        SaveBestModelCallback("model.pt"),
        SaveTrainingStateCallback("states"),
        StepBasedEvaluationCallback(2),
        TerminateOnNaNCallback(),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_shipped_callbacks_can_be_copied_and_pickled(callback, name):
    other = ROUND_TRIPS[name](callback)
    assert type(other) is type(callback)
    assert vars(other) == vars(callback)


def test_an_unknown_attribute_of_a_callback_is_an_attribute_error():
    callback = Counter([])
    assert hasattr(callback, "on_train_epoch_end")
    assert hasattr(callback, "on_eval_epoch_end"), "inherited"
    assert not hasattr(callback, "on_something_else")
    assert not hasattr(callback, "state_dict")
    with pytest.raises(AttributeError, match="on_something_else"):
        callback.on_something_else(None)


def test_events_lists_all_events_in_order_of_declaration():
    assert EVENTS == (
        "on_init_end",
        "on_training_run_start",
        "on_train_epoch_start",
        "on_train_step_start",
        "on_backward_start",
        "on_optimizer_step_start",
        "on_optimizer_step_end",
        "on_train_step_end",
        "on_log_point",
        "on_train_epoch_end",
        "on_eval_epoch_start",
        "on_eval_step_start",
        "on_eval_step_end",
        "on_eval_epoch_end",
        "on_training_run_epoch_end",
        "on_training_state_save",
        "on_training_run_end",
        "on_evaluation_run_start",
        "on_evaluation_run_end",
        "on_stop_training_error",
        "on_exception",
    )
    assert all(inspect.isfunction(vars(TrainerCallback)[event]) for event in EVENTS)


@pytest.mark.parametrize("event", EVENTS)
def test_events_of_the_base_class_do_nothing_and_accept_unknown_arguments(event):
    callback = TrainerCallback()
    arguments = {"batch": (), "batch_output": {}, "step": 0, "exception": ValueError(), "something_new": 1}
    assert getattr(callback, event)(None, **arguments) is None
    assert vars(callback) == {}


def test_the_default_callbacks_include_the_progress_bar_only_on_request():
    with_bar = get_default_callbacks()
    assert with_bar == (
        MoveModulesToDeviceCallback,
        TerminateOnNaNCallback,
        PrintProgressCallback,
        ProgressBarCallback,
        LogMetricsCallback,
    )
    without_bar = get_default_callbacks(progress_bar=False)
    assert without_bar == tuple(callback for callback in with_bar if callback is not ProgressBarCallback)
