"""A step stays short: the modules that one batch passes through, and the events and methods of a step."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from _support import SOURCE, EventRecorder, make_dataset, make_trainer, train
from pytorch_accelerated import Trainer
from pytorch_accelerated._loop import STEP_EVENTS, STEP_METHODS, TrainingLoop

MAX_MODULES = 5
"""The modules of the package that run between the start of a step and its update, on one process, without callbacks."""


class Tracer:
    """Records which functions of the package are called while it is on."""

    def __init__(self) -> None:
        self.called: list[tuple[str, str]] = []

    def __enter__(self) -> Tracer:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.setprofile(None)

    def _note(self, frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(SOURCE):
            self.called.append((path.relative_to(SOURCE).as_posix(), frame.f_code.co_name))


class TracedTrainer(Trainer):
    """Traces its steps, from the batch to the update, and to the end of the step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.until_update: list[tuple[str, str]] = []
        self.whole_step: list[tuple[str, str]] = []

    def _perform_forward_and_backward_passes(self, batch, step):
        self.tracer = Tracer()
        self.tracer.__enter__()
        super()._perform_forward_and_backward_passes(batch, step)

    def optimizer_step(self):
        super().optimizer_step()
        self.until_update = list(self.tracer.called)

    def _loop_end_train_step(self, batch, step):
        super()._loop_end_train_step(batch, step)
        self.tracer.__exit__()
        self.whole_step = self.tracer.called


@pytest.fixture
def traced():
    """A trainer after some steps of training, each of which made an update, with clipping and a schedule."""
    trainer = make_trainer(cls=TracedTrainer)
    train(
        trainer,
        make_dataset(16),
        gradient_clip_norm=1.0,
        create_scheduler_fn=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1),
    )
    return trainer


def test_a_batch_passes_through_few_modules(traced):
    modules = {module for module, _ in traced.until_update}
    assert modules == {"_loop.py", "_step.py", "_accumulation.py", "tracking.py", "_distributed/fast_path.py"}
    assert len(modules) <= MAX_MODULES


def test_the_methods_of_a_step_are_those_that_are_called_in_one(traced):
    """A step with other methods may end the run at any update, so processes have to tell each other at each."""
    called = {name for module, name in traced.whole_step if module == "_loop.py" and hasattr(TrainingLoop, name)}
    infrastructure = {name for name in called if name.startswith("_loop_")} - set(STEP_METHODS)
    assert called - infrastructure == set(STEP_METHODS)
    assert infrastructure == {
        "_loop_complete_gradients",
        "_loop_end_step",
        "_loop_fire",
        "_loop_track",
    }


def test_the_events_of_a_step_are_those_that_fire_in_one():
    recorder = EventRecorder()
    train(make_trainer(callbacks=[recorder]), make_dataset(8))
    start, end = recorder.log.index("on_train_epoch_start"), recorder.log.index("on_train_epoch_end")
    assert set(recorder.log[start + 1 : end]) == STEP_EVENTS
