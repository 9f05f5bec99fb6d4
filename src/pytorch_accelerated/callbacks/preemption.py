"""The callback that ends a run gracefully when its process is about to be terminated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytorch_accelerated._hints.arguments import explains_arguments
from pytorch_accelerated._requests.signals import PREEMPTION_SIGNALS
from pytorch_accelerated._views import library_of
from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytorch_accelerated.trainer import Trainer


class PreemptionCallback(TrainerCallback):
    """Ends the run gracefully on a signal that announces termination, as Ctrl-C does.

    Clusters and cloud providers send such a signal some time before they terminate a process. The run finishes the
    current step on all processes, fires its end-of-run events, and `train` raises `SystemExit` with the code
    ``128 + n``, where ``n`` is the number of the signal. Without this callback the signal ends the process immediately.
    `SaveTrainingStateCallback` listens for the same signals and saves a state to resume from.

    Args:
        signals: The signals to listen for. The default is SIGTERM and SIGUSR1, where the system has them.

    Example:
        >>> import signal
        >>> callback = PreemptionCallback(signals=[signal.SIGTERM])
    """

    @explains_arguments
    def __init__(self, signals: Iterable[int] = PREEMPTION_SIGNALS) -> None:
        self.signals = tuple(signals)

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen for the signals until the run ends."""
        library_of(trainer).end_run_on_signals(*self.signals)
