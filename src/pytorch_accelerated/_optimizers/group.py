"""Several optimizers that one run steps, as one optimizer."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.optim import Optimizer

if TYPE_CHECKING:
    from pytorch_accelerated._types import ParameterGroup, StateDict, StateMapping

Closure = Callable[[], Any]
"""Computes loss and gradients again, and returns the loss."""

CLOSURE = "closure"
"""What the argument of a `step` is called that is such a function."""

_REFUSAL = re.compile(r"assert\s+closure\b|if\s+(closure\s+is\s+None|not\s+closure)\s*:\s*raise\b")

CHOICE = "optimizer"
"""The entry of a new parameter group that names the optimizer to add it to."""


class ByName:
    """Access to several optimizers as to the list or dictionary that they were given in."""

    optimizers: dict[Any, Optimizer]
    is_named: bool

    def __getitem__(self, name: Any) -> Optimizer:
        """Return an optimizer by its name or index."""
        return self.optimizers[name] if self.is_named else list(self.optimizers.values())[name]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.optimizers if self.is_named else self.optimizers.values())

    def __len__(self) -> int:
        return len(self.optimizers)

    def keys(self) -> Iterable[Any]:
        """Return the names, or the indices."""
        return self.optimizers.keys()

    def values(self) -> Iterable[Optimizer]:
        """Return the optimizers."""
        return self.optimizers.values()

    def items(self) -> Iterable[tuple[Any, Optimizer]]:
        """Return the names, or the indices, with the optimizers."""
        return self.optimizers.items()


class OptimizerGroup(ByName, Optimizer):
    """The optimizers that a trainer was given in a list, tuple or dictionary, as one.

    As ``trainer.optimizer``, the group is used like what was given: by index or name, and in loops. Its parameter
    groups are those of its optimizers, the same objects, one optimizer after the other.

    Args:
        optimizers: The optimizers, or a mapping from their names to them.

    Example:
        >>> matrix, bias = torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> group = OptimizerGroup({"muon": torch.optim.SGD([matrix], lr=0.1), "adamw": torch.optim.AdamW([bias])})
        >>> list(group), [settings["lr"] for settings in group.param_groups]
        (['muon', 'adamw'], [0.1, 0.001])
        >>> group["muon"].param_groups[0]["lr"] = 0.2
        >>> group.param_groups[0]["lr"]
        0.2
    """

    def __init__(self, optimizers: Iterable[Optimizer] | Mapping[Any, Optimizer]) -> None:
        is_named = isinstance(optimizers, Mapping)
        self.__setstate__(
            {
                "optimizers": dict(optimizers.items() if isinstance(optimizers, Mapping) else enumerate(optimizers)),
                "is_named": is_named,
            }
        )

    def __setstate__(self, state: StateDict) -> None:
        """Become a copy. The base class adds what it keeps besides groups and state, such as hooks."""
        self.optimizers: dict[Any, Optimizer] = state["optimizers"]
        """The optimizers by name, or by index."""

        self.updated: set[Any] = set()
        """The names of those that have been stepped on their own since the last `step`."""

        self.is_named: bool = state["is_named"]
        """Whether they were given in a dictionary."""

        for name, optimizer in self.optimizers.items():
            optimizer.register_step_post_hook(partial(self._note_update, name))
        super().__setstate__(state)

    def __getstate__(self) -> StateDict:
        """Return what `__setstate__` takes; as of all optimizers, hooks are not copied."""
        return {name: vars(self)[name] for name in ("optimizers", "is_named")}

    def __repr__(self) -> str:
        members = ", ".join(f"{name}: {type(member).__name__}" for name, member in self.optimizers.items())
        return f"{type(self).__name__}({members})"

    # --- used like an optimizer ----------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[ParameterGroup]:  # type: ignore[override]
        """The parameter groups of all optimizers; groups are added with `add_param_group` only."""
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    @property
    def state(self) -> MutableMapping[Any, Any]:  # type: ignore[override]
        """What the optimizers keep for each parameter."""
        return _JointState(self)

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of all optimizers; of several with the same setting, that of the last."""
        return {name: value for optimizer in self.optimizers.values() for name, value in optimizer.defaults.items()}

    def step(self, closure: Closure | None = None) -> Any:
        """Step each optimizer that has a gradient, in order.

        Args:
            closure: Given to those whose `step` requires one. If the first one needs none, it is called before.

        Returns:
            What the last optimizer with a closure returned, or the closure; ``None`` without one.
        """
        due = [optimizer for optimizer in self.optimizers.values() if has_gradient(optimizer)]
        loss = None
        if closure is not None and due and not requires_closure(due[0]):
            with torch.enable_grad():
                loss = closure()
        for optimizer in due:
            if closure is not None and requires_closure(optimizer):
                loss = optimizer.step(closure)
            else:
                optimizer.step()
        self.updated.clear()
        return loss

    def _note_update(self, name: Any, *_: object) -> None:
        self.updated.add(name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard the gradients of all parameters."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(**({} if set_to_none else {"set_to_none": False}))

    def add_param_group(self, param_group: ParameterGroup) -> None:
        """Add a parameter group to one of the optimizers.

        Args:
            param_group: The group. Its entry ``"optimizer"`` is the name or index of the optimizer.

        Raises:
            ValueError: It names none.
        """
        settings = {name: value for name, value in param_group.items() if name != CHOICE}
        if param_group.get(CHOICE) not in self.optimizers:
            chosen = f"names the optimizer {param_group[CHOICE]!r}" if CHOICE in param_group else "names no optimizer"
            raise ValueError(
                f"The new parameter group {chosen}, but there are several: {list(self.optimizers)}. Say which one "
                f'trains it, by `{{"params": ..., "{CHOICE}": {next(iter(self.optimizers))!r}}}`, or call '
                "`add_param_group` of that optimizer."
            )
        self.optimizers[param_group[CHOICE]].add_param_group(settings)

    def train(self) -> None:
        """Put the optimizers that have modes into training mode."""
        for optimizer in with_modes(self):
            optimizer.train()

    def eval(self) -> None:
        """Put the optimizers that have modes into evaluation mode."""
        for optimizer in with_modes(self):
            optimizer.eval()

    # --- states --------------------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """Return the state of each optimizer, by its name or index."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: It has the states of other optimizers; nothing was loaded.
        """
        if state_dict.keys() != self.optimizers.keys():
            raise ValueError(
                f"The state has the entries {list(state_dict)}, but the optimizers are {list(self.optimizers)}. "
                "Expected the state of each of them."
            )
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state_dict[name])

    def _refuse_hook(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(
            "A group of optimizers has no hooks for its state. Register the hook with one of the optimizers: "
            f"{list(self.optimizers)}."
        )

    register_state_dict_pre_hook = register_state_dict_post_hook = _refuse_hook
    register_load_state_dict_pre_hook = register_load_state_dict_post_hook = _refuse_hook


class _JointState(MutableMapping[Any, Any]):
    """The states of several optimizers, as one: an entry belongs to the optimizer that holds its parameter."""

    def __init__(self, group: OptimizerGroup) -> None:
        self._optimizers = list(group.optimizers.values())

    def _state_with(self, key: Any) -> Any:
        for optimizer in self._optimizers:
            if key in optimizer.state or any(key is p for group in optimizer.param_groups for p in group["params"]):
                return optimizer.state
        raise KeyError(key)

    def __getitem__(self, key: Any) -> Any:
        return self._state_with(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._state_with(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._state_with(key)[key]

    def __contains__(self, key: object) -> bool:
        return any(key in optimizer.state for optimizer in self._optimizers)

    def __iter__(self) -> Iterator[Any]:
        return (key for optimizer in self._optimizers for key in optimizer.state)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)


def optimizers_in(optimizer: Any) -> dict[Any, Any]:
    """Return the optimizers of a group by name or index, or a single one by the name ``""``."""
    return optimizer.optimizers if isinstance(optimizer, OptimizerGroup) else {"": optimizer}


# --- what an optimizer is like -----------------------------------------------------------------------------------


def parameters_of(optimizer: Any) -> list[torch.Tensor]:
    """Return the parameters that an optimizer holds."""
    return [parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]]


def has_gradient(optimizer: Any) -> bool:
    """Tell whether an optimizer holds a parameter with a gradient."""
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])


def discard_gradients(optimizer: Any, names: Iterable[Any]) -> None:
    """Discard the gradients of some optimizers in a group, prepared or not, which then leaves them out of its step."""
    for name in names:
        for parameter in parameters_of(optimizer[name]):
            parameter.grad = None


def with_modes(optimizer: Any) -> list[Any]:
    """Return those optimizers that have a training and an evaluation mode, such as the schedule-free ones."""
    # Looked up in the class: an instance may claim to have any attribute, as mocks do.
    return [
        member
        for member in optimizers_in(optimizer).values()
        if all(callable(getattr(type(member), mode, None)) for mode in ("train", "eval"))
    ]


def arguments_of_step(optimizer: Any) -> list[str]:
    """Return the arguments that the `step` of an optimizer requires."""
    try:
        parameters = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    except (AttributeError, TypeError, ValueError):  # it has no step, or one without a signature
        return []
    open_kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in parameters if each.default is each.empty and each.kind not in open_kinds]


def requires_closure(optimizer: Any) -> bool:
    """Tell whether the `step` of an optimizer, or of one in a group, needs a function that computes the loss again.

    Its argument has no default then. If it has one, the optimizer says so by an attribute ``requires_closure``, or
    `step` begins with an assertion or an error for the case that there is none.

    Example:
        >>> parameter = torch.ones(1, requires_grad=True)
        >>> requires_closure(torch.optim.LBFGS([parameter])), requires_closure(torch.optim.SGD([parameter]))
        (True, False)
    """
    return any(
        any(CLOSURE in name for name in arguments_of_step(each))
        or getattr(each, "requires_closure", False) is True
        or _insists_on_closure(each)
        for each in optimizers_in(optimizer).values()
    )


def _insists_on_closure(optimizer: Any) -> bool:
    """Tell whether the code of a `step` refuses to work without a closure, although it has a default for it."""
    if type(optimizer).__module__.startswith("torch."):
        return False
    try:
        source = inspect.getsource(inspect.unwrap(type(optimizer).step))
    except (AttributeError, OSError, TypeError):  # there is none to read
        return False
    return _REFUSAL.search(source) is not None


def copy_into(parameters: Iterable[torch.Tensor], values: Iterable[torch.Tensor]) -> None:
    """Give parameters other values, in place."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
