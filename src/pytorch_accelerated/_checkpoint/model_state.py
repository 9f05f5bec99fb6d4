"""The state of a model: does it fit the model that it meets? That is decided before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from pytorch_accelerated._checkpoint.names import live_state_dict, match_names, portable_name, portable_state_dict
from pytorch_accelerated._distributed.fast_path import unwrap_optimizer
from pytorch_accelerated.exceptions import CheckpointError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pytorch_accelerated._types import StateMapping

_OF_PYTORCH = "torch."


def load_model_state(model: nn.Module, state_dict: StateMapping, source: str) -> None:
    """Load a model's state, or reject it before anything changes.

    Args:
        model: The model.
        state_dict: The state, with or without the names of `torch.compile`.
        source: How error messages refer to where the state comes from.

    Raises:
        CheckpointError: The model does not accept it; the message names the parameters that differ.
    """
    check_model_state(model, state_dict, source)
    load_checked_model_state(model, match_names(state_dict, portable_state_dict(model), source))


def load_checked_model_state(model: nn.Module, state_dict: StateMapping, optimizer: Optimizer | None = None) -> None:
    """Load a model's state that `check_model_state` has accepted.

    Args:
        model: The model.
        state_dict: The state, with portable names.
        optimizer: Holds parameters of the model; where loading has replaced some of them, it gets the new ones.
    """
    before = dict(model.named_parameters())
    model.load_state_dict(live_state_dict(model, state_dict))
    after = dict(model.named_parameters())
    replaced = {before[name]: after[name] for name in before if after.get(name, before[name]) is not before[name]}
    if replaced and optimizer is not None:
        _exchange_parameters(unwrap_optimizer(optimizer), replaced)


def _exchange_parameters(optimizer: Optimizer, replaced: Mapping[nn.Parameter, nn.Parameter]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]
    for old, new in replaced.items():
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)


def check_model_state(model: nn.Module, state_dict: StateMapping, source: str) -> nn.Module:
    """Raise unless a model accepts a state: it has the same names and shapes, or the model's own loading adapts it.

    Modules may rename, resize, convert or create parameters when they load a state. Whether that succeeds is tried out
    on a copy of the model.

    Args:
        model: The model.
        state_dict: The state to load, with or without the names of `torch.compile`.
        source: How error messages refer to where the state comes from.

    Returns:
        A model like the one that has loaded the state: the copy, or the model itself if nothing had to be tried.

    Raises:
        CheckpointError: The model does not accept it; the message lists missing and unexpected parameters, and
            different shapes.
    """
    current = portable_state_dict(model)
    state_dict = match_names(state_dict, current, source)
    differences = _differences(current, state_dict)
    if not differences and not adapts_states(model):
        return model
    tried = _copy_of(model)
    if tried is None and not differences:
        return model
    try:
        if tried is None:
            raise ValueError("it cannot be copied, to try out whether it adapts this state")  # noqa: TRY301
        tried.load_state_dict(live_state_dict(tried, state_dict))
    except Exception as error:
        reason = f"Parameters {differences}" if differences else f"The model says: {error}"
        raise CheckpointError(
            f"{source} belongs to a different model. {reason}. Nothing was loaded. Create the model with the settings "
            "it was saved with."
        ) from error
    return tried


def try_to_load(model: nn.Module, state_dict: StateMapping) -> tuple[list[str], list[str]] | None:
    """Load into a copy of a model what it accepts of a state, with ``strict=False``.

    Returns:
        The names that are missing from the state, and those that the model does not expect; ``None`` if it refuses the
        state as a whole. A model that cannot be copied is compared by its names and shapes.
    """
    tried = _copy_of(model)
    if tried is None:
        current = portable_state_dict(model)
        missing = [name for name in current if name not in state_dict]
        unexpected = [name for name in state_dict if name not in current]
        return None if names_of_other_shape(current, state_dict) else (missing, unexpected)
    try:
        keys = tried.load_state_dict(live_state_dict(tried, state_dict), strict=False)
    except Exception:  # a shape differs, or the user's own code refuses it
        return None
    missing, unexpected = ([portable_name(tried, name) for name in part] for part in (keys or ((), ())))
    return missing, unexpected


def _copy_of(model: nn.Module) -> nn.Module | None:
    try:
        return copy.deepcopy(model)
    except Exception:  # a part of it cannot be copied
        return None


def _differences(current: StateMapping, saved: StateMapping) -> str:
    """Describe the names and shapes in which two states differ; empty if they do not."""
    differences = {
        "missing from it": sorted(current.keys() - saved.keys()),
        "unexpected in it": sorted(saved.keys() - current.keys()),
        "with a different shape": [
            f"{name} {shape_of(saved[name])} instead of {shape_of(current[name])}"
            for name in names_of_other_shape(current, saved)
        ],
    }
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in differences.items() if names)


def names_of_other_shape(current: StateMapping, saved: StateMapping) -> list[str]:
    """Return the names in both of two states whose tensors have different shapes, or no shape yet in one of them."""
    return sorted(name for name in current.keys() & saved.keys() if shape_of(current[name]) != shape_of(saved[name]))


def adapts_states(model: nn.Module) -> bool:
    """Tell whether a part of a model has code of its own for loading a state, which might refuse it."""
    return any(
        module._load_state_dict_pre_hooks  # noqa: SLF001 - PyTorch's own, but there is no other way to ask
        or module._load_state_dict_post_hooks  # noqa: SLF001
        or not all(
            getattr(type(module), method).__module__.startswith(_OF_PYTORCH)
            for method in ("load_state_dict", "_load_from_state_dict", "set_extra_state")
        )
        for module in model.modules()
    )


def shape_of(value: object) -> tuple[int, ...] | None:
    """Return the shape of a tensor; ``None`` for anything else, and for a tensor that has no shape yet."""
    try:
        return tuple(value.shape) if isinstance(value, torch.Tensor) else None
    except RuntimeError:  # not initialized
        return None
