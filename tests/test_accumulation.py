"""The weights of the batches that make one update."""

from __future__ import annotations

import pytest
import torch

import _numbers
from pytorch_accelerated._accumulation import AccumulationWindow, scale_gradients


def effective_weights(weights, num_expected):
    """Return what each batch's gradient is multiplied by in the end."""
    window = AccumulationWindow(num_expected)
    shares = [window.add(weight) for weight in weights]
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


def test_equal_batches_cost_one_scale_and_no_correction():
    window = AccumulationWindow(2)
    assert [window.add(8), window.add(8), window.close()] == [0.5, 0.5, None]


def test_a_window_of_one_batch_costs_nothing():
    window = AccumulationWindow(1)
    assert [window.add(8), window.close()] == [None, None]
    assert window.expected is None


def test_the_last_window_of_an_epoch_may_be_short():
    window = AccumulationWindow()
    window.start_epoch(3, num_batches_per_epoch=5)
    assert [window.add(8, step=step) for step in range(3)] == [pytest.approx(1 / 3)] * 3
    assert window.close() is None
    assert [window.add(8, step=3), window.add(8, step=4), window.close()] == [0.5, 0.5, None]


def test_the_samples_since_the_last_update_are_counted_and_forgotten_by_it():
    window = AccumulationWindow(2)
    window.add(9, num_samples=4)
    window.add(7, num_samples=3)
    assert window.num_samples == 7
    window.close()
    assert window.num_samples == 0


def test_a_window_starts_without_what_was_left_of_the_one_before():
    window = AccumulationWindow(2)
    window.add(100)
    window.reset()
    assert [window.add(4), window.add(4), window.close()] == [0.5, 0.5, None]
    assert [window.add(2), window.add(2), window.close()] == [0.5, 0.5, None]
    assert window.close() is None


# --- with a nominal weight, as for several processes ----------------------------------------------------------------


def effective_weights_of_processes(weights_by_process, num_expected, nominal_weight):
    """Return what each batch's gradient is multiplied by in the end, the average over the processes included."""
    windows = [AccumulationWindow(num_expected, nominal_weight) for _ in weights_by_process]
    shares = [
        [window.add(weight) for weight in weights] for window, weights in zip(windows, weights_by_process, strict=True)
    ]
    total = float(sum(window.total for window in windows))
    num_processes = len(windows)
    corrections = [window.close(total, num_processes) for window in windows]
    return [
        float((1 if share is None else share) * (1 if correction is None else correction)) / num_processes
        for own_shares, correction in zip(shares, corrections, strict=True)
        for share in own_shares
    ]


@pytest.mark.parametrize("kind", [float, lambda weight: torch.tensor(float(weight))])
@pytest.mark.parametrize("nominal_weight", [8.0, 1.0, 3.0])
@pytest.mark.parametrize(
    "weights",
    [
        [[8], [8]],
        [[8, 8], [8, 8]],
        [[8, 8], [8, 3]],
        [[1, 5], [2, 8], [9, 9]],
        [[8], [0]],
        [[0, 0], [4, 1]],
        [[0], [3]],
    ],
)
@pytest.mark.parametrize("num_missing", [0, 1])
def test_each_batch_of_each_process_has_its_share(weights, nominal_weight, num_missing, kind):
    """Also if the window turns out shorter than was thought when it began."""
    of_kind = [[kind(weight) for weight in own] for own in weights]
    effective = effective_weights_of_processes(of_kind, len(weights[0]) + num_missing, nominal_weight)
    flat = [weight for own in weights for weight in own]
    assert effective == pytest.approx([weight / sum(flat) for weight in flat], rel=1e-6)


def test_processes_without_any_item_give_no_gradient_and_no_nan():
    assert effective_weights_of_processes([[0, 0], [0, 0]], 2, 8.0) == [0.0] * 4


def test_equal_full_batches_of_several_processes_cost_no_correction():
    window = AccumulationWindow(1, nominal_weight=8.0)
    assert [window.add(8), window.close(24.0, num_processes=3)] == [None, None]
    window = AccumulationWindow(2, nominal_weight=8.0)
    assert [window.add(8) for _ in range(2)] == [0.5, 0.5]
    assert window.close(48.0, num_processes=3) is None


def test_a_window_of_one_batch_is_corrected_if_another_process_had_another_weight():
    window = AccumulationWindow(1, nominal_weight=8.0)
    assert window.add(8) is None
    assert window.close(12.0, num_processes=2) == pytest.approx(16 / 12)


@pytest.mark.parametrize("nominal_weight", [None, 8.0])
def test_the_total_is_that_of_the_open_window(nominal_weight):
    window = AccumulationWindow(3, nominal_weight)
    assert window.total == 0
    totals = []
    for weight in (8, 3, 0.5):
        window.add(weight)
        totals.append(window.total)
    assert totals == [8, 11, 11.5]
    window.close()
    assert window.total == 0
    window.add(torch.tensor(2))
    window.add(torch.tensor(3))
    assert isinstance(window.total, torch.Tensor)
    assert window.total.item() == 5
    window.reset()
    assert window.total == 0


@pytest.mark.parametrize("nominal_weight", [None, 8.0])
@pytest.mark.parametrize("num_done", [0, 1, 2])
def test_an_open_window_goes_on_from_its_state(num_done, nominal_weight):
    weights = [5, 2, 9]
    windows = [AccumulationWindow(3, nominal_weight), AccumulationWindow(3, nominal_weight)]
    for weight in weights[:num_done]:
        windows[0].add(weight)
    windows[1].load_state_dict(windows[0].state_dict())
    shares = [[window.add(weight) for weight in weights[num_done:]] for window in windows]
    assert shares[0] == shares[1]
    assert windows[0].total == windows[1].total == 16
    assert windows[0].close() == windows[1].close() is not None


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`gradient_accumulation_steps` is")
def test_gradients_and_loss_of_every_update_are_those_of_the_big_batch(record_property):
    """Over the whole grid of splits, with one process; `distributed/test_numbers.py` has it with two and three."""
    differences = _numbers.grid_differences(num_processes=1)
    worst = max(gradients for gradients, _ in differences.values())
    record_property("largest difference of a gradient", worst)
    print(_numbers.table_of(differences, num_processes=1))
    assert len(differences) == 90
    assert {point: pair for point, pair in differences.items() if not max(pair) <= 1e-6} == {}


@pytest.mark.parametrize("scheduler", ["cosine", "one cycle"])
def test_a_run_does_not_depend_on_how_its_batches_are_split(scheduler):
    whole = _numbers.whole_run(8, 1, scheduler)
    for batch_size, accumulation in ((4, 2), (2, 4), (1, 8)):
        run = _numbers.whole_run(batch_size, accumulation, scheduler)
        assert run["rates"] == whole["rates"]
        assert run["num_updates"] == run["num_scheduler_steps" if scheduler == "one cycle" else "num_updates"] == 24
        torch.testing.assert_close(run["history"], whole["history"], rtol=0, atol=1e-5)
        torch.testing.assert_close(run["weights"], whole["weights"], rtol=0, atol=1e-5)
    if scheduler == "one cycle":
        assert whole["rates"] == pytest.approx(_numbers.one_cycle_rates(24), rel=1e-9)


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


def test_weights_in_tensors_lose_no_digits():
    """A share in float32 would limit the precision of a model in float64, and differ with the split."""
    window = AccumulationWindow(3)
    shares = [window.add(torch.tensor(weight)) for weight in (3, 5, 2)]
    assert [share.dtype for share in shares] == [torch.float64] * 3
    assert [float(share) * float(window.expected) for share in shares] == pytest.approx([3, 5, 2], rel=1e-15)
    assert float(window.close()) == pytest.approx(9 / 10, rel=1e-15)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("weights", [(0.05, 0.15, 0.1, 0.1), (0.0, 0.2, 0.0), (1e-6, 3e-6), (0.0, 0.0), (8, 4, 0.5)])
def test_weights_are_any_numbers_from_zero_on(weights, as_tensor):
    """The weights of the losses, times the correction, are the fractions of the total; only a total of 0 has none."""
    window = AccumulationWindow(num_batches=len(weights))
    given = [torch.tensor(weight) for weight in weights] if as_tensor else weights
    scales = [window.add(weight, 1, step) for step, weight in enumerate(given)]
    correction = window.close()
    correction = 1 if correction is None else correction
    total = sum(weights)
    for scale, weight in zip(scales, weights, strict=True):
        fraction = float((1 if scale is None else scale) * correction)
        assert fraction == pytest.approx(weight / total if total else 0.0, rel=1e-6)
