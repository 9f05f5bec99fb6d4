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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import permutations
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar

from torch.optim.lr_scheduler import OneCycleLR

from pytorch_accelerated._data.loaders import num_batches_of, total_num_batches_of

if TYPE_CHECKING:
    from pytorch_accelerated.run_config import TrainerRunConfig
    from pytorch_accelerated.trainer import Trainer


Number: TypeAlias = "int | float"


NumberOrPlaceholder: TypeAlias = "Number | TrainerPlaceholderValues | PlaceholderExpression"


KnownValues: TypeAlias = "Mapping[TrainerPlaceholderValues | frozenset[TrainerPlaceholderValues], Any]"
"""The number for each placeholder, ``None`` if it is not known.

In a run that a number of updates ends, also the number for products of epochs with what each epoch has.
"""


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
    ``max_num_train_steps`` ends the run within an epoch, ``NUM_EPOCHS`` counts that epoch, but ``NUM_EPOCHS`` times
    ``NUM_UPDATE_STEPS_PER_EPOCH`` is the number of updates that the run makes, so that a schedule of that length ends
    with the run; likewise ``0.1 * NUM_EPOCHS * NUM_UPDATE_STEPS_PER_EPOCH`` is a tenth of that number.

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
        return _resolve_partial(value, values)
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


def _resolve_partial(function: functools.partial[Any], values: KnownValues) -> functools.partial[Any]:
    if getattr(function.func, "_takes_partial_epochs", False):
        values = {**values, **_partial_epochs(values)}
    args, keywords = resolve_placeholders((function.args, _with_length(function)), values)
    is_same = args is function.args and keywords is function.keywords
    return function if is_same else functools.partial(function.func, *args, **keywords)


def _partial_epochs(values: KnownValues) -> KnownValues:
    """Return the number of epochs as a fraction, in a run that ends within an epoch."""
    epochs = TrainerPlaceholderValues.NUM_EPOCHS
    known = _partial_epochs_in(epochs * TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH, values)
    return {epochs: known[epochs]} if known.get(epochs, 1) % 1 else {}


def _with_length(function: functools.partial[Any]) -> dict[str, Any]:
    """Return the keyword arguments; PyTorch's scheduler that multiplies two of them gets their product instead."""
    keywords: dict[str, Any] = function.keywords
    if function.func is not OneCycleLR or keywords.get("total_steps") is not None:
        return keywords
    epochs, per_epoch = (keywords.get(name) for name in ("epochs", "steps_per_epoch"))
    are_placeholders = isinstance(epochs, _Arithmetic) and isinstance(per_epoch, _Arithmetic)
    return {**keywords, "total_steps": epochs * per_epoch} if are_placeholders else keywords  # type: ignore[operator]


def _lookup(placeholder: TrainerPlaceholderValues, values: KnownValues) -> Number:
    number: Number | None = values.get(placeholder)
    if number is None:
        raise ValueError(
            f"`{placeholder}` has no value in this run. It needs what it counts: a number of epochs, or a training or "
            "evaluation dataset with a length. Pass that to `train`, or replace the placeholder with a number."
        )
    return number


def _evaluate(expression: PlaceholderExpression, values: KnownValues) -> Number:
    partial_epochs = _partial_epochs_in(expression, values)
    left, right = (
        resolve_placeholders(side, {**values, **partial_epochs}) for side in (expression.left, expression.right)
    )
    try:
        number = _FUNCTIONS[expression.symbol](left, right)
    except ZeroDivisionError as error:
        raise ValueError(
            f"`{expression!r}` is {left!r} {expression.symbol} {right!r} in this run, a division by zero. Expected a "
            "divisor other than 0. Replace the placeholder that is 0 with a number."
        ) from error
    return int(number + 1e-6) if partial_epochs and _is_whole(expression) else number


def _partial_epochs_in(expression: PlaceholderExpression, values: KnownValues) -> KnownValues:
    """Return the number of epochs as a fraction, where it is multiplied by what each epoch has.

    A number of epochs that is rounded, as by ``NUM_EPOCHS // 3``, stays whole.
    """
    num_epochs = TrainerPlaceholderValues.NUM_EPOCHS
    for epochs, other in permutations((expression.left, expression.right)) if expression.symbol == "*" else ():
        parts = set(_parts_of(epochs))
        if num_epochs not in parts or parts & {"//", "%", "**"}:
            continue
        for placeholder in (part for part in _parts_of(other) if part in _PER_EPOCH):
            total, per_epoch = values.get(_run_of(placeholder)), values.get(placeholder)
            if total is not None and per_epoch:
                return {num_epochs: total / per_epoch}
            if total is not None and resolve_placeholders(epochs, {**values, num_epochs: 0}) == 0:
                return {num_epochs: 1, placeholder: total}  # a stream, taken for a single epoch
    return {}


def _is_whole(expression: PlaceholderExpression) -> bool:
    """Tell whether an expression of whole numbers is a whole number."""
    parts = list(_parts_of(expression))
    return "/" not in parts and all(isinstance(part, (str, TrainerPlaceholderValues, Integral)) for part in parts)


def _parts_of(value: object) -> Iterator[object]:
    """Yield the operators, placeholders and numbers of an expression."""
    if isinstance(value, PlaceholderExpression):
        yield value.symbol
        yield from _parts_of(value.left)
        yield from _parts_of(value.right)
    else:
        yield value


def _run_of(placeholder: TrainerPlaceholderValues) -> frozenset[TrainerPlaceholderValues]:
    """Return the key for what a run has, of something that is counted per epoch."""
    return frozenset((TrainerPlaceholderValues.NUM_EPOCHS, placeholder))


_PER_EPOCH: tuple[TrainerPlaceholderValues, ...] = (
    TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
    TrainerPlaceholderValues.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH,
    TrainerPlaceholderValues.TRAIN_DATALOADER_LEN,
)


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
    totals = _lengths_of(run_config, num_batches_of(train_loader))
    resolved: Template = resolve_placeholders(instance, {**values, **totals})
    return resolved


def _lengths_of(run_config: TrainerRunConfig, num_batches_per_epoch: int | None) -> KnownValues:
    """Return the updates and batches of a run that a number of updates ends: not as many as its epochs would have."""
    num_updates = run_config.max_num_train_steps
    if getattr(run_config, "is_limited_by_steps", False) is not True or num_updates is None:
        return {}
    per_epoch = run_config.num_update_steps_per_epoch
    num_epochs, num_updates_left = divmod(num_updates, per_epoch) if per_epoch else (0, num_updates)
    num_batches = num_epochs * (num_batches_per_epoch or 0) + num_updates_left * run_config.gradient_accumulation_steps
    totals = (num_updates, num_updates, num_batches)
    return {_run_of(placeholder): total for placeholder, total in zip(_PER_EPOCH, totals, strict=True)}


def placeholders_of_lengths(num_epochs: int, num_updates: int) -> KnownValues:
    """Return the numbers of a run with one batch per update, whose updates are divided evenly over its epochs."""
    per_epoch = -(-num_updates // num_epochs)
    values: KnownValues = {TrainerPlaceholderValues.NUM_EPOCHS: num_epochs, **dict.fromkeys(_PER_EPOCH, per_epoch)}
    is_limited = num_updates % num_epochs > 0
    totals: KnownValues = {_run_of(placeholder): num_updates for placeholder in _PER_EPOCH if is_limited}
    return {**values, **totals}
