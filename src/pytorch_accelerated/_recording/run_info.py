"""What a run is made of: its settings, the versions of packages, and that of the program."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytorch_accelerated._accumulation import groups_of
from pytorch_accelerated._checkpoint.manifest import installed_versions
from pytorch_accelerated._distributed.fast_path import unwrap_optimizer
from pytorch_accelerated._history.code_version import code_version
from pytorch_accelerated._history.tables import plain_value

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from pytorch_accelerated.run_config import TrainerRunConfig

Plain = int | float | str | bool

_MAX_TEXT_LENGTH = 250  # MLflow refuses more
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # of an object that has no text of its own


def run_info_of(config: TrainerRunConfig, model: nn.Module, optimizer: Optimizer, scheduler: object) -> dict[str, Any]:
    """Return what a training run that starts now is made of; see `RunHistory.run_info`.

    Args:
        config: Of the run.
        model: The model of the program, without wrappers.
        optimizer: The optimizer, prepared or not.
        scheduler: The scheduler, or the group of several; ``None`` for none.
    """
    settings = settings_of(config, model, optimizer, scheduler)
    return {"settings": settings, "versions": installed_versions(), "code": code_version()}


def settings_of(
    config: TrainerRunConfig, model: nn.Module, optimizer: Optimizer, scheduler: object
) -> dict[str, Plain]:
    """Return the run configuration, the settings of each group of the optimizer, and the names of classes."""
    groups = groups_of(optimizer)
    settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    parts = {"model": model, "optimizer": unwrap_optimizer(optimizer), "scheduler": scheduler}
    classes = {name: type(part).__name__ for name, part in parts.items() if part is not None}
    return flattened({**config.to_dict(), **classes, "optimizer_groups": dict(enumerate(settings))})


def flattened(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Plain]:
    """Return nested mappings as a single one of numbers and short texts, which are the same in each process.

    Example:
        >>> flattened({"net": {"width": 8}, "depth": 3})
        {'net/width': 8, 'depth': 3}
    """
    flat: dict[str, Plain] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}/")
        else:
            plain = value if isinstance(value, bool) else plain_value(value)
            flat[f"{prefix}{name}"] = _ADDRESS.sub("", plain)[:_MAX_TEXT_LENGTH] if isinstance(plain, str) else plain
    return flat
