"""`Trainer`: prepares model, data and schedule, and runs the loop over them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from pytorch_accelerated._accumulation import OutsideParameters
from pytorch_accelerated._arguments.moments import check_initialized, check_no_run
from pytorch_accelerated._arguments.numbers import (
    as_whole_number,
    check_numbers_of_run,
    check_positive_integer,
    check_seed,
    warn_about_long_accumulation,
)
from pytorch_accelerated._arguments.parts import check_loss_func, check_model, check_run_history
from pytorch_accelerated._checkpoint import resume
from pytorch_accelerated._checkpoint.manifest import SavedState
from pytorch_accelerated._checkpoint.reading import read_state
from pytorch_accelerated._checkpoint.restoring import prepare_new_schedule, undone_if_refused
from pytorch_accelerated._checkpoint.scheduler_state import (
    check_scheduler_state,
    load_scheduler_state,
    restore_settings_of_groups,
    settings_of_groups,
)
from pytorch_accelerated._checkpoint.weights import LoadedCheckpoint as LoadedCheckpoint
from pytorch_accelerated._checkpoint.writer import StateWriter
from pytorch_accelerated._data.build import rebuild_loader
from pytorch_accelerated._data.checks import (
    check_data_not_empty,
    check_data_of_loader,
    check_loader_not_empty,
    check_reiterable,
    explain_bad_data,
    warn_about_ready_batches,
)
from pytorch_accelerated._data.defaults import (
    EvaluationSettings,
    chosen_batch_size,
    default_dl_kwargs,
    merge_dl_kwargs,
)
from pytorch_accelerated._data.determinism import SeededLoader
from pytorch_accelerated._data.limits import LIMIT_BATCHES_ENV_VAR, limit_from_environment
from pytorch_accelerated._data.loaders import batch_size_of, is_dataset, num_batches_of
from pytorch_accelerated._data.rng import derive_seed, restore_generators, seed_generators
from pytorch_accelerated._data.workers import defer_worker_errors
from pytorch_accelerated._data.workers import worker_init_fn as worker_init_fn  # as in 0.1.61
from pytorch_accelerated._distributed.accelerator import (
    PreparedModel,
    check_clipping,
    choose_seed,
    create_accelerator,
    disable_loss_scaling,
    has_comm_hook,
    is_sharded,
    placement_of,
    prepare,
    rank_of,
    release,
)
from pytorch_accelerated._distributed.collectives import num_local_processes
from pytorch_accelerated._distributed.collectives import remove_padding as remove_padding  # as in 0.1.61
from pytorch_accelerated._distributed.consensus import StopConsensus, overrides_any, replaces_any
from pytorch_accelerated._distributed.copies import attributes_of_copy, state_to_copy
from pytorch_accelerated._distributed.fast_path import can_use_fast_path
from pytorch_accelerated._distributed.precision import precision_of, warn_about_unused_precision
from pytorch_accelerated._distributed.waiting import announce_end, explain_vain_wait, start_run
from pytorch_accelerated._hints.arguments import explains_arguments
from pytorch_accelerated._hints.classes import words_of_user
from pytorch_accelerated._history.records import metrics_of_evaluation, num_recorded, records_since
from pytorch_accelerated._loop import can_skip_exchange_in, preserve_modes, report_exception
from pytorch_accelerated._measuring.metric_set import MetricSet
from pytorch_accelerated._predictions import OutputChoice, PredictionSettings
from pytorch_accelerated._requests.time_limit import read_limits
from pytorch_accelerated._run import Run, do_nothing
from pytorch_accelerated._saving import SavingLoop
from pytorch_accelerated._scheduling.start import choose_stepping, warn_about_no_scheduler
from pytorch_accelerated._scheduling.stepping import Interval
from pytorch_accelerated._start import checks
from pytorch_accelerated._start.resuming import find_state, folders_of_states
from pytorch_accelerated._start.schedule import take_over_scheduler
from pytorch_accelerated._start.updates import set_up_parameters, set_up_window
from pytorch_accelerated._types import (
    CollateFunction,
    Data,
    DataLoaderKwargs,
    EvalData,
    Loader,
    LossFunction,
    Metrics,
    MetricValue,
    ModelOutput,
    Optimizers,
    SchedulerFactory,
    Schedulers,
    StateDict,
    TimmScheduler,
)
from pytorch_accelerated.callbacks import (  # those renamed to themselves can be imported from here, as in 0.1.61
    CallbackHandler,
    LimitBatchesCallback,
    get_default_callbacks,
)
from pytorch_accelerated.callbacks import LogMetricsCallback as LogMetricsCallback
from pytorch_accelerated.callbacks import MoveModulesToDeviceCallback as MoveModulesToDeviceCallback
from pytorch_accelerated.callbacks import PrintProgressCallback as PrintProgressCallback
from pytorch_accelerated.callbacks import ProgressBarCallback as ProgressBarCallback
from pytorch_accelerated.callbacks import StopTrainingError as StopTrainingError
from pytorch_accelerated.callbacks import TerminateOnNaNCallback as TerminateOnNaNCallback
from pytorch_accelerated.callbacks.handler import Callbacks
from pytorch_accelerated.run_config import TrainerRunConfig, derive_run_config
from pytorch_accelerated.schedulers._placeholders import TrainerPlaceholderValues, replace_trainer_placeholder_values
from pytorch_accelerated.time_ledger import SAVING
from pytorch_accelerated.tracking import EVALUATION_PREFIX, RunHistory
from pytorch_accelerated.tracking import InMemoryRunHistory as InMemoryRunHistory  # as in 0.1.61
from pytorch_accelerated.tracking import LossTracker as LossTracker  # as in 0.1.61

__all__ = [
    "DEFAULT_CALLBACKS",
    "LIMIT_BATCHES_ENV_VAR",
    "Trainer",
    "TrainerPlaceholderValues",
    "TrainerWithTimmScheduler",
    "replace_trainer_placeholder_values",
]

DEFAULT_CALLBACKS = get_default_callbacks()


class Trainer(SavingLoop):
    """Trains and evaluates a model, on one process or many, and lets subclasses and callbacks take part.

    Creating a trainer checks nothing; its parts are checked when a run starts. Override the methods
    below to change what a step does. Write a :class:`~pytorch_accelerated.callbacks.TrainerCallback` to act alongside
    it.

    Args:
        model: The model. Called with the first item of a batch; see `calculate_train_batch_loss`.
        loss_func: Called with the model's outputs and the second item of a batch. ``None`` if the model returns its
            loss.
        optimizer: The optimizer of the model's parameters, or several in a list or dictionary; see `docs/loop.md`.
            ``None`` if the trainer only evaluates.
        callbacks: Callbacks, as instances or classes, called in this order. One alone needs no list; ``None`` is none.
        run_history: Where metrics are recorded; in memory by default.
        mixed_precision: ``"no"``, ``"fp16"``, ``"bf16"`` or ``"fp8"``; ``None`` for the one configured in Accelerate.
            Each trainer of a process has its own, except with FSDP and DeepSpeed.
        seed: Seeds all random number generators now, and the data order of each run. With ``None`` nothing is seeded,
            and the data order derives from the seed that the program passed to ``torch.manual_seed``.
        accelerator: An `accelerate.Accelerator`, or keyword arguments to create one with.
        metrics: Computed on the training data and on each evaluation dataset, and recorded as ``train_<name>``,
            ``eval_<name>`` and so on: a dictionary of metrics of torchmetrics or of `pytorch_accelerated.metrics`, or
            of functions, which are called with what `get_metric_inputs` returns and averaged over the samples. See
            `docs/metrics.md`.
        compute_train_metrics: Whether they are computed on the training data too.
        verbose: Whether to print anything. With ``False`` there are no bars and no table, and `print` does nothing;
            warnings and errors remain. The default callbacks print on the main process only.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> dataset = TensorDataset(torch.randn(64, 3), torch.randn(64, 1))
        >>> model = nn.Linear(3, 1)
        >>> trainer = Trainer(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), callbacks=())
        >>> history = trainer.train(dataset, num_epochs=2, eval_dataset=dataset, per_device_batch_size=16)
        >>> sorted(trainer.run_history.get_metric_names())
        ['eval_loss_epoch', 'train_loss_epoch']
    """

    @explains_arguments
    def __init__(
        self,
        model: nn.Module,
        loss_func: LossFunction | None,
        optimizer: Optimizers | None,
        callbacks: Callbacks = DEFAULT_CALLBACKS,
        run_history: RunHistory | None = None,
        *,
        mixed_precision: str | None = None,
        seed: int | None = None,
        accelerator: Accelerator | Mapping[str, Any] | None = None,
        metrics: Metrics | None = None,
        compute_train_metrics: bool = True,
        verbose: bool = True,
    ) -> None:
        check_seed(seed)
        check_run_history(run_history)
        super().__init__(model, loss_func, optimizer, run_history, MetricSet(metrics, compute_train_metrics))
        self.train_dataset = None
        self.eval_dataset = None
        self.collate_fn: CollateFunction | None = None
        self.create_scheduler_fn: SchedulerFactory | None = None
        self._loop_last_evaluation = EvaluationSettings()
        self._callbacks: Callbacks = tuple(callbacks) if isinstance(callbacks, Iterator) else callbacks
        self._loop_seed = seed
        self._loop_accelerator_source = accelerator
        self._loop_mixed_precision = mixed_precision
        self._loop_state_writer = StateWriter()
        self._loop_pending_scheduler_state = None
        self._accelerator = self._create_accelerator()
        warn_about_unused_precision(self._accelerator)
        rank = rank_of(self._accelerator)
        self._loop_run = Run(0, rank, is_sharded(self._accelerator))
        self._loop_run.is_verbose = verbose
        if seed is not None:
            seed_generators(derive_seed(seed, "rank", rank) if rank else seed)
        self.callback_handler = self._create_callback_handler()
        checks.warn_about_uncalled_hooks(self)
        self.callback_handler.call_event("on_init_end", self)

    # --- entry points --------------------------------------------------------------------------------------------

    @explains_arguments
    def train(
        self,
        train_dataset: Data,
        num_epochs: int,
        eval_dataset: EvalData | None = None,
        per_device_batch_size: int = 8,
        max_num_train_steps: int | None = None,
        gradient_accumulation_steps: int = 1,
        gradient_clip_value: float | None = None,
        create_scheduler_fn: SchedulerFactory | None = None,
        train_dataloader_kwargs: DataLoaderKwargs | None = None,
        eval_dataloader_kwargs: DataLoaderKwargs | None = None,
        reset_run_history: bool = True,
        collate_fn: CollateFunction | None = None,
        resume_from: str | os.PathLike[str] | bool | None = None,
        *,
        gradient_clip_norm: float | None = None,
        allow_other_num_processes: bool = False,
        step_scheduler: Interval | None = None,
        scheduler_metric: str | None = None,
        max_time: str | timedelta | None = None,
        min_epochs: int | None = None,
    ) -> RunHistory:
        """Train the model.

        In short, without the events, which :class:`~pytorch_accelerated.callbacks.TrainerCallback` lists::

            for epoch in range(num_epochs):
                train_epoch_start()
                for batch in train_dataloader:
                    loss = calculate_train_batch_loss(batch)["loss"]
                    backward_step(loss)
                    if an update is due:  # after gradient_accumulation_steps batches
                        optimizer_step()
                        scheduler_step()
                        optimizer_zero_grad()
                train_epoch_end()
                for batch in eval_dataloader:
                    calculate_eval_batch_loss(batch)
                if the scheduler is stepped once per epoch:
                    scheduler_step()

        Args:
            train_dataset: A dataset of samples, or an iterable of batches.
            num_epochs: Passes over the training data; at least 1.
            eval_dataset: Evaluated after each epoch: a dataset, or a dictionary of datasets, whose names are put in
                front of the names of their metrics. ``None`` for no evaluation.
            per_device_batch_size: Samples in a batch of one process; ``None`` for that in the loader's arguments.
            max_num_train_steps: Updates after which the run ends, unless ``num_epochs`` ends it before.
            gradient_accumulation_steps: Batches per process that make one update.
            gradient_clip_value: Bound for the absolute value of each entry of the gradient, applied before each update.
            create_scheduler_fn: Creates the learning-rate scheduler from the optimizer, or several in a list or
                dictionary. The arguments of a `functools.partial` may be :class:`TrainerPlaceholderValues`.
            train_dataloader_kwargs: Keyword arguments for the training `DataLoader`; they override the defaults.
            eval_dataloader_kwargs: Keyword arguments for the evaluation `DataLoader`.
            reset_run_history: Whether to forget the metrics and the epoch count of earlier runs.
            collate_fn: Makes a batch from samples, in both loaders.
            resume_from: A directory that `save_training_state` wrote. The run continues from there, up to
                ``num_epochs``. ``"latest"``, or ``True``, takes the newest valid state that the run's
                ``SaveTrainingStateCallback`` saved; if there is none, the run starts from scratch.
            gradient_clip_norm: Bound for the norm of all gradients together, applied before each update. The norm
                before clipping is in ``trainer.gradient_norm``, from ``on_optimizer_step_end`` on.
            allow_other_num_processes: Whether to resume a state that a different number of processes saved: at the same
                place in the data, but not exactly.
            step_scheduler: ``"update"`` to step the scheduler after each update, ``"epoch"`` to step it at the end of
                each epoch. With ``None``, it is stepped after each update, and a warning tells of a schedule that
                evidently counts epochs. A scheduler that takes a metric, such as ``ReduceLROnPlateau``, is stepped
                after the evaluation of each epoch in any case, and one of timm decides itself.
            scheduler_metric: The metric in the run history that such a scheduler is stepped with, once per epoch in
                which it was recorded. ``None`` for the evaluation loss, or the training loss if there is no
                ``eval_dataset``.
            max_time: The time after which the run ends, such as ``"10 min"`` or ``"1.5 h"``, counted from this call.
                The epoch under way is then cut short after an update, and evaluated. ``None`` for no limit.
            min_epochs: Epochs before whose end neither callbacks, nor `stop`, nor ``max_time`` end the run: requests
                before are told and not followed. Signals, errors and ``max_num_train_steps`` still do.

        Returns:
            ``trainer.run_history``, which shows what was recorded as a table, a CSV file or a data frame.

        Raises:
            ValueError: An argument has an invalid value, or model and optimizer do not belong together.
            CheckpointError: The state to resume is damaged, or does not fit the trainer; nothing has been changed.
            TypeError: An argument has the wrong type.
            KeyboardInterrupt: Ctrl-C was pressed; the run ended gracefully first.
            SystemExit: Same for another signal that a callback listens to; the code is 128 + its number.
        """
        _check_not_running(self)
        per_device_batch_size = chosen_batch_size(per_device_batch_size, train_dataloader_kwargs)
        numbers: dict[str, Any] = {
            "per_device_batch_size": per_device_batch_size,
            "num_epochs": num_epochs,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "max_num_train_steps": as_whole_number(max_num_train_steps),
            "gradient_clip_value": gradient_clip_value,
            **({} if gradient_clip_norm is None else {"gradient_clip_norm": gradient_clip_norm}),
        }
        check_numbers_of_run(**numbers)
        check_reiterable(train_dataset, eval_dataset, num_epochs, max_num_train_steps)
        stepping = choose_stepping(step_scheduler, scheduler_metric)
        limits = read_limits(max_time, min_epochs, num_epochs)
        self.optimizer = checks.check_parts_of_training(self, create_scheduler_fn, is_sharded(self._accelerator))

        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.collate_fn, self.create_scheduler_fn = collate_fn, create_scheduler_fn
        _warn_about_start(self, per_device_batch_size, train_dataloader_kwargs, eval_dataloader_kwargs)
        with self._loop_run_context() as run:
            run.stepping, (run.time_limit, run.min_epochs) = stepping, limits
            state = find_state(self, self._accelerator, resume_from, allow_other_num_processes)
            self._loop_make_train_loader(per_device_batch_size, train_dataloader_kwargs)
            if eval_dataset is not None:
                self._loop_make_eval_loaders(per_device_batch_size, eval_dataloader_kwargs)
            self._loop_prepare_run(**numbers)
            self._loop_set_up_training(num_epochs, state, reset_run_history)
            self._run_training()
            _complete_saving(self)
        run.raise_interruption()
        return self.run_history

    @explains_arguments
    def evaluate(
        self,
        dataset: EvalData | None = None,
        per_device_batch_size: int = 8,
        dataloader_kwargs: DataLoaderKwargs | None = None,
        collate_fn: CollateFunction | None = None,
    ) -> dict[str, MetricValue]:
        """Evaluate the model, before, after or without training; needs no optimizer.

        The loss is recorded as ``evaluation_loss`` in the run history, which keeps what training recorded. What
        callbacks and hooks record meanwhile gets ``evaluation_`` in front too, and `RunHistory.get_latest_metric` finds
        it by its plain name until training records it again.

        Args:
            dataset: A dataset of samples, an iterable of batches, or a dictionary of these. ``None`` for the one that
                was evaluated last, with the arguments of that evaluation where they are not given here.
            per_device_batch_size: Samples in a batch of one process; ``None`` for that in the loader's arguments.
            dataloader_kwargs: Keyword arguments for the `DataLoader`; they override the defaults.
            collate_fn: Makes a batch from samples.

        Returns:
            ``loss``, and the metrics of steps and callbacks, by their plain names. For a dictionary of datasets, such a
            dictionary for each.

        Raises:
            ValueError: There is nothing to evaluate.
        """
        check_initialized(self, "_loop_run")
        if not overrides_any(self, ["calculate_eval_batch_loss"]):
            check_loss_func(self.loss_func)
        checks.warn_about_ready_loaders(self, (None, dataset), per_device_batch_size, collate_fn, (dataloader_kwargs,))
        settings = EvaluationSettings(per_device_batch_size, dataloader_kwargs, collate_fn)
        with _without_trace_in_a_run(self):
            if dataset is not None:
                self.eval_dataset = dataset
            else:
                settings = settings.completed_by(self._loop_last_evaluation)
            names = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
            num_before = num_recorded(self.run_history)
            with self._loop_evaluation_context(*settings):
                self._run_evaluation()
            return metrics_of_evaluation(records_since(self.run_history, num_before), EVALUATION_PREFIX, names)

    @explains_arguments
    def predict(
        self,
        dataset: EvalData,
        per_device_batch_size: int = 8,
        dataloader_kwargs: DataLoaderKwargs | None = None,
        collate_fn: CollateFunction | None = None,
        *,
        on_every_process: bool = True,
        move_to_host: bool = True,
        outputs: OutputChoice = None,
        return_targets: bool = False,
        padding_value: float | None = None,
    ) -> ModelOutput:
        """Return the model's outputs for a dataset, in its order, once per sample. Must be called on every process.

        What `calculate_predictions` returns for each batch is put together, without gradients: the rows of tensors and
        NumPy arrays, and the entries of lists that have one for each sample, such as the boxes of a detector, in
        mappings, dataclasses and tuples of any depth. A single number, such as a loss, becomes its mean over all
        samples. What has no part for each sample, such as a cache, is left out, with a warning unless it is
        ``past_key_values``: it is missing in a mapping, and ``None`` elsewhere.

        Args:
            dataset: A dataset of samples, an iterable of batches, or a dictionary of these.
            per_device_batch_size: Samples in a batch of one process; ``None`` for that in the loader's arguments.
            dataloader_kwargs: Keyword arguments for the `DataLoader`; they override the defaults.
            collate_fn: Makes a batch from samples.
            on_every_process: Whether all processes get the outputs; otherwise all but the main process get ``None``.
            move_to_host: Whether to move the outputs to host memory after each batch, or to keep them on the device.
            outputs: What to keep of the model's outputs: a name or an index for that one alone, several of them, or a
                function that is called with the outputs of each batch. Nothing else takes up memory.
            return_targets: Whether to return the targets too: the second item of each batch, or its ``labels``,
                ``targets`` or ``y``.
            padding_value: Fills the dimensions after the first where batches differ in them, at their end. With
                ``None`` they must agree.

        Returns:
            What the model returns for a batch, with the parts of all samples; tensors of shape ``(samples, ...)``.
            With ``return_targets``, a pair of this and the targets. For a dictionary of datasets, a dictionary.

        Raises:
            ValueError: The outputs of a batch cannot be joined to those before, or have no part for each sample.
        """
        check_initialized(self, "_loop_run")
        checks.warn_about_ready_loaders(self, (None, dataset), per_device_batch_size, collate_fn, (dataloader_kwargs,))
        run, callbacks = self._loop_run, self.callback_handler.callbacks
        has_bar = any(isinstance(callback, ProgressBarCallback) for callback in callbacks)
        shows_progress = has_bar and run.is_verbose and not run.is_active  # the bar of the run stays
        settings = PredictionSettings(
            outputs, return_targets, padding_value, on_every_process, move_to_host, shows_progress
        )
        with _without_trace_in_a_run(self), _preserve_attributes(self, "eval_dataset", "_loop_last_evaluation"):
            self.eval_dataset = dataset
            with self._loop_evaluation_context(per_device_batch_size, dataloader_kwargs, collate_fn):
                results = self._loop_predict(settings)
        return results if isinstance(dataset, dict) else results[""]

    # --- hooks: override them to change what happens -------------------------------------------------------------

    def get_default_train_dl_kwargs(self, batch_size: int) -> dict[str, Any]:
        """Return the default keyword arguments of the training loader; the user's are merged into them."""
        return {"shuffle": True, **_default_dl_kwargs(self.train_dataset, batch_size, self._accelerator)}

    def get_default_eval_dl_kwargs(self, batch_size: int) -> dict[str, Any]:
        """Return the default keyword arguments of the evaluation loader; the user's are merged into them."""
        return {"shuffle": False, **_default_dl_kwargs(self.eval_dataset, batch_size, self._accelerator)}

    def create_train_dataloader(self, batch_size: int, train_dl_kwargs: DataLoaderKwargs | None = None) -> Loader:
        """Create the loader of ``self.train_dataset``; any iterable of batches will do."""
        if not is_dataset(self.train_dataset):
            return self.train_dataset  # type: ignore[no-any-return]
        defaults = self.get_default_train_dl_kwargs(batch_size)
        self._train_dl_kwargs = dl_kwargs = merge_dl_kwargs(defaults, train_dl_kwargs, self.train_dataset)
        return DataLoader(dataset=self.train_dataset, **{"collate_fn": self.collate_fn, **dl_kwargs})

    def create_eval_dataloader(self, batch_size: int, eval_dl_kwargs: DataLoaderKwargs | None = None) -> Loader:
        """Create the loader of ``self.eval_dataset``; any iterable of batches will do."""
        if not is_dataset(self.eval_dataset):
            return self.eval_dataset  # type: ignore[no-any-return]
        defaults = self.get_default_eval_dl_kwargs(batch_size)
        self._eval_dl_kwargs = dl_kwargs = merge_dl_kwargs(defaults, eval_dl_kwargs, self.eval_dataset)
        return DataLoader(dataset=self.eval_dataset, **{"collate_fn": self.collate_fn, **dl_kwargs})

    def create_scheduler(self) -> Schedulers | None:
        """Create the learning-rate scheduler of a run, or several in a list or dictionary.

        If it returns ``None``, the run uses the scheduler that the program has set as ``self.scheduler``, if any.
        """
        if self.create_scheduler_fn is None:
            return None
        return replace_trainer_placeholder_values(self, self.create_scheduler_fn)(self.optimizer)

    # --- the start and the end of a run --------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made from. Outside a run, `pickle` and `copy.deepcopy` work at any time."""
        return state_to_copy(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy of another trainer, or the one that was pickled."""
        vars(self).update(attributes_of_copy(state))

    def _create_accelerator(self) -> Accelerator:
        """Create the accelerator that serves all runs of this trainer."""
        return create_accelerator(self._loop_accelerator_source, self._loop_mixed_precision)

    def _create_callback_handler(self) -> CallbackHandler:
        limit = limit_from_environment()
        handler = CallbackHandler(None if limit is None else LimitBatchesCallback(limit))
        handler.other_words = words_of_user(type(self))
        handler.add_callbacks(self._callbacks)
        return handler

    @contextmanager
    def _loop_run_context(self) -> Iterator[Run]:
        """Start a run. At its end, report an exception to the callbacks, clean up, and return to an outer run."""
        outer, accelerator = self._loop_run, self._accelerator
        rank, num_processes = rank_of(accelerator), int(accelerator.num_processes)
        seed = choose_seed(self._loop_seed, rank, num_processes)
        run = self._loop_run = Run(seed, rank, is_sharded(accelerator), previous=outer)
        run.metrics = self._loop_metrics
        run.metrics.place(self.device)
        run.is_active = True
        self.callback_handler.refresh()
        start_run()
        try:
            with restore_generators(), run.keeping_time():
                yield run
        except BaseException as error:
            with defer_worker_errors():  # the run has failed with another error already
                try:
                    announce_end(error)
                    explain_vain_wait(error)
                    self._loop_state_writer.finish(error)
                    report_exception(self, error)
                finally:
                    self._loop_teardown(run, outer)
                raise
        with defer_worker_errors():
            self._loop_teardown(run, outer)

    @contextmanager
    def _loop_evaluation_context(
        self, batch_size: int, dl_kwargs: DataLoaderKwargs | None, collate_fn: CollateFunction | None
    ) -> Iterator[None]:
        """Prepare a pass over ``self.eval_dataset``, and clean up afterwards."""
        batch_size = chosen_batch_size(batch_size, dl_kwargs)
        check_positive_integer("per_device_batch_size", batch_size, "samples")
        check_model(self.model)
        self.collate_fn = collate_fn
        with self._loop_run_context() as run:
            self._loop_make_eval_loaders(batch_size, dl_kwargs)
            self._loop_prepare_run(
                per_device_batch_size=batch_size,
                num_epochs=1,
                gradient_accumulation_steps=1,
                max_num_train_steps=None,
                gradient_clip_value=None,
            )
            self._check_eval_batch_size()
            run.consensus = _create_consensus(self)
            run.record_in(self.run_history)
            yield

    def _loop_make_train_loader(self, batch_size: int, dl_kwargs: DataLoaderKwargs | None) -> None:
        self._loop_run.train_dl_kwargs = None  # those of an earlier run
        checks.check_data(self, "train_dataset", self.train_dataset, dl_kwargs, DataLoader)
        with explain_bad_data("train_dataset", self.train_dataset):
            loader = self.create_train_dataloader(batch_size=batch_size, train_dl_kwargs=dl_kwargs)
        seeded_loader = _seed_loader("train_dataset", loader, self._accelerator)
        check_loader_not_empty("train_dataset", loader)
        self._loop_run.seeded_train_loaders = [seeded_loader]
        self._loop_run.train_dataloader = seeded_loader.loader

    def _loop_make_eval_loaders(self, batch_size: int, dl_kwargs: DataLoaderKwargs | None) -> None:
        run, datasets = self._loop_run, self.eval_dataset
        if isinstance(datasets, dict):
            check_data_not_empty("eval_dataset", list(datasets))
        self._loop_last_evaluation = EvaluationSettings(batch_size, dl_kwargs, self.collate_fn)
        named_datasets = datasets if isinstance(datasets, dict) else {"": datasets}
        checks.check_data(self, "eval_dataset", datasets, dl_kwargs, DataLoader)
        try:
            for name, dataset in named_datasets.items():
                self.eval_dataset = dataset  # which the hook reads
                with explain_bad_data("eval_dataset", dataset):
                    loader = self.create_eval_dataloader(batch_size=batch_size, eval_dl_kwargs=dl_kwargs)
                if loader is not None:
                    seeded_loader = _seed_loader("eval_dataset", loader, self._accelerator)
                    run.seeded_eval_loaders.append(seeded_loader)
                    run.eval_dataloaders[name] = seeded_loader.loader
        finally:
            self.eval_dataset = datasets

    def _loop_prepare_run(self, **numbers: Any) -> None:
        """Prepare model, optimizer and loaders, and fix the configuration of the run."""
        run = self._loop_run
        self._prepare_model_optimizer_and_dataloaders()
        run.show_users_arguments()
        run.config = self.run_config = self._create_run_config(**numbers)
        run.metrics.check_names(run.eval_dataloaders, run.is_training_run)
        if not overrides_any(self, ("_clip_gradients",)):
            check_clipping(self._accelerator, run.config.gradient_clip_value, run.config.gradient_clip_norm)

    def _prepare_model_optimizer_and_dataloaders(self) -> None:
        run = self._loop_run
        run.prepared_model = PreparedModel(self.model)
        self.model, self.optimizer, run.train_dataloader, run.eval_dataloaders = prepare(
            self._accelerator, self.model, self.optimizer, run.train_dataloader, run.eval_dataloaders
        )
        run.prepared_model.prepared = self.model
        run.uses_fast_path = can_use_fast_path(self._accelerator)
        is_free_to_read = torch.empty(0, device=self._accelerator.device).is_cpu
        run.can_guard_updates = is_free_to_read and self._accelerator.scaler is None and not run.is_sharded

    def _create_run_config(
        self,
        per_device_batch_size: int,
        num_epochs: int,
        gradient_accumulation_steps: int,
        max_num_train_steps: int | None,
        gradient_clip_value: float | None,
        gradient_clip_norm: float | None = None,  # only passed if it was asked for: 0.1.61 does not have it
    ) -> TrainerRunConfig:
        run, accelerator = self._loop_run, self._accelerator
        config = derive_run_config(
            num_epochs=num_epochs,
            num_batches_per_epoch=num_batches_of(run.train_dataloader),
            gradient_accumulation_steps=gradient_accumulation_steps,
            max_num_train_steps=max_num_train_steps,
            num_processes=int(accelerator.num_processes),
            gradient_clip_value=gradient_clip_value,
            gradient_clip_norm=gradient_clip_norm,
            train_per_device_batch_size=batch_size_of(run.train_dataloader, run.train_dl_kwargs, per_device_batch_size),
            train_dl_kwargs=run.train_dl_kwargs,
            eval_per_device_batch_size=batch_size_of(run.eval_dataloader, run.eval_dl_kwargs, per_device_batch_size),
            eval_dl_kwargs=run.eval_dl_kwargs,
            is_local_process_zero=accelerator.is_local_main_process,
            is_world_process_zero=accelerator.is_main_process,
            mixed_precision=precision_of(accelerator),
            seed=run.seed,
        )
        if run.is_training_run:
            return config
        return replace(config, num_update_steps_per_epoch=0, num_local_update_steps_per_epoch=0)

    def _loop_set_up_training(
        self, num_epochs: int, state: SavedState | Callable[[], StateDict] | None, reset_run_history: bool
    ) -> None:
        """Prepare everything that a training run needs next to model and loaders.

        The order matters: settings are taken before a scheduler changes the optimizer; a state is restored when there
        is a scheduler to restore. If it does not fit, nothing of the previous run is forgotten.
        """
        run, config = self._loop_run, self._loop_run.config
        self._check_eval_batch_size()
        run.consensus = _create_consensus(self)
        disable_loss_scaling(self._accelerator, config.gradient_accumulation_steps)
        with ExitStack() as undo:
            if state is not None or self._loop_pending_scheduler_state is not None:
                kept = _attributes_of_training(self, run)
                undo.enter_context(undone_if_refused(self._loop_state_parts(), self._accelerator, kept))
            run.training.settings = resume.run_settings(
                config, self.train_dataset, run.train_dataloader, self.optimizer, self.loss_func, self._loop_seed
            )
            num_batches = run.training.settings["num_batches_per_epoch"]
            warn_about_long_accumulation(config.gradient_accumulation_steps, num_batches)
            if isinstance(state, SavedState):
                parts = self._loop_state_parts()
                contents = read_state(state, self._accelerator, parts)
                prepare_new_schedule(contents, parts)
                state = partial(self._loop_restore, contents)
            if reset_run_history:
                run.reset_history(self.run_history)
            set_up_parameters(run, self.model, self.optimizer, has_comm_hook(self._accelerator))
            self._loop_set_up_scheduler(is_resumed=state is not None)
            window = set_up_window(run, self.optimizer, self._accelerator, replaces_any(self, ["optimizer_step"]))
            num_epochs = config.num_epochs if overrides_any(self, ("_create_run_config",)) else num_epochs
            run.start_training(self.run_history.current_epoch - 1, num_epochs, window)
            saves_states = bool(folders_of_states(self.callback_handler))
            self._loop_companions().check_before_run(saves_states, config.is_distributed)
            if state is not None:
                self._loop_resume(state, num_epochs)
            run.complete_start = _what_completes_start(self)

    def _loop_set_up_scheduler(self, is_resumed: bool) -> None:
        """Create the scheduler of the run, or else keep one that the program has set; not one of an earlier run."""
        run, is_set_by_program = self._loop_run, False

        def create_or_keep() -> Schedulers | None:
            nonlocal is_set_by_program
            created = self.create_scheduler()
            is_set_by_program = created is None and self.scheduler is not run.created_scheduler
            return self.scheduler if is_set_by_program else created

        self.scheduler = take_over_scheduler(self, create_or_keep, isinstance(self, TrainerWithTimmScheduler))
        run.created_scheduler = None if is_set_by_program else self.scheduler
        if not is_resumed:
            _load_pending_scheduler_state(self)

    def _loop_resume(self, restore: Callable[[], StateDict], num_epochs: int) -> None:
        """Continue where a training state left off.

        Args:
            restore: Restores the state, and returns the user's entries.
            num_epochs: The number of epochs at which training ends.
        """
        run = self._loop_run
        run.is_resuming = True
        try:
            current_epoch = resume.entries_of(restore(), "load_training_state").get("current_epoch")
        finally:
            run.is_resuming = False
        if current_epoch is not None:
            self.run_history._set_epoch(current_epoch)  # noqa: SLF001 - a seam of 0.1.61
            run.training.move_to_epoch(int(current_epoch))
        run.start_resumed_training(num_epochs)
        saved = run.training.lineage.origin
        if saved is not None:
            self.print(f"Resuming from {saved.path.name!r} in epoch {self.run_history.current_epoch}.")
        if run.limit_of_exactness is not None:
            self.print(run.limit_of_exactness)

    def _check_eval_batch_size(self) -> None:
        """Refuse evaluation data that yields no batch; a subclass may demand more."""
        for loader in self._loop_run.eval_dataloaders.values():
            check_loader_not_empty("eval_dataset", loader)

    def _loop_teardown(self, run: Run, outer: Run) -> None:
        run.is_active = False  # first, because a signal may interrupt the rest
        try:
            if run.training.optimizer_mode.is_training and not outer.is_active:
                run.training.optimizer_mode.eval(self.optimizer)
            for seeded_loader in (*run.seeded_train_loaders, *run.seeded_eval_loaders):
                seeded_loader.end_run()
            release(self._accelerator, run.train_dataloader, *run.eval_dataloaders.values())
            model, run.prepared_model = run.prepared_model, None
            if model is not None:
                if not outer.is_active:
                    self._loop_state_writer.release()
                    release(self._accelerator, self.optimizer, model.prepared, model.plain)
                self.model = model.restore(self._accelerator, self.model)
            if not outer.is_active:
                run.training.epoch.loader = run.training.shown_pass.loader = None  # and with them the data
            run.outside_parameters, run.restart, run.complete_start = OutsideParameters(), None, do_nothing
            run.consensus = StopConsensus(num_processes=1)  # that of the run would keep the trainer alive
            run.step_results = []
        finally:
            if outer.is_active:
                self._loop_run = outer
            else:
                run.ledger.stop()


def _create_consensus(trainer: Trainer) -> StopConsensus:
    """Create what lets all processes end the run together. Must be called on every process."""
    run = trainer._loop_run  # noqa: SLF001 - same module
    consensus = StopConsensus(
        run.config.num_processes, run.find_non_finite_loss, partial(can_skip_exchange_in, trainer)
    )
    if run.consensus.requested_stop is not None:  # by a hook that creates a loader
        consensus.request_stop(run.consensus.requested_stop)
    return consensus


@contextmanager
def _without_trace_in_a_run(trainer: Trainer) -> Iterator[None]:
    """If a run is under way, let it continue after an evaluation as if there had been none."""
    if not trainer._loop_run.is_active:  # noqa: SLF001 - same module
        yield
        return
    arguments = ("eval_dataset", "collate_fn", "_loop_last_evaluation")
    with preserve_modes(vars(trainer).values()), _preserve_attributes(trainer, *arguments):
        yield


@contextmanager
def _preserve_attributes(owner: object, *names: str) -> Iterator[None]:
    values = [getattr(owner, name) for name in names]
    try:
        yield
    finally:
        for name, value in zip(names, values, strict=True):
            setattr(owner, name, value)


def _check_not_running(trainer: Trainer) -> None:
    check_initialized(trainer, "_loop_run")
    check_no_run(trainer._loop_run.is_active)  # noqa: SLF001 - same module


def _complete_saving(trainer: Trainer) -> None:
    """Wait until the last training state that is written in the background is complete."""
    with trainer._loop_run.ledger.during(SAVING):  # noqa: SLF001 - same module
        trainer._loop_state_writer.wait()  # noqa: SLF001 - same module


def _warn_about_start(trainer: Trainer, batch_size: int, *dl_kwargs: DataLoaderKwargs | None) -> None:
    data = trainer.train_dataset, trainer.eval_dataset
    checks.warn_about_ready_loaders(trainer, data, batch_size, trainer.collate_fn, dl_kwargs)
    run, is_main = trainer._loop_run, trainer._accelerator.is_main_process  # noqa: SLF001 - same module
    if trainer._callbacks and is_main and run.is_verbose:  # noqa: SLF001 - same module
        checks.tell_what_is_missing(trainer)


def _default_dl_kwargs(dataset: Data, batch_size: int, accelerator: Accelerator) -> dict[str, Any]:
    num_processes = num_local_processes(int(accelerator.num_processes))
    return default_dl_kwargs(dataset, batch_size, num_processes, pin_memory=accelerator.device.type == "cuda")


def _seed_loader(dataset_name: str, loader: Loader, accelerator: Accelerator) -> SeededLoader:
    check_data_of_loader(dataset_name, loader)
    warn_about_ready_batches(dataset_name, loader)
    return rebuild_loader(loader, placement_of(accelerator))


def _load_pending_scheduler_state(trainer: Trainer) -> None:
    """Load the state that was kept until there is a scheduler."""
    state = trainer._loop_pending_scheduler_state  # noqa: SLF001 - same module
    if trainer.scheduler is not None and state is not None:
        trainer._loop_pending_scheduler_state = None  # noqa: SLF001 - same module
        source = "The scheduler state that was loaded before the run"
        check_scheduler_state(trainer.scheduler, state, source)
        load_scheduler_state(state, trainer._loop_load_scheduler_state, source)  # noqa: SLF001 - same module


def _what_completes_start(trainer: Trainer) -> Callable[[], None]:
    """Return what takes over what the program creates in the events at the start of the run, which are to come."""
    run, scheduler = trainer._loop_run, trainer.scheduler  # noqa: SLF001 - same module
    settings = settings_of_groups(trainer.optimizer) if run.is_resumed else []

    def complete_start() -> None:
        if run.restart is not None:
            run.restart.complete_run()
        if trainer.scheduler is not scheduler:
            is_timm = isinstance(trainer, TrainerWithTimmScheduler)
            trainer.scheduler = take_over_scheduler(trainer, lambda: trainer.scheduler, is_timm)
            if not run.is_resumed:
                run.training.num_metric_values_seen = run.stepping.num_values_before
            _load_pending_scheduler_state(trainer)
            restore_settings_of_groups(trainer.optimizer, settings)  # a new scheduler starts with its first rate
        if trainer.scheduler is None and not overrides_any(trainer, ["scheduler_step"]):
            warn_about_no_scheduler(run.stepping)
        if run.is_resumed:
            trainer._loop_pending_scheduler_state = None  # noqa: SLF001 - that of a run without a scheduler
        saved = run.training.lineage.origin
        if run.is_resumed and saved is not None and run.config.is_world_process_zero:
            resume.warn_about_mismatch(saved, trainer._loop_state_parts().settings)  # noqa: SLF001 - same module

    return complete_start


def _attributes_of_training(trainer: Trainer, run: Run) -> list[tuple[object, str]]:
    """Return what is set when a run starts to train, and set back if the state to resume is refused."""
    of_trainer = [(trainer, "scheduler"), (trainer, "_loop_pending_scheduler_state")]
    return [*of_trainer, (run, "training"), (run, "created_scheduler"), (run.training, "settings")]


class TrainerWithTimmScheduler(Trainer):
    """A `Trainer` for the schedulers of timm, which take the number of updates, and of epochs, done so far."""

    scheduler: TimmScheduler | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # 0.1.61 has this signature
        super().__init__(*args, **kwargs)

    @property
    def num_updates(self) -> int | None:
        """The number of updates that the scheduler knows of; ``None`` before the first training.

        It may be set: counting continues from there.
        """
        return self._loop_run.training.num_scheduler_updates

    @num_updates.setter
    def num_updates(self, num_updates: int | None) -> None:
        self._loop_run.training.num_scheduler_updates = num_updates

    def scheduler_step(self) -> None:
        """Pass the number of updates to the scheduler: 1, 2, 3, ..."""
        self._loop_run.training.count_scheduler_update()
        super().scheduler_step()

    def training_run_epoch_end(self) -> None:
        """Pass the number of epochs to the scheduler: 1, 2, 3, ..., and the metric of the epoch if it takes one."""
        if self.scheduler is None:
            self._loop_run.training.count_scheduler_update()  # `scheduler_step` was not called
        else:
            with self._loop_run.stepping.at_epoch_end(self.run_history, self._loop_run.config):
                super().scheduler_step()
