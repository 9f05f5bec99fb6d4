"""How a run shows on the trainer, and how callbacks of the library see both, whatever names a subclass uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from pytorch_accelerated._proxy import Forwarded, Value, WritableForwarded

if TYPE_CHECKING:
    from pytorch_accelerated._loop import TrainingLoop
    from pytorch_accelerated._run import Run

TrainerType = TypeVar("TrainerType", bound="TrainingLoop")


def run_of(trainer: TrainingLoop) -> Run:
    """Return the run of a trainer, for callbacks of the library.

    They do not read the public attributes of the trainer, because a subclass may use these names for something else. A
    test double of the trainer, which has no run, shows the attributes itself.
    """
    double: Any = trainer
    run: Run = getattr(double, "_loop_run", double)
    return run


def library_of(trainer: TrainerType) -> TrainerType:
    """Return a trainer with the methods of the library, for callbacks of the library.

    A subclass may use the names of those that 0.1.61 did not have for something else. A test double of the trainer,
    whose class is not derived from one of the library, shows its own methods.
    """
    view: Any = _LibraryView(trainer)
    shown: TrainerType = view
    return shown


class _LibraryView:
    def __init__(self, trainer: TrainingLoop) -> None:
        self._trainer = trainer

    def __getattr__(self, name: str) -> Any:
        kind = type(self._trainer)
        for base in kind.__mro__:
            if name in vars(base) and base.__module__.partition(".")[0] == __name__.partition(".")[0]:
                return vars(base)[name].__get__(self._trainer, kind)
        return getattr(self._trainer, name)


class RunAttribute(Forwarded[Value]):
    """A read-only attribute of the trainer that lives in its run.

    Args:
        path: Where it is in `Run`, such as ``"training.progress"``.
    """

    def __init__(self, path: str) -> None:
        super().__init__(f"_loop_run.{path}")


class WritableRunAttribute(RunAttribute[Value], WritableForwarded[Value]):
    """The same for an attribute that programs also set."""
