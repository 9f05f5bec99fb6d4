"""Reads a training state, and refuses one that does not fit, before anything is restored from it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pytorch_accelerated._accumulation import AccumulationWindow
from pytorch_accelerated._checkpoint.files import load_file
from pytorch_accelerated._checkpoint.host_memory import HostMemory
from pytorch_accelerated._checkpoint.layout import BatchLayout, sum_epoch_means, translate_position
from pytorch_accelerated._checkpoint.manifest import TRAINER_STATE, SavedState, name_state, process_file
from pytorch_accelerated._checkpoint.model_state import check_model_state
from pytorch_accelerated._checkpoint.names import match_names, portable_state_dict
from pytorch_accelerated._checkpoint.optimizer_state import Named, entries_of, fit_optimizer_state, parameters_of
from pytorch_accelerated._checkpoint.parts import OPTIMIZER, SCALER, WEIGHTS, Parts, StateContents
from pytorch_accelerated._checkpoint.portable import unwrap_model
from pytorch_accelerated._checkpoint.schema import check_process_state, check_trainer_state
from pytorch_accelerated._distributed.accelerator import is_sharded
from pytorch_accelerated._distributed.collectives import run_on_all
from pytorch_accelerated._measuring.metric_set import joined_states
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.progress import TrainingProgress

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from pytorch_accelerated._types import StateDict, StateMapping


_NAMES_IN_FORMAT_1 = {WEIGHTS: "model.safetensors", OPTIMIZER: "optimizer.bin"}  # Accelerate wrote them


def read_state(saved: SavedState, accelerator: Accelerator, parts: Parts) -> StateContents:
    """Read a training state without changing anything. Must be called on every process.

    Args:
        saved: The state, which has been verified.
        accelerator: Unwraps the model, and loads it later if it is sharded.
        parts: The parts of the trainer that the state has to fit.

    Raises:
        CheckpointError: On any process, the state does not fit the model or the optimizer, or cannot be read safely.
    """

    def read() -> StateContents:
        from safetensors import SafetensorError  # a dependency of accelerate

        try:
            return _read_state(saved, accelerator, parts)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{name_state(saved.path)} has unexpected contents: {error!r}. Nothing was loaded. Use an older state."
            ) from error

    return run_on_all(read, int(accelerator.num_processes))


def _read_state(saved: SavedState, accelerator: Accelerator, parts: Parts) -> StateContents:
    num_processes = int(accelerator.num_processes)
    trainer_state = load_file(saved.path / TRAINER_STATE)
    process_state = _read_process_state(saved, int(accelerator.process_index), num_processes)
    _check_entries(trainer_state["trainer"], "progress", "seed", "stopped")
    _check_entries(process_state, "means", "window", "gradients", "rng")
    check_trainer_state(trainer_state, saved.position, parts.run_history)
    check_process_state(process_state, None if is_sharded(accelerator) else unwrap_model(parts.model, accelerator))
    progress = trainer_state["trainer"]["progress"]
    then = BatchLayout.from_settings({**parts.settings, **saved.settings}, saved.num_processes)
    now = BatchLayout.from_settings({**saved.settings, **parts.settings}, num_processes)
    if then.step != now.step:
        length = saved.settings.get("dataset_length", parts.settings.get("dataset_length"))
        progress |= asdict(translate_position(TrainingProgress(**progress), then, now, length))
        process_state |= {"window": AccumulationWindow().state_dict(), "gradients": {}, "stream": None, "buffers": None}
    if parts.stream is None or not trainer_state["trainer"].get("knows_stream"):
        process_state["stream"] = None
    num_batches = parts.settings.get("num_batches_per_epoch")
    if num_batches is not None and progress["phase"] == "training":  # the epoch may have become shorter
        progress["num_batches_in_epoch"] = min(progress["num_batches_in_epoch"], num_batches)
    if "companions" in trainer_state["trainer"]:  # earlier versions did not save them
        parts.companions.check(trainer_state["trainer"]["companions"], name_state(saved.path))
    if is_sharded(accelerator):
        return StateContents(saved, trainer_state, process_state, None, None, None)
    weights, optimizer = _read_weights_and_optimizer(
        saved, unwrap_model(parts.model, accelerator), parts, trainer_state
    )
    return StateContents(saved, trainer_state, process_state, weights, optimizer, _read_if_listed(saved, SCALER))


def _read_weights_and_optimizer(
    saved: SavedState, model: nn.Module, parts: Parts, trainer_state: StateMapping
) -> tuple[StateDict, StateDict | None]:
    source, companions = name_state(saved.path), parts.companions.modules
    weights = match_names(_read_weights(saved, model), portable_state_dict(model), source)
    loaded = check_model_state(model, weights, source)
    optimizer = _read_if_listed(saved, OPTIMIZER)
    if parts.optimizer is None or optimizer is None:
        return weights, optimizer
    saved_companions = trainer_state["trainer"].get("companions", {"modules": {}})["modules"]
    named = Named(
        parameters_of({"": model, **companions}),
        parameters_of({"": loaded, **companions}),
        entries_of({"": weights, **saved_companions}),
    )
    then, now = (settings.get("optimizer") for settings in (saved.settings, parts.settings))
    if None in (then, now) or then == now:
        then = None  # the settings have the class of an optimizer in the optimizer
    return weights, fit_optimizer_state(parts.optimizer, optimizer, named, source, then)


def _check_entries(state: StateMapping, *names: str) -> None:
    missing = [name for name in names if name not in state]
    if missing:
        raise KeyError(*missing)


def _read_process_state(saved: SavedState, process_index: int, num_processes: int) -> StateDict:
    if saved.num_processes == num_processes:
        return load_file(saved.path / process_file(process_index))
    states = [load_file(saved.path / process_file(index)) for index in range(saved.num_processes)]
    # The means are summed over all processes at the end of the epoch, so one process can take all of them.
    means = sum_epoch_means([state["means"] for state in states] if process_index == 0 else [])
    metrics = joined_states([state.get("metrics", {}) for state in states], is_main=process_index == 0)
    rng = states[process_index]["rng"] if process_index < saved.num_processes else None
    companions = states[min(process_index, saved.num_processes - 1)].get("companions")
    return {**states[0], "means": means, "metrics": metrics, "rng": rng, "companions": companions}


def _read_if_listed(saved: SavedState, name: str) -> StateDict | None:
    name = _NAMES_IN_FORMAT_1.get(name, name) if saved.format_version == 1 else name
    return _load_large(saved.path / name) if name in saved.files else None


def _load_large(path: Path) -> StateDict:
    # Reading into memory that the system allocates page by page takes four times as long.
    contents: StateDict = HostMemory().copy(load_file(path, is_mapped=True))
    return contents


def _read_weights(saved: SavedState, model: nn.Module) -> StateDict:
    if saved.format_version > 1:
        return _load_large(saved.path / WEIGHTS)
    return _read_safetensors(saved, portable_state_dict(model))


def _read_safetensors(saved: SavedState, current: StateMapping) -> StateDict:
    from safetensors.torch import load_file as load_safetensors  # a dependency of accelerate

    weights: dict[str, torch.Tensor] = load_safetensors(saved.path / _NAMES_IN_FORMAT_1[WEIGHTS])
    by_pointer = {current[name].data_ptr(): weights[name] for name in weights if name in current}
    # Of several tensors that share memory, the file contains only one.
    tied = {name: by_pointer[value.data_ptr()] for name, value in current.items() if value.data_ptr() in by_pointer}
    return {**tied, **weights}
