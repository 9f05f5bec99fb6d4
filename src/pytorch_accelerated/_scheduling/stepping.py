"""When and how a scheduler is stepped: after each update or at the end of each epoch, with a metric if it takes one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch.optim.lr_scheduler import ReduceLROnPlateau

from pytorch_accelerated._checkpoint.scheduler_state import schedulers_in
from pytorch_accelerated._distributed.collectives import run_on_main
from pytorch_accelerated._means import as_number
from pytorch_accelerated._messages import warn
from pytorch_accelerated._scheduling.group import members_of
from pytorch_accelerated.schedulers.scheduler_base import StatefulSchedulerBase
from pytorch_accelerated.tracking import latest_value

if TYPE_CHECKING:
    from pytorch_accelerated._position import TrainingPosition
    from pytorch_accelerated.run_config import TrainerRunConfig
    from pytorch_accelerated.tracking import RunHistory

Interval = Literal["update", "epoch"]

_METRIC_WORDS = frozenset(
    ("metric", "metrics", "loss", "losses", "score", "value", "val", "accuracy", "acc", "perplexity", "error")
)


# --- one scheduler -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepRule:
    """How one scheduler is stepped.

    Args:
        scheduler: The scheduler.
        counts_updates: Whether its `step_update` is passed the number of updates done.
        epoch: The argument of its `step` that is the number of epochs done; ``None`` if it has none.
        metric: The argument of its `step` that is a metric; ``None`` if it has none.
        needs_metric: Whether it does nothing without one.
        unknown: The arguments that its `step` requires, and that nobody can supply.
    """

    scheduler: Any
    counts_updates: bool
    epoch: str | None
    metric: str | None
    needs_metric: bool
    unknown: tuple[str, ...]

    @property
    def is_plain(self) -> bool:
        """Whether its `step` is called without arguments, after each update or each epoch."""
        return not (self.counts_updates or self.epoch or self.metric)

    def step_epoch(self, epoch: int, metric: float | None) -> None:
        """Step it at the end of an epoch.

        Args:
            epoch: The number of epochs done.
            metric: The value of the metric; ``None`` if there is no new one.
        """
        if (metric is None and self.needs_metric and self.epoch is None) or not hasattr(self.scheduler, "step"):
            return
        arguments = [] if self.epoch is None else [epoch]
        self.scheduler.step(*arguments, **({} if metric is None or self.metric is None else {self.metric: metric}))


def rule_of(scheduler: Any, *, is_timm: bool = False, is_metric_given: bool = False) -> StepRule:
    """Return how a scheduler is stepped, according to the arguments that its `step` requires.

    Args:
        scheduler: The scheduler.
        is_timm: Whether the trainer is one for the schedulers of timm: whatever has `step_update` is one of them.
        is_metric_given: Whether a metric was named, so that an optional argument for one is meant to be used.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> rule_of(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)).metric
        'metrics'
        >>> rule_of(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)).is_plain
        True
    """
    parameters = _parameters_of(_innermost(scheduler))
    required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    has_step = hasattr(scheduler, "step")
    has_step_update = callable(getattr(scheduler, "step_update", None))
    is_stateful = isinstance(scheduler, StatefulSchedulerBase)
    counts_updates = has_step_update and not is_stateful and (is_timm or bool(required) or not has_step)
    epoch = next((name for name in required if "epoch" in name.lower()), None)
    if counts_updates and is_timm and has_step:
        epoch = epoch or "epoch"
    metric = next((parameter.name for parameter in parameters if _is_metric(parameter.name)), None)
    needs_metric = metric is not None and (metric in required or _is_plateau(scheduler))
    unknown = tuple(name for name in required if name not in (epoch, metric) and not (counts_updates and is_timm))
    return StepRule(
        scheduler,
        counts_updates,
        epoch,
        metric if needs_metric or epoch is not None or is_metric_given else None,
        needs_metric,
        unknown,
    )


def _innermost(scheduler: object) -> object:
    """Return the scheduler whose `step` is meant: one that passes on all arguments takes what the one in it takes."""
    kinds = {parameter.kind for parameter in _all_parameters_of(scheduler)}
    inner = schedulers_in(scheduler)
    passes_on = kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return _innermost(inner[0]) if passes_on and len(inner) == 1 else scheduler


def _parameters_of(scheduler: object) -> list[inspect.Parameter]:
    parameters = _all_parameters_of(scheduler)
    return [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]


def _all_parameters_of(scheduler: object) -> Collection[inspect.Parameter]:
    step = getattr(scheduler, "step", None)
    try:
        return inspect.signature(step).parameters.values() if callable(step) else []
    except (TypeError, ValueError):  # it has none, as some functions written in C
        return []


def _is_metric(name: str) -> bool:
    return not _METRIC_WORDS.isdisjoint(re.split(r"[_\d]+", name.lower()))


def _is_plateau(scheduler: object) -> bool:
    is_named_so = "plateau" in type(scheduler).__name__.lower()
    return is_named_so or any(isinstance(inner, ReduceLROnPlateau) for inner in schedulers_in(scheduler))


# --- the schedulers of a run -------------------------------------------------------------------------------------


class SchedulerStepping:
    """Steps the scheduler of a run, or each of a group by its own rule.

    The trainer's hook `scheduler_step` calls `step`, after each update, and once within `at_epoch_end`. A subclass that
    overrides the hook without calling that of the library is left to itself: it gets the one call per update or epoch
    that was asked for, and no other.

    Args:
        interval: When schedulers are stepped that take no metric and no epoch; ``None`` if the user has not said.
        metric_name: The metric that the user has named; ``None`` for the default.
    """

    def __init__(self, interval: Interval | None = None, metric_name: str | None = None) -> None:
        self.requested_interval = interval
        self.metric_name = metric_name
        self.rules: list[StepRule] = []
        self.is_due_after_update = True
        """Whether the hook is called after an update."""

        self.is_due_after_epoch = False
        """Whether the hook is called at the end of an epoch."""

        self.num_values_before = 0
        """How many values of the metric earlier runs have recorded."""

        self._has_warned = False
        self._is_timm = False
        self.is_metric_given = metric_name is not None
        self._scheduler: object = None
        self._without_arguments: list[Any] = []
        self._counting: list[Any] = []
        self._epoch_end: tuple[RunHistory, TrainerRunConfig] | None = None

    @property
    def interval(self) -> Interval:
        """When schedulers are stepped that take no metric and no epoch."""
        return "update" if self.requested_interval is None else self.requested_interval

    @property
    def needs_metric(self) -> bool:
        """Whether a scheduler does nothing without a metric."""
        return any(rule.needs_metric for rule in self.rules)

    @property
    def settings(self) -> dict[str, str | None]:
        """What a resumed run ought to have in common with the run that saved its state; nothing without a scheduler."""
        if not self.rules:
            return {}
        is_per_update = bool(self._without_arguments or self._counting)
        return {
            "step_scheduler": "update" if is_per_update else "epoch",
            "scheduler_metric": self.metric_name if self.needs_metric else None,
        }

    def plan(self, scheduler: object, *, is_timm: bool) -> None:
        """Find out how to step a scheduler.

        Args:
            scheduler: The scheduler, a group, or ``None``.
            is_timm: Whether the trainer is one for the schedulers of timm.
        """
        self._scheduler, self._is_timm = scheduler, is_timm
        self.rules = [
            rule_of(member, is_timm=is_timm, is_metric_given=self.is_metric_given) for member in members_of(scheduler)
        ]
        is_per_update = self.interval == "update"
        self._without_arguments = [rule.scheduler for rule in self.rules if rule.is_plain and is_per_update]
        self._counting = [rule.scheduler for rule in self.rules if rule.counts_updates]

    def plan_hook(self, *, is_overridden: bool, is_replaced: bool) -> None:
        """Decide when the hook `scheduler_step` is called; a trainer for timm's schedulers ends its epochs itself.

        Args:
            is_overridden: Whether a subclass overrides it.
            is_replaced: Whether it does so without calling the method of the library.
        """
        is_per_update = self.interval == "update"
        has_epochs = any(not rule.is_plain and (rule.epoch or rule.metric) for rule in self.rules)
        self.is_due_after_update = self._is_timm or not is_overridden or is_per_update
        self.is_due_after_epoch = not self._is_timm and (
            not is_overridden or not is_per_update or (has_epochs and not is_replaced)
        )

    def step(self, scheduler: object, training: TrainingPosition) -> None:
        """Step what is due at this moment.

        Args:
            scheduler: The scheduler of the trainer, which a program may have replaced.
            training: Where the run is; it counts the updates, and the values of the metric.
        """
        if scheduler is not self._scheduler:
            self.plan(scheduler, is_timm=self._is_timm)
        if self._epoch_end is not None:
            self._step_epoch(training, *self._epoch_end)
            return
        for each in self._without_arguments:
            each.step()
        if self._counting:
            training.count_scheduler_update()
            for each in self._counting:
                each.step_update(num_updates=training.num_scheduler_updates)

    @contextmanager
    def at_epoch_end(self, history: RunHistory, config: TrainerRunConfig) -> Iterator[None]:
        """Let `step` step what is stepped once an epoch, while the body runs.

        Args:
            history: Has the metric, on the main process at least.
            config: The configuration of the run.
        """
        self._epoch_end = history, config
        try:
            yield
        finally:
            self._epoch_end = None

    def _step_epoch(self, training: TrainingPosition, history: RunHistory, config: TrainerRunConfig) -> None:
        metric = None
        if self.metric_name is not None and any(rule.metric for rule in self.rules):
            seen = training.num_metric_values_seen
            training.num_metric_values_seen, metric = read_metric(history, config, self.metric_name, seen)
            if training.num_metric_values_seen == 0 and self.needs_metric and config.is_world_process_zero:
                self._warn_once_about_metric(history)
        for rule in self.rules:
            if not rule.is_plain:
                rule.step_epoch(history.current_epoch, metric)
            elif self.interval == "epoch":
                rule.scheduler.step()

    def _warn_once_about_metric(self, history: RunHistory) -> None:
        if not self._has_warned:
            warn(
                f"The scheduler is stepped with the metric {self.metric_name!r}, but nothing has been recorded under "
                f"this name so far, so the learning rate stays as it is. Recorded so far: "
                f"{sorted(history.get_metric_names())}. Pass one of these as `scheduler_metric`, or record the metric "
                "before the end of an epoch, in `on_eval_epoch_end` for example.",
            )
        self._has_warned = True


def read_metric(
    history: RunHistory, config: TrainerRunConfig, name: str, num_seen: int = 0
) -> tuple[int, float | None]:
    """Return how many values of a metric there are, and the latest one unless it was seen before.

    The main process reads for all, so that all decide alike. Must be called on every process.

    Args:
        history: Has the metric, on the main process at least.
        config: The configuration of the run.
        name: The metric.
        num_seen: How many values there were when it was read before.

    Raises:
        ValueError: The value is not a single number.
    """

    def read() -> tuple[int, float | None]:
        names: Collection[str] = set(history.get_metric_names())
        num_values = len(list(history.get_metric_values(name))) if name in names else 0
        is_new = num_values not in (0, num_seen)
        return num_values, as_number(latest_value(history, name)) if is_new else None

    return run_on_main(read, config.is_world_process_zero, config.num_processes)
