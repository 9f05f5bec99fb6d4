"""Proofs on your own model: `check_invariance` shows that the numbers do not depend on how the work is split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import IterableDataset, Subset

from pytorch_accelerated import _distributed, _validation
from pytorch_accelerated._rng import preserved_rng_state, seed_generators
from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.tracking import InMemoryRunHistory
from pytorch_accelerated.trainer import Trainer

SPLIT_DEPENDENT_MODULES: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
"""Batch norms and dropout: in training mode their outputs depend on how the work is split, and rightly so."""

_EPSILON_OF_PRECISION = {
    "fp16": torch.finfo(torch.float16).eps,
    "bf16": torch.finfo(torch.bfloat16).eps,
    "fp8": torch.finfo(torch.float8_e4m3fn).eps,
}
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class SplitDifference:
    """How far the numbers of one split are from those of the whole batch; infinite if any is not finite.

    Args:
        per_device_batch_size: Samples in a batch of one process.
        gradient_accumulation_steps: Batches per process that make one update.
        loss: Largest relative difference of an update's loss, as recorded in the run history.
        gradient: Largest relative difference of an update's gradient; see `check_invariance`.
        absolute_gradient: Largest absolute difference of any entry of a gradient.
        parameter: The parameter whose gradient has the largest relative difference.
        update: In which update it has, from 1.
        factor: What the gradients are the multiple of the whole batch's by, in the sense of least squares.
    """

    per_device_batch_size: int
    gradient_accumulation_steps: int
    loss: float
    gradient: float
    absolute_gradient: float
    parameter: str
    update: int
    factor: float


@dataclass(frozen=True)
class InvarianceReport:
    """What `check_invariance` found; print it to read it.

    Args:
        num_updates: Updates made in each split.
        samples_per_update: Samples in an update, of all processes together.
        num_processes: Processes that shared them.
        tolerance: Bound for the relative differences.
        splits: The differences of each split.
        modules_in_eval_mode: Names of the modules that were kept in evaluation mode.
        likely_cause: What to change; empty if nothing depends on the split.
    """

    num_updates: int
    samples_per_update: int
    num_processes: int
    tolerance: float
    splits: tuple[SplitDifference, ...]
    modules_in_eval_mode: tuple[str, ...]
    likely_cause: str

    @property
    def worst(self) -> SplitDifference:
        """The split with the largest relative difference of gradient or loss."""
        return max(self.splits, key=lambda split: max(split.gradient, split.loss))

    @property
    def is_invariant(self) -> bool:
        """Whether all differences are within the tolerance."""
        return max(self.worst.gradient, self.worst.loss) <= self.tolerance

    def raise_if_different(self) -> None:
        """Raise an `AssertionError` with the report as its message, unless all differences are within the tolerance."""
        if not self.is_invariant:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        verdict = "do not depend" if self.is_invariant else "depend"
        lines = [
            f"Gradients and losses {verdict} on how a batch is split: {self.num_updates} updates of "
            f"{self.samples_per_update} samples, {self.num_processes} process(es), tolerance {self.tolerance:.1e}.",
            "",
            "batch x accumulated      loss  gradient  absolute  parameter (update)",
        ]
        lines += [
            f"{split.per_device_batch_size:5} x {split.gradient_accumulation_steps:<11}{split.loss:10.1e}"
            f"{split.gradient:10.1e}{split.absolute_gradient:10.1e}  {split.parameter} ({split.update})"
            for split in self.splits
        ]
        if self.modules_in_eval_mode:
            lines += ["", f"Kept in evaluation mode: {_enumerate(self.modules_in_eval_mode)}."]
        if self.likely_cause:
            lines += ["", f"Likely cause: {self.likely_cause}"]
        return "\n".join(lines)


def check_invariance(
    make_trainer: Callable[[], Trainer],
    dataset: Any,
    *,
    num_updates: int = 3,
    samples_per_update: int = 16,
    splits: Sequence[int] | None = None,
    tolerance: float | None = None,
    collate_fn: Callable[..., Any] | None = None,
    modules_in_eval_mode: tuple[type[nn.Module], ...] = SPLIT_DEPENDENT_MODULES,
    seed: int = 0,
) -> InvarianceReport:
    r"""Show that your trainer computes the same gradients and losses however a batch is split.

    A new trainer learns for a few updates in each split, from the same weights and random state, on the same samples in
    the same order. The gradient of each update, before clipping, is compared with that of the whole batch, computed by
    every process for itself. Each split then goes on with the gradient of the whole batch, so that no optimizer
    magnifies rounding. Must be called on every process; all get the same report.

    The callbacks and the run history of the trainers are replaced by silent ones; the hooks of a subclass are called.
    The global random state is left as it was.

    The difference of a gradient is relative to its largest entry in the same parameter, or to :math:`\sqrt{tolerance}`
    of the largest entry of all parameters if that is more: gradients that should vanish, as that of a bias before a
    batch norm, consist of rounding alone. The tolerance is :math:`\sqrt{\varepsilon}` of the coarsest precision in use,
    parameters or mixed precision, so half of its digits have to agree: 3.5e-4 for float32. Rounding in sums of
    :math:`n` numbers takes up to :math:`n \varepsilon`, and as a rule :math:`\sqrt{n} \varepsilon`; a wrong weight shows
    in the first digits.

    Args:
        make_trainer: Makes a trainer with a model and an optimizer of its own each time.
        dataset: Samples that can be got by their index. The first ``num_updates * samples_per_update`` are used.
        num_updates: Updates in each split; at least 1.
        samples_per_update: Samples in an update, of all processes together; at least 2. They make one batch once.
        splits: Batch sizes per device, below ``samples_per_update``. As many batches are accumulated as it takes; the
            last may be short. By default a process's share is accumulated over 1 (with several processes), 2, 3 and 4
            batches.
        tolerance: Bound for relative differences, above 0; ``None`` for the rule above. Give a larger one, such as
            3e-2, where TF32 is in use.
        collate_fn: Makes a batch from samples.
        modules_in_eval_mode: Kinds of modules that are kept in evaluation mode, because in training mode they depend on
            the split by their nature. Add your own, such as stochastic depth; ``()`` for none.
        seed: Seeds the random number generators.

    Raises:
        ValueError: An argument has an impossible value, the dataset is too small, or the model is not new each time.
        TypeError: ``make_trainer`` makes no trainer, or samples cannot be got by index.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> def make_trainer():
        ...     model = nn.Linear(3, 1)
        ...     return Trainer(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
        >>> report = check_invariance(make_trainer, TensorDataset(torch.randn(48, 3), torch.randn(48, 1)))
        >>> report.is_invariant
        True
        >>> report.raise_if_different()
    """
    _check_arguments(make_trainer, dataset, num_updates, samples_per_update, splits, tolerance)
    blocks = [range(start, start + samples_per_update) for start in range(0, num_updates * samples_per_update, samples_per_update)]
    experiment = _Experiment(make_trainer, dataset, blocks, collate_fn, modules_in_eval_mode)
    with preserved_rng_state():
        reference = experiment.train_reference(tolerance, seed)
        sizes = _default_splits(samples_per_update, reference.num_processes) if splits is None else splits
        differences = tuple(experiment.compare(reference, size, seed) for size in sizes)
        cause = _find_cause(differences, reference, lambda: experiment.compare(reference, samples_per_update, seed + 1))
    return InvarianceReport(
        num_updates=num_updates,
        samples_per_update=samples_per_update,
        num_processes=reference.num_processes,
        tolerance=reference.tolerance,
        splits=differences,
        modules_in_eval_mode=tuple(_names_of(reference.model, modules_in_eval_mode)),
        likely_cause=cause,
    )


class _Reference(NamedTuple):
    """What the whole batch gave."""

    model: nn.Module
    initial_state: dict[str, Any]
    num_processes: int
    tolerance: float
    losses: list[float]
    gradients: list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class _Experiment:
    """What all splits have in common."""

    make_trainer: Callable[[], Trainer]
    dataset: Any
    blocks: list[range]
    collate_fn: Callable[..., Any] | None
    modules_in_eval_mode: tuple[type[nn.Module], ...]

    def train_reference(self, tolerance: float | None, seed: int) -> _Reference:
        """Train on whole batches."""
        trainer = self._new_trainer(seed)
        num_processes = int(trainer._accelerator.num_processes)
        initial_state = copy.deepcopy(trainer.model.state_dict())
        recorder = _GradientRecorder(self.modules_in_eval_mode)
        losses = self._train(trainer, recorder, len(self.blocks[0]), num_processes)
        tolerance = _default_tolerance(trainer) if tolerance is None else tolerance
        return _Reference(trainer.model, initial_state, num_processes, tolerance, losses, recorder.gradients)

    def compare(self, reference: _Reference, batch_size: int, seed: int) -> SplitDifference:
        """Train on batches of this size. Must be called on every process."""
        trainer = self._new_trainer(seed)
        if trainer.model is reference.model:
            raise ValueError(
                "`make_trainer` returned a trainer with the same model again, but each split has to start from the "
                "same weights. Make the model and the optimizer inside `make_trainer`, or copy the model there with "
                "`copy.deepcopy`."
            )
        trainer.model.load_state_dict(reference.initial_state)
        recorder = _GradientComparer(self.modules_in_eval_mode, reference)
        num_copies = reference.num_processes if batch_size == len(self.blocks[0]) else 1
        losses = self._train(trainer, recorder, batch_size, num_copies)
        worst = max(recorder.differences, key=lambda difference: difference.relative)
        square = sum(difference.square for difference in recorder.differences)
        split = SplitDifference(
            per_device_batch_size=batch_size,
            gradient_accumulation_steps=trainer.run_config.gradient_accumulation_steps,
            loss=max(map(_relative_difference, losses, reference.losses)),
            gradient=worst.relative,
            absolute_gradient=max(difference.absolute for difference in recorder.differences),
            parameter=worst.parameter,
            update=recorder.differences.index(worst) + 1,
            factor=sum(difference.product for difference in recorder.differences) / max(square, _TINY),
        )
        return cast("SplitDifference", _distributed.broadcast_from_main(split, reference.num_processes))

    def _new_trainer(self, seed: int) -> Trainer:
