"""`Trainer`: makes model, data and schedule ready, and runs the loop over them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from pytorch_accelerated import _validation
from pytorch_accelerated._checkpoint.folder import Lineage
from pytorch_accelerated._checkpoint.manifest import SavedState
from pytorch_accelerated._checkpoint.portable import build_checkpoint, load_checkpoint, model_state_of, save_checkpoint
from pytorch_accelerated._checkpoint.resume import name_of, run_settings, warn_about_mismatch
from pytorch_accelerated._checkpoint.state import (
    Parts,
    StateContents,
    collect_state,
    open_state,
    read_state,
    restore_state,
)
from pytorch_accelerated._checkpoint.writer import StateWriter
from pytorch_accelerated._data.defaults import default_dl_kwargs, loader_arguments, merge_dl_kwargs
from pytorch_accelerated._data.determinism import SeededLoader
from pytorch_accelerated._data.limits import LIMIT_BATCHES_ENV_VAR, limit_from_environment
from pytorch_accelerated._data.loaders import batch_size_of, is_dataset, loaders_in, num_batches_of
from pytorch_accelerated._data.rng import derive_seed, restore_generators, seed_generators
from pytorch_accelerated._data.workers import defer_worker_errors
from pytorch_accelerated._distributed.accelerator import (
    PreparedModel,
    choose_seed,
    create_accelerator,
    num_batches_per_step,
    prepare,
    release,
    take_over_accumulation,
)
from pytorch_accelerated._distributed.collectives import num_local_processes
from pytorch_accelerated._distributed.consensus import StopConsensus, can_skip_exchange
from pytorch_accelerated._distributed.fast_path import can_use_fast_path
from pytorch_accelerated._loop import TrainingLoop
from pytorch_accelerated._loss_monitor import find_non_finite_loss
from pytorch_accelerated.callbacks import CallbackHandler, LimitBatchesCallback, get_default_callbacks
from pytorch_accelerated.callbacks.saving import find_state_to_resume
from pytorch_accelerated.progress import TrainingProgress
from pytorch_accelerated.run_config import TrainerRunConfig, derive_run_config
from pytorch_accelerated.schedulers._placeholders import TrainerPlaceholderValues, replace_trainer_placeholder_values
from pytorch_accelerated.schedulers.scheduler_base import StatefulSchedulerBase
from pytorch_accelerated.tracking import EpochMeans, RunHistory

__all__ = [
    "DEFAULT_CALLBACKS",
    "LIMIT_BATCHES_ENV_VAR",
    "Trainer",
    "TrainerPlaceholderValues",
    "TrainerWithTimmScheduler",
    "replace_trainer_placeholder_values",
]

DEFAULT_CALLBACKS = get_default_callbacks()

# fmt: off
_ATTRIBUTES_OF_A_RUN = (
    "run_config", "stop_reason", "is_resumed", "_train_dataloader", "_eval_dataloader", "_current_eval_dataloader",
    "_train_dl_kwargs", "_eval_dl_kwargs", "_train_randomness", "_eval_randomness", "_prepared_model", "_uses_fast_path",
    "_batch_output", "_agreement", "_nominal_weight", "_interruption", "_early_stop_reason",
)
# fmt: on


class Trainer(TrainingLoop):
    """Trains and evaluates a model, on one process or many, and lets subclasses and callbacks take part.

    The trainer asks nothing of its parts when it is made; they are checked when a run starts. Override the methods
    named below to change what a step does; write a :class:`~pytorch_accelerated.callbacks.TrainerCallback` to act
    beside it.

    Args:
        model: The model. Called with the first item of a batch; see `calculate_train_batch_loss`.
        loss_func: Called with the model's outputs and the second item of a batch. ``None`` if the model returns its
            loss.
        optimizer: The optimizer of the model's parameters. ``None`` if the trainer only evaluates.
        callbacks: Callbacks, as instances or classes, called in this order.
        run_history: Where metrics are recorded; in memory by default.
        mixed_precision: ``"no"``, ``"fp16"``, ``"bf16"`` or ``"fp8"``; ``None`` leaves it to Accelerate's
            configuration.
        seed: Seeds all random number generators now, and the order of the data in each run. With ``None`` nothing is
            seeded and the order derives from the seed that the program gave to ``torch.manual_seed``.
        accelerator: A ready `accelerate.Accelerator`, or keyword arguments to make it with.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> dataset = TensorDataset(torch.randn(64, 3), torch.randn(64, 1))
        >>> model = nn.Linear(3, 1)
        >>> trainer = Trainer(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), callbacks=())
        >>> trainer.train(dataset, num_epochs=2, eval_dataset=dataset, per_device_batch_size=16)
        >>> sorted(trainer.run_history.get_metric_names())
        ['eval_loss_epoch', 'train_loss_epoch']
    """

    def __init__(
        self,
        model: Any,
        loss_func: Any,
        optimizer: Any,
        callbacks: Iterable[Any] = DEFAULT_CALLBACKS,
        run_history: RunHistory | None = None,
        *,
        mixed_precision: str | None = None,
        seed: int | None = None,
        accelerator: Accelerator | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, loss_func, optimizer, run_history)
        self.train_dataset: Any = None
        self.eval_dataset: Any = None
        self.collate_fn: Callable[..., Any] | None = None
        self.create_scheduler_fn: Callable[..., Any] | None = None
        self._train_dl_kwargs: dict[str, Any] | None = None
        self._eval_dl_kwargs: dict[str, Any] | None = None
        self._prepared_model: PreparedModel | None = None
        self._waiting_scheduler_state: Mapping[str, Any] | None = None
        self._state_writer = StateWriter()
        self._settings: dict[str, Any] = {}
        self._lineage = Lineage()
        self._is_running = False
        self._seed = seed
        self._mixed_precision = mixed_precision
        self._accelerator_source = accelerator
        self._accelerator = self._create_accelerator()
        if seed is not None:
            seed_generators(derive_seed(seed, "rank", self.process_index) if self.process_index else seed)
        self.callback_handler = self._create_callback_handler(callbacks)
        self.callback_handler.call_event("on_init_end", self)

    # --- entry points --------------------------------------------------------------------------------------------

    def train(
        self,
        train_dataset: Any,
        num_epochs: int,
        eval_dataset: Any = None,
        per_device_batch_size: int = 8,
        max_num_train_steps: int | None = None,
        gradient_accumulation_steps: int = 1,
        gradient_clip_value: float | None = None,
        create_scheduler_fn: Callable[..., Any] | None = None,
        train_dataloader_kwargs: Mapping[str, Any] | None = None,
        eval_dataloader_kwargs: Mapping[str, Any] | None = None,
        reset_run_history: bool = True,
        collate_fn: Callable[..., Any] | None = None,
        resume_from: str | os.PathLike[str] | bool | None = None,
        *,
        gradient_clip_norm: float | None = None,
        allow_other_num_processes: bool = False,
    ) -> None:
        """Train the model.

        In short, leaving out the events, which :class:`~pytorch_accelerated.callbacks.TrainerCallback` lists::

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

        Args:
            train_dataset: A dataset of samples, or an iterable of batches.
            num_epochs: Passes over the training data; at least 1.
            eval_dataset: Evaluated after each epoch: a dataset, or a dictionary of them. The metrics of each then carry
                its name in front. ``None`` for no evaluation.
            per_device_batch_size: Samples in a batch of one process.
            max_num_train_steps: Updates after which the run ends, if ``num_epochs`` do not end it before.
            gradient_accumulation_steps: Batches per process that make one update.
            gradient_clip_value: Bound for the absolute value of each entry of the gradient, applied before each update.
            create_scheduler_fn: Makes the learning-rate scheduler from the optimizer. In a `functools.partial` the
                arguments may be :class:`TrainerPlaceholderValues`. The scheduler is stepped after each update.
            train_dataloader_kwargs: Keyword arguments for the training `DataLoader`; they win over the defaults.
            eval_dataloader_kwargs: Keyword arguments for the evaluation `DataLoader`.
            reset_run_history: Whether metrics and epoch count of an earlier run are forgotten.
            collate_fn: Makes a batch from samples, in both loaders.
            gradient_clip_norm: Bound for the norm of all gradients together, applied before each update. Callbacks find
                the norm before clipping in ``trainer.gradient_norm``, from ``on_optimizer_step_end`` on.
            resume_from: A directory that `save_training_state` wrote. The run goes on from there up to ``num_epochs``.
                ``"latest"``, or ``True``, takes the newest state that is whole, out of those that the run's
                ``SaveTrainingStateCallback`` saves; if there is none, the run starts afresh.
            allow_other_num_processes: Whether to go on from a state that another number of processes saved: at the same
                place in the data, but not exactly.

        Raises:
            ValueError: An argument has an impossible value, or model and optimizer do not belong together.
            CheckpointError: The state to resume from is damaged, or of another model; nothing has been changed.
            TypeError: An argument is of the wrong kind.
            KeyboardInterrupt: Ctrl-C was pressed; the run has ended in good order before.
            SystemExit: Likewise, by another signal that a callback listens to; the code is 128 + its number.
        """
        _validation.check_no_run(self._is_running)
        numbers: dict[str, Any] = {
            "num_epochs": num_epochs,
            "per_device_batch_size": per_device_batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "max_num_train_steps": max_num_train_steps,
            "gradient_clip_value": gradient_clip_value,
            "gradient_clip_norm": gradient_clip_norm,
        }
        _validation.check_numbers_of_run(**numbers)
        for name, data in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            _validation.check_reiterable(name, data, num_epochs, max_num_train_steps)
        _validation.check_create_scheduler_fn(create_scheduler_fn)
        _validation.check_trainable(self.model, self.loss_func, self.optimizer)

        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.collate_fn = collate_fn
        self.create_scheduler_fn = create_scheduler_fn
        with self._run_context():
            saved_state = find_state_to_resume(self, self._accelerator, resume_from, allow_other_num_processes)
            self._make_train_loader(per_device_batch_size, train_dataloader_kwargs)
            if eval_dataset is not None:
                self._make_eval_loaders(per_device_batch_size, eval_dataloader_kwargs)
            self._prepare_model_optimizer_and_dataloaders()
            self.run_config = self._create_run_config(**numbers)
            self._set_up_training(num_epochs, saved_state, reset_run_history)
            self._run_training()
            self.wait_for_training_state()
        if self._interruption is not None:
            raise self._interruption.to_exit_exception()

    def evaluate(
        self,
        dataset: Any = None,
        per_device_batch_size: int = 8,
        dataloader_kwargs: Mapping[str, Any] | None = None,
        collate_fn: Callable[..., Any] | None = None,
    ) -> None:
        """Evaluate the model, before, after or without training; needs no optimizer.

        The loss is recorded as ``evaluation_loss`` in the run history, which keeps what training recorded.

        Args:
            dataset: A dataset of samples, an iterable of batches, or a dictionary of such. ``None`` for the one that
                was evaluated last.
            per_device_batch_size: Samples in a batch of one process.
            dataloader_kwargs: Keyword arguments for the `DataLoader`; they win over the defaults.
            collate_fn: Makes a batch from samples.

        Raises:
            ValueError: There is nothing to evaluate.
        """
        if dataset is not None:
            self.eval_dataset = dataset
        with self._evaluation_context(per_device_batch_size, dataloader_kwargs, collate_fn):
            self._run_evaluation()

    def predict(
        self,
        dataset: Any,
        per_device_batch_size: int = 8,
        dataloader_kwargs: Mapping[str, Any] | None = None,
        collate_fn: Callable[..., Any] | None = None,
        *,
        on_every_process: bool = True,
        move_to_host: bool = True,
    ) -> Any:
        """Return the model's outputs for a dataset, in its order, each sample's once. Must be called on every process.

        Args:
            dataset: A dataset of samples, or an iterable of batches.
            per_device_batch_size: Samples in a batch of one process.
            dataloader_kwargs: Keyword arguments for the `DataLoader`; they win over the defaults.
            collate_fn: Makes a batch from samples.
            on_every_process: Whether all processes get the outputs; otherwise the others get ``None``.
            move_to_host: Whether outputs go to host memory after each batch, or stay on the device.

        Returns:
            What `calculate_predictions` returns, with the rows of all batches: shape ``(samples, ...)``.
        """
        eval_dataset, self.eval_dataset = self.eval_dataset, dataset
        try:
            with self._evaluation_context(per_device_batch_size, dataloader_kwargs, collate_fn):
                return self._run_prediction(on_every_process, move_to_host)
        finally:
            self.eval_dataset = eval_dataset

    # --- hooks: override them to change what happens -------------------------------------------------------------

    def get_default_train_dl_kwargs(self, batch_size: int) -> dict[str, Any]:
        """Return the keyword arguments of the training loader which the user's are merged into."""
        return {"shuffle": True, **self._default_dl_kwargs(self.train_dataset, batch_size)}

    def get_default_eval_dl_kwargs(self, batch_size: int) -> dict[str, Any]:
        """Return the keyword arguments of the evaluation loader which the user's are merged into."""
        return {"shuffle": False, **self._default_dl_kwargs(self.eval_dataset, batch_size)}

    def create_train_dataloader(
        self, batch_size: int, train_dl_kwargs: Mapping[str, Any] | None = None
    ) -> Iterable[Any]:
        """Make the loader of ``self.train_dataset``; any iterable of batches will do."""
        _validation.check_data_not_empty("train_dataset", self.train_dataset)
        if not is_dataset(self.train_dataset):
            return self.train_dataset  # type: ignore[no-any-return]
        defaults = self.get_default_train_dl_kwargs(batch_size)
        self._train_dl_kwargs = merge_dl_kwargs(defaults, train_dl_kwargs, self.train_dataset)
        return self._create_dataloader(self.train_dataset, self._train_dl_kwargs)

    def create_eval_dataloader(self, batch_size: int, eval_dl_kwargs: Mapping[str, Any] | None = None) -> Iterable[Any]:
        """Make the loader of ``self.eval_dataset``; any iterable of batches will do."""
        _validation.check_data_not_empty("eval_dataset", self.eval_dataset)
        if not is_dataset(self.eval_dataset):
            return self.eval_dataset  # type: ignore[no-any-return]
        defaults = self.get_default_eval_dl_kwargs(batch_size)
        self._eval_dl_kwargs = merge_dl_kwargs(defaults, eval_dl_kwargs, self.eval_dataset)
        return self._create_dataloader(self.eval_dataset, self._eval_dl_kwargs)

    def create_scheduler(self) -> Any:
        """Make the learning-rate scheduler of a run; ``None`` for none."""
        if self.create_scheduler_fn is None:
            return None
        return replace_trainer_placeholder_values(self, self.create_scheduler_fn)(self.optimizer)

    # --- checkpoints and training states -------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_path: str | os.PathLike[str],
        checkpoint_kwargs: Mapping[str, Any] | None = None,
        save_optimizer: bool = True,
        save_scheduler: bool = True,
        save_per_node: bool = True,
    ) -> None:
        """Write the model, and what belongs to it, to one file. Must be called on every process.

        Args:
            save_path: Where to; folders are made, and an older file is replaced only by a complete one.
            checkpoint_kwargs: More entries: tensors, numbers, strings and containers of them.
            save_optimizer: Whether the state of the optimizer goes with it, as ``optimizer_state_dict``.
            save_scheduler: Whether the state of the scheduler goes with it, as ``scheduler_state_dict``.
            save_per_node: Whether every node writes the file, or the main process of all alone.

        Raises:
            CheckpointError: The file cannot be written.
        """
        model_state = model_state_of(self.model, self._accelerator)
        optimizer = self.optimizer if save_optimizer else None
        scheduler = self.scheduler if save_scheduler else None
        checkpoint = build_checkpoint(model_state, optimizer, scheduler, checkpoint_kwargs)
        save_checkpoint(checkpoint, save_path, self._accelerator, save_per_node)

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], load_optimizer: bool = True, load_scheduler: bool = True
    ) -> dict[str, Any]:
        """Load what `save_checkpoint` wrote, before, during or after training.

        Args:
            checkpoint_path: The file.
            load_optimizer: Whether to load the state of the optimizer, if there is one in the file.
            load_scheduler: Likewise. Before training it is kept until the scheduler is made.

        Returns:
            The further entries of the file.

        Raises:
            FileNotFoundError: There is no such file.
            CheckpointError: It is damaged, or belongs to another model; nothing has been changed.
        """
        optimizer = self.optimizer if load_optimizer else None
        checkpoint = load_checkpoint(checkpoint_path, self.get_model(), optimizer)
        scheduler_state = checkpoint.pop("scheduler_state_dict", None)
        if load_scheduler and scheduler_state is not None:
            self._load_scheduler_state(scheduler_state)
        return checkpoint

    def save_training_state(
        self,
        output_dir: str | os.PathLike[str],
        checkpoint_kwargs: Mapping[str, Any] | None = None,
        *,
        in_background: bool = False,
        and_then: Callable[[], Any] | None = None,
    ) -> None:
        """Write everything that ``train(..., resume_from=output_dir)`` needs. Must be called on every process.

        Args:
            output_dir: The directory; it is complete or not there, and an older state in it stays until then.
            checkpoint_kwargs: More entries, which `load_training_state` returns.
            in_background: Whether to go on as soon as the state is copied to host memory, unless it is sharded.
            and_then: Called on the main process when the state is complete.

        Raises:
            CheckpointError: It cannot be written, or the one before in the background could not.
        """
        announce = partial(self.callback_handler.call_event, "on_training_state_save", self)
        collected = collect_state(self._parts_of_state(), self._accelerator, checkpoint_kwargs, announce)
        self._state_writer.write(output_dir, collected, self._lineage, self._accelerator, in_background, and_then)

    def wait_for_training_state(self) -> None:
        """Wait until the state that is written in the background is complete, as `train` does at its end.

        Raises:
            CheckpointError: It could not be written.
        """
        self._state_writer.wait()

    def load_training_state(
        self, input_dir: str | os.PathLike[str], *, allow_other_num_processes: bool = False
    ) -> dict[str, Any]:
        """Restore what `save_training_state` wrote. Must be called on every process.

        Args:
            input_dir: The directory.
            allow_other_num_processes: Whether another number of processes may have saved it.

        Returns:
            ``current_epoch``, the number of the epoch in which training goes on, and the ``checkpoint_kwargs``.

        Raises:
            FileNotFoundError: There is no such directory.
            CheckpointError: It is incomplete, damaged, or of another model; nothing has been changed.
        """
        saved = open_state(input_dir, self._accelerator, allow_other_num_processes)
        return self._restore(read_state(saved, self._accelerator, self._parts_of_state()))

    # --- the start and the end of a run --------------------------------------------------------------------------

    def _create_accelerator(self) -> Accelerator:
        """Make the accelerator that serves all runs of this trainer."""
        return create_accelerator(self._accelerator_source, self._mixed_precision)

    def _create_callback_handler(self, callbacks: Iterable[Any]) -> CallbackHandler:
        limit = limit_from_environment()
        return CallbackHandler([*([] if limit is None else [LimitBatchesCallback(limit)]), *callbacks])

    @contextmanager
    def _run_context(self) -> Iterator[None]:
        """Forget the run before, tell the callbacks of an exception, and tidy up; an outer run is left as it was."""
        outer_run = {name: getattr(self, name) for name in _ATTRIBUTES_OF_A_RUN} if self._is_running else {}
        self._is_running = True
        self.stop_reason = self._interruption = None
        self.is_resumed = False
        self._train_dataloader = self._eval_dataloader = self._current_eval_dataloader = None
        self._train_dl_kwargs = self._eval_dl_kwargs = None
        self._train_randomness, self._eval_randomness = [], []
        self._run_seed = choose_seed(self._accelerator, self._seed)
        self.callback_handler.refresh()
        try:
            with restore_generators():
                yield
        except BaseException as error:
            with defer_worker_errors():  # the run has its error
                try:
                    self._state_writer.finish(error)
                    self._report_exception(error)
                finally:
                    self._teardown(outer_run)
                raise
        with defer_worker_errors():
            self._teardown(outer_run)

    @contextmanager
    def _evaluation_context(
        self, batch_size: int, dl_kwargs: Mapping[str, Any] | None, collate_fn: Callable[..., Any] | None
    ) -> Iterator[None]:
        """Make everything ready that goes over ``self.eval_dataset``, and tidy up afterwards."""
        _validation.check_positive_integer("per_device_batch_size", batch_size, "samples")
        self.collate_fn = collate_fn
        with self._run_context():
            self._make_eval_loaders(batch_size, dl_kwargs)
            self._prepare_model_optimizer_and_dataloaders()
            self.run_config = self._create_run_config(num_epochs=1, per_device_batch_size=batch_size)
            self._check_eval_batch_size()
            self._join_processes()
            yield

    def _make_train_loader(self, batch_size: int, dl_kwargs: Mapping[str, Any] | None) -> None:
        loader = self.create_train_dataloader(batch_size=batch_size, train_dl_kwargs=dl_kwargs)
        _validation.check_loader_not_empty("train_dataset", loader)
        self._train_randomness = [self._seeded_loader(loader)]
        self._train_dataloader = self._train_randomness[0].loader

    def _make_eval_loaders(self, batch_size: int, dl_kwargs: Mapping[str, Any] | None) -> None:
        datasets = self.eval_dataset
        if isinstance(datasets, dict):
            _validation.check_data_not_empty("eval_dataset", list(datasets))
        loaders = {}
        try:
            for name, self.eval_dataset in (datasets if isinstance(datasets, dict) else {"": datasets}).items():
                loaders[name] = self.create_eval_dataloader(batch_size=batch_size, eval_dl_kwargs=dl_kwargs)
        finally:
            self.eval_dataset = datasets
        randomness = {name: self._seeded_loader(loader) for name, loader in loaders.items()}
        self._eval_randomness = list(randomness.values())
        loaders = {name: source.loader for name, source in randomness.items()}
        self._eval_dataloader = loaders if isinstance(datasets, dict) else loaders[""]

    def _seeded_loader(self, loader: Any) -> SeededLoader:
        return SeededLoader(loader, self.process_index, num_batches_per_step(self._accelerator))

    def _default_dl_kwargs(self, dataset: Any, batch_size: int) -> dict[str, Any]:
        num_local = num_local_processes(int(self._accelerator.num_processes))
        is_gpu = self._accelerator.device.type == "cuda"
        return default_dl_kwargs(dataset, batch_size, num_local, pin_memory=is_gpu)

    def _create_dataloader(self, dataset: Any, dl_kwargs: Mapping[str, Any]) -> Iterable[Any]:
        return DataLoader(**loader_arguments(dataset, self.collate_fn, dl_kwargs))

    def _prepare_model_optimizer_and_dataloaders(self) -> None:
        self._prepared_model = PreparedModel(self.model)
        self.model, self.optimizer, self._train_dataloader, self._eval_dataloader = prepare(
            self._accelerator, self.model, self.optimizer, self._train_dataloader, self._eval_dataloader
        )
        self._prepared_model.prepared = self.model
        self._uses_fast_path = can_use_fast_path(self._accelerator)

    def _create_run_config(
        self,
        num_epochs: int,
        per_device_batch_size: int,
        gradient_accumulation_steps: int = 1,
        max_num_train_steps: int | None = None,
        gradient_clip_value: float | None = None,
        gradient_clip_norm: float | None = None,
    ) -> TrainerRunConfig:
        accelerator = self._accelerator
        train_size = batch_size_of(self._train_dataloader, self._train_dl_kwargs, per_device_batch_size)
        eval_size = batch_size_of(self._eval_dataloader, self._eval_dl_kwargs, per_device_batch_size)
        return derive_run_config(
            num_epochs=num_epochs,
            num_batches_per_epoch=num_batches_of(self._train_dataloader),
            gradient_accumulation_steps=gradient_accumulation_steps,
            max_num_train_steps=max_num_train_steps,
            num_processes=int(accelerator.num_processes),
            gradient_clip_value=gradient_clip_value,
            gradient_clip_norm=gradient_clip_norm,
            train_per_device_batch_size=train_size,
            train_dl_kwargs=self._train_dl_kwargs,
            eval_per_device_batch_size=eval_size,
            eval_dl_kwargs=self._eval_dl_kwargs,
            is_local_process_zero=accelerator.is_local_main_process,
            is_world_process_zero=accelerator.is_main_process,
            mixed_precision=accelerator.mixed_precision,
            seed=self._run_seed,
        )

    def _join_processes(self) -> None:
        find_bad_loss, may_wait = partial(find_non_finite_loss, self), partial(can_skip_exchange, self)
        self._agreement = StopConsensus(self.run_config.num_processes, find_bad_loss, may_wait)
        nominal_weight = self.run_config.train_per_device_batch_size or 1
        self._nominal_weight = float(nominal_weight) if self._agreement.is_needed else None

    def _set_up_training(self, num_epochs: int, saved: SavedState | None, reset_run_history: bool) -> None:
        self._settings = run_settings(
            self.run_config, self.train_dataset, self._train_dataloader, self.optimizer, self.loss_func, self._seed
        )
        contents = None if saved is None else read_state(saved, self._accelerator, self._parts_of_state())
        if reset_run_history:
            self.run_history.reset()
        self._check_eval_batch_size()
        self._join_processes()
        if isinstance(self.model, nn.Module):  # what was left in `.grad` goes, also of what the optimizer does not hold
            self.model.zero_grad()
        self.optimizer.zero_grad()
        take_over_accumulation(self._accelerator, self.run_config.gradient_accumulation_steps)
        self.scheduler = self.create_scheduler()
        if isinstance(self.scheduler, StatefulSchedulerBase) and self.scheduler.num_updates < 0:
            self.scheduler.step()  # so that update k trains at curve(k)
        if self.scheduler is not None and self._waiting_scheduler_state is not None:
            self._load_scheduler_state(self._waiting_scheduler_state)
            self._waiting_scheduler_state = None
        self._means = EpochMeans()
        self._early_stop_reason = self._stream_position = None
        self._num_batches_to_skip = 0
        self._lineage = Lineage()
        self.progress = TrainingProgress(num_epochs_completed=self.run_history.current_epoch - 1)
        self._last_epoch = self.progress.num_epochs_completed + num_epochs
        if contents is not None:
            self._resume(contents, num_epochs)

    def _resume(self, contents: StateContents, num_epochs: int) -> None:
        state = self._restore(contents)
        self.run_history._set_epoch(state["current_epoch"])
        self._num_batches_to_skip = self.progress.num_batches_in_epoch if self.progress.phase == "training" else 0
        self._stream_position = contents.stream_position
        self._last_epoch = num_epochs
        self.is_resumed = True
        if self.run_config.is_world_process_zero:
            warn_about_mismatch(contents.saved, self._parts_of_state().settings)

    def _check_eval_batch_size(self) -> None:
        """Refuse evaluation data that gives no batch; a subclass may demand more."""
        for loader in loaders_in(self._eval_dataloader):
            _validation.check_loader_not_empty("eval_dataset", loader)

    def _parts_of_state(self) -> Parts:
        return Parts(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            progress=self.progress,
            run_history=self.run_history,
            callbacks=self.callback_handler,
            means=self._means,
            window=self._window,
            stream=next((source.stream for source in self._train_randomness), None),
            seed=self._run_seed,
            stop_reason=self._early_stop_reason,
            settings={**self._settings, "scheduler": name_of(self.scheduler)},
        )

    def _restore(self, contents: StateContents) -> dict[str, Any]:
        parts = self._parts_of_state()
        restore_state(contents, self._accelerator, parts, self._load_scheduler_state, self.print)
        self._run_seed, self._early_stop_reason = contents.own["seed"], contents.own["stopped"]
        self._lineage = Lineage(contents.saved)
        return {name: value for name, value in contents.trainer_state.items() if name != "trainer"}

    def _load_scheduler_state(self, state: Mapping[str, Any]) -> None:
        if self.scheduler is None:
            self._waiting_scheduler_state = state
        else:
            self.scheduler.load_state_dict(state)

    def _teardown(self, outer_run: Mapping[str, Any]) -> None:
        self._is_running = bool(outer_run)  # first: a signal may interrupt the rest
        for source in (*self._train_randomness, *self._eval_randomness):
            source.end_run()
        release(self._accelerator, self._train_dataloader, *loaders_in(self._eval_dataloader))
        model, self._prepared_model = self._prepared_model, None
        if model is not None:
            if not outer_run:
                self._state_writer.release()
                release(self._accelerator, self.optimizer, model.prepared, model.plain)
            self.model = model.restore(self._accelerator, self.model)
        self._agreement = StopConsensus(num_processes=1)  # that of the run refers to the trainer
        self._batch_output = None
        vars(self).update(outer_run)


class TrainerWithTimmScheduler(Trainer):
    """A `Trainer` for the schedulers of timm, which are told the number of updates, and of epochs, done so far."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    @property
    def num_updates(self) -> int:
        """How many updates the run has made."""
        return self.progress.num_updates

    def scheduler_step(self) -> None:
        """Tell the scheduler the number of updates: 1, 2, 3, ..."""
        if self.scheduler is not None:
            self.scheduler.step_update(num_updates=self.num_updates)

    def training_run_epoch_end(self) -> None:
        """Tell the scheduler the number of epochs: 1, 2, 3, ..."""
        if self.scheduler is not None:
            self.scheduler.step(self.run_history.current_epoch)
