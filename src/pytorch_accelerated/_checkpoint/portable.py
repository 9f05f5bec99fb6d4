"""Checkpoints: portable files with a model, and what belongs to it, in them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from pytorch_accelerated._checkpoint.files import check_can_write, load_file, save_file
from pytorch_accelerated._distributed.accelerator import is_sharded
from pytorch_accelerated._distributed.collectives import run_on_all
from pytorch_accelerated._nested import rebuild
from pytorch_accelerated.exceptions import CheckpointError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn


_COMPILED_PREFIX = "_orig_mod."


def model_state_of(model: Any, accelerator: Accelerator) -> Mapping[str, Any]:
    """Return the whole state of a model, however it is wrapped. Must be called on every process."""
    is_whole = not is_sharded(accelerator)
    state: Mapping[str, Any] = (
        accelerator.unwrap_model(model).state_dict() if is_whole else accelerator.get_state_dict(model)
    )
    return state


def build_checkpoint(
    model_state: Mapping[str, Any], optimizer: Any, scheduler: Any, extras: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Put a checkpoint together: one flat dictionary, the user's entries beside ours."""
    checkpoint: dict[str, Any] = {"model_state_dict": portable_state_dict(model_state)}
    for name, part in (("optimizer_state_dict", optimizer), ("scheduler_state_dict", scheduler)):
        if part is not None:
            checkpoint[name] = with_whole_tensors(part.state_dict())
    return {**checkpoint, **(extras or {})}


def save_checkpoint(
    checkpoint: Mapping[str, Any], path: str | os.PathLike[str], accelerator: Accelerator, is_per_node: bool
) -> None:
    """Write a checkpoint to a file, on the main process. Must be called on every process.

    Args:
        checkpoint: What `build_checkpoint` returned.
        path: The file.
        accelerator: The accelerator.
        is_per_node: Whether the main process of every node writes, or the main process of all alone.

    Raises:
        CheckpointError: It could not be written, on this process or another.
    """
    is_writer = accelerator.is_local_main_process if is_per_node else accelerator.is_main_process
    run_on_all(lambda: save_file(checkpoint, path) if is_writer else None, accelerator.num_processes)


def check_save_path(path: str | os.PathLike[str], accelerator: Accelerator) -> None:
    """Raise at the start of a run if a checkpoint could not be saved later. Must be called on every process.

    Raises:
        CheckpointError: It could not be written, on this process or another.
    """
    is_writer = accelerator.is_local_main_process
    run_on_all(lambda: check_can_write(path) if is_writer else None, accelerator.num_processes)


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Load a checkpoint's model, and its optimizer if there is one in it, or refuse before anything has changed.

    Args:
        path: The file.
        model: The model.
        optimizer: The optimizer; ``None`` to leave its state out.

    Returns:
        The other entries of the file.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is damaged, or belongs to another model or optimizer.
    """
    checkpoint = load_file(path)
    source = f"The checkpoint {os.fspath(path)!r}"
    model_state = take_model_state(checkpoint, source)
    optimizer_state = checkpoint.pop("optimizer_state_dict", None)
    if optimizer is None or optimizer_state is None:
        load_model_state(model, model_state, source)
        return checkpoint
    check_same_optimizer(optimizer, optimizer_state, source)
    load_model_state(model, model_state, source)
    optimizer.load_state_dict(optimizer_state)
    return checkpoint


def with_whole_tensors(state: Any) -> Any:
    """Return a state whose sharded tensors are put together. Must be called on every process, if it has any."""
    if isinstance(state, torch.Tensor):
        return state.full_tensor() if hasattr(state, "full_tensor") else state
    return rebuild(state, with_whole_tensors)


def take_model_state(checkpoint: dict[str, Any], source: str) -> Mapping[str, Any]:
    """Take the model's state out of a checkpoint.

    Raises:
        CheckpointError: There is none in it.
    """
    if "model_state_dict" not in checkpoint:
        raise CheckpointError(
            f"{source} holds no `model_state_dict`, only {sorted(map(str, checkpoint))}. Expected a file that "
            "`save_checkpoint` wrote; a bare state dictionary is loaded with `model.load_state_dict`."
        )
    state: Mapping[str, Any] = checkpoint.pop("model_state_dict")
    return state


def portable_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's state under the names it has without `torch.compile`."""
    return {name.replace(_COMPILED_PREFIX, ""): value for name, value in state_dict.items()}


def load_model_state(model: nn.Module, state_dict: Mapping[str, Any], source: str) -> None:
    """Load a model's state, or refuse before anything has changed.

    Raises:
        CheckpointError: It is the state of another model; names the parameters that differ.
    """
    state_dict = portable_state_dict(state_dict)
    own_state = model.state_dict()
    check_same_model(portable_state_dict(own_state), state_dict, source)
    model.load_state_dict({name: state_dict[name.replace(_COMPILED_PREFIX, "")] for name in own_state})


def check_same_model(own: Mapping[str, Any], saved: Mapping[str, Any], source: str) -> None:
    """Raise unless both states have the same names and shapes.

    Raises:
        CheckpointError: They differ; lists what is missing, unexpected, or of another shape.
    """
    differences = {
        "missing in it": sorted(own.keys() - saved.keys()),
        "unexpected in it": sorted(saved.keys() - own.keys()),
        "of another shape": [
            f"{name} {_shape(saved[name])} instead of {_shape(own[name])}"
            for name in sorted(own.keys() & saved.keys())
            if _shape(own[name]) != _shape(saved[name])
        ],
    }
    described = [f"{kind}: {', '.join(names)}" for kind, names in differences.items() if names]
    if described:
        raise CheckpointError(
            f"{source} belongs to another model. Parameters {'; '.join(described)}. "
            "Nothing was loaded. Make the model with the settings it was saved with."
        )


def check_same_optimizer(optimizer: Any, state_dict: Mapping[str, Any], source: str) -> None:
    """Raise unless a saved optimizer has the same parameter groups.

    Raises:
        CheckpointError: It has others.
    """
    own = [len(group["params"]) for group in optimizer.param_groups]
    saved = [len(group["params"]) for group in state_dict["param_groups"]]
    if own != saved:
        raise CheckpointError(
            f"{source} belongs to another optimizer, with {saved} parameters in its groups instead of {own}. Nothing "
            "was loaded. Make the optimizer as it was; a checkpoint may also be loaded with `load_optimizer=False`."
        )


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if hasattr(value, "shape") else None
