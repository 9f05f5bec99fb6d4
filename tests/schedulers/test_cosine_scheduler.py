"""`cosine_lr` and `CosineLrScheduler`, compared with an independent formula over whole runs."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from _support import make_optimizer, step_through
from pytorch_accelerated.exceptions import SchedulerSettingsError
from pytorch_accelerated.schedulers import CosineLrScheduler, cosine_lr
from pytorch_accelerated.schedulers._placeholders import TrainerPlaceholderValues, resolve_placeholders


def expected_curve(updates, total, warmup, cooldown, base, minimum, start, k):
    """The curve over all updates at once, with sin^2 instead of the cosine, and clipping instead of cases."""
    ramp = np.interp(updates, [0, max(warmup, 1e-12)], [start, base])
    length = max(total - cooldown - warmup, 1e-12)  # a cosine of length 0 jumps to its end
    progress = np.where(updates >= total - cooldown, 1, np.clip((updates - warmup) / length, 0, 1))
    falling = base - (base - minimum) * np.sin(np.pi / 2 * progress**k) ** 2
    return np.where(updates < warmup, ramp, falling)


@pytest.mark.parametrize(
    ("num_epochs", "updates_per_epoch", "warmup", "cooldown", "k", "minimum"),
    [
        *itertools.product([1, 4], [1, 7, 10], [0, 0.25], [0, 0.5], [0.5, 1.0, 2.0], [0.0, 1e-6, 0.05]),
        (3, 10, 3, 0, 1.0, 1e-6),
        (3, 10, 0, 3, 1.0, 1e-6),
        (3, 10, 1, 2, 1.0, 1e-6),
        (5, 10, 1.37, 2.21, 1.5, 1e-3),
    ],
)
def test_the_learning_rates_of_a_whole_run_follow_the_formula(
    num_epochs, updates_per_epoch, warmup, cooldown, k, minimum
):
    total = num_epochs * updates_per_epoch
    scheduler = CosineLrScheduler(
        make_optimizer(0.1, 0.7),
        num_epochs,
        updates_per_epoch,
        k_decay=k,
        lr_min=minimum,
        num_warmup_epochs=warmup,
        warmup_starting_lr=1e-4,
        num_cooldown_epochs=cooldown,
    )
    rates = step_through(scheduler, total + 4)
    for column, base in enumerate([0.1, 0.7]):
        expected = expected_curve(
            np.arange(total + 4),
            total,
            warmup * updates_per_epoch,
            cooldown * updates_per_epoch,
            base,
            minimum,
            1e-4,
            k,
        )
        np.testing.assert_allclose(rates[:, column], expected, rtol=1e-12, atol=1e-15)


def test_warm_up_cosine_and_cooldown_meet_exactly_at_their_boundaries():
    scheduler = CosineLrScheduler(
        make_optimizer(0.1), 10, 100, num_warmup_epochs=2, num_cooldown_epochs=3, warmup_starting_lr=1e-5
    )
    rates = step_through(scheduler, 1002)[:, 0]
    assert rates[0] == 1e-5
    assert rates[200] == rates.max() == 0.1
    assert rates[699] > rates[700] == 1e-6
    assert (rates[700:] == 1e-6).all()
    largest_step = 0.1 / 200
    assert np.abs(np.diff(rates)).max() <= largest_step


def test_without_warm_up_the_rate_starts_at_the_full_value_and_ends_at_the_minimum():
    rates = step_through(CosineLrScheduler(make_optimizer(0.1), 3, 5), 16)[:, 0]
    assert rates[0] == 0.1
    assert rates[14] > 1e-6
    assert rates[15] == 1e-6


def test_a_ratio_replaces_the_rate_and_applies_to_each_group():
    scheduler = CosineLrScheduler(
        make_optimizer(0.1, 0.4),
        2,
        10,
        lr_min=5.0,
        min_lr_ratio=0.25,
        num_warmup_epochs=1,
        warmup_starting_lr=5.0,
        warmup_starting_lr_ratio=0.5,
    )
    rates = step_through(scheduler, 21)
    np.testing.assert_allclose(rates[[0, 10, 20]], [[0.05, 0.2], [0.1, 0.4], [0.025, 0.1]])


def test_a_ratio_of_zero_replaces_the_rate_too():
    scheduler = CosineLrScheduler(
        make_optimizer(0.1), 2, 10, min_lr_ratio=0.0, num_warmup_epochs=1, warmup_starting_lr_ratio=0.0
    )
    rates = step_through(scheduler, 21)[:, 0]
    assert rates[0] == rates[20] == 0.0


def test_a_group_with_a_base_value_below_the_minimum_never_exceeds_it():
    scheduler = CosineLrScheduler(
        make_optimizer(0.1, 1e-8, 0.0), 2, 10, lr_min=1e-3, num_warmup_epochs=1, warmup_starting_lr=1e-2
    )
    rates = step_through(scheduler, 21)
    assert rates[-1, 0] == 1e-3
    np.testing.assert_allclose(rates[:, 1], 1e-8)
    assert (rates[:, 2] == 0).all()


def test_a_restored_schedule_continues_like_an_uninterrupted_one():
    settings = {"num_warmup_epochs": 1, "num_cooldown_epochs": 0.5, "k_decay": 1.5}
    uninterrupted = step_through(CosineLrScheduler(make_optimizer(0.1, 0.2), 4, 6, **settings), 25)
    first = CosineLrScheduler(make_optimizer(0.1, 0.2), 4, 6, **settings)
    step_through(first, 11)
    second = CosineLrScheduler(make_optimizer(9.0, 9.0), 4, 6, **settings)
    second.load_state_dict(first.state_dict())
    np.testing.assert_array_equal(step_through(second, 14), uninterrupted[11:])


def test_a_resumed_run_can_be_longer_than_originally_planned():
    first = CosineLrScheduler(make_optimizer(0.1), 2, 6)
    step_through(first, 9)
    longer = CosineLrScheduler(make_optimizer(0.1), 4, 6)
    longer.load_state_dict(state_dict=first.state_dict())
    uninterrupted = step_through(CosineLrScheduler(make_optimizer(0.1), 4, 6), 25)
    np.testing.assert_array_equal(step_through(longer, 16), uninterrupted[9:])


def test_create_scheduler_fn_uses_the_length_of_the_run():
    create = CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=TrainerPlaceholderValues.NUM_EPOCHS / 4)
    values = {
        TrainerPlaceholderValues.NUM_EPOCHS: 2,
        TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH: 8,
    }
    scheduler = resolve_placeholders(create, values)(make_optimizer(0.1))
    same = CosineLrScheduler(make_optimizer(0.1), 2, 8, num_warmup_epochs=0.5)
    np.testing.assert_array_equal(step_through(scheduler, 17), step_through(same, 17))


def test_create_scheduler_fn_passes_every_argument_and_creates_the_subclass():
    class Own(CosineLrScheduler):
        pass

    arguments = {
        "total_num_epochs": 4,
        "num_update_steps_per_epoch": 5,
        "k_decay": 2.0,
        "lr_min": 1e-5,
        "min_lr_ratio": 0.1,
        "num_warmup_epochs": 1,
        "warmup_starting_lr": 1e-4,
        "warmup_starting_lr_ratio": 0.2,
        "num_cooldown_epochs": 0.5,
    }
    scheduler = Own.create_scheduler_fn(**arguments)(make_optimizer(0.1))
    assert type(scheduler) is Own
    assert {name: getattr(scheduler, name) for name in arguments} == arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_num_epochs": 0}, "is 0, but the length of the run must be a finite number above 0."),
        ({"total_num_epochs": float("inf")}, "`total_num_epochs` is inf"),
        ({"num_update_steps_per_epoch": 0}, "`num_update_steps_per_epoch` is 0, but the length of an epoch"),
        (
            {"k_decay": 0.0},
            "`k_decay` is 0.0, but the exponent of the decay must be a finite number above 0.",
        ),
        ({"k_decay": -1.0}, "`k_decay` is -1.0"),
        ({"lr_min": -0.1}, "`lr_min` is -0.1, but a learning rate must be a finite number of at least 0."),
        ({"lr_min": float("nan")}, "`lr_min` is nan"),
        (
            {"lr_min": 0.2},
            "`lr_min` is 0.2, but the initial learning rate of the optimizer, the upper end of the schedule, is lower",
        ),
        ({"min_lr_ratio": 1.5}, "`min_lr_ratio` is 1.5, but a fraction of the initial learning rate must be"),
        ({"min_lr_ratio": -0.5}, "`min_lr_ratio` is -0.5"),
        ({"num_warmup_epochs": -1}, "`num_warmup_epochs` is -1, but the length of the warm-up"),
        ({"num_warmup_epochs": 1, "warmup_starting_lr": -1.0}, "`warmup_starting_lr` is -1.0"),
        (
            {"num_warmup_epochs": 1, "warmup_starting_lr": 0.2},
            "`warmup_starting_lr` is 0.2, but the initial learning rate of the optimizer",
        ),
        (
            {"num_warmup_epochs": 1, "warmup_starting_lr_ratio": 2},
            "and at most 1. Change `warmup_starting_lr_ratio` where",
        ),
        ({"num_cooldown_epochs": -0.5}, "`num_cooldown_epochs` is -0.5, but the length of the cooldown"),
    ],
)
def test_a_setting_out_of_range_is_rejected(settings, message):
    settings = {"total_num_epochs": 3, "num_update_steps_per_epoch": 5, **settings}
    with pytest.raises(SchedulerSettingsError, match=re.escape(message)) as caught:
        CosineLrScheduler(make_optimizer(0.1), **settings)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("warmup", "cooldown"), [(2, 1.5), (3.5, 0), (0, 4)])
def test_a_warm_up_and_a_cooldown_that_exceed_the_run_follow_each_other_with_a_warning(warmup, cooldown):
    with pytest.warns(UserWarning, match="both are part of the run, which has only 3 epochs"):
        scheduler = CosineLrScheduler(
            make_optimizer(0.1), 3, 4, num_warmup_epochs=warmup, num_cooldown_epochs=cooldown, warmup_starting_lr=0.01
        )
    rates = step_through(scheduler, 13)[:, 0]
    expected = [0.01 + 0.09 * update / (4 * warmup) if update < 4 * warmup else 1e-6 for update in range(13)]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


def test_an_unresolved_placeholder_is_an_error_that_names_it():
    with pytest.raises(TypeError, match=r"`total_num_epochs` is TrainerPlaceholderValues.NUM_EPOCHS, but"):
        CosineLrScheduler.create_scheduler_fn()(make_optimizer(0.1))


def test_cosine_lr_computes_the_same_curve():
    updates = np.arange(31)
    curve = [
        cosine_lr(
            update,
            total_updates=30,
            lr=2.0,
            lr_min=0.5,
            k_decay=3.0,
            num_warmup_updates=4.5,
            warmup_starting_lr=0.1,
            num_cooldown_updates=2.5,
        )
        for update in updates
    ]
    np.testing.assert_allclose(curve, expected_curve(updates, 30, 4.5, 2.5, 2.0, 0.5, 0.1, 3.0))
