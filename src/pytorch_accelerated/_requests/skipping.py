"""Leaves a batch out of its update, because the program asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pytorch_accelerated._arguments.moments import check_run

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from pytorch_accelerated._run import Run
    from pytorch_accelerated._types import BatchOutput


def skip_batch(run: Run) -> None:
    """Leave the batch of the step out of the update.

    Raises:
        RuntimeError: No batch is under way, or its gradients are computed already.
    """
    is_open = run.is_taking_steps and run.is_batch_open and not run.is_evaluating
    check_run(is_open, "skip_batch", "on_train_step_start", "with a batch whose gradients are still to come ")
    if run.closure is not None and run.consensus.is_needed:
        raise RuntimeError(
            "`skip_batch` was called in a run with several processes, whose optimizer evaluates its batches again. "
            "There, return a `batch_size` of 0 with the loss instead."
        )
    run.is_batch_skipped = True


def leaves_out(run: Run) -> bool:
    """Return whether a batch that was skipped before its step needs no forward pass.

    If an update is due, the other ranks wait for gradients from this one, which need a forward pass. Ranks that share a
    model in shards wait for the forward pass itself.
    """
    return not run.consensus.is_needed or not (run.is_update_due or run.is_sharded)


def complete_skipped_step(
    run: Run, model: nn.Module, batch_output: BatchOutput, backward: Callable[[torch.Tensor], None], step: int
) -> None:
    """End the step of a batch that is left out, and take part in the update of the other ranks.

    Args:
        run: The run.
        model: The prepared model.
        batch_output: What the step returned, if there was a forward pass.
        backward: Computes the gradients.
        step: Index of the batch in its epoch.
    """
    run.is_batch_open = run.is_batch_skipped = False
    run.training.window.skip(step)
    if not run.consensus.is_needed:
        run.training.progress.num_skipped_in_epoch += 1
        return
    if run.is_update_due:
        run.start_exchange(step)
    if run.is_sharded or (run.is_update_due and getattr(model, "find_unused_parameters", False)):
        backward(batch_output["loss"] * 0)
    elif run.is_update_due:  # gradients of 0 whatever the loss is, which could be NaN
        trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
        zeros: list[torch.Tensor] = [parameter.flatten()[:1].float().sum() * 0 for parameter in trained]
        backward(torch.stack(zeros).sum())


def has_skipped_all(run: Run) -> bool:
    """Return whether a window has no samples because its batches were skipped, on all ranks; if so, reset it."""
    window = run.training.window
    num_skipped = run.consensus.num_skipped if run.consensus.is_needed else window.num_skipped
    if num_skipped == 0:
        return False
    window.reset()
    return True
