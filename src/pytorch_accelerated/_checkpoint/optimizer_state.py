"""The state of an optimizer: does it fit? Where it does, it is assigned to the parameters by their names."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pytorch_accelerated._checkpoint.model_state import shape_of
from pytorch_accelerated._checkpoint.names import METADATA, portable_parameters
from pytorch_accelerated._distributed.fast_path import unwrap_optimizer
from pytorch_accelerated._optimizers.group import OptimizerGroup
from pytorch_accelerated._tensors.nested import tensors_in
from pytorch_accelerated.exceptions import CheckpointError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pytorch_accelerated._types import ParameterGroup, StateDict, StateMapping

CLASS, _PARAMETERS = "class", "parameters"


class DifferentPartError(CheckpointError):
    """The state belongs to a different optimizer or scheduler. Nothing was loaded, so it can be loaded without them."""


# --- where a state comes from ------------------------------------------------------------------------------------


def optimizer_state_of(optimizer: Optimizer, modules: Mapping[str, nn.Module] | None) -> StateDict:
    """Return the state of an optimizer, which knows its class and the names of its parameters.

    Args:
        optimizer: The optimizer.
        modules: The modules whose parameters it holds; see `parameters_of`. ``None`` if their names are not known.
    """
    members = members_of(optimizer)
    if members is not None:
        return {name: optimizer_state_of(member, modules) for name, member in members.items()}
    origin: StateDict = {CLASS: class_name(unwrap_optimizer(optimizer))}
    if modules is not None:
        origin[_PARAMETERS] = _parameter_names(optimizer, parameters_of(modules))
    return with_origin(optimizer.state_dict(), origin)


def members_of(optimizer: object) -> Mapping[Any, Optimizer] | None:
    """Return the optimizers of a group by name or index, whose states are saved one by one; ``None`` for a single one.

    Args:
        optimizer: The optimizer or group, prepared or not.
    """
    inner = unwrap_optimizer(optimizer)
    return inner.optimizers if isinstance(inner, OptimizerGroup) else None


def groups_in(state: StateMapping) -> list[ParameterGroup]:
    """Return the parameter groups in the state of an optimizer, or in those of a group of optimizers, one by one."""
    states = state.values() if _is_of_several(state) else [state]
    return [group for each in states for group in each.get("param_groups", ())]


def _is_of_several(state: StateMapping) -> bool:
    """Tell whether a state is that of a group of optimizers."""
    states = state.values() if state and "param_groups" not in state else [{}]
    return all(isinstance(each, Mapping) and "param_groups" in each for each in states)


def with_origin(state: StateDict, origin: StateMapping) -> StateDict:
    """Return a copy of a state that knows where it comes from, in what is no entry of it."""
    labelled = OrderedDict(state)
    vars(labelled)[METADATA] = origin
    return labelled


def origin_of(state: StateMapping) -> StateMapping:
    """Return what `with_origin` has added; nothing if it has not."""
    origin: StateMapping = getattr(state, METADATA, {})
    return origin


def class_name(value: object) -> str:
    """Return the name of the class of an object."""
    return type(value).__name__


def _parameter_names(optimizer: Optimizer, parameters: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Return a name for each parameter of an optimizer, group by group."""
    names = {id(value): name for name, value in reversed(list(parameters.items()))}  # the first one of several
    numbers = itertools.count()
    return [
        [
            names.get(id(value)) or f"number {next(numbers)} of those without a name, of shape {shape_of(value)}"
            for value in group["params"]
        ]
        for group in getattr(optimizer, "param_groups", ())
    ]


# --- what does not fit -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    """The tensors that the parameters of an optimizer are compared by, each by its name.

    Args:
        parameters: The parameters.
        loaded: The parameters as they will be when the models are loaded.
        saved: The states of the models that come with that of the optimizer.
    """

    parameters: Mapping[str, torch.Tensor]
    loaded: Mapping[str, torch.Tensor]
    saved: StateMapping


def parameters_of(modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Return the parameters of some modules by name, after that of the module; the main one is called ``""``."""
    return {
        _join(module_name, name): value
        for module_name, module in modules.items()
        for name, value in portable_parameters(module).items()
    }


def entries_of(states: Mapping[str, StateMapping]) -> StateDict:
    """Return the entries of the states of some modules, by the same names."""
    return {_join(module_name, name): value for module_name, state in states.items() for name, value in state.items()}


def _join(module_name: str, name: str) -> str:
    return f"{module_name}.{name}" if module_name else name


def fit_optimizer_state(
    optimizer: Optimizer, state_dict: StateDict, named: Named, source: str, saved_class: str | None = None
) -> StateDict:
    """Return a saved optimizer's state in the order of this one's parameters, or reject it.

    Args:
        optimizer: The optimizer.
        state_dict: The state to load. If it knows the names of its parameters, it is assigned by name.
        named: The parameters and other tensors by name.
        source: How error messages refer to where the state comes from.
        saved_class: The class of the optimizer that saved it, if the state does not know; ``None`` if unknown.

    Raises:
        DifferentPartError: It is the state of another class of optimizer, or of other parameters.
    """
    members = members_of(optimizer)
    difference = _other_optimizers(members, state_dict)
    if members is not None and difference is None:
        return {
            name: fit_optimizer_state(member, state_dict[name], named, f"{source} (for the optimizer {name!r})")
            for name, member in members.items()
        }
    origin, order = origin_of(state_dict), None
    if difference is None:
        difference = _other_class(optimizer, state_dict, origin.get(CLASS) or saved_class)
    if difference is None and _has_groups(optimizer, state_dict):
        difference = _other_sizes(optimizer, state_dict)
        if difference is None and _PARAMETERS in origin:
            order, difference = _match_names(origin[_PARAMETERS], _parameter_names(optimizer, named.parameters), named)
        if difference is None:
            state_dict = _in_order(state_dict, order)
            difference = _other_shapes(optimizer, state_dict, named, order)
    if difference is not None:
        raise _different_optimizer(source, difference)
    return state_dict


def load_optimizer_state(optimizer: Optimizer, state_dict: StateDict, source: str) -> None:
    """Load what `fit_optimizer_state` returned.

    Raises:
        DifferentPartError: The optimizer does not accept it.
    """
    try:
        optimizer.load_state_dict(state_dict)
    except Exception as error:  # the class may be the user's
        raise _different_optimizer(source, f"it says {error!r}") from error


def _different_optimizer(source: str, difference: str) -> DifferentPartError:
    return DifferentPartError(
        f"{source} belongs to a different optimizer: {difference}. Nothing was loaded. Create the optimizer as it was, "
        "or load a checkpoint with `load_optimizer=False`."
    )


def _other_optimizers(members: Mapping[Any, object] | None, state_dict: StateMapping) -> str | None:
    """Return in what a state shows that it belongs to one optimizer instead of several, or to others."""
    if members is None:
        return f"it has the states of several, {list(state_dict)}" if _is_of_several(state_dict) else None
    if not _is_of_several(state_dict):
        return f"it has the state of a single one instead of those of {list(members)}"
    is_same = state_dict.keys() == members.keys()
    return None if is_same else f"it has the states of {list(state_dict)} instead of {list(members)}"


def _has_groups(optimizer: object, state_dict: StateMapping) -> bool:
    """Tell whether a state has to have groups; with a `state_dict` of its own, an optimizer may have another form."""
    state_method = getattr(type(unwrap_optimizer(optimizer)), "state_dict", None)
    return "param_groups" in state_dict or state_method is torch.optim.Optimizer.state_dict


def _other_class(optimizer: Optimizer, state_dict: StateMapping, then: str | None) -> str | None:
    optimizer = unwrap_optimizer(optimizer)
    now = class_name(optimizer)
    if then is not None:
        return None if then == now else f"its class is {then!r} instead of {now!r}"
    # The state does not know its class, but its groups have the settings of it.
    groups: list[ParameterGroup] = [{**group} for group in state_dict.get("param_groups", ())]
    defaults: StateMapping = getattr(optimizer, "defaults", {})
    if groups and defaults:
        tried = object.__new__(type(optimizer))
        tried.__setstate__({"defaults": {**defaults}, "state": {}, "param_groups": groups})  # adds what is new
    missing = sorted({name for group in groups for name in defaults.keys() - group.keys()})
    return f"its groups lack the settings {missing} of a {now!r}" if missing else None


def _other_sizes(optimizer: Optimizer, state_dict: StateMapping) -> str | None:
    current = [len(group["params"]) for group in optimizer.param_groups]
    saved = [len(group["params"]) for group in state_dict["param_groups"]]
    return None if current == saved else f"its groups have {saved} parameters instead of {current}"


def _match_names(
    then: Sequence[Sequence[str]], now: Sequence[Sequence[str]], named: Named
) -> tuple[list[list[int]], str | None]:
    """Return where each parameter was in its group, or else in what the groups differ."""
    order = []
    for index, (names_then, names_now) in enumerate(zip(then, now, strict=True)):
        former_names = {**dict(zip(names_now, names_now, strict=True)), **_renamings(names_then, names_now, named)}
        lacking = sorted(name for name in names_now if former_names[name] not in names_then)
        if lacking:
            others = sorted(set(names_then) - set(names_now))
            return [], f"its parameter group {index} has the parameters {others} in place of {lacking}"
        order.append([names_then.index(former_names[name]) for name in names_now])
    return order, None


def _renamings(then: Sequence[str], now: Sequence[str], named: Named) -> dict[str, str]:
    """Return the former names of parameters that the model has renamed in loading the state."""
    former = [name for name in then if name not in now and name in named.saved]
    loaded = named.loaded
    renamings: dict[str, str] = {}
    for name in now:
        if name not in then and name in loaded:
            same = (other for other in former if _is_same(loaded[name], named.saved[other]))
            found = next(same, None)
            if found is not None:
                former.remove(found)
                renamings[name] = found
    return renamings


def _is_same(left: torch.Tensor, right: object) -> bool:
    return (
        isinstance(right, torch.Tensor) and shape_of(left) == shape_of(right) and torch.equal(left.cpu(), right.cpu())
    )


def _in_order(state_dict: StateDict, order: list[list[int]] | None) -> StateDict:
    if order is None:
        return state_dict
    groups = [
        {
            **group,
            **{name: [group[name][place] for place in places] for name in ("params", "param_names") if name in group},
        }
        for group, places in zip(state_dict["param_groups"], order, strict=True)
    ]
    return {**state_dict, "param_groups": groups}


def _other_shapes(
    optimizer: Optimizer, state_dict: StateMapping, named: Named, order: list[list[int]] | None
) -> str | None:
    """Return in what the shapes of the averages show that they belong to other parameters, or to former shapes."""
    rows = list(itertools.chain.from_iterable(_rows(optimizer, state_dict, named, order)))
    for row in rows:
        if row.is_resized:
            return f"{row.name!r} had the shape {row.shape_then} instead of {row.shape}"
        if row.is_moved and not all(shape_of(tensor) in ((), row.shape) for tensor in tensors_in(dict(row.state))):
            return "its parameters are in another order, and not all of its state belongs to single parameters"
    if order is None and _are_permuted(rows):
        return "its parameters are in another order"
    return None


@dataclass(frozen=True)
class _Row:
    """A parameter, and the state that an optimizer is about to load for it."""

    name: str
    shape: tuple[int, ...] | None
    shape_then: tuple[int, ...] | None
    is_moved: bool
    state: Mapping[str, object]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors in the state, but not of numbers."""
        shapes = {name: shape_of(value) for name, value in self.state.items()}
        return {name: shape for name, shape in shapes.items() if shape}

    @property
    def is_resized(self) -> bool:
        """Whether the parameter has another shape now, and its state does not have this one."""
        has_other_shape = any(shape != self.shape for shape in self.shapes.values())
        return self.shape_then not in (None, self.shape) and has_other_shape


def _rows(
    optimizer: Optimizer, state_dict: StateMapping, named: Named, order: list[list[int]] | None
) -> Iterator[list[_Row]]:
    names = _parameter_names(optimizer, named.parameters)
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, state_dict["param_groups"], strict=True)):
        rows = []
        for place, (value, number) in enumerate(zip(group["params"], saved["params"], strict=True)):
            name, state = names[index][place], state_dict.get("state", {}).get(number)
            shape = shape_of(named.loaded.get(name, value))
            is_moved = order is not None and order[index][place] != place
            rows.append(
                _Row(
                    name, shape, shape_of(named.saved.get(name)), is_moved, state if isinstance(state, Mapping) else {}
                )
            )
        yield rows


def _are_permuted(rows: Sequence[_Row]) -> bool:
    """Tell whether averages have the shapes of the parameters, but in another order."""
    for name in {name for row in rows for name in row.shapes}:
        pairs = [(row.shapes[name], row.shape) for row in rows if name in row.shapes]
        saved, current = ([str(pair[side]) for pair in pairs] for side in (0, 1))
        if saved != current and sorted(saved) == sorted(current):
            return True
    return False
