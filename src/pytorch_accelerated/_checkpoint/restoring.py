"""Restores a training state; if a part refuses its own, everything is as it was before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytorch_accelerated._checkpoint.buffers import load_local_buffers
from pytorch_accelerated._checkpoint.companions import load_gradients
from pytorch_accelerated._checkpoint.manifest import name_state
from pytorch_accelerated._checkpoint.model_state import load_checked_model_state
from pytorch_accelerated._checkpoint.parts import Parts, StateContents, load_state_dicts, sharded_objects
from pytorch_accelerated._checkpoint.portable import unwrap_model
from pytorch_accelerated._checkpoint.scheduler_state import (
    check_scheduler_state,
    describe_new_length,
    load_scheduler_state,
    replay,
    return_to_initial_rates,
)
from pytorch_accelerated._checkpoint.undo import attributes_kept_on_error, undone_on_error
from pytorch_accelerated._data.rng import derive_seed, seed_generators, set_rng_state
from pytorch_accelerated._data.samplers import OrderState
from pytorch_accelerated._distributed.collectives import run_on_all
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.progress import TrainingProgress

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pytorch_accelerated._types import StateDict, StateMapping


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
            with sharded_objects(accelerator, parts):
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
