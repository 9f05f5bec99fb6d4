"""Gradient accumulation: the weights of the batches that make one update, and the parameters that it changes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pytorch_accelerated._means import widened

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch.optim import Optimizer

    from pytorch_accelerated._types import MaybeNone, ParameterGroup, StateDict, Stateful, StateMapping


class AccumulationWindow:
    r"""Makes the gradient of an update that of the mean over all items of its batches, whatever their sizes.

    With :math:`w_i` items in batch :math:`i` and the gradient :math:`g_i` of its mean loss, an update should use
    :math:`\sum_i w_i g_i / \sum_i w_i`, where the sums run over the :math:`n` batches of the window on all :math:`R`
    ranks. The sum of the weights is known only at the end, so each loss is scaled by :math:`w_i / (n w)` with a nominal
    weight :math:`w`. Since gradients are averaged over the ranks, that is right if every batch weighs :math:`w`, as
    most do. Otherwise the gradients are multiplied once by :math:`R n w / \sum_i w_i`.

    Args:
        num_batches: Batches of one rank that make one update.
        nominal_weight: What every rank takes a full batch to weigh; above 0. With ``None``, for a single process, it is
            the weight of the window's first batch.
        updated: The set in which a group of optimizers notes those that make an update of their own.

    Example:
        >>> window = AccumulationWindow(num_batches=2)
        >>> [window.add(weight) for weight in (8, 4)]
        [0.5, 0.25]
        >>> round(window.close(), 4)
        1.3333
    """

    def __init__(
        self, num_batches: int = 1, nominal_weight: float | None = None, updated: set[Any] | None = None
    ) -> None:
        self._num_batches = num_batches
        self._num_batches_per_epoch: int | None = None
        self._nominal_weight = nominal_weight

        self.total: float | torch.Tensor = 0
        """The weight of the window's batches so far on this rank; stays 0 if an update takes one batch of one rank."""

        self.num_samples = 0
        """The number of samples in them."""

        self.num_skipped = 0
        """The number of batches of this rank that were left out of the window."""

        self.end_of_epoch: list[Any] | None = None
        """Why the epoch ends with this window, and whether that is decided; ``None`` if it goes on."""

        self.expected: float | torch.Tensor | None = None
        """What `total` will be if all batches have the nominal weight; ``None`` while nothing is weighed."""

        self.updated = set() if updated is None else updated
        """The optimizers that have made an update of their own, and do not take part in that of the window."""

        self.closure: Stateful | None = None
        """The steps of the window, if the optimizer evaluates them again."""

    def start_epoch(self, num_batches: int, num_batches_per_epoch: int | None) -> None:
        """Set the length of the windows of an epoch, of which the last may be short.

        Args:
            num_batches: Batches of this rank that make one update.
            num_batches_per_epoch: Batches per epoch on this rank; ``None`` if that is not certain.
        """
        self._num_batches = num_batches
        self._num_batches_per_epoch = num_batches_per_epoch

    def reset(self) -> None:
        """Forget the batches since the last update."""
        self.total = self.num_samples = self.num_skipped = 0
        self.expected = None
        self.updated.clear()

    def state_dict(self) -> StateDict:
        """Return the sums of the window that is open, and what there is of the rest."""
        state: StateDict = {"total": self.total, "num_samples": self.num_samples, "expected": self.expected}
        if self.num_skipped:
            state["num_skipped"] = self.num_skipped
        if self.end_of_epoch is not None:
            state["end_of_epoch"] = list(self.end_of_epoch)
        if self.updated:
            state["updated"] = sorted(self.updated, key=str)
        if self.closure is not None:
            state["closure"] = self.closure.state_dict()
        return state

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore the open window that `state_dict` described."""
        self.total = state_dict["total"]
        self.num_samples = state_dict["num_samples"]
        self.expected = state_dict["expected"] or None  # earlier versions wrote 0
        self.num_skipped = state_dict.get("num_skipped", 0)
        self.end_of_epoch = state_dict.get("end_of_epoch")
        self.updated.clear()
        self.updated.update(state_dict.get("updated", ()))
        if self.closure is not None and "closure" in state_dict:
            self.closure.load_state_dict(state_dict["closure"])

    def add(self, weight: float | torch.Tensor, num_samples: int = 0, step: int = 0) -> float | torch.Tensor | None:
        """Add the next batch, and return the factor to scale its loss by; ``None`` for no scaling.

        Args:
            weight: The number of items its mean loss was taken over; a tensor stays on its device.
            num_samples: The number of samples in it.
            step: Index of the batch in its epoch.
        """
        self.num_samples += num_samples
        if self.expected is None and self._nominal_weight is None and self._size_at(step) == 1:
            return None  # an update of one batch of one rank: there is nothing to weigh
        if isinstance(weight, torch.Tensor):
            weight = widened(weight)
        if self.expected is None:
            nominal_weight = _one_if_zero(weight) if self._nominal_weight is None else self._nominal_weight
            self.expected = self._size_at(step) * nominal_weight
        self.total = self.total + weight
        return None if _are_equal_numbers(weight, self.expected) else weight / self.expected

    def skip(self, step: int) -> None:
        """Leave the next batch out: it has no weight, and no samples."""
        self.num_skipped += 1
        if self._nominal_weight is not None:
            self.add(0, 0, step)

    def close(self, total: float | torch.Tensor | None = None, num_processes: int = 1) -> float | torch.Tensor | None:
        """End the window, and return the factor to multiply the gradients by; ``None``, the usual case, for none.

        Args:
            total: The weight of the window on all ranks; ``None`` with a single process.
            num_processes: The number of ranks whose gradients are averaged.
        """
        if self.expected is None:
            self.num_samples = self.num_skipped = 0
            return None
        total = self.total if total is None else total
        expected = self.expected * num_processes
        self.reset()
        return None if _are_equal_numbers(total, expected) else expected / _one_if_zero(total)

    def _size_at(self, step: int) -> int:
        """Return the number of batches that the window starting at a step will have, unless the epoch ends sooner."""
        if self._num_batches_per_epoch is None or self._num_batches == 1:
            return self._num_batches
        return min(self._num_batches, self._num_batches_per_epoch - step)


def _one_if_zero(weight: float | torch.Tensor) -> float | torch.Tensor:
    # A batch may hold no item at all, such as a text that is all padding. Its gradient is 0 whatever divides it.
    return weight.where(weight != 0, 1) if isinstance(weight, torch.Tensor) else weight or 1


def _are_equal_numbers(left: float | torch.Tensor, right: float | torch.Tensor) -> bool:
    # Tensors are not compared: that would read them from the device.
    return not isinstance(left, torch.Tensor) and not isinstance(right, torch.Tensor) and left == right


def scale_gradients(parameters: Iterable[torch.Tensor], factor: float | torch.Tensor) -> None:
    """Multiply all gradients by ``factor``, in place."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


def clip_gradients(parameters: list[torch.Tensor], max_value: float | None, max_norm: float | None) -> None:
    """Clip complete gradients, first each entry, then their total norm; ``None`` for no bound."""
    dense = list(with_dense_gradients(parameters))
    if max_value is not None:
        nn.utils.clip_grad_value_(dense, max_value)
    if max_norm is not None:
        nn.utils.clip_grad_norm_(dense, max_norm)


def with_dense_gradients(parameters: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield parameters; for one with a sparse gradient, a tensor whose gradient is the values of that one.

    What changes the gradients in place then changes the sparse ones too, and their norm is the same. The functions of
    PyTorch for clipping do not take sparse gradients.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.is_sparse:
            parameter.grad = gradient = gradient.coalesce()  # an index that occurs twice has one gradient
            values = gradient.values()
            parameter = torch.empty_like(values)
            parameter.grad = values
        yield parameter


# --- the parameters ----------------------------------------------------------------------------------------------


class OutsideParameters:
    """The parameters outside the model: what the optimizer holds besides, such as those of a loss function.

    They are trained like the model's. Only, DDP does not know them.

    Args:
        model: The prepared model.
        optimizer: The optimizer.
    """

    def __init__(self, model: nn.Module | MaybeNone = None, optimizer: Optimizer | None = None) -> None:
        self._model = model
        self._optimizer = optimizer
        self._num_groups = -1
        self._parameters: list[torch.Tensor] = []

    def __iter__(self) -> Iterator[torch.Tensor]:
        num_groups = len(groups_of(self._optimizer))
        if num_groups != self._num_groups:  # groups are only ever added
            self._parameters = parameters_outside(self._model, self._optimizer)
            self._num_groups = num_groups
        return iter(self._parameters)

    def together_with(self, model: nn.Module) -> Iterator[torch.Tensor]:
        """Return the parameters of the model, and these."""
        return chain(model.parameters(), self)


def groups_of(optimizer: object) -> Sequence[ParameterGroup]:
    """Return the parameter groups of an optimizer; none for a test double that has none, or for ``None``."""
    groups = getattr(optimizer, "param_groups", None)
    return groups if isinstance(groups, Sequence) else ()


def parameters_outside(model: nn.Module | MaybeNone, optimizer: Optimizer | None) -> list[torch.Tensor]:
    """Return the parameters that an optimizer holds and a model does not, in the order of the optimizer.

    There are none if the optimizer holds no parameter of the model: then it trains another one.
    """
    held = [parameter for group in groups_of(optimizer) for parameter in group["params"]]
    in_model = {id(parameter) for parameter in model.parameters()} if isinstance(model, nn.Module) else set()
    outside = [parameter for parameter in held if id(parameter) not in in_model]
    return outside if len(outside) < len(held) else []


def gradients_for(optimizer: Optimizer) -> list[torch.Tensor]:
    """Return all gradients that an optimizer would use."""
    groups = optimizer.param_groups
    return [gradient for group in groups for each in group["params"] if (gradient := each.grad) is not None]


class GradientCheck:
    """Tells whether no gradient has a NaN or an infinity. Reads from the device."""

    def __init__(self) -> None:
        self._is_found = torch.zeros(1, dtype=torch.float32, device="cpu")
        self._factor = torch.ones(1, dtype=torch.float32, device="cpu")

    def are_finite(self, gradients: list[torch.Tensor]) -> bool:
        """Look at all of them."""
        try:
            # The operation of gradient scalers, one for all gradients. It also multiplies them by 1.
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, self._is_found, self._factor)
        except RuntimeError:  # sparse or complex gradients, or another device
            return are_finite(gradients)
        if self._is_found.item() == 0:
            return True
        self._is_found.zero_()
        return False


def are_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Tell whether no tensor has a NaN or an infinity. Reads from the device."""
    flags: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        values = tensor.coalesce().values() if tensor.is_sparse else tensor
        flags.setdefault(tensor.device, []).append(torch.isfinite(values).all())
    return all(bool(torch.stack(flags_of_device).all()) for flags_of_device in flags.values())
