"""What a trainer saves and loads: checkpoints and training states."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from pytorch_accelerated._accumulation import parameters_outside
from pytorch_accelerated._checkpoint import portable, resume
from pytorch_accelerated._checkpoint.collecting import collect_state
from pytorch_accelerated._checkpoint.companions import Companions, attributes_without_state, find_companions
from pytorch_accelerated._checkpoint.files import printable
from pytorch_accelerated._checkpoint.folder import Lineage
from pytorch_accelerated._checkpoint.parts import Parts, StateContents
from pytorch_accelerated._checkpoint.reading import read_state
from pytorch_accelerated._checkpoint.restart import Restart
from pytorch_accelerated._checkpoint.restoring import restore_state
from pytorch_accelerated._checkpoint.weights import LoadedCheckpoint, frozen_parameters
from pytorch_accelerated._checkpoint.writer import StateWriter
from pytorch_accelerated._distributed.registry import AcceleratorRegistry
from pytorch_accelerated._loop import TrainingLoop, early_stop_reason, record_steps
from pytorch_accelerated._optimizers.inner import inner_optimizers
from pytorch_accelerated._scheduling.group import load_state_of, start_counting
from pytorch_accelerated._types import StateDict, StateMapping
from pytorch_accelerated.time_ledger import SAVING


class SavingLoop(TrainingLoop):
    """Saves a trainer, and everything that a run needs to continue. `Trainer` is derived from it.

    The methods find the parts, which `_checkpoint/` takes as values.
    """

    train_dataset: Any
    eval_dataset: Any
    _loop_state_writer: StateWriter
    _loop_pending_scheduler_state: StateDict | None

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_path: str | os.PathLike[str],
        checkpoint_kwargs: StateMapping | None = None,
        save_optimizer: bool = True,
        save_scheduler: bool = True,
        save_per_node: bool = True,
        *,
        trainable_only: bool = False,
    ) -> None:
        """Write the model, and what belongs to it, to one file. Must be called on every process.

        Args:
            save_path: The file. Folders are created, and an existing file is replaced only by a complete one. With the
                suffix ``.safetensors`` it has that format, which holds weights and entries that are plain values.
            checkpoint_kwargs: Additional entries: tensors, numbers, strings and containers of these. A file with other
                objects is written too, with a warning that `load_checkpoint` will refuse it.
            save_optimizer: Whether to include the state of the optimizer, as ``optimizer_state_dict``.
            save_scheduler: Whether to include the state of the scheduler, as ``scheduler_state_dict``; with a warning,
                it is left out if the scheduler has no ``state_dict``.
            save_per_node: Whether the main process of every node writes the file, or only the main process.
            trainable_only: Whether to leave out the parameters of the model that are frozen. When it is loaded, these
                keep their values, so the model must have them from elsewhere, such as a pretrained network.

        Raises:
            CheckpointError: The file cannot be written.
            ModuleNotFoundError: The suffix is ``.safetensors``, and that package is not installed.
        """
        accelerator = self._accelerator
        is_writer = accelerator.is_local_main_process if save_per_node else accelerator.is_main_process
        optimizer = self.optimizer if save_optimizer else None
        scheduler = portable.with_state(self.scheduler, is_writer) if save_scheduler else None
        companions = self._loop_companions()
        modules = None if self._loop_run.is_sharded else {"": self.get_model(), **companions.modules}
        frozen = frozen_parameters(self.get_model()) if trainable_only else ()
        run = self._loop_run
        with run.ledger.during(SAVING), run.training.optimizer_mode.evaluating(self.optimizer):
            model_state = portable.model_state_of(self.model, accelerator)
            extras = {**companions.trained_state(), **(checkpoint_kwargs or {})}
            checkpoint = portable.build_checkpoint(model_state, optimizer, scheduler, extras, modules, frozen)
            portable.save_checkpoint(checkpoint, save_path, is_writer, accelerator.num_processes)

    def load_checkpoint(
        self,
        checkpoint_path: str | os.PathLike[str],
        load_optimizer: bool = True,
        load_scheduler: bool = True,
        *,
        strict: bool = True,
    ) -> LoadedCheckpoint:
        """Load what `save_checkpoint` wrote, or weights from elsewhere, before, during or after training.

        The file is one of `torch.save` or of safetensors. Other programs may have written it: a state dict, or a
        dictionary that contains one, as ``state_dict`` or ``model``. Prefixes of wrappers, such as ``module.``, are
        removed from the names.

        Args:
            checkpoint_path: The file.
            load_optimizer: Whether to load the state of the optimizer, if the file has one.
            load_scheduler: Same for the scheduler. Before training, its state is kept until the scheduler is created.
            strict: Whether everything has to fit. With ``False``, what does not is left out and printed: missing and
                unexpected parameters, those of another shape, and the state of an optimizer for other parameters.

        Returns:
            All entries of the file, which are ``model_state_dict``, ``optimizer_state_dict`` and
            ``scheduler_state_dict`` if they were saved, and the additional ones. Its attributes list what was not
            loaded.

        Raises:
            FileNotFoundError: There is no such file.
            CheckpointError: It is damaged, or belongs to another model, optimizer or scheduler; nothing has
                been changed. With ``strict=False``, it is damaged, or none of its weights fits.
            ModuleNotFoundError: The file is one of safetensors, and that package is not installed.
            ValueError: It is not a local file.
        """
        with self._loop_run.training.optimizer_mode.evaluating(self.optimizer, loads_weights=True):
            loaded = portable.load_checkpoint(
                checkpoint_path,
                self.get_model(),
                self.optimizer if load_optimizer else None,
                self.scheduler,
                self._loop_load_scheduler_state if load_scheduler else None,
                self._loop_companions(),
                holder=self.optimizer,
                strict=strict,
            )
        if loaded.describe_rest():
            self.print(f"{printable(checkpoint_path)}: {loaded.describe_rest()}")
        return loaded

    # --- training states -----------------------------------------------------------------------------------------

    def save_training_state(
        self,
        output_dir: str | os.PathLike[str],
        checkpoint_kwargs: StateMapping | None = None,
        *,
        in_background: bool = False,
        and_then: Callable[[], object] | None = None,
    ) -> None:
        """Write everything that ``train(..., resume_from=output_dir)`` needs. Must be called on every process.

        Args:
            output_dir: The directory. It is complete or does not exist; an older state in it is kept until then.
            checkpoint_kwargs: Additional entries, which `load_training_state` returns.
            in_background: Whether to continue as soon as the state is copied to host memory, unless it is sharded.
            and_then: Called on the main process when the state is complete.

        Raises:
            CheckpointError: The state cannot be written, or the previous one in the background could not be.
        """
        record_steps(self)
        on_collect = partial(self.callback_handler.call_event, "on_training_state_save", self)
        run = self._loop_run
        with run.ledger.during(SAVING), run.training.optimizer_mode.saving(self.optimizer):
            collected = collect_state(self._loop_state_parts(), self._accelerator, checkpoint_kwargs, on_collect)
            self._loop_state_writer.write(
                output_dir,
                collected,
                run.training.lineage,
                is_main=self._accelerator.is_main_process,
                num_processes=int(self._accelerator.num_processes),
                in_background=in_background,
                on_complete=and_then,
            )

    def wait_for_training_state(self) -> None:
        """Wait until the state being written in the background is complete, as `train` does at its end.

        Raises:
            CheckpointError: It could not be written.
        """
        with self._loop_run.ledger.during(SAVING):
            self._loop_state_writer.wait()

    def load_training_state(
        self, input_dir: str | os.PathLike[str], *, allow_other_num_processes: bool = False
    ) -> StateDict:
        """Restore what `save_training_state` wrote. Must be called on every process.

        If a subclass overrides this method, `train` calls it with ``resume_from``, when model, optimizer and scheduler
        are ready, and continues in the epoch that it returns as ``current_epoch``.

        Args:
            input_dir: The directory.
            allow_other_num_processes: Whether the state may come from a different number of processes.

        Returns:
            ``current_epoch``, the number of the epoch in which training continues, and the ``checkpoint_kwargs``.

        Raises:
            FileNotFoundError: There is no such directory.
            CheckpointError: The state is incomplete or damaged, or does not fit; nothing has been changed.
        """
        accelerator = self._accelerator
        is_main, num_processes = accelerator.is_main_process, int(accelerator.num_processes)
        saved = resume.open_state(input_dir, is_main, num_processes, allow_other_num_processes)
        return self._loop_restore(read_state(saved, accelerator, self._loop_state_parts()))

    def _loop_state_parts(self) -> Parts:
        run, training = self._loop_run, self._loop_run.training
        return Parts(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            progress=training.progress,
            run_history=self.run_history,
            callbacks=self.callback_handler,
            recorder=training.recorder,
            means=training.epoch.means,
            metrics=run.metrics.of_training,
            metric_set=run.metrics if run.metrics.names else None,
            window=training.window,
            stream=next((loader.stream for loader in run.seeded_train_loaders), None),
            order=next((loader.order_state for loader in run.seeded_train_loaders), None),
            run_seed=run.seed,
            seed=training.seed,
            run_number=training.run_number,
            stop_reason=early_stop_reason(self._loop_run, self.callback_handler),
            settings={**training.settings, "scheduler": resume.name_of(self.scheduler), **run.stepping.settings},
            num_metric_values_seen=training.num_metric_values_seen,
            companions=self._loop_companions(),
            is_optimizer_training=training.optimizer_mode.is_training,
            is_epoch_cut_short=run.is_epoch_cut_short,
        )

    def _loop_companions(self) -> Companions:
        """Find what else has a state among the attributes of the trainer and its callbacks, and at Accelerate."""
        callbacks, model = self.callback_handler.nested_last(), portable.unwrap_model(self.model, self._accelerator)
        own = (self.optimizer, self.scheduler, self.run_history, self.callback_handler, self._loop_metrics)
        saved = (model, self.model, *own, *callbacks)
        data = (self.train_dataset, self.eval_dataset)
        left_out = {"_callbacks", *_names_in(self.left_out_of_states)}
        owners = {
            "": {name: value for name, value in vars(self).items() if name not in left_out},
            **attributes_without_state(callbacks),
            "optimizer.": inner_optimizers(self.optimizer),
            "accelerator.": {"registered": AcceleratorRegistry(self._accelerator).registered_objects()},
        }
        outside = [] if self._loop_run.is_sharded else parameters_outside(self.model, self.optimizer)
        return find_companions(owners, outside, (self, *saved, *data))

    def _loop_restore(self, contents: StateContents) -> StateDict:
        """Restore what was read, and return the user's entries."""
        run, training = self._loop_run, self._loop_run.training
        parts, was_training = self._loop_state_parts(), contents.is_optimizer_training
        with training.optimizer_mode.restoring(self.optimizer, was_training, is_resuming=run.is_resuming):
            restore_state(contents, self._accelerator, parts, self._loop_load_scheduler_state, self.print)
        rank = int(self._accelerator.process_index)
        run.restart = Restart(contents, parts.companions, self._loop_companions, rank)
        run.seed, training.seed, training.run_number = contents.run_seed, contents.seed, contents.run_number
        if contents.has_former_draws and any(loader.draws_while_loading for loader in run.seeded_train_loaders):
            self.print(
                "An earlier version saved this state: what is drawn while samples are loaded differs from here on."
            )
        training.early_stop_reason = contents.stop_reason
        run.is_epoch_cut_short = contents.is_epoch_cut_short
        training.num_metric_values_seen = contents.num_metric_values_seen
        training.stream_position = contents.stream_position
        training.lineage = Lineage(contents.saved)
        return contents.user_entries

    def _loop_load_scheduler_state(self, state: StateDict) -> None:
        """Load a state, of which the scheduler gets a copy, or keep it until there is a scheduler."""
        if self.scheduler is None:
            self._loop_pending_scheduler_state = state
            return
        load_state_of(self.scheduler, state, self._loop_run.is_resuming)
        start_counting(self.scheduler)


def _names_in(left_out_of_states: object) -> Collection[str]:
    # A subclass written for 0.1.61 may use the name of the attribute for something else.
    return left_out_of_states if isinstance(left_out_of_states, (list, tuple, set, frozenset)) else ()
