"""Optimizers with a training and an evaluation mode, between which the weights in the model differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pytorch_accelerated._distributed.fast_path import unwrap_optimizer
from pytorch_accelerated._optimizers.group import copy_into, parameters_of, with_modes


class OptimizerMode:
    """Puts an optimizer that has modes, as the schedule-free ones have, into the mode that the loop needs.

    In training mode the model has the weights to compute gradients with, in evaluation mode those to use. Going to and
    fro rounds numbers. Where training has to continue as if nothing had been, the weights are therefore copied, and put
    back afterwards. Nothing is done to other optimizers.
    """

    def __init__(self) -> None:
        self.is_training: bool | None = None
        """Whether the optimizer is in training mode; ``None`` if it has no modes, or its mode is not known."""

        self._suspended: list[torch.Tensor] | None = None
        """The weights of training mode, within `evaluating`, unless others are loaded meanwhile."""

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
        if not self.is_training:
            self.eval(optimizer)
            yield
            if loads_weights:
                self._end_suspension()
            return
        self._suspended = _weights_of(optimizer)
        self.eval(optimizer)
        are_loaded = False
        try:
            yield
            are_loaded = loads_weights
        finally:
            self.train(optimizer)
            weights = self._end_suspension()
            if weights is not None and not are_loaded:
                copy_into(_parameters_of(optimizer), weights)

    @contextmanager
    def saving(self, optimizer: Any) -> Iterator[None]:
        """Put the weights of training back while the body saves a training state in the middle of `evaluating`."""
        weights = self._suspended
        if weights is None:
            yield
            return
        evaluated = _weights_of(optimizer)
        self.train(optimizer)
        copy_into(_parameters_of(optimizer), weights)
        try:
            yield
        finally:
            self.eval(optimizer)
            copy_into(_parameters_of(optimizer), evaluated)

    @contextmanager
    def restoring(self, optimizer: Any, is_training: bool | None, *, is_resuming: bool) -> Iterator[None]:
        """Put an optimizer into the mode in which a state was saved while the body restores that.

        Args:
            optimizer: The optimizer.
            is_training: Whether that is training mode; ``None`` if it is not known.
            is_resuming: Whether the run that saved the state continues. Otherwise, the optimizer is put back into the
                mode it was in.
        """
        was_training, weights = self.is_training, _weights_of(optimizer)
        if is_training is not None:
            self._switch(optimizer, is_training)
        try:
            yield
        except BaseException:
            self._switch(optimizer, bool(was_training))
            copy_into(_parameters_of(optimizer), weights)
            raise
        self._end_suspension()
        if not is_resuming:
            self._switch(optimizer, bool(was_training))

    def _end_suspension(self) -> list[torch.Tensor] | None:
        weights, self._suspended = self._suspended, None
        return weights

    def _switch(self, optimizer: Any, to_training: bool) -> None:
        optimizers = with_modes(unwrap_optimizer(optimizer))
        for each in optimizers:
            each.train() if to_training else each.eval()
        self.is_training = to_training if optimizers else None


def _parameters_of(optimizer: Any) -> list[torch.Tensor]:
    """Return the parameters of what has modes."""
    return [parameter for each in with_modes(unwrap_optimizer(optimizer)) for parameter in parameters_of(each)]


def _weights_of(optimizer: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in _parameters_of(optimizer)]
