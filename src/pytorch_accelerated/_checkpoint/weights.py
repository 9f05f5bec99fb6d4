"""The weights in a file of any origin: where they are, which of them fit a model, and what was not loaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from pytorch_accelerated._checkpoint.model_state import (
    adapts_states,
    check_model_state,
    names_of_other_shape,
    shape_of,
    try_to_load,
)
from pytorch_accelerated._checkpoint.names import (
    match_names,
    portable_parameters,
    portable_state_dict,
    renamed,
    without_compiled,
)
from pytorch_accelerated._types import StateDict, StateMapping
from pytorch_accelerated.exceptions import CheckpointError

MODEL, OPTIMIZER, SCHEDULER = "model_state_dict", "optimizer_state_dict", "scheduler_state_dict"
"""The entries of a checkpoint for the states of the model, the optimizer and the scheduler."""

FROZEN = "frozen_parameters"
"""The entry for the names of the parameters that were left out, because they are not trained."""

_ENTRIES_OF_OTHERS = ("state_dict", "model", "model_state", "module", "network", "net", "weights", "params")
"""Under which names other programs save the state of a model: Lightning, torchvision, DeepSpeed, and many more."""

_WRAPPERS = ("module", "model")
"""The attributes in which DataParallel and DDP, and by custom a LightningModule, hold the model that they wrap."""

_EXTRA_STATE = "_extra_state"  # how PyTorch calls the state of a module that is not a tensor
_MAX_NESTING = 2  # dictionaries around the state
_MAX_NAMES = 10


class LoadedCheckpoint(dict[str, Any]):
    """The entries of a checkpoint that was loaded, and what of it was not.

    With ``strict=True`` everything was loaded, and nothing is listed.

    Args:
        entries: The entries.
        missing_keys: See the attribute.
        unexpected_keys: See the attribute.
        mismatched_keys: See the attribute.
    """

    missing_keys: list[str]
    """Names of the model that are not in the file. They keep their values."""

    unexpected_keys: list[str]
    """Names in the file that the model does not have."""

    mismatched_keys: list[str]
    """Names that have another shape in the file. They keep their values."""

    left_out: dict[str, str]
    """The other entries of the file that do not fit, such as ``optimizer_state_dict``, each with the reason."""

    def __init__(
        self,
        entries: Mapping[str, Any],
        missing_keys: Iterable[str] = (),
        unexpected_keys: Iterable[str] = (),
        mismatched_keys: Iterable[str] = (),
    ) -> None:
        super().__init__(entries)
        self.missing_keys, self.unexpected_keys = list(missing_keys), list(unexpected_keys)
        self.mismatched_keys = list(mismatched_keys)
        self.left_out = {}

    @contextmanager
    def leaves_out(self, name: str, strict: bool) -> Iterator[None]:
        """Unless ``strict``, note an entry as left out if the body finds that it does not fit."""
        try:
            yield
        except CheckpointError as error:
            if strict:
                raise
            self.left_out[name] = str(error).partition(" Nothing was loaded.")[0]

    def describe_rest(self) -> str:
        """Say in sentences what was not loaded; empty if everything was."""
        lists = (
            ("not in the file", self.missing_keys),
            ("of another shape in the file", self.mismatched_keys),
            ("not in the model", self.unexpected_keys),
        )
        sentences = [f"{len(names)} {text}: {_listed(names)}." for text, names in lists if names]
        sentences += [f"`{name}` was left out: {reason}" for name, reason in self.left_out.items()]
        return f"Not everything was loaded. {' '.join(sentences)}" if sentences else ""


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


# --- where they are ----------------------------------------------------------------------------------------------


def find_weights(entries: StateMapping, source: str, names: Collection[str] = ()) -> StateMapping:
    """Return the state of the model in a file: under the name that this library uses, or another program, or bare.

    Args:
        entries: The entries of the file.
        source: How error messages refer to the file.
        names: The names in the state of the model, which tell it from those of others in the file.

    Raises:
        CheckpointError: There is none, or there are several and nothing tells which one is meant.
    """
    if isinstance(entries.get(MODEL), Mapping):
        state: StateMapping = entries[MODEL]
        return state
    candidates = _states_in(entries)
    for name in _ENTRIES_OF_OTHERS:
        if name in candidates:
            return candidates[name]
    fitting = [
        state
        for state in candidates.values()
        if any(name in names or without_compiled(name) in names for name in state)
    ]
    if len(candidates) == 1 or len(fitting) == 1:
        return (fitting or list(candidates.values()))[0]
    if candidates:
        raise CheckpointError(
            f"{source} has the states of several models, {sorted(candidates)}, and no `{MODEL}`. Load the one that you "
            f"mean with `model.load_state_dict(torch.load(path)[{min(candidates)!r}])`."
        )
    raise CheckpointError(
        f"{source} has no `{MODEL}`, only the entries {sorted(map(str, entries))}. Expected a file written by "
        "`save_checkpoint`, a state dict, or a dictionary that contains one, as `state_dict` or `model`."
    )


def _states_in(entries: StateMapping, nesting: int = _MAX_NESTING) -> dict[str, StateMapping]:
    """Return what looks like the state of a model: a mapping itself, else items of it, else items of those."""
    if _is_state_of_model(entries):
        return {MODEL: entries}
    inner = {str(name): value for name, value in entries.items() if isinstance(value, Mapping)}
    states = {name: value for name, value in inner.items() if _is_state_of_model(value)}
    if states or nesting == 1:
        return states
    deeper = [_states_in(value, nesting - 1) for value in inner.values()]
    return {name: state for states in deeper for name, state in states.items()}


def _is_state_of_model(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and any(isinstance(item, torch.Tensor) for item in value.values())
        and all(
            isinstance(name, str) and (isinstance(item, torch.Tensor) or name.endswith(_EXTRA_STATE))
            for name, item in value.items()
        )
    )


def frozen_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters that are not trained, as they are in the state of the model."""
    named = portable_parameters(model, remove_duplicate=False)
    return [name for name, parameter in named.items() if not parameter.requires_grad]


def frozen_in(entries: StateMapping) -> list[str]:
    """Return the names that `frozen_parameters` returned when a checkpoint was saved without them; often none."""
    names = entries.get(FROZEN)
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


# --- which of them fit -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """A state that a model can load as a whole, and what of a file is not in it.

    Where the file has nothing for the model, it contains the values that the model has now.
    """

    state: StateMapping
    loaded: nn.Module
    """A model like the one that has loaded the state."""

    saved: StateMapping
    """What the file has, with the names that the model uses."""

    missing_keys: Sequence[str] = ()
    unexpected_keys: Sequence[str] = ()
    mismatched_keys: Sequence[str] = ()


def fit_weights(model: nn.Module, entries: StateMapping, source: str, strict: bool = True) -> Fit:
    """Return the state that a model loads, without the prefixes of wrappers such as ``module.``.

    Args:
        model: The model.
        entries: The entries of a file of any origin. Parameters that were left out of it as frozen keep their values.
        source: How error messages refer to the file.
        strict: Whether all of it has to fit, as it does with ``load_state_dict``.

    Raises:
        CheckpointError: It does not fit, or with ``strict=False``, nothing of it does.
    """
    current = portable_state_dict(model)
    weights = find_weights(entries, source, current.keys())
    first_error: CheckpointError | None = None
    states = [
        _completed(model, current, state, frozen_in(entries)) for state in _without_wrappers(weights, current, source)
    ]
    for state in states if adapts_states(model) else states[:1]:
        try:
            return Fit(state, check_model_state(model, state, source), state)
        except CheckpointError as error:
            first_error = first_error or error
    if not strict:
        return _fit_in_part(model, current, states[0], source)
    raise CheckpointError(
        f"{first_error} To load only what fits, pass `strict=False` to `load_checkpoint`."
    ) from first_error


def _without_wrappers(weights: StateMapping, current: StateMapping, source: str) -> list[StateDict]:
    """Return a state without prefixes that wrappers put before all names; first the one most of whose names fit.

    Raises:
        CheckpointError: Its names collide with every prefix.
    """
    states: list[StateDict] = []
    first_error: CheckpointError | None = None
    for prefix in _prefixes(list(weights)):
        try:
            inner = renamed(weights, partial(_remove_prefix, prefix), source)
            states.append(match_names(inner, current, source))
        except CheckpointError as error:
            first_error = first_error or error
    if first_error is not None and not states:
        raise first_error
    return sorted(states, key=lambda state: -sum(name in current for name in state))


def _remove_prefix(prefix: str, name: str) -> str:
    is_module = f"{name}." == prefix  # in the metadata of the state
    return "" if is_module else name.removeprefix(prefix)


def without_entries(state: StateMapping, names: Collection[str]) -> StateDict:
    """Return a copy of a state without some of its entries."""
    rest = renamed(state, str, "The state")  # with its metadata
    for name in names:
        rest.pop(name, None)
    return rest


def _prefixes(names: Sequence[str]) -> Iterator[str]:
    """Yield the empty prefix, then longer ones: what all names have in front, or some have that wrappers put there."""
    yield ""
    heads = {name.partition(".")[0] for name in names if "." in name}
    is_shared = len(heads) == 1 and all("." in name for name in names)
    for head in sorted(heads):
        if is_shared or head in _WRAPPERS:
            inner = [name.removeprefix(f"{head}.") for name in names if name.startswith(f"{head}.")]
            yield from (f"{head}.{prefix}" for prefix in _prefixes(inner))


def _completed(model: nn.Module, current: StateMapping, state: StateDict, frozen: Iterable[str]) -> StateDict:
    """Add what a file may leave out: frozen parameters, and a parameter that is the same as another of the model."""
    same: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in portable_parameters(model, remove_duplicate=False).items():
        same[id(parameter)].append(name)
    for names in same.values():
        saved = next((name for name in names if name in state), None)
        if saved is not None and len(names) > 1:
            state.update({name: state[saved] for name in names if name not in state})
    state.update({name: current[name] for name in frozen if name in current and name not in state})
    return state


def _fit_in_part(model: nn.Module, current: StateMapping, state: StateDict, source: str) -> Fit:
    """Return the part of a state that fits, completed by the model's own values.

    What a module adapts in loading is kept: what is missing or unexpected, the model says itself.
    """
    saved, mismatched = state, list[str]()
    keys = try_to_load(model, state)
    if keys is None:
        mismatched = [name for name in names_of_other_shape(current, state) if shape_of(current[name]) is not None]
        state = without_entries(state, mismatched)
        keys = try_to_load(model, state)
    missing, unexpected = keys or ([], [])
    missing = [name for name in missing if name not in mismatched]
    fitting = without_entries(state, unexpected)
    if not fitting:
        raise CheckpointError(
            f"{source} belongs to a different model: nothing of it fits, neither by its name nor by its shape. Its "
            f"first entries are {_listed(list(state)[:3] + mismatched[:3])}, those of the model "
            f"{_listed(list(current)[:3])}. Nothing was loaded."
        )
    fitting.update({name: current[name] for name in (*missing, *mismatched) if name in current})
    return Fit(fitting, check_model_state(model, fitting, source), saved, missing, unexpected, mismatched)
