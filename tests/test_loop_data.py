"""Data of every kind: datasets, streams, loaders, iterables of batches, with and without a length."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from _support import (
    IN_ORDER,
    Batches,
    EventRecorder,
    Samples,
    SizedBatches,
    Stream,
    assert_same_weights,
    losses,
    make_dataset,
    make_trainer,
    train,
    weights_of,
)
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LimitBatchesCallback


def train_on(data, **kwargs):
    """Train, and return the weights, the numbers of batches and updates, and the trainer."""
    recorder = EventRecorder()
    trainer = make_trainer(callbacks=[recorder])
    train(trainer, data, **kwargs)
    counts = [recorder.log.count(event) for event in ("on_train_step_end", "on_optimizer_step_end")]
    return weights_of(trainer.model), counts, trainer


def reference_weights(num_epochs=1, num_steps=1):
    """Return the weights after training on a dataset of 10 samples in order."""
    trainer = make_trainer()
    train(
        trainer,
        make_dataset(10),
        num_epochs=num_epochs,
        train_dataloader_kwargs=IN_ORDER,
        gradient_accumulation_steps=num_steps,
    )
    return weights_of(trainer.model)


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize(
    "make_data",
    [
        lambda dataset: Stream(dataset),
        lambda dataset: Batches(dataset, 4),
        lambda dataset: SizedBatches(dataset, 4, 3),
        lambda dataset: DataLoader(dataset, batch_size=4),
        lambda dataset: DataLoader(Stream(dataset), batch_size=4),
    ],
    ids=["iterable dataset", "iterable of batches", "sized iterable of batches", "loader", "loader of a stream"],
)
def test_training_data_of_every_kind_gives_the_weights_of_a_dataset(make_data, num_steps):
    data = make_data(make_dataset(10))
    weights, counts, _ = train_on(data, num_epochs=2, gradient_accumulation_steps=num_steps)
    assert counts == [6, 6 if num_steps == 1 else 4]
    expected = reference_weights(num_epochs=2, num_steps=num_steps)
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-6)


def test_a_generator_trains_for_one_epoch():
    dataset = make_dataset(10)
    weights, counts, trainer = train_on(dataset[start : start + 4] for start in (0, 4, 8))
    assert counts == [3, 3]
    assert_same_weights(weights, reference_weights())
    assert trainer.run_config.num_update_steps_per_epoch is None


def test_a_generator_is_refused_for_more_than_one_epoch():
    dataset = make_dataset(10)
    with pytest.raises(ValueError, match=r"is an iterator \(generator\).* an object of a class whose"):
        train_on((dataset[start : start + 4] for start in (0, 4, 8)), num_epochs=2)


def test_create_train_dataloader_may_return_a_list_of_batches():
    dataset = make_dataset(10)

    class Listed(Trainer):
        def create_train_dataloader(self, batch_size, train_dl_kwargs=None):
            return [dataset[start : start + 4] for start in (0, 4, 8)]

    trainer = make_trainer(cls=Listed)
    trainer.train(None, num_epochs=1)
    assert_same_weights(weights_of(trainer.model), reference_weights())


def test_max_num_train_steps_ends_training_on_endless_data():
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield from make_dataset(4)

    recorder = EventRecorder()
    trainer = make_trainer(callbacks=[recorder])
    train(trainer, Endless(), num_epochs=1, max_num_train_steps=7)
    assert recorder.log.count("on_optimizer_step_end") == 7
    assert trainer.run_config.num_update_steps_per_epoch is None
    assert trainer.run_config.max_num_train_steps == 7
    assert trainer.stop_reason == "7 updates are done (`max_num_train_steps`)"


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("length", [3, 5, 10, 17, 40])
@pytest.mark.filterwarnings("ignore:Length of IterableDataset:UserWarning")  # about the wrong length
def test_an_iterable_dataset_may_report_a_wrong_length(length, num_steps):
    """It has ten samples, in three batches."""

    class Estimated(Stream):
        def __len__(self):
            return length

    weights, counts, _ = train_on(Estimated(make_dataset(10)), gradient_accumulation_steps=num_steps)
    assert counts == [3, 3 if num_steps == 1 else 2]
    expected = reference_weights(num_steps=num_steps)
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-6)


def test_evaluation_data_of_every_kind_gives_the_same_loss():
    dataset = make_dataset(10)
    trainer = make_trainer()
    kinds = {
        "stream": Stream(dataset),
        "batches": Batches(dataset, 4),
        "loader": DataLoader(dataset, batch_size=4),
        "samples": Samples(dataset),
        "list": [dataset[index] for index in range(10)],
    }
    for data in kinds.values():
        trainer.evaluate(data, per_device_batch_size=4)
    assert losses(trainer, "evaluation_loss") == [pytest.approx(losses(trainer, "evaluation_loss")[0])] * len(kinds)


def test_limit_batches_callback_limits_training_epochs_and_evaluations():
    recorder = EventRecorder()
    trainer = make_trainer(callbacks=[LimitBatchesCallback(3), recorder])
    train(trainer, num_epochs=2, eval_dataset=make_dataset(32), gradient_accumulation_steps=2)
    assert recorder.log.count("on_train_step_end") == 6
    assert recorder.log.count("on_optimizer_step_end") == 4
    assert recorder.log.count("on_eval_step_end") == 6
