"""The checksum that a checkpoint carries: a damaged file is refused, and other programs read the file as before."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from pytorch_accelerated.exceptions import CheckpointError

EMPTY_CHECKSUM = "pytorch_accelerated.crc32:00000000"
"""What `seal` replaces by the checksum. It stands in the header of a safetensors file, or at the end of a zip archive.

The checksum is that of all bytes but its own eight digits.
"""

_NUM_DIGITS = 8
_LABEL = EMPTY_CHECKSUM[:-_NUM_DIGITS].encode()
LENGTH_SIZE = 8  # bytes; a file of safetensors begins with the length of its header, which is JSON
_LENGTH_OF_COMMENT = 2  # bytes; the end of a zip archive without a comment
ZIP_SIGNATURE = b"PK\x03\x04"
"""How a zip archive begins, the format in which `torch.save` writes by default."""

_END_OF_ZIP = b"PK\x05\x06"
_END_SIZE = 22  # bytes
_IS_FOLDER = 0x10  # in the attributes of a record
_BLOCK_SIZE = 1 << 20  # bytes


def is_safetensors_file(path: Path) -> bool:
    """Tell by its contents whether a file is in the format of safetensors, whatever its suffix is."""
    with path.open("rb") as file:
        return _header_size(file) is not None


def seal(path: Path) -> None:
    """Let a file that `torch.save` or safetensors wrote carry a checksum; in the second case, in its metadata.

    In a zip archive, it becomes the comment at the end, which readers skip.
    """
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _END_SIZE))
        end = file.read(_END_SIZE)
        if end.startswith(_END_OF_ZIP) and end.endswith(bytes(_LENGTH_OF_COMMENT)):
            file.seek(size - _LENGTH_OF_COMMENT)
            file.write(len(EMPTY_CHECKSUM).to_bytes(_LENGTH_OF_COMMENT, "little") + EMPTY_CHECKSUM.encode())
        place = _find_digits(file)
        if place is not None:
            digits = _crc32_without(file, place)
            file.seek(place)
            file.write(digits)


def carried_checksum(path: Path) -> str | None:
    """Return the checksum that a file carries, as it stands there; ``None`` if it carries none."""
    with path.open("rb") as file:
        place = _find_digits(file)
        if place is None:
            return None
        file.seek(place)
        return file.read(_NUM_DIGITS).decode("ascii", "replace")


def check_undamaged(path: Path) -> None:
    """Raise if a checkpoint is not as it was written.

    A file without a checksum, from an older version or another program, is read with the checks that its format has.
    Those of a zip archive cover the contents of each record. Files of safetensors have none.

    Raises:
        CheckpointError: It is not.
    """
    with path.open("rb") as file:
        place = _find_digits(file)
        if place is None:
            difference = _first_damaged_record(file)
        else:
            file.seek(place)
            is_equal = file.read(_NUM_DIGITS) == _crc32_without(file, place)
            difference = None if is_equal else "its contents do not match the checksum in it"
    if difference is not None:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} could not be read: {difference}. The file is damaged: it has changed since "
            "it was written. Nothing was loaded. Use an undamaged copy."
        )


def _find_digits(file: BinaryIO) -> int | None:
    """Return where the digits of the checksum begin; ``None`` if the file has none."""
    header_size = _header_size(file)
    if header_size is not None:
        place = file.read(header_size).find(_LABEL)
        return None if place < 0 else LENGTH_SIZE + place + len(_LABEL)
    place = file.seek(0, 2) - len(EMPTY_CHECKSUM)
    file.seek(max(0, place))
    return place + len(_LABEL) if file.read(len(_LABEL)) == _LABEL else None


def _header_size(file: BinaryIO) -> int | None:
    """Return the size of the header, in bytes, and go there; ``None`` for a file that is not one of safetensors."""
    size = file.seek(0, 2)
    file.seek(0)
    header_size = int.from_bytes(file.read(LENGTH_SIZE), "little")
    is_header = file.read(1) == b"{" and LENGTH_SIZE + header_size <= size
    file.seek(min(LENGTH_SIZE, size))
    return header_size if is_header else None


def _crc32_without(file: BinaryIO, place: int) -> bytes:
    """Return the checksum of a file as digits, computed without the digits at a place."""
    file.seek(0)
    checksum, num_left = 0, place
    while block := file.read(min(_BLOCK_SIZE, num_left)):
        checksum, num_left = zlib.crc32(block, checksum), num_left - len(block)
    file.seek(place + _NUM_DIGITS)
    while block := file.read(_BLOCK_SIZE):
        checksum = zlib.crc32(block, checksum)
    return f"{checksum:0{_NUM_DIGITS}x}".encode()


def _first_damaged_record(file: BinaryIO) -> str | None:
    """Say what in a zip archive is damaged; ``None`` if nothing is, or there are no checksums in it."""
    file.seek(0)
    if file.read(len(ZIP_SIGNATURE)) != ZIP_SIGNATURE:
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if not any(record.CRC for record in records):  # `torch.serialization.set_crc32_options(False)`
                return None
            for record in records:  # PyTorch reads nothing from a folder, into memory that contains anything
                if record.external_attr & _IS_FOLDER:
                    return f"its record {record.filename!r} is marked as a folder"
            name = archive.testzip()
    except Exception as error:  # of many kinds: any number in the list of records may be wrong
        return f"its records cannot be read ({error!r})"
    return None if name is None else f"its record {name!r} does not match the checksum of it"
