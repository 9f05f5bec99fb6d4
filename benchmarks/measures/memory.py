"""Memory: the peak of a run in a fresh process, and what many runs leave behind. Linux only, which tells it exactly."""

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
_M_MMAP_THRESHOLD = -3  # of malloc.h


def measure(case: str, framework: str) -> list[Figure]:
    """Return the peak, from which the runner takes that of the loop written by hand, and the growth."""
    train = load_framework(framework).train
    if not _STATUS.exists():
        raise RuntimeError("This needs `/proc`, which only Linux has.")
    _give_back_what_is_freed()
    load_framework(HAND_WRITTEN).train(
        Job(make_mlp, make_dataset(32))
    )  # loads the parts of PyTorch that training needs
    job = Job(make_wide_mlp, make_dataset(32 * 20), num_epochs=2)
    before = memory("VmRSS")
    _CLEAR_REFS.write_text("5")  # the peak is counted from here on
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


def _give_back_what_is_freed() -> None:
    """Let the memory of a large tensor go back to the system when it is freed, so that the peak is what is needed.

    The C library changes its mind about large blocks as they are freed, and then gives out their places to small ones.
    Whether a gradient of 17 MB fits into its old place is chance from then on, in the loop written by hand too.
    """
    if (set_option := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        set_option(_M_MMAP_THRESHOLD, 128 * 1024)


def memory(name: str) -> float:
    """Return one of the kernel's figures about this process in MB."""
    kilobytes = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert kilobytes is not None
    return int(kilobytes[1]) * 1024 / _MEGABYTE
