"""What all processes do, or decide, as one: if it fails on one of them, it fails on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from pytorch_accelerated._distributed import broadcast_from_main, values_of_all
from pytorch_accelerated.exceptions import CheckpointError

Result = TypeVar("Result")


def decided_by_main(decide: Callable[[], Result], is_main: bool, num_processes: int) -> Result:
    """Call a function on the main process only, and return, or raise, the same everywhere.

    Must be called on every process.

    Args:
        decide: Returns something that can be pickled.
        is_main: Whether this is the main process.
        num_processes: How many there are.
    """
    result: Any = None
    error: Exception | None = None
    if is_main:
        try:
            result = decide()
        except Exception as caught:
            error = caught
    result, error = broadcast_from_main((result, error), num_processes)
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def done_by_all(act: Callable[[], Result], num_processes: int, group: Any = None) -> Result:
    """Call a function on every process, and return what it returned there, unless it failed on any.

    Otherwise a process that fails would leave the others waiting for it. Must be called on every process.

    Args:
        act: What to do; it must not wait for other processes.
        num_processes: How many there are.
        group: How they tell each other; ``None`` for the default group.

    Raises:
        CheckpointError: It failed on another process.
        Exception: It failed on this one.
    """
    if num_processes == 1 or not distributed.is_initialized():
        own_result = act()
        broadcast_from_main(None, num_processes)  # processes of another kind (XLA) at least wait for each other
        return own_result
    result: Any = None
    error: Exception | None = None
    try:
        result = act()
    except Exception as caught:
        error = caught
    problems = values_of_all(None if error is None else str(error), num_processes, group)
    if error is not None and not isinstance(error, CheckpointError):
        raise error
    problem = next((problem for problem in problems if problem is not None), None)
    if problem is not None:
        raise CheckpointError(problem) from error
    return result  # type: ignore[no-any-return]
