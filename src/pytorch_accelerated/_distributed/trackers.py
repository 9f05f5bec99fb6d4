"""Accelerate's experiment trackers: one adapter for all of them, with what a resumed run needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    Plain = bool | int | float | str | None

_EXTRAS = {"tensorboard": "trackers", "mlflow": "mlflow", "wandb": "wandb"}
"""The extra of this library that installs what a tracker needs. That of the others is a package of their name."""

_MODULES = {"tensorboard": ("tensorboard", "tensorboardX")}
"""The modules of which a tracker needs one, where it is not that of its own name."""


def open_tracker(name: str, project: str, logging_dir: str | None, options: Mapping[str, Any]) -> GeneralTracker:
    """Open a tracker of Accelerate.

    Args:
        name: Its name, such as ``"tensorboard"``.
        project: The project or experiment; for TensorBoard, the folder below ``logging_dir``.
        logging_dir: Where a tracker that writes files puts them; ``None`` for ``runs``, if it needs to know.
        options: Further arguments of the tracker's class.

    Raises:
        ValueError: Accelerate has no such tracker.
        ModuleNotFoundError: Its package is not installed.
    """
    check_tracker(name)
    tracker_class = _tracker_classes()[name]
    needs_folder = logging_dir is not None or tracker_class.requires_logging_directory
    folder = {"logging_dir": logging_dir or "runs"} if needs_folder else {}
    tracker: GeneralTracker = tracker_class(project, **folder, **options)
    if hasattr(tracker, "start"):  # before accelerate 1.8, the constructor starts it
        tracker.start()
    return tracker


def store_hyperparameters(tracker: GeneralTracker, values: Mapping[str, Plain]) -> None:
    """Send the hyper-parameters of a run.

    For TensorBoard they are written to the run itself, so that its table shows them next to the metrics. Accelerate
    writes them to another run, named after the time, which has no metrics.

    Args:
        tracker: The tracker, which has been opened.
        values: The hyper-parameters, by name.
    """
    if type(tracker) is not _tracker_classes()["tensorboard"]:
        tracker.store_init_configuration(dict(values))
        return
    from torch.utils.tensorboard.summary import hparams

    texts = {name: str(value) if isinstance(value, bool) else value for name, value in values.items()}
    _, start, _ = hparams(texts, {})  # type: ignore[no-untyped-call]
    # Without the list of columns that it makes too, TensorBoard shows all metrics of the run.
    tracker.writer.file_writer.add_summary(start)
    tracker.writer.flush()


def check_tracker(name: str) -> None:
    """Raise unless there is a tracker of this name, and its package is installed.

    Raises:
        ValueError: Accelerate has no such tracker.
        ModuleNotFoundError: Its package is not installed.
    """
    known = _tracker_classes()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        remedy = f"Did you mean {near[0]!r}?" if near else "Pass one of these, or a tracker of your own."
        raise ValueError(f"Accelerate has no tracker {name!r}. Expected one of {sorted(known)}. {remedy}")
    if not any(importlib.util.find_spec(module) for module in _MODULES.get(name, (name,))):
        extra = _EXTRAS.get(name)
        package = name.replace("_", "-") if extra is None else f"pytorch-accelerated[{extra}]"
        raise ModuleNotFoundError(
            f"The tracker {name!r} needs a package that is not installed. Install it with `pip install '{package}'`.",
            name=name,
        )


def _tracker_classes() -> dict[str, Any]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return {str(kind): tracker_class for kind, tracker_class in LOGGER_TYPE_TO_CLASS.items()}
