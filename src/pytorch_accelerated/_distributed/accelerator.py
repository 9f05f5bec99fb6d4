"""Accelerators: create one, prepare the objects of a run with it, and take them back after the run."""

from __future__ import annotations

import atexit
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DDPCommunicationHookType, InitProcessGroupKwargs
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from pytorch_accelerated._data.build import Placement, shard_loader
from pytorch_accelerated._data.loaders import PlacedBatches, RestOfEpoch, is_shardable, showing_inner_arguments
from pytorch_accelerated._data.rng import derive_seed, seed_generators
from pytorch_accelerated._data.sharding import TrimmedDispatcher
from pytorch_accelerated._data.workers import shut_down_workers
from pytorch_accelerated._distributed.collectives import all_gather_objects, broadcast_from_main
from pytorch_accelerated._distributed.dispatch import DispatchedLoader
from pytorch_accelerated._distributed.fast_path import FastPathLoader, can_use_fast_path, wrap_optimizer
from pytorch_accelerated._distributed.lockstep import LocalBatches, LocalLoader
from pytorch_accelerated._distributed.precision import SHARDED_TYPES, accelerator_in_precision
from pytorch_accelerated._distributed.registry import AcceleratorRegistry
from pytorch_accelerated._distributed.restarts import init_method_of_restart
from pytorch_accelerated._distributed.waiting import PROCESS_TIMEOUT
from pytorch_accelerated._models.wrappers import without_compilation
from pytorch_accelerated._types import Loader, MaybeNone


def choose_seed(seed: int | None, process_index: int, num_processes: int) -> int:
    """Return the seed of a run, the same on every process. Must be called on every process.

    If another process was seeded with the same number as the main process, its generators are seeded again: dropout
    and augmentation should differ between processes.

    Args:
        seed: The user's seed; ``None`` for the one that the main process passed to ``torch.manual_seed``.
        process_index: The rank of this process.
        num_processes: The world size.
    """
    if seed is not None:
        return seed
    local_seed = torch.initial_seed()
    common_seed = broadcast_from_main(local_seed, num_processes)
    if process_index != 0 and local_seed == common_seed:
        seed_generators(derive_seed(common_seed, "rank", process_index))
    return common_seed


def create_accelerator(source: Accelerator | Mapping[str, Any] | None, mixed_precision: str | None) -> Accelerator:
    """Create an accelerator, or return the user's.

    Args:
        source: The user's accelerator, keyword arguments for a new one, or ``None``.
        mixed_precision: The precision to train in; ``None`` for the configured one.

    Raises:
        TypeError: ``source`` is something else.
        ValueError: The precision contradicts ``source`` or the device, or the compiler contradicts an accelerator
            created earlier in this process.
    """
    if source is not None and not isinstance(source, (Accelerator, Mapping)):
        raise TypeError(
            f"`accelerator` is a {type(source).__name__}. Expected an `accelerate.Accelerator`, or a dictionary of "
            "keyword arguments for one, such as `{'cpu': True}`."
        )
    settings = {"mixed_precision": source.mixed_precision} if isinstance(source, Accelerator) else dict(source or {})
    if mixed_precision is not None and settings.get("mixed_precision") not in (None, mixed_precision):
        raise ValueError(
            f"`mixed_precision` is {mixed_precision!r}, but the `accelerator` has {settings['mixed_precision']!r}. "
            "The two must agree: set the precision in one of these places only."
        )
    if isinstance(source, Accelerator):
        return source
    if mixed_precision is not None:
        settings["mixed_precision"] = mixed_precision
    _complete_settings(settings)
    accelerator = accelerator_in_precision(settings)
    _check_compiler(settings, accelerator)
    _leave_group_at_exit()
    return accelerator


def _check_compiler(settings: Mapping[str, Any], accelerator: Accelerator) -> None:
    plugin = settings.get("dynamo_plugin")
    backend = settings.get("dynamo_backend") if plugin is None else plugin.backend
    if backend is None:
        return
    requested, current = (
        str(getattr(one, "value", one)).upper() for one in (backend, accelerator.state.dynamo_plugin.backend)
    )
    if requested != current:
        raise ValueError(
            f"The `accelerator` is configured to compile with {requested!r}, but this process already uses "
            f"{current!r}. Accelerate has one setting for all accelerators of a process. Restart the process (in a "
            "notebook, the kernel), or pass `torch.compile(model, backend=...)` to the trainer instead."
        )


def _complete_settings(settings: dict[str, Any]) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        settings.setdefault("cpu", True)  # otherwise, each process would train separately
    handlers = list(settings.get("kwargs_handlers") or ())
    of_user = [handler for handler in handlers if isinstance(handler, InitProcessGroupKwargs)]
    others = [handler for handler in handlers if handler not in of_user]
    process_group = of_user[0] if of_user else InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)
    if process_group.init_method is None:
        process_group = replace(process_group, init_method=init_method_of_restart())
    settings["kwargs_handlers"] = [*others, process_group]


def _leave_group_at_exit() -> None:
    # A process that exits while it is in a gloo group is sometimes aborted: its work is done, but it reports a failure.
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        atexit.unregister(_leave_group)
        atexit.register(_leave_group)


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def disable_loss_scaling(accelerator: Accelerator, gradient_accumulation_steps: int) -> None:
    """Keep Accelerate from dividing losses by the accumulation steps, because the loop weighs each loss itself.

    With DeepSpeed this does nothing: its engine counts the accumulation steps.

    Args:
        accelerator: The accelerator.
        gradient_accumulation_steps: Batches per update of the run that starts.

    Raises:
        ValueError: The accelerator was created with another number.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return
    configured = accelerator.gradient_accumulation_steps
    if isinstance(configured, int) and configured not in (1, gradient_accumulation_steps):
        raise ValueError(
            f"The `accelerator` was created with gradient_accumulation_steps={configured}, but `train` was called with "
            f"{gradient_accumulation_steps}. The two must agree: pass `gradient_accumulation_steps` to `train` only."
        )
    accelerator.gradient_accumulation_steps = 1


def check_clipping(accelerator: Accelerator, clip_value: float | None, clip_norm: float | None) -> None:
    """Refuse clipping that Accelerate leaves to others, which would not be done.

    Args:
        accelerator: The accelerator.
        clip_value: Bound on the absolute value of each gradient entry, or ``None``.
        clip_norm: Bound on the total norm of all gradients, or ``None``.

    Raises:
        ValueError: Gradients cannot be clipped in this way.
    """
    if clip_value is not None and accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"`gradient_clip_value` is {clip_value!r}, but FSDP and DeepSpeed cannot clip gradients by value. Clip by "
            "norm: with FSDP, pass `gradient_clip_norm`; with DeepSpeed, set `gradient_clipping` in its configuration."
        )
    if clip_norm is None or accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    configured = accelerator.deepspeed_plugin.deepspeed_config.get("gradient_clipping")
    if configured != clip_norm:
        raise ValueError(
            f"`gradient_clip_norm` is {clip_norm!r}, but DeepSpeed clips gradients itself, and its `gradient_clipping` "
            f"is {configured!r}. Set `gradient_clipping` in the configuration of DeepSpeed, and omit "
            "`gradient_clip_norm`."
        )


def is_sharded(accelerator: Accelerator) -> bool:
    """Tell whether the model's parameters are sharded over the processes, as with FSDP and DeepSpeed."""
    return accelerator.distributed_type in SHARDED_TYPES


class PreparedModel:
    """Remembers a model as it was before `Accelerator.prepare`, and restores it after the run.

    Args:
        plain: The model before the run; it may be compiled.
    """

    def __init__(self, plain: nn.Module) -> None:
        self.plain = plain
        parts = {id(part): part for part in (plain, without_compilation(plain))}.values()
        self._attributes = [(part, AcceleratorRegistry.forward_attributes(part)) for part in parts]
        self.prepared = plain

    def restore(self, accelerator: Accelerator, model: nn.Module) -> nn.Module:
        """Return the plain model with its original ``forward``, ready to be called, pickled or prepared again.

        Args:
            accelerator: The accelerator.
            model: The trainer's model at the end of the run. If a callback has replaced it, the replacement is
                unwrapped and returned.
        """
        for part, attributes in self._attributes:
            AcceleratorRegistry.restore_forward(part, attributes)
        return self.plain if model is self.prepared else accelerator.unwrap_model(model)


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer | None,
    train_dl: Loader | None,
    eval_dls: Mapping[str, Loader],
) -> tuple[nn.Module, Optimizer | MaybeNone, Loader | MaybeNone, dict[str, Loader]]:
    """Let Accelerate wrap model, optimizer and loaders for the way in which the program was launched.

    Args:
        accelerator: The accelerator.
        model: The model.
        optimizer: The optimizer or ``None``.
        train_dl: The training loader or ``None``.
        eval_dls: The evaluation loaders by name.

    Returns:
        All four, prepared. Iterables of batches that are not a `DataLoader` are not sharded; their batches are moved to
        the device.
    """
    placement = placement_of(accelerator)
    train_dl, *active_eval_dls = (_activate(loader, placement) for loader in (train_dl, *eval_dls.values()))
    optimizer = wrap_optimizer(accelerator, optimizer, uses_fast_path=can_use_fast_path(accelerator))
    if train_dl is None and _is_refused_by_ddp(accelerator, model):
        model = accelerator.prepare_model(model, evaluation_mode=True)
    objects = [model, optimizer, train_dl, *active_eval_dls]
    present = [item for item in objects if item is not None]
    # DeepSpeed and FSDP have to see all objects at once. A single object is not returned in a tuple.
    results = accelerator.prepare(*present)
    prepared = iter(results if len(present) > 1 else (results,))
    wrapped: list[MaybeNone] = [None if item is None else next(prepared) for item in objects]
    model, optimizer, train_dl, *loaders = wrapped
    placed = {name: _place(accelerator, loader) for name, loader in zip(eval_dls, loaders, strict=True)}
    return model, optimizer, _place(accelerator, train_dl), placed


def _is_refused_by_ddp(accelerator: Accelerator, model: nn.Module) -> bool:
    """Tell whether DDP would raise, because the model has nothing to train. That is no obstacle to evaluating it."""
    is_ddp = accelerator.distributed_type in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    return is_ddp and not any(parameter.requires_grad for parameter in model.parameters())


def has_comm_hook(accelerator: Accelerator) -> bool:
    """Tell whether DDP calls a communication hook instead of adding up the gradients."""
    handler = accelerator.ddp_handler
    return handler is not None and handler.comm_hook != DDPCommunicationHookType.NO


def rank_of(accelerator: Accelerator) -> int:
    """Return the rank of this process; 0 for a test double that does not tell."""
    rank: object = accelerator.process_index
    return rank if isinstance(rank, int) else 0


def placement_of(accelerator: Accelerator) -> Placement:
    """Return where the loaders of a run are used: the ranks, the device, and whether Accelerate shards the data."""
    is_left_to_accelerate = (
        accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
        or getattr(accelerator, "parallelism_config", None) is not None
        or accelerator.split_batches
        or accelerator.dispatch_batches
        or accelerator.use_stateful_dataloader
    )
    device = accelerator.device if accelerator.device_placement else None
    rank, num_processes = rank_of(accelerator), int(accelerator.num_processes)
    create_loader = partial(FastPathLoader, device=device)
    create_dispatched_loader = partial(
        DispatchedLoader, device=device, process_index=rank, num_processes=num_processes, rank_device=accelerator.device
    )
    return Placement(
        process_index=rank,
        num_processes=num_processes,
        num_batches_per_step=1 if accelerator.split_batches else num_processes,
        create_loader=None if is_left_to_accelerate else create_loader,
        create_dispatched_loader=None if is_left_to_accelerate else create_dispatched_loader,
        create_local_loader=partial(LocalLoader, device=device, num_processes=num_processes),
        keep_in_step=lambda batches, num_steps: LocalBatches(batches, num_processes, num_steps),
        gather=lambda value: all_gather_objects(value, num_processes),
    )


def _activate(loader: Loader | None, placement: Placement) -> Loader | None:
    """Return a loader that Accelerate leaves as it is, unless Accelerate shards the data itself."""
    if not isinstance(loader, FastPathLoader):
        loader = shard_loader(loader, placement)  # a subclass may have replaced the loader of the run
    if isinstance(loader, FastPathLoader):
        loader.activate()
    return loader


def _place(accelerator: Accelerator, loader: Loader | MaybeNone) -> Loader | MaybeNone:
    if isinstance(loader, DataLoaderDispatcher):
        return TrimmedDispatcher(loader, accelerator.process_index)
    needs_placing = not isinstance(loader, DataLoader) and hasattr(loader, "__iter__")
    return PlacedBatches(loader, accelerator.device) if needs_placing and accelerator.device.type != "cpu" else loader


def skip_batches(accelerator: Accelerator, loader: Loader, num_batches: int) -> Loader:
    """Return the rest of a loader's epoch. Skipped batches are not loaded, unless the loader has no indices."""
    if num_batches == 0:
        return loader
    if not isinstance(loader, DataLoader) or not is_shardable(loader):
        return RestOfEpoch(loader, num_batches)
    if isinstance(loader, FastPathLoader):
        return loader.skip_first(num_batches)
    if num_batches >= len(loader):  # older versions of Accelerate fail if no batch is left
        deque(loader.batch_sampler or (), maxlen=0)  # samplers with a state of their own continue after it
        return ()
    with showing_inner_arguments(loader):
        rest: Loader = accelerator.skip_first_batches(loader, num_batches)
    return rest


def release(accelerator: Accelerator, *prepared: object) -> None:
    """Shut down the workers of prepared loaders, and let Accelerate drop its references to these objects.

    Args:
        accelerator: The accelerator.
        *prepared: Models, optimizers and loaders as `prepare` returned them; anything else is ignored.
    """
    registered = [item.loader if isinstance(item, TrimmedDispatcher) else item for item in prepared]
    for item in registered:
        shut_down_workers(item)
        _restore_step(item)
    AcceleratorRegistry(accelerator).forget(*registered)


def _restore_step(optimizer: object) -> None:
    # PyTorch's schedulers wrap the method, on the instance. In a copy of the optimizer, that function would update the
    # original; PyTorch's own optimizers leave it out of copies.
    if isinstance(optimizer, AcceleratedOptimizer) and hasattr(vars(optimizer).get("step"), "__wrapped__"):
        del vars(optimizer)["step"]
