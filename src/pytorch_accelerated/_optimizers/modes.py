"""Optimizers with a training and an evaluation mode, between which the weights in the model differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pytorch_accelerated._distributed.fast_path import unwrap_optimizer
from pytorch_accelerated._optimizers.group import with_modes


class OptimizerMode:
    """Puts an optimizer that has modes, as the schedule-free ones have, into the mode that the loop needs.

    In training mode the model has the weights to compute gradients with, in evaluation mode those to use. Going to and
    fro rounds numbers. Where training has to continue as if nothing had been, the weights are therefore copied, and put
    back afterwards. Nothing is done to other optimizers.
    """

    def __init__(self) -> None:
        self.is_training: bool | None = None
        """Whether the optimizer is in training mode; ``None`` if it has no modes, or its mode is not known."""

    def train(self, optimizer: Any) -> None:
        """Put an optimizer into training mode, for steps."""
        self._switch(optimizer, to_training=True)

    def eval(self, optimizer: Any) -> None:
        """Put an optimizer into evaluation mode, for everything else."""
        self._switch(optimizer, to_training=False)

    @contextmanager
    def evaluating(self, optimizer: Any, *, loads_weights: bool = False) -> Iterator[None]:
        """Put an optimizer into evaluation mode while the body runs, and then back, to the same weights.

        Args:
            optimizer: The optimizer.
            loads_weights: Whether the body loads other weights, to be kept unless it raises.
        """
        was_training, are_loaded = self.is_training, False
        parameters = _parameters_of(optimizer) if was_training else []
        weights = [parameter.detach().clone() for parameter in parameters]
        self.eval(optimizer)
        try:
            yield
            are_loaded = loads_weights
        finally:
            if was_training:
                self.train(optimizer)
                if not are_loaded:
                    _copy_into(parameters, weights)

    @contextmanager
    def restoring(self, optimizer: Any, is_training: bool | None, *, is_resuming: bool) -> Iterator[None]:
        """Put an optimizer into the mode in which a state was saved while the body restores that.

        Args:
            optimizer: The optimizer.
            is_training: Whether that is training mode; ``None`` if it is not known.
            is_resuming: Whether the run that saved the state continues. Otherwise, the optimizer is put back into the
                mode it was in.
        """
        was_training, parameters = self.is_training, _parameters_of(optimizer)
        weights = [parameter.detach().clone() for parameter in parameters]
        if is_training is not None:
            self._switch(optimizer, is_training)
        try:
            yield
        except BaseException:
            self._switch(optimizer, bool(was_training))
            _copy_into(parameters, weights)
            raise
        if not is_resuming:
            self._switch(optimizer, bool(was_training))

    def _switch(self, optimizer: Any, to_training: bool) -> None:
        optimizers = with_modes(unwrap_optimizer(optimizer))
        for each in optimizers:
            each.train() if to_training else each.eval()
        self.is_training = to_training if optimizers else None


def _parameters_of(optimizer: Any) -> list[torch.Tensor]:
    """Return the parameters of what has modes."""
    optimizers = with_modes(unwrap_optimizer(optimizer))
    groups = [group for each in optimizers for group in getattr(each, "param_groups", ())]
    return [parameter for group in groups for parameter in group["params"]]


def _copy_into(parameters: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
