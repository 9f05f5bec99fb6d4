"""Kills one of two ranks at random moments, sends SIGTERM to the other, and measures how long that one takes to end.

    make soak RANK_KILLS=300 SEED=7

States are saved in the background. After each kill, every visible state must be valid.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # optimizers import it at their first step, which would take seconds in each process

import _runs
from _kills import problems_of, read_arguments, start, wait
from _processes import free_port

END_SECONDS = 15
"""How long the other rank may take to end."""


def run_rank(folder: Path, port: int, rank: int) -> None:
    """Train as one of two processes."""
    of_group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(of_group, RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
    _runs.train(_runs.make_trainer(folder / "states", in_background=True, max_checkpoints=2, save_at_end=True))


def start_both(folder: Path) -> list[int]:
    """Start both processes, and return their numbers."""
    folder.mkdir()
    port = free_port()
    return [start(folder / f"output-{rank}.txt", partial(run_rank, folder, port, rank)) for rank in range(2)]


def kill_one(folder: Path, generator: random.Random, seconds: float) -> tuple[float, list[str]]:
    """Kill one of two ranks, and return how long the other one took to end, and what is wrong."""
    pids = start_both(folder)
    victim = generator.randint(0, 1)
    time.sleep(generator.uniform(0, 1.05 * seconds))
    os.kill(pids[victim], signal.SIGKILL)
    os.waitpid(pids[victim], 0)
    time.sleep(generator.choice([0, 0, 0.05, 0.5]))
    begin, other = time.monotonic(), pids[1 - victim]
    os.kill(other, signal.SIGTERM)  # a process that has ended is there until it is waited for
    status = wait(other, END_SECONDS)
    taken = time.monotonic() - begin
    if status is None:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        output = (folder / f"output-{1 - victim}.txt").read_text()[-1500:]
        return taken, [f"rank {1 - victim} still runs {END_SECONDS} s after its SIGTERM: {output}"]
    return taken, problems_of(folder)


def main() -> int:
    num_kills, generator = read_arguments(__doc__.partition("\n")[0], 300)
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="rank_kills_"))
    begin = time.monotonic()
    if any(wait(pid, 120) != 0 for pid in start_both(root / "uninterrupted")):
        raise RuntimeError((root / "uninterrupted" / "output-0.txt").read_text())
    duration, taken, num_failed = time.monotonic() - begin, [], 0
    for number in range(num_kills):
        seconds, problems = kill_one(root / str(number), generator, duration)
        taken.append(seconds)
        if problems:
            num_failed += 1
            print(f"kill {number}: {problems}", flush=True)
        shutil.rmtree(root / str(number))
    print(
        f"{num_kills} kills in {time.monotonic() - begin:.0f} s, {num_failed} failures; the other ended after "
        f"{max(taken):.1f} s at most, {sum(each > 5 for each in taken)} times after more than 5 s"
    )
    shutil.rmtree(root)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
