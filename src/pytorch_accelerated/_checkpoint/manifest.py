"""The manifest of a training state: what the directory contains, and whether all of it is intact."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import reprlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Literal, TypedDict

from pytorch_accelerated._checkpoint.files import crc32_of, flush_to_disk, load_file, sha256_of
from pytorch_accelerated._checkpoint.plausible import is_hollow
from pytorch_accelerated._types import JsonObject, MetricValue, RunSettings, StateMapping
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.progress import TrainingProgress
from pytorch_accelerated.tracking import as_number

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.pt"

_METADATA_OF_0_1_61 = "trainer_metadata.pt"
_MAX_TEXT_LENGTH = 80
_MAX_SIZE = 1 << 24  # bytes of a manifest
_MAX_COUNT = 2**63 - 1
_PHASES = ("training", "evaluation", "end")

_READ_BY_ACCELERATE = re.compile(
    r"(model|pytorch_model|optimizer|scheduler|sampler|scaler|dl_state_dict|random_states|custom_checkpoint)(_\d+)?"
    r"\.(safetensors|bin|pt|pkl)"
)
"""Names of files that `Accelerator.load_state` looks for."""


class NewerFormatError(CheckpointError):
    """A training state was written by a newer version of the library, so this version cannot interpret it."""


class _FileSize(TypedDict):
    size: int


class FileMetadata(_FileSize, total=False):
    """The entry of a file in the manifest: its size in bytes, and the checksum that its format uses."""

    crc32: str
    sha256: str


@dataclass(frozen=True)
class SavedState:
    """A training state on disk, as described by its manifest.

    Args:
        path: Its directory.
        position: Where a run resumes from it; ``None`` if the manifest cannot be read.
        metrics: The latest value of each metric; as text if it is not a finite number.
        settings: The settings of the run that a resumed run should share.
        versions: The versions of the packages that wrote it.
        num_processes: The number of processes that wrote it.
        generation: Which of the runs in its folder wrote it, from 0; a resumed run counts as the same run.
        number: How many states that run had saved in the folder before.
        files: Size in bytes and checksum of every file, by its path in the directory.
        format_version: The format of the manifest and the files.
        problem: Why the state is unusable, if that is known; ``None`` if it is usable.
    """

    path: Path
    position: TrainingProgress | None = None
    metrics: dict[str, float | str] = field(default_factory=dict)
    settings: RunSettings = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    num_processes: int = 1
    generation: int = 0
    number: int = 0
    files: dict[str, FileMetadata] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    problem: str | None = None

    @property
    def size(self) -> int:
        """Total bytes of its files, without the manifest."""
        return sum(file["size"] for file in self.files.values())

    @property
    def order(self) -> tuple[float, ...]:
        """The sort key of states: the newest has the greatest. It does not depend on any clock."""
        if self.position is None:
            return (math.inf,) if self.format_version > FORMAT_VERSION else (-1,)
        at = self.position
        within_epoch = (at.num_batches_in_epoch, _PHASES.index(at.phase), at.num_evaluations_in_epoch)
        return (self.generation, at.num_epochs_completed, *within_epoch, at.num_updates, self.number)


def name_state(path: Path) -> str:
    """Return how error messages refer to a training state."""
    return f"The training state {str(path)!r}"


def unreadable(path: Path, error: OSError) -> str:
    """Say that a training state cannot be read at the moment."""
    return f"{name_state(path)} cannot be read: {error}."


def process_file(process_index: int) -> str:
    """Return the name of the file with the local part of one process."""
    return f"process_{process_index}.pt"


def installed_versions() -> dict[str, str | None]:
    """Return the versions that the results of a run depend on; ``None`` for what is not installed as a package."""
    packages = {name: _version_of(name) for name in ("pytorch-accelerated", "torch", "accelerate")}
    return {**packages, "python": platform.python_version()}


@cache  # a look-up takes a millisecond, and the version of a loaded package does not change
def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def as_json_scalar(value: MetricValue) -> float | str:
    """Return a finite number as it is, anything else as a short text."""
    try:
        number = as_number(value)
    except ValueError:
        return str(value)[:_MAX_TEXT_LENGTH]
    return number if math.isfinite(number) else str(number)


# --- writing -----------------------------------------------------------------------------------------------------


def file_metadata(path: Path) -> FileMetadata:
    """Return the size and the checksum of a file for the manifest."""
    return {"size": path.stat().st_size, "crc32": crc32_of(path)}


def write_manifest(
    directory: Path, metadata: Mapping[str, object], checksums: Mapping[str, FileMetadata] | None = None
) -> None:
    """Complete a directory: list its files in a manifest, apply the umask to all of them, and flush them to disk.

    Args:
        directory: The directory.
        metadata: The other entries of the manifest.
        checksums: What `file_metadata` returned, by name, for the files that have been flushed already.
    """
    paths = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    checksums = checksums or {}
    files = {name: checksums.get(name) or file_metadata(path) for name, path in sorted(paths.items())}
    manifest = {
        "format_version": FORMAT_VERSION,
        "versions": installed_versions(),
        **metadata,
        "size": sum(file["size"] for file in files.values()),
        "files": files,
    }
    path, text = directory / MANIFEST, _serialize(manifest)
    if len(text) > _MAX_SIZE:
        raise ValueError(f"The {MANIFEST} of a state would have {len(text)} bytes, and may have {_MAX_SIZE}")
    path.write_text(text, encoding="utf-8")
    mode = path.stat().st_mode
    for other in paths.values():
        if other.stat().st_mode != mode:  # safetensors makes its files readable by their owner only
            other.chmod(mode)
    not_flushed = [other for name, other in paths.items() if name not in checksums]
    folders = [folder for folder in directory.rglob("*") if folder.is_dir()]
    for written in (*not_flushed, path, *folders, directory):
        flush_to_disk(written)


def _serialize(manifest: Mapping[str, object]) -> str:
    """Return a manifest as text, with a checksum of itself."""
    checksum = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "checksum": checksum}, indent=1, allow_nan=False)


# --- reading -----------------------------------------------------------------------------------------------------


def read_manifest(directory: Path) -> SavedState:
    """Return the contents of a training state's manifest; the other files are not read.

    Raises:
        FileNotFoundError: There is no such directory.
        CheckpointError: There is no readable manifest, or a newer version of this library wrote it.
    """
    if directory.is_file():
        raise FileNotFoundError(
            f"{str(directory)!r} is a file. Expected a training state, a directory written by `save_training_state`. "
            "If it is a checkpoint, load it with `load_checkpoint` before the run."
        )
    if not directory.is_dir():
        raise FileNotFoundError(
            f"There is no training state {str(directory)!r}. Expected a directory written by `save_training_state`. "
            "Check the path."
        )
    try:
        text = _read_text(directory / MANIFEST)
        manifest = _parse_json(text)
        format_version = _count(manifest["format_version"])
        if format_version <= FORMAT_VERSION:
            return _READERS[format_version](directory, manifest, text)
        _check_unaltered(manifest, text)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if (directory / _METADATA_OF_0_1_61).exists() and not (directory / MANIFEST).exists():
            raise CheckpointError(_advice_for_0_1_61(directory)) from error
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{str(directory)!r} is not a complete training state: it has no readable {MANIFEST} ({reason}). Use an "
            "older state."
        ) from error
    raise NewerFormatError(
        f"{name_state(directory)} was written by a newer version of this library: it has format {format_version}, and "
        f"this version reads formats up to {FORMAT_VERSION}. Upgrade pytorch-accelerated."
    )


def _advice_for_0_1_61(directory: Path) -> str:
    message = (
        f"{str(directory)!r} comes from version 0.1.61 of this library, which did not save all that a run depends on, "
        "so no run can be resumed from it."
    )
    weights = directory / "model.safetensors"
    if weights.exists():
        message += (
            " Its model can be loaded, to start a new run from it: "
            f"`safetensors.torch.load_model(model, {str(weights)!r})`."
        )
    return message


def _read_text(path: Path) -> str:
    """Return the text of a manifest; not that of a pipe, which would never end, or of a file that is none."""
    if not path.is_file():
        raise ValueError("it is no file" if path.exists() else "it is missing")
    if path.stat().st_size > _MAX_SIZE:
        raise ValueError(f"it has more than {_MAX_SIZE} bytes")
    return path.read_text(encoding="utf-8")


def _parse_json(text: str) -> JsonObject:
    def refuse(constant: str) -> None:
        raise ValueError(f"it contains {constant}")

    return _mapping(json.loads(text, parse_constant=refuse))


def _check_unaltered(manifest: JsonObject, text: str) -> None:
    """Compare a manifest with the checksum that every format since the second has in it, and will have."""
    entries = {name: value for name, value in manifest.items() if name != "checksum"}
    if _serialize(entries) != text:
        raise ValueError("it was altered")


def _read_format_2(directory: Path, manifest: JsonObject, text: str) -> SavedState:
    _check_unaltered(manifest, text)
    return SavedState(
        path=directory,
        position=_parse_position(_mapping(manifest["position"])),
        metrics={_text(name): _metric(value) for name, value in _mapping(manifest["metrics"]).items()},
        settings=_mapping(manifest["settings"]),
        versions=_parse_versions(manifest),
        generation=_count(manifest["generation"]),
        number=_count(manifest["number"]),
        **_parse_files(manifest, "crc32"),
    )


def _read_format_1(directory: Path, manifest: JsonObject, _: str) -> SavedState:
    """Read the first format, which has position and metrics only in its files."""
    position, metrics, problem = None, {}, None
    try:
        state = load_file(directory / TRAINER_STATE)["trainer"]
        position = _parse_position(state["progress"])
        history = state.get("run_history", {}).get("metrics", {})
        metrics = {name: as_json_scalar(values[-1]) for name, values in history.items() if values}
    except (CheckpointError, FileNotFoundError, KeyError, TypeError, ValueError, AttributeError):
        problem = f"{TRAINER_STATE} is missing or altered"
    return SavedState(
        path=directory,
        position=position,
        metrics=metrics,
        versions=_parse_versions(manifest),
        format_version=1,
        problem=problem,
        **_parse_files(manifest, "sha256"),
    )


_READERS = {1: _read_format_1, 2: _read_format_2}


class _Files(TypedDict):
    files: dict[str, FileMetadata]
    num_processes: int


def _parse_files(manifest: JsonObject, checksum: Literal["crc32", "sha256"]) -> _Files:
    """Return the files of a state, and the number of its processes, each of which has written one."""
    files: dict[str, FileMetadata] = {}
    for name, entries in _mapping(manifest["files"]).items():
        metadata: FileMetadata = {"size": _count(entries["size"])}
        metadata[checksum] = _text(entries[checksum])
        files[_name_of_file(name)] = metadata
    num_processes = _count(manifest["num_processes"])
    if not 1 <= num_processes <= max(1, len(files)):
        raise ValueError(f"there are no {num_processes} processes that have written {len(files)} files")
    return {"files": files, "num_processes": num_processes}


def _parse_position(entries: StateMapping) -> TrainingProgress:
    counts = {name: _count(value) for name, value in entries.items() if name != "phase"}
    position = TrainingProgress(**counts, phase=entries["phase"])
    if position.phase not in _PHASES:
        raise ValueError(f"there is no phase {position.phase!r}")
    return position


def _parse_versions(manifest: JsonObject) -> dict[str, str | None]:
    return {
        _text(name): None if version is None else _text(version)
        for name, version in _mapping(manifest["versions"]).items()
    }


def _name_of_file(name: str) -> str:
    path = PurePosixPath(name)
    if not name or "\0" in name or path.is_absolute() or ".." in path.parts or Path(name).is_absolute():
        raise ValueError(f"{name!r} is not in the directory")
    return name


def _metric(value: object) -> float | str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not the value of a metric")
    return value


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_COUNT:
        raise ValueError(f"{reprlib.repr(value)} is not a count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{reprlib.repr(value)} is not a text")  # noqa: TRY004 - the file is wrong, not the program
    return value


def _mapping(value: object) -> JsonObject:
    if not isinstance(value, dict):
        raise ValueError(f"{reprlib.repr(value)} is not a mapping")  # noqa: TRY004
    return value


# --- verifying ---------------------------------------------------------------------------------------------------


def verify_state(directory: Path) -> SavedState:
    """Compare all files of a training state with the checksums in its manifest.

    Returns:
        The contents of the manifest.

    Raises:
        FileNotFoundError: There is no such directory.
        CheckpointError: A file is missing, altered, unexpected or unreadable, or there is no readable manifest.
    """
    saved = read_manifest(directory)
    try:
        problem = find_damage(saved)
    except OSError as error:
        raise CheckpointError(unreadable(directory, error)) from error
    if problem is not None:
        raise CheckpointError(f"{name_state(directory)} is damaged: {problem}. Use an older state.")
    return saved


def find_damage(saved: SavedState, compare_checksums: bool = True) -> str | None:
    """Return what is wrong with the files of a training state; ``None`` if nothing is.

    Args:
        saved: The state.
        compare_checksums: Whether to read the files. Otherwise only their sizes are compared.

    Raises:
        OSError: The operating system refuses to say, which does not mean that there is damage.
    """
    names = dict.fromkeys((TRAINER_STATE, *map(process_file, range(saved.num_processes)), *saved.files))
    damaged = next((name for name in names if not _has_size(saved, name)), None)
    if damaged is None and compare_checksums:
        with ThreadPoolExecutor() as readers:
            are_intact = readers.map(partial(_has_checksum, saved), names)
            damaged = next((name for name, is_intact in zip(names, are_intact, strict=True) if not is_intact), None)
    if damaged is not None:
        return f"{damaged} is missing or altered"
    # An unlisted file could not be verified. Users may add files of their own, unless Accelerate would read them.
    unlisted = [path.name for path in saved.path.iterdir() if path.name not in saved.files]
    unexpected = [name for name in sorted(unlisted) if _READ_BY_ACCELERATE.fullmatch(name)]
    return f"{unexpected[0]} is not part of the state" if unexpected else saved.problem


def _has_size(saved: SavedState, name: str) -> bool:
    path = saved.path / name
    is_right = name in saved.files and path.is_file() and path.stat().st_size == saved.files[name]["size"]
    return is_right and not is_hollow(path)


def _has_checksum(saved: SavedState, name: str) -> bool:
    path, file = saved.path / name, saved.files[name]
    return crc32_of(path) == str(file["crc32"]) if "crc32" in file else sha256_of(path) == str(file["sha256"])
