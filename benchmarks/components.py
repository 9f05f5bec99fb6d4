"""Time the parts of a step in place, between the forward and backward passes of a small network.

    python benchmarks/components.py

In a separate loop, each part is several times as fast, because its code and data stay in the processor's caches.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from _common import make_dataset
from pytorch_accelerated import Trainer
from pytorch_accelerated._distributed.fast_path import wrap_optimizer
from pytorch_accelerated._means import LossTracker
from pytorch_accelerated._measuring.metric_set import MetricSet, PassMetrics
from pytorch_accelerated._recording.loss_monitor import LossMonitor
from pytorch_accelerated._step import read_batch_output
from pytorch_accelerated.callbacks import TrainerCallback

NUM_STEPS = 2000


class Timer:
    """Records the duration of calls in nanoseconds, by name."""

    def __init__(self) -> None:
        self.times: defaultdict[str, list[int]] = defaultdict(list)

    def __call__(self, name: str, function: Callable[[], Any]) -> Any:
        """Call a function and record its duration."""
        start = time.perf_counter_ns()
        result = function()
        self.times[name].append(time.perf_counter_ns() - start)
        return result

    def microseconds(self, name: str) -> float:
        """Return the median duration for a name, minus the overhead of the clock."""
        return (statistics.median(self.times[name]) - statistics.median(self.times["nothing"])) / 1000


def metrics_of_pass(metrics: dict[str, Any]) -> PassMetrics:
    """Return what gathers the metrics of a training epoch."""
    metric_set = MetricSet(metrics)
    metric_set.place(torch.device("cpu"))
    assert metric_set.of_training is not None
    return metric_set.of_training


def measure() -> Timer:
    """Train with a hand-written loop that also calls the parts of the library."""
    timed = Timer()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    loss_func, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(model, loss_func, optimizer, callbacks=())
    fire = partial(trainer._loop_fire, TrainerCallback.on_train_step_start)
    tracker, monitor, total = LossTracker(), LossMonitor(), torch.zeros(())
    metrics = metrics_of_pass({name: lambda outputs, targets: 0.5 for name in ("a", "b", "c")})
    wrapped = wrap_optimizer(Accelerator(), optimizer)
    batches = iter(DataLoader(make_dataset(32 * NUM_STEPS), 32))
    for step in range(NUM_STEPS):
        timed("nothing", lambda: None)
        inputs, targets = timed("fetching a batch", partial(next, batches))
        timed("an event without listeners", partial(fire, batch=inputs, step=step))
        outputs = timed("forward pass", partial(model, inputs))
        loss = timed("loss", partial(loss_func, outputs, targets))
        batch_output = {"loss": loss, "model_outputs": outputs, "batch_size": 32}
        timed("checking what the step returned", partial(read_batch_output, batch_output, "step"))
        timed("backward pass", loss.backward)
        if step % 2:  # alternate: the second would profit from the caches that the first has filled
            timed("summing the loss, in the library", partial(tracker.update, loss, 32))
            timed("optimizer step, on the fast path", wrapped.step)
        else:
            timed("summing the loss, by hand", lambda loss=loss: total.add_(loss.detach()))
            timed("optimizer step, by hand", optimizer.step)
        timed("discarding the gradients, on the fast path", wrapped.zero_grad)
        timed("checking whether a log point is due", monitor.is_due)
        update = partial(metrics.update, trainer.get_metric_inputs, (inputs, targets), batch_output, 32)
        timed("three metrics, without what their functions compute", update)
    return timed


def main() -> None:
    torch.set_num_threads(1)
    timed = measure()
    print(f"torch {torch.__version__}, one thread, {NUM_STEPS} steps, medians\n")
    print("| part | us |\n| --- | --- |")
    for name in timed.times:
        if name != "nothing":
            print(f"| {name} | {timed.microseconds(name):.1f} |")


if __name__ == "__main__":
    main()
