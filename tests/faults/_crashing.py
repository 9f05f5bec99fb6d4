"""Processes that die at a chosen operation on files."""

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
    """Fork a process that does something and dies, as if by SIGKILL, before its n-th operation on files in a folder.

    Returns:
        Whether it came to that; otherwise it has done all.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which do nothing here
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
    assert code in (0, _DIED), "the process failed by itself"
    return code == _DIED


def _die_at(point: int, folder: Path) -> None:
    num_seen = 0

    def count() -> None:
        nonlocal num_seen
        if num_seen == point:
            os._exit(_DIED)
        num_seen += 1

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        # What is deleted as part of a folder is named relatively to it.
        is_there = event in ("os.remove", "os.rmdir") or any(
            isinstance(argument, (str, os.PathLike)) and os.fspath(argument).startswith(str(folder))
            for argument in arguments
        )
        is_reading = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) == 0
        if event in _EVENTS and is_there and not is_reading:
            count()

    def half_written(save: Callable[..., Any]) -> Callable[..., Any]:
        # These writers are not Python. They may die before, within, and after a file.
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
    torch.save = half_written(torch.save)
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())
    sys.addaudithook(hear)
