"""Limits on the number of batches per epoch."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
from torch.utils.data import DataLoader

from _support import make_dataset
from pytorch_accelerated._data.limits import limit_from_environment
from pytorch_accelerated.utils import LIMIT_BATCHES_ENV_VAR, DataLoaderSlice, LimitBatches


def test_a_slice_yields_the_first_batches_and_has_the_other_attributes_of_its_loader():
    loader = DataLoader(make_dataset(10), batch_size=2)
    part = DataLoaderSlice(loader, 3)
    assert len(list(part)) == len(part) == 3
    assert part.batch_size == 2
    assert len(DataLoaderSlice(loader, 30)) == 5
    assert len(DataLoaderSlice(iter(()), 4)) == 4
    with pytest.raises(AttributeError, match="no_such_attribute"):
        part.no_such_attribute  # noqa: B018 - the error is what is tested


def test_a_slice_can_be_copied_and_pickled():
    part = DataLoaderSlice([1, 2, 3], 2)
    assert list(copy.deepcopy(part)) == list(pickle.loads(pickle.dumps(part))) == [1, 2]


def test_limits_of_with_blocks_nest_and_end_with_the_block(monkeypatch):
    monkeypatch.delenv(LIMIT_BATCHES_ENV_VAR, raising=False)
    with LimitBatches(5):
        with LimitBatches(2):
            assert os.environ[LIMIT_BATCHES_ENV_VAR] == "2"
        assert os.environ[LIMIT_BATCHES_ENV_VAR] == "5"
    assert LIMIT_BATCHES_ENV_VAR not in os.environ
    assert list(LimitBatches(1)([1, 2])) == [1]


@pytest.mark.parametrize(("text", "expected"), [(None, None), ("", None), ("3", 3), (" 12 ", 12)])
def test_the_environment_limits_batches_to_a_whole_number(monkeypatch, text, expected):
    monkeypatch.delenv(LIMIT_BATCHES_ENV_VAR, raising=False)
    if text is not None:
        monkeypatch.setenv(LIMIT_BATCHES_ENV_VAR, text)
    assert limit_from_environment() == expected


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many"])
def test_a_limit_in_the_environment_that_is_no_number_of_batches_is_refused(monkeypatch, text):
    monkeypatch.setenv(LIMIT_BATCHES_ENV_VAR, text)
    with pytest.raises(ValueError, match=rf"{LIMIT_BATCHES_ENV_VAR} is '{text}'.*at least 1.*unset"):
        limit_from_environment()


@pytest.mark.parametrize("value", [1.5, 0, -1, True, "2", None, float("inf")])
@pytest.mark.parametrize("make", [LimitBatches, lambda limit: DataLoaderSlice([1], limit)], ids=["limit", "slice"])
def test_a_limit_that_is_no_number_of_batches_is_refused_where_it_is_given(make, value):
    with pytest.raises(ValueError, match=rf"is {value!r}. Expected a whole number of batches, at least 1"):
        make(value)
