"""The whole sequence of hooks and events of each kind of run, as design section 4 draws it."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from torch.optim.lr_scheduler import ConstantLR

from _support import EventRecorder, HookRecorder, make_dataset, make_model, make_trainer, raiser
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


def record(reactions=None, callbacks=(), optimizer=True, model=None):
    """Make a trainer whose hooks and events go to one list."""
    log = []
    recorder = EventRecorder(log, reactions)
    trainer = make_trainer(model, cls=HookRecorder, callbacks=[recorder, *callbacks], log=log)
    if not optimizer:
        trainer.optimizer = None
    return trainer, log


def train(trainer, num_samples=8, evaluate=False, **kwargs):
    """Two batches of four samples per epoch, in training and in evaluation."""
    options = {"num_epochs": 1, "per_device_batch_size": 4, **kwargs}
    eval_dataset = make_dataset(8, seed=5) if evaluate else None
    trainer.train(make_dataset(num_samples), eval_dataset=eval_dataset, **options)


# --- whole runs --------------------------------------------------------------------------------------------------


def test_training_with_evaluation():
    trainer, log = record()
    train(trainer, evaluate=True, num_epochs=2, create_scheduler_fn=lambda optimizer: ConstantLR(optimizer, 1.0))
    epoch = [*EPOCH_START, *TRAIN_STEP, *TRAIN_STEP, *EPOCH_TRAINED, *EVAL_EPOCH, *EPOCH_END]
    assert log == [*RUN_START, *epoch, *epoch, *RUN_END]


def test_training_without_evaluation():
    trainer, log = record()
    train(trainer)
    assert log == [*RUN_START, *EPOCH_START, *TRAIN_STEP, *TRAIN_STEP, *EPOCH_TRAINED, *EPOCH_END, *RUN_END]


def test_accumulation_updates_at_the_end_of_each_window_and_of_the_epoch():
    trainer, log = record()
    train(trainer, num_samples=20, gradient_accumulation_steps=2)
    window = [*TRAIN_STEP_WITHOUT_UPDATE, *TRAIN_STEP]
    assert log == [*RUN_START, *EPOCH_START, *window, *window, *TRAIN_STEP, *EPOCH_TRAINED, *EPOCH_END, *RUN_END]


def test_evaluation_alone():
    trainer, log = record(optimizer=False)
    trainer.evaluate(make_dataset(8), per_device_batch_size=4)
    assert log == [
        "on_init_end",
        "evaluation_run_start",
        "on_evaluation_run_start",
        *EVAL_EPOCH,
        "evaluation_run_end",
        "on_evaluation_run_end",
    ]


def test_intermediate_evaluation():
    trainer, log = record(callbacks=[StepBasedEvaluationCallback(eval_every_n_steps=2)])
    train(trainer, num_samples=12, evaluate=True)
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


def test_each_evaluation_dataset_of_a_dictionary_has_an_epoch_of_its_own():
    trainer, log = record()
    datasets = {"a": make_dataset(8), "b": make_dataset(8)}
    trainer.train(make_dataset(4), num_epochs=1, eval_dataset=datasets, per_device_batch_size=4)
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


def test_the_limit_of_updates_ends_the_epoch_in_good_order():
    trainer, log = record()
    train(trainer, evaluate=True, num_epochs=3, max_num_train_steps=1)
    assert log == [*RUN_START, *EPOCH_START, *TRAIN_STEP, *EPOCH_TRAINED, *EVAL_EPOCH, *EPOCH_END, *RUN_END]


def test_events_tell_batch_output_and_step_and_whether_the_evaluation_is_intermediate():
    seen = []
    events = ("on_train_step_start", "on_backward_start", "on_train_step_end", "on_eval_step_start")
    events += ("on_eval_step_end", "on_eval_epoch_start", "on_eval_epoch_end")

    def remember(event):
        return lambda trainer, **kwargs: seen.append((event, sorted(kwargs), kwargs.get("step")))

    trainer, _ = record({event: remember(event) for event in events})
    trainer.train(make_dataset(8), num_epochs=1, eval_dataset=make_dataset(4), per_device_batch_size=4)
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


def test_all_callbacks_get_the_same_batch_output_object():
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
    train(make_trainer(callbacks=recorders), num_samples=4)
    assert len(outputs) == 4
    assert all(output is outputs[0] for output in outputs)


# --- stopping ----------------------------------------------------------------------------------------------------

FULL_EPOCH = [*RUN_START, *EPOCH_START, *TRAIN_STEP, *TRAIN_STEP, *EPOCH_TRAINED, *EVAL_EPOCH, *EPOCH_END]


def until(event, sequence=FULL_EPOCH):
    """The sequence up to and with the first such event."""
    return sequence[: sequence.index(event) + 1]


@pytest.mark.parametrize(
    ("event", "num_epochs_counted"),
    [
        ("on_training_run_start", 0),
        ("on_train_epoch_start", 0),
        ("on_train_step_start", 0),
        ("on_backward_start", 0),
        ("on_optimizer_step_start", 0),
        ("on_optimizer_step_end", 0),
        ("on_train_step_end", 0),
        ("on_train_epoch_end", 1),
        ("on_eval_epoch_start", 1),
        ("on_eval_step_start", 1),
        ("on_eval_step_end", 1),
        ("on_eval_epoch_end", 1),
        ("on_training_run_epoch_end", 1),
    ],
)
def test_a_stop_lets_later_callbacks_have_the_event_and_ends_the_run_in_good_order(event, num_epochs_counted):
    trainer, log = record({event: raiser(StopTrainingError("enough"))})
    later = EventRecorder(name="later ")
    trainer.callback_handler.add_callback(later)
    train(trainer, evaluate=True, num_epochs=3)
    assert log == [*until(event), *STOPPED]
    heard_by_later = [f"later {name}" for name in log if name.startswith("on_") and name != "on_init_end"]
    assert later.log == heard_by_later
    assert trainer.stop_reason == "enough"
    assert trainer.run_history.current_epoch == 1 + num_epochs_counted
    assert trainer.progress.num_epochs_completed == num_epochs_counted


def test_the_epoch_is_counted_before_the_event_of_the_stop():
    epochs = []
    reactions = {
        "on_training_run_epoch_end": raiser(StopTrainingError),
        "on_stop_training_error": lambda trainer, **kwargs: epochs.append(trainer.run_history.current_epoch),
    }
    trainer, _ = record(reactions)
    train(trainer)
    assert epochs == [2]
    assert trainer.stop_reason == "a callback asked to stop"


def test_a_stop_in_an_intermediate_evaluation_ends_the_run():
    trainer, log = record({"on_eval_step_end": raiser(StopTrainingError)}, [StepBasedEvaluationCallback(1)])
    train(trainer, evaluate=True)
    start_of_evaluation = EVAL_EPOCH[: EVAL_EPOCH.index("on_eval_step_end") + 1]
    assert log == [*RUN_START, *EPOCH_START, *TRAIN_STEP, *start_of_evaluation, *STOPPED]
    assert not trainer.is_intermediate_evaluation


@pytest.mark.parametrize("event", ["on_stop_training_error", "on_training_run_end"])
def test_a_stop_that_comes_when_the_run_ends_changes_nothing(event):
    trainer, log = record({"on_train_epoch_end": raiser(StopTrainingError), event: raiser(StopTrainingError)})
    train(trainer)
    assert log == [*until("on_train_epoch_end"), *STOPPED]


@pytest.mark.parametrize("hook", ["calculate_train_batch_loss", "train_epoch_end", "training_run_epoch_end"])
def test_a_stop_raised_by_a_hook_is_one_too(hook):
    def stop(self, *args):
        raise StopTrainingError("by the hook")

    log = []
    trainer = make_trainer(cls=type("Stopping", (Trainer,), {hook: stop}), callbacks=[EventRecorder(log)])
    train(trainer)
    assert log[-2:] == ["on_stop_training_error", "on_training_run_end"]
    assert trainer.stop_reason == "by the hook"


@pytest.mark.parametrize("hook", ["training_run_end", "evaluation_run_end"])
def test_a_stop_raised_by_the_last_hook_does_not_reach_the_caller(hook):
    def stop(self):
        raise StopTrainingError("too late")

    log = []
    trainer = make_trainer(cls=type("Stopping", (Trainer,), {hook: stop}), callbacks=[EventRecorder(log)])
    if hook == "training_run_end":
        train(trainer)
    else:
        trainer.evaluate(make_dataset(4))
    assert log[-1] == f"on_{hook}"


@pytest.mark.parametrize("event", ["on_evaluation_run_start", "on_eval_epoch_start", "on_eval_step_end"])
def test_a_stop_ends_an_evaluation_in_good_order(event):
    trainer, log = record({event: raiser(StopTrainingError("enough"))})
    trainer.evaluate(make_dataset(8), per_device_batch_size=4)
    whole = ["on_init_end", "evaluation_run_start", "on_evaluation_run_start", *EVAL_EPOCH]
    assert log == [*until(event, whole), "on_stop_training_error", "evaluation_run_end", "on_evaluation_run_end"]
    assert trainer.stop_reason == "enough"


def test_a_run_tells_why_it_ended():
    trainer, _ = record()
    assert trainer.stop_reason is None
    train(trainer, num_epochs=2)
    assert trainer.stop_reason == "2 epochs are done"
    train(trainer, num_epochs=2, max_num_train_steps=3)
    assert trainer.stop_reason == "3 updates are done (`max_num_train_steps`)"


# --- exceptions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["on_training_run_start", "on_backward_start", "on_eval_step_end"])
def test_an_exception_in_an_event_is_told_to_the_callbacks_and_goes_to_the_caller(event):
    error = AttributeError("a slip")
    told = []
    reactions = {event: raiser(error), "on_exception": lambda trainer, exception: told.append(exception)}
    model = make_model()
    trainer, log = record(reactions, model=model)
    with pytest.raises(AttributeError) as caught:
        train(trainer, evaluate=True)
    assert caught.value is error
    assert told == [error]
    assert log == [*until(event), "on_exception"]
    assert trainer.model is model
    assert trainer.stop_reason == "AttributeError: a slip"
    assert any(f"`EventRecorder` in `{event}`, epoch 1" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("hook", ["training_run_start", "calculate_train_batch_loss", "eval_epoch_end"])
def test_an_exception_in_a_hook_is_told_to_the_callbacks_and_goes_to_the_caller(hook):
    def fail(self, *args):
        raise LookupError("a slip")

    log = []
    model = make_model()
    trainer = make_trainer(model, cls=type("Failing", (Trainer,), {hook: fail}), callbacks=[EventRecorder(log)])
    with pytest.raises(LookupError, match="a slip"):
        train(trainer, evaluate=True)
    assert log[-1] == "on_exception"
    assert "on_training_run_end" not in log
    assert trainer.model is model


def test_an_exception_in_an_evaluation_is_told_to_the_callbacks():
    trainer, log = record({"on_eval_step_start": raiser(LookupError())})
    with pytest.raises(LookupError):
        trainer.evaluate(make_dataset(8))
    assert log[-2:] == ["on_eval_step_start", "on_exception"]


def test_an_exception_while_callbacks_are_told_of_one_does_not_hide_it():
    reactions = {"on_train_epoch_start": raiser(LookupError("first")), "on_exception": raiser(OSError("second"))}
    trainer, _ = record(reactions)
    with pytest.raises(LookupError, match="first") as caught:
        train(trainer)
    assert any("second" in note for note in caught.value.__notes__)


def test_a_session_goes_on_after_an_exception():
    trainer, log = record({"on_backward_start": raiser(LookupError())})
    with pytest.raises(LookupError):
        train(trainer)
    trainer.callback_handler.callbacks[0].reactions = {}
    log.clear()
    train(trainer)
    assert log == [*RUN_START[1:], *EPOCH_START, *TRAIN_STEP, *TRAIN_STEP, *EPOCH_TRAINED, *EPOCH_END, *RUN_END]


# --- Ctrl-C ------------------------------------------------------------------------------------------------------


def press_ctrl_c(times=1, if_epoch=1):
    """A reaction that sends real signals to this process."""

    def react(trainer, **kwargs):
        if trainer.run_history.current_epoch == if_epoch:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    return react


@pytest.fixture
def _own_handler():
    """Pytest's own handler is the default one; a test must not leave another."""
    before = signal.getsignal(signal.SIGINT)
    yield
    left = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert left is before


@pytest.mark.usefixtures("_own_handler")
def test_ctrl_c_finishes_the_step_and_ends_the_run_in_good_order():
    model = make_model()
    trainer, log = record({"on_backward_start": press_ctrl_c()}, model=model)
    with pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
        train(trainer, evaluate=True, num_epochs=3)
    assert log == [*RUN_START, *EPOCH_START, *TRAIN_STEP, *STOPPED]
    assert trainer.model is model
    assert trainer.progress.num_updates == 1
    assert trainer.stop_reason == "interrupted by Ctrl-C"


@pytest.mark.usefixtures("_own_handler")
def test_ctrl_c_within_an_accumulation_window_finishes_the_micro_batch():
    trainer, log = record({"on_backward_start": press_ctrl_c()})
    with pytest.raises(KeyboardInterrupt):
        train(trainer, gradient_accumulation_steps=2)
    assert log == [*RUN_START, *EPOCH_START, *TRAIN_STEP_WITHOUT_UPDATE, *STOPPED]


@pytest.mark.usefixtures("_own_handler")
def test_ctrl_c_during_evaluation_finishes_its_step():
    trainer, log = record({"on_eval_step_start": press_ctrl_c()})
    with pytest.raises(KeyboardInterrupt):
        train(trainer, evaluate=True, num_epochs=2)
    assert log == [*until("on_eval_step_end"), *STOPPED]
    assert trainer.run_history.current_epoch == 2


@pytest.mark.usefixtures("_own_handler")
def test_ctrl_c_after_the_last_step_is_still_raised_to_the_caller():
    trainer, log = record({"on_training_run_epoch_end": press_ctrl_c()})
    with pytest.raises(KeyboardInterrupt):
        train(trainer)
    assert log == [*RUN_START, *EPOCH_START, *TRAIN_STEP, *TRAIN_STEP, *EPOCH_TRAINED, *EPOCH_END, *RUN_END]


@pytest.mark.usefixtures("_own_handler")
def test_a_second_ctrl_c_interrupts_at_once():
    model = make_model()
    trainer, log = record({"on_backward_start": press_ctrl_c(times=2)}, model=model)
    with pytest.raises(KeyboardInterrupt):
        train(trainer)
    assert log == [*RUN_START, *EPOCH_START, *FORWARD_AND_BACKWARD[:-1], "on_exception"]
    assert trainer.model is model


@pytest.mark.usefixtures("_own_handler")
@pytest.mark.parametrize("times", [1, 2])
def test_a_session_goes_on_after_ctrl_c(times):
    trainer, log = record({"on_backward_start": press_ctrl_c(times)})
    with pytest.raises(KeyboardInterrupt):
        train(trainer)
    trainer.callback_handler.callbacks[0].reactions = {}
    log.clear()
    trainer.evaluate(make_dataset(8), per_device_batch_size=4)
    start, end = ["evaluation_run_start", "on_evaluation_run_start"], ["evaluation_run_end", "on_evaluation_run_end"]
    assert log == [*start, *EVAL_EPOCH, *end]
    log.clear()
    train(trainer)
    assert log == [*RUN_START[1:], *EPOCH_START, *TRAIN_STEP, *TRAIN_STEP, *EPOCH_TRAINED, *EPOCH_END, *RUN_END]


@pytest.mark.usefixtures("_own_handler")
def test_a_handler_of_the_program_is_called_and_put_back():
    pressed = []

    def handler(number, frame):
        pressed.append(number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        trainer, _ = record({"on_backward_start": press_ctrl_c()})
        with pytest.raises(KeyboardInterrupt):
            train(trainer)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed == [signal.SIGINT]


@pytest.mark.usefixtures("_own_handler")
def test_a_run_in_another_thread_installs_no_handler():
    handlers = []
    trainer, log = record({"on_backward_start": lambda trainer, **kwargs: handlers.append(signal.getsignal(2))})
    thread = threading.Thread(target=train, args=(trainer,))
    thread.start()
    thread.join(timeout=60)
    assert handlers == [signal.getsignal(signal.SIGINT)] * 2
    assert log[-1] == "on_training_run_end"
