"""The progress bar."""

from __future__ import annotations

import itertools
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import tqdm

from _screens import use_terminal
from _support import Batches, Probe, make_dataset, make_trainer, raiser, train
from pytorch_accelerated import Trainer
from pytorch_accelerated._console import shown_bar as module
from pytorch_accelerated._recording import loss_monitor
from pytorch_accelerated.callbacks import LogMetricsCallback, ProgressBarCallback, StepBasedEvaluationCallback
from pytorch_accelerated.exceptions import StopTrainingError


class WithAccuracy(Trainer):
    def calculate_train_batch_loss(self, batch):
        return {**super().calculate_train_batch_loss(batch), "metrics": {"accuracy": 0.5}}

    def calculate_eval_batch_loss(self, batch):
        return {**super().calculate_eval_batch_loss(batch), "metrics": {"accuracy": 0.5}}


class RecordingBar:
    """Replaces tqdm's bar."""

    format_dict = {"ncols": 120}  # noqa: RUF012 - as tqdm's

    def __init__(self, total=None, initial=0, disable=False, **kwargs):
        self.total, self.n, self.disable = total, initial, disable
        self.initial, self.bar_format, self.leave = initial, "", False
        self.shown = []
        self.is_closed = False

    @property
    def count(self):
        return self.n

    @property
    def losses(self):
        return [found[1] for text in self.shown if (found := re.search(r"loss (\S+)", text))]

    def clear(self, nolock=False):
        assert not self.is_closed

    def refresh(self, nolock=False):
        assert not self.is_closed
        self.shown.append(self.bar_format)

    def close(self):
        self.is_closed = True


class SecondProcess(Trainer):
    """Takes itself for another process than the main one."""

    def _create_run_config(self, **kwargs):
        return replace(super()._create_run_config(**kwargs), is_world_process_zero=False)


@pytest.fixture
def bars(monkeypatch):
    """All bars that were opened on a terminal, in order."""
    opened = []
    monkeypatch.setattr(module, "is_terminal", lambda stream: True)

    def open_bar(**kwargs):
        opened.append(RecordingBar(**kwargs))
        return opened[-1]

    monkeypatch.setattr(module, "tqdm", open_bar)
    return opened


def test_each_epoch_has_a_bar_with_its_number_of_batches(bars):
    trainer = make_trainer(callbacks=[ProgressBarCallback])
    train(trainer, num_epochs=2, eval_dataset=make_dataset(6))
    trainer.evaluate(make_dataset(9), per_device_batch_size=4)
    assert [(bar.total, bar.count) for bar in bars] == [(4, 4), (2, 2), (4, 4), (2, 2), (3, 3)]
    assert all(bar.is_closed for bar in bars)


def test_the_running_loss_is_shown_at_each_log_point(bars, monkeypatch):
    """The clock is replaced by one that advances 0.04 seconds with each reading."""
    times = itertools.count()
    monkeypatch.setattr(loss_monitor.time, "monotonic", lambda: next(times) / 25)
    losses = []
    probe = Probe(on_train_step_end=lambda trainer, **_: losses.append(f"{trainer.mean_loss:#.4g}"))
    train(make_trainer(callbacks=[probe, ProgressBarCallback]), 32)
    assert len(losses) == 8
    assert bars[0].losses == [losses[2], losses[5]]
    assert bars[0].count == 8


def test_an_empty_bar_is_drawn_unless_the_epoch_before_was_short(monkeypatch):
    """The clock advances by 1 second with each reading, but stands still in the second epoch."""
    drawn, times, epochs = [], itertools.count(), []
    monkeypatch.setattr(module.time, "perf_counter", lambda: 0.0 if len(epochs) == 1 else next(times))
    monkeypatch.setattr(tqdm.tqdm, "refresh", lambda bar, **_: drawn.append((len(epochs), bar.n)))
    use_terminal(monkeypatch)
    count = Probe(on_training_run_epoch_end=lambda trainer, **_: epochs.append(1))
    train(make_trainer(callbacks=[ProgressBarCallback, count]), num_epochs=3)
    assert [number for number, num_done in drawn if num_done == 0] == [0, 1]


def test_the_bar_has_no_total_if_the_data_have_no_length(bars):
    train(make_trainer(callbacks=[ProgressBarCallback]), Batches(make_dataset(12), 4))
    assert [(bar.total, bar.count) for bar in bars] == [(None, 3)]


def test_an_intermediate_evaluation_keeps_the_bar_of_the_training_epoch(bars):
    train(make_trainer(callbacks=[StepBasedEvaluationCallback(2), ProgressBarCallback]), eval_dataset=make_dataset(8))
    assert [(bar.total, bar.count) for bar in bars] == [(4, 4), (2, 2)]


@pytest.mark.parametrize("event", ["on_train_step_end", "on_eval_step_end", "on_eval_epoch_end"])
def test_a_run_nested_in_a_pass_keeps_the_bar_of_that_pass(bars, event):
    """A callback calls `evaluate` and `predict` while a bar is open: it goes on to its end."""
    is_nested = False

    def nest(trainer, **_):
        nonlocal is_nested
        if is_nested:
            return
        is_nested = True
        trainer.evaluate(make_dataset(12), per_device_batch_size=4)
        trainer.predict(make_dataset(12), per_device_batch_size=4)
        is_nested = False

    train(make_trainer(callbacks=[Probe(**{event: nest}), ProgressBarCallback]), eval_dataset=make_dataset(8))
    assert [(bar.total, bar.count) for bar in bars if not bar.disable] == [(4, 4), (2, 2)]
    assert all(bar.is_closed for bar in bars)


def test_each_evaluation_dataset_has_a_bar_with_its_number_of_batches(bars):
    train(
        make_trainer(callbacks=[ProgressBarCallback]), eval_dataset={"one": make_dataset(4), "three": make_dataset(12)}
    )
    assert [bar.total for bar in bars] == [4, 1, 3]


def test_the_bar_of_a_resumed_epoch_starts_at_the_resumed_batch(bars, tmp_path):
    def save(trainer, step, **_):
        if step == 2:
            trainer.save_training_state(tmp_path / "state")

    train(make_trainer(callbacks=[Probe(on_train_step_end=save)]))
    train(make_trainer(callbacks=[ProgressBarCallback]), resume_from=tmp_path / "state")
    assert [(bar.total, bar.initial, bar.count) for bar in bars] == [(4, 3, 4)]


def test_only_the_main_process_shows_a_bar(bars):
    train(make_trainer(cls=SecondProcess, callbacks=[ProgressBarCallback]))
    assert [bar.disable for bar in bars] == [True]
    assert bars[0].losses == [], "reading the loss would synchronize the device for nothing"


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt("mine"), StopTrainingError("mine")])
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("event", ["on_train_step_end", "on_optimizer_step_start", "on_eval_step_end"])
def test_bars_are_closed_however_a_run_ends(bars, event, is_first, error):
    callbacks = [Probe(**{event: raiser(error)}), ProgressBarCallback]
    trainer = make_trainer(callbacks=callbacks if is_first else callbacks[::-1])
    if isinstance(error, StopTrainingError):
        train(trainer, eval_dataset=make_dataset(4))
    else:
        with pytest.raises(type(error), match="mine"):
            train(trainer, eval_dataset=make_dataset(4))
    assert [bar.is_closed for bar in bars] == ([True, True] if "eval" in event else [True])
    assert trainer.callback_handler.callbacks[1 if is_first else 0]._open_bar is None


def test_bars_are_closed_when_an_evaluation_fails(bars):
    trainer = make_trainer(callbacks=[Probe(on_eval_step_end=raiser(ValueError("mine"))), ProgressBarCallback])
    with pytest.raises(ValueError, match="mine"):
        trainer.evaluate(make_dataset(4))
    assert [bar.is_closed for bar in bars] == [True]


@pytest.mark.parametrize("call", ["train", "evaluation in a run", "evaluate"])
@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), StopTrainingError("mine")])
def test_the_bar_of_a_pass_that_ends_early_shows_how_far_it_came(bars, call, error):
    batches = []

    class FailsAtTheThirdBatch(Trainer):
        def calculate_train_batch_loss(self, batch):
            return self.fail_or(super().calculate_train_batch_loss, batch, call == "train")

        def calculate_eval_batch_loss(self, batch):
            return self.fail_or(super().calculate_eval_batch_loss, batch, call != "train")

        def fail_or(self, calculate_loss, batch, fails):
            batches.extend([batch] * fails)
            if len(batches) == 3:
                raise error
            return calculate_loss(batch)

    trainer = make_trainer(callbacks=[ProgressBarCallback], cls=FailsAtTheThirdBatch)
    with nullcontext() if isinstance(error, StopTrainingError) else pytest.raises(type(error)):
        if call == "evaluate":
            trainer.evaluate(make_dataset(16), per_device_batch_size=4)
        else:
            train(trainer, 16, eval_dataset=make_dataset(16))
    assert (bars[-1].total, bars[-1].count, bars[-1].is_closed) == (4, 2, True)


def test_bars_are_closed_when_another_callback_fails_during_clean_up(bars):
    fail = Probe(on_train_step_end=raiser(ValueError("mine")), on_exception=raiser(RuntimeError("another")))
    with pytest.raises(ValueError, match="mine"):
        train(make_trainer(callbacks=[fail, ProgressBarCallback]))
    assert [bar.is_closed for bar in bars] == [True]


def test_a_run_after_a_failed_one_opens_new_bars(bars):
    trainer = make_trainer(callbacks=[ProgressBarCallback, Probe(on_train_step_end=raiser(ValueError("mine")))])
    with pytest.raises(ValueError, match="mine"):
        train(trainer)
    trainer.callback_handler.callbacks.pop()
    train(trainer)
    assert [(bar.total, bar.count, bar.is_closed) for bar in bars] == [(4, 0, True), (4, 4, True)]


# --- what one sees -----------------------------------------------------------------------------------------------


@pytest.fixture
def each_step_is_a_log_point(monkeypatch):
    monkeypatch.setattr(loss_monitor, "SECONDS_BETWEEN_LOG_POINTS", 0.0)


def drawn_on(terminal):
    """Return what was drawn on a line, one after the other."""
    return [text.strip() for text in re.split(r"[\r\n]", terminal.getvalue()) if "|" in text]


@pytest.mark.usefixtures("each_step_is_a_log_point")
def test_the_bar_shows_epoch_loss_metrics_rate_speed_and_time_left(monkeypatch):
    terminal = use_terminal(monkeypatch, columns=160)
    train(make_trainer(cls=WithAccuracy, callbacks=[ProgressBarCallback]), num_epochs=12, eval_dataset=make_dataset(8))
    drawn = drawn_on(terminal)
    number = r"[\d.,e+-]+"
    assert re.fullmatch(
        rf"epoch 3/12  75% \|.*\| 3/4  loss {number}  accuracy 0.5000  lr 1.0e-01  {number} samples/s  "
        r"\d+s left, run \d+s left",
        [text for text in drawn if text.startswith("epoch 3/12  75%")][-1],
    )
    assert any(re.match(rf"epoch 3/12 evaluation  50% .* 1/2  loss {number}  accuracy 0.5000", text) for text in drawn)


def test_the_bar_gives_way_when_its_epoch_ends(monkeypatch):
    terminal = use_terminal(monkeypatch)
    trainer = make_trainer(callbacks=[ProgressBarCallback, LogMetricsCallback])
    train(trainer, num_epochs=2, eval_dataset=make_dataset(8))
    assert drawn_on(terminal)
    assert [line.split()[0] for line in terminal.screen()] == ["epoch", "1/2", "2/2"], "header and lines of the table"


def test_a_bar_stays_if_nothing_else_tells_of_its_pass(monkeypatch):
    terminal = use_terminal(monkeypatch)
    trainer = make_trainer(callbacks=[ProgressBarCallback])
    train(trainer, num_epochs=2, eval_dataset=make_dataset(8))
    trainer.evaluate(make_dataset(8))
    titles = ["epoch 1/2", "epoch 1/2 evaluation", "epoch 2/2", "epoch 2/2 evaluation", "evaluation"]
    assert [re.match(r"(.*?) +100% ", line)[1] for line in terminal.screen()] == titles


def test_without_a_terminal_a_line_says_how_far_a_failed_pass_came(capsys):
    fail = Probe(on_train_step_end=lambda trainer, step, **_: step == 2 and raiser(ValueError("mine"))(trainer))
    with pytest.raises(ValueError, match="mine"):
        train(make_trainer(callbacks=[fail, ProgressBarCallback]), num_epochs=3)
    assert re.match(r"epoch 1/3 .*2/4", capsys.readouterr().err)
    train(make_trainer(callbacks=[ProgressBarCallback]))
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("each_step_is_a_log_point")
def test_bars_of_evaluations_name_their_datasets(monkeypatch):
    terminal = use_terminal(monkeypatch)
    trainer = make_trainer(callbacks=[ProgressBarCallback])
    train(trainer, eval_dataset={"near": make_dataset(8), "far": make_dataset(8)})
    trainer.evaluate({"moon": make_dataset(8)}, per_device_batch_size=4)
    titles = {re.match(r"[^%]*?(?=\s+\d+%)", text)[0] for text in drawn_on(terminal)}
    assert titles == {"epoch 1/1", "epoch 1/1 near", "epoch 1/1 far", "evaluation moon"}


@pytest.mark.usefixtures("each_step_is_a_log_point")
def test_text_of_callbacks_has_lines_of_its_own(monkeypatch):
    terminal = use_terminal(monkeypatch)

    def tell(trainer, step, **_):
        print(f"printed in step {step}")
        trainer.print(f"told in step {step}")
        assert terminal.screen()[-1].startswith("epoch 1/1"), "the bar is below"

    train(make_trainer(callbacks=[ProgressBarCallback, Probe(on_train_step_end=tell)]))
    *lines, bar = terminal.screen()
    assert lines == [f"{verb} in step {step}" for step in range(4) for verb in ("printed", "told")]
    assert "4/4" in bar


@pytest.mark.usefixtures("each_step_is_a_log_point")
def test_after_an_error_the_bar_stays_and_text_goes_on_below_it(monkeypatch):
    terminal = use_terminal(monkeypatch)
    fail = Probe(on_train_step_end=lambda trainer, step, **_: step == 2 and raiser(ValueError("mine"))(trainer))
    with pytest.raises(ValueError, match="mine"):
        train(make_trainer(callbacks=[fail, ProgressBarCallback]), num_epochs=3)
    print("traceback")
    bar, below = terminal.screen()
    assert re.match(r"epoch 1/3  50% \|.*\| 2/4 ", bar)
    assert below == "traceback"
    assert "left" not in bar


@pytest.mark.usefixtures("each_step_is_a_log_point")
def test_without_a_terminal_long_epochs_have_plain_lines(capsys, monkeypatch):
    """The clock advances by 10 seconds with each reading."""
    times = itertools.count(step=10)
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(times))
    train(make_trainer(callbacks=[ProgressBarCallback(seconds_between_lines=25)]), 32)
    output = capsys.readouterr()
    assert output.err == ""
    assert not re.search(r"[\r\x1b]", output.out)
    lines = output.out.splitlines()
    assert 1 < len(lines) < 8
    assert re.fullmatch(r"epoch 1/1  \d\d%  \d/8  loss \S+  lr 1.0e-01(  \S+ samples/s  .* left)?", lines[0])


@pytest.mark.usefixtures("each_step_is_a_log_point")
@pytest.mark.parametrize("seconds", [30.0, float("inf")])
def test_without_a_terminal_short_epochs_have_no_lines(capsys, seconds):
    train(make_trainer(callbacks=[ProgressBarCallback(seconds)]), eval_dataset=make_dataset(8))
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("each_step_is_a_log_point")
@pytest.mark.parametrize("make_it", ["not verbose", "another process"])
def test_nothing_is_shown_if_nothing_is_to_be_shown(monkeypatch, make_it):
    class SecondProcess(Trainer):
        def _create_run_config(self, **kwargs):
            return replace(super()._create_run_config(**kwargs), is_world_process_zero=make_it != "another process")

    terminal = use_terminal(monkeypatch)
    trainer = make_trainer(cls=SecondProcess, callbacks=[ProgressBarCallback], verbose=make_it != "not verbose")
    train(trainer, eval_dataset=make_dataset(8))
    assert terminal.getvalue() == ""


def test_text_of_another_process_wipes_the_line_of_the_bar_first(monkeypatch):
    terminal = use_terminal(monkeypatch)
    tell = Probe(on_train_step_end=lambda trainer, step, **_: step == 1 and print("told"))
    train(make_trainer(cls=SecondProcess, callbacks=[ProgressBarCallback, tell]))
    assert terminal.getvalue() == "\r\x1b[Ktold\n"


class LeavesBarsOpen(ProgressBarCallback):
    def on_train_epoch_end(self, trainer, **kwargs):
        pass

    def on_eval_epoch_end(self, trainer, **kwargs):
        pass


def test_bars_that_a_subclass_leaves_open_are_closed_with_the_run(monkeypatch):
    terminal = use_terminal(monkeypatch)
    trainer = make_trainer(callbacks=[LeavesBarsOpen, LogMetricsCallback])
    train(trainer, num_epochs=2, eval_dataset=make_dataset(8))
    assert "write" not in vars(terminal)
    trainer.evaluate(make_dataset(8))
    assert "write" not in vars(terminal)
    assert "%" not in "".join(terminal.screen())


def test_an_evaluation_within_an_epoch_after_its_bar_has_one_of_its_own(bars):
    evaluate = Probe(on_train_epoch_end=lambda trainer, **_: trainer.evaluate_now())
    train(make_trainer(callbacks=[ProgressBarCallback, evaluate]), eval_dataset=make_dataset(8))
    assert [(bar.total, bar.n, bar.is_closed) for bar in bars] == [(4, 4, True), (2, 2, True), (2, 2, True)]
