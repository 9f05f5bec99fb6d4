"""The file of the best model: is it still the one that this run saved, at the epoch that it tells?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytorch_accelerated._checkpoint.checksum import carried_checksum
from pytorch_accelerated._checkpoint.files import crc32_of, load_file, temporary_path
from pytorch_accelerated._checkpoint.safetensors_file import is_safetensors_path, load_safetensors
from pytorch_accelerated._distributed.collectives import run_on_main
from pytorch_accelerated._messages import warn

if TYPE_CHECKING:
    from pytorch_accelerated._types import StateDict, StateMapping


@dataclass
class BestModelFile:
    """Knows which file a run has saved, and tells it from one that another run, or a later epoch, has put in its place.

    A run that is resumed from an earlier state finds the file of the run that it departs from. That file is kept when
    it is first replaced, until the run itself comes to the same one: it has then only repeated what was done before.

    On several processes, the file that the main process sees counts. All methods must be called on every process.

    Attributes:
        identity: What tells the file that the run saved from others; ``None`` if it saved none, or an earlier version
            of the library saved the state that the run was resumed from.
    """

    identity: str | None = None
    _found: str | None = None
    _kept: str | None = None

    def state_dict(self) -> StateDict:
        """Return the identities of the file that the run saved, and of the one that is kept."""
        return {"saved_file": self.identity, "kept_file": self._kept}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned, which states of earlier versions lack."""
        self.identity, self._kept = state_dict.get("saved_file"), state_dict.get("kept_file")

    def start_run(self, path: Path, entries: Mapping[str, object] | None, is_main: bool, num_processes: int) -> bool:
        """Look at the file when a run is resumed, and return whether it is the one that the run saved.

        Args:
            path: The file.
            entries: What the file that the run saved says about itself; ``None`` if the run had saved none.
            is_main: Whether this is the main process.
            num_processes: The world size.
        """
        self._found = run_on_main(lambda: _identity_of(path), is_main, num_processes)
        if entries is not None and self.is_own(path, entries, is_main, num_processes):
            self._found = None
            return True
        return entries is None

    def forget(self) -> None:
        """Forget the files of earlier runs: the run starts from scratch, and replaces whatever is there."""
        self.identity = self._found = self._kept = None

    def is_own(self, path: Path, entries: Mapping[str, object], is_main: bool, num_processes: int) -> bool:
        """Return whether a file is the one that the run saved, as far as that can be known.

        Args:
            path: The file.
            entries: What the file that the run saved says about itself; it decides if its identity is not known.
            is_main: Whether this is the main process.
            num_processes: The world size.
        """

        def compare() -> bool:
            if self.identity is not None:
                return _identity_of(path) in (self.identity, None)  # if there is no file, the reader says so
            found = describe(path, entries)
            return all(found.get(name, value) == value for name, value in entries.items())

        return run_on_main(compare, is_main, num_processes)

    def replace(self, path: Path, save: Callable[[], None], is_main: bool, num_processes: int) -> Path | None:
        """Save the file, and return where the one that a resumed run had found there is kept; ``None`` if it is not.

        Args:
            path: The file.
            save: Writes it.
            is_main: Whether this is the main process.
            num_processes: The world size.
        """
        found, self._found = self._found, None
        if found is not None:
            run_on_main(lambda: _set_aside(path), is_main, num_processes)
        save()
        self.identity = run_on_main(lambda: _identity_of(path), is_main, num_processes)
        if self.identity in (found, self._kept):  # the run has come to the same model
            run_on_main(lambda: self._discard_same(path, found), is_main, num_processes)
            self._kept = None if self.identity == self._kept else self._kept
        if found in (None, self.identity):
            return None
        kept = run_on_main(lambda: _keep(path), is_main, num_processes)
        self._kept = None if kept is None else found
        return kept

    def _discard_same(self, path: Path, found: str | None) -> None:
        kept = place_to_keep(path)
        with suppress(OSError):
            if self.identity == found:
                temporary_path(kept).unlink(missing_ok=True)
            if self.identity == self._kept == _identity_of(kept):
                kept.unlink()


def describe(path: Path, names: Mapping[str, object]) -> dict[str, object]:
    """Return those of some entries that a checkpoint has; none if it cannot be read. Its tensors are not read."""
    with suppress(Exception):  # a file from anywhere
        entries = load_safetensors(path) if is_safetensors_path(path) else load_file(path, is_mapped=True)
        return {name: entries[name] for name in names if name in entries}
    return {}


def _identity_of(path: Path) -> str | None:
    """Return a checksum that tells a file from others; ``None`` if there is no such file."""
    try:
        return carried_checksum(path) or crc32_of(path)
    except OSError:
        return None


def place_to_keep(path: Path) -> Path:
    """Return where a file is kept that is replaced: next to it."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _set_aside(path: Path) -> None:
    """Give a file a second name, so that it outlives its replacement."""
    aside = temporary_path(place_to_keep(path))
    try:
        aside.unlink(missing_ok=True)
        try:
            os.link(path, aside)
        except OSError:  # the file system has no links
            shutil.copy2(path, aside)
    except OSError as error:
        _warn_about_loss(path, error)


def _keep(path: Path) -> Path | None:
    """Keep the file that was set aside, and return where it is."""
    kept = place_to_keep(path)
    aside = temporary_path(kept)
    try:
        aside.replace(kept)
    except FileNotFoundError:  # which has been told, unless nothing was there
        return None
    except OSError as error:
        _warn_about_loss(path, error)
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        return None
    return kept


def _warn_about_loss(path: Path, error: OSError) -> None:
    warn(f"The file {str(path)!r} is replaced, and the model in it could not be kept: {error}.")
