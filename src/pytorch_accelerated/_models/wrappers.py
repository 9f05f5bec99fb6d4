"""Tells modules wrapped by `torch.compile`, DDP or `DataParallel` from those of the user that only look like it."""

from __future__ import annotations

import sys

from torch import nn

COMPILED = "_orig_mod"
"""The child in which `torch.compile` keeps the module that it wraps."""


def is_compiled(module: nn.Module) -> bool:
    """Tell whether `torch.compile` returned a module; one of the user's may have a child of the same name."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # importing it takes seconds
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def without_compilation(module: nn.Module) -> nn.Module:
    """Return the module that a compiled one wraps, or the module itself."""
    return module.get_submodule(COMPILED) if is_compiled(module) else module


def is_compiled_in_place(module: nn.Module) -> bool:
    """Tell whether `Module.compile` was called, after which the hooks of a module are compiled with it."""
    return vars(module).get("_compiled_call_impl") is not None


def without_wrappers(module: nn.Module) -> nn.Module:
    """Return the module inside of `DistributedDataParallel`, `DataParallel` and `torch.compile`, in any order."""
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return without_wrappers(module.module)
    return without_wrappers(without_compilation(module)) if is_compiled(module) else module
