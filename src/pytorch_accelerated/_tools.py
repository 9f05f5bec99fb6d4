"""What a program sees of a run on its trainer, and the tools that hooks and callbacks have."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm

from pytorch_accelerated._arguments.moments import check_run
from pytorch_accelerated._arguments.numbers import check_positive_integer
from pytorch_accelerated._data.limits import LimitBatches
from pytorch_accelerated._distributed.collectives import drop_placeholders, gather_uneven, run_on_main
from pytorch_accelerated._means import LossTracker, as_number
from pytorch_accelerated._requests.ending import request_end_of_epoch, request_stop
from pytorch_accelerated._requests.skipping import skip_batch
from pytorch_accelerated._run import Run
from pytorch_accelerated._types import DataLoaderKwargs, EvalLoaders, Loader, MaybeNone, Nested
from pytorch_accelerated._views import RunAttribute, WritableRunAttribute
from pytorch_accelerated.exceptions import NonFiniteLossError
from pytorch_accelerated.progress import TrainingProgress
from pytorch_accelerated.run_config import TrainerRunConfig
from pytorch_accelerated.time_ledger import TimeLedger
from pytorch_accelerated.tracking import InMemoryRunHistory, RunHistory, latest_value

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrainerTools:
    """Shows the run of a trainer, and has the tools for hooks and callbacks. `TrainingLoop` is derived from it.

    What belongs to a run is in one object, `Run`; the attributes show parts of it. The library reads the run instead,
    because a subclass may use a public name that 0.1.61 does not have for something else.

    Args:
        model: The model.
        run_history: Where metrics are recorded; in memory by default.
    """

    _accelerator: Accelerator

    run_config = WritableRunAttribute[TrainerRunConfig]("config")
    """The configuration of the run under way, or of the last one; not there (``None``) before the first."""

    progress = RunAttribute[TrainingProgress]("progress")
    """How far training has come."""

    stop_reason = RunAttribute["str | None"]("stop_reason")
    """Why the run ended; ``None`` until then. Known in the events at the end of a run."""

    is_resumed = RunAttribute[bool]("is_resumed")
    """Whether the run continues from a training state."""

    is_interrupted = RunAttribute[bool]("is_interrupted")
    """Whether a signal, such as that of Ctrl-C, ends the run; known from ``on_stop_training_error`` on."""

    is_evaluating = RunAttribute[bool]("is_evaluating")
    """Whether a pass over evaluation data is under way, from ``on_eval_epoch_start`` to ``on_eval_epoch_end``."""

    is_intermediate_evaluation = RunAttribute[bool]("is_intermediate_evaluation")
    """Whether the evaluation under way is in the middle of a training epoch."""

    process_index = RunAttribute[int]("process_index")
    """The rank of this process, from 0."""

    is_sharded = RunAttribute[bool]("is_sharded")
    """Whether the parameters of the model are split over the processes, as by FSDP and DeepSpeed."""

    is_between_updates = RunAttribute[bool]("is_between_updates")
    """Whether every sample trained on so far has entered an update; if not, batches are being accumulated."""

    gradient_norm = RunAttribute["torch.Tensor | None"]("gradient_norm")
    """The norm of all gradients before clipping, if the run clips by norm; new in ``on_optimizer_step_end``."""

    time_ledger = RunAttribute[TimeLedger]("ledger")
    """Where the time of the run under way, or of the last one, goes; ``print(trainer.time_ledger)`` shows a table."""

    train_dataloader = RunAttribute[Loader | None]("train_dataloader")
    """The training loader of the run; ``None`` in a call of `evaluate` or `predict`."""

    eval_dataloaders = RunAttribute[Mapping[str, Loader]]("eval_dataloaders")
    """The evaluation loaders of the run by name, with ``""`` for a single dataset; empty without evaluation."""

    current_dataloader = RunAttribute[Loader | None]("current_dataloader")
    """The loader of the training epoch or evaluation under way; ``None`` where there is none, as in `predict`."""

    num_batches_done = RunAttribute[int]("num_batches_done")
    """The number of batches done in the training epoch or evaluation under way, on this process."""

    recent_loss = RunAttribute["float | None"]("recent_loss")
    """The mean loss of the epoch so far, as of the last ``on_log_point``; reading it never waits for the device.

    On a CUDA device it is the value of the log point before. ``None`` until it is known.
    """

    recent_metrics = RunAttribute["dict[str, float]"]("recent_metrics")
    """The same of ``loss`` and of metrics, by plain name, on this process; empty until they are known.

    Of the metrics of the Trainer, it has those that are means of single numbers.
    """

    mean_loss = RunAttribute[float]("mean_loss")
    """The mean loss of the epoch so far on this process, read from the device; NaN before the first batch."""

    # Programs written for 0.1.61 read and set these.
    _train_dataloader = WritableRunAttribute[Loader | None]("train_dataloader")
    _eval_dataloader = WritableRunAttribute[EvalLoaders | None]("eval_dataloader")
    _train_dl_kwargs = WritableRunAttribute[DataLoaderKwargs | None]("train_dl_kwargs")
    _eval_dl_kwargs = WritableRunAttribute[DataLoaderKwargs | None]("eval_dl_kwargs")
    left_out_of_states: Collection[str] = ()
    """Names of attributes that training states should not contain, such as a large teacher model that never changes."""

    _loss_tracker = WritableRunAttribute[LossTracker]("training.shown_pass.means.loss")

    def __init__(self, model: nn.Module | MaybeNone, run_history: RunHistory | None = None) -> None:
        self.model: nn.Module | MaybeNone = model
        self.run_history: RunHistory = InMemoryRunHistory() if run_history is None else run_history
        self._loop_run = Run()

    @property
    def device(self) -> torch.device:
        """The device of this process, where the model runs and batches are moved to."""
        return self._accelerator.device  # type: ignore[no-any-return]

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context for what a step computes beside the model's forward pass, in the precision of the runs.

        The forward pass is computed in it anyway; what it returns is converted to float32, and the loss function is
        called outside. Use this context for other calls: another method of the model, a second network. In it, PyTorch
        chooses a data type for each operation, as in ``torch.autocast``, and results stay in that type. Without mixed
        precision it changes nothing, and with DeepSpeed neither, which converts the model itself.

        Example:
            >>> from pytorch_accelerated import Trainer
            >>> class Contrastive(Trainer):
            ...     def calculate_train_batch_loss(self, batch):
            ...         with self.autocast():
            ...             codes = self.get_model().encode(batch[0])
            ...         return {"loss": self.loss_func(codes.float(), batch[1]), "batch_size": len(batch[1])}
        """
        context: AbstractContextManager[None] = self._accelerator.autocast()
        return context

    def print(self, *args: object, **kwargs: object) -> None:
        """Print on the main process of each node only, on lines of their own next to open progress bars.

        With ``Trainer(verbose=False)`` nothing is printed.
        """
        if not self._loop_run.is_verbose:
            return
        with tqdm.external_write_mode(kwargs.get("file")):
            self._accelerator.print(*args, **kwargs)

    def gather(self, tensor: Nested, padding_value: float | None = None) -> Nested:
        """Concatenate the tensors of all processes, in the order of their ranks. Must be called on every process.

        The processes may have different numbers of rows, including none.

        Args:
            tensor: A tensor of shape ``(rows, ...)``, or tuples, lists and mappings of such tensors.
            padding_value: Needed if dimensions other than the first may differ between processes: they are padded with
                it. Rows are never padded in the result, and real values that equal it are kept, unless a tensor
                consists of nothing else: it stands for no rows, so that a process may have nothing to contribute.

        Returns:
            The same structure with tensors of shape ``(sum of rows, ...)``; with one process, ``tensor`` itself.

        Raises:
            ValueError: The shapes do not fit together; raised on every process.
        """
        if padding_value is not None:
            tensor = drop_placeholders(tensor, padding_value)
        if self._accelerator.num_processes == 1:
            return self._accelerator.gather(tensor)
        return gather_uneven(tensor, padding_value)

    def get_agreed_metric(self, metric_name: str) -> float:
        """Return the latest value of a metric on the main process, as a number, on every process.

        Use it for decisions that all processes must make alike. What `evaluate` records counts only if training records
        nothing under this name. Must be called on every process; only the main process need have recorded the metric.

        Raises:
            ValueError: Nothing was recorded under this name, or the value is not a single number.
        """
        config = self._loop_run.config
        return run_on_main(
            lambda: as_number(latest_value(self.run_history, metric_name)),
            config.is_world_process_zero,
            config.num_processes,
        )

    def get_model(self, keep_torch_compile: bool = True) -> nn.Module:
        """Return the model without the wrappers that Accelerate put around it.

        Args:
            keep_torch_compile: Whether a compiled model is returned as such.
        """
        model: nn.Module = self._accelerator.unwrap_model(self.model, keep_torch_compile=keep_torch_compile)
        return model

    def limit_batches(self, num_batches: int) -> None:
        """Use only the first batches of every loader of this run; call it in ``on_training_run_start``.

        Raises:
            RuntimeError: No run is under way.
        """
        run, limit = self._loop_run, LimitBatches(num_batches)
        check_run(run.is_active, "limit_batches", "on_training_run_start")
        if run.train_dataloader is not None:
            run.train_dataloader = limit(run.train_dataloader)
        run.eval_dataloaders = {name: limit(loader) for name, loader in run.eval_dataloaders.items()}

    def stop(self, reason: str = "") -> None:
        """End the run gracefully, after the step or the evaluation under way; call it anywhere in a run.

        Unlike `StopTrainingError`, which ends the method that raises it, it only asks: hooks can use it too. On one
        process a run in the middle of a step ends after that step. With several, it may be called on any of them: all
        end the run after the same update, the next one at the latest if callbacks or hooks take part in steps. A run
        that is resumed later stops again at once. Within `evaluate`, only that evaluation ends, before its next
        dataset.

        Args:
            reason: Why; it becomes ``trainer.stop_reason``, and is printed.

        Raises:
            RuntimeError: No training or evaluation run is under way.
        """
        request_stop(self._loop_run, reason, self.print)

    def end_epoch(self, reason: str = "") -> None:
        """End the training part of the epoch; call it anywhere in a training epoch, such as in ``on_train_step_end``.

        What was trained counts: batches that wait for an update are completed to one first. So the epoch ends after the
        step, or the window of accumulated batches, under way; with several processes, of which any may call it, after
        the next update. Then the epoch is evaluated and counted as usual, and the next one starts with new data.
        Schedules keep the length that they were planned with. Printed, and recorded as ``train_num_batches``: how many
        batches of each process there were.

        Args:
            reason: Why, for the line that is printed.

        Raises:
            RuntimeError: No training epoch is under way.
        """
        request_end_of_epoch(self._loop_run, reason)

    def skip_batch(self) -> None:
        """Leave out the batch of the step; call it in ``on_train_step_start``, a hook or ``on_backward_start``.

        The batch has no gradients, no weight in its update, no loss in the mean, and does not count as samples; it
        counts as one of the batches done. The step has no further events. If all batches of an update are left out, on
        all processes, there is no update either, and no step of the schedule. What the forward pass has changed
        already, such as the statistics of batch norms, stays. Other processes keep their batches. One that still owes
        them its part of the update computes the forward pass of a batch that it leaves out. The number of batches that
        an epoch has left out is recorded as ``train_num_skipped_batches``.

        Raises:
            RuntimeError: No batch is under way, or its gradients are computed already.
        """
        skip_batch(self._loop_run)

    def limit_eval_steps(self, num_eval_steps: int) -> None:
        """End the current evaluation after this number of batches; call it in ``on_eval_epoch_start``.

        Raises:
            RuntimeError: No evaluation is under way.
        """
        check_run(self._loop_run.is_evaluating, "limit_eval_steps", "on_eval_epoch_start")
        check_positive_integer("num_eval_steps", num_eval_steps, "batches")
        self._loop_run.training.current_pass.max_num_steps = num_eval_steps
        self.print(f"Limiting this evaluation to {num_eval_steps} batches per process")

    def find_non_finite_loss(self) -> NonFiniteLossError | None:
        """Return an error that names the first loss that is NaN or infinite; ``None`` if all are finite.

        Covers the losses of this process in the current training epoch and evaluation. Reads them from the device.
        """
        return self._loop_run.find_non_finite_loss()

    def end_run_on_signals(self, *signals: int) -> None:
        """End this training run gracefully when one of these signals arrives; call it in ``on_training_run_start``.

        As on Ctrl-C, the current step is finished and all processes end the run with its events. Then `Trainer.train`
        raises `SystemExit` with the code ``128 + n`` on each of them. A handler that the program had installed is
        called too, and restored when the run has ended. A signal that the program ignores stays ignored. In a thread
        other than the main one, where Python allows no handlers, this is a no-op.

        Args:
            *signals: Such as ``signal.SIGTERM``.

        Raises:
            RuntimeError: No training run is under way.
            ValueError: The system does not let programs handle the signal.
        """
        check_run(self._loop_run.interrupt.is_active, "end_run_on_signals", "on_training_run_start")
        self._loop_run.interrupt.listen_to(*signals)
