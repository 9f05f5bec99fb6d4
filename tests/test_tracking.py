"""The run history, and weighted means on the device."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

from _support import make_dataset, make_trainer, train
from pytorch_accelerated import Trainer
from pytorch_accelerated._means import EpochMeans, LossTracker, as_number, weighted_mean
from pytorch_accelerated.callbacks import StepBasedEvaluationCallback
from pytorch_accelerated.tracking import InMemoryRunHistory, RunHistory


@pytest.fixture(autouse=True, params=["values in host memory", "values on an accelerator"])
def _where_the_values_are(request, monkeypatch):
    """Buffers for an accelerator are tested in host memory, which every machine has."""
    if request.param == "values on an accelerator":
        monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)


def test_a_history_keeps_values_of_any_type_in_order():
    history = InMemoryRunHistory()
    values = [1.0, -1, np.float64(0.5), torch.tensor(2.0), torch.ones(3), {"a": 1}]
    for value in values:
        history.update_metric("metric", value)
    kept = history.get_metric_values("metric")
    assert all(one is other for one, other in zip(kept, values, strict=True))
    assert history.get_latest_metric("metric") is values[-1]
    kept.clear()
    assert len(history.get_metric_values("metric")) == 6
    assert history.get_metric_names() == {"metric"}


@pytest.mark.parametrize("method", ["get_latest_metric", "delete_metric"])
def test_an_unknown_metric_is_an_error_that_lists_the_known_ones(method):
    history = InMemoryRunHistory()
    history.update_metric("b", 1)
    history.update_metric("a", 1)
    with pytest.raises(ValueError, match=r"metric name 'c'. Recorded so far: \['a', 'b'\]"):
        getattr(history, method)("c")
    assert history.get_metric_names() == {"a", "b"}


def test_a_deleted_metric_is_gone_from_the_history():
    history = InMemoryRunHistory()
    history.update_metric("a", 1)
    history.delete_metric("a")
    assert history.get_metric_names() == set()


def test_a_prefix_applies_to_metrics_recorded_after_it_was_set():
    history = InMemoryRunHistory()
    history.update_metric("a", 1)
    history.set_metric_name_prefix("ema_")
    history.update_metric("a", 2)
    assert history.metric_name_prefix == "ema_"
    history.set_metric_name_prefix()
    history.update_metric("a", 3)
    assert (history.get_metric_values("a"), history.get_metric_values("ema_a")) == ([1, 3], [2])


def test_the_history_counts_epochs_from_one_and_reset_returns_to_one():
    history = InMemoryRunHistory()
    assert history.current_epoch == 1
    history._increment_epoch()
    history._set_epoch(history.current_epoch + 4)
    history.update_metric("a", 1)
    assert history.current_epoch == 6
    history.reset()
    assert (history.current_epoch, history.get_metric_names()) == (1, set())


def test_a_history_is_restored_from_its_state_dict():
    history, other = InMemoryRunHistory(), InMemoryRunHistory()
    for value in (1, 2):
        history.update_metric("a", value)
    history._set_epoch(3)
    other.update_metric("b", 9)
    other.load_state_dict(history.state_dict())
    assert other.state_dict() == history.state_dict()
    assert other.state_dict().items() >= {"current_epoch": 3, "metrics": {"a": [1, 2]}, "newest_series": {}}.items()
    other.update_metric("a", 3)
    assert history.get_metric_values("a") == [1, 2]


def test_a_run_history_without_its_methods_cannot_be_instantiated():
    with pytest.raises(TypeError, match="abstract"):
        RunHistory()


# --- weighted means ----------------------------------------------------------------------------------------------

UPDATES = [(1.0, 3), (2.0, 1), (4.0, 4)]
MEAN = (1.0 * 3 + 2.0 + 4.0 * 4) / 8


def test_weights_of_any_type_and_order_give_the_same_mean():
    for sizes in itertools.permutations([torch.tensor(3), 2.5, torch.tensor(0.5), 2]):
        tracker = LossTracker()
        for size in sizes:
            tracker.update(2.0, size)
        assert tracker.average == 2.0
        assert float(tracker.running_count) == 8.0
    assert [float(size) for size in sizes] == [2, 0.5, 2.5, 3], "the tensors of the caller must not change"


@pytest.mark.parametrize("batch_size", [int, float, torch.tensor])
@pytest.mark.parametrize("value", [float, torch.tensor, lambda value: torch.tensor([[value]], dtype=torch.float16)])
def test_the_average_is_weighted_by_batch_size(value, batch_size):
    tracker = LossTracker()
    assert tracker.average == 0
    for loss, size in UPDATES:
        tracker.update(value(loss), batch_size(size))
    assert tracker.average == MEAN
    tracker.reset()
    assert tracker.average == 0
    tracker.update(2.5)
    assert tracker.average == 2.5


class NamedTracker(LossTracker):
    """A subclass whose constructor takes an argument."""

    def __init__(self, name):
        super().__init__()
        self.name = name


def test_reset_works_in_a_subclass_with_another_constructor():
    tracker = NamedTracker("validation")
    tracker.update(torch.tensor(4.0), 2)
    tracker.reset()
    assert tracker.average == 0
    assert (tracker.name, float(tracker.running_count)) == ("validation", 0.0)


def test_a_state_can_be_loaded_into_a_subclass_with_another_constructor():
    tracker, restored = LossTracker(), NamedTracker("validation")
    tracker.update(torch.tensor(4.0), 2)
    restored.update(torch.tensor(9.0), 2)
    restored.load_state_dict(tracker.state_dict())
    assert (restored.name, restored.average) == ("validation", 4.0)


def test_numbers_and_tensors_can_be_mixed_in_one_mean():
    tracker = LossTracker()
    tracker.update(1.0, 3)
    tracker.update(torch.tensor(2.0), torch.tensor(1))
    tracker.update(4.0, 4)
    assert tracker.average == MEAN


def test_update_changes_no_tensor_of_the_caller_and_keeps_no_graph():
    tracker = LossTracker()
    loss, size = torch.tensor(2.0, requires_grad=True), torch.tensor(4)
    for _ in range(3):
        tracker.update(loss * 1, size)
        tracker.update(loss, 2)
    assert (loss.item(), size.item()) == (2.0, 4)
    assert not torch.as_tensor(tracker.total_loss).requires_grad


def test_many_small_losses_are_summed_without_loss_of_precision():
    tracker = LossTracker()
    loss = torch.tensor(0.1)
    for _ in range(20_000):
        tracker.update(loss, 1)
    assert tracker.average == pytest.approx(loss.item(), rel=1e-12)


def test_a_restored_tracker_continues_from_its_state():
    tracker, other = LossTracker(), LossTracker()
    tracker.update(torch.tensor(1.0), 3)
    other.load_state_dict(tracker.state_dict())
    for half in (tracker, other):
        half.update(torch.tensor(2.0), 1)
        half.update(torch.tensor(4.0), 4)
    assert tracker.average == other.average == MEAN


def test_epoch_means_return_their_sums_by_the_names_they_are_recorded_under():
    means = EpochMeans()
    for loss, size in UPDATES:
        means.loss.update(loss, size)
        means.update_metrics({"metrics": {"top_1": loss, "auc": 0.5}}, size)
    means.update_metrics({"metrics": None}, 4)
    means.update_metrics({}, 4)
    sums = means.sums("train_loss_epoch")
    assert list(sums) == ["train_loss_epoch", "train_auc", "train_top_1"]
    assert [weighted_mean(*sums[name]) for name in sums] == [MEAN, 0.5, MEAN]
    assert set(means.sums("evaluation_loss")) == {"evaluation_loss", "evaluation_auc", "evaluation_top_1"}


def test_restored_epoch_means_continue_from_their_state():
    means, other = EpochMeans(), EpochMeans()
    means.loss.update(1.0, 3)
    means.update_metrics({"metrics": {"a": 5.0}}, 3)
    other.load_state_dict(means.state_dict())
    for half in (means, other):
        half.loss.update(2.0, 1)
        half.update_metrics({"metrics": {"a": 1.0}}, 1)
    assert other.sums("train_loss_epoch") == means.sums("train_loss_epoch")


def test_the_mean_of_no_values_is_nan():
    assert math.isnan(weighted_mean(0.0, 0))
    assert weighted_mean(torch.tensor(6.0), torch.tensor(4)) == 1.5


@pytest.mark.parametrize("value", [2, 2.0, np.float64(2), torch.tensor(2.0), torch.tensor([2.0]), "2"])
def test_a_metric_with_one_element_is_converted_to_a_number(value):
    assert as_number(value) == 2.0


@pytest.mark.parametrize("value", [None, torch.ones(2), {"a": 1}, "high"])
def test_a_metric_that_is_not_a_single_number_is_rejected(value):
    with pytest.raises(ValueError, match=r"The metric is .* Expected a single number"):
        as_number(value)


# --- losses that are summed a block at a time ----------------------------------------------------------------------

MANY = 3 * 64 + 7


def test_the_mean_is_exact_over_several_blocks():
    values = torch.rand(MANY)
    for weights in ([8] * MANY, [1 + i % 5 for i in range(MANY)], [torch.tensor(1 + i % 3) for i in range(MANY)]):
        tracker = LossTracker()
        for value, weight in zip(values, weights, strict=True):
            tracker.update(value, weight)
        exact = sum(value.item() * float(weight) for value, weight in zip(values, weights, strict=True))
        assert float(tracker.total_loss) == pytest.approx(exact, rel=1e-14)
        assert float(tracker.running_count) == sum(map(float, weights))


def test_reading_or_saving_the_sums_does_not_change_them():
    """Otherwise the last digits would depend on the progress bar, and on whether a run was resumed."""
    looked_at, left_alone, resumed = LossTracker(), LossTracker(), LossTracker()
    for number, value in enumerate(torch.rand(MANY)):
        for tracker in (looked_at, left_alone, resumed):
            tracker.update(value, 3)
        assert looked_at.average > 0
        if number % 50 == 20:
            state, resumed = resumed.state_dict(), LossTracker()
            resumed.load_state_dict(state)
    assert looked_at.average == left_alone.average == resumed.average


def test_changing_a_loss_after_update_does_not_change_the_mean():
    tracker, loss, weight = LossTracker(), torch.tensor(2.0), torch.tensor(3)
    tracker.update(loss, weight)
    loss.zero_()
    weight.zero_()
    assert tracker.average == 2.0


def test_a_loss_that_is_a_view_does_not_keep_the_large_tensor_alive():
    tracker, large = LossTracker(), torch.ones(10_000)
    tracker.update(large[3])
    assert len(pickle.dumps(tracker)) < 10_000


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tracker: pickle.loads(pickle.dumps(tracker))])
def test_a_copied_tracker_is_independent_of_the_original(copied):
    tracker = LossTracker()
    tracker.update(torch.tensor(2.0))
    other = copied(tracker)
    other.update(torch.tensor(5.0))
    assert (tracker.average, other.average) == (2.0, 3.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_of_any_precision_and_shape_are_averaged_exactly(dtype):
    losses = [torch.rand(shape, dtype=dtype) for shape in ((), (1,), (1, 1))]
    tracker = LossTracker()
    for loss in losses:
        tracker.update(loss)
    assert tracker.average == pytest.approx(sum(loss.double().item() for loss in losses) / 3, rel=1e-15)


@pytest.mark.parametrize("bad_index", [0, 5, 63, 64, 65, MANY - 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_find_non_finite_returns_the_first_bad_loss(bad_index, value):
    tracker = LossTracker()
    assert tracker.find_non_finite() is None
    for index in range(MANY):
        tracker.update(torch.tensor(value if index in (bad_index, bad_index + 2) else 1.0), 2)
    index, found = tracker.find_non_finite()
    assert index == bad_index
    assert not math.isfinite(found)


def test_find_non_finite_returns_the_first_bad_loss_among_plain_numbers():
    tracker = LossTracker()
    for loss in (torch.tensor(1.0), 2.0, math.inf, torch.tensor(3.0)):
        tracker.update(loss, 1)
    assert tracker.find_non_finite() == (2, math.inf)


def test_find_non_finite_ignores_a_custom_loss_tracker():
    means = EpochMeans()
    means.loss = object()
    assert means.find_non_finite() is None


def test_a_tracker_state_without_buffered_values_can_be_loaded():
    tracker = LossTracker()
    tracker.load_state_dict({"total_loss": torch.tensor(6.0), "running_count": torch.tensor(3.0)})
    tracker.update(torch.tensor(4.0), 1)
    assert tracker.average == 2.5


@pytest.mark.parametrize("name", ["loss", "loss_epoch"])
def test_a_metric_of_a_step_with_the_name_of_the_loss_is_refused(name):
    with pytest.raises(ValueError, match=f"a metric with the name '{name}', under which the library records the loss"):
        EpochMeans().update_metrics({"metrics": {name: 1.0}}, 4)


@pytest.mark.parametrize("value", [None, "high", "0.5", b"1", 1j, torch.tensor(1j), [0.1, 0.2], {"a": 1}, np.ones(2)])
def test_a_metric_of_a_step_that_is_no_number_is_refused_by_its_name(value):
    with pytest.raises(TypeError, match=r"The metric 'f1' of a step is .*Expected a number"):
        EpochMeans().update_metrics({"metrics": {"f1": value}}, 4)


def test_a_metric_of_a_step_without_a_name_is_refused():
    with pytest.raises(TypeError, match="A step returned a metric with the name 3, of type int"):
        EpochMeans().update_metrics({"metrics": {3: 1.0}}, 4)


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        Fraction(1, 2),
        np.float32(0.5),
        np.array(0.5),
        np.full((1, 1), 0.5),
        torch.tensor(0.5),
        torch.full((1, 1), 0.5),
        True,
    ],
)
def test_a_metric_of_a_step_may_be_any_single_number(value):
    means = EpochMeans()
    means.update_metrics({"metrics": {"f1": value}}, 4)
    total, weight = means.sums("train_loss_epoch")["train_f1"]
    assert float(total) == (4 if value is True else 2)
    assert weight == 4


@pytest.mark.parametrize("metrics", [[0.5], "high", 0.5, torch.tensor([0.5, 1.0])])
def test_metrics_that_have_no_names_are_for_callbacks_only(metrics):
    means = EpochMeans()
    with pytest.warns(UserWarning, match=r"A step returned `metrics` of type .*Only callbacks will see it"):
        means.update_metrics({"metrics": metrics}, 4)
    assert list(means.sums("train_loss_epoch")) == ["train_loss_epoch"]


@pytest.mark.parametrize("name", ["loss", "loss_epoch"])
@pytest.mark.parametrize("call", ["train", "evaluation in a run", "intermediate evaluation", "evaluate"])
@pytest.mark.parametrize("dataset_name", [None, "test"])
def test_a_name_of_the_library_is_refused_in_every_pass(call, name, dataset_name):
    class Measuring(Trainer):
        def calculate_train_batch_loss(self, batch):
            return self.measured(super().calculate_train_batch_loss(batch), call == "train")

        def calculate_eval_batch_loss(self, batch):
            return self.measured(super().calculate_eval_batch_loss(batch), call != "train")

        def measured(self, output, is_named):
            return {**output, "metrics": {name if is_named else "accuracy": 0.5}}

    callbacks = [StepBasedEvaluationCallback(1)] if call == "intermediate evaluation" else []
    trainer = make_trainer(callbacks=callbacks, cls=Measuring)
    eval_dataset = make_dataset(4) if dataset_name is None else {dataset_name: make_dataset(4)}
    train_and_evaluate = partial(train, trainer, 8, eval_dataset=eval_dataset)
    start = partial(trainer.evaluate, eval_dataset) if call == "evaluate" else train_and_evaluate
    with pytest.raises(ValueError, match=f"a metric with the name '{name}'"):
        start()
