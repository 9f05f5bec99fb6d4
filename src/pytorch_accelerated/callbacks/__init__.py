"""Callbacks: the events of a run, the handler that forwards them, and the callbacks that come with the library."""

from pytorch_accelerated.callbacks.base import EVENTS, TrainerCallback
from pytorch_accelerated.callbacks.diagnostics import GradientNormCallback
from pytorch_accelerated.callbacks.ema import ModelEmaCallback
from pytorch_accelerated.callbacks.evaluation import (
    LimitBatchesCallback,
    LimitEvalStepsCallback,
    StepBasedEvaluationCallback,
)
from pytorch_accelerated.callbacks.finetuning import GradualUnfreezingCallback
from pytorch_accelerated.callbacks.handler import CallbackHandler
from pytorch_accelerated.callbacks.placement import ConvertSyncBatchNormCallback, MoveModulesToDeviceCallback
from pytorch_accelerated.callbacks.preemption import PreemptionCallback
from pytorch_accelerated.callbacks.progress_bar import ProgressBarCallback
from pytorch_accelerated.callbacks.reporting import LogMetricsCallback, PrintProgressCallback
from pytorch_accelerated.callbacks.saving import SaveBestModelCallback, SaveTrainingStateCallback
from pytorch_accelerated.callbacks.stopping import EarlyStoppingCallback, TerminateOnNaNCallback
from pytorch_accelerated.callbacks.wsd import WSDCheckpointCallback
from pytorch_accelerated.exceptions import CallbackMethodNotImplementedError, StopTrainingError

__all__ = [
    "EVENTS",
    "CallbackHandler",
    "CallbackMethodNotImplementedError",
    "ConvertSyncBatchNormCallback",
    "EarlyStoppingCallback",
    "GradientNormCallback",
    "GradualUnfreezingCallback",
    "LimitBatchesCallback",
    "LimitEvalStepsCallback",
    "LogMetricsCallback",
    "ModelEmaCallback",
    "MoveModulesToDeviceCallback",
    "PreemptionCallback",
    "PrintProgressCallback",
    "ProgressBarCallback",
    "SaveBestModelCallback",
    "SaveTrainingStateCallback",
    "StepBasedEvaluationCallback",
    "StopTrainingError",
    "TerminateOnNaNCallback",
    "TrainerCallback",
    "WSDCheckpointCallback",
    "get_default_callbacks",
]


def get_default_callbacks(progress_bar: bool = True) -> tuple[type[TrainerCallback], ...]:
    """Return the callbacks a trainer has if none are given; unpack them to add your own.

    Args:
        progress_bar: Whether a progress bar is among them.

    Example:
        >>> callbacks = [*get_default_callbacks(progress_bar=False), EarlyStoppingCallback(early_stopping_patience=3)]
    """
    return (
        MoveModulesToDeviceCallback,
        TerminateOnNaNCallback,
        PrintProgressCallback,
        *((ProgressBarCallback,) if progress_bar else ()),
        LogMetricsCallback,
    )
