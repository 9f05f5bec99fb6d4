"""Callbacks that move modules to the device, or convert them for distributed training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


class MoveModulesToDeviceCallback(TrainerCallback):
    """Moves modules that are attributes of the trainer to its device, such as a loss with parameters, or metrics.

    Accelerate moves the model itself.
    """

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Move the modules before training."""
        self._move_modules(trainer)

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Move the modules before evaluation."""
        self._move_modules(trainer)

    def _move_modules(self, trainer: Trainer) -> None:
        for name, value in vars(trainer).items():
            if isinstance(value, nn.Module) and name != "model":
                value.to(trainer.device)


class ConvertSyncBatchNormCallback(TrainerCallback):
    """Converts batch norms to `torch.nn.SyncBatchNorm`, which computes its statistics over all processes.

    The conversion happens at the start of a training run. With a single process, this is a no-op.
    """

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Convert the batch norms of the model."""
        if trainer.run_config.is_distributed:
            trainer.model = nn.SyncBatchNorm.convert_sync_batchnorm(trainer.model)  # type: ignore[no-untyped-call]
