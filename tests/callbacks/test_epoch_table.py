"""One aligned line per epoch."""

from __future__ import annotations

import re
from functools import partial

import pytest

import _support
from _support import Probe, make_dataset, make_trainer
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LogMetricsCallback, StepBasedEvaluationCallback
from pytorch_accelerated.exceptions import StopTrainingError

train = partial(_support.train, dataset=8)  # two steps per epoch


def lines_of(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if not line.startswith(("Evaluating", "Training"))]


def test_each_epoch_has_a_line_below_one_header(capsys):
    trainer = make_trainer(callbacks=[LogMetricsCallback])
    train(trainer, num_epochs=3, eval_dataset=make_dataset(4))
    header, *rows = lines_of(capsys)
    assert re.split(r"\s{2,}", header.strip()) == ["epoch", "time", "eta", "lr", "train loss", "eval loss"]
    assert [row.split()[0] for row in rows] == ["1/3", "2/3", "3/3"]
    for metric, column in (("train_loss_epoch", -2), ("eval_loss_epoch", -1)):
        shown = [float(row.split()[column].rstrip("*")) for row in rows]
        assert shown == pytest.approx(trainer.run_history.get_metric_values(metric), rel=1e-3)
    end = header.index("train loss") + len("train loss")
    assert all(row[end - 1].isdigit() and row[end] in "* " for row in rows)


def test_the_lowest_loss_so_far_is_marked(capsys):
    trainer = make_trainer(callbacks=[LogMetricsCallback])
    train(trainer, num_epochs=3)
    values = trainer.run_history.get_metric_values("train_loss_epoch")
    marks = [row.endswith("*") for row in lines_of(capsys)[1:]]
    assert marks == [value == min(values[: number + 1]) for number, value in enumerate(values)]


def test_an_evaluation_within_an_epoch_has_a_line_with_the_update(capsys):
    train(make_trainer(callbacks=[LogMetricsCallback, StepBasedEvaluationCallback(1)]), eval_dataset=make_dataset(4))
    labels = [line.strip().split("  ")[0] for line in lines_of(capsys) if "epoch" not in line]
    assert labels == ["update 1", "update 2", "1/1"]


def test_several_evaluation_datasets_are_named(capsys):
    datasets = {"one": make_dataset(4), "three": make_dataset(12)}
    train(make_trainer(callbacks=[LogMetricsCallback]), eval_dataset=datasets)
    assert lines_of(capsys)[0].endswith("one eval loss  three eval loss")


def test_an_evaluation_run_has_a_line(capsys):
    make_trainer(callbacks=[LogMetricsCallback]).evaluate(make_dataset(4))
    header, row = lines_of(capsys)
    assert header.endswith("loss")
    assert row.startswith("evaluation  ")


def test_an_evaluation_run_within_an_epoch_leaves_the_line_of_the_epoch_complete(capsys):
    nest = Probe(on_train_epoch_end=lambda trainer, **kwargs: trainer.evaluate(make_dataset(4)))
    train(make_trainer(callbacks=[LogMetricsCallback, nest]), num_epochs=2, eval_dataset=make_dataset(4))
    lines = lines_of(capsys)
    rows = [line for line in lines if "epoch" not in line]
    assert [row.split()[0] for row in rows] == ["evaluation", "1/2", "evaluation", "2/2"]
    assert [len(row.split()) for row in rows] == [2, 6, 2, 6]
    assert "train loss" in lines[2]


def test_what_is_recorded_at_the_end_of_the_run_has_a_line(capsys):
    record = Probe(on_training_run_end=lambda trainer, **kwargs: trainer.run_history.update_metric("score", 0.5))
    train(make_trainer(callbacks=[LogMetricsCallback, record]))
    assert lines_of(capsys)[-1].split() == ["end", "0.5000"]


def test_a_screen_that_is_too_narrow_gets_two_lines(capsys, monkeypatch):
    monkeypatch.setattr("pytorch_accelerated.callbacks._epoch_table.line_width", lambda: 40)
    train(make_trainer(callbacks=[LogMetricsCallback]), eval_dataset=make_dataset(4))
    lines = lines_of(capsys)
    assert len(lines) == 4
    assert max(map(len, lines)) <= 40


def test_a_screen_of_another_width_brings_a_new_header(capsys, monkeypatch):
    widths = iter([100, 100, 60])
    monkeypatch.setattr("pytorch_accelerated.callbacks._epoch_table.line_width", lambda: next(widths))
    train(make_trainer(callbacks=[LogMetricsCallback]), num_epochs=3)
    assert ["epoch" in line for line in lines_of(capsys)] == [True, False, False, True, False]


def test_without_a_terminal_there_is_no_carriage_return_and_no_wrapping(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    train(make_trainer(callbacks=[LogMetricsCallback]), num_epochs=2, eval_dataset=make_dataset(4))
    output = capsys.readouterr()
    assert "\r" not in output.out + output.err
    assert len(output.out.splitlines()) == 3


def test_other_processes_print_nothing(capsys):
    class SecondProcess(Trainer):
        def _create_run_config(self, *args, **kwargs):
            config = super()._create_run_config(*args, **kwargs)
            object.__setattr__(config, "is_world_process_zero", False)
            return config

    train(make_trainer(cls=SecondProcess, callbacks=[LogMetricsCallback]))
    assert capsys.readouterr().out == ""


def test_values_of_any_size_share_one_header(capsys, monkeypatch):
    monkeypatch.setattr("pytorch_accelerated.callbacks._epoch_table.line_width", lambda: 63)
    scale = Probe(on_train_epoch_end=lambda trainer, **_: record(trainer))

    def record(trainer):
        trainer.run_history.update_metric("train_error", 10.0 ** (4 - trainer.run_history.current_epoch))

    train(make_trainer(callbacks=[LogMetricsCallback, scale]), num_epochs=12, eval_dataset=make_dataset(4))
    lines = lines_of(capsys)
    assert ["epoch" in line for line in lines] == [False, True] + [False] * 12


def test_a_value_is_marked_if_it_is_better_than_all_before(capsys):
    values = iter([0.5, 0.75, 0.75, float("nan"), 0.25, 1.0])
    record = Probe(on_eval_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("f1", next(values)))
    train(make_trainer(callbacks=[LogMetricsCallback, record]), num_epochs=6, eval_dataset=make_dataset(4))
    marks = [line.endswith("*") for line in lines_of(capsys)[1:]]
    assert marks == [True, True, False, False, False, True]


def test_a_value_is_compared_with_one_that_no_line_shows(capsys):
    values = iter([0.5, 0.9, 0.6, 0.8, 0.7, 0.95])  # two in each epoch, of which a line shows the last

    def record_two(trainer, **kwargs):
        for _ in range(2):
            trainer.run_history.update_metric("f1", next(values))

    record = Probe(on_eval_epoch_end=record_two)
    train(make_trainer(callbacks=[LogMetricsCallback, record]), num_epochs=3, eval_dataset=make_dataset(4))
    assert [line.endswith("*") for line in lines_of(capsys)[1:]] == [True, False, True]


def test_a_history_that_is_reset_within_a_run_starts_again(capsys):
    values = iter([0.9, 0.5, 0.6, 0.4])

    def record_or_reset(trainer, **kwargs):
        if trainer.run_history.current_epoch == 2:
            trainer.run_history.reset()
            trainer.run_history._increment_epoch()
        trainer.run_history.update_metric("f1", next(values))

    record = Probe(on_eval_epoch_end=record_or_reset)
    train(make_trainer(callbacks=[LogMetricsCallback, record]), num_epochs=4, eval_dataset=make_dataset(4))
    assert [line.endswith("*") for line in lines_of(capsys)[1:]] == [True, True, True, False]


@pytest.mark.parametrize("name", ["score", "train_accuracy"])
def test_a_metric_is_not_marked_if_its_direction_is_unknown_or_it_is_of_training(capsys, name):
    record = Probe(on_eval_epoch_end=lambda trainer, **_: trainer.run_history.update_metric(name, 0.5))
    train(make_trainer(callbacks=[LogMetricsCallback, record]), eval_dataset=make_dataset(4))
    assert lines_of(capsys)[1].count("*") == 1


def test_a_resumed_run_marks_what_is_better_than_before(capsys, tmp_path):
    trainer = make_trainer()
    train(trainer, num_epochs=3)
    trainer.save_training_state(tmp_path / "state")
    before = min(trainer.run_history.get_metric_values("train_loss_epoch"))
    capsys.readouterr()
    resumed = make_trainer(callbacks=[LogMetricsCallback])
    train(resumed, num_epochs=4, resume_from=tmp_path / "state")
    row = lines_of(capsys)[-1]
    assert row.startswith("  4/4")
    assert row.endswith("*") == (resumed.run_history.get_latest_metric("train_loss_epoch") < before)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_run_that_is_stopped_within_an_epoch_has_a_line_for_it(capsys, epoch):
    def stop(trainer, **_):
        if trainer.run_history.current_epoch == epoch:
            raise StopTrainingError("enough")

    train(make_trainer(callbacks=[LogMetricsCallback, Probe(on_train_step_end=stop)]), num_epochs=3)
    lines = [line for line in lines_of(capsys) if line]
    assert lines[-1].split()[0] == f"{epoch}/3"
    assert sum("/3" in line for line in lines) == epoch


def test_metrics_of_like_names_have_columns_of_their_own(capsys):
    def record(trainer, **_):
        for number, name in enumerate(("eval_loss", "lr", "lr_epoch")):
            trainer.run_history.update_metric(name, number + 0.5)

    train(make_trainer(callbacks=[LogMetricsCallback, Probe(on_eval_epoch_end=record)]), eval_dataset=make_dataset(4))
    header, row = lines_of(capsys)
    assert re.split(r"\s{2,}", header)[4:] == ["train loss", "eval loss", "eval_loss_epoch", "lr_epoch"]
    assert row.split()[5::2] == ["0.5000*", "2.500"]
    assert row.split()[3] == "1.5e+00", "what was recorded as the learning rate is in its column"


def test_an_evaluation_of_data_of_its_own_within_an_epoch_has_a_line(capsys):
    class Own(Trainer):
        def train_epoch_end(self):
            self._run_eval_epoch(self._train_dataloader, is_intermediate=True)

    train(make_trainer(cls=Own, callbacks=[LogMetricsCallback]))
    assert lines_of(capsys)[1].split()[:2] == ["update", "2"]


@pytest.mark.parametrize("are_of_training", [True, False])
def test_metrics_of_the_trainer_have_their_columns_from_the_first_evaluation_on(capsys, are_of_training):
    metrics = {"error": lambda outputs, targets: outputs.mean(), "area": lambda outputs, targets: outputs.mean(dim=0)}
    callbacks = [LogMetricsCallback, StepBasedEvaluationCallback(1)]
    trainer = make_trainer(callbacks=callbacks, metrics=metrics, compute_train_metrics=are_of_training)
    train(trainer, num_epochs=2, eval_dataset=make_dataset(4))
    (header,) = [line for line in lines_of(capsys) if "epoch" in line]
    names = ["loss", "error", "area"]
    columns = [*(f"train {name}" for name in names[: 3 if are_of_training else 1]), *(f"eval {name}" for name in names)]
    assert re.split(r"\s{2,}", header.strip())[4:] == columns, "in the order in which they were given"


def test_the_time_left_ends_with_the_time_of_the_run(capsys):
    train(make_trainer(callbacks=[LogMetricsCallback]), num_epochs=2000, max_time="0.2 s")
    rows = [line for line in lines_of(capsys) if "/2000" in line]
    assert {row.split()[2] for row in rows} == {"0s"}


def test_an_epoch_that_is_ended_early_has_no_other_columns(capsys):
    ending = Probe(on_train_step_end=lambda trainer, **_: trainer.end_epoch("enough"))
    train(make_trainer(callbacks=[LogMetricsCallback, ending]), num_epochs=2)
    lines = capsys.readouterr().out.splitlines()
    assert sum("train loss" in line for line in lines) == 1
    assert sum("ends after 1 batches per process: enough" in line for line in lines) == 2
    assert not any("num batches" in line for line in lines)
