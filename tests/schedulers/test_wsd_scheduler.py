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
    curve[checkpoints[-1] :] = minimum * base
    for checkpoint, earlier in zip(checkpoints, [0, *checkpoints], strict=False):
        num_decaying = int(ratio * (checkpoint - earlier))
        weights = np.arange(num_decaying) / max(num_decaying, 1)
        if is_sqrt:
            decay = (1 - weights**0.5) + minimum * weights**0.5
        elif minimum == 0:
            decay = np.where(weights == 0, 1.0, 0.0)
        else:
            decay = 1 / (weights / minimum + 1 - weights)
        curve[checkpoint - num_decaying : checkpoint] = base * decay
    num_warming = int(np.ceil(warmup))
    curve[:num_warming] = (start + (base - start) * np.arange(num_warming) / (warmup or 1))[:num_updates]
    return curve


@pytest.mark.parametrize(
    ("total", "num_checkpoints", "ratio", "warmup", "minimum", "is_sqrt"),
    [
        *itertools.product([40, 101], [1, 2, 3], [0.0, 0.01, 0.1, 0.5], [0, 9], [0.0, 1e-6], [True, False]),
        (100, 1, 1.0, 0, 1e-3, True),
        (100, 1, 1.0, 30, 1e-3, False),
        (100, 2, 1.0, 30.5, 1e-3, True),
        (100, 3, 0.2, 60, 1e-3, False),
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


def test_the_rate_falls_until_a_checkpoint_where_it_is_stable_again_and_to_the_minimum_at_the_end():
    rates = step_through(make_scheduler(total_steps=200, num_checkpoints=2, num_warmup_steps=10), 203)[:, 0]
    assert rates[0] == 1e-6
    assert rates[9] < rates[10] == 0.1
    assert (rates[10:91] == 0.1).all()
    assert rates[91] == pytest.approx(0.1 * (1e-6 + (1 - 1e-6) * (1 - 0.1**0.5)))
    assert (np.diff(rates[90:100]) < 0).all()
    assert (rates[100:191] == 0.1).all()
    assert (np.diff(rates[190:201]) < 0).all()
    assert rates[200:] == pytest.approx([1e-7] * 3)


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
    ("checkpoints", "ratio", "starts"),
    [
        ([100], 0.1, [90]),
        ([25, 50, 100], 0.1, [23, 48, 95]),
        ([50, 100], 0.7, [15, 65]),
        ([50, 100], 1.0, [0, 50]),
        ([100], 0.001, [100]),
        ([100], 0, [100]),
        ([1, 2], 0.1, [1, 2]),
        ([3], 0.9, [1]),
    ],
)
def test_a_decay_takes_its_fraction_of_the_updates_since_the_checkpoint_before(checkpoints, ratio, starts):
    decays = plan_decays(checkpoints, ratio)
    assert [decay["pre_decay_step"] for decay in decays] == starts
    assert [decay["period_start"] for decay in decays] == [0, *checkpoints[:-1]]
    assert [decay["period_end"] for decay in decays] == checkpoints
    assert [decay["decay_steps"] for decay in decays] == list(np.subtract(checkpoints, starts))


def test_a_group_with_a_base_value_below_the_start_of_the_warm_up_never_exceeds_it():
    scheduler = make_scheduler(0.1, 1e-8, total_steps=20, lr_min=1e-3, num_warmup_steps=5, warmup_starting_lr=1e-2)
    rates = step_through(scheduler, 21)
    assert rates[-1, 0] == pytest.approx(1e-4)
    np.testing.assert_allclose(rates[:18, 1], 1e-8)


def test_the_length_of_the_run_can_be_given_in_epochs():
    assert make_scheduler(num_epochs=3, num_update_steps_per_epoch=7).total_steps == 21
    assert make_scheduler(num_epochs=1.5, num_update_steps_per_epoch=7).total_steps == 10
    assert make_scheduler(num_epochs=3, num_update_steps_per_epoch=7, total_steps=21).total_steps == 21
    assert make_scheduler(num_epochs=3, total_steps=20).total_steps == 20


def test_a_fraction_of_a_warm_up_step_is_kept():
    scheduler = make_scheduler(total_steps=20, num_warmup_steps=3.6, warmup_starting_lr=0.01)
    assert scheduler.num_warmup_steps == 3.6
    assert step_through(scheduler, 4)[3, 0] == pytest.approx(0.01 + 0.09 * 3 / 3.6)


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
        ({"decay_phase_ratio": -0.1}, "`decay_phase_ratio` is -0.1, but a fraction of the run must be a finite"),
        ({"decay_phase_ratio": 1.1}, "of at least 0 and at most 1. Change `decay_phase_ratio` where"),
        (
            {"lr_min": -1e-6},
            "`lr_min` is -1e-06, but a fraction of the initial learning rate must be a finite number of at least 0",
        ),
        ({"lr_min": 1.2}, "`lr_min` is 1.2, but a fraction of the initial learning rate must be"),
        (
            {"num_warmup_steps": 2, "warmup_starting_lr": 0.2},
            "`warmup_starting_lr` is 0.2, but the initial learning rate of the optimizer, the upper end of the "
            "schedule, is lower",
        ),
        ({"num_warmup_steps": 2, "warmup_starting_lr": float("nan")}, "`warmup_starting_lr` is nan"),
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
    assert rates[20] == pytest.approx(1e-7)
    assert scheduler.num_warmup_steps == 15


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
    assert continuation.get_current_step() == -1
    assert continuation.base_values == [0.3]
    assert continuation.optimizer.param_groups[0]["lr"] == 0.3
    assert continuation.state_dict() == {
        "param_group_field": "lr",
        "base_lr_values": [0.3],
        "num_updates": -1,
        "param_group_values": [0.3],
        "total_steps": 200,
        "num_warmup_steps": 0,
        "decay_phase_ratio": 0.1,
        "lr_min": 1e-6,
        "warmup_starting_lr": 1e-6,
        "use_inverse_sqrt_decay": True,
        "num_checkpoints": 1,
        "is_continuation_from_checkpoint": True,
        "checkpoint_steps": [200],
        "checkpoint_decay_info": [
            {"period_start": 0, "period_end": 200, "decay_steps": 20, "pre_decay_step": 180},
        ],
        "previous_checkpoint_step": None,
    }


def test_resuming_a_continuation_restores_its_position():
    settings = {"total_steps": 50, "num_warmup_steps": 5, "is_continuation_from_checkpoint": True}
    uninterrupted = step_through(make_scheduler(0.1, 0.2, **settings), 52)
    first = make_scheduler(0.1, 0.2, **settings)
    step_through(first, 47)
    second = make_scheduler(9.0, 9.0, **settings)
    second.resume_from(first.state_dict())
    np.testing.assert_array_equal(step_through(second, 5), uninterrupted[47:])


def test_the_previous_checkpoint_is_the_last_that_was_reached():
    scheduler = make_scheduler(total_steps=8, num_checkpoints=2)
    seen = []
    for _ in range(10):
        scheduler.step()
        seen.append(scheduler.previous_checkpoint_step)
    assert seen == [None] * 4 + [4] * 4 + [8] * 2


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
        {"period_start": 0, "period_end": 50, "decay_steps": 5, "pre_decay_step": 45},
        {"period_start": 50, "period_end": 100, "decay_steps": 5, "pre_decay_step": 95},
    ]
    info = scheduler.get_decay_info()
    assert info == expected
    info[0]["period_start"] = 7
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
        (51, "stable", 50, 95, 1 / 45, 100, False),
        (95, "decay", 95, 100, 0.0, 100, False),
        (97, "decay", 95, 100, 0.4, 100, False),
        (100, "decay", 95, 100, 1.0, 100, True),
        (999, "decay", 95, 100, 1.0, 100, True),
    ],
)
def test_phase_info_describes_the_position_in_the_schedule(
    num_updates, phase, start, end, progress, checkpoint, is_checkpoint
):
    scheduler = make_scheduler(total_steps=100, num_checkpoints=2, num_warmup_steps=10)
    assert scheduler.get_phase_info(num_updates) == {
        **scheduler.get_decay_info()[checkpoint // 100],
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


@pytest.mark.parametrize(("num_warmup_epochs", "num_warmup_steps"), [(None, 0), (0, 0), (1, 8), (0.3, 2.4)])
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
    decays = plan_decays([20, 40], 0.25)
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
