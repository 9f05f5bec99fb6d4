"""Outputs of a model over a dataset, in one process; two and three are in `distributed/test_numbers.py`."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

from _numbers import EVALUATED_LENGTHS, evaluations, expected_evaluations
from _support import Batches, Samples, make_dataset, make_indexed_dataset, make_model, make_trainer
from pytorch_accelerated import Trainer
from pytorch_accelerated._nested import concatenate, on_host
from pytorch_accelerated._step import predictions

Pair = namedtuple("Pair", ["left", "right"])


# --- functions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((1, 2), ((1,), {})),
        ([1, 2], ((1,), {})),
        (Pair(1, 2), ((1,), {})),
        ({"a": 1, "b": 2}, ((), {"a": 1, "b": 2})),
        (OrderedDict(a=1), ((), {"a": 1})),
        (3, ((3,), {})),
    ],
)
def test_what_of_a_batch_goes_into_the_model(batch, expected):
    assert predictions(lambda *args, **kwargs: (args, kwargs), batch) == expected


def test_outputs_on_the_host_keep_their_structure():
    outputs = {"a": torch.ones(2), "b": [Pair(torch.zeros(1), "text")]}
    moved = on_host(outputs)
    assert type(moved["b"][0]) is Pair
    assert torch.equal(moved["a"], outputs["a"])
    assert {moved["a"].device.type, moved["b"][0].left.device.type} == {"cpu"}


def test_parts_are_joined_along_the_first_dimension():
    joined = concatenate([torch.ones(2, 3), torch.zeros(0, 3), torch.zeros(1, 3)])
    assert joined.tolist() == [[1.0] * 3, [1.0] * 3, [0.0] * 3]


def test_scalars_are_stacked_and_what_is_no_tensor_becomes_a_list():
    assert concatenate([torch.tensor(1.0), torch.tensor(2.0)]).tolist() == [1.0, 2.0]
    assert concatenate([["a"], ["b"]]) == [["a", "b"]]
    assert concatenate([None]) == [None]


def test_structures_are_joined_item_by_item():
    parts = [{"a": [torch.ones(1) * k], "b": (Pair(torch.ones(2) * k, k),)} for k in range(2)]
    joined = concatenate(parts)
    assert joined["a"][0].tolist() == [0.0, 1.0]
    pair = joined["b"][0]
    assert (type(joined["a"]), type(joined["b"]), type(pair)) == (list, tuple, Pair)
    assert pair.left.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert pair.right == [0, 1]


def test_parts_that_are_not_nested_alike_are_refused():
    with pytest.raises(ValueError, match="zip"):
        concatenate([[torch.ones(1)], [torch.ones(1), torch.ones(1)]])


# --- with a trainer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_in_memory", [True, False])
@pytest.mark.parametrize("num_samples", EVALUATED_LENGTHS)
def test_each_sample_counts_once_and_in_order(num_samples, is_in_memory):
    torch.testing.assert_close(
        evaluations(num_samples, is_in_memory), expected_evaluations(num_samples), rtol=0, atol=1e-6, check_device=False
    )


@pytest.mark.parametrize("optimizer", [None, "sgd"])
def test_outputs_of_a_plain_model_before_any_training(optimizer):
    dataset, model = make_dataset(11), make_model()
    trainer = make_trainer(model) if optimizer else Trainer(model, None, None, callbacks=())
    outputs = trainer.predict(dataset, per_device_batch_size=4)
    torch.testing.assert_close(outputs, model.cpu()(dataset.tensors[0]), rtol=0, atol=1e-6)
    assert not outputs.requires_grad
    assert trainer.model is model


def test_the_model_is_put_into_evaluation_mode_and_dropout_does_nothing():
    model = nn.Sequential(nn.Dropout(0.5))
    dataset = make_indexed_dataset(9)
    trainer = Trainer(model, None, None, callbacks=())
    assert trainer.predict(dataset, per_device_batch_size=4).flatten().tolist() == list(range(9))


@pytest.mark.parametrize("dataset", [make_indexed_dataset(9), Samples(make_indexed_dataset(9))])
def test_a_loader_of_the_users_wishes(dataset):
    seen = []

    class Recorder(Trainer):
        def calculate_predictions(self, batch):
            seen.append(len(batch))
            return batch

    trainer = Recorder(nn.Identity(), None, None, callbacks=())
    outputs = trainer.predict(
        dataset,
        dataloader_kwargs={"batch_size": 5, "num_workers": 0},
        collate_fn=lambda samples: torch.cat([inputs for inputs, _ in samples]),
    )
    assert outputs.tolist() == list(range(9))
    assert seen == [5, 4]


def test_batches_that_the_user_made():
    outputs = Trainer(nn.Identity(), None, None, callbacks=()).predict(Batches(make_indexed_dataset(9), 4))
    assert outputs.flatten().tolist() == list(range(9))


def test_neither_the_evaluation_data_nor_the_random_state_nor_the_history_are_touched():
    trainer = make_trainer()
    trainer.train(make_dataset(8), num_epochs=1, eval_dataset=make_dataset(4))
    before = (trainer.eval_dataset, trainer.progress.num_updates, sorted(trainer.run_history.get_metric_names()))
    state = torch.get_rng_state()
    trainer.predict(make_dataset(5), move_to_host=False)
    assert (
        trainer.eval_dataset,
        trainer.progress.num_updates,
        sorted(trainer.run_history.get_metric_names()),
    ) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_leaves_the_evaluation_data_too():
    trainer = make_trainer()
    trainer.eval_dataset = dataset = make_dataset(4)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        trainer.predict(make_indexed_dataset(4))
    assert trainer.eval_dataset is dataset


@pytest.mark.parametrize("on_every_process", [True, False])
def test_one_process_is_the_main_one(on_every_process):
    outputs = make_trainer().predict(make_dataset(3), on_every_process=on_every_process)
    assert outputs.shape == (3, 1)
