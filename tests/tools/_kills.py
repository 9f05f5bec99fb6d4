"""Kills training runs at random moments, and restarts them until they finish; run as a script.

    python tests/tools/_kills.py --kills 200 --seed 7

Each run is a process forked from this one, so that a restart takes no time. After each kill, every visible state must
be valid. A run that finishes must end with the same bits as one that was never killed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import _runs
from pytorch_accelerated.states import list_states, verify_state

MAX_CHECKPOINTS = 2
KINDS: dict[str, dict[str, Any]] = {
    "every step": {"save_every_n_steps": 1},
    "every third step": {"save_every_n_steps": 3, "save_every_n_epochs": 1},
    "every epoch, the end too": {"save_every_n_steps": None, "save_every_n_epochs": 1, "save_at_end": True},
    "accumulated": {"save_every_n_steps": 1, "gradient_accumulation_steps": 4},
    "in the background": {"save_every_n_steps": 1, "in_background": True},
    "workers": {"save_every_n_steps": 2, "num_workers": 2},
}
TRAIN_ARGUMENTS = ("gradient_accumulation_steps", "num_workers")
NUM_LITTER = 3
"""The maximum number of temporary folders and locks next to the states after a kill."""


def run(folder: Path, kind: str) -> None:
    """Train, from the newest state if there is one, and save the outcome."""
    settings = {**KINDS[kind], "max_checkpoints": MAX_CHECKPOINTS}
    train_settings = {name: settings.pop(name) for name in TRAIN_ARGUMENTS if name in settings}
    trainer = _runs.make_trainer(folder / "states", **settings)
    outcome = _runs.train(trainer, **train_settings, resume_from="latest")
    torch.save(outcome, folder / "outcome.part")
    (folder / "outcome.part").rename(folder / "outcome.pt")


def start(output: Path, run: Callable[[], None]) -> int:
    """Fork a process that trains, with its workers in a separate process group, and return its pid.

    Args:
        output: The file that what it prints is appended to.
        run: Trains.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        printed = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: float) -> int | None:
    """Return the exit status of a process; ``None`` if it is still running after a number of seconds."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() > deadline:
            return None
        time.sleep(0.001)


def problems_of(folder: Path) -> list[str]:
    """Return what is wrong with the states of a run that was killed."""
    states = folder / "states"
    if not states.exists():
        return []
    problems = []
    for state in list_states(states):
        try:
            verify_state(state.path)
        except Exception as error:
            problems.append(f"{state.path.name}: {error}")
    kept = [path for path in states.iterdir() if path.name.startswith(("step_", "epoch_"))]
    if len(kept) > MAX_CHECKPOINTS + 1:  # one more while the oldest is being deleted
        problems.append(f"{len(kept)} states are kept")
    litter = [path for path in states.iterdir() if path.name.startswith(".")]
    if len(litter) > NUM_LITTER:
        problems.append(f"litter: {sorted(path.name for path in litter)}")
    return problems


def problems_at_end(folder: Path, expected: dict[str, Any]) -> list[str]:
    """Return what is wrong with a run that has finished."""
    outcome = torch.load(folder / "outcome.pt", weights_only=True)
    problems = _runs.differences(expected, outcome)[:3]
    left = sorted(path.name for path in (folder / "states").iterdir() if path.name.startswith("."))
    return problems + [f"litter: {name}" for name in left if name != ".lock"]


class Failures(list[str]):
    """What went wrong, with the output of the run."""

    def record(self, folder: Path, problems: list[str]) -> None:
        if problems:
            output = (folder / "output.txt").read_text()[-2000:]
            self.append(f"{folder.name}: {problems}\n{output}")


def uninterrupted_run(folder: Path, kind: str) -> tuple[dict[str, Any], float]:
    """Return the outcome of a run that is not killed, and the seconds it took."""
    folder.mkdir()
    begin = time.monotonic()
    status = wait(start(folder / "output.txt", partial(run, folder, kind)), 120)
    if status != 0:
        raise RuntimeError((folder / "output.txt").read_text())
    return torch.load(folder / "outcome.pt", weights_only=True), time.monotonic() - begin


def kill_runs(root: Path, kind: str, num_kills: int, generator: random.Random) -> tuple[int, int, Failures]:
    """Kill runs of a kind, let the last one finish, and return the numbers of kills and finished runs, and failures."""
    failures = Failures()
    expected, seconds = uninterrupted_run(root / f"{kind} uninterrupted", kind)
    kills = ends = 0
    folder = root / kind
    while (kills < num_kills or folder.exists()) and not failures:
        folder.mkdir(exist_ok=True)
        child = start(folder / "output.txt", partial(run, folder, kind))
        status = wait(child, generator.uniform(0, 1.1 * seconds) if kills < num_kills else 120)
        if status is None:
            os.killpg(child, signal.SIGKILL) if kills % 2 else os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            failures.record(folder, problems_of(folder))
        else:
            problems = [f"ended with status {status}"] if status else problems_at_end(folder, expected)
            failures.record(folder, problems)
            shutil.rmtree(folder)
            ends += 1
    return kills, ends, failures


def read_arguments(description: str, num_kills: int) -> tuple[int, random.Random]:
    """Return the number of kills that the command line asks for, and what decides when they happen; print its seed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--kills", type=int, default=num_kills)
    parser.add_argument("--seed", type=int, default=None, help="decides when the kills happen (default: the time)")
    arguments = parser.parse_args()
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    return arguments.kills, random.Random(seed)


def main() -> int:
    num_kills, generator = read_arguments(__doc__.partition("\n")[0], 200)
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="kills_"))
    begin = time.monotonic()
    num_failed = 0
    for number, kind in enumerate(KINDS):
        num_of_kind = num_kills // len(KINDS) + (number < num_kills % len(KINDS))
        kills, ends, failures = kill_runs(root, kind, num_of_kind, generator)
        print(f"{kind}: {kills} kills, {ends} runs finished, {len(failures)} failures", flush=True)
        for failure in failures:
            print(failure)
        num_failed += len(failures)
    print(f"{num_kills} kills in {time.monotonic() - begin:.0f} s, {num_failed} failures")
    if not num_failed:
        shutil.rmtree(root)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
