"""`CallbackHandler`: which callbacks receive an event, with which arguments, and what happens if one fails."""

from __future__ import annotations

import warnings
from functools import partial
from types import SimpleNamespace

import pytest

import _support
from _support import EventRecorder, Probe, make_dataset, make_trainer, raiser
from pytorch_accelerated.callbacks import CallbackHandler, TrainerCallback
from pytorch_accelerated.exceptions import StopTrainingError


class Named(TrainerCallback):
    """Appends its name to a log at the start of an epoch."""

    def __init__(self, name="default", log=None):
        self.name = name
        self.log = [] if log is None else log

    def on_train_epoch_start(self, trainer, **kwargs):
        self.log.append(self.name)


class Counting(TrainerCallback):
    def __init__(self, count=0):
        self.count = count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


train = partial(_support.train, dataset=8)  # two steps per epoch


# --- the list ----------------------------------------------------------------------------------------------------


def test_callbacks_get_an_event_in_list_order():
    log = []
    handler = CallbackHandler([Named("first", log), Named("second", log)])
    handler.add_callback(Named("third", log))
    handler.add_callbacks([Named("fourth", log), Named("fifth", log)])
    handler.call_event("on_train_epoch_start", None)
    assert log == ["first", "second", "third", "fourth", "fifth"]


def test_callback_classes_are_instantiated():
    handler = CallbackHandler([Named, Named("mine")])
    assert [callback.name for callback in handler.callbacks] == ["default", "mine"]
    assert handler.callback_list == ["Named", "Named"]


def test_two_instances_of_a_class_are_two_callbacks():
    log = []
    handler = CallbackHandler([Named("one", log), Named("two", log)])
    handler.call_event("on_train_epoch_start", None)
    assert log == ["one", "two"]


def test_the_same_object_twice_is_an_error():
    callback = Named()
    with pytest.raises(ValueError, match=r"was added twice.*pass a second instance"):
        CallbackHandler([callback, Counting(), callback])
    handler = CallbackHandler([callback])
    with pytest.raises(ValueError, match="was added twice"):
        handler.add_callback(callback)
    assert handler.callbacks == [callback]


def test_equal_callbacks_are_not_the_same_object():
    class Equal(Named):
        __hash__ = None

        def __eq__(self, other):
            return True

    assert len(CallbackHandler([Equal(), Equal()]).callbacks) == 2


def test_clear_callbacks_removes_all_callbacks():
    log = []
    handler = CallbackHandler([Named("gone", log)])
    handler.call_event("on_train_epoch_start", None)
    handler.clear_callbacks()
    handler.call_event("on_train_epoch_start", None)
    assert log == ["gone"]
    assert handler.callback_list == []


def test_a_callback_added_later_gets_events_that_were_called_before():
    log = []
    handler = CallbackHandler([Named("early", log)])
    handler.call_event("on_train_epoch_start", None)
    handler.add_callback(Named("late", log))
    handler.call_event("on_train_epoch_start", None)
    assert log == ["early", "early", "late"]


def test_refresh_picks_up_direct_changes_of_the_list():
    log = []
    handler = CallbackHandler([Named("old", log)])
    handler.call_event("on_train_epoch_start", None)
    handler.callbacks[:] = [Named("new", log), Named("newer", log)]
    handler.refresh()
    handler.call_event("on_train_epoch_start", None)
    assert log == ["old", "new", "newer"]


def test_a_run_uses_the_callbacks_in_the_list_at_its_start():
    log = []
    trainer = make_trainer(callbacks=[Named("old", log)])
    train(trainer)
    trainer.callback_handler.callbacks.append(Named("new", log))
    train(trainer)
    assert log == ["old", "old", "new"]


# --- what counts as a callback -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "thing", [None, 3, "EarlyStopping", object(), lambda trainer: None, SimpleNamespace(x=1), dict]
)
def test_an_object_that_is_not_a_callback_is_rejected(thing):
    with pytest.raises(TypeError, match=r"is not a callback\. Expected a `TrainerCallback`"):
        CallbackHandler([thing])


def test_a_callback_class_that_needs_arguments_is_rejected():
    class Needy(TrainerCallback):
        def __init__(self, required):
            self.required = required

    with pytest.raises(
        TypeError, match=r"`Needy` cannot be instantiated without arguments.*required.*Pass an instance instead"
    ):
        CallbackHandler([Needy])


def test_any_object_with_an_event_method_is_a_callback():
    class Duck:
        epochs = 0

        def on_train_epoch_start(self, trainer, **kwargs):
            self.epochs += 1

    trainer = make_trainer(callbacks=[Duck])
    train(trainer, num_epochs=2)
    assert trainer.callback_handler.callbacks[0].epochs == 2


def make_callback_with(method):
    return type("Own", (TrainerCallback,), {method: lambda self, trainer, **kwargs: None})


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("on_train_epochs_end", "on_train_epoch_end"),
        ("on_training_epoch_end", "on_train_epoch_end"),
        ("on_trainstep_end", "on_train_step_end"),
        ("on_eval_epoch_ended", "on_eval_epoch_end"),
        ("on_exeption", "on_exception"),
        ("on_stop_training", "on_stop_training_error"),
    ],
)
def test_a_misspelled_event_warns_with_the_nearest_name(wrong, right):
    with pytest.warns(UserWarning, match=f"`Own.{wrong}` is not an event, .* Rename it to `{right}`") as caught:
        CallbackHandler([make_callback_with(wrong)])
    assert len(caught) == 1


@pytest.mark.parametrize("own", ["on_invoke_something", "on_batch_downloaded", "on_checkpoint", "train_epoch_ends"])
def test_unrelated_method_names_do_not_warn(own):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CallbackHandler([make_callback_with(own), Named, EventRecorder])


# --- events ------------------------------------------------------------------------------------------------------


def test_a_custom_event_reaches_the_callbacks_that_define_it():
    class Listener(TrainerCallback):
        def __init__(self):
            self.heard = []

        def on_invoke_something(self, trainer, *, volume):
            self.heard.append(volume)

    class Speaking(type(make_trainer())):
        def train_epoch_end(self):
            self.callback_handler.call_event("on_invoke_something", self, volume=11)

    listener = Listener()
    trainer = make_trainer(cls=Speaking, callbacks=[Named, listener, Counting])
    train(trainer, num_epochs=2)
    assert listener.heard == [11, 11]


def test_an_event_that_no_callback_defines_is_skipped():
    CallbackHandler([Named()]).call_event("on_nothing_at_all", None, anything=1)


def test_callbacks_that_do_not_override_an_event_are_not_its_listeners():
    class Plain(TrainerCallback):
        pass

    handler = CallbackHandler([Plain(), Named()])
    handler.call_event("on_train_epoch_start", None)
    handler.call_event("on_train_epoch_end", None)
    assert [len(handler._listeners[event]) for event in ("on_train_epoch_start", "on_train_epoch_end")] == [1, 0]
    assert handler.events_without_listeners == {"on_train_epoch_end"}
    handler.add_callback(Probe(on_train_epoch_end=lambda trainer, **kwargs: None))
    assert handler.events_without_listeners == set()


def test_callbacks_without_kwargs_receive_only_the_arguments_they_name():
    class Narrow(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_train_step_start(self, trainer):
            self.seen.append("start")

        def on_train_step_end(self, trainer, batch, batch_output):
            self.seen.append((len(batch), batch_output["batch_size"]))

        def on_eval_step_end(self, trainer, batch, batch_output, step):
            self.seen.append(step)

    narrow = Narrow()
    train(make_trainer(callbacks=[narrow]), eval_dataset=make_dataset(8))
    assert narrow.seen == ["start", (2, 4), "start", (2, 4), 0, 1]


def test_callbacks_with_kwargs_receive_all_arguments():
    seen = {}

    def on_train_step_end(trainer, **kwargs):
        seen.update(kwargs)

    train(make_trainer(callbacks=[Probe(on_train_step_end=on_train_step_end)]))
    assert seen.keys() == {"batch", "batch_output", "step"}
    assert seen["step"] == 1


# --- errors and stop requests ------------------------------------------------------------------------------------


class Broken(TrainerCallback):
    """Has a bug that shows in the second epoch."""

    def on_train_step_end(self, trainer, step, **kwargs):
        if trainer.run_history.current_epoch == 2 and step == 1:
            self.attribute_that_does_not_exist  # noqa: B018 - it is meant to fail


def test_an_attribute_error_in_a_callback_is_raised_with_a_note_of_callback_event_epoch_and_step():
    trainer = make_trainer(callbacks=[Named, Broken])
    with pytest.raises(AttributeError, match="attribute_that_does_not_exist") as caught:
        train(trainer, num_epochs=3)
    assert caught.value.__notes__ == ["raised by the callback `Broken` in `on_train_step_end`, epoch 2, step 1"]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyError("mine"), NotImplementedError("mine")])
def test_an_error_in_an_epoch_event_is_raised_with_a_note_of_callback_event_and_epoch(error):
    trainer = make_trainer(callbacks=[Probe(on_train_epoch_end=raiser(error))])
    with pytest.raises(type(error)) as caught:
        train(trainer)
    assert caught.value is error
    assert error.__notes__ == ["raised by the callback `Probe` in `on_train_epoch_end`, epoch 1"]


def test_an_error_outside_a_run_is_raised_with_a_note_of_callback_and_event():
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine"):
        CallbackHandler([Probe(on_train_epoch_end=raiser(error))]).call_event("on_train_epoch_end", None)
    assert error.__notes__ == ["raised by the callback `Probe` in `on_train_epoch_end`"]


def test_after_an_error_later_callbacks_do_not_receive_the_event():
    log = []
    handler = CallbackHandler([Probe(on_train_epoch_start=raiser(ValueError())), Named("later", log)])
    with pytest.raises(ValueError):  # noqa: PT011 - one without a message
        handler.call_event("on_train_epoch_start", None)
    assert log == []


def test_after_a_stop_request_later_callbacks_receive_the_event_and_the_first_request_is_raised():
    log = []
    handler = CallbackHandler(
        [
            Named("before", log),
            Probe(on_train_epoch_start=raiser(StopTrainingError("first"))),
            Named("between", log),
            Probe(on_train_epoch_start=raiser(StopTrainingError("second"))),
            Named("after", log),
        ]
    )
    with pytest.raises(StopTrainingError, match="first"):
        handler.call_event("on_train_epoch_start", None)
    assert log == ["before", "between", "after"]


def test_an_error_after_a_stop_request_is_raised_instead_of_it():
    events = [raiser(StopTrainingError("stop")), raiser(ValueError("error"))]
    handler = CallbackHandler([Probe(on_train_epoch_start=event) for event in events])
    with pytest.raises(ValueError, match="error"):
        handler.call_event("on_train_epoch_start", None)


def test_a_stop_request_ends_the_run_gracefully():
    """Later callbacks receive the event and the end-of-run events, the epoch counts, and `train` returns normally."""
    recorder = EventRecorder()
    stop = Probe(on_training_run_epoch_end=raiser(StopTrainingError("enough")))
    trainer = make_trainer(callbacks=[stop, recorder])
    train(trainer, num_epochs=3)
    assert recorder.log[-3:] == ["on_training_run_epoch_end", "on_stop_training_error", "on_training_run_end"]
    assert trainer.stop_reason == "enough"
    assert trainer.run_history.current_epoch == 2
    assert recorder.log.count("on_train_epoch_end") == 1


# --- states ------------------------------------------------------------------------------------------------------


def test_each_instance_of_a_callback_class_has_its_own_state():
    handler = CallbackHandler([Counting(1), Named(), Counting(2)])
    states = handler.state_dict()
    assert len(states) == 2
    other = CallbackHandler([Counting(), Named(), Counting()])
    other.load_state_dict(states)
    assert [callback.count for callback in other.callbacks if isinstance(callback, Counting)] == [1, 2]


def test_states_are_matched_to_callbacks_when_other_callbacks_are_added_or_removed():
    states = CallbackHandler([Counting(1), Counting(2)]).state_dict()
    fewer = CallbackHandler([Named(), Counting()])
    fewer.load_state_dict(states)
    assert fewer.callbacks[1].count == 1
    more = CallbackHandler([Counting(), Counting(), Counting(7)])
    more.load_state_dict(states)
    assert [callback.count for callback in more.callbacks] == [1, 2, 7]


def test_callbacks_without_state_dict_have_no_entry_in_the_state():
    handler = CallbackHandler([Named()])
    assert handler.state_dict() == {}
    handler.load_state_dict({})
