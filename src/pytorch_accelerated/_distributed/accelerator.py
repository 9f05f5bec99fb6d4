"""How objects enter and leave Accelerate."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, PrecisionType
from torch.utils.data import DataLoader

from pytorch_accelerated._data.loaders import PlacedBatches, RestOfEpoch, has_indices, loader_settings
from pytorch_accelerated._data.rng import derive_seed, seed_generators
from pytorch_accelerated._data.sharding import ShardedBatchSampler, TrimmedDispatcher
from pytorch_accelerated._data.workers import shut_down_workers
from pytorch_accelerated._distributed.collectives import PROCESS_TIMEOUT, broadcast_from_main
from pytorch_accelerated._distributed.fast_path import FastPathLoader, can_use_fast_path, wrap_optimizer

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


_FORWARD_ATTRIBUTES = ("forward", "_original_forward", "_is_accelerate_prepared")


def choose_seed(accelerator: Accelerator, seed: int | None) -> int:
    """Return the seed of a run, the same on every process. Must be called on every process.

    Without one from the user it is the seed that the main process gave to ``torch.manual_seed``. Another process that
    was seeded alike is seeded anew, because dropout and augmentation should differ between processes.
    """
    if seed is not None:
        return seed
    own_seed = torch.initial_seed()
    common_seed: int = broadcast_from_main(own_seed, int(accelerator.num_processes))
    if accelerator.process_index != 0 and own_seed == common_seed:
        seed_generators(derive_seed(common_seed, "rank", accelerator.process_index))
    return common_seed


def create_accelerator(source: Accelerator | Mapping[str, Any] | None, mixed_precision: str | None) -> Accelerator:
    """Make an accelerator, or take the user's own.

    Args:
        source: A ready accelerator, keyword arguments to make one with, or ``None``.
        mixed_precision: The precision asked for; ``None`` for whatever is configured.

    Raises:
        TypeError: ``source`` is something else.
        ValueError: The precision contradicts ``source``, or it or the compiler an accelerator made earlier in this
            process.
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
            "Give it in one place only."
        )
    if isinstance(source, Accelerator):
        return source
    if mixed_precision is not None:
        settings["mixed_precision"] = mixed_precision
    _complete_settings(settings)
    try:
        accelerator = Accelerator(**settings)
    except ValueError as error:
        current, asked = AcceleratorState._shared_state.get("_mixed_precision"), settings.get("mixed_precision")
        if current in (None, asked) or asked not in PrecisionType.list():
            raise
        raise ValueError(
            f"`mixed_precision` is {asked!r}, but this process already uses {current!r}: "
            "Accelerate keeps one setting for all accelerators of a process. Restart it (in a notebook, the kernel), "
            "or leave `mixed_precision` out to go on with the present one."
        ) from error
    _check_compiler(settings, accelerator)
    _leave_group_at_exit()
    return accelerator


def _check_compiler(settings: Mapping[str, Any], accelerator: Accelerator) -> None:
    plugin = settings.get("dynamo_plugin")
    backend = settings.get("dynamo_backend") if plugin is None else plugin.backend
    if backend is None:
        return
    asked, current = (
        str(getattr(one, "value", one)).upper() for one in (backend, accelerator.state.dynamo_plugin.backend)
    )
    if asked != current:
        raise ValueError(
            f"The `accelerator` is to compile with {asked!r}, but this process already uses {current!r}: Accelerate "
            "keeps one setting for all accelerators of a process. Restart it (in a notebook, the kernel), or pass "
            "`torch.compile(model, backend=...)` to the trainer instead."
        )


def _complete_settings(settings: dict[str, Any]) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        settings.setdefault("cpu", True)  # without it Accelerate would start as many separate trainings
    handlers = list(settings.get("kwargs_handlers") or ())
    if not any(isinstance(handler, InitProcessGroupKwargs) for handler in handlers):
        settings["kwargs_handlers"] = [*handlers, InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)]


def _leave_group_at_exit() -> None:
    # A process that ends in a group over gloo is aborted now and then, with everything done and a signal for exit code.
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        atexit.unregister(_leave_group)
        atexit.register(_leave_group)


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def take_over_accumulation(accelerator: Accelerator, num_steps: int) -> None:
    """Keep Accelerate from dividing the losses of an accumulation window: the loop weighs them itself.

    DeepSpeed is left alone, as its engine counts the window.

    Args:
        accelerator: The accelerator.
        num_steps: The ``gradient_accumulation_steps`` of the run.

    Raises:
        ValueError: The accelerator was made with another number.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return
    own_number = accelerator.gradient_accumulation_steps
    if isinstance(own_number, int) and own_number not in (1, num_steps):
        raise ValueError(
            f"The `accelerator` was made with gradient_accumulation_steps={own_number}, but `train` was called with "
            f"{num_steps}. Give it in one place: as `gradient_accumulation_steps` of `train`."
        )
    accelerator.gradient_accumulation_steps = 1


def is_sharded(accelerator: Accelerator) -> bool:
    """Tell whether the wrapped model holds the parameters in a form of its own, as FSDP and DeepSpeed do."""
    return accelerator.distributed_type in _SHARDED


class PreparedModel:
    """Remembers a model as it was before Accelerate prepared it, to leave it so after the run.

    Args:
        plain: The model before.
    """

    def __init__(self, plain: Any) -> None:
        self.plain = plain
        compiled = getattr(plain, "_orig_mod", None)  # the model within a compiled one
        self._attributes = [(part, _forward_attributes(part)) for part in (plain, compiled)]
        self.prepared: Any = plain

    def restore(self, accelerator: Accelerator, model: Any) -> Any:
        """Return the plain model, its ``forward`` as it was, so that it can be used, pickled and prepared again.

        Args:
            accelerator: The accelerator.
            model: The trainer's model at the end of the run; if a callback put another one there, that one is kept.
        """
        for part, attributes in self._attributes:
            for name in _forward_attributes(part):
                del vars(part)[name]
            getattr(part, "__dict__", {}).update(attributes)
        return self.plain if model is self.prepared else accelerator.unwrap_model(model)


def _forward_attributes(model: Any) -> dict[str, Any]:
    attributes = getattr(model, "__dict__", {})
    return {name: attributes[name] for name in _FORWARD_ATTRIBUTES if name in attributes}


def prepare(
    accelerator: Accelerator, model: Any, optimizer: Any, train_dl: Any, eval_dl: Any
) -> tuple[Any, Any, Any, Any]:
    """Let Accelerate wrap model, optimizer and loaders for the way the program was started.

    Args:
        accelerator: The accelerator.
        model: The model.
        optimizer: The optimizer or ``None``.
        train_dl: The training loader or ``None``.
        eval_dl: The evaluation loader, a dictionary of loaders, or ``None``.

    Returns:
        All four, prepared. Loaders that are no `DataLoader` only move their batches to the device.
    """
    eval_dls = eval_dl if isinstance(eval_dl, dict) else {} if eval_dl is None else {"": eval_dl}
    train_dl, *own_eval_dls = (_own_loader(accelerator, loader) for loader in (train_dl, *eval_dls.values()))
    if can_use_fast_path(accelerator):
        optimizer = wrap_optimizer(accelerator, optimizer)
    objects = [model, optimizer, train_dl, *own_eval_dls]
    present = [item for item in objects if item is not None]
    # DeepSpeed and FSDP have to see all objects at once. A single one is returned bare.
    results = accelerator.prepare(*present)
    prepared = iter(results if len(present) > 1 else (results,))
    model, optimizer, train_dl, *loaders = [None if item is None else next(prepared) for item in objects]
    placed = {name: _place(accelerator, loader) for name, loader in zip(eval_dls, loaders, strict=True)}
    return model, optimizer, _place(accelerator, train_dl), placed if isinstance(eval_dl, dict) else placed.get("")


def _own_loader(accelerator: Accelerator, loader: Any) -> Any:
    is_left_to_accelerate = (
        not has_indices(loader)
        or accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
        or getattr(accelerator, "parallelism_config", None) is not None
        or accelerator.split_batches
        or accelerator.dispatch_batches
        or accelerator.use_stateful_dataloader
    )
    if is_left_to_accelerate:
        return loader
    share = None
    if accelerator.num_processes > 1:  # Accelerate would fill up the last batches with samples from the beginning
        share = ShardedBatchSampler(loader.batch_sampler, accelerator.num_processes, accelerator.process_index)
    own = FastPathLoader(
        loader.dataset,
        device=accelerator.device if accelerator.device_placement else None,
        batch_sampler=share or loader.batch_sampler,
        _drop_last=loader.drop_last,
        _non_blocking=accelerator.non_blocking,
        **loader_settings(loader),
    )
    own.share = share
    own._is_accelerate_prepared = True
    return own


def _place(accelerator: Accelerator, loader: Any) -> Any:
    if isinstance(loader, DataLoaderDispatcher):
        return TrimmedDispatcher(loader, accelerator.process_index)
    needs_placing = not isinstance(loader, DataLoader) and hasattr(loader, "__iter__")
    return PlacedBatches(loader, accelerator.device) if needs_placing and accelerator.device.type != "cpu" else loader


def num_batches_per_step(accelerator: Accelerator) -> int:
    """Return how many batches of a stream a step takes, which all processes share."""
    return 1 if accelerator.split_batches else int(accelerator.num_processes)


def skip_batches(accelerator: Accelerator, loader: Any, num_batches: int) -> Any:
    """Return the rest of a loader's epoch, without loading what is skipped where that is possible."""
    if num_batches == 0:
        return loader
    if has_indices(loader):
        # Of a loader without any batch left, older versions of Accelerate make an error.
        return accelerator.skip_first_batches(loader, num_batches) if num_batches < len(loader) else ()
    return RestOfEpoch(loader, num_batches)


def release(accelerator: Accelerator, *prepared: Any) -> None:
    """Let workers end, and Accelerate forget objects it prepared, and only these: the user may have prepared others.

    `Accelerator.free_memory` forgets all of them and runs a full garbage collection, which can take longer than a run.
    """
    forgotten = [item.loader if isinstance(item, TrimmedDispatcher) else item for item in prepared]
    for item in forgotten:
        shut_down_workers(item)
    for registry in ("_models", "_optimizers", "_dataloaders", "_schedulers"):
        kept = [item for item in getattr(accelerator, registry, []) if all(item is not o for o in forgotten)]
        setattr(accelerator, registry, kept)


@contextmanager
def registered(accelerator: Accelerator, model: Any, optimizer: Any) -> Iterator[None]:
    """Let Accelerate save and load this model and this optimizer, and nothing else."""
    registries = ("_models", "_optimizers", "_dataloaders", "_schedulers", "_custom_objects")
    before = {name: getattr(accelerator, name) for name in registries}
    now = {"_models": [model], "_optimizers": [] if optimizer is None else [optimizer]}
    try:
        for name in registries:
            setattr(accelerator, name, now.get(name, []))
        yield
    finally:
        for name, value in before.items():
            setattr(accelerator, name, value)
