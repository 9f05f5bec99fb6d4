"""All private names of Accelerate that this library depends on, in one class."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

_PREPARED_OBJECTS = ("_models", "_optimizers", "_dataloaders", "_schedulers")
_SAVED_OBJECTS = (*_PREPARED_OBJECTS, "_custom_objects")
_PREPARED_MARK = "_is_accelerate_prepared"
_CHOSEN_BY_TRAINER = "_precision_chosen_by_trainer"  # our own, next to what Accelerate keeps there
_FORWARD_ATTRIBUTES = ("forward", "_original_forward", _PREPARED_MARK)


class AcceleratorRegistry:
    """Accesses the lists in which an accelerator keeps its prepared objects, and what else Accelerate keeps private.

    Accelerate has no public call for any of this. `tests/_distributed/test_registry.py` checks each name against the
    installed version.

    Args:
        accelerator: The accelerator whose lists are edited.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def forget(self, *objects: object) -> None:
        """Remove these objects from the lists, and no others: the user may have prepared some, too.

        `Accelerator.free_memory` removes all objects, and runs a full garbage collection that can take longer than a
        run.
        """
        for name in _PREPARED_OBJECTS:
            kept = [item for item in self._list(name) if all(item is not forgotten for forgotten in objects)]
            setattr(self._accelerator, name, kept)

    @contextmanager
    def restricted_to(self, model: nn.Module, optimizer: Optimizer | None) -> Iterator[None]:
        """Let `Accelerator.save_state` and `load_state` see only this model and this optimizer.

        Args:
            model: The prepared model.
            optimizer: The prepared optimizer, or ``None``.
        """
        previous = {name: getattr(self._accelerator, name) for name in _SAVED_OBJECTS}
        visible = {"_models": [model], "_optimizers": [] if optimizer is None else [optimizer]}
        try:
            for name in _SAVED_OBJECTS:
                setattr(self._accelerator, name, visible.get(name, []))
            yield
        finally:
            for name, objects in previous.items():
                setattr(self._accelerator, name, objects)

    def copy(self, memo: dict[int, Any]) -> Accelerator:
        """Return an accelerator with copies of what training changes; `copy.deepcopy` returns the accelerator itself.

        Args:
            memo: The copies made so far, as in `copy.deepcopy`.
        """
        copied = copy.copy(self._accelerator)
        for name in ("scaler", *_SAVED_OBJECTS):
            setattr(copied, name, copy.deepcopy(getattr(copied, name), memo))
        return copied

    def registered_objects(self) -> list[object]:
        """Return what the user passed to `Accelerator.register_for_checkpointing`."""
        return self._list("_custom_objects")

    def _list(self, name: str) -> list[Any]:
        """Return a list of the accelerator; a new one, which is empty, for a test double that has none."""
        registered = getattr(self._accelerator, name, None)
        return registered if isinstance(registered, list) else []

    @staticmethod
    def mark_as_prepared(item: object) -> None:
        """Let `Accelerator.prepare` register an object without wrapping it."""
        setattr(item, _PREPARED_MARK, True)

    @staticmethod
    def is_prepared(item: object) -> bool:
        """Tell whether `Accelerator.prepare` leaves an object as it is."""
        return bool(getattr(item, _PREPARED_MARK, False))

    @staticmethod
    def forward_attributes(model: object) -> dict[str, object]:
        """Return those of a model's instance attributes that `Accelerator.prepare` sets or replaces."""
        attributes = getattr(model, "__dict__", {})
        return {name: attributes[name] for name in _FORWARD_ATTRIBUTES if name in attributes}

    @classmethod
    def restore_forward(cls, model: object, attributes: Mapping[str, object]) -> None:
        """Undo what `Accelerator.prepare` did to a model's instance attributes.

        Args:
            model: The model.
            attributes: What `forward_attributes` returned before.
        """
        for name in cls.forward_attributes(model):
            del vars(model)[name]
        getattr(model, "__dict__", {}).update(attributes)

    # --- the state that all accelerators of a process share ------------------------------------------------------

    def shares_state_of_process(self) -> bool:
        """Tell whether the accelerator has the state of the process, not a copy or one of another process."""
        return vars(self._accelerator.state) is AcceleratorState._shared_state  # noqa: SLF001 - see the class

    def detach_state(self) -> None:
        """Give the accelerator a state of its own, with what the state of the process contains now."""
        own_state = object.__new__(AcceleratorState)  # whose `__init__` would share it
        vars(own_state).update(vars(self._accelerator.state))
        self._accelerator.state = own_state

    @contextmanager
    def state_used_for_process(self) -> Iterator[None]:
        """Let the process have the state of the accelerator in the body: Accelerate looks up the precision there."""
        if self.shares_state_of_process():
            yield
            return
        with self.process_state_put_aside():
            AcceleratorState._shared_state.update(vars(self._accelerator.state))  # noqa: SLF001 - see the class
            yield

    @staticmethod
    @contextmanager
    def process_state_put_aside() -> Iterator[None]:
        """Let the process have no state in the body, as before its first accelerator."""
        state = AcceleratorState._shared_state  # noqa: SLF001 - see the class
        before = dict(state)
        state.clear()
        try:
            yield
        finally:
            state.clear()
            state.update(before)

    @staticmethod
    def process_precision() -> str | None:
        """Return the mixed precision that all accelerators of this process share; ``None`` before the first one."""
        # `AcceleratorState()` would initialize the state where it does not exist yet.
        has_state = bool(AcceleratorState._shared_state)  # noqa: SLF001 - see the class
        return AcceleratorState().mixed_precision if has_state else None

    @staticmethod
    def note_precision_of_trainer() -> None:
        """Remember that a trainer has chosen the precision of the process, not the user's configuration."""
        AcceleratorState._shared_state[_CHOSEN_BY_TRAINER] = True  # noqa: SLF001 - see the class

    @staticmethod
    def has_precision_of_trainer() -> bool:
        """Tell whether `note_precision_of_trainer` was called in this process."""
        return _CHOSEN_BY_TRAINER in AcceleratorState._shared_state  # noqa: SLF001 - see the class

    @staticmethod
    def process_type() -> DistributedType | None:
        """Return how this process trains with others; ``None`` before Accelerate knows it."""
        return PartialState._shared_state.get("distributed_type")  # noqa: SLF001 - see the class

    @staticmethod
    def process_device() -> torch.device | None:
        """Return the device of this process; ``None`` before Accelerate knows it."""
        device: torch.device | None = PartialState._shared_state.get("device")  # noqa: SLF001 - see the class
        return device

    @staticmethod
    @contextmanager
    def process_state_kept_on_error() -> Iterator[None]:
        """Forget what a failed accelerator has set for all later ones of this process."""
        state = AcceleratorState._shared_state  # noqa: SLF001 - see the class
        before = dict(state)
        try:
            yield
        except BaseException:
            state.clear()
            state.update(before)
            raise

    @staticmethod
    def has_process_state() -> bool:
        """Tell whether Accelerate knows its ranks yet; a query of the state itself would initialize it."""
        return bool(PartialState._shared_state)  # noqa: SLF001 - see the class
