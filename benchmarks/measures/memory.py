"""Measure the peak memory of a run in a fresh process, and what many runs leave behind. Requires Linux."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

from _common import Job, make_dataset, make_mlp, make_wide_mlp
from frameworks import HAND_WRITTEN
from measures import Figure, do, load_framework

NUM_RUNS = 20
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MEGABYTE = 1024**2
_M_MMAP_THRESHOLD = -3  # from malloc.h


def measure(case: str, framework: str) -> list[Figure]:
    """Return the peak memory and the growth.

    `report.py` subtracts the peak of the hand-written loop.
    """
    train = load_framework(framework).train
    if not _STATUS.exists():
        raise RuntimeError("Measuring memory needs `/proc`, which only Linux has.")
    _return_freed_memory()
    load_framework(HAND_WRITTEN).train(Job(make_mlp, make_dataset(32)))  # loads what training needs from PyTorch
    job = Job(make_wide_mlp, make_dataset(32 * 20), num_epochs=2)
    before = memory("VmRSS")
    _CLEAR_REFS.write_text("5")  # resets the peak
    do(job, train)
    figures = [Figure("M-peak", memory("VmHWM") - before)]

    def run() -> tuple[float, int]:
        do(Job(make_mlp, make_dataset(32 * 20)), train)
        gc.collect()
        return memory("VmRSS"), len(gc.get_objects())

    del job
    for _ in range(NUM_RUNS // 2):
        run()
    first_memory, first_count = run()
    last = [run() for _ in range(NUM_RUNS)][-1]
    return [
        *figures,
        Figure("M-growth", last[0] - first_memory),
        Figure("M-objects", max(0, last[1] - first_count) // NUM_RUNS),
    ]


def _return_freed_memory() -> None:
    """Make the C library return the memory of large tensors to the system when they are freed.

    By default, it raises its threshold for large blocks as they are freed, and reuses their memory for small ones. From
    then on it depends on chance whether a gradient of 17 MB fits into its previous place, in the hand-written loop too.
    With a fixed threshold, the peak is what the run needs.
    """
    if (set_option := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        set_option(_M_MMAP_THRESHOLD, 128 * 1024)


def memory(name: str) -> float:
    """Return one of the kernel's memory figures for this process in MB."""
    kilobytes = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert kilobytes is not None
    return int(kilobytes[1]) * 1024 / _MEGABYTE
