"""What is told of data before training, and what is not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, RandomSampler, random_split

from _support import Batches, Samples, Stream, make_dataset, make_trainer, mse, train
from pytorch_accelerated import Trainer
from pytorch_accelerated import trainer as trainer_module
from pytorch_accelerated._data.checks import check_is_dataset, check_loader_arguments

X, Y = make_dataset(8).tensors


class Table:
    """Looks like a data frame of pandas."""

    iloc = columns = ()

    def __getitem__(self, index):
        raise KeyError(index)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((X, Y), "a tuple of 2 tensors with 8 rows each. .* Pass `TensorDataset\\(X, y\\)`"),
        ((X, X), "a tuple of 2 tensors"),
        ([X, Y], "a list of 2 tensors"),
        ((X, X, Y), ".*`TensorDataset\\(x1, x2, x3\\)`"),
        ((X.numpy(), Y.numpy()), "a tuple of 2 arrays.*`torch.as_tensor` of each"),
        ({"inputs": X, "targets": Y}, "a dict of 2 tensors.*`TensorDataset\\(inputs, targets\\)`"),
        (Table(), "a Table"),
        ("data", "'data', of type str"),
        (Samples, "the class `Samples`"),
        ([make_dataset(), make_dataset()], "a list of 2 datasets. Expected one"),
        (random_split(make_dataset(8), [4, 4]), "a list of 2 datasets"),
        ((DataLoader(make_dataset()),), "a tuple of 1 datasets"),
        ({"a": make_dataset()}, "a dict of 1 datasets"),
    ],
)
def test_what_is_no_dataset_is_refused(data, words):
    with pytest.raises(TypeError, match=f"`train_dataset` is {words}"):
        check_is_dataset("train_dataset", data)


@pytest.mark.parametrize(
    "data",
    [
        make_dataset(),
        Samples(make_dataset()),
        Stream(make_dataset()),
        Batches(make_dataset(), 4),
        DataLoader(make_dataset()),
        ConcatDataset([make_dataset(), make_dataset()]),
        [(x, y) for x, y in zip(X, Y, strict=True)],
        [X, X],
        [X[0], X[1], X[2], X[3], X[4]],
        list(X),
        X,
        X.numpy(),
        [np.zeros(3), np.ones(2)],
        {0: (X[0], Y[0]), 1: (X[1], Y[1])},
        {0: X, 1: Y},
        [{"x": X[0]}, {"x": X[1]}],
        [torch.tensor(1.0), torch.tensor(2.0)],
        iter([(X, Y)]),
        [],
        None,
    ],
    ids=lambda data: type(data).__name__,
)
def test_what_may_be_a_dataset_is_not_refused(data):
    check_is_dataset("train_dataset", data)


@pytest.mark.parametrize("data", [{"a": make_dataset(), "b": make_dataset()}, {"near": X, "far": X}, {}])
def test_several_evaluation_datasets_come_in_a_dictionary(data):
    check_is_dataset("eval_dataset", data)


@pytest.mark.parametrize("data", [[make_dataset(), make_dataset()], (DataLoader(make_dataset()),) * 2])
def test_a_list_of_evaluation_datasets_is_answered_with_a_dictionary(data):
    trainer = make_trainer()
    with pytest.raises(TypeError, match=r"`eval_dataset` is a \w+ of 2 datasets.*a dictionary with a name for each"):
        train(trainer, eval_dataset=data)
    assert trainer.progress.num_updates == 0
    with pytest.raises(TypeError, match="a dictionary with a name for each"):
        trainer.evaluate(data)


def test_a_collate_function_may_take_any_samples():
    def collate(samples):
        return torch.cat([sample[:, :3].float() for sample in samples]), torch.zeros(len(samples) * len(X), 1)

    make_trainer().train([X, torch.cat([X, X], dim=1)], 1, collate_fn=collate)
    make_trainer().train([X, X[:, :3].double()], 1, train_dataloader_kwargs={"collate_fn": collate})


def test_a_loader_of_the_subclass_may_be_made_of_anything():
    class Own(Trainer):
        def create_train_dataloader(self, batch_size, train_dl_kwargs=None):
            assert train_dl_kwargs == {"mine": 1}
            return DataLoader(torch.utils.data.TensorDataset(*self.train_dataset), batch_size)

    make_trainer(cls=Own).train((X, Y), 1, train_dataloader_kwargs={"mine": 1})


# --- arguments of loaders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_worker": 2}, "contains 'num_worker', .* Did you mean 'num_workers'"),
        ({"nonsense": 2}, "contains 'nonsense', which is not an argument"),
        ({"dataset": []}, "contains `dataset`"),
        (["shuffle"], "is of type list"),
        ("shuffle", "is of type str"),
    ],
)
def test_arguments_that_no_loader_has_are_refused(given, words):
    with pytest.raises(TypeError, match=f"`train_dataloader_kwargs` {words}"):
        train(make_trainer(), train_dataloader_kwargs=given)
    with pytest.raises(TypeError, match="`eval_dataloader_kwargs`"):
        train(make_trainer(), eval_dataset=make_dataset(), eval_dataloader_kwargs=given)


def test_a_loader_class_in_the_place_of_pytorchs_has_its_own_arguments(monkeypatch):
    class Loader(DataLoader):
        def __init__(self, dataset, follow=(), **kwargs):
            self.follow = follow
            super().__init__(dataset, **kwargs)

    monkeypatch.setattr(trainer_module, "DataLoader", Loader)
    train(make_trainer(), train_dataloader_kwargs={"follow": ["x"]})
    check_loader_arguments("train_dataloader_kwargs", {"anything": 1}, Loader)


LOADER = DataLoader(make_dataset(), 4)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"per_device_batch_size": 2}, "per_device_batch_size"),
        ({"per_device_batch_size": 2, "eval_dataset": LOADER}, "per_device_batch_size"),
        ({"train_dataloader_kwargs": {"num_workers": 0}, "eval_dataset": make_dataset()}, "train_dataloader_kwargs"),
        ({"eval_dataset": {"a": LOADER}, "eval_dataloader_kwargs": {}}, "eval_dataloader_kwargs"),
        ({"collate_fn": list}, "collate_fn"),
    ],
)
def test_arguments_beside_a_ready_loader_are_told_of(arguments, name):
    with pytest.warns(UserWarning, match=f"`{name}` has no effect, because the data are a ready") as caught:
        make_trainer().train(LOADER, 1, **arguments)
    assert len(caught) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"per_device_batch_size": 4},
        {"per_device_batch_size": 8},
        {"per_device_batch_size": 2, "eval_dataset": make_dataset()},
        {"eval_dataset": make_dataset(), "eval_dataloader_kwargs": {"num_workers": 0}},
        {"eval_dataset": {"a": LOADER, "b": make_dataset()}, "per_device_batch_size": 2, "collate_fn": None},
        {"train_dataset": make_dataset(), "eval_dataset": LOADER, "per_device_batch_size": 2},
        {"train_dataset": Batches(make_dataset(), 4), "per_device_batch_size": 2},
        {
            "train_dataset": DataLoader(
                make_dataset(), batch_sampler=BatchSampler(RandomSampler(make_dataset()), 4, False)
            ),
            "per_device_batch_size": 2,
        },
    ],
)
def test_arguments_that_have_an_effect_are_not_told_of(arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = make_trainer(loss_func=mse)
        trainer.train(**{"train_dataset": LOADER, "num_epochs": 1, **arguments})
        if arguments.get("eval_dataset") is not None:
            trainer.evaluate()
