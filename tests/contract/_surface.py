"""Describe the public names of the package and their signatures; as a script, write them to `surface.json`."""

from __future__ import annotations

import enum
import importlib
import inspect
import json
import pkgutil
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytorch_accelerated
from pytorch_accelerated._proxy import Forwarded

SURFACE = Path(__file__).with_name("surface.json")


def describe_package() -> dict[str, dict[str, Any]]:
    """Describe every public module: one whose dotted name has no part with a leading underscore."""
    found = pkgutil.walk_packages(pytorch_accelerated.__path__, "pytorch_accelerated.")
    names = ["pytorch_accelerated", *(module.name for module in found)]
    public = sorted(name for name in names if not _is_private(name))
    return {name: describe_module(importlib.import_module(name)) for name in public}


def describe_module(module: Any) -> dict[str, Any]:
    """Describe the names that a module exports."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return {name: describe(getattr(module, name), module.__name__) for name in sorted(names)}


def describe(value: Any, module_name: str) -> Any:
    """Describe a class by its bases, fields, properties and methods, a function by its arguments.

    For a name that another public module defines, or another package, return only where it comes from.
    """
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return type(value).__name__
    home = value.__module__
    if home.partition(".")[0] != "pytorch_accelerated":
        return f"from {home.partition('.')[0]}"
    if home != module_name and not _is_private(home):
        return f"from {home}"
    return describe_class(value) if inspect.isclass(value) else arguments_of(value)


def _is_private(module_name: str) -> bool:
    return any(part.startswith("_") for part in module_name.split("."))


def describe_class(cls: type) -> dict[str, Any]:
    """Describe a class by its members and those of its private bases, which have no entry of their own."""
    description: dict[str, Any] = {"bases": [base.__name__ for base in cls.__mro__[1:-1]]}
    public_bases = [base for base in cls.__mro__[1:] if not _is_private(base.__module__)]
    private_bases = [base for base in cls.__mro__ if _is_of_private_module(base) and not _is_among(base, public_bases)]
    members = {name: value for base in reversed([cls, *private_bases]) for name, value in vars(base).items()}
    if issubclass(cls, enum.Enum):
        description["members"] = list(cls.__members__)
        return description
    if is_dataclass(cls):
        description["fields"] = [field.name for field in fields(cls)]
    elif issubclass(cls, (tuple, dict)):
        description["fields"] = list(cls.__annotations__)
    if "__init__" in members:
        description["init"] = arguments_of(members["__init__"])
    public = {name: value for name, value in sorted(members.items()) if not name.startswith("_")}
    description["properties"] = [name for name, value in public.items() if isinstance(value, (property, Forwarded))]
    methods = {name: getattr(value, "__func__", value) for name, value in public.items()}
    description["methods"] = {name: arguments_of(value) for name, value in methods.items() if inspect.isfunction(value)}
    return description


def _is_of_private_module(base: type) -> bool:
    return base.__module__.startswith("pytorch_accelerated.") and _is_private(base.__module__)


def _is_among(base: type, others: list[type]) -> bool:
    return any(issubclass(other, base) for other in others)


def arguments_of(function: Any) -> str:
    """Return the arguments of a signature, without annotations: ``self, batch, *, step=0, **kwargs``."""
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=parameter.empty, default=_Default.of(parameter.default))
        for parameter in signature.parameters.values()
    ]
    return str(inspect.Signature(parameters))[1:-1]


class _Default:
    """A default value whose `repr` is the same in every process."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    @classmethod
    def of(cls, value: Any) -> Any:
        if value is inspect.Parameter.empty:
            return value
        if inspect.isclass(value):
            return cls(value.__name__)
        if isinstance(value, enum.Enum):  # such as a signal, whose number depends on the system
            return cls(f"{type(value).__name__}.{value.name}")
        if isinstance(value, tuple):
            return cls("(" + ", ".join(repr(cls.of(item)) for item in value) + ")")
        return cls(repr(value))


if __name__ == "__main__":
    SURFACE.write_text(json.dumps(describe_package(), indent=1) + "\n")
