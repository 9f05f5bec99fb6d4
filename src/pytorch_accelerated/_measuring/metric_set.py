"""The metrics of a trainer, and what they have gathered in a pass over the data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from pytorch_accelerated._measuring.accumulators import Accumulator, Number, create_accumulators
from pytorch_accelerated._measuring.names import MetricNames, named_numbers, stems_of_run
from pytorch_accelerated._measuring.states import is_torchmetric
from pytorch_accelerated._messages import warn
from pytorch_accelerated._tensors.nested import outline_of_arguments, rebuild
from pytorch_accelerated._types import Batch, BatchOutput, Metrics, Nested, StateDict, StateMapping
from pytorch_accelerated.exceptions import add_note

GetInputs = Callable[[Batch, BatchOutput], Nested]
Gather = Callable[[StateDict], list[StateDict]]


class PassMetrics:
    """What the metrics of a trainer have gathered in one pass over the data, on this process.

    Args:
        accumulators: One for each metric, by name.
    """

    def __init__(self, accumulators: Mapping[str, Accumulator]) -> None:
        self._accumulators = dict(accumulators)
        self._updated = [(name, each) for name, each in accumulators.items() if each.needs_inputs]
        self._context = torch.no_grad if any(each.calls_users_code for each in accumulators.values()) else nullcontext
        self._earlier: dict[str, list[StateMapping]] = {}
        """States of further processes that the run had before it was resumed."""

        self._not_restored: set[str] = set()
        self._has_names = False
        """Whether the names of the results were compared."""

    def update(self, get_inputs: GetInputs, batch: Batch, batch_output: BatchOutput, num_samples: int) -> None:
        """Add a step.

        Args:
            get_inputs: Returns what the metrics are called with.
            batch: The batch.
            batch_output: What the step returned.
            num_samples: The number of its samples.

        Raises:
            ValueError: Two results have the same name.
        """
        if not self._updated:
            return
        inputs = _detached(get_inputs(batch, batch_output))
        with self._context():
            args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
            for name, accumulator in self._updated:
                try:
                    accumulator.update(args, kwargs, num_samples)
                except Exception as error:
                    _note_metric(error, name)
                    add_note(error, f"The metric was called with {outline_of_arguments(args, kwargs)}")
                    raise
        if not self._has_names:
            self._check_names()

    def _check_names(self) -> None:
        """Raise at the first step if two results have the same name, as far as their names are known then.

        Raises:
            ValueError: Two have.
        """
        self._has_names = True
        results: dict[str, float] = {}
        for name, accumulator in self._accumulators.items():
            numbers = dict(named_numbers("" if accumulator.has_names else name, accumulator.zeros()))
            _check_differ(name, results, numbers)
            results |= numbers

    def sums(self) -> dict[str, tuple[Number, Number]]:
        """Return the weighted sum and the total weight of each metric that is a mean of single numbers, by name."""
        sums: dict[str, tuple[Number, Number]] = {}
        with torch.no_grad():
            for name, accumulator in self._accumulators.items():
                for key, pair in accumulator.sums().items():
                    sums[key if accumulator.has_names else f"{name}_{key}" if key else name] = pair
        return sums

    def may_return(self, name: str) -> bool:
        """Return whether a result may have this name, as far as is known before it is computed."""
        return any(own in ("", name) or name.startswith(f"{own}_") for own in self._accumulators)

    def finish(self, mean_loss: float, gather: Gather | None = None) -> dict[str, float]:
        """Return the results, by name, and forget all steps. Reads from the device.

        Args:
            mean_loss: The mean loss of the pass, on all processes.
            gather: Returns the values of all processes, in their order; ``None`` if there is only this one. Then this
                must be called on every process.

        Raises:
            ValueError: Two results have the same name.
        """
        local = {name: [each.state_dict(), *self._earlier.get(name, ())] for name, each in self._accumulators.items()}
        of_processes = [local] if gather is None else gather(local)
        results: dict[str, float] = {}
        with torch.no_grad():
            for name, accumulator in self._accumulators.items():
                states = [state for of_process in of_processes for state in of_process[name]]
                try:
                    result = accumulator.compute(states, mean_loss)
                    numbers = dict(named_numbers("" if accumulator.has_names else name, result))
                except Exception as error:
                    _note_metric(error, name)
                    raise
                _check_differ(name, results, numbers)
                results |= numbers
        self.reset()
        return results

    def reset(self) -> None:
        """Forget all steps."""
        self._earlier, self._not_restored = {}, set()
        for accumulator in self._accumulators.values():
            accumulator.reset()

    def memory(self) -> StateDict:
        """Return what outlives `reset`, by the names of metrics; usually nothing."""
        memories = {name: accumulator.memory() for name, accumulator in self._accumulators.items()}
        return {name: memory for name, memory in memories.items() if memory}

    def load_memory(self, memory: StateMapping) -> None:
        """Restore what `memory` returned."""
        for name, accumulator in self._accumulators.items():
            accumulator.load_memory(memory.get(name, {}))

    def warn_about_rest(self) -> None:
        """Warn about metrics that the training state of a resumed epoch does not have."""
        if self._not_restored:
            warn(
                f"The training state has nothing of {', '.join(f'`{name}`' for name in sorted(self._not_restored))} in "
                "`metrics`: in the epoch that is resumed, they cover only the steps from here on."
            )

    def state_dict(self) -> StateDict:
        """Return what each metric has gathered, for one process or several."""
        return {name: [each.state_dict(), *self._earlier.get(name, ())] for name, each in self._accumulators.items()}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned, or what `joined_states` made of it.

        Raises:
            ValueError: It is that of other metrics of the same names.
        """
        self.reset()
        for name, accumulator in self._accumulators.items():
            states = state_dict.get(name)
            if states is None:
                self._not_restored.add(name)
                continue
            for state in states[:1]:
                try:
                    accumulator.load_state_dict(state)
                except (KeyError, ValueError) as error:
                    raise ValueError(f"the metric {name!r} is another one: {error}") from error
            self._earlier[name] = list(states[1:])


def joined_states(states: list[StateMapping], is_main: bool) -> StateDict:
    """Return the state for one process of a run that is resumed with a different number of processes.

    The main process takes the states of all, which are put together at the end of the pass.

    Args:
        states: What `PassMetrics.state_dict` returned on each process of the run that saved it.
        is_main: Whether it is for the main process.
    """
    names = dict.fromkeys(name for state in states for name in state)
    return {name: [part for state in states for part in state.get(name, ())] if is_main else [] for name in names}


def _detached(inputs: Nested) -> Nested:
    if isinstance(inputs, torch.Tensor):
        return inputs.detach() if inputs.requires_grad else inputs
    if inputs.__class__ is tuple:  # which is what most steps have
        return tuple([_detached(item) for item in inputs])
    return rebuild(inputs, _detached)


def _note_metric(error: Exception, name: str) -> None:
    add_note(error, f"in the metric {name!r} of the Trainer" if name else "in `metrics` of the Trainer")


def _check_differ(name: str, results: Mapping[str, float], numbers: Mapping[str, float]) -> None:
    common = sorted(results.keys() & numbers.keys())
    if common:
        raise ValueError(
            f"The metric {name!r} has results with the names {common}, which another metric of the Trainer has too. "
            "Give one of them another name."
        )


class MetricSet:
    """The metrics of a trainer: one copy for training, and one for each evaluation dataset.

    Args:
        metrics: What the program passed to the Trainer; see `Trainer`.
        measures_training: Whether the metrics are computed on the training data too.

    Raises:
        TypeError: It contains something that is no metric.
        ValueError: A name is missing, or is one that the library uses.
    """

    def __init__(self, metrics: Metrics | None = None, measures_training: bool = True) -> None:
        self._metrics = _named(metrics)
        self._measures_training = measures_training
        self._device: torch.device | None = None
        self.of_training: PassMetrics | None = None
        """Those of training; ``None`` if there are none, or before the first run."""

        self._of_evaluation: dict[str, PassMetrics] = {}
        """Those that no evaluation uses at the moment."""

        self._memories: StateDict = {}
        """What the others remember of earlier evaluations."""

        for name in self.names:
            MetricNames().check(name, "`metrics` has")

    @property
    def names(self) -> list[str]:
        """The names of the metrics; those of a result with several entries begin with one of them."""
        return [key for name, metric in self._metrics.items() for key in ([name] if name else map(str, metric.keys()))]

    def place(self, device: torch.device) -> None:
        """Create the copies on a device, unless they are there."""
        if self._metrics and self._device != device:
            self._device = device
            self.of_training = self._created(device) if self._measures_training else None
            self._of_evaluation.clear()

    @contextmanager
    def of_evaluation(self, key: str) -> Iterator[PassMetrics | None]:
        """Lend the metrics of an evaluation while the body runs; ``None`` if there are none.

        Args:
            key: Stands for the dataset.
        """
        if self._device is None:
            yield None
            return
        metrics = self._of_evaluation.pop(key, None)
        if metrics is None:
            metrics = self._created(self._device)
            metrics.load_memory(self._memories.get(key, {}))
        self._memories[key] = metrics.memory()
        try:
            yield metrics
        finally:
            metrics.reset()
            self._of_evaluation[key] = metrics

    def _created(self, device: torch.device) -> PassMetrics:
        return PassMetrics(create_accumulators(self._metrics, device))

    def state_dict(self) -> StateDict:
        """Return what the metrics of evaluations remember of earlier ones, which is identical on every process."""
        memories = {**self._memories, **{key: metrics.memory() for key, metrics in self._of_evaluation.items()}}
        return {"memories": {key: memory for key, memory in memories.items() if memory}}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        self._of_evaluation.clear()
        self._memories = dict(state_dict["memories"])

    def check_names(self, dataset_names: Iterable[str], is_training_run: bool) -> None:
        """Raise at the start of a run if a metric would be recorded under the name of another.

        Args:
            dataset_names: The names of the evaluation datasets; that of a single one is empty.
            is_training_run: Whether it is a call of `train`.

        Raises:
            ValueError: One would.
        """
        stems = stems_of_run(dataset_names, is_training_run) if self._metrics else set()
        for stem in stems if self._measures_training else stems - {"train_"}:
            names = MetricNames(stem, stems)
            for name in self.names:
                names.check(name, "`metrics` has")

    def recorded_names(self, stems: set[str]) -> set[str]:
        """Return the names under which the metrics are recorded in the passes with these stems."""
        stems = stems if self._measures_training else stems - {"train_"}
        return {stem + name for stem in stems for name in self.names}


def _named(metrics: Metrics | None) -> dict[str, Any]:
    """Return metrics by name; a collection of torchmetrics, which has names of its own, by the empty one."""
    if metrics is None:
        return {}
    if is_torchmetric(metrics) and hasattr(metrics, "add_metrics"):
        return {"": metrics}
    if isinstance(metrics, Mapping):
        named = dict(metrics)
    else:
        several = list(metrics) if isinstance(metrics, (list, tuple)) else [metrics]
        named = {_name_of(metric): metric for metric in several}
        if len(named) < len(several):
            raise ValueError(f"`metrics` has several of the same name: {sorted(named)}. Pass a dictionary of metrics.")
    for name, metric in named.items():
        _check_metric(name, metric)
    return named


def _name_of(metric: Any) -> str:
    name = getattr(metric, "__name__", None) or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(metric).__name__).lower()
    if not name.isidentifier() and not isinstance(metric, str):
        raise ValueError(
            f"`metrics` has {metric!r}, which has no name. Expected a dictionary of metrics: "
            '`metrics={"error": lambda outputs, targets: ...}`.'
        )
    return str(name)


def _check_metric(name: object, metric: object) -> None:
    if name == "":
        raise ValueError("`metrics` has a metric with an empty name. Expected a text such as 'accuracy'.")
    if isinstance(metric, type):
        remedy = f"It is a class: create an instance, such as `{metric.__name__}(...)`."
    elif not callable(metric):
        remedy = (
            "Expected a metric of torchmetrics or of `pytorch_accelerated.metrics`, or a function of the model's "
            "outputs and the targets."
        )
    else:
        return
    raise TypeError(f"The metric {name!r} is {metric!r}, of type {type(metric).__name__}. {remedy}")
