"""Checkpoints: portable files that contain a model and, optionally, its optimizer and scheduler."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from pytorch_accelerated._checkpoint.companions import Companions
from pytorch_accelerated._checkpoint.files import check_can_write, load_file, save_file
from pytorch_accelerated._checkpoint.model_state import (
    check_model_state,
    load_checked_model_state,
    portable_state_dict,
)
from pytorch_accelerated._checkpoint.optimizer_state import (
    Named,
    entries_of,
    fit_optimizer_state,
    optimizer_state_of,
    parameters_of,
)
from pytorch_accelerated._checkpoint.scheduler_state import (
    check_scheduler_state,
    load_scheduler_state,
    scheduler_state_of,
)
from pytorch_accelerated._checkpoint.undo import undone_on_error
from pytorch_accelerated._distributed.accelerator import is_sharded
from pytorch_accelerated._distributed.collectives import run_on_all
from pytorch_accelerated._messages import warn
from pytorch_accelerated._nested import rebuild
from pytorch_accelerated.exceptions import CheckpointError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from torch.optim import Optimizer

    from pytorch_accelerated._types import Nested, StateDict, Stateful, StateMapping

# --- saving ------------------------------------------------------------------------------------------------------


def unwrap_model(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Return the user's model, without what Accelerate and `torch.compile` have wrapped around it."""
    unwrapped: nn.Module = accelerator.unwrap_model(model, keep_torch_compile=False)
    return unwrapped


def model_state_of(model: nn.Module, accelerator: Accelerator) -> StateMapping:
    """Return the complete state of a model, however it is wrapped. Must be called on every process."""
    state: StateMapping = (
        accelerator.get_state_dict(model) if is_sharded(accelerator) else unwrap_model(model, accelerator).state_dict()
    )
    return state


def build_checkpoint(
    model_state: StateMapping,
    optimizer: Optimizer | None,
    scheduler: Stateful | None,
    extras: StateMapping | None,
    modules: Mapping[str, nn.Module] | None = None,
) -> StateDict:
    """Build a checkpoint: one flat dictionary with our entries and the user's.

    Args:
        model_state: The state of the model.
        optimizer: The optimizer, or ``None``.
        scheduler: The scheduler, or ``None``.
        extras: The user's entries.
        modules: The modules with the parameters of the optimizer, whose state then knows their names.
    """
    checkpoint: StateDict = {"model_state_dict": portable_state_dict(model_state)}
    if optimizer is not None:
        checkpoint["optimizer_state_dict"] = with_full_tensors(optimizer_state_of(optimizer, modules))
    if scheduler is not None:
        checkpoint["scheduler_state_dict"] = with_full_tensors(scheduler_state_of(scheduler))
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

    Args:
        checkpoint: What `build_checkpoint` returned.
        path: The file.
        is_writer: Whether this process writes the file.
        num_processes: The world size.

    Raises:
        CheckpointError: The file could not be written, on this process or another.
    """
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
    run_on_all(lambda: check_can_write(path) if is_writer else None, num_processes)


def with_full_tensors(state: Nested) -> Nested:
    """Gather the sharded tensors in a state. Must be called on every process if there are any."""
    if isinstance(state, torch.Tensor):
        return state.full_tensor() if hasattr(state, "full_tensor") else state
    return rebuild(state, with_full_tensors)


# --- loading -----------------------------------------------------------------------------------------------------


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None,
    scheduler: object = None,
    load_scheduler: Callable[[StateDict], None] | None = None,
    companions: Companions | None = None,
    holder: Optimizer | None = None,
) -> StateDict:
    """Load a checkpoint's model, and its optimizer and scheduler if there are any, or reject it with nothing changed.

    Args:
        path: The file.
        model: The model.
        optimizer: The optimizer; ``None`` to skip its state.
        scheduler: The scheduler, if there is one yet.
        load_scheduler: Loads the state of the scheduler; ``None`` to skip it.
        companions: What else the optimizer trains.
        holder: The optimizer that holds the parameters of the model, whether or not its state is loaded.

    Returns:
        All entries of the file.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is damaged, or belongs to a different model, optimizer or scheduler.
    """
    checkpoint, companions = load_file(path), companions or Companions()
    source = f"The checkpoint {os.fspath(path)!r}"
    companions.check_trained_state(checkpoint, source)
    model_state = model_state_in(checkpoint, source)
    loaded = check_model_state(model, model_state, source)
    optimizer_state = checkpoint.get("optimizer_state_dict")
    if optimizer is not None and optimizer_state is not None:
        named = Named(
            parameters_of({"": model, **companions.modules}),
            parameters_of({"": loaded, **companions.modules}),
            entries_of({"": portable_state_dict(model_state), **companions.trained_modules_in(checkpoint)}),
        )
        optimizer_state = fit_optimizer_state(optimizer, optimizer_state, named, source)
    scheduler_state = checkpoint.get("scheduler_state_dict")
    if scheduler is not None and load_scheduler is not None and scheduler_state is not None:
        check_scheduler_state(scheduler, scheduler_state, source)
    with undone_on_error(model, (optimizer,), (scheduler, companions.modules, companions.parameters)):
        if optimizer is not None and optimizer_state is not None:
            optimizer.load_state_dict(optimizer_state)
        if load_scheduler is not None and scheduler_state is not None:
            load_scheduler_state(scheduler_state, load_scheduler, source)
        companions.load_trained_state(checkpoint)
        load_checked_model_state(model, model_state, holder)
    return checkpoint


def model_state_in(checkpoint: StateMapping, source: str) -> StateMapping:
    """Return the model's state in a checkpoint.

    Args:
        checkpoint: The entries of the file.
        source: How error messages refer to the file.

    Raises:
        CheckpointError: There is none.
    """
    if "model_state_dict" not in checkpoint:
        raise CheckpointError(
            f"{source} has no `model_state_dict`, only the entries {sorted(map(str, checkpoint))}. Expected a file "
            "written by `save_checkpoint`. A bare state dict can be loaded with `model.load_state_dict`."
        )
    state: StateMapping = checkpoint["model_state_dict"]
    return state
