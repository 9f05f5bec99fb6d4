"""The rows of the result table, their budgets, and which process measures what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Row(NamedTuple):
    """One row of the table."""

    title: str
    unit: str = ""
    """Empty for a ratio to the loop written by hand."""
    budget: float | None = None
    """What this library may have at most; ``None`` if the row only informs."""


ROWS = {
    "A": Row("training step, same loader, default callbacks and bar", budget=1.05),
    "A'": Row("training step, the library's own loader", budget=0.70),
    "A-off": Row("training step, same loader, no callbacks, bar or logs", budget=1.03),
    "B": Row("evaluation, same loader, default callbacks and bar", budget=1.08),
    "B'": Row("evaluation, the library's own loader", budget=0.35),
    "C": Row("512 samples, 20 epochs, all defaults, whole call", budget=0.9),
    "D": Row("training step of 30 ms, a small convolutional net", budget=1.01),
    "E-import": Row("import, over `import torch`", budget=1.05),
    "E-start": Row("start of the script to the first update", budget=1.05),
    "F-save": Row(
        "saving a state of 100 MB, 256 tensors, with manifest and fsync, over torch.save and fsync", budget=1.2
    ),
    "F-stall": Row("stall of the loop by saving it in the background, the first time, over the same", budget=0.1),
    "F-later": Row("stall of the loop by saving it in the background, later, over the same", budget=0.1),
    "F-held": Row("the same with what the next steps take longer while it is written"),
    "F-resume": Row("resume from it to the end of the first step", budget=1.2),
    "F-save-vector": Row("F-save with one tensor", budget=1.2),
    "F-stall-vector": Row("F-stall with one tensor", budget=0.1),
    "F-later-vector": Row("F-later with one tensor", budget=0.1),
    "F-held-vector": Row("F-held with one tensor"),
    "F-resume-vector": Row("F-resume with one tensor", budget=1.2),
    "G": Row("accumulation over 4 batches, bf16 autocast", budget=1.03),
    "H": Row("DDP, 2 processes on gloo", budget=1.03),
    "M-peak": Row("peak memory of a run, over the hand-written loop", "MB", 5),
    "M-growth": Row("growth of the memory over 20 runs (what the allocator rounds is none)", "MB", 0.5),
    "M-objects": Row("objects that a run leaves behind", "objects", 0),
    "R": Row("training step of about 10 ms, samples one by one, everything exact", budget=1.03),
    "R-2": Row("the same with 2 processes", budget=1.03),
    "S": Row("host reads of tensors per step, between log points", "reads", 0),
    "S-all": Row("host reads of tensors per step, log points and ends of epochs included", "reads"),
    "S-calls": Row("calls of Python functions per step", "calls"),
    "Z": Row("an event that a callback implements and does nothing in", "us", 0.3),
    "Z-none": Row("a callback without any event, per step", "us", 0.02),
}


@dataclass(frozen=True)
class Case:
    """What is measured together, and in which process."""

    module: str
    """The file in `measures`."""
    process: str = "steps"
    """Cases of one name share a process; the name ``own`` stands for a process for each."""
    num_processes: int = 1
    is_repeated: bool = True
    """Whether it is measured in each round; counts come out the same each time."""


CASES = {
    "A": Case("steps"),
    "A'": Case("steps"),
    "A-off": Case("steps"),
    "B": Case("steps"),
    "B'": Case("steps"),
    "C": Case("steps"),
    "D": Case("steps"),
    "E": Case("starting", process="own"),
    "F": Case("saving", process="own"),
    "G": Case("steps", process="own"),  # Accelerate settles the precision once for a process
    "H": Case("steps", process="own", num_processes=2),
    "M": Case("memory", process="own"),
    "R": Case("steps"),
    "R-2": Case("steps", process="own", num_processes=2),
    "S": Case("counting", process="own", is_repeated=False),
    "Z": Case("events"),
    "scaling": Case("scaling", process="own"),
}

CURVES = {
    "callbacks": "microseconds that so many callbacks add to a step, each of which does nothing in one event of it",
    "metrics": "microseconds that so many metrics add to a step which returns them",
    "parameter tensors": "step over the hand-written loop with so many parameter tensors",
    "samples": "milliseconds from the call of `train` to the first step with so many samples",
    "samples, by hand": "milliseconds from the making of a `DataLoader` to its first batch with so many samples",
}
