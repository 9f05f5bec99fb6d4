"""A folder of training states: which states it contains, which is the newest, which are kept, and which run owns it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pytorch_accelerated._checkpoint.files import check_can_replace, create_folder, delete_folder, repair_folder
from pytorch_accelerated._checkpoint.lock import lock, unlock
from pytorch_accelerated._checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    TRAINER_STATE,
    NewerFormatError,
    SavedState,
    find_damage,
    read_manifest,
    unreadable,
    verify_state,
)
from pytorch_accelerated._messages import warn
from pytorch_accelerated.exceptions import CheckpointError

_STATE_NAME = re.compile(r"(epoch|step)_\d+|final")
_LEFTOVER_NAME = re.compile(rf"\.({_STATE_NAME.pattern})\.(tmp|old)")
_LONGEST_PATH = f".epoch_{'0' * 12}.old/{TRAINER_STATE}"


# --- what is in it -----------------------------------------------------------------------------------------------


def list_states(folder: str | os.PathLike[str]) -> list[SavedState]:
    """Return the training states in a folder, oldest first, including unusable ones.

    They are sorted by how far their run had come; later runs come after earlier ones. If a state is unusable, its
    ``problem`` says why, judging by manifest and file sizes only.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    found = (_inspect(path) for path in sorted(Path(folder).iterdir()))
    return sorted((state for state in found if state is not None), key=lambda state: state.order)


def _inspect(path: Path) -> SavedState | None:
    """Return the training state at a path; ``None`` if there is something else."""
    is_state = _STATE_NAME.fullmatch(path.name) is not None
    try:
        if path.name.startswith(".") or not path.is_dir() or not (is_state or (path / MANIFEST).exists()):
            return None
        saved, is_state = read_manifest(path), True
        return replace(saved, problem=find_damage(saved, compare_checksums=False))
    except NewerFormatError as error:
        return SavedState(path, format_version=FORMAT_VERSION + 1, problem=str(error))
    except CheckpointError as error:
        return SavedState(path, problem=str(error))
    except OSError as error:  # without a state's name it may belong to someone else
        return SavedState(path, problem=unreadable(path, error)) if is_state else None


def find_newest_state(
    folder: str | os.PathLike[str], on_skip: Callable[[str], object] = lambda message: None
) -> SavedState | None:
    """Return the newest valid training state in a folder; ``None`` if there is none.

    Args:
        folder: The folder.
        on_skip: Called for each newer state that is skipped, with a sentence that says why.

    Raises:
        CheckpointError: A newer version of this library wrote one of the states.
    """
    states = list_states(folder)
    unplaced = [state for state in states if state.position is None and state.format_version <= FORMAT_VERSION]
    for state in unplaced:  # each of them may be the newest
        on_skip(str(state.problem))
    for state in reversed(states):
        if state in unplaced:
            continue
        try:
            return verify_state(state.path)
        except NewerFormatError:
            raise
        except (OSError, CheckpointError) as error:
            on_skip(str(error))
    return None


class Lineage:
    """Numbers the states of a run, so that those of later runs in a folder sort after those of earlier runs.

    A resumed run belongs to the generation of the state that it was resumed from; any other run starts a new one. A run
    that was resumed from a state other than the newest in the folder also starts a new one, because it abandons the
    states after that one.

    Args:
        origin: The state that the run was resumed from; ``None`` if it was not resumed.
    """

    def __init__(self, origin: SavedState | None = None) -> None:
        self.origin = origin
        self._next: dict[Path, tuple[int, int]] = {}

    def take_number(self, folder: Path) -> tuple[int, int]:
        """Return the generation of the next state in a folder, and its number within that generation, from 0."""
        resolved = folder.resolve()
        generation, number = self._next.get(resolved) or self._first_in(folder)
        self._next[resolved] = (generation, number + 1)
        return generation, number

    def _first_in(self, folder: Path) -> tuple[int, int]:
        known = [state for state in list_states(folder) if state.position is not None]
        if not known:
            return (0 if self.origin is None else self.origin.generation), 0
        newest = known[-1]
        if self.origin is not None and newest.order <= self.origin.order:
            return self.origin.generation, newest.number + 1
        return newest.generation + 1, 0


# --- what is kept ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retention:
    """Which states are kept in a folder.

    Args:
        num_newest: Number of newest states to keep; ``None`` for all.
        num_best: Number of best states to keep in addition.
        metric: The metric that decides which are best: a name in the run history.
        greater_is_better: Whether larger values are better.
    """

    num_newest: int | None = None
    num_best: int = 0
    metric: str = ""
    greater_is_better: bool = False

    def choose(self, states: Sequence[SavedState]) -> list[SavedState]:
        """Return the states to keep.

        Args:
            states: The valid states, oldest first.
        """
        if self.num_newest is None:
            return list(states)
        return [*states[-self.num_newest :], *self._best_of(states)]

    def _best_of(self, states: Sequence[SavedState]) -> list[SavedState]:
        first_with_value: dict[tuple[int, int, float], SavedState] = {}
        for state in states:
            value = state.metrics.get(self.metric)
            if isinstance(value, (int, float)) and state.position is not None:
                # Until the next evaluation, later states carry the same value. The first one was evaluated.
                key = (state.generation, state.position.num_epochs_completed, value)
                first_with_value.setdefault(key, state)
        by_value = sorted(first_with_value.items(), key=lambda item: item[0][-1], reverse=self.greater_is_better)
        return [state for _, state in by_value[: self.num_best]]


def rotate(folder: Path, retention: Retention, written: Sequence[Path] = ()) -> list[Path]:
    """Delete the states that are not kept, and return their paths. If that fails, warn.

    Args:
        folder: The folder.
        retention: What is kept.
        written: The states that this run has saved there, oldest first. Of these, superseded ones are deleted even if
            they cannot be read. Unreadable states of other runs are left to the user.
    """
    deleted: list[Path] = []
    try:
        states = [state for state in list_states(folder) if _STATE_NAME.fullmatch(state.path.name)]
        kept = {state.path for state in retention.choose([state for state in states if state.problem is None])}
        unreadable = {state.path for state in states if state.position is None}
        written_unreadable = [path for path in written if path in unreadable]
        superseded = [state.path for state in states if state.path not in kept | unreadable]
        num_newest = retention.num_newest or len(written_unreadable)
        for path in [*superseded, *written_unreadable[:-num_newest]]:
            delete_folder(path)
            deleted.append(path)
    except FileNotFoundError:
        pass  # there is no folder, because a stand-in for the trainer has written nothing
    except OSError as error:
        warn(
            f"A training state that is no longer needed could not be deleted in {str(folder)!r}: {error}. The run "
            "continues; delete the state yourself if you need the space.",
        )
    return deleted


# --- who owns it -------------------------------------------------------------------------------------------------


def claim_folder(folder: Path, owner: object) -> None:
    """Prepare a folder of training states for a run, and lock it for that run until it is unlocked.

    What an earlier run left incomplete is repaired. Only names that this library uses are touched.

    Args:
        folder: The folder. It is created if there is none.
        owner: The trainer.

    Raises:
        CheckpointError: The folder cannot be written to, or another run has locked it.
    """
    try:
        create_folder(folder)
        if not folder.exists():  # a program has replaced `os.makedirs`: a test that writes no files
            return
        with suppress(FileNotFoundError):
            os.lstat(folder / _LONGEST_PATH)  # raises if the path of a file would be too long
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        lock(folder, owner)
        for path in sorted(folder.iterdir()):
            if match := _LEFTOVER_NAME.fullmatch(path.name):
                repair_folder(folder / match[1])
        for path in sorted(folder.iterdir()):
            if _STATE_NAME.fullmatch(path.name):
                check_can_replace(path)
    except OSError as error:
        unlock(folder, owner)
        raise CheckpointError(
            f"Training states cannot be saved in {str(folder)!r}: {error}. Pass a `save_dir` that is writable."
        ) from error
