"""Callbacks that save models and training states."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_accelerated._stopping import PREEMPTION_SIGNALS, is_better
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.callbacks.stopping import check_watched_metric

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from pytorch_accelerated.progress import TrainingProgress
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
        """Check the metric's name, and forget the best model of an earlier run."""
        check_watched_metric(trainer, self.watch_metric, type(self).__name__)
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
    """Saves training states, from which ``train(..., resume_from=...)`` goes on.

    States are folders ``epoch_<n>``, ``step_<n>`` and ``final`` in ``save_dir``. A run that is ended by Ctrl-C, SIGTERM
    or SIGUSR1 leaves ``step_<n>``, where it stands, and no ``final``.

    Args:
        save_dir: Where the states go.
        save_every_n_epochs: Epochs between two states; ``None`` for none.
        save_every_n_steps: Steps between two states; ``None`` for none.
        save_at_end: Whether the end of a run is saved that was not interrupted by a signal.
        max_checkpoints: How many states of epochs and steps are kept, the newest; ``None`` for all.
        save_on_preemption: Whether a state is saved when a signal ends the run. SIGTERM and SIGUSR1 then end it in good
            order, as Ctrl-C does; see :class:`PreemptionCallback`.

    Raises:
        ValueError: A number is below 1.
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
        save_on_preemption: bool = True,
    ) -> None:
        numbers = {
            "save_every_n_epochs": save_every_n_epochs,
            "save_every_n_steps": save_every_n_steps,
            "max_checkpoints": max_checkpoints,
        }
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise ValueError(f"`{name}` is {number!r}. Expected at least 1, or None.")
        self.save_dir = Path(save_dir)
        self.save_every_n_epochs = save_every_n_epochs
        self.save_every_n_steps = save_every_n_steps
        self.save_at_end = save_at_end
        self.max_checkpoints = max_checkpoints
        self.save_on_preemption = save_on_preemption
        self._num_steps = 0
        self._saved: list[str] = []
        self._saved_at: TrainingProgress | None = None

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Begin to count steps, unless the run goes on from a state, and listen to signals."""
        self._saved_at = None
        if not trainer.is_resumed:
            self._num_steps = 0
            self._saved = []
        if self.save_on_preemption:
            trainer.end_run_on_signals(*PREEMPTION_SIGNALS)

    def on_train_step_end(self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any) -> None:
        """Save a state if one is due."""
        self._num_steps += 1
        if self.save_every_n_steps is not None and self._num_steps % self.save_every_n_steps == 0:
            self._save_and_rotate(trainer, f"step_{self._num_steps}")

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save a state if one is due."""
        epoch = trainer.run_history.current_epoch
        if self.save_every_n_epochs is not None and epoch % self.save_every_n_epochs == 0:
            self._save_and_rotate(trainer, f"epoch_{epoch}")

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save a state if a signal ends the run, before other callbacks change anything at its end."""
        if not (self.save_on_preemption and trainer.is_interrupted):
            return
        if self._saved_at != trainer.progress.resume_point():
            self._save_and_rotate(trainer, f"step_{self._num_steps}")
        path = str(self.save_dir / self._saved[-1])
        trainer.print(f"The run is saved in {path!r}. To go on: train(..., resume_from={path!r})")

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save the end of the run."""
        if self.save_at_end and not trainer.is_interrupted:
            trainer.save_training_state(str(self.save_dir / "final"))

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps and the names of the states that are kept."""
        return {"num_steps": self._num_steps, "saved": list(self._saved)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._num_steps = state_dict["num_steps"]
        self._saved = list(state_dict["saved"])

    def _save_and_rotate(self, trainer: Trainer, name: str) -> None:
        superseded = self._superseded(name)
        self._saved = [*(kept for kept in self._saved if kept != name), name]
        trainer.save_training_state(str(self.save_dir / name))
        self._saved_at = trainer.progress.resume_point()
        if trainer.run_config.is_world_process_zero:
            for old in superseded:
                shutil.rmtree(str(self.save_dir / old), ignore_errors=True)
        self._saved = [kept for kept in self._saved if kept not in superseded]

    def _superseded(self, name: str) -> list[str]:
        if self.max_checkpoints is None:
            return []
        others = [kept for kept in self._saved if kept != name]
        return others[: max(0, len(others) + 1 - self.max_checkpoints)]
