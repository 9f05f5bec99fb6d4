"""What a run prints."""

from __future__ import annotations

import re

import torch

from _support import Probe, make_dataset, make_trainer, raiser
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    LogMetricsCallback,
    PrintProgressCallback,
    StepBasedEvaluationCallback,
    TrainerCallback,
)
from pytorch_accelerated.exceptions import StopTrainingError


def train(trainer, **kwargs):
    trainer.train(make_dataset(8), **{"num_epochs": 1, "per_device_batch_size": 4, **kwargs})


class CollectMetrics(LogMetricsCallback):
    """Sends the metrics into a list; does not call ``super().__init__()``, as older subclasses do not."""

    def __init__(self):
        self.logged = []

    def log_metrics(self, trainer, metrics):
        self.logged.append(dict(metrics))


class WithAccuracy(Trainer):
    def calculate_eval_batch_loss(self, batch):
        return {**super().calculate_eval_batch_loss(batch), "metrics": {"accuracy": torch.tensor(0.5)}}


def test_progress_is_printed_line_by_line(capsys):
    trainer = make_trainer(callbacks=[PrintProgressCallback])
    train(trainer, num_epochs=2, eval_dataset=make_dataset(4))
    trainer.evaluate(make_dataset(4))
    assert capsys.readouterr().out == (
        "\nStarting training run\n\nStarting epoch 1\n\nStarting epoch 2\nFinishing training run\n"
        "\nStarting evaluation run\nFinishing evaluation run\n"
    )


def test_the_reason_of_an_early_stop_is_printed(capsys):
    stop = Probe(on_train_epoch_end=raiser(StopTrainingError("that will do")))
    train(make_trainer(callbacks=[stop, PrintProgressCallback]), num_epochs=3)
    assert capsys.readouterr().out.splitlines() == [
        *["", "Starting training run", "", "Starting epoch 1", "", "Stopping: that will do", "Finishing training run"]
    ]


def test_metrics_are_printed_a_line_each(capsys):
    trainer = make_trainer(cls=WithAccuracy, callbacks=[LogMetricsCallback])
    train(trainer, num_epochs=2, eval_dataset=make_dataset(4))
    trainer.evaluate(make_dataset(4))
    lines = [line.split(": ") for line in capsys.readouterr().out.splitlines()]
    epoch = ["train_loss_epoch", "eval_accuracy", "eval_loss_epoch"]
    assert [name for name, _ in lines] == [*epoch, *epoch, "evaluation_accuracy", "evaluation_loss"]
    values = trainer.run_history.get_metric_values("train_loss_epoch")
    assert [float(value) for name, value in lines if name == "train_loss_epoch"] == values


def test_metrics_of_training_come_after_training_and_all_others_after_evaluation():
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


def test_metrics_of_training_that_are_recorded_in_evaluation_wait_for_the_next_training_epoch():
    log = CollectMetrics()
    late = Probe(on_eval_epoch_start=lambda trainer, **_: trainer.run_history.update_metric("train_late", 1))
    train(make_trainer(callbacks=[late, log]), num_epochs=2, eval_dataset=make_dataset(4))
    assert [sorted(metrics) for metrics in log.logged] == [
        ["train_loss_epoch"],
        ["eval_loss_epoch"],
        ["train_late", "train_loss_epoch"],
        ["eval_loss_epoch"],
    ]


def test_each_value_is_logged_once():
    """What an earlier run recorded is not logged again, and what did not change is not repeated."""
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
        ["evaluation_loss"],
    ]


def test_a_run_with_a_new_history_is_logged_from_its_beginning():
    log = CollectMetrics()
    trainer = make_trainer(callbacks=[log])
    train(trainer)
    train(trainer)
    assert [sorted(metrics) for metrics in log.logged] == [["train_loss_epoch"]] * 2
    assert log.logged[1]["train_loss_epoch"] == trainer.run_history.get_latest_metric("train_loss_epoch")


def test_intermediate_metrics_are_logged_when_they_are_there():
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


def test_a_resumed_run_does_not_log_what_it_has_restored(tmp_path):
    trainer = make_trainer()
    train(trainer)
    trainer.save_training_state(tmp_path / "state")
    log = CollectMetrics()
    resumed = make_trainer(callbacks=[log])
    train(resumed, num_epochs=2, resume_from=tmp_path / "state")
    values = resumed.run_history.get_metric_values("train_loss_epoch")
    assert len(values) == 2
    assert log.logged == [{"train_loss_epoch": values[1]}]


def test_only_the_main_process_prints(capsys, monkeypatch):
    trainer = make_trainer(callbacks=[PrintProgressCallback, LogMetricsCallback])
    printed = []
    monkeypatch.setattr(trainer, "print", lambda *args: printed.append(" ".join(args)))
    train(trainer)
    assert capsys.readouterr().out == "", "callbacks print through `trainer.print` alone"
    assert re.fullmatch(r"train_loss_epoch: \d\.\d+", printed[2])


def test_a_callback_behind_sees_the_metrics_of_one_in_front():
    seen = []

    class Last(TrainerCallback):
        def on_train_epoch_end(self, trainer, **kwargs):
            seen.append(trainer.run_history.get_latest_metric("train_norm"))

    first = Probe(on_train_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("train_norm", 3))
    train(make_trainer(callbacks=[first, Last]))
    assert seen == [3]
