"""The shapes of what each module of a model returns, found in a forward pass that leaves no trace."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from pytorch_accelerated._data.rng import preserve_rng_state
from pytorch_accelerated._tensors.nested import move_to_device, named_items, rebuild

if TYPE_CHECKING:
    from pytorch_accelerated._types import Nested


class ShapeRecorder:
    """Records the shapes of what modules return, from its creation until `remove`.

    Args:
        models: The models.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self._shapes: dict[int, Nested] = {}
        self._handles = [module.register_forward_hook(self._note) for module in all_modules(models)]

    def _note(self, module: nn.Module, _: object, output: Nested) -> None:
        self._shapes[id(module)] = shapes_in(output)

    def shape_of(self, module: nn.Module) -> Nested:
        """Return the shape of what a module returned when it was last called; ``None`` if it was not."""
        return self._shapes.get(id(module))

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def shapes_in(output: Nested) -> Nested:
    """Return the shape of a tensor as a tuple, those of several in lists and dictionaries; ``None`` for anything else.

    Example:
        >>> shapes_in({"logits": torch.zeros(2, 10), "states": [torch.zeros(2, 4)], "name": "a"})
        {'logits': (2, 10), 'states': [(2, 4)], 'name': None}
    """
    if isinstance(output, torch.Tensor):
        return tuple(output.shape)
    items = named_items(output)
    if items is not None:
        return {str(name): shapes_in(item) for name, item in items.items()}
    return [shapes_in(item) for item in output] if isinstance(output, (list, tuple)) else None


def all_modules(models: Iterable[nn.Module]) -> list[nn.Module]:
    """Return all modules of some models, each once."""
    return list(dict.fromkeys(module for model in models for module in model.modules()))


def run_with_recorder(
    model: nn.Module, args: Sequence[Nested], kwargs: Mapping[str, Nested]
) -> tuple[nn.Module, ShapeRecorder]:
    """Call a model once in evaluation mode and without gradients, and note the shapes of what its modules return.

    Afterwards the model and the random number generators are as they were: see `leaving_no_trace`.

    Args:
        model: The model, without wrappers.
        args: Its positional arguments, which are copied to the device of the model.
        kwargs: Its keyword arguments, likewise.

    Returns:
        The model that was called, and what was noted. It is a copy if the call would initialize lazy modules.
    """
    is_copy = any(map(is_lazy, _tensors_of(model)))
    called = _copy_of_lazy(model) if is_copy else model
    args, kwargs = _copied((list(args), dict(kwargs)), _device_of(model))
    recorder = ShapeRecorder([called])
    try:
        with preserve_rng_state() if is_copy else leaving_no_trace(model), _without_compilation(), torch.no_grad():
            called.eval()
            called(*args, **kwargs)
    finally:
        recorder.remove()
    return called, recorder


def _copy_of_lazy(model: nn.Module) -> nn.Module:
    """Return a copy of a model with uninitialized tensors; PyTorch copies uninitialized parameters, but no buffers."""
    buffers = [buffer for buffer in model.buffers() if is_lazy(buffer)]
    create: Callable[..., Any] = UninitializedBuffer  # its stub lacks the arguments
    memo = {id(buffer): create(device=buffer.device, dtype=buffer.dtype) for buffer in buffers}
    return copy.deepcopy(model, memo)


@contextmanager
def leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Undo what the body does to a model, and to the random number generators.

    That covers the values of parameters and buffers, gradients, modes and plain attributes, such as counters and lists.
    Parameters and buffers are copied for it, so they take twice the memory for a moment.
    """
    modules, tensors = list(model.modules()), _tensors_of(model)
    attributes = [_saved_attributes(module) for module in modules]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors if _has_values(tensor)]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with preserve_rng_state():
            yield
    finally:
        for module, (saved, containers) in zip(modules, attributes, strict=True):
            vars(module).clear()
            vars(module).update(saved)
            for container, contents in containers:
                _refill(container, contents)
        with torch.no_grad():
            for tensor, value in values:
                if not _are_equal(tensor, value):
                    tensor.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _saved_attributes(module: nn.Module) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """Return the attributes of a module, and its plain containers with copies of them."""
    containers = [value for value in vars(module).values() if type(value) in (dict, list, set)]
    return dict(vars(module)), [(container, copy.copy(container)) for container in containers]


def _refill(container: Any, contents: Collection[Any]) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(contents)


def _has_values(tensor: torch.Tensor) -> bool:
    return not tensor.is_meta and tensor.layout is torch.strided


def _are_equal(tensor: torch.Tensor, value: torch.Tensor) -> bool:
    with suppress(RuntimeError):  # some kinds of tensors cannot be compared
        return torch.equal(tensor, value)
    return False


def _without_compilation() -> AbstractContextManager[None]:
    is_used = "torch._dynamo.eval_frame" in sys.modules  # importing it takes seconds
    return torch.compiler.set_stance("force_eager") if is_used else nullcontext()


def _device_of(model: nn.Module) -> torch.device | None:
    return next((tensor.device for tensor in _tensors_of(model)), None)


def _tensors_of(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _copied(value: Nested, device: torch.device | None) -> Nested:
    """Return a nested structure with copies of its tensors: a model may change them in place."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if device is None else value.detach().clone().to(device)
    if hasattr(value, "to"):
        return value if device is None else move_to_device(value, device)
    return rebuild(value, lambda item: _copied(item, device))
