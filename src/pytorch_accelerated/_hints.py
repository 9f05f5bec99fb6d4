"""What names of other libraries, and near misses, are called here: hooks, events, arguments, callbacks and metrics.

The tables hold what synonyms do not tell. `nearest` knows that a batch is a step, that to begin is to start, and so on.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any, TypeVar

from pytorch_accelerated._messages import PACKAGE

Function = TypeVar("Function", bound=FunctionType | Any)

_SIMILAR_ENOUGH = 0.8

# --- meaning -----------------------------------------------------------------------------------------------------

_SYNONYMS = {
    "begin": "start",
    "before": "start",
    "pre": "start",
    "after": "end",
    "post": "end",
    "finish": "end",
    "batch": "step",
    "iteration": "step",
    "training": "train",
    "fit": "train_run",
    "fitting": "train_run",
    "val": "eval",
    "valid": "eval",
    "validate": "eval",
    "validation": "eval",
    "evaluation": "eval",
    "test": "eval",
    "compute": "calculate",
    "loader": "dataloader",
    "dl": "dataloader",
    "sched": "scheduler",
    "opt": "optimizer",
}

_MOMENTS = ("start", "end")


def _spell_out(name: str) -> str:
    """Return a name in the library's words, with the moment behind: ``after_fit`` is ``train_run_end``.

    Example:
        >>> _spell_out("on_validation_batch_begin")
        'eval_step_start'
    """
    words = [_SYNONYMS.get(word, word) for word in name.lower().split("_")]
    words = [word for word in words if word and word != "on"]
    return "_".join(sorted(words, key=lambda word: word in _MOMENTS))


def nearest(name: str, known: Iterable[str], cutoff: float = _SIMILAR_ENOUGH) -> str | None:
    """Return the known name with the meaning of another name, or with the most similar spelling.

    Args:
        name: The name.
        known: The names to choose from.
        cutoff: How similar the spelling must be, from 0 to 1: only names of the same meaning are found with 1.

    Example:
        >>> nearest("on_train_epoch_begin", ["on_train_epoch_start", "on_train_epoch_end"])
        'on_train_epoch_start'
    """
    spelled_out = {_spell_out(each): each for each in known}
    similar = difflib.get_close_matches(_spell_out(name), spelled_out, n=1, cutoff=cutoff)
    return spelled_out[similar[0]] if similar else None


# --- hooks and events --------------------------------------------------------------------------------------------

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

_METRICS_OF_STEP = (
    "Return the metrics of a step as `metrics`, a dictionary, from `calculate_eval_batch_loss`, or compute them in "
    "`eval_epoch_end`."
)
_FOREIGN_HOOKS = {
    # Lightning
    "training_step": "calculate_train_batch_loss",
    "validation_step": "calculate_eval_batch_loss",
    "test_step": "calculate_eval_batch_loss",
    "predict_step": "calculate_predictions",
    "configure_optimizers": (
        "Pass the optimizer to the Trainer, and the scheduler as `create_scheduler_fn` to `train`, or override "
        "`create_scheduler`."
    ),
    "configure_callbacks": "Pass the callbacks as `callbacks` to the Trainer.",
    "configure_gradient_clipping": "Pass `gradient_clip_norm` or `gradient_clip_value` to `train`.",
    "train_dataloader": "create_train_dataloader",
    "val_dataloader": "create_eval_dataloader",
    "test_dataloader": "create_eval_dataloader",
    "predict_dataloader": "create_eval_dataloader",
    "lr_scheduler_step": "scheduler_step",
    "backward": "backward_step",
    # Hugging Face
    "compute_loss": "calculate_train_batch_loss` and `calculate_eval_batch_loss",
    "prediction_step": "calculate_eval_batch_loss` and `calculate_predictions",
    "compute_metrics": _METRICS_OF_STEP,
    "preprocess_logits_for_metrics": _METRICS_OF_STEP,
    "get_train_dataloader": "create_train_dataloader",
    "get_eval_dataloader": "create_eval_dataloader",
    "get_test_dataloader": "create_eval_dataloader",
    "create_optimizer": "Pass the optimizer to the Trainer.",
    "create_optimizer_and_scheduler": (
        "Pass the optimizer to the Trainer, and the scheduler as `create_scheduler_fn` to `train`."
    ),
    # Keras, fastai and others
    "train_step": "calculate_train_batch_loss",
    "eval_step": "calculate_eval_batch_loss",
    "eval_forward": "calculate_eval_batch_loss",
    "one_batch": "calculate_train_batch_loss",
    "calculate_loss": "calculate_train_batch_loss` and `calculate_eval_batch_loss",
    "train_on_batch": "calculate_train_batch_loss",
}

_EACH_UPDATE_OR_STEP = "on_optimizer_step_{0}` (once per update) or `on_train_step_{0}` (once per batch)"
_NO_EVENTS = "`predict` has no events: override `calculate_predictions` of the Trainer."
_FOREIGN_EVENTS = {
    # Lightning and Keras
    "on_train_start": "on_training_run_start",
    "on_train_end": "on_training_run_end",
    "on_epoch_start": "on_train_epoch_start",
    "on_epoch_end": "on_training_run_epoch_end",
    "on_batch_start": "on_train_step_start",
    "on_batch_end": "on_train_step_end",
    "on_eval_start": "on_eval_epoch_start",
    "on_eval_end": "on_eval_epoch_end",
    "on_backward_end": "on_optimizer_step_start",
    "on_before_zero_grad": "on_optimizer_step_end",
    "on_keyboard_interrupt": "on_stop_training_error",
    "on_error": "on_exception",
    "on_predict_start": _NO_EVENTS,
    "on_predict_end": _NO_EVENTS,
    "on_predict_epoch_start": _NO_EVENTS,
    "on_predict_epoch_end": _NO_EVENTS,
    "on_predict_batch_start": _NO_EVENTS,
    "on_predict_batch_end": _NO_EVENTS,
    "on_save_checkpoint": "on_training_state_save` or `state_dict",
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
}
_EVENTS_BY_MEANING = {_spell_out(name): event for name, event in _FOREIGN_EVENTS.items() if name.startswith("on_")}


def is_sentence(answer: str) -> bool:
    """Tell whether an answer is a sentence, and not a name, or several."""
    return answer.endswith(".")


def hook_meant(name: str, events: Collection[str]) -> str | None:
    """Return what a method of a trainer that is no hook is called here: a sentence, or hooks; ``None`` if unknown.

    Args:
        name: Its name.
        events: The events of callbacks, which the methods of a trainer do not receive.
    """
    if name in HOOKS:
        return None
    if not name.startswith("on_"):
        return _FOREIGN_HOOKS.get(name) or nearest(name, HOOKS, cutoff=0.9)
    event = name if name in events else event_meant(name, events)
    if event is None or is_sentence(event):
        return event
    return nearest(event, HOOKS, cutoff=1) or f"Only callbacks receive events: write a `TrainerCallback` with `{event}`."


def event_meant(name: str, events: Collection[str]) -> str | None:
    """Return the event, or events, that a method of a callback is probably meant to be; ``None`` if there is none."""
    if name in events:
        return None
    is_event = name.startswith(("on_", "before_", "after_"))
    foreign = _FOREIGN_EVENTS.get(name) or (_EVENTS_BY_MEANING.get(_spell_out(name)) if is_event else None)
    return foreign or nearest(name, events, cutoff=_SIMILAR_ENOUGH if name.startswith("on_") else 1)


def find_uncalled(
    cls: type, meant: Callable[[str], str | None], is_called: Callable[[str], bool] = lambda name: False
) -> dict[str, str]:
    """Return the methods of a class that the program has written for another library, or has misspelled.

    A method that another one mentions, by its name or as text, is a helper of the program's, whatever it is called.

    Args:
        cls: The class.
        meant: Returns what a name is called here; ``None`` for any name of the program's choice.
        is_called: Tells whether something else calls a method of this name.

    Returns:
        What each is called here, by its name.
    """
    functions = [(name, function) for base in _classes_of_user(cls) for name, function in _functions_in(base)]
    foreign = {name: ours for name, _ in functions if not is_called(name) and (ours := meant(name)) is not None}
    mentioned = {word for name, function in functions if name not in foreign for word in _words_of(function.__code__)}
    return {name: ours for name, ours in foreign.items() if name not in mentioned}


def words_of_user(cls: type) -> set[str]:
    """Return the names and texts that occur in the methods that the program has written in a class."""
    functions = [function for base in _classes_of_user(cls) for _, function in _functions_in(base)]
    return {word for function in functions for word in _words_of(function.__code__)}


def _classes_of_user(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in (PACKAGE, "builtins")]


def _functions_in(cls: type) -> Iterator[tuple[str, FunctionType]]:
    for name, member in vars(cls).items():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)  # of a property, a classmethod
        if isinstance(function, FunctionType):
            yield name, inspect.unwrap(function)


def _words_of(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _words_of(constant)


# --- callbacks of other libraries --------------------------------------------------------------------------------

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
    "EarlyStopping": "EarlyStoppingCallback",
    "EarlyStoppingCallback": "EarlyStoppingCallback",
    "ModelCheckpoint": "SaveBestModelCallback` or `SaveTrainingStateCallback",
    "SaveModelCallback": "SaveBestModelCallback",
    "BackupAndRestore": "SaveTrainingStateCallback",
    "TerminateOnNaN": "TerminateOnNaNCallback",
    "ProgressCallback": "ProgressBarCallback",
    "TQDMProgressBar": "ProgressBarCallback",
    "RichProgressBar": "ProgressBarCallback",
    "PrinterCallback": "PrintProgressCallback",
    "WeightAveraging": "ModelEmaCallback",
    "EMAWeightAveraging": "ModelEmaCallback",
    "SwapEMAWeights": "ModelEmaCallback",
    "BackboneFinetuning": "GradualUnfreezingCallback",
}


def describe_foreign_callback(callback: object) -> str | None:
    """Return a sentence about a callback of another library; ``None`` for any other object."""
    for cls in type(callback).__mro__:
        library = _OTHER_LIBRARIES.get(cls.__module__.partition(".")[0])
        if library is not None:
            ours = next((_FOREIGN_CALLBACKS[each.__name__] for each in type(callback).__mro__ if _has(each)), None)
            remedy = "Write it as a `TrainerCallback`" if ours is None else f"Use `{ours}`"
            return f"`{type(callback).__name__}` is a callback of {library}. {remedy} of `{PACKAGE}.callbacks`."
    return None


def _has(cls: type) -> bool:
    return cls.__name__ in _FOREIGN_CALLBACKS


# --- metrics -----------------------------------------------------------------------------------------------------


def metric_meant(name: str, known: Iterable[str]) -> str | None:
    """Return the known metric that a name probably stands for; ``None`` if there is none.

    Example:
        >>> metric_meant("val_loss", ["train_loss_epoch", "eval_loss_epoch"])
        'eval_loss_epoch'
    """
    short = {each.removesuffix("_epoch"): each for each in known}
    meant = nearest("train_loss" if name == "loss" else name.removesuffix("_epoch"), short)
    return None if meant is None else short[meant]


# --- arguments ---------------------------------------------------------------------------------------------------

_LOADER = (
    "Pass it in `train_dataloader_kwargs` or `eval_dataloader_kwargs` of `train`, such as `{{'{0}': ...}}`, or in "
    "`dataloader_kwargs` of `evaluate` and `predict`."
)
_LAUNCH = "Start the program with `accelerate launch`, such as `accelerate launch --num_processes 2 train.py`."
_OF_OPTIMIZER = "Pass it to the optimizer, such as `torch.optim.AdamW(model.parameters(), {0}=...)`."
_SAVING = "Add a `SaveTrainingStateCallback`, or a `SaveBestModelCallback`, to the `callbacks` of the Trainer."
_EVALUATING = "`train` evaluates after each epoch. For more, add a `StepBasedEvaluationCallback` to the `callbacks`."
_LIMITING = "Add a `LimitBatchesCallback` to the `callbacks` of the Trainer, or set PT_ACC_LIMIT_BATCHES."
_LOGGING = "Add a callback that sends `trainer.run_history` there, such as a subclass of `LogMetricsCallback`."
_PROGRESS_BAR = "Pass `callbacks=get_default_callbacks(progress_bar=False)` to the Trainer for no progress bar."
_DIRECTION = "Pass `greater_is_better=True` if larger values are better."
_TRAIN_DATA, _EVAL_DATA = ("train_dataset", "dataset"), ("eval_dataset", "dataset")

_FOREIGN_ARGUMENTS: dict[str, str | tuple[str, ...]] = {
    # data
    **dict.fromkeys(("batch_size", "bs", "train_batch_size", "batch_size_per_device"), "per_device_batch_size"),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), "per_device_batch_size"),
    **dict.fromkeys(("eval_batch_size", "val_batch_size", "valid_batch_size"), "per_device_batch_size"),
    **dict.fromkeys(("train_dataloader", "train_dataloaders", "train_loader", "train_dl", "train_data"), _TRAIN_DATA),
    **dict.fromkeys(("train_ds", "train_set", "training_data", "training_dataset"), _TRAIN_DATA),
    **dict.fromkeys(("data", "dataloader", "dataloaders", "loader", "datamodule", "dls"), _TRAIN_DATA),
    **dict.fromkeys(("val_dataset", "valid_dataset", "validation_dataset", "val_dataloader"), _EVAL_DATA),
    **dict.fromkeys(("val_dataloaders", "valid_dataloader", "eval_dataloader", "val_loader"), _EVAL_DATA),
    **dict.fromkeys(("valid_loader", "eval_loader", "val_dl", "valid_dl", "validation_data", "val_data"), _EVAL_DATA),
    **dict.fromkeys(("valid_data", "eval_data", "val_ds", "valid_ds", "eval_ds", "val_set", "valid_set"), _EVAL_DATA),
    **dict.fromkeys(("test_dataset", "test_dataloader", "test_data", "predict_dataset"), _EVAL_DATA),
    **{name: _LOADER.format(name) for name in ("num_workers", "shuffle", "drop_last", "pin_memory", "sampler")},
    **{name: _LOADER.format(name) for name in ("batch_sampler", "prefetch_factor", "persistent_workers")},
    "dataloader_num_workers": _LOADER.format("num_workers"),
    "dataloader_drop_last": _LOADER.format("drop_last"),
    "data_collator": "collate_fn",
    # length of a run and of an update
    **dict.fromkeys(("epochs", "max_epochs", "num_train_epochs", "n_epochs", "n_epoch", "nb_epochs"), "num_epochs"),
    **dict.fromkeys(("max_steps", "num_steps", "total_steps", "max_updates", "max_train_steps"), "max_num_train_steps"),
    "accumulate_grad_batches": "gradient_accumulation_steps",
    **dict.fromkeys(("grad_accum_steps", "accumulation_steps", "grad_accum"), "gradient_accumulation_steps"),
    **dict.fromkeys(("max_grad_norm", "gradient_clip_val", "grad_clip", "gradient_clip"), "gradient_clip_norm"),
    **dict.fromkeys(("clip_grad_norm", "grad_clip_norm", "max_norm", "clipnorm"), "gradient_clip_norm"),
    **dict.fromkeys(("clipvalue", "clip_value", "clip_grad_value", "grad_clip_value"), "gradient_clip_value"),
    **dict.fromkeys(("limit_train_batches", "limit_val_batches", "fast_dev_run", "steps_per_epoch"), _LIMITING),
    # parts of the trainer
    **dict.fromkeys(("loss", "loss_fn", "loss_function", "criterion", "compute_loss_func"), "loss_func"),
    **dict.fromkeys(("opt", "optim", "optimizers", "opt_func"), "optimizer"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "scheduler_fn", "create_scheduler"), "create_scheduler_fn"),
    **dict.fromkeys(("net", "network", "module"), "model"),
    **dict.fromkeys(("callback", "cbs"), "callbacks"),
    **dict.fromkeys(("precision", "fp16", "bf16", "amp", "use_amp"), "mixed_precision"),
    **dict.fromkeys(("random_state", "random_seed", "manual_seed"), "seed"),
    **dict.fromkeys(("devices", "gpus", "num_nodes", "strategy", "num_processes", "tpu_cores"), _LAUNCH),
    "device": "Accelerate chooses the device; `accelerator={'cpu': True}` keeps the Trainer on the CPU.",
    **{name: _OF_OPTIMIZER.format(name) for name in ("lr", "weight_decay", "momentum", "betas")},
    "learning_rate": _OF_OPTIMIZER.format("lr"),
    "args": "Pass the settings of a run to `train`.",
    **dict.fromkeys(("metrics", "compute_metrics"), _METRICS_OF_STEP),
    # saving, evaluating, reporting
    **dict.fromkeys(("resume", "resume_from_checkpoint", "ckpt_path", "checkpoint", "resume_training"), "resume_from"),
    **dict.fromkeys(("save_steps", "save_strategy", "default_root_dir", "enable_checkpointing"), _SAVING),
    **dict.fromkeys(("val_check_interval", "eval_steps", "eval_strategy", "evaluation_strategy"), _EVALUATING),
    **dict.fromkeys(("check_val_every_n_epoch", "validation_split"), _EVALUATING),
    **dict.fromkeys(("logger", "loggers", "report_to", "logging_steps", "log_every_n_steps"), _LOGGING),
    **dict.fromkeys(("verbose", "disable_tqdm", "enable_progress_bar", "progress_bar"), _PROGRESS_BAR),
    # callbacks
    **dict.fromkeys(("monitor", "metric", "metric_name", "metric_for_best_model"), "watch_metric"),
    "patience": "early_stopping_patience",
    **dict.fromkeys(("min_delta", "threshold", "delta"), "early_stopping_threshold"),
    **dict.fromkeys(("mode", "comp"), _DIRECTION),
    **dict.fromkeys(("filepath", "dirpath", "filename", "path", "fname", "output_dir"), ("save_path", "save_dir")),
    **dict.fromkeys(("save_total_limit", "max_to_keep"), "max_checkpoints"),
    "save_top_k": "keep_best",
    "every_n_epochs": "save_every_n_epochs",
    "every_n_train_steps": "save_every_n_steps",
    **dict.fromkeys(("restore_best_weights", "load_best_model_at_end"), "load_saved_checkpoint"),
    "save_weights_only": "Pass `save_optimizer=False` and `save_scheduler=False` to save only the model.",
}

_arguments: dict[str, list[str]] = {}
"""The arguments of each function that explains its own, by its name."""


def explains_arguments(function: Function) -> Function:
    """Let a function, or the ``__init__`` of a class, say what a keyword argument that it lacks is called here.

    It adds a frame to the stack, and nothing else: signature and types stay.
    """
    label = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
    known = _arguments[label] = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def explained(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.keys() <= set(known):
            unknown = [name for name in kwargs if name not in known]
            raise TypeError(" ".join(_explain_argument(label, name) for name in unknown))
        return function(*args, **kwargs)

    return explained  # type: ignore[return-value]


def _explain_argument(function: str, name: str) -> str:
    own, meant = _arguments[function], _FOREIGN_ARGUMENTS.get(name, name)
    problem = f"`{function}` has no argument `{name}`."
    if isinstance(meant, str) and is_sentence(meant):
        return f"{problem} {meant}"
    candidates = (meant,) if isinstance(meant, str) else meant
    for ours in candidates:
        if ours in own:
            return f"{problem} Here it is called `{ours}`."
    for ours in candidates:
        home = next((each for each, arguments in _arguments.items() if ours in arguments), None)
        if home is not None:
            is_called = "It" if ours == name else f"Here it is called `{ours}`, and"
            return f"{problem} {is_called} is an argument of `{home}`."
    similar = nearest(name, own, cutoff=0.7)
    if similar is not None:
        return f"{problem} Did you mean `{similar}`?"
    return f"{problem} It takes {', '.join(f'`{each}`' for each in own)}."


class NotHere:
    """A method of other libraries that a class does not have: an `AttributeError` says what it is called here.

    A subclass may define it.

    Args:
        answer: What to do instead.
    """

    def __init__(self, answer: str) -> None:
        self._answer = answer

    def __set_name__(self, owner: type, name: str) -> None:
        self._message = f"`{owner.__name__}` has no `{name}`. {self._answer}"

    def __get__(self, instance: object, owner: type) -> Any:
        raise AttributeError(self._message)
