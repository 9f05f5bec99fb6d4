"""What the processes of a run tell each other, so that they weigh their batches and end the run together."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
from torch import distributed

from pytorch_accelerated._stopping import RunInterruptedError
from pytorch_accelerated.exceptions import NonFiniteLossError, StopTrainingError

PROCESS_TIMEOUT = timedelta(minutes=10)
"""How long a process waits for another, unless the user's accelerator says otherwise."""

_REASONS: dict[str, type[Exception]] = {
    error.__name__: error for error in (NonFiniteLossError, StopTrainingError, RunInterruptedError)
}
"""The exceptions by which one process ends the run of all; the first that any process has is raised by all."""


def _plain(reason: Exception) -> tuple[str, tuple[Any, ...]]:
    """Return the kind of a reason and what it is made of, to make it anew elsewhere."""
    kind = next(name for name, error in reversed(_REASONS.items()) if isinstance(reason, error))
    if isinstance(reason, RunInterruptedError):
        return kind, (reason.signal_number,)
    return kind, (str(reason), reason.step) if isinstance(reason, NonFiniteLossError) else (str(reason),)


def _precedence(reason: Exception) -> tuple[int, float]:
    """Return what reasons are sorted by: the gravest comes first, and of bad losses the earliest."""
    gravity = list(_REASONS.values()).index(type(reason))
    step = getattr(reason, "step", None)
    return gravity, math.inf if step is None else step


@lru_cache(maxsize=1)  # one for all runs, as each holds connections
def _host_group(world_id: int) -> Any:
    del world_id  # another world, another group
    if distributed.get_backend() == "gloo":
        return None  # the default group connects the hosts
    return distributed.new_group(backend="gloo", timeout=PROCESS_TIMEOUT)


class Agreement:
    """Adds up, once per update, the weights of all processes and their requests to end the run.

    A process that wants to end the run must not just do so: the others would wait for it for ever. It makes a request,
    goes on, and all of them raise the same exception at the same place. The numbers travel between the hosts, beside
    the backward pass, so no device has to wait. With a single process nothing is sent.

    Args:
        num_processes: How many processes take part. With several, making this must happen on every one of them.
        find_bad_loss: Looks whether this process has had a loss that is not finite, since such losses spread.
    """

    def __init__(
        self, num_processes: int, find_bad_loss: Callable[[], NonFiniteLossError | None] = lambda: None
    ) -> None:
        self._find_bad_loss = find_bad_loss
        self.is_needed = num_processes > 1 and distributed.is_initialized()
        self._requests: list[Exception] = []
        self._agreed_reason: Exception | None = None
        self._group: Any = _host_group(id(distributed.group.WORLD)) if self.is_needed else None
        self._numbers = torch.zeros(3, dtype=torch.float64)
        self._exchange: Any = None

    def request_end(self, reason: Exception) -> None:
        """Ask for the end of the run: a `StopTrainingError` or a `NonFiniteLossError`."""
        self._requests.append(reason)

    def start_exchange(self, weight: float | torch.Tensor, num_samples: int) -> None:
        """Tell the others about this process's share of the update, and whether it wants to end the run.

        Args:
            weight: The sum of the weights of its batches.
            num_samples: How many samples were in them.
        """
        self._numbers = torch.tensor([float(weight), num_samples, len(self._requests)], dtype=torch.float64)
        self._exchange = distributed.all_reduce(self._numbers, group=self._group, async_op=True)

    def finish_exchange(self) -> tuple[float, int]:
        """Wait for the others, and return the weight and the number of samples of the whole update.

        If some process asked to stop, the step is to be finished first; `stop_if_agreed` then stops the run.

        Raises:
            NonFiniteLossError: The loss of some process is not finite; the update must not be made.
        """
        if self._exchange is None:  # a subclass has replaced the step that starts it
            self.start_exchange(weight=0.0, num_samples=0)
        self._exchange.wait()
        self._exchange = None
        weight, num_samples, num_requests = self._numbers.tolist()
        if num_requests > 0:
            self._agreed_reason = self._first_reason()
        if isinstance(self._agreed_reason, NonFiniteLossError):
            self.stop_if_agreed()
        return weight, int(num_samples)

    def stop_if_agreed(self) -> None:
        """End the run if a process had asked for it before the last exchange.

        Raises:
            StopTrainingError: A callback on some process asked to stop.
        """
        reason, self._agreed_reason = self._agreed_reason, None
        if reason is not None:
            raise reason

    def settle(self) -> None:
        """End the run if any process wants it. Must be called on every process.

        Raises:
            NonFiniteLossError: The loss of some process is not finite.
            StopTrainingError: A callback on some process asked to stop.
        """
        if self.is_needed:
            self.start_exchange(weight=0.0, num_samples=0)
            self.finish_exchange()
            self.stop_if_agreed()

    def _first_reason(self) -> Exception:
        reasons = self._reasons_of_all()
        if any(isinstance(reason, NonFiniteLossError) for reason in reasons):
            # With the gradients it spreads to processes that may have noticed theirs sooner.
            own = self._find_bad_loss()
            self._requests = [] if own is None else [own]
            reasons += self._reasons_of_all()
        return min(reasons, key=_precedence)

    def _reasons_of_all(self) -> list[Exception]:
        own = list(dict.fromkeys(map(_plain, self._requests)))
        self._requests = []
        reasons_of_all: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(reasons_of_all, own, group=self._group)
        return [_REASONS[kind](*content) for reasons in reasons_of_all for kind, content in reasons]
