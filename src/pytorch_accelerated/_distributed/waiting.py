"""How long processes wait for each other, which of them are missing when that was in vain, and why they have ended."""

from __future__ import annotations

import atexit
import gc
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import distributed

PROCESS_TIMEOUT = timedelta(minutes=10)
"""How long a process waits for another one, unless the user's accelerator sets another timeout."""

TIME_TO_CONNECT, TIME_PER_PROCESS = timedelta(seconds=15), timedelta(seconds=0.1)
"""How long processes that have all begun to form a group wait for each other to complete it."""

TIME_TO_AGREE = timedelta(seconds=60)
"""How long a rank that stops within a step, where nobody can ask the others, waits for them to do the same."""

_LONGEST_ROLL_CALL = timedelta(seconds=3)
_ROLL, _ENDS, _STOPS = (f"pytorch_accelerated/{name}" for name in ("waits", "ends", "stops"))
_MAX_LETTERS = 500
_run_numbers = count()
_run_number = 0
_LOST = re.compile(
    r"gloo/|NCCL|timed out waiting \d+ms|application timeout|wait timeout after|connection (closed|reset)|broken pipe",
    re.IGNORECASE,
)
_TORCH = Path(str(torch.__file__)).parent
_NOT_A_PLACE = (str(_TORCH), str(_TORCH.with_name("accelerate")), str(Path(__file__).parent), "<")


def process_timeout() -> timedelta:
    """Return how long the processes of the default group wait for each other: what `InitProcessGroupKwargs` says."""
    world = distributed.group.WORLD
    for device in ("cpu", "cuda"):
        try:
            timeout = world._get_backend(torch.device(device)).options._timeout  # type: ignore[union-attr] # noqa: SLF001
        except (AttributeError, RuntimeError):
            continue  # no backend for this device, or none that tells
        if isinstance(timeout, timedelta):
            return timeout
    return PROCESS_TIMEOUT


def new_host_group() -> distributed.ProcessGroup:
    """Create a process group that connects hosts, in which processes wait as long as in the default group.

    Must be called on every process. To connect takes an instant once all have come here, but does not notice if one of
    them ends meanwhile: that wait is a short one.
    """
    timeout, num_processes = process_timeout(), distributed.get_world_size()
    distributed.all_gather_object([None] * num_processes, None)  # all are here, or an error tells
    time_to_connect = min(timeout, TIME_TO_CONNECT + num_processes * TIME_PER_PROCESS)
    group: distributed.ProcessGroup = distributed.new_group(backend="gloo", timeout=time_to_connect)
    distributed.distributed_c10d._set_pg_timeout(timeout, group)  # noqa: SLF001 - no public name
    return group


def explain_vain_wait(error: BaseException) -> None:
    """Let the error of a collective say which ranks do not answer, and where each of the others waited.

    Takes a few seconds, in which the ranks that have failed to reach another one hear of each other. Does nothing with
    other errors. Not a collective.

    Args:
        error: Any error; its message is extended.
    """
    if not distributed.is_initialized() or not _is_of_collective(error) or _is_explained(error):
        return
    place, timeout = _place_of(error), process_timeout()
    roll = _call_roll(place, min(timeout, _LONGEST_ROLL_CALL).total_seconds())
    if roll.places:
        missing = [rank for rank in range(distributed.get_world_size()) if rank not in {**roll.places, **roll.ends}]
    else:  # not even its own: the store does not answer, which is in rank 0 or in the launcher
        missing = [] if _is_store_in_launcher() or distributed.get_rank() == 0 else [0]
    roll.places[distributed.get_rank()] = place
    error.args = (f"{error}\n{_explanation(roll, missing, timeout)}",)


def start_run() -> None:
    """Let what ranks tell each other belong to a new run. Must be called on every process, but waits for none."""
    global _run_number
    _run_number = next(_run_numbers)


def announce_end(error: BaseException) -> None:
    """Tell the other ranks why this one ends, for the error of those that wait for it. Not a collective.

    Args:
        error: What ends the run here. If it is that of a collective, the cause is elsewhere.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1 or _is_of_collective(error):
        return
    reason = f"{type(error).__name__} {_place_of(error)}: {error}"[:_MAX_LETTERS].partition("\n")[0]
    rank, store = distributed.get_rank(), _store()
    _call_in_time(lambda: store.set(_key(_ENDS, rank), reason), seconds=1)
    if rank == 0 and not _is_store_in_launcher() and distributed.get_backend() == "gloo":
        _keep_store_at_exit()


@cache
def _keep_store_at_exit() -> None:
    atexit.register(_let_others_read)


def _let_others_read() -> None:
    """Keep the store a moment longer than the connections, so that ranks whose wait fails learn why.

    Does nothing if the program ends otherwise than by an exception.
    """
    held = [name for name in ("last_exc", "last_value", "last_traceback") if hasattr(sys, name)]
    if not held or not distributed.is_initialized():
        return
    for name in held:  # its frames hold the model, and that the group
        delattr(sys, name)
    store, num_processes = _store(), distributed.get_world_size()
    distributed.destroy_process_group()
    gc.collect()
    names = [(_key(_ROLL, rank), _key(_ENDS, rank)) for rank in range(1, num_processes)]
    deadline = time.monotonic() + _LONGEST_ROLL_CALL.total_seconds()
    with suppress(RuntimeError):
        while time.monotonic() < deadline and not all(any(store.check([key]) for key in keys) for keys in names):
            time.sleep(0.05)
        time.sleep(0.5)  # to read after having told


def stop_together(stop: Exception) -> None:
    """Wait for the others to stop as well, when an exception that ends the run on all ranks has ended a step of one.

    Args:
        stop: The exception. No other rank knows of it yet.

    Raises:
        RuntimeError: Not all ranks have raised one within `TIME_TO_AGREE`, or one of them has failed.
    """
    rank, num_processes, store = distributed.get_rank(), distributed.get_world_size(), _store()
    number = store.add(_key(_STOPS, rank), 1)  # those of a run that were agreed on count, too
    timeout = min(process_timeout(), TIME_TO_AGREE)
    deadline, missing = time.monotonic() + timeout.total_seconds(), set(range(num_processes)) - {rank}
    while missing and time.monotonic() < deadline:
        missing = {other for other in missing if store.add(_key(_STOPS, other), 0) < number}
        if any(store.check([_key(name, other)]) for other in missing for name in (_ROLL, _ENDS)):
            break
        time.sleep(0.01)
    if missing:
        raise RuntimeError(
            f"Rank {rank} raised {type(stop).__name__} {_place_of(stop)}: {stop}. There it ends the run only if all "
            f"ranks raise it within {timeout.total_seconds():g} s, and {_ranks(sorted(missing))} did not. Call "
            "`trainer.stop(reason)` instead, which ends the run on all ranks after the step, or raise it in an event "
            "of a callback."
        ) from stop


def _is_of_collective(error: BaseException) -> bool:
    return isinstance(error, distributed.DistError) or (
        type(error) is RuntimeError and _LOST.search(str(error)) is not None
    )


def _is_explained(error: BaseException) -> bool:
    return "\nRank" in str(error) or "\nNo rank is known" in str(error)


@dataclass(frozen=True)
class _Roll:
    """What ranks tell each other: where they have waited, or why they have ended, by rank."""

    places: dict[int, str] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)


def _explanation(roll: _Roll, missing: Sequence[int], timeout: timedelta) -> str:
    ends = [f"Rank {rank} has ended with {roll.ends[rank].removesuffix('.')}." for rank in sorted(roll.ends)]
    places = " ".join([*ends, *(f"Rank {rank} waited {roll.places[rank]}." for rank in sorted(roll.places))])
    if not missing:
        return places if ends else f"No rank is known to be missing. {places}"
    ranks = _ranks(missing).capitalize()
    subject = f"{ranks} does" if len(missing) == 1 else f"{ranks} do"
    return (
        f"{subject} not answer: stopped, busy or gone, as the output there may tell. {places} Processes wait "
        f"{timeout.total_seconds():g} s for each other, which `InitProcessGroupKwargs(timeout=...)` sets."
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def _place_of(error: BaseException) -> str:
    """Say where a rank waited: the innermost function outside PyTorch, Accelerate and this room."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_NOT_A_PLACE)
    ]
    place = f"in `{frames[-1].name}` ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else "here"
    thread = threading.current_thread()
    return place if thread is threading.main_thread() else f"{place}, in its thread '{thread.name}'"


def _call_roll(place: str, seconds: float) -> _Roll:
    """Tell the other ranks where this one waited, and return what those tell that do so in time."""
    roll = _Roll()

    def ask() -> None:
        store = _store()
        missing = set(range(distributed.get_world_size()))
        deadline = time.monotonic() + seconds
        store.set(_key(_ROLL, distributed.get_rank()), place)
        while missing and time.monotonic() < deadline:
            for rank in sorted(missing):
                for name, answers in ((_ROLL, roll.places), (_ENDS, roll.ends)):
                    if rank not in roll.places and store.check([_key(name, rank)]):
                        answers[rank] = store.get(_key(name, rank)).decode()
            missing -= {**roll.places, **roll.ends}.keys()
            time.sleep(0.05)

    _call_in_time(ask, seconds + 1)
    return _Roll(dict(roll.places), dict(roll.ends))


def _store() -> Any:
    return distributed.distributed_c10d._get_default_store()  # noqa: SLF001 - no public name


def _is_store_in_launcher() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def _key(name: str, rank: int) -> str:
    return f"{name}/{_run_number}/{rank}"


def _call_in_time(function: Callable[[], None], seconds: float) -> None:
    """Call a function that uses the store. If the process that holds the store is stopped, this would never return."""

    def call() -> None:
        with suppress(RuntimeError):  # the process that holds the store has ended
            function()

    thread = threading.Thread(target=call, name="roll call", daemon=True)
    thread.start()
    thread.join(seconds)
