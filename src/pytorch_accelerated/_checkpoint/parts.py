"""What a training state consists of: the parts of a trainer, and the contents of a state that was read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pytorch_accelerated._accumulation import AccumulationWindow
from pytorch_accelerated._checkpoint.companions import Companions
from pytorch_accelerated._checkpoint.manifest import SavedState
from pytorch_accelerated._data.samplers import OrderState
from pytorch_accelerated._data.streams import TrackedStream
from pytorch_accelerated._distributed.registry import AcceleratorRegistry
from pytorch_accelerated._means import EpochMeans
from pytorch_accelerated._measuring.metric_set import PassMetrics
from pytorch_accelerated.progress import TrainingProgress
from pytorch_accelerated.tracking import RunHistory

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from torch.optim import Optimizer

    from pytorch_accelerated._types import RunSettings, StateDict, Stateful, StateMapping


WEIGHTS, OPTIMIZER, SCALER = "model.pt", "optimizer.pt", "scaler.pt"


@dataclass(frozen=True)
class Parts:
    """The parts of a trainer that a training state consists of.

    Args:
        model: The model, prepared or not.
        optimizer: The optimizer or ``None``.
        scheduler: The scheduler or ``None``.
        progress: The position of the run.
        run_history: The recorded metrics.
        callbacks: The callback handler, which has the states of the callbacks.
        means: The running means of the epoch on this process.
        window: The accumulation window on this process.
        stream: The source of the training data, if it can report its position.
        order: What the samplers of the training data keep; ``None`` if there is no training data.
        run_seed: The seed of the run, from which all others derive.
        seed: The seed of the data order.
        run_number: Counts the training runs of the trainer from 0.
        stop_reason: Why the run was stopped for good; ``None`` if it was not.
        settings: The settings of the run; see `run_settings`.
        companions: What else has a state.
        recorder: What the run has recorded of steps last.
        metrics: What the metrics of the trainer have gathered in the epoch on this process; ``None`` if there are none.
        metric_set: What they remember of earlier evaluations.
        num_metric_values_seen: How many values of its metric the scheduler has been stepped with.
        is_optimizer_training: Whether an optimizer that has modes is in training mode; ``None`` if there is none.
        is_epoch_cut_short: Whether the limit of updates ended the last epoch before its last batch.
    """

    model: nn.Module
    optimizer: Optimizer | None
    scheduler: Stateful | None
    progress: TrainingProgress
    run_history: RunHistory
    callbacks: Stateful
    means: EpochMeans
    window: AccumulationWindow
    stream: TrackedStream | None
    order: OrderState | None
    run_seed: int
    seed: int
    run_number: int
    stop_reason: str | None
    settings: RunSettings
    companions: Companions = field(default_factory=Companions)
    recorder: Stateful | None = None
    metrics: PassMetrics | None = None
    metric_set: Stateful | None = None
    num_metric_values_seen: int = 0
    is_optimizer_training: bool | None = None
    is_epoch_cut_short: bool = False

    @property
    def shared(self) -> dict[str, object]:
        """The parts with a ``state_dict`` that is identical on every process."""
        shared = {"progress": self.progress, "run_history": self.run_history, "callbacks": self.callbacks}
        optional = {"recorder": self.recorder, "metric_set": self.metric_set}
        return {**shared, **{name: part for name, part in optional.items() if part is not None}}

    @property
    def local(self) -> dict[str, object]:
        """The parts with a ``state_dict`` that differs between processes."""
        return {"means": self.means, "window": self.window, "metrics": self.metrics}


@dataclass(frozen=True)
class StateContents:
    """The contents of a training state, before anything is restored from it.

    Args:
        saved: The state on disk.
        trainer_state: The part that is identical on every process: the user's entries, the epoch, and the library's own
            entries under ``trainer``.
        process_state: The local part of this process.
        weights: The model's; ``None`` if Accelerate reads them.
        optimizer: The optimizer's state; ``None`` if there is none, or if Accelerate reads it.
        scaler: The gradient scaler's state; ``None`` in the same cases.
    """

    saved: SavedState
    trainer_state: StateDict
    process_state: StateDict
    weights: StateDict | None
    optimizer: StateDict | None
    scaler: StateDict | None

    @property
    def seed(self) -> int:
        """The seed of the data order."""
        return int(self.trainer_state["trainer"]["seed"])

    @property
    def run_seed(self) -> int:
        """The seed of the run; before there was one of its own for each run, that of the data order."""
        return int(self.trainer_state["trainer"].get("run_seed", self.seed))

    @property
    def has_former_draws(self) -> bool:
        """Whether the run that saved the state seeded batches by their first index, as earlier versions did."""
        return "run_number" not in self.trainer_state["trainer"]

    @property
    def run_number(self) -> int:
        """Which training run of its trainer saved the state, from 0."""
        return int(self.trainer_state["trainer"].get("run_number", 0))

    @property
    def num_metric_values_seen(self) -> int:
        """How many values of its metric the scheduler has been stepped with; earlier versions had none."""
        return int(self.trainer_state["trainer"].get("num_metric_values_seen", 0))

    @property
    def is_optimizer_training(self) -> bool | None:
        """Whether an optimizer that has modes was in training mode; ``None`` if there was none, or it is not known."""
        is_training: bool | None = self.trainer_state["trainer"].get("is_optimizer_training")
        return is_training

    @property
    def stop_reason(self) -> str | None:
        """Why the run was stopped for good; ``None`` if it was not."""
        reason: str | None = self.trainer_state["trainer"]["stopped"]
        return reason

    @property
    def is_epoch_cut_short(self) -> bool:
        """Whether the limit of updates had ended the last epoch; earlier versions did not save it."""
        return bool(self.trainer_state["trainer"].get("is_epoch_cut_short", False))

    @property
    def user_entries(self) -> StateDict:
        """What `Trainer.load_training_state` returns: ``current_epoch`` and the user's entries."""
        return {name: value for name, value in self.trainer_state.items() if name != "trainer"}

    @property
    def companions(self) -> tuple[StateMapping, StateMapping]:
        """The states of the companions: what is shared between the ranks, and what is not."""
        shared = self.trainer_state["trainer"].get("companions") or Companions().shared_state()
        return shared, self.process_state.get("companions") or Companions().local_state()

    @property
    def stream_position(self) -> StateMapping | None:
        """Where the stream of training data resumes; ``None`` if batches have to be skipped instead."""
        position: StateMapping | None = self.process_state["stream"]
        return position


def state_dicts_of(parts: Mapping[str, object]) -> StateDict:
    """Return the ``state_dict`` of each part that has one."""
    return {name: part.state_dict() for name, part in parts.items() if hasattr(part, "state_dict")}


def load_state_dicts(parts: Mapping[str, object], states: StateMapping) -> None:
    """Restore what `state_dicts_of` returned, where a part has ``load_state_dict``."""
    for name, part in parts.items():
        if name in states and hasattr(part, "load_state_dict"):
            part.load_state_dict(states[name])


@contextmanager
def sharded_objects(accelerator: Accelerator, parts: Parts) -> Iterator[None]:
    """Let Accelerate save or load only this model and optimizer, in exactly the directory that it is given."""
    configuration = accelerator.project_configuration
    is_automatic, configuration.automatic_checkpoint_naming = configuration.automatic_checkpoint_naming, False
    try:
        with AcceleratorRegistry(accelerator).restricted_to(parts.model, parts.optimizer):
            yield
    finally:
        configuration.automatic_checkpoint_naming = is_automatic
