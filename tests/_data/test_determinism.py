"""The order of the data and the seeds of workers as functions of seed and epoch."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from _support import Samples, Stream, make_dataset
from pytorch_accelerated._data.determinism import SeededLoader, SeededSampler

DATASET = make_dataset(12)


class GlobalSampler(Sampler):
    """Draws from a global generator."""

    def __len__(self):
        return 12

    def __iter__(self):
        return iter(np.random.permutation(12).tolist())


def loader_of(**kwargs):
    return DataLoader(DATASET, **{"batch_size": 4, **kwargs})


def orders(loader, epochs=(0, 1, 0), seed=3, process_index=0):
    randomness = SeededLoader(loader, process_index)
    result = []
    for epoch in epochs:
        randomness.set_epoch(epoch, seed)
        result.append([list(indices) for indices in randomness.loader.batch_sampler])
    return result


@pytest.mark.parametrize(
    "make_kwargs",
    [
        lambda: {"shuffle": True},
        lambda: {"sampler": RandomSampler(DATASET)},
        lambda: {"sampler": RandomSampler(DATASET, replacement=True)},
        lambda: {"sampler": SubsetRandomSampler(range(12))},
        lambda: {"sampler": WeightedRandomSampler([1.0] * 12, 12)},
        lambda: {"batch_size": 1, "batch_sampler": BatchSampler(RandomSampler(DATASET), 4, drop_last=False)},
    ],
)
def test_the_order_is_a_function_of_seed_and_epoch(make_kwargs):
    first = orders(loader_of(**make_kwargs()))
    assert first[0] == first[2] != first[1]
    assert orders(loader_of(**make_kwargs())) == first
    assert orders(loader_of(**make_kwargs()), seed=4)[0] != first[0]
    assert orders(loader_of(**make_kwargs()), process_index=1) == first


def test_the_order_is_the_same_when_the_loader_was_used_before():
    loader = loader_of(shuffle=True)
    assert orders(loader) == orders(loader)


def test_a_generator_of_the_users_keeps_its_seed():
    def kwargs():
        return {"sampler": RandomSampler(DATASET, generator=torch.Generator().manual_seed(8))}

    assert orders(loader_of(**kwargs()), seed=1) == orders(loader_of(**kwargs()), seed=2)


def test_nothing_is_drawn_from_the_global_generator():
    state = torch.get_rng_state()
    loader = loader_of(shuffle=True)
    randomness = SeededLoader(loader, 0)
    randomness.set_epoch(0, 1)
    list(randomness.loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seeds_of_workers_differ_between_epochs_and_processes_but_not_between_runs():
    seeds = {}
    for process in (0, 1):
        for run in (0, 1):
            loader = loader_of()
            randomness = SeededLoader(loader, process)
            for epoch in (0, 1):
                randomness.set_epoch(epoch, 3)
                seeds[process, run, epoch] = randomness.loader.generator.initial_seed()
    assert len(set(seeds.values())) == 4
    assert all(seeds[process, 0, epoch] == seeds[process, 1, epoch] for process in (0, 1) for epoch in (0, 1))


@pytest.mark.parametrize("loader", [None, [1, 2], DataLoader(Stream(DATASET), batch_size=4)], ids=str)
def test_loaders_without_an_order_are_left_alone(loader):
    SeededLoader(loader, 0).set_epoch(1, 2)


def test_a_loader_without_batches_of_its_own_is_ordered_by_its_sampler():
    loader = DataLoader(DATASET, batch_size=None, shuffle=True)
    randomness = SeededLoader(loader, 0)
    randomness.set_epoch(0, 1)
    first = list(randomness.loader.sampler)
    randomness.set_epoch(0, 1)
    assert list(randomness.loader.sampler) == first


@pytest.mark.parametrize("kind", ["sampler", "batch_sampler"])
def test_the_order_of_a_sampler_of_the_users_is_a_function_of_seed_and_epoch_too(kind):
    def make():
        if kind == "sampler":
            return loader_of(sampler=GlobalSampler())

        class OwnBatches(GlobalSampler):
            def __iter__(self):
                yield from np.random.permutation(12).reshape(3, 4).tolist()

            def __len__(self):
                return 3

        return DataLoader(DATASET, batch_sampler=OwnBatches())

    results = []
    for process in (0, 1):
        np.random.seed(process)
        results.append(orders(make(), process_index=process))
    assert results[0] == results[1]
    assert results[0][0] == results[0][2] != results[0][1]


def test_a_fixed_order_stays_and_an_endless_one_is_drawn_as_needed():
    class Endless(Sampler):
        def __iter__(self):
            while True:
                yield int(np.random.randint(12))

    sequential = loader_of(sampler=SequentialSampler(DATASET))
    assert orders(sequential)[0] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    randomness = SeededLoader(loader_of(sampler=Endless()), 0)
    firsts = []
    for _ in range(2):
        randomness.set_epoch(0, 1)
        firsts.append(next(iter(randomness.loader.batch_sampler)))
    assert firsts[0] == firsts[1]


def test_a_loader_of_the_users_is_left_as_it_is():
    samples = Samples(DATASET)
    loader = DataLoader(samples, batch_sampler=BatchSampler(GlobalSampler(), 4, drop_last=False), collate_fn=list)
    before = dict(vars(loader))
    SeededLoader(loader, 0).set_epoch(1, 2)
    assert vars(loader) == before


def test_the_loader_in_its_place_has_its_settings():
    given = {"num_workers": 2, "prefetch_factor": 3, "persistent_workers": True, "timeout": 5}
    loader = SeededLoader(DataLoader(Samples(DATASET), batch_size=5, drop_last=True, **given), 0).loader
    assert {name: getattr(loader, name) for name in given} == given
    assert (loader.batch_sampler.batch_size, loader.batch_sampler.drop_last, len(loader)) == (5, True, 2)
    stream = SeededLoader(DataLoader(Stream(DATASET), batch_size=5, drop_last=True, **given), 0).loader
    assert {name: getattr(stream, name) for name in given} == given
    assert (stream.batch_size, stream.drop_last) == (5, True)


def test_an_order_of_its_own_offers_what_its_sampler_does_and_leaves_the_generators_alone():
    sampler = GlobalSampler()
    sampler.batch_size = 7
    order = SeededSampler(sampler)
    assert (len(order), order.batch_size) == (12, 7)
    state = np.random.get_state()[1].copy()
    assert sorted(order) == list(range(12))
    assert (np.random.get_state()[1] == state).all()
    assert list(copy.deepcopy(order)) == list(order)
    with pytest.raises(AttributeError):
        order.nothing_like_it  # noqa: B018 - the error is what is tested


def test_a_sampler_that_draws_as_it_goes_draws_the_same_whatever_is_drawn_between():
    class Lazy(Sampler):
        def __len__(self):
            return 12

        def __iter__(self):
            return (int(torch.randint(12, ())) + random.randint(0, 0) for _ in range(12))

    def drawn(between):
        indices = []
        for index in SeededSampler(Lazy()):
            indices.append(index)
            between()
        return indices

    assert drawn(lambda: None) == drawn(lambda: (torch.rand(3), random.random())) != [drawn(lambda: None)[0]] * 12
