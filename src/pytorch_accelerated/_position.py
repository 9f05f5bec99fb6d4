"""How far training has come: what a run hands on to the next, and a training state restores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from pytorch_accelerated._accumulation import AccumulationWindow
from pytorch_accelerated._checkpoint.folder import Lineage
from pytorch_accelerated._means import EpochMeans
from pytorch_accelerated._optimizers.modes import OptimizerMode
from pytorch_accelerated._recording.loss_monitor import LossMonitor
from pytorch_accelerated._recording.steps import StepRecorder
from pytorch_accelerated.progress import TrainingProgress

if TYPE_CHECKING:
    import torch

    from pytorch_accelerated._measuring.metric_set import PassMetrics
    from pytorch_accelerated._types import Loader, MaybeNone, RunSettings, StateMapping


class DataPass:
    """One pass over the data: a training epoch, or an evaluation.

    Args:
        stage: What the pass is for.
        loader: Yields its batches.
        is_intermediate: Whether it is an evaluation in the middle of a training epoch.
    """

    def __init__(
        self, stage: Literal["training", "evaluation"], loader: Loader | MaybeNone = None, is_intermediate: bool = False
    ) -> None:
        self.stage = stage
        self.loss_name = "train_loss_epoch"
        """The name under which the mean loss is recorded."""

        self.loader = loader
        self.is_intermediate = is_intermediate
        self.means = EpochMeans()
        """The weighted means of loss and metrics so far, on this rank."""

        self.metrics: PassMetrics | None = None
        """What the metrics of the trainer have gathered; ``None`` if they are not computed in this pass."""

        self.monitor = LossMonitor()
        """Says when a log point is due, and knows the loss as of the last one."""

        self.num_batches_done = 0
        self.max_num_steps: int | None = None
        """Batches after which an evaluation ends early; ``None`` for no limit."""

        self.is_dummy_step = False
        """Whether the batch of the current step is a dummy, which counts for nothing."""

    def sums(self) -> dict[str, tuple[float | torch.Tensor, float | torch.Tensor]]:
        """Return the weighted sum and the total weight of each mean so far on this rank, by plain name."""
        return self.means.plain_sums() | ({} if self.metrics is None else self.metrics.sums())


class TrainingPosition:
    """How far training has come, and what else a training state consists of next to model, optimizer and scheduler.

    It outlives the run that trains: an evaluation shares it with the run before, or with the run that it is nested in.

    Args:
        seed: The seed of the order of the training data.
        num_epochs_completed: Epochs done before.
        window: The accumulation window of the run.
        run_number: Counts the training runs of the trainer from 0; -1 before the first.
    """

    def __init__(
        self,
        seed: int = 0,
        num_epochs_completed: int = 0,
        window: AccumulationWindow | None = None,
        run_number: int = -1,
    ) -> None:
        self.run_number = run_number
        self.seed = seed
        """The seed of the data: it derives from the run's, unless it comes from a training state."""

        self.progress = TrainingProgress(num_epochs_completed=num_epochs_completed)
        self.window = AccumulationWindow() if window is None else window
        self.epoch = DataPass("training")
        """The training epoch under way, or the last one."""

        self.current_pass = self.epoch
        """The pass under way: the training epoch, or an evaluation that suspends it."""

        self.shown_pass = self.epoch
        """The pass under way or, between passes, the last one of the run: the one whose loss `_loss_tracker` shows."""

        self.suspended_passes: list[DataPass] = []
        """The passes that the current one suspends, the outermost first."""

        self.recorder = StepRecorder()
        """Takes the values of steps every few updates."""

        self.optimizer_mode = OptimizerMode()
        """Whether an optimizer that has modes is in training mode."""

        self.lineage = Lineage()
        """Numbers the training states of this training."""

        self.stream_position: StateMapping | None = None
        """Where the streams of training data were when the state was saved that this training was restored from."""

        self.num_scheduler_updates: int | None = None
        """The number of updates that a scheduler of timm knows of; a subclass may set it to count from elsewhere."""

        self._num_updates_counted = 0  # of those in `progress`, for the scheduler

        self.settings: RunSettings = {}
        """What a run that is resumed from here ought to have in common with this one."""

        self.num_metric_values_seen = 0
        """How many values of its metric the scheduler has been stepped with, or has been passed over for."""

        self.early_stop_reason: str | None = None
        """Why a callback stopped the training for good; ``None`` if none did."""

    def start_epoch(self, loader: Loader, num_done: int) -> None:
        """Start a training epoch, or the rest of one of which a resumed run has done some batches before."""
        epoch = DataPass("training", loader)
        epoch.num_batches_done = num_done
        if num_done > 0:
            epoch.means = self.epoch.means
        else:
            self.window.reset()
            self.recorder.start_epoch()
        epoch.means.first_step = num_done
        self.epoch = self.current_pass = self.shown_pass = epoch

    def move_to_epoch(self, epoch: int) -> None:
        """Move to the start of an epoch, counted from 1, unless it is the current one."""
        progress = self.progress
        if progress.num_epochs_completed != epoch - 1:
            progress.num_epochs_completed = epoch - 1
            progress.num_batches_in_epoch = progress.num_evaluations_in_epoch = progress.num_skipped_in_epoch = 0
            progress.phase = "training"
            self.stream_position = None

    def count_scheduler_update(self) -> None:
        """Count the updates since the last one that a scheduler of timm was told of."""
        num_updates = self.progress.num_updates
        self.num_scheduler_updates = (self.num_scheduler_updates or 0) + num_updates - self._num_updates_counted
        self._num_updates_counted = num_updates

    def restart_scheduler_updates(self) -> None:
        """Count the updates for a scheduler of timm from the position in training on."""
        self.num_scheduler_updates = self._num_updates_counted = self.progress.num_updates

    @contextmanager
    def suspended_by(self, evaluation: DataPass, is_nested: bool = False) -> Iterator[None]:
        """Make an evaluation the current pass while the body runs.

        Args:
            evaluation: The pass.
            is_nested: Whether a callback has called for it, so that another pass is shown again afterwards.
        """
        shown = self.shown_pass
        self.suspended_passes.append(self.current_pass)
        self.current_pass = self.shown_pass = evaluation
        try:
            yield
        finally:
            self.current_pass = self.suspended_passes.pop()
            if is_nested:
                self.shown_pass = shown
