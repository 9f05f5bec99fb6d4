"""The lock of a folder of training states: one run at a time saves states there."""

from __future__ import annotations

import errno
import gc
import os
import socket
import stat
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pytorch_accelerated._messages import warn
from pytorch_accelerated.exceptions import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""The name of the lock file in a folder."""

_IS_LOCKED = (errno.EACCES, errno.EAGAIN)
_MAX_HOLDER_LENGTH = 200  # bytes
# A pipe in the place of the file does not block, and a link is not followed.
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


@dataclass(frozen=True)
class _Lock:
    """A lock that this process holds: the open file, and whose it is."""

    descriptor: int
    owner: Callable[[], object | None]


_held: dict[Path, _Lock] = {}
"""The locks that this process holds, by folder."""

_access = threading.Lock()


def lock(folder: Path, owner: object) -> None:
    """Lock a folder for a trainer. Locking it again for the same one changes nothing.

    The operating system releases the lock when the process ends, whatever the cause. Other files that the process opens
    or closes do not affect it, and processes that it starts do not hold it.

    Args:
        folder: The folder, which exists.
        owner: The trainer. If it is deleted without having unlocked the folder, others of this process may lock it.

    Raises:
        CheckpointError: Another trainer, of this process or another, has locked it.
        OSError: The lock file cannot be opened.
    """
    resolved = folder.resolve()
    with _access:
        current = _held.get(resolved)
        if current is not None and current.owner() is owner:
            return
        if current is not None:
            gc.collect()  # the holder may be a trainer that only it refers to
        if current is not None and current.owner() is not None:
            raise CheckpointError(_refusal(folder, "another trainer of this process"))
        if current is not None:
            os.close(_held.pop(resolved).descriptor)
        descriptor = _open_locked(folder)
        if descriptor is not None:
            _held[resolved] = _Lock(descriptor, _reference_to(owner))


def keep_locked(folder: Path) -> None:
    """Lock a folder again that this process had locked, if somebody has deleted the lock file or the folder since.

    Raises:
        CheckpointError: Another run has locked the folder meanwhile.
        OSError: The lock file cannot be opened.
    """
    resolved = folder.resolve()
    with _access:
        current = _held.get(resolved)
        if current is None or _is_still_there(folder / LOCK, current.descriptor):
            return
        descriptor = _open_locked(folder)
        os.close(_held.pop(resolved).descriptor)
        if descriptor is not None:
            _held[resolved] = _Lock(descriptor, current.owner)


def unlock(folder: Path, owner: object) -> None:
    """Unlock a folder for other runs, if this trainer has locked it."""
    resolved = folder.resolve()
    with _access:
        if resolved in _held and _held[resolved].owner() is owner:
            os.close(_held.pop(resolved).descriptor)


def _reference_to(owner: object) -> Callable[[], object | None]:
    try:
        return weakref.ref(owner)
    except TypeError:
        return lambda: owner


def _open_locked(folder: Path) -> int | None:
    """Open and lock the lock file of a folder; ``None`` if the file system has no locks."""
    path = folder / LOCK
    while True:
        descriptor = _open_file(path)
        with _closed_unless_kept(descriptor) as keep:
            try:
                is_ours = _try_to_lock(descriptor)
            except OSError as error:
                warn(
                    f"Files in {str(folder)!r} cannot be locked ({error}). Make sure that only one run saves its "
                    "training states there: two would delete each other's.",
                )
                return None
            if not is_ours:
                raise CheckpointError(_refusal(folder, _read_holder(descriptor)))
            if _is_still_there(path, descriptor):  # or another run may have deleted it, and locked a new one
                _write_holder(descriptor)
                return keep()


def _open_file(path: Path) -> int:
    """Open the lock file, and nothing else that somebody has put in its place."""
    try:
        descriptor = os.open(path, _FLAGS, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "the lock file is a link; delete it", str(path)) from error
        raise
    with _closed_unless_kept(descriptor) as keep:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
            return keep()
    reason = "the lock file is no file of its own, but a link, pipe or device; delete it"
    raise OSError(errno.EINVAL, reason, str(path))


@contextmanager
def _closed_unless_kept(descriptor: int) -> Iterator[Callable[[], int]]:
    """Close a file at the end, whatever happens, unless what is yielded is called. It returns the file."""
    with ExitStack() as closing:
        closing.callback(os.close, descriptor)

        def keep() -> int:
            closing.pop_all()
            return descriptor

        yield keep


def _try_to_lock(descriptor: int) -> bool:
    """Return whether the file could be locked.

    `flock` locks belong to the open file. `lockf` locks belong to the process, which loses them as soon as anything in
    it closes the file.

    Raises:
        OSError: The file system, or the operating system, has no such locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _IS_LOCKED:
            return False
        raise
    return True


def _is_still_there(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    return False


def _write_holder(descriptor: int) -> None:
    with suppress(OSError):  # it only informs
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _read_holder(descriptor: int) -> str:
    with suppress(OSError):
        text = os.pread(descriptor, _MAX_HOLDER_LENGTH, 0).decode(errors="replace").strip()
        if text:
            return ascii(text)[1:-1]
    return "owner unknown"


def _refusal(folder: Path, holder: str) -> str:
    return (
        f"Another run is saving its training states in {str(folder)!r}: {holder}. Two runs in one folder would delete "
        "each other's states. Wait for that run, stop it, or pass another `save_dir`."
    )


def _forget_locks() -> None:
    """Close the files in a forked process: it would hold the locks of a parent that it outlives."""
    global _access  # a thread of the parent may hold it
    _access = threading.Lock()
    while _held:
        os.close(_held.popitem()[1].descriptor)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)
