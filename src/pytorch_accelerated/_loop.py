"""The loop: what happens in a run, in which order, and what a subclass may change of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pytorch_accelerated import _nested
from pytorch_accelerated._accumulation import AccumulationWindow, scale_gradients
from pytorch_accelerated._data.determinism import SeededLoader
from pytorch_accelerated._data.loaders import (
    EXACT,
    RestOfEpoch,
    enumerate_batches,
    guarantee_of_skipping,
    reliable_num_batches_of,
)
from pytorch_accelerated._data.rng import preserve_rng_state
from pytorch_accelerated._data.sharding import sharding_of, without_samples
from pytorch_accelerated._distributed.accelerator import skip_batches
from pytorch_accelerated._distributed.collectives import gather_uneven, run_on_main, sum_over_processes
from pytorch_accelerated._distributed.consensus import StopConsensus
from pytorch_accelerated._distributed.fast_path import call_without_gradients, choose_no_sync
from pytorch_accelerated._loss_monitor import LossMonitor
from pytorch_accelerated._nested import concatenate, first_rows, on_host
from pytorch_accelerated._signals import InterruptFlag, RunInterruptedError
from pytorch_accelerated._step import batch_loss, model_outputs, read_batch_output
from pytorch_accelerated._validation import check_run, raise_bad_loss
from pytorch_accelerated.exceptions import NonFiniteLossError, StopTrainingError, add_note
from pytorch_accelerated.progress import TrainingProgress
from pytorch_accelerated.tracking import (
    EpochMeans,
    InMemoryRunHistory,
    LossTracker,
    RunHistory,
    as_number,
    weighted_mean,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pytorch_accelerated.callbacks import CallbackHandler
    from pytorch_accelerated.run_config import TrainerRunConfig


class TrainingLoop:
    """Trains and evaluates a model that is ready for it; `Trainer` makes it ready.

    This class holds the hooks and calls them, and the events of the callbacks, in their order. Read it from
    `_run_training` down.

    Args:
        model: The model.
        loss_func: The loss function, or ``None`` if the model returns its loss.
        optimizer: The optimizer.
        run_history: Where metrics are recorded; in memory by default.
    """

    callback_handler: CallbackHandler
    _accelerator: Accelerator

    def __init__(self, model: Any, loss_func: Any, optimizer: Any, run_history: RunHistory | None = None) -> None:
        self.model = model
        self.loss_func = loss_func
        self.optimizer = optimizer
        self.scheduler: Any = None
        self.run_history: RunHistory = InMemoryRunHistory() if run_history is None else run_history
        self.run_config: TrainerRunConfig = None  # type: ignore[assignment]  # there is one from the first run on
        self.progress = TrainingProgress()
        self.stop_reason: str | None = None
        self._early_stop_reason: str | None = None
        self.gradient_norm: torch.Tensor | None = None
        self.is_resumed = False
        self.is_evaluating = False
        self.is_intermediate_evaluation = False

        self._train_dataloader: Any = None
        self._eval_dataloader: Any = None
        self._current_eval_dataloader: Any = None
        self._train_randomness: list[SeededLoader] = []
        self._eval_randomness: list[SeededLoader] = []
        self._run_seed = 0
        self._last_epoch = 0
        self._is_epoch_cut_short = False
        self._num_batches_to_skip = 0
        self._stream_position: Mapping[str, Any] | None = None
        self._num_batches_per_epoch: int | None = None
        self._num_eval_steps: int | None = None
        self._means = EpochMeans()
        self._suspended_means: list[EpochMeans] = []
        self._window = AccumulationWindow()
        self._nominal_weight: float | None = None
        self._is_update_due = False
        self._is_dummy = False
        self._uses_fast_path = False
        self._monitor = LossMonitor()
        self._num_batches_done = 0
        self._agreement = StopConsensus(num_processes=1)
        self._batch_output: Mapping[str, Any] | None = None
        self._interrupt = InterruptFlag()
        self._interruption: RunInterruptedError | None = None
        self._is_evaluation_repeatable = False

    # --- hooks: override them to change what happens -------------------------------------------------------------

    def training_run_start(self) -> None:
        """Called once when a training run starts, before the event of the same moment."""

    def train_epoch_start(self) -> None:
        """Called at the start of each training epoch; puts the model into training mode."""
        self.model.train()

    def calculate_train_batch_loss(self, batch: Any) -> Mapping[str, Any]:
        """Compute the loss of one training batch; called for each batch, on each process.

        By default the batch is a pair: the model is called with its first item, the loss function with the outputs and
        the second. Without a loss function the model is called with the whole batch (as keyword arguments if it is a
        mapping) and has to return its loss as ``outputs.loss`` or ``outputs["loss"]``.

        Args:
            batch: What the loader gave, on the training device.

        Returns:
            A dictionary with ``loss``, a scalar tensor: the mean over the batch, and ``batch_size``. Further keys reach
            the callbacks; ``metrics``, a dictionary of scalars, is averaged over the epoch as the loss is, and
            ``num_items_in_batch`` tells what the loss is the mean over, if not over samples.
        """
        return batch_loss(self.model, self.loss_func, batch)

    def backward_step(self, loss: torch.Tensor) -> None:
        """Compute the gradients.

        Args:
            loss: The loss of the batch, scaled to its share of the update.
        """
        try:
            if self._uses_fast_path:
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                self._accelerator.backward(loss)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise_bad_loss(loss, error)

    def optimizer_step(self) -> None:
        """Update the parameters; called once per update."""
        self.optimizer.step()

    def scheduler_step(self) -> None:
        """Step the scheduler; called after each update, unless mixed precision skipped it."""
        if self.scheduler is not None:
            self.scheduler.step()

    def optimizer_zero_grad(self) -> None:
        """Discard the gradients; called after each update."""
        self.optimizer.zero_grad()

    def train_epoch_end(self) -> None:
        """Called at the end of each training epoch; the training loss is in the run history."""

    def eval_epoch_start(self) -> None:
        """Called at the start of each evaluation; puts the model into evaluation mode."""
        self.model.eval()

    def calculate_eval_batch_loss(self, batch: Any) -> Mapping[str, Any]:
        """Compute the loss of one evaluation batch, without gradients; see `calculate_train_batch_loss`."""
        return call_without_gradients(batch_loss, self.model, self.loss_func, batch)

    def calculate_predictions(self, batch: Any) -> Any:
        """Return the model's outputs for one batch of `Trainer.predict`, without gradients.

        By default the model is called with the batch's first item, or with all of it as keyword arguments if it is a
        mapping. Returns tensors of one row per sample, nested as you like.
        """
        return call_without_gradients(model_outputs, self.model, batch)

    def eval_epoch_end(self) -> None:
        """Called at the end of each evaluation; its loss is in the run history."""

    def training_run_epoch_end(self) -> None:
        """Called at the end of each epoch, after training and evaluation."""

    def training_run_end(self) -> None:
        """Called once at the end of a training run that finished or was stopped."""

    def evaluation_run_start(self) -> None:
        """Called when `evaluate` starts."""

    def evaluation_run_end(self) -> None:
        """Called when `evaluate` ends."""

    # --- tools for hooks and callbacks ---------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where batches are put and the model runs, on this process."""
        return self._accelerator.device  # type: ignore[no-any-return]

    @property
    def process_index(self) -> int:
        """The rank of this process, from 0."""
        return int(self._accelerator.process_index)

    @property
    def recent_loss(self) -> float | None:
        """The mean loss of the epoch so far, as of the last ``on_log_point``; to ask for it makes no device wait.

        On a CUDA device it is that of the log point before. ``None`` until it is known.
        """
        return self._monitor.mean

    @property
    def is_between_updates(self) -> bool:
        """Whether all samples that were trained on so far have entered an update; else more batches accumulate."""
        return self._window.num_samples == 0

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the main process of each node only."""
        self._accelerator.print(*args, **kwargs)

    def gather(self, tensor: Any, padding_value: float | None = None) -> Any:
        """Concatenate what each process has, in the order of the processes. Must be called on every process.

        The processes may have different numbers of rows, also none.

        Args:
            tensor: A tensor of shape ``(rows, ...)``, or tuples, lists and mappings of them.
            padding_value: Give one if the processes may differ in the other dimensions, which are then filled up with
                it. Rows are never padded in the result, and real values that equal it stay.

        Returns:
            The same structure with tensors of shape ``(sum of rows, ...)``; with one process ``tensor`` itself.

        Raises:
            ValueError: The shapes do not fit together; raised on every process.
        """
        if self._accelerator.num_processes == 1:
            return self._accelerator.gather(tensor)
        return gather_uneven(self._accelerator, tensor, padding_value)

    def get_agreed_metric(self, metric_name: str) -> float:
        """Return the newest value of a metric as a number, the main process's on every process, to decide by.

        Must be called on every process; the others need not have recorded it.

        Raises:
            ValueError: Nothing was recorded under this name, or it is not one number.
        """
        config = self.run_config
        return run_on_main(
            lambda: as_number(self.run_history.get_latest_metric(metric_name)),
            config.is_world_process_zero,
            config.num_processes,
        )

    def get_model(self, keep_torch_compile: bool = True) -> Any:
        """Return the model without what Accelerate wrapped around it.

        Args:
            keep_torch_compile: Whether a compiled model is returned as such.
        """
        return self._accelerator.unwrap_model(self.model, keep_torch_compile=keep_torch_compile)

    def limit_eval_steps(self, num_eval_steps: int) -> None:
        """End the evaluation that starts after so many batches; call it in ``on_eval_epoch_start``."""
        self._num_eval_steps = num_eval_steps

    @property
    def is_interrupted(self) -> bool:
        """Whether a signal, such as that of Ctrl-C, ends the run; callbacks know it in ``on_stop_training_error``."""
        return self._interruption is not None

    def end_run_on_signals(self, *signals: int) -> None:
        """Let signals end this training run in good order, as Ctrl-C does; call it in ``on_training_run_start``.

        The step is finished, all processes end the run with its events, and `Trainer.train` raises `SystemExit` with
        the code ``128 + n`` on each of them. A handler that the program had installed is called too, and put back when
        the run has ended. A signal that the program ignores stays ignored. In a thread other than the main one, where
        Python allows no handlers, this does nothing.

        Args:
            *signals: Such as ``signal.SIGTERM``.

        Raises:
            RuntimeError: No training run is under way.
            ValueError: The system does not let programs handle the signal.
        """
        check_run(self._interrupt.is_active)
        self._interrupt.listen_to(*signals)

    # --- the training loop ---------------------------------------------------------------------------------------

    def _run_training(self) -> None:
        with self._interrupt:
            try:
                self.training_run_start()
                self._call("on_training_run_start")
                self._agreement.sync()
                self._run_epochs()
            except StopTrainingError as stop:
                self._stop(stop)
            self._end_run(self.training_run_end, "on_training_run_end")
        self._end_epoch()  # of an interrupted run, whose state was to go on within it
        self._notice_late_signal()

    def _run_epochs(self) -> None:
        if self._early_stop_reason is not None:  # a resumed run had been stopped for good
            raise StopTrainingError(self._early_stop_reason)
        self._is_epoch_cut_short = False
        is_limit_reached = self._is_update_limit_reached() and self.progress.is_between_epochs()
        while self.progress.num_epochs_completed < self._last_epoch and not is_limit_reached:
            is_limit_reached = self._run_epoch()
        if self._is_epoch_cut_short or self.progress.num_epochs_completed < self._last_epoch:
            self.stop_reason = f"{self.progress.num_updates} updates are done (`max_num_train_steps`)"
        else:
            self.stop_reason = f"{self.progress.num_epochs_completed} epochs are done"

    def _run_epoch(self) -> bool:
        is_limit_reached = self._is_update_limit_reached()  # a resumed run may have only evaluation left
        try:
            if self.progress.phase == "training":  # a resumed run may have been through with it
                is_limit_reached = self._run_train_epoch(self._train_dataloader)
            self._run_eval_epochs()
            self.progress.phase = "end"
            self.training_run_epoch_end()
            self._call("on_training_run_epoch_end")
            self._agreement.sync()
        except RunInterruptedError:
            raise  # a state that is saved now goes on within the epoch
        except BaseException:
            self._end_epoch()
            raise
        self._end_epoch()
        return is_limit_reached

    def _end_epoch(self) -> None:
        if self.progress.phase != "training":  # an epoch counts once its training is done
            self.progress.end_epoch()
            self.run_history._increment_epoch()

    def _run_train_epoch(self, train_dl: Any) -> bool:
        """Train on the batches of an epoch, and return whether the limit of updates was reached."""
        num_done = self._begin_train_epoch(train_dl)
        self.train_epoch_start()
        self._call("on_train_epoch_start")

        is_limit_reached = self._is_update_limit_reached()
        self._is_epoch_cut_short = is_limit_reached and num_done != self._num_batches_per_epoch
        remaining = () if is_limit_reached else self._rest_of_epoch(train_dl, num_done)
        num_accumulated, share = self.run_config.gradient_accumulation_steps, sharding_of(train_dl)
        no_sync = choose_no_sync(self._accelerator, self.model, self._uses_fast_path)
        for step, batch, is_last in enumerate_batches(remaining, num_done):
            is_update_due = is_last or (step + 1) % num_accumulated == 0
            self._accelerator.sync_gradients = self._is_update_due = is_update_due
            self._is_dummy = share is not None and share.dummy_step == step
            if is_update_due:
                self._perform_forward_and_backward_passes(batch, step)
                self._update_parameters()
                is_limit_reached = self._is_update_limit_reached()
            else:
                with no_sync():
                    self._perform_forward_and_backward_passes(batch, step)
            self._end_train_step(batch, step)
            if is_limit_reached:
                self._is_epoch_cut_short = not is_last
                break

        self.progress.phase = "evaluation"
        self._add_epoch_loss_to_run_history("train_loss_epoch")
        self.train_epoch_end()
        self._call("on_train_epoch_end")
        self._agreement.sync()
        return is_limit_reached

    def _begin_train_epoch(self, train_dl: Any) -> int:
        """Bring data and sums to the start of the epoch, and return how many batches a resumed run has done of it."""
        num_done, self._num_batches_to_skip = self._num_batches_to_skip, 0
        if num_done == 0:
            self._means = EpochMeans()
            self._window.reset()
        self._means.first_step = self._num_batches_done = num_done
        self._monitor = LossMonitor()
        self._num_batches_per_epoch = reliable_num_batches_of(train_dl)
        self._set_data_epoch(self._train_randomness, train_dl, self.run_history.current_epoch - 1)
        return num_done

    def _rest_of_epoch(self, train_dl: Any, num_done: int) -> Any:
        """Return the batches that are left of an epoch; a resumed run tells how exactly they go on."""
        position, self._stream_position = self._stream_position, None
        if num_done > 0:
            guarantee = EXACT if position is not None else guarantee_of_skipping(train_dl)
            self.print(f"Going on after batch {num_done} of epoch {self.run_history.current_epoch}. {guarantee}")
        if position is None:
            return skip_batches(self._accelerator, train_dl, num_done)
        for source in self._train_randomness:
            if source.stream is not None:
                source.stream.resume(position, num_done)
        return RestOfEpoch(train_dl, 0) if num_done else train_dl

    def _perform_forward_and_backward_passes(self, batch: Any, step: int) -> None:
        self._call("on_train_step_start", batch=batch, step=step)
        batch_output = self.calculate_train_batch_loss(batch)
        weight, batch_size = read_batch_output(batch_output, "calculate_train_batch_loss")
        if self._is_dummy:
            weight = batch_size = 0
        self._window.num_samples += batch_size
        self._call("on_backward_start", batch=batch, batch_output=batch_output, step=step)
        loss = batch_output["loss"]
        share = self._window.add(weight, self._window_size(step), self._nominal_weight)
        if self._is_update_due and self._agreement.is_needed:
            foreseen = None if step + 1 == self._num_batches_per_epoch else self._window.expected
            self._agreement.start_exchange(self._window.total, self._window.num_samples, foreseen)
        self.backward_step(loss if share is None else loss * share)
        if not self._is_dummy:
            self._update_loss_tracker(loss, weight)
            self._means.update_metrics(batch_output, weight)
        self._batch_output = batch_output

    def _update_parameters(self) -> None:
        total_weight, num_samples = None, self._window.num_samples
        if self._agreement.is_needed:
            total_weight, num_samples = self._agreement.finish_exchange()
        correction = self._window.close(total_weight, self.run_config.num_processes)
        if correction is not None:
            scale_gradients(self.model.parameters(), correction)
        if not self._uses_fast_path and self._accelerator.scaler is not None:
            self._accelerator.unscale_gradients(self.optimizer)
        self._call("on_optimizer_step_start")
        self._clip_gradients()
        self.optimizer_step()
        self.progress.num_updates += 1
        self.progress.num_samples += num_samples
        if self._uses_fast_path or self._accelerator.optimizer_step_was_skipped is not True:
            self.scheduler_step()
        self._call("on_optimizer_step_end")
        self.optimizer_zero_grad()

    def _end_train_step(self, batch: Any, step: int) -> None:
        self.progress.num_batches_in_epoch = step + 1
        batch_output, self._batch_output = self._batch_output, None
        if batch_output is not None:  # a subclass may have replaced the whole step
            if self._is_dummy:
                batch, batch_output = without_samples(batch, batch_output)
            self._call("on_train_step_end", batch=batch, batch_output=batch_output, step=step)
        self._end_any_step(step)
        self._check_interrupt()
        if self._agreement.is_needed:
            self._agreement.raise_if_stopped()

    def _end_any_step(self, step: int) -> None:
        self._num_batches_done = step + 1
        if self._monitor.is_due():
            self._monitor.look(self._loss_tracker)
            self._call("on_log_point")

    def _window_size(self, step: int) -> int:
        num_steps = self.run_config.gradient_accumulation_steps
        if self._num_batches_per_epoch is None or num_steps == 1:
            return num_steps
        return min(num_steps, self._num_batches_per_epoch - step)

    def _clip_gradients(self) -> None:
        # With a scaler the gradients are unscaled already, which Accelerate's functions would do a second time.
        clip_functions: Any = self._accelerator if self._accelerator.scaler is None else nn.utils
        if self.run_config.gradient_clip_value is not None:
            clip_functions.clip_grad_value_(self.model.parameters(), self.run_config.gradient_clip_value)
        if self.run_config.gradient_clip_norm is not None:
            self.gradient_norm = clip_functions.clip_grad_norm_(
                self.model.parameters(), self.run_config.gradient_clip_norm
            )

    def _is_update_limit_reached(self) -> bool:
        limit = self.run_config.max_num_train_steps if self.run_config.is_limited_by_steps else None
        return limit is not None and self.progress.num_updates >= limit

    # --- evaluation ----------------------------------------------------------------------------------------------

    def _run_evaluation(self) -> None:
        try:
            self.evaluation_run_start()
            self._call("on_evaluation_run_start")
            self._run_eval_epochs(is_training=False)
        except StopTrainingError as stop:
            self._stop(stop)
        self._end_run(self.evaluation_run_end, "on_evaluation_run_end")

    def _run_eval_epochs(self, is_training: bool = True, is_intermediate: bool = False) -> None:
        """Evaluate on each evaluation dataset; those with a name put it before the names of their metrics."""
        loaders = self._eval_dataloader
        named_loaders = loaders if isinstance(loaders, dict) else {"": loaders}
        ends_epoch = is_training and not is_intermediate
        num_done = self.progress.num_evaluations_in_epoch if ends_epoch else 0  # before the run was resumed
        for name, loader in islice(named_loaders.items(), num_done, None):
            if loader is None:
                continue
            self._is_evaluation_repeatable = ends_epoch
            with self._metric_prefix(f"{name}_" if name else ""):
                self._run_eval_epoch(loader, is_training, is_intermediate)
            if ends_epoch:
                self.progress.num_evaluations_in_epoch += 1
            if not is_intermediate:  # which is within a step, and steps are finished
                self._agreement.sync()

    def _run_eval_epoch(self, valid_dl: Any, is_training: bool = True, is_intermediate: bool = False) -> None:
        # What a callback or a hook evaluates is finished, because a resumed run would not come to it again.
        is_repeatable, self._is_evaluation_repeatable = self._is_evaluation_repeatable, False
        with self._suspend_training(is_intermediate), preserve_rng_state():
            self._current_eval_dataloader = valid_dl
            self._set_data_epoch(self._eval_randomness, valid_dl, 0)
            self.eval_epoch_start()
            self._call("on_eval_epoch_start", is_intermediate=is_intermediate)
            share = sharding_of(valid_dl)
            for step, batch, _ in islice(enumerate_batches(valid_dl), self._num_eval_steps):
                self._is_dummy = share is not None and share.dummy_step == step
                self._perform_eval_step(batch, step)
                if is_repeatable:
                    self._check_interrupt()
            self._add_epoch_loss_to_run_history("eval_loss_epoch" if is_training else "evaluation_loss")
            self.eval_epoch_end()
            self._call("on_eval_epoch_end", is_intermediate=is_intermediate)

    def _perform_eval_step(self, batch: Any, step: int) -> None:
        self._call("on_eval_step_start", batch=batch, step=step)
        batch_output = self.calculate_eval_batch_loss(batch)
        weight, _ = read_batch_output(batch_output, "calculate_eval_batch_loss")
        if self._is_dummy:
            batch, batch_output = without_samples(batch, batch_output)
        else:
            self._update_loss_tracker(batch_output["loss"], weight)
            self._means.update_metrics(batch_output, weight)
        self._call("on_eval_step_end", batch=batch, batch_output=batch_output, step=step)
        self._end_any_step(step)

    def _run_prediction(self, on_every_process: bool, move_to_host: bool) -> Any:
        is_kept = on_every_process or self.run_config.is_world_process_zero
        outputs = []
        with preserve_rng_state():
            self.eval_epoch_start()
            share = sharding_of(self._eval_dataloader)
            for step, batch, _ in enumerate_batches(self._eval_dataloader):
                own = self.calculate_predictions(batch)
                if share is not None and share.dummy_step == step:
                    own = first_rows(own, _nested.find_batch_size(own), 0)
                gathered = self.gather(own)
                if is_kept:
                    outputs.append(on_host(gathered) if move_to_host else gathered)
        return concatenate(outputs) if is_kept else None

    @contextmanager
    def _suspend_training(self, is_intermediate: bool) -> Iterator[None]:
        """Keep the sums of the training epoch, and, if it goes on afterwards, the mode of each module."""
        of_training = self._means, self._monitor, self._num_batches_done
        self._suspended_means.append(self._means)
        self._means, self._monitor, self._num_batches_done = EpochMeans(), LossMonitor(), 0
        modes = [(module, module.training) for module in self.model.modules()] if is_intermediate else []
        self._num_eval_steps = None
        was_evaluating, self.is_evaluating = self.is_evaluating, True
        self.is_intermediate_evaluation = is_intermediate
        try:
            with self._metric_prefix("intermediate_" if is_intermediate else ""):
                if is_intermediate:
                    self.run_history.update_metric("update", self.progress.num_updates)
                yield
        finally:
            self._suspended_means.pop()
            self._means, self._monitor, self._num_batches_done = of_training
            self.is_evaluating, self.is_intermediate_evaluation = was_evaluating, False
            for module, mode in modes:
                module.training = mode

    # --- what a run records --------------------------------------------------------------------------------------

    def _update_loss_tracker(self, loss: Any, batch_size: Any) -> None:
        self._means.loss.update(loss, batch_size)

    def _add_epoch_loss_to_run_history(self, name: str) -> None:
        """Record the means over the epoch and all processes; the loss as ``name``."""
        sums = self._means.sums(name)
        if self.run_config.is_distributed:
            sums = sum_over_processes(self._accelerator, sums)
        for metric, (total, weight) in sums.items():
            self.run_history.update_metric(metric, weighted_mean(total, weight))

    @contextmanager
    def _metric_prefix(self, prefix: str) -> Iterator[None]:
        outer = self.run_history.metric_name_prefix
        self.run_history.set_metric_name_prefix(outer + prefix)
        try:
            yield
        finally:
            self.run_history.set_metric_name_prefix(outer)

    @property
    def _loss_tracker(self) -> LossTracker:
        return self._means.loss

    @_loss_tracker.setter
    def _loss_tracker(self, tracker: LossTracker) -> None:
        self._means.loss = tracker

    def _set_data_epoch(self, randomness: list[SeededLoader], loader: Any, epoch: int) -> None:
        for source in randomness:
            source.set_epoch(epoch, self._run_seed)
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)

    def _call(self, event: str, **kwargs: Any) -> None:
        if event in self.callback_handler.events_without_listeners:
            return
        try:
            self.callback_handler.call_event(event, self, **kwargs)
        except (StopTrainingError, NonFiniteLossError) as reason:
            self._end_together(reason)

    def _check_interrupt(self) -> None:
        if self._interrupt.signal_number is not None:
            self._end_together(RunInterruptedError(self._interrupt.signal_number))

    def _notice_late_signal(self) -> None:
        """Let a signal have its consequence, on all processes, that came when the run was about to end anyway."""
        if self._interruption is None:
            try:
                self._check_interrupt()
                self._agreement.sync()
            except RunInterruptedError as interruption:
                self._interruption = interruption

    def _end_together(self, reason: Exception) -> None:
        if not self._agreement.is_needed:
            raise reason
        self._agreement.request_stop(reason)

    def _end_run(self, hook: Callable[[], None], event: str) -> None:
        with suppress(StopTrainingError):  # the run has ended already
            hook()
        with suppress(StopTrainingError):
            self._call(event)
            self._agreement.sync()

    def _stop(self, stop: StopTrainingError) -> None:
        self.stop_reason = str(stop) or "a callback asked to stop"
        if isinstance(stop, RunInterruptedError):
            self._interruption = stop
        else:
            self._early_stop_reason = self.stop_reason
        with suppress(StopTrainingError):  # that is what is being done
            self._call("on_stop_training_error")
            self._agreement.sync()

    def _report_exception(self, error: BaseException) -> None:
        self.stop_reason = f"{type(error).__name__}: {error}"
        for secondary in self.callback_handler.call_event_on_all("on_exception", self, exception=error):
            add_note(error, f"a callback failed in `on_exception` too: {secondary!r}")
