"""The callback that ends a run in good order when its process has to go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytorch_accelerated._signals import PREEMPTION_SIGNALS
from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytorch_accelerated.trainer import Trainer


class PreemptionCallback(TrainerCallback):
    """Ends the run in good order when a signal announces that the process has to go, as Ctrl-C does.

    Clusters and clouds send one some time before they end a process. The step is finished, all processes end the run
    with its events, and `train` raises `SystemExit` with the code ``128 + n``. Without this callback the process ends
    at once. `SaveTrainingStateCallback` listens to the same signals, and saves a state to go on from.

    Args:
        signals: The signals; by default SIGTERM and SIGUSR1, as far as the system has them.

    Example:
        >>> import signal
        >>> callback = PreemptionCallback(signals=[signal.SIGTERM])
    """

    def __init__(self, signals: Iterable[int] = PREEMPTION_SIGNALS) -> None:
        self.signals = tuple(signals)

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen until the run has ended."""
        trainer.end_run_on_signals(*self.signals)
