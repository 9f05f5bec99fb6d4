"""Joins what a model returns for consecutive batches: the part of each sample once, in order."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from pytorch_accelerated._tensors.nested import on_host, rebuild
from pytorch_accelerated._tensors.parts import (
    FixedParts,
    LeftOut,
    Part,
    Path,
    are_probably_parts,
    fixed_parts,
    is_number,
    may_be_parts,
)
from pytorch_accelerated._types import Nested


class OutputJoiner:
    """Joins the parts of consecutive batches.

    Rows are written into a tensor of the size that the whole will need, if it is known. So the outputs are in memory
    once, and nothing else of a batch is kept.

    Args:
        padding_value: Fills rows that are shorter than those of another batch; ``None`` if all ought to be alike.
        to_host: Whether the parts are moved to host memory.
        is_kept: Whether there will be a result. Otherwise the parts are only checked.
    """

    def __init__(self, padding_value: float | None = None, to_host: bool = True, is_kept: bool = True) -> None:
        self.padding_value = padding_value
        self.to_host = to_host
        self.is_kept = is_kept
        self.num_expected = 0
        """The number of samples in all batches; 0 if it is not known."""

        self.num_batches = 0
        self.left_out: set[Path] = set()
        """Where there is nothing to join."""

        self._reasons: dict[Path, str] = {}
        self._nodes: dict[Hashable, _Node] = {}

    def add(self, parts: Mapping[Hashable, Part], size: int) -> None:
        """Add what `as_parts` made of the output of the next batch, by name.

        Raises:
            ValueError: It does not fit to the batches before, or has no part for each sample.
        """
        for name, part in parts.items():
            node = self._nodes[name] = extended(self._nodes.get(name), part, size, (name,), self)
            if not node.has_content:
                self._check_anything_left(name, size)
        self.num_batches += 1

    def leave_out(self, path: Path, reason: str | None) -> None:
        """Note that there is nothing to join at this place."""
        self.left_out.add(path)
        if reason is not None:
            self._reasons.setdefault(path, reason)

    def keep(self, value: Nested) -> Nested:
        """Return a copy of a part, which keeps nothing else of the batch in memory."""
        if isinstance(value, torch.Tensor):
            return value.detach().to("cpu", copy=True) if self.to_host else value.detach().clone()
        if isinstance(value, np.ndarray):
            return value.copy()
        if hasattr(value, "to"):
            return on_host(value) if self.to_host else value
        return rebuild(value, self.keep)

    def result(self) -> dict[Hashable, Any]:
        """Return what was joined, by name; rows as a tensor, single numbers as their mean over the samples."""
        return {name: node.join() for name, node in self._nodes.items()}

    def describe_left_out(self) -> str | None:
        """Return a sentence about what a caller may miss; ``None`` if there is nothing."""
        if not self._reasons:
            return None
        named = "; ".join(f"{name_of(path)}, {reason}" for path, reason in self._reasons.items())
        return (
            f"The predictions leave out what has no part for each sample: {named}. Pass the names of those that you "
            "need as `outputs`, or override `calculate_predictions`."
        )

    def raise_different(self, path: Path, what: str, before: str, advice: str = "") -> NoReturn:
        """Refuse a part that cannot be joined to those before.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{name_of(path)} cannot be joined over the batches: batch {self.num_batches} has {what}, those before "
            f"have {before}. {advice}Choose other parts with `outputs`, or let `calculate_predictions` return a list "
            "with one entry per sample."
        )

    def _check_anything_left(self, name: Hashable, size: int) -> None:
        named = "; ".join(f"{name_of(path)} is {reason}" for path, reason in self._reasons.items() if path[0] == name)
        if not named:
            return
        raise ValueError(
            f"The outputs of batch {self.num_batches} do not have a part for each of its {size} samples: {named}. "
            "Expected tensors with one row per sample, or lists with one entry per sample. Let the model return these, "
            "or override `calculate_predictions`."
        )


def name_of(path: Path) -> str:
    """Return the name of a place for messages.

    Example:
        >>> name_of(("outputs", "hidden_states", 0))
        '`outputs.hidden_states[0]`'
    """
    first, *others = path
    return f"`{first}{''.join(f'.{name}' if isinstance(name, str) else f'[{name!r}]' for name in others)}`"


class _Absent:
    """The type of `ABSENT`, the result for anything that is left out."""


ABSENT = _Absent()


class _Node(ABC):
    """The parts of all batches at one place.

    Args:
        path: The place.
        joiner: Has the settings.
    """

    description: str
    """What the batches have here, for messages."""

    has_content = True
    """Whether there is anything about single samples."""

    def __init__(self, path: Path, joiner: OutputJoiner) -> None:
        self.path = path
        self.joiner = joiner

    @abstractmethod
    def add(self, part: Part, size: int) -> _Node:
        """Add the part of the next batch, and return the node for those that follow."""

    @abstractmethod
    def join(self) -> Any:
        """Return the whole."""

    def give_up(self, reason: str | None) -> _Node:
        """Leave this place out of the result, and return the node that stands for that."""
        self.joiner.leave_out(self.path, reason)
        return _LeftOut(self.path, self.joiner)


def extended(node: _Node | None, part: Part, size: int, path: Path, joiner: OutputJoiner) -> _Node:
    """Add a part to the node of its place, which is created if there is none, and return the node."""
    if isinstance(node, _LeftOut):
        return node
    kind = _kind_of(part)
    if node is None:
        node = kind(path, joiner)
    elif kind is _LeftOut:
        return node.give_up(part.description)
    elif type(node) is not kind:
        joiner.raise_different(path, kind.description, node.description)
    return node.add(part, size)


def _kind_of(part: Part) -> type[_Node]:
    if isinstance(part, LeftOut):
        return _LeftOut
    if isinstance(part, dict):
        return _Named
    if isinstance(part, (FixedParts, tuple, list)):
        return _Entries
    if is_number(part):
        return _Numbers
    return _Rows if isinstance(part, torch.Tensor) else _Constant


class _LeftOut(_Node):
    """What has no part for each sample."""

    description = "nothing about single samples"

    has_content = False

    def add(self, part: LeftOut, size: int) -> _Node:
        self.joiner.leave_out(self.path, part.description)
        return self

    def join(self) -> _Absent:
        return ABSENT


class _Constant(_Node):
    """``None``, or a text that is the same in each batch."""

    description = "no tensor"

    has_content = False
    _value: object = ABSENT

    def add(self, part: object, size: int) -> _Node:
        if self._value is ABSENT:
            self._value = part
        return self if self._value == part else self.give_up("a text of each batch")

    def join(self) -> object:
        return self._value


class _Numbers(_Node):
    """A number for a whole batch, such as its loss."""

    description = "a single number"

    def __init__(self, path: Path, joiner: OutputJoiner) -> None:
        super().__init__(path, joiner)
        self._values: list[Any] = []
        self._sizes: list[int] = []

    def add(self, part: Any, size: int) -> _Node:
        self._values.append(self.joiner.keep(part))
        self._sizes.append(size)
        return self

    def join(self) -> Any:
        """Return the mean over the samples, as for a loss; a count that differs from batch to batch has no mean."""
        first = self._values[0]
        values = [value.item() if hasattr(value, "item") else value for value in self._values]
        if all(value == values[0] for value in values):
            return first
        if all(isinstance(value, int) for value in values):
            return self.give_up("a whole number of each batch").join()
        mean = sum(value * size for value, size in zip(values, self._sizes, strict=True)) / sum(self._sizes)
        return torch.tensor(mean, dtype=first.dtype, device=first.device) if isinstance(first, torch.Tensor) else mean


class _Named(_Node):
    """A mapping, dataclass or named tuple."""

    description = "several parts by name"

    def __init__(self, path: Path, joiner: OutputJoiner) -> None:
        super().__init__(path, joiner)
        self._items: dict[Hashable, _Node] = {}

    @property
    def has_content(self) -> bool:  # type: ignore[override]
        return any(item.has_content for item in self._items.values())

    def add(self, part: dict[Hashable, Part], size: int) -> _Node:
        if self._items and part.keys() != self._items.keys():
            self.joiner.raise_different(self.path, f"the parts {list(part)}", f"{list(self._items)}")
        for name, item in part.items():
            self._items[name] = extended(self._items.get(name), item, size, (*self.path, name), self.joiner)
        return self

    def join(self) -> dict[Hashable, Any]:
        return {name: item.join() for name, item in self._items.items()}


class _Entries(_Node):
    """A list or tuple: an entry for each sample, or parts with a row for each sample.

    With two samples and two parts, only a later batch shows which.
    """

    description = "a list"

    def __init__(self, path: Path, joiner: OutputJoiner) -> None:
        super().__init__(path, joiner)
        self._undecided: list[tuple[Sequence[Any], int]] = []
        self._parts: _Node | None = None
        self._samples: list[Any] | None = None

    @property
    def has_content(self) -> bool:  # type: ignore[override]
        return self._parts is None or self._parts.has_content

    def add(self, part: FixedParts | Sequence[Any], size: int) -> _Node:
        if self._parts is None and self._samples is None:
            if not isinstance(part, FixedParts) and may_be_parts(part, size):
                self._undecided.append((self.joiner.keep(part), size))
                return self
            self._decide(are_parts=isinstance(part, FixedParts))
        return self._add(part, size)

    def _decide(self, are_parts: bool) -> None:
        if are_parts:
            self._parts = _Named(self.path, self.joiner)
        else:
            self._samples = []
        undecided, self._undecided = self._undecided, []
        for part, size in undecided:
            self._add(part, size)

    def _add(self, part: FixedParts | Sequence[Any], size: int) -> _Node:
        if self._parts is not None:
            if not isinstance(part, FixedParts):
                part = fixed_parts(part, size, self.path, self.joiner.left_out)
            self._parts = self._parts.add(dict(enumerate(part.items)), size)
        elif isinstance(part, FixedParts):
            return self.give_up(f"a list of {len(part.items)} for {size} samples")
        elif self._samples is not None and self.joiner.is_kept:
            self._samples.extend(map(self.joiner.keep, part))
        return self

    def join(self) -> Any:
        if self._undecided:
            self._decide(are_parts=all(are_probably_parts(part, size) for part, size in self._undecided))
        return self._samples if self._parts is None else tuple(self._parts.join().values())


class _Rows(_Node):
    """The rows of tensors."""

    description = "a tensor"

    def __init__(self, path: Path, joiner: OutputJoiner) -> None:
        super().__init__(path, joiner)
        self._shape: torch.Size | None = None
        self._is_ragged = False
        self._num_rows = 0
        self._chunks: list[torch.Tensor] = []
        self._num_in_last = 0
        """Rows in the last chunk, which may have room for more."""

    def add(self, part: torch.Tensor, size: int) -> _Node:
        self._check(part)
        if not self.joiner.is_kept:
            return self
        chunk = self._chunks[-1] if self._chunks else None
        if chunk is None or not self._fits(chunk, part):
            self._trim()
            chunk = self._new_chunk(part)
            self._chunks.append(chunk)
        chunk[self._num_in_last : self._num_in_last + size].copy_(part)
        self._num_in_last += size
        self._num_rows += size
        return self

    def _check(self, part: torch.Tensor) -> None:
        shape, self._shape = self._shape, part.shape
        if shape is None or shape[1:] == part.shape[1:]:
            return
        padding_value = self.joiner.padding_value
        if padding_value is None or len(shape) != part.ndim:
            advice = "Pass a `padding_value` to fill what is missing. " if len(shape) == part.ndim else ""
            what, before = (f"the shape {tuple(each)}" for each in (part.shape, shape))
            self.joiner.raise_different(self.path, what, before, advice)
        if not _can_hold(part.dtype, padding_value):
            raise ValueError(
                f"`padding_value` is {padding_value!r}, which {name_of(self.path)}, of type {part.dtype}, cannot hold. "
                "Expected a number of this type."
            )
        self._is_ragged = True

    def _fits(self, chunk: torch.Tensor, part: torch.Tensor) -> bool:
        are_alike = chunk.shape[1:] == part.shape[1:] and chunk.dtype == part.dtype
        return are_alike and self._num_in_last + len(part) <= len(chunk)

    def _new_chunk(self, part: torch.Tensor) -> torch.Tensor:
        num_left = self.joiner.num_expected - self._num_rows
        capacity = len(part) if self._is_ragged else max(len(part), num_left if num_left > 0 else self._num_rows)
        self._num_in_last = 0
        device = torch.device("cpu") if self.joiner.to_host else part.device
        return torch.empty((capacity, *part.shape[1:]), dtype=part.dtype, device=device)

    def _trim(self) -> None:
        if self._chunks and self._num_in_last < len(self._chunks[-1]):
            self._chunks[-1] = self._chunks[-1][: self._num_in_last].clone()

    def join(self) -> torch.Tensor | None:
        self._trim()
        chunks, self._chunks = self._chunks, []
        if len(chunks) <= 1:
            return chunks[0] if chunks else None
        if len({chunk.shape[1:] for chunk in chunks}) == 1:
            return torch.cat(chunks)
        return _padded(chunks, self.joiner.padding_value or 0)


def _can_hold(dtype: torch.dtype, number: float) -> bool:
    """Tell whether a type has a number as one of its values, or close to one."""
    if dtype.is_floating_point or dtype.is_complex:
        return True
    if dtype is torch.bool:
        return number in (0, 1)
    limits = torch.iinfo(dtype)
    return math.isfinite(number) and number == int(number) and limits.min <= number <= limits.max


def _padded(chunks: Sequence[torch.Tensor], padding_value: float) -> torch.Tensor:
    """Concatenate tensors of different widths along the first dimension."""
    widths = [max(sizes) for sizes in zip(*(chunk.shape[1:] for chunk in chunks), strict=True)]
    dtype = chunks[0].dtype
    for chunk in chunks:
        dtype = torch.promote_types(dtype, chunk.dtype)
    whole = chunks[0].new_full((sum(map(len, chunks)), *widths), padding_value, dtype=dtype)
    start = 0
    for chunk in chunks:
        whole[(slice(start, start + len(chunk)), *map(slice, chunk.shape[1:]))] = chunk
        start += len(chunk)
    return whole
