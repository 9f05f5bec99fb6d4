"""The default step: the loss of a batch, or its predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from pytorch_accelerated._data.workers import is_worker_failure
from pytorch_accelerated._nested import find_batch_size, rebuild
from pytorch_accelerated._validation import check_is_one_number, raise_bad_batch_output
from pytorch_accelerated.exceptions import add_note


def model_outputs(model: Any, batch: Any) -> Any:
    """Call a model with the inputs of a batch: all of a mapping, the first item of a tuple or list, or the batch."""
    if isinstance(batch, Mapping):
        return call_model(model, **batch)
    return call_model(model, batch[0] if isinstance(batch, (tuple, list)) else batch)


_LONGEST_NOTE = 400  # characters


def batch_loss(model: Callable[..., Any], loss_func: Callable[..., Any] | None, batch: Any) -> dict[str, Any]:
    """Compute the loss of a batch.

    Args:
        model: The model.
        loss_func: The loss function, or ``None`` if the model returns its loss.
        batch: A pair of inputs and targets; without a loss function whatever the model takes.

    Returns:
        ``loss``, ``model_outputs`` and ``batch_size``.

    Raises:
        TypeError: The batch is no pair although there is a loss function.
        ValueError: There is no loss function, and the model returned no loss.
    """
    if loss_func is None:
        return _loss_of_model(model, batch)
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TypeError(
            f"The batch is a {type(batch).__name__}, but with a loss function it should be a pair of inputs and "
            "targets. Override `calculate_train_batch_loss` and `calculate_eval_batch_loss` to say what to do with it, "
            "or pass `loss_func=None` if the model returns its loss."
        )
    inputs, targets = batch[0], batch[1]
    model_outputs = call_model(model, inputs)
    return {
        "loss": _call("The loss function", loss_func, model_outputs, targets),
        "model_outputs": model_outputs,
        "batch_size": find_batch_size(inputs),
    }


def _loss_of_model(model: Callable[..., Any], batch: Any) -> dict[str, Any]:
    if is_dataclass(batch) and not isinstance(batch, type):
        batch = {field.name: getattr(batch, field.name) for field in fields(batch)}
    if isinstance(batch, Mapping):
        model_outputs = call_model(model, **batch)
    elif isinstance(batch, (tuple, list)):
        model_outputs = call_model(model, *batch)
    else:
        model_outputs = call_model(model, batch)
    loss = getattr(model_outputs, "loss", None)
    if loss is None and isinstance(model_outputs, Mapping):
        loss = model_outputs.get("loss")
    if loss is None:
        raise ValueError(
            "`loss_func` is None, so the model has to return its loss as `outputs.loss` or `outputs['loss']`; it "
            f"returned a {type(model_outputs).__name__} without one. Does the batch hold the labels? "
            "Otherwise pass a `loss_func`."
        )
    return {"loss": loss, "model_outputs": model_outputs, "batch_size": find_batch_size(batch)}


def call_model(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call a model; if it fails, the error tells by what arguments."""
    return _call("The model", model, *args, **kwargs)


def _call(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except Exception as error:
        if not is_worker_failure(error):
            with suppress(Exception):  # the user's types may fail to be copied or printed
                given = [*map(str, map(_outline, args)), *(f"{key}={_outline(kwargs[key])}" for key in kwargs)]
                add_note(error, f"{name} was called with {', '.join(given)}"[:_LONGEST_NOTE])
        raise


def _outline(value: Any) -> Any:
    """Return types and shapes in place of the tensors of a batch.

    Example:
        >>> _outline((torch.zeros(8, 4), [torch.arange(3), "cat"]))
        ('float32 (8, 4)', ['int64 (3,)', 'str'])
    """
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    outline = rebuild(value, _outline)
    return type(value).__name__ if outline is value else outline


def read_batch_output(batch_output: Any, hook: str) -> tuple[Any, int]:
    """Return the weight and the size of a batch.

    Args:
        batch_output: What the step returned.
        hook: The method that returned it, for the message.

    Returns:
        How many items the loss is the mean over: tokens, if the step says so, or samples; and the number of samples.

    Raises:
        TypeError: It is no mapping.
        ValueError: ``loss`` or ``batch_size`` is missing, or the loss is not one number.
    """
    if isinstance(batch_output, torch.Tensor):
        raise_bad_batch_output(batch_output, hook)
    try:
        loss = batch_output["loss"]
        batch_size = batch_output["batch_size"]
    except (KeyError, TypeError, IndexError):
        raise_bad_batch_output(batch_output, hook)
    check_is_one_number(loss)
    return batch_output.get("num_items_in_batch", batch_size), int(batch_size)
