"""A callback that prints a table of the model when training starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from pytorch_accelerated._arguments.numbers import check_positive_integer
from pytorch_accelerated._hints.arguments import explains_arguments
from pytorch_accelerated._messages import warn
from pytorch_accelerated._models.output_shapes import ShapeRecorder, all_modules, run_with_recorder
from pytorch_accelerated._models.wrappers import (
    is_compiled,
    is_compiled_in_place,
    without_compilation,
    without_wrappers,
)
from pytorch_accelerated._types import StateMapping
from pytorch_accelerated._views import run_of
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.summary import ModelSummary, build_summary, modules_left_in_eval_mode

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from pytorch_accelerated.trainer import Trainer

_MAX_NAMES = 4


class ModelSummaryCallback(TrainerCallback):
    """Prints a table of the model in the first training step of each run: see `pytorch_accelerated.summary`.

    The shapes of outputs are those of the first training batch on the main process. They are noted while the step runs,
    so the model is not called once more, and training is bit for bit the same. Only if a part of the model is compiled
    is it called with the same arguments without compilation, which leaves no trace. Models that are sharded, or were
    compiled with ``Module.compile``, are shown without shapes.

    The table has all models of the trainer: ``trainer.model``, and other modules with parameters among its attributes.

    It also warns of modules that are in evaluation mode although the model trains, unless `ModelFreezer` keeps them
    there or all their parameters are frozen. (The trainer itself warns of parameters that no optimizer holds, and of an
    accumulation that is longer than the epoch.)

    Args:
        depth: How many levels of modules to show; 1 for the layer groups, ``None`` for all.

    Raises:
        TypeError: ``depth`` is not an integer.
        ValueError: ``depth`` is below 1.
    """

    summary: ModelSummary | None = None
    """The table of the last run, on the main process; ``None`` before the first."""

    @explains_arguments
    def __init__(self, depth: int | None = 1) -> None:
        if depth is not None:
            check_positive_integer("depth", depth, "levels of modules")
        self.depth = depth
        self._is_due = False
        self._left_in_eval_mode: list[str] = []
        self._hooks: list[RemovableHandle | ShapeRecorder] = []

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Make the table due."""
        self._remove_hooks()
        self._is_due = trainer.run_config.is_world_process_zero

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Prepare to note the shapes in the first step."""
        if not self._is_due or self._hooks:
            return
        models = _models_of(trainer)
        if run_of(trainer).is_sharded or is_compiled_in_place(without_compilation(trainer.model)):
            self._show(trainer)
        elif any(is_compiled(module) or is_compiled_in_place(module) for module in all_modules([trainer.model])):
            self._hooks = [_call_before(trainer.model, partial(self._show_shapes_without_compilation, trainer))]
        else:
            recorder = ShapeRecorder(models.values())
            self._hooks = [recorder]
            if len(models) == 1:  # otherwise, the others may be called after the first
                show = partial(self._show_in_training, trainer, recorder)
                self._hooks.append(models["model"].register_forward_hook(lambda *_: show()))

    def on_log_point(self, trainer: Trainer, **kwargs: Any) -> None:
        """Show the table if that has to wait for all models, or the model itself is never called."""
        self._finish(trainer)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Show the table at the latest."""
        self._finish(trainer)

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Remove the hooks of a run that ended in its first step."""
        self._give_up()

    def on_exception(self, trainer: Trainer, *, exception: BaseException, **kwargs: Any) -> None:
        """Remove the hooks of a run that failed in its first step."""
        self._give_up()

    def _finish(self, trainer: Trainer) -> None:
        if not _is_training(trainer):
            return
        if self._is_due:
            recorders = [each for each in self._hooks if isinstance(each, ShapeRecorder)]
            self._show(trainer, *recorders)
        if self._left_in_eval_mode:  # not in a hook, where the warning would point into PyTorch
            names, self._left_in_eval_mode = self._left_in_eval_mode, []
            _warn_about_eval_mode(names)

    def _show_in_training(self, trainer: Trainer, recorder: ShapeRecorder) -> None:
        if _is_training(trainer):
            self._show(trainer, recorder)

    def _show_shapes_without_compilation(self, trainer: Trainer, args: tuple[Any, ...], kwargs: StateMapping) -> None:
        if not _is_training(trainer):
            return
        self._remove_hooks()
        try:
            _, recorder = run_with_recorder(_models_of(trainer)["model"], args, kwargs)
        except Exception as error:  # the run must not end because of a table
            self._show(trainer)
            trainer.print(f"Without compilation, the model raised {error!r}, so the shapes of its outputs are unknown.")
        else:
            self._show(trainer, recorder)

    def _show(self, trainer: Trainer, recorder: ShapeRecorder | None = None) -> None:
        models = _models_of(trainer)
        self._is_due = False
        self._remove_hooks()
        shape_functions = {} if recorder is None else dict.fromkeys(models, recorder.shape_of)
        self.summary = build_summary(models, self.depth, shape_functions)
        self._left_in_eval_mode = modules_left_in_eval_mode(models["model"])
        trainer.print(f"\n{self.summary}\n")

    def _give_up(self) -> None:
        self._is_due, self._left_in_eval_mode = False, []
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for each in self._hooks:
            each.remove()
        self._hooks = []


def _is_training(trainer: Trainer) -> bool:
    """Tell whether a training step is under way, and no evaluation or prediction that a callback has asked for."""
    run = run_of(trainer)
    return run.is_training_run and not run.is_evaluating


def _models_of(trainer: Trainer) -> dict[str, nn.Module]:
    """Return the models of a trainer by name, without wrappers: no module that is a part of another one."""
    models = {"model": without_wrappers(trainer.get_model())}
    for name, value in vars(trainer).items():
        if name != "model" and isinstance(value, nn.Module) and any(True for _ in value.parameters()):
            models[name] = without_wrappers(value)
    parts = {part for model in models.values() for part in model.modules() if part is not model}
    names = {model: name for name, model in reversed(models.items()) if model not in parts or name == "model"}
    return {name: model for name, model in models.items() if names.get(model) == name}


def _call_before(model: nn.Module, function: Callable[[tuple[Any, ...], StateMapping], None]) -> RemovableHandle:
    """Call a function with the arguments of each call of a model; a compiled one compiles only hooks inside it."""
    return model.register_forward_pre_hook(lambda _, args, kwargs: function(args, kwargs), with_kwargs=True)


def _warn_about_eval_mode(names: Sequence[str]) -> None:
    shown = ", ".join(map(repr, names[:_MAX_NAMES]))
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    warn(
        f"Training has started with parts of the model in evaluation mode: {shown}{more}. There, "
        "dropout does nothing, and batch norms keep their statistics. Call `train()` of the model in "
        "`train_epoch_start`, as the trainer does by default. If it is intended, freeze these parts with "
        "`ModelFreezer.freeze(set_modules_as_eval=True)`, and this warning ends."
    )
