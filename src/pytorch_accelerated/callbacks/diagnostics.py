"""A callback that records the gradient norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytorch_accelerated._hints.arguments import explains_arguments
from pytorch_accelerated._means import LossTracker, weighted_mean
from pytorch_accelerated._run import run_of
from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from pytorch_accelerated._types import StateDict, StateMapping
    from pytorch_accelerated.trainer import Trainer


class GradientNormCallback(TrainerCallback):
    """Records the total gradient norm before clipping, averaged over the updates of each epoch.

    ``train(..., gradient_clip_norm=...)`` computes this norm for clipping, so it costs no second pass over the
    gradients. Pass ``gradient_clip_norm=float("inf")`` to measure the norm without clipping. The norm is read from the
    device only at the end of the epoch.

    Args:
        metric_name: Name of the metric in the run history.
    """

    @explains_arguments
    def __init__(self, metric_name: str = "train_gradient_norm") -> None:
        self.metric_name = metric_name
        self._norms = LossTracker()

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check that the run computes the norm.

        Raises:
            ValueError: The run does not clip by norm.
        """
        if trainer.run_config.gradient_clip_norm is None:
            raise ValueError(
                "`gradient_clip_norm` is None, but `GradientNormCallback` records the norm that `train` clips by. Pass "
                'a bound, or `gradient_clip_norm=float("inf")` to measure the norm without clipping.'
            )
        if not run_of(trainer).is_resumed:
            self._norms.reset()

    def on_optimizer_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Add the norm of this update."""
        norm = run_of(trainer).gradient_norm
        if norm is not None:
            self._norms.update(norm)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Record the mean over the epoch."""
        mean = weighted_mean(self._norms.total_loss, self._norms.running_count)
        trainer.run_history.update_metric(self.metric_name, mean)
        self._norms.reset()

    def state_dict(self) -> StateDict:
        """Return the sum and the number of this epoch's norms so far."""
        return self._norms.state_dict()

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        self._norms.load_state_dict(state_dict)
