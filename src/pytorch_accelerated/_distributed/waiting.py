"""How long processes wait for each other, and which of them are missing when that was in vain."""

from __future__ import annotations

import os
import re
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

PROCESS_TIMEOUT = timedelta(minutes=10)
"""How long a process waits for another one, unless the user's accelerator sets another timeout."""

TIME_TO_CONNECT, TIME_PER_PROCESS = timedelta(seconds=15), timedelta(seconds=0.1)
"""How long processes that have all begun to form a group wait for each other to complete it."""

_LONGEST_ROLL_CALL = timedelta(seconds=3)
_ROLL = "pytorch_accelerated/waits"
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
    num_processes, place = distributed.get_world_size(), _place_of(error)
    timeout = process_timeout()
    answers = _call_roll(place, min(timeout, _LONGEST_ROLL_CALL).total_seconds())
    if answers:
        missing = [rank for rank in range(num_processes) if rank not in answers]
    else:  # not even its own: the store does not answer, which is in rank 0 or in the launcher
        is_in_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        missing = [] if is_in_launcher or distributed.get_rank() == 0 else [0]
    answers[distributed.get_rank()] = place
    error.args = (f"{error}\n{_explanation(answers, missing, timeout)}",)


def _is_of_collective(error: BaseException) -> bool:
    return isinstance(error, distributed.DistError) or (
        type(error) is RuntimeError and _LOST.search(str(error)) is not None
    )


def _is_explained(error: BaseException) -> bool:
    return "\nRank" in str(error) or "\nNo rank is known" in str(error)


def _explanation(answers: Mapping[int, str], missing: Sequence[int], timeout: timedelta) -> str:
    places = " ".join(f"Rank {rank} waited {answers[rank]}." for rank in sorted(answers))
    if not missing:
        return f"No rank is known to be missing. {places}"
    ranks = ", ".join(map(str, missing))
    subject = f"Rank {ranks} does" if len(missing) == 1 else f"Ranks {ranks} do"
    return (
        f"{subject} not answer: stopped, busy or gone, as the output there may tell. {places} Processes wait "
        f"{timeout.total_seconds():g} s for each other, which `InitProcessGroupKwargs(timeout=...)` sets."
    )


def _place_of(error: BaseException) -> str:
    """Say where a rank waited: the innermost function outside PyTorch, Accelerate and this room."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_NOT_A_PLACE)
    ]
    place = f"in `{frames[-1].name}` ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else "here"
    thread = threading.current_thread()
    return place if thread is threading.main_thread() else f"{place}, in its thread '{thread.name}'"


def _call_roll(place: str, seconds: float) -> dict[int, str]:
    """Tell the other ranks where this one waited, and return the places of those that tell theirs in time."""
    answers: dict[int, str] = {}

    def ask() -> None:
        store = distributed.distributed_c10d._get_default_store()  # noqa: SLF001 - no public name
        missing = set(range(distributed.get_world_size()))
        deadline = time.monotonic() + seconds
        store.set(f"{_ROLL}/{distributed.get_rank()}", place)
        while missing and time.monotonic() < deadline:
            for rank in sorted(missing):
                if store.check([f"{_ROLL}/{rank}"]):
                    answers[rank] = store.get(f"{_ROLL}/{rank}").decode()
            missing -= answers.keys()
            time.sleep(0.05)

    def ask_if_possible() -> None:
        try:
            ask()
        except RuntimeError:
            return  # the process that holds the store has ended

    # If the process that holds the store is stopped, the call never returns.
    thread = threading.Thread(target=ask_if_possible, name="roll call", daemon=True)
    thread.start()
    thread.join(seconds + 1)
    return dict(answers)
