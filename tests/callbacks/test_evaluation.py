"""Callbacks that evaluate during an epoch, or limit the number of batches."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import _support
from _support import (
    IMPOSSIBLE_COUNTS,
    IN_ORDER,
    Batches,
    EventRecorder,
    Probe,
    Stream,
    assert_same_weights,
    losses,
    make_dataset,
    make_trainer,
    weights_of,
)
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    LimitBatchesCallback,
    LimitEvalStepsCallback,
    StepBasedEvaluationCallback,
    TrainerCallback,
)
from pytorch_accelerated.finetuning import ModelFreezer
from pytorch_accelerated.trainer import LIMIT_BATCHES_ENV_VAR
from pytorch_accelerated.utils import LimitBatches

train = partial(_support.train, dataset=12)  # three batches per epoch


class CountSteps(TrainerCallback):
    """Counts the batches of each epoch of training and of each evaluation."""

    def __init__(self):
        self.train_steps = []
        self.eval_steps = []
        self.intermediate_steps = []
        self._evaluations = self.eval_steps

    def on_train_epoch_start(self, trainer, **kwargs):
        self.train_steps.append(0)

    def on_train_step_end(self, trainer, **kwargs):
        self.train_steps[-1] += 1

    def on_eval_epoch_start(self, trainer, is_intermediate, **kwargs):
        self._evaluations = self.intermediate_steps if is_intermediate else self.eval_steps
        self._evaluations.append(0)

    def on_eval_step_end(self, trainer, **kwargs):
        self._evaluations[-1] += 1


# --- evaluation during an epoch ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_steps", "accumulation", "expected"),
    [
        pytest.param(1, 1, [1, 2, 3, 4, 5, 6, 7, 8, 9], id="after each batch"),
        pytest.param(2, 1, [2, 4, 6, 8], id="across epochs, and after the first step of one"),
        pytest.param(3, 1, [3, 6, 9], id="at the end of each epoch"),
        pytest.param(4, 1, [4, 8], id="less often than epochs end"),
        pytest.param(10, 1, [], id="never"),
        pytest.param(2, 2, [1, 2, 4, 5], id="batches, not updates, are counted"),
    ],
)
def test_intermediate_evaluations_happen_every_n_batches(num_steps, accumulation, expected):
    trainer = make_trainer(callbacks=[StepBasedEvaluationCallback(num_steps)])
    train(trainer, num_epochs=3, eval_dataset=make_dataset(8), gradient_accumulation_steps=accumulation)
    names = {"intermediate_update", "intermediate_eval_loss_epoch"} & trainer.run_history.get_metric_names()
    assert names == ({"intermediate_update", "intermediate_eval_loss_epoch"} if expected else set())
    if expected:
        assert losses(trainer, "intermediate_update") == expected
        assert len(losses(trainer, "intermediate_eval_loss_epoch")) == len(expected)
    assert len(losses(trainer, "eval_loss_epoch")) == len(losses(trainer, "train_loss_epoch")) == 3


def test_an_intermediate_evaluation_measures_the_current_model():
    data = make_dataset(8, seed=3)
    expected = []

    def measure(trainer, **kwargs):
        with torch.no_grad():
            expected.append(nn.functional.mse_loss(trainer.model(data.tensors[0]), data.tensors[1]).item())

    trainer = make_trainer(callbacks=[StepBasedEvaluationCallback(1), Probe(on_optimizer_step_end=measure)])
    train(trainer, num_epochs=2, eval_dataset=data)
    assert losses(trainer, "intermediate_eval_loss_epoch") == pytest.approx(expected, rel=1e-6)
    assert len(set(expected)) == 6


def make_frozen_model():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Dropout(0.5), nn.Linear(4, 1))
    ModelFreezer(model, freeze_batch_norms=True).freeze(to_index=0)
    model[1].eval()
    return model


def test_module_modes_are_restored_after_an_intermediate_evaluation():
    """Including a module that the user puts into evaluation mode at the start of each epoch."""
    modes = {"before": [], "during": [], "after": []}

    def remember(when):
        return lambda trainer, **_: modes[when].append([module.training for module in trainer.model.modules()])

    class OwnMode(Trainer):
        def train_epoch_start(self):
            super().train_epoch_start()
            self.model[1].eval()

    trainer = make_trainer(
        make_frozen_model(),
        cls=OwnMode,
        callbacks=[
            Probe(on_train_step_start=remember("before"), on_eval_step_start=remember("during")),
            StepBasedEvaluationCallback(1),
            Probe(on_train_step_end=remember("after")),
        ],
    )
    model = trainer.model
    statistics = model[0][1].running_mean.clone()
    train(trainer, eval_dataset=make_dataset(4))
    # the root, layer group 0, its linear layer, its batch norm, the dropout layer, the head
    assert modes["before"] == modes["after"] == [[True, True, True, False, False, True]] * 3
    assert modes["during"] == [[False] * 6] * 4
    assert torch.equal(model[0][1].running_mean, statistics)


def test_intermediate_evaluation_does_not_change_training():
    """Weights and losses are bit-identical, although dropout and the evaluation draw random numbers."""

    class Noisy(Trainer):
        def calculate_eval_batch_loss(self, batch):
            torch.rand(3)
            return super().calculate_eval_batch_loss(batch)

    results = []
    for callbacks in ([], [StepBasedEvaluationCallback(1)]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1))
        trainer = make_trainer(model, cls=Noisy, callbacks=callbacks)
        train(trainer, num_epochs=2, eval_dataset=make_dataset(8), gradient_accumulation_steps=2)
        results.append((weights_of(model), losses(trainer, "train_loss_epoch"), losses(trainer, "eval_loss_epoch")))
    plain, evaluated = results
    assert_same_weights(plain[0], evaluated[0])
    assert plain[1:] == evaluated[1:]


def test_the_evaluation_interval_counts_the_batches_of_each_run_separately():
    trainer = make_trainer(callbacks=[StepBasedEvaluationCallback(2)])
    train(trainer, eval_dataset=make_dataset(4))
    train(trainer, eval_dataset=make_dataset(4), reset_run_history=False)
    assert losses(trainer, "intermediate_update") == [2, 2]


def test_a_resumed_run_evaluates_after_the_same_batches(tmp_path):
    def save(trainer, **_):
        if trainer.progress.num_updates == 5:
            trainer.save_training_state(tmp_path / "state")

    kwargs = {"num_epochs": 3, "eval_dataset": make_dataset(4)}
    train(make_trainer(callbacks=[StepBasedEvaluationCallback(2), Probe(on_train_step_end=save)]), **kwargs)
    resumed = make_trainer(callbacks=[StepBasedEvaluationCallback(2)])
    train(resumed, resume_from=tmp_path / "state", **kwargs)
    assert losses(resumed, "intermediate_update") == [2, 4, 6, 8]


@pytest.mark.parametrize("unit", ["steps", "updates"])
@pytest.mark.parametrize(("number", "error"), IMPOSSIBLE_COUNTS)
def test_an_impossible_evaluation_interval_is_rejected(number, error, unit):
    with pytest.raises(error, match=f"`eval_every_n_{unit}` is {number}.* Expected a whole number of {unit}"):
        StepBasedEvaluationCallback(**{f"eval_every_n_{unit}": number})


@pytest.mark.parametrize("numbers", [{}, {"eval_every_n_steps": 2, "eval_every_n_updates": 2}])
def test_an_evaluation_interval_needs_exactly_one_unit(numbers):
    with pytest.raises(ValueError, match=r"`eval_every_n_updates` is .*Expected one of them"):
        StepBasedEvaluationCallback(**numbers)


def test_intermediate_evaluation_without_eval_dataset_is_an_error_before_training():
    recorder = EventRecorder()
    trainer = make_trainer(callbacks=[recorder, StepBasedEvaluationCallback(1)])
    with pytest.raises(ValueError, match="nothing to evaluate on: `train` was called without `eval_dataset`"):
        train(trainer)
    assert "on_train_epoch_start" not in recorder.log


# --- limited evaluations -----------------------------------------------------------------------------------------


def test_only_intermediate_evaluations_are_limited_by_default():
    counts = CountSteps()
    trainer = make_trainer(callbacks=[StepBasedEvaluationCallback(2), LimitEvalStepsCallback(1), counts])
    train(trainer, num_epochs=2, eval_dataset=make_dataset(12))
    trainer.evaluate(make_dataset(12), per_device_batch_size=4)
    assert counts.intermediate_steps == [1, 1, 1]
    assert counts.eval_steps == [3, 3, 3]
    assert counts.train_steps == [3, 3]


def test_all_evaluations_are_limited_if_limit_intermediate_only_is_false():
    counts = CountSteps()
    limit = LimitEvalStepsCallback(2, limit_intermediate_only=False)
    trainer = make_trainer(callbacks=[StepBasedEvaluationCallback(2), limit, counts])
    train(trainer, eval_dataset={"large": make_dataset(12), "small": make_dataset(4)})
    trainer.evaluate(make_dataset(12), per_device_batch_size=4)
    assert counts.intermediate_steps == [2, 1]
    assert counts.eval_steps == [2, 1, 2]


def test_a_limited_evaluation_records_the_mean_over_the_batches_it_used():
    data = make_dataset(12)
    trainer = make_trainer(lr=0.0, callbacks=[LimitEvalStepsCallback(2, limit_intermediate_only=False)])
    train(trainer, eval_dataset=data)
    inputs, targets = data[:8]
    expected = nn.functional.mse_loss(trainer.model(inputs), targets).item()
    assert losses(trainer, "eval_loss_epoch") == [pytest.approx(expected, rel=1e-6)]


# --- limited epochs ----------------------------------------------------------------------------------------------


def limited_by_callback(num_batches, callbacks, monkeypatch):
    return make_trainer(callbacks=[LimitBatchesCallback(num_batches), *callbacks])


def limited_by_variable(num_batches, callbacks, monkeypatch):
    monkeypatch.setenv(LIMIT_BATCHES_ENV_VAR, str(num_batches))
    return make_trainer(callbacks=callbacks)


def limited_by_context(num_batches, callbacks, monkeypatch):
    with LimitBatches(num_batches):
        return make_trainer(callbacks=callbacks)


@pytest.mark.parametrize("make_limited", [limited_by_callback, limited_by_variable, limited_by_context])
@pytest.mark.parametrize(("num_batches", "expected"), [(1, 1), (2, 2), (7, 3)])
def test_every_epoch_uses_at_most_the_given_number_of_batches(make_limited, num_batches, expected, monkeypatch):
    counts = CountSteps()
    trainer = make_limited(num_batches, [counts], monkeypatch)
    train(trainer, num_epochs=2, eval_dataset=make_dataset(12))
    train(trainer, eval_dataset={"one": make_dataset(12), "two": make_dataset(12)})
    trainer.evaluate(make_dataset(12), per_device_batch_size=4)
    assert counts.train_steps == [expected] * 3
    assert counts.eval_steps == [expected] * 5


@pytest.mark.parametrize("make_limited", [limited_by_callback, limited_by_variable, limited_by_context])
@pytest.mark.parametrize("kind", ["samples", "stream", "batches"])
def test_predictions_use_at_most_the_given_number_of_batches(make_limited, kind, monkeypatch):
    data = make_dataset(12)
    trainer = make_limited(2, [], monkeypatch)
    given = {"samples": data, "stream": Stream(data), "batches": Batches(data, 4)}[kind]
    outputs = trainer.predict(given, per_device_batch_size=4)
    assert torch.equal(outputs, trainer.model(data.tensors[0][:8]).detach())
    monkeypatch.delenv(LIMIT_BATCHES_ENV_VAR, raising=False)
    assert len(make_trainer().predict(given, per_device_batch_size=4)) == 12


def test_a_limit_of_an_evaluation_is_a_whole_number():
    limit = Probe(on_eval_epoch_start=lambda trainer, **_: trainer.limit_eval_steps(1.5))
    with pytest.raises(TypeError, match=r"`num_eval_steps` is 1.5"):
        make_trainer(callbacks=[limit]).evaluate(make_dataset(4))


def test_the_limit_of_the_environment_variable_applies_before_all_other_callbacks(monkeypatch):
    assert LIMIT_BATCHES_ENV_VAR == "PT_ACC_LIMIT_BATCHES"
    lengths = []
    see = Probe(on_training_run_start=lambda trainer, **_: lengths.append(len(trainer.train_dataloader)))
    trainer = limited_by_variable(2, [see], monkeypatch)
    assert [type(callback) for callback in trainer.callback_handler.callbacks] == [LimitBatchesCallback, Probe]
    train(trainer)
    assert lengths == [2]


def test_there_is_no_limit_without_the_environment_variable(monkeypatch):
    monkeypatch.delenv(LIMIT_BATCHES_ENV_VAR, raising=False)
    assert make_trainer().callback_handler.callbacks == []


def test_the_last_window_of_a_limited_epoch_makes_an_update():
    """Three batches in accumulation windows of two: the second window has one batch, and full weight."""
    data = make_dataset(20)
    settings = {"gradient_accumulation_steps": 2, "train_dataloader_kwargs": IN_ORDER}
    limited = train(make_trainer(callbacks=[LimitBatchesCallback(3)]), dataset=data, **settings)
    short = train(make_trainer(), dataset=TensorDataset(*data[:12]), **settings)
    assert limited.progress.num_updates == 2
    assert_same_weights(weights_of(limited.model), weights_of(short.model))
    assert losses(limited, "train_loss_epoch") == losses(short, "train_loss_epoch")


def test_a_limited_epoch_is_resumed_within_its_limit(tmp_path):
    def save(trainer, step, **_):
        if step == 1 and trainer.run_history.current_epoch == 2:
            trainer.save_training_state(tmp_path / "state")

    counts = CountSteps()
    uninterrupted = make_trainer(callbacks=[LimitBatchesCallback(3), Probe(on_train_step_end=save)])
    train(uninterrupted, dataset=24, num_epochs=3)
    resumed = make_trainer(callbacks=[LimitBatchesCallback(3), counts])
    train(resumed, dataset=24, num_epochs=3, resume_from=tmp_path / "state")
    assert counts.train_steps == [1, 3]
    assert_same_weights(weights_of(uninterrupted.model), weights_of(resumed.model))
    assert losses(resumed, "train_loss_epoch") == losses(uninterrupted, "train_loss_epoch")


def test_a_limit_does_not_affect_later_runs():
    """The callback limited the loaders of its own run only."""
    counts = CountSteps()
    trainer = make_trainer(callbacks=[LimitBatchesCallback(1), counts])
    train(trainer)
    trainer.callback_handler.callbacks.pop(0)
    train(trainer)
    assert counts.train_steps == [1, 3]


@pytest.mark.parametrize(("number", "error"), IMPOSSIBLE_COUNTS)
@pytest.mark.parametrize("callback_class", [LimitBatchesCallback, LimitEvalStepsCallback])
def test_an_impossible_limit_is_rejected(callback_class, number, error):
    with pytest.raises(error, match=f"is {number}.* Expected a whole number of batches, at least 1"):
        callback_class(number)


@pytest.mark.parametrize("value", ["many", "0", "2.5"])
def test_an_impossible_value_of_the_environment_variable_is_rejected(value, monkeypatch):
    monkeypatch.setenv(LIMIT_BATCHES_ENV_VAR, value)
    with pytest.raises(ValueError, match=f"PT_ACC_LIMIT_BATCHES.*{value}"):
        make_trainer()
