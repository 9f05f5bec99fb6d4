"""The fast path: skip what Accelerate looks up at each step although it stays constant during a run.

At each step, Accelerate checks which packages are installed, asks for the kind of training and inspects signatures.
With a small model, this takes longer than the model. The classes here are for runs in which the answers make no
difference. They run the remaining operations in the same order, so all numbers are bit-identical.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.data_loader import DataLoaderShard, SkipBatchSampler
from accelerate.optimizer import AcceleratedOptimizer
from torch.utils.data import DataLoader

from pytorch_accelerated._data.determinism import SeededStream
from pytorch_accelerated._data.in_memory import whole_batches_of
from pytorch_accelerated._data.loaders import loader_settings, mark_last
from pytorch_accelerated._data.sharding import ShardedBatches, ShardedBatchSampler, Sharding
from pytorch_accelerated._data.workers import iterate
from pytorch_accelerated._distributed.precision import IndependentAccelerator
from pytorch_accelerated._distributed.registry import AcceleratorRegistry
from pytorch_accelerated._optimizers.group import ByName, OptimizerGroup, optimizers_in
from pytorch_accelerated._tensors.nested import move_to_device, tensors_in
from pytorch_accelerated._types import Batch

_SUPPORTED_TYPES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_SUPPORTED_PRECISIONS = ("no", "bf16", "fp16")
_LOMO_PACKAGE = "lomo_optim"  # its optimizers update the parameters in the backward pass; their step is a no-op


def can_use_fast_path(accelerator: Accelerator) -> bool:
    """Tell whether `Accelerator.backward` is just ``loss.backward()``: one process or DDP, without gradient scaler."""
    return (
        type(accelerator) in (Accelerator, IndependentAccelerator)
        and "backward" not in vars(accelerator)
        and accelerator.distributed_type in _SUPPORTED_TYPES
        and accelerator.mixed_precision in _SUPPORTED_PRECISIONS
        and accelerator.scaler is None
    )


def choose_no_sync(
    accelerator: Accelerator, model: torch.nn.Module, uses_fast_path: bool
) -> Callable[[], AbstractContextManager[object]]:
    """Return a factory of contexts in which DDP does not all-reduce gradients, for batches that only accumulate."""
    return getattr(model, "no_sync", nullcontext) if uses_fast_path else partial(accelerator.no_sync, model)


class FastPathOptimizer(AcceleratedOptimizer):  # type: ignore[misc]  # Accelerate has no types
    """An `AcceleratedOptimizer` for runs on the fast path: `step` and `zero_grad` go straight to the wrapped optimizer.

    Accelerate copies the optimizer's state at the start of each run; this class does so only if the state is on another
    device.

    Args:
        optimizer: The optimizer to wrap.
        device: Where its state belongs; ``None`` to leave it where it is.
        scaler: The gradient scaler; ``None`` on the fast path.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device | None, scaler: Any = None) -> None:
        needs_moving = device is not None and _has_state_elsewhere(optimizer, device)
        super().__init__(optimizer, device_placement=needs_moving, scaler=scaler)
        has_option = "set_to_none" in inspect.signature(optimizer.zero_grad).parameters
        self._zero_grad_kwargs = {"set_to_none": True} if has_option else {}

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update the parameters, unless this batch only accumulates."""
        if self.gradient_state.sync_gradients:
            self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Discard the gradients, unless this batch only accumulates."""
        if set_to_none is not None:
            super().zero_grad(set_to_none)
        elif self.gradient_state.sync_gradients:
            self.optimizer.zero_grad(**self._zero_grad_kwargs)


class PreparedGroup(ByName, FastPathOptimizer):
    """A prepared group of optimizers, which is used by names or indices like the group. Accelerate's wrapper is not.

    A gradient scaler scales, checks and skips all of them together.
    """

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update the parameters, unless this batch only accumulates, or the scaler found infinite gradients."""
        if self.scaler is None:
            super().step(closure)
        else:
            AcceleratedOptimizer.step(self, closure)

    @property
    def optimizers(self) -> dict[Any, torch.optim.Optimizer]:  # type: ignore[override]
        """The optimizers by name, or by index."""
        optimizers: dict[Any, torch.optim.Optimizer] = self.optimizer.optimizers
        return optimizers

    @property
    def is_named(self) -> bool:  # type: ignore[override]
        """Whether they were given in a dictionary."""
        return bool(self.optimizer.is_named)


def wrap_optimizer(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer | None, *, uses_fast_path: bool = True
) -> torch.optim.Optimizer | None:
    """Return a PyTorch optimizer ready for the run; prepared optimizers and other objects as they are.

    Args:
        accelerator: Has the device and the gradient scaler.
        optimizer: The optimizer, or a group.
        uses_fast_path: Whether the run can use the fast path; otherwise, a single optimizer is left to Accelerate.
    """
    if not isinstance(optimizer, torch.optim.Optimizer) or AcceleratorRegistry.is_prepared(optimizer):
        return optimizer
    if any(type(each).__module__.startswith(_LOMO_PACKAGE) for each in optimizers_in(optimizer).values()):
        return optimizer
    device = accelerator.device if accelerator.device_placement else None
    if isinstance(optimizer, OptimizerGroup):
        wrapped: FastPathOptimizer = PreparedGroup(optimizer, device, accelerator.scaler)
    elif uses_fast_path:
        wrapped = FastPathOptimizer(optimizer, device)
    else:
        return optimizer
    AcceleratorRegistry.mark_as_prepared(wrapped)
    return wrapped


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer without the wrapper that Accelerate or this module has put around it."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _has_state_elsewhere(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    # Scalars, such as step counts, stay on the host, where the optimizer reads them.
    states = [state for state in optimizer.state.values() if isinstance(state, dict)]
    return any(tensor.ndim > 0 and not _is_on(tensor, device) for state in states for tensor in tensors_in(state))


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


class FastPathLoader(DataLoaderShard):  # type: ignore[misc]  # Accelerate has no types
    """A loader like those that Accelerate prepares, whose next batch reaches the device during the current step.

    It is built before Accelerate prepares the objects of a run, and a subclass of the trainer may prepare nothing.
    Until `activate` is called, it therefore yields what a plain `DataLoader` does: all batches, where they were loaded.

    Takes the arguments of `accelerate.data_loader.DataLoaderShard`.
    """

    @property
    def sharding(self) -> Sharding | None:
        """The sampler, or batch sampler, if it shards the data over several ranks."""
        base = self.base_dataloader
        sampler = base.sampler if base.batch_sampler is None else base.batch_sampler
        return sampler if isinstance(sampler, Sharding) else None

    def __len__(self) -> int:
        dataset = self.base_dataloader.dataset
        return dataset.count_batches() if isinstance(dataset, SeededStream) else len(self.base_dataloader)

    def activate(self) -> None:
        """Shard the batches and move them to the device. `Accelerator.prepare` then leaves the loader as it is."""
        AcceleratorRegistry.mark_as_prepared(self)
        if isinstance(self.sharding, (ShardedBatchSampler, ShardedBatches)):
            self.sharding.activate()

    def skip_first(self, num_batches: int) -> FastPathLoader:
        """Return a loader for the rest of an epoch, which does not load the first batches."""
        base = self.base_dataloader
        settings = loader_settings(base) | {"persistent_workers": False}  # it serves one epoch
        order = SkipBatchSampler(base.batch_sampler, num_batches)
        rest = self._create(base.dataset, batch_sampler=order, **settings)
        rest.iteration = self.iteration  # as an argument, it is unknown to older versions of Accelerate

        if AcceleratorRegistry.is_prepared(self):
            rest.activate()
        return rest

    def _create(self, dataset: Any, **kwargs: Any) -> FastPathLoader:
        """Return a loader of the same kind."""
        return type(self)(dataset, self.device, **kwargs)

    def __iter__(self) -> Iterator[Batch]:
        is_active = AcceleratorRegistry.is_prepared(self)
        return self._iterate_on_device() if is_active else iterate(self.base_dataloader)

    def _iterate_on_device(self) -> Iterator[Batch]:
        self.begin()
        try:
            for batch, is_last in self._transferred(self._read()):
                self.end_of_dataloader = is_last
                yield batch
            self.iteration += 1
        finally:
            self.end()

    def _read(self) -> Iterator[Batch]:
        """Return the batches of an epoch, before they are moved to the device."""
        return batches_of(self.base_dataloader)

    def _transferred(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
        if self.device is None or self.device.type == "cpu":
            return mark_last(batches)
        if self.device.type == "cuda":
            return _prefetch_to_device(batches, self.device)
        return mark_last(move_to_device(batch, self.device) for batch in batches)


def batches_of(loader: DataLoader[Any]) -> Iterator[Batch]:
    """Return the batches of an epoch, without the overhead of a `DataLoader` where that makes no difference."""
    whole_batches = whole_batches_of(loader)
    return iterate(loader) if whole_batches is None else whole_batches


def _prefetch_to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[tuple[Batch, bool]]:
    """Copy each batch on a separate CUDA stream while the device computes. Its consumers wait for the copy.

    The host never waits, if the batches are in pinned memory.
    """
    copy_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start_copy(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        # Operations queued so far may still read the memory of batches that the host has released.
        copy_stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copy_stream):
            return move_to_device(batch, device, non_blocking=True), copy_stream.record_event()

    for (batch, is_copied), is_last in mark_last(map(start_copy, batches)):
        torch.cuda.current_stream(device).wait_event(is_copied)
        yield batch, is_last
