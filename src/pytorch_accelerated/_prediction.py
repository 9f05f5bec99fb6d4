"""Outputs of a model over a dataset, put together batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pytorch_accelerated._data import move_to_device
from pytorch_accelerated._losses import call_model


def model_outputs(model: Any, batch: Any) -> Any:
    """Call a model with the inputs of a batch: all of a mapping, the first item of a tuple or list, or the batch."""
    if isinstance(batch, Mapping):
        return call_model(model, **batch)
    return call_model(model, batch[0] if isinstance(batch, (tuple, list)) else batch)


def on_host(outputs: Any) -> Any:
    """Return outputs in host memory, so that they do not fill the device's."""
    return move_to_device(outputs, torch.device("cpu"))


def concatenate(parts: list[Any]) -> Any:
    """Join the outputs of consecutive batches along the first dimension, whatever they are nested in.

    Tensors without dimension are stacked; what is no tensor becomes a list.

    Example:
        >>> concatenate([{"a": torch.zeros(2)}, {"a": torch.ones(1)}])
        {'a': tensor([0., 0., 1.])}
    """
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.stack(parts) if first.ndim == 0 else torch.cat(parts)
    if isinstance(first, Mapping):
        return {name: concatenate([part[name] for part in parts]) for name in first}
    if isinstance(first, (tuple, list)):
        joined = [concatenate(list(items)) for items in zip(*parts, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    return parts
