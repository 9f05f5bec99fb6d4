"""Decorators that choose the processes on which a function runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from accelerate import PartialState

from pytorch_accelerated._distributed.registry import AcceleratorRegistry

P = ParamSpec("P")
R = TypeVar("R")


def world_process_zero_only(func: Callable[P, R]) -> Callable[P, R | None]:
    """Call the function on the main process only; on the other processes it does nothing and returns ``None``."""

    @functools.wraps(func)
    def call_on_main_process(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return func(*args, **kwargs) if _rank("RANK", "process_index") == 0 else None

    return call_on_main_process


def local_process_zero_only(func: Callable[P, R]) -> Callable[P, R | None]:
    """Call the function on the main process of each node only; elsewhere it does nothing and returns ``None``."""

    @functools.wraps(func)
    def call_on_local_main_process(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return func(*args, **kwargs) if _rank("LOCAL_RANK", "local_process_index") == 0 else None

    return call_on_local_main_process


def local_process_zero_first(func: Callable[P, R]) -> Callable[P, R]:
    """Call the function on the main process of each node first, then on the others: for downloads and caches.

    Must be called on every process.
    """

    @functools.wraps(func)
    def call_on_local_main_process_first(*args: P.args, **kwargs: P.kwargs) -> R:
        with PartialState().local_main_process_first():
            return func(*args, **kwargs)

    return call_on_local_main_process_first


def _rank(variable: str, attribute: str) -> int:
    # `PartialState()` would initialize the process with default settings if there is no accelerator yet.
    if AcceleratorRegistry.has_process_state():
        return int(getattr(PartialState(), attribute))
    return int(os.environ.get(variable, "0"))
