"""The position of a training run: its only counters."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pytorch_accelerated._types import StateDict, StateMapping

Phase = Literal["training", "evaluation", "end"]
"""The phase of an epoch: in its training batches, after them, or after its evaluation."""


_ADDED_LATER = (
    "num_evaluations_in_epoch",
    "num_batches_in_earlier_epochs",
    "num_skipped_in_epoch",
)  # missing in states of earlier versions


@dataclass
class TrainingProgress:
    """The position of a training run, from which it can be resumed.

    Args:
        num_epochs_completed: Epochs whose training and evaluation are done.
        num_batches_in_epoch: Batches of the current epoch that this process has finished.
        num_updates: Optimizer updates since the start of the run; all processes together make one update.
        num_samples: Samples that entered an update since the start of the run, over all processes.
        phase: The phase of the current epoch.
        num_evaluations_in_epoch: Evaluation datasets of the current epoch that are done.
        num_batches_in_earlier_epochs: Batches that this process has finished in the completed epochs of the run.
        num_skipped_in_epoch: Batches of the current epoch that all processes have left out of its updates; see
            `Trainer.skip_batch`.

    Example:
        >>> progress = TrainingProgress()
        >>> progress.num_batches_in_epoch += 5
        >>> restored = TrainingProgress()
        >>> restored.load_state_dict(progress.state_dict())
        >>> restored == progress
        True
    """

    num_epochs_completed: int = 0
    num_batches_in_epoch: int = 0
    num_updates: int = 0
    num_samples: int = 0
    phase: Phase = "training"
    num_evaluations_in_epoch: int = 0
    num_batches_in_earlier_epochs: int = 0
    num_skipped_in_epoch: int = 0

    @property
    def num_batches(self) -> int:
        """Batches that this process has finished since the start of the run."""
        return self.num_batches_in_earlier_epochs + self.num_batches_in_epoch

    def is_between_epochs(self) -> bool:
        """Return whether the run is about to start an epoch."""
        return self.phase == "training" and self.num_batches_in_epoch == 0

    def end_epoch(self) -> None:
        """Count the current epoch, and move to the first batch of the next one."""
        self.num_epochs_completed += 1
        self.num_batches_in_earlier_epochs = self.num_batches
        self.num_batches_in_epoch = self.num_evaluations_in_epoch = self.num_skipped_in_epoch = 0
        self.phase = "training"

    def resume_point(self) -> TrainingProgress:
        """Return the position from which a run that stopped here resumes.

        After a finished epoch this is the start of the next one.
        """
        point = replace(self)
        if point.phase == "end":
            point.end_epoch()
        return point

    def state_dict(self) -> StateDict:
        """Return the counters as plain values."""
        return asdict(self)

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: A counter is missing.
        """
        names = [field.name for field in fields(self)]
        missing = [name for name in names if name not in state_dict and name not in _ADDED_LATER]
        if missing:
            raise ValueError(
                f"The progress lacks {missing}. Expected all of {names}. Pass a state that "
                "`TrainingProgress.state_dict` returned."
            )
        for name in names:
            setattr(self, name, state_dict.get(name, 0))
