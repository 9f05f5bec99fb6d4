"""How many samples a batch holds, found in its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence

from pytorch_accelerated._messages import warn
from pytorch_accelerated._tensors.nested import named_items
from pytorch_accelerated._types import Batch, Nested

LABEL_NAMES = ("labels", "label", "targets", "target", "y")
"""The entries of a mapping that are the targets, of which there is one for each sample."""


def size_of_pair(inputs: Nested, targets: Nested) -> int:
    """Return the number of samples in a batch of inputs and targets: the length of the targets' first dimension.

    The inputs decide where the targets have no dimension, and where they are a list, which may hold a target for each
    sample, or several tensors with a row for each.

    Args:
        inputs: The inputs of the model.
        targets: What the loss function compares its outputs with.

    Raises:
        ValueError: Neither has a tensor with at least one dimension.

    Example:
        >>> size_of_pair(torch.zeros(5, 3, 2), torch.zeros(3, 1))  # sequences of five steps
        3
        >>> boxes = [torch.zeros(4, 4), torch.zeros(4, 4)]
        >>> size_of_pair(torch.zeros(2, 3, 32, 32), boxes)
        2
    """
    of_targets, of_inputs = _possible_sizes(targets), _possible_sizes(inputs)
    for size in of_targets:
        if size in of_inputs:
            return size
    if not of_targets and not of_inputs:
        _raise_no_size((inputs, targets))
    return (of_targets or of_inputs)[0]


def size_of_batch(batch: Batch) -> int:
    """Return the number of samples in a batch that is passed to the model as a whole.

    Args:
        batch: A tensor, or arguments of the model: a mapping or a sequence. In a mapping, the labels or targets tell
            the size; otherwise it is what all tensors have as the length of their first dimension. If there is none,
            the length of most tensors is taken, or of the last one, with a warning.

    Raises:
        ValueError: There is no tensor with at least one dimension.

    Example:
        >>> size_of_batch({"scale": torch.ones(1), "x": torch.zeros(8, 4), "labels": torch.zeros(8)})
        8
    """
    named = named_items(batch)
    if named is not None:
        sizes = _sizes_of_labels(named) or _sizes_of_parts(named)
    elif isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        sizes = _sizes_of_parts({f"[{index}]": part for index, part in enumerate(batch)})
    else:
        sizes = _possible_sizes(batch)
    if not sizes:
        _raise_no_size(batch)
    return sizes[0]


def size_of_predictions(batch: Batch, outputs: Nested, expected: int | None = None) -> int:
    """Return the number of samples in a batch, from which a model made its outputs.

    That is the expected number, if anything in the outputs or the batch has this length. Otherwise a length that both
    have counts.

    Args:
        batch: What the model got, in any form.
        outputs: What it returned, in any form: tensors with a row for each sample, or lists with an entry for each.
        expected: The number of samples that the loader puts into the batch; ``None`` if that is not known.

    Example:
        >>> size_of_predictions(torch.zeros(5, 3, 2), torch.zeros(3, 1), expected=3)
        3
        >>> size_of_predictions(["a", "b"], {"logits": torch.zeros(2, 7), "weights": torch.zeros(7, 4)})
        2
    """
    of_batch, of_outputs = _all_lengths(batch, is_batch=True), _all_lengths(outputs)
    if expected is not None and expected in (*of_outputs, *of_batch):
        return expected
    shared = [size for size in of_batch if size in of_outputs]
    return (shared or of_outputs or of_batch or [1])[0]


def _all_lengths(value: Nested, is_batch: bool = False) -> list[int]:
    """Return the lengths of the tensors, arrays and lists in a batch or in outputs, the most likely size first."""
    if isinstance(value, torch.Tensor):
        return [value.size(0)] if value.ndim > 0 else []
    if isinstance(value, np.ndarray):
        return [len(value)] if value.ndim > 0 else []
    if isinstance(value, PackedSequence):
        return [int(value.batch_sizes[0])]
    named = named_items(value)
    if named is not None:
        labels = [named[name] for name in LABEL_NAMES if is_batch and name in named]
        of_labels = [size for label in labels for size in _all_lengths(label)]
        return list(dict.fromkeys([*of_labels, *_by_frequency([_all_lengths(part) for part in named.values()])]))
    if not isinstance(value, (tuple, list)):
        return []
    parts = [_all_lengths(part) for part in value]
    if is_batch:  # the second item of a batch is its targets
        return list(dict.fromkeys(size for sizes in [*parts[1:2], *parts, [len(value)]] for size in sizes))
    shared = [size for size in parts[0] if all(size in sizes for sizes in parts)] if parts else []
    if len({type(part) for part in value}) == 1 and not isinstance(value[0], (torch.Tensor, np.ndarray)):
        return [len(value), *shared]
    return list(dict.fromkeys([*shared, *_by_frequency(parts), len(value)]))


def _possible_sizes(value: Nested) -> list[int]:
    """Return what the number of samples in a part of a batch may be, the most likely first; empty if nothing tells."""
    if isinstance(value, torch.Tensor):
        return [value.size(0)] if value.ndim > 0 else []
    if isinstance(value, PackedSequence):
        return [int(value.batch_sizes[0])]
    named = named_items(value)
    if named is not None:
        return _sizes_of_labels(named) or _by_frequency([_possible_sizes(part) for part in named.values()])
    return _sizes_of_sequence(value) if isinstance(value, (tuple, list)) else []


def _sizes_of_labels(batch: Mapping[str, Nested]) -> list[int]:
    for name in LABEL_NAMES:
        sizes = _possible_sizes(batch[name]) if name in batch else []
        if sizes:
            return sizes
    return []


def _sizes_of_sequence(value: Sequence[Nested]) -> list[int]:
    """Return the possible sizes of a sequence, of samples or of tensors with a row per sample."""
    parts = [(part, sizes) for part, sizes in zip(value, map(_possible_sizes, value), strict=True) if sizes]
    if not parts:
        return []
    shared = [size for size in parts[0][1] if all(size in sizes for _, sizes in parts)]
    is_of_tensors = all(isinstance(part, torch.Tensor) for part, _ in parts)
    return [*shared, len(value)] if is_of_tensors else [len(value), *shared]


def _sizes_of_parts(parts: Mapping[str, Nested]) -> list[int]:
    """Return the possible sizes of the arguments of a model, and warn if no size fits all of them."""
    named = {name: sizes for name, sizes in ((name, _possible_sizes(part)) for name, part in parts.items()) if sizes}
    sizes = _by_frequency(list(named.values()))
    if named and not all(sizes[0] in possible for possible in named.values()):
        lengths = ", ".join(f"{name}: {possible[0]}" for name, possible in named.items())
        warn(
            f"The tensors of a batch have different lengths ({lengths}), so its number of samples is not certain. "
            f"{sizes[0]} is used as the weight of its loss. Name the targets `labels` in a mapping, or override "
            "`calculate_train_batch_loss` and `calculate_eval_batch_loss` and return the `batch_size` yourself.",
        )
    return sizes


def _by_frequency(parts: Sequence[Sequence[int]]) -> list[int]:
    """Return the sizes that parts may have: first those of most parts, and of several those of the last part."""
    candidates = dict.fromkeys(size for sizes in reversed(parts) for size in sizes)
    return sorted(candidates, key=lambda size: -sum(size in sizes for sizes in parts))


def _raise_no_size(batch: Batch) -> NoReturn:
    raise ValueError(
        f"No batch size was found: the batch, a {type(batch).__name__}, contains no tensor with at least one "
        "dimension. Override `calculate_train_batch_loss` and `calculate_eval_batch_loss` and return the `batch_size` "
        "yourself."
    )
