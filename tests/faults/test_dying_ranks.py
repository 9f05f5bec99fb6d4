"""After a signal, no process waits for one that has died or is stopped, wherever that happened.

    RANK_DEATHS=all python -m pytest tests/faults/test_dying_ranks.py -s

lets each of two ranks die in each way at every place where they do something together. By default, some of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from _processes import free_port
from _starting import start
from pytorch_accelerated.states import list_states, verify_state

SCRIPT = Path(__file__).with_name("_dying_ranks.py")
SECONDS_TO_END = 10
"""More than the grace of the script, and the three seconds in which ranks tell each other why they fail."""

IS_COMPLETE = os.environ.get("RANK_DEATHS") == "all"
WAYS = ("killed", "unnoticed", "stopped")

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system does not tell of its processes"),
]


def launch(folder: Path, dying_rank: int, how: str, place: str) -> list:
    """Start both ranks."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(2):
        with (folder / f"output-{rank}.txt").open("w") as output:
            arguments = (str(folder), str(dying_rank), how, place)
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
            ranks.append(start(SCRIPT, *arguments, stdout=output.fileno(), has_own_group=True, **environment))
    return ranks


def end(ranks: list) -> None:
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()


def die(folder: Path, dying_rank: int, how: str, place: str) -> tuple[str, float | None, str]:
    """Let a rank die, and send SIGTERM to the other.

    Returns:
        Where the rank died, the seconds until the other one ended, ``None`` if it did not, and its output.
    """
    folder.mkdir()
    ranks = launch(folder, dying_rank, how, place)
    other = ranks[1 - dying_rank]
    try:
        deadline = time.monotonic() + 60
        while not (folder / "died").exists():
            assert time.monotonic() < deadline, (folder / f"output-{dying_rank}.txt").read_text()
            time.sleep(0.005)
        time.sleep(0.05)
        begin = time.monotonic()
        other.send_signal(signal.SIGTERM)
        try:
            other.wait(SECONDS_TO_END)
            seconds = time.monotonic() - begin
        except subprocess.TimeoutExpired:
            seconds = None
    finally:
        end(ranks)
    for state in list_states(folder / "states") if (folder / "states").exists() else []:
        verify_state(state.path)
    return (folder / "died").read_text(), seconds, (folder / f"output-{1 - dying_rank}.txt").read_text()


def places_of(folder: Path, rank: int) -> list[str]:
    """Return the names of the places where a rank can die."""
    folder.mkdir()
    ranks = launch(folder, rank, "killed", "0")
    for each in ranks:
        assert each.wait(60) == 0, (folder / "output-0.txt").read_text() + (folder / "output-1.txt").read_text()
    return (folder / "places").read_text().splitlines()


@pytest.mark.skipif(not IS_COMPLETE, reason="takes many minutes; set RANK_DEATHS=all")
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("dying_rank", [1, 0])
def test_a_rank_that_dies_anywhere_leaves_nobody_waiting(tmp_path, dying_rank, how):
    places = places_of(tmp_path / "whole", dying_rank)
    slow, slowest = [], 0.0
    for number in range(1, len(places) + 1):
        name, seconds, output = die(tmp_path / str(number), dying_rank, how, str(number))
        if seconds is None:
            slow.append(f"{number} {name}: {output[-1500:]}")
        else:
            slowest = max(slowest, seconds)
    print(f"rank {dying_rank} {how} at {len(places)} places, {len(slow)} waits; {slowest:.1f} s at most")
    assert slow == []


@pytest.mark.parametrize(
    ("dying_rank", "how", "place"),
    [(1, "unnoticed", "broadcast:20"), (0, "stopped", "backward:1"), (1, "stopped", "all_gather in the background:1")],
)
def test_a_rank_that_dies_leaves_nobody_waiting(tmp_path, dying_rank, how, place):
    name, seconds, output = die(tmp_path / "run", dying_rank, how, place)
    assert name == place.partition(":")[0]
    assert seconds is not None, output
    assert f"SIGTERM ends this process, rank {1 - dying_rank}, at once: it waits in `" in output
    assert f"for rank {dying_rank}, which has ended or been stopped" in output
