"""What a trainer or its callbacks carry along that has a state: it is trained, saved and restored like the model."""

from __future__ import annotations

import dataclasses
import functools
import random
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import CatMetric, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.wrappers import MinMaxMetric, Running

from _saved import assert_equal
from _support import Samples, history_of, make_dataset, train, weights_of
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, TrainerCallback
from pytorch_accelerated.exceptions import CheckpointError

NUM_SAMPLES, BATCH_SIZE = 22, 4  # the last batch is short
DATASET = Samples(make_dataset(NUM_SAMPLES))


class Scaled(nn.Module):
    """A loss function with a parameter and a buffer."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, outputs, targets):
        self.num_calls += 1
        return (torch.exp(-self.log_scale) * (outputs - targets) ** 2 + self.log_scale).mean()


class Sum:
    """A metric object with the two methods."""

    def __init__(self):
        self.total, self.count = 0.0, 0

    def update(self, values):
        self.total, self.count = self.total + float(values.sum()), self.count + len(values)

    def state_dict(self):
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state_dict):
        self.total, self.count = state_dict.pop("total"), state_dict.pop("count")  # consumes what it is given


# --- trainers, each with companions of one kind ------------------------------------------------------------------


class Base(Trainer):
    """Records the losses of all batches."""

    def __init__(self, loss_func=None, more_parameters=(), optimizer_class=torch.optim.Adam, **kwargs):
        torch.manual_seed(1)
        model, loss_func = nn.Linear(3, 1), nn.MSELoss() if loss_func is None else loss_func()
        held = [*loss_func.parameters(), *more_parameters]
        groups = [{"params": list(model.parameters())}, *([{"params": held, "lr": 0.05}] if held else [])]
        super().__init__(model, loss_func, optimizer_class(groups, lr=0.01), seed=0, **kwargs)

    def remembered(self):
        """Return what has to be the same at the end of an interrupted run."""
        return weights_of(self.model), self.loss_func.state_dict(), history_of(self)


class LearnsItsLoss(Base):
    def __init__(self, **kwargs):
        super().__init__(Scaled, **kwargs)


class LearnsATemperature(Base):
    """Holds a parameter that belongs to no module."""

    def __init__(self, **kwargs):
        self.temperature = nn.Parameter(torch.ones(2))
        super().__init__(more_parameters=[self.temperature], **kwargs)

    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        return {**output, "loss": (output["loss"] * self.temperature + self.temperature**2).sum()}

    def remembered(self):
        return *super().remembered(), self.temperature


class Adversarial(Base):
    """A second network with an optimizer and a schedule of its own, in containers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        critic = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.networks = {"critic": critic}
        self.optimizers = [torch.optim.Adam(critic.parameters(), lr=0.01)]
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizers[0], 0.9)

    def calculate_train_batch_loss(self, batch):
        inputs, real = batch
        critic, fake = self.networks["critic"], self.model(inputs)
        loss = (critic(fake.detach()) - critic(real)).mean()
        self.optimizers[0].zero_grad()
        loss.backward()
        self.optimizers[0].step()
        self.schedule.step()
        return {"loss": -critic(fake).mean(), "batch_size": len(inputs)}

    def remembered(self):
        return *super().remembered(), self.networks["critic"].state_dict(), self.optimizers[0].state_dict()


class AccumulatesInTheCritic(Adversarial):
    """Updates the critic every third batch: its gradients are part of the state."""

    num_calls = 0

    def calculate_train_batch_loss(self, batch):
        inputs, real = batch
        critic, fake = self.networks["critic"], self.model(inputs)
        (critic(fake.detach()) - critic(real)).mean().backward()
        if self.scheduler.last_epoch % 3 == 2:  # counted by the trainer, which restores it
            self.optimizers[0].step()
            self.optimizers[0].zero_grad()
        return {"loss": nn.functional.mse_loss(fake, real), "batch_size": len(inputs)}

    def create_scheduler(self):
        return torch.optim.lr_scheduler.StepLR(self.optimizer, 2)


class DrawsItsOwnNumbers(Base):
    """Uses generators of its own, of each kind."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.generators = (
            torch.Generator().manual_seed(1),
            np.random.default_rng(2),
            np.random.RandomState(3),
            random.Random(4),
        )

    def calculate_train_batch_loss(self, batch):
        of_torch, of_numpy, legacy, of_python = self.generators
        noise = torch.randn(1, generator=of_torch).item() + of_numpy.normal() + legacy.normal() + of_python.random()
        return super().calculate_train_batch_loss((batch[0] + 0.1 * noise, batch[1]))


class Measures(Base):
    """Metric objects of several kinds, on the trainer, in its model, and in a callback without a state of its own."""

    def __init__(self, callbacks=(), **kwargs):
        super().__init__(callbacks=[MeasuringCallback(), *callbacks], **kwargs)
        self.sum = Sum()
        self.metrics = MetricCollection({"mean": MeanMetric(), "all": CatMetric()})
        self.wrappers = Running(MeanMetric(), window=3), MinMaxMetric(MeanMetric())  # keep plain numbers besides
        self.model.error = MeanMetric()

    def train_epoch_start(self):
        super().train_epoch_start()
        if self.progress.num_batches_in_epoch == 0:
            self.metrics.reset()
            self.model.error.reset()

    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        self.sum.update(batch[1])
        self.metrics.update(output["loss"].detach())
        recent, extremes = (wrapper(output["loss"].detach()) for wrapper in self.wrappers)
        self.run_history.update_metric("wrappers", {"recent": recent, **extremes})
        self.model.error(output["loss"].detach())
        return output

    def train_epoch_end(self):
        self.run_history.update_metric("all", {**self.metrics.compute(), "error": self.model.error.compute()})

    def remembered(self):
        return *super().remembered(), self.sum.state_dict()


class MeasuringCallback(TrainerCallback):
    """Sums over the whole training."""

    def __init__(self):
        self.accuracy = MulticlassAccuracy(2)
        self.sum = Sum()

    def on_train_step_end(self, trainer, batch, **kwargs):
        self.sum.update(batch[0])
        self.accuracy.update(batch[0][:, :2], (batch[1][:, 0] > 0).long())

    def on_train_epoch_end(self, trainer, **kwargs):
        trainer.run_history.update_metric("callback", {**self.sum.state_dict(), "accuracy": self.accuracy.compute()})


class CreatesItWhenTheRunStarts(Base):
    """Creates a metric and a network in `training_run_start`, and resets another metric there."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.reset_sum = Sum()

    def training_run_start(self):
        self.sum, self.critic = Sum(), nn.Linear(1, 1)
        self.reset_sum.load_state_dict({"total": 0.0, "count": 0})

    def calculate_train_batch_loss(self, batch):
        with torch.no_grad():
            self.critic.weight += batch[1].mean()
        self.sum.update(batch[0])
        self.reset_sum.update(batch[0])
        return super().calculate_train_batch_loss(batch)

    def remembered(self):
        states = (self.sum, self.reset_sum, self.critic)
        return *super().remembered(), *(item.state_dict() for item in states)


class DrawsWhenTheRunStarts(Base):
    """Draws from the global generators in `training_run_start`, and again in each step."""

    def training_run_start(self):
        self.draw()

    def calculate_train_batch_loss(self, batch):
        return super().calculate_train_batch_loss((batch[0] + 0.1 * self.draw(), batch[1]))

    def draw(self):
        return torch.randn(()).item() + np.random.normal() + random.random()


@dataclasses.dataclass(slots=True)
class Record:
    item: object


class HoldsThemInObjects(Base):
    """Has modules, an optimizer and a generator in objects without a state: records, partials, methods, functions."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        record, partial, method, function, plain = (nn.BatchNorm1d(1) for _ in range(5))
        critic = nn.Linear(1, 1)
        self.by_record = {"list": [Record(Record(record))]}
        self.by_partial = functools.partial(nn.Module.__call__, partial)
        self.by_method = types.SimpleNamespace(call=method.forward)
        self.by_function = lambda outputs: function(outputs)
        self.helper = types.SimpleNamespace(norm=plain, critic=critic, generator=torch.Generator().manual_seed(5))
        self.helper.optimizer = torch.optim.Adam(critic.parameters(), lr=0.05)

    def calculate_train_batch_loss(self, batch):
        outputs, helper = self.model(batch[0]), self.helper
        norms = (self.by_record["list"][0].item.item, self.by_method.call, self.by_function, helper.norm)
        normalized = sum(norm(outputs) for norm in norms) + self.by_partial(outputs)
        helper.optimizer.zero_grad()
        nn.functional.mse_loss(helper.critic(outputs.detach()), batch[1]).backward()
        helper.optimizer.step()
        helper.critic.zero_grad()
        noise = torch.randn(1, generator=helper.generator)
        loss = nn.functional.mse_loss(outputs + noise, batch[1]) + helper.critic(outputs).mean() * normalized.std()
        return {"loss": loss, "batch_size": len(outputs)}

    def remembered(self):
        states = (item.state_dict() for item in self._loop_companions().modules.values())
        return *super().remembered(), *states


class Registers(Base):
    """Registers an object with Accelerate, which saves such objects in its own states."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        registered = Sum()
        self._accelerator.register_for_checkpointing(registered)
        self.get_sum = lambda: registered

    def calculate_train_batch_loss(self, batch):
        self.get_sum().update(batch[0])
        return super().calculate_train_batch_loss(batch)

    def remembered(self):
        return *super().remembered(), self.get_sum().state_dict()


KINDS = [
    LearnsItsLoss,
    LearnsATemperature,
    Adversarial,
    AccumulatesInTheCritic,
    DrawsItsOwnNumbers,
    Measures,
    CreatesItWhenTheRunStarts,
    DrawsWhenTheRunStarts,
    HoldsThemInObjects,
    Registers,
]


def run(trainer, num_epochs=2, **kwargs):
    return train(trainer, DATASET, num_epochs=num_epochs, **{"train_dataloader_kwargs": {"num_workers": 0}, **kwargs})


# --- resume ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("step", [2, 5, 8])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_as_the_uninterrupted_one(kind, accumulation, step, tmp_path):
    settings = {"gradient_accumulation_steps": accumulation, "gradient_clip_norm": 0.5}
    complete = run(kind(callbacks=[SaveTrainingStateCallback(tmp_path, save_every_n_steps=1)]), **settings)
    resumed = run(
        kind(callbacks=[SaveTrainingStateCallback(tmp_path / "other")]),
        resume_from=tmp_path / f"step_{step}",
        **settings,
    )
    assert_equal(resumed.remembered(), complete.remembered())


def test_what_objects_hold_is_found_once_and_by_where_it_is():
    trainer = HoldsThemInObjects()
    trainer.itself, trainer.many = trainer, [nn.Linear(1, 1)] * 2000
    companions = trainer._loop_companions()
    assert sorted(companions.modules) == [
        "by_function.function",
        "by_method.call.__self__",
        "by_partial.args[0]",
        "by_record['list'][0].item.item",
        "helper.critic",
        "helper.norm",
    ]
    assert list(companions.optimizers) == ["helper.optimizer"]
    assert list(companions.others) == ["helper.generator"]


class TrainsItsBiasFromTheSecondEpochOn(Base):
    """Adds it to the optimizer then. In the first epoch, its gradients add up, as nobody zeroes them."""

    def train_epoch_start(self):
        super().train_epoch_start()
        if self.run_history.current_epoch == 2:
            self.optimizer.add_param_group({"params": [self.model.bias], "lr": 0.1})

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.optimizer = torch.optim.SGD([self.model.weight], lr=0.01)


@pytest.mark.filterwarnings("ignore:The optimizer does not hold 1 of the 2 parameters")
@pytest.mark.parametrize("step", [2, 6])
def test_gradients_that_the_optimizer_does_not_hold_yet_are_restored(step, tmp_path):
    saving = [SaveTrainingStateCallback(tmp_path, save_every_n_steps=1)]
    complete = run(TrainsItsBiasFromTheSecondEpochOn(callbacks=saving))
    resumed = run(TrainsItsBiasFromTheSecondEpochOn(), resume_from=tmp_path / f"step_{step}")
    assert_equal(resumed.remembered(), complete.remembered())


@pytest.mark.parametrize(
    "optimizer_class", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad]
)
def test_the_optimizer_state_of_outside_parameters_is_restored(optimizer_class, tmp_path):
    saving = [SaveTrainingStateCallback(tmp_path, save_every_n_steps=4)]
    complete = run(LearnsItsLoss(optimizer_class=optimizer_class, callbacks=saving))
    resumed = run(LearnsItsLoss(optimizer_class=optimizer_class), resume_from=tmp_path / "step_4")
    assert_equal(resumed.remembered(), complete.remembered())
    assert complete.loss_func.log_scale != 0


def test_a_state_of_another_loss_function_is_refused_and_nothing_changes(tmp_path):
    run(LearnsItsLoss()).save_training_state(tmp_path / "state")
    other = LearnsItsLoss()
    other.loss_func.log_scale = nn.Parameter(torch.zeros(3))
    before = other.remembered()
    with pytest.raises(CheckpointError, match=r"in its `loss_func`.*log_scale \(1,\) instead of \(3,\)"):
        other.load_training_state(tmp_path / "state")
    assert_equal(other.remembered(), before)


def test_a_state_of_another_second_optimizer_is_refused_and_nothing_changes(tmp_path):
    run(Adversarial()).save_training_state(tmp_path / "state")
    other = Adversarial()
    other.optimizers = [torch.optim.Adam([nn.Parameter(torch.zeros(1))])]
    before = other.remembered()
    with pytest.raises(CheckpointError, match=r"in its `optimizers\[0\]`"):
        other.load_training_state(tmp_path / "state")
    assert_equal(other.remembered(), before)


def test_what_the_state_lacks_or_has_in_addition_is_named(tmp_path):
    trainer = Base()
    trainer.old_sum = Sum()
    run(trainer).save_training_state(tmp_path / "state")
    trainer = Base()
    trainer.new_sum = Sum()
    with pytest.warns(UserWarning, match=r"no state of these.*`new_sum`\. It has the state of these.*`old_sum`\."):
        run(trainer, 3, resume_from=tmp_path / "state")


class Unstorable(Sum):
    def state_dict(self):
        return {"when": object()}


class OnlySaves:
    def state_dict(self):
        return {}


@pytest.mark.parametrize(
    ("item", "reason"), [(Unstorable(), "`object` cannot be saved"), (OnlySaves(), "no `load_state_dict`")]
)
def test_a_run_that_saves_states_names_what_they_will_not_cover_before_it_starts(item, reason, tmp_path):
    trainer = Base(callbacks=[SaveTrainingStateCallback(tmp_path)])
    trainer.custom = item
    with pytest.warns(
        UserWarning, match=f"`custom`, a {type(item).__name__}, is not part of the training state.*{reason}"
    ):
        run(trainer)
    assert (tmp_path / "final").is_dir()


class SeesAWorkerDie(Sum):
    def state_dict(self):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")


def test_the_failure_of_a_worker_is_not_taken_for_one_of_an_object(tmp_path):
    """PyTorch raises it from a signal handler, so perhaps within any `state_dict`."""
    trainer = run(Base())
    trainer.custom = SeesAWorkerDie()
    with pytest.raises(RuntimeError, match=r"^DataLoader worker"):
        trainer.save_training_state(tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_out_is_not_saved(tmp_path):
    class WithTeacher(Adversarial):
        left_out_of_states = ("networks", "optimizers", "schedule")

    run(WithTeacher()).save_training_state(tmp_path / "state")
    state = torch.load(tmp_path / "state" / "trainer_state.pt")["trainer"]["companions"]
    assert state == {"modules": {}, "optimizers": {}, "parameters": []}


def test_aliases_parts_of_the_model_and_mocks_are_no_companions():
    from unittest import mock

    trainer = Base()
    trainer.alias, trainer.layers, trainer.the_optimizer = trainer.model, [trainer.model], trainer.optimizer
    trainer.double, trainer.cls, trainer.history = mock.MagicMock(), nn.Linear, trainer.run_history
    run(trainer)
    companions = trainer._loop_companions()
    assert (companions.modules, companions.optimizers, companions.others, companions.parameters) == ({}, {}, {}, [])


# --- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LearnsItsLoss, LearnsATemperature])
def test_a_checkpoint_contains_what_the_optimizer_trains(kind, tmp_path):
    trainer, other = run(kind()), kind()
    trainer.save_checkpoint(tmp_path / "model.pt")
    other.load_checkpoint(tmp_path / "model.pt")
    for left, right in zip(
        trainer.optimizer.param_groups[1]["params"], other.optimizer.param_groups[1]["params"], strict=True
    ):
        assert torch.equal(left, right)
        assert left.abs().sum() > 0


def test_a_checkpoint_that_does_not_fit_the_loss_function_changes_nothing(tmp_path):
    run(LearnsItsLoss()).save_checkpoint(tmp_path / "model.pt")
    other = LearnsItsLoss()
    other.loss_func.log_scale = nn.Parameter(torch.zeros(3))
    before = other.remembered()
    with pytest.raises(CheckpointError, match="in its `loss_func`"):
        other.load_checkpoint(tmp_path / "model.pt", load_optimizer=False)
    assert_equal(other.remembered(), before)


def test_a_checkpoint_loads_into_a_trainer_with_a_plain_loss_function(tmp_path):
    trainer, other = run(LearnsItsLoss()), Base()
    trainer.save_checkpoint(tmp_path / "model.pt")
    other.load_checkpoint(tmp_path / "model.pt", load_optimizer=False)
    assert_equal(weights_of(other.model), weights_of(trainer.model))


def test_a_checkpoint_of_a_plain_trainer_has_no_further_entries(tmp_path):
    run(Base(callbacks=())).save_checkpoint(tmp_path / "model.pt")
    assert set(torch.load(tmp_path / "model.pt")) == {"model_state_dict", "optimizer_state_dict"}


# --- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipping", [{}, {"gradient_clip_norm": 0.3}, {"gradient_clip_value": 0.05}])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_parameters_of_the_loss_get_the_gradient_of_the_mean_over_the_window_and_are_clipped(accumulation, clipping):
    trainer = run(
        LearnsItsLoss(optimizer_class=torch.optim.SGD),
        gradient_accumulation_steps=accumulation,
        train_dataloader_kwargs={"shuffle": False, "num_workers": 0},
        **clipping,
    )
    by_hand = LearnsItsLoss(optimizer_class=torch.optim.SGD)
    inputs, targets = (torch.stack(column) for column in zip(*DATASET, strict=True))
    model, loss_func, optimizer = by_hand.model, by_hand.loss_func, by_hand.optimizer
    parameters = [*model.parameters(), loss_func.log_scale]
    for _ in range(2):
        for window in range(0, NUM_SAMPLES, accumulation * BATCH_SIZE):
            rows = slice(window, window + accumulation * BATCH_SIZE)
            optimizer.zero_grad()
            loss_func(model(inputs[rows]), targets[rows]).backward()
            if "gradient_clip_norm" in clipping:
                nn.utils.clip_grad_norm_(parameters, 0.3)
            if "gradient_clip_value" in clipping:
                nn.utils.clip_grad_value_(parameters, 0.05)
            optimizer.step()
    torch.testing.assert_close(trainer.loss_func.log_scale, loss_func.log_scale)
    torch.testing.assert_close(trainer.model.weight, model.weight)


def test_a_group_of_outside_parameters_that_is_added_in_a_run_is_clipped_too():
    class AddsAGroup(TrainerCallback):
        def on_train_epoch_start(self, trainer, **kwargs):
            if trainer.run_history.current_epoch == 2:
                trainer.optimizer.add_param_group({"params": list(trainer.loss_func.parameters())})

        def on_optimizer_step_end(self, trainer, **kwargs):
            norms.append(trainer.loss_func.log_scale.grad.norm().item())

    norms = []
    trainer = LearnsItsLoss(callbacks=[AddsAGroup()])
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.01)
    run(trainer, gradient_clip_norm=1e-3)
    num_updates = len(norms) // 2
    assert max(norms[num_updates:]) <= 1e-3


def test_nothing_is_said_in_a_usual_run(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(Base(callbacks=[SaveTrainingStateCallback(tmp_path)]))
        run(Base(), 3, resume_from=tmp_path / "final")


def test_a_checkpoint_of_a_model_that_the_optimizer_does_not_train_has_no_further_entries(tmp_path):
    trainer = run(Base())
    trainer.model = nn.Linear(3, 1)
    trainer.save_checkpoint(tmp_path / "model.pt", save_optimizer=False)
    assert set(torch.load(tmp_path / "model.pt")) == {"model_state_dict"}


def test_a_checkpoint_with_outside_parameters_loads_into_a_trainer_without_optimizer(tmp_path):
    trainer = run(LearnsATemperature())
    trainer.save_checkpoint(tmp_path / "model.pt")
    other = Trainer(nn.Linear(3, 1), None, None)
    other.load_checkpoint(tmp_path / "model.pt")
    assert_equal(weights_of(other.model), weights_of(trainer.model))
