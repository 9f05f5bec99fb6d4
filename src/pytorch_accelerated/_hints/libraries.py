"""Callbacks of other libraries, and which of ours do the same."""

from __future__ import annotations

from pytorch_accelerated._messages import PACKAGE

_OTHER_LIBRARIES = {
    "lightning": "Lightning",
    "pytorch_lightning": "Lightning",
    "keras": "Keras",
    "tensorflow": "Keras",
    "transformers": "Hugging Face Transformers",
    "fastai": "fastai",
    "composer": "Composer",
}
_FOREIGN_CALLBACKS = {
    "EarlyStopping": "`EarlyStoppingCallback`",
    "EarlyStoppingCallback": "`EarlyStoppingCallback`",
    "ModelCheckpoint": "`SaveBestModelCallback` or `SaveTrainingStateCallback`",
    "SaveModelCallback": "`SaveBestModelCallback`",
    "BackupAndRestore": "`SaveTrainingStateCallback`",
    "TerminateOnNaN": "`TerminateOnNaNCallback`",
    "ProgressCallback": "`ProgressBarCallback`",
    "TQDMProgressBar": "`ProgressBarCallback`",
    "RichProgressBar": "`ProgressBarCallback`",
    "PrinterCallback": "`PrintProgressCallback`",
    "WeightAveraging": "`ModelEmaCallback`",
    "EMAWeightAveraging": "`ModelEmaCallback`",
    "SwapEMAWeights": "`ModelEmaCallback`",
    "BackboneFinetuning": "`GradualUnfreezingCallback`",
}


def describe_foreign_callback(callback: object) -> str | None:
    """Return what to do about a callback of another library; ``None`` for any other object.

    Example:
        >>> describe_foreign_callback(object())
    """
    classes = type(callback).__mro__
    library = next((library for cls in classes if (library := library_of(cls.__module__)) is not None), None)
    if library is None:
        return None
    ours = next((_FOREIGN_CALLBACKS[cls.__name__] for cls in classes if cls.__name__ in _FOREIGN_CALLBACKS), None)
    remedy = "Write it as a `TrainerCallback`" if ours is None else f"Use {ours}"
    return f"`{type(callback).__name__}` is a callback of {library}. {remedy} of `{PACKAGE}.callbacks`."


def library_of(module: str) -> str | None:
    """Return the library that a module belongs to, if it is one with callbacks of its own."""
    return _OTHER_LIBRARIES.get(module.partition(".")[0])
