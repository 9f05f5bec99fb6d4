"""Processes that die at a chosen file operation."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "shutil.rmtree", "os.truncate"}
_DIED = 77


def dies_at(point: int, act: Callable[[], Any], folder: Path) -> bool:
    """Fork a process that calls a function, and dies as if by SIGKILL before its n-th file operation in a folder.

    Returns:
        Whether it died. Otherwise the function returned.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about forking with threads, which are idle here
        child = os.fork()
    if child == 0:
        code = 1
        try:
            _die_at(point, folder)
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, _DIED), "the process failed on its own"
    return code == _DIED


def _die_at(point: int, folder: Path) -> None:
    num_seen = 0

    def count() -> None:
        nonlocal num_seen
        if num_seen == point:
            os._exit(_DIED)
        num_seen += 1

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        # Files that are deleted as part of a folder are named relative to it.
        is_inside = event in ("os.remove", "os.rmdir") or any(
            isinstance(argument, (str, os.PathLike)) and os.fspath(argument).startswith(str(folder))
            for argument in arguments
        )
        is_reading = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) == 0
        if event in _EVENTS and is_inside and not is_reading:
            count()

    def with_partial_writes(save: Callable[..., Any]) -> Callable[..., Any]:
        # This writer is not Python, so no event is audited. It may die before, during and after a file.
        def write(contents: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            count()
            save(contents, path, *args, **kwargs)
            if num_seen == point:
                name = path if isinstance(path, (str, os.PathLike)) else path.name
                os.truncate(name, Path(name).stat().st_size // 2)
            count()

        return write

    fsync = os.fsync
    os.fsync = lambda descriptor: (count(), fsync(descriptor))[1]
    torch.save = with_partial_writes(torch.save)
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())
    sys.addaudithook(audit)
