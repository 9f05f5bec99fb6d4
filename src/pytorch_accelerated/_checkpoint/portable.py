"""Checkpoints: portable files that contain a model and, optionally, its optimizer and scheduler."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from pytorch_accelerated._checkpoint.files import check_can_write, load_file, save_file
from pytorch_accelerated._distributed.accelerator import is_sharded
from pytorch_accelerated._distributed.collectives import run_on_all
from pytorch_accelerated._nested import rebuild
from pytorch_accelerated.exceptions import CheckpointError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from torch.optim import Optimizer

    from pytorch_accelerated._types import Nested, StateDict, Stateful, StateMapping

_COMPILED_PREFIX = "_orig_mod."
"""What `torch.compile` puts before the names of a model's parameters."""


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
    model_state: StateMapping, optimizer: Stateful | None, scheduler: Stateful | None, extras: StateMapping | None
) -> StateDict:
    """Build a checkpoint: one flat dictionary with our entries and the user's."""
    checkpoint: StateDict = {"model_state_dict": portable_state_dict(model_state)}
    for name, part in (("optimizer_state_dict", optimizer), ("scheduler_state_dict", scheduler)):
        if part is not None:
            checkpoint[name] = with_full_tensors(part.state_dict())
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
    run_on_all(lambda: check_can_write(path) if is_writer else None, num_processes)


def with_full_tensors(state: Nested) -> Nested:
    """Gather the sharded tensors in a state. Must be called on every process if there are any."""
    if isinstance(state, torch.Tensor):
        return state.full_tensor() if hasattr(state, "full_tensor") else state
    return rebuild(state, with_full_tensors)


def portable_state_dict(state_dict: StateMapping) -> StateDict:
    """Return a model's state with the parameter names that it has without `torch.compile`."""
    return {name.replace(_COMPILED_PREFIX, ""): value for name, value in state_dict.items()}


# --- loading -----------------------------------------------------------------------------------------------------


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None,
    check: Callable[[StateMapping, str], None] = lambda checkpoint, source: None,
) -> StateDict:
    """Load a checkpoint's model, and its optimizer state if there is one, or reject it before anything changes.

    Args:
        path: The file.
        model: The model.
        optimizer: The optimizer; ``None`` to skip its state.
        check: Called with the checkpoint, and with how messages refer to it, before anything changes.

    Returns:
        All entries of the file.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is damaged, or belongs to a different model or optimizer.
    """
    checkpoint = load_file(path)
    source = f"The checkpoint {os.fspath(path)!r}"
    check(checkpoint, source)
    model_state = model_state_in(checkpoint, source)
    optimizer_state = checkpoint.get("optimizer_state_dict")
    if optimizer is None or optimizer_state is None:
        load_model_state(model, model_state, source)
        return checkpoint
    check_same_optimizer(optimizer, optimizer_state, source)
    load_model_state(model, model_state, source)
    optimizer.load_state_dict(optimizer_state)
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


def load_model_state(model: nn.Module, state_dict: StateMapping, source: str) -> None:
    """Load a model's state, or reject it before anything changes.

    Args:
        model: The model.
        state_dict: The state, with or without the names of `torch.compile`.
        source: How error messages refer to where the state comes from.

    Raises:
        CheckpointError: It is the state of a different model; the message names the parameters that differ.
    """
    state_dict = portable_state_dict(state_dict)
    current = model.state_dict()
    check_same_model(portable_state_dict(current), state_dict, source)
    model.load_state_dict({name: state_dict[name.replace(_COMPILED_PREFIX, "")] for name in current})


def check_same_model(current: StateMapping, saved: StateMapping, source: str) -> None:
    """Raise unless both states have the same names and shapes.

    Args:
        current: The state of the model, as `portable_state_dict` returns it.
        saved: The state to load.
        source: How error messages refer to where the state comes from.

    Raises:
        CheckpointError: They differ; the message lists missing and unexpected parameters, and different shapes.
    """
    differences = {
        "missing from it": sorted(current.keys() - saved.keys()),
        "unexpected in it": sorted(saved.keys() - current.keys()),
        "with a different shape": [
            f"{name} {_shape(saved[name])} instead of {_shape(current[name])}"
            for name in sorted(current.keys() & saved.keys())
            if _shape(current[name]) != _shape(saved[name])
        ],
    }
    described = [f"{kind}: {', '.join(names)}" for kind, names in differences.items() if names]
    if described:
        raise CheckpointError(
            f"{source} belongs to a different model. Parameters {'; '.join(described)}. "
            "Nothing was loaded. Create the model with the settings it was saved with."
        )


def check_same_optimizer(optimizer: Optimizer, state_dict: StateMapping, source: str) -> None:
    """Raise unless a saved optimizer has parameter groups of the same sizes.

    Args:
        optimizer: The optimizer.
        state_dict: The state to load.
        source: How error messages refer to where the state comes from.

    Raises:
        CheckpointError: Its groups differ.
    """
    current = [len(group["params"]) for group in optimizer.param_groups]
    saved = [len(group["params"]) for group in state_dict["param_groups"]]
    if current != saved:
        raise CheckpointError(
            f"{source} belongs to a different optimizer: its groups have {saved} parameters instead of {current}. "
            "Nothing was loaded. Create the optimizer as it was, or load a checkpoint with `load_optimizer=False`."
        )


def _shape(value: object) -> tuple[int, ...] | None:
    return tuple(value.shape) if hasattr(value, "shape") else None
