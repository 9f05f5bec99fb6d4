"""Finds the training state that a run continues from."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pytorch_accelerated._checkpoint.resume import find_state_to_resume, is_directory
from pytorch_accelerated._distributed.consensus import overrides_any
from pytorch_accelerated.callbacks import SaveTrainingStateCallback

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from pathlib import Path

    from accelerate import Accelerator

    from pytorch_accelerated._checkpoint.manifest import SavedState
    from pytorch_accelerated._types import StateDict
    from pytorch_accelerated.callbacks import CallbackHandler
    from pytorch_accelerated.trainer import Trainer


def find_state(
    trainer: Trainer,
    accelerator: Accelerator,
    resume_from: str | os.PathLike[str] | bool | None,
    allow_other_num_processes: bool,
) -> SavedState | Callable[[], StateDict] | None:
    """Return the verified state that a run continues from; ``None`` if it starts from scratch.

    If a subclass overrides `load_training_state`, its method reads and checks the state. It is returned instead. Must
    be called on every process.

    Args:
        trainer: The trainer.
        accelerator: Its accelerator.
        resume_from: As for `Trainer.train`.
        allow_other_num_processes: As for `Trainer.train`.
    """
    options = {"allow_other_num_processes": True} if allow_other_num_processes else {}
    is_overridden = overrides_any(trainer, ("load_training_state",))
    if is_overridden and is_directory(resume_from):
        return partial(trainer.load_training_state, resume_from, **options)
    saved = find_state_to_resume(
        resume_from,
        folders_of_states(trainer.callback_handler),
        trainer,
        is_main=accelerator.is_main_process,
        num_processes=int(accelerator.num_processes),
        allow_other_num_processes=allow_other_num_processes,
        print_fn=trainer.print,
    )
    if is_overridden and saved is not None:
        return partial(trainer.load_training_state, str(saved.path), **options)
    return saved


def folders_of_states(callback_handler: CallbackHandler) -> set[Path]:
    """Return the folders in which a run saves training states."""
    callbacks = callback_handler.with_nested_callbacks()
    return {callback.save_dir for callback in callbacks if isinstance(callback, SaveTrainingStateCallback)}
