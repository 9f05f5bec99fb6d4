"""What programs written for 0.1.61 observe of the run history and of `LossTracker`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from _support import Probe, losses, make_dataset, make_trainer, train
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LogMetricsCallback, SaveBestModelCallback, TrainerCallback
from pytorch_accelerated.tracking import InMemoryRunHistory, LossTracker, RunHistory

# --- the history -------------------------------------------------------------------------------------------------


def test_an_unknown_metric_has_no_values_and_is_not_created_by_asking():
    """Row 11.1."""
    history = InMemoryRunHistory()
    assert history.get_metric_values("x") == []
    assert history.get_metric_names() == set()
    with pytest.raises(ValueError, match="Nothing was recorded under the metric name 'x'"):
        history.get_latest_metric("x")


def test_the_values_of_a_metric_are_a_copy():
    """Row 11.2, which stays ours."""
    history = InMemoryRunHistory()
    history.update_metric("a", 1)
    history.get_metric_values("a").append(2)
    assert history.get_metric_values("a") == [1]


@pytest.mark.parametrize("error", [KeyError, ValueError])
def test_deleting_an_unknown_metric_is_an_error_of_both_kinds(error):
    """Row 11.3."""
    with pytest.raises(error) as caught:
        InMemoryRunHistory().delete_metric("x")
    assert str(caught.value) == "Nothing was recorded under the metric name 'x'. Recorded so far: []."


def test_the_attributes_of_the_history_have_the_names_that_subclasses_use():
    """Row 11.4."""

    class Own(InMemoryRunHistory):
        def update_metric(self, metric_name, metric_value):
            self._metrics[self._prefix + metric_name].append(metric_value)

        def last(self, name):
            return self._metrics[name][-1]

    history = Own()
    history._metrics["a"].extend([0, 1])
    assert history.get_metric_values("a") == [0, 1]
    assert history.get_latest_metric("a") == 1
    history.set_metric_name_prefix("ema_")
    history.update_metric("b", 2)
    assert history._prefix == "ema_"
    assert history.last("ema_b") == 2
    history._current_epoch = 4
    assert history.current_epoch == 4


def test_a_name_that_was_only_looked_at_has_no_value():
    """Row 11.4: reading a `defaultdict` creates an empty list."""
    trainer = make_trainer(callbacks=[LogMetricsCallback()])
    assert trainer.run_history._metrics["seen"] == []
    with pytest.raises(ValueError, match="Nothing was recorded"):
        trainer.run_history.get_latest_metric("seen")


# --- the mean ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["host", "accelerator"])
def _device(request, monkeypatch):
    """Buffers for an accelerator are tested in host memory, which every machine has."""
    if request.param == "accelerator":
        monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)


def test_the_average_of_nothing_is_zero():
    """Row 11.5."""
    tracker = LossTracker()
    assert tracker.average == 0
    tracker.update(3.0, 2)
    tracker.reset()
    assert tracker.average == 0


def test_an_epoch_without_batches_still_records_nan():
    """Row 11.5: only the tracker says 0."""
    seen = []
    probe = Probe(on_train_epoch_start=lambda trainer, **_: seen.append(trainer.mean_loss))
    trainer = make_trainer(callbacks=[probe])
    train(trainer)
    trainer._loop_run.training.epoch.means.loss.reset()
    trainer._add_epoch_loss_to_run_history("empty")
    assert math.isnan(seen[0])
    assert math.isnan(trainer.run_history.get_latest_metric("empty"))


@pytest.mark.usefixtures("_device")
@pytest.mark.parametrize("as_value", [float, torch.tensor])
def test_the_last_value_can_be_read_at_any_time(as_value):
    """Row 11.6: also where the buffer has just been summed."""
    tracker = LossTracker()
    assert tracker.loss_value == 0
    for number in range(200):
        tracker.update(as_value(float(number)), 2)
        assert float(tracker.loss_value) == number
    tracker.loss_value = 7.5
    assert tracker.loss_value == 7.5
    assert float(tracker.running_count) == 400
    tracker.update(as_value(1.0), 2)
    assert float(tracker.loss_value) == 1.0
    other = LossTracker()
    other.load_state_dict(tracker.state_dict())
    assert float(other.loss_value) == 1.0
    tracker.reset()
    assert tracker.loss_value == 0


@pytest.mark.usefixtures("_device")
@pytest.mark.parametrize("as_value", [float, torch.tensor])
@pytest.mark.parametrize("num_before", [0, 1, 64, 65, 130])
def test_sum_and_weight_can_be_set(as_value, num_before):
    """Row 11.6."""
    tracker = LossTracker()
    for _ in range(num_before):
        tracker.update(as_value(2.0), 4)
    tracker.total_loss += 1
    tracker.running_count += 3
    assert float(tracker.total_loss) == 8 * num_before + 1
    assert float(tracker.running_count) == 4 * num_before + 3
    tracker.update(as_value(5.0), 1)
    assert float(tracker.average) == pytest.approx((8 * num_before + 6) / (4 * num_before + 4), rel=1e-15)
    restored = LossTracker()
    restored.load_state_dict(tracker.state_dict())
    assert restored.average == tracker.average
    tracker.total_loss = 0
    tracker.running_count = 0
    assert tracker.average == 0


def test_a_tracker_that_keeps_its_sums_itself_is_used_by_the_loop():
    """Row 11.6: a subclass that does what `update` of 0.1.61 did, here with a decay."""

    class Own(LossTracker):
        def update(self, loss_batch_value, batch_size=1):
            self.loss_value = loss_batch_value.detach()
            self.total_loss += self.loss_value * batch_size
            self.running_count += batch_size

    values = []

    def install(trainer, **_):
        trainer._loss_tracker = Own()

    def look(trainer, batch_output, **_):
        values.append(batch_output["loss"].item())
        assert trainer._loss_tracker.loss_value == batch_output["loss"]

    trainer = make_trainer(callbacks=[Probe(on_train_epoch_start=install, on_train_step_end=look)])
    train(trainer, dataset=32)
    assert losses(trainer) == [pytest.approx(np.mean(values), rel=1e-6)]


def test_a_value_with_several_elements_is_refused():
    """Row 11.7, which stays ours."""
    with pytest.raises(RuntimeError):
        LossTracker().update(torch.ones(3))


# --- what callbacks record during `evaluate` ----------------------------------------------------------------------


class Accuracy(TrainerCallback):
    """Records the next number as ``accuracy`` after each evaluation, and what its name means then."""

    def __init__(self, start=0):
        self.number = start
        self.seen = []

    def on_eval_epoch_end(self, trainer, **kwargs):
        self.number += 1
        trainer.run_history.update_metric("accuracy", self.number)
        self.seen.append(trainer.run_history.get_latest_metric("accuracy"))


def test_what_is_recorded_during_evaluate_is_a_series_of_its_own():
    """Row 11.8."""
    trainer = make_trainer(callbacks=[Accuracy()])
    train(trainer, num_epochs=2, eval_dataset=make_dataset(8))
    trainer.evaluate(make_dataset(8))
    history = trainer.run_history
    assert history.get_metric_values("accuracy") == [1, 2]
    assert history.get_metric_values("evaluation_accuracy") == [3]
    assert history.get_latest_metric("accuracy") == 3
    assert len(history.get_metric_values("evaluation_loss")) == 1
    assert history.get_metric_names() == {
        "accuracy",
        "evaluation_accuracy",
        "evaluation_loss",
        "train_loss_epoch",
        "eval_loss_epoch",
    }
    train(trainer, num_epochs=1, eval_dataset=make_dataset(8), reset_run_history=False)
    assert history.get_latest_metric("accuracy") == 4
    assert history.get_metric_values("accuracy") == [1, 2, 4]
    trainer.evaluate(make_dataset(8))
    assert history.get_metric_values("evaluation_accuracy") == [3, 5]
    assert trainer.callback_handler.callbacks[0].seen == [1, 2, 3, 4, 5]


def test_hooks_and_events_around_the_evaluation_belong_to_it():
    """Row 11.8."""

    class Recording(Trainer):
        def evaluation_run_start(self):
            self.run_history.update_metric("start", 1)

        def eval_epoch_end(self):
            self.run_history.update_metric("epoch", 2)

        def evaluation_run_end(self):
            self.run_history.update_metric("end", 3)
            assert self.run_history.get_latest_metric("end") == 3

    record = Probe(on_evaluation_run_end=lambda trainer, **_: trainer.run_history.update_metric("event", 4))
    trainer = make_trainer(cls=Recording, callbacks=[record])
    trainer.evaluate(make_dataset(8))
    names = {f"evaluation_{name}" for name in ("start", "epoch", "end", "event", "loss")}
    assert trainer.run_history.get_metric_names() == names
    trainer.run_history.update_metric("after", 5)
    assert trainer.run_history.get_metric_values("after") == [5]


def test_a_name_that_says_so_already_gets_no_second_prefix():
    """Row 11.8: also where a subclass records the loss itself."""

    class Recording(Trainer):
        def _add_epoch_loss_to_run_history(self, name):
            self.run_history.update_metric(name, self._loss_tracker.average)

    record = Probe(on_eval_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("evaluation_f1", 1))
    trainer = make_trainer(cls=Recording, callbacks=[record])
    trainer.evaluate({"near": make_dataset(8), "far": make_dataset(8)})
    assert trainer.run_history.get_metric_names() == {
        "near_evaluation_loss",
        "near_evaluation_f1",
        "far_evaluation_loss",
        "far_evaluation_f1",
    }


def test_each_dataset_has_its_own_series():
    """Row 11.8, with a dictionary of datasets."""
    accuracy = Accuracy()
    trainer = make_trainer(callbacks=[accuracy])
    datasets = {"near": make_dataset(8), "far": make_dataset(8)}
    train(trainer, num_epochs=2, eval_dataset=datasets)
    trainer.evaluate(datasets)
    history = trainer.run_history
    assert accuracy.seen == [1, 2, 3, 4, 5, 6]
    assert history.get_metric_values("near_accuracy") == [1, 3]
    assert history.get_metric_values("near_evaluation_accuracy") == [5]
    assert history.get_latest_metric("near_accuracy") == 5
    assert history.get_latest_metric("far_accuracy") == 6


def test_evaluate_before_any_training_is_found_under_the_plain_name():
    """Row 11.8: a script that only evaluates reads its metric as it did with 0.1.61."""
    trainer = make_trainer(callbacks=[Accuracy()])
    trainer.evaluate(make_dataset(8))
    assert trainer.run_history.get_latest_metric("accuracy") == 1
    assert trainer.run_history.get_metric_values("accuracy") == [1]


def test_evaluate_within_a_run_changes_no_decision_of_the_run(tmp_path):
    """Row 11.8: the best model is chosen by the values of training, although the test value is newer."""

    def evaluate(trainer, **_):
        trainer.evaluate(make_dataset(4))

    accuracy = Accuracy()
    best = SaveBestModelCallback(tmp_path / "best.pt", "accuracy", greater_is_better=True, load_saved_checkpoint=False)
    trainer = make_trainer(callbacks=[accuracy, Probe(on_training_run_epoch_end=evaluate), best])
    train(trainer, num_epochs=2, eval_dataset=make_dataset(8))
    assert losses(trainer, "accuracy") == [1, 3]
    assert losses(trainer, "evaluation_accuracy") == [2, 4]
    assert best.best_metric == 3


def test_what_a_name_means_is_part_of_the_state():
    """Row 11.8: after a resume, too, the newest value is found."""
    history = InMemoryRunHistory()
    history.update_metric("a", 1)
    with history.recording_evaluation():
        history.update_metric("a", 2)
    restored = InMemoryRunHistory()
    restored.load_state_dict(history.state_dict())
    assert restored.get_latest_metric("a") == 2
    restored.delete_metric("evaluation_a")
    assert restored.get_latest_metric("a") == 1
    old = InMemoryRunHistory()
    old.load_state_dict({"current_epoch": 2, "metrics": {"a": [1]}})
    assert old.get_latest_metric("a") == 1


def test_a_failed_evaluation_leaves_the_history_as_it_was():
    """Row 11.8."""

    def fail(trainer, **_):
        raise RuntimeError("broken")

    trainer = make_trainer(callbacks=[Probe(on_eval_epoch_end=fail)])
    with pytest.raises(RuntimeError, match="broken"):
        trainer.evaluate(make_dataset(8))
    trainer.run_history.update_metric("a", 1)
    assert trainer.run_history.get_metric_values("a") == [1]


def test_a_history_of_the_users_records_evaluations_as_it_likes():
    """Row 11.8: a `RunHistory` with nothing but the abstract methods works in `evaluate`."""

    class Own(RunHistory):
        metric_name_prefix = ""
        current_epoch = 1

        def __init__(self):
            self.values = []

        def get_metric_names(self):
            return {name for name, _ in self.values}

        def get_metric_values(self, metric_name):
            return (value for name, value in self.values if name == metric_name)

        def get_latest_metric(self, metric_name):
            return list(self.get_metric_values(metric_name))[-1]

        def update_metric(self, metric_name, metric_value):
            self.values.append((metric_name, metric_value))

        def delete_metric(self, metric_name):
            """Not needed."""

        def set_metric_name_prefix(self, prefix=""):
            """Not needed."""

        def _set_epoch(self, epoch):
            """Not needed."""

        def _increment_epoch(self):
            """Not needed."""

        def reset(self):
            self.values = []

    trainer = make_trainer(callbacks=[Accuracy()], run_history=Own())
    train(trainer, eval_dataset=make_dataset(8))
    trainer.evaluate(make_dataset(8))
    assert trainer.run_history.get_metric_names() == {
        "train_loss_epoch",
        "eval_loss_epoch",
        "evaluation_loss",
        "accuracy",
    }
