"""The callback that ends a run gracefully on a signal, and how such a run ends."""

from __future__ import annotations

import os
import signal
import threading
from functools import partial

import pytest

import _support
from _support import EventRecorder, Probe, make_dataset, make_model, make_trainer, raiser, run_python
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    ModelEmaCallback,
    PreemptionCallback,
    StepBasedEvaluationCallback,
    StopTrainingError,
)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def _handlers_stay():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    after = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


def sender(number, only_if=lambda trainer: True):
    """A reaction that sends a real signal to this process."""

    def react(trainer, **kwargs):
        if only_if(trainer):
            os.kill(os.getpid(), number)

    return react


train = partial(_support.train, dataset=12, num_epochs=2)  # three updates per epoch


def evaluated():
    """Two evaluation batches."""
    return {"eval_dataset": make_dataset(8, seed=5)}


def end_of(trainer, **kwargs):
    """Train, and return the exception that ended the run, if any."""
    try:
        train(trainer, **kwargs)
    except (KeyboardInterrupt, SystemExit) as end:
        return end
    return None


# --- how a run ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_lets_the_step_finish_and_ends_the_run_gracefully(number):
    model = make_model()
    recorder = EventRecorder(reactions={"on_backward_start": sender(number)})
    trainer = make_trainer(model, callbacks=[PreemptionCallback(), recorder])
    end = end_of(trainer, **evaluated())
    if number == signal.SIGINT:
        assert (type(end), str(end)) == (KeyboardInterrupt, "interrupted by Ctrl-C")
    else:
        assert (type(end), end.code) == (SystemExit, 128 + number)
        assert end.__notes__ == [f"interrupted by {number.name}"]
        assert trainer.stop_reason == f"interrupted by {number.name}"
    assert recorder.log[-4:] == [
        "on_optimizer_step_end",
        "on_train_step_end",
        "on_stop_training_error",
        "on_training_run_end",
    ]
    assert trainer.model is model
    assert trainer.progress.num_updates == 1
    assert trainer.is_interrupted


@pytest.mark.parametrize(
    ("event", "num_updates"),
    [
        ("on_training_run_start", 1),
        ("on_train_epoch_start", 1),
        ("on_train_step_start", 1),
        ("on_optimizer_step_end", 1),
        ("on_train_step_end", 1),
        ("on_train_epoch_end", 3),
        ("on_eval_epoch_start", 3),
        ("on_eval_step_end", 3),
        ("on_eval_epoch_end", 4),
        ("on_training_run_epoch_end", 4),
    ],
)
def test_a_signal_in_any_event_ends_the_run_after_at_most_one_more_step(event, num_updates):
    trainer = make_trainer(callbacks=[PreemptionCallback(), Probe(**{event: sender(signal.SIGTERM)})])
    assert end_of(trainer, **evaluated()).code == 128 + signal.SIGTERM
    assert trainer.progress.num_updates == num_updates
    assert trainer.is_interrupted
    assert trainer.stop_reason == "interrupted by SIGTERM"


@pytest.mark.parametrize("event", ["on_training_run_epoch_end", "on_training_run_end"])
def test_a_signal_after_the_last_step_takes_effect_when_the_run_has_ended(event):
    recorder = EventRecorder()
    trainer = make_trainer(callbacks=[PreemptionCallback(), Probe(**{event: sender(signal.SIGTERM)}), recorder])
    assert end_of(trainer, num_epochs=1).code == 128 + signal.SIGTERM
    assert "on_stop_training_error" not in recorder.log
    assert trainer.stop_reason == "1 epoch is done"
    assert trainer.is_interrupted


def test_a_signal_in_the_last_step_of_the_last_epoch_interrupts_the_run():
    last = sender(signal.SIGUSR1, only_if=lambda trainer: trainer.progress.num_updates == 6)
    recorder = EventRecorder(reactions={"on_train_step_end": last})
    trainer = make_trainer(callbacks=[PreemptionCallback(), recorder])
    assert end_of(trainer, **evaluated()).code == 128 + signal.SIGUSR1
    assert recorder.log[-2:] == ["on_stop_training_error", "on_training_run_end"]
    assert trainer.progress.num_batches_in_epoch == 3


def test_a_stop_by_a_callback_takes_precedence_and_the_signal_takes_effect_afterwards():
    reactions = [sender(signal.SIGTERM), raiser(StopTrainingError("enough"))]
    trainer = make_trainer(
        callbacks=[PreemptionCallback(), *(Probe(on_train_step_end=reaction) for reaction in reactions)]
    )
    assert end_of(trainer).code == 128 + signal.SIGTERM
    assert trainer.stop_reason == "enough"


def test_an_error_takes_precedence_over_a_signal():
    trainer = make_trainer(
        callbacks=[
            PreemptionCallback(),
            Probe(on_train_step_start=sender(signal.SIGTERM), on_train_step_end=raiser(LookupError("mine"))),
        ]
    )
    with pytest.raises(LookupError, match="mine"):
        train(trainer)
    assert not trainer.is_interrupted


def test_further_sigterms_have_no_effect_even_during_the_end_of_the_run():
    terminate = sender(signal.SIGTERM)
    events = ("on_train_step_start", "on_train_step_end", "on_stop_training_error", "on_training_run_end")
    recorder = EventRecorder(reactions=dict.fromkeys(events, terminate))
    trainer = make_trainer(callbacks=[PreemptionCallback(), recorder])
    assert end_of(trainer).code == 128 + signal.SIGTERM
    assert [event for event in recorder.log if event in events] == list(events)


@pytest.mark.parametrize("event", ["on_stop_training_error", "on_training_run_end"])
def test_a_second_ctrl_c_interrupts_even_the_end_of_the_run(event):
    press = sender(signal.SIGINT)
    recorder = EventRecorder(reactions={"on_train_step_start": press, event: press})
    trainer = make_trainer(callbacks=[recorder])
    assert isinstance(end_of(trainer), KeyboardInterrupt)
    assert recorder.log[-2:] == [event, "on_exception"]


# --- whether a run was interrupted -------------------------------------------------------------------------------


def test_is_interrupted_tells_callbacks_that_a_signal_ends_the_run():
    known = {}

    def look(trainer, event):
        known[event] = trainer.is_interrupted

    trainer = make_trainer(
        callbacks=[
            PreemptionCallback(),
            Probe(
                on_train_step_start=sender(signal.SIGTERM),
                on_train_step_end=lambda trainer, **kwargs: look(trainer, "step"),
                on_stop_training_error=lambda trainer, **kwargs: look(trainer, "stop"),
                on_training_run_end=lambda trainer, **kwargs: look(trainer, "end"),
            ),
        ]
    )
    assert not trainer.is_interrupted
    assert end_of(trainer) is not None
    assert known == {"step": False, "stop": True, "end": True}


def test_a_run_stopped_by_a_callback_is_not_interrupted():
    trainer = make_trainer(callbacks=[Probe(on_train_step_end=raiser(StopTrainingError("enough")))])
    train(trainer)
    assert (trainer.stop_reason, trainer.is_interrupted) == ("enough", False)


def test_a_nested_evaluation_does_not_change_that_the_run_was_interrupted():
    known = []

    def evaluate(trainer, **kwargs):
        trainer.evaluate(make_dataset(8))
        known.append((trainer.is_interrupted, trainer.stop_reason))

    probe = Probe(
        on_train_step_start=sender(signal.SIGTERM),
        on_evaluation_run_start=lambda trainer, **kwargs: known.append(trainer.is_interrupted),
        on_training_run_end=evaluate,
    )
    assert end_of(make_trainer(callbacks=[PreemptionCallback(), probe])).code == 128 + signal.SIGTERM
    assert known == [False, (True, "interrupted by SIGTERM")]


@pytest.mark.parametrize("next_run", ["train", "evaluate"])
def test_the_run_after_an_interrupted_one_is_not_interrupted(next_run):
    probe = Probe(on_train_step_start=sender(signal.SIGTERM))
    trainer = make_trainer(callbacks=[PreemptionCallback(), probe])
    assert end_of(trainer, **evaluated()) is not None
    trainer.callback_handler.callbacks.remove(probe)
    if next_run == "train":
        train(trainer)
    else:
        trainer.evaluate(make_dataset(8), per_device_batch_size=4)
    assert not trainer.is_interrupted


# --- which signals are handled, and for how long -----------------------------------------------------------------


def test_no_signal_handlers_are_installed_without_the_callback():
    seen = []
    before = [signal.getsignal(number) for number in SIGNALS[1:]]
    probe = Probe(on_train_step_end=lambda trainer, **kwargs: seen.append([signal.getsignal(n) for n in SIGNALS[1:]]))
    train(make_trainer(callbacks=[probe]), num_epochs=1)
    assert seen == [before] * 3


def test_handlers_are_installed_only_for_the_given_signals():
    before = signal.getsignal(signal.SIGTERM)
    seen = []
    look = Probe(on_train_step_end=lambda trainer, **kwargs: seen.append(signal.getsignal(signal.SIGTERM)))
    send = Probe(on_train_step_start=sender(signal.SIGUSR2))
    trainer = make_trainer(callbacks=[PreemptionCallback(signals=[signal.SIGUSR2]), look, send])
    assert end_of(trainer).code == 128 + signal.SIGUSR2
    assert seen == [before]


def test_a_signal_that_the_system_does_not_have_is_not_among_the_defaults():
    """Windows has no SIGUSR1. This program pretends to run on a system without it."""
    printed = run_python(
        """
import enum, signal
signal.Signals = enum.IntEnum("Signals", {"SIGINT": 2, "SIGTERM": 15})
from pytorch_accelerated.callbacks import PreemptionCallback
print([number.name for number in PreemptionCallback().signals])
""",
        has_imported_nothing=True,
    )
    assert printed == "['SIGTERM']\n"


def test_end_run_on_signals_outside_a_training_run_is_an_error():
    trainer = make_trainer(callbacks=[PreemptionCallback()])
    with pytest.raises(RuntimeError, match="`end_run_on_signals` was called while no training run is under way"):
        trainer.end_run_on_signals(signal.SIGTERM)
    train(trainer)
    with pytest.raises(RuntimeError, match="Call it in a callback's `on_training_run_start`"):
        trainer.end_run_on_signals(signal.SIGTERM)
    trainer.callback_handler.add_callback(
        Probe(on_evaluation_run_start=lambda trainer, **kwargs: trainer.end_run_on_signals(signal.SIGTERM))
    )
    with pytest.raises(RuntimeError, match="no training run is under way"):
        trainer.evaluate(make_dataset(8))


@pytest.mark.parametrize("run", ["evaluate", "predict"])
def test_ctrl_c_interrupts_evaluate_and_predict_immediately(run):
    class Interrupted(Trainer):
        def eval_epoch_start(self):
            super().eval_epoch_start()
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(self)

    reached = []
    trainer = make_trainer(cls=Interrupted, callbacks=[PreemptionCallback()])
    with pytest.raises(KeyboardInterrupt):
        getattr(trainer, run)(make_dataset(8))
    assert reached == []


def test_a_run_outside_the_main_thread_installs_no_handlers():
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []
    probe = Probe(on_train_step_end=lambda trainer, **kwargs: seen.append([signal.getsignal(n) for n in SIGNALS]))
    trainer = make_trainer(callbacks=[PreemptionCallback(), probe])
    thread = threading.Thread(target=train, args=(trainer,), kwargs={"num_epochs": 1})
    thread.start()
    thread.join(timeout=60)
    assert seen == [before] * 3
    assert trainer.stop_reason == "1 epoch is done"


# --- evaluation during training ----------------------------------------------------------------------------------


def test_a_nested_evaluation_keeps_the_signal_handlers():
    seen = []

    def evaluate(trainer, **kwargs):
        before = [signal.getsignal(number) for number in SIGNALS]
        trainer.evaluate(make_dataset(8), per_device_batch_size=4)
        seen.append([signal.getsignal(number) for number in SIGNALS] == before)
        os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(callbacks=[PreemptionCallback(), Probe(on_train_step_end=evaluate)])
    assert end_of(trainer).code == 128 + signal.SIGTERM
    assert seen == [True]


@pytest.mark.parametrize("event", ["on_eval_step_start", "on_eval_step_end"])
@pytest.mark.parametrize("how", ["evaluate", "hook", "intermediate", "ema"])
def test_an_evaluation_started_by_a_callback_or_hook_is_finished_before_the_run_ends(tmp_path, how, event):
    callbacks = [PreemptionCallback()]
    names = {"intermediate": "intermediate_eval_loss_epoch", "ema": "ema_model_eval_loss_epoch"}
    cls = Trainer
    probe = Probe(**{event: sender(signal.SIGTERM, only_if=lambda trainer: how != "ema")})
    if how == "evaluate":
        evaluate = Probe(on_train_step_end=lambda trainer, **kwargs: trainer.evaluate(make_dataset(8)))
        callbacks.append(evaluate)
    elif how == "hook":
        hook = {"train_epoch_end": lambda self: self.evaluate(make_dataset(8))}
        cls = type("Evaluating", (cls,), hook)
    elif how == "intermediate":
        callbacks.append(StepBasedEvaluationCallback(1))
    else:
        inner = [Probe(**{event: sender(signal.SIGTERM)})]
        callbacks.append(ModelEmaCallback(save_path=tmp_path / "ema.pt", callbacks=inner))
    recorder = EventRecorder()
    trainer = make_trainer(cls=cls, callbacks=[*callbacks, probe, recorder])
    assert end_of(trainer, **(evaluated() if how in names else {})).code == 128 + signal.SIGTERM
    assert len(trainer.run_history.get_metric_values(names.get(how, "evaluation_loss"))) == 1
    assert recorder.log.count("on_stop_training_error") == 1
    assert (tmp_path / "ema.pt").exists() == (how == "ema")


def test_an_interrupted_evaluation_does_not_count_for_early_stopping():
    probe = Probe(on_eval_step_start=sender(signal.SIGTERM))
    stopping = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = make_trainer(callbacks=[PreemptionCallback(), stopping, probe])
    assert end_of(trainer, **evaluated()).code == 128 + signal.SIGTERM
    assert stopping.state_dict() == {"best": None, "num_without_improvement": 0, "num_values_seen": 0}
    assert "eval_loss_epoch" not in trainer.run_history.get_metric_names()
