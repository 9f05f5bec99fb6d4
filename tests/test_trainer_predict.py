"""`Trainer.predict` and `evaluate` on one process; `distributed/test_numbers.py` has them on two and three."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from _numbers import EVALUATED_LENGTHS, evaluations, expected_evaluations
from _support import Batches, Samples, make_dataset, make_indexed_dataset, make_model, make_trainer
from pytorch_accelerated import Trainer


@pytest.mark.parametrize("is_in_memory", [True, False])
@pytest.mark.parametrize("num_samples", EVALUATED_LENGTHS)
def test_each_sample_is_evaluated_and_predicted_once_and_in_order(num_samples, is_in_memory):
    torch.testing.assert_close(
        evaluations(num_samples, is_in_memory), expected_evaluations(num_samples), rtol=0, atol=1e-6, check_device=False
    )


@pytest.mark.parametrize("optimizer", [None, "sgd"])
def test_predict_works_before_training_with_and_without_an_optimizer(optimizer):
    dataset, model = make_dataset(11), make_model()
    trainer = make_trainer(model) if optimizer else Trainer(model, None, None, callbacks=())
    outputs = trainer.predict(dataset, per_device_batch_size=4)
    torch.testing.assert_close(outputs, model.cpu()(dataset.tensors[0]), rtol=0, atol=1e-6)
    assert not outputs.requires_grad
    assert trainer.model is model


def test_predict_puts_the_model_into_evaluation_mode():
    model = nn.Sequential(nn.Dropout(0.5))
    dataset = make_indexed_dataset(9)
    trainer = Trainer(model, None, None, callbacks=())
    assert trainer.predict(dataset, per_device_batch_size=4).flatten().tolist() == list(range(9))


@pytest.mark.parametrize("dataset", [make_indexed_dataset(9), Samples(make_indexed_dataset(9))])
def test_predict_uses_the_dataloader_kwargs_and_the_collate_function(dataset):
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


def test_predict_accepts_an_iterable_of_batches():
    outputs = Trainer(nn.Identity(), None, None, callbacks=()).predict(Batches(make_indexed_dataset(9), 4))
    assert outputs.flatten().tolist() == list(range(9))


def test_predict_leaves_evaluation_dataset_progress_history_and_random_state_unchanged():
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


def test_a_failed_predict_leaves_the_evaluation_dataset_unchanged():
    trainer = make_trainer()
    trainer.eval_dataset = dataset = make_dataset(4)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        trainer.predict(make_indexed_dataset(4))
    assert trainer.eval_dataset is dataset


@pytest.mark.parametrize("on_every_process", [True, False])
def test_a_single_process_gets_the_outputs_as_the_main_process(on_every_process):
    outputs = make_trainer().predict(make_dataset(3), on_every_process=on_every_process)
    assert outputs.shape == (3, 1)
