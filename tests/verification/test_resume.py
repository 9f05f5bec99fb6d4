"""`verify_resume`: what passes, what fails and for which cause, what it does not change, and what it rejects."""

from __future__ import annotations

import itertools
import random
import tempfile

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

import _runs
from _support import Probe, Stream, make_dataset
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import EarlyStoppingCallback, ModelEmaCallback, TrainerCallback
from pytorch_accelerated.verification import verify_resume

DATASET = make_dataset(num_samples=24)
ARGUMENTS = {"per_device_batch_size": 4, "train_dataloader_kwargs": {"num_workers": 0}}


class Dropout(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1))


def trainer_of(make_model=Dropout, loss_func=nn.functional.mse_loss, optimizer_class=torch.optim.AdamW, callbacks=()):
    """Return a function that creates a new trainer on each call."""

    def make_trainer():
        model = make_model()
        return Trainer(model, loss_func, optimizer_class(model.parameters(), lr=0.01), callbacks=callbacks)

    return make_trainer


def verify(make_trainer, dataset=DATASET, **kwargs):
    return verify_resume(make_trainer, dataset, **{**ARGUMENTS, **kwargs})


def found(report):
    """Return kind and name of the difference, which the report contains."""
    assert not report.is_exact
    with pytest.raises(AssertionError, match="Likely cause"):
        report.raise_if_different()
    assert report.difference.name in str(report)
    return report.difference.kind, report.difference.name


# --- what passes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_with_augmentation_schedule_accumulation_ema_and_early_stopping_is_exact(tmp_path, num_workers):
    def make_trainer():
        average = ModelEmaCallback(save_path=tmp_path / "average.pt")
        return trainer_of(_runs.Net, callbacks=[average, EarlyStoppingCallback(9)])()

    dataset = _runs.NoisySamples()
    report = verify_resume(
        make_trainer,
        dataset,
        eval_dataset=dataset,
        per_device_batch_size=4,
        gradient_accumulation_steps=4,
        create_scheduler_fn=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2),
        train_dataloader_kwargs={"num_workers": num_workers},
        eval_dataloader_kwargs={"num_workers": 0},
        collate_fn=_runs.masked,
    )
    report.raise_if_different()
    assert str(report) == (
        "Resumed runs end like the uninterrupted one, bit by bit.\n"
        "12 steps, interrupted and resumed after steps 3, 6, 8."
    )


def test_given_stops_are_used_and_the_defaults_lie_within_the_epochs():
    assert verify(trainer_of(), stops=[2, 5]).stops == (2, 5)
    assert verify(trainer_of(), num_epochs=1).stops == (3, 6)


def test_a_single_stop_is_reported_in_the_singular():
    assert str(verify(trainer_of(), stops=[2])).endswith("interrupted and resumed after step 2.")


def test_a_stream_without_length_is_exact():
    assert verify(trainer_of(), Stream(DATASET), stops=[2, 6, 7]).is_exact


def test_the_rng_state_is_restored_and_the_saved_states_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    verify(trainer_of())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (str(np.random.get_state()), random.getstate()) == states[1:]
    assert list(tmp_path.iterdir()) == []


# --- what fails --------------------------------------------------------------------------------------------------


class OwnGenerator(_runs.NoisySamples):
    """Augments with its own generator, which is never seeded."""

    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng()

    def __getitem__(self, index):
        inputs, targets = super().__getitem__(index)
        return inputs + float(self.generator.normal()), targets


def test_a_generator_that_belongs_to_the_dataset_is_reported_as_the_batch():
    report = verify(trainer_of(_runs.Net), OwnGenerator())
    assert found(report) == ("batch", "the batch")
    assert "the run is not reproducible even without an interruption" in report.likely_cause
    assert "a generator that the dataset creates for itself is not" in report.likely_cause
    assert "resumed after step 3, in step 4, rank 0: the batch." in str(report)


def test_a_stream_that_resumes_at_another_position_is_reported_as_the_batch():
    class Endless(IterableDataset):
        def __init__(self):
            self.numbers = itertools.count()

        def __iter__(self):
            for number in itertools.islice(self.numbers, 24):
                yield torch.full((3,), float(number)), torch.zeros(1)

    report = verify(trainer_of(), Endless(), stops=[3])
    assert found(report) == ("batch", "the batch")


class CountsCalls(nn.Module):
    """Its output depends on the number of earlier calls, which is not a buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.seen = torch.zeros(1)

    def forward(self, inputs):
        self.seen = self.seen + 1
        return self.layer(inputs) + self.seen


def test_a_tensor_that_is_not_a_buffer_is_reported_as_the_loss():
    report = verify(trainer_of(CountsCalls))
    assert found(report) == ("loss", "the loss")
    assert "not a buffer (use `register_buffer`)" in report.likely_cause
    assert "not reproducible" not in report.likely_cause


class LosesMomentum(torch.optim.AdamW):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["exp_avg"].zero_()


def test_an_optimizer_that_does_not_restore_its_state_is_reported_with_the_field():
    report = verify(trainer_of(optimizer_class=LosesMomentum))
    assert found(report) == ("optimizer", "`exp_avg` of the optimizer for `0.weight`")
    assert "right after the resume" in str(report)


class ZeroedOnLoad(nn.Linear):
    def get_extra_state(self):
        return torch.ones(2)

    def set_extra_state(self, state):
        self.weight.data.zero_()


def test_a_model_that_does_not_restore_a_parameter_is_reported_with_its_name():
    assert found(verify(trainer_of(lambda: ZeroedOnLoad(3, 1)))) == ("model", "`weight` of the model")


class StuckScheduler(torch.optim.lr_scheduler.StepLR):
    def load_state_dict(self, state_dict):
        super().load_state_dict({**state_dict, "last_epoch": 0})


def test_a_scheduler_that_does_not_restore_its_state_is_reported():
    report = verify(trainer_of(), create_scheduler_fn=lambda optimizer: StuckScheduler(optimizer, 1))
    assert found(report) == ("scheduler", "the scheduler")


class Counts(TrainerCallback):
    def __init__(self, factor):
        self.factor = factor
        self.count = 0

    def on_train_step_end(self, trainer, **kwargs):
        self.count += 1

    def on_train_epoch_end(self, trainer, **kwargs):
        trainer.run_history.update_metric("count", self.count)


class BadlyRestored(Counts):
    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"] * self.factor


def test_callbacks_that_lose_their_state_are_reported_as_a_metric_or_by_name():
    report = verify(lambda: trainer_of(callbacks=[Counts(1)])())
    assert found(report) == ("history", "the metric 'count'")
    report = verify(lambda: trainer_of(callbacks=[BadlyRestored(2)])())
    assert found(report) == ("callback", "the state of the callback BadlyRestored/0")
    assert verify(lambda: trainer_of(callbacks=[BadlyRestored(1)])()).is_exact


def test_a_callback_that_seeds_a_generator_is_reported_as_the_rng_state():
    seeds = itertools.count()
    probe = Probe(on_train_epoch_start=lambda trainer, **_: np.random.seed(next(seeds)))
    assert found(verify(trainer_of(callbacks=[probe]))) == ("random state", "the RNG state of numpy")


# --- what is rejected --------------------------------------------------------------------------------------------


def test_stops_outside_of_the_run_are_rejected():
    with pytest.raises(ValueError, match="`stops` is 0"):
        verify(trainer_of(), stops=[0])
    with pytest.raises(ValueError, match=r"`stops` has \[13\], but the run has 12 steps"):
        verify(trainer_of(), stops=[3, 13])


def test_data_without_length_needs_stops():
    with pytest.raises(ValueError, match=r"no length\. Expected `stops`"):
        verify(trainer_of(), Stream(DATASET))
