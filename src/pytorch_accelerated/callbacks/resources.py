"""Callbacks that look at the machine: memory, and a profile of some steps."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import profiler

from pytorch_accelerated._arguments.numbers import check_positive_integer
from pytorch_accelerated._checkpoint.files import local_path
from pytorch_accelerated._views import run_of
from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from pytorch_accelerated._types import Batch, BatchOutput, MaybeNone
    from pytorch_accelerated.trainer import Trainer

_MIB = 2**20


class MemoryCallback(TrainerCallback):
    """Records at the end of the training part of each epoch how much memory this process takes up, in MiB.

    The metrics are ``host_memory_mib`` (Linux only), ``peak_host_memory_mib`` (not on Windows) and, on a GPU, those of
    its tensors: ``device_memory_mib`` and ``peak_device_memory_mib``. The peaks are those since the process started.
    Worker processes of the loaders do not count.
    """

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Record the memory."""
        for name, num_bytes in {**_memory_of_host(), **_memory_of_device(trainer.device)}.items():
            trainer.run_history.update_metric(f"{name}_mib", num_bytes / _MIB)


def _memory_of_host() -> dict[str, int]:
    memory = {}
    statistics = Path("/proc/self/statm")
    if statistics.is_file():
        memory["host_memory"] = int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform != "win32":
        import resource  # not there on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        memory["peak_host_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return memory


def _memory_of_device(device: torch.device) -> dict[str, int]:
    if device.type == "cpu":
        return {}
    module = torch.get_device_module(device)
    functions = {"device_memory": "memory_allocated", "peak_device_memory": "max_memory_allocated"}
    return {name: getattr(module, each)(device) for name, each in functions.items() if hasattr(module, each)}


class ProfilerCallback(TrainerCallback):
    """Runs PyTorch's profiler over some steps, and writes traces that open in Perfetto, Chrome or TensorBoard.

    The first ``wait`` steps are left out, then the profiler warms up for ``warmup`` steps and records ``active`` ones,
    which become one file ``rank0.<time>.pt.trace.json`` in the folder; and that ``repeat`` times. Each process writes
    its own.

    Args:
        folder: Where the traces are written. It is created.
        wait: Steps to leave out before each trace.
        warmup: Steps during which the profiler runs, but nothing is kept: at first it slows things down.
        active: Steps in a trace.
        repeat: The number of traces.
        options: Arguments of `torch.profiler.profile`, such as ``record_shapes=True`` or ``with_stack=True``.

    Raises:
        TypeError: An argument has the wrong type, or is none of the profiler's.
        ValueError: A number of steps is negative, or there is nothing to record.

    Example:
        >>> callback = ProfilerCallback("traces", wait=10, active=5, record_shapes=True)
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        wait: int = 5,
        warmup: int = 2,
        active: int = 3,
        repeat: int = 1,
        **options: Any,
    ) -> None:
        for name, value in (("active", active), ("repeat", repeat)):
            check_positive_integer(name, value, "steps" if name == "active" else "traces")
        for name, value in (("wait", wait), ("warmup", warmup)):
            if value != 0:
                check_positive_integer(name, value, "steps")
        unknown = sorted(options.keys() - inspect.signature(profiler.profile).parameters.keys())
        if unknown:
            raise TypeError(
                f"`ProfilerCallback` has no argument `{unknown[0]}`. It takes `folder`, `wait`, `warmup`, `active`, "
                "`repeat`, and the arguments of `torch.profiler.profile`."
            )
        self.folder = local_path(folder)
        self.options = options
        self._schedule = {"wait": wait, "warmup": warmup, "active": active, "repeat": repeat}
        self._num_steps_left = 0
        self._profile: profiler.profile | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out a profiler that runs."""
        return {**vars(self), "_profile": None}

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Start the profiler."""
        schedule = self._schedule
        self._num_steps_left = (schedule["wait"] + schedule["warmup"] + schedule["active"]) * schedule["repeat"]
        self.folder.mkdir(parents=True, exist_ok=True)
        write = profiler.tensorboard_trace_handler(str(self.folder), f"rank{run_of(trainer).process_index}")
        # Without `acc_events`, the second trace comes with a warning that the events of the first are gone.
        settings = {"acc_events": schedule["repeat"] > 1, "on_trace_ready": write, **self.options}
        settings["schedule"] = profiler.schedule(**schedule)
        self._profile = profiler.profile(**settings)
        self._profile.start()

    def on_train_step_end(
        self, trainer: Trainer, batch: Batch = None, batch_output: BatchOutput | MaybeNone = None, **kwargs: Any
    ) -> None:
        """Tell the profiler that a step has ended; stop it after the last one of the schedule."""
        profile, self._profile = self._profile, None  # one that fails here crashes the interpreter if it is stopped
        if profile is not None:
            profile.step()
            self._profile = profile
            self._num_steps_left -= 1
            if self._num_steps_left <= 0:
                self._stop()

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Stop the profiler, which writes what there is of a trace under way."""
        self._stop()

    def on_exception(self, trainer: Trainer, *, exception: BaseException, **kwargs: Any) -> None:
        """Stop the profiler."""
        self._stop()

    def _stop(self) -> None:
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.stop()
