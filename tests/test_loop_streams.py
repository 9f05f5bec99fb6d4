"""Iterable datasets in a run: what they draw, their place after a resume, and what their code sees in workers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from _support import Probe, make_trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

NUM_SAMPLES, BATCH_SIZE = 15, 4
DRAWS = {
    "torch": lambda: torch.rand(()).item(),
    "numpy": np.random.rand,
    "random": random.random,
}
WORKERS = [(0, False), (1, False), (2, False), (2, True)]
"""The number of workers, and whether they persist."""


class StopError(Exception):
    """Ends a run, as a crash would."""


class Drawing(IterableDataset):
    """Yields its samples in an order that it draws; the second number of a sample is drawn too."""

    def __init__(self, library):
        self.library = library

    def __iter__(self):
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        numbers = list(range(first, NUM_SAMPLES, step))
        numbers.sort(key=lambda _: DRAWS[self.library]())
        for number in numbers:
            yield torch.tensor([number, DRAWS[self.library]()], dtype=torch.float64), torch.zeros(1)


class Remembering(IterableDataset):
    """The same in order, with a state."""

    def __init__(self, library):
        self.library, self.next = library, 0

    def __iter__(self):
        for number in range(self.next, NUM_SAMPLES):
            self.next = number + 1
            yield torch.tensor([number, DRAWS[self.library]()], dtype=torch.float64), torch.zeros(1)
        self.next = 0

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def add_noise(samples):
    """A collation that draws."""
    inputs, targets = default_collate(samples)
    return torch.cat([inputs, torch.rand(len(inputs), 1)], dim=1), targets


class Noisy(nn.Module):
    """A model that draws from all generators."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.drawn = []

    def forward(self, inputs):
        self.drawn.append([draw() for draw in DRAWS.values()])
        return inputs.sum(1, keepdim=True).float() * self.weight


def run(data, num_workers=0, persistent=False, folder=None, stop_after=None, seed=3, draws=0, calls=1, **kwargs):
    """Return the batches of two epochs, and what the model drew."""
    seen, model = [], Noisy()

    def see(trainer, batch, **_):
        seen.append(batch[0].tolist())
        if len(seen) == stop_after:
            raise StopError

    states = [] if folder is None else [SaveTrainingStateCallback(folder, save_every_n_steps=1, save_at_end=False)]
    trainer = make_trainer(model, callbacks=[Probe(on_train_step_end=see), *states], lr=0.0, seed=seed)
    for generator in (np.random.seed, random.seed):
        generator(draws)
    settings = {"num_workers": num_workers, **({"persistent_workers": True} if persistent else {})}
    for _ in range(calls):
        trainer.train(data, 2, per_device_batch_size=BATCH_SIZE, train_dataloader_kwargs=settings, **kwargs)
    return seen, model.drawn


@pytest.mark.parametrize("library", DRAWS)
@pytest.mark.parametrize(("num_workers", "persistent"), WORKERS)
def test_what_a_stream_draws_is_a_function_of_seed_epoch_and_place(library, num_workers, persistent):
    loading = {"num_workers": num_workers, "persistent": persistent, "collate_fn": add_noise}
    first, _ = run(Drawing(library), **loading)
    again, _ = run(Drawing(library), draws=1, **loading)
    assert again == first
    rows = [row for batch in first for row in batch]
    assert sorted(row[0] for row in rows) == sorted([*range(NUM_SAMPLES)] * 2)
    for column in (1, 2):
        assert len({row[column] for row in rows}) == 2 * NUM_SAMPLES, "some draws are equal"
    assert [row[0] for row in rows[:NUM_SAMPLES]] != [row[0] for row in rows[NUM_SAMPLES:]]
    other, _ = run(Drawing(library), seed=4, **loading)
    assert not {row[1] for batch in other for row in batch} & {row[1] for row in rows}


def test_workers_that_persist_draw_what_new_ones_draw():
    assert run(Drawing("torch"), 2, persistent=True)[0] == run(Drawing("torch"), 2)[0]


def test_each_call_of_train_draws_other_numbers_repeatably():
    seen, _ = run(Drawing("torch"), calls=3)
    draws = [row[1] for batch in seen for row in batch]
    assert len(set(draws)) == len(draws) == 6 * NUM_SAMPLES
    assert run(Drawing("torch"), calls=3)[0] == seen


@pytest.mark.parametrize("library", DRAWS)
def test_reading_a_stream_leaves_the_generators_to_the_model(library):
    class Quiet(IterableDataset):
        def __iter__(self):
            return iter([(torch.ones(2), torch.zeros(1))] * NUM_SAMPLES)

    torch.manual_seed(0)
    assert run(Drawing(library))[1] == run(Quiet())[1]


@pytest.mark.parametrize(("num_workers", "persistent"), WORKERS)
@pytest.mark.parametrize("stop_after", [2, 4, 6])
def test_a_stream_that_draws_is_resumed_exactly(num_workers, persistent, stop_after, tmp_path):
    loading = {"num_workers": num_workers, "persistent": persistent, "collate_fn": add_noise}
    complete, drawn = run(Drawing("torch"), **loading)
    with pytest.raises(StopError):
        run(Drawing("torch"), folder=tmp_path, stop_after=stop_after, **loading)
    rest, drawn_in_rest = run(Drawing("torch"), folder=tmp_path, resume_from="latest", draws=1, **loading)
    assert rest == complete[stop_after - 1 :]  # the newest state is that of the step before
    assert drawn_in_rest == drawn[stop_after - 1 :]


@pytest.mark.parametrize("library", DRAWS)
@pytest.mark.parametrize("stop_after", [2, 3, 4, 5, 6])
def test_a_stream_with_a_state_that_draws_continues_exactly(library, stop_after, tmp_path):
    complete, drawn = run(Remembering(library), collate_fn=add_noise)
    with pytest.raises(StopError):
        run(Remembering(library), folder=tmp_path, stop_after=stop_after, collate_fn=add_noise)
    rest, drawn_in_rest = run(
        Remembering(library), folder=tmp_path, resume_from="latest", draws=1, collate_fn=add_noise
    )
    assert rest == complete[stop_after - 1 :]
    assert drawn_in_rest == drawn[stop_after - 1 :]


# --- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "settings", [{"batch_size": 4}, {"batch_size": 4, "drop_last": True}, {"batch_size": None}, {"batch_size": 20}]
)
def test_the_batches_of_a_stream_are_those_of_a_plain_loader(settings, num_workers):
    class Sized(IterableDataset):
        def __len__(self):
            return NUM_SAMPLES

        def __iter__(self):
            worker = get_worker_info()
            first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
            return ((torch.full((3, 2), float(n)), torch.zeros(3, 1)) for n in range(first, NUM_SAMPLES, step))

    seen, configs = [], []

    def see(trainer, batch, **_):
        seen.append([tensor.tolist() for tensor in batch])
        configs.append((trainer.run_config.train_per_device_batch_size, len(trainer.train_dataloader)))

    class Any(type(make_trainer())):
        def calculate_train_batch_loss(self, batch):
            return {"loss": self.model.weight.sum(), "batch_size": len(batch[0])}

    loader = DataLoader(Sized(), num_workers=num_workers, **settings)
    make_trainer(cls=Any, callbacks=[Probe(on_train_step_end=see)], lr=0.0).train(loader, 1)
    plain = DataLoader(Sized(), num_workers=num_workers, **settings)
    assert seen == [[tensor.tolist() for tensor in batch] for batch in plain]
    assert set(configs) == {(settings["batch_size"] or 8, len(plain))}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stop_iteration_of_the_collate_function_does_not_end_the_epoch(num_workers):
    def collate(samples):
        return next(iter(())) if any(sample[0][0] == 13 for sample in samples) else default_collate(samples)

    with pytest.raises(RuntimeError, match="The Drawing, or its collate function, raised `StopIteration`"):
        run(Drawing("torch"), num_workers, collate_fn=collate)


def test_an_iterator_that_stops_ends_a_stream():
    class Counting(IterableDataset):
        def __iter__(self):
            self.num_left = 8
            return self

        def __next__(self):
            if self.num_left == 0:
                raise StopIteration
            self.num_left -= 1
            return torch.ones(2), torch.zeros(1)

    assert len(run(Counting())[0]) == 4


def test_code_in_a_worker_finds_the_users_dataset():
    class Looking(IterableDataset):
        def __iter__(self):
            worker = get_worker_info()
            assert type(worker.dataset) is type(self)
            yield from [(torch.ones(2), torch.zeros(1))] * 4

    assert len(run(Looking(), 1)[0]) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_pipes_are_left_to_pytorch(num_workers):
    """It divides them among the workers."""
    pipes = pytest.importorskip("torch.utils.data.datapipes.iter")
    samples = [(torch.full((2,), float(number)), torch.zeros(1)) for number in range(8)]
    pipe = pipes.IterableWrapper(samples).sharding_filter()
    seen, _ = run(pipe, num_workers)
    assert sorted(row[0] for batch in seen for row in batch) == sorted([*range(8)] * 2)
