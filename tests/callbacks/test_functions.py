"""The callback made of functions."""

from __future__ import annotations

import pytest

from _support import make_trainer, train
from pytorch_accelerated.callbacks import LambdaCallback, StopTrainingError


def test_functions_are_called_with_the_arguments_that_they_accept():
    seen = []
    callback = LambdaCallback(
        on_training_run_start=lambda trainer: seen.append("start"),
        on_train_step_end=lambda trainer, step: seen.append(step),
        on_train_epoch_end=lambda trainer, **kwargs: seen.append(trainer.run_history.current_epoch),
    )
    train(make_trainer(callbacks=[callback, LambdaCallback(on_training_run_end=lambda trainer: seen.append("end"))]), 8)
    assert seen == ["start", 0, 1, 1, "end"]


def test_a_function_may_stop_the_run():
    def stop(trainer):
        raise StopTrainingError("enough")

    assert train(make_trainer(callbacks=[LambdaCallback(on_train_step_end=stop)])).stop_reason == "enough"


def test_what_is_no_event_or_no_function_is_refused():
    with pytest.raises(TypeError, match=r"'on_epoch_end', which is not an event. .*on_train"):
        LambdaCallback(on_epoch_end=print)
    with pytest.raises(TypeError, match=r"'quite_other', which is not an event. Choose one of \['on_init_end'"):
        LambdaCallback(quite_other=print)
    with pytest.raises(TypeError, match="got 3, of type int, for 'on_train_epoch_end'"):
        LambdaCallback(on_train_epoch_end=3)
