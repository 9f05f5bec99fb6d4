"""A callback that saves training before and after each decay of a warmup-stable-decay schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_accelerated._checkpoint.files import PathAttribute, local_path
from pytorch_accelerated._checkpoint.manifest import read_manifest
from pytorch_accelerated._checkpoint.resume import entries_of
from pytorch_accelerated._hints.arguments import explains_arguments
from pytorch_accelerated._messages import warn
from pytorch_accelerated._run import Run
from pytorch_accelerated._views import run_of
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.callbacks.handler import CallbackHandler
from pytorch_accelerated.exceptions import SchedulerSettingsError
from pytorch_accelerated.schedulers.scheduler_base import StatefulSchedulerBase
from pytorch_accelerated.tracking import InMemoryRunHistory

if TYPE_CHECKING:
    from os import PathLike

    from pytorch_accelerated._types import Batch, BatchOutput, StateDict, StateMapping
    from pytorch_accelerated.schedulers.wsd_scheduler import DecayInfo
    from pytorch_accelerated.trainer import Trainer


class WSDCheckpointCallback(TrainerCallback):
    """Saves training just before the learning rate decays, and the model after the decay.

    For a decay from update ``s`` to the checkpoint ``c`` of a :class:`~pytorch_accelerated.schedulers.WSDLrScheduler`,
    the callback writes the folder ``checkpoint_<s>_wsd_pre_decay``, a training state of the stable phase from which
    training can continue, and the file ``checkpoint_<c>_wsd_post_decay.pt``, a checkpoint with the model to use. In
    addition, both contain ``step`` (the number of updates done), ``checkpoint_type`` (``"wsd_pre_decay"`` or
    ``"wsd_post_decay"``), ``total_steps`` (the updates of the run), ``decay_fraction`` and ``timestamp``.

    With ``initial_checkpoint`` a run starts from such a folder or file. It loads the model, the optimizer, and from the
    scheduler what a continuation takes over, but counts epochs and updates from 0, with a history of its own. A run
    that is resumed with ``train(..., resume_from=...)`` does not load it again. List the callback before others that
    look at the model when a run starts, such as `ModelEmaCallback`.

    Any scheduler will do that has the methods ``get_checkpoint_steps``, ``get_decay_info``, ``get_phase_info`` and
    ``get_current_step``, and the attribute ``decay_phase_ratio``, with the meaning they have in ``WSDLrScheduler``. One
    that does not derive from `StatefulSchedulerBase` returns from ``get_current_step`` the number of its steps less 1.

    Args:
        save_dir: Folder of the checkpoints. It is created at once.
        save_optimizer: Whether the files contain the optimizer.
        save_scheduler: Whether the files contain the scheduler.
        initial_checkpoint: A training state or a checkpoint to continue from, usually a folder ``..._wsd_pre_decay``.
            Use it together with a scheduler that has ``is_continuation_from_checkpoint=True``.

    Attributes:
        last_checkpoint_step: Updates done at the last save, or at that of the initial checkpoint; ``None`` before.
            After this number of updates nothing is saved again.
        checkpoint_steps: Updates done at each checkpoint; ``None`` before a run.
        decay_info: What ``get_decay_info`` of the scheduler returned; ``None`` before a run.
        decay_fraction: The ``decay_phase_ratio`` of the scheduler; ``None`` before a run.

    Example:
        >>> import tempfile
        >>> from pytorch_accelerated.schedulers import WSDLrScheduler
        >>> callback = WSDCheckpointCallback(tempfile.mkdtemp(), initial_checkpoint="run/checkpoint_90_wsd_pre_decay")
        >>> create_scheduler_fn = WSDLrScheduler.create_scheduler_fn(is_continuation_from_checkpoint=True)
    """

    save_dir = PathAttribute()
    initial_checkpoint = PathAttribute()

    @explains_arguments
    def __init__(
        self,
        save_dir: str | PathLike[str] = "checkpoints",
        save_optimizer: bool = True,
        save_scheduler: bool = True,
        initial_checkpoint: str | PathLike[str] | None = None,
    ) -> None:
        self.save_dir = Path(save_dir)
        local_path(self.save_dir).mkdir(parents=True, exist_ok=True)
        self.save_optimizer = save_optimizer
        self.save_scheduler = save_scheduler
        self.initial_checkpoint = None if initial_checkpoint is None else Path(initial_checkpoint)
        self.last_checkpoint_step: int | None = None
        self.checkpoint_steps: set[int] | None = None
        self.decay_info: list[DecayInfo] | None = None
        self.decay_fraction: float | None = None
        self._last_saved_step: int | None = None

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check the scheduler, and load the initial checkpoint unless the run is resumed.

        Raises:
            SchedulerSettingsError: The scheduler of the run has no checkpoints.
            FileNotFoundError: There is no such initial checkpoint.
        """
        scheduler = _get_scheduler(trainer)
        is_resumed = getattr(run_of(trainer), "is_resumed", False) is True
        if not is_resumed:
            self._forget_earlier_run()
            if self.initial_checkpoint is not None:
                self._start_from(self.initial_checkpoint, trainer)
        self.checkpoint_steps = set(scheduler.get_checkpoint_steps())
        self.decay_info = scheduler.get_decay_info()
        self.decay_fraction = scheduler.decay_phase_ratio
        self._warn_if_overwritten()
        if is_resumed:  # the state may have been saved just before the checkpoint that was due
            self._save_due_checkpoints(trainer, _num_updates_done(scheduler))

    def on_train_step_end(
        self, trainer: Trainer, batch: Batch = None, batch_output: BatchOutput | None = None, **kwargs: Any
    ) -> None:
        """Save what is due after this update, if anything."""
        self._save_due_checkpoints(trainer, _num_updates_done(trainer.scheduler))

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save the last checkpoint of a complete run if the schedule has not reached it.

        The schedule falls behind when mixed precision skips updates, which it does not count.
        """
        step = _num_updates_done(trainer.scheduler)
        last_step = max(self.checkpoint_steps or {step})
        run: object = run_of(trainer)  # a test double of the trainer has none
        is_complete = isinstance(run, Run) and run.progress.num_updates >= last_step
        self._save_due_checkpoints(trainer, last_step if is_complete else step)

    def state_dict(self) -> StateDict:
        """Return after how many updates training was saved last."""
        return {"last_checkpoint_step": self.last_checkpoint_step}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        # The first versions recorded the last update at which they looked whether anything was due.
        step = state_dict.get("last_checkpoint_step", state_dict.get("last_seen_step"))
        self.last_checkpoint_step = self._last_saved_step = step

    def _forget_earlier_run(self) -> None:
        if self.last_checkpoint_step == self._last_saved_step:  # otherwise the user has set it
            self.last_checkpoint_step = None
        self._last_saved_step = None

    # --- the initial checkpoint ----------------------------------------------------------------------------------

    def _start_from(self, checkpoint: Path, trainer: Trainer) -> None:
        is_state = checkpoint.is_dir()
        trainer.print(f"Starting from the {_kind(is_state)} {str(checkpoint)!r}.")
        if is_state:
            contents = entries_of(_load_without_position(trainer, checkpoint), "load_training_state")
        else:
            contents = entries_of(trainer.load_checkpoint(checkpoint), "load_checkpoint")
        if isinstance(trainer.scheduler, StatefulSchedulerBase):
            trainer.scheduler.num_updates = -1  # the loaded position belongs to the earlier run
            trainer.scheduler.step()
        self.last_checkpoint_step = contents.get("step")
        if "step" in contents:  # otherwise it is a checkpoint of another origin
            trainer.print(f"Loaded the {_kind(is_state)} ({contents['checkpoint_type']}) of update {contents['step']}.")

    def _warn_if_overwritten(self) -> None:
        for step in self.checkpoint_steps or ():
            if self._is_initial_checkpoint(self._post_decay_path(step)):
                warn(
                    f"`initial_checkpoint` is {str(self.initial_checkpoint)!r}, which this run overwrites with its own "
                    f"checkpoint after {step} updates. Pass a different `save_dir` to keep it."
                )

    def _is_initial_checkpoint(self, path: Path) -> bool:
        return self.initial_checkpoint is not None and path.resolve() == self.initial_checkpoint.resolve()

    # --- saving --------------------------------------------------------------------------------------------------

    def _save_due_checkpoints(self, trainer: Trainer, step: int) -> None:
        if step == self.last_checkpoint_step or step <= 0:
            return
        scheduler = _get_scheduler(trainer)
        period = scheduler.get_phase_info(step)
        is_post_decay = step == period["period_end"]
        if is_post_decay:  # the next period may have no stable phase
            period = scheduler.get_phase_info(step + 1)
        is_pre_decay = step == period["pre_decay_step"] < period["period_end"]
        if not (is_pre_decay or is_post_decay):
            return
        self.last_checkpoint_step = self._last_saved_step = step
        if is_pre_decay:
            self._save_state(trainer, step)
        if is_post_decay:
            self._save_checkpoint(trainer, step)

    def _save_state(self, trainer: Trainer, step: int) -> None:
        trainer.print(f"The learning rate decays from update {step} on.")
        path = self.save_dir / f"checkpoint_{step}_wsd_pre_decay"
        if self._is_initial_checkpoint(path):
            trainer.print(f"Not saved: the run started from {str(path)!r}, which is kept.")
            return
        trainer.save_training_state(str(path), checkpoint_kwargs=self._extras(trainer, step, "wsd_pre_decay"))
        trainer.print(f"Saved the training state before the decay, at update {step}: {str(path)!r}")

    def _save_checkpoint(self, trainer: Trainer, step: int) -> None:
        path = self._post_decay_path(step)
        trainer.save_checkpoint(
            path,
            checkpoint_kwargs=self._extras(trainer, step, "wsd_post_decay"),
            save_optimizer=self.save_optimizer,
            save_scheduler=self.save_scheduler,
        )
        trainer.print(f"Saved the checkpoint after the decay, at update {step}: {str(path)!r}")

    def _post_decay_path(self, step: int) -> Path:
        return Path(self.save_dir, f"checkpoint_{step}_wsd_post_decay.pt")

    def _extras(self, trainer: Trainer, step: int, checkpoint_type: str) -> StateDict:
        return {
            "step": step,
            "checkpoint_type": checkpoint_type,
            "total_steps": trainer.run_config.max_num_train_steps,
            "decay_fraction": self.decay_fraction,
            "timestamp": datetime.now().isoformat(),
        }


def _kind(is_state: bool) -> str:
    return "training state" if is_state else "checkpoint"


def _get_scheduler(trainer: Trainer) -> Any:
    """Return the scheduler. Open: any class that has the methods will do."""
    scheduler = trainer.scheduler
    if not hasattr(scheduler, "get_checkpoint_steps"):
        raise SchedulerSettingsError(
            f"The scheduler of this run is {scheduler!r}, but `WSDCheckpointCallback` saves at the checkpoints of a "
            "`WSDLrScheduler`, or another scheduler with a method `get_checkpoint_steps`. Pass "
            "`create_scheduler_fn=WSDLrScheduler.create_scheduler_fn()` to `train`, or remove the callback."
        )
    return scheduler


def _num_updates_done(scheduler: Any) -> int:
    """Return the number of updates done. The trainer steps our schedulers once when it creates them, and no others."""
    step: int = scheduler.get_current_step()
    return step if isinstance(scheduler, StatefulSchedulerBase) else step + 1


def _load_without_position(trainer: Trainer, path: Path) -> StateMapping:
    """Load model, optimizer and scheduler from the training state of an earlier run, but not how far that had come."""
    with _position_kept(trainer) as run:
        is_other_world = run is not None and read_manifest(path).num_processes != run.config.num_processes
        options = {"allow_other_num_processes": True} if is_other_world else {}
        return trainer.load_training_state(str(path), **options)


@contextmanager
def _position_kept(trainer: Trainer) -> Iterator[Run | None]:
    """While the body runs, let the run, its history and its callbacks be those of somebody else.

    Yields:
        The run; ``None`` if the trainer is a test double without one.
    """
    run: object = run_of(trainer)
    if not isinstance(run, Run):
        yield None
        return
    callback_handler, run_history = trainer.callback_handler, trainer.run_history
    trainer.callback_handler, trainer.run_history = CallbackHandler([]), InMemoryRunHistory()
    try:
        with run.keeping_position():
            yield run
    finally:
        trainer.callback_handler, trainer.run_history = callback_handler, run_history
    trainer.model.zero_grad()  # the state may contain the gradients of an update that it had not finished
