"""The complete sequence of hooks and events of each kind of run; programs rely on it."""

from __future__ import annotations

import math
import os
import signal
import threading

import pytest
from torch.optim.lr_scheduler import ConstantLR

from _support import EventRecorder, HookRecorder, Probe, make_dataset, make_model, make_trainer, raiser, train
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import StepBasedEvaluationCallback
from pytorch_accelerated.exceptions import StopTrainingError

FORWARD_AND_BACKWARD = ["on_train_step_start", "calculate_train_batch_loss", "on_backward_start", "backward_step"]
UPDATE = [
    "on_optimizer_step_start",
    "optimizer_step",
    "scheduler_step",
    "on_optimizer_step_end",
    "optimizer_zero_grad",
]
TRAIN_STEP = [*FORWARD_AND_BACKWARD, *UPDATE, "on_train_step_end"]
TRAIN_STEP_WITHOUT_UPDATE = [*FORWARD_AND_BACKWARD, "on_train_step_end"]
EVAL_STEP = ["on_eval_step_start", "calculate_eval_batch_loss", "on_eval_step_end"]
EVAL_EPOCH = [
    "eval_epoch_start",
    "on_eval_epoch_start",
    *EVAL_STEP,
    *EVAL_STEP,
    "eval_epoch_end",
    "on_eval_epoch_end",
]
RUN_START = ["on_init_end", "training_run_start", "on_training_run_start"]
EPOCH_START = ["train_epoch_start", "on_train_epoch_start"]
EPOCH_TRAINED = ["train_epoch_end", "on_train_epoch_end"]
EPOCH_END = ["training_run_epoch_end", "on_training_run_epoch_end"]
RUN_END = ["training_run_end", "on_training_run_end"]
STOPPED = ["on_stop_training_error", *RUN_END]


TWO_BATCHES = make_dataset(8)
"""A dataset that yields two batches of four samples, in training and in evaluation."""


def record(reactions=None, callbacks=(), model=None):
    """Create a trainer whose hooks and events are recorded in one list, and return both."""
    log = []
    recorder = EventRecorder(log, reactions)
    trainer = make_trainer(model, cls=HookRecorder, callbacks=[recorder, *callbacks], log=log)
    trainer.scheduler = ConstantLR(trainer.optimizer, 1.0)
    return trainer, log


# --- runs without incident ---------------------------------------------------------------------------------------


def test_the_events_of_training_with_evaluation():
    trainer, log = record()
    train(
        trainer,
        TWO_BATCHES,
        eval_dataset=TWO_BATCHES,
        num_epochs=2,
        create_scheduler_fn=lambda optimizer: ConstantLR(optimizer, 1.0),
    )
    epoch = [*EPOCH_START, *TRAIN_STEP, *TRAIN_STEP, *EPOCH_TRAINED, *EVAL_EPOCH, *EPOCH_END]
    assert log == [*RUN_START, *epoch, *epoch, *RUN_END]


def test_the_events_of_training_without_a_scheduler():
    trainer, log = record()
    trainer.scheduler = None
    train(trainer, TWO_BATCHES)
    step = [each for each in TRAIN_STEP if each != "scheduler_step"]
    assert log == [*RUN_START, *EPOCH_START, *step, *step, *EPOCH_TRAINED, *EPOCH_END, *RUN_END]


def test_the_events_of_training_without_evaluation():
    trainer, log = record()
    train(trainer, TWO_BATCHES)
    assert log == [*RUN_START, *EPOCH_START, *TRAIN_STEP, *TRAIN_STEP, *EPOCH_TRAINED, *EPOCH_END, *RUN_END]


def test_with_accumulation_updates_come_at_the_end_of_each_window_and_of_the_epoch():
    trainer, log = record()
    train(trainer, 20, gradient_accumulation_steps=2)
    window = [*TRAIN_STEP_WITHOUT_UPDATE, *TRAIN_STEP]
    assert log == [*RUN_START, *EPOCH_START, *window, *window, *TRAIN_STEP, *EPOCH_TRAINED, *EPOCH_END, *RUN_END]


def test_the_events_of_evaluate():
    trainer, log = record()
    trainer.optimizer = None
    trainer.evaluate(TWO_BATCHES, per_device_batch_size=4)
    assert log == [
        "on_init_end",
        "evaluation_run_start",
        "on_evaluation_run_start",
        *EVAL_EPOCH,
        "evaluation_run_end",
        "on_evaluation_run_end",
    ]


def test_the_events_of_an_intermediate_evaluation():
    trainer, log = record(callbacks=[StepBasedEvaluationCallback(eval_every_n_steps=2)])
    train(trainer, 12, eval_dataset=TWO_BATCHES)
    assert log == [
        *RUN_START,
        *EPOCH_START,
        *TRAIN_STEP,
        *TRAIN_STEP,
        *EVAL_EPOCH,
        *TRAIN_STEP,
        *EPOCH_TRAINED,
        *EVAL_EPOCH,
        *EPOCH_END,
        *RUN_END,
    ]


def test_each_evaluation_dataset_of_a_dictionary_has_a_separate_evaluation_epoch():
    trainer, log = record()
    train(trainer, 4, eval_dataset={"a": TWO_BATCHES, "b": TWO_BATCHES})
    assert log == [
        *RUN_START,
        *EPOCH_START,
        *TRAIN_STEP,
        *EPOCH_TRAINED,
        *EVAL_EPOCH,
        *EVAL_EPOCH,
        *EPOCH_END,
        *RUN_END,
    ]


def test_max_num_train_steps_ends_epoch_and_run_gracefully():
    trainer, log = record()
    train(trainer, TWO_BATCHES, eval_dataset=TWO_BATCHES, num_epochs=3, max_num_train_steps=1)
    assert log == [*RUN_START, *EPOCH_START, *TRAIN_STEP, *EPOCH_TRAINED, *EVAL_EPOCH, *EPOCH_END, *RUN_END]


def test_events_have_the_arguments_batch_batch_output_step_and_is_intermediate():
    seen = []
    events = ("on_train_step_start", "on_backward_start", "on_train_step_end", "on_eval_step_start")
    events += ("on_eval_step_end", "on_eval_epoch_start", "on_eval_epoch_end")

    def remember(event):
        return lambda trainer, **kwargs: seen.append((event, sorted(kwargs), kwargs.get("step")))

    trainer, _ = record({event: remember(event) for event in events})
    train(trainer, TWO_BATCHES, eval_dataset=make_dataset(4))
    output = ["batch", "batch_output", "step"]
    step = [("on_train_step_start", ["batch", "step"]), ("on_backward_start", output), ("on_train_step_end", output)]
    assert seen == [
        *((event, names, 0) for event, names in step),
        *((event, names, 1) for event, names in step),
        ("on_eval_epoch_start", ["is_intermediate"], None),
        ("on_eval_step_start", ["batch", "step"], 0),
        ("on_eval_step_end", output, 0),
        ("on_eval_epoch_end", ["is_intermediate"], None),
    ]


def test_all_callbacks_and_events_of_a_step_get_the_same_batch_output_object():
    outputs = []
    recorders = [
        EventRecorder(
            reactions={
                "on_backward_start": lambda trainer, batch_output, **kwargs: outputs.append(batch_output),
                "on_train_step_end": lambda trainer, batch_output, **kwargs: outputs.append(batch_output),
            }
        )
        for _ in range(2)
    ]
    train(make_trainer(callbacks=recorders), 4)
    assert len(outputs) == 4
    assert all(output is outputs[0] for output in outputs)


# --- stopping ----------------------------------------------------------------------------------------------------

FULL_EPOCH = [*RUN_START, *EPOCH_START, *TRAIN_STEP, *TRAIN_STEP, *EPOCH_TRAINED, *EVAL_EPOCH, *EPOCH_END]


def until(event, sequence=FULL_EPOCH):
    """Return the sequence up to and including the first such event."""
    return sequence[: sequence.index(event) + 1]


@pytest.mark.parametrize(
    ("event", "num_epochs_counted"),
    [
        ("on_training_run_start", 0),
        ("on_train_epoch_start", 1),
        ("on_train_step_start", 1),
        ("on_backward_start", 1),
        ("on_optimizer_step_start", 1),
        ("on_optimizer_step_end", 1),
        ("on_train_step_end", 1),
        ("on_train_epoch_end", 1),
        ("on_eval_epoch_start", 1),
        ("on_eval_step_start", 1),
        ("on_eval_step_end", 1),
        ("on_eval_epoch_end", 1),
        ("on_training_run_epoch_end", 1),
    ],
)
def test_a_stop_is_followed_by_the_event_for_later_callbacks_and_the_end_of_the_run(event, num_epochs_counted):
    trainer, log = record({event: raiser(StopTrainingError("enough"))})
    later = EventRecorder(name="later ")
    trainer.callback_handler.add_callback(later)
    train(trainer, TWO_BATCHES, eval_dataset=TWO_BATCHES, num_epochs=3)
    assert log == [*until(event), *STOPPED]
    expected_for_later = [f"later {name}" for name in log if name.startswith("on_") and name != "on_init_end"]
    assert later.log == expected_for_later
    assert trainer.stop_reason == "enough"
    assert trainer.run_history.current_epoch == 1 + num_epochs_counted
    assert trainer.progress.num_epochs_completed == num_epochs_counted


def test_an_epoch_is_counted_before_on_stop_training_error():
    epochs = []
    reactions = {
        "on_training_run_epoch_end": raiser(StopTrainingError),
        "on_stop_training_error": lambda trainer, **kwargs: epochs.append(trainer.run_history.current_epoch),
    }
    trainer, _ = record(reactions)
    train(trainer, TWO_BATCHES)
    assert epochs == [2]
    assert trainer.stop_reason == "a callback asked to stop"


BEFORE_TRAINING = ("on_train_epoch_start", "on_train_step_start", "on_backward_start")


@pytest.mark.parametrize("occurrence", [1, 2])
@pytest.mark.parametrize(
    "event",
    [
        *(*BEFORE_TRAINING, "on_optimizer_step_start", "on_optimizer_step_end"),
        *("on_train_step_end", "on_train_epoch_end", "on_eval_step_start", "on_eval_epoch_end"),
    ],
)
def test_what_was_trained_before_a_stop_is_recorded_and_its_epoch_counted(event, occurrence):
    trained = []

    class Recording(Trainer):
        def backward_step(self, loss):
            super().backward_step(loss)
            trained.append(loss.item())

    def stop(trainer, **kwargs):
        nonlocal occurrence
        occurrence -= 1
        if occurrence == 0:
            raise StopTrainingError("enough")

    trainer = make_trainer(callbacks=[Probe(**{event: stop})], cls=Recording)
    train(trainer, TWO_BATCHES, num_epochs=3, eval_dataset=TWO_BATCHES)
    epochs = [trained[start : start + 2] for start in range(0, len(trained), 2)]
    means = [sum(epoch) / len(epoch) for epoch in epochs]
    recorded = [value for value in trainer.run_history.get_metric_values("train_loss_epoch") if not math.isnan(value)]
    assert recorded == pytest.approx(means)
    is_before_training = len(trained) % 2 == 0 and event in BEFORE_TRAINING
    assert trainer.run_history.current_epoch == 1 + len(epochs) + is_before_training


def test_a_stop_in_an_intermediate_evaluation_ends_the_training_run():
    trainer, log = record({"on_eval_step_end": raiser(StopTrainingError)}, [StepBasedEvaluationCallback(1)])
    train(trainer, TWO_BATCHES, eval_dataset=TWO_BATCHES)
    start_of_evaluation = EVAL_EPOCH[: EVAL_EPOCH.index("on_eval_step_end") + 1]
    assert log == [*RUN_START, *EPOCH_START, *TRAIN_STEP, *start_of_evaluation, *STOPPED]
    assert not trainer.is_intermediate_evaluation


@pytest.mark.parametrize("event", ["on_stop_training_error", "on_training_run_end"])
def test_a_second_stop_while_the_run_ends_changes_nothing(event):
    trainer, log = record({"on_train_epoch_end": raiser(StopTrainingError), event: raiser(StopTrainingError)})
    train(trainer, TWO_BATCHES)
    assert log == [*until("on_train_epoch_end"), *STOPPED]


@pytest.mark.parametrize("hook", ["calculate_train_batch_loss", "train_epoch_end", "training_run_epoch_end"])
def test_a_stop_raised_by_a_hook_ends_the_run(hook):
    def stop(self, *args):
        raise StopTrainingError("by the hook")

    log = []
    trainer = make_trainer(cls=type("Stopping", (Trainer,), {hook: stop}), callbacks=[EventRecorder(log)])
    train(trainer, TWO_BATCHES)
    assert log[-2:] == ["on_stop_training_error", "on_training_run_end"]
    assert trainer.stop_reason == "by the hook"


@pytest.mark.parametrize("hook", ["training_run_end", "evaluation_run_end"])
def test_a_stop_raised_by_the_last_hook_does_not_reach_the_caller(hook):
    def stop(self):
        raise StopTrainingError("too late")

    log = []
    trainer = make_trainer(cls=type("Stopping", (Trainer,), {hook: stop}), callbacks=[EventRecorder(log)])
    if hook == "training_run_end":
        train(trainer, TWO_BATCHES)
    else:
        trainer.evaluate(make_dataset(4))
    assert log[-1] == f"on_{hook}"


@pytest.mark.parametrize("event", ["on_evaluation_run_start", "on_eval_epoch_start", "on_eval_step_end"])
def test_a_stop_ends_evaluate_gracefully(event):
    trainer, log = record({event: raiser(StopTrainingError("enough"))})
    trainer.evaluate(TWO_BATCHES, per_device_batch_size=4)
    complete = ["on_init_end", "evaluation_run_start", "on_evaluation_run_start", *EVAL_EPOCH]
    assert log == [*until(event, complete), "on_stop_training_error", "evaluation_run_end", "on_evaluation_run_end"]
    assert trainer.stop_reason == "enough"


def test_stop_reason_says_why_a_run_ended():
    trainer, _ = record()
    assert trainer.stop_reason is None
    train(trainer, TWO_BATCHES, num_epochs=2)
    assert trainer.stop_reason == "2 epochs are done"
    train(trainer, TWO_BATCHES, num_epochs=2, max_num_train_steps=3)
    assert trainer.stop_reason == "3 updates are done (`max_num_train_steps`)"


# --- exceptions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["on_training_run_start", "on_backward_start", "on_eval_step_end"])
def test_an_exception_in_a_callback_is_reported_to_all_callbacks_and_raised_to_the_caller(event):
    error = AttributeError("a slip")
    reported = []
    reactions = {event: raiser(error), "on_exception": lambda trainer, exception: reported.append(exception)}
    model = make_model()
    trainer, log = record(reactions, model=model)
    with pytest.raises(AttributeError) as caught:
        train(trainer, TWO_BATCHES, eval_dataset=TWO_BATCHES)
    assert caught.value is error
    assert reported == [error]
    assert log == [*until(event), "on_exception"]
    assert trainer.model is model
    assert trainer.stop_reason == "AttributeError: a slip"
    assert any(f"`EventRecorder` in `{event}`, epoch 1" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("hook", ["training_run_start", "calculate_train_batch_loss", "eval_epoch_end"])
def test_an_exception_in_a_hook_is_reported_to_the_callbacks_and_raised_to_the_caller(hook):
    def fail(self, *args):
        raise LookupError("a slip")

    log = []
    model = make_model()
    trainer = make_trainer(model, cls=type("Failing", (Trainer,), {hook: fail}), callbacks=[EventRecorder(log)])
    with pytest.raises(LookupError, match="a slip"):
        train(trainer, TWO_BATCHES, eval_dataset=TWO_BATCHES)
    assert log[-1] == "on_exception"
    assert "on_training_run_end" not in log
    assert trainer.model is model


def test_an_exception_in_evaluate_is_reported_to_the_callbacks():
    trainer, log = record({"on_eval_step_start": raiser(LookupError())})
    with pytest.raises(LookupError):
        trainer.evaluate(TWO_BATCHES)
    assert log[-2:] == ["on_eval_step_start", "on_exception"]


def test_an_exception_in_on_exception_does_not_hide_the_first_one():
    reactions = {"on_train_epoch_start": raiser(LookupError("first")), "on_exception": raiser(OSError("second"))}
    trainer, _ = record(reactions)
    with pytest.raises(LookupError, match="first") as caught:
        train(trainer, TWO_BATCHES)
    assert any("second" in note for note in caught.value.__notes__)


def test_a_trainer_can_train_again_after_an_exception():
    trainer, log = record({"on_backward_start": raiser(LookupError())})
    with pytest.raises(LookupError):
        train(trainer, TWO_BATCHES)
    trainer.callback_handler.callbacks[0].reactions = {}
    log.clear()
    train(trainer, TWO_BATCHES)
    assert log == [*RUN_START[1:], *EPOCH_START, *TRAIN_STEP, *TRAIN_STEP, *EPOCH_TRAINED, *EPOCH_END, *RUN_END]


# --- Ctrl-C ------------------------------------------------------------------------------------------------------


def press_ctrl_c(times=1, if_epoch=1):
    """Return a reaction that sends real signals to this process in the given epoch."""

    def react(trainer, **kwargs):
        if trainer.run_history.current_epoch == if_epoch:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    return react


@pytest.mark.usefixtures("_handlers_are_restored")
def test_ctrl_c_finishes_the_step_and_ends_the_run_gracefully():
    model = make_model()
    trainer, log = record({"on_backward_start": press_ctrl_c()}, model=model)
    with pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
        train(trainer, TWO_BATCHES, eval_dataset=TWO_BATCHES, num_epochs=3)
    assert log == [*RUN_START, *EPOCH_START, *TRAIN_STEP, *STOPPED]
    assert trainer.model is model
    assert trainer.progress.num_updates == 1
    assert trainer.stop_reason == "interrupted by Ctrl-C"


@pytest.mark.usefixtures("_handlers_are_restored")
def test_ctrl_c_within_an_accumulation_window_finishes_the_batch_without_an_update():
    trainer, log = record({"on_backward_start": press_ctrl_c()})
    with pytest.raises(KeyboardInterrupt):
        train(trainer, TWO_BATCHES, gradient_accumulation_steps=2)
    assert log == [*RUN_START, *EPOCH_START, *TRAIN_STEP_WITHOUT_UPDATE, *STOPPED]


@pytest.mark.usefixtures("_handlers_are_restored")
def test_ctrl_c_during_an_evaluation_finishes_the_evaluation_step():
    trainer, log = record({"on_eval_step_start": press_ctrl_c()})
    with pytest.raises(KeyboardInterrupt):
        train(trainer, TWO_BATCHES, eval_dataset=TWO_BATCHES, num_epochs=2)
    assert log == [*until("on_eval_step_end"), *STOPPED]
    assert trainer.run_history.current_epoch == 2


@pytest.mark.usefixtures("_handlers_are_restored")
def test_ctrl_c_after_the_last_step_is_raised_to_the_caller_at_the_end():
    trainer, log = record({"on_training_run_epoch_end": press_ctrl_c()})
    with pytest.raises(KeyboardInterrupt):
        train(trainer, TWO_BATCHES)
    assert log == [*RUN_START, *EPOCH_START, *TRAIN_STEP, *TRAIN_STEP, *EPOCH_TRAINED, *EPOCH_END, *RUN_END]


@pytest.mark.usefixtures("_handlers_are_restored")
def test_a_second_ctrl_c_interrupts_immediately():
    model = make_model()
    trainer, log = record({"on_backward_start": press_ctrl_c(times=2)}, model=model)
    with pytest.raises(KeyboardInterrupt):
        train(trainer, TWO_BATCHES)
    assert log == [*RUN_START, *EPOCH_START, *FORWARD_AND_BACKWARD[:-1], "on_exception"]
    assert trainer.model is model


@pytest.mark.usefixtures("_handlers_are_restored")
@pytest.mark.parametrize("times", [1, 2])
def test_a_trainer_can_evaluate_and_train_again_after_ctrl_c(times):
    trainer, log = record({"on_backward_start": press_ctrl_c(times)})
    with pytest.raises(KeyboardInterrupt):
        train(trainer, TWO_BATCHES)
    trainer.callback_handler.callbacks[0].reactions = {}
    log.clear()
    trainer.evaluate(TWO_BATCHES, per_device_batch_size=4)
    start, end = ["evaluation_run_start", "on_evaluation_run_start"], ["evaluation_run_end", "on_evaluation_run_end"]
    assert log == [*start, *EVAL_EPOCH, *end]
    log.clear()
    train(trainer, TWO_BATCHES)
    assert log == [*RUN_START[1:], *EPOCH_START, *TRAIN_STEP, *TRAIN_STEP, *EPOCH_TRAINED, *EPOCH_END, *RUN_END]


@pytest.mark.usefixtures("_handlers_are_restored")
def test_a_handler_of_the_program_is_called_and_restored():
    pressed = []

    def handler(number, frame):
        pressed.append(number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        trainer, _ = record({"on_backward_start": press_ctrl_c()})
        with pytest.raises(KeyboardInterrupt):
            train(trainer, TWO_BATCHES)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed == [signal.SIGINT]


@pytest.mark.usefixtures("_handlers_are_restored")
def test_a_run_in_another_thread_installs_no_handler():
    handlers = []
    trainer, log = record({"on_backward_start": lambda trainer, **kwargs: handlers.append(signal.getsignal(2))})
    thread = threading.Thread(target=train, args=(trainer, TWO_BATCHES))
    thread.start()
    thread.join(timeout=60)
    assert handlers == [signal.getsignal(signal.SIGINT)] * 2
    assert log[-1] == "on_training_run_end"
