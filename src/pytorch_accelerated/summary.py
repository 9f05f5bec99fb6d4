"""A table of a model: the shapes, parameters and sizes of its layer groups.

:mod:`pytorch_accelerated.finetuning` defines layer groups. To print the table at the start of each run, use
:class:`~pytorch_accelerated.callbacks.ModelSummaryCallback`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pytorch_accelerated._arguments.numbers import check_positive_integer
from pytorch_accelerated._console.text import align, format_size
from pytorch_accelerated._models.output_shapes import run_with_recorder
from pytorch_accelerated._models.wrappers import without_wrappers
from pytorch_accelerated._optimizers.checks import find_untrained, warn_about_untrained
from pytorch_accelerated._types import Nested
from pytorch_accelerated.exceptions import add_note
from pytorch_accelerated.finetuning import is_kept_in_eval_mode

__all__ = ["ModelSummary", "SummaryRow", "summarize"]

_OWN_PARAMETERS = "(own parameters)"
_MAX_SHAPE_LENGTH = 40
_HEADER = ("group", "layer", "output shape", "parameters", "state", "dtype", "size")


@dataclass(frozen=True)
class SummaryRow:
    """What a summary tells of one module, including everything inside it. Each parameter counts once."""

    name: str
    """Where the module is in the model, such as ``encoder.0``; empty for the model itself."""

    module_class: str
    """The name of its class. For parameters of the model that are in no layer group, that of their class."""

    depth: int
    """How many levels it is below the model."""

    layer_group: int | None
    """The index of the layer group, as in `ModelFreezer`; ``None`` for the model and for modules within a group."""

    output_shape: Nested
    """The shape of what it returned: a tuple of integers, or lists and dictionaries of them. ``None`` if unknown."""

    num_parameters: int
    """The number of elements of its parameters, without those that have no shape yet."""

    num_trainable: int
    """How many of them require a gradient."""

    num_shared: int
    """How many of them modules outside of this one use too."""

    num_uninitialized: int
    """How many tensors have no shape yet, because a lazy module has not been called."""

    state: Literal["trainable", "frozen", "partly", ""]
    """Whether all, none or some parameters require a gradient; empty without parameters."""

    dtypes: tuple[str, ...]
    """The data types of the parameters, such as ``("float32",)``, in the order of their first appearance."""

    num_bytes: int
    """The memory that parameters and buffers take, or would take if they are on the meta device."""


@dataclass(frozen=True, repr=False)
class ModelSummary:
    """The table that `summarize` returns. Printed, or shown in a notebook, it is that table.

    Example:
        >>> summary = summarize(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), torch.zeros(2, 8))
        >>> summary.num_parameters, summary.rows[1].output_shape
        (36, (2, 4))
    """

    rows: tuple[SummaryRow, ...]
    """One row for the model, then one for each layer group and, up to the given depth, each module within."""

    num_parameters: int
    """The number of elements of all parameters; shared ones count once."""

    num_trainable: int
    """How many of them require a gradient."""

    num_bytes: int
    """The memory that all parameters and buffers take."""

    num_uninitialized: int = 0
    """How many tensors have no shape yet, so that they are missing above."""

    @property
    def num_frozen(self) -> int:
        """How many elements of the parameters require no gradient."""
        return self.num_parameters - self.num_trainable

    def to_rows(self) -> list[dict[str, Any]]:
        """Return each row as a dictionary with the attributes of `SummaryRow`."""
        return [{entry.name: getattr(row, entry.name) for entry in fields(row)} for row in self.rows]

    def __repr__(self) -> str:
        lines = align([_HEADER, *map(_cells, self.rows)], right=[0, 3, 6])
        total = (
            f"{self.num_parameters:,} parameters ({self.num_trainable:,} trainable, {self.num_frozen:,} frozen), "
            f"{format_size(self.num_bytes)} with buffers"
        )
        notes = []
        if any(row.num_shared for row in self.rows):
            notes.append("* shared with modules outside of this row; the total counts each parameter once")
        if self.num_uninitialized:
            notes.append(f"? without {self.num_uninitialized} tensors whose shape the first call of the model decides")
        return "\n".join([*lines, total, *notes])


def summarize(
    model: nn.Module | Mapping[str, nn.Module],
    example_input: Nested = None,
    *,
    depth: int | None = 1,
    optimizer: object = None,
) -> ModelSummary:
    """Return a table of the layer groups of a model: output shapes, parameters, frozen or not, data types and sizes.

    With an example input, the model is called once, in evaluation mode and without gradients. That leaves no trace:
    parameters, buffers, gradients, modes, attributes and random number generators are afterwards what they were. Lazy
    modules stay uninitialized; a copy of the model is called instead. Compiled models are called without compilation.
    The model may be on the meta device. Wrappers such as those of ``torch.compile`` and DDP are looked through.

    Args:
        model: The model, or several by name.
        example_input: What to call the model with: a tuple has its positional arguments, a mapping its keyword
            arguments, anything else is the only argument. It is copied to the device of the model. For several models,
            a mapping from their names to such inputs, in which some may be missing. ``None`` for a table without
            output shapes.
        depth: How many levels of modules to show; 1 for the layer groups, ``None`` for all.
        optimizer: An optimizer, or several in a list or mapping, for a warning if none holds a trainable parameter.

    Raises:
        TypeError: ``model`` is not a module, or ``depth`` not an integer.
        ValueError: ``depth`` is below 1, or ``example_input`` has the name of an unknown model.

    Example:
        >>> from torch import nn, optim
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> print(summarize(model, torch.zeros(16, 8)))
        group  layer       output shape  parameters  state      dtype     size
               Sequential  (16, 2)               46  trainable  float32  184 B
            0  0 (Linear)  (16, 4)               36  trainable  float32  144 B
            1  1 (ReLU)    (16, 4)                0                        0 B
            2  2 (Linear)  (16, 2)               10  trainable  float32   40 B
        46 parameters (46 trainable, 0 frozen), 184 B with buffers
    """
    if depth is not None:
        check_positive_integer("depth", depth, "levels of modules")
    models = _as_models(model)
    for each in models.values():
        warn_about_untrained(each, find_untrained(each, *_optimizers(optimizer)))
    inputs = _as_inputs(example_input, models)
    shape_functions: dict[str, Callable[[nn.Module], Nested]] = {}
    for name, each in inputs.items():
        models[name], shape_functions[name] = _call(models[name], each)
    return build_summary(models, depth, shape_functions)


def build_summary(
    models: Mapping[str, nn.Module], depth: int | None, shape_functions: Mapping[str, Callable[[nn.Module], Nested]]
) -> ModelSummary:
    """Return the table of models, given functions that return what is known of the shapes of outputs.

    Args:
        models: The models by name, without wrappers. The name of a single one is not shown.
        depth: How many levels of modules to show; ``None`` for all.
        shape_functions: For each model, returns the shape of the outputs of a module; ``None`` if unknown.
    """
    num_users = _count_users(models.values())
    rows: list[SummaryRow] = []
    for name, model in models.items():
        shape_of = shape_functions.get(name, _unknown_shape)
        items = _items_of(model, depth, name if len(models) > 1 else "")
        rows += [item.row(None if item.module is None else shape_of(item.module), num_users) for item in items]
    total = _Tensors.of(models.values())
    return ModelSummary(
        tuple(rows), total.num_parameters, total.num_trainable, total.num_bytes, total.num_uninitialized
    )


def modules_left_in_eval_mode(model: nn.Module) -> list[str]:
    """Return the names of modules that are in evaluation mode, without those that somebody has frozen on purpose.

    These are modules that `ModelFreezer` keeps in evaluation mode, and parts of the model whose parameters are all
    frozen. Of nested modules, only the outermost is named, with its class if it is the model itself.
    """

    def visit(module: nn.Module, name: str) -> Iterator[str]:
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            return
        is_left = not module.training and not is_kept_in_eval_mode(module)
        if is_left:
            yield name or type(module).__name__
        if not is_left or any(child.training for child in module.modules()):
            for child_name, child in module.named_children():
                yield from visit(child, f"{name}.{child_name}" if name else child_name)

    return list(visit(without_wrappers(model), ""))


def _call(model: nn.Module, example_input: Nested) -> tuple[nn.Module, Callable[[nn.Module], Nested]]:
    is_mapping = isinstance(example_input, Mapping)
    args = () if is_mapping else example_input if type(example_input) is tuple else (example_input,)
    kwargs = example_input if is_mapping else {}
    try:
        called, recorder = run_with_recorder(model, args, kwargs)
    except Exception as error:
        add_note(
            error,
            f"`{type(model).__name__}` was called with `example_input` to find the shapes of its outputs. Expected its "
            "argument, a tuple of its positional arguments, or a dictionary of its keyword arguments.",
        )
        raise
    return called, recorder.shape_of


# --- what a row is about -----------------------------------------------------------------------------------------


@dataclass
class _Tensors:
    """Parameters and buffers, each once."""

    parameters: list[nn.Parameter] = field(default_factory=list)
    buffers: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> _Tensors:
        modules = list(modules)
        parameters = dict.fromkeys(parameter for module in modules for parameter in module.parameters())
        buffers = dict.fromkeys(buffer for module in modules for buffer in module.buffers())
        return cls(list(parameters), list(buffers))

    @property
    def initialized(self) -> list[nn.Parameter]:
        return list(filter(_has_shape, self.parameters))

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.initialized)

    @property
    def num_trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.initialized if parameter.requires_grad)

    @property
    def num_uninitialized(self) -> int:
        return sum(not _has_shape(tensor) for tensor in [*self.parameters, *self.buffers])

    @property
    def num_bytes(self) -> int:
        tensors = filter(_has_shape, [*self.parameters, *self.buffers])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(parameter.dtype).removeprefix("torch.") for parameter in self.parameters))

    @property
    def state(self) -> Literal["trainable", "frozen", "partly", ""]:
        states = {parameter.requires_grad for parameter in self.parameters}
        if not states:
            return ""
        return "partly" if len(states) == 2 else "trainable" if states == {True} else "frozen"


def _has_shape(tensor: torch.Tensor) -> bool:
    return not is_lazy(tensor)


@dataclass
class _Item:
    """A module of a model, and what its row counts."""

    module: nn.Module | None
    name: str
    module_class: str
    depth: int
    layer_group: int | None
    tensors: _Tensors
    num_users: Counter[nn.Parameter]

    def row(self, output_shape: Nested, num_users: Counter[nn.Parameter]) -> SummaryRow:
        shared = [each for each in self.tensors.initialized if self.num_users[each] < num_users[each]]
        return SummaryRow(
            name=self.name,
            module_class=self.module_class,
            depth=self.depth,
            layer_group=self.layer_group,
            output_shape=output_shape,
            num_parameters=self.tensors.num_parameters,
            num_trainable=self.tensors.num_trainable,
            num_shared=sum(parameter.numel() for parameter in shared),
            num_uninitialized=self.tensors.num_uninitialized,
            state=self.tensors.state,
            dtypes=self.tensors.dtypes,
            num_bytes=self.tensors.num_bytes,
        )


def _items_of(model: nn.Module, max_depth: int | None, name: str) -> Iterator[_Item]:
    """Yield a model, its layer groups, and the modules within."""
    children = list(model.named_children())
    yield _item(model, name, 0, None if children else 0)
    own = _Tensors(list(model.parameters(recurse=False)), list(model.buffers(recurse=False)))
    if children and own.parameters:
        classes = dict.fromkeys(type(parameter).__name__ for parameter in own.parameters)
        users = Counter(own.parameters)
        yield _Item(None, _joined(name, _OWN_PARAMETERS), ", ".join(classes), 1, 0, own, users)
    for group, (child_name, child) in enumerate(children):
        yield from _items_within(child, _joined(name, child_name), 1, max_depth, group)


def _items_within(
    module: nn.Module, name: str, depth: int, max_depth: int | None, group: int | None
) -> Iterator[_Item]:
    module = without_wrappers(module)
    yield _item(module, name, depth, group)
    if max_depth is None or depth < max_depth:
        for child_name, child in module.named_children():
            yield from _items_within(child, _joined(name, child_name), depth + 1, max_depth, None)


def _item(module: nn.Module, name: str, depth: int, group: int | None) -> _Item:
    return _Item(module, name, type(module).__name__, depth, group, _Tensors.of([module]), _count_users([module]))


def _count_users(models: Iterable[nn.Module]) -> Counter[nn.Parameter]:
    """Return how many modules use each parameter directly."""
    modules = dict.fromkeys(module for model in models for module in model.modules())
    return Counter(parameter for module in modules for parameter in module.parameters(recurse=False))


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)


# --- as text -----------------------------------------------------------------------------------------------------


def _cells(row: SummaryRow) -> tuple[str, ...]:
    shape = "" if row.output_shape is None else _format_shape(row.output_shape)
    name = "  " * max(row.depth - 1, 0) + (f"{row.name} ({row.module_class})" if row.name else row.module_class)
    marks = ("*" if row.num_shared else "") + ("?" if row.num_uninitialized else "")
    return (
        "" if row.layer_group is None else str(row.layer_group),
        name,
        shape if len(shape) <= _MAX_SHAPE_LENGTH else f"{shape[: _MAX_SHAPE_LENGTH - 3]}...",
        marks if marks and not row.num_parameters else f"{row.num_parameters:,}{marks}",
        row.state,
        ", ".join(row.dtypes),
        format_size(row.num_bytes),
    )


def _format_shape(shape: Nested) -> str:
    if isinstance(shape, dict):
        return "{" + ", ".join(f"{name}: {_format_shape(item)}" for name, item in shape.items()) + "}"
    return f"[{', '.join(map(_format_shape, shape))}]" if isinstance(shape, list) else str(shape)


# --- arguments ---------------------------------------------------------------------------------------------------


def _as_models(model: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    models: dict[str, Any] = dict(model) if isinstance(model, Mapping) else {"": model}
    for name, each in models.items():
        if not isinstance(each, nn.Module):
            place = f"`model[{name!r}]`" if isinstance(model, Mapping) else "`model`"
            raise TypeError(
                f"{place} is a {type(each).__name__}. Expected a module, or a mapping from names to modules."
            )
    return {str(name): without_wrappers(each) for name, each in models.items()}


def _as_inputs(example_input: Nested, models: Mapping[str, nn.Module]) -> Mapping[str, Nested]:
    if example_input is None:
        return {}
    if list(models) == [""]:
        return {"": example_input}
    unknown = set(example_input) - set(models) if isinstance(example_input, Mapping) else {type(example_input).__name__}
    if unknown:
        raise ValueError(
            f"`example_input` has {sorted(unknown)}, but the models are {list(models)}. Expected a mapping from names "
            "of models to what each is called with."
        )
    inputs: Mapping[str, Nested] = example_input
    return inputs


def _optimizers(optimizer: object) -> tuple[object, Sequence[object]]:
    """Return an optimizer, and where to look for others."""
    several = list(optimizer.values()) if isinstance(optimizer, Mapping) else optimizer
    return (several[0], several) if isinstance(several, (list, tuple)) and several else (optimizer, [])


def _unknown_shape(_: nn.Module) -> None:
    """Return what is known of the shape of an output if the model was not called."""
