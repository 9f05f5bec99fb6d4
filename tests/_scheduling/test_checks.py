"""What is refused as a scheduler before training, with a message that says what to do."""

from __future__ import annotations

import warnings
from functools import partial, wraps

import pytest
import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from _support import assert_same_weights, make_dataset, make_model, make_optimizer, make_trainer, train, weights_of
from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated._scheduling import checks
from pytorch_accelerated._scheduling.group import SchedulerGroup
from pytorch_accelerated.schedulers import CosineLrScheduler, WSDLrScheduler

OPTIMIZER = make_optimizer(0.1)
DATASET = make_dataset(8)
EPOCHS = TrainerPlaceholderValues.NUM_EPOCHS
UPDATES = EPOCHS * TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH


# --- arguments of `train` ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [None, LinearLR, partial(StepLR, step_size=1), lambda optimizer: None, print])
def test_a_function_or_class_that_creates_a_scheduler_is_accepted(function):
    checks.check_create_scheduler_fn(function)


@pytest.mark.parametrize("value", [StepLR(OPTIMIZER, 1), 3, "cosine"])
def test_a_scheduler_instance_or_an_uncallable_object_is_refused(value):
    with pytest.raises(TypeError, match=rf"`create_scheduler_fn` is .*{type(value).__name__}.*functools.partial"):
        checks.check_create_scheduler_fn(value)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda: None, "`<lambda>\\(\\)`.*too many positional arguments"),
        (StepLR, "`StepLR\\(optimizer.*missing a required argument: 'step_size'"),
        (partial(StepLR, gamma=0.5), "`StepLR\\(optimizer.*missing a required argument: 'step_size'"),
        (lambda optimizer, num_epochs: None, ".*missing a required argument: 'num_epochs'"),
    ],
)
def test_a_function_that_cannot_be_called_with_the_optimizer_alone_is_refused(function, words):
    with pytest.raises(TypeError, match=f"`create_scheduler_fn` is {words}.*Expected a function.*`functools.partial`"):
        checks.check_create_scheduler_fn(function)


def test_a_decorator_may_add_the_arguments_of_a_scheduler_function():
    def with_step_size(function):
        @wraps(function)
        def create_scheduler(optimizer):
            return function(optimizer, 1)

        return create_scheduler

    checks.check_create_scheduler_fn(with_step_size(StepLR))


@pytest.mark.parametrize(
    ("value", "remedy"),
    [("epochs", "epoch"), ("step", "update"), ("batch", "update"), ("never", None), (True, None), (1, None)],
)
def test_an_interval_that_does_not_exist_is_refused(value, remedy):
    message = '`step_scheduler` is .*Expected "update".*or "epoch"' + (
        f'.*`step_scheduler="{remedy}"`' if remedy else ""
    )
    with pytest.raises(ValueError, match=message):
        train(make_trainer(), step_scheduler=value)


@pytest.mark.parametrize("value", [1, "", ["eval_loss_epoch"], ReduceLROnPlateau])
def test_a_metric_that_is_no_name_is_refused(value):
    with pytest.raises(TypeError, match=r"`scheduler_metric` is .*Expected the name of a metric"):
        train(make_trainer(), scheduler_metric=value)


# --- mistakes, each before the first update ----------------------------------------------------------------------


class Unknown:
    """Its step needs what nobody knows."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, temperature, metric=None):
        raise AssertionError("never called")

    def state_dict(self):
        return {}


MISTAKES = {
    "a class with missing arguments": (StepLR, {}, TypeError, "`StepLR.*'step_size'.*functools.partial"),
    "a class of the library": (CosineLrScheduler, {}, TypeError, r"Pass `CosineLrScheduler.create_scheduler_fn\(\)`"),
    "the other class of the library": (
        partial(CosineLrScheduler, lr_min=0.0),
        {},
        TypeError,
        r"Pass `CosineLrScheduler.create_scheduler_fn\(\)`",
    ),
    "a method that is not called": (
        WSDLrScheduler.create_scheduler_fn,
        {},
        TypeError,
        r"returned a `functools.partial` of `WSDLrScheduler`.*`WSDLrScheduler.create_scheduler_fn\(\)`",
    ),
    "a name": ("cosine", {}, TypeError, r"is 'cosine', of type str.*`CosineLrScheduler.create_scheduler_fn\(\)`"),
    "a scheduler": (StepLR(OPTIMIZER, 1), {}, TypeError, "is a scheduler of type StepLR.*lambda optimizer"),
    "of another optimizer": (lambda o: StepLR(OPTIMIZER, 1), {}, ValueError, "a `StepLR` of another optimizer"),
    "a group of another optimizer": (lambda o: [StepLR(OPTIMIZER, 1)], {}, ValueError, "`StepLR` of another optimizer"),
    "a class in return": (lambda o: StepLR, {}, TypeError, "returned the class `StepLR`.*Expected a scheduler"),
    "the optimizer": (lambda o: o, {}, TypeError, "returned an object of type .*Optimizer.*Expected a scheduler"),
    "a number": (lambda o: 0.1, {}, TypeError, "returned an object of type float.*Expected a scheduler"),
    "a class in a group": (lambda o: [StepLR(o, 1), StepLR], {}, TypeError, "the class `StepLR` in a group of 2"),
    "an empty group": (lambda o: [], {}, TypeError, "returned an object of type list.*Expected a scheduler"),
    "None in a group": (lambda o: {"a": None}, {}, TypeError, "returned None in a group of 1"),
    "the form of Lightning": (
        lambda o: {"scheduler": StepLR(o, 1), "interval": "epoch"},
        {},
        TypeError,
        "'epoch', of type str in a group.*`step_scheduler` and `scheduler_metric` to `train`",
    ),
    "a placeholder kept": (
        lambda o: CosineAnnealingLR(o, T_max=EPOCHS),
        {},
        TypeError,
        r"`CosineAnnealingLR` was created with `.*NUM_EPOCHS`.*`functools.partial\(CosineAnnealingLR, ...\)`",
    ),
    "an expression kept": (
        lambda o: LinearLR(o, total_iters=UPDATES),
        {},
        TypeError,
        r"`LinearLR` was created with `.*NUM_EPOCHS \* .*instead of a number",
    ),
    "a placeholder in a chain": (
        lambda o: ChainedScheduler([CosineAnnealingLR(o, T_max=UPDATES // 2)]),
        {},
        TypeError,
        "was created with `.*// 2` instead of a number",
    ),
    "a placeholder in a group": (
        lambda o: [CosineAnnealingLR(o, T_max=UPDATES)],
        {},
        TypeError,
        "`CosineAnnealingLR` was created with",
    ),
    "a placeholder in a function": (
        lambda o: LambdaLR(o, lambda step: 1 - step / EPOCHS),
        {},
        TypeError,
        "instead of a number",
    ),
    "a placeholder compared": (
        lambda o: OneCycleLR(o, 0.1, total_steps=UPDATES),
        {},
        TypeError,
        "stands for a number that is known only in a run.*`functools.partial`",
    ),
    "a placeholder counted": (
        lambda o: StepLR(o, step_size=int(UPDATES)),
        {},
        TypeError,
        "stands for a number that is known only in a run",
    ),
    "a plateau per update": (
        ReduceLROnPlateau,
        {"step_scheduler": "update"},
        ValueError,
        '`step_scheduler` is "update", but `ReduceLROnPlateau` takes a metric.*after the evaluation of each epoch',
    ),
    "a metric for a function": (
        partial(StepLR, step_size=1),
        {"scheduler_metric": "eval_loss_epoch"},
        ValueError,
        "`scheduler_metric` is 'eval_loss_epoch', but `StepLR` takes no metric",
    ),
    "an unknown argument": (Unknown, {}, TypeError, "`Unknown.step` requires `temperature`.*override `scheduler_step`"),
    "a plateau in a chain": (
        lambda o: ChainedScheduler([ReduceLROnPlateau(o)]),
        {},
        ValueError,
        "does not support `ReduceLROnPlateau`",
    ),
    "a plateau in a sequence": (
        lambda o: SequentialLR(o, [ReduceLROnPlateau(o), ExponentialLR(o, 0.9)], milestones=[1]),
        {},
        ValueError,
        "does not support `ReduceLROnPlateau`",
    ),
    "a metric without evaluation": (
        ReduceLROnPlateau,
        {"scheduler_metric": "eval_accuracy"},
        ValueError,
        "'eval_accuracy', but `train` was called without `eval_dataset`.*scheduler_metric=\"train_loss_epoch\"",
    ),
    "several datasets": (
        ReduceLROnPlateau,
        {"eval_dataset": {"a": DATASET, "b": DATASET}},
        ValueError,
        r"several evaluation datasets.*`scheduler_metric`, as one of \['a_eval_loss_epoch', 'b_eval_loss_epoch'\]",
    ),
    "the loss of several datasets": (
        ReduceLROnPlateau,
        {"eval_dataset": {"a": DATASET, "b": DATASET}, "scheduler_metric": "eval_loss_epoch"},
        ValueError,
        r"'eval_loss_epoch', but there are several evaluation datasets.*\['a_eval_loss_epoch'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_before_the_first_update(mistake):
    create_scheduler_fn, kwargs, error, message = MISTAKES[mistake]
    trainer = make_trainer()
    before = weights_of(trainer.model)
    with pytest.raises(error, match=f"(?s){message}"):
        train(trainer, DATASET, create_scheduler_fn=create_scheduler_fn, **kwargs)
    assert_same_weights(before, trainer.model.state_dict())
    assert trainer.scheduler is None
    trainer.optimizer.param_groups[0]["lr"] = 0.1
    train(trainer, DATASET, create_scheduler_fn=partial(StepLR, step_size=3))  # the trainer can still be used


def test_an_error_in_the_function_says_where_it_happened():
    with pytest.raises(LookupError) as caught:
        train(make_trainer(), create_scheduler_fn=lambda optimizer: {}["length"])
    assert "`create_scheduler_fn`" in caught.value.__notes__[0]


def test_a_function_that_returns_nothing_is_told_of():
    """It may be meant: 0.1.61 trained without a scheduler."""
    with pytest.warns(UserWarning, match="`create_scheduler_fn` returned None.*missing `return`") as caught:
        trainer = train(make_trainer(), create_scheduler_fn=lambda optimizer: None)
    assert trainer.scheduler is None
    assert [warning.filename.endswith("_support.py") for warning in caught] == [True]  # which calls `train`


# --- no mistakes -------------------------------------------------------------------------------------------------


def test_a_subclass_may_create_anything_that_it_steps_itself():
    class Own(Trainer):
        def create_scheduler(self):
            return Unknown(OPTIMIZER)

        def scheduler_step(self):
            pass

    train(make_trainer(cls=Own), create_scheduler_fn="mine")

    class NoScheduler(Trainer):
        def create_scheduler(self):
            return None

    train(make_trainer(cls=NoScheduler), create_scheduler_fn=lambda optimizer: StepLR(optimizer, 1))


def test_a_scheduler_of_earlier_runs_or_of_several_optimizers_belongs_to_the_optimizer():
    trainer = make_trainer()
    scheduler = StepLR(trainer.optimizer, step_size=100)
    for _ in range(2):  # the second time, the optimizer is prepared already
        train(trainer, create_scheduler_fn=lambda optimizer: scheduler)
    other = torch.optim.SGD(make_model().parameters(), lr=0.1)
    group = SchedulerGroup([StepLR(trainer.optimizer, 100), StepLR(other, 100)])
    checks.check_scheduler(group, trainer.optimizer, is_of_function=True, is_stepped_by_trainer=True)


@pytest.mark.parametrize(
    ("metric", "meant"),
    [("val_loss", "eval_loss_epoch"), ("eval_loss", "eval_loss_epoch"), ("loss", "train_loss_epoch")],
)
def test_the_name_of_a_metric_in_another_library_is_told_of(metric, meant):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(make_trainer(), eval_dataset=DATASET, create_scheduler_fn=ReduceLROnPlateau, scheduler_metric=metric)
    first, second = (str(warning.message) for warning in caught)
    assert f"`scheduler_metric` is '{metric}', but" in first
    assert f'`scheduler_metric="{meant}"`' in first
    assert "nothing has been recorded under this name so far" in second
    assert caught[0].filename.endswith("_support.py")  # which calls `train`


@pytest.mark.parametrize(
    ("mode", "metric", "is_told"),
    [("max", "eval_loss_epoch", True), ("min", "eval_accuracy", True), ("min", "eval_loss_epoch", False)],
)
def test_a_plateau_that_waits_for_a_loss_to_rise_is_told_of(mode, metric, is_told):
    class WithAccuracy(Trainer):
        def calculate_eval_batch_loss(self, batch):
            return {**super().calculate_eval_batch_loss(batch), "metrics": {"accuracy": 0.5}}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kwargs = {"create_scheduler_fn": partial(ReduceLROnPlateau, mode=mode), "scheduler_metric": metric}
        train(make_trainer(cls=WithAccuracy), eval_dataset=DATASET, **kwargs)
    assert [f"`ReduceLROnPlateau` has `mode='{mode}'`" in str(warning.message) for warning in caught] == [
        True
    ] * is_told
    assert all(warning.filename.endswith("_support.py") for warning in caught)
