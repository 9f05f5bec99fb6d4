"""`verify_resume`: what passes, what fails and why, what it leaves alone, and what it refuses."""

from __future__ import annotations

import itertools
import random
import tempfile
from pathlib import Path

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
    def make_trainer():
        model = make_model()
        return Trainer(model, loss_func, optimizer_class(model.parameters(), lr=0.01), callbacks=callbacks)

    return make_trainer


def verify(make_trainer, dataset=DATASET, **kwargs):
    return verify_resume(make_trainer, dataset, **{**ARGUMENTS, **kwargs})


def found(report):
    """The kind and the name of the difference; the report can be printed."""
    assert not report.is_exact
    with pytest.raises(AssertionError, match="Likely cause"):
        report.raise_if_different()
    assert report.difference.name in str(report)
    return report.difference.kind, report.difference.name


# --- what passes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmentation_schedule_accumulation_average_and_early_stopping(tmp_path, num_workers):
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
        "Resumed runs end as the uninterrupted one, bit by bit.\n12 steps, interrupted and resumed after step 3, 6, 8."
    )


def test_stops_can_be_chosen_and_one_epoch_be_enough():
    assert verify(trainer_of(), stops=[2, 5]).stops == (2, 5)
    assert verify(trainer_of(), num_epochs=1).stops == (3, 6)


def test_a_stream_without_length(tmp_path):
    report = verify(trainer_of(), Stream(DATASET), stops=[2, 6, 7])
    assert report.is_exact


def test_the_random_state_is_left_alone_and_so_are_files():
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    folders = set(Path(tempfile.gettempdir()).glob("verify_resume_*"))
    verify(trainer_of())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (str(np.random.get_state()), random.getstate()) == states[1:]
    assert set(Path(tempfile.gettempdir()).glob("verify_resume_*")) <= folders


# --- what fails --------------------------------------------------------------------------------------------------


class OwnGenerator(_runs.NoisySamples):
    """Augments by a generator that nobody seeds."""

    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng()

    def __getitem__(self, index):
        inputs, targets = super().__getitem__(index)
        return inputs + float(self.generator.normal()), targets


def test_a_generator_of_the_datasets_own_is_named():
    report = verify(trainer_of(_runs.Net), OwnGenerator())
    assert found(report) == ("batch", "the batch")
    assert "even without an interruption the run is not the same twice" in report.likely_cause
    assert "a generator of the dataset's own is not" in report.likely_cause
    assert "resumed after step 3, in step 4, rank 0: the batch." in str(report)


def test_a_stream_that_goes_on_elsewhere_is_named():
    class Endless(IterableDataset):
        def __init__(self):
            self.numbers = itertools.count()

        def __iter__(self):
            for number in itertools.islice(self.numbers, 24):
                yield torch.full((3,), float(number)), torch.zeros(1)

    report = verify(trainer_of(), Endless(), stops=[3])
    assert found(report) == ("batch", "the batch")


class Remembers(nn.Module):
    """Its output depends on the calls before, which are in no buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.seen = torch.zeros(1)

    def forward(self, inputs):
        self.seen = self.seen + 1
        return self.layer(inputs) + self.seen


def test_a_tensor_that_is_no_buffer_is_named():
    report = verify(trainer_of(Remembers))
    assert found(report) == ("loss", "the loss")
    assert "no buffer (`register_buffer`)" in report.likely_cause
    assert "even without" not in report.likely_cause


class Forgetful(torch.optim.AdamW):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["exp_avg"].zero_()


def test_a_field_of_the_optimizer_is_named():
    report = verify(trainer_of(optimizer_class=Forgetful))
    assert found(report) == ("optimizer", "`exp_avg` of the optimizer for `0.weight`")
    assert "right after the resume" in str(report)


class LosesExtraState(nn.Linear):
    def get_extra_state(self):
        return torch.ones(2)

    def set_extra_state(self, state):
        self.weight.data.zero_()


def test_a_parameter_is_named():
    assert found(verify(trainer_of(lambda: LosesExtraState(3, 1)))) == ("model", "`weight` of the model")


class StuckScheduler(torch.optim.lr_scheduler.StepLR):
    def load_state_dict(self, state_dict):
        super().load_state_dict({**state_dict, "last_epoch": 0})


def test_a_scheduler_is_named():
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


def test_a_callback_and_a_metric_are_named():
    report = verify(lambda: trainer_of(callbacks=[Counts(1)])())
    assert found(report) == ("history", "the metric 'count'")
    report = verify(lambda: trainer_of(callbacks=[BadlyRestored(2)])())
    assert found(report) == ("callback", "the state of the callback BadlyRestored/0")
    assert verify(lambda: trainer_of(callbacks=[BadlyRestored(1)])()).is_exact


def test_a_random_state_from_elsewhere_is_named():
    seeds = itertools.count()
    probe = Probe(on_train_epoch_start=lambda trainer, **_: np.random.seed(next(seeds)))
    assert found(verify(trainer_of(callbacks=[probe]))) == ("random state", "the random state of numpy")


# --- what is refused ---------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="`make_trainer` is a Trainer"):
        verify(trainer_of()())
    with pytest.raises(TypeError, match="`make_trainer` returned a int"):
        verify(lambda: 3)
    with pytest.raises(ValueError, match="`stops` is 0"):
        verify(trainer_of(), stops=[0])
    with pytest.raises(ValueError, match=r"`stops` has \[13\], but the run has 12 steps"):
        verify(trainer_of(), stops=[3, 13])
    with pytest.raises(ValueError, match=r"no length\. Give the `stops`"):
        verify(trainer_of(), Stream(DATASET))
