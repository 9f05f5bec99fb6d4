"""The user's loaders are used as they are: their own iteration, their lengths, their errors; and ready batches."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset

from _support import Probe, Samples, make_dataset, make_indexed_dataset, make_trainer
from pytorch_accelerated import Trainer
from pytorch_accelerated._data.loaders import has_own_iteration, reliable_num_batches_of
from pytorch_accelerated.callbacks import SaveTrainingStateCallback

NUM_SAMPLES = 24


def batches_seen(data, num_epochs=2, evaluated=False, resume_from=None, folder=None, **kwargs):
    """Return the indices of the samples in each batch."""
    seen = []

    def see(trainer, batch, **_):
        seen.append(batch[0][:, 0].int().tolist())

    states = [] if folder is None else [SaveTrainingStateCallback(folder, save_every_n_steps=1)]
    event = "on_eval_step_end" if evaluated else "on_train_step_end"
    trainer = make_trainer(nn.Linear(1, 1), callbacks=[Probe(**{event: see}), *states], lr=0.0, seed=1)
    train_data = make_indexed_dataset(4) if evaluated else data
    kwargs = {"per_device_batch_size": 4, "eval_dataset": data if evaluated else None, **kwargs}
    trainer.train(train_data, num_epochs, resume_from=resume_from, **kwargs)
    return seen


# --- subclasses of DataLoader with their own iteration -----------------------------------------------------------


class Short(DataLoader):
    """Yields two batches."""

    def __iter__(self):
        return itertools.islice(super().__iter__(), 2)

    def __len__(self):
        return 2


class WrongLength(DataLoader):
    """Reports too many batches."""

    def __len__(self):
        return 2 * super().__len__()


class Negating(DataLoader):
    """Changes each batch."""

    def __iter__(self):
        for inputs, targets in super().__iter__():
            yield -inputs, targets


class Lasting(DataLoader):
    """Takes the batches of all epochs from one iterator that never ends, to keep its workers alive."""

    def __init__(self, dataset, **kwargs):
        super().__init__(dataset, batch_sampler=Repeating(len(dataset)), **kwargs)
        self.batches = None

    def __len__(self):
        return NUM_SAMPLES // 4

    def __iter__(self):
        if self.batches is None:
            self.batches = super().__iter__()
        return itertools.islice(self.batches, len(self))


class Repeating:
    def __init__(self, num_samples):
        self.num_samples = num_samples

    def __iter__(self):
        while True:
            yield from BatchSampler(range(self.num_samples), 4, drop_last=False)


def create(cls, num_workers=0, **kwargs):
    dataset = Samples(make_indexed_dataset(NUM_SAMPLES))
    settings = {} if cls is Lasting else {"batch_size": 4, **kwargs}
    return cls(dataset, num_workers=num_workers, **settings)


def by_hand(cls, num_epochs=2):
    loader = create(cls)
    return [batch[0][:, 0].int().tolist() for _ in range(num_epochs) for batch in loader]


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cls", [Short, WrongLength, Negating, Lasting])
def test_a_subclass_yields_in_a_run_what_it_yields_by_hand(cls, num_workers, evaluated):
    assert batches_seen(create(cls, num_workers), evaluated=evaluated) == by_hand(cls)


@pytest.mark.parametrize("cls", [Short, Negating, Lasting])
def test_a_subclass_that_a_hook_creates_is_kept_too(cls):
    seen = []

    class Creating(Trainer):
        def create_train_dataloader(self, batch_size, train_dl_kwargs=None):
            return create(cls)

    probe = Probe(on_train_step_end=lambda trainer, batch, **_: seen.append(batch[0][:, 0].int().tolist()))
    make_trainer(nn.Linear(1, 1), cls=Creating, callbacks=[probe]).train(make_indexed_dataset(4), 2)
    assert seen == by_hand(cls)


def test_predictions_use_the_iteration_of_a_subclass():
    outputs = make_trainer(nn.Linear(1, 1)).predict(create(Short))
    assert len(outputs) == 8


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_shuffling_subclass_is_resumed_within_an_epoch(step, tmp_path):
    complete = batches_seen(create(Negating, shuffle=True), folder=tmp_path)
    assert complete[:6] != complete[6:]
    rest = batches_seen(create(Negating, shuffle=True), resume_from=tmp_path / f"step_{step}")
    assert rest == complete[step:]


def test_a_subclass_with_the_iteration_of_pytorch_is_rebuilt_as_any_loader():
    class Configured(DataLoader):
        def __init__(self, dataset):
            super().__init__(dataset, batch_size=4)

    assert not has_own_iteration(Configured(make_indexed_dataset(8)))
    assert not has_own_iteration(DataLoader(make_indexed_dataset(8)))
    assert has_own_iteration(create(Short))
    assert len(batches_seen(Configured(make_indexed_dataset(8)))) == 4


# --- lengths -----------------------------------------------------------------------------------------------------


class Estimating:
    """A batch sampler whose length is an estimate."""

    def __init__(self, length, num_batches=6):
        self.length, self.num_batches = length, num_batches

    def __iter__(self):
        return (list(range(4 * number, 4 * number + 4)) for number in range(self.num_batches))

    def __len__(self):
        return self.length


class Growing(Estimating):
    """Yields one batch more in each epoch, and always reports the same length."""

    def __iter__(self):
        self.num_batches += 1
        return super().__iter__()


class Unsized(Estimating):
    __len__ = None


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("length", [1, 5, 6, 7, 9])
def test_an_epoch_and_its_last_window_end_where_the_batches_end(length, accumulation, num_workers):
    """Compare with a hand-written loop over the samples of each window."""
    dataset = make_dataset(NUM_SAMPLES)
    trainer = make_trainer()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`gradient_accumulation_steps` is")
        trainer.train(
            Samples(dataset),
            2,
            gradient_accumulation_steps=accumulation,
            train_dataloader_kwargs={"batch_sampler": Estimating(length), "num_workers": num_workers},
        )
    by_hand = make_trainer()
    for _ in range(2):
        for start in range(0, NUM_SAMPLES, 4 * accumulation):
            inputs, targets = dataset[start : min(start + 4 * accumulation, NUM_SAMPLES)]
            by_hand.optimizer.zero_grad()
            nn.functional.mse_loss(by_hand.model(inputs), targets).backward()
            by_hand.optimizer.step()
    torch.testing.assert_close(trainer.model.weight, by_hand.model.weight)
    assert trainer.progress.num_updates == 2 * -(-6 // accumulation)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("batch_sampler", [Growing(6, num_batches=2), Unsized(0)])
def test_a_length_may_change_or_be_missing(batch_sampler):
    num_batches = [3, 4] if isinstance(batch_sampler, Growing) else [6, 6]
    loading = {"batch_sampler": batch_sampler, "num_workers": 0}
    data = make_indexed_dataset(NUM_SAMPLES)
    assert len(batches_seen(data, train_dataloader_kwargs=loading)) == sum(num_batches)


def test_the_length_is_certain_only_if_pytorchs_own_samplers_report_it():
    dataset = make_indexed_dataset(8)
    own = DataLoader(dataset, batch_size=4, shuffle=True)
    assert reliable_num_batches_of(own) == 2
    assert (
        reliable_num_batches_of(DataLoader(dataset, batch_sampler=BatchSampler(SequentialSampler(dataset), 4, False)))
        == 2
    )
    assert reliable_num_batches_of(DataLoader(dataset, sampler=[3, 1])) == 2
    for kwargs in ({"batch_sampler": Estimating(2)}, {"sampler": type("S", (), {"__iter__": None, "__len__": None})()}):
        assert reliable_num_batches_of(DataLoader(dataset, **kwargs)) is None


# --- what goes wrong while loading -------------------------------------------------------------------------------


class Failing(Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, index):
        if index == 9:
            raise self.error
        return torch.ones(1), torch.zeros(1)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_stop_iteration_in_the_dataset_is_an_error_and_no_short_epoch(evaluated, num_workers):
    loading = {f"{'eval' if evaluated else 'train'}_dataloader_kwargs": {"num_workers": num_workers, "shuffle": False}}
    with pytest.raises(RuntimeError, match="raised `StopIteration`"):
        batches_seen(Failing(StopIteration()), evaluated=evaluated, **loading)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "error",
    [EOFError("file 9 ended too early"), ConnectionResetError(104, "server 9"), OSError("disk 9"), KeyError("9")],
)
def test_an_error_of_the_dataset_arrives_as_it_is(error, num_workers):
    with pytest.raises(type(error), match="9") as caught:
        batches_seen(Failing(error), train_dataloader_kwargs={"num_workers": num_workers, "shuffle": False})
    assert "killed" not in str(caught.value)


# --- ready batches -----------------------------------------------------------------------------------------------


READY = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(8)]


class Plain:
    def __iter__(self):
        return iter(READY)


class Stream(Plain, IterableDataset):
    pass


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize(
    ("data", "kwargs"),
    [(Plain(), {}), (Stream(), {"batch_size": None}), (READY, {"batch_size": None, "num_workers": 0})],
)
def test_ready_batches_are_used_as_they_are(data, kwargs, evaluated):
    shapes = []
    see = Probe(
        **{f"on_{'eval' if evaluated else 'train'}_step_end": lambda t, batch, **_: shapes.append(batch[0].shape)}
    )
    trainer = make_trainer(callbacks=[see])
    other = {"train_dataset": make_dataset(4), "eval_dataset": data, "eval_dataloader_kwargs": kwargs}
    trainer.train(**(other if evaluated else {"train_dataset": data, "train_dataloader_kwargs": kwargs}), num_epochs=2)
    assert shapes == [(4, 3)] * 16


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("kind", [list, tuple, "dictionaries"])
def test_a_list_of_ready_batches_is_told_of(kind, evaluated):
    data = [{"x": x, "y": y} for x, y in READY] if kind == "dictionaries" else kind(READY)

    class TakesAny(Trainer):
        def calculate_train_batch_loss(self, batch):
            return {"loss": self.model.weight.sum(), "batch_size": 4}

        calculate_eval_batch_loss = calculate_train_batch_loss

    name = "eval_dataset" if evaluated else "train_dataset"
    trainer = make_trainer(cls=TakesAny)
    with pytest.warns(UserWarning, match=f"The items of `{name}`.* look like ready batches of 4 samples"):
        trainer.train(make_dataset(4) if evaluated else data, 1, eval_dataset=data if evaluated else None)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "sample",
    [
        (torch.ones(3), torch.ones(1)),
        (torch.ones(3), torch.tensor(1.0)),
        (torch.ones(1), torch.ones(1)),
        (np.ones(3, dtype=np.float32), np.ones(1, dtype=np.float32)),
        (torch.ones(3), 1.0),
    ],
    ids=str,
)
def test_a_list_of_samples_is_not_warned_about(sample):
    class TakesAny(Trainer):
        def calculate_train_batch_loss(self, batch):
            return {"loss": self.model.weight.sum(), "batch_size": 4}

    make_trainer(cls=TakesAny).train([sample] * 8, 1)


@pytest.mark.parametrize("as_data", [list, TensorDataset])
def test_the_error_for_an_iterator_names_something_that_works(as_data):
    with pytest.raises(ValueError, match=r"Pass an object of a class whose `__iter__` starts over"):
        make_trainer().train((batch for batch in READY), 2)
