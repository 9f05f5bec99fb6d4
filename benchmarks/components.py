"""What the pieces of a step take, timed where they run, between the forward and backward passes of a small network.

    python benchmarks/components.py

In a loop of its own each piece is several times as fast, because its code and data stay in the processor's caches.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from _common import make_dataset
from pytorch_accelerated import Trainer, _direct
from pytorch_accelerated._losses import read_batch_output
from pytorch_accelerated._monitor import LossMonitor
from pytorch_accelerated.tracking import LossTracker

NUM_STEPS = 2000


class Timer:
    """Collects the nanoseconds of calls, by name."""

    def __init__(self) -> None:
        self.times: defaultdict[str, list[int]] = defaultdict(list)

    def __call__(self, name: str, function: Callable[[], Any]) -> Any:
        """Call a function and note what it took."""
        start = time.perf_counter_ns()
        result = function()
        self.times[name].append(time.perf_counter_ns() - start)
        return result

    def microseconds(self, name: str) -> float:
        """Return the median of a name, without what the clock itself takes."""
        return (statistics.median(self.times[name]) - statistics.median(self.times["nothing"])) / 1000


def measure() -> Timer:
    """Train by hand, with the pieces of the library in between."""
    timed = Timer()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    loss_func, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(model, loss_func, optimizer, callbacks=())
    tracker, monitor, total = LossTracker(), LossMonitor(), torch.zeros(())
    bare_step: Any = _direct._bare_step(optimizer)
    loader: Any = DataLoader(make_dataset(32 * NUM_STEPS), 32)
    with_ranges, without_ranges = iter(loader), _direct._without_ranges(iter(loader))
    for step in range(NUM_STEPS):
        timed("nothing", lambda: None)
        timed("fetching a batch, with PyTorch's range for profilers", partial(next, with_ranges))
        inputs, targets = timed("fetching a batch, without it", partial(next, without_ranges))
        timed("an event that nobody hears", partial(trainer._call, "on_train_step_start", batch=inputs, step=step))
        outputs = timed("forward pass", partial(model, inputs))
        loss = timed("loss", partial(loss_func, outputs, targets))
        batch_output = {"loss": loss, "model_outputs": outputs, "batch_size": 32}
        timed("reading what the step returned", partial(read_batch_output, batch_output, "step"))
        timed("backward pass", loss.backward)
        if step % 2:  # each in turn, as the second would find what the first has brought into the caches
            timed("adding up the loss, in the library", partial(tracker.update, loss, 32))
            timed("the optimizer's step, without PyTorch's range for profilers", partial(bare_step, optimizer))
        else:
            timed("adding up the loss, by hand", lambda loss=loss: total.add_(loss.detach()))
            timed("the optimizer's step, with it", optimizer.step)
        timed("discarding the gradients, with it", optimizer.zero_grad)
        timed("asking whether a log point is due", monitor.is_due)
    return timed


def main() -> None:
    torch.set_num_threads(1)
    timed = measure()
    print(f"torch {torch.__version__}, one thread, {NUM_STEPS} steps, medians\n")
    print("| piece | us |\n| --- | --- |")
    for name in timed.times:
        if name != "nothing":
            print(f"| {name} | {timed.microseconds(name):.1f} |")


if __name__ == "__main__":
    main()
