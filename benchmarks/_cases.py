"""The rows of the result table, their budgets, and the process that measures each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Row(NamedTuple):
    """One row of the table."""

    title: str
    unit: str = ""
    """Empty for a ratio to the hand-written loop."""
    budget: float | None = None
    """The upper limit for this library; ``None`` for rows without a budget."""


ROWS = {
    "A": Row("training step, same dataloader, default callbacks and progress bar", budget=1.03),
    "A'": Row("training step, the library's own dataloader", budget=0.62),
    "A-off": Row("training step, same dataloader, no callbacks, progress bar or logs", budget=1.01),
    "A-single": Row("training step, same dataloader, a dataset of the user's, fetched sample by sample"),
    "B": Row("evaluation, same dataloader, default callbacks and progress bar", budget=1.03),
    "B'": Row("evaluation, the library's own dataloader", budget=0.35),
    "C": Row("512 samples, 20 epochs, all defaults, complete call", budget=0.75),
    "D": Row("training step of 30 ms, a small convolutional network", budget=1.01),
    "E-import": Row("import, relative to `import torch`", budget=1.05),
    "E-start": Row("from the start of the script to the first update", budget=1.05),
    "F-save": Row(
        "saving a state of 100 MB, 256 tensors, with manifest and fsync, relative to torch.save and fsync", budget=1.2
    ),
    "F-stall": Row("pause of the loop for the first background save, relative to torch.save and fsync", budget=0.1),
    "F-later": Row("pause of the loop for a later background save, relative to torch.save and fsync", budget=0.1),
    "F-held": Row("F-later plus the slowdown of the next steps while the state is written"),
    "F-resume": Row("resuming from the state, up to the end of the first step", budget=1.2),
    "F-save-vector": Row("F-save with one tensor", budget=1.2),
    "F-stall-vector": Row("F-stall with one tensor", budget=0.1),
    "F-later-vector": Row("F-later with one tensor", budget=0.1),
    "F-held-vector": Row("F-held with one tensor"),
    "F-resume-vector": Row("F-resume with one tensor", budget=1.2),
    "G": Row("accumulation over 4 batches, bf16 autocast", budget=1.03),
    "H": Row("DDP, 2 processes over gloo", budget=1.03),
    "M-peak": Row("peak memory of a run, above that of the hand-written loop", "MB", 5),
    "M-growth": Row("memory growth over 20 runs (allocator rounding does not count)", "MB", 0.5),
    "M-objects": Row("objects that a run leaves behind", "objects", 0),
    "R": Row("training step of about 10 ms, samples fetched one by one, all guarantees on", budget=1.03),
    "R-2": Row("the same with 2 processes", budget=1.03),
    "S": Row("host reads of tensors per step, between log points", "reads", 0),
    "S-all": Row("host reads of tensors per step, including log points and ends of epochs", "reads"),
    "S-calls": Row("calls of Python functions per step", "calls"),
    "Z": Row("a callback with one no-op event, per step", "us", 0.3),
    "Z-none": Row("a callback without any event, per step", "us", 0.02),
}


@dataclass(frozen=True)
class Case:
    """One or more rows that are measured together, and the process that measures them."""

    module: str
    """Name of the module in `measures`."""
    process: str = "steps"
    """Cases with the same value share a process; ``own`` gives a case a process to itself."""
    num_processes: int = 1
    is_repeated: bool = True
    """Whether the case is measured in each round; counts are the same each time."""


CASES = {
    "A": Case("steps"),
    "A'": Case("steps"),
    "A-off": Case("steps"),
    "A-single": Case("steps"),
    "B": Case("steps"),
    "B'": Case("steps"),
    "C": Case("steps"),
    "D": Case("steps"),
    "E": Case("starting", process="own"),
    "F": Case("saving", process="own"),
    "G": Case("steps", process="own"),  # Accelerate fixes the precision once per process
    "H": Case("steps", process="own", num_processes=2),
    "M": Case("memory", process="own"),
    "R": Case("steps"),
    "R-2": Case("steps", process="own", num_processes=2),
    "S": Case("counting", process="own", is_repeated=False),
    "Z": Case("events"),
    "scaling": Case("scaling", process="own"),
}

CURVES = {
    "callbacks": "microseconds added to a step by this many callbacks, each with one no-op event per step",
    "metrics": "microseconds added to a step that returns this many metrics",
    "parameter tensors": "step time relative to the hand-written loop, by number of parameter tensors",
    "samples": "milliseconds from calling `train` to the first step, by number of samples",
    "samples, by hand": "milliseconds from creating a `DataLoader` to its first batch, by number of samples",
}
