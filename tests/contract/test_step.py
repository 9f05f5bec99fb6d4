"""A step stays short: few modules of the package run between its start and its update."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

from _support import SOURCE, make_dataset, make_trainer, train
from pytorch_accelerated import Trainer

MAX_MODULES = 5
"""The modules of the package that run between the start of a step and its update, on one process, without callbacks.

The ledger does not count: it takes the time, and no part in the step.
"""


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
    """Traces its steps, from the batch to the update."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.called: list[tuple[str, str]] = []

    def _perform_forward_and_backward_passes(self, batch, step):
        self.tracer = Tracer()
        self.tracer.__enter__()
        super()._perform_forward_and_backward_passes(batch, step)

    def optimizer_step(self):
        super().optimizer_step()
        self.tracer.__exit__()
        self.called = self.tracer.called


def test_a_batch_passes_through_few_modules():
    trainer = make_trainer(cls=TracedTrainer)
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    train(trainer, make_dataset(16), gradient_clip_norm=1.0, create_scheduler_fn=schedule)
    modules = {module for module, _ in trainer.called} - {"time_ledger.py"}
    assert modules == {"_loop.py", "_step.py", "_accumulation.py", "_means.py", "_distributed/fast_path.py"}
    assert len(modules) <= MAX_MODULES
    assert {function for module, function in trainer.called if module == "time_ledger.py"} == {"switch"}
