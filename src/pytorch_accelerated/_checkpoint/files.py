"""Files and folders that are whole or not there, and that are read without running code from them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pytorch_accelerated._data.workers import is_worker_failure
from pytorch_accelerated.exceptions import CheckpointError

_STORABLE = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


_BLOCK_SIZE = 1 << 20  # bytes


_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


def save_file(contents: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a dictionary to one file, which is whole or not there; an older file survives a failure.

    Parent folders are made. NumPy scalars and arrays are stored as numbers and tensors, so that the file can be read
    without running code from it.

    Raises:
        CheckpointError: The file cannot be written, or could not be read back safely.
    """
    path = Path(path)
    plain_contents = as_plain(contents)
    node = os.environ.get(
        "GROUP_RANK", "0"
    )  # nodes may write the same file; what one leaves behind it overwrites later
    temporary = path.with_name(f".{path.name}.tmp-{node}")
    try:
        make_folder(path.parent)
        with temporary.open("wb") as file:
            torch.save(plain_contents, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        flush_to_disk(path.parent)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if is_worker_failure(error):  # which PyTorch reports wherever the program is
            raise
        raise CheckpointError(
            f"The checkpoint {str(path)!r} could not be written: {error}. What was saved there before is untouched. "
            "Check that the folder is writable and the disk has room."
        ) from error


def check_can_write(path: str | os.PathLike[str]) -> None:
    """Make the folder of a file to come, and raise if the file could not be written.

    Raises:
        CheckpointError: It could not.
    """
    path = Path(path)
    try:
        make_folder(path.parent)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise CheckpointError(
            f"No checkpoint can be saved as {str(path)!r}: {error}. Give the path of a file in a folder that can be "
            "written to."
        ) from error


def load_file(path: str | os.PathLike[str], *, is_mapped: bool = False) -> dict[str, Any]:
    """Read a file that `save_file` wrote, or an older checkpoint, to host memory, without running code from it.

    Args:
        path: The file.
        is_mapped: Whether the tensors stay in the file until they are looked at; it must be whole, and stay as it is.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is damaged, or holds objects other than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no checkpoint file {str(path)!r}. Expected the path of a file that `save_checkpoint` wrote."
        )
    try:
        with torch.serialization.safe_globals(_numpy_scalar_globals()):
            return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped))
    except Exception as error:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} could not be read: {error}. It is damaged, or holds Python objects other "
            "than tensors, numbers, strings and containers of them, which are not loaded because that could run code."
        ) from error


def check_is_complete(path: Path) -> None:
    """Raise if the end of a file is missing that `torch.save` wrote by its name.

    Where that is C++ of an older PyTorch, it does not notice that a disk had no room for the last part.

    Raises:
        RuntimeError: It is missing.
    """
    if not zipfile.is_zipfile(path):
        raise RuntimeError(f"the end of {path.name!r} is missing")


def begins_as_archive(path: Path) -> bool:
    """Tell whether a file begins as those do that `torch.save` writes by default: as a zip archive."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def as_plain(value: Any, place: str = "") -> Any:
    """Return what can be stored and read back without running code, in nested containers too.

    NumPy scalars and arrays become numbers and tensors.

    Args:
        value: What to store.
        place: Where it stands, for the message.

    Raises:
        CheckpointError: Something in it is no tensor, number, string or container of them.
    """
    if value is None or isinstance(value, torch.Tensor) or type(value) in _STORABLE:  # most of what there is
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value.copy())
    if type(value) in (dict, OrderedDict, Counter, defaultdict):
        plain = {key: as_plain(item, f"{place}[{key!r}]") for key, item in _with_plain_keys(value).items()}
        return type(value)(plain) if type(value) in (OrderedDict, Counter) else plain
    if type(value) in (tuple, list, set, torch.Size):
        return type(value)(as_plain(item, f"{place}[...]") for item in value)
    raise CheckpointError(
        f"A {type(value).__name__} cannot be saved{' as ' + place if place else ''}: to read it back would mean to run "
        "code from the file. Save tensors, numbers, strings and containers of them, such as `vars(...)` or `str(...)`."
    )


def _with_plain_keys(mapping: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a dictionary whose keys are no NumPy scalars."""
    return {key.item() if isinstance(key, np.generic) else key: item for key, item in mapping.items()}


def _numpy_scalar_globals() -> list[Any]:
    # Checkpoints of 0.1.61 may hold metric values that are NumPy scalars. They are harmless: a data type and bytes.
    dtypes = {type(np.dtype(name)) for name in ("float64", "float32", "float16", "int64", "int32", "bool")}
    build_scalar = np.float64(0.0).__reduce__()[0]
    return [build_scalar, np.dtype, *dtypes]


def crc32_of(path: Path) -> str:
    """Return a checksum that finds accidents, fast."""
    checksum = 0
    block = memoryview(bytearray(_BLOCK_SIZE))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            checksum = zlib.crc32(block[:size], checksum)
    return f"{checksum:08x}"


def sha256_of(path: Path) -> str:
    """Return a checksum that nobody can forge; it takes longer."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that they survive a power loss."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot do this for folders.
        if error.errno not in _NOT_SUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def temporary_path(target: Path) -> Path:
    """Return where a folder is written before it gets its name; also where it goes to be deleted."""
    return target.with_name(f".{target.name}.tmp")


def backup_path(target: Path) -> Path:
    """Return where the folder that had the name before waits until the new one is there."""
    return target.with_name(f".{target.name}.old")


def replace_folder(target: Path) -> None:
    """Give the folder at `temporary_path` its name. What had it before stays until then, and comes back on a failure."""
    temporary, replaced = temporary_path(target), backup_path(target)
    if target.exists():
        target.rename(replaced)
    try:
        temporary.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    flush_to_disk(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def delete_folder(target: Path) -> None:
    """Delete a folder; if that is cut off, what is left of it no longer has its name."""
    temporary = temporary_path(target)
    shutil.rmtree(temporary, ignore_errors=True)
    target.rename(temporary)
    shutil.rmtree(temporary)


def restore_backup(target: Path) -> None:
    """Give a folder its name back whose replacement was cut off before the new one was there."""
    replaced = backup_path(target)
    if replaced.exists() and not target.exists():
        replaced.rename(target)
        flush_to_disk(target.parent)


def repair_folder(target: Path) -> None:
    """Undo or finish what was cut off while a folder was written, replaced or deleted."""
    restore_backup(target)
    for left in (temporary_path(target), backup_path(target)):
        shutil.rmtree(left, ignore_errors=True)
