"""What is gathered for a metric: its state restores it, and several states together give the result of all samples."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric, MetricCollection, PearsonCorrCoef
from torchmetrics.classification import BinaryAUROC
from torchmetrics.wrappers import Running

import _measured
from pytorch_accelerated._checkpoint.files import as_plain
from pytorch_accelerated._measuring.accumulators import create_accumulator, create_accumulators, weighted
from pytorch_accelerated.metrics import Accuracy, FromLoss, TopKAccuracy, WholeSet

CPU = torch.device("cpu")
METRICS = {
    **_measured.make_metrics(),
    "ragged": WholeSet(lambda outputs, targets: outputs.sum(), padding_value=0.0),
    "module": nn.CrossEntropyLoss(),
}


def steps(num_steps=5, seed=0):
    """Return outputs and targets of batches of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [4, 1, 3, 2, 5][:num_steps]
    return [(torch.randn(size, 3, generator=generator), torch.arange(size) % 3) for size in sizes]


def create(metric):
    return next(iter(create_accumulators({"m": metric}, CPU).values()))


def gathered(metric, batches):
    accumulator = create(metric)
    for outputs, targets in batches:
        accumulator.update((outputs, targets), {}, len(targets))
    return accumulator


def same(left, right, tolerance=1e-6):
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        return all(same(left[key], right[key], tolerance) for key in left)
    return torch.allclose(torch.as_tensor(left).double(), torch.as_tensor(right).double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", METRICS)
def test_states_of_processes_give_the_result_of_all_steps(name):
    """Steps are dealt in turn; the third process has none."""
    batches = steps()
    alone = gathered(METRICS[name], batches)
    expected = alone.compute([alone.state_dict()], 0.7)
    processes = [gathered(METRICS[name], part) for part in (batches[::2], batches[1::2], [])]
    states = [copy.deepcopy(each.state_dict()) for each in processes]
    for process in processes:
        assert same(process.compute(states, 0.7), expected)


@pytest.mark.parametrize("name", METRICS)
def test_a_state_restores_everything(name):
    """Through the plain form in which it is saved, in the middle of a pass, bit by bit."""
    batches = steps()
    expected = gathered(METRICS[name], batches)
    first = gathered(METRICS[name], batches[:2])
    state = as_plain(copy.deepcopy(first.state_dict()))
    first.reset()
    restored = create(METRICS[name])
    restored.load_state_dict(state)
    for outputs, targets in batches[2:]:
        restored.update((outputs, targets), {}, len(targets))
    assert same(restored.compute([restored.state_dict()], 0.7), expected.compute([expected.state_dict()], 0.7), 0.0)


@pytest.mark.parametrize("name", METRICS)
def test_a_reset_forgets_everything(name):
    accumulator = gathered(METRICS[name], steps())
    accumulator.reset()
    if not isinstance(METRICS[name], FromLoss):
        assert accumulator.compute([accumulator.state_dict()], 0.7) in (None, {"m": None})
    for outputs, targets in steps(seed=1):
        accumulator.update((outputs, targets), {}, len(targets))
    expected = gathered(METRICS[name], steps(seed=1))
    assert same(accumulator.compute([accumulator.state_dict()], 0.7), expected.compute([expected.state_dict()], 0.7))


def test_a_wrapper_is_restored_with_the_metrics_in_it():
    expected = create_accumulator(Running(MeanMetric(), window=2), CPU)
    for value in (1.0, 2.0, 4.0):
        expected.update((value,), {}, 1)
    restored = create_accumulator(Running(MeanMetric(), window=2), CPU)
    restored.load_state_dict(copy.deepcopy(expected.state_dict()))
    for each in (expected, restored):
        each.update((8.0,), {}, 1)
    assert expected.compute([expected.state_dict()], 0.0) == 6.0
    assert restored.compute([restored.state_dict()], 0.0) == 6.0


@pytest.mark.parametrize("metric", [PearsonCorrCoef(), BinaryAUROC(), BinaryAUROC(thresholds=4)])
def test_metrics_that_keep_all_samples_or_curves(metric):
    generator = torch.Generator().manual_seed(3)
    batches = [
        (torch.rand(5, generator=generator), (torch.rand(5, generator=generator) > 0.5).long()) for _ in range(4)
    ]
    if isinstance(metric, PearsonCorrCoef):
        batches = [(outputs, outputs + 0.5 * targets) for outputs, targets in batches]
    expected = gathered(metric, batches)
    processes = [gathered(metric, batches[:1]), gathered(metric, batches[1:])]
    states = [each.state_dict() for each in processes]
    assert same(processes[0].compute(states, 0.0), expected.compute([expected.state_dict()], 0.0))


def test_members_of_a_collection_that_share_their_state_are_saved_with_it():
    metrics = MetricCollection({"a": MeanMetric(), "b": MeanMetric()})
    first = create_accumulator(metrics, CPU)
    for value in (1.0, 2.0):
        first.update((value,), {}, 1)
    restored = create_accumulator(metrics, CPU)
    restored.load_state_dict(copy.deepcopy(first.state_dict()))
    restored.update((6.0,), {}, 1)
    assert restored.compute([restored.state_dict()], 0.0) == {"a": 3.0, "b": 3.0}


def test_the_state_of_another_metric_is_refused():
    state = create_accumulator(MeanMetric(), CPU).state_dict()
    with pytest.raises(ValueError, match="it has the sums"):
        create_accumulator(BinaryAUROC(), CPU).load_state_dict(state)


def test_what_the_model_returned_may_be_overwritten_in_the_next_step():
    outputs = torch.ones(2, 3)
    accumulator = create_accumulator(WholeSet(lambda outputs, targets: outputs.sum()), CPU)
    accumulator.update((outputs, torch.zeros(2)), {}, 2)
    outputs.zero_()
    assert accumulator.compute([accumulator.state_dict()], 0.0) == 6.0


def test_sums_are_precise():
    """A million steps of 0.1 in float32 would not add up."""
    accumulator = create_accumulator(lambda value: value, CPU)
    for value in (torch.tensor([2.0**24, 2.0**24]), torch.ones(2), torch.ones(2)):
        accumulator.update((value,), {}, 1)
    assert accumulator.compute([accumulator.state_dict()], 0.0).tolist() == [(2**24 + 2) / 3] * 2


@pytest.mark.parametrize("num_steps", [1, 2, 15, 16, 17, 18, 40])
@pytest.mark.parametrize("sizes", [(4,), (4, 1, 3), (3000, 4)], ids=str)
def test_batches_that_wait_for_each_other_are_all_counted(num_steps, sizes):
    """In batches that are small, of different sizes, or large; and with a state in between, bit by bit."""
    generator = torch.Generator().manual_seed(4)
    batches = [
        (torch.randn(size, 3, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for size in (sizes[step % len(sizes)] for step in range(num_steps))
    ]
    outputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    metrics = {"accuracy": Accuracy(), "top2": TopKAccuracy(2)}
    (whole,) = create_accumulators(metrics, CPU).values()
    for step, batch in enumerate(batches):
        if step == num_steps // 2:
            (resumed,) = create_accumulators(metrics, CPU).values()
            resumed.load_state_dict(as_plain(copy.deepcopy(whole.state_dict())))
        for each in (whole, resumed) if step >= num_steps // 2 else (whole,):
            each.update(batch, {}, len(batch[0]))
    results = [each.compute([each.state_dict()], 0.0) for each in (whole, resumed)]
    assert results[0] == results[1]
    assert results[0]["accuracy"] == pytest.approx((outputs.argmax(1) == targets).float().mean().item(), abs=1e-6)
    right = (outputs.topk(2).indices == targets[:, None]).any(1)
    assert results[0]["top2"] == pytest.approx(right.float().mean().item(), abs=1e-6)


def test_shapes_may_change_between_batches():
    """As the lengths of texts do."""
    (accumulator,) = create_accumulators({"accuracy": Accuracy()}, CPU).values()
    for length in (2, 3, 3, 2):
        accumulator.update((torch.ones(4, 5, length), torch.zeros(4, length, dtype=torch.long)), {}, 4)
    assert accumulator.compute([accumulator.state_dict()], 0.0) == {"accuracy": 1.0}


def test_the_first_batch_is_measured_at_once():
    """So that an error comes in the first step."""
    (accumulator,) = create_accumulators({"accuracy": Accuracy()}, CPU).values()
    with pytest.raises(ValueError, match="got outputs of the shape"):
        accumulator.update((torch.ones(4, 5), torch.zeros(3, 2)), {}, 4)


def test_a_weight_of_zero_on_an_accelerator_leaves_out_what_is_not_finite():
    """There the host does not know the weight."""
    values, weights = torch.tensor([math.nan, math.inf, 2.0]), torch.tensor([0.0, 0.0, 3.0])
    assert [float(weighted(value, weight)) for value, weight in zip(values, weights, strict=True)] == [0.0, 0.0, 6.0]
