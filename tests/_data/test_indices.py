"""Datasets and samplers with indices of any type yield the samples that PyTorch's `DataLoader` yields."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, Subset, TensorDataset

from _support import IN_ORDER, Samples, weights_of
from pytorch_accelerated import Trainer
from pytorch_accelerated.exceptions import StopTrainingError

ROWS = torch.arange(12.0).view(12, 1)
IN_MEMORY = TensorDataset(ROWS, ROWS)
COLLATED = Samples(IN_MEMORY)
ORDER = [7, 3, 3, 11, 0, 1, 5]


class ByKey(Dataset):
    """Its samples have names."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, key):
        return ROWS[int(key[1:])], ROWS[int(key[1:])]


class Positions(Trainer):
    """Remembers which samples it sees."""

    def __init__(self):
        model = nn.Linear(1, 1)
        super().__init__(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=1e-4), callbacks=())
        self.seen = []

    def calculate_train_batch_loss(self, batch):
        self.seen.append(batch[0].flatten().tolist())
        return super().calculate_train_batch_loss(batch)

    def calculate_eval_batch_loss(self, batch):
        self.seen.append(batch[0].flatten().tolist())
        return super().calculate_eval_batch_loss(batch)


def assert_same_samples(dataset, **loader):
    expected = [batch[0].flatten().tolist() for batch in DataLoader(dataset, **loader)]
    trained, evaluated, of_loader = Positions(), Positions(), Positions()
    order = {} if "sampler" in loader or "batch_sampler" in loader else IN_ORDER
    trained.train(dataset, num_epochs=1, train_dataloader_kwargs={"num_workers": 0, **order, **loader})
    evaluated.evaluate(dataset, dataloader_kwargs={"num_workers": 0, **loader})
    of_loader.evaluate(DataLoader(dataset, **loader))
    assert trained.seen == evaluated.seen == of_loader.seen == expected


@pytest.mark.parametrize("dataset", [IN_MEMORY, COLLATED], ids=["in memory", "collated"])
@pytest.mark.parametrize(
    "indices",
    [
        range(2, 9),
        tuple(ORDER),
        [np.int64(index) for index in ORDER],
        [torch.tensor(index) for index in ORDER],
        np.array(ORDER, dtype=np.uint8),
        np.array(ORDER, dtype=np.int32),
        np.array(ORDER, dtype=np.uint64),
        np.array(ORDER, dtype=object),
        torch.tensor(ORDER),
        torch.tensor(ORDER, dtype=torch.int16),
        [-1, -2, 3],
    ],
    ids=lambda indices: f"{type(indices).__name__} of {getattr(indices, 'dtype', type(indices[0]).__name__)}",
)
def test_a_subset_may_have_indices_of_any_type(dataset, indices):
    assert_same_samples(Subset(dataset, indices), batch_size=3)


@pytest.mark.parametrize("indices", [[np.array([3]), np.array([4])], torch.tensor([[1], [2]])])
def test_a_subset_in_memory_may_have_arrays_of_one_index(indices):
    assert_same_samples(Subset(IN_MEMORY, indices), batch_size=3)


@pytest.mark.parametrize("indices", [[0.0, 1.5], np.array([0.0, 1.5]), torch.tensor([0.0, 1.5])])
def test_indices_that_pytorch_refuses_are_not_rounded(indices):
    with pytest.raises(IndexError):
        Positions().evaluate(Subset(IN_MEMORY, indices))


@pytest.mark.parametrize("dataset", [IN_MEMORY, COLLATED, Subset(IN_MEMORY, range(12))])
@pytest.mark.parametrize(
    "sampler",
    [ORDER, [np.int64(index) for index in ORDER], np.array(ORDER), torch.tensor(ORDER), [torch.tensor(3)], [-1, 3]],
)
def test_a_sampler_may_yield_indices_of_any_type(dataset, sampler):
    assert_same_samples(dataset, batch_size=3, sampler=sampler)


@pytest.mark.parametrize("dataset", [IN_MEMORY, COLLATED])
@pytest.mark.parametrize(
    "batch_sampler",
    [
        list(torch.tensor(ORDER).split(3)),
        [np.array([1, 2]), np.array([3])],
        [range(3), range(5, 7)],
        [(1, 2), (3, 4)],
        [[np.int64(1), torch.tensor(2)], [3]],
    ],
)
def test_a_batch_sampler_may_yield_batches_of_any_type(dataset, batch_sampler):
    assert_same_samples(dataset, batch_sampler=batch_sampler)


def test_samples_may_have_names():
    keys = ["k3", "k1", "k9"]
    assert_same_samples(Subset(ByKey(), keys), batch_size=2)
    assert_same_samples(ByKey(), batch_size=2, sampler=keys)
    assert_same_samples(ByKey(), batch_sampler=[["k3", "k1"], ["k9"]])


@pytest.mark.parametrize(
    "sampler", [[[1, 2], [3, 4]], [slice(0, 2), slice(4, 8)], BatchSampler(SequentialSampler(IN_MEMORY), 5, False)]
)
def test_a_sampler_may_yield_batches_if_there_is_no_batch_size(sampler):
    assert_same_samples(IN_MEMORY, batch_size=None, sampler=sampler)


def test_a_loader_without_batch_size_is_shuffled_and_resumes_where_it_was(tmp_path):
    batches = TensorDataset(ROWS[:, None], ROWS[:, None])

    class Interrupted(Positions):
        num_steps = 99

        def calculate_train_batch_loss(self, batch):
            if len(self.seen) == self.num_steps:
                self.save_training_state(tmp_path / "state")
                raise StopTrainingError("halfway")
            return super().calculate_train_batch_loss(batch)

    def train(num_steps, **settings):
        torch.manual_seed(2)
        trainer = Interrupted()
        trainer.num_steps = num_steps
        trainer.train(DataLoader(batches, batch_size=None, shuffle=True), num_epochs=2, **settings)
        return trainer

    whole, first = train(99), train(17)
    assert sorted(whole.seen[:12]) == sorted(whole.seen[12:]) == ROWS.tolist()
    assert len({str(ROWS.tolist()), str(whole.seen[:12]), str(whole.seen[12:])}) == 3
    rest = train(99, resume_from=tmp_path / "state")
    assert first.seen + rest.seen == whole.seen
    assert all(
        torch.equal(left, right)
        for left, right in zip(weights_of(rest.model).values(), weights_of(whole.model).values(), strict=True)
    )
