"""`wsd_lr` and `WSDLrScheduler`, compared with an independent formula over whole runs."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch

from _support import make_optimizer, step_through
from pytorch_accelerated.exceptions import SchedulerSettingsError
from pytorch_accelerated.schedulers import WSDLrScheduler, estimate_checkpoint_steps, plan_decays, wsd_lr
from pytorch_accelerated.schedulers._placeholders import TrainerPlaceholderValues, resolve_placeholders


def make_scheduler(*lrs, **settings):
    return WSDLrScheduler(make_optimizer(*(lrs or (0.1,))), **settings)


def expected_curve(num_updates, checkpoints, ratio, warmup, base, minimum, start, is_sqrt):
    """A constant curve, onto which the end, then each decay, then the warm-up are written."""
    curve = np.full(num_updates, float(base))
    curve[checkpoints[-1] :] = minimum
    for checkpoint in reversed(checkpoints):  # an earlier decay overwrites the update at which a later one starts
        earlier = [other for other in checkpoints if other < checkpoint]
        first = max([checkpoint - max(1, round(ratio * checkpoint)), warmup, *earlier])
        weights = np.linspace(0, 1, checkpoint - first + 1)
        weights = weights**0.5 if is_sqrt else weights
        curve[first : checkpoint + 1] = base * (1 - weights) + minimum * weights
    curve[:warmup] = np.linspace(start, base, warmup + 1)[:-1]
    return curve


@pytest.mark.parametrize(
    ("total", "num_checkpoints", "ratio", "warmup", "minimum", "is_sqrt"),
    [
        *itertools.product([40, 101], [1, 2, 3], [0.01, 0.1, 0.5], [0, 9], [0.0, 1e-6], [True, False]),
        (100, 1, 1.0, 0, 1e-3, True),
        (100, 1, 1.0, 30, 1e-3, False),
        (100, 2, 1.0, 30, 1e-3, True),
        (16, 5, 0.1, 0, 0.0, True),
        (2, 2, 0.5, 0, 0.0, True),
        (1, 1, 0.1, 0, 0.0, True),
        (2, 1, 0.1, 1, 0.0, False),
    ],
)
def test_the_learning_rates_of_a_whole_run_follow_the_formula(total, num_checkpoints, ratio, warmup, minimum, is_sqrt):
    scheduler = make_scheduler(
        0.1,
        0.7,
        total_steps=total,
        num_checkpoints=num_checkpoints,
        decay_phase_ratio=ratio,
        num_warmup_steps=warmup,
        lr_min=minimum,
        warmup_starting_lr=1e-4,
        use_inverse_sqrt_decay=is_sqrt,
    )
    checkpoints = [int(total / 2**power) for power in range(num_checkpoints)][::-1]
    assert scheduler.get_checkpoint_steps() == checkpoints
    rates = step_through(scheduler, total + 3)
    for column, base in enumerate([0.1, 0.7]):
        expected = expected_curve(total + 3, checkpoints, ratio, warmup, base, minimum, 1e-4, is_sqrt)
        np.testing.assert_allclose(rates[:, column], expected, rtol=1e-12, atol=1e-15)


def test_the_rate_falls_to_the_minimum_at_a_checkpoint_and_is_stable_again_one_update_later():
    rates = step_through(make_scheduler(total_steps=200, num_checkpoints=2, num_warmup_steps=10), 203)[:, 0]
    assert rates[0] == 1e-6
    assert rates[9] < rates[10] == 0.1
    assert (rates[10:91] == 0.1).all()
    assert rates[91] == pytest.approx(1e-6 + (0.1 - 1e-6) * (1 - 0.1**0.5))
    assert (np.diff(rates[90:101]) < 0).all()
    assert rates[100] == 1e-6
    assert (rates[101:181] == 0.1).all()
    assert (np.diff(rates[180:201]) < 0).all()
    assert (rates[200:] == 1e-6).all()


@pytest.mark.parametrize(
    ("total", "num_checkpoints", "expected"),
    [
        (1000, 1, [1000]),
        (1000, 2, [500, 1000]),
        (1000, 3, [250, 500, 1000]),
        (10, 3, [2, 5, 10]),
        (7, 2, [3, 7]),
        (4, 3, [1, 2, 4]),
        (1, 1, [1]),
        (100.0, 2, [50, 100]),
    ],
)
def test_each_checkpoint_is_twice_as_far_as_the_previous_and_the_last_is_at_the_end(total, num_checkpoints, expected):
    assert estimate_checkpoint_steps(total, num_checkpoints) == expected


def test_estimate_checkpoint_steps_places_three_checkpoints_by_default():
    assert estimate_checkpoint_steps(80) == [20, 40, 80]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "`total_steps` is 0, but a count must be a finite number above 0."),
        ((10.5, 1), "`total_steps` is 10.5, but a count must be a whole number."),
        ((10, 0), "`num_checkpoints` is 0"),
        ((10, 1.5), "`num_checkpoints` is 1.5, but a count must be a whole number."),
        ((7, 4), "`num_checkpoints` is 4, but a run of 7 updates is too short for that"),
    ],
)
def test_checkpoints_that_cannot_be_placed_are_rejected(arguments, message):
    with pytest.raises(SchedulerSettingsError, match=re.escape(message)):
        estimate_checkpoint_steps(*arguments)


@pytest.mark.parametrize(
    ("checkpoints", "ratio", "warmup", "starts"),
    [
        ([100], 0.1, 0, [90]),
        ([25, 50, 100], 0.1, 0, [23, 45, 90]),
        ([50, 100], 0.7, 0, [15, 50]),
        ([100], 1.0, 30, [30]),
        ([100], 0.001, 0, [99]),
        ([1, 2], 0.1, 0, [0, 1]),
        ([3], 0.9, 2, [2]),
    ],
)
def test_a_decay_takes_its_fraction_of_updates_but_starts_after_the_warm_up_and_the_previous_checkpoint(
    checkpoints, ratio, warmup, starts
):
    decays = plan_decays(checkpoints, ratio, warmup)
    assert [decay["start_step"] for decay in decays] == starts
    assert [decay["end_step"] for decay in decays] == checkpoints
    assert [decay["num_decay_steps"] for decay in decays] == list(np.subtract(checkpoints, starts))


def test_a_group_with_a_base_value_below_the_minimum_never_exceeds_it():
    scheduler = make_scheduler(0.1, 1e-8, total_steps=20, lr_min=1e-3, num_warmup_steps=5, warmup_starting_lr=1e-2)
    rates = step_through(scheduler, 21)
    assert rates[-1, 0] == 1e-3
    np.testing.assert_allclose(rates[:, 1], 1e-8)


def test_the_length_of_the_run_can_be_given_in_epochs():
    assert make_scheduler(num_epochs=3, num_update_steps_per_epoch=7).total_steps == 21
    assert make_scheduler(num_epochs=1.5, num_update_steps_per_epoch=7).total_steps == 10
    assert make_scheduler(num_epochs=3, num_update_steps_per_epoch=7, total_steps=21).total_steps == 21
    assert make_scheduler(num_epochs=3, total_steps=20).total_steps == 20


def test_a_fraction_of_a_warm_up_step_is_rounded():
    assert make_scheduler(total_steps=20, num_warmup_steps=3.6).num_warmup_steps == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": None}, "`total_steps` is None, but the scheduler needs the length of the run."),
        ({"total_steps": None, "num_epochs": 3}, "is 3, `num_update_steps_per_epoch` is None and"),
        ({"total_steps": 0}, "`total_steps` is 0"),
        ({"total_steps": -5}, "`total_steps` is -5"),
        ({"total_steps": 5.5}, "`total_steps` is 5.5, but a count must be a whole number."),
        (
            {"num_epochs": 3, "num_update_steps_per_epoch": 7},
            "`total_steps` is 100, but `num_epochs` times `num_update_steps_per_epoch` is 21. Both are",
        ),
        ({"total_steps": None, "num_epochs": 0, "num_update_steps_per_epoch": 7}, "`num_epochs` is 0"),
        (
            {"total_steps": None, "num_epochs": 3, "num_update_steps_per_epoch": 0},
            "`num_epochs * num_update_steps_per_epoch` is 0",
        ),
        ({"num_warmup_steps": -1}, "`num_warmup_steps` is -1, but the length of the warm-up"),
        (
            {"num_warmup_steps": 100},
            "The warm-up takes 100 updates, but the first checkpoint is after 100 of 100 updates, and its decay",
        ),
        ({"num_warmup_steps": 30, "num_checkpoints": 3}, "the first checkpoint is after 25 of 100"),
        ({"decay_phase_ratio": 0.0}, "`decay_phase_ratio` is 0.0, but a fraction of the run must be a finite"),
        ({"decay_phase_ratio": -0.1}, "`decay_phase_ratio` is -0.1"),
        ({"decay_phase_ratio": 1.1}, "above 0 and at most 1. Change `decay_phase_ratio` where"),
        (
            {"lr_min": -1e-6},
            "`lr_min` is -1e-06, but a learning rate must be a finite number of at least 0",
        ),
        (
            {"lr_min": 0.2},
            "`lr_min` is 0.2, but the initial learning rate of the optimizer, the upper end of the schedule, is lower",
        ),
        ({"warmup_starting_lr": float("nan")}, "`warmup_starting_lr` is nan"),
        ({"num_checkpoints": 0}, "`num_checkpoints` is 0"),
        ({"num_checkpoints": 8}, "`num_checkpoints` is 8, but a run of 100 updates is too short"),
    ],
)
def test_a_setting_out_of_range_is_a_value_error_and_an_assertion_error(settings, message):
    with pytest.raises(SchedulerSettingsError, match=re.escape(message)) as caught:
        make_scheduler(**{"total_steps": 100, **settings})
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, AssertionError)


def test_a_continuation_has_no_warm_up():
    scheduler = make_scheduler(total_steps=20, num_warmup_steps=15, is_continuation_from_checkpoint=True)
    rates = step_through(scheduler, 21)[:, 0]
    assert (rates[:19] == 0.1).all()
    assert rates[20] == 1e-6


def test_a_restored_schedule_continues_like_an_uninterrupted_one():
    settings = {"total_steps": 50, "num_checkpoints": 2, "num_warmup_steps": 5}
    uninterrupted = step_through(make_scheduler(0.1, 0.2, **settings), 52)
    for position in (1, 4, 24, 26, 48):
        first = make_scheduler(0.1, 0.2, **settings)
        step_through(first, position)
        second = make_scheduler(9.0, 9.0, **settings)
        second.load_state_dict(first.state_dict())
        np.testing.assert_array_equal(step_through(second, 52 - position), uninterrupted[position:])


def test_a_continuation_that_loads_an_earlier_state_stays_a_continuation_of_its_own_length():
    earlier = make_scheduler(0.3, total_steps=50, num_warmup_steps=5)
    step_through(earlier, 46)
    continuation = make_scheduler(0.1, total_steps=200, is_continuation_from_checkpoint=True)
    continuation.load_state_dict(earlier.state_dict())
    assert continuation.is_continuation_from_checkpoint
    assert continuation.get_checkpoint_steps() == [200]
    assert continuation.get_current_step() == 45
    assert continuation.base_values == [0.3]
    assert continuation.state_dict() == {
        "base_values": [0.3],
        "num_updates": 45,
        "is_continuation_from_checkpoint": True,
        "total_steps": 200,
    }


def test_a_run_does_not_become_a_continuation_by_loading_the_state_of_one():
    scheduler = make_scheduler(total_steps=20)
    scheduler.load_state_dict(make_scheduler(total_steps=30, is_continuation_from_checkpoint=True).state_dict())
    assert not scheduler.is_continuation_from_checkpoint
    assert scheduler.total_steps == 20


def test_the_state_can_be_loaded_without_running_code(tmp_path):
    scheduler = make_scheduler(total_steps=20)
    scheduler.step()
    torch.save(scheduler.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == scheduler.state_dict()


def test_decay_info_returns_copies_of_start_end_and_length():
    scheduler = make_scheduler(total_steps=100, num_checkpoints=2)
    expected = [
        {"start_step": 45, "end_step": 50, "num_decay_steps": 5},
        {"start_step": 90, "end_step": 100, "num_decay_steps": 10},
    ]
    info = scheduler.get_decay_info()
    assert info == expected
    info[0]["start_step"] = 0
    assert scheduler.get_decay_info() == expected


@pytest.mark.parametrize(
    ("num_updates", "phase", "start", "end", "progress", "checkpoint", "is_checkpoint"),
    [
        (-1, "warmup", 0, 10, 0.0, 50, False),
        (0, "warmup", 0, 10, 0.0, 50, False),
        (9, "warmup", 0, 10, 0.9, 50, False),
        (10, "stable", 10, 45, 0.0, 50, False),
        (44, "stable", 10, 45, 34 / 35, 50, False),
        (45, "decay", 45, 50, 0.0, 50, False),
        (50, "decay", 45, 50, 1.0, 50, True),
        (51, "stable", 50, 90, 1 / 40, 100, False),
        (90, "decay", 90, 100, 0.0, 100, False),
        (95, "decay", 90, 100, 0.5, 100, False),
        (100, "decay", 90, 100, 1.0, 100, True),
        (999, "decay", 90, 100, 1.0, 100, True),
    ],
)
def test_phase_info_describes_the_position_in_the_schedule(
    num_updates, phase, start, end, progress, checkpoint, is_checkpoint
):
    scheduler = make_scheduler(total_steps=100, num_checkpoints=2, num_warmup_steps=10)
    assert scheduler.get_phase_info(num_updates) == {
        "phase": phase,
        "start_step": start,
        "end_step": end,
        "progress": pytest.approx(progress),
        "checkpoint_step": checkpoint,
        "is_checkpoint": is_checkpoint,
    }


def test_the_current_phase_advances_with_the_steps():
    scheduler = make_scheduler(total_steps=10, num_warmup_steps=2, decay_phase_ratio=0.3)
    assert scheduler.get_current_step() == -1
    phases = []
    for _ in range(11):
        scheduler.step()
        phases.append(scheduler.get_current_phase_info()["phase"])
        assert scheduler.get_current_phase_info() == scheduler.get_phase_info(scheduler.get_current_step())
    assert phases == ["warmup"] * 2 + ["stable"] * 5 + ["decay"] * 4
    assert scheduler.get_current_step() == 10


@pytest.mark.parametrize(("num_warmup_epochs", "num_warmup_steps"), [(None, 0), (0, 0), (1, 8), (0.3, 2)])
def test_create_scheduler_fn_uses_the_length_of_the_run_and_a_warm_up_in_epochs(num_warmup_epochs, num_warmup_steps):
    create = WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=num_warmup_epochs, num_checkpoints=2)
    values = {
        TrainerPlaceholderValues.NUM_EPOCHS: 4,
        TrainerPlaceholderValues.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH: 8,
    }
    scheduler = resolve_placeholders(create, values)(make_optimizer(0.1))
    assert scheduler.get_checkpoint_steps() == [16, 32]
    assert scheduler.num_warmup_steps == num_warmup_steps


def test_the_warm_up_can_be_a_fraction_of_the_run():
    create = WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=0.25 * TrainerPlaceholderValues.NUM_EPOCHS)
    values = {
        TrainerPlaceholderValues.NUM_EPOCHS: 4,
        TrainerPlaceholderValues.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH: 8,
    }
    assert resolve_placeholders(create, values)(make_optimizer(0.1)).num_warmup_steps == 8


def test_create_scheduler_fn_passes_every_argument_and_creates_the_subclass():
    class Own(WSDLrScheduler):
        pass

    arguments = {
        "decay_phase_ratio": 0.2,
        "lr_min": 1e-5,
        "warmup_starting_lr": 1e-4,
        "use_inverse_sqrt_decay": False,
        "num_checkpoints": 2,
        "is_continuation_from_checkpoint": True,
    }
    create = Own.create_scheduler_fn(total_num_epochs=4, num_update_steps_per_epoch=5, **arguments)
    scheduler = create(make_optimizer(0.1))
    assert type(scheduler) is Own
    assert scheduler.total_steps == 20
    assert {name: getattr(scheduler, name) for name in arguments} == arguments


def test_an_unresolved_placeholder_is_an_error_that_names_it():
    with pytest.raises(TypeError, match=r"`num_epochs` is TrainerPlaceholderValues.NUM_EPOCHS, but"):
        WSDLrScheduler.create_scheduler_fn(num_update_steps_per_epoch=3)(make_optimizer(0.1))


def test_wsd_lr_computes_the_same_curve():
    decays = plan_decays([20, 40], 0.25, 6)
    curve = [
        wsd_lr(
            update,
            decays=decays,
            lr=2.0,
            lr_min=0.5,
            num_warmup_steps=6,
            warmup_starting_lr=0.1,
            use_inverse_sqrt_decay=False,
        )
        for update in range(43)
    ]
    np.testing.assert_allclose(curve, expected_curve(43, [20, 40], 0.25, 6, 2.0, 0.5, 0.1, is_sqrt=False))
