"""Callbacks that save models and training states."""

from __future__ import annotations

import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytorch_accelerated._checkpoint.folder import Retention, claim_folder, find_newest_state, release_folder, rotate
from pytorch_accelerated._checkpoint.portable import check_save_path
from pytorch_accelerated._checkpoint.state import check_num_processes, open_state
from pytorch_accelerated._distributed.accelerator import is_sharded
from pytorch_accelerated._distributed.collectives import run_on_main
from pytorch_accelerated._metrics import is_better
from pytorch_accelerated._signals import PREEMPTION_SIGNALS
from pytorch_accelerated._validation import check_positive_number
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.callbacks.stopping import check_watched_metric
from pytorch_accelerated.exceptions import CheckpointError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping

    from accelerate import Accelerator

    from pytorch_accelerated._checkpoint.manifest import SavedState
    from pytorch_accelerated.progress import TrainingProgress
    from pytorch_accelerated.run_config import TrainerRunConfig
    from pytorch_accelerated.trainer import Trainer


class SaveBestModelCallback(TrainerCallback):
    """Saves the model after each epoch in which a metric is the best so far, and loads it at the end of the run.

    Args:
        save_path: Where the checkpoint goes.
        watch_metric: Name of the metric in the run history.
        greater_is_better: Whether larger values are better.
        reset_on_train: Whether each run looks for a best model of its own.
        save_optimizer: Whether the state of the optimizer is saved, and loaded, too.
        save_scheduler: Whether the state of the scheduler is saved, and loaded, too.
        load_saved_checkpoint: Whether the trainer has the best model after the run rather than the last one.
    """

    def __init__(
        self,
        save_path: str | os.PathLike[str] = "best_model.pt",
        watch_metric: str = "eval_loss_epoch",
        greater_is_better: bool = False,
        reset_on_train: bool = True,
        save_optimizer: bool = True,
        save_scheduler: bool = True,
        load_saved_checkpoint: bool = True,
    ) -> None:
        self.save_path = save_path
        self.watch_metric = watch_metric
        self.greater_is_better = greater_is_better
        self.reset_on_train = reset_on_train
        self.save_optimizer = save_optimizer
        self.save_scheduler = save_scheduler
        self.load_saved_checkpoint = load_saved_checkpoint
        self.best_metric: float | None = None
        self.best_metric_epoch: int | None = None
        self._has_saved = False

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check the metric's name and the path, and forget the best model of an earlier run.

        Raises:
            ValueError: There will be no such metric.
            CheckpointError: Nothing can be saved there.
        """
        check_watched_metric(trainer, self.watch_metric, type(self).__name__)
        check_save_path(self.save_path, trainer._accelerator)
        if trainer.is_resumed:
            self._check_saved_model()
            return
        self._has_saved = False
        if self.reset_on_train:
            self.best_metric = self.best_metric_epoch = None

    def _check_saved_model(self) -> None:
        if self._has_saved and self.load_saved_checkpoint and not Path(self.save_path).is_file():
            raise FileNotFoundError(
                f"The run that is resumed saved its best model, of epoch {self.best_metric_epoch}, to "
                f"{str(self.save_path)!r}, where there is none now. Put it back, start in the folder the run was "
                "started in, or pass `load_saved_checkpoint=False`."
            )

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save the model if it is the best so far."""
        value = trainer.get_agreed_metric(self.watch_metric)
        if not is_better(value, self.best_metric, self.greater_is_better):
            return
        epoch = trainer.run_history.current_epoch
        trainer.save_checkpoint(
            self.save_path,
            checkpoint_kwargs={self.watch_metric: value, "epoch": epoch},
            save_optimizer=self.save_optimizer,
            save_scheduler=self.save_scheduler,
        )
        self.best_metric = value
        self.best_metric_epoch = epoch
        self._has_saved = True

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Load the best model, if this run saved one."""
        if not (self.load_saved_checkpoint and self._has_saved):
            return
        trainer.print(
            f"Loading the best model: {self.watch_metric} {self.best_metric} in epoch {self.best_metric_epoch}"
        )
        trainer.load_checkpoint(self.save_path, load_optimizer=self.save_optimizer, load_scheduler=self.save_scheduler)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, its epoch, and whether a checkpoint was saved."""
        return {
            "best_metric": self.best_metric,
            "best_metric_epoch": self.best_metric_epoch,
            "has_saved": self._has_saved,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.best_metric = state_dict["best_metric"]
        self.best_metric_epoch = state_dict["best_metric_epoch"]
        self._has_saved = state_dict["has_saved"]


class SaveTrainingStateCallback(TrainerCallback):
    """Saves training states, from which ``train(..., resume_from="latest")`` goes on.

    States are folders ``epoch_<n>``, ``step_<n>`` and ``final`` in ``save_dir``. A run that is ended by Ctrl-C, SIGTERM
    or SIGUSR1 leaves ``step_<n>``, where it stands, and no ``final``.
    While a run lasts, no other run can save states there.

    Args:
        save_dir: Where the states go.
        save_every_n_epochs: Epochs between two states; ``None`` for none.
        save_every_n_steps: Steps between two states; ``None`` for none.
        save_at_end: Whether the end of a run is saved that was not interrupted by a signal.
        max_checkpoints: How many states of epochs and steps are kept, the newest; ``None`` for all. Those of earlier
            runs in ``save_dir`` count, and go first.
        save_every_n_updates: Updates between two states; ``None`` for none.
        save_every_n_minutes: Minutes after a state until the next is saved, at the end of a step; with several
            processes, at the end of one that made an update. ``None`` for none.
        keep_best: How many states are kept beside the newest because their metric is the best; ``None`` for none.
        watch_metric: Name of that metric in the run history.
        greater_is_better: Whether larger values of it are better.
        on_save_error: What happens if a state cannot be written: ``"raise"`` ends the run with `CheckpointError`;
            ``"warn"`` goes on after a warning. The states saved before are intact either way.
        save_on_preemption: Whether a state is saved when a signal ends the run. SIGTERM and SIGUSR1 then end it in good
            order, as Ctrl-C does; see :class:`PreemptionCallback`.
        in_background: Whether the run goes on while a state is written, after it was copied to host memory; the next
            save, and the end of the run, wait for it. The last states of a run are written at once.

    Raises:
        ValueError: A number is below 1, or settings contradict each other.
    """

    is_called_last = True

    def __init__(
        self,
        save_dir: str | os.PathLike[str] = "training_states",
        save_every_n_epochs: int | None = None,
        save_every_n_steps: int | None = None,
        save_at_end: bool = True,
        max_checkpoints: int | None = None,
        *,
        save_every_n_updates: int | None = None,
        save_every_n_minutes: float | None = None,
        keep_best: int | None = None,
        watch_metric: str = "eval_loss_epoch",
        greater_is_better: bool = False,
        on_save_error: Literal["raise", "warn"] = "raise",
        save_on_preemption: bool = True,
        in_background: bool = False,
    ) -> None:
        _check_numbers(
            save_every_n_epochs=save_every_n_epochs,
            save_every_n_steps=save_every_n_steps,
            save_every_n_updates=save_every_n_updates,
            max_checkpoints=max_checkpoints,
            keep_best=keep_best,
        )
        check_positive_number("save_every_n_minutes", save_every_n_minutes)
        if keep_best is not None and max_checkpoints is None:
            raise ValueError("`keep_best` is given without `max_checkpoints`, so all states are kept. Give both.")
        if on_save_error not in ("raise", "warn"):
            raise ValueError(f"`on_save_error` is {on_save_error!r}. Expected 'raise' or 'warn'.")
        self.save_dir = Path(save_dir)
        self.save_every_n_epochs = save_every_n_epochs
        self.save_every_n_steps = save_every_n_steps
        self.save_at_end = save_at_end
        self.max_checkpoints = max_checkpoints
        self.save_every_n_updates = save_every_n_updates
        self.save_every_n_minutes = save_every_n_minutes
        self.keep_best = keep_best
        self.watch_metric = watch_metric
        self.greater_is_better = greater_is_better
        self.on_save_error = on_save_error
        self.save_on_preemption = save_on_preemption
        self.in_background = in_background
        self._num_steps = self._num_updates = 0
        self._saved: tuple[TrainingProgress, Path] | None = None
        self._written: list[Path] = []
        self._is_put_off = False
        self._timer = _Timer(save_every_n_minutes)

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Take the folder, begin to count steps, unless the run goes on from a state, and listen to signals.

        Raises:
            CheckpointError: The folder cannot be written to, or another run saves its states there.
        """
        config = trainer.run_config
        run_on_main(lambda: claim_folder(self.save_dir), config.is_world_process_zero, config.num_processes)
        if self.keep_best is not None:
            check_watched_metric(trainer, self.watch_metric, type(self).__name__)
        if not trainer.is_resumed:
            self._num_steps = 0
        self._num_updates = trainer.progress.num_updates
        self._timer.restart(self._num_updates)
        self._saved = None
        self._written = []
        self._is_put_off = False
        if self.save_on_preemption:
            trainer.end_run_on_signals(*PREEMPTION_SIGNALS)

    def on_train_step_end(self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any) -> None:
        """Save a state if one is due."""
        self._num_steps += 1
        is_due = self._is_due(trainer) or self._is_put_off
        self._is_put_off = is_due and not trainer.is_between_updates and is_sharded(trainer._accelerator)
        if is_due and not self._is_put_off:
            self._save(trainer, f"step_{self._num_steps}", in_background=self.in_background)

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save a state if one is due."""
        epoch = trainer.run_history.current_epoch
        if _is_multiple(epoch, self.save_every_n_epochs):
            self._save(trainer, f"epoch_{epoch}", in_background=self.in_background)

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save a state if a signal ends the run, before other callbacks change anything at its end."""
        if not self.save_on_preemption or trainer.is_interrupted is not True:
            return
        self._wait(trainer)
        position = trainer.progress.resume_point()
        if self._saved is None or self._saved[0] != position:
            self._save(trainer, f"step_{self._num_steps}")
        if self._saved is not None and self._saved[0] == position:
            path = str(self._saved[1])
            trainer.print(f"The run is saved in {path!r}. To go on: train(..., resume_from={path!r})")

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save the end of the run, and let others have the folder."""
        if self.save_at_end and trainer.is_interrupted is not True:
            self._save(trainer, "final")
        self._wait(trainer)
        release_folder(self.save_dir)

    def on_exception(self, trainer: Trainer, *, exception: BaseException, **kwargs: Any) -> None:
        """Let others have the folder."""
        release_folder(self.save_dir)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps."""
        return {"num_steps": self._num_steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._num_steps = state_dict["num_steps"]

    def _is_due(self, trainer: Trainer) -> bool:
        num_updates, self._num_updates = self._num_updates, trainer.progress.num_updates
        if _is_multiple(self._num_steps, self.save_every_n_steps):
            return True
        if self._num_updates == num_updates:
            return False
        return _is_multiple(self._num_updates, self.save_every_n_updates) or self._timer.is_up(
            trainer.run_config, self._num_updates
        )

    def _save(self, trainer: Trainer, name: str, *, in_background: bool = False) -> None:
        """Save a state, and then delete those that it makes superfluous."""
        self._wait(trainer)
        path = self.save_dir / name
        self._written = [*(other for other in self._written if other != path), path]
        config = trainer.run_config
        with self._handled_save_error(trainer):
            if in_background:
                trainer.save_training_state(path, in_background=True, and_then=self._rotate)
            else:
                trainer.save_training_state(str(path))
                run_on_main(self._rotate, config.is_world_process_zero, config.num_processes)
            self._saved = trainer.progress.resume_point(), path
        self._timer.restart(trainer.progress.num_updates)

    def _wait(self, trainer: Trainer) -> None:
        with self._handled_save_error(trainer):
            trainer.wait_for_training_state()

    @contextmanager
    def _handled_save_error(self, trainer: Trainer) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:  # on all processes, if on any
            if self.on_save_error == "raise":
                raise
            self._saved = None
            if trainer.run_config.is_world_process_zero:
                warnings.warn(f"{error} The run goes on without it.", stacklevel=2)

    def _rotate(self) -> None:
        if self.max_checkpoints is not None:
            best = (self.keep_best or 0, self.watch_metric, self.greater_is_better)
            rotate(self.save_dir, Retention(self.max_checkpoints, *best), self._written)


def _check_numbers(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"`{name}` is {number!r}. Expected at least 1, or None.")


def _is_multiple(number: int, divisor: int | None) -> bool:
    return divisor is not None and number % divisor == 0


@dataclass
class _Timer:
    """Tells when some minutes have gone by, at the same update on all processes.

    It is the main process that looks at its clock. To ask it costs an exchange, so they do not ask after each update,
    but when half of those have been made that should fit into what is left of the time.

    Args:
        num_minutes: How many; ``None`` for never.
    """

    num_minutes: float | None
    _start: float = 0.0
    _start_update: int = 0
    _next_look: int = 0

    def restart(self, num_updates: int) -> None:
        """Begin anew, after so many updates."""
        if self.num_minutes is None:
            return
        self._start = time.monotonic()
        self._start_update = num_updates
        self._next_look = num_updates + 1

    def is_up(self, config: TrainerRunConfig, num_updates: int) -> bool:
        """Tell whether the time is up. Must be called on every process after each update."""
        if self.num_minutes is None or num_updates < self._next_look:
            return False
        num_made = num_updates - self._start_update
        num_left = run_on_main(
            lambda: num_made * self._share_left(), config.is_world_process_zero, config.num_processes
        )
        self._next_look = num_updates + (max(1, int(num_left / 2)) if config.is_distributed else 1)
        return num_left <= 0

    def _share_left(self) -> float:
        """Return the time that is left as a multiple of the time that has gone by."""
        elapsed = time.monotonic() - self._start
        return (60 * (self.num_minutes or 0) - elapsed) / max(elapsed, 1e-9)


def find_state_to_resume(
    trainer: Trainer,
    accelerator: Accelerator,
    resume_from: str | os.PathLike[str] | bool | None,
    allow_other_num_processes: bool,
) -> SavedState | None:
    """Return the state that a run is to go on from, which is whole; ``None`` if it starts afresh.

    Must be called on every process.

    Args:
        trainer: The trainer, whose callbacks tell where the newest state is.
        accelerator: The accelerator.
        resume_from: A directory, ``"latest"`` or ``True`` for the newest state, ``None`` or ``False`` for none.
        allow_other_num_processes: Whether another number of processes may have saved it.

    Raises:
        ValueError: The newest state is asked for, and there is not one folder where it could be.
        CheckpointError: The state is damaged or does not fit the number of processes, or another run has the folder.
    """
    if resume_from is None or resume_from is False:
        return None
    if resume_from is not True and resume_from != "latest":  # which `Path("latest")` is not either
        return open_state(resume_from, accelerator, allow_other_num_processes)
    folder = _only_save_dir(trainer.callback_handler.callbacks)
    num_processes = int(accelerator.num_processes)
    saved, passed_over = run_on_main(lambda: _newest_in(folder), accelerator.is_main_process, num_processes)
    for reason in passed_over:
        trainer.print(f"Passed over: {reason}")
    if saved is None:
        trainer.print(f"There is no training state to resume from in {str(folder)!r}: the run starts afresh.")
        return None
    check_num_processes(saved, num_processes, allow_other_num_processes)
    trainer.print(f"Resuming from {str(saved.path)!r}.")
    return saved


def _newest_in(folder: Path) -> tuple[SavedState | None, list[str]]:
    claim_folder(folder)
    passed_over: list[str] = []
    return find_newest_state(folder, passed_over.append), passed_over


def _only_save_dir(callbacks: Iterable[Any]) -> Path:
    folders = {callback.save_dir for callback in callbacks if isinstance(callback, SaveTrainingStateCallback)}
    if len(folders) == 1:
        return folders.pop()
    raise ValueError(
        f"The newest training state is to be resumed from, but there are {len(folders)} folders where it could be: "
        "those of the trainer's `SaveTrainingStateCallback`s. Give it one, with the `save_dir` where they are, or "
        'pass the path of a state as `resume_from` (if it is called "latest", as `Path("latest")`).'
    )
