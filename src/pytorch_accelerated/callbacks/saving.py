"""Callbacks that save the best model, and training states to resume from."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytorch_accelerated._arguments.lengths import Length
from pytorch_accelerated._arguments.numbers import check_positive_integer, check_positive_number
from pytorch_accelerated._checkpoint.best_model import BestModelFile, describe, place_to_keep
from pytorch_accelerated._checkpoint.files import PathAttribute, local_path, printable
from pytorch_accelerated._checkpoint.folder import Retention, claim_folder, rotate
from pytorch_accelerated._checkpoint.lock import unlock
from pytorch_accelerated._checkpoint.optimizer_state import DifferentPartError
from pytorch_accelerated._checkpoint.portable import check_save_path
from pytorch_accelerated._checkpoint.schema import OF_BEST_MODEL, check_entries, is_count
from pytorch_accelerated._checkpoint.weights import frozen_in, frozen_parameters
from pytorch_accelerated._distributed.collectives import run_on_main
from pytorch_accelerated._hints.arguments import explains_arguments
from pytorch_accelerated._measuring.comparison import BestMetric, ComparisonOfMetric, NewValues, rounded
from pytorch_accelerated._messages import warn
from pytorch_accelerated._proxy import WritableForwarded
from pytorch_accelerated._recording.cadence import Cadence, Timer
from pytorch_accelerated._requests.signals import PREEMPTION_SIGNALS
from pytorch_accelerated._run import Run
from pytorch_accelerated._views import library_of, run_of
from pytorch_accelerated.callbacks._watching import num_values_of, watched_value
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.callbacks.stopping import check_watched_metric, warn_about_direction
from pytorch_accelerated.exceptions import CheckpointError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from torch import nn

    from pytorch_accelerated._types import Batch, BatchOutput, MaybeNone, StateDict, StateMapping
    from pytorch_accelerated.progress import TrainingProgress
    from pytorch_accelerated.trainer import Trainer


class SaveBestModelCallback(TrainerCallback):
    """Saves the model after each epoch in which a metric improves, and loads the best one at the end of the run.

    A metric of intermediate evaluations, such as ``intermediate_eval_loss_epoch``, is compared after each of these.

    Args:
        save_path: File to write the checkpoint to.
        watch_metric: Name of the metric in the run history.
        greater_is_better: Whether larger values are better.
        reset_on_train: Whether each run forgets the best value of earlier runs.
        save_optimizer: Whether the checkpoint includes the optimizer state, and whether it is loaded at the end.
        save_scheduler: Whether the checkpoint includes the scheduler state, and whether it is loaded at the end.
        load_saved_checkpoint: Whether to load the best model at the end of the run. Otherwise the trainer keeps the
            model of the last epoch.
        trainable_only: Whether to leave out the parameters of the model that are frozen, which have to stay so.
    """

    save_path = PathAttribute()

    best_metric = WritableForwarded["float | None"]("_best.value")
    """The best value so far; ``None`` before the first."""

    best_metric_epoch = WritableForwarded["int | None"]("_best.epoch")
    """The epoch of the best value."""

    operator = ComparisonOfMetric()
    """``operator.gt`` if larger values are better, ``operator.lt`` if smaller ones are."""

    @explains_arguments
    def __init__(
        self,
        save_path: str | os.PathLike[str] = "best_model.pt",
        watch_metric: str = "eval_loss_epoch",
        greater_is_better: bool = False,
        reset_on_train: bool = True,
        save_optimizer: bool = True,
        save_scheduler: bool = True,
        load_saved_checkpoint: bool = True,
        *,
        trainable_only: bool = False,
    ) -> None:
        self.save_path = save_path
        self.watch_metric = watch_metric
        self.greater_is_better = greater_is_better
        self.reset_on_train = reset_on_train
        self.save_optimizer = save_optimizer
        self.save_scheduler = save_scheduler
        self.load_saved_checkpoint = load_saved_checkpoint
        self.trainable_only = trainable_only
        self._best = BestMetric()
        self._new_values = NewValues()
        self._has_saved = False
        self._file = BestModelFile()

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check the metric and the path, and forget the best model of an earlier run.

        Raises:
            ValueError: The run will not record the metric.
            CheckpointError: The checkpoint cannot be written to ``save_path``.
            FileNotFoundError: The run is resumed, and the best model that it saved is gone.
        """
        config = trainer.run_config
        check_watched_metric(trainer, self.watch_metric, type(self).__name__)
        warn_about_direction(self.watch_metric, self.greater_is_better, type(self).__name__)
        check_save_path(self.save_path, config.is_local_process_zero, config.num_processes)
        self._new_values.start_run(num_values_of(trainer, self.watch_metric), run_of(trainer).is_resumed)
        if run_of(trainer).is_resumed:
            self._check_saved_model(trainer)
            return
        self._has_saved = False
        self._file.forget()
        if self.reset_on_train:
            self._best.reset()

    def _check_saved_model(self, trainer: Trainer) -> None:
        """Check the file that the resumed run will load at its end, and tell if it is not the one that it saved."""
        if self._has_saved and self.load_saved_checkpoint and not local_path(self.save_path).is_file():
            raise FileNotFoundError(
                f"The run being resumed saved its best model (epoch {self.best_metric_epoch}) to "
                f"{str(self.save_path)!r}, but that file does not exist. Restore it, start from the working directory "
                "of the original run, or pass `load_saved_checkpoint=False`."
            )
        path = local_path(self.save_path)
        if not self._file.start_run(
            path, self._saved_entries() if self._has_saved else None, *_main_of(_run_of(trainer))
        ):
            trainer.print(
                f"{self._describe_other_file()} It stays there until the metric improves, and is then kept as "
                f"{place_to_keep(path).name!r}, unless this run comes to the same model."
            )

    def _saved_entries(self) -> dict[str, object]:
        return {"epoch": self.best_metric_epoch, self.watch_metric: self.best_metric}

    def _describe_other_file(self) -> str:
        path, entries = local_path(self.save_path), self._saved_entries()
        found = describe(path, entries)
        own, other = (", ".join(f"{name} {value}" for name, value in each.items()) for each in (entries, found))
        return (
            f"The file {str(path)!r} is not the best model that this run saved ({own}). "
            f"Another run has saved it, or this one after the state that it was resumed from ({other or 'unknown'})."
        )

    def on_eval_epoch_end(self, trainer: Trainer, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Save the model if the metric is one of this intermediate evaluation and has improved."""
        prefix = trainer.run_history.metric_name_prefix
        if is_intermediate and prefix and self.watch_metric.startswith(prefix):
            self._save_if_best(trainer)

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save the model if the metric has improved."""
        self._save_if_best(trainer)

    def _save_if_best(self, trainer: Trainer) -> None:
        value = watched_value(trainer, self.watch_metric, type(self).__name__)
        if value is None:
            return
        is_new = self._new_values.look(num_values_of(trainer, self.watch_metric))
        if not is_new or not self._best.is_improved_by(value, self.greater_is_better):
            return
        self._save_best(trainer, value)

    def _save_best(self, trainer: Trainer, value: float) -> None:
        epoch = trainer.run_history.current_epoch
        save = partial(self._save, trainer, {self.watch_metric: value, "epoch": epoch})
        kept = self._file.replace(local_path(self.save_path), save, *_main_of(_run_of(trainer)))
        self._best.record(value, epoch)
        self._has_saved = True
        if kept is not None:
            trainer.print(f"The best model that was saved before this run was resumed is kept as {printable(kept)}")

    def _save(self, trainer: Trainer, entries: Mapping[str, float]) -> None:
        self._write(trainer, entries)

    def _write(self, trainer: Trainer, entries: Mapping[str, float]) -> None:
        # An override of the method may take these keywords only, as in 0.1.61.
        options = {} if self.save_scheduler else {"save_scheduler": False}
        if self.trainable_only:
            options["trainable_only"] = True
        trainer.save_checkpoint(
            save_path=self.save_path, checkpoint_kwargs=entries, save_optimizer=self.save_optimizer, **options
        )

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Load the best model, if this run saved one."""
        if "intermediate_" in self.watch_metric and not num_values_of(trainer, self.watch_metric):
            warn(
                f"`{type(self).__name__}` watches {self.watch_metric!r}, which the run has not recorded, so no model "
                "was saved. Pass a smaller interval to `StepBasedEvaluationCallback`.",
            )
        if self._has_saved and self._has_own_file(trainer) and self.load_saved_checkpoint:
            self._load_best(trainer)

    def _has_own_file(self, trainer: Trainer) -> bool:
        """Return whether the file is the one that the run saved; if not, tell what that means."""
        run, path = _run_of(trainer), local_path(self.save_path)
        if self._file.is_own(path, self._saved_entries(), *_main_of(run)):
            return True
        advice = (
            "If it is what you want, load it with `load_checkpoint`. Give each run and callback its own `save_path`."
        )
        if not self.load_saved_checkpoint:
            trainer.print(f"{self._describe_other_file()} {advice}")
        elif _main_of(run)[0]:
            warn(
                f"{self._describe_other_file()} It is not loaded, and the model keeps the weights that it has now. "
                f"{advice}"
            )
        return False

    def _load_best(self, trainer: Trainer) -> None:
        trainer.print(
            f"Loading the best model: {self.watch_metric} {rounded(self.best_metric)} in epoch {self.best_metric_epoch}"
        )
        is_saved = {"load_optimizer": self.save_optimizer, "load_scheduler": self.save_scheduler}
        options = {name: False for name, value in is_saved.items() if not value}
        try:
            entries = trainer.load_checkpoint(self.save_path, **options)
        except DifferentPartError as error:  # the program has changed the optimizer since, for example added a group
            trainer.print(f"Only the model is loaded, because optimizer or scheduler have changed since: {error}")
            entries = trainer.load_checkpoint(self.save_path, load_optimizer=False, load_scheduler=False)
        if self.trainable_only:
            _warn_about_unfrozen(trainer.get_model(), entries)

    def state_dict(self) -> StateDict:
        """Return the best value, its epoch, whether a checkpoint was saved and which, and how many values were seen."""
        return {**self._state_of_best(), **self._new_values.state_dict()}

    def _state_of_best(self) -> StateDict:
        return {**self._best.state_dict(), "has_saved": self._has_saved, **self._file.state_dict()}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        self._load_state_of_best(state_dict)
        self._new_values.load_state_dict(state_dict)

    def _load_state_of_best(self, state_dict: StateMapping) -> None:
        check_entries(state_dict, OF_BEST_MODEL)
        self._best.load_state_dict(state_dict)
        self._has_saved = state_dict["has_saved"]
        self._file.load_state_dict(state_dict)


def _warn_about_unfrozen(model: nn.Module, checkpoint: StateMapping) -> None:
    names = sorted(set(frozen_in(checkpoint)) - set(frozen_parameters(model)))
    if names:
        warn(
            f"The best model was saved with `trainable_only=True`, when these parameters were frozen: "
            f"{', '.join(names)}. They have been unfrozen since, so the file does not have them, and they keep the "
            "values that they have now. Save with `trainable_only=False` in runs that unfreeze parameters.",
        )


class SaveTrainingStateCallback(TrainerCallback):
    """Saves training states, which ``train(..., resume_from="latest")`` resumes from.

    States are folders named ``epoch_<n>``, ``step_<n>`` and ``final`` in ``save_dir``. If Ctrl-C, SIGTERM or SIGUSR1
    ends the run, it saves ``step_<n>`` at the current step, and no ``final``. A line is printed for each state that is
    saved or removed. Only one run at a time can save states to a folder.

    ``epoch_<n>`` is complete before the evaluation of epoch ``n`` begins, so that an evaluation that fails costs no
    training. A run resumed from it starts with that evaluation. With ``keep_best``, which needs its metrics, the state
    is saved after the evaluation.

    Args:
        save_dir: Folder for the states.
        save_every_n_epochs: Epochs between two states; ``None`` to save none after epochs.
        save_every_n_steps: Steps between two states; ``None`` to save none by steps.
        save_at_end: Whether to save ``final`` at the end of a run, unless a signal ended it.
        max_checkpoints: Number of newest states to keep, ``final`` included; ``None`` to keep all. States of earlier
            runs in ``save_dir`` count, and are removed first.
        save_every_n_updates: Updates between two states; ``None`` to save none by updates.
        save_every_n_minutes: Minutes from one state to the next, which is saved at the end of a step; with several
            processes, at the end of a step that made an update. ``None`` to save none by time.
        keep_best: Number of states with the best metric to keep in addition to the newest; ``None`` for none. Requires
            ``max_checkpoints``.
        watch_metric: Name in the run history of the metric for ``keep_best``.
        greater_is_better: Whether larger values of the metric are better.
        on_save_error: What to do if a state cannot be written. ``"raise"`` ends the run with `CheckpointError`;
            ``"warn"`` warns and continues. Earlier states stay valid in both cases.
        save_on_preemption: Whether to save a state when a signal ends the run. SIGTERM and SIGUSR1 then end the run
            gracefully, as Ctrl-C does; see :class:`PreemptionCallback`.
        in_background: Whether training continues while a state is written, once it has been copied to host memory. The
            next save and the end of the run wait for the write to finish. The last state of a run is written
            synchronously.
        save_every: How often a state is saved, as a text: ``"500 updates"``, ``"2 epochs"``, ``"0.25 epochs"``,
            ``"1e6 samples"`` or ``"30 min"``; see :class:`~pytorch_accelerated.utils.Length`. ``None`` for the
            arguments above alone.

    Raises:
        ValueError: A number is below 1, the settings contradict each other, or ``save_every`` is not understood.
        TypeError: A number is not an integer.
    """

    is_called_last = True
    save_dir = PathAttribute()

    @explains_arguments
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
        save_every: str | Length | None = None,
    ) -> None:
        _check_counts(
            save_every_n_epochs=save_every_n_epochs,
            save_every_n_steps=save_every_n_steps,
            save_every_n_updates=save_every_n_updates,
            max_checkpoints=max_checkpoints,
            keep_best=keep_best,
        )
        check_positive_number("save_every_n_minutes", save_every_n_minutes)
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
        self._global_step = self._num_updates = 0
        self._saved: tuple[TrainingProgress, Path] | None = None
        self._written: list[Path] = []
        self._is_delayed = self._is_saved_later = False
        self.save_every = None if save_every is None else Length.parse("save_every", save_every)
        self._cadence = Cadence(self.save_every)
        self._timer = Timer(save_every_n_minutes)

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Lock the folder, start counting steps unless the run is resumed, and listen for signals.

        Raises:
            CheckpointError: The folder cannot be written to, or another run is saving states there.
            ValueError: The run will not record the metric that ``keep_best`` needs.
        """
        run = _run_of(trainer)
        run_on_main(lambda: claim_folder(local_path(self.save_dir), trainer), *_main_of(run))
        if self.keep_best is not None:
            check_watched_metric(trainer, self.watch_metric, type(self).__name__)
            warn_about_direction(self.watch_metric, self.greater_is_better, type(self).__name__)
        if not run.is_resumed:
            self._global_step = 0
        self._num_updates = run.progress.num_updates
        self._timer.restart(self._num_updates)
        self._cadence.start(run)
        self._saved = None
        self._written = []
        self._is_delayed = False
        if self.save_on_preemption and run.is_training_run:
            library_of(trainer).end_run_on_signals(*PREEMPTION_SIGNALS)

    def on_train_step_end(
        self, trainer: Trainer, batch: Batch = None, batch_output: BatchOutput | MaybeNone = None, **kwargs: Any
    ) -> None:
        """Save a state if one is due.

        Sharded training cannot save between the batches of an update, so the save is delayed to the end of the update.
        """
        self._global_step += 1
        run = _run_of(trainer)
        is_due = self._is_due(run) or self._is_delayed
        self._is_delayed = is_due and run.is_sharded and not run.is_between_updates
        if is_due and not self._is_delayed:
            self._save(trainer, f"step_{self._global_step}", in_background=self.in_background)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save a state if one is due, before the evaluation of the epoch."""
        # A loop of the user's may fire the event while the library still takes the epoch to be trained.
        self._is_saved_later = self.keep_best is not None or _is_training(trainer)
        if not self._is_saved_later:
            self._save_epoch(trainer)

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save a state if one is due and has to wait for the evaluation."""
        if self._is_saved_later:
            self._save_epoch(trainer)

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save a state if a signal ends the run, before the end-of-run events change anything."""
        run = _run_of(trainer)
        if not (self.save_on_preemption and run.is_interrupted):
            return
        self._wait(trainer)
        position = run.progress.resume_point()
        if self._saved is None or self._saved[0] != position:
            self._save(trainer, f"step_{self._global_step}")
        if self._saved is not None and self._saved[0] == position:
            trainer.print(f"To resume: train(..., resume_from={str(self._saved[1])!r})")

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save the final state, and unlock the folder."""
        if self.save_at_end and not _run_of(trainer).is_interrupted:
            self._save(trainer, "final")
        self._wait(trainer)
        unlock(local_path(self.save_dir), trainer)

    def on_exception(self, trainer: Trainer, *, exception: BaseException, **kwargs: Any) -> None:
        """Unlock the folder, unless only an evaluation within the run has failed."""
        if not _run_of(trainer).is_nested:
            with suppress(ValueError):  # such a path was refused
                unlock(local_path(self.save_dir), trainer)

    def state_dict(self) -> StateDict:
        """Return the number of steps of the run so far."""
        return {"num_steps": self._global_step}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        check_entries(state_dict, {"num_steps": is_count})
        self._global_step = state_dict["num_steps"]

    def _is_due(self, run: Run) -> bool:
        num_updates, self._num_updates = self._num_updates, run.progress.num_updates
        if self._cadence.is_due(run):
            return True
        if _is_multiple(self._global_step, self.save_every_n_steps):
            return True
        if self._num_updates == num_updates:
            return False
        return _is_multiple(self._num_updates, self.save_every_n_updates) or self._timer.has_expired(
            run, self._num_updates
        )

    def _save_epoch(self, trainer: Trainer) -> None:
        epoch = trainer.run_history.current_epoch
        if _is_multiple(epoch, self.save_every_n_epochs) or self._cadence.is_due_after_epoch(_run_of(trainer)):
            self._save(trainer, f"epoch_{epoch}", in_background=self.in_background)

    def _save(self, trainer: Trainer, name: str, *, in_background: bool = False) -> None:
        """Save a state, then remove the states that it supersedes."""
        self._wait(trainer)
        run, path = _run_of(trainer), self.save_dir / name
        written = local_path(path)
        self._written = [*(other for other in self._written if other != written), written]
        entries = {"global_step": self._global_step}
        finish = partial(self._finish, trainer, path)
        with self._handled_save_error(trainer):
            if in_background:
                trainer.save_training_state(path, entries, in_background=True, and_then=finish)
            else:
                trainer.save_training_state(str(path), checkpoint_kwargs=entries)
                run_on_main(finish, *_main_of(run))
            self._saved = run.progress.resume_point(), path
        self._timer.restart(run.progress.num_updates)
        self._cadence.restart(run)

    def _finish(self, trainer: Trainer, path: Path) -> None:
        """Tell that a state is complete, and remove those that are no longer needed; on the main process only."""
        trainer.print(f"Saved training state to {printable(path)}")
        if self.max_checkpoints is not None:
            best = (self.keep_best or 0, self.watch_metric, self.greater_is_better)
            for removed in rotate(local_path(self.save_dir), Retention(self.max_checkpoints, *best), self._written):
                trainer.print(f"Removed training state {printable(removed)}")

    def _wait(self, trainer: Trainer) -> None:
        if self.in_background:
            with self._handled_save_error(trainer):
                library_of(trainer).wait_for_training_state()

    @contextmanager
    def _handled_save_error(self, trainer: Trainer) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:  # raised on every process, unless it has another kind of error
            if self.on_save_error == "raise" or error.is_of_program:
                raise
            self._saved = None
            if trainer.run_config.is_world_process_zero:
                warn(f"{error} Training continues without this state.")


def _is_training(trainer: Trainer) -> bool:
    run: object = run_of(trainer)
    return isinstance(run, Run) and run.progress.phase == "training"


def _run_of(trainer: Trainer) -> Run:
    """Return the run of the trainer; an empty one for a stand-in that can only save, as programs use in tests."""
    run: object = run_of(trainer)
    return run if isinstance(run, Run) else Run()


def _main_of(run: Run) -> tuple[bool, int]:
    """Return whether this is the main process, and the number of processes."""
    return run.process_index == 0, int(getattr(run.config, "num_processes", 1))


def _check_counts(*, max_checkpoints: int | None, keep_best: int | None, **intervals: int | None) -> None:
    for name, interval in intervals.items():
        if interval is not None:
            check_positive_integer(name, interval, unit=name.rpartition("_")[2])  # `save_every_n_epochs`
    if max_checkpoints is not None:
        check_positive_integer("max_checkpoints", max_checkpoints, "states")
    if keep_best is None:
        return
    check_positive_integer("keep_best", keep_best, "states")
    if max_checkpoints is None:
        raise ValueError(
            f"`keep_best` is {keep_best!r}, but `max_checkpoints` is None, so all states are kept anyway. Pass both, "
            "or neither."
        )


def _is_multiple(number: int, divisor: int | None) -> bool:
    return divisor is not None and number % divisor == 0
