"""What the processes of a run tell each other, so that they weigh their batches and end the run together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from pytorch_accelerated._distributed.collectives import PROCESS_TIMEOUT
from pytorch_accelerated._signals import RunInterruptedError
from pytorch_accelerated.exceptions import NonFiniteLossError, StopTrainingError

SECONDS_BETWEEN_EXCHANGES = 0.1
"""How often processes exchange numbers if there is no need to do so at each update."""


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


_group_on_hosts: list[Any] = []
"""The group of all processes, and the one beside it that connects their hosts: one for all runs, as it takes ports."""


def _host_group() -> Any:
    if distributed.get_backend() == "gloo":
        return None  # the default group connects the hosts
    world = distributed.group.WORLD
    if not _group_on_hosts or _group_on_hosts[0] is not world:
        _group_on_hosts[:] = world, distributed.new_group(backend="gloo", timeout=PROCESS_TIMEOUT)
    return _group_on_hosts[1]


class StopConsensus:
    """Adds up, once per update, the weights of all processes and their requests to end the run.

    A process that wants to end the run must not just do so: the others would wait for it for ever. It makes a request,
    goes on, and all of them raise the same exception at the same place. The numbers travel between the hosts, beside
    the backward pass, so no device has to wait. With a single process nothing is sent.

    Where every process knows the weights of the others beforehand, and nothing can ask for the end of the run at a
    certain update, most exchanges are left out, by all alike: some times a second are often enough for a signal. How
    many are left out before the next is agreed on in each exchange.

    Args:
        num_processes: How many processes take part. With several, making this must happen on every one of them.
        find_bad_loss: Looks whether this process has had a loss that is not finite, since such losses spread.
        can_skip_exchange: Tells whether exchanges may be left out, as far as this process knows.
    """

    def __init__(
        self,
        num_processes: int,
        find_bad_loss: Callable[[], NonFiniteLossError | None] = lambda: None,
        can_skip_exchange: Callable[[], bool] = lambda: False,
    ) -> None:
        self._num_processes = num_processes
        self._find_bad_loss = find_bad_loss
        self._can_skip_exchange = can_skip_exchange
        self.is_needed = num_processes > 1 and distributed.is_initialized()
        self._requests: list[Exception] = []
        self._agreed_reason: Exception | None = None
        self._group: Any = _host_group() if self.is_needed else None
        self._numbers = torch.zeros(5, dtype=torch.float64)
        self._exchange: Any = None
        self._left_out: tuple[float, int] | None = None
        self._num_to_leave_out = self._num_updates = 0
        self._last_time: float | None = None

    def request_stop(self, reason: Exception) -> None:
        """Ask for the end of the run: a `StopTrainingError` or a `NonFiniteLossError`."""
        self._requests.append(reason)

    def start_exchange(
        self, weight: float | torch.Tensor, num_samples: int, foreseen_weight: float | torch.Tensor | None = None
    ) -> None:
        """Tell the others about this process's share of the update, and whether it wants to end the run.

        Args:
            weight: The sum of the weights of its batches.
            num_samples: How many samples were in them.
            foreseen_weight: What the weight is on each process, as they all know if the run is foreseeable; ``None`` if
                this update is not.

        Raises:
            RuntimeError: The exchange would be left out, but the weight is another.
        """
        self._num_updates += 1
        if foreseen_weight is not None and self._num_to_leave_out > 0:
            if weight != foreseen_weight:
                raise RuntimeError(
                    f"The batches of an update hold {weight:g} samples, but the loader promised {foreseen_weight:g}. "
                    "Does a dataset or a collation leave some out? Tell the `batch_size` by overriding "
                    "`calculate_train_batch_loss`, so that all processes are asked for theirs."
                )
            self._num_to_leave_out -= 1
            self._left_out = float(weight), num_samples
            return
        needs_each = 0 if self._can_skip_exchange() else 1
        numbers = float(weight), num_samples, len(self._requests), needs_each, self._updates_between_exchanges()
        self._numbers = torch.tensor(numbers, dtype=torch.float64)
        self._exchange = distributed.all_reduce(self._numbers, group=self._group, async_op=True)

    def finish_exchange(self) -> tuple[float, int]:
        """Wait for the others, and return the weight and the number of samples of the whole update.

        If some process asked to stop, the step is to be finished first; `raise_if_stopped` then stops the run.

        Raises:
            NonFiniteLossError: The loss of some process is not finite; the update must not be made.
        """
        if self._left_out is not None:
            (weight, num_samples), self._left_out = self._left_out, None
            return weight * self._num_processes, num_samples * self._num_processes
        if self._exchange is None:  # a subclass has replaced the step that starts it
            self.start_exchange(weight=0.0, num_samples=0)
        self._exchange.wait()
        self._exchange = None
        weight, num_samples, num_requests, need_each, total_updates = self._numbers.tolist()
        self._num_to_leave_out = 0 if need_each else max(0, int(total_updates / self._num_processes) - 1)
        if num_requests > 0:
            self._agreed_reason = self._first_reason()
        if isinstance(self._agreed_reason, NonFiniteLossError):
            self.raise_if_stopped()
        return weight, int(num_samples)

    def raise_if_stopped(self) -> None:
        """End the run if a process had asked for it before the last exchange.

        Raises:
            StopTrainingError: A callback on some process asked to stop.
        """
        reason, self._agreed_reason = self._agreed_reason, None
        if reason is not None:
            raise reason

    def sync(self) -> None:
        """End the run if any process wants it. Must be called on every process.

        Raises:
            NonFiniteLossError: The loss of some process is not finite.
            StopTrainingError: A callback on some process asked to stop.
        """
        if self.is_needed:
            self.start_exchange(weight=0.0, num_samples=0)
            self.finish_exchange()
            self.raise_if_stopped()

    def _updates_between_exchanges(self) -> float:
        """Propose how often to exchange, by the speed since the last time, but at most twice as seldom as then."""
        now, num_updates = time.monotonic(), self._num_updates
        seconds = math.inf if self._last_time is None else now - self._last_time
        self._last_time, self._num_updates = now, 0
        return min(num_updates * SECONDS_BETWEEN_EXCHANGES / max(seconds, 1e-6), 2 * num_updates)

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


_EVENTS_OF_A_STEP = {
    "on_train_step_start",
    "on_backward_start",
    "on_optimizer_step_start",
    "on_optimizer_step_end",
    "on_train_step_end",
}


_METHODS_OF_A_STEP = (
    "_perform_forward_and_backward_passes",
    "calculate_train_batch_loss",
    "backward_step",
    "_update_loss_tracker",
    "_update_parameters",
    "_clip_gradients",
    "optimizer_step",
    "scheduler_step",
    "optimizer_zero_grad",
    "_end_train_step",
)


def can_skip_exchange(trainer: Any) -> bool:
    """Tell whether the steps of a run are the library's own, in a process: so that they weigh what the loader promises.

    Then also nothing is called in them that might end the run. To be asked again, as callbacks may join a run.
    """
    return (
        trainer.callback_handler.events_without_listeners >= _EVENTS_OF_A_STEP
        and all(source.gives_full_batches for source in trainer._train_randomness)
        and all(_is_own(trainer, name) for name in _METHODS_OF_A_STEP)
    )


def _is_own(trainer: Any, method: str) -> bool:
    module = getattr(type(trainer), method).__module__
    return method not in vars(trainer) and module.partition(".")[0] == __name__.partition(".")[0]
