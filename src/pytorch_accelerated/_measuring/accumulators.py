"""What a metric has gathered in one pass over the data on one process, for each kind of metric."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import chain, groupby, zip_longest
from typing import Any

import torch
from torch import nn

from pytorch_accelerated._means import wide_dtype
from pytorch_accelerated._measuring.comparison import one_number
from pytorch_accelerated._measuring.states import is_torchmetric, load_state, merged, metrics_in, on_device, state_of
from pytorch_accelerated._messages import warn
from pytorch_accelerated._tensors.joining import OutputJoiner
from pytorch_accelerated._tensors.nested import rebuild
from pytorch_accelerated._tensors.output_types import restorer_of_types
from pytorch_accelerated._tensors.parts import as_parts
from pytorch_accelerated._types import MetricValue, Nested, StateDict, StateMapping
from pytorch_accelerated.metrics import Accuracy, FromLoss, MeanAbsoluteError, TopKAccuracy, WholeSet

_SAMPLE_MEANS = (Accuracy, TopKAccuracy, MeanAbsoluteError)
_NUM_WAITING = 64  # batches; the first operations after other work take ten times as long
_MAX_SMALL = 4096  # elements

Number = float | torch.Tensor


class Accumulator(ABC):
    """Gathers what one metric needs of each step, without reading it from an accelerator.

    Its state is plain, and the states of several processes together give the result for all samples.
    """

    needs_inputs = True
    """Whether `update` has to be called."""

    calls_users_code = True
    """Whether `update` calls code of the user's, or of another library, which may compute gradients."""

    has_names = False
    """Whether the result is a mapping of metrics with names of their own."""

    @abstractmethod
    def update(self, args: Sequence[Nested], kwargs: Mapping[str, Nested], num_samples: int) -> None:
        """Add a step.

        Args:
            args: What the metric is called with, such as outputs and targets.
            kwargs: Keyword arguments; there are either these or ``args``.
            num_samples: The size of the batch.
        """

    def sums(self) -> dict[str, tuple[Number, Number]]:
        """Return the weighted sum and the total weight of each result that is a mean of single numbers, by name.

        The name of the only result is empty. This changes nothing, and reads nothing from an accelerator.
        """
        return {}

    def zeros(self) -> MetricValue:
        """Return a result of zeros in host memory, whose entries are those of the result; ``None`` if unknown yet."""
        return None

    @abstractmethod
    def compute(self, states: Sequence[StateMapping], mean_loss: float) -> MetricValue:
        """Return the result for some states, or ``None`` if they hold nothing.

        Args:
            states: What `state_dict` returned on each process, this one included.
            mean_loss: The mean loss of the pass, on all processes.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget all steps."""

    @abstractmethod
    def state_dict(self) -> StateDict:
        """Return what was gathered so far."""

    @abstractmethod
    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""

    def memory(self) -> StateDict:
        """Return what outlives `reset`, such as the best value so far; of most metrics nothing."""
        return {}

    def load_memory(self, memory: StateMapping) -> None:
        """Restore what `memory` returned."""
        return


def create_accumulators(metrics: Mapping[str, Any], device: torch.device) -> dict[str, Accumulator]:
    """Create the accumulator of each metric; those of the library share one.

    Args:
        metrics: The metrics by name.
        device: Where they are.

    Returns:
        The accumulators by the name of the metric, or the names of several.
    """
    own = {name: metric for name, metric in metrics.items() if type(metric) in _SAMPLE_MEANS}
    accumulators: dict[str, Accumulator] = {", ".join(own): OfSampleMeans(own, device)} if own else {}
    for name, metric in metrics.items():
        if name not in own:
            accumulators[name] = create_accumulator(metric, device, name)
    return accumulators


def create_accumulator(metric: Any, device: torch.device, name: str = "") -> Accumulator:
    """Create the accumulator of a metric, which has a copy of the metric if that has a state."""
    if is_torchmetric(metric):
        return OfTorchMetric(metric, device)
    if isinstance(metric, WholeSet):
        return OfWholeSet(metric, device)
    if isinstance(metric, FromLoss):
        return OfLoss(metric)
    return OfBatchMeans(metric.to(device) if isinstance(metric, nn.Module) else metric, device, name)


# --- plain functions ---------------------------------------------------------------------------------------------


class OfBatchMeans(Accumulator):
    """The weighted mean of what a function returns for each batch.

    Args:
        function: Returns a number, or several in a tensor, sequence or mapping; in a pair, the second is the weight.
        device: Where tensors are.
        name: The name of the metric, for messages.

    Example:
        >>> accumulator = OfBatchMeans(lambda outputs, targets: (outputs - targets).abs().mean(), torch.device("cpu"))
        >>> accumulator.update((torch.zeros(3), torch.ones(3)), {}, 3)
        >>> accumulator.update((torch.zeros(1), torch.ones(1) * 5), {}, 1)
        >>> accumulator.compute([accumulator.state_dict()], 0.0)
        2.0
    """

    def __init__(self, function: Callable[..., MetricValue], device: torch.device, name: str = "") -> None:
        self._function = function
        self._device = device
        self._name = name
        self._totals: dict[str, Number] = {}
        self._weights: dict[str, Number] = {}
        self._was_called = False

    def update(self, args: Sequence[Nested], kwargs: Mapping[str, Nested], num_samples: int) -> None:
        """Call the function, and add what it returned; nothing where that is ``None`` or has a weight of 0."""
        weight: Any = num_samples
        value = self._function(*args, **kwargs)
        self._was_called = True
        if isinstance(value, tuple) and len(value) == 2:
            value, weight = value
            weight = _as_weight(weight, self._name)
        if weight.__class__ is not torch.Tensor and weight == 0:
            return
        if isinstance(value, Mapping):
            for key, item in value.items():
                if item is not None:
                    self._add(str(key), item, weight)
        elif value is not None:
            self._add("", value, weight)

    def _add(self, key: str, value: MetricValue, weight: Any) -> None:
        if value.__class__ is not float:
            value = _as_summand(value, self._name)
        total = self._totals.get(key, 0.0)
        if isinstance(value, torch.Tensor):
            if isinstance(total, torch.Tensor) and total.shape != value.shape:
                raise ValueError(
                    f"The metric {self._name!r} returned the shape {tuple(value.shape)} for a batch, and "
                    f"{tuple(total.shape)} for those before. Expected the mean over the batch: return that, or use "
                    "`pytorch_accelerated.metrics.WholeSet(function)` for a function of all samples."
                )
            if isinstance(total, torch.Tensor) and weight.__class__ is int:
                total.add_(value, alpha=weight)  # a single operation
            else:
                self._totals[key] = weighted(value.to(wide_dtype(value.device)), weight) + total
        else:
            self._totals[key] = weighted(value, weight) + total
        self._weights[key] = self._weights.get(key, 0) + weight

    def sums(self) -> dict[str, tuple[Number, Number]]:
        """Return the sums of the means so far that are single numbers."""
        totals = self._totals.items()
        return {key: (total, self._weights[key]) for key, total in totals if getattr(total, "ndim", 0) == 0}

    def zeros(self) -> MetricValue:
        """Return zeros in the shapes of what the function has returned."""
        zeros = {key: torch.zeros(getattr(total, "shape", ())) for key, total in self._totals.items()}
        return zeros.get("", zeros)

    def compute(self, states: Sequence[StateMapping], mean_loss: float) -> MetricValue:
        """Return the mean, or a dictionary of means if the function returned a mapping."""
        pairs: dict[str, list[tuple[Number, Number]]] = {}
        for state in states:
            for key, total in state["totals"].items():
                pairs.setdefault(key, []).append((total, state["weights"][key]))
        if self._was_called and not pairs:
            warn(
                f"The metric {self._name!r} has measured nothing in a whole pass over the data: for each batch it "
                "returned None, or a weight of 0. Check that the function returns its result."
            )
        means = {key: _mean(of_processes) for key, of_processes in pairs.items()}
        return means.get("", means or None)

    def reset(self) -> None:
        """Forget all sums."""
        self._totals, self._weights, self._was_called = {}, {}, False

    def state_dict(self) -> StateDict:
        """Return the weighted sums, and the sums of the weights."""
        return {"totals": dict(self._totals), "weights": dict(self._weights)}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        state = on_device(dict(state_dict), self._device)
        self._totals, self._weights = state["totals"], state["weights"]


def weighted(value: Number, weight: Number) -> Number:
    """Return the product; 0 for a weight of 0, also of a value that is not finite, such as the mean of nothing."""
    if isinstance(weight, torch.Tensor):  # on an accelerator, where the host would wait for its value
        product = torch.as_tensor(value * weight)
        return torch.where(weight == 0, torch.zeros_like(product), product)
    return value * weight


def _as_summand(value: MetricValue, name: str) -> Number:
    """Return a number in host memory as such, and anything else as a tensor."""
    number = None if isinstance(value, torch.Tensor) else one_number(value)
    if number is not None:
        return number
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"The metric {name!r} returned {value!r}, of type {type(value).__name__}. Expected a number, or a tensor "
            "or mapping of numbers: the mean over the batch, and `None` where there is none."
        ) from error
    if tensor.is_complex():
        raise TypeError(f"The metric {name!r} returned complex numbers. Expected real ones.")
    return _read_if_free(tensor) if tensor.numel() == 1 else tensor.detach()


def _as_weight(weight: Any, name: str) -> Number:
    number = one_number(weight)
    if number is None:
        raise TypeError(
            f"The metric {name!r} returned a pair whose second item, the weight of the value, is {weight!r}. Expected "
            "a single number. Return several values as a tensor, list or mapping."
        )
    if isinstance(number, torch.Tensor):
        number = _read_if_free(number)
    if not isinstance(number, torch.Tensor) and not 0 <= number < math.inf:
        raise ValueError(
            f"The metric {name!r} returned a pair whose second item, the weight of the value, is {number:g}. Expected "
            "a finite number, not below 0. Return several values as a tensor, list or mapping."
        )
    return number


def _read_if_free(value: torch.Tensor) -> Number:
    """Return a single number from host memory as such; one on an accelerator, for which the host would wait, stays."""
    number: float | torch.Tensor = value.item() if value.is_cpu else value.detach().reshape(())
    return number


def _mean(pairs: Sequence[tuple[Number, Number]]) -> Number | None:
    total = sum((_on_host(total) for total, _ in pairs), 0.0)
    weight = sum((_on_host(weight) for _, weight in pairs), 0.0)
    return total / weight if weight else None


def _on_host(number: Number) -> Number:
    if not isinstance(number, torch.Tensor):
        return number
    return float(number) if number.ndim == 0 else number.cpu()


class OfSampleMeans(Accumulator):
    """The means of some metrics of the library, which are means over samples, so batches may be put together.

    Small batches wait for each other. Calling a metric once for several of them takes a fraction of the time.

    Args:
        metrics: The metrics by name, each a function of outputs and targets.
        device: Where tensors are.
    """

    calls_users_code = False
    has_names = True

    def __init__(self, metrics: Mapping[str, Callable[..., MetricValue]], device: torch.device) -> None:
        self._metrics = metrics
        self._means = _means_of(metrics, device)
        self._device = device
        self._waiting: list[list[torch.Tensor]] = []
        self._is_tried = False

    def update(self, args: Sequence[Nested], kwargs: Mapping[str, Nested], num_samples: int) -> None:
        """Keep a copy of a small batch until there are several; the first one is measured at once."""
        if len(args) == 2 and _is_small(args[0]) and _is_small(args[1]):
            self._waiting.append([args[0].clone(), args[1].clone()])
            if len(self._waiting) == _NUM_WAITING or not self._is_tried:
                self._measure_waiting()
                self._is_tried = True
        else:
            self._measure_waiting()
            _measure(self._means, args, kwargs)

    def _measure_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        _measure_batches(self._means, waiting)

    def sums(self) -> dict[str, tuple[Number, Number]]:
        """Return the sums with those of the batches that wait, which keep waiting."""
        waiting = _means_of(self._metrics, self._device)
        _measure_batches(waiting, self._waiting)
        sums: dict[str, tuple[Number, Number]] = {}
        for name, pair in ((name, pair) for means in (self._means, waiting) for name, pair in _sums_of(means)):
            total, weight = sums.get(name, (0.0, 0.0))
            sums[name] = total + pair[0], weight + pair[1]
        return sums

    def zeros(self) -> MetricValue:
        """Return a zero for each metric."""
        return dict.fromkeys(self._metrics, 0.0)

    def compute(self, states: Sequence[StateMapping], mean_loss: float) -> MetricValue:
        """Return the mean of each metric, by name."""
        completed = [self._completed(state) for state in states]
        return {
            name: means.compute([state[name] for state in completed], mean_loss) for name, means in self._means.items()
        }

    def _completed(self, state: StateMapping) -> StateDict:
        self.load_state_dict(state)
        self._measure_waiting()
        return self.state_dict()["means"]  # type: ignore[no-any-return]  # a state is open

    def reset(self) -> None:
        """Forget all steps."""
        self._waiting, self._is_tried = [], False
        for means in self._means.values():
            means.reset()

    def state_dict(self) -> StateDict:
        """Return the sums, and the batches that wait: to measure them now would round other sums."""
        means = {name: means.state_dict() for name, means in self._means.items()}
        return {"means": means, "waiting": list(self._waiting), "is_tried": self._is_tried}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        self.reset()
        for name, means in self._means.items():
            means.load_state_dict(state_dict["means"][name])
        self._waiting = on_device(list(state_dict["waiting"]), self._device)
        self._is_tried = state_dict["is_tried"]


def _means_of(metrics: Mapping[str, Callable[..., MetricValue]], device: torch.device) -> dict[str, OfBatchMeans]:
    return {name: OfBatchMeans(metric, device, name) for name, metric in metrics.items()}


def _measure(means: Mapping[str, OfBatchMeans], args: Sequence[Nested], kwargs: Mapping[str, Nested]) -> None:
    for each in means.values():
        each.update(args, kwargs, 1)  # the metrics know their weights


def _measure_batches(means: Mapping[str, OfBatchMeans], batches: Sequence[list[torch.Tensor]]) -> None:
    for _, alike in groupby(batches, key=_kind_of_batch):
        _measure(means, [torch.cat(parts) for parts in zip(*alike, strict=True)], {})


def _sums_of(means: Mapping[str, OfBatchMeans]) -> Iterator[tuple[str, tuple[Number, Number]]]:
    return ((name, pair) for name, each in means.items() for pair in each.sums().values())


def _is_small(value: Nested) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.numel() <= _MAX_SMALL


def _kind_of_batch(batch: list[torch.Tensor]) -> Hashable:
    return tuple((part.shape[1:], part.dtype, part.device) for part in batch)


class OfWholeSet(Accumulator):
    """Keeps what a function needs of all steps, on the device.

    Args:
        metric: The function, and how to join what it is called with.
        device: Where tensors are.
    """

    calls_users_code = False

    def __init__(self, metric: WholeSet, device: torch.device) -> None:
        self._metric = metric
        self._device = device
        self._chunks: list[StateDict] = []

    def update(self, args: Sequence[Nested], kwargs: Mapping[str, Nested], num_samples: int) -> None:
        """Keep a copy: what the model returned may be overwritten in the next step."""
        named = {f"{index}": value for index, value in enumerate(args)} | dict(kwargs)
        self._chunks.append({"size": num_samples, "num_args": len(args), "inputs": _copied(named)})

    def compute(self, states: Sequence[StateMapping], mean_loss: float) -> MetricValue:
        """Join the steps, in the order in which the processes took turns, and call the function."""
        turns = chain.from_iterable(zip_longest(*(state["chunks"] for state in states)))
        chunks = [chunk for chunk in turns if chunk is not None]
        if not chunks:
            return None
        joiner = OutputJoiner(self._metric.padding_value, to_host=False)
        joiner.num_expected = sum(chunk["size"] for chunk in chunks)
        for chunk in chunks:
            size, parts = chunk["size"], chunk["inputs"]
            joiner.add({name: as_parts(value, size, (name,)) for name, value in parts.items()}, size)
        joined = restorer_of_types(chunks[0]["inputs"])(joiner.result())
        args = [joined.pop(f"{index}") for index in range(chunks[0]["num_args"])]
        return self._metric.function(*args, **joined)

    def reset(self) -> None:
        """Forget all steps."""
        self._chunks = []

    def state_dict(self) -> StateDict:
        """Return the arguments and the size of each step."""
        return {"chunks": list(self._chunks)}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        self._chunks = on_device(list(state_dict["chunks"]), self._device)


def _copied(value: Nested) -> Nested:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return rebuild(value, _copied)


class OfLoss(Accumulator):
    """Gathers nothing: the trainer knows the mean loss.

    Args:
        metric: The function of the mean loss.
    """

    needs_inputs = False
    calls_users_code = False

    def __init__(self, metric: FromLoss) -> None:
        self._metric = metric

    def update(self, args: Sequence[Nested], kwargs: Mapping[str, Nested], num_samples: int) -> None:
        """Do nothing."""

    def zeros(self) -> MetricValue:
        """Return a zero."""
        return 0.0

    def compute(self, states: Sequence[StateMapping], mean_loss: float) -> MetricValue:
        """Call the function with the mean loss."""
        return self._metric.function(mean_loss)

    def reset(self) -> None:
        """Do nothing."""

    def state_dict(self) -> StateDict:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Do nothing."""


# --- torchmetrics ------------------------------------------------------------------------------------------------


class OfTorchMetric(Accumulator):
    """A copy of a metric, or of a collection of metrics, of torchmetrics.

    Args:
        metric: The metric.
        device: Where the copy is.
    """

    def __init__(self, metric: Any, device: torch.device) -> None:
        self._metric = copy.deepcopy(metric).to(device)
        self._metric.reset()
        self._num_updates = 0  # metrics around others do not count them
        for each in self._parts().values():
            each.distributed_available_fn = _is_never_available  # processes are put together by `compute`
        self._initial_numbers = copy.deepcopy(self._numbers())

    def _parts(self) -> dict[str, Any]:
        return metrics_in(self._metric)

    def update(self, args: Sequence[Nested], kwargs: Mapping[str, Nested], num_samples: int) -> None:
        """Update the metric."""
        self._metric.update(*args, **kwargs)
        self._num_updates += 1

    def compute(self, states: Sequence[StateMapping], mean_loss: float) -> MetricValue:
        """Put the states together, which leaves the metric with the result, and compute that."""
        if not any(state["num_updates"] for state in states):
            return None
        for name, part in self._parts().items() if len(states) > 1 else ():
            load_state(part, merged(part, [state["metrics"][name] for state in states]))
        return self._metric.compute()

    def reset(self) -> None:
        """Reset the metric."""
        self._metric.reset()
        self._num_updates = 0

    def state_dict(self) -> StateDict:
        """Return the state of the metric, and of each metric in it."""
        metrics = {name: state_of(part) for name, part in self._parts().items()}
        return {"metrics": metrics, "num_updates": self._num_updates}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: It is that of another metric.
        """
        parts, saved = self._parts(), state_dict["metrics"]
        sums = {name: set(part.metric_state) for name, part in parts.items()}
        saved_sums = {name: set(state["sums"]) for name, state in saved.items()}
        if sums != saved_sums:
            raise ValueError(f"it has the sums {saved_sums} instead of {sums}")
        for name, part in parts.items():
            load_state(part, saved[name])
        self._num_updates = state_dict["num_updates"]

    def _numbers(self) -> dict[str, StateDict]:
        return {name: state_of(part)["numbers"] for name, part in self._parts().items()}

    def memory(self) -> StateDict:
        """Return the numbers that are not what they were at first; call it after `reset`."""
        memory: StateDict = {}
        for name, numbers in self._numbers().items():
            initial = self._initial_numbers[name]
            changed = {key: value for key, value in numbers.items() if not _are_equal(value, initial.get(key))}
            memory |= {name: changed} if changed else {}
        return memory

    def load_memory(self, memory: StateMapping) -> None:
        """Restore what `memory` returned."""
        for name, part in self._parts().items():
            for key, number in memory.get(name, {}).items():
                setattr(part, key, on_device(number, part.device))


def _are_equal(number: object, other: object) -> bool:
    if isinstance(number, torch.Tensor) and isinstance(other, torch.Tensor):
        return number.shape == other.shape and torch.equal(number.cpu(), other.cpu())
    return type(number) is type(other) and number == other


def _is_never_available() -> bool:
    return False
