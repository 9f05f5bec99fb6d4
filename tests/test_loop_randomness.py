"""What the seed of a run determines, and what must not influence it."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from _support import Probe, Samples, assert_same_weights, losses, make_dataset, make_trainer, mse, train, weights_of
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, StepBasedEvaluationCallback


def test_the_same_seed_gives_a_bit_identical_run():
    results = []
    for _ in range(2):
        torch.manual_seed(11)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        trainer = make_trainer(model)
        train(trainer, num_epochs=3, eval_dataset=make_dataset(8))
        results.append((weights_of(model), losses(trainer), losses(trainer, "eval_loss_epoch")))
    assert_same_weights(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


def test_the_seed_of_the_trainer_gives_a_bit_identical_run_whatever_the_global_seed():
    results = []
    for number in range(2):
        torch.manual_seed(number)
        trainer = Trainer(None, mse, None, callbacks=(), seed=5)
        trainer.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
        train(trainer, num_epochs=2)
        results.append(weights_of(trainer.model))
    assert_same_weights(*results)


# --- the data order ----------------------------------------------------------------------------------------------


def data_order(num_epochs=2, dataset=16, trainer_seed=None, dl_kwargs=None):
    """Train, and return the inputs of each batch, in order."""
    seen = []
    probe = Probe(on_train_step_start=lambda trainer, batch, **kwargs: seen.append(batch[0].flatten().tolist()))
    trainer = make_trainer(callbacks=[probe], lr=0.0, seed=trainer_seed)
    train(trainer, dataset, num_epochs=num_epochs, train_dataloader_kwargs=dl_kwargs)
    return seen


def test_the_data_order_follows_the_seed_and_differs_between_epochs():
    torch.manual_seed(1)
    one = data_order()
    torch.manual_seed(2)
    other = data_order()
    torch.manual_seed(1)
    assert data_order() == one
    assert one != other
    assert one[:4] != one[4:]
    assert sorted(chain(*one[:4])) == sorted(chain(*one[4:]))


def test_the_data_order_does_not_depend_on_earlier_random_draws():
    torch.manual_seed(1)
    one = data_order()
    torch.manual_seed(1)
    torch.rand(100)
    assert data_order() == one


def test_the_seed_of_the_trainer_determines_the_data_order():
    assert data_order(trainer_seed=3) == data_order(trainer_seed=3)
    assert data_order(trainer_seed=3) != data_order(trainer_seed=4)


@pytest.mark.parametrize("kind", ["loader", "sampler"])
def test_the_data_order_does_not_depend_on_earlier_use_of_the_loader(kind):
    dataset = make_dataset(16)
    if kind == "loader":
        kwargs = {"dataset": DataLoader(dataset, batch_size=4, shuffle=True)}
    else:
        kwargs = {"dataset": dataset, "dl_kwargs": {"sampler": RandomSampler(dataset)}}
    first = data_order(num_epochs=2, **kwargs)
    assert data_order(num_epochs=2, **kwargs) == first


# --- the global generators ---------------------------------------------------------------------------------------


def test_loading_the_data_draws_nothing_from_the_global_generator():
    trainer = make_trainer()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    train(trainer, num_epochs=2, eval_dataset=make_dataset(8))
    assert torch.equal(torch.rand(4), expected)


def train_with_dropout(eval_dataset=None, callbacks=(), **kwargs):
    """Train a model with dropout, whose evaluation steps draw random numbers, and return the weights."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    class Drawing(Trainer):
        def calculate_eval_batch_loss(self, batch):
            torch.rand(3)
            return super().calculate_eval_batch_loss(batch)

    trainer = make_trainer(model, cls=Drawing, callbacks=callbacks)
    train(trainer, num_epochs=2, eval_dataset=eval_dataset, **kwargs)
    return weights_of(model)


def test_an_evaluation_that_draws_random_numbers_does_not_change_training():
    eval_dataset = Samples(make_dataset(8))
    plain = train_with_dropout()
    shuffled = {"eval_dataloader_kwargs": {"shuffle": True, "num_workers": 0}}
    assert_same_weights(plain, train_with_dropout(eval_dataset, **shuffled))
    assert_same_weights(plain, train_with_dropout(eval_dataset, [StepBasedEvaluationCallback(1)], **shuffled))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_normal_numbers_of_a_step_depend_neither_on_workers_nor_on_where_a_run_was_resumed(num_workers, tmp_path):
    """NumPy draws them in pairs, and keeps the second."""

    def draws(**kwargs):
        drawn = []
        probe = Probe(on_train_step_start=lambda *_, **__: drawn.append(np.random.normal()))
        trainer = make_trainer(callbacks=[probe, SaveTrainingStateCallback(tmp_path, save_every_n_steps=3)], seed=2)
        train(trainer, Samples(make_dataset(16)), num_epochs=1, **kwargs)
        return drawn

    alone = draws(train_dataloader_kwargs={"num_workers": 0})
    drawn = draws(train_dataloader_kwargs={"num_workers": num_workers})
    assert drawn == alone
    assert draws(resume_from=tmp_path / "step_3", train_dataloader_kwargs={"num_workers": num_workers}) == drawn[3:]
