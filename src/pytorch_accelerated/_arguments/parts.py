"""Checks of the parts of a trainer: model, loss function, optimizer, run history."""

from __future__ import annotations

import functools
import inspect
import os

from torch import nn
from torch.optim import Optimizer


def check_model(model: object) -> None:
    """Raise unless ``model`` can be put into training and evaluation mode, as an instance of a module can.

    Raises:
        TypeError: It is a class, a function that would create a model, a container of models, or something else.
    """
    if all(callable(getattr(model, mode, None)) for mode in ("train", "eval")) and not inspect.isclass(model):
        return
    raise TypeError(
        f"`model` is {describe(model)}. Expected an instance of `torch.nn.Module`. Pass {_remedy(model, 'model')} to "
        "the Trainer."
    )


def check_loss_func(loss_func: object) -> None:
    """Raise unless ``loss_func`` is ``None`` or could compute a loss.

    Raises:
        TypeError: It is not callable, or a class that would take outputs and targets for its settings.
    """
    called = loss_func.func if isinstance(loss_func, functools.partial) else loss_func
    is_class = inspect.isclass(called) and called.__new__ is object.__new__  # otherwise it may return a loss
    if loss_func is None or (callable(loss_func) and not is_class):
        return
    raise TypeError(
        f"`loss_func` is {describe(loss_func)}. Expected a function of outputs and targets, or an instance of a loss "
        f"class. Pass {_remedy(loss_func, 'loss function')} to the Trainer."
    )


def check_optimizer(optimizer: object) -> None:
    """Raise unless ``optimizer`` is ``None`` or has the methods of an optimizer.

    Raises:
        TypeError: It is a class, a function that would create one, a container of optimizers, or something else.
    """
    methods = [getattr(optimizer, name, None) for name in ("step", "zero_grad")]
    if optimizer is None or (all(map(callable, methods)) and not inspect.isclass(optimizer)):
        return
    described, remedy = describe(optimizer), _remedy(optimizer, "optimizer")
    if isinstance(optimizer, (list, tuple, dict)):
        items = list(optimizer.values()) if isinstance(optimizer, dict) else list(optimizer)
        wrong = [item for item in items if not isinstance(item, Optimizer)]
        content = describe(wrong[0]) if wrong else "a single optimizer" if items else "nothing"
        described = f"a {type(optimizer).__name__} with {content} in it"
        remedy = _remedy(wrong[0], "optimizer") if wrong else remedy
    raise TypeError(
        f"`optimizer` is {described}. Expected an instance of `torch.optim.Optimizer`, or several in a list or "
        f"dictionary. Pass {remedy} to the Trainer."
    )


def check_run_history(run_history: object) -> None:
    """Raise if a class or a path is given in place of a run history.

    Raises:
        TypeError: It is.
    """
    if isinstance(run_history, (str, os.PathLike)):
        raise TypeError(
            f"`run_history` is {run_history!r}, of type {type(run_history).__name__}. Expected a run history. To write "
            f"it to a file, pass `JsonlRunHistory({os.fspath(run_history)!r})`."
        )
    if inspect.isclass(run_history):
        raise TypeError(
            f"`run_history` is the class `{run_history.__name__}`. Expected an instance. Pass "
            f"`{run_history.__name__}(...)` to the Trainer."
        )


def check_trainable(model: object, loss_func: object, optimizer: object) -> None:
    """Raise unless there is an optimizer, something to train, and both belong together.

    Objects that are not a PyTorch module or optimizer, such as test doubles, are not checked.

    Raises:
        ValueError: There is no optimizer, all parameters are frozen, or the optimizer holds other parameters.
    """
    if optimizer is None:
        raise ValueError(
            "`optimizer` is None, so nothing can be trained. Pass an optimizer to the Trainer, such as "
            "`torch.optim.AdamW(model.parameters())`. Without one, only `evaluate` and `predict` work."
        )
    if not isinstance(model, nn.Module) or not isinstance(optimizer, Optimizer):
        return
    modules = [module for module in (model, loss_func) if isinstance(module, nn.Module)]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    if not any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            f"None of the {len(parameters)} parameters of `{type(model).__name__}` has `requires_grad`, so nothing "
            "would be trained. Unfreeze some of them, for example with `ModelFreezer(model).unfreeze()`."
        )
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in optimized for parameter in parameters):
        raise ValueError(
            f"The optimizer holds none of the parameters of `{type(model).__name__}`, so training would not change it. "
            "Was it created for another model, or before the model was replaced or copied? Create it from "
            "`model.parameters()`."
        )


def describe(value: object) -> str:
    """Return what a value is, for a message: ``"the class `StepLR`"``, ``"None"``."""
    if inspect.isclass(value):
        return f"the class `{value.__name__}`"
    if isinstance(value, functools.partial):
        return f"a `functools.partial` of `{getattr(value.func, '__name__', value.func)}`"
    if value is None:
        return "None"
    return f"{value!r}, of type str" if isinstance(value, str) else f"an object of type {type(value).__name__}"


_EXAMPLES = {
    "model": "",
    "loss function": ", such as `nn.MSELoss()`,",
    "optimizer": ", such as `torch.optim.AdamW(model.parameters())`,",
}


def _remedy(value: object, role: str) -> str:
    if inspect.isclass(value):
        return f"an instance, `{value.__name__}({'model.parameters()' if role == 'optimizer' else '...'})`,"
    if isinstance(value, functools.partial):
        return "what it returns when it is called"
    is_swapped = isinstance(value, nn.Module if role == "optimizer" else Optimizer)
    if is_swapped:
        return "model, loss function and optimizer in this order, or by their names,"
    return f"the {role} itself{_EXAMPLES[role]}"
