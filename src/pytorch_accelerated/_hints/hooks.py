"""What the hooks of other libraries, and near misses, are called here: methods of callbacks and of trainers.

The tables hold what synonyms do not tell: `nearest` knows that a batch is a step, that to begin is to start, and so on.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

from pytorch_accelerated._hints.meaning import nearest, spell_out

_Answer: TypeAlias = "str | tuple[str, ...]"
"""A sentence, or the names to use instead."""

# --- hooks of a trainer ------------------------------------------------------------------------------------------

HOOKS = (
    "training_run_start",
    "train_epoch_start",
    "calculate_train_batch_loss",
    "backward_step",
    "optimizer_step",
    "scheduler_step",
    "optimizer_zero_grad",
    "train_epoch_end",
    "eval_epoch_start",
    "calculate_eval_batch_loss",
    "calculate_predictions",
    "eval_epoch_end",
    "training_run_epoch_end",
    "training_run_end",
    "evaluation_run_start",
    "evaluation_run_end",
    "create_train_dataloader",
    "create_eval_dataloader",
    "create_scheduler",
    "get_default_train_dl_kwargs",
    "get_default_eval_dl_kwargs",
)
"""The methods that the trainer calls for a subclass to override."""

_STEP = "Override `{0}(self, batch)` instead, which returns a dictionary with `loss` and `batch_size`."
_TRAIN_STEP = _STEP.format("calculate_train_batch_loss")
_EVAL_STEP = _STEP.format("calculate_eval_batch_loss")
_BOTH_STEPS = (
    "Override `calculate_train_batch_loss(self, batch)` and `calculate_eval_batch_loss(self, batch)` instead, which "
    "return a dictionary with `loss` and `batch_size`."
)
_LOADER = "Override `{0}(self, batch_size, {1}_dl_kwargs)` instead, or pass the loader as `{1}_dataset`."
_TRAIN_LOADER = _LOADER.format("create_train_dataloader", "train")
_EVAL_LOADER = _LOADER.format("create_eval_dataloader", "eval")
METRICS_OF_STEP = (
    "Pass functions or metrics of torchmetrics as `metrics` to the Trainer, or return the metrics of a step as "
    "`metrics`, a dictionary, from `calculate_eval_batch_loss`."
)
_OPTIMIZER_AND_SCHEDULER = (
    "Pass the optimizer to the Trainer, and the scheduler as `create_scheduler_fn` to `train`, or override "
    "`create_scheduler`."
)
_FOREIGN_HOOKS: dict[str, _Answer] = {
    # Lightning
    "training_step": _TRAIN_STEP,
    "validation_step": _EVAL_STEP,
    "test_step": _EVAL_STEP,
    "predict_step": ("calculate_predictions",),
    "configure_optimizers": _OPTIMIZER_AND_SCHEDULER,
    "configure_callbacks": "Pass the callbacks as `callbacks` to the Trainer.",
    "configure_gradient_clipping": "Pass `gradient_clip_norm` or `gradient_clip_value` to `train`.",
    "train_dataloader": _TRAIN_LOADER,
    "val_dataloader": _EVAL_LOADER,
    "test_dataloader": _EVAL_LOADER,
    "predict_dataloader": _EVAL_LOADER,
    "lr_scheduler_step": ("scheduler_step",),
    "backward": ("backward_step",),
    # Hugging Face
    "compute_loss": _BOTH_STEPS,
    "prediction_step": "Override `calculate_eval_batch_loss` and `calculate_predictions` instead.",
    "compute_metrics": METRICS_OF_STEP,
    "preprocess_logits_for_metrics": METRICS_OF_STEP,
    "get_train_dataloader": _TRAIN_LOADER,
    "get_eval_dataloader": _EVAL_LOADER,
    "get_test_dataloader": _EVAL_LOADER,
    "create_optimizer": "Pass the optimizer to the Trainer.",
    "create_optimizer_and_scheduler": _OPTIMIZER_AND_SCHEDULER,
    # Keras, fastai and others
    "train_step": _TRAIN_STEP,
    "eval_step": _EVAL_STEP,
    "eval_forward": _EVAL_STEP,
    "one_batch": _TRAIN_STEP,
    "calculate_loss": _BOTH_STEPS,
    "calculate_batch_loss": _BOTH_STEPS,
    "train_on_batch": _TRAIN_STEP,
}


def hook_meant(name: str, events: Collection[str]) -> str | None:
    """Return a sentence about a method of a trainer that looks like a hook, but is none; ``None`` for any other.

    Args:
        name: Its name.
        events: The events of callbacks, which the methods of a trainer do not receive.

    Example:
        >>> hook_meant("validation_epoch_end", [])
        'Rename it to `eval_epoch_end`.'
    """
    if name in HOOKS:
        return None
    if not name.startswith("on_"):
        return _remedy(_FOREIGN_HOOKS.get(name) or nearest(name, HOOKS, cutoff=0.85))
    meant = name if name in events else _event(name, events)
    if meant is None or isinstance(meant, tuple) or meant.endswith("."):
        return _remedy(meant)
    return _remedy(nearest(meant, HOOKS, cutoff=1)) or f"Only callbacks get events: write a callback with `{meant}`."


# --- events of callbacks -----------------------------------------------------------------------------------------

_EACH_UPDATE_OR_STEP = "Rename it to `on_optimizer_step_{0}`, once per update, or `on_train_step_{0}`, once per batch."
_NO_SANITY_CHECK = "There is no sanity check. Call `evaluate` before `train` for one."
_NO_CANCELLING = "Only a run can be cancelled: raise `StopTrainingError`, and define `on_stop_training_error`."
_NO_EVENTS = "`predict` has no events. Override `calculate_predictions` of the Trainer instead."
_FOREIGN_EVENTS: dict[str, _Answer] = {
    # Lightning and Keras
    "on_train_start": "on_training_run_start",
    "on_train_end": "on_training_run_end",
    "on_epoch_start": "on_train_epoch_start",
    "on_epoch_end": "on_training_run_epoch_end",
    "on_run_start": "on_training_run_start",
    "on_run_end": "on_training_run_end",
    "on_batch_begin": "on_train_step_start",
    "on_batch_start": "on_train_step_start",
    "on_batch_end": "on_train_step_end",
    "on_eval_start": "on_eval_epoch_start",
    "on_eval_end": "on_eval_epoch_end",
    "on_backward_end": "on_optimizer_step_start",
    "on_before_zero_grad": "on_optimizer_step_end",
    "on_keyboard_interrupt": "on_stop_training_error",
    "on_stop_training": "on_stop_training_error",
    "on_error": "on_exception",
    "on_sanity_check_start": _NO_SANITY_CHECK,
    "on_sanity_check_end": _NO_SANITY_CHECK,
    "on_predict_start": _NO_EVENTS,
    "on_predict_end": _NO_EVENTS,
    "on_predict_epoch_start": _NO_EVENTS,
    "on_predict_epoch_end": _NO_EVENTS,
    "on_predict_batch_start": _NO_EVENTS,
    "on_predict_batch_end": _NO_EVENTS,
    "on_save_checkpoint": ("on_training_state_save", "state_dict"),
    "on_load_checkpoint": "load_state_dict",
    # Hugging Face
    "on_step_start": _EACH_UPDATE_OR_STEP.format("start"),
    "on_step_end": _EACH_UPDATE_OR_STEP.format("end"),
    "on_substep_end": "on_train_step_end",
    "on_optimizer_step": "on_optimizer_step_end",
    "on_evaluate": "on_eval_epoch_end",
    "on_prediction_step": "on_eval_step_end",
    "on_predict": _NO_EVENTS,
    "on_save": "on_training_state_save",
    "on_log": "on_log_point",
    # fastai
    "after_create": "on_init_end",
    "before_train": "on_train_epoch_start",
    "after_train": "on_train_epoch_end",
    "after_pred": "on_backward_start",
    "after_loss": "on_backward_start",
    "before_step": "on_optimizer_step_start",
    "after_step": "on_optimizer_step_end",
    "before_batch": "on_train_step_start",
    "after_batch": "on_train_step_end",
    "after_cancel_fit": "on_stop_training_error",
    **dict.fromkeys(("after_cancel_epoch", "after_cancel_train", "after_cancel_validate"), _NO_CANCELLING),
    **dict.fromkeys(("after_cancel_batch", "after_cancel_step", "after_cancel_backward"), _NO_CANCELLING),
}
_EVENTS_BY_MEANING = {spell_out(name): event for name, event in _FOREIGN_EVENTS.items() if name.startswith("on_")}


def event_meant(name: str, events: Collection[str]) -> str | None:
    """Return a sentence about a method of a callback that looks like an event, but is none; ``None`` for any other.

    Example:
        >>> event_meant("on_train_epoch_begin", ["on_train_epoch_start", "on_train_epoch_end"])
        'Rename it to `on_train_epoch_start`.'
    """
    return None if name in events else _remedy(_event(name, events))


def _event(name: str, events: Collection[str]) -> _Answer | None:
    is_event = name.startswith(("on_", "before_", "after_"))
    foreign = _FOREIGN_EVENTS.get(name) or (_EVENTS_BY_MEANING.get(spell_out(name)) if is_event else None)
    return foreign or (nearest(name, events) if name.startswith("on_") else nearest(name, events, cutoff=1))


def _remedy(meant: _Answer | None) -> str | None:
    if meant is None or (isinstance(meant, str) and meant.endswith(".")):
        return meant
    names = (meant,) if isinstance(meant, str) else meant
    return f"Rename it to {' or '.join(f'`{name}`' for name in names)}."
