"""The layers of a model, for callbacks that look at each: the modules that hold parameters themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pytorch_accelerated._views import run_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

    from pytorch_accelerated.trainer import Trainer

_OF_THE_MODEL_ITSELF = "model"
_OUTSIDE_THE_MODEL = "outside_the_model"


def check_not_sharded(trainer: Trainer, callback_name: str, remedy: str) -> None:
    """Raise if the run splits the parameters over the processes.

    Raises:
        ValueError: It does.
    """
    if run_of(trainer).is_sharded:
        raise ValueError(
            f"`{callback_name}` looks at single parameters, which this run splits over the processes, as FSDP and "
            f"DeepSpeed do. {remedy}"
        )


def parameters_by_layer(model: nn.Module, outside: Iterable[torch.Tensor] = ()) -> dict[str, list[torch.Tensor]]:
    """Return the trainable parameters of each layer by the name of its module.

    A parameter that several layers share belongs to the first.

    Args:
        model: The model.
        outside: Parameters that the optimizer holds beside the model, which make a layer of their own.

    Example:
        >>> [*parameters_by_layer(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)))]
        ['0', '2']
    """
    layers: dict[str, list[torch.Tensor]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [each for each in module.parameters(recurse=False) if each.requires_grad and id(each) not in seen]
        seen.update(map(id, own))
        if own:
            layers[name or _OF_THE_MODEL_ITSELF] = own
    others = [parameter for parameter in outside if parameter.requires_grad]
    return {**layers, _OUTSIDE_THE_MODEL: others} if others else layers


def norms_by_layer(layers: Mapping[str, Iterable[torch.Tensor | None]]) -> dict[str, torch.Tensor]:
    """Return the norm of all tensors of each layer together, a scalar on their device; none of an empty layer.

    Args:
        layers: The tensors by layer, such as gradients, of which some may be missing.
    """
    norms = {}
    for name, tensors in layers.items():
        present = [
            torch.linalg.vector_norm(_values_of(each), dtype=_dtype(each)) for each in tensors if each is not None
        ]
        if present:
            norms[name] = joint_norm(present)
    return norms


def joint_norm(norms: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the norm of what several norms are those of, on the device of the first."""
    first, *others = norms
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack([first, *(each.to(first.device) for each in others)]))
    return norm


def _values_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().coalesce().values() if tensor.is_sparse else tensor.detach()


def _dtype(tensor: torch.Tensor) -> torch.dtype | None:
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else None
