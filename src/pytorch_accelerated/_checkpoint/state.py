"""Training states: what they contain, and how they are collected, read and restored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pytorch_accelerated._accumulation import AccumulationWindow
from pytorch_accelerated._checkpoint.buffers import load_local_buffers, local_buffers_of
from pytorch_accelerated._checkpoint.companions import Companions, gradients_of, load_gradients
from pytorch_accelerated._checkpoint.files import as_plain, load_file
from pytorch_accelerated._checkpoint.host_memory import HostMemory
from pytorch_accelerated._checkpoint.layout import BatchLayout, sum_epoch_means, translate_position
from pytorch_accelerated._checkpoint.manifest import (
    TRAINER_STATE,
    SavedState,
    as_json_scalar,
    name_state,
    process_file,
)
from pytorch_accelerated._checkpoint.model_state import (
    check_model_state,
    load_checked_model_state,
)
from pytorch_accelerated._checkpoint.names import match_names, portable_parameters, portable_state_dict
from pytorch_accelerated._checkpoint.optimizer_state import (
    Named,
    entries_of,
    fit_optimizer_state,
    optimizer_state_of,
    parameters_of,
)
from pytorch_accelerated._checkpoint.portable import unwrap_model
from pytorch_accelerated._checkpoint.scheduler_state import (
    check_scheduler_state,
    describe_new_length,
    load_scheduler_state,
    replay,
    return_to_initial_rates,
    scheduler_state_of,
)
from pytorch_accelerated._checkpoint.schema import check_process_state, check_trainer_state
from pytorch_accelerated._checkpoint.undo import attributes_kept_on_error, undone_on_error
from pytorch_accelerated._checkpoint.writer import CollectedState
from pytorch_accelerated._data.rng import derive_seed, get_rng_state, seed_generators, set_rng_state
from pytorch_accelerated._data.samplers import OrderState
from pytorch_accelerated._data.streams import TrackedStream
from pytorch_accelerated._distributed.accelerator import is_sharded
from pytorch_accelerated._distributed.collectives import run_on_all
from pytorch_accelerated._distributed.registry import AcceleratorRegistry
from pytorch_accelerated._means import EpochMeans
from pytorch_accelerated._measuring.metric_set import PassMetrics, joined_states
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.progress import TrainingProgress
from pytorch_accelerated.tracking import RunHistory, latest_value

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from torch.optim import Optimizer

    from pytorch_accelerated._types import RunSettings, StateDict, Stateful, StateMapping

WEIGHTS, OPTIMIZER, SCALER = "model.pt", "optimizer.pt", "scaler.pt"

_NAMES_IN_FORMAT_1 = {WEIGHTS: "model.safetensors", OPTIMIZER: "optimizer.bin"}  # Accelerate wrote them


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
    num_metric_values_seen: int = 0
    is_optimizer_training: bool | None = None
    is_epoch_cut_short: bool = False

    @property
    def shared(self) -> dict[str, object]:
        """The parts with a ``state_dict`` that is identical on every process."""
        shared = {"progress": self.progress, "run_history": self.run_history, "callbacks": self.callbacks}
        return shared if self.recorder is None else {**shared, "recorder": self.recorder}

    @property
    def local(self) -> dict[str, object]:
        """The parts with a ``state_dict`` that differs between processes."""
        return {"means": self.means, "window": self.window, "metrics": self.metrics}


# --- collecting --------------------------------------------------------------------------------------------------


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
        with _sharded_objects(accelerator, parts):
            accelerator.save_state(str(directory))

    return save


@contextmanager
def _sharded_objects(accelerator: Accelerator, parts: Parts) -> Iterator[None]:
    """Let Accelerate save or load only this model and optimizer, in exactly the directory that it is given."""
    configuration = accelerator.project_configuration
    is_automatic, configuration.automatic_checkpoint_naming = configuration.automatic_checkpoint_naming, False
    try:
        with AcceleratorRegistry(accelerator).restricted_to(parts.model, parts.optimizer):
            yield
    finally:
        configuration.automatic_checkpoint_naming = is_automatic


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


def state_dicts_of(parts: Mapping[str, object]) -> StateDict:
    """Return the ``state_dict`` of each part that has one."""
    return {name: part.state_dict() for name, part in parts.items() if hasattr(part, "state_dict")}


def load_state_dicts(parts: Mapping[str, object], states: StateMapping) -> None:
    """Restore what `state_dicts_of` returned, where a part has ``load_state_dict``."""
    for name, part in parts.items():
        if name in states and hasattr(part, "load_state_dict"):
            part.load_state_dict(states[name])


# --- reading -----------------------------------------------------------------------------------------------------


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


# --- restoring ---------------------------------------------------------------------------------------------------


def restore_state(
    contents: StateContents,
    accelerator: Accelerator,
    parts: Parts,
    load_scheduler: Callable[[StateDict], None],
    print_fn: Callable[[str], None],
) -> None:
    """Restore what was read. Must be called on every process.

    Args:
        contents: What `read_state` returned.
        accelerator: Unwraps the model, and loads it if it is sharded.
        parts: The parts of the trainer.
        load_scheduler: Restores the scheduler, or keeps its state until there is one.
        print_fn: Prints what is not exact if a different number of processes saved the state.

    Raises:
        CheckpointError: On any process, a part does not accept its state; nothing has been changed.
    """
    source = name_state(contents.saved.path)
    scheduler_state = contents.trainer_state["trainer"].get("scheduler")
    if parts.scheduler is not None and scheduler_state is not None:
        check_scheduler_state(parts.scheduler, scheduler_state, source, contents.saved.settings.get("scheduler"))
    with undone_if_refused(parts, accelerator):
        if contents.weights is None:
            with _sharded_objects(accelerator, parts):
                accelerator.load_state(str(contents.saved.path))
        run_on_all(
            lambda: _restore_parts(contents, accelerator, parts, load_scheduler, print_fn),
            int(accelerator.num_processes),
        )
        model = unwrap_model(parts.model, accelerator)
        if contents.weights is not None:  # which have been checked, and now nothing else can fail on any process
            load_checked_model_state(model, contents.weights, parts.optimizer)
        load_gradients(model, contents.process_state["gradients"])
        load_local_buffers(parts.model, contents.process_state.get("buffers"))  # not in states of earlier versions
    restore_rng(contents, int(accelerator.process_index))
    if contents.saved.num_processes != accelerator.num_processes:
        print_fn(
            f"{str(contents.saved.path)!r} was saved by {contents.saved.num_processes} processes and is resumed by "
            f"{accelerator.num_processes}: random numbers and the last bits differ from here on, and samples of up to "
            "one update of this epoch are repeated."
        )


def prepare_new_schedule(contents: StateContents, parts: Parts) -> None:
    """Prepare the optimizer for the scheduler of a resumed run, if that is made for another length of the run.

    Args:
        contents: What the run resumes from.
        parts: The parts of the trainer, before it has its new scheduler.
    """
    new_length = describe_new_length(contents.saved.settings, parts.settings)
    if new_length is not None and contents.optimizer is not None and parts.optimizer is not None:
        return_to_initial_rates(parts.optimizer, contents.optimizer)


@contextmanager
def undone_if_refused(
    parts: Parts, accelerator: Accelerator, attributes: Iterable[tuple[object, str]] = ()
) -> Iterator[None]:
    """Put the parts of a trainer back if the body raises, except the state of the model.

    Args:
        parts: The parts, as they are before the body.
        accelerator: Unwraps the model, and has the gradient scaler.
        attributes: What is also set back: objects, each with the name of an attribute.
    """
    companions = parts.companions
    owned = (companions.modules, companions.parameters, companions.others)
    changed = (*parts.shared.values(), *parts.local.values(), parts.scheduler, accelerator.scaler)
    optimizers = (parts.optimizer, *companions.optimizers.values())
    others = [*companions.others.values(), *([] if parts.order is None else [_SavedOrder(parts.order)])]
    model = unwrap_model(parts.model, accelerator)
    with attributes_kept_on_error(attributes), undone_on_error(model, optimizers, (*changed, *owned), others):
        yield


@dataclass(frozen=True)
class _SavedOrder:
    """The samplers of a run, as one object with a state."""

    order: OrderState

    def state_dict(self) -> StateDict:
        return self.order.now()

    def load_state_dict(self, state_dict: StateMapping) -> None:
        self.order.restore(state_dict)


def _restore_parts(
    contents: StateContents,
    accelerator: Accelerator,
    parts: Parts,
    load_scheduler: Callable[[StateDict], None],
    print_fn: Callable[[str], None],
) -> None:
    """Restore all parts that may refuse their state."""
    entries, source = contents.trainer_state["trainer"], name_state(contents.saved.path)
    for name, part, state in (
        *((name, part, entries) for name, part in parts.shared.items()),
        *((name, part, contents.process_state) for name, part in parts.local.items()),
    ):
        _load_part(name, part, state, source)
    if parts.order is not None:
        _load_part("order", _SavedOrder(parts.order), {"order": {}, **contents.process_state}, source)
    _load_companions(contents, parts, source)
    if contents.scaler is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(contents.scaler)
    _restore_optimizer_and_scheduler(contents, parts, load_scheduler, print_fn)


def _restore_optimizer_and_scheduler(
    contents: StateContents,
    parts: Parts,
    load_scheduler: Callable[[StateDict], None],
    print_fn: Callable[[str], None],
) -> None:
    state = contents.trainer_state["trainer"].get("scheduler")
    new_length = describe_new_length(contents.saved.settings, parts.settings)
    replayed = None
    if state is not None and new_length is not None:
        position = TrainingProgress(**contents.trainer_state["trainer"]["progress"])
        settings = contents.saved.settings, parts.settings
        replayed = replay(parts.scheduler, parts.optimizer, state, position, *settings)
    if contents.optimizer is not None and parts.optimizer is not None:
        parts.optimizer.load_state_dict(contents.optimizer)
    if replayed is not None and parts.optimizer is not None:
        replayed.apply(parts.optimizer)
        print_fn(f"The schedule follows the new length of the run: {new_length}.")
    elif state is not None:  # after the optimizer, whose state has the learning rates of the former schedule
        load_scheduler_state(state, load_scheduler, name_state(contents.saved.path))


def _load_part(name: str, part: object, states: StateMapping, source: str) -> None:
    try:
        load_state_dicts({name: part}, states)
    except CheckpointError as error:  # which says what to do
        raise CheckpointError(f"{source} does not fit this run. {error} Nothing was loaded.") from error
    except Exception as error:
        raise CheckpointError(
            f"{source} does not fit the {name.replace('_', ' ')} of this run: {type(error).__name__}: {error}. Nothing "
            "was loaded. Create everything as it was when the state was saved."
        ) from error


def _load_companions(contents: StateContents, parts: Parts, source: str) -> None:
    try:
        parts.companions.load(*contents.companions, source)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{source} does not fit what the trainer carries along: {type(error).__name__}: {error}. Nothing was "
            "loaded. Create everything as it was when the state was saved."
        ) from error


def restore_rng(contents: StateContents, process_index: int) -> None:
    """Restore the global generators, or seed them if the run that saved the state had no process of this rank."""
    rng = contents.process_state["rng"]
    if rng is not None:
        set_rng_state(rng)
        return
    update = contents.trainer_state["trainer"]["progress"]["num_updates"]
    seed_generators(derive_seed(contents.seed, "rank", process_index, "update", update))
