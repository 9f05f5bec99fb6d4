"""What programs written for 0.1.61 override and observe in a run of the trainer.

The numbers were measured with 0.1.61, or follow from the formula next to them.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext
from functools import partial
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from torch.optim.lr_scheduler import OneCycleLR

from _support import (
    IN_ORDER,
    Batches,
    EventRecorder,
    HookRecorder,
    Probe,
    Samples,
    losses,
    make_dataset,
    make_model,
    make_trainer,
    mse,
    recorder_of,
    train,
    weights_of,
)
from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated import callbacks as library_callbacks
from pytorch_accelerated._data.limits import DataLoaderSlice
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    LimitBatchesCallback,
    LimitEvalStepsCallback,
    ModelEmaCallback,
    PreemptionCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    get_default_callbacks,
)
from pytorch_accelerated.schedulers import CosineLrScheduler
from pytorch_accelerated.trainer import TrainerWithTimmScheduler

BEHIND = {"num_workers": 0}
"""Keyword arguments of a loader whose data, or collate function, cannot be sent to another process."""


class Given:
    """An iterable of these batches, without a length."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def subclass(base=Trainer, **members):
    return type("Subclass", (base,), members)


# --- 4.1: epochs under a limit of updates ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_epochs", "num_batches", "num_accumulated", "limit", "expected"),
    [
        (10, 4, 1, 8, 2),
        (10, 4, 1, 9, 3),
        (10, 4, 1, 1, 1),
        (10, 4, 2, 3, 2),
        (10, 5, 2, 3, 1),  # the last update of an epoch has one batch
        (3, 2, 1, 7, 3),  # 0.1.61 would make the run longer
        (3, 2, 1, 6, 3),
        (10, 4, 1, None, 10),
    ],
)
@pytest.mark.filterwarnings("ignore:`create_scheduler_fn` returned None:UserWarning")
def test_the_number_of_epochs_is_that_of_the_run(num_epochs, num_batches, num_accumulated, limit, expected):
    """Row 4.1."""
    trainer = make_trainer()
    seen = []
    kwargs = {"num_epochs": TrainerPlaceholderValues.NUM_EPOCHS}
    schedule = partial(lambda optimizer, num_epochs: seen.append(num_epochs), **kwargs)
    train(
        trainer,
        4 * num_batches,
        num_epochs=num_epochs,
        max_num_train_steps=limit,
        gradient_accumulation_steps=num_accumulated,
        create_scheduler_fn=schedule,
    )
    num_updates_per_epoch = math.ceil(num_batches / num_accumulated)
    assert (trainer.run_config.num_epochs, seen) == (expected, [expected])
    assert trainer.progress.num_updates == min(limit or math.inf, num_epochs * num_updates_per_epoch)
    assert trainer.run_history.current_epoch == expected + 1


TOTAL = TrainerPlaceholderValues.NUM_EPOCHS * TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH


@pytest.mark.parametrize(
    ("schedule", "largest_last_rate"),
    [
        (CosineLrScheduler.create_scheduler_fn(), 0.004),
        (partial(OneCycleLR, max_lr=0.1, total_steps=TOTAL), 1e-3),
    ],
    ids=["cosine", "one cycle"],
)
def test_a_schedule_ends_with_a_run_of_few_updates(schedule, largest_last_rate):
    """Row 4.1: 8 updates of 40, at rates of up to 0.1."""
    rates, seen = recorder_of(lambda trainer: trainer.optimizer.param_groups[0]["lr"], "on_optimizer_step_start")
    train(make_trainer(callbacks=[rates]), 16, num_epochs=10, max_num_train_steps=8, create_scheduler_fn=schedule)
    assert len(seen) == 8
    assert max(seen) > 0.09
    assert seen[-1] <= largest_last_rate


def test_without_a_length_the_number_of_epochs_is_the_one_asked_for():
    """Row 4.1."""
    trainer = make_trainer()
    train(trainer, Batches(make_dataset(16), 4), num_epochs=10, max_num_train_steps=8)
    assert (trainer.run_config.num_epochs, trainer.progress.num_updates) == (10, 8)


def test_a_resumed_run_keeps_the_limit_and_the_number_of_epochs(tmp_path):
    """Row 4.1: the schedule goes on as if there had been no interruption."""
    kwargs = {
        "num_epochs": 10,
        "max_num_train_steps": 8,
        "create_scheduler_fn": CosineLrScheduler.create_scheduler_fn(),
    }
    uninterrupted = train(make_trainer(seed=1), **kwargs)
    saving = SaveTrainingStateCallback(tmp_path, save_every_n_steps=3)
    train(make_trainer(seed=1, callbacks=[saving]), **kwargs)
    resumed = train(make_trainer(seed=1), resume_from=tmp_path / "step_3", **kwargs)
    assert resumed.run_config.num_epochs == 2
    assert resumed.progress == uninterrupted.progress
    assert torch.equal(resumed.model.weight, uninterrupted.model.weight)


def test_the_number_of_epochs_of_an_overridden_configuration_ends_the_run():
    """Beside row 4.1: 0.1.61 counts the epochs of `run_config`."""

    def create_run_config(self, **kwargs):
        return dataclasses.replace(Trainer._create_run_config(self, **kwargs), num_epochs=1)

    trainer = make_trainer(cls=subclass(_create_run_config=create_run_config))
    assert len(losses(train(trainer, num_epochs=3))) == 1


# --- 4.2: no gradients in evaluation -----------------------------------------------------------------------------

EVAL_EVENTS = ("on_eval_epoch_start", "on_eval_step_start", "on_eval_step_end", "on_eval_epoch_end")
TRAIN_EVENTS = ("on_train_epoch_start", "on_train_step_start", "on_backward_start", "on_train_step_end")


class GradientModes(Trainer):
    """Records whether gradients are on, in each hook of an evaluation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.modes = []

    def eval_epoch_start(self):
        super().eval_epoch_start()
        self.modes.append(torch.is_grad_enabled())

    def calculate_eval_batch_loss(self, batch):
        outputs = self.model(batch[0])
        self.modes += [torch.is_grad_enabled(), outputs.requires_grad]
        outputs.numpy()  # which PyTorch refuses if there is a graph
        return {"loss": self.loss_func(outputs, batch[1]), "batch_size": len(batch[0])}

    def calculate_predictions(self, batch):
        outputs = self.model(batch[0])
        self.modes += [torch.is_grad_enabled(), outputs.requires_grad]
        return outputs

    def eval_epoch_end(self):
        self.modes.append(torch.is_grad_enabled())


def test_an_overridden_evaluation_and_its_events_run_without_gradients():
    """Row 4.2: in training, in the middle of an epoch, in `evaluate`, and in `predict`."""
    off, seen = recorder_of(lambda trainer: torch.is_grad_enabled(), *EVAL_EVENTS)
    trainer = make_trainer(cls=GradientModes, callbacks=[StepBasedEvaluationCallback(1), off])
    train(trainer, Samples(make_dataset(8)), eval_dataset=make_dataset(8), train_dataloader_kwargs=BEHIND)
    trainer.evaluate(make_dataset(8))
    trainer.predict(make_dataset(8))
    assert len(trainer.modes) > 20
    assert not any(trainer.modes)
    assert len(seen) >= 12
    assert not any(seen)
    assert torch.is_grad_enabled()


def test_training_has_gradients_again_after_an_evaluation():
    """Row 4.2."""
    on, seen = recorder_of(lambda trainer: torch.is_grad_enabled(), *TRAIN_EVENTS)
    trainer = make_trainer(cls=GradientModes, callbacks=[StepBasedEvaluationCallback(1), on])
    before = trainer.model.weight.clone()
    train(trainer, 8, num_epochs=2, eval_dataset=make_dataset(8))
    assert all(seen)
    assert not torch.equal(trainer.model.weight, before)


def test_a_failed_evaluation_leaves_gradients_on():
    """Row 4.2."""

    def fail(trainer, **kwargs):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        make_trainer(callbacks=[Probe(on_eval_step_end=fail)]).evaluate(make_dataset(8))
    assert torch.is_grad_enabled()


def test_the_samples_of_an_evaluation_are_loaded_without_gradients():
    """Row 4.2, measured with 0.1.61."""

    class Recording(Samples):
        modes = ()

        def __getitem__(self, index):
            self.modes = (*self.modes, torch.is_grad_enabled())
            return super().__getitem__(index)

    dataset = Recording(make_dataset(8))
    make_trainer().evaluate(dataset, dataloader_kwargs=BEHIND)
    assert set(dataset.modes) == {False}


def test_an_evaluation_step_may_turn_gradients_on():
    """Row 4.2: for adversarial examples, say."""

    def step(self, batch):
        with torch.enable_grad():
            inputs = batch[0].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.model(inputs).sum(), inputs)
        return {"loss": gradient.mean(), "batch_size": len(batch[0])}

    trainer = make_trainer(cls=subclass(calculate_eval_batch_loss=step))
    trainer.evaluate(make_dataset(8))
    assert losses(trainer, "evaluation_loss") == [pytest.approx(trainer.model.weight.mean().item())]


# --- 4.3: the size of a batch ------------------------------------------------------------------------------------


class Constant(nn.Module):
    """Returns one parameter, whatever it is called with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, *args, **kwargs):
        return self.weight


def sizes_seen(batches, loss_func, **kwargs):
    """Return the batch sizes that the default steps return, in training and in evaluation."""
    sizes = []

    def note(trainer, batch_output, **kwargs):
        sizes.append(batch_output["batch_size"])

    trainer = make_trainer(Constant(), loss_func=loss_func, callbacks=[Probe(on_train_step_end=note)])
    trainer.train(batches, num_epochs=1, **kwargs)
    probe = Probe(on_eval_step_end=note)
    trainer = make_trainer(Constant(), loss_func=loss_func, callbacks=[probe])
    trainer.evaluate(batches)
    return sizes


@pytest.mark.parametrize(
    ("inputs", "targets"),
    [
        (torch.zeros(5, 3, 2), torch.zeros(3, 1)),
        ([torch.zeros(length, 2) for length in (3, 4, 5)], torch.zeros(3, 1)),
        ({"scale": torch.ones(1), "x": torch.zeros(3, 2)}, torch.zeros(3)),
        (pack_sequence([torch.zeros(length, 2) for length in (5, 4, 1)]), torch.zeros(3)),
        (torch.zeros(3, 2), torch.tensor(1.0)),
        (torch.zeros(3, 2), [1, 2]),
    ],
)
def test_the_size_of_a_batch_is_that_of_its_targets(inputs, targets):
    """Row 4.3: 5 inputs and 3 targets are 3 samples; the inputs tell where targets have no dimension."""
    assert sizes_seen(Given((inputs, targets)), lambda outputs, targets: outputs.sum()) == [3, 3]


def test_the_labels_of_a_mapping_tell_the_size_of_a_batch():
    """Row 4.3."""

    class Model(Constant):
        def forward(self, scale, x, labels):
            return {"loss": self.weight * scale.sum()}

    batch = {"scale": torch.ones(1), "x": torch.zeros(5, 3), "labels": torch.zeros(3)}
    trainer = make_trainer(Model(), loss_func=None)
    assert trainer.calculate_train_batch_loss(batch)["batch_size"] == 3
    assert trainer.calculate_eval_batch_loss(batch)["batch_size"] == 3


class SequenceFirst(nn.Module):
    """A linear model of inputs of shape (length, batch, features)."""

    def __init__(self):
        super().__init__()
        self.layer = make_model()

    def forward(self, inputs):
        return self.layer(inputs.mean(dim=0))


def sequence_first(samples):
    return torch.stack([inputs for inputs, _ in samples], dim=1), torch.stack([targets for _, targets in samples])


@pytest.mark.parametrize("num_accumulated", [1, 2, 3])
def test_losses_and_gradients_of_sequence_first_inputs_are_means_over_samples(num_accumulated):
    """Row 4.3: batches of 4, 4 and 2 samples of 7 steps; by hand, the mean over the samples of each update."""
    generator = torch.Generator().manual_seed(3)
    inputs, targets = torch.randn(10, 7, 3, generator=generator), torch.randn(10, 1, generator=generator)
    dataset = list(zip(inputs, targets, strict=True))
    trainer = make_trainer(SequenceFirst())
    kwargs = {"collate_fn": sequence_first, "eval_dataset": dataset, "gradient_accumulation_steps": num_accumulated}
    train(trainer, dataset, train_dataloader_kwargs={**IN_ORDER, **BEHIND}, eval_dataloader_kwargs=BEHIND, **kwargs)

    model = SequenceFirst()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [slice(0, 4), slice(4, 8), slice(8, 10)]
    for start in range(0, 3, num_accumulated):
        window = batches[start : start + num_accumulated]
        rows = slice(window[0].start, window[-1].stop)
        optimizer.zero_grad()
        mse(model(inputs[rows].transpose(0, 1)), targets[rows]).backward()
        optimizer.step()
    torch.testing.assert_close(weights_of(trainer.model), weights_of(model))
    expected = mse(model(inputs.transpose(0, 1)), targets).item()
    assert losses(trainer, "eval_loss_epoch") == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize("is_packed", [False, True])
def test_the_loss_of_ragged_inputs_is_the_mean_over_samples(is_packed):
    """Row 4.3: the squared error of sample i is i * i."""
    lengths = [9, 2, 3, 4, 1, 2, 6]

    def collate(samples):
        inputs = [inputs for inputs, _ in samples]
        targets = torch.stack([target for _, target in samples])
        return pack_sequence(inputs, enforce_sorted=False) if is_packed else inputs, targets

    class Zeros(Constant):
        def forward(self, inputs):
            inputs = unpack_sequence(inputs) if isinstance(inputs, PackedSequence) else inputs
            return self.weight + torch.zeros(len(inputs))

    dataset = [(torch.full((length, 3), float(i)), torch.tensor(float(i))) for i, length in enumerate(lengths)]
    trainer = make_trainer(Zeros())
    trainer.evaluate(dataset, per_device_batch_size=4, collate_fn=collate, dataloader_kwargs=BEHIND)
    assert losses(trainer, "evaluation_loss") == [pytest.approx(sum(i * i for i in range(7)) / 7)]


# --- 4.4: gather and padding -------------------------------------------------------------------------------------


def test_a_tensor_of_padding_only_is_no_rows():
    """Row 4.4."""
    trainer = make_trainer()
    assert len(trainer.gather(torch.tensor([-1] * 7), padding_value=-1)) == 0
    assert trainer.gather(torch.full((1, 7), -1.0), padding_value=-1).shape == (0, 7)
    assert trainer.gather(torch.full((2, 3), math.nan), padding_value=math.nan).shape == (0, 3)
    nested = trainer.gather({"a": [torch.tensor([[5, 5]])], "b": torch.tensor([5, 1])}, padding_value=5)
    assert nested["a"][0].shape == (0, 2)
    assert nested["b"].tolist() == [5, 1]


@pytest.mark.parametrize(
    "values", [[1, -1, 2], [[-1, -1], [1, -1]], [[-1.0, 0.0]], [True, True], [], torch.tensor(-1.0)], ids=str
)
def test_real_values_that_equal_the_padding_are_kept(values):
    """Row 4.4."""
    tensor = torch.as_tensor(values)
    assert torch.equal(make_trainer().gather(tensor, padding_value=-1), tensor)


def test_without_a_padding_value_everything_is_kept():
    """Row 4.4."""
    tensor = torch.tensor([-1] * 7)
    assert torch.equal(make_trainer().gather(tensor), tensor)


def test_a_detection_trainer_gets_nothing_back_for_no_predictions():
    """Row 4.4: one row of padding stands for the predictions of a batch without any."""

    class Detector(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.found = []

        def calculate_eval_batch_loss(self, batch):
            found = [[*row.tolist(), 1.0] for row in batch[0] if row[0] > 0]
            predictions = torch.tensor(found or [[-1.0] * 4])
            self.found.append(self.gather(predictions, padding_value=-1))
            return {"loss": self.model(batch[0]).mean(), "batch_size": len(batch[0])}

    inputs = torch.tensor([[1.0, 2.0, 3.0], [1.0, -1.0, 3.0], [-1.0, 2.0, 3.0], [-2.0, 2.0, 3.0]])
    trainer = make_trainer(cls=Detector)
    trainer.evaluate(Given((inputs[:2], torch.zeros(2)), (inputs[2:], torch.zeros(2))))
    assert [len(found) for found in trainer.found] == [2, 0]
    assert torch.cat(trainer.found)[:, -1].tolist() == [1.0, 1.0]


# --- 4.5: clipping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "expected"), [({}, 0), ({"gradient_clip_value": 0.1}, 2), ({"gradient_clip_norm": 0.1}, 2)], ids=str
)
@pytest.mark.parametrize("num_accumulated", [1, 2])
def test_an_override_of_clipping_is_called_only_if_clipping_was_asked_for(kwargs, expected, num_accumulated):
    """Row 4.5: once per update."""
    calls = []
    trainer = make_trainer(cls=subclass(_clip_gradients=lambda self: calls.append(self.run_config)))
    train(trainer, 8 * num_accumulated, gradient_accumulation_steps=num_accumulated, **kwargs)
    assert len(calls) == expected


# --- 4.6: the events of a step -----------------------------------------------------------------------------------


class OwnEpochs(HookRecorder):
    """Has an epoch loop as programs for 0.1.61 write it."""

    returned = None

    def _run_train_epoch(self, train_dl):
        self.train_epoch_start()
        self._loss_tracker.reset()
        self.callback_handler.call_event("on_train_epoch_start", self)
        for step, batch in enumerate(train_dl):
            self.callback_handler.call_event("on_train_step_start", self, batch=batch, step=step)
            self._perform_forward_and_backward_passes(batch, step)
            if (step + 1) % self.run_config.gradient_accumulation_steps == 0 or step + 1 == len(train_dl):
                if self.run_config.gradient_clip_value is not None:
                    self._clip_gradients()
                self.optimizer_step()
                self.scheduler_step()
                self.optimizer_zero_grad()
        self.train_epoch_end()
        self._add_epoch_loss_to_run_history("train_loss_epoch")
        self.callback_handler.call_event("on_train_epoch_end", self)
        return self.returned


STEP = ["on_train_step_start", "calculate_train_batch_loss", "on_backward_start", "backward_step", "on_train_step_end"]
UPDATE = ["optimizer_step", "scheduler_step", "optimizer_zero_grad"]


@pytest.mark.parametrize("returned", [None, False])
def test_an_own_epoch_loop_gets_a_start_and_an_end_of_each_step(returned):
    """Row 4.6: the library fires the end of a step where it does not make the updates. Epochs are counted."""
    log = []
    trainer = make_trainer(cls=OwnEpochs, log=log, callbacks=[EventRecorder(log)])
    trainer.returned = returned
    log.clear()
    train(trainer, 8, num_epochs=2)
    epoch = ["train_epoch_start", "on_train_epoch_start", *STEP, *UPDATE, *STEP, *UPDATE]
    epoch += ["train_epoch_end", "on_train_epoch_end", "training_run_epoch_end", "on_training_run_epoch_end"]
    end = ["training_run_end", "on_training_run_end"]
    assert log == ["training_run_start", "on_training_run_start", *epoch, *epoch, *end]
    assert trainer.run_history.current_epoch == 3
    assert len(losses(trainer)) == 2


@pytest.mark.parametrize("num_accumulated", [1, 2])
def test_an_own_epoch_loop_trains_like_that_of_the_library(num_accumulated):
    """Row 4.6: the same order of samples in each epoch, the same losses, weights, updates and states."""
    results = []
    for cls in (subclass(OwnEpochs), subclass(HookRecorder)):
        trainer = make_trainer(cls=cls, log=[], seed=3)
        schedule = CosineLrScheduler.create_scheduler_fn()
        kwargs = {"gradient_accumulation_steps": num_accumulated, "create_scheduler_fn": schedule}
        train(trainer, 16, num_epochs=3, eval_dataset=make_dataset(8), gradient_clip_value=0.5, **kwargs)
        results.append((trainer, weights_of(trainer.model)))
    (own, own_weights), (library, weights) = results
    torch.testing.assert_close(own_weights, weights)
    assert losses(own) == pytest.approx(losses(library))
    assert losses(own, "eval_loss_epoch") == pytest.approx(losses(library, "eval_loss_epoch"))
    assert own.progress == library.progress


def test_an_own_epoch_loop_saves_states_after_steps_and_can_be_resumed_from_an_epoch(tmp_path):
    """Row 4.6."""
    cls = subclass(OwnEpochs)
    saving = SaveTrainingStateCallback(tmp_path, save_every_n_steps=3, save_every_n_epochs=1)
    uninterrupted = train(make_trainer(cls=cls, log=[], seed=3, callbacks=[saving]), 16, num_epochs=3)
    assert {"step_3", "epoch_1", "epoch_2"} <= {path.name for path in tmp_path.iterdir()}
    resumed = train(make_trainer(cls=cls, log=[], seed=3), 16, num_epochs=3, resume_from=tmp_path / "epoch_1")
    torch.testing.assert_close(weights_of(resumed.model), weights_of(uninterrupted.model), rtol=0, atol=0)


def test_an_own_epoch_loop_ends_the_run_by_what_it_returns_or_by_the_limit_of_updates():
    """Row 4.6."""
    for returned, kwargs, expected in ((True, {}, 1), (None, {"max_num_train_steps": 8}, 2)):
        trainer = make_trainer(cls=subclass(OwnEpochs, returned=returned), log=[])
        train(trainer, 16, num_epochs=5, **kwargs)
        assert len(losses(trainer)) == expected


def test_an_extended_epoch_loop_keeps_the_order_of_events_and_resumes_exactly(tmp_path):
    """Row 4.6: a method that calls the library's is no loop of one's own."""

    def run_train_epoch(self, train_dl):
        self.log.append("epoch")
        return Trainer._run_train_epoch(self, train_dl)

    cls = subclass(HookRecorder, _run_train_epoch=run_train_epoch)
    log = []
    trainer = make_trainer(cls=cls, log=log, callbacks=[EventRecorder(log)])
    train(trainer, 4, create_scheduler_fn=CosineLrScheduler.create_scheduler_fn())
    start = log.index("on_train_step_start")
    assert log[start : log.index("on_train_step_end")] == [
        *STEP[:-1],
        "on_optimizer_step_start",
        *UPDATE[:2],
        "on_optimizer_step_end",
        UPDATE[2],
    ]
    saving = SaveTrainingStateCallback(tmp_path, save_every_n_steps=3)
    uninterrupted = train(make_trainer(cls=cls, log=[], seed=3, callbacks=[saving]), 16, num_epochs=3)
    resumed = train(make_trainer(cls=cls, log=[], seed=3), 16, num_epochs=3, resume_from=tmp_path / "step_6")
    torch.testing.assert_close(weights_of(resumed.model), weights_of(uninterrupted.model), rtol=0, atol=0)
    assert losses(resumed) == losses(uninterrupted)


def test_an_epoch_loop_may_pass_another_loader_to_the_librarys():
    """Row 4.6."""

    def run_train_epoch(self, train_dl):
        return Trainer._run_train_epoch(self, DataLoaderSlice(train_dl, 2))

    recorder = EventRecorder()
    train(make_trainer(cls=subclass(_run_train_epoch=run_train_epoch), callbacks=[recorder]), 16, num_epochs=2)
    assert recorder.log.count("on_train_step_end") == recorder.log.count("on_optimizer_step_end") == 4


def test_an_own_step_gets_the_start_of_the_step_from_the_library():
    """Row 4.6: and fires the end itself, if it wants it."""
    log = []

    def step(self, batch, step):
        log.append("step")
        loss = self.loss_func(self.model(batch[0]), batch[1])
        loss.backward()
        self._update_loss_tracker(loss.detach(), len(batch[0]))
        output = {"loss": loss, "batch_size": len(batch[0])}
        self.callback_handler.call_event("on_train_step_end", self, batch=batch, batch_output=output, step=step)

    recorder = EventRecorder(log)
    trainer = make_trainer(cls=subclass(_perform_forward_and_backward_passes=step), callbacks=[recorder])
    plain = make_trainer()
    log.clear()
    train(trainer, 8, train_dataloader_kwargs=IN_ORDER)
    one_step = ["on_train_step_start", "step", "on_train_step_end", "on_optimizer_step_start", "on_optimizer_step_end"]
    assert log[2:12] == one_step * 2
    train(plain, 8, train_dataloader_kwargs=IN_ORDER)
    torch.testing.assert_close(weights_of(trainer.model), weights_of(plain.model))
    assert losses(trainer) == pytest.approx(losses(plain))


def test_the_end_of_a_step_tells_of_the_batch_that_was_processed():
    """Row 4.6: a step may pass another batch on, and several of them."""
    seen = []

    def step(self, batch, step):
        for factor in (2.0, 3.0):
            Trainer._perform_forward_and_backward_passes(self, (batch[0] * 0 + factor, batch[1]), step)

    def note(trainer, batch, batch_output, step, **kwargs):
        seen.append((batch[0].unique().item(), batch_output["batch_size"], step))

    probe = Probe(on_train_step_end=note)
    train(make_trainer(cls=subclass(_perform_forward_and_backward_passes=step), callbacks=[probe]), 8)
    assert seen == [(2.0, 4, 0), (3.0, 4, 0), (2.0, 4, 1), (3.0, 4, 1)]


def test_with_the_loops_of_the_library_the_end_of_a_step_comes_after_the_update():
    """Row 4.6, with the order of the events in a run."""
    rates, seen = recorder_of(lambda trainer: trainer.progress.num_updates, "on_train_step_start", "on_train_step_end")
    train(make_trainer(callbacks=[rates]), 8)
    assert seen == [0, 1, 1, 2]


# --- 4.7, 4.8: what makes the configuration and the callbacks ----------------------------------------------------


class OwnConfiguration(Trainer):
    """Overrides `_create_run_config` with the five arguments of 0.1.61."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []

    def _create_run_config(
        self,
        per_device_batch_size,
        num_epochs,
        gradient_accumulation_steps,
        max_num_train_steps,
        gradient_clip_value,
    ):
        numbers = per_device_batch_size, num_epochs, gradient_accumulation_steps, max_num_train_steps
        self.calls.append((*numbers, gradient_clip_value))
        return super()._create_run_config(*numbers, gradient_clip_value)  # by position


def test_the_configuration_is_made_from_five_keywords_in_every_kind_of_run():
    """Row 4.7: the values that 0.1.61 passes."""
    trainer = make_trainer(cls=OwnConfiguration)
    kwargs = {"gradient_accumulation_steps": 2, "max_num_train_steps": 3, "gradient_clip_value": 0.5}
    train(trainer, 16, num_epochs=7, **kwargs)
    config = trainer.run_config
    assert (config.num_epochs, config.train_per_device_batch_size, config.gradient_accumulation_steps) == (2, 4, 2)
    train(trainer)
    trainer.evaluate(make_dataset(4), per_device_batch_size=2)
    trainer.predict(make_dataset(4))
    assert trainer.calls == [
        (4, 7, 2, 3, 0.5),
        (4, 1, 1, None, None),
        (2, 1, 1, None, None),
        (8, 1, 1, None, None),
    ]


def test_the_bound_of_the_norm_is_passed_on_only_if_there_is_one():
    """Row 4.7."""
    calls = []

    def create_run_config(self, **kwargs):
        calls.append(sorted(kwargs))
        return Trainer._create_run_config(self, **kwargs)

    trainer = make_trainer(cls=subclass(_create_run_config=create_run_config))
    train(trainer)
    train(trainer, gradient_clip_norm=1.0)
    assert [len(names) for names in calls] == [5, 6]
    assert set(calls[1]) - set(calls[0]) == {"gradient_clip_norm"}
    assert trainer.run_config.gradient_clip_norm == 1.0


def test_an_override_that_makes_the_handler_takes_nothing_and_reads_the_callbacks():
    """Row 4.8."""
    recorder, added = EventRecorder(), EventRecorder()

    def create_callback_handler(self):
        self._callbacks = [*self._callbacks, added]
        return Trainer._create_callback_handler(self)

    cls = subclass(_create_callback_handler=create_callback_handler)
    train(make_trainer(cls=cls, callbacks=[recorder]))
    assert recorder.log == added.log
    assert recorder.log[-1] == "on_training_run_end"
    assert make_trainer(cls=cls, callbacks=iter([recorder]))._callbacks == [recorder, added]


# --- 4.9: the names of a subclass --------------------------------------------------------------------------------

NAMES_OF_0_1_61 = {
    *("_accelerator", "_callbacks", "_eval_dataloader", "_eval_dl_kwargs", "_loss_tracker", "_pad_uneven_eval_batches"),
    *("_train_dataloader", "_train_dl_kwargs", "callback_handler", "collate_fn", "create_scheduler_fn", "eval_dataset"),
    *("loss_func", "model", "optimizer", "run_config", "run_history", "scheduler", "train_dataset"),
    *("_add_epoch_loss_to_run_history", "_check_eval_batch_size", "_clip_gradients", "_create_accelerator"),
    *("_create_callback_handler", "_create_run_config", "_perform_forward_and_backward_passes"),
    *("_prepare_model_optimizer_and_dataloaders", "_run_eval_epoch", "_run_evaluation", "_run_train_epoch"),
    *("_run_training", "_update_loss_tracker", "backward_step", "calculate_eval_batch_loss"),
    *("calculate_train_batch_loss", "create_eval_dataloader", "create_scheduler", "create_train_dataloader", "device"),
    *("eval_epoch_end", "eval_epoch_start", "evaluate", "evaluation_run_end", "evaluation_run_start", "gather"),
    *("get_default_eval_dl_kwargs", "get_default_train_dl_kwargs", "get_model", "load_checkpoint"),
    *("load_training_state", "optimizer_step", "optimizer_zero_grad", "print", "save_checkpoint"),
    *("save_training_state", "scheduler_step", "train", "train_epoch_end", "train_epoch_start", "training_run_end"),
    *("training_run_epoch_end", "training_run_start"),
}
"""The attributes and methods of a trainer of 0.1.61."""

FREE_NAMES = sorted(
    {
        *(name for name in dir(make_trainer()) if not name.startswith(("__", "_loop_"))),
        *("_metric_prefix", "_window", "_call", "_interrupt", "_run", "_agreement", "_direct", "_seed", "num_updates"),
    }
    - NAMES_OF_0_1_61
)
"""Names that a subclass may choose: those that the library has added, except its internal ones, and some others."""


def all_callbacks(folder):
    """Callbacks of the library that ask the trainer for something."""
    return [
        *get_default_callbacks(progress_bar=False),
        library_callbacks.ProgressBarCallback,
        LimitBatchesCallback(3),
        LimitEvalStepsCallback(2),
        StepBasedEvaluationCallback(2),
        EarlyStoppingCallback(early_stopping_patience=5),
        SaveBestModelCallback(str(folder / "best.pt")),
        ModelEmaCallback(save_path=str(folder / "ema.pt")),
        library_callbacks.GradientNormCallback(),
        SaveTrainingStateCallback(folder / "states", in_background=True),
        PreemptionCallback(),
    ]


def use_with_all_callbacks(cls, folder):
    """Train, resume, evaluate, and return what came of it."""
    log = []
    for num_epochs in (1, 2):
        trainer = make_trainer(cls=cls, seed=3, callbacks=[*all_callbacks(folder), EventRecorder(log)])
        kwargs = {"eval_dataset": make_dataset(16), "gradient_clip_norm": 1.0, "resume_from": "latest"}
        train(trainer, 16, num_epochs=num_epochs, **kwargs)
    trainer.evaluate(make_dataset(8))
    history = trainer.run_history
    return log, weights_of(trainer.model), {name: losses(trainer, name) for name in sorted(history.get_metric_names())}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return use_with_all_callbacks(Trainer, tmp_path_factory.mktemp("plain"))


def assert_uses_the_same(cls, folder, expected):
    log, weights, metrics = use_with_all_callbacks(cls, folder)
    assert log == expected[0]
    torch.testing.assert_close(weights, expected[1], rtol=0, atol=0)
    assert metrics == expected[2]


def test_the_names_that_crashed_are_among_the_free_ones():
    """Row 4.9."""
    assert set(FREE_NAMES) >= {"_metric_prefix", "_window", "_call", "_interrupt", "process_index", "progress"}
    assert set(FREE_NAMES) >= {"stop_reason", "evaluate_now", "limit_batches", "mean_loss", "predict"}
    assert len(FREE_NAMES) > 30


@pytest.mark.parametrize("name", FREE_NAMES)
def test_a_subclass_may_have_an_attribute_of_any_name_that_0_1_61_does_not_use(name, tmp_path):
    """Row 4.9: set to a text before, or after, the constructor of the trainer."""

    class Named(Trainer):
        def __init__(self, *args, **kwargs):
            setattr(self, name, "mine")
            super().__init__(*args, **kwargs)
            setattr(self, name, "mine")

    trainer = make_trainer(cls=Named, callbacks=all_callbacks(tmp_path))
    train(trainer, 16, num_epochs=2, eval_dataset=make_dataset(8), gradient_clip_norm=1.0)
    trainer.evaluate(make_dataset(8))
    assert getattr(trainer, name) == "mine"


def test_a_subclass_may_have_all_of_these_attributes_and_trains_the_same(tmp_path, expected):
    """Row 4.9."""

    class Named(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for name in FREE_NAMES:
                setattr(self, name, "mine")

    assert_uses_the_same(Named, tmp_path, expected)


def test_a_subclass_may_have_methods_of_all_of_these_names_and_trains_the_same(tmp_path, expected):
    """Row 4.9."""

    def mine(self, one, another):
        raise AssertionError

    assert_uses_the_same(subclass(**dict.fromkeys(FREE_NAMES, mine)), tmp_path, expected)


# --- 4.10: resuming ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["a folder/of mine", "latest/but not the newest"])
def test_an_own_method_reads_the_state_to_resume(path):
    """Row 4.10: it is called once, with the path as given, and its result decides in which epoch training continues."""
    calls = []

    def load_training_state(self, *args, **kwargs):
        calls.append((args, kwargs, self.scheduler is not None, self.run_config is not None))
        return {"current_epoch": 3, "mine": 1}

    recorder, epochs = recorder_of(lambda trainer: trainer.run_history.current_epoch, "on_train_epoch_start")
    trainer = make_trainer(cls=subclass(load_training_state=load_training_state), callbacks=[recorder])
    train(trainer, num_epochs=4, resume_from=path, create_scheduler_fn=CosineLrScheduler.create_scheduler_fn())
    assert calls == [((path,), {}, True, True)]
    assert epochs == [3, 4]
    assert trainer.run_history.current_epoch == 5
    assert trainer.is_resumed


def test_an_own_method_may_load_a_checkpoint_instead(tmp_path):
    """Row 4.10: scheduler, model and optimizer are there to be loaded."""
    schedule = CosineLrScheduler.create_scheduler_fn()
    first = train(make_trainer(), num_epochs=1, create_scheduler_fn=schedule)
    first.save_checkpoint(tmp_path / "mine.pt")

    def load_training_state(self, path):
        self.load_checkpoint(path)
        return {"current_epoch": 2}

    weights = []
    probe = Probe(on_training_run_start=lambda trainer, **kwargs: weights.append(weights_of(trainer.get_model())))
    trainer = make_trainer(make_model(seed=9), cls=subclass(load_training_state=load_training_state), callbacks=[probe])
    train(trainer, num_epochs=2, resume_from=tmp_path / "mine.pt", create_scheduler_fn=schedule)
    torch.testing.assert_close(weights[0], weights_of(first.model), rtol=0, atol=0)
    assert len(losses(trainer)) == 1


@pytest.mark.parametrize("resume_from", ["path", "latest"])
@pytest.mark.parametrize("step", [3, 4, 6])
def test_an_extended_method_resumes_exactly(tmp_path, step, resume_from):
    """Row 4.10: within an epoch, between epochs, and from the newest state."""
    calls = []

    def load_training_state(self, path):
        calls.append(path)
        return Trainer.load_training_state(self, path)

    def run(cls, **kwargs):
        saving = SaveTrainingStateCallback(tmp_path, save_every_n_steps=step, max_checkpoints=None)
        trainer = make_trainer(cls=cls, seed=3, callbacks=[saving])
        return train(trainer, 16, **{"num_epochs": 3, "eval_dataset": make_dataset(8), **kwargs})

    uninterrupted = run(Trainer)
    for state in tmp_path.iterdir():
        if state.is_dir() and state.name != f"step_{step}":
            for file in state.iterdir():
                file.unlink()
            state.rmdir()
    given = resume_from if resume_from == "latest" else str(tmp_path / f"step_{step}")
    resumed = run(subclass(load_training_state=load_training_state), resume_from=given)
    assert calls == [str(tmp_path / f"step_{step}")]
    torch.testing.assert_close(weights_of(resumed.model), weights_of(uninterrupted.model), rtol=0, atol=0)
    assert losses(resumed) == losses(uninterrupted)
    assert losses(resumed, "eval_loss_epoch") == losses(uninterrupted, "eval_loss_epoch")


def test_what_an_extended_method_returns_decides_over_what_it_has_restored(tmp_path):
    """Row 4.10."""

    def load_training_state(self, path):
        return {**Trainer.load_training_state(self, path), "current_epoch": 2}

    saving = SaveTrainingStateCallback(tmp_path, save_every_n_steps=11)
    train(make_trainer(callbacks=[saving]), 16, num_epochs=3)
    trainer = make_trainer(cls=subclass(load_training_state=load_training_state))
    train(trainer, 16, num_epochs=3, resume_from=tmp_path / "step_11")
    assert len(losses(trainer)) == 4  # those of the first two epochs, restored, and two more


def test_a_result_without_an_epoch_leaves_the_epoch_as_it_is():
    """Row 4.10."""
    trainer = make_trainer(cls=subclass(load_training_state=lambda self, path: {}))
    assert len(losses(train(trainer, num_epochs=2, resume_from="mine"))) == 2


def test_another_number_of_processes_is_passed_on_only_if_it_is_allowed():
    """Row 4.10: further keywords only if they differ from their default."""
    calls = []

    def load_training_state(self, path, **kwargs):
        calls.append(kwargs)
        return {}

    trainer = make_trainer(cls=subclass(load_training_state=load_training_state))
    train(trainer, resume_from="mine")
    train(trainer, resume_from="mine", allow_other_num_processes=True)
    assert calls == [{}, {"allow_other_num_processes": True}]


# --- 4.11 to 4.21 ------------------------------------------------------------------------------------------------


def test_the_mean_of_an_evaluation_loss_with_several_elements_counts():
    """Row 4.11: in 0.1.61 too; each batch by its number of samples."""
    inputs, targets = make_dataset(10)[:]
    for trainer in (
        make_trainer(loss_func=nn.MSELoss(reduction="none")),
        make_trainer(
            cls=subclass(
                calculate_eval_batch_loss=lambda self, batch: {
                    "loss": (self.model(batch[0]) - batch[1]).square()[:, 0],
                    "batch_size": len(batch[0]),
                }
            )
        ),
    ):
        trainer.evaluate(make_dataset(10), per_device_batch_size=4)
        expected = mse(trainer.model(inputs), targets).item()
        assert losses(trainer, "evaluation_loss") == [pytest.approx(expected, rel=1e-6)]


def test_callbacks_get_the_loss_of_an_evaluation_as_the_step_returned_it():
    """Row 4.11."""
    shapes = []
    probe = Probe(on_eval_step_end=lambda trainer, batch_output, **kwargs: shapes.append(batch_output["loss"].shape))
    make_trainer(loss_func=nn.MSELoss(reduction="none"), callbacks=[probe]).evaluate(make_dataset(4))
    assert shapes == [(4, 1)]


def test_a_training_loss_with_several_elements_is_still_refused():
    """Row 4.11: PyTorch has no gradient for it."""
    with pytest.raises(ValueError, match=r"The loss has the shape \(4, 1\)"):
        train(make_trainer(loss_func=nn.MSELoss(reduction="none")))


def test_no_epochs_are_a_clear_error():
    """Row 4.12, where the library differs on purpose."""
    with pytest.raises(ValueError, match=r"`num_epochs` is 0\. Expected a whole number of epochs, at least 1"):
        train(make_trainer(), num_epochs=0)


@pytest.mark.parametrize("limit", [2.0, np.float64(2.0), np.int64(2), 2], ids=repr)
def test_the_limit_of_updates_may_be_a_float_of_whole_value(limit):
    """Row 4.13."""
    trainer = train(make_trainer(), num_epochs=3, max_num_train_steps=limit)
    assert trainer.progress.num_updates == 2
    assert type(trainer.run_config.max_num_train_steps) in (int, np.int64)


@pytest.mark.parametrize("limit", [2.5, math.nan, math.inf, "2", True])
def test_any_other_limit_of_updates_is_refused(limit):
    """Row 4.13."""
    with pytest.raises(TypeError, match="`max_num_train_steps` is"):
        train(make_trainer(), max_num_train_steps=limit)


def test_the_smaller_of_epochs_and_updates_ends_the_run():
    """Row 4.14, where the library differs on purpose."""
    for num_epochs, limit, expected in ((1, 100, 4), (3, 5, 5)):
        trainer = train(make_trainer(), num_epochs=num_epochs, max_num_train_steps=limit)
        assert trainer.progress.num_updates == expected


def test_the_hook_at_the_end_of_an_epoch_can_read_its_loss():
    """Row 4.15, where the library differs on purpose: 0.1.61 records the loss after the hook."""
    seen = []

    def read(name):
        return lambda self: seen.append(self.run_history.get_latest_metric(name))

    hooks = {"train_epoch_end": read("train_loss_epoch"), "eval_epoch_end": read("eval_loss_epoch")}
    trainer = make_trainer(cls=subclass(**hooks))
    train(trainer, num_epochs=2, eval_dataset=make_dataset(8))
    assert seen[::2] == losses(trainer)
    assert seen[1::2] == losses(trainer, "eval_loss_epoch")


def test_an_evaluation_leaves_the_epoch_where_training_ended():
    """Row 4.16, where the library differs on purpose."""
    epochs, seen = recorder_of(lambda trainer: trainer.run_history.current_epoch, "on_evaluation_run_start")
    trainer = train(make_trainer(callbacks=[epochs]), num_epochs=3)
    trainer.evaluate(make_dataset(8))
    assert seen == [4]


class TimmSchedule:
    """Records what it is stepped with."""

    def __init__(self):
        self.updates, self.epochs = [], []

    def step_update(self, num_updates):
        self.updates.append(num_updates)

    def step(self, epoch):
        self.epochs.append(epoch)

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        pass


def train_timm(cls, num_epochs=2, **kwargs):
    """Train for some epochs of two updates, and return the schedule and the trainer."""
    schedule = TimmSchedule()
    trainer = make_trainer(cls=cls, **{"seed": 3, **kwargs.pop("trainer", {})})
    train(trainer, 8, num_epochs=num_epochs, create_scheduler_fn=lambda optimizer: schedule, **kwargs)
    return schedule, trainer


def test_timm_updates_are_counted_from_one_and_unknown_before_a_run():
    """Row 4.17."""
    assert make_trainer(cls=TrainerWithTimmScheduler).num_updates is None
    schedule, trainer = train_timm(TrainerWithTimmScheduler)
    assert (schedule.updates, schedule.epochs, trainer.num_updates) == ([1, 2, 3, 4], [1, 2], 4)
    trainer.evaluate(make_dataset(8))
    assert trainer.num_updates == 4
    train(trainer, 8, create_scheduler_fn=lambda optimizer: schedule)
    assert schedule.updates[4:] == [1, 2]


def test_a_number_of_timm_updates_that_is_set_counts_on():
    """Row 4.17."""

    class FromHundred(TrainerWithTimmScheduler):
        def train_epoch_start(self):
            super().train_epoch_start()
            if self.run_history.current_epoch == 2:
                self.num_updates = 100

    schedule, trainer = train_timm(FromHundred, num_epochs=3)
    assert schedule.updates == [1, 2, 101, 102, 103, 104]
    assert trainer.num_updates == 104


def test_a_timm_step_that_counts_itself_counts_once():
    """Row 4.17: as programs wrote it that replaced the step of the scheduler."""

    class CountsItself(TrainerWithTimmScheduler):
        def scheduler_step(self):
            self.num_updates += 1
            self.scheduler.step_update(num_updates=self.num_updates)

    schedule, _ = train_timm(CountsItself)
    assert schedule.updates == [1, 2, 3, 4]


def test_timm_updates_are_counted_in_an_own_epoch_loop():
    """Rows 4.6 and 4.17."""

    class Own(TrainerWithTimmScheduler):
        def _run_train_epoch(self, train_dl):
            for step, batch in enumerate(train_dl):
                self._perform_forward_and_backward_passes(batch, step)
                self.optimizer_step()
                self.scheduler_step()
                self.optimizer_zero_grad()

    assert train_timm(Own)[0].updates == [1, 2, 3, 4]


def test_timm_updates_go_on_in_a_resumed_run(tmp_path):
    """Row 4.17."""
    saving = SaveTrainingStateCallback(tmp_path, save_every_n_steps=3)
    train_timm(TrainerWithTimmScheduler, trainer={"callbacks": [saving]})
    schedule, trainer = train_timm(TrainerWithTimmScheduler, num_epochs=3, resume_from=tmp_path / "step_3")
    assert (schedule.updates, schedule.epochs, trainer.num_updates) == ([4, 5, 6], [2, 3], 6)


def test_one_accelerator_serves_all_runs_and_nothing_is_seeded():
    """Row 4.18, where the library differs on purpose."""
    calls = []

    def create_accelerator(self):
        calls.append(1)
        return Trainer._create_accelerator(self)

    torch.manual_seed(11)
    trainer = make_trainer(cls=subclass(_create_accelerator=create_accelerator))
    train(trainer)
    trainer.evaluate(make_dataset(4))
    assert len(calls) == 1
    assert torch.initial_seed() == 11


def test_a_run_without_evaluation_data_has_no_evaluation_loader():
    """Row 4.19, where the library differs on purpose."""
    loaders, seen = recorder_of(lambda trainer: trainer._eval_dataloader, "on_training_run_start")
    trainer = make_trainer(callbacks=[loaders])
    train(trainer, eval_dataset=make_dataset(8))
    train(trainer)
    assert [loader is None for loader in seen] == [False, True]


def test_evaluation_data_smaller_than_a_batch_counts_each_sample_once():
    """Row 4.20, where the library differs on purpose (on several processes: in the distributed tests)."""
    trainer = make_trainer()
    trainer.evaluate(make_dataset(3), per_device_batch_size=8)
    inputs, targets = make_dataset(3)[:]
    assert losses(trainer, "evaluation_loss") == [pytest.approx(mse(trainer.model(inputs), targets).item())]


# --- test doubles ------------------------------------------------------------------------------------------------


class _Loader:
    """What a run needs of a loader."""

    def __init__(self, num_batches):
        self.num_batches = num_batches

    def __len__(self):
        return self.num_batches

    def __iter__(self):
        return iter([{"index": index} for index in range(self.num_batches)])


def doubled_accelerator(kind):
    """Return a double of the accelerator that knows little more than the number of processes."""
    known = {"num_processes": 1, "is_main_process": True, "is_local_main_process": True, "mixed_precision": "no"}
    accelerator = kind(**known, device="cpu", optimizer_step_was_skipped=False)
    accelerator.distributed_type.NO = "NO"
    accelerator.prepare = kind(side_effect=lambda *args: args)
    accelerator.no_sync.return_value = nullcontext()
    return accelerator


@pytest.mark.parametrize(
    ("num_batches", "settings", "num_updates"),
    [
        (40, {"num_epochs": 10, "max_num_train_steps": 15, "gradient_accumulation_steps": 2}, 15),
        (10, {"num_epochs": 2, "max_num_train_steps": 7}, 7),
        (6, {"num_epochs": 2, "eval_dataset": "irrelevant"}, 12),
    ],
)
@pytest.mark.parametrize("kind", [Mock, MagicMock])
def test_the_loop_runs_with_doubles_of_everything(kind, num_batches, settings, num_updates):
    """As programs test their own steps: the model, the optimizer, the loss function and the accelerator do nothing."""
    updates = []
    output = {"loss": torch.tensor(1.0), "model_outputs": None, "batch_size": 1}
    accelerator = doubled_accelerator(kind)
    doubled = subclass(
        _create_accelerator=lambda self: accelerator,
        create_train_dataloader=lambda self, batch_size, train_dl_kwargs: _Loader(num_batches),
        create_eval_dataloader=lambda self, batch_size, eval_dl_kwargs: _Loader(2),
        _prepare_model_optimizer_and_dataloaders=lambda self: None,
        _perform_forward_and_backward_passes=lambda self, batch, step: None,
        calculate_eval_batch_loss=lambda self, batch: output,
        optimizer_step=lambda self: updates.append(1),
    )
    trainer = doubled(model=kind(), loss_func=kind(), optimizer=kind())
    trainer.train(train_dataset=kind(), **settings)
    assert len(updates) == num_updates
