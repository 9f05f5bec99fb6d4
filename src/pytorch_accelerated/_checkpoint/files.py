"""Files and folders that are complete or do not exist, and that are read without running code from them."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import re
import shutil
import tempfile
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from pytorch_accelerated._checkpoint.checksum import ZIP_SIGNATURE, seal
from pytorch_accelerated._checkpoint.plausible import check_archive, check_contents
from pytorch_accelerated._data.workers import is_worker_failure
from pytorch_accelerated._messages import warn
from pytorch_accelerated._tensors.nested import like_mapping
from pytorch_accelerated._types import Nested, StateDict
from pytorch_accelerated.exceptions import CheckpointError

T = TypeVar("T")

_STORABLE = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_BLOCK_SIZE = 1 << 20  # bytes
_NOT_PICKLABLE = (pickle.PicklingError, AttributeError, TypeError)  # what `pickle` raises
_FSYNC_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
_cannot_flush: set[int] = set()
"""The file systems that cannot flush files, of which the user has been warned."""

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # not of one letter, as the drives of Windows
_MAX_NAME_LENGTH = 143  # bytes; some encrypted file systems allow no more, most allow 255


# --- paths -------------------------------------------------------------------------------------------------------


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a file or folder. ``~`` is the home folder.

    Whoever keeps a path for later keeps the absolute one, because the program may change the current folder.

    Raises:
        ValueError: It is the address of a remote store, or there is no such home folder.
    """
    if _ADDRESS.match(os.fspath(path)):
        address = _ADDRESS.sub(r"\1://", os.fspath(path), count=1)  # as it was before it became a `Path`
        raise ValueError(
            f"{address!r} is not the path of a local file or folder, and files are only saved and loaded locally. Pass "
            "a local path, and copy to it or from it."
        )
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        if is_worker_failure(error):
            raise
        raise ValueError(f"The path {os.fspath(path)!r} names a home folder that does not exist: {error}") from error


class PathAttribute:
    """A path that is an attribute of an object. Relative, it means the folder that was current when it was set.

    The attribute shows the path as it was given, or an absolute one if the program has changed the current folder.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if instance is None:
            return self
        if self._name not in vars(instance):
            raise AttributeError(f"`{type(instance).__name__}` has no `{self._name}` yet")
        path, folder = vars(instance)[self._name]
        return path if folder is None or folder == _current_folder() else type(path)(folder / path)

    def __set__(self, instance: object, path: str | os.PathLike[str] | None) -> None:
        vars(instance)[self._name] = path, _current_folder() if _is_relative(path) else None


def _is_relative(path: object) -> bool:
    """Tell whether the meaning of a path depends on the current folder."""
    if not isinstance(path, (str, os.PathLike)):  # not a path, such as `None`
        return False
    text = os.fspath(path)
    return not (Path(text).is_absolute() or text.startswith("~") or _ADDRESS.match(text))


def _current_folder() -> Path | None:
    try:
        return Path.cwd()
    except FileNotFoundError:  # it has been deleted
        return None


def printable(text: object) -> str:
    """Return a text with the characters escaped that would control a terminal, or that have no encoding.

    Names of files may contain both. Those that are not UTF-8 could not be printed.
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))


@contextmanager
def name_for_pytorch(path: Path, flags: int = os.O_RDONLY) -> Iterator[str]:
    """Open a file under a name that PyTorch can take: one that is UTF-8, which names on Linux need not be."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        descriptor = os.open(path, flags, 0o666)
        try:
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:
        yield str(path)


def _hidden_name(path: Path, suffix: str) -> str:
    """Return a name for what stands next to a file or folder; one that is short enough for every file system."""
    name = f".{path.name}{suffix}"
    if len(os.fsencode(name)) <= _MAX_NAME_LENGTH:
        return name
    return f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()}{suffix}"


# --- one file ----------------------------------------------------------------------------------------------------


def save_file(contents: Mapping[str, object], path: str | os.PathLike[str]) -> list[str]:
    """Write a dictionary to one file atomically; if that fails, an older file survives.

    Missing parent folders are created, and the file carries a checksum. NumPy scalars and arrays are stored as numbers
    and tensors, so that the file can be read without running code from it.

    Returns:
        Why `load_file` will refuse the file: a sentence for each entry that cannot be stored in such a way. These are
        pickled as they are.

    Raises:
        CheckpointError: The file cannot be written, or contains something that cannot be pickled.
    """
    entries, refused = _as_plain_entries(contents)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # by name, older versions of PyTorch do not notice a full disk
            torch.save(entries, file)
        seal(temporary)

    write_atomically(path, write)
    return refused


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Write one file, and its missing parent folders, completely or not at all: an older file survives a failure.

    Args:
        path: The file.
        write: Writes the contents to the path that it is called with.

    Raises:
        CheckpointError: The file cannot be written, or contains something that cannot be pickled.
    """
    path = local_path(path)
    # Several nodes may write the same file. A node overwrites what it left behind itself.
    node = os.environ.get("GROUP_RANK", "0")
    temporary = path.with_name(_hidden_name(path, f".tmp-{node}"))
    kept = "An earlier file of this name is unchanged."
    try:
        create_folder(path.parent)
        temporary.unlink(missing_ok=True)
        temporary.touch(exist_ok=False)  # a new file: a link of this name would be written through
        write(temporary)
        flush_to_disk(temporary)
        temporary.replace(path)
        kept = "It is complete, but may not survive a power loss."
        flush_to_disk(path.parent)
    except (OSError, RuntimeError, *_NOT_PICKLABLE) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if is_worker_failure(error):  # PyTorch raises it anywhere in the program
            raise
        advice = (
            "Leave out what cannot be pickled."
            if isinstance(error, _NOT_PICKLABLE)
            else "Check that the folder is writable and that the disk has free space."
        )
        raise CheckpointError(f"The checkpoint {str(path)!r} could not be written: {error}. {kept} {advice}") from error


def check_can_write(path: str | os.PathLike[str]) -> None:
    """Create the folder of a file that will be written later, and raise if it could not be written.

    Raises:
        CheckpointError: It could not.
    """
    path = local_path(path)
    try:
        create_folder(path.parent)
        with suppress(FileNotFoundError):
            os.lstat(path)  # raises if the name is too long
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise CheckpointError(
            f"Checkpoints cannot be saved as {str(path)!r}: {error}. Pass the path of a file in a writable folder."
        ) from error


def load_file(path: str | os.PathLike[str], *, is_mapped: bool = False) -> StateDict:
    """Read a file that `save_file` wrote, or an older checkpoint, into host memory, without running code from it.

    Args:
        path: The file.
        is_mapped: Whether the tensors are memory-mapped. The file must then be complete, and must not change.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is damaged, or contains objects other than tensors and plain values.
    """
    path = local_path(path)
    if path.is_dir():
        raise FileNotFoundError(
            f"{str(path)!r} is a directory. Expected a checkpoint, a file written by `save_checkpoint`. If it is a "
            "training state, use `load_training_state`, or pass it to `train` as `resume_from`."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no checkpoint file {str(path)!r}. Expected a file written by `save_checkpoint`. Check the path."
        )
    try:
        check_archive(path)
        with torch.serialization.safe_globals(_numpy_scalar_globals()), name_for_pytorch(path) as name:
            contents = torch.load(name, map_location="cpu", weights_only=True, mmap=is_mapped)
        check_contents(contents, path.stat().st_size)
        return contents if isinstance(contents, dict) else dict(contents)  # with its attributes
    except Exception as error:
        if is_worker_failure(error):
            raise
        raise CheckpointError(
            f"The checkpoint {str(path)!r} could not be read: {_short_reason(error)}. The file is damaged, or it "
            "contains Python objects other than tensors, numbers, strings and containers of these. Such objects are "
            "not loaded, because that could run code. Use an undamaged copy, or save the file again without them."
        ) from error


def _short_reason(error: Exception) -> str:
    # PyTorch surrounds its reason by paragraphs that recommend loading the file unsafely.
    reason = str(error).rpartition("WeightsUnpickler error: ")[2]
    return reason.partition("\n")[0].partition(". Please")[0].rstrip(".")


def check_zip_is_complete(path: Path) -> None:
    """Raise if the end of a file is missing that `torch.save` wrote by name.

    The C++ writer of older PyTorch versions does not notice when the disk has no space for the last part.

    Raises:
        RuntimeError: It is missing.
    """
    if not zipfile.is_zipfile(path):
        raise RuntimeError(f"the end of {path.name!r} is missing")


def starts_like_zip(path: Path) -> bool:
    """Tell whether a file starts like those that `torch.save` writes by default: as a zip archive."""
    with path.open("rb") as file:
        return file.read(len(ZIP_SIGNATURE)) == ZIP_SIGNATURE


def crc32_of(path: Path) -> str:
    """Return a checksum that detects accidents; fast."""
    checksum = 0
    block = memoryview(bytearray(_BLOCK_SIZE))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            checksum = zlib.crc32(block[:size], checksum)
    return f"{checksum:08x}"


def sha256_of(path: Path) -> str:
    """Return a checksum that cannot be forged; slower."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_SIZE):
            digest.update(block)
    return digest.hexdigest()


# --- what a file may contain -------------------------------------------------------------------------------------


def as_plain(value: Nested, place: str = "") -> Nested:
    """Convert a value to one that can be stored and read back without running code, including nested containers.

    NumPy scalars and arrays become numbers and tensors.

    Args:
        value: What to store.
        place: Where the value is found, for the message.

    Raises:
        CheckpointError: The value contains something other than tensors, numbers, strings and containers of these.
    """
    if value is None or isinstance(value, torch.Tensor) or type(value) in _STORABLE:  # the most common case first
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value.copy())
    if type(value) in (dict, OrderedDict, Counter, defaultdict):
        plain = {key: as_plain(item, f"{place}[{key!r}]") for key, item in _with_plain_keys(value).items()}
        return _with_attributes(value, plain) if type(value) in (OrderedDict, Counter) else plain
    if type(value) in (tuple, list, set, torch.Size):
        return type(value)(as_plain(item, f"{place}[...]") for item in value)
    raise CheckpointError(
        f"A value of type `{type(value).__name__}` cannot be saved safely{f' (at {place})' if place else ''}: reading "
        "it back would run code from the file. Save tensors, numbers, strings or containers of these. `vars(...)` or "
        "`str(...)` can convert many objects."
    )


def _with_attributes(value: Mapping[Any, Any], plain: dict[Any, Any]) -> Mapping[Any, Any]:
    """Return a mapping of the same type. The state of a model or optimizer has its metadata in an attribute."""
    rebuilt = like_mapping(value, plain)
    for name, attribute in vars(value).items():
        try:
            vars(rebuilt)[name] = as_plain(attribute)
        except CheckpointError:  # without it, the state is as complete as in a program that copies its entries
            del vars(rebuilt)[name]
    return rebuilt


def _as_plain_entries(contents: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """Convert the entries of a dictionary; return also the messages about those that have to stay as they are."""
    entries, refused = _with_plain_keys(contents), []
    for name, value in entries.items():
        try:
            entries[name] = as_plain(value, f"[{name!r}]")
        except CheckpointError as error:
            refused.append(str(error))
    return entries, refused


def _with_plain_keys(mapping: Mapping[Any, T]) -> dict[Any, T]:
    """Convert keys that are NumPy scalars to Python numbers."""
    return {key.item() if isinstance(key, np.generic) else key: item for key, item in mapping.items()}


def _numpy_scalar_globals() -> list[Any]:
    # Checkpoints of 0.1.61 may contain metric values that are NumPy scalars. They are harmless: a dtype and bytes.
    dtypes = {type(np.dtype(name)) for name in ("float64", "float32", "float16", "int64", "int32", "bool")}
    build_scalar = np.float64(0.0).__reduce__()[0]
    return [build_scalar, np.dtype, *dtypes]


# --- folders -----------------------------------------------------------------------------------------------------


def create_folder(path: Path) -> None:
    """Create a folder and its parents durably: they survive a power loss."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    if missing:
        os.makedirs(path, exist_ok=True)  # noqa: PTH103 - which programs replace in their tests
    for folder in reversed(missing):
        if folder.parent.is_dir():
            flush_to_disk(folder.parent)


def flush_to_disk(path: Path) -> None:
    """Fsync a file, or the list of names in a folder. If the file system cannot, warn once."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _FSYNC_NOT_SUPPORTED:
            raise
        if not path.is_dir():  # some network file systems cannot fsync folders only
            _warn_about_flushing(path.parent, error, os.fstat(descriptor).st_dev)
    finally:
        os.close(descriptor)


def _warn_about_flushing(folder: Path, error: OSError, file_system: int) -> None:
    if file_system not in _cannot_flush:
        _cannot_flush.add(file_system)
        warn(
            f"Files in {str(folder)!r} cannot be flushed to the disk ({error}): what is saved there may not survive a "
            "power loss. Save to another file system if that matters."
        )


def temporary_path(target: Path) -> Path:
    """Return where a folder is written before it is renamed to its final name. A folder is also deleted there."""
    return target.with_name(_hidden_name(target, ".tmp"))


def backup_path(target: Path) -> Path:
    """Return where the previous folder of the same name is kept until the new one has replaced it."""
    return target.with_name(_hidden_name(target, ".old"))


def replace_folder(target: Path) -> None:
    """Rename the folder at `temporary_path` to its final name.

    A previous folder of that name is kept until the new one is in place, and is restored if that fails. If it was a
    link, what it points to stays as it is.
    """
    temporary, backup = temporary_path(target), backup_path(target)
    if _is_there(target):
        check_can_replace(target)
        target.rename(backup)
    try:
        temporary.rename(target)
        flush_to_disk(target.parent)
    except OSError:
        if _is_there(backup):
            with suppress(FileNotFoundError):
                target.rename(temporary)
            backup.rename(target)
        raise
    remove(backup, ignore_errors=True)


def check_can_replace(path: Path) -> None:
    """Raise if there is something else than a folder, or a link, at a path.

    Raises:
        FileExistsError: There is.
    """
    if not (path.is_symlink() or path.is_dir()):
        raise FileExistsError(errno.EEXIST, "it is no folder, so it is not replaced; move it away", str(path))


def delete_folder(target: Path) -> None:
    """Delete a folder. It is renamed first, so that an interrupted deletion leaves nothing under its name."""
    temporary = temporary_path(target)
    remove(temporary, ignore_errors=True)
    target.rename(temporary)
    remove(temporary)


def is_replacement_interrupted(target: Path) -> bool:
    """Tell whether the replacement of a folder was interrupted before the new one was in place, or is under way."""
    return _is_there(backup_path(target)) and not _is_there(target)


def restore_backup(target: Path) -> None:
    """Restore a folder whose replacement was interrupted before the new one was in place."""
    if is_replacement_interrupted(target):
        backup_path(target).rename(target)
        flush_to_disk(target.parent)


def repair_folder(target: Path) -> None:
    """Undo or finish an interrupted write, replacement or deletion of a folder."""
    restore_backup(target)
    for leftover in (temporary_path(target), backup_path(target)):
        remove(leftover, ignore_errors=True)


def _is_there(path: Path) -> bool:
    """Tell whether there is a file or folder, or a link, wherever it points; raise if the disk does not say."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def remove(path: Path, ignore_errors: bool = False) -> None:
    """Remove a folder, or what somebody has put in its place, such as a pipe, which must not be opened.

    Of a link to a folder, only the link is removed: what it points to is not ours.
    """
    with suppress(*(OSError,) if ignore_errors else ()):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=ignore_errors)
