"""Prints a table of all schedulers of PyTorch, and of timm if it is installed: runs compared with loops by hand.

Each scheduler trains for three epochs, after each update and once per epoch, on one process and on two. The learning
rate of each update has to equal that of a loop written by hand, and a run that is resumed in the middle has to end with
the same weights, bit by bit::

    python tests/tools/compare_schedulers.py

The exit code is 1 if anything differs.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import sys
import tempfile
from pathlib import Path

import _schedules
from _processes import launch, read_results, run_cases

NAME = "schedulers"


def compare() -> dict[str, list[list[str]]]:
    """Return what differs for each scheduler: on one process, and on each rank of two."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.redirect_stdout(io.StringIO()):  # the messages of the runs
            alone = _schedules.compare_all(folder / "alone")
        launch(Path(__file__).resolve(), folder, 2, timeout=600)
        results = [alone, *read_results(folder, NAME, 2)]
    return {scheduler: [result[scheduler] for result in results] for scheduler in alone}


def main() -> int:
    """Compare, and print the table."""
    packages = [name for name in ("torch", "timm") if importlib.util.find_spec(name)]
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages), end="\n\n")
    differing = {}
    print(f"| {'scheduler':<59} | one process | two processes |\n| {'-' * 59} | ----------- | ------------- |")
    for scheduler, (alone, *ranks) in compare().items():
        first, second = ("DIFFERENT" if any(problems) else "equal" for problems in ([alone], ranks))
        print(f"| {scheduler:<59} | {first:<11} | {second:<13} |")
        differing[scheduler] = [problem for problems in (alone, *ranks) for problem in problems]
    problems = [f"{scheduler}: {problem}" for scheduler, found in differing.items() for problem in found]
    print(f"\n{len(differing)} schedules, {len(problems)} differences", *problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    if "RANK" in os.environ:
        run_cases({NAME: lambda rank, folder: _schedules.compare_all(folder)})
    else:
        sys.exit(main())
