"""What the entries of a training state must look like: checksums protect from accidents, not from who wrote them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch

from pytorch_accelerated._checkpoint.names import match_names, portable_parameters, portable_state_dict
from pytorch_accelerated._data.rng import check_rng_state
from pytorch_accelerated.progress import TrainingProgress
from pytorch_accelerated.tracking import InMemoryRunHistory, RunHistory

if TYPE_CHECKING:
    from torch import nn

    from pytorch_accelerated._types import StateMapping

Rule: TypeAlias = Callable[[object], bool]

_MAX_COUNT = 2**63 - 1


def is_count(value: object) -> bool:
    """Tell whether a value is a whole number that can count something."""
    return type(value) is int and 0 <= value <= _MAX_COUNT


def is_number(value: object) -> bool:
    """Tell whether a value is one number."""
    return type(value) in (int, float) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def _is_finite(value: object) -> bool:
    return is_number(value) and math.isfinite(float(value))  # type: ignore[arg-type]  # a number, or a tensor of one


def is_text(value: object) -> bool:
    """Tell whether a value is a text."""
    return isinstance(value, str)


def is_flag(value: object) -> bool:
    """Tell whether a value is true or false."""
    return isinstance(value, bool)


def is_mapping(value: object) -> bool:
    """Tell whether a value is a dictionary."""
    return isinstance(value, Mapping)


def optional(rule: Rule) -> Rule:
    """Return a rule for values that may also be ``None``."""
    return lambda value: value is None or rule(value)


def many(rule: Rule) -> Rule:
    """Return a rule for lists and vectors."""
    return lambda value: isinstance(value, (list, tuple, torch.Tensor)) and _is_vector(value) and all(map(rule, value))


def by_name(rule: Rule) -> Rule:
    """Return a rule for dictionaries with texts as keys."""
    return lambda value: (
        isinstance(value, Mapping) and all(map(is_text, value)) and all(rule(item) for item in value.values())
    )


def _is_vector(value: object) -> bool:
    return not isinstance(value, torch.Tensor) or value.ndim == 1


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _is_record(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 1 and is_text(value[0])


def _is_seed(value: object) -> bool:
    return type(value) is int


def check_entries(entries: object, rules: Mapping[str, Rule], place: str = "") -> None:
    """Raise if an entry is not what a rule says. Entries that are missing, or have no rule, are not checked.

    Args:
        entries: The entries.
        rules: The rules by the names of the entries.
        place: Where the entries are, for the message.

    Raises:
        ValueError: An entry is something else, or there are none.
    """
    if not isinstance(entries, Mapping):
        raise ValueError(f"{place or 'it'} is {reprlib.repr(entries)}")  # noqa: TRY004 - the file is wrong
    for name, rule in rules.items():
        if name in entries and not rule(entries[name]):
            raise ValueError(f"{place}{'.' if place else ''}{name} is {reprlib.repr(entries[name])}")


def check_numbers(entries: StateMapping, own: StateMapping) -> None:
    """Raise if there is something else in the place of a number, or of a list, that an object has there itself.

    Args:
        entries: What the object is to load.
        own: What it has now.

    Raises:
        ValueError: There is.
    """
    rules: dict[str, Rule] = {}
    for name, value in own.items():
        if type(value) in (int, float):
            rules[name] = optional(lambda saved: is_number(saved) or is_flag(saved))
        elif isinstance(value, list):
            rules[name] = lambda saved: isinstance(saved, (list, tuple))
    check_entries(entries, rules)


_MEAN: dict[str, Rule] = {
    "total_loss": is_number,
    "running_count": is_number,
    "values": many(is_number),
    "weights": many(is_number),
}
_OF_TRAINER: dict[str, Rule] = {
    "progress": is_mapping,
    "run_history": is_mapping,
    "callbacks": is_mapping,
    "recorder": is_mapping,
    "companions": is_mapping,
    "seed": _is_seed,
    "run_seed": _is_seed,
    "run_number": lambda value: type(value) is int,
    "stopped": optional(is_text),
    "num_metric_values_seen": is_count,
    "is_optimizer_training": optional(is_flag),
    "is_epoch_cut_short": is_flag,
    "knows_stream": is_flag,
}
_HISTORY: dict[str, Rule] = {
    "current_epoch": is_count,
    "metrics": by_name(lambda value: isinstance(value, (list, tuple))),
    "newest_series": is_mapping,
    "moments": many(_is_record),
    "step_records": many(_is_record),
}
_OF_PROCESS: dict[str, Rule] = {
    "means": is_mapping,
    "window": is_mapping,
    "gradients": by_name(_is_tensor),
    "buffers": optional(is_mapping),
    "order": is_mapping,
    "stream": optional(is_mapping),
    "companions": optional(is_mapping),
}
_COMPANIONS: dict[str, Rule] = {
    "others": is_mapping,
    "gradients": by_name(is_mapping),
    "parameter_gradients": lambda value: isinstance(value, (list, tuple)),
}
_WINDOW: dict[str, Rule] = {
    "total": _is_finite,
    "num_samples": is_count,
    "expected": optional(_is_finite),
    "num_skipped": is_count,
    "end_of_epoch": optional(lambda value: isinstance(value, list) and [*map(type, value)] == [str, bool]),
    "updated": many(lambda value: isinstance(value, (str, int))),
}


OF_BEST_MODEL: dict[str, Rule] = {
    "best_metric": optional(is_number),
    "best_metric_epoch": optional(is_count),
    "has_saved": is_flag,
    "saved_file": optional(is_text),
    "kept_file": optional(is_text),
    "num_values_seen": optional(is_count),
}
"""What `SaveBestModelCallback` keeps in a state."""

OF_AVERAGE: dict[str, Rule] = {
    **OF_BEST_MODEL,
    "ema_model": by_name(_is_tensor),
    "ema_model_numbers": by_name(is_number),
    "callbacks": is_mapping,
}
"""What `ModelEmaCallback` keeps in a state."""

OF_EARLY_STOPPING: dict[str, Rule] = {
    "best": optional(is_number),
    "num_without_improvement": is_count,
    "num_values_seen": optional(is_count),
    "best_weights": optional(by_name(_is_tensor)),
}
"""What `EarlyStoppingCallback` keeps in a state."""


def check_trainer_state(state: StateMapping, position: TrainingProgress | None, history: RunHistory) -> None:
    """Check the part of a state that is identical on all processes.

    Args:
        state: The contents of its file.
        position: What the manifest says of where the run is.
        history: The run history that will load its part.

    Raises:
        ValueError: An entry is not what it should be.
        KeyError, TypeError: One is missing or unknown.
    """
    entries = state["trainer"]
    check_entries(state, {"current_epoch": is_count})
    check_entries(entries, _OF_TRAINER, "trainer")
    check_entries(entries["progress"], {name: is_count for name in entries["progress"] if name != "phase"}, "progress")
    if TrainingProgress(**entries["progress"]) != position:
        raise ValueError("its position is not the one that its manifest tells")
    loads_as_usual = getattr(type(history), "load_state_dict", None) is InMemoryRunHistory.load_state_dict
    if loads_as_usual and "run_history" in entries:
        check_entries(entries["run_history"], _HISTORY, "run_history")


def check_process_state(state: StateMapping, model: nn.Module | None) -> None:
    """Check the part of a state that belongs to one process.

    Args:
        state: The contents of its file.
        model: The plain model, to which gradients and buffers must fit; ``None`` if it is sharded.

    Raises:
        ValueError: An entry is not what it should be.
        KeyError, TypeError: One is missing.
    """
    check_entries(state, _OF_PROCESS)
    check_entries(state["window"], _WINDOW, "window")
    check_entries(state.get("companions") or {}, _COMPANIONS, "companions")
    check_entries(state["means"], {"loss": is_mapping, "metrics": by_name(is_mapping)}, "means")
    for name, mean in {"means.loss": state["means"]["loss"], **state["means"]["metrics"]}.items():
        check_entries(mean, _MEAN, name)
    if state["rng"] is not None:
        check_rng_state(state["rng"])
    buffers = state.get("buffers")
    if buffers is not None:
        check_entries(buffers, {"syncs_next": is_flag, "values": by_name(_is_tensor)}, "buffers")
    if model is not None:
        _check_shapes("gradients", state["gradients"], portable_parameters(model))
        _check_shapes("buffers", {} if buffers is None else buffers["values"], portable_state_dict(model))


def _check_shapes(place: str, tensors: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in match_names(tensors, own, "The training state").items():
        if name in own and tensor.shape != own[name].shape:
            raise ValueError(f"{place}.{name} has the shape {[*tensor.shape]}, not {[*own[name].shape]}")
