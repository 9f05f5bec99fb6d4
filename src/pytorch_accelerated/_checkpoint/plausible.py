"""Is what a file claims plausible for its size? That is asked before memory or time is spent on it."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path

import torch

_GIANT = 1 << 30  # bytes
_MAX_HOLLOWNESS = 1000
_MAX_NUM_EXTENTS = 1000
_MAX_DEPTH = 200
_MIN_NUM_ITEMS = 100_000
_MIN_NUM_BYTES = 1 << 26
_MAX_BYTES_PER_BYTE = 64
"""Tensors may share memory, such as tied weights or an expanded one, so a few times the size of a file is normal."""


def check_archive(path: Path) -> None:
    """Raise if the parts of a zip archive are larger than the archive. `torch.save` does not compress.

    Raises:
        ValueError: They are.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError("its parts are compressed")
    if sum(part.file_size for part in parts) > path.stat().st_size:
        raise ValueError("its parts are larger than the file")


def check_contents(contents: object, size: int) -> None:
    """Raise if contents are nested too deeply, or are much larger than the file that they come from.

    In a file, one item may stand in many places, so that a few bytes become as many items as there are paths to it.

    Args:
        contents: What was read.
        size: The size of the file in bytes.

    Raises:
        ValueError: They are.
    """
    num_items, num_bytes = _measure(contents, 0, {})
    if num_items > max(size, _MIN_NUM_ITEMS) or num_bytes > size * _MAX_BYTES_PER_BYTE + _MIN_NUM_BYTES:
        raise ValueError(f"{num_items} items with {num_bytes} bytes cannot come from a file of {size} bytes")


def _measure(value: object, depth: int, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Return how many items a value contains, and how many bytes its tensors have; each counts wherever it stands."""
    if isinstance(value, torch.Tensor):
        return 1, value.numel() * value.element_size() if value.layout == torch.strided else 0
    if isinstance(value, (str, bytes)) or not isinstance(value, (Mapping, Collection)):
        return 1, 0
    if depth > _MAX_DEPTH:
        raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
    if id(value) in known:
        measured = known[id(value)]
        if measured is None:
            raise ValueError("it contains itself")
        return measured
    known[id(value)] = None
    num_items, num_bytes = 1, 0
    for item in chain(value, value.values() if isinstance(value, Mapping) else ()):
        items_within, bytes_within = _measure(item, depth + 1, known)
        num_items, num_bytes = num_items + items_within, num_bytes + bytes_within
    known[id(value)] = num_items, num_bytes
    return num_items, num_bytes


def is_hollow(path: Path) -> bool:
    """Tell whether a giant file consists of next to nothing but holes, which take no space on the disk."""
    size = path.stat().st_size
    if size < _GIANT or not hasattr(os, "SEEK_DATA"):
        return False
    num_bytes = position = 0
    with path.open("rb", buffering=0) as file:
        for _ in range(_MAX_NUM_EXTENTS):
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:  # no more data
                return True
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            num_bytes += position - start
            if num_bytes * _MAX_HOLLOWNESS >= size:
                return False
    return False
