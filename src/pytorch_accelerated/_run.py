"""The state of one run, held by one object."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pytorch_accelerated._accumulation import AccumulationWindow
from pytorch_accelerated._checkpoint.folder import Lineage
from pytorch_accelerated._data.loaders import reliable_num_batches_of
from pytorch_accelerated._distributed.consensus import StopConsensus
from pytorch_accelerated._loss_monitor import LossMonitor, describe_non_finite_loss
from pytorch_accelerated._proxy import Forwarded, Value, WritableForwarded
from pytorch_accelerated._signals import InterruptFlag, RunInterruptedError
from pytorch_accelerated.exceptions import NonFiniteLossError
from pytorch_accelerated.progress import TrainingProgress
from pytorch_accelerated.tracking import EpochMeans

if TYPE_CHECKING:
    import torch

    from pytorch_accelerated._data.determinism import SeededLoader
    from pytorch_accelerated._distributed.accelerator import PreparedModel
    from pytorch_accelerated._types import (
        Batch,
        BatchOutput,
        DataLoaderKwargs,
        EvalLoaders,
        Loader,
        MaybeNone,
        RunSettings,
        StateMapping,
    )
    from pytorch_accelerated.run_config import TrainerRunConfig


class DataPass:
    """One pass over the data: a training epoch, or an evaluation.

    Args:
        stage: What the pass is for.
        loader: Yields its batches.
        is_intermediate: Whether it is an evaluation in the middle of a training epoch.
    """

    def __init__(
        self, stage: Literal["training", "evaluation"], loader: Loader | MaybeNone = None, is_intermediate: bool = False
    ) -> None:
        self.stage = stage
        self.loader = loader
        self.is_intermediate = is_intermediate
        self.means = EpochMeans()
        """The weighted means of loss and metrics so far, on this rank."""

        self.monitor = LossMonitor()
        """Says when a log point is due, and knows the loss as of the last one."""

        self.num_batches_done = 0
        self.max_num_steps: int | None = None
        """Batches after which an evaluation ends early; ``None`` for no limit."""

        self.is_dummy_step = False
        """Whether the batch of the current step is a dummy, which counts for nothing."""


class Run:
    """Everything that belongs to one call of `train`, `evaluate` or `predict`.

    Args:
        seed: The seed of the data order.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.is_active = False
        """Whether the run is under way."""

        self.config: TrainerRunConfig = None  # type: ignore[assignment]  # created when the loaders are prepared
        self.is_resumed = False
        self.stop_reason: str | None = None
        self.interrupt = InterruptFlag()
        """Raised by a signal; checked after each step."""

        self.interruption: RunInterruptedError | None = None
        """The signal that ends the run; ``None`` if there was none."""

        # The model and the data.
        self.train_loader: Loader | MaybeNone = None
        self.eval_loader: EvalLoaders | None = None
        """The evaluation loader, or a dictionary of them; ``None`` for no evaluation."""

        self.train_dl_kwargs: DataLoaderKwargs | None = None
        self.eval_dl_kwargs: DataLoaderKwargs | None = None
        self.seeded_train_loaders: list[SeededLoader] = []
        self.seeded_eval_loaders: list[SeededLoader] = []
        self.prepared_model: PreparedModel | None = None
        self.uses_fast_path = False

        # The step under way.
        self.is_update_due = False
        self.batch_output: BatchOutput | None = None
        self.gradient_norm: torch.Tensor | None = None
        self.consensus = StopConsensus(num_processes=1)
        # The epoch under way.
        self.total_num_epochs = 0
        """The number of completed epochs at which training ends."""

        self.is_last_epoch = False
        """Whether the run ends with the epoch that was trained last."""

        self.num_batches_per_epoch: int | None = None
        """Training batches per epoch; ``None`` unless that is certain."""

        self.num_batches_to_skip = 0
        """Batches of the next epoch that were done before the run was resumed."""

        self.stream_position: StateMapping | None = None
        self.is_epoch_cut_short = False
        self.is_evaluation_repeatable = False
        """Whether a run interrupted now would run the current evaluation again after a resume."""

        # The position in training: what a training state consists of, next to model, optimizer and scheduler.
        self.progress = TrainingProgress()
        self.passes = [DataPass("training")]
        """The training epoch, then the evaluations that suspend it, the innermost last."""

        self.window = AccumulationWindow()
        self.training_seed = seed
        self.lineage = Lineage()
        self.settings: RunSettings = {}
        self.early_stop_reason: str | None = None

    def inherit(self, previous: Run) -> None:
        """Keep the position in training where the previous run left it; a call of `train` then starts its own."""
        self.config = previous.config
        self.gradient_norm = previous.gradient_norm
        self.progress = previous.progress
        self.passes = previous.passes
        self.window = previous.window
        self.training_seed = previous.training_seed
        self.lineage = previous.lineage
        self.settings = previous.settings
        self.early_stop_reason = previous.early_stop_reason
        if previous.is_active:  # the run is nested in a callback of the other
            self.interrupt = previous.interrupt

    def start_training(self, num_epochs_completed: int, num_epochs: int, window: AccumulationWindow) -> None:
        """Put the run before the first batch of its first epoch."""
        self.window = window
        self.progress = TrainingProgress(num_epochs_completed=num_epochs_completed)
        self.total_num_epochs = num_epochs_completed + num_epochs
        self.passes = [DataPass("training")]
        self.training_seed = self.seed
        self.lineage = Lineage()
        self.early_stop_reason = None

    # --- passes over the data ------------------------------------------------------------------------------------

    @property
    def current_pass(self) -> DataPass:
        """The pass under way, or the last training epoch."""
        return self.passes[-1]

    @property
    def eval_loaders(self) -> dict[str, Loader]:
        """The evaluation loaders by name; a single one has the name ``""``."""
        if isinstance(self.eval_loader, dict):
            return self.eval_loader
        return {} if self.eval_loader is None else {"": self.eval_loader}

    @property
    def is_evaluating(self) -> bool:
        """Whether an evaluation is under way."""
        return self.passes[-1].stage == "evaluation"

    @property
    def is_between_updates(self) -> bool:
        """Whether every sample trained on so far has entered an update."""
        return self.window.num_samples == 0

    def start_train_epoch(self, loader: Loader, index: int) -> int:
        """Put sums, accumulation window and loader at the start of a training epoch.

        Args:
            loader: Yields its batches.
            index: Index of the epoch, from 0.

        Returns:
            How many of its batches a resumed run has done before.
        """
        num_done, self.num_batches_to_skip = self.num_batches_to_skip, 0
        epoch = DataPass("training", loader)
        epoch.num_batches_done = num_done
        if num_done > 0:
            epoch.means = self.passes[0].means
        else:
            self.window.reset()
        epoch.means.first_step = num_done
        self.passes[0] = epoch
        self.num_batches_per_epoch = reliable_num_batches_of(loader)
        self.window.start_epoch(self.num_batches_per_epoch)
        self.set_data_epoch(self.seeded_train_loaders, loader, index)
        return num_done

    def start_exchange(self, step: int) -> None:
        """Tell the other ranks the weight of this rank's share of the update, while the backward pass runs."""
        is_last = step + 1 == self.num_batches_per_epoch
        expected = None if is_last else self.window.expected
        self.consensus.start_exchange(self.window.total, self.window.num_samples, expected)

    def resume_streams(self, position: StateMapping, num_batches: int) -> None:
        """Put the streams that training reads from at the position after this number of batches."""
        for seeded_loader in self.seeded_train_loaders:
            if seeded_loader.stream is not None:
                seeded_loader.stream.resume(position, num_batches)

    def set_data_epoch(self, seeded_loaders: list[SeededLoader], loader: Loader, epoch: int) -> None:
        """Put loaders before the first batch of an epoch, counted from 0."""
        for seeded_loader in seeded_loaders:
            seeded_loader.set_epoch(epoch, self.seed)
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)

    def find_non_finite_loss(self, epoch: int, process_index: int) -> NonFiniteLossError | None:
        """Return an error that names the first loss of the epoch that is NaN or infinite; ``None`` if all are finite.

        Reads from the device.
        """
        for data_pass in self.passes:
            found = data_pass.means.find_non_finite()
            if found is not None:
                step, loss = found
                place = f" in {data_pass.stage}, epoch {epoch}, step {step}, rank {process_index}"
                return NonFiniteLossError(describe_non_finite_loss(loss, place), step)
        return None

    # --- the end of a run ----------------------------------------------------------------------------------------

    @property
    def is_interrupted(self) -> bool:
        """Whether a signal ends the run."""
        return self.interruption is not None

    @property
    def update_limit(self) -> int | None:
        """The number of updates that ends the run, if `max_num_train_steps` asked for one."""
        config = self.config
        return config.max_num_train_steps if config.is_limited_by_steps else None

    @property
    def is_update_limit_reached(self) -> bool:
        """Whether the run has made as many updates as were asked for."""
        limit = self.update_limit
        return limit is not None and self.progress.num_updates >= limit

    def should_continue(self) -> bool:
        """Return whether there is an epoch left to run, or the rest of one."""
        if self.is_last_epoch or self.progress.num_epochs_completed >= self.total_num_epochs:
            return False
        return not (self.is_update_limit_reached and self.progress.is_between_epochs())

    def until_update_limit(self, steps: Iterator[tuple[int, Batch, bool]]) -> Iterator[tuple[int, Batch, bool]]:
        """Yield the steps of an epoch until the run has made its last update."""
        limit = self.update_limit
        self.is_epoch_cut_short = False
        if limit is None:
            yield from steps
            return
        is_last = self.current_pass.num_batches_done == self.num_batches_per_epoch
        while self.progress.num_updates < limit:
            step = next(steps, None)
            if step is None:
                return
            is_last = step[-1]
            yield step
        self.is_epoch_cut_short = not is_last

    def end_together(self, reason: Exception) -> None:
        """End the run at the same place on every rank: at once if this is the only one."""
        if not self.consensus.is_needed:
            raise reason
        self.consensus.request_stop(reason)

    def check_signals(self) -> None:
        """End the run if a signal has arrived."""
        if self.interrupt.signal_number is not None:
            self.end_together(RunInterruptedError(self.interrupt.signal_number))


class RunAttribute(Forwarded[Value]):
    """A read-only attribute of the trainer that lives in its run.

    Args:
        path: Where it is in `Run`, such as ``"current_pass.loader"``.
    """

    def __init__(self, path: str) -> None:
        super().__init__(f"_loop_run.{path}")


class WritableRunAttribute(RunAttribute[Value], WritableForwarded[Value]):
    """The same for an attribute that programs also set."""
