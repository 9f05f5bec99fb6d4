"""What is in the directory of a training state, and whether it is all there, as its manifest tells."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pytorch_accelerated._checkpoint.files import crc32_of, flush_to_disk, load_file, sha256_of
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.progress import TrainingProgress
from pytorch_accelerated.tracking import as_number

FORMAT_VERSION = 2


MANIFEST = "manifest.json"


TRAINER_STATE = "trainer_state.pt"


_LONGEST_TEXT = 80


_PHASES = ("training", "evaluation", "end")


_READ_BY_ACCELERATE = re.compile(
    r"(model|pytorch_model|optimizer|scheduler|sampler|scaler|dl_state_dict|random_states|custom_checkpoint)(_\d+)?"
    r"\.(safetensors|bin|pt|pkl)"
)


class NewerFormatError(CheckpointError):
    """A training state was written by a newer version of the library, so that this one cannot know what it means."""


@dataclass(frozen=True)
class SavedState:
    """A training state on disk, as its manifest describes it.

    Args:
        path: Its directory.
        position: Where a run goes on from it; ``None`` if the manifest cannot be read.
        metrics: The newest value of each metric; as text if it is no finite number.
        settings: What the run was started with, as far as a resumed run ought to have the same.
        versions: Of the packages that wrote it.
        num_processes: How many processes wrote it.
        generation: Which of the runs in its folder wrote it, from 0; a resumed run is the same run.
        number: How many states that run had saved in the folder before.
        files: Size in bytes and checksum of every file, by its path in the directory.
        format_version: Of the manifest and the files.
        problem: Why it cannot be used, as far as that is known; ``None`` if it can.
    """

    path: Path
    position: TrainingProgress | None = None
    metrics: dict[str, float | str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    num_processes: int = 1
    generation: int = 0
    number: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    problem: str | None = None

    @property
    def size(self) -> int:
        """Bytes in its files, without the manifest."""
        return sum(facts["size"] for facts in self.files.values())

    @property
    def order(self) -> tuple[float, ...]:
        """What states are sorted by: the newest has the greatest, and no clock has a say in it."""
        if self.position is None:
            return (math.inf,) if self.format_version > FORMAT_VERSION else (-1,)
        at = self.position
        within_epoch = (at.num_batches_in_epoch, _PHASES.index(at.phase), at.num_evaluations_in_epoch)
        return (self.generation, at.num_epochs_completed, *within_epoch, at.num_updates, self.number)


def process_file(process_index: int) -> str:
    """Return the name of the file with what a process has for itself."""
    return f"process_{process_index}.pt"


def installed_versions() -> dict[str, str | None]:
    """Return the versions of what a run's results depend on; ``None`` for what is not installed as a package."""
    packages = {name: _version_of(name) for name in ("pytorch-accelerated", "torch", "accelerate")}
    return {**packages, "python": platform.python_version()}


@cache  # to look it up takes a millisecond, and what is loaded stays
def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def as_json_number(value: Any) -> float | str:
    """Return a finite number as it is, anything else as a short text."""
    try:
        number = as_number(value)
    except ValueError:
        return str(value)[:_LONGEST_TEXT]
    return number if math.isfinite(number) else str(number)


def file_metadata(path: Path) -> dict[str, Any]:
    """Return the size and the checksum of a file for the manifest."""
    return {"size": path.stat().st_size, "crc32": crc32_of(path)}


def write_manifest(directory: Path, facts: Mapping[str, Any], flushed: Mapping[str, Any] | None = None) -> None:
    """Complete a directory by a list of its files, all readable for whom the umask says, and flush it to disk.

    Args:
        directory: Where they are.
        facts: What the manifest tells beside them.
        flushed: What `file_metadata` returned for those that are on the disk already.
    """
    paths = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    flushed = flushed or {}
    files = {name: flushed.get(name) or file_metadata(path) for name, path in sorted(paths.items())}
    manifest = {
        "format_version": FORMAT_VERSION,
        "versions": installed_versions(),
        **facts,
        "size": sum(file["size"] for file in files.values()),
        "files": files,
    }
    path = directory / MANIFEST
    path.write_text(_seal(manifest), encoding="utf-8")
    mode = path.stat().st_mode
    for other in paths.values():
        if other.stat().st_mode != mode:  # safetensors lets nobody but the owner read its files
            other.chmod(mode)
    others = [other for name, other in paths.items() if name not in flushed]
    folders = [folder for folder in directory.rglob("*") if folder.is_dir()]
    for written in (*others, path, *folders, directory):
        flush_to_disk(written)


def _seal(manifest: Mapping[str, Any]) -> str:
    """Write a manifest out, with a checksum of its own."""
    checksum = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "checksum": checksum}, indent=1, allow_nan=False)


def read_manifest(directory: Path) -> SavedState:
    """Return what the manifest of a training state says; its files are not looked at.

    Raises:
        FileNotFoundError: There is no such directory.
        CheckpointError: There is no readable manifest, or a newer version of this library wrote it.
    """
    if not directory.is_dir():
        raise FileNotFoundError(
            f"There is no training state {str(directory)!r}. Expected a directory that `save_training_state` wrote."
        )
    try:
        text = (directory / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        format_version = int(manifest["format_version"])
        if format_version <= FORMAT_VERSION:
            return _READERS[format_version](directory, manifest, text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{str(directory)!r} is no complete training state: it has no readable {MANIFEST}. Use an older one."
        ) from error
    raise NewerFormatError(
        f"The training state {str(directory)!r} was written by a newer version of this library: it has the format "
        f"{format_version}, and this version reads those up to {FORMAT_VERSION}. Update pytorch-accelerated."
    )


def _read_format_2(directory: Path, manifest: dict[str, Any], text: str) -> SavedState:
    del manifest["checksum"]
    if _seal(manifest) != text:
        raise ValueError("it was altered")
    return SavedState(
        path=directory,
        position=_position_from(manifest["position"]),
        metrics=dict(manifest["metrics"]),
        settings=dict(manifest["settings"]),
        versions=dict(manifest["versions"]),
        num_processes=int(manifest["num_processes"]),
        generation=int(manifest["generation"]),
        number=int(manifest["number"]),
        files=_files_in(manifest, "crc32"),
    )


def _read_format_1(directory: Path, manifest: dict[str, Any], _: str) -> SavedState:
    """Read what the first format had in its files only."""
    position, metrics, problem = None, {}, None
    try:
        state = load_file(directory / TRAINER_STATE)["trainer"]
        position = _position_from(state["progress"])
        history = state.get("run_history", {}).get("metrics", {})
        metrics = {name: as_json_number(values[-1]) for name, values in history.items() if values}
    except (CheckpointError, FileNotFoundError, KeyError, TypeError, ValueError, AttributeError):
        problem = f"{TRAINER_STATE} is missing or altered"
    return SavedState(
        path=directory,
        position=position,
        metrics=metrics,
        versions=dict(manifest["versions"]),
        num_processes=int(manifest["num_processes"]),
        files=_files_in(manifest, "sha256"),
        format_version=1,
        problem=problem,
    )


_READERS = {1: _read_format_1, 2: _read_format_2}


def _position_from(facts: Mapping[str, Any]) -> TrainingProgress:
    position = TrainingProgress(**facts)
    if position.phase not in _PHASES:
        raise ValueError(f"there is no phase {position.phase!r}")
    return position


def _files_in(manifest: Mapping[str, Any], checksum: str) -> dict[str, dict[str, Any]]:
    listed = manifest["files"].items()
    files = {str(name): {"size": int(facts["size"]), checksum: str(facts[checksum])} for name, facts in listed}
    outside = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise ValueError(f"{outside} are not in the directory")
    return files


def verify_state(directory: Path) -> SavedState:
    """Compare a training state with its manifest, checksum by checksum.

    Returns:
        What the manifest says.

    Raises:
        FileNotFoundError: There is no such directory.
        CheckpointError: A file is missing, altered or unexpected, or there is no readable manifest.
    """
    saved = read_manifest(directory)
    problem = find_damage(saved)
    if problem is not None:
        raise CheckpointError(f"The training state {str(directory)!r} is damaged: {problem}. Use an older one.")
    return saved


def find_damage(saved: SavedState, compares_checksums: bool = True) -> str | None:
    """Return what is wrong with the files of a training state; ``None`` if nothing is.

    Args:
        saved: The state.
        compares_checksums: Whether the files are read, or only their sizes looked at.
    """
    names = dict.fromkeys((TRAINER_STATE, *map(process_file, range(saved.num_processes)), *saved.files))
    damaged = next((name for name in names if not _has_size(saved, name)), None)
    if damaged is None and compares_checksums:
        with ThreadPoolExecutor() as readers:
            are_intact = readers.map(partial(_has_checksum, saved), names)
            damaged = next((name for name, is_intact in zip(names, are_intact, strict=True) if not is_intact), None)
    if damaged is not None:
        return f"{damaged} is missing or altered"
    # A file that is not listed cannot be vouched for. Users may put files of their own beside ours.
    unlisted = [path.name for path in saved.path.iterdir() if path.name not in saved.files]
    unexpected = [name for name in sorted(unlisted) if _READ_BY_ACCELERATE.fullmatch(name)]
    return f"{unexpected[0]} does not belong to it" if unexpected else saved.problem


def _has_size(saved: SavedState, name: str) -> bool:
    path = saved.path / name
    try:
        return name in saved.files and path.is_file() and path.stat().st_size == saved.files[name]["size"]
    except OSError:  # not readable
        return False


def _has_checksum(saved: SavedState, name: str) -> bool:
    path, facts = saved.path / name, saved.files[name]
    try:
        return crc32_of(path) == str(facts["crc32"]) if "crc32" in facts else sha256_of(path) == str(facts["sha256"])
    except OSError:  # not readable
        return False
