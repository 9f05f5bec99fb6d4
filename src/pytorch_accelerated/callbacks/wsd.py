"""A callback that saves checkpoints before and after each decay of a warmup-stable-decay schedule."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytorch_accelerated._run import run_of
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.exceptions import SchedulerSettingsError
from pytorch_accelerated.schedulers.wsd_scheduler import WSDLrScheduler

if TYPE_CHECKING:
    from os import PathLike

    from pytorch_accelerated._types import StateDict
    from pytorch_accelerated.trainer import Trainer


class WSDCheckpointCallback(TrainerCallback):
    """Saves a checkpoint just before the learning rate decays, and another one after the decay.

    For each checkpoint of the :class:`~pytorch_accelerated.schedulers.WSDLrScheduler`, at update ``c``, the callback
    writes two files. ``checkpoint_c_pre_decay.pt`` is the last state of the stable phase, from which training can
    continue. ``checkpoint_c_post_decay.pt`` is the model to use. In addition to the model, both contain
    ``checkpoint_step`` (``c``), ``phase`` (``"pre_decay"`` or ``"post_decay"``) and ``num_updates``.

    With ``initial_checkpoint`` the run starts from such a file. It loads the model, the optimizer and the base learning
    rates, but the schedule starts again from 0, for the updates of this run. A run that is resumed with
    ``train(..., resume_from=...)`` does not load the file again.

    Args:
        save_dir: Folder of the checkpoints. It is created if it does not exist.
        save_optimizer: Whether the files contain the optimizer, and whether it is loaded from ``initial_checkpoint``.
        save_scheduler: Whether the files contain the scheduler, and whether it is loaded from ``initial_checkpoint``.
        initial_checkpoint: A checkpoint to continue from, usually a ``..._pre_decay.pt`` file. Use it together with a
            scheduler that has ``is_continuation_from_checkpoint=True``.

    Example:
        >>> from pytorch_accelerated.schedulers import WSDLrScheduler
        >>> callback = WSDCheckpointCallback("river", initial_checkpoint="valley/checkpoint_100_pre_decay.pt")
        >>> create_scheduler_fn = WSDLrScheduler.create_scheduler_fn(is_continuation_from_checkpoint=True)
    """

    def __init__(
        self,
        save_dir: str | PathLike[str] = "checkpoints",
        save_optimizer: bool = True,
        save_scheduler: bool = True,
        initial_checkpoint: str | PathLike[str] | None = None,
    ) -> None:
        self.save_dir = Path(save_dir)
        self.save_optimizer = save_optimizer
        self.save_scheduler = save_scheduler
        self.initial_checkpoint = None if initial_checkpoint is None else Path(initial_checkpoint)
        self._last_seen_step = -1

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check the scheduler, create the folder, and load the initial checkpoint unless the run is resumed.

        Raises:
            SchedulerSettingsError: The scheduler of the run is not a ``WSDLrScheduler``.
            ValueError: The run would overwrite the checkpoint that it starts from.
        """
        scheduler = _get_scheduler(trainer)
        self.save_dir.mkdir(parents=True, exist_ok=True)
        if not run_of(trainer).is_resumed:
            self._last_seen_step = -1
            if self.initial_checkpoint is not None:
                self._check_not_overwritten(self.initial_checkpoint, scheduler)
                self._start_from(self.initial_checkpoint, trainer, scheduler)
        self._save_due_checkpoints(trainer, scheduler, scheduler.get_current_step())

    def on_optimizer_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save the checkpoint that is due after this update, if any."""
        scheduler = _get_scheduler(trainer)
        self._save_due_checkpoints(trainer, scheduler, scheduler.get_current_step())

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save the last checkpoint of a complete run if the schedule has not reached it.

        The schedule falls behind when mixed precision skips updates, which it does not count.
        """
        scheduler = _get_scheduler(trainer)
        if run_of(trainer).progress.num_updates >= scheduler.total_steps:
            self._save_due_checkpoints(trainer, scheduler, scheduler.total_steps)

    def state_dict(self) -> StateDict:
        """Return the schedule position up to which all checkpoints have been saved."""
        return {"last_seen_step": self._last_seen_step}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore what `state_dict` returned."""
        self._last_seen_step = state_dict["last_seen_step"]

    def _start_from(self, checkpoint: Path, trainer: Trainer, scheduler: WSDLrScheduler) -> None:
        trainer.load_checkpoint(checkpoint, load_optimizer=self.save_optimizer, load_scheduler=self.save_scheduler)
        # The loaded position and learning rates belong to the earlier run.
        scheduler.load_state_dict({**scheduler.state_dict(), "num_updates": 0})

    def _save_due_checkpoints(self, trainer: Trainer, scheduler: WSDLrScheduler, step: int) -> None:
        if step <= self._last_seen_step:  # after a resume, or an update that mixed precision skipped
            return
        self._last_seen_step = step
        for decay in scheduler.get_decay_info():
            if step == decay["end_step"]:
                self._save(trainer, decay["end_step"], "post_decay", step)
            elif step == decay["start_step"]:
                self._save(trainer, decay["end_step"], "pre_decay", step)

    def _save(
        self, trainer: Trainer, checkpoint_step: int, phase: Literal["pre_decay", "post_decay"], step: int
    ) -> None:
        trainer.save_checkpoint(
            self._path(checkpoint_step, phase),
            checkpoint_kwargs={"checkpoint_step": checkpoint_step, "phase": phase, "num_updates": step},
            save_optimizer=self.save_optimizer,
            save_scheduler=self.save_scheduler,
        )

    def _path(self, checkpoint_step: int, phase: str) -> Path:
        return self.save_dir / f"checkpoint_{checkpoint_step}_{phase}.pt"

    def _check_not_overwritten(self, checkpoint: Path, scheduler: WSDLrScheduler) -> None:
        for step in scheduler.get_checkpoint_steps():
            for phase in ("pre_decay", "post_decay"):
                if self._path(step, phase).resolve() == checkpoint.resolve():
                    raise ValueError(
                        f"`initial_checkpoint` is {str(checkpoint)!r}, which this run would overwrite with its own "
                        f"checkpoint after {step} updates. Pass a different `save_dir`."
                    )


def _get_scheduler(trainer: Trainer) -> WSDLrScheduler:
    scheduler = trainer.scheduler
    if not isinstance(scheduler, WSDLrScheduler):
        raise SchedulerSettingsError(
            f"The scheduler of this run is {scheduler!r}, but `WSDCheckpointCallback` saves at the checkpoints of a "
            "`WSDLrScheduler`. Pass `create_scheduler_fn=WSDLrScheduler.create_scheduler_fn()` to `train`, or remove "
            "the callback."
        )
    return scheduler
