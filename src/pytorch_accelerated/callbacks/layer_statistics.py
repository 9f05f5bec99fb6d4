"""A callback that looks into the layers: mean, standard deviation and zeros of activations and gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from pytorch_accelerated._arguments.numbers import check_positive_integer
from pytorch_accelerated._distributed.collectives import mean_over_processes
from pytorch_accelerated._hints.arguments import explains_arguments
from pytorch_accelerated._messages import warn
from pytorch_accelerated._models.wrappers import is_compiled
from pytorch_accelerated._views import run_of
from pytorch_accelerated.callbacks._layers import check_not_sharded, parameters_by_layer
from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from torch.utils.hooks import RemovableHandle

    from pytorch_accelerated._types import StateDict, StateMapping
    from pytorch_accelerated.trainer import Trainer

Statistic: TypeAlias = Literal["mean", "std", "zeros"]

_NUM_SUMS = 4  # of the values: their number, sum, sum of squares, and how many are zero


class LayerStatisticsCallback(TrainerCallback):
    """Looks at the activations and the gradients of each layer in one update of n.

    Of each layer the mean, the standard deviation and the share of zeros are computed on the device, over all batches
    and processes of the update. They are read at the end of the epoch. Activations are what the modules without
    children return, or the first tensor of that, in training. Gradients are those of the parameters that a module has
    itself, as the update finds them: complete, and not clipped.

    Forward hooks are on the modules during the forward passes of such an update only. A module that `torch.compile` has
    compiled calls no hooks, so that of a compiled model only the gradients are looked at.

    Args:
        every_n_updates: Look at one update in this number.
        print_table: Whether to print the table of the last update looked at, at the end of the run.

    Example:
        >>> callback = LayerStatisticsCallback(every_n_updates=100)
        >>> callback.activations("mean").shape  # updates, layers
        (0, 0)
    """

    @explains_arguments
    def __init__(self, every_n_updates: int = 50, *, print_table: bool = False) -> None:
        check_positive_integer("every_n_updates", every_n_updates, "updates")
        self.every_n_updates = every_n_updates
        self.print_table = print_table
        self.updates: list[int] = []
        """The updates looked at, counted from 1, of the epochs that are done."""

        self.activation_layers: list[str] = []
        """The names of the modules whose activations are looked at."""

        self.gradient_layers: list[str] = []
        """The names of the modules whose gradients are looked at."""

        self._activations = _Samples()
        self._gradients = _Samples()
        self._pending_updates: list[int] = []
        self._hooks: list[RemovableHandle] = []

    # --- what it has seen ----------------------------------------------------------------------------------------

    def activations(self, statistic: Statistic) -> NDArray[np.float64]:
        """Return a statistic of the activations, of shape ``(updates, layers)``, such as for a heat map.

        A layer that was not called has NaN.
        """
        return self._activations.statistic(statistic, len(self.activation_layers))

    def gradients(self, statistic: Statistic) -> NDArray[np.float64]:
        """Return a statistic of the gradients, of shape ``(updates, layers)``."""
        return self._gradients.statistic(statistic, len(self.gradient_layers))

    def __str__(self) -> str:
        """Return a table of the last update looked at."""
        if not self.updates:
            return "no update looked at so far"
        tables = [
            _table("activations", self.activation_layers, self._activations),
            _table("gradients", self.gradient_layers, self._gradients),
        ]
        return "\n".join([f"update {self.updates[-1]}", *(table for table in tables if table)])

    # --- events --------------------------------------------------------------------------------------------------

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Find the layers.

        Raises:
            ValueError: The run splits the parameters over the processes.
        """
        check_not_sharded(trainer, type(self).__name__, "Remove the callback.")
        run, model = run_of(trainer), trainer.get_model()
        if any(is_compiled(module) for module in model.modules()):
            self.activation_layers = []
            warn(
                "`LayerStatisticsCallback` sees no activations of a compiled model, which calls no hooks; it looks at "
                "the gradients only. Train without `torch.compile` for a while to see the activations."
            )
        else:
            self.activation_layers = list(_leaves_of(model))
        self.gradient_layers = list(parameters_by_layer(model, run.outside_parameters))
        if not run.is_resumed:
            self.updates, self._pending_updates = [], []
            self._activations, self._gradients = _Samples(), _Samples()
        elif run.process_index > 0:  # what was saved is that of all processes, and counts once
            self._activations.forget_open()

    def on_train_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Watch the forward pass of this step, if its update is one to look at."""
        run = run_of(trainer)
        if run.progress.num_updates % self.every_n_updates != 0 or not self.activation_layers:
            return
        sums = self._activations.open_sample(len(self.activation_layers), trainer.device)
        if not run.training.current_pass.is_dummy_step:
            for index, module in enumerate(_leaves_of(trainer.get_model()).values()):
                self._hooks.append(module.register_forward_hook(_Adding(sums[index])))

    def on_backward_start(self, trainer: Trainer, batch: Any = None, batch_output: Any = None, **kwargs: Any) -> None:
        """Stop watching."""
        self._remove_hooks()

    def on_optimizer_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look at the gradients."""
        run = run_of(trainer)
        if run.progress.num_updates % self.every_n_updates != 0:
            return
        layers = parameters_by_layer(trainer.get_model(), run.outside_parameters)
        sums = self._gradients.open_sample(len(self.gradient_layers), trainer.device)
        for index, name in enumerate(self.gradient_layers):
            for parameter in layers.get(name, []):
                if parameter.grad is not None:
                    _add(sums[index], parameter.grad)
        self._gradients.close_sample()
        self._activations.close_sample()
        self._pending_updates.append(run.progress.num_updates + 1)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Read what was computed in the epoch."""
        self._collect(trainer)

    def on_training_state_save(self, trainer: Trainer, **kwargs: Any) -> None:
        """Read what was computed so far."""
        self._collect(trainer)

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Read what a run that was stopped has computed, and print the table."""
        self._remove_hooks()
        self._collect(trainer)
        if self.print_table:
            trainer.print(f"\n{self}")

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        """Stop watching."""
        self._remove_hooks()

    def on_exception(self, trainer: Trainer, *, exception: BaseException, **kwargs: Any) -> None:
        """Stop watching."""
        self._remove_hooks()

    def state_dict(self) -> StateDict:
        """Return all sums."""
        return {
            "updates": list(self.updates),
            "activations": self._activations.state_dict(),
            "gradients": self._gradients.state_dict(),
        }

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        self.updates = list(state_dict["updates"])
        self._activations.load_state_dict(state_dict["activations"])
        self._gradients.load_state_dict(state_dict["gradients"])

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _collect(self, trainer: Trainer) -> None:
        """Read the sums of all processes from the device. Must be called on every process."""
        num_processes = trainer.run_config.num_processes
        self._activations.collect(num_processes)
        self._gradients.collect(num_processes=1)  # all processes have the same gradients
        self.updates += self._pending_updates
        self._pending_updates = []


class _Samples:
    """The sums of each layer in each update looked at."""

    def __init__(self) -> None:
        self._collected: list[torch.Tensor] = []
        self._pending: list[torch.Tensor] = []
        self._open: torch.Tensor | None = None
        self._open_of_all: torch.Tensor | None = None

    def open_sample(self, num_layers: int, device: torch.device) -> torch.Tensor:
        """Return the sums of the update under way, of shape ``(layers, 4)``, on the device."""
        if self._open is None:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._open = torch.zeros(num_layers, _NUM_SUMS, dtype=dtype, device=device)
        elif self._open.device != device:  # it was saved
            self._open = self._open.to(device)
        return self._open

    def close_sample(self) -> None:
        """End the update."""
        if self._open is not None:
            self._pending.append(self._open)
            self._open = None

    def forget_open(self) -> None:
        """Start the update under way from nothing, if it has any sums."""
        if self._open is not None:
            self._open = torch.zeros_like(self._open)

    def collect(self, num_processes: int) -> None:
        """Add up the sums over the processes, and read them. Must be called on every process."""
        waiting = [*self._pending, *([] if self._open is None else [self._open])]
        if not waiting:
            self._open_of_all = None
            return
        sums = (mean_over_processes(torch.stack(waiting), num_processes) * num_processes).cpu()
        self._open_of_all = None if self._open is None else sums[-1].clone()
        self._collected += [each.clone() for each in sums[: len(self._pending)]]
        self._pending = []

    def statistic(self, statistic: Statistic, num_layers: int) -> NDArray[np.float64]:
        """Return a statistic of what was collected, of shape ``(updates, layers)``."""
        if not self._collected:
            return np.zeros((0, num_layers))
        count, total, squares, zeros = torch.stack(self._collected).double().unbind(dim=-1)
        mean = total / count  # NaN of a layer without values
        values = {"mean": mean, "std": (squares / count - mean.square()).clamp(min=0).sqrt(), "zeros": zeros / count}
        if statistic not in values:
            raise ValueError(f"`statistic` is {statistic!r}. Expected one of {list(values)}.")
        result: NDArray[np.float64] = values[statistic].numpy()
        return result

    def state_dict(self) -> StateDict:
        """Return all sums, as of the last collection."""
        return {"collected": list(self._collected), "open": self._open_of_all}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        self._collected, self._open = list(state_dict["collected"]), state_dict["open"]
        self._pending = []


class _Adding:
    """A forward hook that adds the output of a module to sums.

    Args:
        sums: A row of 4 numbers, changed in place.
    """

    def __init__(self, sums: torch.Tensor) -> None:
        self._sums = sums

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        values = output if isinstance(output, torch.Tensor) else _first_tensor(output)
        if values is not None and values.is_floating_point():
            _add(self._sums, values)


def _first_tensor(output: Any) -> torch.Tensor | None:
    items: Iterable[Any] = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
    return next((item for item in items if isinstance(item, torch.Tensor)), None)


@torch.no_grad()
def _add(sums: torch.Tensor, tensor: torch.Tensor) -> None:
    values = tensor.detach()
    dense = values.coalesce().values() if values.is_sparse else values
    wide = dense.to(sums.device, sums.dtype)
    num_zeros = (dense == 0).sum().to(sums.device) + values.numel() - dense.numel()
    sums[0] += values.numel()
    sums[1] += wide.sum()
    sums[2] += wide.square().sum()
    sums[3] += num_zeros


def _leaves_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name or "model": module for name, module in model.named_modules() if not any(module.children())}


def _table(title: str, layers: list[str], samples: _Samples) -> str:
    if not layers:
        return ""
    columns = [samples.statistic(statistic, len(layers))[-1] for statistic in ("mean", "std", "zeros")]
    width = max(len(name) for name in [*layers, title])
    lines = [f"{title:<{width}}  {'mean':>10}  {'std':>10}  {'zeros':>6}"]
    for name, mean, std, zeros in zip(layers, *columns, strict=True):
        lines.append(f"{name:<{width}}  {mean:10.3e}  {std:10.3e}  {zeros:6.1%}")
    return "\n".join(lines)
