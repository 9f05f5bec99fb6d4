"""Collects a training state from the parts of a trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pytorch_accelerated._checkpoint.buffers import local_buffers_of
from pytorch_accelerated._checkpoint.companions import gradients_of
from pytorch_accelerated._checkpoint.files import as_plain
from pytorch_accelerated._checkpoint.manifest import TRAINER_STATE, as_json_scalar, process_file
from pytorch_accelerated._checkpoint.names import portable_parameters, portable_state_dict
from pytorch_accelerated._checkpoint.optimizer_state import optimizer_state_of
from pytorch_accelerated._checkpoint.parts import OPTIMIZER, SCALER, WEIGHTS, Parts, sharded_objects, state_dicts_of
from pytorch_accelerated._checkpoint.portable import unwrap_model
from pytorch_accelerated._checkpoint.scheduler_state import scheduler_state_of
from pytorch_accelerated._checkpoint.writer import CollectedState
from pytorch_accelerated._data.rng import get_rng_state
from pytorch_accelerated._data.samplers import OrderState
from pytorch_accelerated._distributed.accelerator import is_sharded
from pytorch_accelerated._distributed.collectives import run_on_all
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.progress import TrainingProgress
from pytorch_accelerated.tracking import RunHistory, latest_value

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from pytorch_accelerated._types import StateDict, StateMapping


def collect_state(
    parts: Parts, accelerator: Accelerator, extras: StateMapping | None, on_collect: Callable[[], object]
) -> CollectedState:
    """Collect the state of a trainer. Must be called on every process.

    Args:
        parts: The parts of the trainer.
        accelerator: Unwraps the model, and saves it if it is sharded.
        extras: The user's entries.
        on_collect: Called first. If it raises, nothing is collected.

    Raises:
        CheckpointError: The state contains something that could not be read back safely, on this process or another.
    """

    def collect() -> CollectedState:
        on_collect()
        return _collect_state(parts, accelerator, extras)

    return run_on_all(collect, int(accelerator.num_processes))


def _collect_state(parts: Parts, accelerator: Accelerator, extras: StateMapping | None) -> CollectedState:
    position = parts.progress.resume_point()
    stream = None if parts.stream is None else parts.stream.position(_num_batches_read(position))
    model = unwrap_model(parts.model, accelerator)
    local_state = {
        **state_dicts_of(parts.local),
        "gradients": _pending_gradients(parts, model, accelerator),
        "buffers": local_buffers_of(parts.model, int(accelerator.process_index)),
        "rng": get_rng_state(),
        "stream": stream,
        "order": _order_state(parts.order, position),
        "companions": parts.companions.local_state(),
    }
    shared_state = _shared_state(parts, position, stream, extras)
    return CollectedState(
        files={TRAINER_STATE: as_plain(shared_state), **_model_files(parts, model, accelerator)},
        local_files={process_file(accelerator.process_index): as_plain(local_state)},
        metadata={
            "num_processes": int(accelerator.num_processes),
            "position": asdict(position),
            "metrics": latest_metrics(parts.run_history),
            "settings": {**parts.settings, "seed": parts.run_seed},
        },
        save_shards=_shard_saver(parts, accelerator) if is_sharded(accelerator) else None,
    )


def _pending_gradients(parts: Parts, model: nn.Module, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Return the gradients of an open window; after an update, only those of parameters that no optimizer holds yet."""
    gradients = gradients_of(model)
    if parts.window.total:
        return gradients
    if parts.optimizer is None or is_sharded(accelerator):
        return {}
    held = {id(parameter) for group in parts.optimizer.param_groups for parameter in group["params"]}
    names = {name for name, parameter in portable_parameters(model).items() if id(parameter) not in held}
    return {name: gradient for name, gradient in gradients.items() if name in names}


def _shared_state(
    parts: Parts, position: TrainingProgress, stream: StateMapping | None, extras: StateMapping | None
) -> StateDict:
    num_epochs_ahead = position.num_epochs_completed - parts.progress.num_epochs_completed
    return {
        **(extras or {}),
        "current_epoch": parts.run_history.current_epoch + num_epochs_ahead,
        "trainer": {
            **state_dicts_of({**parts.shared, "progress": position}),
            **({"scheduler": scheduler_state_of(parts.scheduler)} if hasattr(parts.scheduler, "state_dict") else {}),
            "run_seed": parts.run_seed,
            "seed": parts.seed,
            "run_number": parts.run_number,
            "stopped": parts.stop_reason,
            "num_metric_values_seen": parts.num_metric_values_seen,
            "is_optimizer_training": parts.is_optimizer_training,
            "is_epoch_cut_short": parts.is_epoch_cut_short,
            "knows_stream": stream is not None and stream["state"] is not None,
            "companions": parts.companions.shared_state(),
        },
    }


def _model_files(parts: Parts, model: nn.Module, accelerator: Accelerator) -> dict[str, StateDict]:
    if is_sharded(accelerator):
        return {}
    files = {WEIGHTS: as_plain(portable_state_dict(model))}
    if parts.optimizer is not None:
        modules = {"": model, **parts.companions.modules}
        files[OPTIMIZER] = as_plain(optimizer_state_of(parts.optimizer, modules), "optimizer state")
    if accelerator.scaler is not None:
        files[SCALER] = as_plain(accelerator.scaler.state_dict())
    return files


def _shard_saver(parts: Parts, accelerator: Accelerator) -> Callable[[Path], None]:
    if parts.window.num_samples > 0:
        raise CheckpointError(
            f"The training state of a sharded model cannot be saved now: {parts.window.num_samples} samples wait for "
            "an update, and a sharded model does not expose its accumulated gradients. Save it after an update, when "
            "`trainer.is_between_updates` is true, as `SaveTrainingStateCallback` does."
        )

    def save(directory: Path) -> None:
        with sharded_objects(accelerator, parts):
            accelerator.save_state(str(directory))

    return save


def _order_state(order: OrderState | None, position: TrainingProgress) -> StateDict:
    if order is None:
        return {}
    return order.at_start() if _num_batches_read(position) else order.now()


def _num_batches_read(position: TrainingProgress) -> int:
    """Return how many batches of an epoch have been read when a run resumes; 0 if the next epoch starts."""
    return position.num_batches_in_epoch if position.phase == "training" else 0


def latest_metrics(history: RunHistory) -> dict[str, float | str]:
    """Return the latest value of each metric in a form that JSON can store."""
    return {name: as_json_scalar(latest_value(history, name)) for name in sorted(history.get_metric_names())}
