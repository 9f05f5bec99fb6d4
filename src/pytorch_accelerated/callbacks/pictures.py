"""A callback that keeps a picture of the learning curves up to date while training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pytorch_accelerated._checkpoint.files import local_path, write_atomically
from pytorch_accelerated._hints.arguments import explains_arguments
from pytorch_accelerated._messages import warn
from pytorch_accelerated._plots.panels import check_has_matplotlib
from pytorch_accelerated._views import run_of
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.plotting import plot_learning_curves
from pytorch_accelerated.time_ledger import SAVING

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from pytorch_accelerated._types import MaybeNone
    from pytorch_accelerated.run_config import TrainerRunConfig
    from pytorch_accelerated.trainer import Trainer

_SHARE_OF_TIME = 0.02


class LearningCurveCallback(TrainerCallback):
    """Keeps a picture of the learning curves in a file: see `pytorch_accelerated.plotting.plot_learning_curves`.

    The picture is drawn at the end of an epoch and of an evaluation within an epoch, never in a step, and only on the
    main process. If epochs are short, some are skipped, so that drawing takes at most two percent of the time; the
    picture is complete when the run has ended, also by an error. The file is replaced as a whole, so a viewer never
    finds half a picture. If it cannot be written, a warning says so once, and training goes on.

    Args:
        path: The file. Its suffix says which format it has, such as ``.png``, ``.svg`` or ``.pdf``.
        metrics: The metrics to draw, such as ``["loss", "accuracy"]``; ``None`` for all that are recorded in training
            or evaluation.
        log_scale: Whether the vertical axis is logarithmic; or the metrics for which it is.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: The suffix is not that of a format that matplotlib writes, or the path not that of a local file.
    """

    is_called_last = True

    @explains_arguments
    def __init__(
        self,
        path: str | os.PathLike[str],
        metrics: Sequence[str] | None = None,
        log_scale: bool | Sequence[str] = False,
    ) -> None:
        check_has_matplotlib()
        self.path = local_path(path)
        _check_format(self.path)
        self.metrics, self.log_scale = metrics, log_scale
        self._next_time = 0.0
        self._has_failed = False

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Draw at the first opportunity."""
        self._next_time, self._has_failed = 0.0, False

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Draw the curves, unless they have just been drawn."""
        if time.monotonic() >= self._next_time:
            self._draw(trainer)

    def on_eval_epoch_end(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Draw the curves after an evaluation within an epoch, unless they have just been drawn."""
        if is_intermediate and time.monotonic() >= self._next_time:
            self._draw(trainer)

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Draw the complete curves."""
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, *, exception: BaseException, **kwargs: Any) -> None:
        """Draw the curves until the error."""
        if run_of(trainer).is_training_run:
            self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        config: TrainerRunConfig | MaybeNone = run_of(trainer).config
        if config is None or not config.is_world_process_zero or not list(trainer.run_history.get_metric_names()):
            return
        start = time.monotonic()
        with run_of(trainer).ledger.during(SAVING):
            self._save_figure(trainer)
        self._next_time = time.monotonic() + (time.monotonic() - start) / _SHARE_OF_TIME

    def _save_figure(self, trainer: Trainer) -> None:
        try:
            figure = plot_learning_curves(trainer.run_history, self.metrics, log_scale=self.log_scale)
            write_atomically(self.path, lambda path: figure.savefig(path, dpi=120, format=self.path.suffix[1:]))
        except ValueError as error:
            if run_of(trainer).stop_reason is not None:  # until then, a metric may still be recorded
                self._warn_once(str(error))
        except CheckpointError as error:
            self._warn_once(f"{str(self.path)!r} cannot be written: {error.__cause__}.")

    def _warn_once(self, reason: str) -> None:
        if not self._has_failed:
            warn(f"The learning curves were not drawn. {reason} Training continues without the picture.")
        self._has_failed = True


def _check_format(path: Path) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(
            f"`path` has the suffix {path.suffix!r}. Expected that of a picture, such as '.png', '.svg' or '.pdf'; "
            f"matplotlib writes {sorted(known)}."
        )
