"""The order of the data, and what is drawn while it is loaded, as functions of seed and epoch."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from _support import Samples, make_dataset
from pytorch_accelerated._data.build import Placement, rebuild_loader
from pytorch_accelerated._data.determinism import (
    SeededDataset,
    SeededGenerator,
    SeededSampler,
    has_known_order,
    keeps_every_sample,
    uses_no_randomness,
)
from pytorch_accelerated._data.in_memory import WholeBatchDataset, unchanged

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

DATASET = make_dataset(12)


# --- the order -------------------------------------------------------------------------------------------------------


class GlobalSampler(Sampler):
    """Draws from a global generator."""

    def __len__(self):
        return 12

    def __iter__(self):
        return iter(np.random.permutation(12).tolist())


def loader_of(**kwargs):
    return DataLoader(DATASET, **{"batch_size": 4, **kwargs})


def orders(loader, epochs=(0, 1, 0), seed=3, process_index=0):
    seeded = rebuild_loader(loader, Placement(process_index))
    result = []
    for epoch in epochs:
        seeded.set_epoch(epoch, seed)
        result.append([list(indices) for indices in seeded.loader.batch_sampler])
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
def test_the_order_of_a_shuffling_sampler_is_a_function_of_seed_and_epoch(make_kwargs):
    first = orders(loader_of(**make_kwargs()))
    assert first[0] == first[2] != first[1]
    assert orders(loader_of(**make_kwargs())) == first
    assert orders(loader_of(**make_kwargs()), seed=4)[0] != first[0]
    assert orders(loader_of(**make_kwargs()), process_index=1) == first


def test_the_order_does_not_depend_on_an_earlier_run_with_the_same_loader():
    loader = loader_of(shuffle=True)
    assert orders(loader) == orders(loader)


def test_the_seed_of_a_users_generator_determines_the_order():
    def kwargs():
        return {"sampler": RandomSampler(DATASET, generator=torch.Generator().manual_seed(8))}

    assert orders(loader_of(**kwargs()), seed=1) == orders(loader_of(**kwargs()), seed=2)


def test_shuffling_draws_nothing_from_the_global_generator():
    state = torch.get_rng_state()
    loader = loader_of(shuffle=True)
    seeded = rebuild_loader(loader, Placement())
    seeded.set_epoch(0, 1)
    list(seeded.loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_batch_size_the_order_of_the_sampler_is_a_function_of_seed_and_epoch():
    loader = DataLoader(DATASET, batch_size=None, shuffle=True)
    seeded = rebuild_loader(loader, Placement())
    seeded.set_epoch(0, 1)
    first = list(seeded.loader.sampler)
    seeded.set_epoch(0, 1)
    assert list(seeded.loader.sampler) == first


@pytest.mark.parametrize("kind", ["sampler", "batch_sampler"])
def test_the_order_of_a_users_sampler_is_a_function_of_seed_and_epoch_on_every_rank(kind):
    def make():
        if kind == "sampler":
            return loader_of(sampler=GlobalSampler())

        class CustomBatches(GlobalSampler):
            def __iter__(self):
                yield from np.random.permutation(12).reshape(3, 4).tolist()

            def __len__(self):
                return 3

        return DataLoader(DATASET, batch_sampler=CustomBatches())

    results = []
    for process in (0, 1):
        np.random.seed(process)
        results.append(orders(make(), process_index=process))
    assert results[0] == results[1]
    assert results[0][0] == results[0][2] != results[0][1]


def test_a_fixed_order_is_kept_and_an_endless_one_is_drawn_as_needed():
    class Endless(Sampler):
        def __iter__(self):
            while True:
                yield int(np.random.randint(12))

    sequential = loader_of(sampler=SequentialSampler(DATASET))
    assert orders(sequential)[0] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    seeded = rebuild_loader(loader_of(sampler=Endless()), Placement())
    firsts = []
    for _ in range(2):
        seeded.set_epoch(0, 1)
        firsts.append(next(iter(seeded.loader.batch_sampler)))
    assert firsts[0] == firsts[1]


def test_a_seeded_sampler_passes_attributes_through_and_leaves_the_generators_unchanged():
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


def test_a_sampler_that_draws_lazily_is_independent_of_what_is_drawn_in_between():
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


def test_a_seeded_generator_replaces_that_of_a_sampler_once():
    given = torch.Generator().manual_seed(8)
    sampler = RandomSampler(DATASET, generator=given)
    generator = SeededGenerator.of(sampler)
    assert sampler.generator is generator
    assert SeededGenerator.of(sampler) is generator
    generator.seed_epoch(1, seed=3)
    assert given.initial_seed() == 8


def test_a_seeded_generator_depends_on_purpose_keys_epoch_and_seed():
    def seed_of(*purpose, epoch=0, seed=3):
        generator = SeededGenerator(*purpose)
        generator.seed_epoch(epoch, seed)
        return generator.initial_seed()

    seeds = [
        seed_of("order"),
        seed_of("workers"),
        seed_of("workers", 1),
        seed_of("order", epoch=1),
        seed_of("order", seed=4),
    ]
    assert len(set(seeds)) == 5
    assert seed_of("workers", 1) == seeds[2]


@pytest.mark.parametrize(
    ("make_kwargs", "expected"),
    [
        (lambda: {"shuffle": True}, True),
        (lambda: {"batch_size": None}, True),
        (lambda: {"sampler": WeightedRandomSampler([1.0] * 12, 12)}, True),
        (lambda: {"sampler": GlobalSampler()}, False),
        (lambda: {"sampler": type("Subclass", (RandomSampler,), {})(DATASET)}, False),
        (lambda: {"batch_size": 1, "batch_sampler": [[0, 1]]}, False),
    ],
    ids=["shuffled", "samples", "weighted", "user's", "subclass", "list"],
)
def test_the_order_is_known_if_all_samplers_are_pytorchs_own(make_kwargs, expected):
    assert has_known_order(loader_of(**make_kwargs())) is expected


# --- what is drawn while samples are loaded --------------------------------------------------------------------------


class Augmented(Dataset):
    """Each sample is its index and a draw from each global generator."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(()), np.random.rand(), random.random()], dtype=torch.float64)


def mask(samples):
    """A collation that draws, like those of masked language models."""
    batch = torch.stack(samples)
    return torch.cat([batch, torch.rand(len(batch), 1)], dim=1)


def batches_of(loader, epoch=0, seed=3):
    seeded = rebuild_loader(loader, Placement())
    seeded.set_epoch(epoch, seed)
    return list(seeded.loader)


def augmented_loader(num_workers=0, **kwargs):
    return DataLoader(Augmented(), **{"batch_size": 4, "shuffle": True, "num_workers": num_workers, **kwargs})


@pytest.mark.parametrize("collate_fn", [None, mask])
def test_draws_depend_on_seed_and_epoch_and_not_on_the_number_of_workers(collate_fn):
    first = torch.cat(batches_of(augmented_loader(collate_fn=collate_fn)))
    assert len(set(first[:, 1:].flatten().tolist())) == first[:, 1:].numel(), "some draws are equal"
    for num_workers in (1, 2):
        again = torch.cat(batches_of(augmented_loader(num_workers, collate_fn=collate_fn)))
        assert torch.equal(again, first)
    for other in ({"epoch": 1}, {"seed": 4}):
        rows = torch.cat(batches_of(augmented_loader(collate_fn=collate_fn), **other))
        assert not set(rows[:, 1:].flatten().tolist()) & set(first[:, 1:].flatten().tolist())


def test_persistent_workers_use_the_seed_of_a_new_epoch():
    seeded = rebuild_loader(augmented_loader(2, persistent_workers=True), Placement())
    for epoch in (0, 1, 0):
        seeded.set_epoch(epoch, 3)
        assert torch.equal(torch.cat(list(seeded.loader)), torch.cat(batches_of(augmented_loader(), epoch)))


@pytest.mark.parametrize("kwargs", [{}, {"batch_size": None}, {"batch_sampler": [[1, 2], [3]], "batch_size": 1}])
def test_loading_leaves_the_global_generators_unchanged(kwargs):
    kwargs = {"shuffle": "batch_sampler" not in kwargs, **kwargs}

    def drawn(load):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(5)
        np.random.normal()  # leaves a second value behind
        load()
        return [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()]

    assert drawn(lambda: batches_of(augmented_loader(**kwargs))) == drawn(lambda: None)


def test_an_error_while_loading_leaves_the_global_generators_unchanged():
    class Broken(Augmented):
        def __getitem__(self, index):
            super().__getitem__(index)
            raise LookupError("no such sample")

    state = torch.get_rng_state(), random.getstate(), np.random.get_bit_generator()
    with pytest.raises(LookupError, match="no such sample"):
        batches_of(DataLoader(Broken(), batch_size=4))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.random.get_bit_generator() is state[2]


def test_a_dataset_that_loads_several_samples_at_once_is_asked_for_them_at_once():
    class SeveralAtOnce(Augmented):
        def __getitems__(self, indices):
            return [torch.tensor([index, -1.0]) for index in indices]

    batches = batches_of(DataLoader(SeveralAtOnce(), batch_size=4))
    assert [batch[:, 0].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert (torch.cat(batches)[:, 1] == -1).all()


def test_the_length_and_other_attributes_of_the_dataset_are_passed_through():
    dataset = Augmented()
    dataset.classes = ["a", "b"]
    samples = SeededDataset(dataset, unchanged, has_workers=False)
    assert (len(samples), samples.classes, samples[3][0]) == (12, ["a", "b"], 3)
    with pytest.raises(AttributeError):
        samples.nothing_like_it  # noqa: B018 - the error is what is tested


@pytest.mark.parametrize(
    ("dataset", "kwargs", "expected"),
    [
        (make_dataset(4), {}, True),
        (make_dataset(4), {"batch_size": None}, True),
        (WholeBatchDataset(make_dataset(4)), {"collate_fn": unchanged}, True),
        ([1, 2], {}, True),
        (make_dataset(4), {"collate_fn": mask}, False),
        (Samples(make_dataset(4)), {}, False),
        (type("Custom", (TensorDataset,), {})(torch.zeros(4)), {}, False),
    ],
)
def test_only_data_in_memory_with_pytorchs_collation_is_known_to_draw_nothing(dataset, kwargs, expected):
    loader = DataLoader(dataset, **kwargs)
    assert uses_no_randomness(loader) is expected
    assert isinstance(rebuild_loader(loader, Placement()).loader.dataset, SeededDataset) is not expected


@pytest.mark.parametrize(
    ("dataset", "kwargs", "expected"),
    [
        (Samples(make_dataset(4)), {}, True),
        (Subset(Samples(make_dataset(4)), [0, 2]), {}, True),
        (WholeBatchDataset(make_dataset(4)), {"collate_fn": unchanged}, True),
        (Samples(make_dataset(4)), {"collate_fn": list}, False),
        (type("Several", (Augmented,), {"__getitems__": lambda self, indices: []})(), {}, False),
    ],
    ids=["samples", "subset", "whole batches", "user's collation", "several at once"],
)
def test_a_batch_is_known_to_keep_every_sample_if_pytorch_collates_it(dataset, kwargs, expected):
    assert keeps_every_sample(DataLoader(dataset, batch_size=2, **kwargs)) is expected
