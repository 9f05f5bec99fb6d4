"""The loop: what happens in a run, in which order, and what a subclass may change of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from pytorch_accelerated._accumulation import clip_gradients, gradients_for, scale_gradients, with_dense_gradients
from pytorch_accelerated._arguments.moments import check_run
from pytorch_accelerated._console.text import all_done
from pytorch_accelerated._data.loaders import EXACT, RestOfEpoch, enumerate_batches
from pytorch_accelerated._data.rng import forget_spare_gaussian, preserve_rng_state
from pytorch_accelerated._data.sharding import sharding_of, start_at, without_samples
from pytorch_accelerated._distributed.accelerator import skip_batches
from pytorch_accelerated._distributed.collectives import average_gradients
from pytorch_accelerated._distributed.consensus import can_skip_exchange, overrides_any
from pytorch_accelerated._distributed.fast_path import choose_no_sync
from pytorch_accelerated._distributed.peers import EndOnSignals
from pytorch_accelerated._distributed.reasons import RunInterruptedError
from pytorch_accelerated._measuring.metric_set import MetricSet
from pytorch_accelerated._measuring.names import stem_of
from pytorch_accelerated._optimizers.checks import as_optimizer, choose_optimizer, find_untrained, warn_about_untrained
from pytorch_accelerated._optimizers.closure import WindowStep, scaled
from pytorch_accelerated._optimizers.group import discard_gradients, parameters_of
from pytorch_accelerated._position import DataPass
from pytorch_accelerated._predictions import Predictions, PredictionSettings, caches_of
from pytorch_accelerated._recording.results import results_of_pass
from pytorch_accelerated._recording.run_info import run_info_of
from pytorch_accelerated._recording.steps import take_step_values
from pytorch_accelerated._requests.ending import EndOfEpoch, is_ignored
from pytorch_accelerated._requests.skipping import complete_skipped_step, has_skipped_all, leaves_out
from pytorch_accelerated._run import Run
from pytorch_accelerated._step import (
    batch_loss,
    mean_loss,
    metric_inputs,
    predictions,
    raise_bad_loss,
    read_batch_output,
)
from pytorch_accelerated._tools import TrainerTools
from pytorch_accelerated._types import (
    Batch,
    BatchOutput,
    Loader,
    LossFunction,
    MaybeNone,
    ModelOutput,
    Nested,
    Optimizers,
    Scheduler,
)
from pytorch_accelerated._views import run_of
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.callbacks.evaluation import LimitBatchesCallback
from pytorch_accelerated.callbacks.reporting import has_table
from pytorch_accelerated.exceptions import NonFiniteLossError, StopTrainingError, add_note
from pytorch_accelerated.time_ledger import BACKWARD, EVALUATION, EVALUATION_DATA, FORWARD, OPTIMIZER, OTHER
from pytorch_accelerated.tracking import RunHistory

if TYPE_CHECKING:
    from pytorch_accelerated.callbacks import CallbackHandler

STEP_EVENTS = frozenset(
    {
        "on_train_step_start",
        "on_backward_start",
        "on_optimizer_step_start",
        "on_optimizer_step_end",
        "on_train_step_end",
    }
)
"""The events that come with each training step, in which a callback may ask to stop at that very update.

If no callback listens to them, and no method below is overridden, ranks need not talk to each other at each update; see
`can_skip_exchange`. (Log points come by the clock, so what is asked for there may wait.)
"""

STEP_METHODS = (
    "_perform_forward_and_backward_passes",
    "calculate_train_batch_loss",
    "backward_step",
    "_update_loss_tracker",
    "_loop_update",
    "_clip_gradients",
    "optimizer_step",
    "scheduler_step",
    "optimizer_zero_grad",
    "_loop_end_train_step",
)
"""The methods of a training step that a subclass may override."""


class TrainingLoop(TrainerTools):
    """Trains and evaluates a model that has been prepared; `Trainer` prepares it.

    This class declares the hooks, and calls them and the events of the callbacks in order. Read it from `_run_training`
    down. What belongs to one run is in one object, `Run`.

    A subclass may use any name that 0.1.61 does not use for attributes of its own. Therefore private names begin with
    ``_loop_``.

    Args:
        model: The model.
        loss_func: The loss function, or ``None`` if the model returns its loss.
        optimizer: The optimizer, or several in a list or dictionary.
        run_history: Where metrics are recorded; in memory by default.
        metrics: Those that are computed in each pass over the data.
    """

    callback_handler: CallbackHandler

    def __init__(
        self,
        model: nn.Module,
        loss_func: LossFunction | None,
        optimizer: Optimizers | None,
        run_history: RunHistory | None = None,
        metrics: MetricSet | None = None,
    ) -> None:
        super().__init__(model, run_history)
        self.loss_func = loss_func
        self.optimizer: Optimizer | MaybeNone = as_optimizer(optimizer)
        self.scheduler: Scheduler | None = None
        self._loop_metrics = MetricSet() if metrics is None else metrics

    # --- hooks: override them to change what happens -------------------------------------------------------------

    def training_run_start(self) -> None:
        """Called once when a training run starts, before ``on_training_run_start``."""

    def train_epoch_start(self) -> None:
        """Called at the start of each training epoch; puts the model into training mode."""
        self.model.train()

    def calculate_train_batch_loss(self, batch: Batch) -> BatchOutput:
        """Compute the loss of one training batch; called for each batch, on each process.

        By default the batch is a pair: the model is called with its first item, the loss function with the outputs and
        the second item. A warning tells of further items, which are not used. Without a loss function the model is
        called with the whole batch, whose items become its arguments (keyword arguments if it is a mapping or a
        dataclass), and must return its loss as ``outputs.loss`` or ``outputs["loss"]``.

        Args:
            batch: The batch from the loader, on the training device.

        Returns:
            A dictionary with ``loss``, a scalar tensor: the mean over the batch, and ``batch_size``, by default the
            length of the targets' first dimension. Further keys are passed on to the callbacks. ``metrics``, a
            dictionary of scalars, is averaged over the epoch like the loss.
            ``num_items_in_batch`` is the number of items the loss is the mean over, if these are not samples.
        """
        return batch_loss(self.model, self.loss_func, batch)

    def backward_step(self, loss: torch.Tensor) -> None:
        """Compute the gradients.

        Args:
            loss: The loss of the batch, scaled to its share of the update.
        """
        try:
            if self._loop_run.uses_fast_path:
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                self._accelerator.backward(loss)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise_bad_loss(loss, error)

    def optimizer_step(self) -> None:
        """Update the parameters; called once per update.

        An optimizer whose `step` requires a closure gets one, which computes the loss and the gradients of the update
        again. It calls `calculate_train_batch_loss` and `backward_step` for the same batches; losses and metrics are
        not recorded again.
        """
        if self._loop_run.closure is None:
            self.optimizer.step()
        else:
            self.optimizer.step(self._loop_run.closure)  # type: ignore[arg-type]  # typed to return a float

    def scheduler_step(self) -> None:
        """Step the scheduler, if there is one; called after each update that infinite fp16 gradients did not skip.

        Also called once after the evaluation of each epoch: here, to step what is stepped once per epoch; and instead,
        if a subclass overrides this method and ``step_scheduler="epoch"``.
        """
        if self.scheduler is not None:
            self._loop_run.stepping.step(self.scheduler, self._loop_run.training)

    def optimizer_zero_grad(self) -> None:
        """Discard the gradients; called after each update."""
        self.optimizer.zero_grad()

    def train_epoch_end(self) -> None:
        """Called at the end of each training epoch; the training loss is in the run history."""

    def eval_epoch_start(self) -> None:
        """Called at the start of each evaluation, and of `predict`; puts the model into evaluation mode."""
        self.model.eval()

    def calculate_eval_batch_loss(self, batch: Batch) -> BatchOutput:
        """Compute the loss of one evaluation batch, without gradients; see `calculate_train_batch_loss`.

        If the loss has several elements, their mean counts.
        """
        with torch.no_grad():
            return batch_loss(self.model, self.loss_func, batch)

    def calculate_predictions(self, batch: Batch) -> ModelOutput:
        """Return the model's outputs for one batch of `Trainer.predict`, without gradients.

        By default the model is called with the batch's first item, or with all of it as keyword arguments if it is a
        mapping. Return tensors with one row per sample; they may be nested.
        """
        with torch.no_grad():
            return predictions(self.model, batch)

    def get_metric_inputs(self, batch: Batch, batch_output: BatchOutput) -> Nested:
        """Return what the metrics of the Trainer are called with, after each step of training and evaluation.

        By default these are two: ``batch_output["model_outputs"]``, or their ``logits`` if they have some, and the
        targets: the second item of the batch or, in a mapping or dataclass, its ``labels``, ``label``, ``targets``,
        ``target`` or ``y``.

        Args:
            batch: The batch.
            batch_output: What `calculate_train_batch_loss` or `calculate_eval_batch_loss` returned.

        Returns:
            A tuple of arguments, or a dictionary of keyword arguments. Tensors are detached from the graph.

        Raises:
            ValueError: The step returned no ``model_outputs``, or the batch has no targets.
        """
        return metric_inputs(batch, batch_output)

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

    # --- training ------------------------------------------------------------------------------------------------

    def _run_training(self) -> None:
        run = self._loop_run
        run_info = run_info_of(run.config, self.get_model(), self.optimizer, self.scheduler)
        run.record_in(self.run_history, run_info)
        run.training.recorder.start(run, self.run_history.record_every or self.run_history.record_every_n_updates)
        with run.interrupt, EndOnSignals(run.interrupt, run.config.num_processes):
            try:
                run.call(self.training_run_start)
                self._loop_fire(TrainerCallback.on_training_run_start)
                run.consensus.sync()
                run.complete_start()
                if not run.is_sharded:  # shards are other parameters
                    _find_untrained_parameters(self, run)
                self._loop_epochs()
            except StopTrainingError as stop:
                run.consensus.confirm(stop)
                self._loop_stop(stop)
            self._loop_end_run(self.training_run_end, TrainerCallback.on_training_run_end)
        run.count_epoch(
            self.run_history
        )  # an interrupted epoch only now: states saved in the events above resume within it
        run.check_late_signal()

    def _loop_epochs(self) -> None:
        run = self._loop_run
        progress, reason = run.training.progress, run.training.early_stop_reason
        if reason is not None:  # the run was stopped for good before it was resumed
            raise StopTrainingError(reason)
        while run.should_continue():
            self._loop_epoch()
        limit = run.limit_reached()
        run.stop_reason = all_done(progress.num_epochs_completed, "epoch") if limit is None else limit
        if limit is not None:
            self.print(f"Training ends in epoch {self.run_history.current_epoch - 1}: {limit}")

    def _loop_epoch(self) -> None:
        """Train on one epoch, then evaluate."""
        run, progress = self._loop_run, self._loop_run.training.progress
        try:
            if progress.phase == "training":  # otherwise a resumed run has only evaluation left
                run.training.optimizer_mode.train(self.optimizer)
                if overrides_any(self, ("_run_train_epoch",)):
                    run.start_epoch_of_subclass()
                with self.run_history.during_pass("train_"):
                    run.was_last_epoch = self._run_train_epoch(run.train_dataloader)
                run.training.optimizer_mode.eval(self.optimizer)
                run.num_batches_to_skip, progress.phase = 0, "evaluation"
            self._loop_evaluate()
            if run.stepping.is_due_after_epoch and self.scheduler is not None:
                with run.stepping.at_epoch_end(self.run_history, run.config):
                    self.scheduler_step()
            progress.phase = "end"
            run.call(self.training_run_epoch_end)
            self._loop_fire(TrainerCallback.on_training_run_epoch_end)
            run.consensus.sync()
        except RunInterruptedError:
            raise  # a state saved from now on continues within the epoch
        except StopTrainingError as stop:
            run.consensus.confirm(stop)
            if progress.phase == "training":
                _cut_epoch_short(self, run)
            run.count_epoch(self.run_history)
            raise
        except BaseException:
            run.count_epoch(self.run_history)
            raise
        run.count_epoch(self.run_history)

    def _run_train_epoch(self, train_dl: Loader) -> bool:
        """Train on the batches of one epoch, and return whether the limit of updates was reached."""
        run, config = self._loop_run, self._loop_run.config
        num_done = run.start_train_epoch(train_dl)
        with run.epoch_start(num_done, self.optimizer, (self.run_history, *self.callback_handler.nested_last())):
            run.call(self.train_epoch_start)
            self._loop_fire(TrainerCallback.on_train_epoch_start)
        run.count_batches(train_dl)

        epoch, sharding = run.training.epoch, sharding_of(train_dl)
        no_sync = choose_no_sync(self._accelerator, self.model, run.uses_fast_path)
        is_last = num_done == run.num_batches_per_epoch
        with EndOfEpoch(run, self.run_history, self.print):
            for step, batch, is_last in run.until_update_limit(self._loop_train_steps(train_dl, num_done)):
                run.is_update_due = is_last or (step + 1) % config.gradient_accumulation_steps == 0
                self._accelerator.sync_gradients = run.is_update_due
                epoch.is_dummy_step = sharding is not None and sharding.is_dummy(step)
                run.is_batch_open = True
                self._loop_fire(TrainerCallback.on_train_step_start, batch=batch, step=step)
                if run.is_update_due:
                    self._perform_forward_and_backward_passes(batch, step)
                    self._loop_update()
                else:
                    with no_sync():
                        self._perform_forward_and_backward_passes(batch, step)
                self._loop_end_train_step(step)

        run.is_epoch_cut_short = not is_last and (run.is_update_limit_reached or run.is_time_over)
        run.training.optimizer_mode.eval(self.optimizer)
        run.call(self._add_epoch_loss_to_run_history, "train_loss_epoch")
        run.call(self.train_epoch_end)
        self._loop_fire(TrainerCallback.on_train_epoch_end)
        run.consensus.sync()
        return run.is_update_limit_reached

    def _loop_train_steps(self, train_dl: Loader, num_done: int) -> Iterator[tuple[int, Batch, bool]]:
        """Return index, batch, and whether it is the last, for the steps that are left of an epoch."""
        run = self._loop_run
        position, run.stream_position = run.stream_position, None
        if num_done > 0:
            guarantee = EXACT if position is not None else run.guarantee_of_order(train_dl)
            self.print(f"Resuming epoch {self.run_history.current_epoch} after batch {num_done}. {guarantee}")
        if position is None:
            rest = skip_batches(self._accelerator, train_dl, num_done)
        else:
            run.resume_streams(position, num_done)
            start_at(train_dl, num_done)
            rest = RestOfEpoch(train_dl, 0) if num_done else train_dl
        steps = enumerate_batches(rest, num_done)
        replaces_generators = any(loader.replaces_generators for loader in run.seeded_train_loaders)
        return map(forget_spare_gaussian, steps) if replaces_generators else steps

    def _perform_forward_and_backward_passes(self, batch: Batch, step: int) -> None:
        """Process one batch: weigh it, scale its loss, compute the gradients, and record the loss.

        The step ends after the update, unless a subclass makes the updates in a `_run_train_epoch` of its own.
        """
        run, training = self._loop_run, self._loop_run.training
        if run.is_batch_skipped and leaves_out(run):
            complete_skipped_step(run, self.model, {}, self.backward_step, step)
            return
        batch_output = self.calculate_train_batch_loss(batch)
        if not run.is_batch_skipped:
            weight, batch_size = read_batch_output(batch_output, "calculate_train_batch_loss")
            if training.current_pass.is_dummy_step:
                weight = batch_size = 0
            run.ledger.switch(BACKWARD)
            self._loop_fire(TrainerCallback.on_backward_start, batch=batch, batch_output=batch_output, step=step)
        if run.is_batch_skipped:
            complete_skipped_step(run, self.model, batch_output, self.backward_step, step)
            return
        run.is_batch_open = False
        loss = batch_output["loss"]
        scale = training.window.add(weight, batch_size, step) if run.makes_updates else run.plain_scale
        if run.is_update_due and run.consensus.is_needed:
            run.start_exchange(step)
        self.backward_step(loss if scale is None else loss * scale)
        if run.closure is not None and run.makes_updates:
            run.closure.add(batch, step, loss, scale)
        self._loop_track(loss, weight, batch_output, batch, batch_size)
        run.step_results.append((batch, batch_output))
        if not run.makes_updates:
            run.count_step_of_subclass(step, batch_size)
            self._loop_end_train_step(step)

    def _loop_update(self) -> None:
        """Make one update: complete the gradients, clip them, step optimizer and scheduler, discard the gradients."""
        run, window = self._loop_run, self._loop_run.training.window
        if window.updated:
            discard_gradients(self.optimizer, window.updated)
        total_weight, num_samples = run.finish_exchange() if run.consensus.is_needed else (None, window.num_samples)
        if num_samples == 0 and has_skipped_all(run):
            _discard_gradients(self, run)
            return
        correction = window.close(total_weight, run.config.num_processes)
        self._loop_complete_gradients(correction)
        run.ledger.switch(OPTIMIZER)
        self._loop_fire(TrainerCallback.on_optimizer_step_start)
        if run.guards_updates:
            gradients = gradients_for(self.optimizer)  # held to the end: PyTorch creates the objects of each anew
            run.check_gradients(gradients, self.model)
        if run.config.gradient_clip_value is not None or run.config.gradient_clip_norm is not None:
            self._clip_gradients()
        if run.closure is None:
            self.optimizer_step()
        else:
            with run.updating_with_closure(self.optimizer, self._loop_repeat_steps, correction):
                self.optimizer_step()
        if window.updated:  # the hook has stepped some of several optimizers one by one
            window.updated.clear()
        run.training.progress.num_updates += 1
        run.training.progress.num_samples += num_samples
        was_made = run.uses_fast_path or self._accelerator.optimizer_step_was_skipped is not True
        if was_made and run.stepping.is_due_after_update and self.scheduler is not None:
            self.scheduler_step()
        self._loop_fire(TrainerCallback.on_optimizer_step_end)
        _discard_gradients(self, run)

    def _loop_complete_gradients(self, correction: float | torch.Tensor | None) -> None:
        """Make the gradients those of the mean over the window on all ranks, and unscale them."""
        run = self._loop_run
        if run.config.is_distributed:
            average_gradients(run.outside_parameters, run.config.num_processes)
        if correction is not None:
            scale_gradients(run.outside_parameters.together_with(self.model), correction)
        if not run.uses_fast_path and self._accelerator.scaler is not None:
            self._accelerator.unscale_gradients(self.optimizer)

    def _loop_repeat_steps(self, steps: list[WindowStep], correction: float | torch.Tensor | None) -> torch.Tensor:
        """Compute the gradients of a window again, and return the sum of its scaled losses; for a closure."""
        run, config, total = self._loop_run, self._loop_run.config, torch.zeros((), device=self.device)
        no_sync = choose_no_sync(self._accelerator, self.model, run.uses_fast_path)
        self.optimizer_zero_grad()
        for batch, step, scale in steps:
            with nullcontext() if step == steps[-1].step else no_sync(), run.ledger.during(FORWARD):
                batch_output = self.calculate_train_batch_loss(batch)
                self._loop_fire(TrainerCallback.on_backward_start, batch=batch, batch_output=batch_output, step=step)
                loss = scaled(batch_output["loss"], scale)
                run.ledger.switch(BACKWARD)
                self.backward_step(loss)
            total = total + loss.detach()
        self._loop_complete_gradients(correction)
        if config.gradient_clip_value is not None or config.gradient_clip_norm is not None:
            self._clip_gradients()
        return total

    def make_update(self, loss: torch.Tensor, optimizer: str | int, num_items: float = 1) -> None:
        """Make an update with one of several optimizers in the middle of a step; call it in a hook of the step.

        This is for networks that are trained in turns, such as a discriminator before its generator: compute the loss
        of the first, make its update, then return the loss of the second from `calculate_train_batch_loss`. The update
        of the run that follows leaves this optimizer out, and gradients of its parameters do not count there. It is not
        counted as an update of the run, but clipped and averaged over the processes like one. Must be called on every
        process.

        Args:
            loss: The loss, a scalar tensor. It must not depend on what the other optimizers train: use ``detach``.
            optimizer: The name or index of the optimizer in ``trainer.optimizer``. With several processes, its
                parameters should be no part of the trainer's model, whose wrapper averages the gradients of one loss.
            num_items: How much the loss of this process weighs, such as the size of its batch; for several processes.

        Raises:
            RuntimeError: No training epoch is under way, or the run uses a gradient scaler (fp16).
            TypeError: There is only one optimizer, or it needs a closure.
            KeyError: There is no optimizer of this name.
        """
        run, config = self._loop_run, self._loop_run.config
        check_run(run.is_training_run and run.makes_updates, "make_update", "on_train_step_start")
        member = choose_optimizer(self.optimizer, optimizer, has_scaler=self._accelerator.scaler is not None)
        member.zero_grad()
        self.backward_step(scaled(loss, run.share_of_ranks(num_items, self.device)))
        run.training.window.updated.add(optimizer)
        run.complete_single_update(member, self.model)
        clip_gradients(parameters_of(member), config.gradient_clip_value, config.gradient_clip_norm)
        member.step()
        member.zero_grad()

    def _clip_gradients(self) -> None:
        config, outside = self._loop_run.config, self._loop_run.outside_parameters
        # The gradients are unscaled already. With a scaler, Accelerate's functions would unscale them a second time.
        clip_functions: Any = self._accelerator if self._accelerator.scaler is None else nn.utils
        parameters = list(with_dense_gradients(outside.together_with(self.model)))
        if config.gradient_clip_value is not None:
            clip_functions.clip_grad_value_(parameters, config.gradient_clip_value)
        if config.gradient_clip_norm is not None:
            self._loop_run.gradient_norm = clip_functions.clip_grad_norm_(parameters, config.gradient_clip_norm)

    def _loop_end_train_step(self, step: int) -> None:
        run = self._loop_run
        run.training.progress.num_batches_in_epoch = step + 1
        if run.training.progress.num_updates >= run.training.recorder.next_update:
            record_steps(self, wait=False)
        run.ledger.switch(OTHER)
        results, run.step_results = run.step_results, []  # none if a subclass has replaced the step
        for batch, batch_output in results:
            if run.training.current_pass.is_dummy_step:
                batch, batch_output = without_samples(batch, batch_output)
            self._loop_fire(TrainerCallback.on_train_step_end, batch=batch, batch_output=batch_output, step=step)
        self._loop_count_step(step)
        run.check_signals()
        if run.consensus.is_pending:
            run.consensus.raise_if_stopped(run.is_update_due)

    def _loop_count_step(self, step: int) -> None:
        """Count a step of training or evaluation, and fire a log point if one is due."""
        current = self._loop_run.training.current_pass
        current.num_batches_done = step + 1
        if current.monitor.is_due():
            current.monitor.look(current.sums())
            if self._loop_run.time_limit is not None:
                self._loop_run.time_limit.check(self._loop_run)
            self._loop_fire(TrainerCallback.on_log_point)
            self._loop_run.warn_about_time()

    # --- evaluation ----------------------------------------------------------------------------------------------

    def _run_evaluation(self) -> None:
        run = self._loop_run
        with self.run_history.recording_evaluation():
            try:
                run.call(self.evaluation_run_start)
                self._loop_fire(TrainerCallback.on_evaluation_run_start)
                self._loop_evaluate(is_training=False)
            except StopTrainingError as stop:
                run.consensus.confirm(stop)
                self._loop_stop(stop)
            self._loop_end_run(self.evaluation_run_end, TrainerCallback.on_evaluation_run_end)

    def _loop_evaluate(self, is_training: bool = True, is_intermediate: bool = False) -> None:
        """Evaluate on each evaluation dataset; the name of a dataset goes in front of the names of its metrics."""
        run, progress = self._loop_run, self._loop_run.training.progress
        ends_epoch = is_training and not is_intermediate
        kind = {} if is_training else {"is_training": False}  # an override may take fewer arguments, as in 0.1.61
        if is_intermediate:
            kind["is_intermediate"] = True
        num_done = progress.num_evaluations_in_epoch if ends_epoch else 0  # before the run was resumed
        for name, loader in islice(run.eval_dataloaders.items(), num_done, None):
            run.is_evaluation_repeatable = ends_epoch
            with _metric_prefix(self.run_history, f"{name}_" if name else ""), run.ledger.during(EVALUATION):
                self._run_eval_epoch(loader, **kind)
            if ends_epoch:
                progress.num_evaluations_in_epoch += 1
            if not is_intermediate:  # otherwise a stop waits for the end of the training step
                run.consensus.sync()

    def _run_eval_epoch(self, valid_dl: Loader, is_training: bool = True, is_intermediate: bool = False) -> None:
        run = self._loop_run
        is_repeatable, run.is_evaluation_repeatable = run.is_evaluation_repeatable, False
        evaluation = DataPass("evaluation", valid_dl, is_intermediate)
        evaluation.loss_name = "eval_loss_epoch" if is_training else "evaluation_loss"
        with self._loop_suspend_training(evaluation), preserve_rng_state(), torch.no_grad():
            run.set_data_epoch(run.seeded_eval_loaders, valid_dl, 0, run.seed)
            run.call(self.eval_epoch_start)
            self._loop_fire(TrainerCallback.on_eval_epoch_start, is_intermediate=is_intermediate)
            sharding = sharding_of(valid_dl)
            # No variable holds the batches: it would keep the loader alive as long as an exception that ends the pass.
            for step, batch, _ in islice(
                run.ledger.waiting_for(enumerate_batches(valid_dl), EVALUATION_DATA), evaluation.max_num_steps
            ):
                evaluation.is_dummy_step = sharding is not None and sharding.is_dummy(step)
                run.call(self._loop_eval_step, batch, step)
                if is_repeatable:
                    run.check_signals()
            run.call(self._add_epoch_loss_to_run_history, evaluation.loss_name)
            run.call(self.eval_epoch_end)
            self._loop_fire(TrainerCallback.on_eval_epoch_end, is_intermediate=is_intermediate)

    def _loop_eval_step(self, batch: Batch, step: int) -> None:
        self._loop_fire(TrainerCallback.on_eval_step_start, batch=batch, step=step)
        batch_output = self.calculate_eval_batch_loss(batch)
        weight, size = read_batch_output(batch_output, "calculate_eval_batch_loss", may_have_several_losses=True)
        self._loop_track(mean_loss(batch_output["loss"]), weight, batch_output, batch, size)
        if self._loop_run.training.current_pass.is_dummy_step:
            batch, batch_output = without_samples(batch, batch_output)
        self._loop_fire(TrainerCallback.on_eval_step_end, batch=batch, batch_output=batch_output, step=step)
        self._loop_count_step(step)

    @contextmanager
    def _loop_suspend_training(self, evaluation: DataPass) -> Iterator[None]:
        """Make an evaluation the current pass; after an intermediate one, restore the mode of each module."""
        training, is_intermediate = self._loop_run.training, evaluation.is_intermediate
        is_nested = is_intermediate or self._loop_run.is_nested or self._loop_run.is_evaluating
        stem = stem_of(evaluation.loss_name)
        with (
            preserve_modes(vars(self).values() if is_intermediate else ()),
            training.optimizer_mode.evaluating(self.optimizer),
            training.suspended_by(evaluation, is_nested),
            self._loop_metrics.of_evaluation(self.run_history.metric_name_prefix) as evaluation.metrics,
            _metric_prefix(self.run_history, "intermediate_" if is_intermediate else ""),
            self.run_history.during_pass(stem),
        ):
            self._loop_run.start_metrics(evaluation, self.run_history.metric_name_prefix + stem)
            record_steps(self)
            if is_intermediate:
                self.run_history.update_metric("update", training.progress.num_updates)
            yield

    def _loop_predict(self, settings: PredictionSettings) -> dict[str, ModelOutput]:
        """Return the outputs for each of the datasets of the run, by name."""
        for callback in self.callback_handler.callbacks:  # predictions have no events
            if isinstance(callback, LimitBatchesCallback):
                self.limit_batches(callback.num_batches)
        run, config = self._loop_run, self._loop_run.config
        run.is_predicting = True
        results = {}
        is_training = run.training.optimizer_mode
        with (
            is_training.evaluating(self.optimizer),
            preserve_rng_state(),
            torch.no_grad(),
            run.ledger.during(EVALUATION),
        ):
            for name, loader in run.eval_dataloaders.items():
                run.set_data_epoch(run.seeded_eval_loaders, loader, 0, run.seed)
                self.eval_epoch_start()
                rank, caches = self._accelerator.process_index, caches_of(self.get_model())
                predictions = Predictions(settings, config, loader, self.device, rank, caches, self.print)
                results[name] = predictions.of_all_batches(self.calculate_predictions)
        return results

    def evaluate_now(self) -> None:
        """Evaluate in the middle of a training epoch; call it in ``on_train_step_end``, on every process.

        Metrics are recorded under their names with ``intermediate_`` in front, next to ``intermediate_update``, the
        number of updates so far. Training then continues as if there had been no evaluation.

        Raises:
            RuntimeError: No training run with evaluation data is under way.
        """
        run = self._loop_run
        check_run(
            run.is_active and bool(run.eval_dataloaders), "evaluate_now", "on_train_step_end", "with `eval_dataset` "
        )
        is_told = has_table(self.callback_handler)
        if not is_told:
            self.print(f"Evaluating after {run.training.progress.num_updates} updates")
        self._loop_evaluate(is_intermediate=True)
        if not is_told:
            self.print("Training continues")

    def evaluate_another(self, model: nn.Module, callback_handler: CallbackHandler, metric_name_prefix: str) -> None:
        """Evaluate another model on the data of the evaluation under way; call it in ``on_eval_epoch_end``.

        Must be called on every process. The trainer's own callbacks get no events of it, so it does not repeat itself.

        Args:
            model: The model, such as an average of the weights.
            callback_handler: Has the callbacks that get the events of this evaluation.
            metric_name_prefix: Put in front of the names of its metrics.

        Raises:
            RuntimeError: No evaluation is under way.
        """
        check_run(self._loop_run.is_evaluating, "evaluate_another", "on_eval_epoch_end")
        evaluation = self._loop_run.training.current_pass
        trained_model, handler = self.model, self.callback_handler
        self.model, self.callback_handler = model, callback_handler
        try:
            with _metric_prefix(self.run_history, metric_name_prefix), self._loop_run.ledger.during(EVALUATION):
                self._run_eval_epoch(evaluation.loader)
        finally:
            self.model, self.callback_handler = trained_model, handler

    # --- what a run records --------------------------------------------------------------------------------------

    def _loop_track(
        self,
        loss: float | torch.Tensor,
        weight: float | torch.Tensor,
        batch_output: BatchOutput,
        batch: Batch,
        batch_size: int,
    ) -> None:
        """Add loss and metrics of a step to the means of the epoch, unless its batch is a dummy."""
        current = self._loop_run.training.current_pass
        if not current.is_dummy_step:
            self._update_loss_tracker(loss, weight)
            if "metrics" in batch_output:
                current.means.update_metrics(batch_output, weight)
            if current.metrics is not None:
                current.metrics.update(self.get_metric_inputs, batch, batch_output, batch_size)

    def _update_loss_tracker(self, loss: float | torch.Tensor, batch_size: float | torch.Tensor) -> None:
        # What 0.1.61 calls the batch size is the weight of the batch.
        self._loop_run.training.current_pass.means.loss.update(loss, batch_size)

    def _add_epoch_loss_to_run_history(self, name: str) -> None:
        """Record the means over the epoch and all processes, that of the loss as ``name``; then the metrics."""
        record_steps(self)
        run = self._loop_run
        for metric, value in results_of_pass(run.training.current_pass, name, run.config, self.device).items():
            self.run_history.update_metric(metric, value)

    # --- events, and the end of a run ----------------------------------------------------------------------------

    def _loop_fire(self, event: Callable[..., None], **kwargs: object) -> None:
        """Send an event, given as a method of `TrainerCallback`, to the callbacks that implement it."""
        name = event.__name__
        if name in self.callback_handler.events_without_listeners:
            return
        try:
            self.callback_handler.call_event(name, self, **kwargs)
        except (StopTrainingError, NonFiniteLossError) as reason:
            if not is_ignored(self._loop_run, reason, self.print):
                self._loop_run.stop_on_all_ranks(reason)

    def _loop_end_run(self, hook: Callable[[], None], event: Callable[..., None]) -> None:
        run = self._loop_run
        with suppress(StopTrainingError):  # the run has ended already
            record_steps(self)
        with suppress(StopTrainingError):
            run.call(hook)
        with suppress(StopTrainingError):
            self._loop_fire(event)
            run.consensus.sync()
        run.warn_about_time(is_at_end=True)

    def _loop_stop(self, stop: StopTrainingError) -> None:
        run = self._loop_run
        run.ledger.switch(OTHER)
        run.stop_reason = _reason_of(stop)
        if isinstance(stop, RunInterruptedError):
            run.interruption = stop
        elif run.is_training_run:
            run.training.early_stop_reason = run.stop_reason
        self.print(f"\nStopping: {run.stop_reason}")
        with suppress(StopTrainingError):  # the run is being stopped already
            self._loop_fire(TrainerCallback.on_stop_training_error)
            run.consensus.sync()


def record_steps(trainer: TrainingLoop, *, wait: bool = True) -> None:
    """Record the values of steps that are due, and those taken before, and show them to the callbacks.

    Args:
        trainer: The trainer.
        wait: Whether to wait for those that are still on their way from the device.
    """
    run, history, recorder = run_of(trainer), trainer.run_history, run_of(trainer).training.recorder
    if recorder.is_due(run):
        take_step_values(run, history.current_epoch, trainer.optimizer, trainer.device)
    for moment, values in recorder.known(wait=wait):
        history._record_step(values, moment)  # noqa: SLF001 - a seam
        row = {**moment._asdict(), **values}
        trainer._loop_fire(TrainerCallback.on_step_values, row=row)  # noqa: SLF001 - same module


def can_skip_exchange_in(trainer: TrainingLoop) -> bool:
    """Return whether each rank knows the weights of the others, and no code of the user's can end the run here."""
    return can_skip_exchange(
        events_without_listeners=trainer.callback_handler.events_without_listeners,
        step_events=STEP_EVENTS,
        yields_full_batches=all(loader.yields_full_batches for loader in run_of(trainer).seeded_train_loaders),
        is_step_overridden=overrides_any(trainer, STEP_METHODS),
    )


def early_stop_reason(run: Run, callback_handler: CallbackHandler) -> str | None:
    """Return why the training has been stopped for good, or is about to be, by a callback earlier in an event."""
    reason, request = run.training.early_stop_reason, callback_handler.requested_stop or run.consensus.requested_stop
    if isinstance(request, RunInterruptedError):
        request = None
    is_requested = reason is None and request is not None and run.is_training_run
    return _reason_of(request) if is_requested else reason


def report_exception(trainer: TrainingLoop, error: BaseException) -> None:
    """Tell the callbacks of the exception that ends a run; what fails there is noted at it."""
    run_of(trainer).stop_reason = f"{type(error).__name__}: {error}"
    for secondary in trainer.callback_handler.call_event_on_all("on_exception", trainer, exception=error):
        add_note(error, f"a callback also failed in `on_exception`: {secondary!r}")


def _find_untrained_parameters(trainer: TrainingLoop, run: Run) -> None:
    """Warn about parameters that no optimizer holds, and keep them: nobody else discards their gradients."""
    model = trainer.get_model()
    attributes = [
        getattr(each, "__dict__", {}).values() for each in (trainer, *trainer.callback_handler.with_nested_callbacks())
    ]
    untrained = find_untrained(model, trainer.optimizer, chain.from_iterable(attributes))
    if run.config.is_world_process_zero:
        warn_about_untrained(model, untrained)
    run.untrained_parameters = list(untrained.values())


def _discard_gradients(trainer: TrainingLoop, run: Run) -> None:
    trainer.optimizer_zero_grad()
    for parameter in run.untrained_parameters:
        parameter.grad = None  # or they would add up, in the norm of the gradients for example


def _cut_epoch_short(trainer: TrainingLoop, run: Run) -> None:
    """End the training part of an epoch before its last batch: record the means of what was trained."""
    run.training.optimizer_mode.eval(trainer.optimizer)
    progress = run.training.progress
    if progress.num_batches_in_epoch > 0 or run.step_results:  # the latter of a step that has not ended
        trainer._add_epoch_loss_to_run_history("train_loss_epoch")  # noqa: SLF001 - same module
    progress.phase = "evaluation"


def _reason_of(stop: StopTrainingError | None) -> str:
    return str(stop) or "a callback asked to stop"


@contextmanager
def preserve_modes(objects: Iterable[object]) -> Iterator[None]:
    """Restore the mode, training or evaluation, of each module among some objects and within them after the body."""
    modules = [module for each in objects if isinstance(each, nn.Module) for module in each.modules()]
    modes = [module.training for module in modules]
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


@contextmanager
def _metric_prefix(history: RunHistory, prefix: str) -> Iterator[None]:
    outer = history.metric_name_prefix
    history.set_metric_name_prefix(outer + prefix)
    try:
        yield
    finally:
        history.set_metric_name_prefix(outer)
