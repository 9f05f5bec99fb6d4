"""Training states on disk: list them, find the newest, and verify that they are complete.

To inspect them from a shell::

    python -m pytorch_accelerated.states list training_states
    python -m pytorch_accelerated.states verify training_states
    python -m pytorch_accelerated.states show training_states/epoch_3
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import TextIO

from pytorch_accelerated._checkpoint import manifest
from pytorch_accelerated._checkpoint.files import printable
from pytorch_accelerated._checkpoint.folder import find_newest_state, list_states
from pytorch_accelerated._checkpoint.manifest import MANIFEST, SavedState
from pytorch_accelerated._console.text import format_size
from pytorch_accelerated.exceptions import CheckpointError

_GAP = "  "
_MIN_WIDTH = 20  # of a column that is wrapped

__all__ = ["SavedState", "find_latest_state", "list_states", "main", "verify_state"]


def find_latest_state(folder: str | os.PathLike[str]) -> Path | None:
    """Return the newest valid training state in a folder; ``None`` if there is none.

    Its files are compared with their checksums. Nothing is changed, so a run may be saving there at the same time.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: There is no such folder.
        CheckpointError: A newer version of this library wrote one of the states.
    """
    newest = find_newest_state(folder)
    return None if newest is None else newest.path


def verify_state(path: str | os.PathLike[str]) -> SavedState:
    """Compare the files of a training state with their checksums, and return the contents of its manifest.

    Args:
        path: The directory of the state.

    Raises:
        FileNotFoundError: There is no such directory.
        CheckpointError: The state is damaged, or a newer version of this library wrote it.
    """
    return manifest.verify_state(Path(path))


# --- the command line --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code: 1 if a state is missing or damaged, otherwise 0.

    Args:
        arguments: The command-line arguments; ``None`` for those of this process.
    """
    parser = argparse.ArgumentParser("python -m pytorch_accelerated.states", description="Inspect training states.")
    commands = parser.add_subparsers(required=True)
    for name, (function, place, purpose) in _COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.add_argument("path", metavar=place, type=Path)
        command.set_defaults(function=function)
    given = parser.parse_args(arguments)
    try:
        is_valid: bool = given.function(given.path)
    except (OSError, ValueError, CheckpointError) as error:  # `ValueError` of a path that no file can have
        print(_printable(f"error: {error}", sys.stderr), file=sys.stderr)
        return 1
    return 0 if is_valid else 1


def _list(folder: Path) -> bool:
    rows: list[Sequence[str]] = [("name", "epochs", "batches", "updates", "size", "metrics", "files")]
    for state in list_states(folder):
        at = state.position
        place = ("?",) * 3 if at is None else (at.num_epochs_completed, at.num_batches_in_epoch, at.num_updates)
        rows.append(
            (state.path.name, *map(str, place), format_size(state.size), _format_metrics(state), _verdict(state))
        )
    _print_table(rows)
    return True


def _verify(path: Path) -> bool:
    is_state = (path / MANIFEST).exists()
    paths = [path] if is_state else [state.path for state in list_states(path)]
    if not paths:
        raise CheckpointError(
            f"There is no training state in {str(path)!r}. Expected a training state, or a folder that contains some. "
            "Check the path."
        )
    problems = {state: _find_problem(state) for state in paths}
    for state, problem in problems.items():
        print(_printable(f"{state}: {problem or 'valid'}"))
    return not any(problems.values())


def _show(path: Path) -> bool:
    state = manifest.read_manifest(path)
    state = replace(state, problem=manifest.find_damage(state, compare_checksums=False))
    summary = {
        "state": str(path),
        "files are": _verdict(state),
        "size": format_size(state.size),
        "format": state.format_version,
        "generation": state.generation,
        "processes": state.num_processes,
    }
    files = {name: format_size(file["size"]) for name, file in state.files.items()}
    position = {} if state.position is None else asdict(state.position)
    for title, values in (
        ("", summary),
        ("position", position),
        ("metrics", state.metrics),
        ("settings", state.settings),
        ("versions", state.versions),
        ("files", files),
    ):
        if title and values:
            print(f"\n{title}")
        _print_table([(f"  {name}" if title else name, str(value)) for name, value in values.items()])
    return state.problem is None


_COMMANDS: dict[str, tuple[Callable[[Path], bool], str, str]] = {
    "list": (_list, "DIR", "List the states in a folder, oldest first. Checks only the sizes of files."),
    "verify": (_verify, "DIR_OR_STATE", "Verify the checksums of a state, or of all states in a folder."),
    "show": (_show, "STATE", "Show the manifest of a state. Checks only the sizes of files."),
}


def _find_problem(path: Path) -> str | None:
    try:
        verify_state(path)
    except (OSError, CheckpointError) as error:
        return str(error)
    return None


def _verdict(state: SavedState) -> str:
    return "complete" if state.problem is None else f"NOT VALID: {state.problem}"


def _format_metrics(state: SavedState) -> str:
    shown = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in state.metrics.items()}
    return " ".join(f"{name}={value}" for name, value in shown.items())


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows, aligned. In a terminal that is too narrow, the widest columns are wrapped."""
    printable = [[_printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*printable, strict=True)]
    available = shutil.get_terminal_size().columns - len(_GAP) * (len(widths) - 1)
    while sys.stdout.isatty() and sum(widths) > available and max(widths) > _MIN_WIDTH:
        widths[widths.index(max(widths))] -= 1
    for row in printable:
        cells = [textwrap.wrap(cell, width, drop_whitespace=False) for cell, width in zip(row, widths, strict=True)]
        for lines in zip_longest(*cells, fillvalue=""):
            print(_GAP.join(line.ljust(width) for line, width in zip(lines, widths, strict=True)).rstrip())


def _printable(text: str, stream: TextIO | None = None) -> str:
    """Return a text without what would control a terminal, or what the stream cannot print: it comes from files."""
    encoding = (sys.stdout if stream is None else stream).encoding or "utf-8"
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


if __name__ == "__main__":
    sys.exit(main())
