"""The default step: the loss of a batch, its predictions, and what a step has to return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import NoReturn, ParamSpec, TypeVar

import torch

from pytorch_accelerated._arguments.parts import check_loss_func
from pytorch_accelerated._data.workers import is_worker_failure
from pytorch_accelerated._measuring.comparison import one_number
from pytorch_accelerated._messages import warn
from pytorch_accelerated._tensors.batch_size import LABEL_NAMES, size_of_batch, size_of_pair
from pytorch_accelerated._tensors.nested import named_items, outline_of_arguments
from pytorch_accelerated._types import Batch, BatchOutput, LossFunction, ModelOutput, Nested
from pytorch_accelerated.exceptions import add_note

P = ParamSpec("P")
Result = TypeVar("Result")

_REMEDY_FOR_OUTPUTS = (
    "A loss function is called with all that the model returns. To use a part of it, pass a loss function that takes "
    "it from there, or override `calculate_train_batch_loss` and `calculate_eval_batch_loss`."
)
_REMEDY_FOR_BATCH = (
    "Because `loss_func` is None, the model is called with all items of a batch, and must return its loss. Otherwise, "
    "pass a `loss_func`."
)


def batch_loss(model: Callable[..., ModelOutput], loss_func: LossFunction | None, batch: Batch) -> BatchOutput:
    """Compute the loss of a batch.

    Args:
        model: The model.
        loss_func: The loss function, or ``None`` if the model returns its loss.
        batch: A pair of inputs and targets, with a warning if it has more items; without a loss function, whatever the
            model takes.

    Returns:
        ``loss``, ``model_outputs`` and ``batch_size``, the length of the first dimension of the targets.

    Raises:
        TypeError: There is a loss function, but the batch is not a pair, or it is a class.
        ValueError: There is no loss function, and the model returned no loss.
    """
    if loss_func is None:
        return _loss_of_model(model, batch)
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        _check_pair(batch)
    inputs, targets = batch[0], batch[1]
    model_outputs = call_model(model, inputs)
    try:
        loss = loss_func(model_outputs, targets)
    except Exception as error:
        check_loss_func(loss_func)
        _note_arguments(error, "The loss function", model_outputs, targets)
        if not isinstance(model_outputs, torch.Tensor):
            add_note(error, _REMEDY_FOR_OUTPUTS)
        raise
    is_plain = isinstance(targets, torch.Tensor) and targets.ndim > 0
    batch_size = targets.size(0) if is_plain else size_of_pair(inputs, targets)
    return {"loss": loss, "model_outputs": model_outputs, "batch_size": batch_size}


def _check_pair(batch: Batch) -> None:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TypeError(
            f"The batch is a {type(batch).__name__}. With a loss function, a batch must be a pair of inputs and "
            "targets. Override `calculate_train_batch_loss` and `calculate_eval_batch_loss` to use other batches, or "
            "pass `loss_func=None` if the model returns its loss."
        )
    warn(
        f"The batch has {len(batch)} items, of which only the first two are used: the first is the input of the model, "
        "the second the target of the loss function. To use the others, override `calculate_train_batch_loss` and "
        "`calculate_eval_batch_loss`; otherwise, leave them out of the dataset.",
    )


def _loss_of_model(model: Callable[..., ModelOutput], batch: Batch) -> BatchOutput:
    if is_dataclass(batch) and not isinstance(batch, type):
        batch = {field.name: getattr(batch, field.name) for field in fields(batch)}
    if isinstance(batch, Mapping):
        model_outputs = call_model(model, **batch)
    else:
        items = batch if isinstance(batch, (tuple, list)) else [batch]
        try:
            model_outputs = call_model(model, *items)
        except TypeError as error:
            add_note(error, _REMEDY_FOR_BATCH)
            raise
    loss = getattr(model_outputs, "loss", None)
    if loss is None and isinstance(model_outputs, Mapping):
        loss = model_outputs.get("loss")
    if loss is None:
        raise ValueError(
            f"The model returned a {type(model_outputs).__name__} without a loss. Because `loss_func` is None, the "
            "model must return its loss as `outputs.loss` or `outputs['loss']`. Check that the batch holds the labels, "
            "or pass a `loss_func`."
        )
    return {"loss": loss, "model_outputs": model_outputs, "batch_size": size_of_batch(batch)}


def predictions(model: Callable[..., ModelOutput], batch: Batch) -> ModelOutput:
    """Call a model with the inputs of a batch: all of a mapping, the first item of a tuple or list, or the batch."""
    if isinstance(batch, Mapping):
        return call_model(model, **batch)
    return call_model(model, batch[0] if isinstance(batch, (tuple, list)) else batch)


def call_model(model: Callable[P, Result], /, *args: P.args, **kwargs: P.kwargs) -> Result:
    """Call a model; if it fails, note the types and shapes of its arguments on the error."""
    try:
        return model(*args, **kwargs)
    except Exception as error:
        _note_arguments(error, "The model", *args, **kwargs)
        raise


def _note_arguments(error: Exception, name: str, /, *args: Nested, **kwargs: Nested) -> None:
    if not is_worker_failure(error):
        add_note(error, f"{name} was called with {outline_of_arguments(args, kwargs)}")


# --- what metrics are computed from ---------------------------------------------------------------------------------


def metric_inputs(batch: Batch, batch_output: BatchOutput) -> tuple[ModelOutput, Nested]:
    """Return what the metrics of a trainer are called with by default: the model's outputs, and the targets.

    Raises:
        ValueError: The step returned no outputs, or the batch has no targets.
    """
    if "model_outputs" not in batch_output:
        raise ValueError(
            f"The step returned no `model_outputs`, which the metrics are computed from, but {sorted(batch_output)}. "
            "Return what the model has returned under this name, or override `get_metric_inputs`."
        )
    outputs = batch_output["model_outputs"]
    if not isinstance(outputs, torch.Tensor):
        named = named_items(outputs)
        if named is not None and "logits" in named:
            outputs = named["logits"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return outputs, batch[1]
    remedy = "Use data with targets, or override `get_metric_inputs`."
    return outputs, targets_of(batch, "The Trainer has `metrics`", remedy)


def targets_of(batch: Batch, reason: str, remedy: str) -> Nested:
    """Return the targets of a batch: its second item, or the entry that has one of their usual names.

    Args:
        batch: The batch.
        reason: Why targets are needed, for the message.
        remedy: What to do if there are none.

    Raises:
        ValueError: It has none.
    """
    named = named_items(batch)
    if named is not None:
        for name in LABEL_NAMES:
            if name in named:
                return named[name]
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[1]
    shown = f"a {type(batch).__name__}" + ("" if named is None else f" with {list(named)}")
    raise ValueError(
        f"{reason}, but no targets were found in a batch, which is {shown}. Expected a pair of inputs and targets, or "
        f"one of the entries {list(LABEL_NAMES)}. {remedy}"
    )


# --- what a step returns -----------------------------------------------------------------------------------------


def read_batch_output(
    batch_output: BatchOutput | torch.Tensor, hook: str, may_have_several_losses: bool = False
) -> tuple[float | torch.Tensor, int]:
    """Return the weight and the size of a batch.

    Args:
        batch_output: What the step returned.
        hook: The method that returned it, for the message.
        may_have_several_losses: Whether the loss may have more than one element, as in an evaluation.

    Returns:
        The number of items that the loss is the mean over (tokens, if the step says so, otherwise samples), and the
        number of samples.

    Raises:
        TypeError: It is not a mapping, the loss is ``None``, or the weight or the size is not a single number.
        ValueError: ``loss`` or ``batch_size`` is missing, or the loss is not a single number.
    """
    if isinstance(batch_output, torch.Tensor):  # which PyTorch would warn about before it refuses the index
        _raise_bad_batch_output(batch_output, hook)
    try:
        loss, batch_size = batch_output["loss"], batch_output["batch_size"]
    except (KeyError, TypeError, IndexError):
        _raise_bad_batch_output(batch_output, hook)
    if loss is None or (isinstance(loss, torch.Tensor) and loss.numel() != 1):
        _check_losses(loss, may_have_several_losses)
    weight = batch_output.get("num_items_in_batch")
    if weight is None:
        weight = batch_size
    if weight.__class__ is not int or batch_size.__class__ is not int:
        batch_size = _as_number("batch_size", batch_size)
        weight = _as_number("num_items_in_batch", weight)
    return weight, int(batch_size)


def _as_number(name: str, value: object) -> float | torch.Tensor:
    number = value if isinstance(value, int) else one_number(value)
    if number is None:
        raise TypeError(
            f"A step returned `{name}` as {value!r}, of type {type(value).__name__}. Expected a single number."
        )
    return number


def _check_losses(loss: torch.Tensor | None, may_be_several: bool) -> None:
    if loss is None or loss.numel() == 0 or not may_be_several:
        _raise_not_one_number(loss)


def mean_loss(loss: float | torch.Tensor) -> float | torch.Tensor:
    """Return the loss of an evaluation batch as a single number: the mean of its elements."""
    return loss.mean() if isinstance(loss, torch.Tensor) and loss.numel() != 1 else loss


def _raise_bad_batch_output(batch_output: object, hook: str) -> NoReturn:
    needed = "Return a dictionary with `loss` (a scalar tensor) and `batch_size` (the number of samples)."
    if not isinstance(batch_output, Mapping):
        raise TypeError(f"`{hook}` returned {batch_output!r}, of type {type(batch_output).__name__}. {needed}")
    missing = [f"`{name}`" for name in ("loss", "batch_size") if name not in batch_output]
    present = sorted(map(str, batch_output))
    raise ValueError(f"`{hook}` returned a dictionary without {' and '.join(missing)}; it has {present}. {needed}")


def _raise_not_one_number(loss: torch.Tensor | None) -> NoReturn:
    if loss is None:
        raise TypeError("The loss is None. Expected a tensor with one element; does the step return what it computes?")
    raise ValueError(
        f"The loss has the shape {tuple(loss.shape)}. Expected a single number. Reduce it, for example with `.mean()`."
    )


def raise_bad_loss(loss: object, error: Exception) -> NoReturn:
    """Explain why no gradient could be computed, or raise the error again if the loss is not to blame.

    Raises:
        TypeError: The loss is not a tensor.
        ValueError: The loss has more than one element, or no gradient.
        Exception: ``error`` itself.
    """
    if not isinstance(loss, torch.Tensor):
        raise TypeError(
            f"The loss is {loss!r}, of type {type(loss).__name__}. Expected a tensor that depends on the model's "
            "parameters. Do not call `.item()` or `float()` on it."
        ) from error
    if loss.numel() != 1:
        _raise_not_one_number(loss)
    if not loss.requires_grad:
        raise ValueError(
            "The loss does not depend on any parameter that has `requires_grad`, so there is no gradient. Check if "
            "it was computed under `torch.no_grad()`, was detached, or comes from the outputs of frozen layers only."
        ) from error
    raise error
