"""Checks of the user's arguments; `test_trainer.py` has the calls of `train` that they refuse."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from _support import Batches, Samples, Stream, make_dataset, make_trainer, train
from pytorch_accelerated._arguments.moments import check_no_run
from pytorch_accelerated._arguments.numbers import check_positive_integer
from pytorch_accelerated._arguments.parts import check_trainable
from pytorch_accelerated._data.checks import (
    check_data_not_empty,
    check_data_of_loader,
    check_loader_not_empty,
    check_reiterable,
    explain_bad_data,
)

PARAMETER = nn.Parameter(torch.ones(1))
OPTIMIZER = torch.optim.SGD([PARAMETER], lr=0.1)


@pytest.mark.parametrize("value", [1, 7, np.int64(3), torch.tensor(2)])
def test_positive_integers_of_any_type_are_accepted(value):
    check_positive_integer("num_epochs", value, "epochs")


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-3, ValueError), (np.int64(0), ValueError)]
    + [(value, TypeError) for value in (1.0, "1", None, True, np.bool_(True), [1])],
)
def test_zero_negative_numbers_and_other_types_are_no_positive_integers(value, error):
    with pytest.raises(error, match=r"`num_epochs` is .*Expected a whole number of epochs, at least 1") as caught:
        check_positive_integer("num_epochs", value, "epochs")
    assert repr(value) in str(caught.value)


def test_objects_that_are_no_pytorch_model_or_optimizer_are_not_checked():
    check_trainable(object(), None, object())
    check_trainable(nn.Linear(1, 1), None, object())


def test_an_optimizer_of_a_part_of_the_model_is_accepted():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[0].requires_grad_(False)
    check_trainable(model, None, torch.optim.SGD(model[1].parameters(), lr=0.1))


@pytest.mark.parametrize("data", [make_dataset(1), [1], Stream([]), Batches(make_dataset(2), 1), iter(())])
def test_data_that_is_not_known_to_be_empty_is_accepted(data):
    check_data_not_empty("train_dataset", data)


@pytest.mark.parametrize("data", [make_dataset(0), [], (), DataLoader(Samples(make_dataset(0)))])
def test_empty_data_is_refused(data):
    with pytest.raises(ValueError, match=r"`train_dataset` is empty: its length is 0"):
        check_data_not_empty("train_dataset", data)


def test_a_loader_is_checked_by_its_dataset_only_if_that_has_indices():
    for loader in (DataLoader(Stream([])), Batches(make_dataset(2), 1), None, [], DataLoader(make_dataset(2))):
        check_data_of_loader("train_dataset", loader)
    with pytest.raises(ValueError, match=r"`train_dataset` is empty"):
        check_data_of_loader("train_dataset", DataLoader(Samples(make_dataset(0))))


@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_an_error_is_explained_by_bad_data_only_if_that_is_the_reason(error):
    with (
        pytest.raises(ValueError, match=r"`train_dataset` is None"),
        explain_bad_data("train_dataset", None),
    ):
        raise error("of PyTorch")
    with pytest.raises(error, match="the user's"), explain_bad_data("train_dataset", make_dataset(2)):
        raise error("the user's")


def test_an_iterator_is_accepted_for_one_epoch_or_a_number_of_updates_only():
    check_reiterable(iter(()), None, 1, None)
    check_reiterable(iter(()), None, 2, 5)
    check_reiterable(Batches(make_dataset(2), 1), None, 2, None)
    with pytest.raises(
        ValueError, match=r"`train_dataset` is an iterator .*first of 2 epochs.*an object of a class whose"
    ):
        check_reiterable(iter(()), None, 2, None)


@pytest.mark.parametrize(
    "loader", [None, [], DataLoader(make_dataset(3), batch_size=4), DataLoader(Stream([]), batch_size=4)]
)
def test_a_loader_that_may_yield_a_batch_is_accepted(loader):
    check_loader_not_empty("train_dataset", loader)


def test_a_loader_that_drops_its_only_batch_is_refused():
    with pytest.raises(ValueError, match=r"`eval_dataset` yields no batch: 3 samples do not fill one batch of 4"):
        check_loader_not_empty("eval_dataset", DataLoader(make_dataset(3), batch_size=4, drop_last=True))


def test_training_during_a_run_is_refused():
    check_no_run(False)
    with pytest.raises(RuntimeError, match="`train` was called during a run of this trainer"):
        check_no_run(True)


@pytest.mark.parametrize(("accumulation", "is_told"), [(8, True), (4, True), (3, False), (1, False)])
@pytest.mark.parametrize("data", ["a dataset", "an iterable of batches"])
def test_accumulation_over_more_batches_than_an_epoch_has_is_told(accumulation, is_told, data):
    """If the number of batches is not known, nothing is said."""
    dataset = make_dataset(12) if data == "a dataset" else Batches(make_dataset(12), 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(make_trainer(), dataset, gradient_accumulation_steps=accumulation)
    messages = [str(warning.message) for warning in caught]
    expected = f"`gradient_accumulation_steps` is {accumulation} batches, but an epoch has only 3."
    assert any(message.startswith(expected) for message in messages) == (is_told and data == "a dataset")
