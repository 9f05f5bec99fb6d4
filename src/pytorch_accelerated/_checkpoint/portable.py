"""Checkpoints: portable files that contain a model and, optionally, its optimizer and scheduler."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch

from pytorch_accelerated._checkpoint.checksum import check_undamaged, is_safetensors_file
from pytorch_accelerated._checkpoint.companions import TRAINED, Companions
from pytorch_accelerated._checkpoint.files import check_can_write, load_file, local_path, save_file
from pytorch_accelerated._checkpoint.model_state import load_checked_model_state
from pytorch_accelerated._checkpoint.names import portable_state_dict
from pytorch_accelerated._checkpoint.optimizer_state import (
    Named,
    entries_of,
    fit_optimizer_state,
    load_optimizer_state,
    optimizer_state_of,
    parameters_of,
)
from pytorch_accelerated._checkpoint.safetensors_file import (
    SUFFIX,
    check_has_safetensors,
    is_safetensors_path,
    load_safetensors,
    save_safetensors,
)
from pytorch_accelerated._checkpoint.scheduler_state import (
    check_scheduler_state,
    load_scheduler_state,
    scheduler_state_of,
)
from pytorch_accelerated._checkpoint.undo import undone_on_error
from pytorch_accelerated._checkpoint.weights import (
    FROZEN,
    MODEL,
    OPTIMIZER,
    SCHEDULER,
    Fit,
    LoadedCheckpoint,
    fit_weights,
    without_entries,
)
from pytorch_accelerated._distributed.accelerator import is_sharded
from pytorch_accelerated._distributed.collectives import run_on_all
from pytorch_accelerated._messages import warn
from pytorch_accelerated._tensors.nested import rebuild
from pytorch_accelerated.exceptions import CheckpointError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from torch.optim import Optimizer

    from pytorch_accelerated._types import Nested, StateDict, Stateful, StateMapping

    Load: TypeAlias = Callable[[], object]

# --- saving ------------------------------------------------------------------------------------------------------


def unwrap_model(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Return the user's model, without what Accelerate and `torch.compile` have wrapped around it."""
    unwrapped: nn.Module = accelerator.unwrap_model(model, keep_torch_compile=False)
    return unwrapped


def model_state_of(model: nn.Module, accelerator: Accelerator) -> StateMapping:
    """Return the complete state of a model by portable names. Must be called on every process."""
    state = accelerator.get_state_dict(model) if is_sharded(accelerator) else None
    return portable_state_dict(unwrap_model(model, accelerator), state)


def build_checkpoint(
    model_state: StateMapping,
    optimizer: Optimizer | None,
    scheduler: Stateful | None,
    extras: StateMapping | None,
    modules: Mapping[str, nn.Module] | None = None,
    frozen: Collection[str] = (),
) -> StateDict:
    """Build a checkpoint: one flat dictionary with our entries and the user's.

    Args:
        model_state: The state of the model, by portable names.
        optimizer: The optimizer, or ``None``.
        scheduler: The scheduler, or ``None``.
        extras: The user's entries.
        modules: The modules with the parameters of the optimizer, whose state then knows their names.
        frozen: Names of parameters of the model that are left out, and listed instead.
    """
    checkpoint: StateDict = {MODEL: without_entries(model_state, frozen)}
    if frozen:
        checkpoint[FROZEN] = list(frozen)
    if optimizer is not None:
        checkpoint[OPTIMIZER] = with_full_tensors(optimizer_state_of(optimizer, modules))
    if scheduler is not None:
        checkpoint[SCHEDULER] = with_full_tensors(scheduler_state_of(scheduler))
    return {**checkpoint, **(extras or {})}


def with_state(scheduler: Stateful | None, is_writer: bool) -> Stateful | None:
    """Return the scheduler, or ``None`` with a warning if it has no state that could be saved."""
    if scheduler is None or hasattr(scheduler, "state_dict"):
        return scheduler
    if is_writer:
        warn(
            "Could not save the scheduler state dict. Please ensure the scheduler has a state_dict method. The "
            f"checkpoint is written without the state of the `{type(scheduler).__name__}`.",
        )
    return None


def save_checkpoint(
    checkpoint: StateMapping, path: str | os.PathLike[str], is_writer: bool, num_processes: int
) -> None:
    """Write a checkpoint to a file. Must be called on every process.

    With the suffix ``.safetensors``, the file is one of that format. It contains the weights of the model, and of the
    other entries those that are plain values; a warning names the rest.

    Args:
        checkpoint: What `build_checkpoint` returned.
        path: The file.
        is_writer: Whether this process writes the file.
        num_processes: The world size.

    Raises:
        CheckpointError: The file could not be written, on this process or another.
        ModuleNotFoundError: safetensors is not installed.
    """
    if is_safetensors_path(path):
        left_out = run_on_all(lambda: save_safetensors(checkpoint, path) if is_writer else [], num_processes)
        if left_out:
            warn(
                f"{os.fspath(path)!r} contains the weights of the model, but not these entries: {', '.join(left_out)}. "
                f"A file with the suffix {SUFFIX!r} holds weights and plain values only. Choose another suffix, such "
                "as '.pt', or leave them out with `save_optimizer=False` and `save_scheduler=False`.",
            )
        return
    refused = run_on_all(lambda: save_file(checkpoint, path) if is_writer else [], num_processes)
    if refused:
        warn(
            f"`load_checkpoint` will refuse the checkpoint {os.fspath(path)!r}, which has been written. "
            f"{' '.join(refused)}",
        )


def check_save_path(path: str | os.PathLike[str], is_writer: bool, num_processes: int) -> None:
    """Raise at the start of a run if a checkpoint could not be saved later. Must be called on every process.

    Args:
        path: The file.
        is_writer: Whether this process will write the file.
        num_processes: The world size.

    Raises:
        CheckpointError: The file could not be written, on this process or another.
    """
    if is_safetensors_path(path):
        check_has_safetensors()
    run_on_all(lambda: check_can_write(path) if is_writer else None, num_processes)


def with_full_tensors(state: Nested) -> Nested:
    """Gather the sharded tensors in a state. Must be called on every process if there are any."""
    if isinstance(state, torch.Tensor):
        return state.full_tensor() if hasattr(state, "full_tensor") else state
    return rebuild(state, with_full_tensors)


# --- loading -----------------------------------------------------------------------------------------------------


def load_entries(path: str | os.PathLike[str]) -> StateDict:
    """Read a file of weights, as `torch.save` or safetensors writes it, into host memory.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is damaged, or contains objects other than tensors and plain values.
        ModuleNotFoundError: It is one of safetensors, which is not installed.
    """
    file = local_path(path)
    try:
        if not file.is_file():
            return load_file(path)  # which says so
        check_undamaged(file)
        return load_safetensors(path) if is_safetensors_file(file) else load_file(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} could not be read: {error}. Nothing was loaded. Check that you may read the "
            "file, and that its disk is in order."
        ) from error


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None,
    scheduler: object = None,
    load_scheduler: Callable[[StateDict], None] | None = None,
    companions: Companions | None = None,
    holder: Optimizer | None = None,
    strict: bool = True,
) -> LoadedCheckpoint:
    """Load a checkpoint's model, and its optimizer and scheduler if there are any, or reject it with nothing changed.

    Args:
        path: The file.
        model: The model.
        optimizer: The optimizer; ``None`` to skip its state.
        scheduler: The scheduler, if there is one yet.
        load_scheduler: Loads the state of the scheduler; ``None`` to skip it.
        companions: What else the optimizer trains.
        holder: The optimizer that holds the parameters of the model, whether or not its state is loaded.
        strict: Whether everything has to fit. Otherwise what does not is left out.

    Returns:
        All entries of the file, with what of it was not loaded.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is damaged, or belongs to a different model, optimizer or scheduler.
    """
    entries, companions = load_entries(path), companions or Companions()
    source = f"The checkpoint {os.fspath(path)!r}"
    fit = fit_weights(model, entries, source, strict)
    loaded = LoadedCheckpoint(entries, fit.missing_keys, fit.unexpected_keys, fit.mismatched_keys)
    fits: dict[str, Callable[[], Load]] = {TRAINED: partial(_fit_companions, companions, entries, source)}
    if optimizer is not None:
        fits[OPTIMIZER] = partial(_fit_optimizer, optimizer, model, companions, entries, fit, source)
    if load_scheduler is not None:
        fits[SCHEDULER] = partial(_fit_scheduler, scheduler, load_scheduler, entries, source)
    loads: dict[str, Load] = {}
    for name, find in fits.items():
        if entries.get(name) is not None:
            with loaded.leaves_out(name, strict):
                loads[name] = find()
    undone = partial(undone_on_error, model, (optimizer,), (scheduler, companions.modules, companions.parameters))
    with undone():
        for name, load in loads.items():
            if name == SCHEDULER and OPTIMIZER in loaded.left_out:
                loaded.left_out[SCHEDULER] = "It continues the learning rates of that optimizer."
                continue
            with loaded.leaves_out(name, strict), undone():
                load()
        load_checked_model_state(model, fit.state, holder)
    return loaded


def _fit_companions(companions: Companions, entries: StateMapping, source: str) -> Load:
    """Return what loads the companions from a checkpoint, or raise if they do not fit."""
    companions.check_trained_state(entries, source)
    return lambda: companions.load_trained_state(entries)


def _fit_optimizer(
    optimizer: Optimizer, model: nn.Module, companions: Companions, entries: StateMapping, fit: Fit, source: str
) -> Load:
    """Return what loads the optimizer's state in a checkpoint, or raise if it does not fit."""
    named = Named(
        parameters_of({"": model, **companions.modules}),
        parameters_of({"": fit.loaded, **companions.modules}),
        entries_of({"": fit.saved, **companions.trained_modules_in(entries)}),
    )
    state = fit_optimizer_state(optimizer, entries[OPTIMIZER], named, source)
    return lambda: load_optimizer_state(optimizer, state, source)


def _fit_scheduler(scheduler: object, load: Callable[[StateDict], None], entries: StateMapping, source: str) -> Load:
    """Return what loads the scheduler's state in a checkpoint, or raise if it does not fit."""
    if scheduler is not None:
        check_scheduler_state(scheduler, entries[SCHEDULER], source)
    return lambda: load_scheduler_state(entries[SCHEDULER], load, source)
