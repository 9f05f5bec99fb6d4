"""Converts joined outputs back to the types that the model returns."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence

from pytorch_accelerated._tensors.joining import ABSENT
from pytorch_accelerated._tensors.nested import like_mapping, named_items, rebuild
from pytorch_accelerated._types import ModelOutput, Nested


def restorer_of_types(output: ModelOutput) -> Callable[[Any], Any]:
    """Return a function that converts joined parts back to the types of an output. It holds on to none of its tensors.

    What is left out is missing in a mapping, and ``None`` elsewhere.
    """
    if isinstance(output, np.ndarray):
        dtype = output.dtype
        return lambda joined: _as_array(joined, dtype)
    if isinstance(output, PackedSequence):
        return lambda joined: joined
    named = named_items(output)
    if named is not None:
        return _restorer_of_named(output, {name: restorer_of_types(item) for name, item in named.items()})
    if isinstance(output, (tuple, list)):
        create, restorers = type(output), [restorer_of_types(item) for item in output]
        return lambda joined: _restored_sequence(joined, create, restorers)
    return lambda joined: joined


def _as_array(joined: Any, dtype: np.dtype[Any]) -> Any:
    if isinstance(joined, torch.Tensor):
        return joined.cpu().numpy()
    return np.fromiter(joined, object, len(joined)) if dtype.hasobject else np.array(joined)


def _restored_sequence(joined: Any, create: Callable[..., Any], restorers: Sequence[Callable[[Any], Any]]) -> Any:
    if isinstance(joined, list):  # with an entry for each sample
        return tuple(joined) if create is tuple else joined
    return create([_restored(restore, item) for restore, item in zip(restorers, joined, strict=True)])


def _restorer_of_named(output: Nested, restorers: Mapping[Hashable, Callable[[Any], Any]]) -> Callable[[Any], Any]:
    blank = rebuild(output, lambda item: None)
    if isinstance(output, Mapping) and not is_dataclass(output):
        return lambda joined: like_mapping(
            blank, {name: restorers[name](item) for name, item in joined.items() if item is not ABSENT}
        )

    def restore(joined: dict[Hashable, Any]) -> Any:
        items = iter([_restored(restorers[name], item) for name, item in joined.items()])
        return rebuild(blank, lambda item: next(items))

    return restore


def _restored(restore: Callable[[Any], Any], joined: Any) -> Any:
    return None if joined is ABSENT else restore(joined)
