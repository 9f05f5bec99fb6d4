"""Start several processes that communicate over gloo, run test cases on them, and read the results."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from _starting import start

WAIT_SECONDS = 20
"""How long a rank waits for the others in a collective operation."""

NUM_REPEATS = int(os.environ.get("REPEAT", "1"))
"""How often to run the cases in which one rank stops all of them: ``REPEAT=20 pytest tests/distributed``."""


@dataclass
class Ended:
    """The exit code of a process, and when it ended, by `time.monotonic`."""

    returncode: int
    time: float


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(
    script: Path, folder: Path, num_processes: int, *arguments: str, timeout: float = 150, **more: str
) -> list[Ended]:
    """Run a script on several processes, and kill those that have not ended after ``timeout`` seconds.

    Args:
        script: The script.
        folder: The working directory of the processes, which gets their output as ``output-0.txt`` and so on.
        num_processes: How many processes to start.
        arguments: The command-line arguments of the script, after the folder.
        timeout: Seconds until the processes are killed.
        more: Changes to their environment.
    """
    environment = {
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
        **more,
    }
    processes, ended = [], [Ended(-1, float("inf")) for _ in range(num_processes)]

    def watch(rank: int) -> None:
        ended[rank] = Ended(processes[rank].wait(), time.monotonic())

    for rank in range(num_processes):
        of_rank = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"output-{rank}.txt").open("w") as output:
            processes.append(start(script, str(folder), *arguments, stdout=output.fileno(), cwd=folder, **of_rank))
    watchers = [threading.Thread(target=watch, args=(rank,)) for rank in range(num_processes)]
    deadline = time.monotonic() + timeout
    try:
        for watcher in watchers:
            watcher.start()
        for watcher in watchers:
            watcher.join(max(0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
        for watcher in watchers:
            watcher.join()
    return ended


def run_cases(cases: Mapping[str, Callable[[int, Path], Any]]) -> None:
    """Run all cases on this rank, and store what they return or raise for `read_results`."""
    directory = Path(sys.argv[1])
    process_group = InitProcessGroupKwargs(timeout=timedelta(seconds=WAIT_SECONDS))
    accelerator = Accelerator(cpu=True, kwargs_handlers=[process_group])
    rank = accelerator.process_index
    for name, case in cases.items():
        torch.manual_seed(0)
        folder = directory / name
        folder.mkdir(exist_ok=True)
        try:
            result = {"value": case(rank, folder)}
        except Exception:
            result = {"error": traceback.format_exc()}
        torch.save(result, directory / f"{name}-{rank}.pt")
        accelerator.wait_for_everyone()
    accelerator.end_training()


def read_results(folder: Path, name: str, num_processes: int) -> list[Any]:
    """Return what a case returned, by rank; fail the test if the case raised or did not finish."""
    values = []
    for rank in range(num_processes):
        path = folder / f"{name}-{rank}.pt"
        if not path.exists():
            output = (folder / f"output-{rank}.txt").read_text()[-3000:]
            pytest.fail(f"`case_{name}` did not finish on rank {rank}:\n{output}")
        result = torch.load(path, weights_only=False)
        if "error" in result:
            pytest.fail(f"`case_{name}` failed on rank {rank}:\n{result['error']}")
        values.append(result["value"])
    return values
