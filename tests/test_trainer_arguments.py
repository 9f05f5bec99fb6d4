"""What `Trainer`, `train` and `evaluate` refuse, and the error messages, which name the value and the remedy."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset

from _support import (
    EventRecorder,
    Probe,
    Samples,
    assert_same_weights,
    losses,
    make_dataset,
    make_model,
    make_trainer,
    mse,
    train,
    weights_of,
)
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LimitBatchesCallback, StepBasedEvaluationCallback, TerminateOnNaNCallback

# --- arguments of a run ------------------------------------------------------------------------------------------


class Empty(Dataset):
    def __len__(self):
        return 0

    def __getitem__(self, index):
        raise IndexError


@dataclass
class BadInput:
    """Arguments of `train`, and what the error must say."""

    name: str
    kwargs: dict
    error: type
    words: tuple


SCHEDULER = StepLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), 1)
EMPTY = "is empty: its length is 0"
BAD_INPUTS = [
    BadInput("empty dataset", {"train_dataset": Empty()}, ValueError, ("`train_dataset`", EMPTY, "Check how it was")),
    BadInput("empty tensors", {"train_dataset": make_dataset(0)}, ValueError, ("`train_dataset`", EMPTY)),
    BadInput("empty list", {"train_dataset": []}, ValueError, ("`train_dataset`", EMPTY)),
    BadInput(
        "empty loader",
        {"train_dataset": DataLoader(Samples(make_dataset(3)), batch_size=4, drop_last=True)},
        ValueError,
        ("`train_dataset`",),
    ),
    BadInput(
        "loader without a full batch",
        {"train_dataset": make_dataset(3), "train_dataloader_kwargs": {"drop_last": True}},
        ValueError,
        ("`train_dataset` yields no batch", "3 samples", "one batch of 4", "`drop_last=False`"),
    ),
    BadInput("empty evaluation dataset", {"eval_dataset": Empty()}, ValueError, ("`eval_dataset`", EMPTY)),
    BadInput("one of several empty", {"eval_dataset": {"a": Empty()}}, ValueError, ("`eval_dataset`", EMPTY)),
    BadInput("no evaluation dataset in the dictionary", {"eval_dataset": {}}, ValueError, ("`eval_dataset`", "empty")),
    BadInput(
        "evaluation loader without a full batch",
        {"eval_dataset": make_dataset(3), "eval_dataloader_kwargs": {"drop_last": True}},
        ValueError,
        ("`eval_dataset` yields no batch", "`drop_last` is set"),
    ),
    BadInput("no dataset", {"train_dataset": None}, ValueError, ("`train_dataset` is None", "Expected a dataset")),
    BadInput(
        "a number as dataset", {"train_dataset": 3}, TypeError, ("`train_dataset` is of type int", "Expected a data")
    ),
    BadInput("zero epochs", {"num_epochs": 0}, ValueError, ("`num_epochs` is 0", "whole number of epochs, at least 1")),
    BadInput("half an epoch", {"num_epochs": 1.5}, TypeError, ("`num_epochs` is 1.5, of type float", "whole number")),
    BadInput("epochs as text", {"num_epochs": "3"}, TypeError, ("`num_epochs` is '3', of type str", "whole number")),
    BadInput("epochs as boolean", {"num_epochs": True}, TypeError, ("`num_epochs` is True, of type bool",)),
    BadInput(
        "batch size of zero",
        {"per_device_batch_size": 0},
        ValueError,
        ("`per_device_batch_size` is 0", "at least 1"),
    ),
    BadInput("batch size of a half", {"per_device_batch_size": 0.5}, TypeError, ("`per_device_batch_size` is 0.5",)),
    BadInput(
        "zero accumulation steps",
        {"gradient_accumulation_steps": 0},
        ValueError,
        ("`gradient_accumulation_steps` is 0", "at least 1"),
    ),
    BadInput("zero updates", {"max_num_train_steps": 0}, ValueError, ("`max_num_train_steps` is 0", "at least 1")),
    BadInput(
        "a scheduler",
        {"create_scheduler_fn": SCHEDULER},
        TypeError,
        ("`create_scheduler_fn` is a scheduler of type StepLR", "takes the optimizer", "lambda optimizer: StepLR("),
    ),
    BadInput("a number as scheduler", {"create_scheduler_fn": 3}, TypeError, ("`create_scheduler_fn`", "of type int")),
]


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
def test_an_invalid_argument_of_train_is_refused_before_training_starts(bad):
    recorder = EventRecorder()
    model = make_model()
    before = weights_of(model)
    trainer = make_trainer(model, callbacks=[recorder])
    kwargs = {"train_dataset": make_dataset(8), "num_epochs": 1, "per_device_batch_size": 4, **bad.kwargs}
    with pytest.raises(bad.error) as caught:
        trainer.train(**kwargs)
    assert type(caught.value) is bad.error
    for words in bad.words:
        assert words in str(caught.value)
    assert "on_training_run_start" not in recorder.log
    assert trainer.model is model
    assert_same_weights(before, weights_of(model))
    train(trainer)  # the trainer is still usable
    assert len(losses(trainer)) == 1


def test_evaluate_refuses_missing_data_empty_data_and_an_invalid_batch_size():
    trainer = make_trainer()
    with pytest.raises(ValueError, match=r"None\. Expected a dataset"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="is empty: its length is 0"):
        trainer.evaluate(Empty())
    with pytest.raises(ValueError, match=r"empty"):
        trainer.evaluate({})
    with pytest.raises(ValueError, match="yields no batch"):
        trainer.evaluate(make_dataset(3), dataloader_kwargs={"drop_last": True})
    with pytest.raises(ValueError, match="`per_device_batch_size` is -1"):
        trainer.evaluate(make_dataset(3), per_device_batch_size=-1)


def test_intermediate_evaluation_without_an_evaluation_dataset_is_refused():
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        train(make_trainer(callbacks=[StepBasedEvaluationCallback(1)]))


def test_train_is_refused_during_a_run():
    probe = Probe(on_train_epoch_end=lambda trainer, **kwargs: train(trainer))
    with pytest.raises(RuntimeError, match="during a run of this trainer"):
        train(make_trainer(callbacks=[probe]))


# --- model, loss function and optimizer --------------------------------------------------------------------------


def test_training_without_an_optimizer_is_refused():
    trainer = Trainer(make_model(), mse, None, callbacks=())
    with pytest.raises(ValueError, match=r"`optimizer` is None.*Pass an optimizer.*only `evaluate` and `predict` work"):
        train(trainer)


def test_a_model_whose_parameters_are_all_frozen_is_refused():
    model = make_model().requires_grad_(False)
    with pytest.raises(ValueError, match=r"None of the 2 parameters of `Linear` has `requires_grad`.*Unfreeze"):
        train(make_trainer(model))


def test_an_optimizer_of_another_model_is_refused():
    trainer = make_trainer()
    trainer.model = make_model()
    with pytest.raises(ValueError, match=r"optimizer holds none of the parameters of `Linear`.*Create it from"):
        train(trainer)


def test_the_parameters_of_the_loss_function_may_be_the_only_ones_that_are_trained():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, outputs, targets):
            return (self.scale * mse(outputs, targets)).sum()

    loss_func = Scaled()
    model = make_model().requires_grad_(False)
    trainer = Trainer(model, loss_func, torch.optim.SGD(loss_func.parameters(), lr=0.1), callbacks=())
    train(trainer)
    assert loss_func.scale.item() != 1.0


# --- callbacks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("callback", [3, object(), "ProgressBarCallback", nn.Linear(1, 1)])
def test_an_object_that_is_not_a_callback_is_refused(callback):
    with pytest.raises(TypeError, match=r"is not a callback. Expected a `TrainerCallback`.*on_train_epoch_end"):
        make_trainer(callbacks=[callback])


def test_a_callback_class_that_needs_arguments_is_refused():
    with pytest.raises(
        TypeError, match=r"`LimitBatchesCallback` cannot be instantiated without arguments.*Pass an instance"
    ):
        make_trainer(callbacks=[LimitBatchesCallback])


# --- what a step returns -----------------------------------------------------------------------------------------


class BadStep(Trainer):
    """Its training step returns what `make_output` makes of the unreduced loss."""

    make_output = staticmethod(lambda loss, batch: None)

    def calculate_train_batch_loss(self, batch):
        return self.make_output(mse(self.model(batch[0]), batch[1], reduction="none"), batch)


@pytest.mark.parametrize("callbacks", [(), (TerminateOnNaNCallback,)], ids=["no callbacks", "a default callback"])
@pytest.mark.parametrize(
    ("make_output", "error", "words"),
    [
        (
            lambda loss, batch: loss.mean(),
            TypeError,
            ("`calculate_train_batch_loss` returned tensor", "of type Tensor"),
        ),
        (lambda loss, batch: None, TypeError, ("returned None", "Return a dictionary with `loss`", "`batch_size`")),
        (lambda loss, batch: (loss.mean(), 4), TypeError, ("of type tuple", "Return a dictionary")),
        (lambda loss, batch: "abc", TypeError, ("'abc', of type str",)),
        (lambda loss, batch: {"batch_size": 4}, ValueError, ("without `loss`", "['batch_size']")),
        (lambda loss, batch: {"loss": loss.mean()}, ValueError, ("without `batch_size`", "['loss']")),
        (lambda loss, batch: {}, ValueError, ("without `loss` and `batch_size`",)),
        (lambda loss, batch: {"loss": loss, "batch_size": 4}, ValueError, ("shape (4, 1)", "`.mean()`")),
        (
            lambda loss, batch: {"loss": loss.mean().detach(), "batch_size": 4},
            ValueError,
            ("does not depend on any parameter", "`torch.no_grad()`"),
        ),
        (
            lambda loss, batch: {"loss": loss.mean().item(), "batch_size": 4},
            TypeError,
            ("of type float", "Expected a tensor", "`.item()`"),
        ),
        (lambda loss, batch: {"loss": None, "batch_size": 4}, TypeError, ("None", "Expected a tensor")),
    ],
)
@pytest.mark.parametrize("num_steps", [1, 2])
def test_an_invalid_output_of_a_training_step_is_explained(make_output, error, words, num_steps, callbacks):
    trainer = make_trainer(cls=type("Bad", (BadStep,), {"make_output": staticmethod(make_output)}), callbacks=callbacks)
    with pytest.raises(error) as caught:
        train(trainer, gradient_accumulation_steps=num_steps)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("callbacks", [(), (TerminateOnNaNCallback,)], ids=["no callbacks", "a default callback"])
@pytest.mark.parametrize(
    ("output", "error", "words"),
    [
        (None, TypeError, ("`calculate_eval_batch_loss` returned None",)),
        (
            {"loss": torch.tensor(1.0)},
            ValueError,
            ("`calculate_eval_batch_loss` returned a dictionary without `batch_size`",),
        ),
        ({"loss": torch.ones(0), "batch_size": 4}, ValueError, ("shape (0,)",)),
        ({"loss": None, "batch_size": 4}, TypeError, ("loss is None",)),
    ],
)
def test_an_invalid_output_of_an_evaluation_step_is_explained(output, error, words, callbacks):
    trainer = make_trainer(
        cls=type("Bad", (Trainer,), {"calculate_eval_batch_loss": lambda self, batch: output}), callbacks=callbacks
    )
    with pytest.raises(error) as caught:
        trainer.evaluate(make_dataset(4))
    for word in words:
        assert word in str(caught.value)


def test_an_error_in_the_users_backward_pass_is_raised_unchanged():
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs):
            return inputs.sum()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        train(make_trainer(loss_func=lambda outputs, targets: Failing.apply(outputs)))
