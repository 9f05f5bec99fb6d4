"""What a callback reports every few updates: means over the updates since it last did, and learning rates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytorch_accelerated._distributed.collectives import sum_over_processes

if TYPE_CHECKING:
    import torch

    from pytorch_accelerated._run import Run
    from pytorch_accelerated._types import StateDict, StateMapping


class StepValues:
    """Means over the updates since the last report of this epoch, and over all processes.

    Nothing is read from the device, nor exchanged between processes, except for a report.

    Args:
        every_n_updates: Updates from one report to the next; ``None`` for no reports.
    """

    def __init__(self, every_n_updates: int | None) -> None:
        self.every_n_updates = every_n_updates
        self._next_update = 0
        self._sums: dict[str, list[float]] = {}
        """The sums over the epoch as of the last report, and their weights."""

    def start_run(self, num_updates: int) -> None:
        """Wait for the next report after this number of updates."""
        if self.every_n_updates is not None:
            self._next_update = (num_updates // self.every_n_updates + 1) * self.every_n_updates

    def start_epoch(self) -> None:
        """Forget the sums of the epoch before."""
        self._sums = {}

    def is_due(self, run: Run) -> bool:
        """Return whether it is time for a report, at the end of a step."""
        return self.every_n_updates is not None and run.training.progress.num_updates >= self._next_update

    def read(self, run: Run, device: torch.device) -> dict[str, float]:
        """Return the means by name, such as ``train_loss_step``. Must be called on every process.

        Args:
            run: The run.
            device: Where processes exchange tensors.
        """
        self.start_run(run.training.progress.num_updates)
        sums = run.training.epoch.means.sums("train_loss")
        if run.config.is_distributed:
            sums = {**sum_over_processes(sums, device)}
        before, self._sums = self._sums, {name: [float(total), float(weight)] for name, (total, weight) in sums.items()}
        means = {}
        for name, (total, weight) in self._sums.items():
            total_before, weight_before = before.get(name, (0.0, 0.0))
            if weight > weight_before:
                means[f"{name}_step"] = (total - total_before) / (weight - weight_before)
        return means

    def state_dict(self) -> StateDict:
        """Return the sums as of the last report."""
        return {"sums": {name: list(pair) for name, pair in self._sums.items()}}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        self._sums = {name: list(pair) for name, pair in state_dict["sums"].items()}


def learning_rates_of(optimizer: Any) -> dict[str, float]:
    """Return the learning rate of an optimizer, or that of each of its groups.

    Example:
        >>> import torch
        >>> learning_rates_of(torch.optim.SGD([torch.zeros(1)], lr=0.5))
        {'learning_rate': 0.5}
    """
    rates = [float(group["lr"]) for group in getattr(optimizer, "param_groups", ()) if "lr" in group]
    return {f"learning_rate_{i}" if len(rates) > 1 else "learning_rate": rate for i, rate in enumerate(rates)}
