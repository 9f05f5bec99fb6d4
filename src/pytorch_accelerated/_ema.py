"""`ModelEma`: an exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

if TYPE_CHECKING:
    from collections.abc import Iterator


class ModelEma(nn.Module):
    r"""A copy of a model whose weights are the exponential moving average of that model's weights.

    Each `update` sets

    .. math:: \bar\theta \leftarrow d \, \bar\theta + (1 - d) \, \theta

    with :math:`\bar\theta` the weights of `module`, :math:`\theta` those of the model and :math:`d` the
    decay: the last :math:`1 / (1 - d)` updates weigh most. The average often generalises better than the last
    weights. Source: Polyak and Juditsky, 1992, "Acceleration of Stochastic Approximation by Averaging"; with
    this exponential weighting Tarvainen and Valpola, 2017, "Mean teachers are better role models",
    arXiv:1703.01780.

    Parameters are averaged, each once, so that what is tied in the model is tied here. Buffers of integers,
    such as the number of batches that a batch norm has seen, are copied, and so is any tensor that holds
    infinities, such as an attention mask. Everything is on the device of the model, and moves there if the
    model has moved. The average has the dtypes that the model had in the beginning; for weights of 16 bits
    call `float` on it first, as their last bits are too coarse for the small steps of a large decay.

    To weigh differently, change ``decay`` between updates or override `update_fn`.

    Args:
        model: The model, also one that was compiled; it is copied, not kept.
        decay: The weight of the past, from 0 (the average follows the model at once) to 1 (it stays as it
            is).
        should_average_buffers: Whether buffers of floating-point numbers, such as the running statistics of
            batch norms, are averaged too; otherwise they are copied.

    Attributes:
        module: The average, a model like the given one, in evaluation mode, that requires no gradient.
        decay: The decay of the next update; may be changed at any time.

    Raises:
        ValueError: The decay is out of range.

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
        if not 0 <= decay <= 1:
            raise ValueError(f"`decay` is {decay!r}. Expected the weight of the past, between 0 and 1.")
        self.decay = decay
        self.module = copy.deepcopy(getattr(model, "_orig_mod", model))
        self.module.eval()
        self.module.requires_grad_(False)
        self._is_averaged = [
            _can_be_averaged(tensor) and (should_average_buffers or isinstance(tensor, nn.Parameter))
            for tensor in _tensors(self.module)
        ]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average one step towards the weights of ``model``, without waiting for the device.

        Raises:
            ValueError: The parameters or buffers of ``model`` are not those that were copied.
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
        """Return the new average of one tensor; an override is called for each tensor.

        Args:
            ema_model_weights: The average so far.
            updated_model_weights: The weights of the model, of the same shape, dtype and device.
        """
        return self.decay * ema_model_weights + (1 - self.decay) * updated_model_weights

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Start anew from the weights and buffers of ``model``.

        Raises:
            ValueError: The parameters or buffers of ``model`` are not those that were copied.
        """
        for average, current, _ in self._pair_up(model):
            average.copy_(current)

    def _pair_up(self, model: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool]]:
        # By position, not by name: wrappers such as DistributedDataParallel change the names only.
        averages, currents = _tensors(self.module), _tensors(model)
        if [tensor.shape for tensor in averages] != [tensor.shape for tensor in currents]:
            raise ValueError(
                f"The {len(currents)} parameters and buffers of this {type(model).__name__} differ in number "
                f"or shape from the {len(averages)} that are averaged. Expected the same model throughout; "
                "after replacing or tying layers, make a new average."
            )
        if [tensor.device for tensor in averages] != [tensor.device for tensor in currents]:
            self.module.to(currents[0].device)
            averages = _tensors(self.module)
        for average, current, is_averaged in zip(averages, currents, self._is_averaged, strict=True):
            if average.dtype != current.dtype:
                current = current.to(average.dtype)
            yield average, current, is_averaged


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    # Each once. Twice as fast as `parameters()` and `buffers()`, which put names together on the way.
    members = (member for module in model.modules() for member in (module._parameters, module._buffers))
    return list(dict.fromkeys(t for member in members for t in member.values() if t is not None))


def _can_be_averaged(tensor: torch.Tensor) -> bool:
    # The difference of two infinities is NaN, and so would be every later average.
    return (tensor.is_floating_point() or tensor.is_complex()) and bool(tensor.isfinite().all())
