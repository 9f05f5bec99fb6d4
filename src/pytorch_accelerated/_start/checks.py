"""What is refused before a run, and what the user is warned of because it is probably a mistake."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytorch_accelerated._arguments.parts import check_loss_func, check_model, check_optimizer, check_trainable
from pytorch_accelerated._data.checks import check_is_dataset, check_loader_arguments
from pytorch_accelerated._data.checks import warn_about_ready_loaders as warn_about_arguments_beside
from pytorch_accelerated._distributed.consensus import overrides_any
from pytorch_accelerated._hints.classes import find_uncalled, words_of_user
from pytorch_accelerated._hints.hooks import hook_meant
from pytorch_accelerated._messages import warn
from pytorch_accelerated._optimizers import checks as optimizer_checks
from pytorch_accelerated._scheduling.checks import check_create_scheduler_fn
from pytorch_accelerated._views import run_of
from pytorch_accelerated.callbacks import EVENTS, LogMetricsCallback, PrintProgressCallback, ProgressBarCallback
from pytorch_accelerated.callbacks._checks import say_what_is_missing
from pytorch_accelerated.callbacks.handler import CallbackHandler

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pytorch_accelerated._types import CollateFunction, Data, DataLoaderKwargs, EvalData
    from pytorch_accelerated.trainer import Trainer

_REPORTING = (PrintProgressCallback, ProgressBarCallback, LogMetricsCallback)


def check_parts_of_training(trainer: Trainer, create_scheduler_fn: object, is_sharded: bool) -> Optimizer:
    """Refuse a model, loss function, optimizer or scheduler function that is not one.

    A subclass with its own step may use any loss function, one with its own `create_scheduler` any scheduler.

    Returns:
        The optimizer; a group, if the program has set several since the trainer was created.
    """
    if not overrides_any(trainer, ["create_scheduler"]):
        check_create_scheduler_fn(create_scheduler_fn)
    check_model(trainer.model)
    if not overrides_any(trainer, ["calculate_train_batch_loss"]):
        check_loss_func(trainer.loss_func)
    optimizer: Optimizer = optimizer_checks.as_optimizer(trainer.optimizer)
    check_optimizer(optimizer)
    optimizer_checks.check_group(optimizer, is_sharded=is_sharded)
    if not overrides_any(trainer, ["optimizer_step"]):
        optimizer_checks.check_step(optimizer)
    check_trainable(trainer.model, trainer.loss_func, optimizer)
    return optimizer


def warn_about_uncalled_hooks(trainer: Trainer) -> None:
    """Warn about methods that look like a hook or an event, but that nothing calls."""
    handler: object = trainer.callback_handler  # that of a subclass may be of any class
    callbacks = handler.with_nested_callbacks() if isinstance(handler, CallbackHandler) else []
    words = {word for callback in callbacks for word in words_of_user(type(callback))}
    name = type(trainer).__name__
    for method, remedy in find_uncalled(type(trainer), lambda name: hook_meant(name, EVENTS), words).items():
        warn(
            f"`{name}.{method}` is not a hook of the Trainer, so nothing calls it. {remedy} If your program calls it "
            "itself, choose a name that differs more."
        )


def tell_what_is_missing(trainer: Trainer) -> None:
    """Say so if none of the callbacks that replace the default ones prints anything."""
    say_what_is_missing(trainer.callback_handler.with_nested_callbacks(), _REPORTING)


def warn_about_ready_loaders(
    trainer: Trainer,
    data: tuple[Data | None, EvalData | None],
    batch_size: int,
    collate_fn: CollateFunction | None,
    dl_kwargs: tuple[DataLoaderKwargs | None, ...],
) -> None:
    """Warn about loader arguments next to a ready loader, unless a subclass creates its loaders itself."""
    if overrides_any(trainer, ["create_train_dataloader", "create_eval_dataloader"]):
        return
    names = ["dataloader_kwargs"] if len(dl_kwargs) == 1 else ["train_dataloader_kwargs", "eval_dataloader_kwargs"]
    warn_about_arguments_beside(*data, batch_size, collate_fn, dict(zip(names, dl_kwargs, strict=True)))


def check_data(
    trainer: Trainer, name: str, data: object, dl_kwargs: DataLoaderKwargs | None, loader_class: type
) -> None:
    """Refuse what is no dataset, and unknown loader arguments, unless a subclass creates its loaders itself."""
    kind = name.removesuffix("_dataset")
    if overrides_any(trainer, [f"create_{kind}_dataloader"]):
        return
    is_training = kind == "train" or run_of(trainer).is_training_run
    prefix = f"{kind}_" if is_training else ""  # `evaluate` and `predict` have one dataset
    check_loader_arguments(f"{prefix}dataloader_kwargs", dl_kwargs, loader_class)
    check_is_dataset(f"{prefix}dataset", data, trainer.collate_fn or (dl_kwargs or {}).get("collate_fn"))
