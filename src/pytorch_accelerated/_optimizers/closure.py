"""The closure of an update: what optimizers such as LBFGS call to compute loss and gradients again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pytorch_accelerated._optimizers.checks import check_closure
from pytorch_accelerated._optimizers.group import copy_into, parameters_of
from pytorch_accelerated._tensors.nested import move_to_device

if TYPE_CHECKING:
    from pytorch_accelerated._types import Batch, StateDict, StateMapping

Scale = float | torch.Tensor | None
"""What a loss, or all gradients, are multiplied by; ``None`` for nothing."""


class WindowStep(NamedTuple):
    """A step of the accumulation window that is open."""

    batch: Batch
    step: int
    scale: Scale


Evaluate = Callable[[list[WindowStep]], torch.Tensor]
"""Computes the gradients of some steps again, and returns the sum of their scaled losses."""


class WindowClosure:
    """Computes the gradients of the accumulation window again, as often as the optimizer wants within one update.

    The first evaluation has been made by the steps of the window themselves. It counts if the optimizer calls the
    closure at the parameters and gradients that these steps have left, as LBFGS does. An optimizer that has changed
    them before, as sharpness-aware ones do, gets a new evaluation.

    Args:
        device: Where the batches belong, if they come from a state.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps: list[WindowStep] = []
        self._loss: Any = 0.0  # the sum of the scaled losses of the window so far
        self._evaluate: Evaluate | None = None
        self._parameters: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor | None] | None = None

    def add(self, batch: Batch, step: int, loss: torch.Tensor, scale: Scale) -> None:
        """Add a step to the window.

        Args:
            batch: Its batch.
            step: Its index in the epoch.
            loss: Its loss.
            scale: What the loss was multiplied by.
        """
        self._steps.append(WindowStep(batch, step, scale))
        self._loss = self._loss + scaled(loss.detach(), scale)

    @contextmanager
    def during_update(
        self, optimizer: torch.optim.Optimizer, evaluate: Evaluate, average: Callable[[torch.Tensor], torch.Tensor]
    ) -> Iterator[Callable[[], None]]:
        """Let the optimizer call the closure while the body runs; the gradients of the window are complete.

        Yields a function that puts the parameters back. If the body raises, it is called.

        Args:
            optimizer: The optimizer.
            evaluate: Computes the gradients of these steps again, and returns the sum of their scaled losses.
            average: Makes that sum the mean over the window on all ranks.
        """
        self._parameters = parameters_of(optimizer)
        self._weights = [parameter.detach().clone() for parameter in self._parameters]
        self._gradients = [None if p.grad is None else p.grad.detach().clone() for p in self._parameters]
        self._loss = average(self._loss)
        self._evaluate = lambda steps: average(evaluate(steps))
        put_back = partial(copy_into, self._parameters, self._weights)
        try:
            yield put_back
        except BaseException:
            put_back()
            raise
        finally:
            self._steps, self._loss = [], 0.0
            self._evaluate = self._gradients = None
            self._parameters, self._weights = [], []

    def __call__(self) -> torch.Tensor:
        """Compute the gradients of the window at the present parameters, and return its loss."""
        if self._evaluate is None:
            raise RuntimeError(
                "The closure was called outside an update. It belongs to one update, and computes the loss of the "
                "batches of that one: call it in the `step` of the optimizer. A subclass that makes the updates in a "
                "`_run_train_epoch` of its own has to pass a closure of its own, too, in `optimizer_step`."
            )
        is_evaluated, self._gradients = self._is_evaluated(), None
        if not is_evaluated:
            with torch.enable_grad():
                self._loss = self._evaluate(self._steps)
        loss: torch.Tensor = self._loss
        return loss

    def state_dict(self) -> StateDict:
        """Return the steps of the window that is open, with their batches."""
        return {"steps": [list(step) for step in self._steps], "loss": self._loss}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore the open window that `state_dict` described."""
        moved = move_to_device(dict(state_dict), self._device)
        self._steps, self._loss = [WindowStep(*step) for step in moved["steps"]], moved["loss"]

    def _is_evaluated(self) -> bool:
        """Tell whether the closure is called for the first time, and nothing has changed since the evaluation."""
        if self._gradients is None:
            return False
        return all(
            torch.equal(parameter, weight) and _are_equal(parameter.grad, gradient)
            for parameter, weight, gradient in zip(self._parameters, self._weights, self._gradients, strict=True)
        )


def create_closure(
    optimizer: object, device: torch.device, *, has_scaler: bool, is_sharded: bool, is_stepped_by_user: bool
) -> WindowClosure | None:
    """Return the closure that the optimizer of a run needs; ``None``, the usual case, if it needs none.

    Args:
        optimizer: The optimizer.
        device: The training device.
        has_scaler: Whether the run scales gradients (fp16).
        is_sharded: Whether the model is split over the processes.
        is_stepped_by_user: Whether a subclass steps the optimizer itself.

    Raises:
        ValueError: It needs one, and the run does not allow it.
    """
    if is_stepped_by_user or not check_closure(optimizer, has_scaler=has_scaler, is_sharded=is_sharded):
        return None
    return WindowClosure(device)


def scaled(value: Any, scale: Scale) -> Any:
    """Return a loss multiplied by a factor; unchanged if that is ``None``."""
    return value if scale is None else value * scale


def _are_equal(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return torch.equal(left.to_dense(), right.to_dense())  # sparse tensors cannot be compared
