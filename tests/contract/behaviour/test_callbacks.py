"""What programs written for 0.1.61 observe of callbacks and of what a run prints: sections 7 and 8."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
import tqdm as tqdm_package

from _screens import use_terminal
from _support import Probe, make_dataset, make_trainer, raiser, recorder_of, train
from pytorch_accelerated import Trainer, callbacks
from pytorch_accelerated._recording import loss_monitor
from pytorch_accelerated.callbacks import (
    CallbackHandler,
    EarlyStoppingCallback,
    LimitEvalStepsCallback,
    LogMetricsCallback,
    ModelEmaCallback,
    PrintProgressCallback,
    ProgressBarCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    StopTrainingError,
    TrainerCallback,
)
from pytorch_accelerated.tracking import InMemoryRunHistory
from pytorch_accelerated.trainer import DEFAULT_CALLBACKS

SHIPPED = [
    member
    for _, member in sorted(vars(callbacks).items())
    if inspect.isclass(member) and issubclass(member, TrainerCallback)
]


class Rows(LogMetricsCallback):
    """Collects the names of what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, trainer, metrics):
        self.rows.extend(metrics)


def lines_of(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line]


# --- 7: base and handler -----------------------------------------------------------------------------------------


def test_the_handler_lists_the_class_names_of_its_callbacks():
    """Row 7.1: a list of names, in order."""
    trainer = make_trainer(callbacks=[PrintProgressCallback, LogMetricsCallback()])
    assert trainer.callback_handler.callback_list == ["PrintProgressCallback", "LogMetricsCallback"]
    trainer.callback_handler.clear_callbacks()
    assert trainer.callback_handler.callback_list == []


def test_iterating_over_the_handler_yields_the_callbacks_in_order():
    """Row 7.2."""
    first, second = PrintProgressCallback(), LogMetricsCallback()
    handler = CallbackHandler([first, second])
    assert list(handler) == [first, second]
    assert [callback for callback in handler if isinstance(callback, LogMetricsCallback)] == [second]


@pytest.mark.parametrize("cls", SHIPPED, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    "event", ["on_train_step_start", "on_backward_start", "on_train_step_end", "on_eval_step_start", "on_eval_step_end"]
)
def test_events_of_steps_of_shipped_callbacks_need_only_the_trainer(cls, event):
    """Row 7.3: subclasses call ``super().on_train_step_end(trainer, step=step)``."""
    inspect.signature(getattr(cls, event)).bind(object(), object())
    inspect.signature(getattr(cls, event)).bind(object(), object(), step=3)


def passing_on_step_only(base):
    class PassingOn(base):
        num_calls = 0

        def on_train_step_end(self, trainer, step, **kwargs):
            self.num_calls += 1
            super().on_train_step_end(trainer, step=step)

        def on_eval_step_end(self, trainer, step, **kwargs):
            super().on_eval_step_end(trainer, step=step)

    return PassingOn


def test_a_subclass_that_passes_on_the_step_only_saves_and_evaluates(tmp_path):
    """Row 7.3: in `SaveTrainingStateCallback` and `StepBasedEvaluationCallback`."""
    save = passing_on_step_only(SaveTrainingStateCallback)(tmp_path, save_every_n_steps=2, save_at_end=False)
    evaluate = passing_on_step_only(StepBasedEvaluationCallback)(2)
    trainer = train(make_trainer(callbacks=[save, evaluate]), eval_dataset=make_dataset(4))
    assert save.num_calls == 4
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["step_2", "step_4"]
    assert len(trainer.run_history.get_metric_values("intermediate_eval_loss_epoch")) == 2


@pytest.mark.parametrize(
    "make",
    [
        passing_on_step_only(ProgressBarCallback),
        passing_on_step_only(callbacks.TerminateOnNaNCallback),
        lambda: passing_on_step_only(ModelEmaCallback)(evaluate_during_training=False),
        passing_on_step_only(TrainerCallback),
    ],
)
def test_a_subclass_of_a_callback_without_the_event_can_pass_on_the_step_only(make, tmp_path, monkeypatch):
    """Row 7.3: the base class has the same defaults."""
    monkeypatch.chdir(tmp_path)
    callback = make()
    train(make_trainer(callbacks=[callback]), eval_dataset=make_dataset(4))
    assert callback.num_calls == 4


def test_two_callbacks_of_one_class_both_get_events():
    """Row 7.4: ours."""
    first, starts = recorder_of(lambda trainer: 1, "on_train_epoch_start")
    second, more_starts = recorder_of(lambda trainer: 2, "on_train_epoch_start")
    train(make_trainer(callbacks=[first, second]))
    assert (starts, more_starts) == ([1], [2])


def test_steps_have_their_index_and_callbacks_that_do_not_name_it_are_called_without():
    """Row 7.5: ours."""
    wide, narrow = [], []

    class Wide(TrainerCallback):
        def on_train_step_start(self, trainer, *, step, **kwargs):
            wide.append(step)

    class Narrow(TrainerCallback):
        def on_train_step_start(self, trainer, batch):
            narrow.append(len(batch[0]))

    train(make_trainer(callbacks=[Wide, Narrow]))
    assert (wide, narrow) == ([0, 1, 2, 3], [4, 4, 4, 4])


# --- 8: reporting ------------------------------------------------------------------------------------------------


def test_each_metric_is_told_with_its_value(capsys):
    """Row 8.1."""
    trainer = make_trainer()
    LogMetricsCallback().log_metrics(trainer, {"a": 1.0, "b": 2})
    assert lines_of(capsys) == ["a: 1.0", "b: 2"]


class Collecting(LogMetricsCallback):
    def __init__(self):
        self.logged = []

    def log_metrics(self, trainer, metrics):
        self.logged.append(dict(metrics))


class CollectingWithoutStarts(Collecting):
    """Like many subclasses, it uses the events at the start of a run itself."""

    def on_training_run_start(self, trainer, **kwargs):
        pass

    def on_evaluation_run_start(self, trainer, **kwargs):
        pass

    def on_train_epoch_start(self, trainer, **kwargs):
        pass

    def on_eval_epoch_start(self, trainer, **kwargs):
        pass


@pytest.mark.parametrize("num_epochs", [1, 2])
@pytest.mark.parametrize("cls", [Collecting, CollectingWithoutStarts])
def test_a_second_run_of_equal_length_is_logged_again(cls, num_epochs):
    """Row 8.2: the logger notices that the history was reset, whatever events a subclass overrides."""
    log = cls()
    trainer = make_trainer(callbacks=[log])
    of_one_run = [["train_loss_epoch"], ["eval_loss_epoch"]] * num_epochs
    for number in (1, 2, 3):
        train(trainer, num_epochs=num_epochs, eval_dataset=make_dataset(4))
        assert [list(metrics) for metrics in log.logged] == of_one_run * number
    assert log.logged[-1]["eval_loss_epoch"] == trainer.run_history.get_latest_metric("eval_loss_epoch")


@pytest.mark.parametrize("name", ["score", "train_score"])
@pytest.mark.parametrize(
    "event",
    ["on_train_epoch_start", "on_train_epoch_end", "on_eval_epoch_end", "on_training_run_epoch_end"],
)
def test_what_callbacks_behind_the_logger_record_is_logged_in_its_epoch(event, name):
    """Whoever logs comes last: each value once, in its epoch, those of the last epoch too."""
    rows = []

    class Log(LogMetricsCallback):
        def log_metrics(self, trainer, metrics):
            rows.extend((trainer.run_history.current_epoch, metrics[name]) for _ in range(name in metrics))

    def record(trainer, **_):
        trainer.run_history.update_metric(name, float(trainer.run_history.current_epoch))

    train(make_trainer(callbacks=[Log(), Probe(**{event: record})]), num_epochs=3, eval_dataset=make_dataset(4))
    assert rows == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_what_callbacks_behind_the_logger_record_at_the_end_of_a_run_is_logged():
    """Whoever logs comes last: in training, and in `evaluate`."""
    rows = []

    class Log(LogMetricsCallback):
        def log_metrics(self, trainer, metrics):
            rows.extend(value for key, value in metrics.items() if key.endswith("score"))

    def record(value):
        return lambda trainer, **_: trainer.run_history.update_metric("score", value)

    events = Probe(on_training_run_end=record(1.0), on_evaluation_run_end=record(2.0))
    trainer = make_trainer(callbacks=[Log(), events])
    train(trainer, num_epochs=1)
    trainer.evaluate(make_dataset(4))
    assert rows == [1.0, 2.0]


@pytest.mark.parametrize("position", ["before", "behind"])
def test_what_callbacks_record_at_the_start_of_a_run_is_logged(position):
    """In each run: with a new history, and with one that is kept."""
    log = Rows()
    record = Probe(on_training_run_start=lambda trainer, **_: trainer.run_history.update_metric("learning_rate", 0.1))
    trainer = make_trainer(callbacks=[record, log] if position == "before" else [log, record])
    for settings in ({}, {}, {"reset_run_history": False}):
        log.rows = []
        train(trainer, num_epochs=1, **settings)
        assert sorted(log.rows) == ["learning_rate", "train_loss_epoch"], settings


def test_an_evaluation_run_within_an_epoch_loses_no_training_metric():
    """What the epoch has recorded before is logged once, with the evaluation or at the end of the epoch."""
    log = Rows()

    def act(trainer, step, **_):
        if step == 0:
            trainer.run_history.update_metric("train_note", trainer.run_history.current_epoch)
        if step == 1:
            trainer.evaluate(make_dataset(4))

    train(make_trainer(callbacks=[log, Probe(on_train_step_end=act)]), num_epochs=2)
    assert (log.rows.count("train_note"), log.rows.count("train_loss_epoch")) == (2, 2)


def test_a_run_resumed_by_the_same_logger_logs_what_is_new_only(tmp_path):
    """Values that the state has were logged by the run that saved it."""
    log, save = Rows(), SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1)
    trainer = make_trainer(callbacks=[log, save])
    train(trainer, num_epochs=3, eval_dataset=make_dataset(4))
    log.rows = []
    train(trainer, num_epochs=3, eval_dataset=make_dataset(4), resume_from=tmp_path / "epoch_2")
    assert log.rows == ["eval_loss_epoch", "train_loss_epoch", "eval_loss_epoch"]


def test_a_history_that_is_kept_is_not_logged_again():
    """Row 8.2: ours; each value is handed out once."""
    log = CollectingWithoutStarts()
    trainer = make_trainer(callbacks=[log])
    train(trainer, num_epochs=2)
    train(trainer, num_epochs=1, reset_run_history=False)
    trainer.evaluate(make_dataset(4))
    assert [list(metrics) for metrics in log.logged] == [["train_loss_epoch"]] * 3 + [["evaluation_loss"]]


def test_a_history_that_a_callback_resets_is_logged_from_there():
    """Row 8.2: also a constant that has the same place in the history as before."""
    log = CollectingWithoutStarts()
    constant = Probe(on_train_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("train_constant", -1))
    reset = Probe(on_train_epoch_start=lambda trainer, **_: trainer.run_history.reset())
    train(make_trainer(callbacks=[reset, constant, log]), num_epochs=3)
    assert [sorted(metrics) for metrics in log.logged] == [["train_constant", "train_loss_epoch"]] * 3


def test_a_history_of_another_class_is_logged_too():
    """Row 8.2: a history that returns new objects each time."""

    class Copying(InMemoryRunHistory):
        def get_metric_values(self, metric_name):
            return iter([value + 0.0 for value in super().get_metric_values(metric_name)])

    log = CollectingWithoutStarts()
    train(make_trainer(callbacks=[log], run_history=Copying()), num_epochs=2, eval_dataset=make_dataset(4))
    assert [sorted(metrics) for metrics in log.logged] == [["train_loss_epoch"], ["eval_loss_epoch"]] * 2


def test_the_evaluation_of_each_epoch_is_told(capsys):
    """Row 8.3: once per evaluation, with the name if there are several datasets."""
    train(make_trainer(callbacks=[PrintProgressCallback]), num_epochs=2, eval_dataset=make_dataset(4))
    assert lines_of(capsys).count("Starting evaluation") == 2
    several = {"near": make_dataset(4), "far": make_dataset(4)}
    trainer = train(make_trainer(callbacks=[PrintProgressCallback]), eval_dataset=several)
    assert [line for line in lines_of(capsys) if "evaluation" in line] == [
        "Starting evaluation on 'near'",
        "Starting evaluation on 'far'",
    ]
    trainer.evaluate(make_dataset(4))
    assert lines_of(capsys) == ["Starting evaluation run", "Finishing evaluation run"]


@pytest.mark.parametrize("others", [[], [PrintProgressCallback]])
@pytest.mark.parametrize("event", ["on_train_step_end", "on_train_epoch_end", "on_eval_epoch_end"])
def test_the_message_of_a_stop_is_told_once_whatever_the_callbacks(capsys, others, event):
    """Row 8.4."""
    stop = Probe(**{event: raiser(StopTrainingError("bye"))})
    train(make_trainer(callbacks=[stop, *others]), num_epochs=3, eval_dataset=make_dataset(4))
    assert [line for line in lines_of(capsys) if "bye" in line] == ["Stopping: bye"]


def test_the_message_of_a_stop_in_an_evaluation_run_is_told(capsys):
    """Row 8.4: in `evaluate` too."""
    make_trainer(callbacks=[Probe(on_eval_step_end=raiser(StopTrainingError("bye")))]).evaluate(make_dataset(4))
    assert lines_of(capsys) == ["Stopping: bye"]


@pytest.mark.parametrize(("limit", "epoch"), [(3, 1), (4, 1), (6, 2)])
def test_the_end_by_the_limit_of_updates_is_told_with_its_epoch(capsys, limit, epoch):
    """Row 8.5."""
    train(make_trainer(), num_epochs=2, max_num_train_steps=limit)
    assert lines_of(capsys) == [f"Training ends in epoch {epoch}: {limit} updates are done (`max_num_train_steps`)"]


@pytest.mark.parametrize("limit", [None, 8, 9])
def test_a_limit_that_does_not_shorten_the_run_is_not_told(capsys, limit):
    """Row 8.5."""
    train(make_trainer(), num_epochs=2, max_num_train_steps=limit)
    assert lines_of(capsys) == []


def test_early_stopping_tells_of_each_epoch_whether_it_has_improved(capsys):
    """Row 8.6: the improvement, the counter and the patience."""
    values = iter([1.0, 0.5, 0.495, 0.6, 0.25, 0.5, 0.5, 0.5])
    record = Probe(on_train_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("score", next(values)))
    stop = EarlyStoppingCallback(early_stopping_patience=3, early_stopping_threshold=0.01, watch_metric="score")
    train(make_trainer(callbacks=[record, stop]), num_epochs=8)
    assert lines_of(capsys) == [
        "score has improved by 0.5 to 0.5",
        "score has not improved for 1 of 3 epochs",
        "score has not improved for 2 of 3 epochs",
        "score has improved by 0.25 to 0.25",
        "score has not improved for 1 of 3 epochs",
        "score has not improved for 2 of 3 epochs",
        "Stopping: score has not improved on 0.25 for 3 epochs",
    ]


def test_saving_and_resuming_are_told(capsys, tmp_path):
    """Row 8.7: saved, removed and resumed states, the best model, each once."""
    states, best = tmp_path / "states", tmp_path / "best.pt"
    save = SaveTrainingStateCallback(states, save_every_n_epochs=1, max_checkpoints=1, save_at_end=False)
    train(make_trainer(callbacks=[save, SaveBestModelCallback(best)]), num_epochs=2, eval_dataset=make_dataset(4))
    *lines, loading = lines_of(capsys)
    assert lines == [
        f"Saved training state to {states / 'epoch_1'}",
        f"Saved training state to {states / 'epoch_2'}",
        f"Removed training state {states / 'epoch_1'}",
    ]
    assert loading.startswith("Loading the best model: eval_loss_epoch ")
    for resume_from in (states / "epoch_2", "latest"):
        train(make_trainer(callbacks=[save]), num_epochs=2, resume_from=resume_from)
        assert lines_of(capsys) == ["Resuming from 'epoch_2' in epoch 2."]


def test_a_state_written_in_the_background_is_told_once_it_is_complete(capsys, tmp_path):
    """Row 8.7."""
    save = SaveTrainingStateCallback(tmp_path, save_every_n_steps=2, max_checkpoints=1, in_background=True)
    train(make_trainer(callbacks=[save]))
    assert lines_of(capsys) == [
        f"Saved training state to {tmp_path / 'step_2'}",
        f"Saved training state to {tmp_path / 'step_4'}",
        f"Removed training state {tmp_path / 'step_2'}",
        f"Saved training state to {tmp_path / 'final'}",
        f"Removed training state {tmp_path / 'step_4'}",
    ]


def test_a_state_that_could_not_be_written_is_not_told_as_saved(capsys, tmp_path, monkeypatch):
    """Row 8.7."""

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    save = SaveTrainingStateCallback(tmp_path, save_every_n_steps=4, save_at_end=False, on_save_error="warn")
    with pytest.warns(UserWarning, match="Training continues without this state"):
        train(make_trainer(callbacks=[save]))
    assert lines_of(capsys) == []


def test_evaluations_in_between_their_limit_and_that_of_the_average_are_told(capsys, tmp_path):
    """Row 8.7: each evaluation once, also beside `PrintProgressCallback`."""
    average = ModelEmaCallback(save_path=tmp_path / "average.pt")
    limit = LimitEvalStepsCallback(1)
    train(
        make_trainer(callbacks=[PrintProgressCallback, StepBasedEvaluationCallback(3), limit, average]),
        eval_dataset=make_dataset(8),
    )
    assert lines_of(capsys) == [
        "Starting training run",
        "Starting epoch 1",
        "Evaluating after 3 updates",
        "Limiting this evaluation to 1 batches per process",
        "Training continues",
        "Starting evaluation",
        "Evaluating the moving average of the weights",
        "Finishing training run",
    ]


def test_what_is_told_has_lines_of_its_own_beside_an_open_bar(capsys, monkeypatch):
    """Rows 8.3 to 8.7: the bar is wiped first, and drawn again below the line."""
    written = []

    class Terminal:
        def write(self, text):
            written.append(text)

        def flush(self):
            pass

        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("sys.stdout", terminal)
    tell = Probe(on_train_step_end=lambda trainer, step, **_: step == 1 and trainer.print("told"))
    train(make_trainer(callbacks=[ProgressBarCallback, tell]))
    before, _, after = "".join(written).partition("told\n")
    assert before.endswith("\r")
    assert before.rpartition("\r")[0].rpartition("\r")[2].strip() == "", "the last thing on the line is blanks"
    assert after.startswith("\r")


def test_printing_without_a_bar_writes_nothing_else(capsys):
    """Rows 8.3 to 8.7: to the file that the caller names, too."""
    import io

    file = io.StringIO()
    trainer = make_trainer()
    trainer.print("a", "b", sep="-", file=file)
    trainer.print("c")
    captured = capsys.readouterr()
    assert (file.getvalue(), captured.out, captured.err) == ("a-b\n", "c\n", "")


def test_the_bars_are_none_at_first_and_real_bars_while_they_are_open():
    """Row 8.8: `pbar` in training, `eval_pbar` in evaluation; both stay there when they are closed."""
    bar = ProgressBarCallback()
    assert (bar.pbar, bar.eval_pbar) == (None, None)
    seen = []

    def look(trainer, **_):
        open_bar = bar.eval_pbar if trainer.is_evaluating else bar.pbar
        seen.append((isinstance(open_bar, tqdm_package.tqdm), open_bar.total, open_bar.disable))

    probe = Probe(on_train_step_end=look, on_eval_step_end=look)
    trainer = train(make_trainer(callbacks=[bar, probe]), eval_dataset=make_dataset(8))
    assert seen == [(True, 4, False)] * 4 + [(True, 2, False)] * 2
    trainer.evaluate(make_dataset(4))
    assert seen[6:] == [(True, 1, False)]
    assert bar.pbar.total == 4
    bar.pbar.set_postfix(loss=1)  # as in a later event of a subclass


@pytest.mark.parametrize(
    ("left_out", "has_bar", "has_table"),
    [(None, True, True), (ProgressBarCallback, False, True), (LogMetricsCallback, True, False)],
)
def test_programs_choose_among_the_default_callbacks_by_name(monkeypatch, left_out, has_bar, has_table):
    """They leave one out, put a subclass in its place, and everything is told once."""
    terminal, logged = use_terminal(monkeypatch), []

    class Own(LogMetricsCallback):
        def log_metrics(self, trainer, metrics):
            logged.append(sorted(metrics))

    chosen = [callback for callback in DEFAULT_CALLBACKS if callback is not left_out]
    train(make_trainer(callbacks=[*chosen, Own]), num_epochs=2)
    assert logged == [["train_loss_epoch"]] * 2
    assert ("epoch 1/2   0% |" in terminal.getvalue()) == has_bar
    assert sum("train loss" in line for line in terminal.screen()) == has_table
    assert sum(line == "Starting epoch 2" for line in terminal.screen()) == (not has_table)


class BarWithPostfix(ProgressBarCallback):
    def on_train_step_end(self, trainer, batch, batch_output, **kwargs):
        self.pbar.set_postfix(mine=batch_output["batch_size"])

    def on_eval_step_end(self, trainer, batch, batch_output, **kwargs):
        self.eval_pbar.set_postfix(mine=batch_output["batch_size"])


def test_a_subclass_shows_values_of_its_own_in_the_bar(monkeypatch):
    """Row 8.8: in training, evaluation and intermediate evaluation, and the bar does not take them away."""
    times = itertools.count()
    monkeypatch.setattr(loss_monitor.time, "monotonic", lambda: next(times))  # each step is a log point
    terminal = use_terminal(monkeypatch)
    train(make_trainer(callbacks=[BarWithPostfix, StepBasedEvaluationCallback(2)]), eval_dataset=make_dataset(8))
    drawn = [text for text in terminal.getvalue().split("\r") if "3/4" in text]
    assert "mine=4" in drawn[-1]


def test_a_process_without_a_bar_can_set_a_postfix():
    """Row 8.8: the bars of other processes are disabled."""
    from dataclasses import replace

    class SecondProcess(Trainer):
        def _create_run_config(self, **kwargs):
            return replace(super()._create_run_config(**kwargs), is_local_process_zero=False)

    train(make_trainer(cls=SecondProcess, callbacks=[BarWithPostfix]), eval_dataset=make_dataset(8))
