"""What `Trainer`, `train` and `evaluate` refuse, and the error messages, which name the value and the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

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
from pytorch_accelerated.callbacks import (
    GradualUnfreezingCallback,
    LimitBatchesCallback,
    StepBasedEvaluationCallback,
    TerminateOnNaNCallback,
    TrainerCallback,
)
from pytorch_accelerated.utils import LIMIT_BATCHES_ENV_VAR

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


class Counting(TrainerCallback):
    """Counts the epochs that all its instances have seen."""

    num_epochs = 0

    def on_train_epoch_end(self, trainer, **kwargs):
        Counting.num_epochs += 1


class OtherObject:
    """A callback that is none by class."""

    def on_train_epoch_end(self, trainer, **kwargs):
        Counting.num_epochs += 1


@pytest.mark.parametrize(
    ("callbacks", "expected"),
    [
        (Counting(), 2),
        (Counting, 2),
        (OtherObject(), 2),
        (OtherObject, 2),
        (None, 0),
        ((), 0),
        (iter([Counting, OtherObject()]), 4),
    ],
)
def test_callbacks_may_be_one_a_class_or_none(callbacks, expected):
    Counting.num_epochs = 0
    train(make_trainer(callbacks=callbacks), num_epochs=2)
    assert Counting.num_epochs == expected


def test_a_single_callback_is_added_to_the_one_that_the_environment_asks_for(monkeypatch):
    monkeypatch.setenv(LIMIT_BATCHES_ENV_VAR, "2")
    trainer = make_trainer(callbacks=Counting())
    assert [type(callback) for callback in trainer.callback_handler.callbacks] == [LimitBatchesCallback, Counting]


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        ("ProgressBarCallback", "`callbacks` is a str. Expected callbacks.*Pass a list"),
        ({"counting": Counting()}, "`callbacks` is a dict. Expected callbacks.*Pass a list"),
        (3, "3 is not a callback. Expected a `TrainerCallback` .* in `callbacks`"),
        (nn.Linear, "is not a callback|cannot be instantiated"),
        ([None], "None is not a callback. Expected a `TrainerCallback` .* in `callbacks`"),
        ([[Counting()]], "is not a callback. Expected a `TrainerCallback` .* in `callbacks`"),
    ],
)
def test_something_else_in_the_place_of_callbacks_is_refused_at_construction(callbacks, words):
    with pytest.raises(TypeError, match=words):
        make_trainer(callbacks=callbacks)


# --- slips in the arguments of the trainer -----------------------------------------------------------------------


def sgd(model, **kwargs):
    return torch.optim.SGD(model.parameters(), lr=0.1, **kwargs)


def with_parts(model=None, loss_func=mse, make_optimizer=sgd, cls=Trainer):
    real = make_model() if model is None else nn.Linear(3, 1)
    return cls(real if model is None else model, loss_func, make_optimizer(real), callbacks=())


class LossClass:
    def __call__(self, outputs, targets):
        return mse(outputs, targets)


@pytest.mark.parametrize("act", [train, lambda trainer: trainer.evaluate(make_dataset())], ids=["train", "evaluate"])
@pytest.mark.parametrize(
    ("loss_func", "words"),
    [
        (nn.MSELoss, "the class `MSELoss`.*Pass an instance, `MSELoss\\(...\\)`"),
        (nn.CrossEntropyLoss, "the class `CrossEntropyLoss`"),
        (LossClass, "the class `LossClass`"),
        (partial(nn.MSELoss, reduction="sum"), "a `functools.partial` of `MSELoss`.*what it returns when it is called"),
        ("mse", "'mse', of type str.*Expected a function of outputs and targets"),
        ([nn.MSELoss()], "an object of type list.*Pass the loss function itself"),
        (torch.optim.SGD([torch.zeros(1)], lr=0.1), "an object of type SGD"),
    ],
)
def test_something_else_in_the_place_of_the_loss_function_is_refused(loss_func, words, act):
    recorder = EventRecorder()
    trainer = with_parts(loss_func=loss_func)
    trainer.callback_handler.add_callback(recorder)
    with pytest.raises(TypeError, match=f"`loss_func` is {words}"):
        act(trainer)
    assert "on_training_run_start" not in recorder.log


def test_a_class_that_returns_the_loss_is_a_loss_function():
    class Loss:
        def __new__(cls, outputs, targets):
            return mse(outputs, targets)

    train(with_parts(loss_func=Loss))


def test_a_step_of_ones_own_may_use_a_class_of_losses():
    class OwnStep(Trainer):
        def calculate_train_batch_loss(self, batch):
            loss = self.loss_func(reduction="mean")(self.model(batch[0]), batch[1])
            return {"loss": loss, "batch_size": len(batch[0])}

        calculate_eval_batch_loss = calculate_train_batch_loss

    trainer = train(with_parts(loss_func=nn.MSELoss, cls=OwnStep), eval_dataset=make_dataset(4))
    trainer.evaluate(make_dataset(4))


def test_a_step_that_calls_the_default_one_is_told_of_a_class_of_losses_too():
    class Calling(Trainer):
        def calculate_train_batch_loss(self, batch):
            return super().calculate_train_batch_loss(batch)

    with pytest.raises(TypeError, match="`loss_func` is the class `MSELoss`"):
        train(with_parts(loss_func=nn.MSELoss, cls=Calling))


class Net(nn.Linear):
    def __init__(self):
        super().__init__(3, 1)


@pytest.mark.parametrize("method", ["train", "evaluate", "predict"])
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Net, "the class `Net`. Expected an instance of `torch.nn.Module`. Pass an instance, `Net\\(...\\)`"),
        (partial(nn.Linear, 3, 1), "a `functools.partial` of `Linear`.*what it returns when it is called"),
        ({"a": Net()}, "an object of type dict"),
        (lambda inputs: inputs, "an object of type function"),
    ],
    ids=["class", "partial", "dictionary", "function"],
)
def test_something_else_in_the_place_of_the_model_is_refused_and_left_as_it_was(model, words, method):
    before = dict(vars(Net))
    trainer = with_parts(model=model)
    act = {"train": train, "evaluate": lambda it: it.evaluate(make_dataset()), "predict": lambda it: it.predict([1])}
    with pytest.raises(TypeError, match=f"`model` is {words}"):
        act[method](trainer)
    assert dict(vars(Net)) == before
    assert trainer.model is model


@pytest.mark.parametrize(
    ("make_optimizer", "words"),
    [
        (lambda model: torch.optim.SGD, "the class `SGD`.*Pass an instance, `SGD\\(model.parameters\\(\\)\\)`"),
        (lambda model: partial(torch.optim.SGD, lr=0.1), "a `functools.partial` of `SGD`"),
        (lambda model: [sgd(model)], "a list with a single optimizer in it.*Pass the optimizer itself"),
        (lambda model: {"a": sgd(model)}, "a dict with a single optimizer in it"),
        (lambda model: [], "a list with nothing in it"),
        (lambda model: {"a": sgd(model), "b": torch.optim.SGD}, "a dict with the class `SGD` in it.*Pass an instance"),
        (lambda model: [sgd(model), "adam"], "a list with 'adam', of type str in it"),
        (lambda model: model.parameters(), "an object of type generator"),
        (lambda model: "adam", "'adam', of type str"),
        (lambda model: StepLR(sgd(model), 1), "an object of type StepLR"),
        (lambda model: nn.MSELoss(), "an object of type MSELoss"),
    ],
)
def test_something_else_in_the_place_of_the_optimizer_is_refused(make_optimizer, words):
    trainer = with_parts(make_optimizer=make_optimizer)
    trainer.callback_handler.add_callback(GradualUnfreezingCallback())
    before = weights_of(trainer.model)
    with pytest.raises(TypeError, match=f"`optimizer` is {words}"):
        train(trainer)
    assert_same_weights(before, trainer.model.state_dict())


@pytest.mark.parametrize(
    ("create_scheduler_fn", "words"),
    [
        (lambda optimizer: StepLR, "the class `StepLR`"),
        (lambda optimizer: [], "an object of type list"),
        (lambda optimizer: optimizer, "an object of type FastPathOptimizer"),
        (lambda optimizer: 0.1, "an object of type float"),
    ],
)
def test_a_scheduler_function_that_returns_something_else_is_refused_before_the_first_update(
    create_scheduler_fn, words
):
    trainer = make_trainer()
    before = weights_of(trainer.model)
    with pytest.raises(TypeError, match=f"`create_scheduler_fn`.* returned {words}.*Expected a scheduler"):
        train(trainer, create_scheduler_fn=create_scheduler_fn)
    assert_same_weights(before, trainer.model.state_dict())
    assert trainer.scheduler is None
    train(trainer, create_scheduler_fn=lambda optimizer: StepLR(optimizer, 1))


@pytest.mark.parametrize("first", [[], [-1]])
def test_a_subclass_may_call_the_scheduler_function_and_the_scheduler_in_its_own_way(first):
    class OwnScheduler(Trainer):
        def create_scheduler(self):
            return self.create_scheduler_fn(self.optimizer, list(first))

        def scheduler_step(self):
            self.scheduler.append(len(self.scheduler))

    trainer = train(make_trainer(cls=OwnScheduler), create_scheduler_fn=lambda optimizer, updates: updates)
    assert trainer.scheduler == first + [len(first) + n for n in range(4)]


# --- items of a batch that the default step does not use ---------------------------------------------------------

TRIPLES = TensorDataset(torch.randn(8, 3), torch.randn(8, 1), torch.randn(8, 1))
UNUSED = "The batch has 3 items, of which only the first two are used.*override `calculate_train_batch_loss`"


def test_a_batch_of_three_items_is_told_of_and_trained_on_the_first_two():
    trainer, other = make_trainer(), make_trainer()
    with pytest.warns(UserWarning, match=UNUSED):
        train(trainer, TRIPLES)
    with pytest.warns(UserWarning, match=UNUSED):
        trainer.evaluate(TRIPLES)
    train(other, TensorDataset(*TRIPLES.tensors[:2]))
    assert_same_weights(trainer.model.state_dict(), other.model.state_dict())


def test_a_step_of_ones_own_uses_all_items_in_silence():
    class OwnStep(Trainer):
        def calculate_train_batch_loss(self, batch):
            return {"loss": mse(self.model(batch[0]) + batch[1], batch[2]), "batch_size": len(batch[0])}

    train(make_trainer(cls=OwnStep), TRIPLES)


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
