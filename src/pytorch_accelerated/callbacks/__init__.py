"""The events of a run, the handler that dispatches them, and the callbacks that ship with the library.

Each module covers one subject: `stopping`, `saving`, `evaluation`, `reporting` and so on. A new callback goes into the
module of its subject, or into a new one; its name is exported here. It reads the run through `run_of(trainer)`, because
a subclass of the trainer may use the names of the public attributes. If it keeps state between events, it defines
``state_dict`` and ``load_state_dict``, so that a resumed run continues with that state.
"""

from tqdm import tqdm as tqdm  # as in 0.1.61

from pytorch_accelerated._data.limits import DataLoaderSlice as DataLoaderSlice  # as in 0.1.61
from pytorch_accelerated._models.ema import ModelEma as ModelEma  # as in 0.1.61
from pytorch_accelerated.callbacks.base import EVENTS, TrainerCallback
from pytorch_accelerated.callbacks.csv_log import CSVLogCallback
from pytorch_accelerated.callbacks.diagnostics import GradientNormCallback, LearningRateCallback, UpdateRatioCallback
from pytorch_accelerated.callbacks.ema import ModelEmaCallback
from pytorch_accelerated.callbacks.evaluation import (
    LimitBatchesCallback,
    LimitEvalStepsCallback,
    StepBasedEvaluationCallback,
)
from pytorch_accelerated.callbacks.finetuning import GradualUnfreezingCallback
from pytorch_accelerated.callbacks.functions import LambdaCallback
from pytorch_accelerated.callbacks.handler import CallbackHandler
from pytorch_accelerated.callbacks.layer_statistics import LayerStatisticsCallback
from pytorch_accelerated.callbacks.pictures import LearningCurveCallback
from pytorch_accelerated.callbacks.placement import ConvertSyncBatchNormCallback, MoveModulesToDeviceCallback
from pytorch_accelerated.callbacks.preemption import PreemptionCallback
from pytorch_accelerated.callbacks.progress_bar import ProgressBarCallback
from pytorch_accelerated.callbacks.reporting import LogMetricsCallback, PrintProgressCallback
from pytorch_accelerated.callbacks.resources import MemoryCallback, ProfilerCallback
from pytorch_accelerated.callbacks.saving import SaveBestModelCallback, SaveTrainingStateCallback
from pytorch_accelerated.callbacks.stopping import EarlyStoppingCallback, TerminateOnNaNCallback
from pytorch_accelerated.callbacks.summary import ModelSummaryCallback
from pytorch_accelerated.callbacks.timing import ThroughputCallback, TimeLedgerCallback
from pytorch_accelerated.callbacks.trackers import MLflowCallback, TensorBoardCallback, TrackerCallback, WandbCallback
from pytorch_accelerated.callbacks.wsd import WSDCheckpointCallback
from pytorch_accelerated.exceptions import CallbackMethodNotImplementedError, StopTrainingError
from pytorch_accelerated.tracking import LossTracker as LossTracker  # as in 0.1.61

__all__ = [
    "EVENTS",
    "CSVLogCallback",
    "CallbackHandler",
    "CallbackMethodNotImplementedError",
    "ConvertSyncBatchNormCallback",
    "EarlyStoppingCallback",
    "GradientNormCallback",
    "GradualUnfreezingCallback",
    "LambdaCallback",
    "LayerStatisticsCallback",
    "LearningCurveCallback",
    "LearningRateCallback",
    "LimitBatchesCallback",
    "LimitEvalStepsCallback",
    "LogMetricsCallback",
    "MLflowCallback",
    "MemoryCallback",
    "ModelEmaCallback",
    "ModelSummaryCallback",
    "MoveModulesToDeviceCallback",
    "PreemptionCallback",
    "PrintProgressCallback",
    "ProfilerCallback",
    "ProgressBarCallback",
    "SaveBestModelCallback",
    "SaveTrainingStateCallback",
    "StepBasedEvaluationCallback",
    "StopTrainingError",
    "TensorBoardCallback",
    "TerminateOnNaNCallback",
    "ThroughputCallback",
    "TimeLedgerCallback",
    "TrackerCallback",
    "TrainerCallback",
    "UpdateRatioCallback",
    "WSDCheckpointCallback",
    "WandbCallback",
    "get_default_callbacks",
]


def get_default_callbacks(progress_bar: bool = True) -> tuple[type[TrainerCallback], ...]:
    """Return the callback classes that a trainer uses by default. Unpack them to add your own.

    Args:
        progress_bar: Whether to include the progress bar.

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
