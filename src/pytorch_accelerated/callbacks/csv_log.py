"""A callback that keeps a CSV file of what the run records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytorch_accelerated._hints.arguments import explains_arguments
from pytorch_accelerated._history.log_file import LogFile
from pytorch_accelerated._history.records import Moment, records_in, rows_of
from pytorch_accelerated._history.tables import csv_lines
from pytorch_accelerated._views import run_of
from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from pytorch_accelerated.trainer import Trainer


class CSVLogCallback(TrainerCallback):
    """Keeps a CSV file of what the run has recorded: the rows of `RunHistory.to_rows`, up to date after each epoch.

    The first columns are ``epoch``, ``update``, ``samples`` and ``time``, then the metrics. A column stays where it is:
    that of a metric which is recorded later becomes the last, and is empty in the rows before. Only the main process
    writes. The file can be read at any time, however the process ends.

    A run that is resumed from a training state continues its file without doubles or gaps. The file of another run is
    never overwritten, but set aside: ``log.csv`` becomes ``log.1.csv``.

    Args:
        path: The file. It is created, with missing folders, when the run starts.
    """

    is_called_last = True

    @explains_arguments
    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = LogFile(path, identity=_first_moment)
        self._lines: list[str] | None = None
        """The lines that this callback has written in the current run; ``None`` before the first."""

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Start the file, or make that of a resumed run what it was when its state was saved."""
        self._lines = None
        self._write(trainer)

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Write the rows of the epoch."""
        self._write(trainer)

    def on_eval_epoch_end(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Write the row of an evaluation within an epoch."""
        if is_intermediate:
            self._write(trainer)

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Write what was recorded since."""
        self._write(trainer)

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Write what the evaluation has recorded."""
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        run = run_of(trainer)
        if not run.config.is_world_process_zero:
            return
        lines = csv_lines(rows_of(records_in(trainer.run_history)))
        if self._lines is None:
            self._file.start(lines, is_new=run.has_reset_history and not run.is_resumed)
        elif lines[: len(self._lines)] == self._lines:
            self._file.append(lines[len(self._lines) :])
        else:  # there is a new column, or the last row has become longer
            self._file.replace(lines)
        self._lines = lines


def _first_moment(lines: Sequence[str]) -> list[str]:
    """Return the cells of the first row that do not change when columns are added; none if there is no row."""
    return lines[1].split(",")[: len(Moment._fields)] if len(lines) > 1 else []
