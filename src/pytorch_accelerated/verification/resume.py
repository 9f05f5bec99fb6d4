"""`verify_resume` shows that a run which was interrupted ends as if it had not been, bit by bit."""

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

from pytorch_accelerated import _validation
from pytorch_accelerated._data.loaders import num_batches_of
from pytorch_accelerated._data.rng import get_rng_state, preserve_rng_state, seed_generators
from pytorch_accelerated._distributed.collectives import all_gather_objects, broadcast_from_main
from pytorch_accelerated.callbacks import (
    LogMetricsCallback,
    PrintProgressCallback,
    ProgressBarCallback,
    SaveTrainingStateCallback,
    TrainerCallback,
)
from pytorch_accelerated.trainer import Trainer

Kind = Literal["batch", "random state", "loss", "model", "optimizer", "scheduler", "history", "callback"]

_LEFT_OUT = (LogMetricsCallback, PrintProgressCallback, ProgressBarCallback, SaveTrainingStateCallback)
_CAUSES: dict[Kind, str] = {
    "batch": (
        "the data is not the same again at this place. What loading draws from the global generators of torch, NumPy "
        "and `random` is restored; a generator of the dataset's own is not. Draw from the global ones, or derive the "
        "numbers from the index. An iterable dataset has to give the same samples each time, or to have `state_dict` "
        "and `load_state_dict`."
    ),
    "random state": (
        "something draws random numbers outside of the steps: a callback, a hook, or a thread. Let it draw from a "
        "generator of its own."
    ),
    "loss": (
        "batch, weights and random state are the same, so the step depends on something that is not in the state: a "
        "tensor of the model that is no buffer (`register_buffer`), or what the loss function, the trainer or a "
        "callback remember (give the callback `state_dict` and `load_state_dict`). Operations that are not "
        "deterministic, as some on GPUs, have the same effect: `torch.use_deterministic_algorithms(True)` finds them."
    ),
    "model": "the model's `state_dict` does not give back what its `load_state_dict` took.",
    "optimizer": "the optimizer keeps something that is not in its `state_dict`, or changes it when it is loaded.",
    "scheduler": "the scheduler keeps something that is not in its `state_dict`, or was made with other settings.",
    "history": "something records other values than before: a callback, or a metric that remembers earlier batches.",
    "callback": "the callback's `load_state_dict` does not restore what its `state_dict` returned.",
}


class _Fact(NamedTuple):
    kind: Kind
    name: str
    digest: str


@dataclass(frozen=True)
class ResumeDifference:
    """The first thing that was not the same after a resume.

    Args:
        stop: The step after which the run had been interrupted, counted from 1 over the whole run.
        place: Where it was found: right after the resume, in a step, or at the end.
        kind: What kind of thing it is.
        name: What it is.
        process_index: The rank of the process.
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
        num_steps: Steps of the whole run.
        stops: The steps after which it was interrupted and resumed.
        difference: The first thing that differed; ``None`` if all was the same, bit by bit.
        likely_cause: What to change; empty if nothing differed.
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
        """Raise an `AssertionError` with the report as its message, unless all was the same."""
        if not self.is_exact:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        stops = ", ".join(map(str, self.stops))
        lines = [f"{self.num_steps} steps, interrupted and resumed after step {stops}."]
        found = self.difference
        if found is None:
            return "\n".join(["Resumed runs end as the uninterrupted one, bit by bit.", *lines])
        place = f"resumed after step {found.stop}, {found.place}, rank {found.process_index}"
        what = f"First difference, {place}: {found.name}."
        cause = textwrap.wrap(f"Likely cause: {self.likely_cause}", width=100)
        return "\n".join(["A resumed run is not the same as the uninterrupted one.", *lines, what, "", *cause])


def verify_resume(
    make_trainer: Callable[[], Trainer],
    train_dataset: Any,
    *,
    stops: Sequence[int] | None = None,
    num_epochs: int = 2,
    seed: int = 0,
    **train_arguments: Any,
) -> ResumeReport:
    """Show that your run can be interrupted, and resumed from a training state, to the same bits.

    A trainer makes the whole run, and saves a state at each stop. For each stop a new trainer, with other weights and
    another random state at first, resumes from there. What is compared: model, optimizer, scheduler, history, callbacks
    and random state right after the resume and at the end; batch, random state and loss of each step between. Must be
    called on every process; all get the same report.

    The callbacks of the trainers take part, but for those that report progress, and `SaveTrainingStateCallback`. The
    global random state is left as it was.

    Args:
        make_trainer: Makes a trainer with a model and an optimizer of its own each time, as your script does it.
        train_dataset: The dataset. Some batches of it will do: pass a `torch.utils.data.Subset`.
        stops: The steps after which the run is interrupted, counted from 1 over the whole run. By default in the midst
            of the first epoch, at its end, and within the second.
        num_epochs: Passes over the data; at least 1.
        seed: Seeds the random number generators before the whole run.
        **train_arguments: All other arguments of `Trainer.train`, such as ``eval_dataset``.

    Raises:
        ValueError: A stop is not within the run, or the epoch has no length and there are no ``stops``.
        TypeError: ``make_trainer`` makes no trainer.

    Example:
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> def make_trainer():
        ...     model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.1), nn.Linear(8, 1))
        ...     return Trainer(model, nn.MSELoss(), torch.optim.AdamW(model.parameters()))
        >>> dataset = TensorDataset(torch.randn(48, 3), torch.randn(48, 1))
        >>> print(verify_resume(make_trainer, dataset))
        Going on after batch 3 of epoch 1. The data continue exactly where they stopped.
        Going on after batch 6 of epoch 1. The data continue exactly where they stopped.
        Going on after batch 2 of epoch 2. The data continue exactly where they stopped.
        Resumed runs end as the uninterrupted one, bit by bit.
        12 steps, interrupted and resumed after step 3, 6, 8.
    """
    if not callable(make_trainer):
        raise TypeError(
            f"`make_trainer` is a {type(make_trainer).__name__}. Expected a function that makes a new trainer, with a "
            "model and an optimizer of its own, each time it is called."
        )
    for stop in stops or ():
        _validation.check_positive_integer("stops", stop, "steps")
    experiment = _Experiment(make_trainer, train_dataset, {"num_epochs": num_epochs, **train_arguments})
    with preserve_rng_state(), _SavingRecorder(stops) as whole:
        experiment.run(seed, whole)
        whole.check()
        differences = (experiment.compare(whole, stop, seed) for stop in whole.stops)
        difference = next((found for found in differences if found is not None), None)
        repeats = difference is None or experiment.repeats(whole, seed)
    return ResumeReport(
        num_steps=whole.num_steps,
        stops=whole.stops,
        difference=difference,
        likely_cause="" if difference is None else _describe_cause(difference, repeats),
    )


def _describe_cause(difference: ResumeDifference, repeats: bool) -> str:
    cause = _CAUSES[difference.kind]
    return cause if repeats else f"even without an interruption the run is not the same twice: {cause}"


# --- the runs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Experiment:
    """What all runs have in common; its methods must be called on every process."""

    make_trainer: Callable[[], Trainer]
    train_dataset: Any
    train_arguments: Mapping[str, Any]

    def run(self, seed: int, recorder: _Recorder, resume_from: Path | None = None) -> None:
        """Train a new trainer."""
        seed_generators(seed)
        trainer = self.make_trainer()
        if not isinstance(trainer, Trainer):
            raise TypeError(f"`make_trainer` returned a {type(trainer).__name__}. Expected a new `Trainer` each time.")
        kept = [callback for callback in trainer.callback_handler.callbacks if type(callback) not in _LEFT_OUT]
        trainer.callback_handler.clear_callbacks()
        trainer.callback_handler.add_callbacks([*kept, recorder])
        trainer.train(self.train_dataset, resume_from=resume_from, **self.train_arguments)

    def compare(self, whole: _SavingRecorder, stop: int, seed: int) -> ResumeDifference | None:
        """Resume after a stop, and return the first difference of all processes."""
        resumed = _Recorder(first_step=stop)
        self.run(seed + 1, resumed, whole.state_at(stop))
        found = _first_difference({**whole.facts, _AT_START: whole.facts_at_stops[stop]}, resumed.facts)
        own = None if found is None else ResumeDifference(stop, found[0], *found[1][:2], resumed.process_index)
        differences = all_gather_objects(own, resumed.num_processes)
        places = [*resumed.facts]
        return min(filter(None, differences), key=lambda difference: places.index(difference.place), default=None)

    def repeats(self, whole: _SavingRecorder, seed: int) -> bool:
        """Tell whether the uninterrupted run is the same again."""
        again = _Recorder()
        self.run(seed, again)
        own = _first_difference(whole.facts, again.facts)
        return not any(all_gather_objects(own, again.num_processes))


_AT_START, _AT_END = "right after the resume", "at the end"


def _first_difference(
    expected: Mapping[str, Sequence[_Fact]], found: Mapping[str, Sequence[_Fact]]
) -> tuple[str, _Fact] | None:
    for place, facts in found.items():
        others = {fact[:2]: fact for fact in expected.get(place, ())}
        for fact in facts:
            if others.pop(fact[:2], None) != fact:
                return place, fact
        for fact in others.values():
            return place, fact
    return None


class _Recorder(TrainerCallback):
    """Keeps digests of what happens in a run, by place."""

    is_called_last = True

    def __init__(self, first_step: int = 0) -> None:
        self.num_steps = first_step
        self.facts: dict[str, list[_Fact]] = {}
        self.process_index = 0
        self.num_processes = 1
        self._facts_of_step: list[_Fact] = []

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        self.process_index = trainer.process_index
        self.num_processes = trainer.run_config.num_processes
        self.facts[_AT_START] = _facts_of(trainer)

    def on_train_step_start(self, trainer: Trainer, *, batch: Any = None, step: int = 0, **kwargs: Any) -> None:
        self._facts_of_step = [_Fact("batch", "the batch", _digest(batch)), *_random_facts()]

    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Mapping[str, Any], *, step: int = 0, **kwargs: Any
    ) -> None:
        self.num_steps += 1
        loss = _Fact("loss", "the loss", _digest(batch_output["loss"]))
        self.facts[f"in step {self.num_steps}"] = [*self._facts_of_step, loss]

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.facts[_AT_END] = _facts_of(trainer)


class _SavingRecorder(_Recorder):
    """Saves states at some steps, too, to a folder that is there within a ``with`` block."""

    def __init__(self, stops: Sequence[int] | None) -> None:
        super().__init__()
        self.facts_at_stops: dict[int, list[_Fact]] = {}
        self._wanted = stops
        self._folder = ""

    def __enter__(self) -> _SavingRecorder:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._folder and self.process_index == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def stops(self) -> tuple[int, ...]:
        """The steps at which states were saved."""
        return tuple(self.facts_at_stops)

    def state_at(self, stop: int) -> Path:
        """Return the folder of a state."""
        return Path(self._folder, f"step_{stop}")

    def check(self) -> None:
        """Raise unless all stops were reached."""
        missing = [stop for stop in self._wanted or () if stop not in self.facts_at_stops]
        if missing:
            raise ValueError(
                f"`stops` has {missing}, but the run has {self.num_steps} steps. Expected steps within it."
            )

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        super().on_training_run_start(trainer)
        own_folder = tempfile.mkdtemp(prefix="verify_resume_") if self.process_index == 0 else ""
        self._folder = broadcast_from_main(own_folder, self.num_processes)
        if self._wanted is None:
            self._wanted = _default_stops(trainer)

    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Mapping[str, Any], *, step: int = 0, **kwargs: Any
    ) -> None:
        super().on_train_step_end(trainer, batch, batch_output)
        if self.num_steps in (self._wanted or ()):
            trainer.save_training_state(self.state_at(self.num_steps))
            self.facts_at_stops[self.num_steps] = _facts_of(trainer)


def _default_stops(trainer: Trainer) -> list[int]:
    length = num_batches_of(trainer._train_dataloader)
    if length is None:
        raise ValueError("The data has no length. Give the `stops`, the steps after which the run is interrupted.")
    in_second_epoch = [length + max(1, length // 3)] if trainer.run_config.num_epochs > 1 else []
    return sorted({max(1, length // 2), length, *in_second_epoch})


# --- digests -----------------------------------------------------------------------------------------------------


def _facts_of(trainer: Trainer) -> list[_Fact]:
    model = trainer.get_model(keep_torch_compile=False)
    history = trainer.run_history
    names = [name for name, _ in model.named_parameters()]
    tensors = (
        model.state_dict() if trainer.process_index == 0 else dict(model.named_parameters())
    )  # buffers are rank 0's
    facts = [_Fact("model", f"`{name}` of the model", _digest(value)) for name, value in tensors.items()]
    optimizer = trainer.optimizer.state_dict()
    for index, state in optimizer["state"].items():
        owner = names[index] if isinstance(index, int) and index < len(names) else index
        facts += [
            _Fact("optimizer", f"`{field}` of the optimizer for `{owner}`", _digest(value))
            for field, value in state.items()
        ]
    facts.append(_Fact("optimizer", "the settings of the optimizer", _digest(optimizer["param_groups"])))
    if trainer.scheduler is not None:
        facts.append(_Fact("scheduler", "the scheduler", _digest(trainer.scheduler.state_dict())))
    facts += [
        _Fact("history", f"the metric {name!r}", _digest(list(history.get_metric_values(name))))
        for name in sorted(history.get_metric_names())
    ]
    facts += [
        _Fact("callback", f"the state of the callback {name}", _digest(state))
        for name, state in trainer.callback_handler.state_dict().items()
    ]
    return [*facts, *_random_facts()]


def _random_facts() -> list[_Fact]:
    return [
        _Fact("random state", f"the random state of {name}", _digest(state)) for name, state in get_rng_state().items()
    ]


def _digest(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().to_dense().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(repr(key).encode())
            _feed(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.update(str(len(value)).encode())
        for item in value:
            _feed(digest, item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            _feed(digest, getattr(value, field.name))
    else:
        digest.update(repr(value).encode())
