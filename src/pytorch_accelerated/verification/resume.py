"""`verify_resume` checks that an interrupted and resumed run ends like an uninterrupted one, bit by bit."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.optim import Optimizer

from pytorch_accelerated._arguments.numbers import check_positive_integer
from pytorch_accelerated._checkpoint.optimizer_state import members_of
from pytorch_accelerated._data.loaders import num_batches_of
from pytorch_accelerated._data.rng import get_rng_state, preserve_rng_state
from pytorch_accelerated._distributed.collectives import all_gather_objects, broadcast_from_main
from pytorch_accelerated._types import Batch, BatchOutput, Data, MaybeNone
from pytorch_accelerated._views import run_of
from pytorch_accelerated.callbacks import (
    LogMetricsCallback,
    PrintProgressCallback,
    ProgressBarCallback,
    SaveTrainingStateCallback,
    TrainerCallback,
)
from pytorch_accelerated.trainer import Trainer
from pytorch_accelerated.verification._trainers import check_make_trainer, create_trainer

Kind = Literal["batch", "random state", "loss", "model", "optimizer", "scheduler", "history", "callback"]

_REMOVED_CALLBACKS = (LogMetricsCallback, PrintProgressCallback, ProgressBarCallback, SaveTrainingStateCallback)
_CAUSES: dict[Kind, str] = {
    "batch": (
        "the dataset or its loader yields different data at this position. The global generators of torch, NumPy and "
        "`random` are restored, but a generator that the dataset creates for itself is not. Draw from the global "
        "generators, or derive the numbers from the index. An iterable dataset must yield the same samples each time, "
        "or define `state_dict` and `load_state_dict`."
    ),
    "random state": (
        "something draws random numbers outside of the steps, such as a callback, a hook or a thread. Let it use its "
        "own generator."
    ),
    "loss": (
        "batch, weights and RNG state are the same, so the step depends on something that is not in the training "
        "state. It may be a tensor of the model that is not a buffer (use `register_buffer`), or something that the "
        "loss function, the trainer or a callback keeps (define `state_dict` and `load_state_dict` in the callback). "
        "Nondeterministic operations, as on GPUs, have the same effect; `torch.use_deterministic_algorithms(True)` "
        "finds them."
    ),
    "model": "the model's `load_state_dict` does not restore what its `state_dict` returned.",
    "optimizer": "the optimizer's `state_dict` is incomplete, or its `load_state_dict` changes what it loads.",
    "scheduler": "the scheduler's `state_dict` is incomplete, or the scheduler was created with other settings.",
    "history": "a callback, or a metric that depends on earlier batches, records other values than before.",
    "callback": "the callback's `load_state_dict` does not restore what its `state_dict` returned.",
}


@dataclass(frozen=True)
class ResumeDifference:
    """The first difference between a resumed run and the uninterrupted one.

    Args:
        stop: The step after which the run was interrupted, counted from 1 over all epochs.
        place: Where the difference was found: right after the resume, in a step, or at the end.
        kind: The kind of thing that differs, such as ``"batch"`` or ``"optimizer"``.
        name: What differs, in words.
        process_index: The rank on which it differs.
    """

    stop: int
    place: str
    kind: Kind
    name: str
    process_index: int


@dataclass(frozen=True)
class ResumeReport:
    """What `verify_resume` found; print it to read it.

    Args:
        num_steps: Steps in the uninterrupted run.
        stops: The steps after which the run was interrupted and resumed.
        difference: The first difference; ``None`` if the runs are the same, bit by bit.
        likely_cause: What to change; empty if nothing differs.
    """

    num_steps: int
    stops: tuple[int, ...]
    difference: ResumeDifference | None
    likely_cause: str

    @property
    def is_exact(self) -> bool:
        """Whether every resumed run was the same as the uninterrupted one, bit by bit."""
        return self.difference is None

    def raise_if_different(self) -> None:
        """Raise an `AssertionError` with the report as its message, unless the runs are the same."""
        if not self.is_exact:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        stops = f"step{'' if len(self.stops) == 1 else 's'} {', '.join(map(str, self.stops))}"
        runs = f"{self.num_steps} steps, interrupted and resumed after {stops}."
        difference = self.difference
        if difference is None:
            return f"Resumed runs end like the uninterrupted one, bit by bit.\n{runs}"
        place = f"resumed after step {difference.stop}, {difference.place}, rank {difference.process_index}"
        lines = [
            "A resumed run differs from the uninterrupted one.",
            runs,
            f"First difference, {place}: {difference.name}.",
            "",
            *textwrap.wrap(f"Likely cause: {self.likely_cause}", width=100),
        ]
        return "\n".join(lines)


def verify_resume(
    make_trainer: Callable[[], Trainer],
    train_dataset: Data,
    *,
    stops: Sequence[int] | None = None,
    num_epochs: int = 2,
    seed: int = 0,
    **train_arguments: Any,
) -> ResumeReport:
    """Check that your run, interrupted and resumed from a training state, ends with the same bits.

    One trainer makes the uninterrupted run, and saves a state at each stop. For each stop, a new trainer, with
    different initial weights and a different RNG state, resumes from that state. Model, optimizer, scheduler, history,
    callbacks and RNG state are compared right after the resume and at the end; batch, RNG state and loss are compared
    in each step in between. Must be called on every process; all processes get the same report.

    The trainers' callbacks are called, except `SaveTrainingStateCallback` and those that report progress. The global
    RNG state is restored at the end.

    Args:
        make_trainer: Creates a trainer, with its own model and optimizer, on each call, as your script does.
        train_dataset: The training dataset. A few batches are enough: pass a `torch.utils.data.Subset`.
        stops: The steps after which the run is interrupted, counted from 1 over all epochs. By default in the middle
            of the first epoch, at its end, and within the second epoch.
        num_epochs: Passes over the data; at least 1.
        seed: Seeds the random number generators before the uninterrupted run.
        **train_arguments: All other arguments of `Trainer.train`, such as ``eval_dataset``.

    Raises:
        ValueError: A stop is not a step of the run, or the training data has no length and there are no ``stops``.
        TypeError: ``make_trainer`` does not return a trainer.

    Example:
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> def make_trainer():
        ...     model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.1), nn.Linear(8, 1))
        ...     return Trainer(model, nn.MSELoss(), torch.optim.AdamW(model.parameters()))
        >>> dataset = TensorDataset(torch.randn(48, 3), torch.randn(48, 1))
        >>> print(verify_resume(make_trainer, dataset))
        Resuming from '...step_3' in epoch 1.
        Resuming epoch 1 after batch 3. The data continue exactly where they stopped.
        Resuming from '...step_6' in epoch 1.
        Resuming epoch 1 after batch 6. The data continue exactly where they stopped.
        Resuming from '...step_8' in epoch 2.
        Resuming epoch 2 after batch 2. The data continue exactly where they stopped.
        Resumed runs end like the uninterrupted one, bit by bit.
        12 steps, interrupted and resumed after steps 3, 6, 8.
    """
    check_make_trainer(make_trainer)
    for stop in stops or ():
        check_positive_integer("stops", stop, "steps")
    experiment = _Experiment(make_trainer, train_dataset, {"num_epochs": num_epochs, **train_arguments})
    with preserve_rng_state(), _SavingRecorder(stops) as uninterrupted:
        experiment.run(seed, uninterrupted)
        uninterrupted.check_stops()
        differences = (experiment.compare(uninterrupted, stop, seed) for stop in uninterrupted.stops)
        difference = next((found for found in differences if found is not None), None)
        is_reproducible = difference is None or experiment.is_reproducible(uninterrupted, seed)
    return ResumeReport(
        num_steps=uninterrupted.num_steps,
        stops=uninterrupted.stops,
        difference=difference,
        likely_cause="" if difference is None else _describe_cause(difference, is_reproducible),
    )


def _describe_cause(difference: ResumeDifference, is_reproducible: bool) -> str:
    cause = _CAUSES[difference.kind]
    return cause if is_reproducible else f"the run is not reproducible even without an interruption: {cause}"


# --- the runs ----------------------------------------------------------------------------------------------------


class _Digest(NamedTuple):
    """The digest of one thing that is compared."""

    kind: Kind
    name: str
    value: str


_AT_START, _AT_END = "right after the resume", "at the end"


@dataclass(frozen=True)
class _Experiment:
    """What all runs have in common. Its methods must be called on every process."""

    make_trainer: Callable[[], Trainer]
    train_dataset: Data
    train_arguments: Mapping[str, Any]

    def run(self, seed: int, recorder: _Recorder, resume_from: Path | None = None) -> None:
        """Train a new trainer."""
        trainer = create_trainer(self.make_trainer, seed)
        callbacks = trainer.callback_handler.callbacks
        kept = [callback for callback in callbacks if type(callback) not in _REMOVED_CALLBACKS]
        trainer.callback_handler.clear_callbacks()
        trainer.callback_handler.add_callbacks([*kept, recorder])
        trainer.train(self.train_dataset, resume_from=resume_from, **self.train_arguments)

    def compare(self, uninterrupted: _SavingRecorder, stop: int, seed: int) -> ResumeDifference | None:
        """Resume after a stop, and return the first difference over all processes."""
        resumed = _Recorder(first_step=stop)
        self.run(seed + 1, resumed, uninterrupted.state_at(stop))
        expected = {**uninterrupted.digests, _AT_START: uninterrupted.digests_at_stops[stop]}
        difference = None
        if found := _first_difference(expected, resumed.digests):
            place, digest = found
            difference = ResumeDifference(stop, place, digest.kind, digest.name, resumed.process_index)
        differences = filter(None, all_gather_objects(difference, resumed.num_processes))
        places = [*resumed.digests]
        return min(differences, key=lambda each: places.index(each.place), default=None)

    def is_reproducible(self, uninterrupted: _SavingRecorder, seed: int) -> bool:
        """Tell whether the uninterrupted run is the same if it is repeated."""
        repeated = _Recorder()
        self.run(seed, repeated)
        difference = _first_difference(uninterrupted.digests, repeated.digests)
        return not any(all_gather_objects(difference, repeated.num_processes))


def _first_difference(
    expected: Mapping[str, Sequence[_Digest]], found: Mapping[str, Sequence[_Digest]]
) -> tuple[str, _Digest] | None:
    """Return the first place of ``found`` where a digest differs, is new or is missing, and the digest."""
    for place, digests in found.items():
        missing = {digest[:2]: digest for digest in expected.get(place, ())}
        for digest in digests:
            if missing.pop(digest[:2], None) != digest:
                return place, digest
        for digest in missing.values():
            return place, digest
    return None


class _Recorder(TrainerCallback):
    """Records digests of what happens in a run, by place."""

    is_called_last = True

    def __init__(self, first_step: int = 0) -> None:
        self.num_steps = first_step
        self.digests: dict[str, list[_Digest]] = {}
        self.process_index = 0
        self.num_processes = 1
        self._digests_at_step_start: list[_Digest] = []

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        self.process_index = run_of(trainer).process_index
        self.num_processes = trainer.run_config.num_processes
        self.digests[_AT_START] = _digests_of(trainer)

    def on_train_step_start(self, trainer: Trainer, *, batch: Batch = None, step: int = 0, **kwargs: Any) -> None:
        self._digests_at_step_start = [_Digest("batch", "the batch", _digest(batch)), *_rng_digests()]

    def on_train_step_end(
        self,
        trainer: Trainer,
        batch: Batch = None,
        batch_output: BatchOutput | MaybeNone = None,
        *,
        step: int = 0,
        **kwargs: Any,
    ) -> None:
        self.num_steps += 1
        loss = _Digest("loss", "the loss", _digest(batch_output["loss"]))
        self.digests[f"in step {self.num_steps}"] = [*self._digests_at_step_start, loss]

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.digests[_AT_END] = _digests_of(trainer)


class _SavingRecorder(_Recorder):
    """Also saves states at some steps, in a folder that exists until the end of the ``with`` block."""

    def __init__(self, stops: Sequence[int] | None) -> None:
        super().__init__()
        self.digests_at_stops: dict[int, list[_Digest]] = {}
        self._requested_stops = stops
        self._folder = ""

    def __enter__(self) -> _SavingRecorder:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._folder and self.process_index == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def stops(self) -> tuple[int, ...]:
        """The steps at which states were saved."""
        return tuple(self.digests_at_stops)

    def state_at(self, stop: int) -> Path:
        """Return the folder of a state."""
        return Path(self._folder, f"step_{stop}")

    def check_stops(self) -> None:
        """Raise unless the run reached all stops."""
        missing = [stop for stop in self._requested_stops or () if stop not in self.digests_at_stops]
        if missing:
            raise ValueError(
                f"`stops` has {missing}, but the run has {self.num_steps} steps. Expected steps of the run, because it "
                "is interrupted after them. Pass smaller `stops`, or train for longer."
            )

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        super().on_training_run_start(trainer)
        folder = tempfile.mkdtemp(prefix="verify_resume_") if self.process_index == 0 else ""
        self._folder = broadcast_from_main(folder, self.num_processes)
        if self._requested_stops is None:
            self._requested_stops = _default_stops(run_of(trainer).train_dataloader, trainer.run_config.num_epochs)

    def on_train_step_end(
        self,
        trainer: Trainer,
        batch: Batch = None,
        batch_output: BatchOutput | MaybeNone = None,
        *,
        step: int = 0,
        **kwargs: Any,
    ) -> None:
        super().on_train_step_end(trainer, batch, batch_output)
        if self.num_steps in (self._requested_stops or ()):
            trainer.save_training_state(self.state_at(self.num_steps))
            self.digests_at_stops[self.num_steps] = _digests_of(trainer)


def _default_stops(loader: object, num_epochs: int) -> list[int]:
    num_batches = num_batches_of(loader)
    if num_batches is None:
        raise ValueError(
            "The training data has no length. Expected `stops`, because their default depends on the length. Pass the "
            "steps after which the run is interrupted."
        )
    in_second_epoch = [num_batches + max(1, num_batches // 3)] if num_epochs > 1 else []
    return sorted({max(1, num_batches // 2), num_batches, *in_second_epoch})


# --- digests -----------------------------------------------------------------------------------------------------


def _digests_of(trainer: Trainer) -> list[_Digest]:
    model = trainer.get_model(keep_torch_compile=False)
    history = trainer.run_history
    names = [name for name, _ in model.named_parameters()]
    # A state holds the buffers of rank 0 only.
    tensors = model.state_dict() if run_of(trainer).process_index == 0 else dict(model.named_parameters())
    digests = [_Digest("model", f"`{name}` of the model", _digest(value)) for name, value in tensors.items()]
    members = members_of(trainer.optimizer)
    if members is None:
        digests += _digests_of_optimizer("the optimizer", trainer.optimizer, names)
    for name, optimizer in (members or {}).items():
        digests += _digests_of_optimizer(f"the optimizer {name!r}", optimizer, [])
    if trainer.scheduler is not None:
        digests.append(_Digest("scheduler", "the scheduler", _digest(trainer.scheduler.state_dict())))
    digests += [
        _Digest("history", f"the metric {name!r}", _digest(list(history.get_metric_values(name))))
        for name in sorted(history.get_metric_names())
    ]
    digests += [
        _Digest("callback", f"the state of the callback {name}", _digest(state))
        for name, state in trainer.callback_handler.state_dict().items()
    ]
    return [*digests, *_rng_digests()]


def _digests_of_optimizer(described: str, optimizer: Optimizer, names: Sequence[str]) -> list[_Digest]:
    """Return the digests of an optimizer.

    Args:
        described: What messages call it.
        optimizer: The optimizer.
        names: The names of its parameters, as far as they are known.
    """
    states = optimizer.state_dict()
    known = dict(enumerate(names))
    named = {known.get(index, index): index for index in states["state"]}
    return [
        *(
            _Digest("optimizer", f"`{field}` of {described} for `{parameter}`", _digest(value))
            for parameter, index in named.items()
            for field, value in states["state"][index].items()
        ),
        _Digest("optimizer", f"the settings of {described}", _digest(states["param_groups"])),
    ]


def _rng_digests() -> list[_Digest]:
    return [
        _Digest("random state", f"the RNG state of {name}", _digest(state)) for name, state in get_rng_state().items()
    ]


def _digest(value: object) -> str:
    """Return a digest of nested values; tensors enter with their dtype, shape and bits."""
    digest = hashlib.blake2b(digest_size=16)
    _update(digest, value)
    return digest.hexdigest()


def _update(digest: hashlib.blake2b, value: object) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().to_dense().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(repr(key).encode())
            _update(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.update(str(len(value)).encode())
        for item in value:
            _update(digest, item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            _update(digest, getattr(value, field.name))
    else:
        digest.update(repr(value).encode())
