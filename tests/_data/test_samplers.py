"""Samplers at any depth of a loader: the epoch they are told, and the state that the user's keep."""

from __future__ import annotations

import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
)

from _support import Probe, Samples, make_indexed_dataset, make_trainer, raiser
from pytorch_accelerated._data.samplers import OrderState, parts_of, set_epoch_of
from pytorch_accelerated.callbacks import SaveTrainingStateCallback

NUM_SAMPLES, BATCH_SIZE = 24, 4


class Told:
    """Remembers the epochs that it is told; wraps a sampler or a dataset."""

    def __init__(self, sampler=None, dataset=None):
        self.epochs = []
        self.sampler = sampler
        self.dataset = dataset

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        return iter(range(NUM_SAMPLES) if self.sampler is None else self.sampler)

    def __len__(self):
        return NUM_SAMPLES if self.sampler is None else len(self.sampler)

    def __getitem__(self, index):
        return self.dataset[index]


class ToldDataset(Told, Dataset):
    pass


def kwargs_with(told):
    """Return places in a loader where the object can be."""
    dataset = make_indexed_dataset(NUM_SAMPLES)
    told_dataset = ToldDataset(dataset=dataset)
    return {
        "sampler": (dataset, {"sampler": told}, told),
        "sampler in a sampler": (dataset, {"sampler": Told(told)}, told),
        "sampler of a batch sampler": (dataset, {"batch_sampler": BatchSampler(told, BATCH_SIZE, False)}, told),
        "around a batch sampler": (
            dataset,
            {"batch_sampler": Told(BatchSampler(SequentialSampler(dataset), BATCH_SIZE, False))},
            None,
        ),
        "dataset": (told_dataset, {}, told_dataset),
        "dataset in a subset": (Subset(told_dataset, range(NUM_SAMPLES)), {}, told_dataset),
        "dataset in a concatenation": (ConcatDataset([told_dataset]), {}, told_dataset),
    }


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("place", kwargs_with(Told()))
def test_whatever_decides_the_order_is_told_each_epoch(place, num_workers):
    dataset, kwargs, told = kwargs_with(Told())[place]
    told = kwargs["batch_sampler"] if told is None else told
    trainer = make_trainer(torch.nn.Linear(1, 1))
    trainer.train(
        dataset, 3, per_device_batch_size=BATCH_SIZE, train_dataloader_kwargs={**kwargs, "num_workers": num_workers}
    )
    assert list(dict.fromkeys(told.epochs)) == [0, 1, 2]


def test_the_epoch_continues_in_a_resumed_run(tmp_path):
    def run(num_epochs, **kwargs):
        told = Told()
        trainer = make_trainer(torch.nn.Linear(1, 1), callbacks=[SaveTrainingStateCallback(tmp_path)])
        loading = {"sampler": told, "num_workers": 0}
        trainer.train(make_indexed_dataset(NUM_SAMPLES), num_epochs, train_dataloader_kwargs=loading, **kwargs)
        return list(dict.fromkeys(told.epochs))

    assert run(2) == [0, 1]
    assert run(3, resume_from="latest") == [0, 1, 2]  # what it remembers is a part of its state


def test_pytorchs_distributed_sampler_of_one_replica_draws_the_orders_it_draws_by_hand():
    dataset, orders = make_indexed_dataset(8), []
    sampler = DistributedSampler(dataset, num_replicas=1, rank=0, seed=3)
    seen = Probe(on_train_step_end=lambda trainer, batch, **_: orders.append(batch[0][:, 0].int().tolist()))
    trainer = make_trainer(torch.nn.Linear(1, 1), callbacks=[seen])
    trainer.train(dataset, 3, train_dataloader_kwargs={"sampler": sampler, "num_workers": 0})
    expected = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected.append(list(sampler))
    assert orders == expected


def test_every_object_is_visited_once():
    told = Told()
    told.sampler = told  # a circle
    set_epoch_of(DataLoader(make_indexed_dataset(8), sampler=RandomSampler(range(8))), 0)
    loader = DataLoader(make_indexed_dataset(8), sampler=told)
    told.sampler = None
    set_epoch_of(loader, 1)
    assert told.epochs == [1]
    assert len({id(part) for _, part in parts_of(loader)}) == len(list(parts_of(loader)))


# --- samplers with a state of their own --------------------------------------------------------------------------


class OfTorch(Sampler):
    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __iter__(self):
        return iter(torch.randperm(NUM_SAMPLES, generator=self.generator).tolist())

    def __len__(self):
        return NUM_SAMPLES


class OfNumpy(OfTorch):
    def __init__(self):
        self.rng = np.random.default_rng(3)

    def __iter__(self):
        return iter(self.rng.permutation(NUM_SAMPLES).tolist())


class OfLegacyNumpy(OfTorch):
    def __init__(self):
        self.rng = np.random.RandomState(3)

    def __iter__(self):
        return iter(self.rng.permutation(NUM_SAMPLES).tolist())


class OfPython:
    """Not a subclass of `Sampler`; draws lazily."""

    def __init__(self):
        self.rng = random.Random(3)

    def __iter__(self):
        for _ in range(NUM_SAMPLES):
            yield self.rng.randrange(NUM_SAMPLES)

    def __len__(self):
        return NUM_SAMPLES


class Counting(OfTorch):
    """Shifts the order by one more in each epoch."""

    def __init__(self):
        self.num_epochs = 0

    def __iter__(self):
        self.num_epochs += 1
        return iter((torch.arange(NUM_SAMPLES) + self.num_epochs).remainder(NUM_SAMPLES).tolist())


class ShufflingInPlace(OfTorch):
    """Shuffles the order of the epoch before."""

    def __init__(self):
        self.order, self.rng = list(range(NUM_SAMPLES)), random.Random(1)

    def __iter__(self):
        self.rng.shuffle(self.order)
        return iter(list(self.order))


class Stateful(OfTorch):
    """Has a state, in a form of its own."""

    def __init__(self):
        self._hidden = {"rng": random.Random(3), "unrelated": object()}

    def __iter__(self):
        return iter(self._hidden["rng"].sample(range(NUM_SAMPLES), NUM_SAMPLES))

    def state_dict(self):
        return {"state": self._hidden["rng"].getstate()}

    def load_state_dict(self, state_dict):
        self._hidden["rng"].setstate(state_dict.pop("state"))


class BatchesOf:
    """A batch sampler with a generator of its own, around a sampler with one."""

    batch_size, drop_last = BATCH_SIZE, False

    def __init__(self):
        self.sampler, self.rng = OfTorch(), random.Random(5)

    def __iter__(self):
        batches = list(BatchSampler(self.sampler, BATCH_SIZE, False))
        self.rng.shuffle(batches)
        return iter(batches)

    def __len__(self):
        return NUM_SAMPLES // BATCH_SIZE


SAMPLERS = [OfTorch, OfNumpy, OfLegacyNumpy, OfPython, Counting, ShufflingInPlace, Stateful, BatchesOf]


class CrashError(Exception):
    pass


def run_with(sampler_class, folder, stop_after=None, dataset=None, num_workers=0, **kwargs):
    """Return the batches of two epochs, up to a crash."""
    sampler, batches = sampler_class(), []

    def see(trainer, batch, **_):
        batches.append(batch[0][:, 0].int().tolist())
        if len(batches) == stop_after:
            raise CrashError

    callbacks = [
        SaveTrainingStateCallback(folder, save_every_n_steps=1, save_at_end=False),
        Probe(on_train_step_end=see),
    ]
    trainer = make_trainer(torch.nn.Linear(1, 1), callbacks=callbacks, lr=0.0)
    trainer.callback_handler.callbacks.reverse()  # the crash comes before the state of its step is saved
    trainer.callback_handler.refresh()
    loading = {"batch_sampler" if sampler_class is BatchesOf else "sampler": sampler, "num_workers": num_workers}
    dataset = make_indexed_dataset(NUM_SAMPLES) if dataset is None else dataset
    with suppress(CrashError):
        trainer.train(dataset, 3, per_device_batch_size=BATCH_SIZE, train_dataloader_kwargs=loading, **kwargs)
    return batches


@pytest.mark.parametrize("stop_after", [2, 7, 9, 14])
@pytest.mark.parametrize("sampler_class", SAMPLERS)
def test_a_run_resumed_anywhere_draws_the_rest_of_the_uninterrupted_one(sampler_class, stop_after, tmp_path, capsys):
    complete = run_with(sampler_class, tmp_path / "complete")
    assert len(complete) == 18
    assert complete[:6] != complete[6:12] != complete[12:]
    run_with(sampler_class, tmp_path / "states", stop_after)
    rest = run_with(sampler_class, tmp_path / "states", resume_from="latest")
    assert rest == complete[stop_after - 1 :]
    assert "may differ" not in capsys.readouterr().out


def test_the_same_with_workers(tmp_path):
    data = Samples(make_indexed_dataset(NUM_SAMPLES))
    complete = run_with(OfTorch, tmp_path / "complete", dataset=data, num_workers=2)
    run_with(OfTorch, tmp_path / "states", 9, dataset=data, num_workers=2)
    assert run_with(OfTorch, tmp_path / "states", dataset=data, num_workers=2, resume_from="latest") == complete[8:]


class Hiding(OfTorch):
    """Keeps its generator where nobody finds it."""

    def __init__(self):
        self.strategy = type("Strategy", (), {})()
        self.strategy.rng = random.Random(3)

    def __iter__(self):
        return iter(self.strategy.rng.sample(range(NUM_SAMPLES), NUM_SAMPLES))


def test_a_resumed_run_names_what_a_sampler_keeps_that_is_not_saved(tmp_path, capsys):
    run_with(Hiding, tmp_path / "states", 9)
    run_with(Hiding, tmp_path / "states", resume_from="latest")
    output = capsys.readouterr().out
    assert "The order may differ: `Hiding.strategy` is not saved. Give the sampler `state_dict`" in output
    assert "exactly" not in output


def test_samplers_of_pytorch_have_no_state_to_save():
    dataset = make_indexed_dataset(8)
    for sampler in (RandomSampler(dataset), SequentialSampler(dataset), WeightedRandomSampler([1.0] * 8, 8)):
        state = OrderState(DataLoader(dataset, sampler=sampler))
        assert state.now() == {}
        assert state.uncovered() == []


# --- the user's loader afterwards --------------------------------------------------------------------------------


@pytest.mark.parametrize("ends_with", [None, RuntimeError])
@pytest.mark.parametrize("call", ["train", "eval_dataset", "evaluate", "predict"])
@pytest.mark.parametrize("seed", [None, 5])
def test_a_loader_draws_the_same_orders_after_a_run_as_before(seed, call, ends_with):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    loader = DataLoader(make_indexed_dataset(8), batch_size=4, shuffle=True, generator=generator)

    class UsesTheLoader(type(make_trainer(torch.nn.Linear(1, 1)))):
        def create_train_dataloader(self, batch_size, train_dl_kwargs=None):
            return loader if call == "train" else super().create_train_dataloader(batch_size, train_dl_kwargs)

        def create_eval_dataloader(self, batch_size, eval_dl_kwargs=None):
            return loader

    def orders():
        if generator is not None:
            generator.manual_seed(seed)
        torch.manual_seed(1)
        return [batch[0][:, 0].tolist() for _ in range(2) for batch in loader]

    before = orders()
    callbacks = (
        [] if ends_with is None else [Probe(on_train_step_end=raiser(ends_with), on_eval_step_end=raiser(ends_with))]
    )
    trainer, dataset = (
        make_trainer(torch.nn.Linear(1, 1), cls=UsesTheLoader, callbacks=callbacks),
        make_indexed_dataset(8),
    )
    try:
        if call in ("train", "eval_dataset"):
            trainer.train(dataset, 1, eval_dataset=dataset if call == "eval_dataset" else None)
        else:
            getattr(trainer, call)(dataset)
    except RuntimeError:
        pass
    assert orders() == before
    assert loader.generator is generator
