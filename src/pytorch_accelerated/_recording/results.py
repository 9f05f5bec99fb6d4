"""The results of a pass over the data, at its end."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pytorch_accelerated._distributed.collectives import all_gather_nested, sum_over_processes
from pytorch_accelerated._means import weighted_mean
from pytorch_accelerated._measuring.names import stem_of

if TYPE_CHECKING:
    import torch

    from pytorch_accelerated._position import DataPass
    from pytorch_accelerated._types import WeightedSums
    from pytorch_accelerated.run_config import TrainerRunConfig


def results_of_pass(
    current: DataPass, loss_name: str, config: TrainerRunConfig, device: torch.device
) -> dict[str, float]:
    """Return the means over a pass and all processes, and the results of the metrics, by the names to record.

    Must be called on every process. Reads from the device.

    Args:
        current: The pass.
        loss_name: The name of the mean loss. The part before its first underscore becomes the prefix of the metrics.
        config: Says how many processes there are.
        device: Where they exchange tensors.
    """
    sums: WeightedSums = current.means.sums(loss_name)
    if config.is_distributed:
        sums = sum_over_processes(sums, device)
    results = {name: weighted_mean(total, weight) for name, (total, weight) in sums.items()}
    if current.metrics is not None:
        gather = partial(all_gather_nested, num_processes=config.num_processes, device=device)
        metrics = current.metrics.finish(results[loss_name], gather if config.is_distributed else None)
        results |= {stem_of(loss_name) + name: value for name, value in metrics.items()}
    return results
