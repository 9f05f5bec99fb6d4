"""A callback that unfreezes the layer groups of a model on a schedule."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from pytorch_accelerated._arguments.numbers import check_positive_integer
from pytorch_accelerated._hints.arguments import explains_arguments
from pytorch_accelerated._views import run_of
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.finetuning import ModelFreezer, discriminative_parameter_groups, group_parameters

if TYPE_CHECKING:
    from pytorch_accelerated._types import StateDict, StateMapping
    from pytorch_accelerated.trainer import Trainer


class GradualUnfreezingCallback(TrainerCallback):
    """Freezes a model when a run starts, and unfreezes its layer groups on a schedule, from the last to the first.

    The run starts by training only the last layer group that has parameters, usually the head, so that the gradients of
    its random weights do not damage the pretrained ones. :mod:`pytorch_accelerated.finetuning` defines layer groups.
    Source: Howard and Ruder, 2018, "Universal Language Model Fine-tuning for Text Classification", arXiv:1801.06146,
    section 3.3.

    The optimizer may hold all parameters, or only those of the head. Missing ones are added when the trainer is
    created, one parameter group per layer group, so that schedulers and resumed runs have the same groups throughout.
    An optimizer skips frozen parameters. All learning rates follow their schedule from the start of the run.

    With several processes the model must be wrapped in ``DistributedDataParallel``, which synchronizes only parameters
    that were trainable when it was created. Leave the freezing to this callback in that case. The gradients of frozen
    layers are still computed, and dropped before each update: the result is the same, but no time or memory is saved.

    Args:
        schedule: Number of epochs after which each further layer group is unfrozen; groups without parameters do not
            count. Or a dictionary from epochs (the first is 1) to the index of the first layer group that is trained
            from then on; negative indices count from the end.
        lr_decay_factor: Ratio of the learning rates of neighboring layer groups, for parameters that the optimizer
            lacked. The last group gets the learning rate of the optimizer's first parameter group.
        freeze_batch_norms: Whether batch norms are frozen too; see `ModelFreezer`.
        set_modules_as_eval: Whether frozen modules are kept in evaluation mode.

    Raises:
        ValueError: An epoch in ``schedule`` is below 1.
        TypeError: An epoch in ``schedule`` is not an integer.

    Example:
        >>> one_group_more_every_two_epochs = GradualUnfreezingCallback(schedule=2)
        >>> two_groups_then_all = GradualUnfreezingCallback({1: -2, 5: 0}, lr_decay_factor=0.4)
    """

    @explains_arguments
    def __init__(
        self,
        schedule: int | Mapping[int, int] = 1,
        lr_decay_factor: float = 1.0,
        freeze_batch_norms: bool = False,
        set_modules_as_eval: bool = False,
    ) -> None:
        if isinstance(schedule, Mapping):
            for epoch in schedule:
                check_positive_integer("epoch in schedule", epoch, "epochs")
        else:
            check_positive_integer("schedule", schedule, "epochs")
        self.schedule = schedule
        self.lr_decay_factor = lr_decay_factor
        self.freeze_batch_norms = freeze_batch_norms
        self.set_modules_as_eval = set_modules_as_eval
        self._first_trained_group: int | None = None
        self._untrained_parameters: set[nn.Parameter] = set()

    def on_init_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Add missing parameters to the optimizer, before a scheduler is created for its groups."""
        if isinstance(trainer.model, nn.Module) and isinstance(trainer.optimizer, Optimizer):
            self._complete_optimizer(trainer)

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Freeze the layer groups that are not due yet.

        Raises:
            IndexError: The schedule names a layer group that does not exist.
            RuntimeError: Parameters that the schedule unfreezes cannot be trained in this run.
        """
        self._check_schedule(trainer.model)
        if trainer.run_config.is_distributed:
            self._check_wrapper(trainer.model)
        self._complete_optimizer(trainer)
        if not run_of(trainer).is_resumed:
            self._first_trained_group = None
        self._first_trained_group = self._group_due(trainer)
        self._freeze_before(self._first_trained_group, trainer.model, trainer.run_config.is_distributed)

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Unfreeze the layer groups that are due."""
        first = self._group_due(trainer)
        if first == self._first_trained_group:
            return
        self._first_trained_group = first
        ModelFreezer(trainer.model, should_keep_frozen=True).unfreeze(to_index=first)
        for parameters in group_parameters(trainer.model)[first:]:
            self._untrained_parameters.difference_update(parameters)

    def on_optimizer_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Drop the gradients of layers that count as frozen; needed with several processes only."""
        for parameter in self._untrained_parameters:
            parameter.grad = None

    def state_dict(self) -> StateDict:
        """Return the index of the first trained layer group."""
        return {"first_trained_group": self._first_trained_group}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned. Layer groups that were trained stay trainable."""
        self._first_trained_group = state_dict["first_trained_group"]

    def _group_due(self, trainer: Trainer) -> int:
        groups = group_parameters(trainer.model)
        first = _first_group_to_train(self.schedule, trainer.run_history.current_epoch, groups)
        return first if self._first_trained_group is None else min(first, self._first_trained_group)

    def _freeze_before(self, first: int, model: nn.Module, is_distributed: bool) -> None:
        freezer = ModelFreezer(model, self.freeze_batch_norms, should_keep_frozen=True)
        freezer.unfreeze(to_index=first)
        trainable = freezer.get_trainable_parameters()
        if first > 0:
            freezer.freeze(to_index=first - 1, set_modules_as_eval=self.set_modules_as_eval)
        self._untrained_parameters = set()
        if is_distributed:
            self._untrained_parameters.update(p for p in trainable if not p.requires_grad)
            for parameter in self._untrained_parameters:
                parameter.requires_grad = True  # the wrapper waits for the gradients of all its parameters

    def _complete_optimizer(self, trainer: Trainer) -> None:
        optimizer = trainer.optimizer
        known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        lr = optimizer.param_groups[0]["lr"]
        for group in discriminative_parameter_groups(trainer.model, lr, self.lr_decay_factor):
            missing = [parameter for parameter in group["params"] if parameter not in known]
            if missing and trainer.scheduler is not None:
                raise RuntimeError(
                    f"The optimizer lacks parameters that `{type(self).__name__}` unfreezes, but its scheduler exists "
                    "already, so they cannot be added. Pass the callback to `Trainer(callbacks=...)`, which adds them "
                    "in time, or pass all parameters to the optimizer."
                )
            if missing:
                optimizer.add_param_group({**group, "params": missing})

    def _check_schedule(self, model: nn.Module) -> None:
        if not isinstance(self.schedule, Mapping):
            return
        num_groups = len(group_parameters(model))
        wrong = [index for index in self.schedule.values() if not -num_groups <= index < num_groups]
        if wrong:
            raise IndexError(
                f"`schedule` names layer group {wrong[0]}, but the model has {num_groups} groups, with indices from "
                f"{-num_groups} to {num_groups - 1}. `ModelFreezer(model).get_layer_groups()` lists them."
            )

    def _check_wrapper(self, model: nn.Module) -> None:
        if not any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
            raise RuntimeError(
                f"The model of this distributed run is a {type(model).__name__}, but `{type(self).__name__}` needs it "
                "to be wrapped in `DistributedDataParallel`. Use that wrapper or a single process, or use "
                "`ModelFreezer` between runs."
            )
        groups = group_parameters(model)
        first = _first_group_to_train(self.schedule, sys.maxsize, groups)
        num_frozen = sum(not p.requires_grad for parameters in groups[first:] for p in parameters)
        if num_frozen:
            raise RuntimeError(
                f"{num_frozen} parameters that `schedule` unfreezes were frozen when the model was wrapped in "
                "`DistributedDataParallel`, which never synchronizes their gradients. Do not freeze them yourself: "
                f"leave the freezing to `{type(self).__name__}`."
            )


def _first_group_to_train(
    schedule: int | Mapping[int, int], epoch: int, groups: Sequence[Sequence[nn.Parameter]]
) -> int:
    with_parameters = [idx for idx, parameters in enumerate(groups) if parameters]
    if isinstance(schedule, Mapping):
        due = [index % len(groups) for first_epoch, index in schedule.items() if first_epoch <= epoch]
        return min([with_parameters[-1], *due])
    num_more = min((epoch - 1) // schedule, len(with_parameters) - 1)
    return with_parameters[-1 - num_more]
