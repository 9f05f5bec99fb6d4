"""Callbacks that report where the time goes, and how fast training is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytorch_accelerated._distributed.collectives import sum_over_processes
from pytorch_accelerated._hints.arguments import explains_arguments
from pytorch_accelerated._messages import warn
from pytorch_accelerated._views import run_of
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.time_ledger import EVALUATION, EVALUATION_DATA, SAVING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from pytorch_accelerated._types import Batch, BatchOutput, MaybeNone, StateDict, StateMapping
    from pytorch_accelerated.trainer import Trainer


class TimeLedgerCallback(TrainerCallback):
    """Prints where the time of a training run went, and records it for each epoch if asked to.

    The ledger itself, ``trainer.time_ledger``, is kept in every run, with this callback or without it.

    Args:
        print_table: Whether to print the table at the end of the run.
        record_epochs: Whether to record the seconds of each epoch in the run history, as ``seconds_data``,
            ``seconds_forward`` and so on, and ``seconds_callback_`` + the name of the class for each callback. An epoch
            ends with this event; what later callbacks do in it counts for the next one.
        max_share: The share of the time of the run, from 0 to 1, above which a warning tells of waiting for data, of
            saving, or of a callback, once each; ``None`` for never.

    Example:
        >>> callbacks = [TimeLedgerCallback(record_epochs=True, max_share=0.2)]
    """

    @explains_arguments
    def __init__(self, *, print_table: bool = True, record_epochs: bool = False, max_share: float | None = 0.4) -> None:
        if max_share is not None and not 0 < max_share <= 1:
            raise ValueError(f"`max_share` is {max_share!r}. Expected a share above 0 and up to 1, or `None`.")
        self.print_table = print_table
        self.record_epochs = record_epochs
        self.max_share = max_share
        self._recorded: dict[str, float] = {}
        self._before_resume: dict[str, float] = {}
        self._saved: dict[str, float] = {}

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Set the share, and start with the first epoch."""
        run_of(trainer).ledger.max_share = self.max_share
        self._recorded = {}
        if not run_of(trainer).is_resumed:
            self._before_resume = {}

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Record the seconds of the epoch."""
        if self.record_epochs:
            for part, seconds in self._seconds_of_epoch(trainer).items():
                trainer.run_history.update_metric(f"seconds_{part}", seconds)
            self._recorded, self._before_resume = run_of(trainer).ledger.seconds, {}

    def on_training_state_save(self, trainer: Trainer, **kwargs: Any) -> None:
        """Note the seconds of the epoch so far."""
        self._saved = self._seconds_of_epoch(trainer)

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print the table."""
        if self.print_table:
            trainer.print(f"\n{run_of(trainer).ledger}")

    def state_dict(self) -> StateDict:
        """Return the seconds of the epoch that had passed when the state was saved."""
        return {"seconds_of_epoch": dict(self._saved)}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        self._before_resume = dict(state_dict["seconds_of_epoch"])

    def _seconds_of_epoch(self, trainer: Trainer) -> dict[str, float]:
        seconds, recorded, before = run_of(trainer).ledger.seconds, self._recorded, self._before_resume
        return {
            part: seconds.get(part, 0.0) - recorded.get(part, 0.0) + before.get(part, 0.0)
            for part in {**seconds, **before}
        }


_NOT_TRAINING = (EVALUATION, EVALUATION_DATA, SAVING)


class ThroughputCallback(TrainerCallback):
    """Records how fast training was in each epoch, over all processes.

    The metrics are ``train_samples_per_second``, ``train_updates_per_second`` and, if they can be told,
    ``train_tokens_per_second`` and ``train_model_flop_utilization``. The time is that of the training part of the
    epoch, without evaluations in the middle of it and without saving. It ends when the loss of the epoch has been read
    from the device, so what the device had to catch up with is part of it.

    Args:
        count_tokens: Returns the number of tokens in a batch, as a number or a tensor, which is not read before the end
            of the epoch.
        flops_per_sample: The floating-point operations that forward and backward pass take for one sample. If it is
            ``None`` and ``peak_flops`` is given, PyTorch's `FlopCounterMode` counts those of the first step: matrix
            products, convolutions and attention, in a model that is not compiled.
        peak_flops: The floating-point operations per second that one device could do, such as ``312e12``. The model
            FLOP utilization is the share of that which the model takes.

    Example:
        >>> callback = ThroughputCallback(count_tokens=lambda batch: batch["attention_mask"].sum(), peak_flops=312e12)
    """

    @explains_arguments
    def __init__(
        self,
        count_tokens: Callable[[Any], float | torch.Tensor] | None = None,
        flops_per_sample: float | None = None,
        peak_flops: float | None = None,
    ) -> None:
        for name, value in (("flops_per_sample", flops_per_sample), ("peak_flops", peak_flops)):
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` is {value!r}. Expected a number above 0, or `None`.")
        self.count_tokens = count_tokens
        self.flops_per_sample = flops_per_sample
        self.peak_flops = peak_flops
        self._counter: FlopCounterMode | None = None
        self._is_counted = flops_per_sample is not None or peak_flops is None
        self._start: dict[str, float] = {}
        self._seconds_in_evaluations = 0.0
        self._before_resume: dict[str, float] = {}
        self._saved: dict[str, float] = {}
        self._num_tokens: float | torch.Tensor = 0
        # With several processes, each event of a step that has a listener costs an exchange, so listen only if needed.
        if not self._is_counted:
            self.on_train_step_start = self._start_counting  # type: ignore[method-assign]
        if count_tokens is not None or not self._is_counted:
            self.on_train_step_end = self._count_step  # type: ignore[method-assign]

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Forget what an earlier run left."""
        self._start = {}
        if not run_of(trainer).is_resumed:
            self._before_resume = {}

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Start the clock."""
        self._num_tokens, self._seconds_in_evaluations = 0, 0.0
        self._start = self._now(trainer)

    def on_eval_epoch_start(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Stop the clock for what callbacks do in an evaluation."""
        self._seconds_in_evaluations -= self._seconds_outside_evaluation(trainer)

    def on_eval_epoch_end(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Let the clock go on."""
        self._seconds_in_evaluations += self._seconds_outside_evaluation(trainer)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Record the rates of the epoch."""
        config, history, done = trainer.run_config, trainer.run_history, self._done_in_epoch(trainer)
        self._before_resume = {}
        seconds = done["seconds"]
        if seconds <= 0:
            return
        samples_per_second = done["samples"] / seconds
        history.update_metric("train_samples_per_second", samples_per_second)
        history.update_metric("train_updates_per_second", done["updates"] / seconds)
        if self.count_tokens is not None:
            history.update_metric("train_tokens_per_second", done["tokens"] / seconds)
        if self.flops_per_sample is not None and self.peak_flops is not None:
            share = samples_per_second * self.flops_per_sample / (self.peak_flops * config.num_processes)
            history.update_metric("train_model_flop_utilization", share)

    def on_training_state_save(self, trainer: Trainer, **kwargs: Any) -> None:
        """Note what was done in the epoch so far."""
        is_within_epoch = bool(self._start) and run_of(trainer).progress.phase == "training"
        self._saved = self._done_in_epoch(trainer) if is_within_epoch else {}

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        """Stop counting."""
        self._stop_counting()

    def on_exception(self, trainer: Trainer, *, exception: BaseException, **kwargs: Any) -> None:
        """Stop counting."""
        self._stop_counting()

    def state_dict(self) -> StateDict:
        """Return what was done of the epoch, and the operations per sample that were counted."""
        counted = {} if self.flops_per_sample is None else {"flops_per_sample": self.flops_per_sample}
        return {"done_in_epoch": dict(self._saved), **counted}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        self._before_resume = dict(state_dict["done_in_epoch"])
        if not self._is_counted and "flops_per_sample" in state_dict:
            self.flops_per_sample, self._is_counted = state_dict["flops_per_sample"], True

    def _now(self, trainer: Trainer) -> dict[str, float]:
        progress = run_of(trainer).progress
        seconds = self._seconds_outside_evaluation(trainer) - self._seconds_in_evaluations
        return {"seconds": seconds, "samples": progress.num_samples, "updates": progress.num_updates}

    def _seconds_outside_evaluation(self, trainer: Trainer) -> float:
        seconds = run_of(trainer).ledger.seconds
        return sum(seconds.values()) - sum(seconds[part] for part in _NOT_TRAINING)

    def _done_in_epoch(self, trainer: Trainer) -> dict[str, float]:
        """Return seconds, and samples, updates and tokens of all processes. Must be called on every process."""
        now, tokens = self._now(trainer), self._num_tokens
        done = {name: value - self._start[name] for name, value in now.items()}
        if self.count_tokens is not None and trainer.run_config.is_distributed:
            tokens = sum_over_processes({"tokens": (tokens, 0)}, trainer.device)["tokens"][0]
        done["tokens"] = float(tokens)
        return {name: value + self._before_resume.get(name, 0) for name, value in done.items()}

    def _start_counting(self, trainer: Trainer, **kwargs: Any) -> None:
        if not self._is_counted and not run_of(trainer).training.current_pass.is_dummy_step:
            from torch.utils.flop_counter import FlopCounterMode  # few need it

            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()  # type: ignore[no-untyped-call]

    def _count_step(
        self, trainer: Trainer, batch: Batch = None, batch_output: BatchOutput | MaybeNone = None, **kwargs: Any
    ) -> None:
        counter = self._stop_counting()
        if counter is not None:
            self._is_counted, num_flops = True, counter.get_total_flops()
            if num_flops > 0:
                self.flops_per_sample = num_flops / batch_output["batch_size"]
            else:
                warn(
                    "PyTorch has counted no floating-point operations in the first step, which is so if the model is "
                    "compiled. Pass `flops_per_sample` to `ThroughputCallback`."
                )
        if self.count_tokens is not None and not run_of(trainer).training.current_pass.is_dummy_step:
            self._num_tokens = self._num_tokens + self.count_tokens(batch)

    def _stop_counting(self) -> FlopCounterMode | None:
        counter, self._counter = self._counter, None
        if counter is not None:
            counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return counter
