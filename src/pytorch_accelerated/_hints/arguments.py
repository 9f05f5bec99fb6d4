"""What the keyword arguments of other libraries are called here, and a decorator that says so.

The table holds what similar spelling does not tell.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from pytorch_accelerated._hints.meaning import nearest

Function = TypeVar("Function", bound=Callable[..., Any])

_LOADER = (
    "It is an argument of the loader: pass `train_dataloader_kwargs={{'{0}': ...}}` to `train`, or `dataloader_kwargs` "
    "to `evaluate` and `predict`."
)
_LAUNCH = "Start the program with `accelerate launch`, such as `accelerate launch --num_processes 2 train.py`."
_OF_OPTIMIZER = "Pass it to the optimizer, such as `torch.optim.AdamW(model.parameters(), {0}=...)`."
_SAVING = "Add a `SaveTrainingStateCallback`, or a `SaveBestModelCallback`, to the `callbacks` of the Trainer."
_EVALUATING = "`train` evaluates after each epoch. For more, add a `StepBasedEvaluationCallback` to the `callbacks`."
_LIMITING = "Add a `LimitBatchesCallback` to the `callbacks` of the Trainer."
_STOPPING = "Add an `EarlyStoppingCallback` to the `callbacks` of the Trainer."
_PRECISION = 'Pass `mixed_precision="{0}"` to the Trainer.'
_LOGGING = "Add a `TensorBoardCallback`, or another `TrackerCallback`, to the `callbacks` of the Trainer."
_PROGRESS_BAR = (
    "Pass `callbacks=get_default_callbacks(progress_bar=False)` to the Trainer for no progress bar, or `verbose=False` "
    "to print nothing at all."
)
_SUMMARY = "For a table of the model, add a `ModelSummaryCallback` to the `callbacks` of the Trainer."
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
    **{name: _PRECISION.format(name) for name in ("fp16", "bf16")},
    **dict.fromkeys(("precision", "amp", "use_amp"), "mixed_precision"),
    **dict.fromkeys(("random_state", "random_seed", "manual_seed"), "seed"),
    **dict.fromkeys(("devices", "gpus", "num_nodes", "strategy", "num_processes", "tpu_cores"), _LAUNCH),
    "device": "Accelerate chooses the device; `accelerator={'cpu': True}` keeps the Trainer on the CPU.",
    **{name: _OF_OPTIMIZER.format(name) for name in ("lr", "weight_decay", "momentum", "betas")},
    "learning_rate": _OF_OPTIMIZER.format("lr"),
    "args": "Pass the settings of a run, such as `num_epochs`, to `train`.",
    "compute_metrics": "metrics",
    # saving, evaluating, reporting
    **dict.fromkeys(("resume", "resume_from_checkpoint", "ckpt_path", "checkpoint", "resume_training"), "resume_from"),
    **dict.fromkeys(("save_strategy", "default_root_dir", "enable_checkpointing"), _SAVING),
    **dict.fromkeys(("val_check_interval", "eval_steps", "eval_strategy", "evaluation_strategy"), _EVALUATING),
    **dict.fromkeys(("check_val_every_n_epoch", "validation_split"), _EVALUATING),
    **dict.fromkeys(("logger", "loggers", "report_to", "logging_steps", "log_every_n_steps"), _LOGGING),
    **dict.fromkeys(("verbose", "disable_tqdm", "enable_progress_bar", "progress_bar"), _PROGRESS_BAR),
    **dict.fromkeys(("enable_model_summary", "model_summary", "weights_summary", "summary"), _SUMMARY),
    # callbacks
    **dict.fromkeys(("monitor", "metric", "metric_name", "metric_for_best_model"), "watch_metric"),
    "early_stopping": _STOPPING,
    "start_from_epoch": "start_epoch",
    "patience": "early_stopping_patience",
    **dict.fromkeys(("min_delta", "threshold", "delta"), "early_stopping_threshold"),
    **dict.fromkeys(("mode", "comp"), _DIRECTION),
    **dict.fromkeys(("filepath", "dirpath", "filename", "path", "fname", "output_dir"), ("save_path", "save_dir")),
    **dict.fromkeys(("save_total_limit", "max_to_keep"), "max_checkpoints"),
    "save_top_k": "keep_best",
    "every_n_epochs": "save_every_n_epochs",
    "save_steps": "save_every_n_steps",
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
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            raise TypeError(" ".join(_explain_argument(label, name) for name in unknown))
        return function(*args, **kwargs)

    return cast("Function", explained)


def _explain_argument(function: str, name: str) -> str:
    own, meant = _arguments[function], _FOREIGN_ARGUMENTS.get(name, name)
    problem = f"`{function}` has no argument `{name}`."
    if isinstance(meant, str) and meant.endswith("."):
        return f"{problem} {meant}"
    candidates = (meant,) if isinstance(meant, str) else meant
    here = next((ours for ours in candidates if ours in own), None)
    if here is not None:
        return f"{problem} Here it is called `{here}`."
    for ours in candidates:
        homes = [each for each, arguments in _arguments.items() if ours in arguments]
        if homes:
            home = min(homes, key=lambda each: each not in ("Trainer", "train"))
            return f"{problem} Pass {'it' if ours == name else f'`{ours}`'} to `{home}`."
    similar = nearest(name, own, cutoff=0.7)
    return f"{problem} Did you mean `{similar}`?" if similar else f"{problem} It takes {_listed(own)}."


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
