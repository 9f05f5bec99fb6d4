"""The short way of a step, past what Accelerate works out anew each time although it stays the same in a run.

At each step Accelerate asks which packages are installed, which kind of training this is and which arguments a method
takes. On a small model that takes longer than the model. Where the answers are known to make no difference, the classes
here do what is left of it: the same operations in the same order, so the numbers are the same bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch
from accelerate import Accelerator, DistributedType
from accelerate.data_loader import DataLoaderShard
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim import optimizer as _optimizer
from torch.utils.data import dataloader

from pytorch_accelerated._data.in_memory import whole_batches_of
from pytorch_accelerated._data.loaders import is_stream, mark_last
from pytorch_accelerated._data.workers import defer_worker_errors
from pytorch_accelerated._nested import move_to_device, tensors_in

_PLAIN_TYPES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


_PLAIN_PRECISIONS = ("no", "bf16", "fp16")


_P = ParamSpec("_P")


_T = TypeVar("_T")


_NO_STEP_PACKAGE = "lomo_optim"  # its optimizers update the parameters in the backward pass


_PYTORCHS_ITERATORS = (dataloader._SingleProcessDataLoaderIter, dataloader._MultiProcessingDataLoaderIter)


_PROFILED_STEP = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__


_is_profiler_on = torch.autograd._profiler_enabled  # type: ignore[attr-defined]


def can_use_fast_path(accelerator: Any) -> bool:
    """Tell whether the backward pass is ``loss.backward()`` and no more: one process or DDP, and no gradient scaler."""
    return (
        type(accelerator) is Accelerator
        and "backward" not in vars(accelerator)
        and accelerator.distributed_type in _PLAIN_TYPES
        and accelerator.mixed_precision in _PLAIN_PRECISIONS
        and accelerator.scaler is None
    )


def choose_no_sync(accelerator: Any, model: Any, can_use_fast_path: bool) -> Callable[[], AbstractContextManager[Any]]:
    """Return what makes the contexts that keep DDP from exchanging gradients while batches accumulate."""
    return getattr(model, "no_sync", nullcontext) if can_use_fast_path else partial(accelerator.no_sync, model)


def call_without_gradients(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call a function as under `torch.no_grad`, by what that comes down to: a third of its time."""
    outer = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)
    try:
        return function(*args, **kwargs)
    finally:
        torch._C._set_grad_enabled(outer)


class FastPathOptimizer(AcceleratedOptimizer):  # type: ignore[misc]  # Accelerate has no types
    """An optimizer as Accelerate prepares it, for runs that are `can_use_fast_path`.

    Its state is only copied if it lies on another device; Accelerate copies it at the start of each run.

    Args:
        optimizer: The optimizer to wrap.
        device: Where its state belongs; ``None`` to leave it where it is.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device | None) -> None:
        super().__init__(optimizer, device_placement=device is not None and _has_state_elsewhere(optimizer, device))
        zero_grad = getattr(optimizer.zero_grad, "__func__", None)
        self._discards_as_pytorch = zero_grad is torch.optim.Optimizer.zero_grad

    def step(self, closure: Any = None) -> None:
        """Update the parameters, unless more batches accumulate."""
        if not self.gradient_state.sync_gradients:
            return
        bare_step = _bare_step(self.optimizer) if closure is None else None
        if bare_step is None:
            self.optimizer.step(closure)
        else:
            bare_step(self.optimizer)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Discard the gradients, unless more batches accumulate."""
        if set_to_none is False or not self._discards_as_pytorch or _is_profiler_on():
            super().zero_grad(set_to_none)
        elif self.gradient_state.sync_gradients:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None


def wrap_optimizer(accelerator: Accelerator, optimizer: Any) -> Any:
    """Return an optimizer of PyTorch ready for runs that are `can_use_fast_path`, and anything else as it is."""
    is_plain = isinstance(optimizer, torch.optim.Optimizer) and not getattr(optimizer, "_is_accelerate_prepared", False)
    if not is_plain or type(optimizer).__module__.startswith(_NO_STEP_PACKAGE):
        return optimizer
    direct = FastPathOptimizer(optimizer, accelerator.device if accelerator.device_placement else None)
    direct._is_accelerate_prepared = True
    return direct


def _bare_step(optimizer: Any) -> Callable[[Any], Any] | None:
    """Return an optimizer's step without what PyTorch puts around it, if that would do nothing else now.

    PyTorch opens a range for its profiler at each step, which takes as long as the step itself on a small model,
    whether a profiler runs or not, and calls the hooks. A scheduler of PyTorch notes that there was a step.
    """
    step, replaced = type(optimizer).step, vars(optimizer).get("step")
    by_scheduler = getattr(replaced, "_wrapped_by_lr_sched", False)
    is_known = getattr(step, "__code__", None) is _PROFILED_STEP and (
        replaced is None or (by_scheduler and replaced.__wrapped__ is step)
    )
    if not is_known or _is_profiler_on() or _has_step_hooks(optimizer):
        return None
    if by_scheduler:
        optimizer._opt_called = True
    return step.__wrapped__  # type: ignore[no-any-return]


def _has_step_hooks(optimizer: Any) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _optimizer._global_optimizer_pre_hooks
        or _optimizer._global_optimizer_post_hooks
    )


def _has_state_elsewhere(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    # Numbers of steps stay on the host, where the optimizer reads them.
    states = [state for state in optimizer.state.values() if isinstance(state, dict)]
    return any(tensor.ndim > 0 and not _is_on(tensor, device) for state in states for tensor in tensors_in(state))


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


class FastPathLoader(DataLoaderShard):  # type: ignore[misc]  # Accelerate has no types
    """A loader as Accelerate prepares it, whose batches reach the device while the one before is trained on.

    Takes the arguments of `accelerate.data_loader.DataLoaderShard`.
    """

    def __iter__(self) -> Iterator[Any]:
        self.begin()
        try:
            for batch, is_last in self._transferred(_batches_of(self.base_dataloader)):
                self.end_of_dataloader = is_last
                yield batch
            self.iteration += 1
        finally:
            self.end()

    def _transferred(self, batches: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        if self.device is None or self.device.type == "cpu":
            return mark_last(batches)
        if self.device.type == "cuda":
            return _prefetch_to_device(batches, self.device)
        return mark_last(move_to_device(batch, self.device) for batch in batches)


def _batches_of(loader: Any) -> Iterator[Any]:
    whole_batches = whole_batches_of(loader)
    if whole_batches is not None:
        return whole_batches
    iterator = iter(loader)
    is_known = type(iterator) in _PYTORCHS_ITERATORS and not is_stream(loader)
    return _without_ranges(iterator) if is_known else iterator


def _without_ranges(iterator: Any) -> Iterator[Any]:
    """Yield the batches of a loader of PyTorch without a range for its profiler around each, unless one runs."""
    try:
        while True:
            try:
                if _is_profiler_on():
                    batch = next(iterator)
                else:
                    batch = iterator._next_data()
                    iterator._num_yielded += 1
            except StopIteration:
                return
            yield batch
    finally:
        if iterator._num_workers > 0 and not iterator._persistent_workers:
            with defer_worker_errors():  # each end of a worker makes PyTorch raise the death of another anew
                iterator._shutdown_workers()


def _prefetch_to_device(batches: Iterator[Any], device: torch.device) -> Iterator[tuple[Any, bool]]:
    """Copy each batch on a CUDA stream of its own while the device computes, and let what uses the copy wait for it.

    The host waits for nothing, given that the batches are in pinned memory.
    """
    beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start_copy(batch: Any) -> tuple[Any, torch.cuda.Event]:
        # What is queued so far may still read the memory of batches that the host has let go.
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            return move_to_device(batch, device, non_blocking=True), beside.record_event()

    for (batch, is_there), is_last in mark_last(map(start_copy, batches)):
        torch.cuda.current_stream(device).wait_event(is_there)
        yield batch, is_last
