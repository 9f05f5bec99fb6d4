"""`check_invariance` shows that the numbers do not depend on how the work is split."""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils.data import IterableDataset, Subset

from pytorch_accelerated import _validation
from pytorch_accelerated._data.rng import preserve_rng_state, seed_generators
from pytorch_accelerated._distributed.accelerator import is_sharded
from pytorch_accelerated._distributed.collectives import broadcast_from_main
from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.tracking import InMemoryRunHistory
from pytorch_accelerated.trainer import Trainer

SPLIT_DEPENDENT_MODULES: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
    nn.MultiheadAttention,  # for its dropout
)
"""Kinds of modules whose outputs depend, in training mode and by their nature, on how the work is split."""

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
_TINY = torch.finfo(torch.float32).tiny
_MAX_ERROR_OF_FACTOR = 0.2  # The batches of one update differ a little; a mean and a sum by a factor of 2 or more.


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
        factor: The multiple of the gradients of the whole batch that comes nearest to those of the split.
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
        """The larger of the relative differences of gradient and loss."""
        return max(self.gradient, self.loss)


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
        processes = "1 process" if self.num_processes == 1 else f"{self.num_processes} processes"
        rows = [
            f"{split.per_device_batch_size:5} x {split.gradient_accumulation_steps:<11}{split.loss:10.1e}"
            f"{split.gradient:10.1e}{split.absolute_gradient:10.1e}  {split.parameter} ({split.update})"
            for split in self.splits
        ]
        lines = [
            f"Gradients and losses {verdict} on how a batch is split.",
            f"{self.num_updates} updates of {self.samples_per_update} samples on {processes}; relative differences may "
            f"be up to {self.tolerance:.1e}.",
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
    :math:`n` numbers takes up to :math:`n \varepsilon`, as a rule :math:`\sqrt{n} \varepsilon`; a wrong weight shows in
    the first digits.

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
    starts = range(0, num_updates * samples_per_update, samples_per_update)
    blocks = [range(start, start + samples_per_update) for start in starts]
    experiment = _Experiment(make_trainer, dataset, blocks, collate_fn, modules_in_eval_mode, seed)
    with preserve_rng_state():
        whole = experiment.train_on_whole_batches(tolerance)
        sizes = _default_splits(samples_per_update, whole.num_processes) if splits is None else splits
        differences = tuple(experiment.compare(whole, size) for size in sizes)
        repeat = partial(experiment.compare, whole, samples_per_update, seed=seed + 1)
        likely_cause = _find_cause(differences, whole, repeat)
    return InvarianceReport(
        num_updates=num_updates,
        samples_per_update=samples_per_update,
        num_processes=whole.num_processes,
        tolerance=whole.tolerance,
        splits=differences,
        modules_in_eval_mode=tuple(_names_of(whole.model, modules_in_eval_mode)),
        likely_cause=likely_cause,
    )


def _check_arguments(
    make_trainer: Any, dataset: Any, num_updates: int, samples_per_update: int, splits: Any, tolerance: float | None
) -> None:
    if not callable(make_trainer):
        raise TypeError(
            f"`make_trainer` is a {type(make_trainer).__name__}. Expected a function that makes a new trainer, with a "
            "model and an optimizer of its own, each time it is called."
        )
    _validation.check_positive_integer("num_updates", num_updates, "updates")
    _validation.check_positive_integer("samples_per_update", samples_per_update, "samples")
    _validation.check_positive_number("tolerance", tolerance)
    if splits is not None and not splits:
        raise ValueError("`splits` is empty. Give the batch sizes to compare, or None for the usual ones.")
    for size in splits or ():
        _validation.check_positive_integer("splits", size, "samples in a batch")
    if samples_per_update <= max(splits or (1,)):
        raise ValueError(
            f"`samples_per_update` is {samples_per_update!r}, and `splits` is {splits!r}. Expected more samples than "
            "the largest batch has, at least 2, because there is nothing to split otherwise."
        )
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"`dataset` is a {type(dataset).__name__}. Expected a dataset with a length whose samples can be got by "
            "index, because each split has to see the same ones. A list of samples will do."
        )
    if len(dataset) < num_updates * samples_per_update:
        raise ValueError(
            f"`dataset` has {len(dataset)} samples, but {num_updates} updates of {samples_per_update} samples need "
            f"{num_updates * samples_per_update}. Lower `num_updates` or `samples_per_update`, or give more samples."
        )


# --- training in splits ------------------------------------------------------------------------------------------


class _WholeBatches(NamedTuple):
    """What training on whole batches gave, to which the splits are compared."""

    model: Any
    initial_state: Mapping[str, Any]
    num_processes: int
    tolerance: float
    losses: list[float]
    gradients: list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class _Experiment:
    """What all splits have in common; its methods must be called on every process."""

    make_trainer: Callable[[], Trainer]
    dataset: Any
    blocks: list[range]
    collate_fn: Callable[..., Any] | None
    modules_in_eval_mode: tuple[type[nn.Module], ...]
    seed: int

    def train_on_whole_batches(self, tolerance: float | None) -> _WholeBatches:
        """Train without a split; every process computes the same."""
        trainer = self._new_trainer()
        initial_state = copy.deepcopy(trainer.model.state_dict())
        recorder = _GradientRecorder(self.modules_in_eval_mode)
        losses = self._train(trainer, recorder, len(self.blocks[0]), self.seed)
        return _WholeBatches(
            model=trainer.model,
            initial_state=initial_state,
            num_processes=trainer.run_config.num_processes,
            tolerance=_default_tolerance(trainer) if tolerance is None else tolerance,
            losses=losses,
            gradients=recorder.gradients,
        )

    def compare(self, whole: _WholeBatches, batch_size: int, *, seed: int | None = None) -> SplitDifference:
        """Train in batches of this size, from the same random state or another."""
        trainer = self._new_trainer()
        if trainer.model is whole.model:
            raise ValueError(
                "`make_trainer` gave its second trainer the model of the first, which has learnt by now. Make the "
                "model and the optimizer inside `make_trainer`, or a `copy.deepcopy` of the model."
            )
        trainer.model.load_state_dict(whole.initial_state)
        recorder = _GradientComparer(self.modules_in_eval_mode, whole)
        losses = self._train(trainer, recorder, batch_size, self.seed if seed is None else seed)
        worst = max(recorder.differences, key=lambda difference: difference.relative)
        square = sum(difference.square for difference in recorder.differences)
        split = SplitDifference(
            per_device_batch_size=batch_size,
            gradient_accumulation_steps=trainer.run_config.gradient_accumulation_steps,
            loss=max(map(_relative_difference, losses, whole.losses)),
            gradient=worst.relative,
            absolute_gradient=max(difference.absolute for difference in recorder.differences),
            parameter=worst.parameter,
            update=recorder.differences.index(worst) + 1,
            factor=sum(difference.product for difference in recorder.differences) / max(square, _TINY),
        )
        return cast("SplitDifference", broadcast_from_main(split, whole.num_processes))

    def _new_trainer(self) -> Trainer:
        seed_generators(self.seed)
        trainer = self.make_trainer()
        if not isinstance(trainer, Trainer):
            raise TypeError(f"`make_trainer` returned a {type(trainer).__name__}. Expected a new `Trainer` each time.")
        if is_sharded(trainer._accelerator):
            raise ValueError(
                "The trainer shards its model (FSDP or DeepSpeed), so no process has whole gradients to compare. Start "
                "the check without sharding, in one process or with DDP."
            )
        return trainer

    def _train(self, trainer: Trainer, recorder: _GradientRecorder, batch_size: int, seed: int) -> list[float]:
        """Make one run, and so one update, of each block of samples, and return their losses."""
        trainer.callback_handler.clear_callbacks()
        trainer.callback_handler.add_callback(recorder)
        trainer.run_history = InMemoryRunHistory()
        seed_generators(seed)
        num_processes = int(trainer._accelerator.num_processes)
        for block in self.blocks:
            is_whole = batch_size == len(block)
            samples = [*block] * num_processes if is_whole else [*block]  # the whole batch for every process
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


class _GradientRecorder(TrainerCallback):
    """Keeps the gradient of each update."""

    def __init__(self, modules_in_eval_mode: tuple[type[nn.Module], ...]) -> None:
        self.modules_in_eval_mode = modules_in_eval_mode
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        for module in trainer.model.modules():
            if isinstance(module, self.modules_in_eval_mode):
                module.eval()

    def on_optimizer_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        self.gradients.append({name: gradient.clone() for name, gradient in _gradients_of(trainer).items()})


class _GradientComparer(_GradientRecorder):
    """Compares the gradient of each update with that of the whole batch, and puts the latter in its place."""

    def __init__(self, modules_in_eval_mode: tuple[type[nn.Module], ...], whole: _WholeBatches) -> None:
        super().__init__(modules_in_eval_mode)
        self.whole = whole
        self.differences: list[_GradientDifference] = []

    def on_optimizer_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        expected = self.whole.gradients[len(self.differences)]
        self.differences.append(_compare(_gradients_of(trainer), expected, self.whole.tolerance))
        for name, parameter in _plain_model(trainer).named_parameters():
            parameter.grad = expected[name].clone() if name in expected else None


def _plain_model(trainer: Trainer) -> Any:
    return trainer.get_model(keep_torch_compile=False)


def _gradients_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    parameters = _plain_model(trainer).named_parameters()
    return {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}


def _default_splits(samples_per_update: int, num_processes: int) -> list[int]:
    share = math.ceil(samples_per_update / num_processes)
    sizes = {math.ceil(share / num_batches) for num_batches in (1, 2, 3, 4)}
    return sorted(sizes - {samples_per_update}, reverse=True)


# --- comparing ---------------------------------------------------------------------------------------------------


class _GradientDifference(NamedTuple):
    """How far the gradient of an update is from that of the whole batch."""

    relative: float
    absolute: float
    parameter: str
    product: float
    """The scalar product of the two."""
    square: float
    """The scalar product of the second with itself."""


def _compare(
    gradients: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float
) -> _GradientDifference:
    floor = math.sqrt(tolerance) * max(map(_largest, expected.values()), default=0.0)
    relative = absolute = product = square = 0.0
    parameter = ""
    for name in {**expected, **gradients}:
        own, other = (_widened(side.get(name, torch.zeros(()))) for side in (gradients, expected))
        difference = _largest(own - other)
        ratio = difference / max(_largest(other), floor, _TINY) if math.isfinite(difference) else math.inf
        if ratio > relative or not parameter:
            relative, parameter = ratio, name
        absolute = max(absolute, difference)
        product += float((own * other).sum())
        square += float((other * other).sum())
    return _GradientDifference(relative, absolute, parameter, product, square)


def _relative_difference(value: float, expected: float) -> float:
    difference = abs(value - expected) / max(abs(expected), _TINY)
    return difference if math.isfinite(difference) else math.inf


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().nan_to_num(nan=math.inf, posinf=math.inf).max()) if tensor.numel() else 0.0


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to_dense().to(torch.promote_types(tensor.dtype, torch.float32))


def _default_tolerance(trainer: Trainer) -> float:
    dtypes = {parameter.dtype for parameter in trainer.model.parameters()}
    dtypes |= {_DTYPES[name] for name in [trainer.run_config.mixed_precision] if name in _DTYPES}
    return math.sqrt(max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point))


# --- finding the cause -------------------------------------------------------------------------------------------


def _find_cause(
    splits: Sequence[SplitDifference], whole: _WholeBatches, repeat_with_other_seed: Callable[[], SplitDifference]
) -> str:
    largest = max(split.largest for split in splits)
    if largest <= whole.tolerance:
        return ""
    if math.isinf(largest):
        return "a loss or a gradient is not finite, so nothing can be compared. Does the model train at all?"
    shares = [split.factor * split.gradient_accumulation_steps * whole.num_processes for split in splits]
    if all(abs(share - 1) < _MAX_ERROR_OF_FACTOR for share in shares):
        return (
            "the gradient shrinks with the batch, so the step returns a sum as its loss, or divides it by the number "
            "of accumulated batches. Return the mean over `batch_size` items (or over `num_items_in_batch`)."
        )
    causes = []
    if repeat_with_other_seed().largest > whole.tolerance:
        dropouts = _enumerate(
            _names_of(whole.model, (nn.modules.dropout._DropoutNd, nn.MultiheadAttention), is_active=True)
        )
        causes.append(
            "the step draws random numbers, so even the whole batch gives another loss each time: "
            f"{dropouts or 'functional dropout, or augmentation'}. Switch that off for the check."
        )
    if norms := _enumerate(_names_of(whole.model, (nn.modules.batchnorm._BatchNorm,), is_active=True)):
        causes.append(
            f"batch norms take the mean and the variance of the batch: {norms}. Keep them in evaluation mode for the "
            "check. If small batches have to train as large ones do, use norms over each sample, such as GroupNorm."
        )
    return " Also: ".join(causes) or (
        "the loss is the mean over something else than the step says. Return the number of samples as `batch_size`; if "
        "the mean is over something else, such as tokens without padding, return their number as `num_items_in_batch`. "
        "(A loss that relates samples to each other, as a contrastive one does, depends on the batch by its nature.)"
    )


def _names_of(model: nn.Module, kinds: tuple[type[nn.Module], ...], is_active: bool = False) -> list[str]:
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    return [f"`{name}` ({type(module).__name__})" for name, module in modules if not is_active or _is_active(module)]


def _is_active(module: nn.Module) -> bool:
    has_no_statistics = getattr(module, "running_mean", module) is None  # then it takes those of the batch
    return module.training or has_no_statistics


def _enumerate(names: Sequence[str], num_shown: int = 3) -> str:
    more = [f"and {len(names) - num_shown} more"] if len(names) > num_shown else []
    return ", ".join([*names[:num_shown], *more])
