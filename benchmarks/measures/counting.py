"""Count what a step does. Counts are the same on every machine, however busy it is."""

from __future__ import annotations

import statistics

from _common import HostReadCounter, Job, PythonCallCounter, make_dataset, make_mlp
from measures import Figure, do, load_framework


def measure(case: str, framework: str) -> list[Figure]:
    train = load_framework(framework).train

    def count(make_probe: type) -> list[int]:
        job = Job(make_mlp, make_dataset(32 * 50), num_epochs=3, make_probe=make_probe)
        per_step: list[int] = do(job, train).per_step
        return per_step

    count(PythonCallCounter)  # warm up: one-time initialization is not counted
    reads = count(HostReadCounter)
    return [
        Figure("S", statistics.median(reads)),
        Figure("S-all", statistics.mean(reads)),
        Figure("S-calls", statistics.median(count(PythonCallCounter))),
    ]
