"""Log points, and the mean loss that is known at them."""

from __future__ import annotations

import itertools

import pytest
import torch

from _support import Probe, make_dataset, make_trainer, train
from pytorch_accelerated import Trainer
from pytorch_accelerated._recording import loss_monitor
from pytorch_accelerated._recording.loss_monitor import LossMonitor
from pytorch_accelerated.metrics import MeanAbsoluteError, WholeSet


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances by 0.04 seconds each time it is read."""
    times = itertools.count()
    monkeypatch.setattr(loss_monitor.time, "monotonic", lambda: next(times) / 25)


def test_log_points_come_ten_times_a_second(clock):
    monitor = LossMonitor()
    assert [monitor.is_due() for _ in range(9)] == [False, False, True] * 3


def test_a_mean_in_host_memory_is_up_to_date():
    monitor = LossMonitor()
    assert monitor.mean is None
    monitor.look({"loss": (torch.tensor(6.0), 2), "accuracy": (1.0, 2)})
    assert monitor.mean == 3.0
    assert monitor.values == {"loss": 3.0, "accuracy": 0.5}


def test_the_recent_loss_at_a_log_point_is_the_mean_of_the_pass_so_far(clock):
    seen = []

    def see(trainer):
        place = "evaluation" if trainer.is_evaluating else trainer.progress.num_batches_in_epoch
        seen.append((place, trainer.recent_loss == pytest.approx(trainer.mean_loss)))

    trainer = make_trainer(callbacks=[Probe(on_log_point=see)])
    train(trainer, make_dataset(32), eval_dataset=make_dataset(16))
    assert seen == [(3, True), (6, True), ("evaluation", True)]


def test_an_intermediate_evaluation_keeps_the_recent_loss_of_training(clock):
    recent = []

    def evaluate(trainer, step, **kwargs):
        before = trainer.recent_loss
        trainer.evaluate_now()
        recent.append((before, trainer.recent_loss))

    train(make_trainer(callbacks=[Probe(on_train_step_end=evaluate)]), make_dataset(32), eval_dataset=make_dataset(40))
    assert recent[0] == (None, None)
    assert all(before == after for before, after in recent)
    assert recent[-1][1] is not None


def test_a_non_finite_loss_of_a_resumed_epoch_is_reported_with_its_step_in_the_whole_epoch(tmp_path):
    """The losses before the resume are not kept one by one."""

    def save(trainer, step, **kwargs):
        if step == 1:
            trainer.save_training_state(tmp_path / "state")

    train(make_trainer(callbacks=[Probe(on_train_step_end=save)], seed=1))
    found = []

    def spoil(trainer, batch_output, step, **kwargs):
        if step == 2:
            batch_output["loss"] = batch_output["loss"] * float("nan")

    def look(trainer, step, **kwargs):
        found.append(trainer.find_non_finite_loss())

    probe = Probe(on_backward_start=spoil, on_train_step_end=look)
    train(make_trainer(callbacks=[probe], seed=1), resume_from=tmp_path / "state")
    assert [error.step for error in found] == [2, 2]
    assert "nan in training, epoch 1, step 2, rank 0" in str(found[0])


def test_no_error_is_found_where_every_loss_is_finite():
    found = []
    train(
        make_trainer(callbacks=[Probe(on_train_epoch_end=lambda trainer: found.append(trainer.find_non_finite_loss()))])
    )
    assert found == [None]


def test_the_recent_metrics_are_those_of_the_pass_so_far_and_to_look_at_them_changes_no_result(clock):
    class Measures(Trainer):
        def calculate_train_batch_loss(self, batch):
            return {**super().calculate_train_batch_loss(batch), "metrics": {"step": 0.5}}

    metrics = {
        "mae": MeanAbsoluteError(),
        "twice": lambda outputs, targets: 2 * (outputs - targets).abs().mean(),
        "named": lambda outputs, targets: {"one": 1.0},
        "vector": lambda outputs, targets: outputs.mean(0),
        "whole": WholeSet(lambda outputs, targets: outputs.max()),
    }
    seen = []

    def run(callbacks):
        torch.manual_seed(1)
        trainer = make_trainer(cls=Measures, callbacks=callbacks, metrics=metrics)
        train(trainer, make_dataset(32), eval_dataset=make_dataset(16))
        return {**trainer.run_history.to_rows()[0], "time": 0}

    with_looks = run([Probe(on_log_point=lambda trainer: seen.append(trainer.recent_metrics))])
    assert with_looks == run([])
    assert seen[0].keys() == {"loss", "step", "mae", "twice", "named_one", "vector"}
    assert seen[-1].keys() == {"loss", "mae", "twice", "named_one", "vector"}
    assert all(values["twice"] == pytest.approx(2 * values["mae"]) for values in seen)
