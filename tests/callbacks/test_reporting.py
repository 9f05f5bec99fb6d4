"""Callbacks that print the progress and the metrics of a run."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import _support
from _support import Probe, make_dataset, make_trainer, raiser
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    LogMetricsCallback,
    PrintProgressCallback,
    StepBasedEvaluationCallback,
    TrainerCallback,
)
from pytorch_accelerated.exceptions import StopTrainingError

train = partial(_support.train, dataset=8)  # two steps per epoch


class CollectMetrics(LogMetricsCallback):
    """Collects the metrics in a list. Like older subclasses, it does not call ``super().__init__()``."""

    def __init__(self):
        self.logged = []

    def log_metrics(self, trainer, metrics):
        self.logged.append(dict(metrics))


class PrintEach(LogMetricsCallback):
    def log_metrics(self, trainer, metrics):
        super().log_metrics(trainer, metrics)


class WithAccuracy(Trainer):
    def calculate_eval_batch_loss(self, batch):
        return {**super().calculate_eval_batch_loss(batch), "metrics": {"accuracy": torch.tensor(0.5)}}


def test_the_start_and_end_of_runs_and_epochs_are_printed(capsys):
    trainer = make_trainer(callbacks=[PrintProgressCallback])
    train(trainer, num_epochs=2, eval_dataset=make_dataset(4))
    trainer.evaluate(make_dataset(4))
    assert capsys.readouterr().out == (
        "\nStarting training run\n\nStarting epoch 1\nStarting evaluation\n\nStarting epoch 2\nStarting evaluation\n"
        "Finishing training run\n"
        "\nStarting evaluation run\nFinishing evaluation run\n"
    )


@pytest.mark.parametrize("others", [[LogMetricsCallback], [PrintEach], [PrintEach, LogMetricsCallback]])
def test_starts_of_epochs_are_left_out_if_a_table_tells_them(capsys, others):
    trainer = make_trainer(callbacks=[PrintProgressCallback, StepBasedEvaluationCallback(1), *others])
    train(trainer, eval_dataset=make_dataset(4))
    trainer.evaluate(make_dataset(4))
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(("Start", "Eval", "Train", "Fin"))
    ]
    always = ["Starting training run", "Finishing training run", "Starting evaluation run"]
    if LogMetricsCallback in others:
        assert lines == always
    else:
        assert set(lines) > {*always, "Starting epoch 1", "Starting evaluation", "Evaluating after 1 updates"}


def test_the_reason_for_stopping_early_is_printed(capsys):
    stop = Probe(on_train_epoch_end=raiser(StopTrainingError("that will do")))
    train(make_trainer(callbacks=[stop, PrintProgressCallback]), num_epochs=3)
    assert capsys.readouterr().out.splitlines() == [
        *["", "Starting training run", "", "Starting epoch 1", "", "Stopping: that will do", "Finishing training run"]
    ]


def test_a_subclass_that_calls_log_metrics_prints_each_metric_on_its_own_line(capsys):
    trainer = make_trainer(cls=WithAccuracy, callbacks=[PrintEach])
    train(trainer, num_epochs=2, eval_dataset=make_dataset(4))
    trainer.evaluate(make_dataset(4))
    lines = [line.split(": ") for line in capsys.readouterr().out.splitlines()]
    epoch = ["train_loss_epoch", "eval_accuracy", "eval_loss_epoch"]
    assert [name for name, _ in lines] == [*epoch, *epoch, "evaluation_accuracy", "evaluation_loss"]
    values = trainer.run_history.get_metric_values("train_loss_epoch")
    assert [float(value) for name, value in lines if name == "train_loss_epoch"] == values


def test_training_metrics_are_logged_after_training_and_all_others_after_evaluation():
    log = CollectMetrics()
    own = Probe(
        on_train_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("train_norm", 3),
        on_eval_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("f1", 0.7),
        on_train_epoch_start=lambda trainer, **_: trainer.run_history.update_metric("lr", 0.1),
    )
    train(make_trainer(callbacks=[own, log]), eval_dataset=make_dataset(4))
    assert [sorted(metrics) for metrics in log.logged] == [
        ["train_loss_epoch", "train_norm"],
        ["eval_loss_epoch", "f1", "lr"],
    ]


def test_training_metrics_recorded_during_evaluation_are_logged_after_it():
    log = CollectMetrics()
    late = Probe(on_eval_epoch_start=lambda trainer, **_: trainer.run_history.update_metric("train_late", 1))
    train(make_trainer(callbacks=[late, log]), num_epochs=2, eval_dataset=make_dataset(4))
    assert [sorted(metrics) for metrics in log.logged] == [
        ["train_loss_epoch"],
        ["eval_loss_epoch", "train_late"],
        ["train_loss_epoch"],
        ["eval_loss_epoch", "train_late"],
    ]


def test_each_recorded_value_is_logged_once():
    """Metrics of an earlier run are not logged again, and unchanged metrics are not repeated."""
    log = CollectMetrics()
    once = Probe(on_training_run_start=lambda trainer, **_: trainer.run_history.update_metric("seed", 1))
    trainer = make_trainer(callbacks=[log, once])
    train(trainer, num_epochs=2, eval_dataset=make_dataset(4))
    train(trainer, reset_run_history=False)
    trainer.evaluate(make_dataset(4))
    assert [sorted(metrics) for metrics in log.logged] == [
        ["train_loss_epoch"],
        ["eval_loss_epoch", "seed"],
        ["train_loss_epoch"],
        ["eval_loss_epoch"],
        ["train_loss_epoch"],
        ["seed"],
        ["evaluation_loss"],
    ]


def test_a_run_with_a_reset_history_is_logged_from_the_start():
    log = CollectMetrics()
    trainer = make_trainer(callbacks=[log])
    train(trainer)
    train(trainer)
    assert [sorted(metrics) for metrics in log.logged] == [["train_loss_epoch"]] * 2
    assert log.logged[1]["train_loss_epoch"] == trainer.run_history.get_latest_metric("train_loss_epoch")


def test_intermediate_metrics_are_logged_when_they_are_recorded():
    log = CollectMetrics()
    train(make_trainer(callbacks=[StepBasedEvaluationCallback(1), log]), eval_dataset=make_dataset(4))
    intermediate = ["intermediate_eval_loss_epoch", "intermediate_update"]
    assert [sorted(metrics) for metrics in log.logged] == [
        intermediate,
        intermediate,
        ["train_loss_epoch"],
        ["eval_loss_epoch"],
    ]


def test_the_metrics_of_each_evaluation_dataset_are_logged():
    log = CollectMetrics()
    train(make_trainer(callbacks=[log]), eval_dataset={"near": make_dataset(4), "far": make_dataset(4, seed=5)})
    assert [list(metrics) for metrics in log.logged] == [
        ["train_loss_epoch"],
        ["near_eval_loss_epoch"],
        ["far_eval_loss_epoch"],
    ]


def test_a_resumed_run_does_not_log_restored_metrics(tmp_path):
    trainer = make_trainer()
    train(trainer)
    trainer.save_training_state(tmp_path / "state")
    log = CollectMetrics()
    resumed = make_trainer(callbacks=[log])
    train(resumed, num_epochs=2, resume_from=tmp_path / "state")
    values = resumed.run_history.get_metric_values("train_loss_epoch")
    assert len(values) == 2
    assert log.logged == [{"train_loss_epoch": values[1]}]


def test_callbacks_print_only_through_the_trainer(capsys, monkeypatch):
    trainer = make_trainer(callbacks=[PrintProgressCallback, LogMetricsCallback])
    printed = []
    monkeypatch.setattr(trainer, "print", lambda *args: printed.append(" ".join(args)))
    train(trainer)
    assert capsys.readouterr().out == "", "callbacks print only through `trainer.print`"
    assert [text.split()[0] for text in printed] == ["Starting", "epoch", "Finishing"]


def test_a_later_callback_sees_the_metrics_recorded_by_an_earlier_one():
    seen = []

    class Last(TrainerCallback):
        def on_train_epoch_end(self, trainer, **kwargs):
            seen.append(trainer.run_history.get_latest_metric("train_norm"))

    first = Probe(on_train_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("train_norm", 3))
    train(make_trainer(callbacks=[first, Last]))
    assert seen == [3]
