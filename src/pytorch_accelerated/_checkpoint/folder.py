"""A folder of training states: which there are, which is the newest, which may go, and whose it is."""

from __future__ import annotations

import errno
import os
import re
import socket
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from pytorch_accelerated._checkpoint.files import delete_folder, make_folder, repair_folder
from pytorch_accelerated._checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    NewerFormatError,
    SavedState,
    find_damage,
    read_manifest,
    verify_state,
)
from pytorch_accelerated.exceptions import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


_ROTATED = re.compile(r"(epoch|step)_\d+")


_OWN_NAME = re.compile(rf"{_ROTATED.pattern}|final")


_LEFT_BEHIND = re.compile(rf"\.({_OWN_NAME.pattern})\.(tmp|old)")


_LOCK = ".lock"


_held_locks: dict[Path, IO[str]] = {}


def list_states(folder: str | os.PathLike[str]) -> list[SavedState]:
    """Return the training states in a folder, the oldest first, those that cannot be used too.

    They are sorted by how far their run had come, later runs after earlier ones. What is wrong with one, as far as
    manifests and sizes of files tell, is its ``problem``.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    seen = (_look_at(path) for path in sorted(Path(folder).iterdir()))
    return sorted((state for state in seen if state is not None), key=lambda state: state.order)


def _look_at(path: Path) -> SavedState | None:
    is_own = _OWN_NAME.fullmatch(path.name) is not None
    try:
        if path.name.startswith(".") or not path.is_dir() or not (is_own or (path / MANIFEST).exists()):
            return None
        saved = read_manifest(path)
        return replace(saved, problem=find_damage(saved, compares_checksums=False))
    except NewerFormatError as error:
        return SavedState(path, format_version=FORMAT_VERSION + 1, problem=str(error))
    except CheckpointError as error:
        return SavedState(path, problem=str(error))
    except OSError as error:  # somebody else's folder, perhaps
        return SavedState(path, problem=f"{str(path)!r} cannot be read: {error}.") if is_own else None


def find_newest_state(
    folder: str | os.PathLike[str], report: Callable[[str], Any] = lambda message: None
) -> SavedState | None:
    """Return the newest training state in a folder that is whole; ``None`` if there is none.

    Args:
        folder: The folder.
        report: Called with a sentence about each state that is passed over.

    Raises:
        CheckpointError: A newer version of this library wrote one of them.
    """
    for state in reversed(list_states(folder)):
        try:
            return verify_state(state.path)
        except NewerFormatError:
            raise
        except (OSError, CheckpointError) as error:
            report(str(error))
    return None


class Lineage:
    """Numbers the states of a run, so that those of later runs in a folder come after those of earlier ones.

    A run that was resumed belongs to the generation of the state it goes on from; any other begins a new one. So does a
    run that was resumed from a state which is not the newest in the folder: what comes after it is given up.

    Args:
        origin: The state that the run was resumed from, if it was.
    """

    def __init__(self, origin: SavedState | None = None) -> None:
        self._origin = origin
        self._next: dict[Path, tuple[int, int]] = {}

    def take_number(self, folder: Path) -> tuple[int, int]:
        """Return the generation of the next state in a folder, and how many it has there already."""
        place = folder.resolve()
        generation, number = self._next.get(place) or self._first_in(folder)
        self._next[place] = (generation, number + 1)
        return generation, number

    def _first_in(self, folder: Path) -> tuple[int, int]:
        known = [state for state in list_states(folder) if state.position is not None]
        if not known:
            return (0 if self._origin is None else self._origin.generation), 0
        newest = known[-1]
        if self._origin is not None and newest.order <= self._origin.order:
            return self._origin.generation, newest.number + 1
        return newest.generation + 1, 0


@dataclass(frozen=True)
class Retention:
    """Which states of epochs and steps are kept in a folder.

    Args:
        num_newest: How many of the newest; ``None`` for all.
        num_best: How many of the best beside them.
        metric: What "best" means: a name in the run history.
        greater_is_better: Whether larger values are better.
    """

    num_newest: int | None = None
    num_best: int = 0
    metric: str = ""
    greater_is_better: bool = False

    def choose(self, states: Sequence[SavedState]) -> list[SavedState]:
        """Return the states that are kept, out of those that can be used, the oldest first."""
        if self.num_newest is None:
            return list(states)
        return [*states[-self.num_newest :], *self._best_of(states)]

    def _best_of(self, states: Sequence[SavedState]) -> list[SavedState]:
        first_with_value: dict[tuple[Any, ...], SavedState] = {}
        for state in states:
            value = state.metrics.get(self.metric)
            if isinstance(value, (int, float)) and state.position is not None:
                # Until the next evaluation, later states still carry the value of the first.
                key = (state.generation, state.position.num_epochs_completed, value)
                first_with_value.setdefault(key, state)
        by_value = sorted(first_with_value.items(), key=lambda item: item[0][-1], reverse=self.greater_is_better)
        return [state for _, state in by_value[: self.num_best]]


def rotate(folder: Path, retention: Retention, written: Sequence[Path] = ()) -> None:
    """Delete the states of epochs and steps that are not kept; what cannot be deleted is a warning.

    Args:
        folder: The folder.
        retention: What is kept.
        written: What this run has saved there, the oldest first. Of these, superseded ones go even if they can no
            longer be read; of others, what cannot be read is left to the user.
    """
    try:
        states = [state for state in list_states(folder) if _ROTATED.fullmatch(state.path.name)]
        kept = {state.path for state in retention.choose([state for state in states if state.problem is None])}
        unreadable = {state.path for state in states if state.position is None}
        own_unreadable = [path for path in written if path in unreadable]
        superseded = [state.path for state in states if state.path not in kept | unreadable]
        for path in [*superseded, *own_unreadable[: -(retention.num_newest or len(own_unreadable))]]:
            delete_folder(path)
    except OSError as error:
        warnings.warn(f"A training state that is no longer needed could not be deleted: {error}.", stacklevel=2)


def claim_folder(folder: Path) -> None:
    """Make a folder of training states ready for a run, which has it for itself until `release_folder`.

    What an earlier run left half done is repaired. Nothing is touched that does not have a name of ours.

    Raises:
        CheckpointError: The folder cannot be written to, or another run has it.
    """
    try:
        make_folder(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        _lock(folder)
        for path in sorted(folder.iterdir()):
            if match := _LEFT_BEHIND.fullmatch(path.name):
                repair_folder(folder / match[1])
    except OSError as error:
        release_folder(folder)
        raise CheckpointError(
            f"Training states cannot be saved in {str(folder)!r}: {error}. Give a `save_dir` that can be written to."
        ) from error


def release_folder(folder: Path) -> None:
    """Let other runs have the folder."""
    file = _held_locks.pop(folder.resolve(), None)
    if file is not None:
        file.close()


def _lock(folder: Path) -> None:
    """Take the lock of a folder, which the system gives back if the process dies, whatever it dies of."""
    place = folder.resolve()
    if place in _held_locks:
        return
    file = (folder / _LOCK).open("a+")
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise CheckpointError(
                f"Another run saves its training states in {str(folder)!r}: {owner or 'owner unknown'}. Two runs would "
                "delete each other's. Wait for it, end it, or give this run another `save_dir`."
            ) from error
        return  # a file system without locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held_locks[place] = file
