"""The loaders that a trainer creates: batches sliced from memory, loader arguments, seeds, workers."""

from __future__ import annotations

import multiprocessing
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from _support import (
    EventRecorder,
    Probe,
    Samples,
    Stream,
    make_dataset,
    make_indexed_dataset,
    make_model,
    make_trainer,
    recorder_of,
    train,
)
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LimitBatchesCallback
from pytorch_accelerated.trainer import LIMIT_BATCHES_ENV_VAR
from pytorch_accelerated.utils import LimitBatches


def batches_of_run(dataset, dl_kwargs=None, seed=9, evaluate=False, cls=Trainer):
    """Train and evaluate for two epochs; return the batches of all training steps, or of all evaluation steps."""
    seen = []
    event = "on_eval_step_start" if evaluate else "on_train_step_start"
    probe = Probe(**{event: lambda trainer, batch, **kwargs: seen.append(batch)})
    trainer = make_trainer(callbacks=[probe], lr=0.0, seed=seed, cls=cls)
    train(
        trainer,
        dataset,
        num_epochs=2,
        eval_dataset=dataset,
        train_dataloader_kwargs=dl_kwargs,
        eval_dataloader_kwargs=dl_kwargs,
    )
    return seen


# --- batches sliced from memory ----------------------------------------------------------------------------------


class PlainTrainer(Trainer):
    """Creates plain loaders, which collate batches from samples."""

    def create_train_dataloader(self, batch_size, train_dl_kwargs=None):
        kwargs = {"batch_size": batch_size, "shuffle": True, **(train_dl_kwargs or {})}
        return DataLoader(Samples(self.train_dataset), **kwargs)

    def create_eval_dataloader(self, batch_size, eval_dl_kwargs=None):
        return DataLoader(Samples(self.eval_dataset), **{"batch_size": batch_size, **(eval_dl_kwargs or {})})


TENSORS = TensorDataset(
    make_dataset(22).tensors[0], make_dataset(22).tensors[1], torch.arange(22), torch.arange(22) % 2 == 0
)
SLICEABLE = {
    "tensors": TENSORS,
    "subset": Subset(TENSORS, [3, 1, 4, 15, 9, 2, 6, 5, 3, 0, -1]),
    "nested subset": Subset(Subset(TENSORS, range(1, 20, 2)), [9, 0, 3, 3, 7]),
    "subset by tensor": Subset(TENSORS, torch.tensor([5, 4, 3, 2, 1])),
    "subset by array": Subset(TENSORS, np.arange(7)),
}


@pytest.mark.filterwarnings("ignore:The batch has 4 items")  # more kinds of tensors than the step uses
@pytest.mark.parametrize("evaluate", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("dl_kwargs", [{}, {"drop_last": True}, {"batch_size": 3}], ids=str)
@pytest.mark.parametrize("name", SLICEABLE)
def test_batches_sliced_from_memory_equal_those_of_a_plain_loader_in_the_same_order(name, dl_kwargs, evaluate):
    sliced = batches_of_run(SLICEABLE[name], dl_kwargs, evaluate=evaluate)
    plain = batches_of_run(SLICEABLE[name], dl_kwargs, evaluate=evaluate, cls=PlainTrainer)
    assert len(sliced) == len(plain)
    for one, other in zip(sliced, plain, strict=True):
        assert type(one) is type(other)
        assert len(one) == len(other) == 4
        for left, right in zip(one, other, strict=True):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)


def slices_batches(trainer):
    inner_loader = getattr(trainer.train_dataloader, "base_dataloader", trainer.train_dataloader)
    return type(inner_loader.dataset).__name__ == "WholeBatchDataset"


def test_batches_of_an_in_memory_dataset_are_sliced_by_default():
    probe, values = recorder_of(slices_batches, "on_training_run_start")
    train(make_trainer(callbacks=[probe]))
    assert values == [True]


def test_batches_of_streams_and_lists_are_not_sliced():
    for data in (Stream(make_dataset(8)), [make_dataset(8)[index] for index in range(8)]):
        probe, values = recorder_of(slices_batches, "on_training_run_start")
        train(make_trainer(callbacks=[probe]), data)
        assert values == [False]


INDEXED = make_indexed_dataset(8)


def collate(samples):
    return torch.utils.data.default_collate(samples)


@pytest.mark.parametrize(
    ("dl_kwargs", "collate_fn", "is_sliced", "expected"),
    [
        ({"sampler": [3, 1, 2, 0]}, None, False, [[3, 1, 2, 0]]),
        ({"batch_sampler": [[7, 0], [1, 1, 1]]}, None, False, [[7, 0], [1, 1, 1]]),
        ({"shuffle": False}, collate, False, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ({"shuffle": False, "collate_fn": collate}, None, False, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ({"shuffle": False}, torch.utils.data.default_collate, True, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (
            {"batch_sampler": BatchSampler(SequentialSampler(INDEXED), 3, drop_last=True)},
            None,
            True,
            [[0, 1, 2], [3, 4, 5]],
        ),
    ],
    ids=["sampler", "batch_sampler", "collate_fn", "collate_fn in kwargs", "PyTorch's collation", "PyTorch's sampler"],
)
def test_samplers_and_collate_functions_are_used_and_batches_sliced_only_if_they_are_pytorchs(
    dl_kwargs, collate_fn, is_sliced, expected
):
    probe, values = recorder_of(slices_batches, "on_training_run_start")
    seen = []
    recorder = Probe(on_train_step_start=lambda trainer, batch, **k: seen.append(batch[0].flatten().int().tolist()))
    trainer = make_trainer(make_model(1), callbacks=[probe, recorder])
    train(trainer, INDEXED, train_dataloader_kwargs=dl_kwargs, collate_fn=collate_fn)
    assert values == [is_sliced]
    assert seen == expected


# --- arguments of the loader -------------------------------------------------------------------------------------


def test_a_collate_function_gets_samples_and_serves_both_loaders():
    def collate(samples):
        sizes.append(len(samples))
        return torch.utils.data.default_collate(samples)

    sizes = []
    train(make_trainer(), make_dataset(6), eval_dataset=make_dataset(3), collate_fn=collate)
    assert sizes == [4, 2, 3]


INDEXED_3 = TensorDataset(torch.arange(24.0).reshape(8, 3), torch.zeros(8, 1))


def test_a_sampler_of_none_is_ignored():
    none = {"sampler": None, "batch_sampler": None}
    plain, with_none = batches_of_run(INDEXED_3), batches_of_run(INDEXED_3, none)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(plain, with_none, strict=True))


def test_dataloader_kwargs_override_the_arguments_of_train_and_appear_in_the_run_config():
    trainer = make_trainer()
    sizes = []
    probe = Probe(
        on_train_step_end=lambda trainer, batch_output, **kwargs: sizes.append(batch_output["batch_size"]),
        on_eval_step_end=lambda trainer, batch_output, **kwargs: sizes.append(batch_output["batch_size"]),
    )
    trainer.callback_handler.add_callback(probe)
    given = {"batch_size": 3, "drop_last": True, "num_workers": 0}
    evaluated = {"batch_size": 6}
    train(
        trainer,
        eval_dataset=make_dataset(10),
        train_dataloader_kwargs=given,
        eval_dataloader_kwargs=evaluated,
        gradient_accumulation_steps=2,
    )
    assert sizes == [3, 3, 3, 3, 3, 6, 4]
    assert given == {"batch_size": 3, "drop_last": True, "num_workers": 0}
    config = trainer.run_config
    assert (config.train_per_device_batch_size, config.eval_per_device_batch_size) == (3, 6)
    assert (config.train_total_batch_size, config.eval_total_batch_size) == (6, 6)
    assert config.train_dl_kwargs["drop_last"] is True
    assert config.train_dl_kwargs["shuffle"] is True
    assert config.eval_dl_kwargs["shuffle"] is False


@pytest.mark.filterwarnings("ignore:`per_device_batch_size` has no effect")
def test_the_run_config_has_the_batch_size_of_a_loader_passed_as_dataset():
    trainer = make_trainer()
    train(trainer, DataLoader(make_dataset(12), batch_size=6), gradient_accumulation_steps=2)
    assert trainer.run_config.num_update_steps_per_epoch == 1
    assert trainer.run_config.train_per_device_batch_size == 6
    assert trainer.run_config.train_total_batch_size == 12


def test_limit_batches_limits_the_trainers_created_under_it(monkeypatch):
    monkeypatch.delenv(LIMIT_BATCHES_ENV_VAR, raising=False)
    recorder = EventRecorder()
    with LimitBatches(2):
        trainer = make_trainer(callbacks=[recorder])
    assert isinstance(trainer.callback_handler.callbacks[0], LimitBatchesCallback)
    train(trainer)
    assert recorder.log.count("on_train_step_end") == 2
    assert len(make_trainer(callbacks=[recorder]).callback_handler.callbacks) == 1


# --- seeds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make_sampler",
    [
        lambda dataset: SubsetRandomSampler(range(8)),
        lambda dataset: WeightedRandomSampler([1.0] * 8, 8),
    ],
    ids=["subset", "weighted"],
)
def test_the_shuffling_samplers_of_pytorch_follow_the_seed_of_the_run(make_sampler):
    orders = []
    for seed in (1, 1, 2):
        batches = batches_of_run(INDEXED_3, {"sampler": make_sampler(INDEXED_3)}, seed=seed)
        orders.append([batch[0][:, 0].tolist() for batch in batches])
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0][:2] != orders[0][2:]


def test_a_generator_of_the_user_keeps_its_seed():
    orders = []
    for seed in (1, 2):
        kwargs = {"generator": torch.Generator().manual_seed(5)}
        batches = batches_of_run(INDEXED_3, kwargs, seed=seed)
        orders.append([batch[0][:, 0].tolist() for batch in batches])
    assert orders[0] == orders[1]


# --- workers -----------------------------------------------------------------------------------------------------


class Augmented(Dataset):
    """Draws from all three global generators, as random augmentation does."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        noise = torch.tensor([torch.rand(1).item(), np.random.rand(), random.random()])
        return noise, torch.zeros(1)


@pytest.mark.parametrize("kwargs", [{"persistent_workers": False}, {"persistent_workers": True}], ids=str)
def test_random_augmentation_in_workers_is_reproducible_and_differs_between_epochs(kwargs):
    kwargs = {"num_workers": 1, **kwargs}
    runs = [[batch[0] for batch in batches_of_run(Augmented(), kwargs, seed=seed)] for seed in (1, 1, 2)]
    for one, other in zip(runs[0], runs[1], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(runs[0][0], runs[2][0])
    assert not torch.equal(torch.cat(runs[0][:2]), torch.cat(runs[0][2:]))


@pytest.mark.parametrize("is_failing", [False, True])
@pytest.mark.parametrize("is_persistent", [False, True])
def test_no_worker_outlives_its_run(is_failing, is_persistent):
    """Even if the program keeps the trainer, or the error, as a notebook does."""
    seen = []

    def look(trainer, **_):
        seen.append(len(multiprocessing.active_children()))
        if is_failing:
            raise LookupError("of a callback")

    trainer = make_trainer(callbacks=[Probe(on_eval_step_end=look)])
    kwargs = {"num_workers": 2, "persistent_workers": is_persistent}
    dl_kwargs = {"train_dataloader_kwargs": kwargs, "eval_dataloader_kwargs": kwargs}
    with pytest.raises(LookupError) if is_failing else nullcontext() as kept:
        train(trainer, eval_dataset=make_dataset(8), num_epochs=2, **dl_kwargs)
    assert seen[0] == (4 if is_persistent else 2)
    assert multiprocessing.active_children() == []
    assert len(list(trainer.train_dataloader)) == len(trainer.train_dataloader)
    del kept
