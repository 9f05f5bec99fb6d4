"""A schedule that evidently has its length in another unit than it is stepped in is told of, and no other."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
from torch.optim import lr_scheduler

from _support import Stream, make_dataset, make_optimizer, make_trainer, train
from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated._scheduling.group import SchedulerGroup
from pytorch_accelerated._scheduling.lengths import lengths_of
from pytorch_accelerated.schedulers import CosineLrScheduler, WSDLrScheduler

EPOCHS = TrainerPlaceholderValues.NUM_EPOCHS
UPDATES = EPOCHS * TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH


def sequential(optimizer, milestone, length):
    inner = [lr_scheduler.LinearLR(optimizer, total_iters=milestone), lr_scheduler.CosineAnnealingLR(optimizer, length)]
    return lr_scheduler.SequentialLR(optimizer, inner, milestones=[milestone])


def chained(optimizer, length):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.StepLR(optimizer, length), lr_scheduler.ExponentialLR(optimizer, 1)]
    )


OF_90_EPOCHS = {
    "StepLR(step_size=30)": partial(lr_scheduler.StepLR, step_size=30),
    "StepLR(step_size=2)": partial(lr_scheduler.StepLR, step_size=2, gamma=0.97),
    "MultiStepLR(milestones=[30, 60])": partial(lr_scheduler.MultiStepLR, milestones=[30, 60]),
    "CosineAnnealingLR(T_max=90)": partial(lr_scheduler.CosineAnnealingLR, T_max=90),
    "CosineAnnealingWarmRestarts(T_0=10)": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=10),
    "ExponentialLR(gamma=0.95)": partial(lr_scheduler.ExponentialLR, gamma=0.95),
    "PolynomialLR(total_iters=90)": partial(lr_scheduler.PolynomialLR, total_iters=90),
    "LinearLR(total_iters=90)": partial(lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=90),
    "OneCycleLR(total_steps=90)": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=90),
    "SequentialLR(milestones=[5])": lambda optimizer: sequential(optimizer, 5, 85),
    "StepLR(step_size=29)": lambda optimizer: chained(optimizer, 29),
    "StepLR(step_size=31)": lambda optimizer: SchedulerGroup([lr_scheduler.StepLR(optimizer, 31)]),
}

OF_45000_UPDATES = [
    partial(lr_scheduler.StepLR, step_size=15000),
    partial(lr_scheduler.StepLR, step_size=1, gamma=0.9999),
    partial(lr_scheduler.StepLR, step_size=1, gamma=0.999),  # falls as far as it can, but epochs would not matter
    partial(lr_scheduler.MultiStepLR, milestones=[15000, 30000]),
    partial(lr_scheduler.MultiStepLR, milestones=[]),
    partial(lr_scheduler.CosineAnnealingLR, T_max=45000),
    partial(lr_scheduler.CosineAnnealingLR, T_max=1000),
    partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=1000),
    partial(lr_scheduler.ExponentialLR, gamma=0.9999),
    partial(lr_scheduler.PolynomialLR, total_iters=45000),
    partial(lr_scheduler.LinearLR, total_iters=90),  # a warm-up
    partial(lr_scheduler.ConstantLR, total_iters=5),
    partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.95**step),
    partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, cycle_momentum=False),
    partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=45000, cycle_momentum=False),
    lambda optimizer: sequential(optimizer, 5, 44995),
    lambda optimizer: CosineLrScheduler(optimizer, 90, 500),
]


@pytest.mark.parametrize("setting", OF_90_EPOCHS)
def test_a_schedule_for_epochs_is_recognised(setting):
    create = OF_90_EPOCHS[setting]
    kwargs = {"cycle_momentum": False} if "OneCycle" in setting else {}
    lengths = list(lengths_of(create(make_optimizer(0.1), **kwargs)))
    assert setting in [length.setting for length in lengths if length.is_of_epochs(90, 45000)]
    assert not any(length.is_of_epochs(1, 500) or length.is_of_epochs(90, 90) for length in lengths)


@pytest.mark.parametrize("create", OF_45000_UPDATES)
def test_a_schedule_for_updates_is_not_taken_for_one_of_epochs(create):
    assert not any(length.is_of_epochs(90, 45000) for length in lengths_of(create(make_optimizer(0.1))))


def warnings_of(create, cls=Trainer, dataset=16, **kwargs):
    """Return the warnings of a run with 6 epochs of 4 updates."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(make_trainer(cls=cls), dataset, num_epochs=6, create_scheduler_fn=create, **kwargs)
    assert all(warning.filename.endswith("_support.py") for warning in caught)  # which calls `train`
    return [str(warning.message) for warning in caught]


def test_the_warning_names_what_to_do_and_ends_if_it_is_done():
    create = partial(lr_scheduler.StepLR, step_size=2)
    [message] = warnings_of(create)
    assert message == (
        "`StepLR(step_size=2)` looks as if it counted epochs, but it is stepped after each update, and the run has 6 "
        'epochs and 24 updates. Pass `step_scheduler="epoch"` to step it once per epoch, or `step_scheduler="update"` '
        "if you mean updates."
    )
    assert warnings_of(create, step_scheduler="epoch") == []
    assert warnings_of(create, step_scheduler="update") == []


@pytest.mark.parametrize(
    "create",
    [
        partial(lr_scheduler.CosineAnnealingLR, T_max=UPDATES),
        CosineLrScheduler.create_scheduler_fn(),
        WSDLrScheduler.create_scheduler_fn(),
    ],
)
def test_a_schedule_for_updates_that_is_stepped_per_epoch_is_told_of(create):
    [message] = warnings_of(create, step_scheduler="epoch")
    assert "is 24 steps long, but it is stepped once per epoch, and the run has 6 epochs and 24 updates" in message
    assert warnings_of(create) == []


def test_a_one_cycle_that_ends_before_the_run_is_told_of_before_it_raises():
    create = partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=10, cycle_momentum=False)
    message = r"`OneCycleLR\(total_steps=10\)` raises an error.*NUM_UPDATE_STEPS_PER_EPOCH"
    with pytest.warns(UserWarning, match=message), pytest.raises(ValueError, match="Tried to step 11 times"):
        train(make_trainer(), num_epochs=6, create_scheduler_fn=create)
    too_long = partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=UPDATES, cycle_momentum=False)
    assert warnings_of(too_long) == []


def test_a_schedule_of_whole_epochs_that_the_run_does_not_finish_is_told_of():
    def create(optimizer, num_epochs, num_updates_per_epoch):
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_epochs * num_updates_per_epoch)

    create = partial(create, num_epochs=EPOCHS, num_updates_per_epoch=TrainerPlaceholderValues.TRAIN_DATALOADER_LEN)
    [message] = warnings_of(create, max_num_train_steps=10)
    assert message.startswith(
        "`CosineAnnealingLR(T_max=12)` is as long as 3 whole epochs, but `max_num_train_steps` ends the run after 10 "
        "updates, before the schedule has reached its end. Pass that number as its length: "
    )
    assert warnings_of(create, max_num_train_steps=12) == []
    assert warnings_of(partial(lr_scheduler.CosineAnnealingLR, T_max=UPDATES), max_num_train_steps=10) == []


def test_nothing_is_told_where_nothing_is_known():
    create = partial(lr_scheduler.StepLR, step_size=2)

    class Own(Trainer):
        def scheduler_step(self):
            pass

    assert warnings_of(create, cls=Own) == []
    assert warnings_of(create, dataset=Stream(make_dataset(16))) == []
    assert warnings_of(create, max_num_train_steps=4) == []
