"""Between log points, a step reads no tensor value on the host: on a GPU, each read makes the host wait."""

from __future__ import annotations

import operator
import sys
from collections import Counter
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torchmetrics import MeanSquaredError, MetricCollection, R2Score

from _support import Probe, Samples, make_dataset, make_trainer
from pytorch_accelerated import Trainer, callbacks
from pytorch_accelerated._recording import loss_monitor
from pytorch_accelerated.callbacks import EVENTS, TrainerCallback, get_default_callbacks
from pytorch_accelerated.metrics import Accuracy, MeanAbsoluteError, Perplexity, WholeSet
from pytorch_accelerated.schedulers import CosineLrScheduler, WSDLrScheduler

pytestmark = pytest.mark.usefixtures("_fresh_accelerate_state")

# fmt: off
READERS = {  # not `to`: in these tests, every device is the host
    torch.Tensor: (
        "__bool__", "__complex__", "__float__", "__index__", "__int__", "allclose", "cpu", "equal", "is_nonzero",
        "item", "nonzero", "numpy", "tolist",
    ),
    torch: ("allclose", "equal", "is_nonzero", "nonzero"),
}
# fmt: on
NUM_EPOCHS, BATCH_SIZE, NUM_STEPS = 2, 3, 67
DATASET = make_dataset(200)
"""Its last batch is short, and it has more batches than the loop keeps losses of before it adds them up."""


class Reads:
    """Records who reads values in a run, from the first step of each pass through the data to its last.

    Reads after the last step, where the means are recorded, do not count.
    """

    def __init__(self):
        self.readers = []
        self._since_step = []

    def around(self, others):
        """Return the callbacks, between two that mark the start and the end of each step."""
        first = Probe(
            on_train_step_start=self._begin,
            on_eval_epoch_start=self._keep_before_intermediate,
            on_eval_step_start=self._begin,
        )
        last = Probe(
            on_train_step_end=self._keep,
            on_train_epoch_end=self._discard,
            on_eval_step_end=self._keep,
            on_eval_epoch_end=self._discard,
        )
        return [first, *others, last]

    @contextmanager
    def watching(self):
        with pytest.MonkeyPatch.context() as patch:
            for owner, names in READERS.items():
                for name in names:
                    patch.setattr(owner, name, self._watched(name, getattr(owner, name)))
            patch.setattr(torch.Tensor, "is_cpu", False, raising=False)  # where reading is free
            yield

    def _watched(self, name, original):
        def read(*args, **kwargs):
            reader = find_reader(sys._getframe(1))
            if reader is not None:
                self._since_step.append(f"{reader} by {name}")
            return original(*args, **kwargs)

        return read

    def _begin(self, trainer, step, **_):
        if step == 0:
            self._discard()

    def _keep_before_intermediate(self, trainer, is_intermediate, **_):
        if is_intermediate:  # it interrupts a training step
            self._keep()

    def _keep(self, *_, **__):
        self.readers += self._since_step
        self._discard()

    def _discard(self, *_, **__):
        self._since_step = []


def find_reader(frame):
    """Return the callback and event that a frame belongs to, or else the method of the library.

    ``None`` for the loading of batches: indices and seeds are in host memory anyway.
    """
    library_method = None
    while frame is not None:
        owner, function, module = frame.f_locals.get("self"), frame.f_code.co_name, frame.f_globals.get("__name__", "")
        if module.startswith("torch.utils.data"):
            return None
        if isinstance(owner, TrainerCallback) and function in EVENTS:
            return f"{type(owner).__name__}.{function}"
        if owner is not None and module.startswith("pytorch_accelerated"):
            library_method = library_method or f"{type(owner).__name__}.{function}"
        frame = frame.f_back
    return library_method or "<user>"


def readers_in(others, *, cls=Trainer, mixed_precision=None, dataset=DATASET, **kwargs):
    """Train with evaluation, evaluate, and return who read values."""
    metrics = kwargs.pop("metrics", None)
    reads, loading = Reads(), {"num_workers": 0}
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.Linear(4, 1))
    settings = {"cls": cls, "mixed_precision": mixed_precision, "metrics": metrics}
    trainer = make_trainer(model, lr=0.01, callbacks=reads.around(others), **settings)
    with reads.watching():
        trainer.train(
            dataset,
            NUM_EPOCHS,
            dataset,
            per_device_batch_size=BATCH_SIZE,
            train_dataloader_kwargs=loading,
            eval_dataloader_kwargs=loading,
            **kwargs,
        )
        trainer.evaluate(dataset, per_device_batch_size=BATCH_SIZE, dataloader_kwargs=loading)
    return reads.readers


def assert_no_reads(readers):
    assert not readers, f"Values of tensors were read on the host: {dict(Counter(readers))}"


@pytest.fixture
def no_log_point(monkeypatch):
    monkeypatch.setattr(loss_monitor, "SECONDS_BETWEEN_LOG_POINTS", float("inf"))


# --- the tests of this file can fail -----------------------------------------------------------------------------


class Curious(TrainerCallback):
    def on_train_step_end(self, trainer, batch_output, **kwargs):
        self._look(batch_output["loss"])

    def _look(self, loss):
        return loss.item()


class CuriousTrainer(Trainer):
    def optimizer_step(self):
        super().optimizer_step()
        if next(self.model.parameters()).isnan().any():
            raise ValueError


def test_a_callback_that_reads_is_reported_with_the_event(no_log_point):
    readers = readers_in([*get_default_callbacks(), Curious()])
    with pytest.raises(
        AssertionError, match=rf"host: {{'Curious.on_train_step_end by item': {NUM_EPOCHS * NUM_STEPS}}}"
    ):
        assert_no_reads(readers)


def test_a_step_that_reads_is_reported_with_the_method(no_log_point):
    with pytest.raises(AssertionError, match=r"'CuriousTrainer._loop_update by __bool__'"):
        assert_no_reads(readers_in(get_default_callbacks(), cls=CuriousTrainer))


@pytest.mark.parametrize(
    "read",
    [
        *(bool, complex, float, int, operator.index),
        *(operator.methodcaller(name) for name in ("cpu", "is_nonzero", "item", "nonzero", "numpy", "tolist")),
        *(lambda one: one.equal(one), lambda one: one.allclose(one)),
        *(lambda one: torch.equal(one, one), lambda one: torch.allclose(one, one)),
        *(lambda one: torch.is_nonzero(one), lambda one: torch.nonzero(one)),
    ],
)
def test_every_way_to_read_a_value_is_recorded(read):
    reads, before = Reads(), dict(vars(torch.Tensor))
    with reads.watching():
        read(torch.tensor(1))
    assert [reader.partition(" by ")[0] for reader in reads._since_step] == ["<user>"]
    assert dict(vars(torch.Tensor)) == before


# --- steps without reads -----------------------------------------------------------------------------------------


class Measuring(Trainer):
    """Returns a metric, and weighs each batch by a number on the device."""

    def calculate_train_batch_loss(self, batch):
        return self._measured(super().calculate_train_batch_loss(batch), batch)

    def calculate_eval_batch_loss(self, batch):
        return self._measured(super().calculate_eval_batch_loss(batch), batch)

    def _measured(self, output, batch):
        error = (output["model_outputs"].detach() - batch[1]).abs().mean()
        return {**output, "metrics": {"error": error}, "num_items_in_batch": (batch[1] > 0).sum()}


@pytest.mark.parametrize("dataset", [DATASET, Samples(DATASET)], ids=["sliced batches", "collated batches"])
@pytest.mark.parametrize("num_accumulated", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_clip_norm": 0.1},
        {"gradient_clip_value": 0.1},
        {"create_scheduler_fn": CosineLrScheduler.create_scheduler_fn()},
        {"create_scheduler_fn": partial(StepLR, step_size=5)},
        {"cls": Measuring},
        {"mixed_precision": "bf16"},
    ],
    ids=["plain", "clipped by norm", "clipped by value", "scheduled", "scheduled by PyTorch", "metrics", "bf16"],
)
def test_a_step_with_the_default_callbacks_reads_nothing_on_the_host(no_log_point, settings, num_accumulated, dataset):
    readers = readers_in(
        get_default_callbacks(), dataset=dataset, gradient_accumulation_steps=num_accumulated, **settings
    )
    assert_no_reads(readers)


METRICS = {
    "accuracy": Accuracy(threshold=0.5),
    "mae": MeanAbsoluteError(),
    "perplexity": Perplexity(),
    "weighted": lambda outputs, targets: ((outputs - targets).mean(), (targets > 0).sum()),
    "vector": lambda outputs, targets: torch.cat([outputs, targets], 1).mean(0),
    "named": lambda outputs, targets: {"largest": outputs.max(), "smallest": outputs.min()},
    "whole": WholeSet(lambda outputs, targets: outputs.max()),
    "mse": MeanSquaredError(),
    "both": MetricCollection([MeanSquaredError(), R2Score()], compute_groups=False),
}


def test_a_step_with_metrics_reads_nothing_on_the_host(no_log_point):
    """The groups of a collection would be formed in its first step, by torchmetrics, which compares states there."""
    assert_no_reads(readers_in(get_default_callbacks(), metrics=METRICS))


STEP_EVENTS = [event for event in EVENTS if "_step_" in event or event == "on_backward_start"]
STEP_CALLBACKS = {
    "GradientNormCallback": lambda folder: callbacks.GradientNormCallback(per_layer=True),
    "GradualUnfreezingCallback": lambda folder: callbacks.GradualUnfreezingCallback(),
    "LayerStatisticsCallback": lambda folder: callbacks.LayerStatisticsCallback(1),
    "LearningRateCallback": lambda folder: callbacks.LearningRateCallback(1),
    "ModelEmaCallback": lambda folder: callbacks.ModelEmaCallback(save_path=folder / "average.pt"),
    "ProfilerCallback": lambda folder: callbacks.ProfilerCallback(folder, active=1),
    "SaveTrainingStateCallback": lambda folder: callbacks.SaveTrainingStateCallback(folder, save_every_n_epochs=1),
    "StepBasedEvaluationCallback": lambda folder: callbacks.StepBasedEvaluationCallback(40),
    "TensorBoardCallback": lambda folder: callbacks.TensorBoardCallback(folder, every_n_updates=10_000),
    "TrackerCallback": lambda folder: callbacks.TrackerCallback(
        "tensorboard", logging_dir=folder, every_n_updates=10_000
    ),
    "UpdateRatioCallback": lambda folder: callbacks.UpdateRatioCallback(every_n_updates=1),
    "WSDCheckpointCallback": lambda folder: callbacks.WSDCheckpointCallback(folder),
}
"""The callbacks that act in steps.

Saving has to read values: states are saved at ends of epochs here, checkpoints by `torch.save`, which is not recorded.
A decay is not part of the run, because its start would save a state. Trackers read every so many updates.
"""


def test_every_callback_that_acts_in_steps_is_in_the_list():
    like_trackers = {"MLflowCallback", "WandbCallback"}  # which need packages of their own
    found = [
        name
        for name in callbacks.__all__
        if any(
            getattr(getattr(callbacks, name), event, None) not in (None, getattr(TrainerCallback, event))
            for event in STEP_EVENTS
        )
    ]
    assert set(found) - like_trackers == set(STEP_CALLBACKS)


@pytest.mark.parametrize("name", STEP_CALLBACKS)
def test_a_step_with_a_callback_that_acts_in_it_reads_nothing_on_the_host(no_log_point, tmp_path, name):
    schedule = WSDLrScheduler.create_scheduler_fn(decay_phase_ratio=0)  # whose only checkpoint is at the end
    others = [*get_default_callbacks(), STEP_CALLBACKS[name](tmp_path)]
    assert_no_reads(readers_in(others, gradient_clip_norm=1.0, create_scheduler_fn=schedule))


def test_counting_tokens_on_the_device_and_operations_reads_nothing_on_the_host(no_log_point):
    throughput = callbacks.ThroughputCallback(count_tokens=lambda batch: (batch[1] > 0).sum(), peak_flops=1e12)
    assert_no_reads(readers_in([*get_default_callbacks(), throughput, callbacks.TimeLedgerCallback()]))


# --- log points --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", [DATASET, Samples(DATASET)], ids=["sliced batches", "collated batches"])
def test_a_log_point_reads_the_mean_loss_once_for_all_callbacks(monkeypatch, dataset):
    """With a log point after each step. That of the last step of a pass comes after the last recorded read."""
    monkeypatch.setattr(loss_monitor, "SECONDS_BETWEEN_LOG_POINTS", 0.0)
    num_passes = 2 * NUM_EPOCHS + 1
    assert Counter(readers_in(get_default_callbacks(), dataset=dataset)) == {
        "HostCopy.numbers by tolist": num_passes * (NUM_STEPS - 1)
    }
