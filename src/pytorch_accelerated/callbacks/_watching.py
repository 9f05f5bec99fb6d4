"""Whether a run records the metric that a callback watches, and what its value is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pytorch_accelerated._distributed.collectives import run_on_main
from pytorch_accelerated._distributed.consensus import overrides_any
from pytorch_accelerated._hints.classes import is_of_library, words_around
from pytorch_accelerated._hints.hooks import HOOKS
from pytorch_accelerated._hints.meaning import metric_meant
from pytorch_accelerated._messages import warn
from pytorch_accelerated._views import library_of, run_of

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


def check_is_recorded(trainer: Trainer, watch_metric: str, callback_name: str) -> None:
    """Raise at the start of a run if nothing will record a metric; warn if its name is that of another library.

    What a program records itself is not known then. So the error is raised only if all hooks and callbacks are the
    library's own, and the warning only if the program does not mention the name.

    Raises:
        ValueError: The run will not record the metric.
    """
    known = _metrics_of_run(trainer, watch_metric)
    of_trainer = _metrics_of_trainer(trainer, watch_metric)
    if watch_metric in known or watch_metric.startswith(tuple(f"{name}_" for name in of_trainer)):
        return  # a result with several entries has the name of the metric in front of theirs
    classes = _classes_of(trainer)
    meant = metric_meant(watch_metric, known)
    if all(map(is_of_library, (*classes, type(trainer.run_history)))) and not overrides_any(trainer, HOOKS):
        remedy = f"Watch {meant!r}." if meant else "Watch one of these, or record the metric in a callback or a hook."
        raise ValueError(
            f"`{callback_name}` watches {watch_metric!r}, which nothing in this run records. It records "
            f"{sorted(known)}. {remedy}"
        )
    if metric_meant(watch_metric, known, cutoff=1) and not any(watch_metric in words_around(cls) for cls in classes):
        warn(
            f"`{callback_name}` watches {watch_metric!r}. Unless your program records a metric of this name, watch "
            f"{meant!r}, as it is called here."
        )


def _classes_of(trainer: Trainer) -> list[type]:
    return [type(trainer), *map(type, trainer.callback_handler.with_nested_callbacks())]


def _metrics_of_run(trainer: Trainer, watch_metric: str) -> set[str]:
    """Return the names of all that the library records in a run, and of what is recorded already.

    Of the names with a prefix, as within an epoch or of an average, only those with that of the watched metric count.
    """
    fronts, prefix = _fronts_of_evaluations(trainer, watch_metric)
    of_evaluation = {f"{front}eval_loss_epoch" for front in fronts} | ({f"{prefix}update"} if prefix else set())
    of_callbacks = _texts_of(trainer, "metric_name")
    of_trainer = _metrics_of_trainer(trainer, watch_metric)
    recorded = trainer.run_history.get_metric_names()
    return {"train_loss_epoch", *of_evaluation, *of_callbacks, *of_trainer, *recorded}


def _metrics_of_trainer(trainer: Trainer, watch_metric: str) -> set[str]:
    """Return the names under which a run records the `metrics` of the Trainer."""
    fronts, _ = _fronts_of_evaluations(trainer, watch_metric)
    return run_of(trainer).metrics.recorded_names({"train_", *(f"{front}eval_" for front in fronts)})


def _fronts_of_evaluations(trainer: Trainer, watch_metric: str) -> tuple[set[str], str]:
    """Return what may be in front of ``eval_`` in the names of metrics, and which prefix the watched metric has."""
    names = {f"{name}_" if name else "" for name in run_of(trainer).eval_dataloaders}  # a single one has no name
    prefixes = ["intermediate_", *_texts_of(trainer, "_track_prefix")]
    prefix = next((prefix for prefix in prefixes if prefix in watch_metric), "")
    return {front for name in names for front in (name, name + prefix)}, prefix


def _texts_of(trainer: Trainer, attribute: str) -> list[str]:
    values = [getattr(callback, attribute, None) for callback in trainer.callback_handler]
    return [value for value in values if isinstance(value, str)]


def num_values_of(trainer: Trainer, metric_name: str) -> int:
    """Return how many values of a metric the main process has recorded. Must be called on every process."""
    config, history = trainer.run_config, trainer.run_history

    def count() -> int:
        return len(list(history.get_metric_values(metric_name))) if metric_name in history.get_metric_names() else 0

    return run_on_main(count, config.is_world_process_zero, config.num_processes)


def watched_value(trainer: Trainer, watch_metric: str, callback_name: str) -> float | None:
    """Return the latest value of a metric, with a warning if it is NaN. Must be called on every process.

    Returns:
        The value; ``None`` if the first one is still to come. Of what is not measured within an epoch, a warning tells.

    Raises:
        ValueError: Nothing was recorded under this name, which evidently means another one, or the value is not a
            single number.
    """
    if not num_values_of(trainer, watch_metric) and not _is_other_name(trainer, watch_metric):
        _warn_about_missing_value(trainer, watch_metric, callback_name)
        return None
    value = library_of(trainer).get_agreed_metric(watch_metric)
    if math.isnan(value):
        warn(
            f"`{callback_name}` watches {watch_metric!r}, which is NaN, and NaN is never better than another value. "
            "Check how the metric is computed: it may divide by zero, for example."
        )
    return value


def _is_other_name(trainer: Trainer, watch_metric: str) -> bool:
    """Tell whether a name is that of another library, of a result whose entries have names, or misspelt."""
    config = trainer.run_config

    def is_other() -> bool:
        names = trainer.run_history.get_metric_names()
        if any(name.startswith(f"{watch_metric}_") for name in names) or metric_meant(watch_metric, names, cutoff=1):
            return True
        is_mentioned = any(watch_metric in words_around(cls) for cls in _classes_of(trainer))
        return metric_meant(watch_metric, names) is not None and not is_mentioned

    return run_on_main(is_other, config.is_world_process_zero, config.num_processes)


def _warn_about_missing_value(trainer: Trainer, watch_metric: str, callback_name: str) -> None:
    dataset_name, is_intermediate, _ = watch_metric.partition("intermediate_")
    if not trainer.run_config.is_world_process_zero:
        return
    names = sorted(trainer.run_history.get_metric_names())
    if not is_intermediate or f"{dataset_name}intermediate_update" in names:
        warn(
            f"`{callback_name}` watches {watch_metric!r}, but nothing has been recorded under this name so far, so "
            f"there is nothing to compare. Recorded so far: {names}. Watch one of these, or record the metric before "
            "the end of an epoch, in `on_eval_epoch_end` for example."
        )
