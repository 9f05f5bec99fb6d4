"""Gives outputs that were joined the types in which the model returns them."""

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


def dresser_of(output: ModelOutput) -> Callable[[Any], Any]:
    """Return a function that gives what was joined the types that an output has. It keeps no tensor of the output.

    What is left out is missing in a mapping, and ``None`` elsewhere.
    """
    if isinstance(output, np.ndarray):
        dtype = output.dtype
        return lambda joined: _as_array(joined, dtype)
    if isinstance(output, PackedSequence):
        return lambda joined: joined
    named = named_items(output)
    if named is not None:
        return _dresser_of_named(output, {name: dresser_of(item) for name, item in named.items()})
    if isinstance(output, (tuple, list)):
        create, dressers = type(output), [dresser_of(item) for item in output]
        return lambda joined: _dressed_sequence(joined, create, dressers)
    return lambda joined: joined


def _as_array(joined: Any, dtype: np.dtype[Any]) -> Any:
    if isinstance(joined, torch.Tensor):
        return joined.cpu().numpy()
    return np.fromiter(joined, object, len(joined)) if dtype.hasobject else np.array(joined)


def _dressed_sequence(joined: Any, create: Callable[..., Any], dressers: Sequence[Callable[[Any], Any]]) -> Any:
    if isinstance(joined, list):  # with an entry for each sample
        return tuple(joined) if create is tuple else joined
    return create([_dressed(dress, item) for dress, item in zip(dressers, joined, strict=True)])


def _dresser_of_named(output: Nested, dressers: Mapping[Hashable, Callable[[Any], Any]]) -> Callable[[Any], Any]:
    blank = rebuild(output, lambda item: None)
    if isinstance(output, Mapping) and not is_dataclass(output):
        return lambda joined: like_mapping(
            blank, {name: dressers[name](item) for name, item in joined.items() if item is not ABSENT}
        )

    def dress(joined: dict[Hashable, Any]) -> Any:
        items = iter([_dressed(dressers[name], item) for name, item in joined.items()])
        return rebuild(blank, lambda item: next(items))

    return dress


def _dressed(dress: Callable[[Any], Any], joined: Any) -> Any:
    return None if joined is ABSENT else dress(joined)
