"""States of the metrics of torchmetrics: what they have summed, and how that of several processes is put together."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from pytorch_accelerated._tensors.nested import rebuild
from pytorch_accelerated._types import Nested, StateDict, StateMapping


def is_torchmetric(value: object) -> bool:
    """Tell whether something is a metric, or a collection of metrics, of torchmetrics, without importing it."""
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(value, (torchmetrics.Metric, torchmetrics.MetricCollection))


def metrics_in(metric: Any) -> dict[str, Any]:
    """Return a metric and those in it, by name; those of a collection refer to what they have in common."""
    if hasattr(metric, "add_metrics"):  # a collection
        metric.items(keep_base=True, copy_state=False)  # the members of a group get the state of its first
    return {name: each for name, each in metric.named_modules() if hasattr(type(each), "update_count")}


def state_of(metric: Any) -> StateDict:
    """Return what a single metric has summed, and the numbers that it keeps besides, such as that of its updates."""
    sums = {name: [*value] if isinstance(value, list) else value for name, value in metric.metric_state.items()}
    others = {name: value for name, value in vars(metric).items() if name not in sums and name != "_computed"}
    return {"sums": sums, "numbers": {name: value for name, value in others.items() if _is_number(value)}}


def load_state(metric: Any, state: StateMapping) -> None:
    """Restore what `state_of` returned; tensors are moved to the device of the metric."""
    metric.reset()
    for name, value in state["sums"].items():
        setattr(metric, name, on_device(value, metric.device))
    for name, number in state["numbers"].items():
        setattr(metric, name, on_device(number, metric.device))


def merged(metric: Any, states: Sequence[StateMapping]) -> StateDict:
    """Put the states of one metric together that several processes have, as torchmetrics does.

    Args:
        metric: The metric, which knows how.
        states: What `state_of` returned on each of them.
    """
    reductions: Mapping[str, Any] = metric._reductions  # noqa: SLF001 - torchmetrics has no public name for it
    sums = {
        name: _reduced(reductions[name], [on_device(state["sums"][name], metric.device) for state in states])
        for name in metric.metric_state
    }
    num_updates = sum(state["numbers"].get("_update_count", 0) for state in states)
    return {"sums": sums, "numbers": {**states[0]["numbers"], "_update_count": num_updates}}


def _reduced(reduction: Any, values: list[Any]) -> Any:
    if isinstance(values[0], list):
        return list(chain.from_iterable(values))  # as one process would have it
    if len({value.shape for value in values}) > 1:
        return torch.cat([value.reshape(-1) if value.ndim == 0 else value for value in values])
    stacked = torch.stack(values)
    return stacked if reduction is None else reduction(stacked)


def on_device(value: Nested, device: torch.device) -> Nested:
    """Return a copy of a nested structure with its tensors on a device; no two of them share their memory."""
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    return rebuild(value, lambda item: on_device(item, device))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, torch.Tensor)) and not isinstance(value, bool)
