"""The metrics that need no other package: `pytorch_accelerated.metrics`."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.functional.classification import binary_accuracy, multiclass_accuracy
from torchmetrics.functional.regression import mean_absolute_error

from pytorch_accelerated.metrics import Accuracy, FromLoss, MeanAbsoluteError, Perplexity, TopKAccuracy, WholeSet

SIZES = [1, 7, 30000]
"""Of batches. The last one is too large for the short way of small tensors."""


def scores(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def classes(*shape, num_classes=5):
    return torch.randint(0, num_classes, shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ignored", [None, 2])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_accuracy_of_classes_is_that_of_torchmetrics(size, ignored, k):
    outputs, targets = scores(size, 5), classes(size)
    metric = Accuracy(ignore_index=ignored) if k == 1 else TopKAccuracy(k, ignore_index=ignored)
    value, weight = metric(outputs, targets)
    counted = targets != (-1 if ignored is None else ignored)
    assert int(weight) == counted.sum()
    if counted.any():
        expected = multiclass_accuracy(outputs[counted], targets[counted], 5, average="micro", top_k=k)
        assert float(value) == pytest.approx(float(expected), abs=1e-6)
    else:
        assert float(value) == 0.0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("metric", [Accuracy(), TopKAccuracy(2)])
def test_classes_may_be_in_dimension_1_or_the_last_one(metric, size):
    outputs, targets = scores(size, 5, 3), classes(size, 3)
    value = metric(outputs, targets)[0]
    assert float(metric(outputs.transpose(1, 2), targets)[0]) == pytest.approx(float(value))
    assert float(metric(outputs.transpose(1, 2).reshape(-1, 5), targets.reshape(-1))[0]) == pytest.approx(float(value))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_binary_accuracy_is_that_of_torchmetrics(size, dtype):
    logits, targets = scores(size), classes(size, num_classes=2).to(dtype)
    expected = float(binary_accuracy(logits.sigmoid(), targets.long()))
    for outputs in (logits, logits[:, None]):
        assert float(Accuracy()(outputs, targets)[0]) == pytest.approx(expected, abs=1e-6)
    assert float(Accuracy(threshold=0.5)(logits.sigmoid(), targets)[0]) == pytest.approx(expected, abs=1e-6)


def test_ignored_targets_do_not_count_by_default():
    """As in `nn.CrossEntropyLoss`."""
    value, weight = Accuracy()(torch.eye(3), torch.tensor([0, -100, 0]))
    assert (float(value), int(weight)) == (0.5, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_outputs_may_have_any_precision_and_require_a_gradient(dtype):
    outputs = scores(6, 5).to(dtype).requires_grad_()
    for metric, targets in (
        (Accuracy(), classes(6)),
        (TopKAccuracy(3), classes(6)),
        (MeanAbsoluteError(), outputs * 2),
    ):
        assert 0 <= float(torch.as_tensor(metric(outputs, targets)[0]).detach()) < 2


@pytest.mark.parametrize("size", SIZES)
def test_the_mean_absolute_error_is_that_of_torchmetrics(size):
    outputs, targets = scores(size, 2), scores(2, size).T
    value, weight = MeanAbsoluteError()(outputs, targets)
    assert float(value) == pytest.approx(float(mean_absolute_error(outputs, targets.contiguous())), rel=1e-5)
    assert weight == 2 * size
    assert float(MeanAbsoluteError()(outputs[:, :1], targets[:, 0])[0]) == pytest.approx(
        float((outputs[:, 0] - targets[:, 0]).abs().mean()), rel=1e-5
    )


@pytest.mark.parametrize(
    ("metric", "outputs", "targets"),
    [
        (Accuracy(), scores(4, 3), classes(5)),
        (Accuracy(), scores(4, 3), classes(4, 2)),
        (TopKAccuracy(), scores(4, 3), classes(4, 2)),
        (TopKAccuracy(), scores(4), classes(4)),
        (MeanAbsoluteError(), scores(4, 3), scores(4)),
        (MeanAbsoluteError(), scores(4, 3), scores(3, 4)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(metric, outputs, targets):
    with pytest.raises(ValueError, match=r"got outputs of the shape \(4.*and targets of the shape .*Expected"):
        metric(outputs, targets)


def test_an_output_that_is_nan_is_not_right():
    outputs = torch.tensor([[torch.nan, 1.0, 0.0]] * 2)
    assert float(TopKAccuracy(1)(outputs, torch.tensor([0, 2]))[0]) == 0.0


def test_k_is_at_least_1():
    with pytest.raises(ValueError, match="`k` is 0"):
        TopKAccuracy(0)


def test_perplexity_is_the_exponential_of_the_loss():
    assert Perplexity()(math.log(3)) == pytest.approx(3)
    assert Perplexity()(1e6) == math.inf
    assert math.isnan(Perplexity()(math.nan))
    assert FromLoss(math.sqrt)(4.0) == 2.0


def test_a_marked_function_can_still_be_called():
    @WholeSet
    def largest(outputs, targets):
        return outputs.max()

    assert largest(torch.tensor([1.0, 2.0]), None) == 2
    assert largest.__name__ == "largest"


@pytest.mark.parametrize("metric", [Accuracy(), TopKAccuracy(1), MeanAbsoluteError()])
@pytest.mark.parametrize(
    "inputs", [((torch.ones(3, 2), None), torch.ones(3)), (torch.ones(3, 2), {"y": torch.ones(3)})]
)
def test_what_is_no_tensor_is_told_with_a_remedy(metric, inputs):
    """A model that returns a tuple, for example."""
    with pytest.raises(TypeError, match=r"got (outputs|targets) of type (tuple|dict).*`get_metric_inputs`"):
        metric(*inputs)
