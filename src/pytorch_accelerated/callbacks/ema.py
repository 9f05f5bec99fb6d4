"""A callback that keeps an exponential moving average of the weights, evaluates it and saves it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytorch_accelerated._arguments.numbers import check_positive_integer
from pytorch_accelerated._checkpoint.model_state import load_model_state
from pytorch_accelerated._checkpoint.names import portable_state_dict
from pytorch_accelerated._checkpoint.portable import check_save_path
from pytorch_accelerated._checkpoint.schema import OF_AVERAGE, check_entries
from pytorch_accelerated._hints.arguments import explains_arguments
from pytorch_accelerated._models.ema import ModelEma, check_decay
from pytorch_accelerated._views import library_of, run_of
from pytorch_accelerated.callbacks._watching import check_is_recorded, num_values_of, watched_value
from pytorch_accelerated.callbacks.handler import CallbackHandler
from pytorch_accelerated.callbacks.reporting import has_table
from pytorch_accelerated.callbacks.saving import SaveBestModelCallback
from pytorch_accelerated.callbacks.stopping import warn_about_direction

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping

    from torch import nn

    from pytorch_accelerated._types import StateDict, StateMapping
    from pytorch_accelerated.callbacks.base import TrainerCallback
    from pytorch_accelerated.trainer import Trainer


class ModelEmaCallback(SaveBestModelCallback):
    """Keeps an exponential moving average (EMA) of the model, evaluates it after each epoch, and saves the best.

    The average is created when a run starts and updated after each update of the model. After the model has been
    evaluated at the end of an epoch, or by `Trainer.evaluate`, the average temporarily replaces it and is evaluated on
    the same data. The metrics of the average are recorded with the prefix ``ema_model_``, before any callback receives
    ``on_training_run_epoch_end``. The best value counts for all runs of the trainer: a later run replaces the file only
    with a better average. If there was no evaluation, the callback saves the average at the end of the run.

    Training, saving and the final state of the model itself do not change. To use the average, load ``save_path``, or
    take ``ema_model.module``.

    Args:
        decay: Weight of the past in each update; see :class:`~pytorch_accelerated.utils.ModelEma`.
        evaluate_during_training: Whether to evaluate the average. Otherwise it is saved at the end of each epoch.
        save_path: File to write the checkpoint of the average to.
        watch_metric: Name in the run history of the metric that decides which average is the best.
        greater_is_better: Whether larger values are better.
        model_ema: Creates the average, as ``model_ema(model, decay=decay)``: `ModelEma`, a subclass, or a partial such
            as ``partial(ModelEma, should_average_buffers=False)``.
        callbacks: Callbacks that receive the events of the average's evaluation, as instances or classes. The
            trainer's own callbacks do not. Of the trainer they receive all events but those of its evaluations, right
            after this callback. Their states are part of the training state.
        update_every_n_updates: Updates of the model per update of the average; at least 1.

    Attributes:
        ema_model: The average of the current or last run; ``None`` before the first.
        model_ema_cls: What creates the average.
        callback_handler: Has the callbacks. ``callback_handler.add_callback(...)`` adds another one before a run.
        reset_on_train: Whether each run forgets the best value of earlier runs; false unless it is set.

    Raises:
        ValueError: ``update_every_n_updates`` is below 1, or ``decay`` not between 0 and 1.
        TypeError: ``update_every_n_updates`` is not an integer, or ``decay`` no number.

    Example:
        >>> callback = ModelEmaCallback(decay=0.999, save_path="best_average.pt")
    """

    @explains_arguments
    def __init__(
        self,
        decay: float = 0.99,
        evaluate_during_training: bool = True,
        save_path: str | os.PathLike[str] = "ema_model.pt",
        watch_metric: str = "ema_model_eval_loss_epoch",
        greater_is_better: bool = False,
        model_ema: Callable[..., ModelEma] = ModelEma,
        callbacks: Iterable[TrainerCallback | type[TrainerCallback]] = (),
        update_every_n_updates: int = 1,
    ) -> None:
        check_positive_integer("update_every_n_updates", update_every_n_updates, "updates")
        if model_ema is ModelEma:
            check_decay(decay)
        super().__init__(
            save_path,
            watch_metric,
            greater_is_better,
            reset_on_train=False,
            save_optimizer=False,
            load_saved_checkpoint=False,
        )
        self.decay = decay
        self.evaluate_during_training = evaluate_during_training
        self.model_ema_cls = model_ema
        self.update_every_n_updates = update_every_n_updates
        self.ema_model: ModelEma | None = None
        self.callback_handler = CallbackHandler(callbacks)
        self._track_prefix = "ema_model_"
        self._num_updates_saved: int | None = None
        self._initial_numbers: dict[str, float] = {}
        self._waiting_state: StateMapping | None = None
        self._models: tuple[nn.Module, nn.Module] | None = None

    @property
    def nested_handler(self) -> CallbackHandler:
        """Has the callbacks of the average."""
        return self.callback_handler

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Create the average, from the model or from a restored state.

        Raises:
            RuntimeError: The model is sharded over processes, so no process can hold the average.
            ValueError: The run will not record the metric.
            CheckpointError: The checkpoint cannot be written to ``save_path``.
        """
        config = trainer.run_config
        if run_of(trainer).is_sharded:
            raise RuntimeError(
                f"`{type(self).__name__}` needs the full model on each process, but FSDP or DeepSpeed shards it. Use "
                "plain data parallelism, or remove the callback."
            )
        if self.evaluate_during_training and run_of(trainer).eval_dataloaders:
            check_is_recorded(trainer, self.watch_metric, type(self).__name__)
        warn_about_direction(self.watch_metric, self.greater_is_better, type(self).__name__)
        check_save_path(self.save_path, config.is_local_process_zero, config.num_processes)
        self.callback_handler.refresh()
        self.ema_model = self.model_ema_cls(self._plain_model(trainer), decay=self.decay)
        self._initial_numbers = _numbers(self.ema_model)
        self._num_updates_saved = None
        if self.reset_on_train:
            self._best.reset()
            self._has_saved = False
            self._file.forget()
        if self._waiting_state is not None:
            self._restore(self._waiting_state)
            self._waiting_state = None
        if run_of(trainer).is_resumed:
            self._check_saved_model(trainer)

    def on_optimizer_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Update the average."""
        if run_of(trainer).progress.num_updates % self.update_every_n_updates == 0:
            self._average().update(self._plain_model(trainer))

    def on_eval_epoch_end(self, trainer: Trainer, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Evaluate the average on the data that the model has just been evaluated on, in `Trainer.evaluate` too."""
        if not self.evaluate_during_training or is_intermediate or self.ema_model is None:
            return
        self._share_buffers(trainer)
        if not has_table(trainer.callback_handler):
            trainer.print("Evaluating the moving average of the weights")
        library_of(trainer).evaluate_another(self._average().module, self.callback_handler, self._track_prefix)
        if run_of(trainer).is_training_run:
            self._save_if_best(trainer)

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save the average if it is not evaluated; otherwise check that the watched metric exists.

        Raises:
            ValueError: Nothing was recorded under its name, or the value is not a number.
        """
        if not self.evaluate_during_training:
            self._save(trainer, {"epoch": trainer.run_history.current_epoch})
        elif run_of(trainer).eval_dataloaders:
            watched_value(trainer, self.watch_metric, type(self).__name__)

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save the average if no evaluation has chosen one to save, unless it is saved already."""
        progress = run_of(trainer).progress
        is_chosen = self.evaluate_during_training and self._has_saved
        if not is_chosen and self._num_updates_saved != progress.num_updates:
            self._save(trainer, {"epoch": progress.num_epochs_completed})
        elif is_chosen:
            self._has_own_file(trainer)
        self._models = None

    def on_exception(self, trainer: Trainer, exception: BaseException, **kwargs: Any) -> None:
        """Release the reference to the model."""
        self._models = None

    def state_dict(self) -> StateDict:
        """Return the average, the counters of a `ModelEma` subclass, and which average was the best."""
        if self.ema_model is None:
            return {}
        numbers = _numbers(self.ema_model)
        initial = self._initial_numbers
        changed = {name: value for name, value in numbers.items() if value != initial.get(name)}
        return {
            "ema_model": portable_state_dict(self.ema_model),
            "ema_model_numbers": changed,
            **self._state_of_best(),
            "callbacks": self.callback_handler.state_dict(),
        }

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore the callbacks, and keep the rest of what `state_dict` returned until the next run starts."""
        self._waiting_state = None
        if state_dict:
            check_entries(state_dict, OF_AVERAGE)
            required = ("ema_model", "ema_model_numbers", "has_saved", "best_metric", "best_metric_epoch")
            self._waiting_state = {**state_dict, **{name: state_dict[name] for name in required}}
            self.callback_handler.load_state_dict(state_dict["callbacks"])

    def _restore(self, state: StateMapping) -> None:
        average = self._average()
        load_model_state(average, state["ema_model"], "The moving average in the training state")
        for name, number in state["ema_model_numbers"].items():
            setattr(average, name, number)
        self._load_state_of_best(state)

    def _average(self) -> ModelEma:
        assert self.ema_model is not None, "a run creates it when it starts"
        return self.ema_model

    def _plain_model(self, trainer: Trainer) -> nn.Module:
        # Cached, because unwrapping visits every module, which is too slow for each update.
        if self._models is None or self._models[0] is not trainer.model:
            self._models = trainer.model, trainer.get_model(keep_torch_compile=False)
        return self._models[1]

    def _save_if_best(self, trainer: Trainer) -> None:
        if not num_values_of(trainer, self.watch_metric):
            return  # the next dataset may record it; the end of the epoch checks that
        value = watched_value(trainer, self.watch_metric, type(self).__name__)
        if value is not None and self._best.is_improved_by(value, self.greater_is_better):
            self._save_best(trainer, value)

    def _share_buffers(self, trainer: Trainer) -> None:
        # Batch norms see different data on each process. As in a distributed model, those of rank 0 are used.
        if trainer.run_config.is_distributed:
            for buffer in self._average().module.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def _save(self, trainer: Trainer, entries: Mapping[str, float]) -> None:
        self._share_buffers(trainer)
        model, trainer.model = trainer.model, self._average().module
        try:
            self._write(trainer, entries)
        finally:
            trainer.model = model
        self._num_updates_saved = run_of(trainer).progress.num_updates


def _numbers(average: ModelEma) -> dict[str, float]:
    # The decay, which may change at each update, and the counters of a subclass.
    return {name: value for name, value in vars(average).items() if type(value) in (int, float)}
