"""The start of a resumed run: the state that it is resumed from, and what differs from the run that saved the state."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch

from pytorch_accelerated._accumulation import groups_of
from pytorch_accelerated._checkpoint.files import is_replacement_interrupted, local_path, restore_backup
from pytorch_accelerated._checkpoint.folder import claim_folder, find_newest_state, list_states
from pytorch_accelerated._checkpoint.lock import lock, unlock
from pytorch_accelerated._checkpoint.manifest import MANIFEST, SavedState, installed_versions, name_state, verify_state
from pytorch_accelerated._checkpoint.optimizer_state import members_of
from pytorch_accelerated._checkpoint.scheduler_state import LENGTHS
from pytorch_accelerated._data.loaders import num_batches_of, reliable_num_batches_of
from pytorch_accelerated._distributed.collectives import run_on_main
from pytorch_accelerated._messages import warn
from pytorch_accelerated.exceptions import CheckpointError

if TYPE_CHECKING:
    from pytorch_accelerated._types import RunSettings, StateMapping
    from pytorch_accelerated.run_config import TrainerRunConfig


# --- the state to resume from ------------------------------------------------------------------------------------


def find_state_to_resume(
    resume_from: str | os.PathLike[str] | bool | None,
    folders: Collection[Path],
    owner: object,
    *,
    is_main: bool,
    num_processes: int,
    allow_other_num_processes: bool,
    print_fn: Callable[[str], object],
) -> SavedState | None:
    """Return the verified state that a run is resumed from; ``None`` if it starts from scratch.

    Must be called on every process.

    Args:
        resume_from: A directory, ``"latest"`` or ``True`` for the newest state, ``None`` or ``False`` for none.
        folders: Where the run saves its states. To find the newest one there must be exactly one such folder.
        owner: The trainer, for which this folder is locked.
        is_main: Whether this is the main process.
        num_processes: The world size.
        allow_other_num_processes: Whether a different number of processes may have saved the state.
        print_fn: Prints which states are skipped.

    Raises:
        FileNotFoundError: There is no such directory.
        ValueError: The newest state is requested, and the run saves its states in no folder, or in several.
        CheckpointError: The state is damaged, a different number of processes saved it, or another run has locked the
            folder.
    """
    if resume_from is None or resume_from is False:
        return None
    if is_directory(resume_from):
        return open_state(resume_from, is_main, num_processes, allow_other_num_processes)
    folder = _only(folders)
    saved, skipped = run_on_main(lambda: _claim_and_find_newest(folder, owner), is_main, num_processes)
    for reason in skipped:
        print_fn(f"Skipped: {reason}")
    if saved is None:
        print_fn(f"There is no training state to resume from in {str(folder)!r}: the run starts from scratch.")
        return None
    _check_num_processes(saved, num_processes, allow_other_num_processes)
    return saved


def is_directory(resume_from: str | os.PathLike[str] | bool | None) -> TypeGuard[str | os.PathLike[str]]:
    """Return whether ``resume_from`` names a state, rather than to ask for the newest one, or for none."""
    is_request = resume_from is None or isinstance(resume_from, bool)
    return not is_request and resume_from != "latest"  # `Path("latest")` is not equal to it: a directory


def _only(folders: Collection[Path]) -> Path:
    if len(folders) == 1:
        return local_path(next(iter(folders)))
    problem, remedy = "there is no folder to look in", "Add one such callback"
    if folders:
        problem, remedy = f"there are {len(folders)} folders to look in", "Keep one such callback"
    raise ValueError(
        f"`resume_from` asks for the newest training state, but {problem}. Expected one: the `save_dir` of the "
        f"trainer's `SaveTrainingStateCallback`. {remedy}, or pass the path of a state as `resume_from` (if that path "
        'is "latest", as `Path("latest")`).'
    )


def _claim_and_find_newest(folder: Path, owner: object) -> tuple[SavedState | None, list[str]]:
    claim_folder(folder, owner)
    skipped: list[str] = []
    return find_newest_state(folder, skipped.append), skipped


def open_state(
    directory: str | os.PathLike[str], is_main: bool, num_processes: int, allow_other_num_processes: bool
) -> SavedState:
    """Verify a training state. Must be called on every process.

    Args:
        directory: The directory of the state.
        is_main: Whether this is the main process, which verifies the state for all.
        num_processes: The world size.
        allow_other_num_processes: Whether a different number of processes may have saved the state.

    Raises:
        FileNotFoundError: There is no such directory.
        CheckpointError: It is damaged or not a training state, or a different number of processes saved it.
    """
    saved = run_on_main(lambda: _repair_and_verify(local_path(directory)), is_main, num_processes)
    _check_num_processes(saved, num_processes, allow_other_num_processes)
    return saved


def entries_of(returned: StateMapping | None, method: str) -> StateMapping:
    """Return the entries that a method which loads something has returned; none if it returned nothing.

    Args:
        returned: What it returned.
        method: Its name, which a subclass may override.

    Raises:
        TypeError: It returned something else than a dictionary.
    """
    if returned is None:
        return {}
    if not isinstance(returned, Mapping):
        raise TypeError(
            f"`{method}` returned {returned!r}. Expected a dictionary of the entries that were loaded, or `None`. "
            f"Return what `super().{method}(...)` returns."
        )
    return returned


class _Reader:
    """Holds the lock of a folder while a state in it is repaired to be read."""


def _repair_and_verify(path: Path) -> SavedState:
    if is_replacement_interrupted(path):  # by a kill, or a run that holds the lock is replacing it at this moment
        reader = _Reader()
        lock(path.parent, reader)
        try:
            restore_backup(path)
        finally:
            unlock(path.parent, reader)
    try:
        return verify_state(path)
    except CheckpointError as error:
        has_manifest = (path / MANIFEST).exists()
        states = [] if has_manifest else [state for state in list_states(path) if state.problem is None]
        if not states:
            raise
        raise CheckpointError(
            f"{str(path)!r} is a folder of training states, not a training state. Pass one of them, such as "
            f'{str(states[-1].path)!r}, or `resume_from="latest"` for the newest state in the `save_dir` of the '
            "trainer's `SaveTrainingStateCallback`."
        ) from error


def _check_num_processes(saved: SavedState, num_processes: int, allow_other_num_processes: bool) -> None:
    if saved.num_processes != num_processes and not allow_other_num_processes:
        raise CheckpointError(
            f"{name_state(saved.path)} was saved by a run with num_processes={saved.num_processes}, but this run has "
            f"num_processes={num_processes} and could not resume exactly. Start {saved.num_processes} processes, or "
            "pass `allow_other_num_processes=True` to continue at the same place in the data with other random numbers."
        )


# --- configuration mismatch --------------------------------------------------------------------------------------


_NOT_COMPARED = ("num_processes", "num_batches_per_epoch", *LENGTHS)
"""The first one is handled by `open_state`, the second one follows from other settings, and the others may change."""

_MAX_NESTING = 5
_OPTIMIZER_SETTING = "optimizer."

_DIFFERENT_ORDER = "the samples come in a different order, so this epoch may repeat some samples and miss others"
_OTHER_RATES = "the learning rates differ from here on"
_CONSEQUENCES = {
    "per_device_batch_size": (
        "the batches differ; the epoch continues at the same sample, rounded down to the start of an update"
    ),
    "dataset_length": _DIFFERENT_ORDER,
    "sampler": _DIFFERENT_ORDER,
    "dataset": "the samples may differ",
    "scheduler": _OTHER_RATES,
    "step_scheduler": _OTHER_RATES,
    "scheduler_metric": _OTHER_RATES,
    "seed": "the run continues with the saved seed",
}
_OF_UPDATES = "the updates differ from here on"
_OF_OPTIMIZER_SETTINGS = (
    "the run continues with the saved value; to change it, set `optimizer.param_groups` in `on_training_run_start`"
)
_OF_VERSIONS = "results may differ in their last bits"


def run_settings(
    run_config: TrainerRunConfig,
    dataset: object,
    loader: object,
    optimizer: object,
    loss_func: object,
    seed: int | None,
) -> RunSettings:
    """Return the settings that a resumed run should share with the run that saved its state, as JSON can store them.

    Must be called before a scheduler or a loaded state changes the settings of the optimizer.

    Args:
        run_config: The configuration of the run.
        dataset: The training dataset.
        loader: The training loader, prepared or not.
        optimizer: The optimizer, prepared or not.
        loss_func: The loss function.
        seed: The seed that the user gave; ``None`` if there was none.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # without the wrapper of Accelerate
    settings = {
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
        **{name: getattr(run_config, name) for name in LENGTHS},
    }
    return {name: _as_json(value) for name, value in settings.items()}


def name_of(value: object) -> str | None:
    """Return the name of a function or of the class of an object; ``None`` for ``None``."""
    return None if value is None else getattr(value, "__name__", type(value).__name__)


def warn_about_mismatch(saved: SavedState, settings: RunSettings) -> None:
    """Warn the caller of `Trainer.train` if the configuration differs from that of the run that saved the state."""
    mismatch = describe_mismatch(saved, settings)
    if mismatch is not None:
        warn(mismatch)


def describe_mismatch(saved: SavedState, settings: RunSettings) -> str | None:
    """Return what differs between two runs, and the consequence of each difference; ``None`` if nothing differs.

    Args:
        saved: The state that a run was resumed from.
        settings: The settings of the resumed run.
    """
    compared = {name: value for name, value in settings.items() if name not in _NOT_COMPARED}
    if settings.get("seed") is None:
        compared.pop("seed", None)  # any seed will do
    versions_then = {name: version for name, version in saved.versions.items() if version is not None}
    versions_now = {name: version for name, version in installed_versions().items() if version is not None}
    lines = [
        *_differences(saved.settings, compared, _consequence_of),
        *_differences(versions_then, versions_now, lambda name: _OF_VERSIONS),
    ]
    if not lines:
        return None
    listed = "".join(f"\n  {line}" for line in lines)
    return (
        f"The run resumed from {str(saved.path)!r} is configured differently from the run that saved it. "
        f"Restore what you did not mean to change:{listed}"
    )


def _differences(
    then: Mapping[str, object], now: Mapping[str, object], consequence_of: Callable[[str], str]
) -> list[str]:
    return [
        f"{name}: {then[name]!r} -> {now[name]!r}: {consequence_of(name)}."
        for name in now
        if name in then and then[name] != now[name]
    ]


def _consequence_of(name: str) -> str:
    if name.startswith(_OPTIMIZER_SETTING):
        return _OF_OPTIMIZER_SETTINGS
    return _CONSEQUENCES.get(name, _OF_UPDATES)


def _name_of_sampler(loader: object) -> str | None:
    """Return the name of the innermost sampler, inside everything that batches and shards its indices."""
    source = loader
    for _ in range(_MAX_NESTING):
        inner = (getattr(source, name, None) for name in ("batch_sampler", "sampler"))
        source = next((sampler for sampler in inner if sampler is not None), source)
    return None if source is loader else name_of(source)


def _hyperparameters_of(optimizer: object) -> dict[str, object]:
    members = members_of(optimizer)
    if members is not None:
        settings = {name: _hyperparameters_of(member) for name, member in members.items()}
        return {f"{name}.{key}": value for name, own in settings.items() for key, value in own.items()}
    groups = groups_of(optimizer) or [{}]
    return {name: value for name, value in groups[0].items() if _is_setting(name, value)}


def _is_setting(name: str, value: object) -> bool:
    """Tell whether an entry of a group is a plain setting of the optimizer; learning rates belong to the schedule."""
    items = list(value) if isinstance(value, (tuple, list)) else [value]
    if any(isinstance(item, (tuple, list)) for item in items):
        return all(_is_setting(name, item) for item in items)
    return (
        "lr" not in name
        and name != "param_names"
        and all(item is None or isinstance(item, (str, Real)) for item in items)
    )


def _as_json(value: object) -> object:
    """Return a number, text or sequence of these in the form in which JSON returns it; infinity and NaN as text."""
    if isinstance(value, (tuple, list)):
        return [_as_json(item) for item in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    number = float(value) if isinstance(value, (Real, torch.Tensor)) else None
    return str(value) if number is None or not math.isfinite(number) else number
