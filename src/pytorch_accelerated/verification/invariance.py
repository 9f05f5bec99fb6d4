"""`check_invariance` checks that gradients and losses do not depend on how a batch is split."""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import distributed, nn
from torch.utils.data import IterableDataset, Subset

from pytorch_accelerated._arguments.numbers import check_positive_integer, check_positive_number
from pytorch_accelerated._data.rng import preserve_rng_state, seed_generators
from pytorch_accelerated._distributed.collectives import broadcast_from_main
from pytorch_accelerated._types import CollateFunction, Samples, StateMapping
from pytorch_accelerated._views import run_of
from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.finetuning import BN_MODULES
from pytorch_accelerated.tracking import InMemoryRunHistory
from pytorch_accelerated.trainer import Trainer
from pytorch_accelerated.verification._trainers import check_make_trainer, create_trainer

_DROPOUT_MODULES = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.MultiheadAttention,  # applies dropout to its attention weights, without a module
)

SPLIT_DEPENDENT_MODULES: tuple[type[nn.Module], ...] = (*BN_MODULES, *_DROPOUT_MODULES)
"""Modules whose outputs in training mode inherently depend on how a batch is split: batch norm and dropout."""

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
_TINY = torch.finfo(torch.float32).tiny  # keeps denominators above 0
_MAX_FACTOR_ERROR = 0.2  # The batches of an update vary a little; a mean and a sum differ by a factor of 2 or more.


@dataclass(frozen=True)
class SplitDifference:
    """How far the numbers of one split are from those of the full batch; infinite if any is NaN or infinite.

    Args:
        per_device_batch_size: Samples in a batch of one process.
        gradient_accumulation_steps: Batches per process that make one update.
        loss: Largest relative difference in an update's loss, as recorded in the run history.
        gradient: Largest relative difference in an update's gradient; see `check_invariance`.
        absolute_gradient: Largest absolute difference in any entry of a gradient.
        parameter: The parameter whose gradient has the largest relative difference.
        update: The update in which it occurs, counted from 1.
        factor: The multiple of the full batch's gradients that is closest to the gradients of the split.
    """

    per_device_batch_size: int
    gradient_accumulation_steps: int
    loss: float
    gradient: float
    absolute_gradient: float
    parameter: str
    update: int
    factor: float

    @property
    def largest(self) -> float:
        """The larger of the relative differences in gradient and loss."""
        return max(self.gradient, self.loss)


@dataclass(frozen=True)
class InvarianceReport:
    """What `check_invariance` found; print it to read it.

    Args:
        num_updates: Updates made in each split.
        samples_per_update: Samples in an update, over all processes.
        num_processes: The number of processes (world size).
        tolerance: Bound on the relative differences.
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
        """The split with the largest relative difference in gradient or loss."""
        return max(self.splits, key=lambda split: split.largest)

    @property
    def is_invariant(self) -> bool:
        """Whether all differences are within the tolerance."""
        return self.worst.largest <= self.tolerance

    def raise_if_different(self) -> None:
        """Raise an `AssertionError` with the report as its message, unless all differences are within the tolerance."""
        if not self.is_invariant:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        verdict = "do not depend" if self.is_invariant else "depend"
        updates = "1 update" if self.num_updates == 1 else f"{self.num_updates} updates"
        processes = "1 process" if self.num_processes == 1 else f"{self.num_processes} processes"
        rows = [
            f"{split.per_device_batch_size:5} x {split.gradient_accumulation_steps:<11}{split.loss:10.1e}"
            f"{split.gradient:10.1e}{split.absolute_gradient:10.1e}  {split.parameter} ({split.update})"
            for split in self.splits
        ]
        lines = [
            f"Gradients and losses {verdict} on how a batch is split.",
            f"{updates} of {self.samples_per_update} samples on {processes}; relative differences may be up to "
            f"{self.tolerance:.1e}.",
            "",
            "batch x accumulated      loss  gradient  absolute  parameter (update)",
            *rows,
        ]
        if self.modules_in_eval_mode:
            lines += ["", f"Kept in evaluation mode: {_enumerate(self.modules_in_eval_mode)}."]
        if self.likely_cause:
            lines += ["", *textwrap.wrap(f"Likely cause: {self.likely_cause}", width=100)]
        return "\n".join(lines)


def check_invariance(
    make_trainer: Callable[[], Trainer],
    dataset: Samples,
    *,
    num_updates: int = 3,
    samples_per_update: int = 16,
    splits: Sequence[int] | None = None,
    tolerance: float | None = None,
    collate_fn: CollateFunction | None = None,
    modules_in_eval_mode: tuple[type[nn.Module], ...] = SPLIT_DEPENDENT_MODULES,
    seed: int = 0,
) -> InvarianceReport:
    r"""Check that your trainer computes the same gradients and losses however a batch is split.

    For each split, a new trainer makes a few updates, starting from the same weights and RNG state, on the same samples
    in the same order. The gradient of each update, before clipping, is compared with that of the full batch, which
    every process computes by itself. Training then continues with the gradient of the full batch, so the optimizer
    cannot magnify rounding errors. Must be called on every process; all processes get the same report.

    The callbacks and the run history of the trainers are replaced; nothing is printed. The hooks of a subclass are
    called. The global RNG state is restored at the end.

    The difference in the gradient of a parameter is relative to the largest entry of that gradient. Where
    :math:`\sqrt{tolerance}` times the largest entry over all parameters is greater, it is relative to that: gradients
    that should be zero, such as the gradient of a bias before a batch norm, consist of rounding errors alone. The
    default tolerance is :math:`\sqrt{\varepsilon}`, where :math:`\varepsilon` is the machine epsilon of the coarsest
    precision in use, that of the parameters or of mixed precision; this is 3.5e-4 for float32. In other words, half of
    the digits have to agree. The rounding error of a sum of :math:`n` numbers is at most :math:`n \varepsilon`, and
    usually :math:`\sqrt{n} \varepsilon`. A wrong weight changes the first digits.

    Args:
        make_trainer: Creates a trainer, with its own model and optimizer, on each call.
        dataset: A dataset or sequence with a length and access by index. The first
            ``num_updates * samples_per_update`` samples are used.
        num_updates: Updates in each split; at least 1.
        samples_per_update: Samples in an update, over all processes; at least 2. They are also the full batch.
        splits: Batch sizes per device, below ``samples_per_update``. Each split accumulates as many batches as needed;
            the last may be short. By default the samples of one process are split into 1 (with several processes),
            2, 3 and 4 batches.
        tolerance: Bound on the relative differences, above 0; ``None`` for the default above. Pass a larger one, such
            as 3e-2, if TF32 is in use.
        collate_fn: Creates a batch from a list of samples; ``None`` for PyTorch's default.
        modules_in_eval_mode: Classes of modules that are kept in evaluation mode, because in training mode they
            inherently depend on the split. Add your own, such as stochastic depth; ``()`` for none.
        seed: The seed of the random number generators.

    Raises:
        ValueError: An argument has an impossible value, the dataset is too small, ``make_trainer`` returns the same
            model again, or the model is sharded (FSDP or DeepSpeed).
        TypeError: ``make_trainer`` does not return a trainer, or the dataset has no length or access by index.

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
    check_make_trainer(make_trainer)
    _check_arguments(dataset, num_updates, samples_per_update, splits, tolerance)
    starts = range(0, num_updates * samples_per_update, samples_per_update)
    blocks = [range(start, start + samples_per_update) for start in starts]
    experiment = _Experiment(make_trainer, dataset, blocks, collate_fn, modules_in_eval_mode, seed)
    with preserve_rng_state():
        reference = experiment.train_on_full_batches(tolerance)
        sizes = _default_splits(samples_per_update, reference.num_processes) if splits is None else splits
        differences = tuple(experiment.compare(reference, size) for size in sizes)
        repeat_with_other_seed = partial(experiment.compare, reference, samples_per_update, seed=seed + 1)
        likely_cause = _find_cause(differences, reference, repeat_with_other_seed)
    return InvarianceReport(
        num_updates=num_updates,
        samples_per_update=samples_per_update,
        num_processes=reference.num_processes,
        tolerance=reference.tolerance,
        splits=differences,
        modules_in_eval_mode=tuple(_names_of(reference.model, modules_in_eval_mode)),
        likely_cause=likely_cause,
    )


def _check_arguments(
    dataset: Samples, num_updates: int, samples_per_update: int, splits: Sequence[int] | None, tolerance: float | None
) -> None:
    check_positive_integer("num_updates", num_updates, "updates")
    check_positive_integer("samples_per_update", samples_per_update, "samples")
    check_positive_number("tolerance", tolerance)
    if splits is not None and not splits:
        raise ValueError("`splits` is empty. Expected at least one batch size. Pass some, or None for the defaults.")
    for size in splits or ():
        check_positive_integer("splits", size, "samples in a batch")
    if samples_per_update <= max(splits or (1,)):
        raise ValueError(
            f"`samples_per_update` is {samples_per_update!r}, and `splits` is {splits!r}. Expected at least 2 samples, "
            "and more than the largest batch has, because otherwise there is nothing to split. Raise "
            "`samples_per_update`, or pass smaller `splits`."
        )
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"`dataset` is of type {type(dataset).__name__}. Expected a dataset with a length and access by index, "
            "because each split has to use the same samples. You can pass a list of samples."
        )
    if len(dataset) < num_updates * samples_per_update:
        raise ValueError(
            f"`dataset` has {len(dataset)} samples, but {num_updates} updates of {samples_per_update} samples need "
            f"{num_updates * samples_per_update}. Lower `num_updates` or `samples_per_update`, or pass more samples."
        )


# --- training in splits ------------------------------------------------------------------------------------------


class _Reference(NamedTuple):
    """The results of training on full batches, with which each split is compared."""

    model: nn.Module
    initial_state: StateMapping
    num_processes: int
    tolerance: float
    losses: list[float]
    gradients: list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class _Experiment:
    """What all splits have in common. Its methods must be called on every process."""

    make_trainer: Callable[[], Trainer]
    dataset: Any
    blocks: list[range]
    collate_fn: CollateFunction | None
    modules_in_eval_mode: tuple[type[nn.Module], ...]
    seed: int

    def train_on_full_batches(self, tolerance: float | None) -> _Reference:
        """Train without a split. Every process computes the same."""
        trainer = self._create_trainer()
        initial_state = copy.deepcopy(trainer.model.state_dict())
        recorder = _GradientRecorder(self.modules_in_eval_mode)
        losses = self._train(trainer, recorder, len(self.blocks[0]), self.seed)
        return _Reference(
            model=trainer.model,
            initial_state=initial_state,
            num_processes=trainer.run_config.num_processes,
            tolerance=_default_tolerance(trainer) if tolerance is None else tolerance,
            losses=losses,
            gradients=recorder.gradients,
        )

    def compare(self, reference: _Reference, batch_size: int, *, seed: int | None = None) -> SplitDifference:
        """Train in batches of this size, starting from the same RNG state unless another seed is given."""
        trainer = self._create_trainer()
        if trainer.model is reference.model:
            raise ValueError(
                "`make_trainer` returned a trainer with the model of an earlier call, which has been trained by now. "
                "Expected a new model on each call. Create the model and the optimizer inside `make_trainer`, or use a "
                "`copy.deepcopy` of the model."
            )
        trainer.model.load_state_dict(reference.initial_state)
        recorder = _GradientComparer(self.modules_in_eval_mode, reference)
        losses = self._train(trainer, recorder, batch_size, self.seed if seed is None else seed)
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
        return broadcast_from_main(split, reference.num_processes)

    def _create_trainer(self) -> Trainer:
        trainer = create_trainer(self.make_trainer, self.seed)
        if run_of(trainer).is_sharded:
            raise ValueError(
                "The trainer shards its model (FSDP or DeepSpeed), so no process has complete gradients. Expected "
                "complete gradients on every process, to compare them. Run the check without sharding, in one process "
                "or with DDP."
            )
        return trainer

    def _train(self, trainer: Trainer, recorder: _GradientRecorder, batch_size: int, seed: int) -> list[float]:
        """Make one run, and so one update, of each block of samples, and return their losses."""
        trainer.callback_handler.clear_callbacks()
        trainer.callback_handler.add_callback(recorder)
        trainer.run_history = InMemoryRunHistory()
        seed_generators(seed)
        num_processes = _world_size()
        for block in self.blocks:
            is_full_batch = batch_size == len(block)
            samples = [*block] * num_processes if is_full_batch else [*block]  # each process gets the full batch
            trainer.train(
                Subset(self.dataset, samples),
                num_epochs=1,
                per_device_batch_size=batch_size,
                gradient_accumulation_steps=math.ceil(len(samples) / (batch_size * num_processes)),
                train_dataloader_kwargs={"shuffle": False, "num_workers": 0},
                collate_fn=self.collate_fn,
                reset_run_history=False,
            )
        return [float(loss) for loss in trainer.run_history.get_metric_values("train_loss_epoch")]


def _world_size() -> int:
    """Return the number of processes, which is needed before a run has a configuration."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _default_splits(samples_per_update: int, num_processes: int) -> list[int]:
    num_local_samples = math.ceil(samples_per_update / num_processes)
    sizes = {math.ceil(num_local_samples / num_batches) for num_batches in (1, 2, 3, 4)}
    return sorted(sizes - {samples_per_update}, reverse=True)


class _GradientRecorder(TrainerCallback):
    """Records the gradient of each update."""

    def __init__(self, modules_in_eval_mode: tuple[type[nn.Module], ...]) -> None:
        self.modules_in_eval_mode = modules_in_eval_mode
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        for module in trainer.model.modules():
            if isinstance(module, self.modules_in_eval_mode):
                module.eval()

    def on_optimizer_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        gradients = _gradients_of(trainer.get_model(keep_torch_compile=False))
        self.gradients.append({name: gradient.clone() for name, gradient in gradients.items()})


class _GradientComparer(_GradientRecorder):
    """Compares the gradient of each update with that of the full batch, and replaces it with the latter."""

    def __init__(self, modules_in_eval_mode: tuple[type[nn.Module], ...], reference: _Reference) -> None:
        super().__init__(modules_in_eval_mode)
        self.reference = reference
        self.differences: list[_GradientDifference] = []

    def on_optimizer_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        model = trainer.get_model(keep_torch_compile=False)
        expected = self.reference.gradients[len(self.differences)]
        self.differences.append(_compare(_gradients_of(model), expected, self.reference.tolerance))
        for name, parameter in model.named_parameters():
            parameter.grad = expected[name].clone() if name in expected else None


def _gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# --- comparing gradients -----------------------------------------------------------------------------------------


class _GradientDifference(NamedTuple):
    """How far the gradient of one update is from that of the full batch."""

    relative: float
    absolute: float
    parameter: str
    product: float
    """The dot product of the two gradients."""
    square: float
    """The dot product of the full batch's gradient with itself."""


def _compare(
    gradients: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float
) -> _GradientDifference:
    floor = math.sqrt(tolerance) * max(map(_largest_entry, expected.values()), default=0.0)
    relative = absolute = product = square = 0.0
    parameter = ""
    for name in {**expected, **gradients}:
        split, full = (_in_float32(side.get(name, torch.zeros(()))) for side in (gradients, expected))
        difference = _largest_entry(split - full)
        ratio = difference / max(_largest_entry(full), floor, _TINY) if math.isfinite(difference) else math.inf
        if ratio > relative or not parameter:
            relative, parameter = ratio, name
        absolute = max(absolute, difference)
        product += float((split * full).sum())
        square += float((full * full).sum())
    return _GradientDifference(relative, absolute, parameter, product, square)


def _relative_difference(value: float, expected: float) -> float:
    difference = abs(value - expected) / max(abs(expected), _TINY)
    return difference if math.isfinite(difference) else math.inf


def _largest_entry(tensor: torch.Tensor) -> float:
    """Return the largest absolute value, infinity if any is NaN or infinite, and 0 if there is none."""
    return float(tensor.abs().nan_to_num(nan=math.inf, posinf=math.inf).max()) if tensor.numel() else 0.0


def _in_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return a dense tensor in float32, or in its own precision if that is higher."""
    return tensor.detach().to_dense().to(torch.promote_types(tensor.dtype, torch.float32))


def _default_tolerance(trainer: Trainer) -> float:
    dtypes = {parameter.dtype for parameter in trainer.model.parameters()}
    dtypes |= {_DTYPES[name] for name in [trainer.run_config.mixed_precision] if name in _DTYPES}
    return math.sqrt(max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point))


# --- finding the cause -------------------------------------------------------------------------------------------


def _find_cause(
    splits: Sequence[SplitDifference], reference: _Reference, repeat_with_other_seed: Callable[[], SplitDifference]
) -> str:
    largest = max(split.largest for split in splits)
    if largest <= reference.tolerance:
        return ""
    if math.isinf(largest):
        return (
            "a loss or a gradient is NaN or infinite, so there is nothing to compare. Check that the model trains "
            "without a split."
        )
    # 1 where the gradient is proportional to the batch size
    ratios = [split.factor * split.gradient_accumulation_steps * reference.num_processes for split in splits]
    if all(abs(ratio - 1) < _MAX_FACTOR_ERROR for ratio in ratios):
        return (
            "the gradient is proportional to the batch size, so the step returns a sum as its loss, or divides the "
            "loss by the number of accumulated batches. Return the mean over `batch_size` items (or over "
            "`num_items_in_batch`)."
        )
    return " Also: ".join(_inherent_causes(reference, repeat_with_other_seed)) or (
        "the loss is not a mean over the number of items that the step returns. Return the number of samples as "
        "`batch_size`. If the loss is the mean over other items, such as tokens without padding, return their number "
        "as `num_items_in_batch`. (A loss that relates samples to each other, such as a contrastive loss, inherently "
        "depends on the batch.)"
    )


def _inherent_causes(reference: _Reference, repeat_with_other_seed: Callable[[], SplitDifference]) -> list[str]:
    """Return what in the step or the model inherently depends on the split."""
    causes = []
    if repeat_with_other_seed().largest > reference.tolerance:
        dropouts = _enumerate(_names_of(reference.model, _DROPOUT_MODULES, is_active=True))
        causes.append(
            f"the step draws random numbers ({dropouts or 'functional dropout or augmentation'}), so even the full "
            "batch has a different loss each time. Switch this off for the check."
        )
    if norms := _enumerate(_names_of(reference.model, BN_MODULES, is_active=True)):
        causes.append(
            f"batch norm uses the mean and variance of each batch ({norms}). Keep it in evaluation mode for the check. "
            "If small batches have to train like large ones, use normalization over each sample, such as GroupNorm."
        )
    return causes


def _names_of(model: nn.Module, classes: tuple[type[nn.Module], ...], is_active: bool = False) -> list[str]:
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, classes)]
    return [f"`{name}` ({type(module).__name__})" for name, module in modules if not is_active or _is_active(module)]


def _is_active(module: nn.Module) -> bool:
    """Tell whether a module drops out, or uses the statistics of the batch."""
    has_no_statistics = getattr(module, "running_mean", module) is None  # then it always uses those of the batch
    return module.training or has_no_statistics


def _enumerate(names: Sequence[str], num_shown: int = 3) -> str:
    more = [f"and {len(names) - num_shown} more"] if len(names) > num_shown else []
    return ", ".join([*names[:num_shown], *more])
