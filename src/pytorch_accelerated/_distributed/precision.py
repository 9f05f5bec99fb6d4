"""Mixed precision: which one an accelerator gets, which one it really uses, and code that runs in it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import PrecisionType

from pytorch_accelerated._distributed.registry import AcceleratorRegistry
from pytorch_accelerated._messages import warn

SHARDED_TYPES = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)

_NOT_ON_CPU = ("fp16", "fp8")
_OTHER_NAMES = {
    **dict.fromkeys(("float16", "half", "16", "16-mixed", "torch.float16"), "fp16"),
    **dict.fromkeys(("bfloat16", "bf16-mixed", "torch.bfloat16"), "bf16"),
    **dict.fromkeys(("float32", "fp32", "32", "32-true", "torch.float32", "none", "false"), "no"),
}
_PRECISION_ENV_VAR, _CPU_ENV_VAR = "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"


class IndependentAccelerator(Accelerator):  # type: ignore[misc]  # Accelerate has no types
    """An accelerator with a precision of its own, whichever one this process already uses.

    All accelerators of a process share one state, and with it the precision of the first. This one has a state to
    itself, which is that of the process while Accelerate looks up the precision there.

    Args:
        **settings: See `accelerate.Accelerator`.
    """

    def __init__(self, **settings: Any) -> None:
        with AcceleratorRegistry.process_state_put_aside():
            super().__init__(**settings)
            AcceleratorRegistry(self).detach_state()

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare objects, the forward pass of models for this precision."""
        with AcceleratorRegistry(self).state_used_for_process():
            return super().prepare(*args, **kwargs)

    @contextmanager
    def autocast(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Run the body in this precision."""
        with ExitStack() as stack:
            with AcceleratorRegistry(self).state_used_for_process():
                stack.enter_context(super().autocast(*args, **kwargs))
            yield


def accelerator_in_precision(settings: Mapping[str, Any]) -> Accelerator:
    """Create an accelerator that computes in the precision that its settings ask for.

    Without one it is the configured precision, even if an earlier trainer of this process asked for another.

    Args:
        settings: Keyword arguments of `accelerate.Accelerator`.

    Raises:
        ValueError: The device does not have this precision, or the model is sharded and the process uses another one.
    """
    settings = dict(settings)
    _check_device_has_precision(settings)
    current = AcceleratorRegistry.process_precision()
    requested = settings.get("mixed_precision")
    if current in (None, requested or _configured_precision()):
        with AcceleratorRegistry.process_state_kept_on_error():
            accelerator = Accelerator(**settings)
        if current is None and requested is not None:
            AcceleratorRegistry.note_precision_of_trainer()
        return accelerator
    if _is_process_sharded():
        raise ValueError(
            f"`mixed_precision` is {requested!r}, but this process already uses {current!r}. With FSDP and DeepSpeed, "
            "all trainers of a process share one precision. Restart the process (in a notebook, the kernel), or omit "
            "`mixed_precision` to keep the current setting."
        )
    return IndependentAccelerator(**settings)


def take_state(accelerator: Accelerator, other: Accelerator) -> None:
    """Give an accelerator the state of another one, and with it its ranks, device and precision.

    Raises:
        ValueError: The precision is not that of the process, and the accelerator is of a class of the user's.
    """
    if isinstance(other, IndependentAccelerator) and not isinstance(accelerator, IndependentAccelerator):
        if type(accelerator) is not Accelerator:
            raise ValueError(
                f"The accelerator of the copied trainer, a `{type(accelerator).__name__}`, computes in "
                f"{accelerator.mixed_precision!r}, but this process already uses "
                f"{AcceleratorRegistry.process_precision()!r}. Only an `accelerate.Accelerator` itself can have a "
                "precision of its own. Copy the trainer into a new process."
            )
        accelerator.__class__ = IndependentAccelerator
    accelerator.state = other.state


def _configured_precision() -> str:
    """Return the precision of an accelerator that is created without one."""
    current = AcceleratorRegistry.process_precision()
    if current is not None and (_is_process_sharded() or not AcceleratorRegistry.has_precision_of_trainer()):
        return current
    return os.environ.get(_PRECISION_ENV_VAR, "").lower() or "no"


def _is_process_sharded() -> bool:
    return AcceleratorRegistry.process_type() in SHARDED_TYPES


def _check_device_has_precision(settings: dict[str, Any]) -> None:
    """Refuse a precision that the device does not have, before Accelerate records it for the whole process.

    One that comes from the configuration was perhaps meant for another machine: it is not used, with a warning.
    """
    requested, configured = settings.get("mixed_precision"), _configured_precision()
    if requested is not None and str(requested) not in PrecisionType.list():
        meant = _OTHER_NAMES.get(str(requested).lower())
        raise ValueError(
            f"`mixed_precision` is {requested!r}. Expected one of {PrecisionType.list()}, where 'no' means float32. "
            f"{f'Pass {meant!r}.' if meant else 'Pass one of these.'}"
        )
    if requested in _NOT_ON_CPU and _will_use_cpu(settings):
        raise ValueError(
            f"`mixed_precision` is {requested!r}, but this run uses a CPU, where Accelerate computes nothing in that "
            'precision. Pass "bf16", or "no" for float32, or run on a GPU.'
        )
    if requested is None and configured in _NOT_ON_CPU and _will_use_cpu(settings):
        _warn_about_precision(configured)
        settings["mixed_precision"] = "no"


def _will_use_cpu(settings: Mapping[str, Any]) -> bool:
    device = AcceleratorRegistry.process_device()
    if device is not None:
        return device.type == "cpu"
    is_requested = settings.get("cpu") or os.environ.get(_CPU_ENV_VAR, "").lower() in ("1", "true", "yes", "on")
    return bool(is_requested) or not torch.accelerator.is_available()


def precision_of(accelerator: Accelerator) -> str:
    """Return the precision that is really used, whatever the accelerator was created with."""
    precision: str = accelerator.mixed_precision
    is_unused = precision in _NOT_ON_CPU and accelerator.device.type == "cpu" and not accelerator.native_amp
    return "no" if is_unused else precision


def warn_about_unused_precision(accelerator: Accelerator) -> None:
    """Warn if the program has created an accelerator in a precision that the device does not have."""
    if isinstance(accelerator, Accelerator) and precision_of(accelerator) != accelerator.mixed_precision:
        _warn_about_precision(accelerator.mixed_precision)


def _warn_about_precision(precision: str) -> None:
    warn(
        f"Accelerate is configured with mixed_precision={precision!r}, but it uses a CPU, where it computes nothing in "
        "that precision: runs use float32."
    )
