"""Decorators that choose the processes on which a function runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState

Function = TypeVar("Function", bound=Callable[..., Any])


def world_process_zero_only(func: Function) -> Function:
    """Call the function on the main process of all only; on the others it returns ``None`` at once."""

    @functools.wraps(func)
    def on_main_process(*args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs) if _rank("RANK", "process_index") == 0 else None

    return on_main_process  # type: ignore[return-value]


def local_process_zero_only(func: Function) -> Function:
    """Call the function on the main process of each node only; on the others it returns ``None`` at once."""

    @functools.wraps(func)
    def on_local_main_process(*args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs) if _rank("LOCAL_RANK", "local_process_index") == 0 else None

    return on_local_main_process  # type: ignore[return-value]


def local_process_zero_first(func: Function) -> Function:
    """Call the function on the main process of each node, and then on its others: for downloads and caches.

    Must be called on every process.
    """

    @functools.wraps(func)
    def main_process_first(*args: Any, **kwargs: Any) -> Any:
        with PartialState().local_main_process_first():
            return func(*args, **kwargs)

    return main_process_first  # type: ignore[return-value]


def _rank(variable: str, attribute: str) -> int:
    # Before an Accelerator exists, asking the state would make one with default settings that nobody chose.
    if PartialState._shared_state:
        return int(getattr(PartialState(), attribute))
    return int(os.environ.get(variable, "0"))
