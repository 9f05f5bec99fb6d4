"""The names in a model's state: the same whether or not the model, or a part of it, is compiled."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from pytorch_accelerated._models.wrappers import COMPILED, is_compiled
from pytorch_accelerated.exceptions import CheckpointError

if TYPE_CHECKING:
    from pytorch_accelerated._types import StateDict, StateMapping

METADATA = "_metadata"
"""Where PyTorch keeps what belongs to a state but is no entry of it: an attribute, which files preserve."""

_Value = TypeVar("_Value")


def portable_name(model: nn.Module, name: str) -> str:
    """Return the name that a parameter, buffer or module of a model would have if no part of it were compiled.

    Args:
        model: The model.
        name: The name, as ``named_parameters``, ``named_modules`` or ``state_dict`` returns it.
    """
    module: nn.Module | None = model
    kept = []
    for segment in name.split("."):
        if module is None or segment != COMPILED or not is_compiled(module):
            kept.append(segment)
        module = None if module is None else module._modules.get(segment)  # noqa: SLF001 - `get_submodule` would raise
    return ".".join(kept)


def portable_state_dict(model: nn.Module, state_dict: StateMapping | None = None) -> StateDict:
    """Return a model's state with portable names.

    Args:
        model: The model.
        state_dict: The state, if it is not the one that the model returns.
    """
    state = model.state_dict() if state_dict is None else state_dict
    return renamed(state, lambda name: portable_name(model, name), f"The {type(model).__name__}")


def portable_parameters(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
    """Return the parameters of a model by their portable names."""
    named = model.named_parameters(remove_duplicate=remove_duplicate)
    return dict(_one_to_one(named, lambda name: portable_name(model, name), f"The {type(model).__name__}"))


def live_state_dict(model: nn.Module, state_dict: StateMapping) -> StateDict:
    """Return a state with portable names as a model expects it, parts of which may be compiled."""
    modules = {portable_name(model, name): name for name, _ in model.named_modules(remove_duplicate=False)}

    def live(name: str) -> str:
        head, rest = name, ""
        while head not in modules:
            head, _, last = head.rpartition(".")
            rest = f".{last}{rest}"
        return f"{modules[head]}{rest}".removeprefix(".")

    return renamed(state_dict, live, "The state")


def match_names(state_dict: StateMapping, names: Collection[str], source: str) -> StateDict:
    """Return a state from a file with the portable names of a model, wherever they are recognized.

    A name that the model has is kept. Another one is compared without its segments ``_orig_mod``, which compiled
    modules have put there, and which earlier versions have removed from the names of the user's modules too.

    Args:
        state_dict: The state.
        names: The portable names in the state of the model.
        source: How error messages refer to the file.

    Raises:
        CheckpointError: Two entries of the file have the same name then.
    """
    known = set(names)
    by_plain = {without_compiled(name): name for name in names}
    # Where two names of the model differ in these segments only, the file must have them.
    ambiguous = {without_compiled(name) for name in names if by_plain[without_compiled(name)] != name}

    def match(name: str) -> str:
        plain = without_compiled(name)
        return name if name in known or plain in ambiguous else by_plain.get(plain, plain)

    return renamed(state_dict, match, source)


def without_compiled(name: str) -> str:
    """Return a name without its segments ``_orig_mod``."""
    return ".".join(segment for segment in name.split(".") if segment != COMPILED)


def renamed(state_dict: StateMapping, rename: Callable[[str], str], source: str) -> StateDict:
    """Return a copy of a model's state with other names, in its metadata as well.

    Args:
        state_dict: The state.
        rename: Returns the new name of an entry or a module.
        source: How error messages refer to where the state comes from.

    Raises:
        CheckpointError: Two entries have the same name then.
    """
    state = OrderedDict(_one_to_one(state_dict.items(), rename, source))
    metadata: Mapping[str, object] | None = getattr(state_dict, METADATA, None)
    if metadata is not None:  # of a compiled module and the one that it wraps, the second counts
        vars(state)[METADATA] = OrderedDict((rename(name), entry) for name, entry in metadata.items())
    return state


def _one_to_one(
    items: Iterable[tuple[str, _Value]], rename: Callable[[str], str], source: str
) -> Iterator[tuple[str, _Value]]:
    originals: dict[str, str] = {}
    for original, value in items:
        name = rename(original)
        if name in originals:
            raise CheckpointError(
                f"{source} has two entries with the same name once what `torch.compile` adds is removed: "
                f"{originals[name]!r} and {original!r} are both {name!r}. Expected one. Rename a module, or remove the "
                "entry that is not meant. Nothing was loaded."
            )
        originals[name] = original
        yield name, value
