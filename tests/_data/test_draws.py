"""Random numbers of the data belong to a draw: the number of a batch in its epoch, and the run."""

from __future__ import annotations

import pickle
import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler

from _support import Probe, make_trainer
from pytorch_accelerated._data.draws import Draw, NumberedOrder, number_of
from pytorch_accelerated._data.sharding import ShardedBatchSampler
from pytorch_accelerated.callbacks import SaveTrainingStateCallback

DRAW_NUMBERS = {
    "torch": lambda: torch.rand(2),
    "numpy": lambda: torch.from_numpy(np.random.rand(2)).float(),
    "random": lambda: torch.tensor([random.random(), random.random()]),
}


class Crops(Dataset):
    """Three images; each access is another random crop."""

    def __init__(self, library):
        self.library = library

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return DRAW_NUMBERS[self.library](), torch.zeros(1)


class CrashError(Exception):
    pass


class RepeatingBatches:
    """A batch sampler that yields the same indices again and again, in a form of its choice."""

    def __init__(self, form):
        self.form = form

    def __iter__(self):
        return (self.form([0, 0, 1, 2]) for _ in range(8))

    def __len__(self):
        return 8


ORDERS = {
    "with replacement": lambda: {"sampler": RandomSampler(Crops("torch"), replacement=True, num_samples=32)},
    "weighted": lambda: {"sampler": WeightedRandomSampler([1.0, 2.0, 3.0], 32)},
    "one index only": lambda: {"sampler": [0] * 32},
    "a batch sampler": lambda: {"batch_sampler": BatchSampler([1] * 32, 4, drop_last=False)},
    "lists": lambda: {"batch_sampler": RepeatingBatches(list)},
    "tuples": lambda: {"batch_sampler": RepeatingBatches(tuple)},
    "iterators": lambda: {"batch_sampler": RepeatingBatches(iter)},
    "arrays": lambda: {"batch_sampler": RepeatingBatches(np.array)},
    "tensors": lambda: {"batch_sampler": RepeatingBatches(torch.tensor)},
}


def run(library, order, num_workers, folder=None, stop_after=None, batch_size=4, num_calls=1, **kwargs):
    """Return the batches of 2 epochs, up to a crash."""
    batches = []

    def see(trainer, batch, **_):
        batches.append(batch[0].clone())
        if len(batches) == stop_after:
            raise CrashError

    states = [] if folder is None else [SaveTrainingStateCallback(folder, save_every_n_steps=1, save_at_end=False)]
    trainer = make_trainer(
        torch.nn.Linear(2, 1), callbacks=[Probe(on_train_step_end=see), *states], lr=0.0, seed=kwargs.pop("seed", 0)
    )
    for _ in range(num_calls):
        with suppress(CrashError):
            trainer.train(
                Crops(library),
                2,
                per_device_batch_size=batch_size,
                train_dataloader_kwargs={**ORDERS[order](), "num_workers": num_workers},
                **kwargs,
            )
    return batches


def num_distinct(batches):
    return len({tuple(row.tolist()) for row in torch.cat(batches)})


@pytest.mark.parametrize("library", DRAW_NUMBERS)
@pytest.mark.parametrize("order", ORDERS)
def test_an_index_that_is_drawn_again_gets_new_numbers(library, order):
    assert num_distinct(run(library, order, num_workers=0)) == 64


@pytest.mark.parametrize("order", [order for order in ORDERS if order != "iterators"])  # which PyTorch cannot pickle
def test_the_numbers_do_not_depend_on_the_workers(order):
    expected = run("torch", order, num_workers=0)
    for num_workers in (1, 2):
        assert all(map(torch.equal, run("torch", order, num_workers), expected))


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("library", DRAW_NUMBERS)
def test_a_resumed_run_sees_the_same_numbers(library, num_workers, batch_size, tmp_path):
    settings = {"library": library, "order": "with replacement", "num_workers": num_workers, "batch_size": batch_size}
    complete = run(**settings)
    run(**settings, folder=tmp_path, stop_after=11)
    rest = run(**settings, folder=tmp_path, resume_from="latest")
    assert len(rest) == len(complete) - 10
    assert all(map(torch.equal, rest, complete[10:]))


@pytest.mark.parametrize("seed", [None, 7])
def test_each_call_of_train_draws_other_orders_and_numbers_and_all_are_repeatable(seed):
    def all_calls():
        torch.manual_seed(3)
        return run("torch", "with replacement", 0, num_calls=3, seed=seed)

    batches = all_calls()
    assert num_distinct(batches) == 3 * 64
    assert all(map(torch.equal, all_calls(), batches))


@pytest.mark.parametrize("generator_seed", [None, 3])
@pytest.mark.parametrize("resumed_call", [1, 2])
def test_a_resumed_call_of_train_draws_the_order_of_that_call(resumed_call, generator_seed, tmp_path):
    """Also if the user's sampler has a generator, and in a program that starts with the resumed call."""

    def orders_of(num_calls, resume_from=None, first_call=0):
        orders = []
        see = Probe(on_train_step_end=lambda trainer, batch, **_: orders.append(batch[0][:, 0].tolist()))
        trainer = make_trainer(torch.nn.Linear(1, 1), callbacks=[see], lr=0.0, seed=5)
        dataset = torch.utils.data.TensorDataset(torch.arange(12.0)[:, None], torch.zeros(12, 1))
        for call in range(first_call, num_calls):
            generator = None if generator_seed is None else torch.Generator().manual_seed(generator_seed)
            states = SaveTrainingStateCallback(tmp_path / f"{call}", save_every_n_steps=2)
            trainer.callback_handler.add_callback(states)
            loading = {"sampler": RandomSampler(dataset, generator=generator), "num_workers": 0}
            trainer.train(dataset, 1, per_device_batch_size=3, train_dataloader_kwargs=loading, resume_from=resume_from)
            trainer.callback_handler.callbacks.remove(states)
            resume_from = None
        return orders

    complete = orders_of(3)
    assert complete[:4] != complete[4:8] != complete[8:]
    state = tmp_path / f"{resumed_call}" / "step_2"
    state.rename(tmp_path / "state")
    resumed = orders_of(3, resume_from=tmp_path / "state", first_call=resumed_call)
    assert resumed == complete[4 * resumed_call + 2 :]


# --- streams -----------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, library):
        self.library = library

    def __iter__(self):
        return ((DRAW_NUMBERS[self.library](), torch.zeros(1)) for _ in range(12))


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("library", DRAW_NUMBERS)
def test_what_workers_of_a_stream_draw_is_a_function_of_seed_epoch_and_worker(library, num_workers, tmp_path):
    def batches(folder, **kwargs):
        seen = []
        callbacks = [
            Probe(on_train_step_end=lambda trainer, batch, **_: seen.append(batch[0].clone())),
            SaveTrainingStateCallback(tmp_path / folder, save_every_n_steps=1),
        ]
        trainer = make_trainer(torch.nn.Linear(2, 1), callbacks=callbacks, lr=0.0, seed=0)
        trainer.train(
            Stream(library),
            2,
            per_device_batch_size=4,
            train_dataloader_kwargs={"num_workers": num_workers},
            max_num_train_steps=100,
            **kwargs,
        )
        return seen

    complete = batches("complete")
    assert num_distinct(complete) == 24 * num_workers
    for step in (2, 3 * num_workers, 3 * num_workers + 2):
        rest = batches("other", resume_from=tmp_path / "complete" / f"step_{step}")
        assert all(map(torch.equal, rest, complete[step:])), step
        assert len(rest) == len(complete) - step


# --- the objects -------------------------------------------------------------------------------------------------


def test_a_draw_is_the_sequence_that_it_numbers_and_can_be_sent_to_a_worker():
    draw = pickle.loads(pickle.dumps(Draw(7, [4, 5])))
    assert (draw.number, list(draw), len(draw), draw[1]) == (7, [4, 5], 2, 5)
    assert number_of(draw) == (7, [4, 5])
    assert number_of([4, 5]) == ("index 4", [4, 5])
    assert number_of(4) == ("index 4", 4)


def test_an_order_is_numbered_from_zero_in_each_epoch():
    order = NumberedOrder([[3, 1], [2, 0]])
    for _ in range(2):
        assert [(draw.number, draw.what) for draw in order] == [(0, [3, 1]), (1, [2, 0])]


@pytest.mark.parametrize("num_samples", range(1, 20))
def test_ranks_number_their_draws_as_one_process_would(num_samples):
    batches = BatchSampler(range(num_samples), 3, drop_last=False)
    shards = [list(ShardedBatchSampler(NumberedOrder(batches), 3, rank)) for rank in range(3)]
    for step, draws in enumerate(zip(*shards, strict=True)):
        numbers = [getattr(draw, "number", None) for draw in draws]
        if 3 * (step + 1) * 3 <= num_samples:
            assert numbers == [3 * step, 3 * step + 1, 3 * step + 2]
        assert len(set(numbers[:num_samples])) == len(numbers) or step == len(shards[0]) - 1
