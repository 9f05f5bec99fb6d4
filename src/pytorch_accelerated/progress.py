"""How far a training run has come: the only counters there are."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

Phase = Literal["training", "evaluation", "end"]
"""Where in an epoch a run stands: among its batches, after them, or after its evaluation."""


_ADDED_LATER = ("num_evaluations_in_epoch",)  # states that were saved before do not have them


@dataclass
class TrainingProgress:
    """The position of a training run, enough to go on from it.

    Args:
        num_epochs_completed: Epochs whose training and evaluation are done.
        num_batches_in_epoch: Batches of the current epoch that this process has finished.
        num_updates: Optimizer steps since the start of the run; all processes together make one update.
        num_samples: Samples that entered an update since the start of the run, over all processes.
        phase: Where in the current epoch the run stands.
        num_evaluations_in_epoch: Evaluation datasets that the current epoch is through with.

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

    def is_between_epochs(self) -> bool:
        """Tell whether the next thing to do is the first batch of an epoch."""
        return self.phase == "training" and self.num_batches_in_epoch == 0

    def end_epoch(self) -> None:
        """Count the current epoch and stand before the first batch of the next."""
        self.num_epochs_completed += 1
        self.num_batches_in_epoch = self.num_evaluations_in_epoch = 0
        self.phase = "training"

    def resume_point(self) -> TrainingProgress:
        """Return where a run goes on that stopped here: after a finished epoch, before the next."""
        point = replace(self)
        if point.phase == "end":
            point.end_epoch()
        return point

    def state_dict(self) -> dict[str, Any]:
        """Return the counters as plain values."""
        return asdict(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: A counter is missing.
        """
        names = [field.name for field in fields(self)]
        missing = [name for name in names if name not in state_dict and name not in _ADDED_LATER]
        if missing:
            raise ValueError(
                f"This progress lacks {missing}; expected all of {names}. It was not written by `TrainingProgress`."
            )
        for name in names:
            setattr(self, name, state_dict.get(name, 0))
