"""Callbacks that send what a run records to an experiment tracker, such as TensorBoard."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytorch_accelerated._arguments.lengths import interval_within_epochs
from pytorch_accelerated._arguments.numbers import check_positive_integer
from pytorch_accelerated._distributed.trackers import check_tracker, open_tracker, store_hyperparameters
from pytorch_accelerated._hints.arguments import explains_arguments
from pytorch_accelerated._history.records import Moment, num_recorded, records_since
from pytorch_accelerated._measuring.comparison import one_number
from pytorch_accelerated._messages import warn
from pytorch_accelerated._recording.run_info import Plain, flattened, run_info_of
from pytorch_accelerated._views import run_of
from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    import os

    from pytorch_accelerated._arguments.lengths import Length
    from pytorch_accelerated._types import MaybeNone, StateDict, StateMapping
    from pytorch_accelerated.trainer import Trainer


class TrackerCallback(TrainerCallback):
    """Sends what a run records to one of Accelerate's experiment trackers.

    Whatever is recorded in the run history is sent with the number of updates as step, when the training or the
    evaluation of an epoch ends. In between, every few updates, so are the means of loss and metrics since then
    (``train_loss_step``), the learning rate, the gradient norm if the run clips by it, and ``epoch`` and ``samples``.
    If the run history, or another tracker, records them more often, they are sent as often. When a run starts, so are
    its hyper-parameters: the run configuration, the groups of the optimizer, versions with the Git commit, and
    ``hyperparameters``. Only the main process sends anything.

    A run that is resumed from a training state continues in the tracker. With TensorBoard, MLflow and Weights & Biases
    (online), which have a callback of their own, it does so without doubles; other trackers may show twice what was
    sent between the state and the interruption.

    Args:
        tracker: Its name: ``"aim"``, ``"clearml"``, ``"comet_ml"``, ``"dvclive"``, ``"mlflow"``, ``"swanlab"``,
            ``"tensorboard"``, ``"trackio"`` or ``"wandb"``. Or an `accelerate.tracking.GeneralTracker` of your own.
        project: The name of the project or experiment.
        logging_dir: Where a tracker puts its files, if it writes files; ``None`` for ``runs`` where one is needed.
        every_n_updates: Updates between what is sent within an epoch; ``None`` for nothing. Only then are values read
            from the device.
        hyperparameters: Further hyper-parameters, by name: a mapping, or an object with attributes such as an
            `argparse.Namespace`.
        options: Further arguments for the tracker.
        on_error: ``"warn"`` if training shall continue when the tracker fails, with one warning; or ``"raise"``.
        log_every: How often to send within an epoch, instead of ``every_n_updates``, as a text: ``"0.1 epochs"``,
            ``"30 s"``; see :class:`~pytorch_accelerated.utils.Length`.

    Raises:
        ValueError: There is no tracker of this name, or another argument has an invalid value.
        ModuleNotFoundError: The package of the tracker is not installed.

    Example::

        Trainer(..., callbacks=[*get_default_callbacks(), TrackerCallback("trackio", "digits")])
    """

    is_called_last = True

    _resends_newest = False
    """Whether a resumed run sends again what was sent after the last update before the state."""

    @explains_arguments
    def __init__(
        self,
        tracker: Any,
        project: str = "training",
        *,
        logging_dir: str | os.PathLike[str] | None = None,
        every_n_updates: int | None = 50,
        hyperparameters: object = None,
        options: Mapping[str, Any] | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        log_every: str | Length | None = None,
    ) -> None:
        if every_n_updates is not None:
            check_positive_integer("every_n_updates", every_n_updates, "updates")
        if on_error not in ("warn", "raise"):
            raise ValueError(f"`on_error` is {on_error!r}. Expected 'warn' or 'raise'.")
        if isinstance(tracker, str):
            check_tracker(tracker)
        self.tracker = tracker
        self.project = project
        self.logging_dir = None if logging_dir is None else Path(logging_dir).expanduser().absolute()
        self.hyperparameters = hyperparameters
        self.options = dict(options or {})
        self.on_error = on_error
        self.run_id: str | None = None
        """What the tracker calls the run, if it can be continued by it."""

        self._open_tracker: Any = None
        self._has_failed = False
        self._num_sent: dict[str, int] = {}
        self._newest: tuple[int, dict[str, float]] = (-1, {})
        """The last update after which something was sent, and all that was."""

        self.every_n_updates = every_n_updates
        self.log_every = interval_within_epochs("log_every", log_every, "values are sent")

    @property
    def writer(self) -> Any:
        """The tracker's own object, to send what is not a number, such as images.

        For TensorBoard it is a `torch.utils.tensorboard.SummaryWriter`, for MLflow and Weights & Biases the run.
        ``None`` before the first run, if the tracker could not be opened, and on all processes but the main one. The
        tracker is opened in ``on_training_run_start``, after all callbacks that are not called last.
        """
        return None if self._open_tracker is None else self._open_tracker.tracker

    def close(self) -> None:
        """Tell the tracker that the run is complete. Without this, it learns it when the next run starts, or at exit.

        What `Trainer.evaluate` records after training belongs to the same run.
        """
        if self._open_tracker is not None:
            with self._tolerating_errors():
                self._open_tracker.finish()
            self._open_tracker = None

    # --- events --------------------------------------------------------------------------------------------------

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Open the tracker, and send the hyper-parameters. A resumed run continues where it was."""
        run = run_of(trainer)
        update = run.training.progress.num_updates
        run.record_steps_every(self.log_every or self.every_n_updates)
        if not run.is_resumed:
            self._newest, self._num_sent, self.run_id = (-1, {}), {}, None
            if not run.has_reset_history:
                self._num_sent = num_recorded(trainer.run_history)
        if not run.config.is_world_process_zero:
            return
        self.close()
        with self._tolerating_errors():
            self._open_tracker = self._open(update if run.is_resumed else None)
            if not run.is_resumed:
                store_hyperparameters(self._open_tracker, self._hyperparameters_of(trainer))
            elif self._resends_newest and self._newest[0] == update:
                self._open_tracker.log(self._newest[1], step=update)

    def on_step_values(self, trainer: Trainer, *, row: Mapping[str, float] | MaybeNone = None, **kwargs: Any) -> None:
        """Send them, unless it is another tracker that wants them."""
        if self.log_every is not None or self.every_n_updates is not None:
            values = dict(row)
            epoch, update, samples, _ = (int(values.pop(name)) for name in Moment._fields)
            self._send(trainer, Moment(epoch, update, samples), values)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Send what was recorded since the last time, as in each of the events below."""
        self._send_new_records(trainer)

    on_eval_epoch_end = on_training_run_epoch_end = on_training_run_end = on_evaluation_run_end = on_train_epoch_end
    on_training_state_save = on_train_epoch_end  # a callback may save before this one is called

    # --- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """Return which run it is for the tracker, and what was sent."""
        return {
            "run_id": self.run_id,
            "num_sent": dict(self._num_sent),
            "newest": [self._newest[0], dict(self._newest[1])],
        }

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        self.run_id = state_dict["run_id"]
        self._num_sent = dict(state_dict["num_sent"])
        update, values = state_dict["newest"]
        self._newest = update, dict(values)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open_tracker": None}  # a copy opens its own

    # --- the tracker ---------------------------------------------------------------------------------------------

    def _open(self, update: int | None) -> Any:
        """Open the tracker, and set `run_id` if the run can be continued by it.

        Args:
            update: The number of updates after which a resumed run continues; ``None`` for a new run.
        """
        if not isinstance(self.tracker, str):
            return self.tracker
        return self._open_with(self.project, self.logging_dir)

    def _open_with(self, project: str, logging_dir: Path | None, **options: Any) -> Any:
        folder = None if logging_dir is None else str(logging_dir)
        return open_tracker(self.tracker, project, folder, {**self.options, **options})

    def _hyperparameters_of(self, trainer: Trainer) -> dict[str, Plain]:
        further = self.hyperparameters
        named = further if isinstance(further, Mapping) else {} if further is None else vars(further)
        config = run_of(trainer).config
        info = run_info_of(config, trainer.get_model(), trainer.optimizer, trainer.scheduler)
        return {**info["settings"], **flattened({"versions": info["versions"], "code": info["code"] or "", **named})}

    def _was_sent(self, name: str, update: int) -> bool:
        """Return whether the tracker has a value that a resumed run records again."""
        return False

    def _send_new_records(self, trainer: Trainer) -> None:
        run, progress = run_of(trainer), run_of(trainer).training.progress
        if not run.config.is_world_process_zero:
            return
        now = Moment(trainer.run_history.current_epoch, progress.num_updates, progress.num_samples)
        by_moment: dict[Moment, dict[str, float]] = {}
        for name, value, moment, _ in records_since(trainer.run_history, self._num_sent):
            number = one_number(value)
            if number is not None:
                known = now if moment.update is None else moment._replace(time=None)
                by_moment.setdefault(known, {})[name] = float(number)
        self._num_sent = num_recorded(trainer.run_history)
        for moment, values in by_moment.items():
            self._send(trainer, moment, values)

    def _send(self, trainer: Trainer, moment: Moment, values: dict[str, float]) -> None:
        if not run_of(trainer).config.is_world_process_zero or self._open_tracker is None:
            return
        update = moment.update or 0
        if self._newest[0] != update:
            self._newest = update, {}
            values |= {"epoch": moment.epoch or 0, "samples": moment.samples or 0}
        values = {name: value for name, value in values.items() if not self._was_sent(name, update)}
        self._newest[1].update(values)
        if values:
            with self._tolerating_errors():
                self._open_tracker.log(values, step=update)

    @contextmanager
    def _tolerating_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self.on_error == "raise":
                raise
            if not self._has_failed:
                self._has_failed = True
                warn(
                    f"`{type(self).__name__}` has failed ({type(error).__name__}: {error}), and training continues. "
                    "Further failures are not reported. Pass `on_error='raise'` to end the run instead."
                )


class TensorBoardCallback(TrackerCallback):
    """Writes what a run records to event files of TensorBoard; see `TrackerCallback`.

    A run that starts from scratch gets a folder of its own: if ``log_dir`` has event files, those of another run, its
    name gets a number. `writer` is the `torch.utils.tensorboard.SummaryWriter`, for images, histograms and whatever
    else it draws.

    Args:
        log_dir: The folder of the event files.
        every_n_updates: Updates between what is written within an epoch; ``None`` for nothing.
        hyperparameters: Further hyper-parameters: a mapping, or an object such as an `argparse.Namespace`.
        options: Further arguments for the ``SummaryWriter``.
        on_error: ``"warn"`` if training shall continue when writing fails, with one warning; or ``"raise"``.
        log_every: How often within an epoch, instead of ``every_n_updates``, as a text such as ``"30 s"``.

    Raises:
        ModuleNotFoundError: ``tensorboard`` is not installed; it comes with the extra ``trackers``.

    Example::

        Trainer(..., callbacks=[*get_default_callbacks(), TensorBoardCallback("runs/digits")])
    """

    _resends_newest = True  # TensorBoard hides all that has the step at which a run continues, or a later one

    @explains_arguments
    def __init__(
        self,
        log_dir: str | os.PathLike[str] = "runs/training",
        *,
        every_n_updates: int | None = 50,
        hyperparameters: object = None,
        options: Mapping[str, Any] | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        log_every: str | Length | None = None,
    ) -> None:
        folder = Path(log_dir).expanduser().absolute()
        super().__init__(
            "tensorboard",
            folder.name,
            logging_dir=folder.parent,
            every_n_updates=every_n_updates,
            hyperparameters=hyperparameters,
            options=options,
            on_error=on_error,
            log_every=log_every,
        )

    @property
    def log_dir(self) -> Path:
        """The folder of the current run, or of the last one; before the first one, the folder that was given."""
        assert self.logging_dir is not None
        return self.logging_dir / (self.run_id or self.project)

    def _open(self, update: int | None) -> Any:
        number = 1
        while update is None and (self.run_id is None or any(self.log_dir.glob("events.out.tfevents.*"))):
            self.run_id = self.project if number == 1 else f"{self.project}_{number}"
            number += 1
        options = {} if update is None else {"purge_step": update}
        return self._open_with(self.log_dir.name, self.logging_dir, **options)


class MLflowCallback(TrackerCallback):
    """Sends what a run records to MLflow; see `TrackerCallback`.

    Args:
        experiment: The name of the experiment.
        tracking_uri: The server, folder or database, such as ``"sqlite:///mlflow.db"``; ``None`` for MLflow's default.
        every_n_updates: Updates between what is sent within an epoch; ``None`` for nothing.
        hyperparameters: Further hyper-parameters: a mapping, or an object such as an `argparse.Namespace`.
        options: Further arguments for `accelerate.tracking.MLflowTracker`, such as ``run_name`` and ``tags``.
        on_error: ``"warn"`` if training shall continue when MLflow fails, with one warning; or ``"raise"``.
        log_every: How often within an epoch, instead of ``every_n_updates``, as a text such as ``"30 s"``.

    Raises:
        ModuleNotFoundError: ``mlflow`` is not installed; it comes with the extra ``mlflow``.
    """

    @explains_arguments
    def __init__(
        self,
        experiment: str = "training",
        tracking_uri: str | None = None,
        *,
        every_n_updates: int | None = 50,
        hyperparameters: object = None,
        options: Mapping[str, Any] | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        log_every: str | Length | None = None,
    ) -> None:
        super().__init__(
            "mlflow",
            experiment,
            every_n_updates=every_n_updates,
            hyperparameters=hyperparameters,
            options=options,
            on_error=on_error,
            log_every=log_every,
        )
        self.tracking_uri = tracking_uri
        self._last_updates: dict[str, int] | None = None
        """The last update that MLflow knew of each metric when the run was resumed, as far as it was asked."""

    def _open(self, update: int | None) -> Any:
        if self.tracking_uri is not None:
            importlib.import_module("mlflow").set_tracking_uri(self.tracking_uri)
        options = {} if update is None or self.run_id is None else {"run_id": self.run_id}
        tracker = self._open_with(self.project, self.logging_dir, **options)
        self.run_id = tracker.tracker.info.run_id
        self._last_updates = {} if options else None
        return tracker

    def _was_sent(self, name: str, update: int) -> bool:
        if self._last_updates is None:
            return False
        if name not in self._last_updates:
            with self._tolerating_errors():
                known = importlib.import_module("mlflow").MlflowClient().get_metric_history(self.run_id, name)
                self._last_updates[name] = max((metric.step for metric in known), default=-1)
        return update <= self._last_updates.get(name, -1)


class WandbCallback(TrackerCallback):
    """Sends what a run records to Weights & Biases; see `TrackerCallback`.

    Args:
        project: The name of the project.
        every_n_updates: Updates between what is sent within an epoch; ``None`` for nothing.
        hyperparameters: Further hyper-parameters: a mapping, or an object such as an `argparse.Namespace`.
        options: Further arguments for ``wandb.init``, such as ``name``, ``group``, ``tags`` and ``mode``.
        on_error: ``"warn"`` if training shall continue when sending fails, with one warning; or ``"raise"``.
        log_every: How often within an epoch, instead of ``every_n_updates``, as a text such as ``"30 s"``.

    Raises:
        ModuleNotFoundError: ``wandb`` is not installed; it comes with the extra ``wandb``.
    """

    @explains_arguments
    def __init__(
        self,
        project: str = "training",
        *,
        every_n_updates: int | None = 50,
        hyperparameters: object = None,
        options: Mapping[str, Any] | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        log_every: str | Length | None = None,
    ) -> None:
        super().__init__(
            "wandb",
            project,
            every_n_updates=every_n_updates,
            hyperparameters=hyperparameters,
            options=options,
            on_error=on_error,
            log_every=log_every,
        )
        self._first_new_update = 0

    def _open(self, update: int | None) -> Any:
        options = {} if update is None or self.run_id is None else {"id": self.run_id, "resume": "allow"}
        tracker = self._open_with(self.project, self.logging_dir, **options)
        self.run_id = tracker.tracker.id
        self._first_new_update = int(tracker.tracker.step) if options else 0
        return tracker

    def _was_sent(self, name: str, update: int) -> bool:
        return update < self._first_new_update
