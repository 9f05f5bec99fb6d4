"""A callback that averages the weights over training, and evaluates and saves the average."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pytorch_accelerated._checkpoint.portable import check_save_path
from pytorch_accelerated._distributed.accelerator import is_sharded
from pytorch_accelerated._ema import ModelEma
from pytorch_accelerated._metrics import is_better
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.callbacks.handler import CallbackHandler

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import nn

    from pytorch_accelerated.trainer import Trainer

_PREFIX = "ema_model_"


class ModelEmaCallback(TrainerCallback):
    """Keeps an exponential moving average of the model, evaluates it after each epoch, and saves the best.

    The average is made when a run starts and updated after each update of the model. After the evaluation of
    each epoch it is put in the model's place and evaluated on the same data; its metrics are recorded under
    their names with ``ema_model_`` in front, before any callback gets ``on_training_run_epoch_end``. If
    nothing has been saved by the end of the run, for lack of evaluation for example, the average at the end
    is saved.

    The model itself is trained, saved and left as without the callback. To use the average, load
    ``save_path``, or take ``ema_model.module``.

    Args:
        decay: The weight of the past in each update; see :class:`~pytorch_accelerated.utils.ModelEma`.
        evaluate_during_training: Whether the average is evaluated.
        save_path: Where the checkpoint of the average goes.
        watch_metric: Name of the metric in the run history that tells which average is the best.
        greater_is_better: Whether larger values are better.
        model_ema: Makes the average from model and decay: `ModelEma`, a subclass, or, to choose more,
            ``partial(ModelEma, should_average_buffers=False)``.
        callbacks: Callbacks, as instances or classes, that get the events of the average's evaluation; the
            trainer's own do not.
        update_every_n_updates: Updates of the model between two updates of the average.

    Attributes:
        ema_model: The average of the run; ``None`` before the first.

    Raises:
        ValueError: ``update_every_n_updates`` is below 1.

    Example:
        >>> callback = ModelEmaCallback(decay=0.999, save_path="best_average.pt")
    """

    def __init__(
        self,
        decay: float = 0.99,
        evaluate_during_training: bool = True,
        save_path: str | os.PathLike[str] = "ema_model.pt",
        watch_metric: str = "ema_model_eval_loss_epoch",
        greater_is_better: bool = False,
        model_ema: Callable[[nn.Module, float], ModelEma] = ModelEma,
        callbacks: Iterable[Any] = (),
        update_every_n_updates: int = 1,
    ) -> None:
        if update_every_n_updates < 1:
            raise ValueError(f"`update_every_n_updates` is {update_every_n_updates!r}. Expected at least 1.")
        self.decay = decay
        self.evaluate_during_training = evaluate_during_training
        self.save_path = save_path
        self.watch_metric = watch_metric
        self.greater_is_better = greater_is_better
        self.model_ema = model_ema
        self.update_every_n_updates = update_every_n_updates
        self.ema_model: ModelEma | None = None
        self.best_metric: float | None = None
        self.best_metric_epoch: int | None = None
        self._has_saved = False
        self._callback_handler = CallbackHandler(callbacks)
        self._initial_numbers: dict[str, float] = {}
        self._waiting_state: Mapping[str, Any] | None = None
        self._models: tuple[nn.Module, nn.Module] | None = None

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Make the average, from the model or from a loaded state.

        Raises:
            RuntimeError: The model is sharded over processes, so that no process could hold the average.
            CheckpointError: Nothing can be saved at the path.
        """
        if is_sharded(trainer._accelerator):
            raise RuntimeError(
                f"`{type(self).__name__}` needs the whole model on each process, but FSDP or DeepSpeed has "
                "split it. Use plain data parallelism, or leave out the callback."
            )
        check_save_path(self.save_path, trainer._accelerator)
        self.ema_model = self.model_ema(self._plain_model(trainer), self.decay)
        self._initial_numbers = _numbers(self.ema_model)
        self.best_metric = self.best_metric_epoch = None
        self._has_saved = False
        if self._waiting_state is not None:
            self._restore(self._waiting_state)
            self._waiting_state = None

    def on_optimizer_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Update the average."""
        if trainer.progress.num_updates % self.update_every_n_updates == 0:
            self._average().update(self._plain_model(trainer))

    def on_eval_epoch_end(self, trainer: Trainer, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Evaluate the average on the data that the model was evaluated on just now."""
        is_in_training = trainer._train_dataloader is not None
        if not (self.evaluate_during_training and is_in_training) or is_intermediate:
            return
        if trainer.run_config.is_distributed:
            _take_over_buffers_of_main_process(self._average())
        with self._swapped_in(trainer):
            trainer._run_eval_epoch(trainer._current_eval_dataloader)
        self._save_if_best(trainer)

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check that there is the metric to watch.

        Raises:
            ValueError: Nothing was recorded under its name, or it is no number.
        """
        if self.evaluate_during_training and trainer._eval_dataloader is not None:
            trainer.get_agreed_metric(self.watch_metric)

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save the average, if that has not been done in this run."""
        if not self._has_saved:
            self._save(trainer, {"epoch": trainer.progress.num_epochs_completed})
        self._models = None

    def on_exception(self, trainer: Trainer, exception: BaseException, **kwargs: Any) -> None:
        """Let go of the model."""
        self._models = None

    def state_dict(self) -> dict[str, Any]:
        """Return the average, what a subclass of `ModelEma` has counted, and which one was the best."""
        if self.ema_model is None:
            return {}
        numbers = _numbers(self.ema_model)
        initial = self._initial_numbers
        changed = {name: value for name, value in numbers.items() if value != initial.get(name)}
        return {
            "ema_model": self.ema_model.state_dict(),
            "ema_model_numbers": changed,
            "best_metric": self.best_metric,
            "best_metric_epoch": self.best_metric_epoch,
            "has_saved": self._has_saved,
            "callbacks": self._callback_handler.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep what `state_dict` returned until the next run starts, which makes the average."""
        self._waiting_state = state_dict or None

    def _restore(self, state: Mapping[str, Any]) -> None:
        average = self._average()
        average.load_state_dict(state["ema_model"])
        for name, number in state["ema_model_numbers"].items():
            setattr(average, name, number)
        self.best_metric = state["best_metric"]
        self.best_metric_epoch = state["best_metric_epoch"]
        self._has_saved = state["has_saved"]
        self._callback_handler.load_state_dict(state["callbacks"])

    def _average(self) -> ModelEma:
        assert self.ema_model is not None, "it is made when a run starts"
        return self.ema_model

    def _plain_model(self, trainer: Trainer) -> nn.Module:
        # Unwrapping looks at every module, which is too slow for each update.
        if self._models is None or self._models[0] is not trainer.model:
            self._models = trainer.model, trainer.get_model(keep_torch_compile=False)
        return self._models[1]

    @contextmanager
    def _swapped_in(self, trainer: Trainer) -> Iterator[None]:
        history = trainer.run_history
        model, handler, prefix = trainer.model, trainer.callback_handler, history.metric_name_prefix
        trainer.model = self._average().module
        trainer.callback_handler = self._callback_handler
        history.set_metric_name_prefix(prefix + _PREFIX)
        try:
            yield
        finally:
            trainer.model, trainer.callback_handler = model, handler
            history.set_metric_name_prefix(prefix)

    def _save_if_best(self, trainer: Trainer) -> None:
        try:
            value = trainer.get_agreed_metric(self.watch_metric)
        except ValueError:
            return  # It may come with the next dataset; the end of the epoch checks it.
        if is_better(value, self.best_metric, self.greater_is_better):
            epoch = trainer.run_history.current_epoch
            self._save(trainer, {self.watch_metric: value, "epoch": epoch})
            self.best_metric = value
            self.best_metric_epoch = epoch

    def _save(self, trainer: Trainer, entries: Mapping[str, float]) -> None:
        with self._swapped_in(trainer):
            trainer.save_checkpoint(self.save_path, entries, save_optimizer=False, save_scheduler=False)
        self._has_saved = True


def _numbers(average: ModelEma) -> dict[str, float]:
    # The decay, which may change in each update, and what a subclass counts.
    return {name: value for name, value in vars(average).items() if type(value) in (int, float)}


def _take_over_buffers_of_main_process(average: ModelEma) -> None:
    # Batch norms see other data on each process; a distributed model uses those of the main process too.
    for buffer in average.module.buffers():
        torch.distributed.broadcast(buffer, src=0)
