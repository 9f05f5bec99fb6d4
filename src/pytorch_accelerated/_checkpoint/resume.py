"""What a run was started with, and what it means that a run resumed from its state is started otherwise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pytorch_accelerated._checkpoint.manifest import SavedState, installed_versions
from pytorch_accelerated._data.loaders import num_batches_of, reliable_num_batches_of

if TYPE_CHECKING:
    from pytorch_accelerated.run_config import TrainerRunConfig


_NOT_COMPARED = ("num_processes", "num_batches_per_epoch")
"""The first is never a mere difference, and the second follows from others."""


_MAX_NESTING = 5


_OPTIMIZER_SETTING = "optimizer."


_OTHER_ORDER = "the order of the samples is another one, so in this epoch some may come twice and some not at all"


_CONSEQUENCES = {
    "per_device_batch_size": "the batches are others; the epoch goes on at the same sample, as far as that starts one",
    "dataset_length": _OTHER_ORDER,
    "sampler": _OTHER_ORDER,
    "dataset": "the samples may be others",
    "optimizer": "it takes over the state of the other, which may not fit",
    "scheduler": "the learning rates from here on are others",
    "seed": "the run goes on with the saved one",
}


_OF_UPDATES = "the updates from here on are others"


_OF_OPTIMIZER_SETTINGS = (
    "the run goes on with the saved value; set `optimizer.param_groups` in `on_training_run_start` to change it"
)


_OF_VERSIONS = "results may differ in their last bits"


def run_settings(
    run_config: TrainerRunConfig, dataset: Any, loader: Any, optimizer: Any, loss_func: Any, seed: int | None
) -> dict[str, Any]:
    """Return what a resumed run ought to have in common with the one that saved the state, as JSON can store it.

    Must be called before a scheduler or a state has changed the optimizer's settings.

    Args:
        run_config: The configuration of the run.
        dataset: The training dataset.
        loader: The training loader, prepared or not.
        optimizer: The optimizer, prepared or not.
        loss_func: The loss function.
        seed: The seed that the user gave; ``None`` if none was given.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # without what Accelerate puts around it
    return {
        "per_device_batch_size": run_config.train_per_device_batch_size,
        "gradient_accumulation_steps": run_config.gradient_accumulation_steps,
        "gradient_clip_value": run_config.gradient_clip_value,
        "gradient_clip_norm": run_config.gradient_clip_norm,
        "mixed_precision": run_config.mixed_precision,
        "num_processes": run_config.num_processes,
        "seed": seed,
        "dataset": name_of(dataset),
        "dataset_length": num_batches_of(dataset),
        "num_batches_per_epoch": reliable_num_batches_of(loader),
        "sampler": _name_of_sampler(loader),
        "loss_func": name_of(loss_func),
        "optimizer": name_of(optimizer),
        **{f"{_OPTIMIZER_SETTING}{name}": value for name, value in _hyperparameters_of(optimizer).items()},
    }


def name_of(value: Any) -> str | None:
    """Return the name of a function, or of the class of an object; ``None`` for ``None``."""
    return None if value is None else getattr(value, "__name__", type(value).__name__)


def warn_about_mismatch(saved: SavedState, settings: Mapping[str, Any]) -> None:
    """Warn the caller of `Trainer.train` of what is different now, if anything is."""
    drift = describe_mismatch(saved, settings)
    if drift is not None:
        warnings.warn(drift, stacklevel=5)


def describe_mismatch(saved: SavedState, settings: Mapping[str, Any]) -> str | None:
    """Say what is different now, and what follows from it; ``None`` if nothing is.

    Args:
        saved: The state that a run was resumed from.
        settings: Those of that run.
    """
    compared = {name: value for name, value in settings.items() if name not in _NOT_COMPARED}
    if settings.get("seed") is None:
        compared.pop("seed", None)  # the user wants none in particular
    versions_then = {name: version for name, version in saved.versions.items() if version is not None}
    versions_now = {name: version for name, version in installed_versions().items() if version is not None}
    lines = [
        *_differences(saved.settings, compared, _consequence_of),
        *_differences(versions_then, versions_now, lambda name: _OF_VERSIONS),
    ]
    if not lines:
        return None
    listed = "".join(f"\n  {line}" for line in lines)
    return f"The run that goes on from {str(saved.path)!r} is not quite the one that was saved:{listed}"


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], consequence_of: Callable[[str], str]) -> list[str]:
    return [
        f"{name}: {then[name]!r} -> {now[name]!r}: {consequence_of(name)}."
        for name in now
        if name in then and then[name] != now[name]
    ]


def _consequence_of(name: str) -> str:
    if name.startswith(_OPTIMIZER_SETTING):
        return _OF_OPTIMIZER_SETTINGS
    return _CONSEQUENCES.get(name, _OF_UPDATES)


def _name_of_sampler(loader: Any) -> str | None:
    """Return what chooses the samples, inside all that groups and shares them."""
    source = loader
    for _ in range(_MAX_NESTING):
        inner = (getattr(source, name, None) for name in ("batch_sampler", "sampler"))
        source = next((sampler for sampler in inner if sampler is not None), source)
    return None if source is loader else name_of(source)


def _hyperparameters_of(optimizer: Any) -> dict[str, Any]:
    groups = getattr(optimizer, "param_groups", None) or [{}]
    plain = {name: _plain(value) for name, value in groups[0].items() if name != "params" and "lr" not in name}
    return {name: value for name, value in plain.items() if value is not _NOT_PLAIN}


_NOT_PLAIN = object()


def _plain(value: Any) -> Any:
    """Return a number, text or sequence of them as JSON gives it back."""
    if isinstance(value, (tuple, list)):
        items = [_plain(item) for item in value]
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in items) else items
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else _NOT_PLAIN
