"""The state of one run, held by one object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from pytorch_accelerated._accumulation import (
    AccumulationWindow,
    GradientCheck,
    OutsideParameters,
    are_finite,
    gradients_for,
)
from pytorch_accelerated._console.pace import Pace, fraction_done
from pytorch_accelerated._console.text import all_done
from pytorch_accelerated._data.loaders import guarantee_of_skipping, order_may_differ, reliable_num_batches_of
from pytorch_accelerated._data.rng import derive_seed
from pytorch_accelerated._distributed.collectives import average_gradients, mean_over_processes, share_of_processes
from pytorch_accelerated._distributed.consensus import StopConsensus
from pytorch_accelerated._distributed.reasons import RunInterruptedError
from pytorch_accelerated._means import weighted_mean
from pytorch_accelerated._measuring.metric_set import MetricSet
from pytorch_accelerated._measuring.names import MetricNames, stems_of_run
from pytorch_accelerated._messages import warn
from pytorch_accelerated._optimizers.closure import WindowClosure, WindowStep, scaled
from pytorch_accelerated._optimizers.group import parameters_of
from pytorch_accelerated._position import DataPass, TrainingPosition
from pytorch_accelerated._recording.non_finite import (
    describe_non_finite_gradient,
    describe_non_finite_loss,
    describe_non_finite_parameters,
)
from pytorch_accelerated._requests.signals import InterruptFlag
from pytorch_accelerated._scheduling.stepping import SchedulerStepping
from pytorch_accelerated.exceptions import NonFiniteLossError, StopTrainingError
from pytorch_accelerated.progress import TrainingProgress
from pytorch_accelerated.time_ledger import DATA, EVALUATION, FORWARD, OTHER, TimeLedger

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

    from pytorch_accelerated._arguments.lengths import Length
    from pytorch_accelerated._checkpoint.restart import Restart
    from pytorch_accelerated._data.determinism import SeededLoader
    from pytorch_accelerated._distributed.accelerator import PreparedModel
    from pytorch_accelerated._requests.time_limit import TimeLimit
    from pytorch_accelerated._types import (
        Batch,
        BatchOutput,
        DataLoaderKwargs,
        EvalLoaders,
        Loader,
        MaybeNone,
        Scheduler,
        StateMapping,
    )
    from pytorch_accelerated.run_config import TrainerRunConfig
    from pytorch_accelerated.tracking import RunHistory


class Run:
    """Everything that belongs to one call of `train`, `evaluate` or `predict`.

    Args:
        seed: The seed of the data order.
        process_index: The rank of this process.
        is_sharded: Whether the model is split over the processes.
        previous: The run before this one, or the run that this one is nested in.
    """

    def __init__(
        self, seed: int = 0, process_index: int = 0, is_sharded: bool = False, previous: Run | None = None
    ) -> None:
        self.seed = seed
        self.process_index = process_index
        self.is_sharded = is_sharded
        self.training: TrainingPosition = TrainingPosition(seed) if previous is None else previous.training
        self.is_active = False
        """Whether the run is under way."""

        self.is_verbose: bool = previous is None or previous.is_verbose
        """Whether anything is printed."""
        self.is_predicting = False
        """Whether this is a call of `predict`."""

        self.config: TrainerRunConfig = None  # type: ignore[assignment]  # created when the loaders are prepared
        self.is_resumed = False
        self.has_reset_history = False
        """Whether the run has started with an empty run history."""

        self.is_resuming = False
        """Whether a training state is being restored to continue the run that saved it."""

        self.stop_reason: str | None = None

        # Model and data.
        self.train_dataloader: Loader | MaybeNone = None
        self.eval_dataloaders: dict[str, Loader] = {}
        """The evaluation loaders by the name of their dataset; a single one has the name ``""``."""

        self.train_dl_kwargs: DataLoaderKwargs | None = None
        self.eval_dl_kwargs: DataLoaderKwargs | None = None
        self.seeded_train_loaders: list[SeededLoader] = []
        self.seeded_eval_loaders: list[SeededLoader] = []
        self.prepared_model: PreparedModel | None = None
        self.outside_parameters = OutsideParameters()
        """The parameters that the optimizer holds and the model does not."""

        self.untrained_parameters: list[nn.Parameter] = []
        """Those of the model that require a gradient, although no optimizer holds them."""

        self.limit_of_exactness: str | None = None
        """What a resumed run says if it may differ in the last bit from an uninterrupted one."""

        self.uses_fast_path = False
        self.created_scheduler: Scheduler | None = None
        """The scheduler that `create_scheduler` returned; any other was set by the program, and outlives the run."""

        self.closure: WindowClosure | None = None
        """What the optimizer calls to compute loss and gradients again; ``None`` if it does not."""

        # The epochs of training.
        self.total_num_epochs = 0
        """The number of completed epochs at which training ends."""

        self.min_epochs = self.first_end = 0
        """The number of completed epochs before which no callback can end the training."""

        self.time_limit: TimeLimit | None = None
        """Ends the training when its time is over."""

        self.is_time_over = False
        """Whether it has ended an epoch before its last batch."""

        self.num_batches_to_skip = 0
        """Batches of the next epoch that were done before the run was resumed."""

        self.stream_position: StateMapping | None = None
        """Where the streams of the next epoch resume; ``None`` if batches are skipped instead."""

        self.num_batches_per_epoch: int | None = None
        """Training batches per epoch; ``None`` unless that is certain."""

        self.restart: Restart | None = None
        """What a resumed run restores again after the events at its start, and at that of its first epoch."""

        self.complete_start: Callable[[], None] = do_nothing
        """Takes over what the program creates only when the run starts; called after ``on_training_run_start``."""

        self.is_epoch_cut_short = False
        """Whether the limit of updates ended the last epoch before its last batch."""

        self.was_last_epoch = False
        """Whether `_run_train_epoch` returned that no epoch follows."""

        self.is_evaluation_repeatable = False
        """Whether the evaluation that starts now would start again after a resume.

        Set by `_loop_evaluate` for `_run_eval_epoch`, whose arguments are those of 0.1.61.
        """

        # The step under way.
        self.makes_updates = False
        """Whether the library's `_run_train_epoch` is under way, which makes the updates, and then ends the steps.

        A subclass may have one of its own instead.
        """

        self.is_update_due = False
        self.is_taking_steps = False
        """Whether the library's `_run_train_epoch` is between its first step and its last."""

        self.is_batch_open = False
        """Whether the gradients of the batch of the step are still to come, so that it can be left out."""

        self.is_batch_skipped = False
        """Whether it is left out."""

        self.step_results: list[tuple[Batch, BatchOutput]] = []
        """The batch of the step and what came of it, for ``on_train_step_end``; several if a subclass makes it so."""

        self.gradient_norm: torch.Tensor | None = None
        self.metrics = MetricSet()
        """The metrics of the trainer."""

        self.stepping = SchedulerStepping()
        """When and how the scheduler is stepped."""

        self.can_guard_updates = False
        """Whether gradients can be checked before each update: on a CPU, where the host waits for nothing."""

        self.guards_updates = False
        """Whether they are, so that none that is NaN or infinite changes a parameter."""

        self._gradient_check = GradientCheck()

        # The end of the run.
        self.consensus = StopConsensus(num_processes=1)
        self.interrupt = InterruptFlag()
        """Raised by a signal; checked after each step."""

        self.ledger = TimeLedger()
        """Where the time of the run goes."""

        self.interruption: RunInterruptedError | None = None
        """The signal that ends the run; ``None`` if there was none."""

        self.is_nested = previous is not None and previous.is_active
        """Whether a callback of another run has started this one."""

        if previous is not None:
            self.config, self.created_scheduler = previous.config, previous.created_scheduler
            self.train_dl_kwargs = previous.train_dl_kwargs
            self.gradient_norm = previous.gradient_norm
            if self.is_nested:  # a signal ends the other run, whose time this one takes
                self.interrupt, self.ledger = previous.interrupt, previous.ledger

    def __getstate__(self) -> dict[str, object]:
        """Leave out the loaders: a copy of the trainer makes its own in its next run, and workers cannot be copied."""
        no_loaders: dict[str, object] = {"train_dataloader": None, "eval_dataloaders": {}}
        return {**vars(self), **no_loaders, "seeded_train_loaders": [], "seeded_eval_loaders": []}

    # --- model and data ------------------------------------------------------------------------------------------

    @property
    def is_training_run(self) -> bool:
        """Whether this is a call of `train`."""
        return self.train_dataloader is not None

    @property
    def eval_dataloader(self) -> EvalLoaders | None:
        """The loader of a single evaluation dataset, or a dictionary: how programs written for 0.1.61 know them."""
        return self.eval_dataloaders.get("", self.eval_dataloaders or None)

    @eval_dataloader.setter
    def eval_dataloader(self, loaders: EvalLoaders | None) -> None:
        named_loaders = loaders if isinstance(loaders, dict) else {"": loaders}
        self.eval_dataloaders = {name: loader for name, loader in named_loaders.items() if loader is not None}

    def show_users_arguments(self) -> None:
        """Let the prepared loaders show the user's datasets and functions."""
        training = zip(self.seeded_train_loaders, [self.train_dataloader], strict=False)
        evaluation = zip(self.seeded_eval_loaders, self.eval_dataloaders.values(), strict=False)
        for seeded_loader, prepared in (*training, *evaluation):
            seeded_loader.show_users_arguments(prepared)

    def set_data_epoch(
        self, seeded_loaders: list[SeededLoader], loader: Loader, epoch: int, seed: int, run_number: int = 0
    ) -> None:
        """Put loaders before the first batch of an epoch, counted from 0."""
        for seeded_loader in seeded_loaders:
            seeded_loader.set_epoch(epoch, seed, run_number)
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)

    def guarantee_of_order(self, loader: Loader) -> str:
        """Return a sentence for the user: how exactly the data continue after batches are skipped."""
        uncovered = [name for seeded in self.seeded_train_loaders for name in seeded.order_state.uncovered()]
        return order_may_differ(uncovered) if uncovered else guarantee_of_skipping(loader)

    def resume_streams(self, position: StateMapping, num_batches: int) -> None:
        """Put the streams that training reads from at the position after this number of batches."""
        for seeded_loader in self.seeded_train_loaders:
            if seeded_loader.stream is not None:
                seeded_loader.stream.resume(position, num_batches)

    # --- what callbacks ask --------------------------------------------------------------------------------------

    @property
    def progress(self) -> TrainingProgress:
        """How far training has come."""
        return self.training.progress

    def fraction_done(self) -> float:
        """Return how much of a training run is done, from 0 to 1."""
        progress, num_batches = self.training.progress, self.num_batches_per_epoch
        of_epoch = progress.num_batches_in_epoch / num_batches if num_batches else 0.0
        num_epochs = progress.num_epochs_completed + (of_epoch if progress.phase == "training" else 1.0)
        return fraction_done(num_epochs, self.total_num_epochs, progress.num_updates, self.update_limit)

    def seconds_left(self, pace: Pace) -> float | None:
        """Return how long a training run still takes: until it is done, or its time is over.

        Args:
            pace: That of `fraction_done`, of which this is a mark.
        """
        pace.mark(self.fraction_done())
        left = pace.seconds_left(1.0)
        if self.time_limit is None:
            return left
        at_least = pace.seconds_left(self.first_end / self.total_num_epochs) or 0.0
        until_limit = max(self.time_limit.seconds_left(), at_least)
        return until_limit if left is None else min(left, until_limit)

    @property
    def name_of_current_dataset(self) -> str:
        """The name of the evaluation dataset under way; empty if it is the only one."""
        loader = self.training.current_pass.loader
        return next((name for name, each in self.eval_dataloaders.items() if each is loader), "")

    @property
    def is_between_updates(self) -> bool:
        """Whether every sample trained on so far has entered an update."""
        return self.training.window.num_samples == 0

    @property
    def is_evaluating(self) -> bool:
        """Whether a pass over evaluation data is under way."""
        return self.training.current_pass.stage == "evaluation"

    @property
    def is_intermediate_evaluation(self) -> bool:
        """Whether the evaluation under way is in the middle of a training epoch."""
        return self.training.current_pass.is_intermediate

    @property
    def current_dataloader(self) -> Loader | MaybeNone:
        """The loader of the training epoch or evaluation under way."""
        return self.training.current_pass.loader

    @property
    def num_batches_done(self) -> int:
        """The number of batches done in the training epoch or evaluation under way."""
        return self.training.current_pass.num_batches_done

    @property
    def recent_loss(self) -> float | None:
        """The mean loss of the epoch so far, as of the last log point; ``None`` until it is known."""
        return self.training.current_pass.monitor.mean

    @property
    def recent_metrics(self) -> dict[str, float]:
        """The mean loss and metrics of the epoch so far on this rank, by plain name, as of the last log point."""
        return dict(self.training.current_pass.monitor.values)

    @property
    def mean_loss(self) -> float:
        """The mean loss of the epoch so far on this rank, read from the device; NaN before the first batch."""
        tracker = self.training.current_pass.means.loss
        return weighted_mean(tracker.total_loss, tracker.running_count)

    # --- epochs and passes ---------------------------------------------------------------------------------------

    def reset_history(self, history: RunHistory) -> None:
        """Forget the metrics of earlier runs."""
        history.reset()
        self.has_reset_history = True

    def record_in(self, history: RunHistory, run_info: StateMapping | None = None) -> None:
        """Let a history read the moment of what is recorded from the position of this run.

        Args:
            history: The history.
            run_info: What a training run is made of; ``None`` for an evaluation.
        """
        history._follow_run(self.training.progress, self.config.is_world_process_zero)  # noqa: SLF001 - a seam
        if run_info is not None:
            history._start_run(run_info)  # noqa: SLF001 - a seam

    def record_steps_every(self, every: Length | int | None) -> None:
        """Record values of steps that often, or more often if the run history or a callback wants that.

        Args:
            every: A length, or a number of updates; ``None`` for no wish.
        """
        self.training.recorder.take_every(self, every)

    def start_training(self, num_epochs_completed: int, num_epochs: int, window: AccumulationWindow) -> None:
        """Start a training of its own, in place of the position that the previous run left."""
        settings, run_number = self.training.settings, self.training.run_number + 1
        seed = derive_seed(self.seed, "run", run_number) if run_number else self.seed
        self.training = TrainingPosition(seed, num_epochs_completed, window, run_number)
        self.training.settings = settings
        self.training.num_metric_values_seen = self.stepping.num_values_before
        self.total_num_epochs = num_epochs_completed + num_epochs
        self.first_end = num_epochs_completed + self.min_epochs
        self.training.restart_scheduler_updates()

    def start_resumed_training(self, num_epochs: int) -> None:
        """Continue the training whose position has been restored, up to this number of epochs."""
        training, progress = self.training, self.training.progress
        self.num_batches_to_skip = progress.num_batches_in_epoch if progress.phase == "training" else 0
        self.stream_position = training.stream_position
        self.total_num_epochs, self.first_end = num_epochs, self.min_epochs
        if not progress.is_between_epochs():
            self.is_epoch_cut_short = self._was_epoch_cut_short()
        self.is_resumed = True
        training.restart_scheduler_updates()

    @contextmanager
    def keeping_position(self) -> Iterator[None]:
        """Forget the position and the seed that the body restores: they belong to another run, whose model it loads."""
        position, seed = self.training, self.seed
        self.training = TrainingPosition(seed)
        try:
            yield
        finally:
            self.training, self.seed = position, seed

    def start_train_epoch(self, loader: Loader, makes_updates: bool = True) -> int:
        """Start an epoch, or the rest of one; return how many of its batches a resumed run has done before.

        Args:
            loader: Yields the batches of the whole epoch.
            makes_updates: Whether the library makes the updates; see `start_epoch_of_subclass`.
        """
        training, num_done = self.training, self.num_batches_to_skip
        self.makes_updates, self.is_update_due = makes_updates, False
        self.ledger.switch(OTHER)
        if makes_updates:
            self.num_batches_to_skip = 0
        training.start_epoch(loader, num_done)
        epoch = training.progress.num_epochs_completed
        self.set_data_epoch(self.seeded_train_loaders, loader, epoch, training.seed, training.run_number)
        training.epoch.metrics = self.metrics.of_training
        self.start_metrics(training.epoch, "train_", is_resumed=num_done > 0)
        return num_done

    def start_metrics(self, data_pass: DataPass, stem: str, is_resumed: bool = False) -> None:
        """Start the metrics of a pass, or continue those of a training epoch that a resumed run is in.

        Args:
            data_pass: The pass.
            stem: What is put in front of the names of its metrics.
            is_resumed: Whether some of its steps were done before.
        """
        stems = stems_of_run(self.eval_dataloaders, self.is_training_run)
        data_pass.means.names = MetricNames(stem, stems, self.metrics.names)
        if data_pass.metrics is not None and is_resumed:
            data_pass.metrics.warn_about_rest()
        elif data_pass.metrics is not None:
            data_pass.metrics.reset()

    def epoch_start(self, num_done: int, optimizer: Any, stateful: Iterable[object]) -> AbstractContextManager[None]:
        """Return the context of the events at the start of an epoch; they change no state if it was started before."""
        restart, self.restart = self.restart, None
        return nullcontext() if restart is None or num_done == 0 else restart.of_epoch(optimizer, stateful)

    def start_epoch_of_subclass(self) -> None:
        """Start an epoch of which a subclass makes the updates, unless its method calls that of the library."""
        self.start_train_epoch(self.train_dataloader, makes_updates=False)
        self.count_batches(self.train_dataloader)

    def count_batches(self, loader: Loader) -> None:
        """Find out how many batches the epoch has; after its start, where a callback may have changed the dataset."""
        self.num_batches_per_epoch = reliable_num_batches_of(loader)
        self.training.window.start_epoch(self.config.gradient_accumulation_steps, self.num_batches_per_epoch)

    @property
    def plain_scale(self) -> float | None:
        """What a loss is multiplied by where a subclass makes the updates, and no batch can be weighed."""
        num_batches = self.config.gradient_accumulation_steps
        return None if num_batches == 1 else 1 / num_batches

    def count_step_of_subclass(self, step: int, num_samples: int) -> None:
        """Count the samples of a step, and the update that a subclass is expected to make after it."""
        progress, num_batches = self.training.progress, self.config.gradient_accumulation_steps
        progress.num_samples += num_samples * self.config.num_processes
        if (step + 1) % num_batches == 0 or step + 1 == self.num_batches_per_epoch:
            progress.num_updates += 1

    def start_exchange(self, step: int) -> None:
        """Tell the other ranks the weight of this rank's share of the update, while the backward pass runs."""
        window = self.training.window
        is_last = step + 1 == self.num_batches_per_epoch
        expected = None if is_last or window.num_skipped else window.expected
        self.consensus.start_exchange(window.total, window.num_samples, expected, window.num_skipped)

    def finish_exchange(self) -> tuple[float, int]:
        """Return the weight of the update and its samples, on all ranks, and note what they have agreed on."""
        weight, num_samples = self.consensus.finish_exchange()
        self.training.progress.num_skipped_in_epoch += self.consensus.num_skipped
        end = self.consensus.agreed_end_of_epoch
        if end is not None and not end.ends_run:
            self.training.window.end_of_epoch = [str(end), True]
        return weight, num_samples

    @contextmanager
    def updating_with_closure(
        self,
        optimizer: Optimizer,
        repeat: Callable[[list[WindowStep], float | torch.Tensor | None], torch.Tensor],
        correction: float | torch.Tensor | None,
    ) -> Iterator[None]:
        """Let the optimizer evaluate the window again, at other parameters, while the body runs.

        Args:
            optimizer: The optimizer.
            repeat: Computes the gradients of some steps again, and returns the sum of their scaled losses.
            correction: The factor that makes that sum the mean over the window, and that `repeat` is passed.

        Raises:
            NonFiniteLossError: A parameter would not be finite; all have their values from before the update.
        """
        assert self.closure is not None

        def average(loss: torch.Tensor) -> torch.Tensor:
            mean: torch.Tensor = scaled(mean_over_processes(loss, self.config.num_processes), correction)
            return mean

        with self.closure.during_update(optimizer, lambda steps: repeat(steps, correction), average) as put_back:
            yield
            if self.guards_updates and not are_finite(parameters_of(optimizer)):
                put_back()
                self.stop_on_all_ranks(NonFiniteLossError(describe_non_finite_parameters(self._place_in_training)))
                self.consensus.sync()

    def share_of_ranks(self, weight: float, device: torch.device) -> float | torch.Tensor | None:
        """Return what to multiply a loss of this rank by for the mean over all ranks; see `share_of_processes`."""
        is_dummy = self.training.current_pass.is_dummy_step
        return share_of_processes(0 if is_dummy else weight, self.config.num_processes, device)

    def complete_single_update(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Make the gradients of an optimizer the mean over the ranks, and check that they are finite."""
        if self.config.is_distributed:
            average_gradients(parameters_of(optimizer), self.config.num_processes)
        if self.guards_updates:
            self.check_gradients(gradients_for(optimizer), model)

    def find_non_finite_loss(self) -> NonFiniteLossError | None:
        """Return an error that names the first loss that is NaN or infinite; ``None`` if all are finite.

        Looks at the passes under way, the training epoch first. Reads from the device.
        """
        training = self.training
        for data_pass in (*training.suspended_passes, training.current_pass):
            found = data_pass.means.find_non_finite()
            if found is not None:
                step, loss = found
                epoch = training.progress.num_epochs_completed + 1
                place = f" in {data_pass.stage}, epoch {epoch}, step {step}, rank {self.process_index}"
                return NonFiniteLossError(describe_non_finite_loss(loss, place), step)
        return None

    def find_non_finite_value(self, model: nn.Module) -> NonFiniteLossError | None:
        """Return an error if a parameter, or a gradient that waits for an update, is NaN or infinite."""
        parameters = list(model.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        place = f", epoch {self.training.progress.num_epochs_completed + 1}, rank {self.process_index}"
        if not self.is_between_updates and not are_finite(gradients):
            return NonFiniteLossError(describe_non_finite_gradient(model, place))
        if not self.guards_updates and not are_finite(parameters):
            return NonFiniteLossError(describe_non_finite_parameters(place))
        return None

    def check_gradients(self, gradients: list[torch.Tensor], model: nn.Module) -> None:
        """Stop the run, on all ranks, if a gradient or a loss of this epoch is not finite.

        All ranks have the same gradients, so all stop here. If only a loss is not finite, other ranks learn it later.

        Raises:
            NonFiniteLossError: It names the first loss that is not finite, or else the parameter.
        """
        if not self._gradient_check.are_finite(gradients):
            place = self._place_in_training
            error = self.find_non_finite_loss() or NonFiniteLossError(describe_non_finite_gradient(model, place))
            self.stop_on_all_ranks(error)
            self.consensus.sync()
        elif getattr(self.training.epoch.means.loss, "is_known_non_finite", False):  # it may be the user's
            self.stop_on_all_ranks(self.find_non_finite_loss() or NonFiniteLossError())

    @property
    def _place_in_training(self) -> str:
        return f" in training, epoch {self.training.progress.num_epochs_completed + 1}, rank {self.process_index}"

    # --- the end of a run ----------------------------------------------------------------------------------------

    @property
    def is_interrupted(self) -> bool:
        """Whether a signal ends the run."""
        return self.interruption is not None

    def raise_interruption(self) -> None:
        """Let the signal that has ended the run, if any, end the program as it would without a run.

        Raises:
            KeyboardInterrupt: It was Ctrl-C.
            SystemExit: It was another signal; the code is 128 + its number.
        """
        if self.interruption is not None:
            raise self.interruption.to_exit_exception()

    @contextmanager
    def keeping_time(self) -> Iterator[None]:
        """Start the ledger, or let the body be an evaluation in that of the run that this one is nested in."""
        if self.is_nested:
            with self.ledger.during(EVALUATION):
                yield
            return
        self.ledger.start()
        try:
            yield
        finally:
            self.ledger.switch(OTHER)

    def warn_about_time(self, *, is_at_end: bool = False) -> None:
        """Warn, on the main process, of what takes too large a share of the time of the run."""
        if not self.config.is_world_process_zero or self.is_nested:
            return
        for part in self.ledger.find_excess(is_at_end=is_at_end):
            loader = self.train_dataloader if part == DATA else next(iter(self.eval_dataloaders.values()), None)
            if part == DATA:
                argument = "train_dataloader_kwargs"
            else:
                argument = "eval_dataloader_kwargs" if self.is_training_run else "dataloader_kwargs"
            warn(self.ledger.describe_excess(part, getattr(loader, "num_workers", None), argument))

    @property
    def update_limit(self) -> int | None:
        """The number of updates that ends the run, if `max_num_train_steps` was given; ``None`` without a limit.

        Without a limit, `TrainerRunConfig.max_num_train_steps` is the number of updates that the epochs make.
        """
        return self.config.max_num_train_steps if self.config.is_limited_by_steps else None

    @property
    def is_update_limit_reached(self) -> bool:
        """Whether the run has made as many updates as `max_num_train_steps` allows."""
        limit = self.update_limit
        return limit is not None and self.training.progress.num_updates >= limit

    def _was_epoch_cut_short(self) -> bool:
        """Return whether the limit of updates had ended the epoch before the run was saved in its evaluation."""
        progress, num_batches = self.training.progress, reliable_num_batches_of(self.train_dataloader)
        is_within_epoch = num_batches is None or progress.num_batches_in_epoch < num_batches
        return progress.phase == "evaluation" and self.is_update_limit_reached and is_within_epoch

    def should_continue(self) -> bool:
        """Return whether there is an epoch left to run, or the rest of one."""
        progress = self.training.progress
        if self.was_last_epoch or progress.num_epochs_completed >= self.total_num_epochs:
            return False
        if self.time_limit is not None and self.time_limit.ends_before_epoch(self):
            return False
        return not (self.is_update_limit_reached and progress.is_between_epochs())

    def until_update_limit(self, steps: Iterator[tuple[int, Batch, bool]]) -> Iterator[tuple[int, Batch, bool]]:
        """Return the steps of an epoch; none is fetched once the run has made its last update.

        Nor is one if the epoch was ended before the run was resumed.
        """
        limit, progress, end = self.update_limit, self.training.progress, self.training.window.end_of_epoch
        if end is not None and end[1]:
            return iter(())
        if limit is not None:
            unlimited = steps
            steps = iter(lambda: next(unlimited, None) if progress.num_updates < limit else None, None)
        return self.ledger.waiting_for(steps, DATA, then=FORWARD)

    def limit_reached(self) -> str | None:
        """Return which limit ended the training before its last epoch was done; ``None`` if none did."""
        progress = self.training.progress
        has_epochs_left = progress.num_epochs_completed < self.total_num_epochs
        if self.time_limit is not None and not self.is_update_limit_reached:
            return self.time_limit.reason if has_epochs_left or self.is_time_over else None
        is_cut_short = self.is_epoch_cut_short and self.is_update_limit_reached
        limit = f"{all_done(progress.num_updates, 'update')} (`max_num_train_steps`)"
        return limit if has_epochs_left or is_cut_short else None

    def count_epoch(self, history: RunHistory) -> None:
        """Count the current epoch, if its training is done."""
        if self.training.progress.phase != "training":
            self.training.progress.end_epoch()
            history._increment_epoch()  # noqa: SLF001 - a seam of 0.1.61 between the loop and its history

    def call(self, hook: Callable[..., object], *args: object) -> None:
        """Call a hook. What ends the run there ends it on all ranks: at once if this is the only one."""
        try:
            hook(*args)
        except (StopTrainingError, NonFiniteLossError) as reason:
            self.stop_on_all_ranks(reason)

    def stop_on_all_ranks(self, reason: Exception) -> None:
        """Stop the run: at once if this is the only rank, otherwise with the next exchange."""
        if not self.consensus.is_needed:
            raise reason
        self.consensus.request_stop(reason)

    def check_signals(self) -> None:
        """Stop the run if a signal has arrived."""
        if self.interrupt.signal_number is not None:
            self.stop_on_all_ranks(RunInterruptedError(self.interrupt.signal_number))

    def check_late_signal(self) -> None:
        """Let a signal that arrived while the run ended anyway have its effect, on all processes."""
        if self.interruption is None:
            try:
                self.check_signals()
                self.consensus.sync()
            except RunInterruptedError as interruption:
                self.interruption = interruption


def do_nothing() -> None:
    """Do nothing."""
