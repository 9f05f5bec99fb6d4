"""A log file of whole lines, which a killed run leaves readable and a resumed run continues."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_accelerated._history.records import Moment, Record
from pytorch_accelerated._history.tables import plain_value
from pytorch_accelerated._types import JsonObject

_START_OF_RUN_INFO = '{"run": '


class LogFile:
    """A text file with the lines that a run has logged.

    Lines are appended in one write each, so a process that is killed leaves at most one torn line, the last, which is
    skipped. Any other change replaces the whole file atomically.

    Args:
        path: The file. Its folder is created when the first line is written.
        identity: Returns what tells a run from others, given lines of its file; something false if they tell nothing.

    Raises:
        TypeError: ``path`` is no path.
        IsADirectoryError: There is a folder.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Callable[[Sequence[str]], object]) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"`path` is {path!r}, of type {type(path).__name__}. Expected the path of a file.")
        self.path = Path(path).expanduser().absolute()
        if self.path.is_dir():
            raise IsADirectoryError(f"`path` is {str(self.path)!r}, which is a folder. Pass the path of a file in it.")
        self._identity = identity

    def read(self) -> list[str]:
        """Return the whole lines of the file; none if it does not exist."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        return text[: text.rfind("\n") + 1].split("\n")[:-1]

    def append(self, lines: Sequence[str]) -> None:
        """Append lines. The operating system has them when this returns, so they outlive the process."""
        if lines:
            with self.path.open("ab", buffering=0) as file:
                file.write("".join(f"{line}\n" for line in lines).encode())

    def replace(self, lines: Sequence[str]) -> None:
        """Replace the whole file atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write("".join(f"{line}\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def start(self, lines: Sequence[str], *, is_new: bool) -> None:
        """Make this the file of a run that has logged these lines so far.

        What a killed run logged after the state that it is resumed from goes, because it is logged again. A file that
        may be another run's is set aside: it gets a number before its suffix.

        Args:
            lines: The lines so far.
            is_new: Whether the run starts from scratch, so that whatever is there belongs to another one.
        """
        present = self.read()
        identity = self._identity(present)
        if identity and (is_new or identity != self._identity(lines)):
            self.path.replace(self._name_for_earlier())
        if present != lines or not self.path.exists() or self.path.stat().st_size != _size_of(lines):
            self.replace(lines)

    def _name_for_earlier(self) -> Path:
        number = 1
        while (path := self.path.with_name(f"{self.path.stem}.{number}{self.path.suffix}")).exists():
            number += 1
        return path


def _size_of(lines: Sequence[str]) -> int:
    return sum(len(line.encode()) + 1 for line in lines)


def first_record(lines: Sequence[str]) -> str | None:
    """Return the first line with a record; ``None`` if there is none."""
    return next((line for line in lines if not line.startswith(_START_OF_RUN_INFO)), None)


def to_json_line(record: Record) -> str:
    """Return a record as a line of JSON. A value that is not finite is a text, because JSON has no number for it.

    Example:
        >>> to_json_line(Record("loss", float("nan"), Moment(epoch=1, update=10, samples=80, time=0.5)))
        '{"metric": "loss", "value": "nan", "epoch": 1, "update": 10, "samples": 80, "time": 0.5}'
    """
    value = plain_value(record.value)
    if isinstance(value, float) and not math.isfinite(value):
        value = str(value)
    mark = {"is_of_step": True} if record.is_of_step else {}
    return json.dumps({"metric": record.name, "value": value, **record.moment._asdict(), **mark})


def run_info_line(run_info: Mapping[str, Any]) -> str:
    """Return what a run is made of as a line of JSON."""
    return json.dumps({"run": run_info})


def run_info_of(line: str) -> dict[str, Any] | None:
    """Return the run information in a line of `run_info_line`; ``None`` for any other line.

    Raises:
        ValueError: The line is no JSON.
    """
    entries: object = json.loads(line)
    return entries.get("run") if isinstance(entries, dict) else None


def from_json_line(line: str) -> Record:
    """Return the record of a line that `to_json_line` returned.

    Raises:
        ValueError: It is no such line.
    """
    try:
        entries: JsonObject = json.loads(line)
        moment = Moment(**{name: entries.get(name) for name in Moment._fields})
        value = float(entries["value"]) if entries["value"] in ("nan", "inf", "-inf") else entries["value"]
        return Record(str(entries["metric"]), value, moment, entries.get("is_of_step", False))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it has no {error}") from error
