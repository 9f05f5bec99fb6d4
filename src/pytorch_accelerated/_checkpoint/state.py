"""Training states: what of a trainer goes into one, and how it is read and restored."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytorch_accelerated._accumulation import AccumulationWindow
from pytorch_accelerated._checkpoint.files import as_plain, load_file, restore_backup
from pytorch_accelerated._checkpoint.folder import list_states
from pytorch_accelerated._checkpoint.host_memory import HostMemory
from pytorch_accelerated._checkpoint.layout import BatchLayout, sum_epoch_means, translate_position
from pytorch_accelerated._checkpoint.manifest import (
    MANIFEST,
    TRAINER_STATE,
    SavedState,
    as_json_number,
    process_file,
    verify_state,
)
from pytorch_accelerated._checkpoint.portable import (
    check_same_model,
    check_same_optimizer,
    load_model_state,
    portable_state_dict,
)
from pytorch_accelerated._checkpoint.writer import CollectedState
from pytorch_accelerated._data.rng import derive_seed, get_rng_state, seed_generators, set_rng_state
from pytorch_accelerated._data.streams import TrackedStream
from pytorch_accelerated._distributed.accelerator import is_sharded, registered
from pytorch_accelerated._distributed.collectives import run_on_all, run_on_main
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.progress import TrainingProgress
from pytorch_accelerated.tracking import EpochMeans, RunHistory

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn


WEIGHTS, OPTIMIZER, SCALER = "model.pt", "optimizer.pt", "scaler.pt"


_FORMER_NAMES = {WEIGHTS: "model.safetensors", OPTIMIZER: "optimizer.bin"}  # format 1: as Accelerate writes them


@dataclass(frozen=True)
class Parts:
    """What of a trainer a training state consists of.

    Args:
        model: The model, prepared or not.
        optimizer: The optimizer or ``None``.
        scheduler: The scheduler or ``None``.
        progress: How far the run has come.
        run_history: What it recorded.
        callbacks: The handler of the callbacks, which has their states.
        means: The sums of the epoch so far, on this process.
        window: The accumulation window, on this process.
        stream: What the training data are read from, if it can tell its position.
        seed: Where the order of the data comes from.
        stop_reason: Why the run was stopped for good; ``None`` if it was not.
        settings: What the run was started with; see `run_settings`.
    """

    model: Any
    optimizer: Any
    scheduler: Any
    progress: TrainingProgress
    run_history: RunHistory
    callbacks: Any
    means: EpochMeans
    window: AccumulationWindow
    stream: TrackedStream | None
    seed: int
    stop_reason: str | None
    settings: Mapping[str, Any]

    @property
    def of_trainer(self) -> dict[str, Any]:
        """What is alike on all processes, and has a ``state_dict``."""
        return {"progress": self.progress, "run_history": self.run_history, "callbacks": self.callbacks}

    @property
    def of_process(self) -> dict[str, Any]:
        """What each process has for itself."""
        return {"means": self.means, "window": self.window}


def collect_state(
    parts: Parts, accelerator: Accelerator, extras: Mapping[str, Any] | None, announce: Callable[[], Any]
) -> CollectedState:
    """Take the state of a trainer. Must be called on every process.

    Args:
        parts: The parts of the trainer.
        accelerator: The accelerator.
        extras: The user's entries.
        announce: Called before; if it fails, nothing is collected.

    Raises:
        CheckpointError: Something in it could not be read back safely, on this process or another.
    """

    def collect() -> CollectedState:
        announce()
        return _collect_state(parts, accelerator, extras)

    return run_on_all(collect, int(accelerator.num_processes))


def _collect_state(parts: Parts, accelerator: Accelerator, extras: Mapping[str, Any] | None) -> CollectedState:
    position = parts.progress.resume_point()
    num_epochs_ahead = position.num_epochs_completed - parts.progress.num_epochs_completed
    stream = None if parts.stream is None else parts.stream.position(_num_batches_ahead_of(position))
    trainer_state = {
        **(extras or {}),
        "current_epoch": parts.run_history.current_epoch + num_epochs_ahead,
        "trainer": {
            **states_of({**parts.of_trainer, "progress": position, "scheduler": parts.scheduler}),
            "seed": parts.seed,
            "stopped": parts.stop_reason,
            "knows_stream": stream is not None and stream["state"] is not None,
        },
    }
    process_state = {
        **states_of(parts.of_process),
        "gradients": gradients_of(_plain_model(accelerator, parts.model)) if parts.window.total else {},
        "rng": get_rng_state(),
        "stream": stream,
    }
    return CollectedState(
        files={TRAINER_STATE: as_plain(trainer_state), **_files_of_model(parts, accelerator)},
        own_files={process_file(accelerator.process_index): as_plain(process_state)},
        facts={
            "num_processes": int(accelerator.num_processes),
            "position": asdict(position),
            "metrics": latest_metrics(parts.run_history),
            "settings": {**parts.settings, "seed": parts.seed},
        },
        save_shards=_save_shards(parts, accelerator) if is_sharded(accelerator) else None,
    )


def _files_of_model(parts: Parts, accelerator: Accelerator) -> dict[str, dict[str, Any]]:
    if is_sharded(accelerator):
        return {}
    files = {WEIGHTS: as_plain(portable_state_dict(_plain_model(accelerator, parts.model).state_dict()))}
    if parts.optimizer is not None:
        files[OPTIMIZER] = as_plain(parts.optimizer.state_dict(), "state of the optimizer")
    if accelerator.scaler is not None:
        files[SCALER] = as_plain(accelerator.scaler.state_dict())
    return files


def _save_shards(parts: Parts, accelerator: Accelerator) -> Callable[[Path], None]:
    if parts.window.num_samples > 0:
        raise CheckpointError(
            "A sharded model keeps the gradients of an accumulation window to itself, so its training state can only "
            "be saved after an update. `SaveTrainingStateCallback` waits for it; so can you, until "
            "`trainer.is_between_updates`."
        )

    def save(directory: Path) -> None:
        with _by_accelerate(accelerator, parts.model, parts.optimizer):
            accelerator.save_state(str(directory))

    return save


@contextmanager
def _by_accelerate(accelerator: Accelerator, model: Any, optimizer: Any) -> Iterator[None]:
    """Let Accelerate save or load what is sharded, where it is told to."""
    configuration = accelerator.project_configuration
    names_itself, configuration.automatic_checkpoint_naming = configuration.automatic_checkpoint_naming, False
    try:
        with registered(accelerator, model, optimizer):
            yield
    finally:
        configuration.automatic_checkpoint_naming = names_itself


def _num_batches_ahead_of(position: TrainingProgress) -> int:
    """Return after how many batches of an epoch the next is read; the next epoch begins after none."""
    return position.num_batches_in_epoch if position.phase == "training" else 0


def latest_metrics(history: RunHistory) -> dict[str, float | str]:
    """Return the newest value of each metric, as JSON can store it."""
    return {name: as_json_number(history.get_latest_metric(name)) for name in sorted(history.get_metric_names())}


def states_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of each part that has one."""
    return {name: part.state_dict() for name, part in parts.items() if hasattr(part, "state_dict")}


def load_states(parts: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Restore what `states_of` returned, as far as the parts can take it."""
    for name, part in parts.items():
        if name in states and hasattr(part, "load_state_dict"):
            part.load_state_dict(states[name])


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients that a model has: part of its state while an accumulation window is open."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def load_gradients(model: nn.Module, gradients: Mapping[str, torch.Tensor]) -> None:
    """Restore what `gradients_of` returned."""
    gradients = portable_state_dict(gradients)
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].to(parameter.device) if name in gradients else None


def _plain_model(accelerator: Accelerator, model: Any) -> Any:
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def open_state(
    directory: str | os.PathLike[str], accelerator: Accelerator, allow_other_num_processes: bool
) -> SavedState:
    """Return a training state that is whole, and may be read here. Must be called on every process.

    Raises:
        FileNotFoundError: There is no such directory.
        CheckpointError: It is damaged, or none, or another number of processes saved it.
    """
    path, num_processes = Path(directory), int(accelerator.num_processes)
    saved = run_on_main(lambda: _verify(path), accelerator.is_main_process, num_processes)
    check_num_processes(saved, num_processes, allow_other_num_processes)
    return saved


def _verify(path: Path) -> SavedState:
    restore_backup(path)
    try:
        return verify_state(path)
    except CheckpointError as error:
        has_manifest = (path / MANIFEST).exists()
        states = [] if has_manifest else [state for state in list_states(path) if state.problem is None]
        if not states:
            raise
        raise CheckpointError(
            f"{str(path)!r} is no training state but a folder of them. Pass one of them, such as "
            f'{str(states[-1].path)!r}, or `resume_from="latest"` for the newest in the folder of the '
            "`SaveTrainingStateCallback` of the run."
        ) from error


def check_num_processes(saved: SavedState, num_processes: int, is_other_allowed: bool) -> None:
    """Raise if another number of processes saved a training state, unless that is allowed.

    Raises:
        CheckpointError: Another number of processes saved it.
    """
    if saved.num_processes != num_processes and not is_other_allowed:
        raise CheckpointError(
            f"{_source(saved)} was saved by {saved.num_processes} processes, but there are {num_processes} now, which "
            f"cannot go on exactly as those would have. Start {saved.num_processes} processes, or pass "
            "`allow_other_num_processes=True` to go on at the same place in the data with other random numbers."
        )


@dataclass(frozen=True)
class StateContents:
    """What was read of a training state; nothing of it is restored yet.

    Args:
        saved: Where it comes from.
        trainer_state: What is alike on all processes: the user's entries, the epoch, and ``trainer`` with our own.
        process_state: What this process has for itself.
        weights: The model's; ``None`` if Accelerate reads them.
        optimizer: The optimizer's state; ``None`` if there is none, or Accelerate reads it.
        scaler: The gradient scaler's; likewise.
    """

    saved: SavedState
    trainer_state: dict[str, Any]
    process_state: dict[str, Any]
    weights: dict[str, Any] | None
    optimizer: dict[str, Any] | None
    scaler: dict[str, Any] | None

    @property
    def own(self) -> dict[str, Any]:
        """What is ours of what is alike on all processes."""
        own: dict[str, Any] = self.trainer_state["trainer"]
        return own

    @property
    def stream_position(self) -> Mapping[str, Any] | None:
        """Where the stream of the training data goes on; ``None`` if its batches have to be skipped."""
        position: Mapping[str, Any] | None = self.process_state["stream"]
        return position


def read_state(saved: SavedState, accelerator: Accelerator, parts: Parts) -> StateContents:
    """Read a training state, and change nothing. Must be called on every process.

    Args:
        saved: The state, which was found to be whole.
        accelerator: The accelerator.
        parts: The parts of the trainer that it has to fit.

    Raises:
        CheckpointError: It does not belong to this model or optimizer, or cannot be read safely, on any process.
    """

    def read() -> StateContents:
        from safetensors import SafetensorError  # a requirement of accelerate

        try:
            return _read_state(saved, accelerator, parts)
        except (KeyError, TypeError, ValueError, AttributeError, OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{_source(saved)} holds something else than expected: {error!r}. Nothing was loaded. Use an older one."
            ) from error

    return run_on_all(read, accelerator.num_processes)


def _read_state(saved: SavedState, accelerator: Accelerator, parts: Parts) -> StateContents:
    trainer_state = load_file(saved.path / TRAINER_STATE)
    process_state = _read_process_state(saved, accelerator)
    _check_entries(trainer_state["trainer"], "progress", "seed", "stopped")
    _check_entries(process_state, "means", "window", "gradients", "rng")
    progress = trainer_state["trainer"]["progress"]
    then = BatchLayout.of({**parts.settings, **saved.settings}, saved.num_processes)
    now = BatchLayout.of({**saved.settings, **parts.settings}, int(accelerator.num_processes))
    if then.step != now.step:
        length = saved.settings.get("dataset_length", parts.settings.get("dataset_length"))
        progress |= asdict(translate_position(TrainingProgress(**progress), then, now, length))
        process_state |= {"window": AccumulationWindow().state_dict(), "gradients": {}, "stream": None}
    if parts.stream is None or not trainer_state["trainer"].get("knows_stream"):
        process_state["stream"] = None
    num_batches = parts.settings.get("num_batches_per_epoch")
    if num_batches is not None and progress["phase"] == "training":  # it may be fewer than they were
        progress["num_batches_in_epoch"] = min(progress["num_batches_in_epoch"], num_batches)
    if is_sharded(accelerator):
        return StateContents(saved, trainer_state, process_state, None, None, None)
    weights = _read_weights(saved, _plain_model(accelerator, parts.model))
    optimizer = _read_listed(saved, OPTIMIZER)
    if parts.optimizer is not None and optimizer is not None:
        check_same_optimizer(parts.optimizer, optimizer, _source(saved))
    return StateContents(saved, trainer_state, process_state, weights, optimizer, _read_listed(saved, SCALER))


def _check_entries(state: Mapping[str, Any], *names: str) -> None:
    missing = [name for name in names if name not in state]
    if missing:
        raise KeyError(*missing)


def _read_process_state(saved: SavedState, accelerator: Accelerator) -> dict[str, Any]:
    own_index, num_processes = accelerator.process_index, accelerator.num_processes
    if saved.num_processes == num_processes:
        return load_file(saved.path / process_file(own_index))
    states = [load_file(saved.path / process_file(index)) for index in range(saved.num_processes)]
    # The sums of the epoch are added up over the processes in the end, so one of them can have all.
    means = sum_epoch_means([state["means"] for state in states] if own_index == 0 else [])
    rng = states[own_index]["rng"] if own_index < saved.num_processes else None
    return {**states[0], "means": means, "rng": rng}


def _read_listed(saved: SavedState, name: str) -> dict[str, Any] | None:
    name = _FORMER_NAMES.get(name, name) if saved.format_version == 1 else name
    return _load_large(saved.path / name) if name in saved.files else None


def _load_large(path: Path) -> dict[str, Any]:
    # To read it into memory that PyTorch takes from the system page by page takes four times as long.
    contents: dict[str, Any] = HostMemory().copy_of(load_file(path, is_mapped=True))
    return contents


def _read_weights(saved: SavedState, model: nn.Module) -> dict[str, Any]:
    own = portable_state_dict(model.state_dict())
    weights = _load_large(saved.path / WEIGHTS) if saved.format_version > 1 else _read_safetensors(saved, own)
    check_same_model(own, weights, _source(saved))
    return weights


def _read_safetensors(saved: SavedState, own: Mapping[str, Any]) -> dict[str, Any]:
    from safetensors.torch import load_file as load_safetensors  # a requirement of accelerate

    weights: dict[str, Any] = load_safetensors(saved.path / _FORMER_NAMES[WEIGHTS])
    by_pointer = {own[name].data_ptr(): weights[name] for name in weights if name in own}
    # Of tensors that share their memory only one is in the file.
    shared = {name: by_pointer[value.data_ptr()] for name, value in own.items() if value.data_ptr() in by_pointer}
    return {**shared, **weights}


def _source(saved: SavedState) -> str:
    return f"The training state {str(saved.path)!r}"


def restore_state(
    contents: StateContents,
    accelerator: Accelerator,
    parts: Parts,
    load_scheduler_state: Callable[[Mapping[str, Any]], None],
    say: Callable[[str], None],
) -> None:
    """Restore what was read. Must be called on every process.

    Args:
        contents: What was read.
        accelerator: The accelerator.
        parts: The parts of the trainer.
        load_scheduler_state: Restores the scheduler, or keeps its state until there is one.
        say: Prints what is given up, if another number of processes saved the state.

    Raises:
        CheckpointError: The scheduler is another one; nothing has been changed.
    """
    saved, own, process_state = contents.saved, contents.own, contents.process_state
    scheduler_state = own.get("scheduler")
    if scheduler_state is not None:
        _try_scheduler(saved, scheduler_state, load_scheduler_state)
    model = _plain_model(accelerator, parts.model)
    if contents.weights is None:
        with _by_accelerate(accelerator, parts.model, parts.optimizer):
            accelerator.load_state(str(saved.path))
    else:
        load_model_state(model, contents.weights, _source(saved))
    if contents.optimizer is not None and parts.optimizer is not None:
        parts.optimizer.load_state_dict(contents.optimizer)
    if contents.scaler is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(contents.scaler)
    if process_state["rng"] is None:
        update = own["progress"]["num_updates"]
        seed_generators(derive_seed(own["seed"], "rank", accelerator.process_index, "update", update))
    else:
        set_rng_state(process_state["rng"])
    load_states(parts.of_trainer, own)
    load_states(parts.of_process, process_state)
    load_gradients(model, process_state["gradients"])
    if scheduler_state is not None:
        load_scheduler_state(scheduler_state)  # the optimizer's state has set the learning rate back
    if saved.num_processes != accelerator.num_processes:
        say(
            f"{str(saved.path)!r} was saved by {saved.num_processes} processes and is resumed by "
            f"{accelerator.num_processes}: random numbers and the last bits differ from here on, and up to an update's "
            "samples of this epoch come again."
        )


def _try_scheduler(
    saved: SavedState, state: Mapping[str, Any], load_scheduler_state: Callable[[Mapping[str, Any]], None]
) -> None:
    try:
        load_scheduler_state(state)
    except Exception as error:
        raise CheckpointError(
            f"{_source(saved)} belongs to another scheduler ({saved.settings.get('scheduler')}): {error} Nothing was "
            "loaded. Make the scheduler as it was."
        ) from error
