"""Companions: what a trainer and its callbacks carry along that has a state, such as a second network or a metric."""

from __future__ import annotations

import copy
import functools
import random
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from pytorch_accelerated._checkpoint.files import as_plain
from pytorch_accelerated._checkpoint.model_state import check_model_state, load_model_state
from pytorch_accelerated._checkpoint.names import match_names, portable_parameters, portable_state_dict
from pytorch_accelerated._checkpoint.optimizer_state import (
    Named,
    entries_of,
    fit_optimizer_state,
    optimizer_state_of,
    parameters_of,
)
from pytorch_accelerated._data.workers import is_worker_failure
from pytorch_accelerated._distributed.fast_path import unwrap_optimizer
from pytorch_accelerated._distributed.registry import AcceleratorRegistry
from pytorch_accelerated._measuring.states import load_state, state_of
from pytorch_accelerated._messages import warn
from pytorch_accelerated._optimizers.group import optimizers_in
from pytorch_accelerated._types import StateDict, Stateful, StateMapping
from pytorch_accelerated.exceptions import CheckpointError

TRAINED = "companions_state_dict"
"""The entry of a checkpoint for what is trained outside the model."""

_MAX_NESTING = 4  # objects and containers in objects and containers
_MAX_ITEMS = 1000  # in a container; one with more is data
_DATA = (DataLoader, Dataset, Sampler)  # their position is part of the position in the data
_PLAIN = (str, bytes, int, float, complex, type(None), torch.Tensor, np.ndarray)
_OURS = ("pytorch_accelerated", "accelerate")  # what their objects hold is saved elsewhere


@dataclass
class Companions:
    """Objects with a state that belong to a run, next to the model and what the library itself keeps.

    Each is named by where it is: ``loss_func``, ``networks['critic']``, ``AccuracyCallback/0.metric``.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    """Modules with parameters or buffers."""

    optimizers: dict[str, Optimizer] = field(default_factory=dict)
    """Optimizers besides the trainer's."""

    others: dict[str, Stateful] = field(default_factory=dict)
    """What else has a state. Each rank has its own, such as a metric of its samples."""

    parameters: list[torch.Tensor] = field(default_factory=list)
    """Parameters that the trainer's optimizer holds and no module does, in its order."""

    trained: set[str] = field(default_factory=set)
    """The modules with parameters that the trainer's optimizer holds."""

    def shared_state(self) -> StateDict:
        """Return what is identical on every rank."""
        return {
            "modules": _states_of(self.modules),
            "optimizers": _states_of(self.optimizers, lambda optimizer: optimizer_state_of(optimizer, self.modules)),
            "parameters": [parameter.detach() for parameter in self.parameters],
        }

    def local_state(self) -> StateDict:
        """Return what differs between ranks."""
        return {
            "others": _states_of(self.others),
            "gradients": {name: gradients_of(module) for name, module in self.modules.items()},
            "parameter_gradients": [parameter.grad for parameter in self.parameters],
        }

    def check(self, shared_state: StateMapping, source: str) -> None:
        """Raise unless the state of each module and optimizer fits.

        Args:
            shared_state: What `shared_state` returned.
            source: How error messages refer to where the state comes from.

        Raises:
            CheckpointError: One does not; the message names it.
        """
        loaded = dict(self.modules)
        for name, module in _both(self.modules, shared_state["modules"]):
            loaded[name] = check_model_state(module, shared_state["modules"][name], f"{source} (in its `{name}`)")
        for name in self.optimizers.keys() & shared_state["optimizers"].keys():
            self._fit_optimizer(name, shared_state, loaded, source)
        shapes, saved_shapes = ([tuple(p.shape) for p in ps] for ps in (self.parameters, shared_state["parameters"]))
        if shapes != saved_shapes:
            raise CheckpointError(
                f"{source} belongs to a different run: of the parameters in no module, its optimizer holds some of the "
                f"shapes {saved_shapes} instead of {shapes}. Nothing was loaded. Create them as they were."
            )

    def _fit_optimizer(
        self, name: str, shared_state: StateMapping, loaded: Mapping[str, nn.Module], source: str
    ) -> StateDict:
        named = Named(parameters_of(self.modules), parameters_of(loaded), entries_of(shared_state["modules"]))
        state = shared_state["optimizers"][name]
        return fit_optimizer_state(self.optimizers[name], state, named, f"{source} (in its `{name}`)")

    def load(self, shared_state: StateMapping, local_state: StateMapping, source: str) -> None:
        """Restore what `shared_state` and `local_state` returned, if it is there."""
        for name, module in _both(self.modules, shared_state["modules"]):
            load_model_state(module, shared_state["modules"][name], source)
            load_gradients(module, local_state["gradients"].get(name, {}))
        for name, optimizer in _both(self.optimizers, shared_state["optimizers"]):
            optimizer.load_state_dict(copy.deepcopy(self._fit_optimizer(name, shared_state, self.modules, source)))
        _copy_into(self.parameters, shared_state["parameters"])
        for parameter, gradient in zip(self.parameters, local_state["parameter_gradients"], strict=False):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        for name, other in _both(self.others, local_state["others"]):
            other.load_state_dict(copy.deepcopy(local_state["others"][name]))

    def trained_state(self) -> StateDict:
        """Return the entries of a checkpoint for what the trainer's optimizer trains outside the model; often none."""
        modules = {name: portable_state_dict(module) for name, module in self.modules.items() if name in self.trained}
        parameters = [parameter.detach() for parameter in self.parameters]
        return {TRAINED: {"modules": modules, "parameters": parameters}} if modules or parameters else {}

    def check_trained_state(self, checkpoint: StateMapping, source: str) -> None:
        """Raise unless what `trained_state` returned fits, where this run has something of the same name.

        Args:
            checkpoint: A checkpoint, which may have no such entry.
            source: How error messages refer to the checkpoint.

        Raises:
            CheckpointError: It does not fit.
        """
        trained = checkpoint.get(TRAINED, {"modules": {}, "parameters": []})
        is_comparable = self.parameters and trained["parameters"]
        parameters = trained["parameters"] if is_comparable else self.parameters
        self.check({"modules": trained["modules"], "optimizers": {}, "parameters": parameters}, source)

    def trained_modules_in(self, checkpoint: StateMapping) -> StateDict:
        """Return the states of modules in what `trained_state` returned; none if there is no such entry."""
        modules: StateDict = checkpoint.get(TRAINED, {"modules": {}})["modules"]
        return modules

    def load_trained_state(self, checkpoint: StateMapping) -> None:
        """Restore what `trained_state` returned, if it is in a checkpoint and this run has something of that name."""
        trained = checkpoint.get(TRAINED, {"modules": {}, "parameters": []})
        for name, module in _both(self.modules, trained["modules"]):
            load_model_state(module, trained["modules"][name], "The checkpoint")
        _copy_into(self.parameters, trained["parameters"])

    def check_before_run(self, saves_states: bool, is_distributed: bool) -> None:
        """Warn about what a run will not save, and what it will not synchronize.

        Args:
            saves_states: Whether the run saves training states.
            is_distributed: Whether there are several ranks.
        """
        for items in (self.modules, self.optimizers, self.others) if saves_states else ():
            _states_of(items)
        names = [f"`{name}`" for name, item in self.optimizers.items() if not AcceleratorRegistry.is_prepared(item)]
        if is_distributed and names:
            warn(
                f"The trainer does not average the gradients of {', '.join(names)} over the ranks, so the parameters "
                "there will differ between them. Prepare the optimizer and its module with "
                "`trainer._accelerator.prepare(module, optimizer)`, or add the parameters to the trainer's optimizer.",
            )

    def since(self, before: Companions) -> Companions:
        """Return those of which there was no such object before, and all that are neither module nor optimizer."""
        return Companions(
            {name: item for name, item in self.modules.items() if before.modules.get(name) is not item},
            {name: item for name, item in self.optimizers.items() if before.optimizers.get(name) is not item},
            self.others,
        )

    def warn_about_mismatch(self, shared_state: StateMapping, local_state: StateMapping, source: str) -> None:
        """Warn about what has no state in what was restored, and what was restored to nothing."""
        names = {*self.modules, *self.optimizers, *self.others}
        saved_names = {*shared_state["modules"], *shared_state["optimizers"], *local_state["others"]}
        described = [
            f"{text} {', '.join(f'`{name}`' for name in sorted(differing))}."
            for text, differing in (
                ("It has no state of these, which continue as the program created them:", names - saved_names),
                ("It has the state of these, which the program has not created:", saved_names - names),
            )
            if differing
        ]
        if described:
            warn(f"{source} does not fit exactly. {' '.join(described)}")


def _copy_into(parameters: Iterable[torch.Tensor], values: Iterable[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=False):
            parameter.copy_(value)


def _both(items: Mapping[str, Any], states: StateMapping) -> Iterator[tuple[str, Any]]:
    return ((name, item) for name, item in items.items() if name in states)


def _states_of(
    items: Mapping[str, Any], state_of: Callable[[Any], StateDict] = lambda item: item.state_dict()
) -> StateDict:
    """Return the state of each item that can be saved; warn about the others."""
    states = {}
    for name, item in items.items():
        try:
            _check_has_both_methods(item)
            states[name] = as_plain(state_of(item))
        except CheckpointError as error:
            warn(_describe_not_covered(name, item, str(error)))
        except Exception as error:  # the method is the user's
            if is_worker_failure(error):
                raise
            warn(_describe_not_covered(name, item, f"`state_dict` raised {error!r}."))
    return states


def _check_has_both_methods(item: object) -> None:
    missing = [name for name in ("state_dict", "load_state_dict") if not callable(getattr(item, name, None))]
    if missing:
        raise CheckpointError(f"it has no `{missing[0]}`. Add it, or remove the other method.")


def _describe_not_covered(name: str, item: object, reason: str) -> str:
    return (
        f"`{name}`, a {type(item).__name__}, is not part of the training state, so a resumed run does not continue "
        f"exactly: {reason}"
    )


# --- gradients ---------------------------------------------------------------------------------------------------


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of a model, which are part of its state while an accumulation window is open."""
    parameters = portable_parameters(model).items()
    return {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}


def load_gradients(model: nn.Module, gradients: Mapping[str, torch.Tensor]) -> None:
    """Restore what `gradients_of` returned."""
    parameters = portable_parameters(model)
    gradients = match_names(gradients, parameters, "The training state")
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].to(parameter.device) if name in gradients else None


# --- finding them ------------------------------------------------------------------------------------------------


def find_companions(
    owners: Mapping[str, Mapping[str, object]], outside_parameters: Iterable[torch.Tensor], saved: Iterable[object]
) -> Companions:
    """Find the companions among the attributes of some objects, and in the containers there.

    Args:
        owners: The attributes of each owner, by what is put in front of their names.
        outside_parameters: The parameters that the trainer's optimizer holds and its model does not.
        saved: What is saved already: the model, the optimizer, and others.
    """
    companions = Companions()
    saved = list(saved)
    for item in saved:  # a metric in the model is not in the model's state
        if isinstance(item, nn.Module):
            companions.others |= _metrics_in("model", item)
    seen = {id(part) for item in saved for part in _parts_of(item)}
    for prefix, attributes in owners.items():
        for attribute, value in attributes.items():
            for name, item in _walk(f"{prefix}{attribute}", value, seen):
                _add(companions, name, item)
    outside = {id(parameter): parameter for parameter in outside_parameters}
    for name, module in companions.modules.items():
        held = [outside.pop(id(parameter), None) for parameter in module.parameters()]
        if any(parameter is not None for parameter in held):
            companions.trained.add(name)
    companions.parameters = list(outside.values())
    return companions


def attributes_without_state(callbacks: Iterable[object]) -> dict[str, dict[str, object]]:
    """Return the attributes of the callbacks that have no ``state_dict``, by what to put in front of their names."""
    num_seen: Counter[str] = Counter()
    attributes = {}
    for callback in callbacks:
        class_name = type(callback).__qualname__
        if not callable(getattr(callback, "state_dict", None)):
            attributes[f"{class_name}/{num_seen[class_name]}."] = dict(getattr(callback, "__dict__", {}))
        num_seen[class_name] += 1
    return attributes


def _parts_of(item: object) -> Iterator[object]:
    """Yield an object, and those in it that have the same state: submodules, and what Accelerate has wrapped."""
    yield item
    if isinstance(item, nn.Module):
        yield from item.modules()
    for attribute in ("optimizer", "scheduler"):
        yield getattr(item, attribute, None)
    yield from optimizers_in(unwrap_optimizer(item)).values()


def _walk(name: str, value: object, seen: set[int], depth: int = 0) -> Iterator[tuple[str, object]]:
    """Yield a value, or what is in a container or in an object without a state, unless it was seen before."""
    if isinstance(value, _PLAIN) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, (nn.Module, Optimizer, *_DATA)) or _as_stateful(value) is not None:
        yield name, value
        return
    if depth < _MAX_NESTING and not (isinstance(value, (list, tuple, dict)) and len(value) > _MAX_ITEMS):
        for item_name, item in _items_of(name, value):
            yield from _walk(item_name, item, seen, depth + 1)


def _items_of(name: str, value: object) -> list[tuple[str, object]]:
    """Return what is in a container or an object, with names."""
    if isinstance(value, (list, tuple)):
        return [(f"{name}[{number}]", item) for number, item in enumerate(value)]
    if isinstance(value, dict):
        return [(f"{name}[{key!r}]", item) for key, item in value.items()]
    return [(f"{name}.{attribute}", item) for attribute, item in _attributes_of(value).items()]


def _attributes_of(value: object) -> dict[str, object]:
    """Return what an object, a bound method, a partial or a function that was defined in another one holds."""
    if isinstance(value, functools.partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, types.MethodType):
        return {"__self__": value.__self__, "__func__": value.__func__}
    if isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        return {variable: cell.cell_contents for variable, cell in cells if cell != types.CellType()}
    if isinstance(value, (type, types.ModuleType)) or type(value).__module__.partition(".")[0] in _OURS:
        return {}
    slots = (name for cls in type(value).__mro__ for name in _slots_of(cls))
    return {**{name: getattr(value, name, None) for name in slots}, **getattr(value, "__dict__", {})}


def _slots_of(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _add(companions: Companions, name: str, item: object) -> None:
    if isinstance(item, nn.Module):
        if item.state_dict():
            companions.modules[name] = item
        companions.others |= _metrics_in(name, item)
    elif isinstance(item, Optimizer):
        companions.optimizers[name] = item
    elif not isinstance(item, _DATA):
        stateful = _as_stateful(item)
        if stateful is not None:
            companions.others[name] = stateful


def _as_stateful(item: object) -> Stateful | None:
    if isinstance(item, torch.Generator):
        return _Generator(item.get_state, item.set_state)
    if isinstance(item, np.random.Generator):
        bits: Any = item.bit_generator
        return _Generator(lambda: bits.state, lambda state: setattr(bits, "state", state))
    if isinstance(item, np.random.RandomState):
        return _Generator(item.get_state, item.set_state)
    if isinstance(item, random.Random):
        return _Generator(item.getstate, item.setstate)
    # Looked up in the class: an instance may claim to have any attribute, as mocks do.
    has_state = any(callable(getattr(type(item), method, None)) for method in ("state_dict", "load_state_dict"))
    stateful: Any = item
    return stateful if has_state and not isinstance(item, type) else None


def _metrics_in(name: str, module: nn.Module) -> dict[str, Stateful]:
    """Return the metrics of torchmetrics in a module. By default, what they have summed is not in their state."""
    return {
        ".".join(filter(None, (name, path))): _Metric(metric)
        for path, metric in module.named_modules()
        if hasattr(type(metric), "update_count")
    }


class _Metric:
    """A metric of torchmetrics, as an object whose state includes what it has summed.

    Args:
        metric: The metric.
    """

    def __init__(self, metric: Any) -> None:
        self._metric = metric

    def state_dict(self) -> StateDict:
        """Return the sums, and the numbers that it keeps besides, such as that of its updates."""
        return state_of(self._metric)

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        load_state(self._metric, state_dict)


class _Generator:
    """A random number generator, as an object with a state.

    Args:
        get_state: Returns the state.
        set_state: Restores it.
    """

    def __init__(self, get_state: Callable[[], Any], set_state: Callable[[Any], object]) -> None:
        self._get_state = get_state
        self._set_state = set_state

    def state_dict(self) -> StateDict:
        """Return the state of the generator."""
        return {"generator": self._get_state()}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        self._set_state(state_dict["generator"])
