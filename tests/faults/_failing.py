"""File operations that fail: the n-th one in a folder, and if the disk stays broken, those after it."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safetensors.torch
import torch

WRITES, REMOVES, READS = "writes", "removes", "reads"
_FAILING = {errno.EIO: (WRITES, REMOVES, READS), errno.EROFS: (WRITES, REMOVES), errno.ENOSPC: (WRITES,)}
"""The kinds of operations that may fail with an error of the operating system."""

CODES = tuple(_FAILING)

_OPERATIONS = {
    "fsync": WRITES,
    "rename": WRITES,
    "replace": WRITES,
    "mkdir": WRITES,
    "ftruncate": WRITES,
    "pwrite": WRITES,
    "chmod": WRITES,
    "unlink": REMOVES,
    "remove": REMOVES,
    "rmdir": REMOVES,
    "stat": READS,
    "lstat": READS,
    "fstat": READS,
    "scandir": READS,
    "listdir": READS,
    "pread": READS,
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Disk:
    """Counts the operations in a folder, and lets one fail.

    Args:
        folder: The folder.
        point: How many operations succeed before the one that fails.
        code: The number of the error.
        stays_broken: Whether those after it fail too.
    """

    def __init__(self, folder: Path, point: int, code: int, stays_broken: bool) -> None:
        self.folder, self.point, self.code, self.stays_broken = str(folder), point, code, stays_broken
        self.num_seen = 0
        self.failed = ""
        """The name of the operation that failed; empty if none did."""
        self._access = threading.Lock()

    def fails(self, name: str, kind: str, file: Any) -> bool:
        """Count an operation, and return whether it fails.

        Args:
            name: Its name.
            kind: Whether it writes, removes or reads.
            file: The path or number of the file.
        """
        if kind not in _FAILING[self.code] or not self._is_inside(file):
            return False
        with self._access:
            number, self.num_seen = self.num_seen, self.num_seen + 1
            if number == self.point:
                self.failed = name
            return number == self.point or (number > self.point and self.stays_broken)

    def pass_or_fail(self, name: str, kind: str, file: Any) -> None:
        """Count an operation, and raise if it fails.

        Raises:
            OSError: It does.
        """
        if self.fails(name, kind, file):
            raise self.error(file)

    def error(self, file: Any) -> OSError:
        """Return what the operating system would raise."""
        path = () if isinstance(file, int) else (os.fspath(file),)
        return OSError(self.code, os.strerror(self.code), *path)

    def _is_inside(self, file: Any) -> bool:
        if isinstance(file, int):
            with suppress(OSError):
                return str(Path(f"/proc/self/fd/{file}").readlink()).startswith(self.folder)
            return False
        # Files that are deleted as part of a folder are named relative to it.
        return os.fspath(file).startswith(self.folder) or not os.path.isabs(file)  # noqa: PTH117


@contextmanager
def failing(folder: Path, point: int, code: int, stays_broken: bool = False) -> Iterator[Disk]:
    """Let an operation in a folder fail, and yield what counts them; also those of PyTorch and safetensors."""
    disk = Disk(folder, point, code, stays_broken)
    former_pathlib = getattr(pathlib, "_NormalAccessor", None)  # in Python 3.10, it has functions of its own
    with _all_patched(
        *((os, name, _checked(disk, name, kind)) for name, kind in _OPERATIONS.items()),
        *(
            (former_pathlib, name, staticmethod(_checked(disk, name, kind)))
            for name, kind in _OPERATIONS.items()
            if hasattr(former_pathlib, name)
        ),
        (os, "open", _checked_open(disk)),
        (fcntl, "flock", _checked_function(disk, fcntl.flock, "flock", READS)),
        (Path, "open", lambda path, *args, **kwargs: _open(disk, path, *args, **kwargs)),
        (torch, "save", _checked_torch_save(disk)),
        (safetensors.torch, "save_file", _checked_save_file(disk)),
    ):
        yield disk


@contextmanager
def _all_patched(*patches: tuple[Any, str, Any]) -> Iterator[None]:
    patchers = [patch.object(*each) for each in patches]
    for patcher in patchers:
        patcher.start()
    try:
        yield
    finally:
        for patcher in reversed(patchers):
            patcher.stop()


def _checked(disk: Disk, name: str, kind: str) -> Callable[..., Any]:
    return _checked_function(disk, getattr(os, name), name, kind)


def _checked_function(disk: Disk, function: Callable[..., Any], name: str, kind: str) -> Callable[..., Any]:
    def call(file: Any = ".", *args: Any, **kwargs: Any) -> Any:
        disk.pass_or_fail(name, kind, file)
        return function(file, *args, **kwargs)

    return call


def _checked_open(disk: Disk) -> Callable[..., int]:
    function = os.open

    def call(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        disk.pass_or_fail("open", WRITES if flags & _WRITING else READS, path)
        return function(path, flags, *args, **kwargs)

    return call


class _RawFile(io.FileIO):
    """A file that reads and writes as long as the disk does."""

    disk: Disk

    def write(self, data: Any) -> int:
        self.disk.pass_or_fail("write", WRITES, self.fileno())
        return super().write(data)

    def readinto(self, buffer: Any) -> int:
        self.disk.pass_or_fail("read", READS, self.fileno())
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self.disk.pass_or_fail("read", READS, self.fileno())
        return super().readall()


def _open(
    disk: Disk, path: Path, mode: str = "r", buffering: int = -1, encoding: str | None = None, *_: Any, **__: Any
) -> Any:
    """Open a file as `open` does, around a file that may fail."""
    raw_mode = mode.replace("b", "").replace("t", "")
    disk.pass_or_fail("open", READS if raw_mode == "r" else WRITES, path)
    raw = _RawFile(os.fspath(path), raw_mode)
    raw.disk = disk
    if buffering == 0:
        return raw
    buffered = {"r": io.BufferedReader}.get(raw_mode, io.BufferedRandom if "+" in raw_mode else io.BufferedWriter)(raw)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding=encoding or "utf-8")


def _checked_torch_save(disk: Disk) -> Callable[..., None]:
    save = torch.save

    def call(contents: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(file, (str, os.PathLike)):  # the file is checked itself
            save(contents, file, *args, **kwargs)
            return
        # This writer does not say why the operating system has refused.
        if disk.fails("open of torch.save", WRITES, file):
            raise RuntimeError(f"File {file} cannot be opened.")
        save(contents, file, *args, **kwargs)
        if disk.fails("write of torch.save", WRITES, file):
            os.truncate(file, Path(file).stat().st_size // 2)
            raise RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter: file write failed")
        if disk.fails("close of torch.save", WRITES, file):  # some versions do not notice that the end is missing
            os.truncate(file, Path(file).stat().st_size - 30)

    return call


def _checked_save_file(disk: Disk) -> Callable[..., None]:
    save_file = safetensors.torch.save_file

    def call(tensors: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if disk.fails("write of safetensors", WRITES, file):
            reason = f"I/O error: {os.strerror(disk.code)} (os error {disk.code})"
            raise safetensors.SafetensorError(f"Error while serializing: {reason}")
        save_file(tensors, file, *args, **kwargs)

    return call
