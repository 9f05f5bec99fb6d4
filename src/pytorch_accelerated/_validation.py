"""Checks of the user's arguments, made before training starts, with messages that say what to do."""

from __future__ import annotations

import functools
import inspect
import operator
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from pytorch_accelerated._counts import check_positive_integer as check_positive_integer
from pytorch_accelerated._data.loaders import is_dataset, is_map_style, is_shardable, num_batches_of
from pytorch_accelerated._hints.classes import describe_forgotten_init, find_uncalled
from pytorch_accelerated._hints.hooks import hook_meant
from pytorch_accelerated._messages import warn

Number = TypeVar("Number")


def check_no_run(is_running: bool) -> None:
    """Raise if a run is under way.

    Raises:
        RuntimeError: `train` was called during a run.
    """
    if is_running:
        raise RuntimeError(
            "`train` was called during a run of this trainer, probably from a callback or a hook. Call it after the "
            "run, or use another trainer. `evaluate` may be called during a run."
        )


def check_run(is_under_way: bool, method: str, event: str, more: str = "") -> None:
    """Raise unless what a method of the trainer acts on is under way.

    Args:
        is_under_way: Whether it is.
        method: The method.
        event: Where to call it: an event of a callback.
        more: What else the run needs, such as ``"with `eval_dataset` "``.

    Raises:
        RuntimeError: It is not.
    """
    if not is_under_way:
        kind = "evaluation" if "eval_epoch" in event else "training run"
        raise RuntimeError(
            f"`{method}` was called while no {kind} {more}is under way. Call it in a callback's `{event}`."
        )


def as_whole_number(value: Number) -> Number | int:
    """Return a float of whole value, such as ``1e4``, as an integer; anything else is returned unchanged."""
    return int(value) if isinstance(value, (float, np.floating)) and float(value).is_integer() else value


def check_positive_number(name: str, value: float | None) -> None:
    """Raise unless ``value`` is ``None`` or a number above 0.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not above 0.
    """
    if value is None:
        return
    expected = "Expected a number above 0, or None."
    try:
        is_positive = None if isinstance(value, bool) else bool(value > 0)
    except TypeError:
        is_positive = None
    if is_positive is None:
        raise TypeError(f"`{name}` is {value!r}, of type {type(value).__name__}. {expected}")
    if not is_positive:
        raise ValueError(f"`{name}` is {value!r}. {expected}")


def check_min_epochs(min_epochs: int | None, num_epochs: int) -> None:
    """Raise unless ``min_epochs`` is ``None`` or a number of epochs that the run has.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is below 1, or above ``num_epochs``.
    """
    if min_epochs is None:
        return
    check_positive_integer("min_epochs", min_epochs, "epochs")
    if min_epochs > num_epochs:
        raise ValueError(
            f"`min_epochs` is {min_epochs!r}, but `num_epochs` is {num_epochs!r}. Expected at most the number of "
            "epochs after which the run ends anyway."
        )


def check_seed(seed: object) -> None:
    """Raise unless ``seed`` is ``None`` or a whole number.

    Raises:
        TypeError: It is not.
    """
    try:
        if seed is not None:
            operator.index(as_whole_number(seed))  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(
            f"`seed` is {seed!r}, of type {type(seed).__name__}. Expected a whole number, or None. "
            f"Pass {f'`seed=int({seed!r})`' if isinstance(seed, str) else 'a number'} to the Trainer."
        ) from error


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


def check_initialized(trainer: object, needed: str) -> None:
    """Raise if the ``__init__`` of the Trainer has not been called.

    Args:
        trainer: The trainer.
        needed: An attribute that it sets.

    Raises:
        RuntimeError: It has not.
    """
    if needed not in vars(trainer):
        forgotten = describe_forgotten_init(type(trainer)) or "Call `super().__init__(...)` in its `__init__`."
        raise RuntimeError(f"This `{type(trainer).__name__}` was not initialized as a Trainer. {forgotten}")


def warn_about_uncalled_hooks(cls: type, events: Collection[str], other_words: Collection[str]) -> None:
    """Warn about methods of a trainer that look like hooks, also of other libraries, and that nothing calls.

    Args:
        cls: The class of the trainer.
        events: The events of callbacks.
        other_words: Names that occur elsewhere in the program.
    """
    for method, remedy in find_uncalled(cls, lambda name: hook_meant(name, events), other_words).items():
        warn(
            f"`{cls.__name__}.{method}` is not a hook of the Trainer, so nothing calls it. {remedy} If your program "
            "calls it itself, choose a name that differs more."
        )


def check_numbers_of_run(
    per_device_batch_size: int,
    num_epochs: int,
    gradient_accumulation_steps: int,
    max_num_train_steps: int | None,
    gradient_clip_value: float | None,
    gradient_clip_norm: float | None = None,
) -> None:
    """Raise unless all numbers that a run is started with are valid.

    Raises:
        TypeError: One of them has the wrong type.
        ValueError: One of them is out of range.
    """
    check_positive_integer("num_epochs", num_epochs, "epochs")
    check_positive_integer("per_device_batch_size", per_device_batch_size, "samples")
    check_positive_integer("gradient_accumulation_steps", gradient_accumulation_steps, "batches")
    if max_num_train_steps is not None:
        check_positive_integer("max_num_train_steps", max_num_train_steps, "updates")
    check_positive_number("gradient_clip_value", gradient_clip_value)
    check_positive_number("gradient_clip_norm", gradient_clip_norm)


def warn_about_long_accumulation(gradient_accumulation_steps: int, num_batches_per_epoch: int | None) -> None:
    """Warn if an epoch has fewer batches than an update should take.

    Args:
        gradient_accumulation_steps: Batches per update and rank.
        num_batches_per_epoch: Batches per epoch and rank; ``None`` if that is not certain.
    """
    if num_batches_per_epoch is not None and num_batches_per_epoch < gradient_accumulation_steps:
        warn(
            f"`gradient_accumulation_steps` is {gradient_accumulation_steps} batches, but an epoch has only "
            f"{num_batches_per_epoch}. An update ends with its epoch, so each takes no more batches than that. Lower "
            "`gradient_accumulation_steps` or `per_device_batch_size`.",
        )


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


def check_data_not_empty(name: str, data: object) -> None:
    """Raise if a dataset is missing or known to be empty.

    Raises:
        ValueError: It is empty, or missing.
        TypeError: It is neither a dataset nor an iterable.
    """
    if data is None:
        raise ValueError(f"`{name}` is None. Expected a dataset, or an iterable of batches. Pass one.")
    if not hasattr(data, "__getitem__") and not hasattr(data, "__iter__"):
        raise TypeError(f"`{name}` is of type {type(data).__name__}. Expected a dataset, or an iterable of batches.")
    if isinstance(data, (Dataset, Sequence, DataLoader)) and num_batches_of(data) == 0:
        raise ValueError(
            f"`{name}` is empty: its length is 0. Expected at least one sample. Check how it was built or filtered."
        )


@contextmanager
def explain_bad_data(name: str, data: object) -> Iterator[None]:
    """If the body fails to create a loader because its dataset is missing or empty, raise an error that says so.

    The dataset is not checked before: a subclass may create its loader from anything.

    Raises:
        ValueError: The dataset is empty, or missing.
        TypeError: It is neither a dataset nor an iterable.
    """
    try:
        yield
    except (TypeError, ValueError):
        check_data_not_empty(name, data)
        raise


def check_reiterable(data: Mapping[str, object], num_epochs: int, max_num_train_steps: int | None) -> None:
    """Raise if data that can be iterated over only once is needed in several epochs.

    Raises:
        ValueError: It is an iterator, such as a generator, and only the number of epochs limits the run.
    """
    for name, each in data.items():
        is_iterator = hasattr(each, "__next__") and not is_dataset(each)
        if is_iterator and num_epochs > 1 and max_num_train_steps is None:
            raise ValueError(
                f"`{name}` is an iterator ({type(each).__name__}), exhausted after the first of {num_epochs} epochs. "
                "Pass an object of a class whose `__iter__` starts over, `def __iter__(self): return make_batches()`, "
                "or use `num_epochs=1`."
            )


def warn_about_ready_batches(name: str, loader: object) -> None:
    """Warn if the samples in a list look like batches, which a loader would batch once more."""
    data: Any = getattr(loader, "dataset", None)
    if not is_shardable(loader) or not isinstance(data, (list, tuple)) or not data:
        return
    if not isinstance(data[0], (list, tuple, dict)):
        return
    first = data[0].values() if isinstance(data[0], dict) else data[0]
    tensors = [item for item in first if isinstance(item, torch.Tensor)]
    sizes = {tensor.shape[0] if tensor.ndim > 0 else 0 for tensor in tensors}
    if len(tensors) > 1 and len(tensors) == len(first) and len(sizes) == 1 and max(sizes) > 1:
        warn(
            f"The items of `{name}`, a {type(data).__name__}, look like ready batches of {max(sizes)} samples. Items "
            "of a list are taken for samples, so they are batched once more. For ready batches, pass an object that "
            "has only `__iter__`, or `batch_size=None` in the arguments of its loader. If they are samples, pass them "
            "as a `Dataset`, and this warning ends.",
        )


def check_data_of_loader(name: str, loader: object) -> None:
    """Raise if a `DataLoader` was created from a dataset that is missing or known to be empty.

    Raises:
        ValueError: It is empty, or missing.
        TypeError: It is no dataset.
    """
    if is_map_style(loader):
        check_data_not_empty(name, getattr(loader, "dataset", None))


def check_loader_not_empty(name: str, loader: object) -> None:
    """Raise if the loader of a real dataset yields no batch.

    Raises:
        ValueError: An epoch would have no batch.
    """
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, (Dataset, Sequence)) or num_batches_of(loader) != 0:
        return
    raise ValueError(
        f"The loader of `{name}` yields no batch: {num_batches_of(dataset)} samples do not fill one batch of "
        f"{getattr(loader, 'batch_size', None)}, and `drop_last` is set. Use a smaller `per_device_batch_size`, or "
        "`drop_last=False`."
    )
