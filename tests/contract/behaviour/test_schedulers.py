"""What programs written for 0.1.61 observe of the schedulers: curves, attributes, and states.

The formulas are written here a second time, update by update. Curves and files of 0.1.61 itself are in
``written_by_0_1_61``.
"""

from __future__ import annotations

import json
import math
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from _support import load_module, make_optimizer, recorder_of, step_through
from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated.callbacks import SaveTrainingStateCallback
from pytorch_accelerated.exceptions import SchedulerSettingsError
from pytorch_accelerated.schedulers import CosineLrScheduler, SchedulerBase, StatefulSchedulerBase, WSDLrScheduler
from pytorch_accelerated.schedulers._placeholders import resolve_placeholders

WRITTEN = Path(__file__).with_name("written_by_0_1_61")
_old = load_module(Path(__file__).with_name("_written_by_0_1_61.py"))

EXACT = {"rtol": 1e-14, "atol": 1e-18}
BATCHES_PER_EPOCH = 10


# --- the formulas --------------------------------------------------------------------------------------------------


def checkpoints_of(total, num_checkpoints):
    return [int(Fraction(total, 2**power)) for power in reversed(range(num_checkpoints))]


def wsd_rate(k, b, checkpoints, r=0.1, m=1e-6, warmup=0.0, w=1e-6, is_sqrt=True):
    if k < warmup:
        return w + (b - w) * k / warmup
    if k >= checkpoints[-1]:
        return b * m
    start, end = next((c, d) for c, d in zip([0, *checkpoints], checkpoints, strict=False) if c <= k < d)
    num_decaying = int(r * (end - start))
    first = end - num_decaying
    if k < first:
        return b
    t = (k - first) / num_decaying
    if is_sqrt:
        return b * (m + (1 - m) * (1 - t**0.5))
    return (b if t == 0 else 0.0) if m == 0 else b / (t / m + 1 - t)


def cosine_rate(k, b, total, power=1.0, minimum=1e-6, warmup=0.0, w=1e-6, cooldown=0.0):
    if k < warmup:
        return w + (b - w) * k / warmup
    if k >= total - cooldown:
        return minimum
    p = ((k - warmup) / (total - cooldown - warmup)) ** power
    return minimum + (b - minimum) * (1 + math.cos(math.pi * p)) / 2


def curve_of(rate, num_rates, lrs, **settings):
    return np.array([[rate(k, lr, **settings) for lr in lrs] for k in range(num_rates)])


LRS = (0.1, 0.7)

WSD_SETTINGS = [
    {},
    {"lr_min": 0.1},
    {"lr_min": 0.1, "use_inverse_sqrt_decay": False},
    {"lr_min": 0.0, "use_inverse_sqrt_decay": False},
    {"lr_min": 0.1, "num_checkpoints": 2},
    {"lr_min": 0.05, "num_checkpoints": 3, "decay_phase_ratio": 0.25, "use_inverse_sqrt_decay": False},
    {"num_warmup_steps": 5, "warmup_starting_lr": 1e-3},
    {"num_warmup_steps": 2.5, "num_checkpoints": 4, "decay_phase_ratio": 0.6},
    {"num_warmup_steps": 17, "num_checkpoints": 3, "decay_phase_ratio": 1.0, "lr_min": 0.2},
    {"decay_phase_ratio": 0},
    {"num_warmup_steps": 60, "lr_min": 0.3},
    {"num_warmup_steps": 12, "is_continuation_from_checkpoint": True, "lr_min": 0.01},
]
COSINE_SETTINGS = [
    {},
    {"lr_min": 0.0},
    {"min_lr_ratio": 0.1},
    {"k_decay": 2.0, "lr_min": 1e-3},
    {"num_warmup_epochs": 1},
    {"num_warmup_epochs": 0.25, "warmup_starting_lr": 1e-3},
    {"num_warmup_epochs": 1, "warmup_starting_lr_ratio": 0.1},
    {"num_cooldown_epochs": 1},
    {"num_warmup_epochs": 0.7, "num_cooldown_epochs": 1.3, "k_decay": 0.5, "lr_min": 0.01},
    {"num_warmup_epochs": 2, "num_cooldown_epochs": 2, "min_lr_ratio": 0.0},
]


def expected_wsd(total, settings, num_rates, lrs=LRS):
    is_continuation = settings.get("is_continuation_from_checkpoint", False)
    return curve_of(
        wsd_rate,
        num_rates,
        lrs,
        checkpoints=checkpoints_of(total, settings.get("num_checkpoints", 1)),
        r=settings.get("decay_phase_ratio", 0.1),
        m=settings.get("lr_min", 1e-6),
        warmup=0 if is_continuation else settings.get("num_warmup_steps", 0),
        w=settings.get("warmup_starting_lr", 1e-6),
        is_sqrt=settings.get("use_inverse_sqrt_decay", True),
    )


def expected_cosine(num_epochs, settings, num_rates, lrs=LRS, per_epoch=BATCHES_PER_EPOCH):
    def rate(k, lr):
        minimum, start = settings.get("min_lr_ratio"), settings.get("warmup_starting_lr_ratio")
        return cosine_rate(
            k,
            lr,
            num_epochs * per_epoch,
            settings.get("k_decay", 1.0),
            settings.get("lr_min", 1e-6) if minimum is None else minimum * lr,
            settings.get("num_warmup_epochs", 0) * per_epoch,
            settings.get("warmup_starting_lr", 1e-6) if start is None else start * lr,
            settings.get("num_cooldown_epochs", 0) * per_epoch,
        )

    return curve_of(rate, num_rates, lrs)


def make_wsd(*lrs, total_steps=40, **settings):
    return WSDLrScheduler(make_optimizer(*(lrs or LRS)), total_steps=total_steps, **settings)


def make_cosine(*lrs, num_epochs=4, per_epoch=BATCHES_PER_EPOCH, **settings):
    return CosineLrScheduler(make_optimizer(*(lrs or LRS)), num_epochs, per_epoch, **settings)


def rates_of(scheduler):
    return [group["lr"] for group in scheduler.optimizer.param_groups]


# --- training ------------------------------------------------------------------------------------------------------


def make_trainer(*callbacks, lrs=LRS, seed=3):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 1)
    parameters = [{"params": [model.weight], "lr": lrs[0]}, {"params": [model.bias], "lr": lrs[1]}]
    optimizer = torch.optim.SGD(parameters, momentum=0.9)
    return Trainer(model, torch.nn.functional.mse_loss, optimizer, callbacks=callbacks)


def train(trainer, create_scheduler_fn, num_epochs=4, **kwargs):
    generator = torch.Generator().manual_seed(5)
    inputs = 0.01 * torch.randn(2 * BATCHES_PER_EPOCH, 3, generator=generator)
    trainer.train(
        TensorDataset(inputs, inputs.sum(1, keepdim=True)),
        num_epochs=num_epochs,
        per_device_batch_size=2,
        create_scheduler_fn=create_scheduler_fn,
        **kwargs,
    )
    return trainer


def rates_of_run(create_scheduler_fn, *callbacks, before=None, **kwargs):
    """Return the rates at which each update trained, and those after the last one, of shape (updates + 1, groups)."""
    recorder, rates = recorder_of(
        lambda trainer: [group["lr"] for group in trainer.optimizer.param_groups], "on_optimizer_step_start"
    )
    trainer = make_trainer(*callbacks, recorder)
    if before is not None:
        before(trainer)
    train(trainer, create_scheduler_fn, **kwargs)
    return np.array([*rates, rates_of(trainer.scheduler)])


# --- WSD: whole curves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", WSD_SETTINGS, ids=str)
@pytest.mark.parametrize("total", [40, 101])
def test_wsd_rates_follow_the_formula_in_a_loop_of_ones_own(total, settings):
    """Rows 1.1 to 1.4, 1.13 to 1.15."""
    rates = step_through(make_wsd(total_steps=total, **settings), total + 3)
    np.testing.assert_allclose(rates, expected_wsd(total, settings, total + 3), **EXACT)


def create_wsd(settings):
    """Return the function that creates the scheduler for a run whose epochs have `BATCHES_PER_EPOCH` updates."""
    others = {name: value for name, value in settings.items() if name != "num_warmup_steps"}
    num_warmup_epochs = settings.get("num_warmup_steps", 0) / BATCHES_PER_EPOCH
    return WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=num_warmup_epochs, **others)


@pytest.mark.parametrize("settings", WSD_SETTINGS, ids=str)
def test_wsd_rates_follow_the_formula_under_the_trainer(settings):
    """Rows 1.1 to 1.4, 1.15: update k trains at curve(k), and after the last one the rate is the minimum."""
    np.testing.assert_allclose(rates_of_run(create_wsd(settings)), expected_wsd(40, settings, 41), **EXACT)


def test_wsd_rates_follow_the_formula_with_accumulation():
    """Row 1.3: a schedule counts updates."""
    create = WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=0, decay_phase_ratio=0.3, lr_min=0.1)
    rates = rates_of_run(create, gradient_accumulation_steps=2)
    expected = expected_wsd(20, {"decay_phase_ratio": 0.3, "lr_min": 0.1}, 21)
    np.testing.assert_allclose(rates, expected, **EXACT)


@pytest.mark.parametrize(
    "recorded", json.loads((WRITTEN / "curves.json").read_text()), ids=lambda r: str(r["settings"])
)
def test_wsd_curves_are_those_that_0_1_61_returned(recorded):
    """Rows 1.1 to 1.4, 1.13, 1.15: recorded with 0.1.61."""
    scheduler = make_wsd(*_old.LRS, total_steps=_old.NUM_STEPS, **recorded["settings"])
    rates = [scheduler.get_updated_values(k) for k in range(_old.NUM_STEPS + 1)]
    np.testing.assert_allclose(rates, recorded["rates"], **EXACT)


def test_lr_min_is_a_fraction_of_the_base_rate_of_each_group():
    """Row 1.1: numbers of 0.1.61."""
    scheduler = make_wsd(0.01, 0.02, total_steps=100, lr_min=0.1)
    assert scheduler.get_updated_values(95) == pytest.approx([0.0036360389693210716, 0.007272077938642143], rel=1e-14)
    assert scheduler.get_updated_values(100) == pytest.approx([0.001, 0.002], rel=1e-14)
    assert make_wsd(0.01, total_steps=100).get_updated_values(100) == pytest.approx([1e-8], rel=1e-14)


def test_the_other_decay_is_inversely_proportional():
    """Row 1.2."""
    scheduler = make_wsd(1.0, total_steps=100, lr_min=0.1, use_inverse_sqrt_decay=False)
    rates = [scheduler.get_updated_values(k)[0] for k in (90, 91, 95, 99, 100)]
    assert rates == pytest.approx([1.0, 0.52632, 0.18182, 0.10989, 0.1], abs=5e-6)
    to_zero = make_wsd(1.0, total_steps=100, lr_min=0.0, use_inverse_sqrt_decay=False)
    assert [to_zero.get_updated_values(k)[0] for k in (90, 91, 99, 100)] == [1.0, 0.0, 0.0, 0.0]


def test_the_length_of_a_decay_is_a_fraction_of_its_period():
    """Row 1.3."""
    periods = make_wsd(total_steps=1000, num_checkpoints=3, decay_phase_ratio=0.1).get_decay_info()
    assert [period["pre_decay_step"] for period in periods] == [225, 475, 950]


def test_the_rate_is_stable_again_at_a_checkpoint_before_the_last():
    """Row 1.4: no update of the next period trains at the minimum."""
    scheduler = make_wsd(1.0, total_steps=1000, num_checkpoints=3, lr_min=0.1)
    rates = [scheduler.get_updated_values(k)[0] for k in (249, 250, 499, 500, 999, 1000)]
    assert rates == pytest.approx([0.1182, 1.0, 0.1182, 1.0, 0.109, 0.1], abs=5e-5)


@pytest.mark.parametrize(("total", "num_warmup"), [(200, 2), (199, 1), (99, 0)])
def test_no_length_of_the_warm_up_means_a_hundredth_of_the_run(total, num_warmup):
    """Row 1.5."""
    assert make_wsd(total_steps=total, num_warmup_steps=None).num_warmup_steps == num_warmup
    assert make_wsd(total_steps=total).num_warmup_steps == 0
    create = WSDLrScheduler.create_scheduler_fn(total_num_epochs=1, num_update_steps_per_epoch=total)
    assert create.keywords["num_warmup_steps"] is None
    scheduler = create(make_optimizer(0.1))
    assert scheduler.num_warmup_steps == num_warmup
    assert rates_of(scheduler) == [1e-6 if num_warmup else 0.1]


def test_a_default_run_trains_its_first_hundredth_as_warm_up():
    """Row 1.5: from the first update on."""
    rates = rates_of_run(WSDLrScheduler.create_scheduler_fn(), num_epochs=20)
    np.testing.assert_allclose(rates, expected_wsd(200, {"num_warmup_steps": 2}, 201), **EXACT)
    assert rates[0, 0] == 1e-6


@pytest.mark.parametrize(("num_epochs", "limit", "total"), [(10, 20, 20), (2, 55, 20), (10, 25, 30)])
def test_the_schedule_is_as_long_as_the_epochs_that_a_limit_of_updates_leaves(num_epochs, limit, total):
    """Row 1.7, by the formula of row 4.1."""
    values = {
        TrainerPlaceholderValues.NUM_EPOCHS: min(num_epochs, math.ceil(limit / BATCHES_PER_EPOCH)),
        TrainerPlaceholderValues.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH: BATCHES_PER_EPOCH,
    }
    scheduler = resolve_placeholders(WSDLrScheduler.create_scheduler_fn(), values)(make_optimizer(0.1))
    assert scheduler.total_steps == total


@pytest.mark.parametrize("settings", WSD_SETTINGS, ids=str)
@pytest.mark.parametrize("limit", [20, 25])
def test_the_schedule_ends_with_the_run_under_a_limit_of_updates(limit, settings):
    """Rows 1.7, 4.1; within an epoch ours, where 0.1.61 trains the start of a schedule over the whole epoch."""
    configs = []
    recorder, _ = recorder_of(lambda trainer: configs.append(trainer.run_config), "on_training_run_end")
    rates = rates_of_run(create_wsd(settings), recorder, max_num_train_steps=limit)
    assert configs[0].num_epochs == math.ceil(limit / BATCHES_PER_EPOCH)
    np.testing.assert_allclose(rates, expected_wsd(limit, settings, limit + 1), **EXACT)


def test_the_checkpoints_are_where_they_were_promised():
    """Row 1.8: ours; 0.1.61 ends at half of the run for two checkpoints."""
    positions = {n: make_wsd(total_steps=200000, num_checkpoints=n).get_checkpoint_steps() for n in (1, 2, 3, 4)}
    assert positions == {
        1: [200000],
        2: [100000, 200000],
        3: [50000, 100000, 200000],
        4: [25000, 50000, 100000, 200000],
    }


def test_the_decays_are_reported_with_the_keys_of_0_1_61():
    """Row 1.9."""
    expected = [{"period_start": 0, "period_end": 100, "decay_steps": 10, "pre_decay_step": 90}]
    scheduler = make_wsd(total_steps=100)
    assert scheduler.get_decay_info() == expected
    scheduler.get_decay_info()[0]["period_end"] = 0
    assert scheduler.get_decay_info() == expected


def test_the_phase_has_the_first_period_that_has_not_ended():
    """Row 1.10."""
    scheduler = make_wsd(total_steps=1000, num_checkpoints=3)
    ends = {n: scheduler.get_phase_info(n)["period_end"] for n in (-1, 0, 250, 251, 500, 501, 1000, 2000)}
    assert ends == {-1: 250, 0: 250, 250: 250, 251: 500, 500: 500, 501: 1000, 1000: 1000, 2000: 1000}
    assert scheduler.get_phase_info(300).items() >= scheduler.get_decay_info()[1].items()
    assert scheduler.get_current_phase_info() == scheduler.get_phase_info(0)
    step_through(scheduler, 302)
    assert scheduler.get_current_phase_info() == scheduler.get_phase_info(301)


def test_a_wsd_scheduler_has_the_attributes_of_0_1_61():
    """Row 1.11."""
    scheduler = make_wsd(total_steps=100, num_checkpoints=2)
    assert scheduler.base_lr_values == list(LRS)
    assert scheduler.checkpoint_steps == [50, 100]
    assert scheduler.checkpoint_decay_info == scheduler.get_decay_info()
    assert scheduler.previous_checkpoint_step is None
    names = ("total_steps", "num_warmup_steps", "decay_phase_ratio", "lr_min", "warmup_starting_lr")
    assert [getattr(scheduler, name) for name in names] == [100, 0, 0.1, 1e-6, 1e-6]


@pytest.mark.parametrize("num_warmup", [100, 250])
def test_a_warm_up_may_last_as_long_as_the_run(num_warmup):
    """Row 1.13."""
    scheduler = make_wsd(0.01, total_steps=100, num_warmup_steps=num_warmup, warmup_starting_lr=1e-8)
    rates = [scheduler.get_updated_values(k)[0] for k in (0, 50, 99)]
    assert rates == pytest.approx([1e-8 + (0.01 - 1e-8) * k / num_warmup for k in (0, 50, 99)], rel=1e-12)


def test_a_decay_ratio_of_zero_means_no_decay():
    """Row 1.14."""
    scheduler = make_wsd(0.1, total_steps=10, decay_phase_ratio=0)
    rates = step_through(scheduler, 13)[:, 0]
    assert (rates[:10] == 0.1).all()
    assert rates[10:] == pytest.approx([1e-7] * 3)
    assert [scheduler.get_phase_info(k)["progress"] for k in range(13)] == [*np.arange(10) / 10, 1.0, 1.0, 1.0]


def test_a_fraction_of_a_step_of_warm_up_is_not_rounded():
    """Row 1.15."""
    create = WSDLrScheduler.create_scheduler_fn(10, 10, num_warmup_epochs=0.25, warmup_starting_lr=0.01)
    scheduler = create(make_optimizer(0.1))
    assert scheduler.num_warmup_steps == 2.5
    assert scheduler.get_updated_values(1) == pytest.approx([0.01 + 0.09 / 2.5], rel=1e-14)


def test_long_decays_and_a_redundant_length_are_allowed():
    """Row 1.16: ours."""
    scheduler = WSDLrScheduler(make_optimizer(0.1), 4, 10, 40, num_checkpoints=2, decay_phase_ratio=0.9)
    assert scheduler.total_steps == 40
    assert [period["pre_decay_step"] for period in scheduler.get_decay_info()] == [2, 22]


def test_the_current_step_is_minus_one_before_the_first():
    """Row 1.17: as 0.1.61 in a loop of one's own; under the trainer, the updates done."""
    scheduler = make_wsd()
    assert scheduler.get_current_step() == -1
    scheduler.step()
    assert scheduler.get_current_step() == 0
    recorder, steps = recorder_of(lambda trainer: trainer.scheduler.get_current_step(), "on_train_step_end")
    train(make_trainer(recorder), WSDLrScheduler.create_scheduler_fn())
    assert steps == list(range(1, 41))


# --- WSD: states and continuations -----------------------------------------------------------------------------------


def state_after(num_steps, **settings):
    scheduler = make_wsd(**settings)
    step_through(scheduler, num_steps)
    return scheduler.state_dict()


def test_a_continuation_starts_a_stable_phase_with_the_settings_of_the_state():
    """Row 1.6."""
    state = state_after(91, total_steps=100, decay_phase_ratio=0.1, lr_min=0.2)
    continuation = make_wsd(9.0, 9.0, total_steps=50, decay_phase_ratio=0.2, is_continuation_from_checkpoint=True)
    with pytest.warns(UserWarning, match=r"takes over its decay: `decay_phase_ratio` is 0.1, not 0.2, `lr_min` is 0.2"):
        continuation.load_state_dict(state)
    assert continuation.num_updates == continuation.get_current_step() == -1
    assert continuation.is_continuation_from_checkpoint
    assert continuation.previous_checkpoint_step is None
    assert (continuation.total_steps, continuation.get_checkpoint_steps()) == (50, [50])
    assert rates_of(continuation) == list(LRS)
    rates = step_through(continuation, 52)
    assert (rates[:46] == LRS).all()
    np.testing.assert_allclose(rates, expected_wsd(50, {"lr_min": 0.2}, 52), **EXACT)


@pytest.mark.parametrize("settings", WSD_SETTINGS, ids=str)
def test_a_continuation_follows_the_formula_with_the_settings_of_the_state(settings):
    """Row 1.6."""
    continuation = make_wsd(9.0, 9.0, total_steps=60, num_warmup_steps=9, is_continuation_from_checkpoint=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        continuation.load_state_dict(state_after(38, **settings))
    taken_over = ("decay_phase_ratio", "lr_min", "use_inverse_sqrt_decay", "num_checkpoints")
    settings = {name: value for name, value in settings.items() if name in taken_over}
    np.testing.assert_allclose(step_through(continuation, 63), expected_wsd(60, settings, 63), **EXACT)


def test_a_continuation_takes_over_the_number_of_checkpoints_and_the_kind_of_decay():
    """Row 1.6."""
    settings = {"num_checkpoints": 3, "use_inverse_sqrt_decay": False, "lr_min": 0.1, "decay_phase_ratio": 0.3}
    continuation = make_wsd(total_steps=60, num_warmup_steps=9, is_continuation_from_checkpoint=True)
    with pytest.warns(UserWarning, match="continues another one"):
        continuation.load_state_dict(state_after(30, **settings))
    np.testing.assert_allclose(step_through(continuation, 63), expected_wsd(60, settings, 63), **EXACT)


def test_a_continuation_with_the_same_settings_does_not_warn():
    """Row 1.6."""
    continuation = make_wsd(is_continuation_from_checkpoint=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        continuation.load_state_dict(state_after(37))
    assert continuation.num_updates == -1


def test_a_continuation_that_is_too_short_for_the_checkpoints_of_the_state_changes_nothing():
    """Row 1.6."""
    continuation = make_wsd(total_steps=3, is_continuation_from_checkpoint=True)
    before = continuation.state_dict()
    with pytest.raises(SchedulerSettingsError, match="too short"):
        continuation.load_state_dict(state_after(5, num_checkpoints=4, decay_phase_ratio=0.2))
    assert continuation.state_dict() == before


def test_a_continuation_of_a_continuation_starts_at_the_beginning_again():
    """Row 1.6: also if both are of one length."""
    first = make_wsd(is_continuation_from_checkpoint=True)
    step_through(first, 38)
    second = make_wsd(is_continuation_from_checkpoint=True)
    second.load_state_dict(first.state_dict())
    np.testing.assert_allclose(step_through(second, 41), expected_wsd(40, {}, 41), **EXACT)


@pytest.mark.parametrize("when", ["before the run", "when the run starts"])
def test_a_run_that_loads_a_checkpoint_as_continuation_trains_at_the_stable_rate_and_decays_at_its_end(tmp_path, when):
    """Row 1.6: under the trainer, from the decay of the first run on."""
    path = tmp_path / "checkpoint.pt"
    saver, _ = recorder_of(
        lambda trainer: trainer.save_checkpoint(path) if trainer.progress.num_updates == 38 else None,
        "on_train_step_end",
    )
    train(make_trainer(saver), WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=1, lr_min=0.1))
    load = lambda trainer: trainer.load_checkpoint(path)  # noqa: E731
    loader, _ = recorder_of(load, "on_training_run_start")
    create = WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=1, lr_min=0.1, is_continuation_from_checkpoint=True)
    if when == "before the run":
        rates = rates_of_run(create, before=load, num_epochs=3)
    else:
        rates = rates_of_run(create, loader, num_epochs=3)
    np.testing.assert_allclose(rates, expected_wsd(30, {"lr_min": 0.1}, 31), **EXACT)


@pytest.mark.parametrize("position", [1, 7, 15, 28, 29])
def test_a_resumed_continuation_goes_on_where_it_was(tmp_path, position):
    """Row 1.6: the trainer's own resume restores the position, and the settings that the run had taken over."""
    path = tmp_path / "checkpoint.pt"
    first = train(make_trainer(), WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=0, lr_min=0.1))
    first.save_checkpoint(path)
    create = WSDLrScheduler.create_scheduler_fn(lr_min=0.2, num_checkpoints=1, is_continuation_from_checkpoint=True)

    def load_unless_resumed(trainer):
        if not trainer.is_resumed:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer.load_checkpoint(path)

    loader, _ = recorder_of(load_unless_resumed, "on_training_run_start")
    states = SaveTrainingStateCallback(tmp_path / "states", save_every_n_steps=1, save_at_end=False)
    whole = rates_of_run(create, loader, states, num_epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rest = rates_of_run(create, loader, num_epochs=3, resume_from=tmp_path / "states" / f"step_{position}")
    np.testing.assert_array_equal(rest, whole[position:])
    np.testing.assert_allclose(whole, expected_wsd(30, {"lr_min": 0.1}, 31), **EXACT)


@pytest.mark.parametrize("settings", WSD_SETTINGS, ids=str)
@pytest.mark.parametrize("position", [1, 9, 10, 37, 40])
def test_a_saved_wsd_schedule_goes_on_where_it_was(settings, position):
    """Row 1.12."""
    whole = step_through(make_wsd(**settings), 43)
    first = make_wsd(**settings)
    step_through(first, position)
    second = make_wsd(9.0, 9.0, **settings)
    second.resume_from(first.state_dict())
    np.testing.assert_array_equal(rates_of(second), whole[position - 1])
    np.testing.assert_array_equal(step_through(second, 43 - position), whole[position:])


def test_the_state_has_the_keys_of_0_1_61_and_the_position():
    """Row 1.12."""
    old = torch.load(WRITTEN / "wsd.pt", weights_only=True)["scheduler_state_dict"]
    scheduler = make_wsd(total_steps=20, num_warmup_steps=None, **_old.WSD)
    step_through(scheduler, 3)
    state = scheduler.state_dict()
    assert state.keys() >= {*old, "num_updates"}
    assert state["num_updates"] == 2
    same = {"param_group_field", "total_steps", "decay_phase_ratio", "lr_min", "num_checkpoints", "checkpoint_steps"}
    assert {name: state[name] for name in same} == {name: old[name] for name in same}
    assert state["checkpoint_decay_info"] == old["checkpoint_decay_info"]


def test_a_state_of_0_1_61_leaves_the_position_as_it_is():
    """Row 1.12."""
    old = torch.load(WRITTEN / "wsd.pt", weights_only=True)["scheduler_state_dict"]
    scheduler = make_wsd(9.0, 9.0, total_steps=30, **_old.WSD)
    scheduler.load_state_dict(old)
    assert scheduler.num_updates == -1
    assert scheduler.base_lr_values == old["base_lr_values"] == list(_old.LRS)
    step_through(scheduler, 25)
    scheduler.load_state_dict(old)
    assert scheduler.num_updates == 24
    assert (scheduler.total_steps, rates_of(scheduler)) == (30, scheduler.get_updated_values(24))


@pytest.mark.parametrize("is_continuation", [True, False])
@pytest.mark.parametrize("left_out", ["base_lr_values", "param_group_field", "previous_checkpoint_step"])
def test_a_state_of_0_1_61_that_a_program_has_put_together_is_accepted(left_out, is_continuation):
    """Row 1.12: the settings and the checkpoints are enough."""
    state = torch.load(WRITTEN / "wsd.pt", weights_only=True)["scheduler_state_dict"]
    del state[left_out]
    scheduler = make_wsd(total_steps=30, is_continuation_from_checkpoint=is_continuation, **_old.WSD)
    own_rates = scheduler.base_lr_values
    step_through(scheduler, 3)
    scheduler.load_state_dict(state)
    assert scheduler.num_updates == (-1 if is_continuation else 2)
    assert scheduler.base_lr_values == state.get("base_lr_values", own_rates)


def test_the_cache_that_the_wsd_scheduler_had_can_be_cleared():
    """Row 1.18."""
    scheduler = make_wsd(total_steps=100)
    scheduler._get_checkpoint_info.cache_clear()
    assert scheduler._get_checkpoint_info(95) == (100, 95)


@pytest.mark.parametrize("is_before_the_run", [True, False])
def test_a_checkpoint_that_0_1_61_wrote_can_be_continued(is_before_the_run):
    """Row 1.12: base rates and settings come from the file, and the model."""
    load = lambda trainer: trainer.load_checkpoint(WRITTEN / "wsd.pt")  # noqa: E731
    loader, _ = recorder_of(load, "on_training_run_start")
    before, callbacks = (load, ()) if is_before_the_run else (None, (loader,))
    create = WSDLrScheduler.create_scheduler_fn(is_continuation_from_checkpoint=True)
    with pytest.warns(UserWarning, match="takes over its decay: `decay_phase_ratio` is 0.3, not 0.1"):
        rates = rates_of_run(create, *callbacks, before=before, num_epochs=3)
    np.testing.assert_allclose(rates, expected_wsd(30, _old.WSD, 31, _old.LRS), **EXACT)


def test_a_state_of_the_first_versions_of_this_library_can_be_loaded():
    """Row 1.12: it has a position and base values only."""
    state = {"base_values": [0.3], "num_updates": 17, "is_continuation_from_checkpoint": False, "total_steps": 20}
    scheduler = make_wsd(0.1, total_steps=20, decay_phase_ratio=0.4)
    scheduler.load_state_dict(state)
    assert (scheduler.num_updates, scheduler.base_values, scheduler.total_steps) == (17, [0.3], 20)
    expected = expected_wsd(20, {"decay_phase_ratio": 0.4}, 21, [0.3])
    assert rates_of(scheduler) == pytest.approx(expected[17], rel=1e-14)
    continuation = make_wsd(0.1, total_steps=20, is_continuation_from_checkpoint=True)
    continuation.load_state_dict(state)
    assert (continuation.num_updates, continuation.base_values) == (-1, [0.3])
    continuation.resume_from({**state, "is_continuation_from_checkpoint": True})
    assert continuation.num_updates == 17


def test_the_state_of_another_kind_of_scheduler_is_refused():
    """Row 1.12."""
    optimizer = make_optimizer(0.1)
    other = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10).state_dict()
    for is_continuation in (True, False):
        scheduler = make_wsd(is_continuation_from_checkpoint=is_continuation)
        before = scheduler.state_dict()
        with pytest.raises(ValueError, match="no entry 'num_updates'"):
            scheduler.load_state_dict(other)
        assert scheduler.state_dict() == before


# --- cosine ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", COSINE_SETTINGS, ids=str)
def test_cosine_rates_follow_the_formula_in_a_loop_of_ones_own(settings):
    """Rows 2.2 to 2.4: ours where warm-up and cooldown meet the cosine."""
    rates = step_through(make_cosine(**settings), 43)
    np.testing.assert_allclose(rates, expected_cosine(4, settings, 43), **EXACT)


@pytest.mark.parametrize("settings", COSINE_SETTINGS, ids=str)
@pytest.mark.parametrize("position", [1, 9, 10, 37, 40])
def test_a_saved_cosine_schedule_goes_on_where_it_was(settings, position):
    """Row 2.7."""
    first, second = make_cosine(**settings), make_cosine(9.0, 9.0, **settings)
    step_through(first, position)
    second.load_state_dict(first.state_dict())
    expected = expected_cosine(4, settings, 43)
    np.testing.assert_allclose(rates_of(second), expected[position - 1], **EXACT)
    np.testing.assert_allclose(step_through(second, 43 - position), expected[position:], **EXACT)


@pytest.mark.parametrize("settings", COSINE_SETTINGS, ids=str)
def test_cosine_rates_follow_the_formula_under_the_trainer(settings):
    """Row 2.1: ours; update k trains at curve(k), and after the last one the rate is the minimum."""
    rates = rates_of_run(CosineLrScheduler.create_scheduler_fn(**settings))
    np.testing.assert_allclose(rates, expected_cosine(4, settings, 41), **EXACT)


@pytest.mark.parametrize("settings", COSINE_SETTINGS, ids=str)
@pytest.mark.parametrize("limit", [20, 25])
@pytest.mark.filterwarnings("ignore:`num_warmup_epochs` is 2 and `num_cooldown_epochs` is 2:UserWarning")
def test_the_cosine_ends_with_the_run_under_a_limit_of_updates(limit, settings):
    """Rows 2.1, 4.1; within an epoch ours, where 0.1.61 trains the start of a schedule over the whole epoch."""
    configs = []
    recorder, _ = recorder_of(lambda trainer: configs.append(trainer.run_config), "on_training_run_end")
    rates = rates_of_run(CosineLrScheduler.create_scheduler_fn(**settings), recorder, max_num_train_steps=limit)
    assert configs[0].num_epochs == math.ceil(limit / BATCHES_PER_EPOCH)
    expected = expected_cosine(limit / BATCHES_PER_EPOCH, settings, limit + 1)
    np.testing.assert_allclose(rates, expected, **EXACT)


def test_the_second_update_trains_at_the_second_rate_of_the_curve():
    """Row 2.1: ours; 0.1.61 trains two updates at the first."""
    rates = rates_of_run(
        CosineLrScheduler.create_scheduler_fn(total_num_epochs=1, num_update_steps_per_epoch=8), num_epochs=1
    )
    assert rates[1, 0] == pytest.approx(0.096194, abs=5e-7)


def test_a_cosine_with_warm_up_reaches_the_minimum_at_its_end_and_not_before():
    """Row 2.2: ours; 0.1.61 drops to the minimum when the warm-up would have ended at the far end."""
    rates = step_through(make_cosine(num_warmup_epochs=1, num_cooldown_epochs=1), 41)[:, 0]
    assert rates[10] == 0.1
    assert rates[29] > rates[30] == 1e-6
    assert abs(np.diff(rates)).max() < 0.011


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda o: CosineLrScheduler(o, 10, 10, num_warmup_epochs=2), 1e-6),
        (lambda o: CosineLrScheduler(o, 10, 10), 0.1),
        (lambda o: CosineLrScheduler(o, 10, 10, num_warmup_epochs=2, warmup_starting_lr_ratio=0.2), 0.02),
        (lambda o: WSDLrScheduler(o, total_steps=10, num_warmup_steps=2, warmup_starting_lr=0.01), 0.01),
        (lambda o: WSDLrScheduler(o, total_steps=10), 0.1),
        (
            lambda o: WSDLrScheduler(o, total_steps=10, num_warmup_steps=2, is_continuation_from_checkpoint=True),
            0.1,
        ),
    ],
)
def test_a_constructor_sets_the_first_rate_and_counts_no_step(make, expected):
    """Row 2.3: also on an optimizer whose last run has ended."""
    optimizer = make_optimizer(0.1)
    scheduler = make(optimizer)
    assert rates_of(scheduler) == pytest.approx([expected])
    assert scheduler.num_updates == -1
    step_through(scheduler, 9)
    assert rates_of(make(optimizer)) == pytest.approx([expected])


@pytest.mark.parametrize(("base", "settings"), [(CosineLrScheduler, (2, 4)), (WSDLrScheduler, (2, 4))])
def test_a_constructor_does_not_call_what_a_subclass_defines(base, settings):
    """Row 2.3: its own constructor has not finished."""

    class Half(base):
        def __init__(self, optimizer):
            super().__init__(optimizer, *settings)
            self.factor = 0.5

        def get_updated_values(self, num_updates):
            return [self.factor * value for value in super().get_updated_values(num_updates)]

    scheduler = Half(make_optimizer(0.1))
    assert rates_of(scheduler) == [0.1]
    assert step_through(scheduler, 1) == [[0.05]]


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        ({"min_lr_ratio": 0.1}, 5e-8),
        ({}, 5e-7),
        ({"lr_min": 1e-6}, 5e-7),
        ({"min_lr_ratio": 0.1, "lr_min": 1.0}, 5e-8),
        ({"num_warmup_epochs": 1}, 5e-7),
        ({"warmup_starting_lr": 0.1}, 5e-7),
        ({"warmup_starting_lr_ratio": 7.0}, 5e-7),
    ],
)
def test_rates_below_the_defaults_work(settings, last):
    """Row 2.4: a default above the base rate counts as that; what is not used is not checked."""
    rates = step_through(make_cosine(5e-7, num_epochs=2, per_epoch=4, **settings), 9)[:, 0]
    assert rates[-1] == pytest.approx(last, rel=1e-12)
    assert rates.max() == 5e-7


def test_a_wsd_schedule_of_a_rate_below_the_defaults_works():
    """Row 2.4."""
    rates = step_through(make_wsd(5e-7, total_steps=10, num_warmup_steps=3), 11)[:, 0]
    assert (rates[:10] == 5e-7).all()
    assert rates[10] == pytest.approx(5e-13)
    assert rates_of(make_wsd(5e-7, total_steps=10, warmup_starting_lr=0.1)) == [5e-7]


def test_warm_up_and_cooldown_may_be_longer_than_the_run():
    """Row 2.5."""
    with pytest.warns(UserWarning, match="both are part of the run, which has only 2 epochs") as caught:
        scheduler = CosineLrScheduler(make_optimizer(0.1), 2, 4, num_warmup_epochs=2, num_cooldown_epochs=1)
    assert caught[0].filename == __file__
    rates = step_through(scheduler, 9)[:, 0]
    np.testing.assert_allclose(rates, [1e-6 + (0.1 - 1e-6) * k / 8 for k in range(8)] + [1e-6], **EXACT)


def test_a_cosine_scheduler_has_the_attributes_of_0_1_61():
    """Row 2.6."""
    scheduler = make_cosine(num_epochs=2, per_epoch=4, num_warmup_epochs=1)
    names = (
        "total_iterations warmup_iterations num_cooldown_iterations warmup_lr_init warmup_lr_ratio lr_min_ratio lr_min "
        "k_decay base_lr_values"
    )
    values = [getattr(scheduler, name) for name in names.split()]
    assert values == [8, 4, 0, 1e-6, None, None, 1e-6, 1.0, list(LRS)]


def test_the_state_of_a_cosine_has_the_keys_of_0_1_61_but_settings_stay_as_constructed():
    """Row 2.7."""
    old = torch.load(WRITTEN / "cosine.pt", weights_only=True)["scheduler_state_dict"]
    scheduler = make_cosine(num_epochs=2, per_epoch=10, **_old.COSINE)
    step_through(scheduler, _old.NUM_UPDATES)  # with which 0.1.61 had made as many updates
    state = scheduler.state_dict()
    assert state.keys() >= old.keys()
    assert {name: state[name] for name in old} == old
    longer = make_cosine(num_epochs=4)
    longer.load_state_dict(state)
    assert (longer.total_iterations, longer.lr_min, longer.k_decay) == (40, 1e-6, 1.0)
    np.testing.assert_array_equal(rates_of(longer), step_through(make_cosine(num_epochs=4), _old.NUM_UPDATES)[-1])


def test_a_checkpoint_with_a_cosine_that_0_1_61_wrote_can_be_loaded():
    """Rows 2.7, 5.8: after n updates its position is n - 1."""
    create = CosineLrScheduler.create_scheduler_fn(**_old.COSINE)
    rates = rates_of_run(create, before=lambda trainer: trainer.load_checkpoint(WRITTEN / "cosine.pt"), num_epochs=2)
    minimum, power = _old.COSINE["lr_min"], _old.COSINE["k_decay"]
    expected = curve_of(cosine_rate, 32, _old.LRS, total=20, power=power, minimum=minimum)[_old.NUM_UPDATES - 1 :]
    np.testing.assert_allclose(rates, expected, **EXACT)


# --- schedulers of one's own -----------------------------------------------------------------------------------------


class HalvingTwice(StatefulSchedulerBase):
    """Halves the present rate at updates 2 and 4, and leaves it at the others, as milestones do."""

    def get_updated_values(self, num_updates):
        if num_updates not in (2, 4):
            return None
        return [group["lr"] / 2 for group in self.optimizer.param_groups]


class Halving(StatefulSchedulerBase):
    """As written for 0.1.61: it reads `base_lr_values`."""

    def get_updated_values(self, num_updates):
        return [base * 0.5**num_updates for base in self.base_lr_values]


def test_no_values_means_no_change():
    """Row 3.1."""
    rates = step_through(HalvingTwice(make_optimizer(0.1, 0.2)), 5)
    np.testing.assert_allclose(rates[:, 0], [0.1, 0.1, 0.05, 0.05, 0.025])
    np.testing.assert_allclose(rates_of_run(HalvingTwice, num_epochs=1)[:6, 0], [0.1, 0.1, 0.05, 0.05, 0.025, 0.025])


@pytest.mark.parametrize("position", [1, 2, 3, 4, 5])
def test_a_scheduler_that_goes_on_from_the_param_group_values_resumes_exactly(tmp_path, position):
    """Row 3.1: they are restored, not computed a second time."""
    states = SaveTrainingStateCallback(tmp_path, save_every_n_steps=1, save_at_end=False)
    whole = rates_of_run(HalvingTwice, states, num_epochs=1)
    rest = rates_of_run(HalvingTwice, num_epochs=1, resume_from=tmp_path / f"step_{position}")
    np.testing.assert_array_equal(rest, whole[position:])
    own = HalvingTwice(make_optimizer(0.1))
    step_through(own, position + 1)
    restored = HalvingTwice(make_optimizer(0.1))
    restored.load_state_dict(own.state_dict())
    assert rates_of(restored) == rates_of(own)


def test_base_values_have_the_name_of_0_1_61_too():
    """Row 3.2: whatever the field is, and with the groups of the moment."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, weight_decay=0.5)

    class Decay(SchedulerBase):
        def get_updated_values(self, num_updates):
            return [value * num_updates for value in self.base_lr_values]

    scheduler = Decay(optimizer, "weight_decay")
    assert scheduler.base_lr_values == scheduler.base_values == [0.5]
    assert isinstance(scheduler.base_lr_values, list)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "weight_decay": 0.25})
    scheduler.step_update(2)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1.0, 0.5]


def test_the_counter_has_both_names_and_can_be_set():
    """Row 3.3."""
    scheduler = Halving(make_optimizer(0.1))
    assert scheduler._num_updates == scheduler.num_updates == -1
    scheduler._num_updates = 5
    scheduler.step()
    assert rates_of(scheduler) == [0.1 / 2**6]
    scheduler.num_updates = 1
    scheduler.step()
    assert scheduler._num_updates == scheduler.num_updates == 2
    assert rates_of(scheduler) == [0.1 / 4]


def test_a_subclass_that_saves_and_restores_its_dictionary_keeps_its_position():
    """Row 3.3: as subclasses of 0.1.61 had to do; also with what such a subclass saved there."""

    class Own(Halving):
        def state_dict(self):
            return {name: value for name, value in vars(self).items() if name != "optimizer"}

        def load_state_dict(self, state_dict):
            vars(self).update(state_dict)

    first = Own(make_optimizer(0.1))
    step_through(first, 3)
    old = {
        "param_group_field": "lr",
        "_initial_param_group_field": "initial_lr",
        "base_lr_values": [0.1],
        "_num_updates": 2,
    }
    assert first.state_dict().items() >= old.items()
    for state in (first.state_dict(), old):
        second = Own(make_optimizer(9.0))
        second.load_state_dict(state)
        second.step()
        assert rates_of(second) == [0.0125]


@pytest.mark.parametrize("make", [Halving, lambda o: type("Stateless", (SchedulerBase,), vars(Halving).copy())(o)])
def test_constructing_a_scheduler_sets_the_initial_values(make):
    """Row 3.4."""
    optimizer = make_optimizer(0.1, 0.2)
    step_through(CosineLrScheduler(optimizer, 2, 4), 9)
    scheduler = make(optimizer)
    assert rates_of(scheduler) == scheduler.base_values == [0.1, 0.2]


def test_what_a_subclass_remembers_is_saved_and_restored():
    """Row 3.5: whatever can be stored, and nothing of the library's own settings."""

    class Own(Halving):
        gain = 1.0

        def __init__(self, optimizer):
            self.early = None
            super().__init__(optimizer)
            self.extra = 0

    first = Own(make_optimizer(0.1))
    first.extra, first.early, first.gain = 9, "set before", 3.0
    first.late = {"seen": [1, 2], "mean": torch.ones(2)}
    first.function = lambda: None
    step_through(first, 2)
    state = first.state_dict()
    assert state["extra"] == 9
    assert "function" not in state
    second = Own(make_optimizer(0.1))
    second.load_state_dict(state)
    assert (second.extra, second.early, second.gain) == (9, "set before", 3.0)
    assert second.late is first.late


def test_what_a_subclass_of_the_cosine_remembers_is_restored_but_not_its_settings():
    """Row 3.5."""

    class Own(CosineLrScheduler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.extra = 0

    first = Own(make_optimizer(0.1), 2, 4)
    first.extra = 9
    second = Own(make_optimizer(0.1), 4, 4, k_decay=2.0)
    second.load_state_dict(first.state_dict())
    assert (second.extra, second.total_num_epochs, second.k_decay) == (9, 4, 2.0)
    assert vars(CosineLrScheduler(make_optimizer(0.1), 2, 4)).keys() == vars(second).keys() - {"extra"}


def test_a_stateless_scheduler_restores_what_a_subclass_remembers():
    """Row 3.5."""
    stateless = type("Stateless", (SchedulerBase,), vars(Halving).copy())
    first, second = stateless(make_optimizer(0.1)), stateless(make_optimizer(0.1))
    first.extra = 9
    second.load_state_dict(first.state_dict())
    assert second.extra == 9


def test_a_missing_field_is_a_key_error_too():
    """Row 3.6."""
    with pytest.raises(KeyError) as caught:
        Halving(make_optimizer(0.1), "beta")
    assert isinstance(caught.value, SchedulerSettingsError)
    assert str(caught.value).startswith("`param_group_field` is 'beta'")


def test_fewer_values_than_groups_are_refused():
    """Row 3.7: ours."""

    class One(StatefulSchedulerBase):
        def get_updated_values(self, num_updates):
            return [1.0]

    with pytest.raises(ValueError, match="1 values for 2 parameter groups"):
        One(make_optimizer(0.1, 0.2)).step()


def test_the_placeholders_have_a_set_of_their_names():
    """Row 3.8."""
    assert TrainerPlaceholderValues.placeholder_set() == {
        "NUM_EPOCHS",
        "NUM_UPDATE_STEPS_PER_EPOCH",
        "PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH",
        "TRAIN_DATALOADER_LEN",
        "EVAL_DATALOADER_LEN",
    }


def test_a_product_of_a_placeholder_is_not_code():
    """Row 3.9: ours."""
    product = TrainerPlaceholderValues.NUM_EPOCHS * 2
    assert not isinstance(product, TrainerPlaceholderValues)
    assert resolve_placeholders(product, {TrainerPlaceholderValues.NUM_EPOCHS: 3}) == 6
