"""Callbacks that report where the time goes and how fast training is; and all that look on, at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.data import TensorDataset

from _support import Probe, assert_same_weights, make_dataset, make_trainer, raiser, train, weights_of
from pytorch_accelerated import Trainer, time_ledger
from pytorch_accelerated.callbacks import (
    GradientNormCallback,
    LambdaCallback,
    LayerStatisticsCallback,
    LearningRateCallback,
    MemoryCallback,
    ProfilerCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    StopTrainingError,
    ThroughputCallback,
    TimeLedgerCallback,
    UpdateRatioCallback,
)


class Clock:
    """A clock on which each step takes a second."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now

    def take(self, seconds):
        self.now += round(seconds * 1e9)

    def ticks(self):
        return Probe(
            on_backward_start=lambda trainer, **_: self.take(1), on_eval_step_start=lambda trainer, **_: self.take(100)
        )


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time_ledger, "_clock", clock)
    return clock


def values_of(trainer, name):
    return trainer.run_history.get_metric_values(name)


# --- the ledger --------------------------------------------------------------------------------------------------


def test_the_seconds_of_each_epoch_are_recorded_if_asked_for(clock):
    trainer = make_trainer(callbacks=[clock.ticks(), TimeLedgerCallback(record_epochs=True)])
    train(trainer, num_epochs=2, eval_dataset=make_dataset(8))
    assert values_of(trainer, "seconds_callback_Probe") == [204, 204]
    assert values_of(trainer, "seconds_data") == [0, 0]
    quiet = train(make_trainer(callbacks=[clock.ticks(), TimeLedgerCallback()]), eval_dataset=make_dataset(8))
    assert not [name for name in quiet.run_history.get_metric_names() if "seconds" in name]


def test_a_resumed_run_records_the_seconds_of_the_whole_epoch(clock, tmp_path):
    def run(**kwargs):
        states = SaveTrainingStateCallback(tmp_path, save_every_n_steps=1, save_at_end=False)
        callbacks = [clock.ticks(), TimeLedgerCallback(record_epochs=True), states]
        trainer = train(make_trainer(callbacks=callbacks), num_epochs=2, **kwargs)
        return values_of(trainer, "seconds_callback_Probe")

    assert run() == [4, 4]
    for step in (2, 6):
        assert run(resume_from=tmp_path / f"step_{step}") == [4, 4]


def test_the_table_is_printed_at_the_end_unless_it_is_not_wanted(clock, capsys):
    train(make_trainer(callbacks=[clock.ticks(), TimeLedgerCallback()]))
    assert "\ncallback Probe       4.000 s  100.0%\ntotal" in capsys.readouterr().out
    train(make_trainer(callbacks=[clock.ticks(), TimeLedgerCallback(print_table=False)]))
    assert "callback Probe" not in capsys.readouterr().out


# --- throughput --------------------------------------------------------------------------------------------------


def test_rates_are_those_of_the_training_part_of_an_epoch(clock):
    callbacks = [
        clock.ticks(),
        StepBasedEvaluationCallback(eval_every_n_steps=2),  # evaluations in the middle do not count, callbacks do
        ThroughputCallback(count_tokens=lambda batch: torch.tensor(10 * len(batch[0]))),
    ]
    settings = {"num_epochs": 2, "gradient_accumulation_steps": 2, "eval_dataset": make_dataset(8)}
    trainer = train(make_trainer(callbacks=callbacks), 14, **settings)
    assert values_of(trainer, "train_samples_per_second") == [14 / 4, 14 / 4]
    assert values_of(trainer, "train_updates_per_second") == [2 / 4, 2 / 4]
    assert values_of(trainer, "train_tokens_per_second") == [140 / 4, 140 / 4]
    assert "train_model_flop_utilization" not in trainer.run_history.get_metric_names()


def test_operations_are_counted_once_and_compared_with_the_peak(clock):
    callback = ThroughputCallback(peak_flops=1000)
    trainer = train(make_trainer(callbacks=[clock.ticks(), callback]), num_epochs=2)
    # For a sample: 3 multiplications and additions forward, and as many for the gradients of the weights.
    assert callback.flops_per_sample == 12
    assert values_of(trainer, "train_model_flop_utilization") == [4 * 12 / 1000] * 2
    given = train(make_trainer(callbacks=[clock.ticks(), ThroughputCallback(flops_per_sample=50, peak_flops=1000)]))
    assert values_of(given, "train_model_flop_utilization") == [4 * 50 / 1000]


def test_a_resumed_run_records_the_rates_of_the_whole_epoch(clock, tmp_path):
    def run(**kwargs):
        states = SaveTrainingStateCallback(tmp_path, save_every_n_steps=1, save_at_end=False)
        throughput = ThroughputCallback(count_tokens=lambda batch: len(batch[0]), peak_flops=1000)
        trainer = train(make_trainer(callbacks=[clock.ticks(), throughput, states]), num_epochs=2, **kwargs)
        return {name: values_of(trainer, name) for name in trainer.run_history.get_metric_names()}

    expected = run()
    for step in (2, 4, 6):
        assert run(resume_from=tmp_path / f"step_{step}") == expected


@pytest.mark.parametrize("error", [RuntimeError("broken"), StopTrainingError("enough")])
def test_counting_ends_with_an_error(error):
    trainer = make_trainer(callbacks=[ThroughputCallback(peak_flops=1), Probe(on_backward_start=raiser(error))])
    if isinstance(error, StopTrainingError):
        train(trainer)
    else:
        with pytest.raises(RuntimeError, match="broken"):
            train(trainer)
    assert _get_current_dispatch_mode() is None


def test_a_model_without_operations_that_can_be_counted_is_told_of():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, inputs):
            return self.scale * inputs.mean(dim=1, keepdim=True)

    with pytest.warns(UserWarning, match="counted no floating-point operations.*Pass `flops_per_sample`"):
        train(make_trainer(Scale(), callbacks=[ThroughputCallback(peak_flops=1)]))


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="`peak_flops` is 0"):
        ThroughputCallback(peak_flops=0)
    with pytest.raises(ValueError, match="`flops_per_sample` is nan"):
        ThroughputCallback(flops_per_sample=float("nan"))


# --- all at once -------------------------------------------------------------------------------------------------


def lookers_on(folder):
    return [
        TimeLedgerCallback(record_epochs=True, print_table=False),
        ThroughputCallback(count_tokens=lambda batch: (batch[1] > 0).sum(), peak_flops=1e12),
        GradientNormCallback(per_layer=True, every_n_updates=2),
        UpdateRatioCallback(every_n_updates=2),
        LearningRateCallback(every_n_updates=3),
        LayerStatisticsCallback(every_n_updates=2),
        MemoryCallback(),
        ProfilerCallback(folder, wait=1, warmup=1, active=2),
        LambdaCallback(on_train_epoch_end=lambda trainer: None),
    ]


@pytest.mark.parametrize("clipping", [{}, {"gradient_clip_norm": 0.1}])
@pytest.mark.parametrize("is_single", [True, False])
def test_nothing_that_looks_on_changes_the_numbers(tmp_path, clipping, is_single):
    dataset = TensorDataset(torch.randn(38, 6), torch.randint(0, 3, (38,)))

    def run(callbacks):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(8, 3)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if not is_single:
            body, head = torch.optim.SGD(model[:4].parameters(), lr=0.1), torch.optim.AdamW(model[4].parameters())
            optimizer = {"body": body, "head": head}
        trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=callbacks, seed=1)
        settings = {"per_device_batch_size": 4, "gradient_accumulation_steps": 2, **clipping}
        trainer.train(dataset, num_epochs=2, eval_dataset=dataset, **settings)
        return weights_of(model), values_of(trainer, "train_loss_epoch"), values_of(trainer, "eval_loss_epoch")

    weights, *losses = run(lookers_on(tmp_path))
    expected, *expected_losses = run([])
    assert losses == expected_losses
    assert_same_weights(weights, expected)
