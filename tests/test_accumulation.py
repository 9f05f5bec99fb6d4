"""The weights of the batches that make one update."""

from __future__ import annotations

import pytest
import torch

from pytorch_accelerated._accumulation import AccumulationWindow, scale_gradients


def effective_weights(weights, num_expected):
    """Return what each batch's gradient is multiplied by in the end."""
    window = AccumulationWindow()
    shares = [window.add(weight, num_expected) for weight in weights]
    correction = window.close()
    return [float((1.0 if share is None else share) * (1.0 if correction is None else correction)) for share in shares]


@pytest.mark.parametrize("kind", [int, float, torch.tensor, lambda weight: torch.tensor(float(weight))])
@pytest.mark.parametrize(
    ("weights", "num_expected"),
    [([8], 1), ([8, 8], 2), ([8, 4], 2), ([8, 8, 8, 3], 4), ([1, 5, 2, 8], 4), ([8, 8], 4), ([3], 4), ([8, 8, 8], 2)],
)
def test_each_batch_has_its_share_of_the_items(weights, num_expected, kind):
    effective = effective_weights([kind(weight) for weight in weights], num_expected)
    assert effective == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-6)


@pytest.mark.parametrize("weights", [[0, 4], [4, 0], [torch.tensor(0), torch.tensor(4)]])
def test_a_batch_without_items_counts_for_nothing(weights):
    assert effective_weights(weights, 2) == pytest.approx([float(weight) / 4 for weight in weights])


def test_a_window_without_items_gives_no_gradient_and_no_nan():
    assert effective_weights([0, 0], 2) == [0.0, 0.0]
    assert effective_weights([torch.tensor(0.0)] * 2, 2) == [0.0, 0.0]


def test_the_usual_case_costs_one_scale_and_no_correction():
    window = AccumulationWindow()
    assert [window.add(8, 2), window.add(8, 2), window.close()] == [0.5, 0.5, None]
    assert [window.add(8, 1), window.close()] == [None, None]


def test_windows_do_not_know_of_each_other():
    window = AccumulationWindow()
    window.add(100, 2)
    window.reset()
    assert [window.add(4, 2), window.add(4, 2), window.close()] == [0.5, 0.5, None]
    assert [window.add(2, 2), window.add(2, 2), window.close()] == [0.5, 0.5, None]
    assert window.close() is None


def test_gradients_are_scaled_in_place_where_there_are_any():
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    gradient = parameters[0].grad = torch.tensor([1.0, 2.0])
    parameters[2].grad = torch.tensor([4.0, 4.0])
    scale_gradients(parameters, 0.5)
    assert parameters[0].grad is gradient
    assert gradient.tolist() == [0.5, 1.0]
    scale_gradients(iter(parameters), torch.tensor(2.0))
    assert parameters[2].grad.tolist() == [4.0, 4.0]
    assert parameters[1].grad is None
    scale_gradients([parameters[1]], 3.0)
    assert parameters[1].grad is None
