"""Checkpoints: portable files that contain a model and, optionally, its optimizer and scheduler."""

from __future__ import annotations

import os
import warnings
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
    frozen: Collection[str] = (),
) -> StateDict:
    """Build a checkpoint: one flat dictionary with our entries and the user's.

    Args:
        model_state: The state of the model.
        optimizer: The optimizer, or ``None``.
        scheduler: The scheduler, or ``None``.
        extras: The user's entries.
        modules: The modules with the parameters of the optimizer, whose state then knows their names.
        frozen: Names of parameters of the model that are left out, and listed instead.
    """
    checkpoint: StateDict = {MODEL: portable_state_dict(model_state, without=frozen)}
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
        warnings.warn(
            "Could not save the scheduler state dict. Please ensure the scheduler has a state_dict method. The "
            f"checkpoint is written without the state of the `{type(scheduler).__name__}`.",
            stacklevel=3,
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
            warnings.warn(
                f"{os.fspath(path)!r} contains the weights of the model, but not {_joined(left_out)}: a file of "
                "safetensors holds tensors only. Choose another suffix, such as '.pt', or leave them out, for example "
                "with `save_optimizer=False`.",
                stacklevel=3,
            )
        return
    refused = run_on_all(lambda: save_file(checkpoint, path) if is_writer else [], num_processes)
    if refused:
        warnings.warn(
            f"`load_checkpoint` will refuse the checkpoint {os.fspath(path)!r}, which has been written. "
            f"{' '.join(refused)}",
            stacklevel=3,
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
    loaded = LoadedCheckpoint(entries)
    fit = fit_weights(model, find_weights(entries, source), source, strict, entries.get(FROZEN, ()))
    if not strict:
        loaded.note_fit(fit)
    choose = partial(_choose, entries, loaded, strict)
    trained = choose(TRAINED, lambda _: companions.check_trained_state(entries, source))
    optimizer_state = choose(OPTIMIZER, lambda state: _fit_optimizer(optimizer, state, model, fit, companions, entries, source)
    )
    ...
