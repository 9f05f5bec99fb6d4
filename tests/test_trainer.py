"""The trainer: what it accepts, what it refuses, how it makes loaders, checkpoints and its accelerator."""

from __future__ import annotations

import multiprocessing
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from _support import (
    IN_ORDER,
    Batches,
    EventRecorder,
    Probe,
    Samples,
    Stream,
    assert_same_weights,
    losses,
    make_dataset,
    make_indexed_dataset,
    make_model,
    make_trainer,
    mse,
    raiser,
    run_python,
    train,
    weights_of,
)
from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated import trainer as trainer_module
from pytorch_accelerated._data import rng as rng_module
from pytorch_accelerated.callbacks import (
    LimitBatchesCallback,
    StepBasedEvaluationCallback,
    TerminateOnNaNCallback,
    TrainerCallback,
)
from pytorch_accelerated.exceptions import CheckpointError, StopTrainingError
from pytorch_accelerated.schedulers import CosineLrScheduler
from pytorch_accelerated.trainer import LIMIT_BATCHES_ENV_VAR, replace_trainer_placeholder_values
from pytorch_accelerated.utils import LimitBatches


def loader_probe(function):
    """A probe that keeps what the function makes of the trainer when a run starts, and the list of it."""
    values = []

    def keep(trainer, **kwargs):
        values.append(function(trainer))

    return Probe(on_training_run_start=keep, on_evaluation_run_start=keep), values


# --- bad input (X), each before training -------------------------------------------------------------------------


class Empty(Dataset):
    def __len__(self):
        return 0

    def __getitem__(self, index):
        raise IndexError


@dataclass
class BadInput:
    """What is given to `train`, and what the error says."""

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
        "loader that gives no batch",
        {"train_dataset": make_dataset(3), "train_dataloader_kwargs": {"drop_last": True}},
        ValueError,
        ("`train_dataset` yields no batch", "3 samples", "one batch of 4", "`drop_last=False`"),
    ),
    BadInput("empty evaluation dataset", {"eval_dataset": Empty()}, ValueError, ("`eval_dataset`", EMPTY)),
    BadInput("one of several empty", {"eval_dataset": {"a": Empty()}}, ValueError, ("`eval_dataset`", EMPTY)),
    BadInput("no evaluation dataset at all", {"eval_dataset": {}}, ValueError, ("`eval_dataset`", "empty")),
    BadInput(
        "evaluation loader that gives no batch",
        {"eval_dataset": make_dataset(3), "eval_dataloader_kwargs": {"drop_last": True}},
        ValueError,
        ("`eval_dataset` yields no batch", "`drop_last` is set"),
    ),
    BadInput("no dataset", {"train_dataset": None}, ValueError, ("`train_dataset` is None", "Expected a dataset")),
    BadInput(
        "a number as dataset", {"train_dataset": 3}, TypeError, ("`train_dataset` is of type int", "Expected a data")
    ),
    BadInput("no epochs", {"num_epochs": 0}, ValueError, ("`num_epochs` is 0", "whole number of epochs, at least 1")),
    BadInput("half an epoch", {"num_epochs": 1.5}, TypeError, ("`num_epochs` is 1.5, of type float", "whole number")),
    BadInput("epochs as text", {"num_epochs": "3"}, TypeError, ("`num_epochs` is '3', of type str", "whole number")),
    BadInput("epochs as truth value", {"num_epochs": True}, TypeError, ("`num_epochs` is True, of type bool",)),
    BadInput(
        "no samples in a batch",
        {"per_device_batch_size": 0},
        ValueError,
        ("`per_device_batch_size` is 0", "at least 1"),
    ),
    BadInput("half a sample", {"per_device_batch_size": 0.5}, TypeError, ("`per_device_batch_size` is 0.5",)),
    BadInput(
        "no accumulation",
        {"gradient_accumulation_steps": 0},
        ValueError,
        ("`gradient_accumulation_steps` is 0", "at least 1"),
    ),
    BadInput("no updates", {"max_num_train_steps": 0}, ValueError, ("`max_num_train_steps` is 0", "at least 1")),
    BadInput(
        "a scheduler",
        {"create_scheduler_fn": SCHEDULER},
        TypeError,
        ("`create_scheduler_fn` is a scheduler of type StepLR", "takes the optimizer", "lambda optimizer: StepLR("),
    ),
    BadInput("a number as scheduler", {"create_scheduler_fn": 3}, TypeError, ("`create_scheduler_fn`", "of type int")),
]


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
def test_bad_input_is_refused_before_training(bad):
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
    train(trainer)  # and the trainer is as good as new
    assert len(losses(trainer)) == 1


def test_evaluating_nothing_is_refused():
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


def test_a_loss_with_parameters_may_be_all_that_is_trained():
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


class NoLoss(Trainer):
    """Its training step returns what it is told to."""

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
def test_a_step_that_returns_no_loss_is_explained(make_output, error, words, num_steps, callbacks):
    trainer = make_trainer(cls=type("Bad", (NoLoss,), {"make_output": staticmethod(make_output)}), callbacks=callbacks)
    with pytest.raises(error) as caught:
        train(trainer, gradient_accumulation_steps=num_steps)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("callbacks", [(), (TerminateOnNaNCallback,)], ids=["no callbacks", "a default callback"])
@pytest.mark.parametrize(
    ("output", "error", "words"),
    [
        (None, TypeError, ("`calculate_eval_batch_loss` returned None",)),
        ({"loss": torch.tensor(1.0)}, ValueError, ("`calculate_eval_batch_loss` returned a dictionary without `batch_size`",)),
        ({"loss": torch.ones(4), "batch_size": 4}, ValueError, ("shape (4,)",)),
        ({"loss": None, "batch_size": 4}, TypeError, ("loss is None",)),
    ],
)
def test_an_evaluation_step_that_returns_no_loss_is_explained(output, error, words, callbacks):
    trainer = make_trainer(
        cls=type("Bad", (Trainer,), {"calculate_eval_batch_loss": lambda self, batch: output}), callbacks=callbacks
    )
    with pytest.raises(error) as caught:
        trainer.evaluate(make_dataset(4))
    for word in words:
        assert word in str(caught.value)


def test_an_error_of_the_users_in_the_backward_pass_stays_as_it_is():
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs):
            return inputs.sum()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        train(make_trainer(loss_func=lambda outputs, targets: Failing.apply(outputs)))


@pytest.mark.parametrize("callback", [3, object(), "ProgressBarCallback", nn.Linear(1, 1)])
def test_a_callback_that_is_none_is_refused(callback):
    with pytest.raises(TypeError, match=r"is not a callback. Expected a `TrainerCallback`.*on_train_epoch_end"):
        make_trainer(callbacks=[callback])


def test_a_callback_class_that_needs_arguments_is_refused():
    with pytest.raises(TypeError, match=r"`LimitBatchesCallback` cannot be instantiated without arguments.*Pass an instance"):
        make_trainer(callbacks=[LimitBatchesCallback])


def test_intermediate_evaluation_without_data_is_refused():
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        train(make_trainer(callbacks=[StepBasedEvaluationCallback(1)]))


def test_training_within_a_run_is_refused():
    probe = Probe(on_train_epoch_end=lambda trainer, **kwargs: train(trainer))
    with pytest.raises(RuntimeError, match="during a run of this trainer"):
        train(make_trainer(callbacks=[probe]))


# --- models that return their own loss ---------------------------------------------------------------------------


Output = namedtuple("Output", ["loss", "logits"])


class OwnLoss(nn.Module):
    """Returns its loss in the way it is told to."""

    def __init__(self, wrap):
        super().__init__()
        self.linear = make_model()
        self.wrap = wrap

    def forward(self, inputs, labels):
        outputs = self.linear(inputs)
        return self.wrap(mse(outputs, labels), outputs)


@dataclass
class Batch:
    inputs: torch.Tensor
    labels: torch.Tensor
    names: list


def as_object(loss, outputs):
    return SimpleNamespace(loss=loss, logits=outputs)


@pytest.mark.parametrize(
    "wrap",
    [as_object, lambda loss, outputs: {"loss": loss, "logits": outputs}, Output],
    ids=["object", "dict", "namedtuple"],
)
@pytest.mark.parametrize("kind", ["dict", "tuple", "list"])
def test_a_model_may_return_its_own_loss(kind, wrap):
    dataset = make_dataset(10)
    collate = {
        "dict": lambda samples: {"inputs": stack(samples, 0), "labels": stack(samples, 1)},
        "tuple": lambda samples: (stack(samples, 0), stack(samples, 1)),
        "list": lambda samples: [stack(samples, 0), stack(samples, 1)],
    }[kind]
    trainer = make_trainer(OwnLoss(wrap), loss_func=None)
    train(trainer, dataset, collate_fn=collate, eval_dataset=dataset, train_dataloader_kwargs=IN_ORDER)
    reference = make_trainer()
    train(reference, dataset, eval_dataset=dataset, train_dataloader_kwargs=IN_ORDER)
    assert_same_weights(weights_of(reference.model), weights_of(trainer.model.linear))
    assert losses(trainer) == losses(reference)
    assert losses(trainer, "eval_loss_epoch") == losses(reference, "eval_loss_epoch")


def stack(samples, index):
    return torch.stack([sample[index] for sample in samples])


def test_the_fields_of_a_dataclass_batch_are_the_models_arguments():
    class Named(OwnLoss):
        def forward(self, inputs, labels, names):
            seen.append(names)
            return super().forward(inputs, labels)

    seen = []
    dataset = make_dataset(8)
    batches = [Batch(*dataset[start : start + 4], names=[start]) for start in (0, 4)]
    trainer = make_trainer(Named(as_object), loss_func=None)
    train(trainer, Listed(batches))
    assert seen == [[0], [4]]
    assert trainer.progress.num_samples == 8


class Listed:
    """An iterable of ready batches."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_a_tensor_batch_is_the_models_only_argument():
    class Norm(nn.Linear):
        def forward(self, inputs):
            return {"loss": super().forward(inputs).square().mean()}

    trainer = make_trainer(Norm(3, 1), loss_func=None)
    train(trainer, Listed([torch.ones(5, 3)]))
    assert trainer.progress.num_samples == 5


@pytest.mark.parametrize("wrap", [lambda loss, outputs: outputs, lambda loss, outputs: {"logits": outputs}])
def test_a_model_that_returns_no_loss_is_explained(wrap):
    with pytest.raises(ValueError, match=r"`loss_func` is None.*`outputs.loss` or `outputs\['loss'\]`.*labels"):
        train(make_trainer(OwnLoss(wrap), loss_func=None))


def test_a_batch_that_is_no_pair_is_explained():
    dataset = make_dataset(4)
    with pytest.raises(TypeError, match=r"batch is a dict.*pair of inputs and targets.*`loss_func=None`"):
        train(make_trainer(), Listed([{"inputs": dataset.tensors[0]}]))


def test_the_batch_size_is_found_in_nested_inputs():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = make_model()

        def forward(self, inputs):
            return self.linear(inputs["parts"][1]["features"])

    dataset = make_dataset(6)
    inputs = {"id": "text", "scale": torch.tensor(2.0), "parts": ["a", {"features": dataset.tensors[0]}]}
    trainer = make_trainer(Nested())
    train(trainer, Listed([(inputs, dataset.tensors[1])]))
    assert trainer.progress.num_samples == 6


def test_a_batch_without_size_is_explained():
    class Constant(nn.Linear):
        def forward(self, inputs):
            return {"loss": self.weight.sum()}

    with pytest.raises(ValueError, match=r"No batch size was found.*return the `batch_size` yourself"):
        train(make_trainer(Constant(3, 1), loss_func=None), Listed([("text",)]))


# --- loaders (D3) ------------------------------------------------------------------------------------------------


def batches_of_run(dataset, dl_kwargs=None, collate_fn=None, seed=9, num_epochs=2, evaluate=False, cls=Trainer):
    seen = []
    probe = Probe(on_train_step_start=lambda trainer, batch, **kwargs: seen.append(batch))
    if evaluate:
        probe = Probe(on_eval_step_start=lambda trainer, batch, **kwargs: seen.append(batch))
    trainer = make_trainer(callbacks=[probe], lr=0.0, seed=seed, cls=cls)
    kwargs = {"num_epochs": num_epochs, "collate_fn": collate_fn}
    train(
        trainer,
        dataset,
        eval_dataset=dataset,
        train_dataloader_kwargs=dl_kwargs,
        eval_dataloader_kwargs=dl_kwargs,
        **kwargs,
    )
    return seen


class PlainTrainer(Trainer):
    """Makes its loaders by hand, sample by sample."""

    def create_train_dataloader(self, batch_size, train_dl_kwargs=None):
        kwargs = {"batch_size": batch_size, "shuffle": True, **(train_dl_kwargs or {})}
        return DataLoader(Samples(self.train_dataset), **kwargs)

    def create_eval_dataloader(self, batch_size, eval_dl_kwargs=None):
        return DataLoader(Samples(self.eval_dataset), **{"batch_size": batch_size, **(eval_dl_kwargs or {})})


TENSORS = TensorDataset(
    make_dataset(22).tensors[0], make_dataset(22).tensors[1], torch.arange(22), torch.arange(22) % 2 == 0
)
SLICEABLE = {
    "tensors": TENSORS,
    "subset": Subset(TENSORS, [3, 1, 4, 15, 9, 2, 6, 5, 3, 0, -1]),
    "nested subset": Subset(Subset(TENSORS, range(1, 20, 2)), [9, 0, 3, 3, 7]),
    "subset by tensor": Subset(TENSORS, torch.tensor([5, 4, 3, 2, 1])),
    "subset by array": Subset(TENSORS, np.arange(7)),
}


@pytest.mark.parametrize("evaluate", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("dl_kwargs", [{}, {"drop_last": True}, {"batch_size": 3}], ids=str)
@pytest.mark.parametrize("name", SLICEABLE)
def test_whole_batches_are_those_of_the_plain_loader_in_the_same_order(name, dl_kwargs, evaluate):
    whole = batches_of_run(SLICEABLE[name], dl_kwargs, evaluate=evaluate)
    plain = batches_of_run(SLICEABLE[name], dl_kwargs, evaluate=evaluate, cls=PlainTrainer)
    assert len(whole) == len(plain)
    for one, other in zip(whole, plain, strict=True):
        assert type(one) is type(other)
        assert len(one) == len(other) == 4
        for left, right in zip(one, other, strict=True):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)


def is_whole(trainer):
    return type(trainer._train_dataloader.dataset).__name__ == "WholeBatchDataset"


def test_whole_batches_are_fetched_by_default():
    probe, values = loader_probe(is_whole)
    train(make_trainer(callbacks=[probe]))
    assert values == [True]


INDEXED = make_indexed_dataset(8)


@pytest.mark.parametrize(
    ("dl_kwargs", "collate_fn", "expected"),
    [
        ({"sampler": [3, 1, 2, 0]}, None, [[3, 1, 2, 0]]),
        ({"batch_sampler": [[7, 0], [1, 1, 1]]}, None, [[7, 0], [1, 1, 1]]),
        ({"batch_sampler": BatchSampler(SequentialSampler(INDEXED), 3, drop_last=True)}, None, [[0, 1, 2], [3, 4, 5]]),
        ({"shuffle": False}, torch.utils.data.default_collate, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ({"shuffle": False, "collate_fn": torch.utils.data.default_collate}, None, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
    ids=["sampler", "batch_sampler", "sized batch_sampler", "collate_fn", "collate_fn in kwargs"],
)
def test_what_the_user_gives_for_the_loader_wins_and_switches_whole_batches_off(dl_kwargs, collate_fn, expected):
    probe, values = loader_probe(is_whole)
    seen = []
    recorder = Probe(on_train_step_start=lambda trainer, batch, **k: seen.append(batch[0].flatten().int().tolist()))
    trainer = make_trainer(make_model(1), callbacks=[probe, recorder])
    train(trainer, INDEXED, train_dataloader_kwargs=dl_kwargs, collate_fn=collate_fn)
    assert values == [False]
    assert seen == expected


def test_a_collate_function_gets_samples_and_serves_both_loaders():
    def collate(samples):
        sizes.append(len(samples))
        return stack(samples, 0), stack(samples, 1)

    sizes = []
    train(make_trainer(), make_dataset(6), eval_dataset=make_dataset(3), collate_fn=collate)
    assert sizes == [4, 2, 3]


def test_no_sampler_is_as_if_none_was_named():
    none = {"sampler": None, "batch_sampler": None}
    plain, with_none = batches_of_run(INDEXED_3), batches_of_run(INDEXED_3, none)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(plain, with_none, strict=True))


INDEXED_3 = TensorDataset(torch.arange(24.0).reshape(8, 3), torch.zeros(8, 1))


def test_the_kwargs_of_the_loader_win_over_the_arguments_and_are_reported():
    trainer = make_trainer()
    sizes = []
    probe = Probe(
        on_train_step_end=lambda trainer, batch_output, **kwargs: sizes.append(batch_output["batch_size"]),
        on_eval_step_end=lambda trainer, batch_output, **kwargs: sizes.append(batch_output["batch_size"]),
    )
    trainer.callback_handler.add_callback(probe)
    given = {"batch_size": 3, "drop_last": True, "num_workers": 0}
    evaluated = {"batch_size": 6}
    train(
        trainer,
        eval_dataset=make_dataset(10),
        train_dataloader_kwargs=given,
        eval_dataloader_kwargs=evaluated,
        gradient_accumulation_steps=2,
    )
    assert sizes == [3, 3, 3, 3, 3, 6, 4]
    assert given == {"batch_size": 3, "drop_last": True, "num_workers": 0}
    config = trainer.run_config
    assert (config.train_per_device_batch_size, config.eval_per_device_batch_size) == (3, 6)
    assert (config.train_total_batch_size, config.eval_total_batch_size) == (6, 6)
    assert config.train_dl_kwargs["drop_last"] is True
    assert config.train_dl_kwargs["shuffle"] is True
    assert config.eval_dl_kwargs["shuffle"] is False


@pytest.mark.parametrize(
    "make_sampler",
    [
        lambda dataset: SubsetRandomSampler(range(8)),
        lambda dataset: WeightedRandomSampler([1.0] * 8, 8),
    ],
    ids=["subset", "weighted"],
)
def test_the_shuffling_samplers_of_torch_follow_the_seed_of_the_run(make_sampler):
    orders = []
    for seed in (1, 1, 2):
        batches = batches_of_run(INDEXED_3, {"sampler": make_sampler(INDEXED_3)}, seed=seed)
        orders.append([batch[0][:, 0].tolist() for batch in batches])
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0][:2] != orders[0][2:]


def test_a_generator_that_the_user_gave_keeps_its_seed():
    orders = []
    for seed in (1, 2):
        kwargs = {"generator": torch.Generator().manual_seed(5)}
        batches = batches_of_run(INDEXED_3, kwargs, seed=seed)
        orders.append([batch[0][:, 0].tolist() for batch in batches])
    assert orders[0] == orders[1]


class Augmented(Dataset):
    """Draws from all three generators, as augmentation does."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        import random

        noise = torch.tensor([torch.rand(1).item(), np.random.rand(), random.random()])
        return noise, torch.zeros(1)


@pytest.mark.parametrize("kwargs", [{"persistent_workers": False}, {"persistent_workers": True}], ids=str)
def test_workers_are_reproducible_and_differ_between_epochs(kwargs):
    kwargs = {"num_workers": 1, **kwargs}
    runs = [[batch[0] for batch in batches_of_run(Augmented(), kwargs, seed=seed)] for seed in (1, 1, 2)]
    for one, other in zip(runs[0], runs[1], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(runs[0][0], runs[2][0])
    assert not torch.equal(torch.cat(runs[0][:2]), torch.cat(runs[0][2:]))


@pytest.mark.parametrize("is_failing", [False, True])
@pytest.mark.parametrize("is_persistent", [False, True])
def test_no_worker_outlives_its_run(is_failing, is_persistent):
    """Not even while an error is kept, as a notebook does, or the trainer."""
    seen = []

    def look(trainer, **_):
        seen.append(len(multiprocessing.active_children()))
        if is_failing:
            raise LookupError("of a callback")

    trainer = make_trainer(callbacks=[Probe(on_eval_step_end=look)])
    kwargs = {"num_workers": 2, "persistent_workers": is_persistent}
    dl_kwargs = {"train_dataloader_kwargs": kwargs, "eval_dataloader_kwargs": kwargs}
    with pytest.raises(LookupError) if is_failing else nullcontext() as kept:
        train(trainer, eval_dataset=make_dataset(8), num_epochs=2, **dl_kwargs)
    assert seen[0] == (4 if is_persistent else 2)
    assert multiprocessing.active_children() == []
    assert len(list(trainer._train_dataloader)) == len(trainer._train_dataloader)
    del kept


def test_a_loader_passed_as_dataset_tells_its_own_batch_size():
    trainer = make_trainer()
    train(trainer, DataLoader(make_dataset(12), batch_size=6), gradient_accumulation_steps=2)
    assert trainer.run_config.num_update_steps_per_epoch == 1
    assert trainer.run_config.train_per_device_batch_size == 6
    assert trainer.run_config.train_total_batch_size == 12


def test_the_environment_variable_limits_all_trainers_made_under_it(monkeypatch):
    monkeypatch.delenv(LIMIT_BATCHES_ENV_VAR, raising=False)
    recorder = EventRecorder()
    with LimitBatches(2):
        trainer = make_trainer(callbacks=[recorder])
    assert isinstance(trainer.callback_handler.callbacks[0], LimitBatchesCallback)
    train(trainer)
    assert recorder.log.count("on_train_step_end") == 2
    assert len(make_trainer(callbacks=[recorder]).callback_handler.callbacks) == 1


# --- placeholders ------------------------------------------------------------------------------------------------


def test_placeholders_have_their_numbers_in_a_real_run():
    values = {}

    def create(optimizer, **kwargs):
        values.update(kwargs)
        return LambdaLR(optimizer, lambda step: 1.0)

    placeholders = TrainerPlaceholderValues
    function = partial(
        create,
        epochs=placeholders.NUM_EPOCHS,
        updates=placeholders.NUM_UPDATE_STEPS_PER_EPOCH,
        local_updates=placeholders.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH,
        train_batches=placeholders.TRAIN_DATALOADER_LEN,
        eval_batches=placeholders.EVAL_DATALOADER_LEN,
        nested=[{"total": 2 * placeholders.NUM_EPOCHS * placeholders.NUM_UPDATE_STEPS_PER_EPOCH - 1}],
        plain="as it is",
    )
    trainer = make_trainer()
    train(
        trainer,
        make_dataset(18),
        num_epochs=3,
        eval_dataset=make_dataset(10),
        gradient_accumulation_steps=2,
        create_scheduler_fn=function,
    )
    assert values == {
        "epochs": 3,
        "updates": 3,
        "local_updates": 3,
        "train_batches": 5,
        "eval_batches": 3,
        "nested": [{"total": 17}],
        "plain": "as it is",
    }
    assert function.keywords["epochs"] is placeholders.NUM_EPOCHS


def test_the_length_of_several_evaluation_loaders_is_that_of_all():
    values = []

    def create(optimizer, num_batches):
        values.append(num_batches)

    function = partial(create, num_batches=TrainerPlaceholderValues.EVAL_DATALOADER_LEN)
    datasets = {"a": make_dataset(10), "b": make_dataset(6)}
    train(make_trainer(), eval_dataset=datasets, create_scheduler_fn=function)
    assert values == [3 + 2]


def test_a_placeholder_without_a_number_is_refused():
    function = CosineLrScheduler.create_scheduler_fn()
    with pytest.raises(ValueError, match=r"NUM_UPDATE_STEPS_PER_EPOCH` has no value in this run"):
        train(make_trainer(), Batches(make_dataset(8), 4), create_scheduler_fn=function)


def test_placeholders_can_be_replaced_outside_a_run():
    trainer = make_trainer()
    train(trainer, num_epochs=2)
    assert replace_trainer_placeholder_values(trainer, [TrainerPlaceholderValues.NUM_EPOCHS, "x"]) == [2, "x"]


# --- the accelerator ---------------------------------------------------------------------------------------------


def test_an_accelerator_may_be_given_ready():
    accelerator = Accelerator()
    other_model = accelerator.prepare(make_model())
    trainer = make_trainer(accelerator=accelerator)
    train(trainer)
    trainer.evaluate(make_dataset(4))
    assert trainer._accelerator is accelerator
    assert accelerator._models == [other_model]  # what the user prepared stays prepared


def test_an_accelerator_may_be_given_as_keyword_arguments():
    trainer = make_trainer(accelerator={"cpu": True, "project_dir": "somewhere"})
    train(trainer)
    assert trainer._accelerator.project_dir == "somewhere"


@pytest.mark.parametrize("accelerator", ["cpu", 1, Accelerator])
def test_an_accelerator_of_another_kind_is_refused(accelerator):
    with pytest.raises(TypeError, match=r"`accelerator` is a .*Expected an `accelerate.Accelerator`, or a dictionary"):
        make_trainer(accelerator=accelerator)


@pytest.mark.parametrize("accelerator", [Accelerator(), {"mixed_precision": "no"}], ids=["ready", "arguments"])
def test_a_precision_that_contradicts_the_accelerator_is_refused(accelerator):
    with pytest.raises(ValueError, match=r"`mixed_precision` is 'bf16', but the `accelerator` has 'no'.*these places only"):
        make_trainer(accelerator=accelerator, mixed_precision="bf16")


def test_a_precision_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="fp17"):
        make_trainer(mixed_precision="fp17")


def test_one_accelerator_serves_all_runs():
    trainer = make_trainer(mixed_precision="no")
    accelerator = trainer._accelerator
    for _ in range(2):
        train(trainer)
        trainer.evaluate(make_dataset(4))
    assert trainer._accelerator is accelerator


ACCUMULATING = """
import torch
from _support import Probe, make_dataset, make_trainer, weights_of, assert_same_weights

def run(num_steps, **kwargs):
    trainer = make_trainer(**kwargs)
    trainer.train(make_dataset(16), num_epochs=2, per_device_batch_size=4, gradient_accumulation_steps=num_steps)
    return weights_of(trainer.model)

expected = run(4)
assert_same_weights(expected, run(4, accelerator={"gradient_accumulation_steps": 4}))
try:
    run(2, accelerator={"gradient_accumulation_steps": 3})
except ValueError as error:
    print(error)
"""


def test_an_accelerator_that_accumulates_scales_no_loss_twice():
    message = run_python(ACCUMULATING)
    assert "gradient_accumulation_steps=3" in message
    assert "`train` was called with 2" in message


# --- tools -------------------------------------------------------------------------------------------------------


def test_gather_returns_what_one_process_has():
    trainer = make_trainer()
    tensor = torch.tensor([1.0, -1.0])
    assert torch.equal(trainer.gather(tensor), tensor)
    assert torch.equal(trainer.gather(tensor, padding_value=-1), tensor)
    nested = trainer.gather({"a": [tensor]}, padding_value=-1)
    assert torch.equal(nested["a"][0], tensor)


def test_print_goes_to_standard_output(capsys):
    make_trainer().print("a", "b", sep="-")
    assert capsys.readouterr().out == "a-b\n"


def test_the_facts_of_the_process():
    trainer = make_trainer()
    assert trainer.device == torch.device("cpu")
    assert trainer.process_index == 0
    train(trainer)
    config = trainer.run_config
    assert config.is_local_process_zero
    assert config.is_world_process_zero
    assert not config.is_distributed
    assert (config.num_processes, config.mixed_precision) == (1, "no")


def test_the_model_is_at_hand_during_a_run():
    model = make_model()
    probe, values = loader_probe(lambda trainer: trainer.get_model() is model)
    train(make_trainer(model, callbacks=[probe]))
    assert values == [True]


def test_default_callbacks_report_a_run(capsys):
    model = make_model()
    trainer = Trainer(model, mse, torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.train(make_dataset(8), num_epochs=1, eval_dataset=make_dataset(4))
    printed = capsys.readouterr().out
    for words in ("Starting training run", "Starting epoch 1", "train_loss_epoch: ", "eval_loss_epoch: ", "Finishing"):
        assert words in printed


def test_callbacks_hear_of_the_end_of_construction():
    seen = []
    probe = Probe(on_init_end=lambda trainer, **kwargs: seen.append((trainer.model, trainer.run_config)))
    trainer = make_trainer(callbacks=(probe,))
    assert seen == [(trainer.model, None)]


def test_the_seed_of_the_trainer_seeds_all_generators():
    import random

    drawn = []
    for _ in range(2):
        make_trainer(make_model(), seed=123)
        drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert drawn[0] == drawn[1]


def test_without_a_seed_nothing_is_seeded():
    import random

    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    model = make_model()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    trainer = make_trainer(model)
    train(trainer, num_epochs=2, eval_dataset=Samples(make_dataset(4)))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def test_a_signal_while_generators_are_aside_does_not_keep_them_there(monkeypatch):
    trainer = make_trainer(make_model())
    generator, state = np.random.get_bit_generator(), torch.get_rng_state()

    def interrupt(depth):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(rng_module, "_restore", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(trainer, Samples(make_dataset(4)))
    assert np.random.get_bit_generator() is generator
    assert torch.equal(torch.get_rng_state(), state)


# --- checkpoints (C5) and states ---------------------------------------------------------------------------------


def momentum_trainer(seed=2, **kwargs):
    model = make_model(seed=seed)
    return Trainer(model, mse, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), callbacks=(), **kwargs)


def test_a_checkpoint_holds_model_optimizer_scheduler_and_the_users_entries(tmp_path):
    path = tmp_path / "new" / "folder" / "model.pt"
    trainer = momentum_trainer()
    train(trainer, create_scheduler_fn=lambda optimizer: StepLR(optimizer, 1, gamma=0.5))
    trainer.save_checkpoint(path, checkpoint_kwargs={"accuracy": np.float64(0.5), "epoch": 3, "names": ["a"]})
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint) == {
        "model_state_dict",
        "optimizer_state_dict",
        "scheduler_state_dict",
        "accuracy",
        "epoch",
        "names",
    }
    assert [file.name for file in path.parent.iterdir()] == ["model.pt"]

    other = momentum_trainer(seed=5)
    extras = other.load_checkpoint(path)
    assert extras == {"accuracy": 0.5, "epoch": 3, "names": ["a"]}
    assert_same_weights(weights_of(trainer.model), weights_of(other.model))
    assert other.optimizer.state_dict()["state"].keys() == {0, 1}
    rates = []
    other.callback_handler.add_callback(
        Probe(on_training_run_start=lambda trainer, **k: rates.append(trainer.scheduler.last_epoch))
    )
    train(other, create_scheduler_fn=lambda optimizer: StepLR(optimizer, 1, gamma=0.5))
    assert rates == [4]  # the state of the scheduler waited for it
    train(other, create_scheduler_fn=lambda optimizer: StepLR(optimizer, 1, gamma=0.5))
    assert rates == [4, 0]


def test_a_checkpoint_may_leave_parts_out(tmp_path):
    trainer = momentum_trainer()
    trainer.save_checkpoint(tmp_path / "before.pt", save_optimizer=False, save_scheduler=False, save_per_node=False)
    assert set(torch.load(tmp_path / "before.pt", weights_only=True)) == {"model_state_dict"}
    train(trainer)
    trainer.save_checkpoint(tmp_path / "after.pt")
    other = momentum_trainer(seed=5)
    other.load_checkpoint(str(tmp_path / "after.pt"), load_optimizer=False, load_scheduler=False)
    assert other.optimizer.state_dict()["state"] == {}
    assert_same_weights(weights_of(trainer.model), weights_of(other.model))


def test_a_checkpoint_can_be_saved_and_loaded_during_a_run(tmp_path):
    path = tmp_path / "model.pt"
    model = make_model()
    initial = weights_of(model)

    def load(trainer, **kwargs):
        trainer.load_checkpoint(path, load_optimizer=False)

    probe = Probe(
        on_training_run_start=lambda trainer, **kwargs: trainer.save_checkpoint(path),
        on_train_epoch_end=load,
    )
    trainer = make_trainer(model, callbacks=[probe])
    train(trainer, create_scheduler_fn=CosineLrScheduler.create_scheduler_fn())
    assert_same_weights(initial, weights_of(model))
    assert trainer.scheduler.num_updates == 0


def test_the_checkpoint_of_a_compiled_model_has_the_names_of_the_plain_one(tmp_path):
    path = tmp_path / "model.pt"
    compiled = torch.compile(make_model(), backend="eager")
    make_trainer(compiled).save_checkpoint(path)
    assert set(torch.load(path, weights_only=True)["model_state_dict"]) == {"weight", "bias"}
    plain = make_trainer(make_model(seed=8))
    plain.load_checkpoint(path)
    assert_same_weights(weights_of(make_model()), weights_of(plain.model))
    other = torch.compile(make_model(seed=8), backend="eager")
    make_trainer(other).load_checkpoint(path)
    assert torch.equal(other.weight, plain.model.weight)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file '.*nowhere.pt'.*`save_checkpoint`"):
        make_trainer().load_checkpoint(tmp_path / "nowhere.pt")


def test_the_checkpoint_of_another_model_is_refused_and_nothing_is_changed(tmp_path):
    path = tmp_path / "model.pt"
    make_trainer(nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1))).save_checkpoint(path)
    model = nn.ModuleDict({"0": nn.Linear(3, 2), "head": nn.Linear(2, 1)})
    before = weights_of(model)
    with pytest.raises(CheckpointError) as caught:
        make_trainer(model).load_checkpoint(path)
    message = str(caught.value)
    assert "belongs to a different model" in message
    assert "missing from it: head.bias, head.weight" in message
    assert "unexpected in it: 1.bias, 1.weight" in message
    assert "0.weight (1, 3) instead of (2, 3)" in message
    assert_same_weights(before, weights_of(model))


def test_a_training_state_resumes_to_the_weights_of_the_run_that_was_not_interrupted(tmp_path):
    """After an epoch, and in the midst of one."""
    dataset = Samples(make_dataset(18))
    kwargs = {"num_epochs": 3, "gradient_accumulation_steps": 2, "eval_dataset": make_dataset(8)}
    kwargs["create_scheduler_fn"] = CosineLrScheduler.create_scheduler_fn()
    kwargs["train_dataloader_kwargs"] = {"num_workers": 0}

    def dropout_trainer(callbacks=()):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        return Trainer(model, mse, torch.optim.Adam(model.parameters(), lr=0.01), callbacks=callbacks)

    def save(trainer, **_):
        path = tmp_path / f"update_{trainer.progress.num_updates}"
        if trainer.progress.num_updates in (3, 5, 7) and not path.exists():
            trainer.save_training_state(path, {"note": "mine"})

    whole = dropout_trainer([Probe(on_train_step_end=save)])
    train(whole, dataset, **kwargs)
    for number, epoch in ((3, 1), (5, 2), (7, 3)):
        resumed = dropout_trainer()
        torch.manual_seed(99)
        train(resumed, dataset, resume_from=tmp_path / f"update_{number}", **kwargs)
        assert_same_weights(weights_of(whole.model), weights_of(resumed.model))
        assert losses(resumed) == losses(whole)
        assert losses(resumed, "eval_loss_epoch") == losses(whole, "eval_loss_epoch")
        assert resumed.is_resumed
        assert resumed.progress.num_updates == whole.progress.num_updates
        again = dropout_trainer()
        again.run_history._set_epoch(7)
        assert again.load_training_state(tmp_path / f"update_{number}") == {"current_epoch": epoch, "note": "mine"}


@pytest.mark.parametrize("event", ["on_train_epoch_end", "on_eval_epoch_end", "on_training_run_epoch_end"])
def test_a_state_saved_between_epochs_trains_no_epoch_twice_and_leaves_out_none(tmp_path, event):
    def save(trainer, **_):
        if trainer.run_history.current_epoch == 2:
            trainer.save_training_state(tmp_path / "state")

    evaluated = make_dataset(8)
    whole = make_trainer(callbacks=[Probe(**{event: save})])
    train(whole, num_epochs=3, eval_dataset=evaluated)
    recorder = EventRecorder()
    resumed = make_trainer(callbacks=[recorder])
    train(resumed, num_epochs=3, eval_dataset=evaluated, resume_from=tmp_path / "state")
    assert_same_weights(weights_of(whole.model), weights_of(resumed.model))
    assert losses(resumed) == losses(whole)
    assert losses(resumed, "eval_loss_epoch")[-1] == losses(whole, "eval_loss_epoch")[-1]
    assert recorder.log.count("on_train_epoch_end") == 1
    assert recorder.log.count("on_training_run_epoch_end") == (1 if event == "on_training_run_epoch_end" else 2)


def test_a_finished_run_that_is_resumed_trains_no_further(tmp_path):
    trainer = momentum_trainer()
    train(trainer, num_epochs=2)
    trainer.save_training_state(tmp_path / "state")
    recorder = EventRecorder()
    resumed = momentum_trainer()
    resumed.callback_handler.add_callback(recorder)
    train(resumed, num_epochs=2, resume_from=tmp_path / "state")
    assert recorder.log == ["on_training_run_start", "on_training_run_end"]
    assert_same_weights(weights_of(trainer.model), weights_of(resumed.model))


def test_a_stream_resumes_in_the_midst_of_an_epoch(tmp_path):
    def save(trainer, step, **_):
        if step == 1:
            trainer.save_training_state(tmp_path / "state")

    seen = []
    for kwargs in ({}, {"resume_from": tmp_path / "state"}):
        steps = []
        probe = Probe(
            on_train_step_end=save,
            on_train_step_start=lambda trainer, step, batch, **_: steps.append((step, batch[0].sum().item())),  # noqa: B023
        )
        train(make_trainer(callbacks=[probe]), Batches(make_dataset(16), 4), **kwargs)
        seen.append(steps)
    assert seen[1] == seen[0][2:]


def test_a_callback_with_a_state_gets_it_back(tmp_path):
    class Counting(TrainerCallback):
        num_steps = 0

        def on_train_step_end(self, trainer, **kwargs):
            self.num_steps += 1

        def state_dict(self):
            return {"num_steps": self.num_steps}

        def load_state_dict(self, state_dict):
            self.num_steps = state_dict["num_steps"]

    trainer = make_trainer(callbacks=[Counting, Counting()])
    train(trainer)
    trainer.save_training_state(tmp_path / "state")
    other = make_trainer(callbacks=[Counting, Counting])
    other.load_training_state(tmp_path / "state")
    assert [callback.num_steps for callback in other.callback_handler.callbacks] == [4, 4]


def test_streams_and_lists_are_no_whole_batches():
    for data in (Stream(make_dataset(8)), [make_dataset(8)[index] for index in range(8)]):
        probe, values = loader_probe(is_whole)
        train(make_trainer(callbacks=[probe]), data)
        assert values == [False]


def test_a_stop_within_a_nested_evaluation_does_not_end_the_run_for_good(tmp_path):
    """A state saved afterwards has to go on when it is resumed."""

    def evaluate(trainer, **_):
        trainer.evaluate(make_dataset(4))
        trainer.save_training_state(tmp_path / "state")

    stop = Probe(on_evaluation_run_start=raiser(StopTrainingError("enough")))
    trainer = make_trainer(callbacks=[stop, Probe(on_train_epoch_end=evaluate)])
    trainer.train(make_dataset(8), num_epochs=1)
    resumed = make_trainer()
    resumed.train(make_dataset(8), num_epochs=3, resume_from=tmp_path / "state")
    assert resumed.progress.num_epochs_completed == 3


def test_an_error_during_teardown_leaves_a_trainer_that_can_train(monkeypatch):
    """A signal handler may raise one at any place."""

    def fail(*_):
        raise LookupError("of a signal")

    trainer = make_trainer()
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "release", fail)
        with pytest.raises(LookupError):
            trainer.train(make_dataset(4), 1)
    trainer.train(make_dataset(4), 1)
    assert trainer.progress.num_epochs_completed == 1
