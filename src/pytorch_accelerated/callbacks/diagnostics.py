"""Callbacks that record what the optimizer does: gradient norms, sizes of updates, learning rates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytorch_accelerated._arguments.numbers import check_positive_integer
from pytorch_accelerated._distributed.fast_path import unwrap_optimizer
from pytorch_accelerated._hints.arguments import explains_arguments
from pytorch_accelerated._means import LossTracker, weighted_mean
from pytorch_accelerated._optimizers.group import optimizers_in
from pytorch_accelerated._views import run_of
from pytorch_accelerated.callbacks._layers import check_not_sharded, joint_norm, norms_by_layer, parameters_by_layer
from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from pytorch_accelerated._types import StateDict, StateMapping
    from pytorch_accelerated.tracking import RunHistory
    from pytorch_accelerated.trainer import Trainer


class _EpochMeansByLayer:
    """Means over the sampled updates of an epoch: one of the whole model, and one of each layer."""

    def __init__(self) -> None:
        self.total = LossTracker()
        self.layers: dict[str, LossTracker] = {}

    def reset(self) -> None:
        """Forget all values."""
        self.total.reset()
        self.layers = {}

    def update_layer(self, layer: str, value: torch.Tensor, weight: float | torch.Tensor = 1) -> None:
        """Add the value of a layer."""
        self.layers.setdefault(layer, LossTracker()).update(value, weight)

    def record(self, history: RunHistory, metric_name: str) -> None:
        """Record the means under the name, and this followed by the layer, where there is a value; then forget them."""
        trackers = {metric_name: self.total, **{f"{metric_name}_{layer}": each for layer, each in self.layers.items()}}
        for name, tracker in trackers.items():
            if float(tracker.running_count) > 0:
                history.update_metric(name, weighted_mean(tracker.total_loss, tracker.running_count))
        self.reset()

    def state_dict(self) -> StateDict:
        """Return all sums."""
        layers = {name: each.state_dict() for name, each in self.layers.items()}
        return {**self.total.state_dict(), **({"layers": layers} if layers else {})}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        self.reset()
        self.total.load_state_dict(state_dict)
        for name, state in state_dict.get("layers", {}).items():
            tracker = self.layers[name] = LossTracker()
            tracker.load_state_dict(state)


class GradientNormCallback(TrainerCallback):
    """Records the norm of all gradients before clipping, averaged over the updates of each epoch.

    Where ``train(..., gradient_clip_norm=...)`` clips by this norm, it is computed already. Otherwise that takes a pass
    over the gradients. They are those of an update: of all its batches and processes. Norms are read from the device
    only at the end of the epoch.

    Args:
        metric_name: Name of the metric in the run history.
        every_n_updates: Look at one update in this number.
        per_layer: Whether to record the norm of each layer too: of each module that has parameters itself, as
            ``metric_name`` + ``_`` + the name of the module.

    Example:
        >>> callback = GradientNormCallback(every_n_updates=10, per_layer=True)
    """

    @explains_arguments
    def __init__(
        self, metric_name: str = "train_gradient_norm", *, every_n_updates: int = 1, per_layer: bool = False
    ) -> None:
        check_positive_integer("every_n_updates", every_n_updates, "updates")
        self.metric_name = metric_name
        self.every_n_updates = every_n_updates
        self.per_layer = per_layer
        self._norms = _EpochMeansByLayer()

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check that the run has gradients to look at.

        Raises:
            ValueError: The run splits the parameters over the processes.
        """
        if self.per_layer or trainer.run_config.gradient_clip_norm is None:
            check_not_sharded(
                trainer, type(self).__name__, "Leave out `per_layer`, and pass `gradient_clip_norm`, to `train`."
            )
        if not run_of(trainer).is_resumed:
            self._norms.reset()

    def on_optimizer_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Add the norms of this update, as far as clipping does not compute them."""
        run, is_clipped = run_of(trainer), trainer.run_config.gradient_clip_norm is not None
        if run.progress.num_updates % self.every_n_updates != 0 or (is_clipped and not self.per_layer):
            return
        layers = parameters_by_layer(trainer.get_model(), run.outside_parameters)
        norms = norms_by_layer({name: [each.grad for each in parameters] for name, parameters in layers.items()})
        if not is_clipped and norms:
            self._norms.total.update(joint_norm(norms.values()))
        if self.per_layer:
            for name, norm in norms.items():
                self._norms.update_layer(name, norm)

    def on_optimizer_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Add the norm of this update that clipping has computed."""
        run = run_of(trainer)
        is_due = (run.progress.num_updates - 1) % self.every_n_updates == 0
        if is_due and trainer.run_config.gradient_clip_norm is not None and run.gradient_norm is not None:
            self._norms.total.update(run.gradient_norm)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Record the means over the epoch."""
        self._norms.record(trainer.run_history, self.metric_name)

    def state_dict(self) -> StateDict:
        """Return the sums and the numbers of this epoch's norms so far."""
        return self._norms.state_dict()

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        self._norms.load_state_dict(state_dict)


class UpdateRatioCallback(TrainerCallback):
    r"""Records how large an update is in relation to the weights, averaged over the sampled updates of each epoch.

    With the weights :math:`w` before an update and :math:`w'` after it, the ratio is
    :math:`\lVert w' - w \rVert / \lVert w \rVert`, of the whole model and of each layer. Around 1e-3 is usual; much
    less learns slowly, much more is unstable. A copy of the weights is kept during an update that is looked at. Layers
    whose weights are all zero, and updates that infinite fp16 gradients have skipped, do not count.

    Args:
        metric_name: Name of the metric in the run history. That of a layer has ``_`` and its name behind.
        every_n_updates: Look at one update in this number.
        per_layer: Whether to record the ratio of each layer too.

    Example:
        >>> callback = UpdateRatioCallback(every_n_updates=100)
    """

    @explains_arguments
    def __init__(
        self, metric_name: str = "train_update_ratio", *, every_n_updates: int = 10, per_layer: bool = True
    ) -> None:
        check_positive_integer("every_n_updates", every_n_updates, "updates")
        self.metric_name = metric_name
        self.every_n_updates = every_n_updates
        self.per_layer = per_layer
        self._ratios = _EpochMeansByLayer()
        self._before: dict[str, list[torch.Tensor]] = {}

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check that the run has weights to look at.

        Raises:
            ValueError: The run splits the parameters over the processes.
        """
        check_not_sharded(trainer, type(self).__name__, "Remove the callback.")
        if not run_of(trainer).is_resumed:
            self._ratios.reset()

    def on_optimizer_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Copy the weights, if this update is one to look at."""
        if run_of(trainer).progress.num_updates % self.every_n_updates == 0:
            layers = self._layers(trainer)
            self._before = {name: [each.detach().clone() for each in group] for name, group in layers.items()}

    def on_optimizer_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Add the ratios of this update."""
        before, self._before = self._before, {}
        if not before or getattr(trainer.optimizer, "step_was_skipped", False) is True:
            return
        after = self._layers(trainer)
        changes = {
            name: [new.detach() - old for new, old in zip(after[name], group, strict=True)]
            for name, group in before.items()
        }
        sizes, weights = norms_by_layer(changes), norms_by_layer(before)
        self._ratios.total.update(*_ratio(joint_norm(sizes.values()), joint_norm(weights.values())))
        if self.per_layer:
            for name, size in sizes.items():
                self._ratios.update_layer(name, *_ratio(size, weights[name]))

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Record the means over the epoch."""
        self._ratios.record(trainer.run_history, self.metric_name)

    def on_exception(self, trainer: Trainer, *, exception: BaseException, **kwargs: Any) -> None:
        """Free the copy of the weights."""
        self._before = {}

    def state_dict(self) -> StateDict:
        """Return the sums and the numbers of this epoch's ratios so far."""
        return self._ratios.state_dict()

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        self._ratios.load_state_dict(state_dict)

    def _layers(self, trainer: Trainer) -> dict[str, list[torch.Tensor]]:
        return parameters_by_layer(trainer.get_model(), run_of(trainer).outside_parameters)


def _ratio(size: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a ratio and how much it counts, which is nothing if its divisor is 0; without a read from the device."""
    counts = weight > 0
    return torch.where(counts, size / torch.where(counts, weight, 1), 0), counts.to(weight.dtype)


class LearningRateCallback(TrainerCallback):
    """Records the learning rate, and the momentum if the optimizer has one.

    What is recorded at the end of the training part of an epoch, as ``lr`` and ``momentum``, is what the last update
    was made with. Of several parameter groups each has a metric of its own, with its number behind, such as ``lr_0``,
    or with its ``"name"``, if it has that entry. Of several optimizers, their names come first: ``lr_generator``,
    ``lr_generator_0``. The momentum of Adam is its first beta.

    Args:
        every_n_updates: Record within the epoch too, after one update in this number. The number of updates done is
            recorded next to each value, as ``lr_update``. ``None`` for the end of the epoch only.
        momentum: Whether to record the momentum.

    Example:
        >>> callback = LearningRateCallback(every_n_updates=100)
    """

    @explains_arguments
    def __init__(self, every_n_updates: int | None = None, *, momentum: bool = True) -> None:
        if every_n_updates is not None:
            check_positive_integer("every_n_updates", every_n_updates, "updates")
        self.every_n_updates = every_n_updates
        self.momentum = momentum
        self._latest: dict[str, Any] = {}

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Forget an earlier run."""
        if not run_of(trainer).is_resumed:
            self._latest = {}

    def on_optimizer_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Note what the update is made with."""
        self._latest = dict(self._settings(trainer))

    def on_optimizer_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Record it, if it is time."""
        if self.every_n_updates is not None and run_of(trainer).progress.num_updates % self.every_n_updates == 0:
            self._record(trainer)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Record what the last update was made with, unless that has been recorded."""
        num_updates = run_of(trainer).progress.num_updates
        if self.every_n_updates is None or num_updates % self.every_n_updates != 0:
            self._record(trainer)

    def state_dict(self) -> StateDict:
        """Return what the last update was made with."""
        return {"latest": {name: float(value) for name, value in self._latest.items()}}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        self._latest = dict(state_dict["latest"])

    def _record(self, trainer: Trainer) -> None:
        if self.every_n_updates is not None:
            trainer.run_history.update_metric("lr_update", run_of(trainer).progress.num_updates)
        for name, value in self._latest.items():
            trainer.run_history.update_metric(name, float(value))

    def _settings(self, trainer: Trainer) -> dict[str, Any]:
        settings = {}
        for optimizer_name, optimizer in optimizers_in(unwrap_optimizer(trainer.optimizer)).items():
            groups = optimizer.param_groups
            for index, group in enumerate(groups):
                label = group.get("name", index) if len(groups) > 1 else ""
                suffix = "".join(f"_{part}" for part in (optimizer_name, label) if part != "")
                settings[f"lr{suffix}"] = _kept(group["lr"]) if "lr" in group else float("nan")
                momentum = _momentum_of(group) if self.momentum else None
                if momentum is not None:
                    settings[f"momentum{suffix}"] = _kept(momentum)
        return settings


def _kept(value: Any) -> Any:
    """Return a setting that stays as it is: a tensor is changed in place by a scheduler."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _momentum_of(group: dict[str, Any]) -> Any:
    betas = group.get("betas")
    return group.get("momentum") if betas is None else betas[0]
