"""A run on two processes that is started by a launcher; the same command goes on with it, for `test_launchers.py`.

The arguments are a folder, and what happens to which rank at which update in JSON, such as
``{"kill": [0, 7], "exit": [1, 4]}``. Each happens once. With ``--forked``, the script is its own launcher: it forks the
processes under the agent that torchrun starts them with, which takes a fraction of the time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import _runs
from _support import Probe

SECONDS_TO_SIGNAL = 60
MAX_RESTARTS = 2


def happens(folder: Path, what: str, rank: int, update: int) -> Probe:
    """Do something on a rank after an update, the first time that the run gets there."""
    mark = folder / f"happened-{what}"

    def act(trainer: Any, **_: Any) -> None:
        if trainer.process_index != rank or trainer.progress.num_updates != update or mark.exists():
            return
        mark.touch()
        if what == "exit":
            os._exit(7)
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        flag = signal.getsignal(signal.SIGTERM).__self__  # the run's `InterruptFlag`, whose method is the handler
        deadline = time.monotonic() + SECONDS_TO_SIGNAL
        while flag.signal_number is None and time.monotonic() < deadline:
            time.sleep(0.01)
        (folder / "signal-arrived").touch()
        if what == "hang":
            time.sleep(SECONDS_TO_SIGNAL)  # until it is killed

    return Probe(on_train_step_end=act)


def run(folder: Path, happenings: dict[str, list[int]]) -> None:
    """Train from the newest state, and save the outcome."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked process has the handler of the launcher
    os.environ["ACCELERATE_USE_CPU"] = "true"
    callbacks = [happens(folder, what, *where) for what, where in happenings.items()]
    trainer = _runs.make_trainer(folder / "states", callbacks=callbacks, max_checkpoints=2, in_background=True)
    outcome = _runs.train(trainer, resume_from="latest")
    torch.save(outcome, folder / f"outcome-{trainer.process_index}.pt")


def launch(folder: Path, happenings: dict[str, list[int]]) -> None:
    """Fork the processes, and start them again if one dies, as torchrun does."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=MAX_RESTARTS,
        start_method="fork",
    )
    elastic_launch(config, run)(folder, happenings)


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--forked"]
    (launch if "--forked" in sys.argv else run)(Path(arguments[0]), json.loads(arguments[1]))
