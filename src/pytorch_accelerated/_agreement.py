"""What the processes of a run tell each other, so that they weigh their batches and end the run together."""

from __future__ import annotations

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


def _plain(reason: Exception) -> tuple[str, str | int]:
    """Return the kind of a reason and what it is made of, to make it anew elsewhere."""
    kind = next(name for name, error in reversed(_REASONS.items()) if isinstance(reason, error))
    return kind, reason.signal_number if isinstance(reason, RunInterruptedError) else str(reason)


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
    """

    def __init__(self, num_processes: int) -> None:
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

    def _first_reason(self) -> Exception | None:
        own = list(dict.fromkeys(map(_plain, self._requests)))
        self._requests = []
        reasons_of_all: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(reasons_of_all, own, group=self._group)
        reasons = [reason for reasons in reasons_of_all for reason in reasons]
        of_first_kind = (
            error(content) for name, error in _REASONS.items() for kind, content in reasons if kind == name
        )
        return next(of_first_kind, None)
