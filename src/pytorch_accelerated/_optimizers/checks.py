"""Checks of the optimizers, made before training starts, with messages that say what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pytorch_accelerated._distributed.fast_path import unwrap_optimizer
from pytorch_accelerated._messages import warn
from pytorch_accelerated._optimizers.group import (
    CLOSURE,
    OptimizerGroup,
    arguments_of_step,
    optimizers_in,
    parameters_of,
    requires_closure,
)

_MAX_NAMES = 4


def as_optimizer(given: Any) -> Any:
    """Return what a trainer was given as its optimizer: as a group if it is a list, tuple or dictionary of several.

    Anything else is returned as it is.
    """
    items = list(given.values()) if isinstance(given, Mapping) else given if isinstance(given, (list, tuple)) else []
    if len(items) < 2 or not all(isinstance(item, Optimizer) for item in items):
        return given
    named = given.items() if isinstance(given, Mapping) else enumerate(given)
    members = {name: unwrap_optimizer(member) for name, member in named}
    return OptimizerGroup(members if isinstance(given, Mapping) else members.values())


def check_step(optimizer: object) -> None:
    """Raise if the `step` of an optimizer requires arguments that the trainer cannot supply.

    Raises:
        TypeError: It does; the message names them.
    """
    for each in optimizers_in(unwrap_optimizer(optimizer)).values():
        unknown = [f"`{name}`" for name in arguments_of_step(each) if CLOSURE not in name]
        if unknown:
            raise TypeError(
                f"The `step` of `optimizer`, a {type(each).__name__}, requires {', '.join(unknown)}, which the trainer "
                "does not know. Expected a `step` without arguments, or with a closure that computes the loss again. "
                "Override `optimizer_step` to pass them."
            )


def check_group(optimizer: object, *, is_sharded: bool) -> None:
    """Raise if several optimizers cannot be used together.

    Args:
        optimizer: The optimizer of the trainer, of whatever kind.
        is_sharded: Whether the model will be split over the processes.

    Raises:
        ValueError: An optimizer or a parameter is in the group twice, or the model will be sharded.
    """
    group = unwrap_optimizer(optimizer)
    if not isinstance(group, OptimizerGroup):
        return
    if is_sharded:
        raise ValueError(
            f"`optimizer` has {len(group)} optimizers, but FSDP and DeepSpeed prepare a single one. Train with one "
            "optimizer and several parameter groups, or with DDP."
        )
    holders: dict[int, Any] = {}
    for name, member in group.optimizers.items():
        for parameter in parameters_of(member):
            other = holders.setdefault(id(parameter), name)
            if other != name:
                raise ValueError(
                    f"A parameter of shape {tuple(parameter.shape)} is held by two of the optimizers, {other!r} and "
                    f"{name!r}, so each update would change it twice. Expected each parameter in one of them."
                )


def check_closure(optimizer: object, *, has_scaler: bool, is_sharded: bool) -> bool:
    """Return whether the optimizer has to be given a closure, or raise if it would not work.

    Args:
        optimizer: The optimizer of the trainer.
        has_scaler: Whether the run scales gradients (fp16).
        is_sharded: Whether the model is split over the processes.

    Raises:
        ValueError: It needs one, and the run does not allow it.
    """
    inner = unwrap_optimizer(optimizer)
    if not requires_closure(inner):
        return False
    if has_scaler or is_sharded:
        names = [type(each).__name__ for each in optimizers_in(inner).values() if requires_closure(each)]
        obstacle = "fp16, whose gradient scaler" if has_scaler else "FSDP or DeepSpeed, which"
        remedy = 'Use `mixed_precision="bf16"` or none' if has_scaler else "Train with DDP or one process"
        raise ValueError(
            f"`optimizer` is a {names[0]}, which computes loss and gradients several times in an update, by a closure. "
            f"The run uses {obstacle} allows no closure. {remedy}, or another optimizer."
        )
    return True


def find_untrained(model: object, optimizer: object, others: Iterable[object]) -> dict[str, nn.Parameter]:
    """Return the parameters of a model that require a gradient, but that no optimizer holds, by name.

    Args:
        model: The model.
        optimizer: The optimizer of the trainer.
        others: Where a program may have optimizers of its own, such as the attributes of the trainer.
    """
    if not isinstance(model, nn.Module) or not isinstance(optimizer, Optimizer):
        return {}
    held = {id(parameter) for each in [optimizer, *_optimizers_among(others)] for parameter in parameters_of(each)}
    return {name: each for name, each in model.named_parameters() if each.requires_grad and id(each) not in held}


def warn_about_untrained(model: nn.Module, untrained: Mapping[str, nn.Parameter]) -> None:
    """Warn about what `find_untrained` found."""
    if not untrained:
        return
    missing = list(untrained)
    num_trainable = sum(parameter.requires_grad for parameter in model.parameters())
    more = f" and {len(missing) - _MAX_NAMES} more" if len(missing) > _MAX_NAMES else ""
    warn(
        f"The optimizer does not hold {len(missing)} of the {num_trainable} parameters of `{type(model).__name__}` "
        f"that require a gradient, so they are not trained: {', '.join(map(repr, missing[:_MAX_NAMES]))}{more}. "
        "If they were added or replaced after the optimizer was created, such as a new head, create it from "
        "`model.parameters()` now. If they are not to be trained, set `requires_grad` to False.",
    )


def choose_optimizer(optimizer: object, name: object, *, has_scaler: bool) -> Optimizer:
    """Return one of the optimizers of the trainer, to make an update of its own.

    Args:
        optimizer: The optimizer of the trainer.
        name: Its name or index.
        has_scaler: Whether the run scales gradients (fp16).

    Raises:
        RuntimeError: The run scales gradients.
        TypeError: There is only one optimizer.
        KeyError: There is none of this name.
    """
    if has_scaler:
        raise RuntimeError(
            "`make_update` was called in a run with fp16, whose gradient scaler serves one update at a time. Use "
            '`mixed_precision="bf16"`, or none.'
        )
    group = unwrap_optimizer(optimizer)
    if not isinstance(group, OptimizerGroup):
        raise TypeError(
            f"`make_update` needs several optimizers, but `optimizer` is a {type(group).__name__}. Pass a dictionary "
            'of them to the Trainer: `{"generator": ..., "discriminator": ...}`.'
        )
    if name not in group.optimizers:
        raise KeyError(f"`optimizer` is {name!r}. Expected one of {list(group.optimizers)}.")
    member: Optimizer = group.optimizers[name]
    if requires_closure(member):
        raise TypeError(
            f"`make_update` cannot use the optimizer {name!r}, a {type(member).__name__}, which needs a closure. Let "
            "the update of the step use it, or take another one."
        )
    return member


def _optimizers_among(objects: Iterable[object]) -> Iterator[Any]:
    for each in objects:
        items: Iterable[Any] = [each]
        if isinstance(each, (list, tuple, Mapping)):
            items = each.values() if isinstance(each, Mapping) else each
        yield from (item for item in items if isinstance(item, Optimizer))
