"""Placeholders for numbers of a training run that are not known yet.

A schedule is configured before its run starts, but needs to know how long the run will be. A placeholder represents
such a number; the trainer replaces it when it creates the scheduler.

Arithmetic with a placeholder yields a :class:`PlaceholderExpression`, a small tree that is evaluated later. Nothing is
ever evaluated as code.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from numbers import Real
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar

from pytorch_accelerated._data.loaders import num_batches_of, total_num_batches_of

if TYPE_CHECKING:
    from pytorch_accelerated.run_config import TrainerRunConfig
    from pytorch_accelerated.trainer import Trainer


Number: TypeAlias = "int | float"


NumberOrPlaceholder: TypeAlias = "Number | TrainerPlaceholderValues | PlaceholderExpression"


KnownValues: TypeAlias = "Mapping[TrainerPlaceholderValues | frozenset[TrainerPlaceholderValues], Number | None]"
"""The number for each placeholder, and for products of two of them that are not the product of their numbers."""


_Operation: TypeAlias = "Callable[[_Arithmetic, NumberOrPlaceholder], PlaceholderExpression]"


Template = TypeVar("Template")


_FUNCTIONS: dict[str, Callable[[Any, Any], Number]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
}


def _operation(symbol: str) -> tuple[_Operation, _Operation]:
    """Return the two methods of an operator: for a placeholder on the left, and for one on the right."""

    def on_the_left(self: _Arithmetic, other: NumberOrPlaceholder) -> PlaceholderExpression:
        return PlaceholderExpression(symbol, self, other) if _is_operand(other) else NotImplemented

    def on_the_right(self: _Arithmetic, other: NumberOrPlaceholder) -> PlaceholderExpression:
        return PlaceholderExpression(symbol, other, self) if _is_operand(other) else NotImplemented

    return on_the_left, on_the_right


def _is_operand(value: object) -> bool:
    return isinstance(value, (Real, _Arithmetic))


class _Arithmetic:
    """Arithmetic that builds a tree instead of computing a result."""

    __array_ufunc__ = None  # otherwise numpy would build arrays of expressions, which are never resolved

    __add__, __radd__ = _operation("+")
    __sub__, __rsub__ = _operation("-")
    __mul__, __rmul__ = _operation("*")
    __truediv__, __rtruediv__ = _operation("/")
    __floordiv__, __rfloordiv__ = _operation("//")
    __mod__, __rmod__ = _operation("%")
    __pow__, __rpow__ = _operation("**")

    def __neg__(self) -> PlaceholderExpression:
        return PlaceholderExpression("*", -1, self)

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError(
            f"`{self!r}` stands for a number that is known only in a run, and cannot be used as a number before. Pass "
            "it as an argument of a `functools.partial`, in which the trainer replaces it."
        )

    __float__ = __int__ = __index__ = __round__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse


class TrainerPlaceholderValues(_Arithmetic, Enum):
    """A number that the trainer knows once a run starts. Use it wherever a schedule needs that number.

    Placeholders can be combined with numbers and with each other using ``+ - * / // ** %`` and the unary minus. If
    ``max_num_train_steps`` ends the run, ``NUM_EPOCHS`` times ``NUM_UPDATE_STEPS_PER_EPOCH`` is that number of updates,
    so that a schedule of that length ends with the run.

    Example:
        >>> TrainerPlaceholderValues.NUM_EPOCHS * TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH // 2
        (TrainerPlaceholderValues.NUM_EPOCHS * TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH) // 2
    """

    NUM_EPOCHS = "num_epochs"
    """Epochs of the run, including those done before a resume."""

    NUM_UPDATE_STEPS_PER_EPOCH = "num_update_steps_per_epoch"
    """Updates of the model per epoch; all processes together make one update."""

    PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH = "per_process_num_update_steps_per_epoch"
    """Same as ``NUM_UPDATE_STEPS_PER_EPOCH``, since every process takes part in every update."""

    TRAIN_DATALOADER_LEN = "train_dataloader_len"
    """Training batches per epoch on one process."""

    EVAL_DATALOADER_LEN = "eval_dataloader_len"
    """Evaluation batches per epoch on one process."""

    @classmethod
    def placeholder_set(cls) -> set[str]:
        """Return the names of all placeholders."""
        return set(cls.__members__)

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class PlaceholderExpression(_Arithmetic):
    """One arithmetic operation on placeholders, evaluated when their values are known.

    Attributes:
        symbol: The operator, as written in Python.
        left: The left operand: a number, a placeholder or an expression.
        right: The right operand.
    """

    symbol: str
    left: object
    right: object

    def __repr__(self) -> str:
        left, right = (
            f"({operand!r})" if isinstance(operand, PlaceholderExpression) else repr(operand)
            for operand in (self.left, self.right)
        )
        return f"{left} {self.symbol} {right}"


def resolve_placeholders(value: Any, values: KnownValues) -> Any:
    """Return ``value`` with every placeholder and expression in it replaced by its number.

    Recurses into the arguments of :class:`functools.partial` objects, and into dictionaries, lists and tuples. Nothing
    is changed in place. A value without placeholders is returned as the same object.

    Args:
        value: A placeholder, an expression, a container of them, or anything else.
        values: The number for each placeholder. The entry is ``None`` or missing if the run does not know the number.

    Raises:
        ValueError: The number of a placeholder is not known, or an expression divides by zero.

    Example:
        >>> epochs = TrainerPlaceholderValues.NUM_EPOCHS
        >>> resolve_placeholders({"period": 3 * epochs // 2, "name": "cosine"}, {epochs: 5})
        {'period': 7, 'name': 'cosine'}
    """
    if isinstance(value, TrainerPlaceholderValues):
        return _lookup(value, values)
    if isinstance(value, PlaceholderExpression):
        return _evaluate(value, values)
    if isinstance(value, functools.partial):
        args, keywords = resolve_placeholders((value.args, value.keywords), values)
        is_same = args is value.args and keywords is value.keywords
        return value if is_same else functools.partial(value.func, *args, **keywords)
    if isinstance(value, dict):
        items = {key: resolve_placeholders(item, values) for key, item in value.items()}
        if _are_same(items.values(), value.values()):
            return value
        resolved = copy.copy(value)  # keeps the type of the dictionary
        resolved.update(items)
        return resolved
    if isinstance(value, (list, tuple)):
        elements = [resolve_placeholders(element, values) for element in value]
        if _are_same(elements, value):
            return value
        if isinstance(value, list):
            return elements
        return value._make(elements) if hasattr(value, "_make") else tuple(elements)
    return value


def find_placeholder(value: object) -> object:
    """Return the first placeholder, or expression of placeholders, in a value; ``None`` if there is none.

    Looks into dictionaries, lists and tuples.
    """
    if isinstance(value, _Arithmetic):
        return value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return next((found for found in map(find_placeholder, items) if found is not None), None)


def _lookup(placeholder: TrainerPlaceholderValues, values: KnownValues) -> Number:
    number = values.get(placeholder)
    if number is None:
        raise ValueError(
            f"`{placeholder}` has no value in this run. It needs what it counts: a number of epochs, or a training or "
            "evaluation dataset with a length. Pass that to `train`, or replace the placeholder with a number."
        )
    return number


def _evaluate(expression: PlaceholderExpression, values: KnownValues) -> Number:
    limit = values.get(_factors_of(expression))
    if limit is not None:
        return limit
    left = resolve_placeholders(expression.left, values)
    right = resolve_placeholders(expression.right, values)
    try:
        return _FUNCTIONS[expression.symbol](left, right)
    except ZeroDivisionError as error:
        raise ValueError(
            f"`{expression!r}` is {left!r} {expression.symbol} {right!r} in this run, a division by zero. Expected a "
            "divisor other than 0. Replace the placeholder that is 0 with a number."
        ) from error


def _factors_of(expression: PlaceholderExpression) -> frozenset[TrainerPlaceholderValues]:
    """Return the placeholders whose product an expression is; empty if it is something else."""
    factors = (expression.left, expression.right) if expression.symbol == "*" else ()
    placeholders = [factor for factor in factors if isinstance(factor, TrainerPlaceholderValues)]
    return frozenset(placeholders) if len(placeholders) == len(factors) else frozenset()


def _are_same(new: Iterable[object], old: Iterable[object]) -> bool:
    return all(new_item is old_item for new_item, old_item in zip(new, old, strict=True))


def replace_trainer_placeholder_values(trainer: Trainer, instance: Template) -> Template:
    """Replace `TrainerPlaceholderValues` with the numbers of a run.

    Args:
        trainer: A trainer with a run configuration.
        instance: A `functools.partial` or a container that may contain placeholders, or expressions of them.

    Returns:
        The same with numbers. ``instance`` is not changed.

    Raises:
        ValueError: A placeholder needs the length of a loader that has none.
    """
    run_config = trainer.run_config
    # Test doubles of the trainer that were written for 0.1.61 have these private attributes.
    train_loader, eval_loader = trainer._train_dataloader, trainer._eval_dataloader  # noqa: SLF001
    values: KnownValues = {
        TrainerPlaceholderValues.NUM_EPOCHS: run_config.num_epochs,
        TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH: run_config.num_update_steps_per_epoch,
        TrainerPlaceholderValues.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH: run_config.num_local_update_steps_per_epoch,
        TrainerPlaceholderValues.TRAIN_DATALOADER_LEN: num_batches_of(train_loader),
        TrainerPlaceholderValues.EVAL_DATALOADER_LEN: total_num_batches_of(eval_loader),
    }
    resolved: Template = resolve_placeholders(instance, {**values, **_lengths_of(run_config)})
    return resolved


def _lengths_of(run_config: TrainerRunConfig) -> KnownValues:
    """Return the updates and batches of a run that a number of updates ends: not as many as its epochs would have."""
    if getattr(run_config, "is_limited_by_steps", False) is not True:
        return {}
    num_updates = run_config.max_num_train_steps
    num_batches = None if num_updates is None else num_updates * run_config.gradient_accumulation_steps
    epochs = TrainerPlaceholderValues.NUM_EPOCHS
    return {
        frozenset((epochs, TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH)): num_updates,
        frozenset((epochs, TrainerPlaceholderValues.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH)): num_updates,
        frozenset((epochs, TrainerPlaceholderValues.TRAIN_DATALOADER_LEN)): num_batches,
    }
