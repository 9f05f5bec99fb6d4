"""Evaluation: on its own, after each epoch, in the middle of one, and from a callback."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from _support import (
    EventRecorder,
    Probe,
    assert_same_weights,
    losses,
    make_dataset,
    make_model,
    make_trainer,
    mse,
    recorder_of,
    train,
    weights_of,
)
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LimitEvalStepsCallback, StepBasedEvaluationCallback

# --- `evaluate` --------------------------------------------------------------------------------------------------


def test_evaluate_keeps_the_history_of_training():
    trainer = make_trainer()
    train(trainer, num_epochs=2, eval_dataset=make_dataset(8))
    before = {name: losses(trainer, name) for name in trainer.run_history.get_metric_names()}
    trainer.evaluate(make_dataset(8))
    trainer.evaluate(make_dataset(8))
    after = {name: losses(trainer, name) for name in trainer.run_history.get_metric_names()}
    assert len(after.pop("evaluation_loss")) == 2
    assert after == before
    assert trainer.run_history.current_epoch == 3


def test_evaluate_works_before_training_and_without_an_optimizer():
    model, dataset = make_model(), make_dataset(10)
    trainer = Trainer(model, mse, None, callbacks=())
    before = weights_of(model)
    trainer.evaluate(dataset, per_device_batch_size=4)
    expected = mse(model(dataset.tensors[0]), dataset.tensors[1]).item()
    assert losses(trainer, "evaluation_loss") == [pytest.approx(expected, rel=1e-6)]
    assert_same_weights(before, weights_of(model))
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(trainer)
    assert len(losses(trainer)) == 1


def test_evaluate_before_training_does_not_change_training():
    plain, evaluated = make_trainer(), make_trainer()
    evaluated.evaluate(make_dataset(8))
    for trainer in (plain, evaluated):
        train(trainer, num_epochs=2)
    assert_same_weights(weights_of(plain.model), weights_of(evaluated.model))


def test_evaluate_without_a_dataset_uses_the_last_one():
    trainer = make_trainer(lr=0.0)
    train(trainer, eval_dataset=make_dataset(8))
    trainer.evaluate()
    assert losses(trainer, "evaluation_loss") == pytest.approx(losses(trainer, "eval_loss_epoch"))


def test_evaluate_computes_no_gradients_and_uses_evaluation_mode():
    seen = []
    probe = Probe(on_eval_step_end=lambda trainer, batch_output, **kwargs: seen.append(batch_output["loss"]))
    trainer = make_trainer(callbacks=[probe])
    trainer.evaluate(make_dataset(4))
    assert not seen[0].requires_grad
    assert not trainer.model.training


def test_evaluate_in_a_callback_does_not_change_the_training_run():
    def evaluate(trainer, **kwargs):
        trainer.evaluate(make_dataset(4), per_device_batch_size=2)
        trainer.model.train()

    plain, nested = make_trainer(), make_trainer(callbacks=[Probe(on_train_epoch_end=evaluate)])
    for trainer in (plain, nested):
        train(trainer, num_epochs=2, eval_dataset=make_dataset(8))
    assert_same_weights(weights_of(plain.model), weights_of(nested.model))
    assert losses(nested) == losses(plain)
    assert losses(nested, "eval_loss_epoch") == losses(plain, "eval_loss_epoch")
    assert len(losses(nested, "evaluation_loss")) == 2
    assert nested.run_config.num_epochs == 2


# --- within a training run ---------------------------------------------------------------------------------------


def test_an_intermediate_evaluation_restores_the_modes_and_keeps_the_training_loss():
    """Also after the first step of an epoch. Each module gets its own mode back, even if the modes differ."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    class Frozen(Trainer):
        def train_epoch_start(self):
            super().train_epoch_start()
            self.model[1].eval()

    def modes_of(trainer):
        return [module.training for module in trainer.model.modules()]

    probe, modes = recorder_of(modes_of, "on_train_step_end")
    trainer = make_trainer(model, cls=Frozen, callbacks=[StepBasedEvaluationCallback(3), probe])
    train(trainer, num_epochs=3, eval_dataset=make_dataset(8))
    assert modes == [[True, True, False, True]] * 12
    assert losses(trainer, "intermediate_update") == [3, 6, 9, 12]
    assert len(losses(trainer, "intermediate_eval_loss_epoch")) == 4
    assert len(losses(trainer, "eval_loss_epoch")) == 3
    assert len(losses(trainer)) == 3

    plain = make_trainer(lr=0.0)
    evaluated = make_trainer(lr=0.0, callbacks=[StepBasedEvaluationCallback(1)])
    train(plain)
    train(evaluated, eval_dataset=make_dataset(8))
    assert losses(evaluated) == losses(plain)
    assert losses(evaluated, "intermediate_update") == [1, 2, 3, 4]


def test_an_intermediate_evaluation_may_be_due_after_updates_instead_of_batches():
    trainer = make_trainer(callbacks=[StepBasedEvaluationCallback(eval_every_n_updates=1)])
    train(trainer, gradient_accumulation_steps=2, eval_dataset=make_dataset(4))
    assert losses(trainer, "intermediate_update") == [1, 2]


def test_the_limit_of_evaluation_steps_ends_with_its_callback():
    recorder = EventRecorder()
    trainer = make_trainer(callbacks=[LimitEvalStepsCallback(1, limit_intermediate_only=False), recorder])
    train(trainer, eval_dataset=make_dataset(16))
    assert recorder.log.count("on_eval_step_end") == 1
    trainer.callback_handler.callbacks.pop(0)
    trainer.evaluate(make_dataset(16), per_device_batch_size=4)
    assert recorder.log.count("on_eval_step_end") == 1 + 4


def test_metrics_of_several_evaluation_datasets_are_prefixed_with_the_name_of_the_dataset():
    trainer = make_trainer(lr=0.0, callbacks=[StepBasedEvaluationCallback(4)])
    datasets = {"near": make_dataset(8, seed=3), "far": make_dataset(6, seed=4)}
    train(trainer, eval_dataset=datasets)
    trainer.evaluate({"other": make_dataset(4, seed=5)})
    model = trainer.model
    for name, dataset in datasets.items():
        expected = [pytest.approx(mse(model(dataset.tensors[0]), dataset.tensors[1]).item(), rel=1e-6)]
        assert losses(trainer, f"{name}_eval_loss_epoch") == expected
        assert losses(trainer, f"{name}_intermediate_eval_loss_epoch") == expected
    assert len(losses(trainer, "other_evaluation_loss")) == 1
    assert "eval_loss_epoch" not in trainer.run_history.get_metric_names()
    assert trainer.eval_dataset.keys() == {"other"}
    assert trainer.run_history.metric_name_prefix == ""


class Sequences(torch.utils.data.Dataset):
    """Samples of different lengths, which default collation refuses."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.ones(index + 1, 3), torch.ones(1)


def pad(samples):
    """Collate sequences by their sums."""
    return torch.stack([inputs.sum(0) for inputs, _ in samples]), torch.stack([targets for _, targets in samples])


@pytest.mark.parametrize("first", ["train", "evaluate"])
def test_evaluating_the_last_data_again_uses_the_arguments_of_that_time(first):
    sizes = []
    probe = Probe(on_eval_step_end=lambda trainer, batch, **_: sizes.append(len(batch[0])))
    trainer = make_trainer(lr=0.0, callbacks=[probe])
    kwargs = {"num_workers": 0, "batch_size": 4, "drop_last": True}
    if first == "train":
        trainer.train(
            Sequences(),
            1,
            eval_dataset=Sequences(),
            per_device_batch_size=3,
            collate_fn=pad,
            train_dataloader_kwargs={"num_workers": 0},
            eval_dataloader_kwargs=kwargs,
        )
    else:
        trainer.evaluate(Sequences(), 3, kwargs, pad)
    trainer.predict(make_dataset(4))  # leaves no trace
    trainer.evaluate()
    assert sizes == [4, 4]
    trainer.evaluate(dataloader_kwargs={"num_workers": 0})  # what is given takes precedence
    assert sizes == [4, 4, 3, 3]
