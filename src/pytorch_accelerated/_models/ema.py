"""`ModelEma`: an exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pytorch_accelerated._measuring.comparison import one_number
from pytorch_accelerated._models.wrappers import without_compilation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class ModelEma(nn.Module):
    r"""A copy of a model whose weights are the exponential moving average of that model's weights.

    Each `update` sets

    .. math:: \bar\theta \leftarrow d \, \bar\theta + (1 - d) \, \theta

    where :math:`\bar\theta` are the weights of `module`, :math:`\theta` those of the model, and :math:`d` is the decay.
    The average is dominated by the last :math:`1 / (1 - d)` updates. It often generalizes better than the last weights.
    Sources: Polyak and Juditsky, 1992, "Acceleration of Stochastic Approximation by Averaging"; for this exponential
    weighting Tarvainen and Valpola, 2017, "Mean teachers are better role models", arXiv:1703.01780.

    Each parameter is averaged once, so weights that are tied in the model are tied here too. Integer buffers, such as
    the number of batches that a batch norm has seen, are copied, and so is any tensor that contains infinities, such as
    an attention mask. The average is on the device of the model, and follows the model to another device. It keeps the
    dtypes that the model had when the average was created. For 16-bit weights call `float` on the average first: their
    precision is too low for the small steps of a large decay.

    For another weighting, change ``decay`` between updates, or override `update_fn`.

    Args:
        model: The model, compiled or not. It is copied; no reference is kept.
        decay: Weight of the past, from 0 (the average equals the model) to 1 (the average never changes).
        should_average_buffers: Whether floating-point buffers, such as the running statistics of batch norms, are
            averaged too. Otherwise they are copied.

    Attributes:
        module: The average: a copy of the model in evaluation mode that requires no gradients.
        decay: The decay of the next update. It may be changed at any time.

    Raises:
        ValueError: ``decay`` is out of range.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> nn.init.zeros_(model.weight)
        Parameter containing:
        tensor([[0.]], requires_grad=True)
        >>> ema = ModelEma(model, decay=0.75)
        >>> nn.init.ones_(model.weight)
        Parameter containing:
        tensor([[1.]], requires_grad=True)
        >>> ema.update(model)
        >>> ema.module.weight.item()
        0.25
    """

    module: nn.Module

    def __init__(self, model: nn.Module, decay: float = 0.9999, should_average_buffers: bool = True) -> None:
        super().__init__()
        check_decay(decay)
        self.decay = decay
        self.module = copy.deepcopy(without_compilation(model))
        self.module.eval()
        self.module.requires_grad_(False)
        self._is_averaged = [
            _can_be_averaged(tensor) and (should_average_buffers or isinstance(tensor, nn.Parameter))
            for tensor in _tensors(self.module)
        ]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average one step towards the weights of ``model``, without a device synchronization.

        Raises:
            ValueError: The parameters or buffers of ``model`` differ from those that are averaged.
        """
        averages, currents = [], []
        for average, current, is_averaged in self._pair_up(model):
            if is_averaged:
                averages.append(average)
                currents.append(current)
            else:
                average.copy_(current)
        if getattr(self.update_fn, "__func__", None) is not ModelEma.update_fn:
            for average, current in zip(averages, currents, strict=True):
                average.copy_(self.update_fn(average, current))
        elif averages:
            get_ema_multi_avg_fn(self.decay)(averages, currents, None)  # type: ignore[no-untyped-call]

    def update_fn(self, ema_model_weights: torch.Tensor, updated_model_weights: torch.Tensor) -> torch.Tensor:
        """Return the new average of one tensor. An override is called for each averaged tensor.

        Args:
            ema_model_weights: The average so far.
            updated_model_weights: The weights of the model, of the same shape, dtype and device.
        """
        return self.decay * ema_model_weights + (1 - self.decay) * updated_model_weights

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Reset the average to the weights and buffers of ``model``.

        Raises:
            ValueError: The parameters or buffers of ``model`` differ from those that are averaged.
        """
        self._update(model, lambda _, current: current)

    @torch.no_grad()
    def _update(self, model: nn.Module, update_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """Replace each average, those of integers too, by a function of it and the current value; a seam of 0.1.61."""
        for average, current, _ in self._pair_up(model):
            average.copy_(update_fn(average, current))

    def _pair_up(self, model: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool]]:
        # By position, not by name: wrappers such as DistributedDataParallel change only the names.
        averages, currents = _tensors(self.module), _tensors(model)
        if [tensor.shape for tensor in averages] != [tensor.shape for tensor in currents]:
            raise ValueError(
                f"The {len(currents)} parameters and buffers of this {type(model).__name__} differ in number or shape "
                f"from the {len(averages)} that are averaged. Expected the same model throughout. After replacing or "
                "tying layers, create a new `ModelEma`."
            )
        if [tensor.device for tensor in averages] != [tensor.device for tensor in currents]:
            self.module.to(currents[0].device)
            averages = _tensors(self.module)
        for average, current, is_averaged in zip(averages, currents, self._is_averaged, strict=True):
            if average.dtype != current.dtype:
                current = current.to(average.dtype)
            yield average, current, is_averaged


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    # Each once. Runs in every update, so it reads PyTorch's dictionaries: `parameters()` and `buffers()` take twice as
    # long, because they also build names.
    members = (member for module in model.modules() for member in (module._parameters, module._buffers))  # noqa: SLF001
    return list(dict.fromkeys(t for member in members for t in member.values() if t is not None))


def _can_be_averaged(tensor: torch.Tensor) -> bool:
    # The difference of two infinities is NaN, and every later average would be NaN too.
    return (tensor.is_floating_point() or tensor.is_complex()) and bool(tensor.isfinite().all())


def check_decay(decay: object) -> None:
    """Raise unless something can be the weight of the past.

    Raises:
        TypeError: It is no number.
        ValueError: It is not between 0 and 1.
    """
    number = one_number(decay)
    if number is None:
        raise TypeError(
            f"`decay` is {decay!r}, of type {type(decay).__name__}. Expected the weight of the past, a number between "
            "0 and 1."
        )
    if not 0 <= number <= 1:
        raise ValueError(f"`decay` is {decay!r}. Expected the weight of the past, a number between 0 and 1.")
