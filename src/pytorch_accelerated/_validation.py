"""Checks of what a user gives, made before training starts, with messages that say what to do."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pytorch_accelerated._data.loaders import is_dataset, num_batches_of


def check_no_run(is_running: bool) -> None:
    """Raise if a run is under way.

    Raises:
        RuntimeError: `train` was called within a run.
    """
    if is_running:
        raise RuntimeError(
            "`train` was called while this trainer is running, probably by a callback or a hook. Call it after the "
            "run; `evaluate` may be called within one."
        )


def check_run(is_running: bool) -> None:
    """Raise unless a training run is under way that signals could end.

    Raises:
        RuntimeError: `TrainingLoop.end_run_on_signals` was called too early, too late or in an evaluation.
    """
    if not is_running:
        raise RuntimeError(
            "`end_run_on_signals` was called while no training run is under way, so there is none to end. Call it in "
            "`on_training_run_start` of a callback, or in the hook `training_run_start`."
        )


def check_positive_integer(name: str, value: Any, unit: str) -> None:
    """Raise unless ``value`` is an integer of at least 1.

    Raises:
        TypeError: It is no integer.
        ValueError: It is below 1.
    """
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError  # noqa: TRY301 - the one message below serves both
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(
            f"`{name}` is {value!r}, of type {type(value).__name__}. Expected a whole number of {unit}, at least 1."
        ) from error
    if number < 1:
        raise ValueError(f"`{name}` is {value!r}. Expected a whole number of {unit}, at least 1.")


def check_positive_number(name: str, value: Any) -> None:
    """Raise unless ``value`` is ``None`` or a number above 0.

    Raises:
        ValueError: It is not.
    """
    if value is not None and not value > 0:
        raise ValueError(f"`{name}` is {value!r}. Expected a number above 0, or None.")


def check_numbers_of_run(
    num_epochs: Any,
    per_device_batch_size: Any,
    gradient_accumulation_steps: Any,
    max_num_train_steps: Any,
    gradient_clip_value: Any,
    gradient_clip_norm: Any,
) -> None:
    """Raise unless all numbers that a run is started with are possible.

    Raises:
        TypeError: One of them is of the wrong kind.
        ValueError: One of them is out of range.
    """
    check_positive_integer("num_epochs", num_epochs, "epochs")
    check_positive_integer("per_device_batch_size", per_device_batch_size, "samples")
    check_positive_integer("gradient_accumulation_steps", gradient_accumulation_steps, "batches")
    if max_num_train_steps is not None:
        check_positive_integer("max_num_train_steps", max_num_train_steps, "updates")
    check_positive_number("gradient_clip_value", gradient_clip_value)
    check_positive_number("gradient_clip_norm", gradient_clip_norm)


def check_create_scheduler_fn(create_scheduler_fn: Any) -> None:
    """Raise unless it is something that makes a scheduler out of an optimizer.

    Raises:
        TypeError: It is a scheduler already, or cannot be called.
    """
    if create_scheduler_fn is None:
        return
    is_scheduler = not inspect.isclass(create_scheduler_fn) and hasattr(create_scheduler_fn, "optimizer")
    if callable(create_scheduler_fn) and not is_scheduler:
        return
    name = type(create_scheduler_fn).__name__
    raise TypeError(
        f"`create_scheduler_fn` is {'a scheduler' if is_scheduler else 'an object'} of type {name}. Expected a "
        "function that takes the optimizer and returns a scheduler, because the Trainer prepares the optimizer first. "
        f"Pass for example `lambda optimizer: {name}(optimizer, ...)` or `functools.partial({name}, ...)`."
    )


def check_trainable(model: Any, loss_func: Any, optimizer: Any) -> None:
    """Raise unless there is an optimizer, something it may train, and both belong together.

    Stand-ins that are no modules or optimizers of PyTorch are not looked into.

    Raises:
        ValueError: No optimizer, only frozen parameters, or an optimizer of other parameters.
    """
    if optimizer is None:
        raise ValueError(
            "`optimizer` is None, so nothing can be trained. Pass an optimizer, such as "
            "`torch.optim.AdamW(model.parameters())`, to the Trainer; without one only `evaluate` works."
        )
    if not isinstance(model, nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
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
            "Was it made for another model, or before the model was replaced or copied? "
            "Make it anew from `model.parameters()`."
        )


def check_data_not_empty(name: str, data: Any) -> None:
    """Raise if a dataset is known to hold nothing.

    Raises:
        ValueError: It is empty, or missing.
        TypeError: It is no dataset at all.
    """
    if data is None:
        raise ValueError(f"`{name}` is None. Expected a dataset, or an iterable of batches.")
    if not hasattr(data, "__getitem__") and not hasattr(data, "__iter__"):
        raise TypeError(f"`{name}` is of type {type(data).__name__}. Expected a dataset, or an iterable of batches.")
    if isinstance(data, (Dataset, Sequence, DataLoader)) and num_batches_of(data) == 0:
        raise ValueError(
            f"`{name}` is empty: its length is 0. Expected at least one sample; check how it was made or filtered."
        )


def check_reiterable(name: str, data: Any, num_epochs: int, max_num_train_steps: int | None) -> None:
    """Raise if data that can be walked through once is needed in several epochs.

    Raises:
        ValueError: It is an iterator, such as a generator, and only the number of epochs bounds the run.
    """
    is_iterator = hasattr(data, "__next__") and not is_dataset(data)
    if is_iterator and num_epochs > 1 and max_num_train_steps is None:
        raise ValueError(
            f"`{name}` is an iterator ({type(data).__name__}), which has nothing left after the first of {num_epochs} "
            "epochs. Pass an object whose `__iter__` starts anew, such as a list or an `IterableDataset`; or use "
            "`num_epochs=1`."
        )


def check_loader_not_empty(name: str, loader: Any) -> None:
    """Raise if the loader of a real dataset gives no batch at all.

    Raises:
        ValueError: There would be no batch in an epoch.
    """
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, (Dataset, Sequence)) or num_batches_of(loader) != 0:
        return
    raise ValueError(
        f"The loader of `{name}` gives no batch: {num_batches_of(dataset)} samples do not fill one batch of "
        f"{getattr(loader, 'batch_size', None)} and `drop_last` is set. "
        "Use a smaller `per_device_batch_size`, or `drop_last=False`."
    )


def raise_bad_batch_output(batch_output: Any, hook: str) -> NoReturn:
    """Explain what is wrong with the return value of a step.

    Raises:
        TypeError: It is no mapping.
        ValueError: ``loss`` or ``batch_size`` is missing.
    """
    needed = "Return a dictionary with `loss` (a scalar tensor) and `batch_size` (the number of samples)."
    if not isinstance(batch_output, Mapping):
        raise TypeError(f"`{hook}` returned {batch_output!r}, of type {type(batch_output).__name__}. {needed}")
    missing = [f"`{name}`" for name in ("loss", "batch_size") if name not in batch_output]
    present = sorted(map(str, batch_output))
    raise ValueError(f"{' and '.join(missing)} missing in what `{hook}` returned, {present}. {needed}")


def check_is_one_number(loss: Any) -> None:
    """Raise if a loss is ``None``, or a tensor of several elements.

    Raises:
        TypeError: It is ``None``.
        ValueError: It has several elements.
    """
    if loss is None:
        raise TypeError("The loss is None. Expected a tensor of one element; does the step return what it computes?")
    if isinstance(loss, torch.Tensor) and loss.numel() != 1:
        raise ValueError(
            f"The loss has the shape {tuple(loss.shape)}. Expected one number: reduce it, for example with `.mean()`."
        )


def raise_bad_loss(loss: Any, error: Exception) -> NoReturn:
    """Explain why no gradient could be computed, or pass the error on if the loss is not to blame.

    Raises:
        TypeError: The loss is no tensor.
        ValueError: The loss has more than one element, or no gradient.
        Exception: ``error`` itself.
    """
    if not isinstance(loss, torch.Tensor):
        raise TypeError(
            f"The loss is {loss!r}, of type {type(loss).__name__}. Expected a tensor that depends on the model's "
            "parameters; do not call `.item()` or `float()` on it."
        ) from error
    check_is_one_number(loss)
    if not loss.requires_grad:
        raise ValueError(
            "The loss does not depend on any parameter that has `requires_grad`, so there is no gradient. Was it "
            "computed under `torch.no_grad()`, detached, or made from the outputs of frozen layers only?"
        ) from error
    raise error
