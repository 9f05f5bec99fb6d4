"""What a run says of a loss, a gradient or a parameter that is NaN or infinite."""

from __future__ import annotations

import torch
from torch import nn


def describe_non_finite_loss(loss: float, place: str) -> str:
    """Say that a loss is not finite, where, and what to do about it.

    Args:
        loss: NaN or an infinity.
        place: Where it occurred, such as ``" in training, epoch 1, step 5, rank 0"``.
    """
    return (
        f"The loss is {loss}{place}. Try a lower learning rate, gradient clipping or a warm-up, and check the data for "
        "invalid values; `torch.autograd.set_detect_anomaly(True)` finds the operation. To continue regardless, remove "
        "`TerminateOnNaNCallback`."
    )


def describe_non_finite_gradient(model: nn.Module, place: str) -> str:
    """Say that a gradient is not finite, where, and what to do about it.

    Args:
        model: The model.
        place: Where it occurred, such as ``" in training, epoch 1, rank 0"``.
    """
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    bad = [name for name, gradient in gradients.items() if not torch.isfinite(gradient.to_dense()).all()]
    name = f"`{bad[0]}`" if bad else "a parameter outside the model"
    others = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
    return (
        f"The gradient of {name}{others} is NaN or infinite{place}, although the loss is finite. Parameters and "
        "optimizer are unchanged. The derivative of some operation is infinite, such as that of a square root at 0; "
        "`torch.autograd.set_detect_anomaly(True)` finds it. To continue regardless, remove `TerminateOnNaNCallback`."
    )


def describe_non_finite_parameters(place: str) -> str:
    """Say that a parameter is not finite, where, and what to do about it."""
    return (
        f"A parameter of the model is NaN or infinite{place}, although the losses so far are finite: the gradient of "
        "the last update was not finite. Resume from the last training state with gradient clipping or a lower "
        "learning rate; `torch.autograd.set_detect_anomaly(True)` finds the operation. To continue regardless, remove "
        "`TerminateOnNaNCallback`."
    )
