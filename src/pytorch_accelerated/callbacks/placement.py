"""Callbacks that put modules where, and into the form in which, they are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


class MoveModulesToDeviceCallback(TrainerCallback):
    """Moves modules that are attributes of the trainer, such as a loss with parameters or metrics, to its device.

    The model itself is moved by Accelerate.
    """

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Move them before training."""
        self._move_modules(trainer)

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Move them before evaluation."""
        self._move_modules(trainer)

    def _move_modules(self, trainer: Trainer) -> None:
        for name, value in vars(trainer).items():
            if isinstance(value, nn.Module) and name != "model":
                value.to(trainer.device)


class ConvertSyncBatchNormCallback(TrainerCallback):
    """Turns batch norms into `torch.nn.SyncBatchNorm`, which takes its statistics over all processes.

    It acts at the start of a training run, and does nothing with a single process.
    """

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Convert the batch norms of the model."""
        if trainer.run_config.is_distributed:
            trainer.model = nn.SyncBatchNorm.convert_sync_batchnorm(trainer.model)  # type: ignore[no-untyped-call]
