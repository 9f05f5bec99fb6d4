"""What may be a callback, and which of its methods are told of when it is added."""

from __future__ import annotations

import functools
import warnings
from unittest.mock import Mock

import pytest

from _support import make_dataset, make_trainer, train
from pytorch_accelerated.callbacks import CallbackHandler, EarlyStoppingCallback, TrainerCallback


def logged(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


class Fitting(TrainerCallback):
    """Its events take what they get, each in another way."""

    def on_train_epoch_start(self, trainer):
        pass

    def on_train_step_start(self, trainer, batch, **kwargs):
        pass

    def on_backward_start(self, trainer, batch, batch_output, step=0):
        pass

    def on_train_step_end(self, my_trainer, batch_output, extra=None):
        pass

    def on_train_epoch_end(self, *args, **kwargs):
        pass

    @logged
    def on_eval_epoch_start(self, trainer, is_intermediate, **kwargs):
        pass

    @staticmethod
    def on_eval_epoch_end(trainer, **kwargs):
        pass

    on_training_run_epoch_end = functools.partialmethod(on_train_epoch_end, "first")

    @classmethod
    def on_training_run_end(cls, trainer, **kwargs):
        pass

    def on_exception(self, trainer, exception):
        pass


def test_events_that_can_be_called_are_not_told_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        instance = Fitting()
        instance.on_training_run_start = lambda trainer, **kwargs: None
        instance.on_log_point = Mock()
        train(make_trainer(callbacks=[instance]), eval_dataset=make_dataset(8))


@pytest.mark.parametrize(
    ("event", "method", "declaration"),
    [
        ("on_train_epoch_end", lambda self: None, "(self, trainer, **kwargs)"),
        ("on_train_epoch_end", lambda self, trainer, module: None, "(self, trainer, **kwargs)"),
        ("on_train_epoch_end", lambda self, *, trainer, **kwargs: None, "(self, trainer, **kwargs)"),
        (
            "on_train_step_end",
            lambda self, trainer, module, outputs, batch, batch_idx: None,
            "(self, trainer, batch, batch_output, step, **kwargs)",
        ),
        ("on_exception", lambda self, trainer, error: None, "(self, trainer, exception, **kwargs)"),
    ],
)
def test_an_event_that_cannot_be_called_is_told_of_with_its_declaration(event, method, declaration):
    with pytest.warns(UserWarning, match=f"`Own.{event}` cannot be called with") as caught:
        CallbackHandler([type("Own", (TrainerCallback,), {event: method})])
    assert f"Define it as `{event}{declaration}`." in str(caught[0].message)


# --- callbacks of other libraries --------------------------------------------------------------------------------


def of_library(module, name, **methods):
    return type(name, (), {"__module__": module, **methods})


@pytest.mark.parametrize(
    ("module", "name", "words"),
    [
        ("lightning.pytorch.callbacks", "EarlyStopping", "of Lightning. Use `EarlyStoppingCallback` of"),
        ("keras.src.callbacks", "TerminateOnNaN", "of Keras. Use `TerminateOnNaNCallback` of"),
        (
            "transformers.trainer_callback",
            "MyCallback",
            "of Hugging Face Transformers. Write it as a",
        ),
        ("fastai.callback.core", "SaveModelCallback", "of fastai. Use `SaveBestModelCallback` of"),
    ],
)
def test_a_callback_of_another_library_is_answered_with_ours(module, name, words):
    def on_train_epoch_end(self, trainer, module):
        pass

    theirs = of_library(module, name, on_train_epoch_end=on_train_epoch_end)
    for cls in (theirs, type("Mine", (theirs,), {})):
        with pytest.raises(TypeError, match=f"`{cls.__name__}` is a callback {words}"):
            CallbackHandler([cls()])


def test_a_callback_of_another_library_with_an_event_of_ours_is_taken():
    theirs = of_library("keras.callbacks", "Callback", on_epoch_end=lambda self, epoch, logs=None: None)
    seen = []
    both = type("Both", (theirs,), {"on_train_epoch_end": lambda self, trainer, **kwargs: seen.append(trainer)})
    trainer = make_trainer(callbacks=[both()])
    train(trainer)
    assert seen == [trainer]


# --- a forgotten `super().__init__()` ----------------------------------------------------------------------------


class Forgetful(EarlyStoppingCallback):
    def __init__(self):
        self.mine = 1


class Child(Forgetful):
    pass


@pytest.mark.parametrize("cls", [Forgetful, Child])
def test_the_error_of_a_callback_that_was_not_initialized_says_which_call_is_missing(cls):
    with pytest.raises(AttributeError) as caught:
        train(make_trainer(callbacks=[cls()]), eval_dataset=make_dataset(8))
    assert (
        "`Forgetful.__init__` does not call that of its base class `EarlyStoppingCallback`."
        in caught.value.__notes__[0]
    )


def test_another_missing_attribute_is_not_laid_to_it():
    class Own(TrainerCallback):
        def __init__(self):
            pass

        def on_train_epoch_start(self, trainer, **kwargs):
            return trainer.nonsense

    with pytest.raises(AttributeError) as caught:
        train(make_trainer(callbacks=[Own()]))
    assert "__init__" not in caught.value.__notes__[0]
