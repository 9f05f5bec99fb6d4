"""Stop consensus: the ranks sum their weights once per update, and all stop at the same update if one requests it."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable, Set
from typing import Any

import torch
from torch import distributed

from pytorch_accelerated._distributed.collectives import host_group
from pytorch_accelerated._distributed.reasons import EpochEndedError, StopReason, first_of, packed, unpacked
from pytorch_accelerated._distributed.waiting import stop_together
from pytorch_accelerated.exceptions import NonFiniteLossError, StopTrainingError

SECONDS_BETWEEN_EXCHANGES = 0.1
"""How often ranks exchange numbers in a run that does not need an exchange at each update."""


def _find_none() -> None:
    return None


def _never() -> bool:
    return False


class StopConsensus:
    """All-reduces, once per update, the weights of all ranks and their requests to stop.

    A rank must not stop on its own: the others would wait for it forever. It records a request and continues. After the
    next exchange, all ranks raise the same exception at the same place. The numbers travel between hosts during the
    backward pass, so no device waits. With a single process nothing is sent, and a request waits for the end of the
    step.

    If every rank knows the weights of the others in advance, and no request has to take effect at an exact update, most
    exchanges are skipped: for a signal, ten per second are enough. Each exchange determines how many of the following
    ones all ranks skip.

    Args:
        num_processes: The world size. With several processes, every one of them must create the object.
        find_bad_loss: Returns an error for the first non-finite loss of this rank, ``None`` if there is none. It is
            called once a rank has found one, because non-finite gradients spread to the others.
        can_skip_exchange: Whether this rank allows exchanges to be skipped. Called at each exchange.
    """

    def __init__(
        self,
        num_processes: int,
        find_bad_loss: Callable[[], NonFiniteLossError | None] = _find_none,
        can_skip_exchange: Callable[[], bool] = _never,
    ) -> None:
        self._num_processes = num_processes
        self._find_bad_loss = find_bad_loss
        self._can_skip_exchange = can_skip_exchange
        self.is_needed = num_processes > 1 and distributed.is_initialized()
        """Whether there are other ranks. Callers check this before each exchange."""

        self.is_pending = False
        """Whether there is a reason to raise at the end of the step; see `raise_if_stopped`."""

        self.num_skipped = 0
        """The number of batches that all ranks together have left out of the last update."""

        self._requests: list[Any] = []
        self._stop_reason: Exception | None = None
        self._agreed_reason: Exception | None = None
        self._group = host_group() if self.is_needed else None
        self._numbers = torch.zeros(6, dtype=torch.float64)
        self._exchange: Any = None
        self._skipped: tuple[float, int] | None = None
        self._num_to_skip = self._num_updates = 0
        self._last_time: float | None = None

    def request_stop(self, reason: Exception) -> None:
        """Let all ranks raise this reason after the next exchange; a single process at the end of the step.

        Args:
            reason: A `StopTrainingError`, a `NonFiniteLossError`, a `RunInterruptedError` or an `EpochEndedError`.
        """
        self._requests.append(reason)
        self.is_pending = self.is_pending or not self.is_needed

    @property
    def requested_stop(self) -> StopTrainingError | None:
        """What this rank knows of a stop that is still to come."""
        reasons = (self._stop_reason, *self._requests)
        return next((reason for reason in reasons if isinstance(reason, StopTrainingError)), None)

    @property
    def agreed_end_of_epoch(self) -> EpochEndedError | None:
        """The end of the epoch that all ranks have agreed on, at the end of this step."""
        return self._stop_reason if isinstance(self._stop_reason, EpochEndedError) else None

    def forget_end_of_epoch(self) -> None:
        """Drop the requests to end the epoch, which has ended."""
        self._requests = [reason for reason in self._requests if not isinstance(reason, EpochEndedError)]
        self.is_pending = self._stop_reason is not None or (not self.is_needed and bool(self._requests))

    def start_exchange(
        self,
        weight: float | torch.Tensor,
        num_samples: int,
        expected_weight: float | torch.Tensor | None = None,
        num_skipped: int = 0,
    ) -> None:
        """Send the weight of an update, and whether this rank requests a stop, to the other ranks, without waiting.

        Args:
            weight: The sum of the weights of this rank's batches.
            num_samples: The number of samples in them.
            expected_weight: The weight that all ranks expect of each other if exchanges can be skipped; ``None`` if
                this update needs an exchange.
            num_skipped: The number of batches that this rank has left out of the update.

        Raises:
            RuntimeError: The exchange would be skipped, but the weight differs from the expected one.
        """
        self._num_updates += 1
        if expected_weight is not None and self._num_to_skip > 0:
            if weight != expected_weight:
                raise RuntimeError(
                    f"The batches of an update hold {weight:g} samples. Expected {expected_weight:g} samples, the "
                    "number of indices from the dataloader. If the dataset or the collate function omits samples, "
                    "override `calculate_train_batch_loss` and return the actual `batch_size`; then the processes "
                    "exchange their batch sizes at each update."
                )
            self._num_to_skip -= 1
            self._skipped = float(weight), num_samples
            return
        needs_each = 0 if self._can_skip_exchange() else 1
        numbers = (float(weight), num_samples, len(self._requests), needs_each, self._updates_between_exchanges())
        self._numbers = torch.tensor((*numbers, num_skipped), dtype=torch.float64)
        self._exchange = distributed.all_reduce(self._numbers, group=self._group, async_op=True)

    def finish_exchange(self) -> tuple[float, int]:
        """Wait for the other ranks, and return the weight and the number of samples of the update on all of them.

        If a rank requested to stop, finish the update first; then call `raise_if_stopped`.

        Raises:
            NonFiniteLossError: The loss of some rank is not finite. The optimizer step must not happen.
        """
        if self._skipped is not None:
            (weight, num_samples), self._skipped, self.num_skipped = self._skipped, None, 0
            return weight * self._num_processes, num_samples * self._num_processes
        if self._exchange is None:  # a subclass has replaced the method that starts it
            self.start_exchange(weight=0.0, num_samples=0)
        self._exchange.wait()
        self._exchange = None
        weight, num_samples, num_requests, num_with_need, total_updates, num_skipped = self._numbers.tolist()
        self.num_skipped = int(num_skipped)
        self._num_to_skip = 0 if num_with_need else max(0, int(total_updates / self._num_processes) - 1)
        if num_requests > 0:
            self._stop_reason, self.is_pending = self._find_common_reason(), True
        if isinstance(self._stop_reason, NonFiniteLossError):
            self.raise_if_stopped()
        return weight, int(num_samples)

    def raise_if_stopped(self, is_after_update: bool = True) -> None:
        """Raise the reason to stop if a rank requested it before the last exchange; a single process before now.

        Args:
            is_after_update: Whether no batch waits for an update. The end of an epoch waits for that.

        Raises:
            StopTrainingError: A callback on some rank requested to stop, or a signal did.
            EpochEndedError: Some rank requested to end the epoch.
        """
        if not self.is_needed:
            due = [reason for reason in self._requests if is_after_update or not isinstance(reason, EpochEndedError)]
            if due:
                self._requests, self._stop_reason = [], first_of(due)
        reason, self._stop_reason = self._stop_reason, None
        self._agreed_reason = reason
        self.is_pending = not self.is_needed and bool(self._requests)
        if reason is not None:
            raise reason

    def confirm(self, reason: StopTrainingError) -> None:
        """Make sure that all ranks stop now, if a reason comes from elsewhere than an exchange.

        Raises:
            RuntimeError: They do not.
        """
        if self.is_needed and reason is not self._agreed_reason:
            stop_together(reason)
            self._agreed_reason = reason

    def sync(self) -> None:
        """Exchange requests outside an update, and raise if there is one. Must be called on every process.

        Raises:
            NonFiniteLossError: The loss of some rank is not finite.
            StopTrainingError: A callback on some rank requested to stop, or a signal did.
        """
        if self.is_needed:
            self.start_exchange(weight=0.0, num_samples=0)
            self.finish_exchange()
        self.raise_if_stopped()

    def _updates_between_exchanges(self) -> float:
        """Propose an interval from the speed since the last exchange, at most twice as long as the last interval."""
        now, num_updates = time.monotonic(), self._num_updates
        seconds = math.inf if self._last_time is None else now - self._last_time
        self._last_time, self._num_updates = now, 0
        return min(num_updates * SECONDS_BETWEEN_EXCHANGES / max(seconds, 1e-6), 2 * num_updates)

    def _find_common_reason(self) -> StopReason:
        reasons = self._gather_requests()
        if any(isinstance(reason, NonFiniteLossError) for reason in reasons):
            # It spreads with the gradients. A rank that has noticed it may not be the first that had it.
            bad_loss = self._find_bad_loss()
            self._requests = [] if bad_loss is None else [bad_loss]
            reasons += self._gather_requests()
        return first_of(reasons)

    def _gather_requests(self) -> list[StopReason]:
        local_requests = list(dict.fromkeys(map(packed, self._requests)))
        self._requests = []
        requests_by_rank: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(requests_by_rank, local_requests, group=self._group)
        return [unpacked(request) for requests in requests_by_rank for request in requests]


def can_skip_exchange(
    *,
    events_without_listeners: Set[str],
    step_events: Set[str],
    yields_full_batches: bool,
    is_step_overridden: bool,
) -> bool:
    """Tell whether a rank allows exchanges to be skipped: its weights are known, and nothing in a step requests a stop.

    The answer may change during a run, because callbacks can be added.

    Args:
        events_without_listeners: The events that no callback of this rank listens to.
        step_events: The events of a training step.
        yields_full_batches: Whether every training batch but the last is known to have the nominal size.
        is_step_overridden: Whether a method of the training step is not the library's own.
    """
    return yields_full_batches and not is_step_overridden and events_without_listeners >= step_events


def overrides_any(instance: object, methods: Iterable[str]) -> bool:
    """Tell whether any of these methods is not the library's own: overridden in a subclass, or set on the instance."""
    return any(name in vars(instance) or not _is_own(getattr(type(instance), name)) for name in methods)


def replaces_any(instance: object, methods: Iterable[str]) -> bool:
    """Tell whether any of these methods is overridden by one that does not call the library's, as far as code shows."""
    return any(overrides_any(instance, [name]) and not _mentions(getattr(instance, name), name) for name in methods)


def _mentions(method: Callable[..., object], name: str) -> bool:
    code = getattr(inspect.unwrap(method), "__code__", None)
    return code is not None and name in code.co_names


def _is_own(method: Callable[..., object]) -> bool:
    return method.__module__.partition(".")[0] == __name__.partition(".")[0]
