"""Every scheduler of PyTorch and timm, in a loop written by hand and in runs of the trainer, which resume too."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from _support import IN_ORDER, Probe, make_dataset, make_model, mse, weights_of
from pytorch_accelerated import Trainer
from pytorch_accelerated.trainer import TrainerWithTimmScheduler

NUM_EPOCHS, NUM_UPDATES_PER_EPOCH, TOTAL_BATCH_SIZE = 3, 4, 8
NUM_UPDATES = NUM_EPOCHS * NUM_UPDATES_PER_EPOCH
DATASET = make_dataset(NUM_UPDATES_PER_EPOCH * TOTAL_BATCH_SIZE)
EVAL_DATASET = make_dataset(TOTAL_BATCH_SIZE, seed=5)


def sequential(optimizer: Any, length: int) -> Any:
    """Warm up, then decay."""
    inner = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(optimizer, length)]
    return lr_scheduler.SequentialLR(optimizer, inner, milestones=[2])


def chained(optimizer: Any, length: int) -> Any:
    """Apply two factors."""
    inner = [lr_scheduler.ConstantLR(optimizer, total_iters=length // 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(inner, optimizer=optimizer)


OF_PYTORCH: dict[str, Callable[[Any, int], Any]] = {
    "LambdaLR": lambda o, n: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o, n: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o, n: lr_scheduler.StepLR(o, step_size=n // 3 or 1, gamma=0.5),
    "MultiStepLR": lambda o, n: lr_scheduler.MultiStepLR(o, milestones=[1, n - 1], gamma=0.5),
    "ConstantLR": lambda o, n: lr_scheduler.ConstantLR(o, total_iters=n - 1),
    "LinearLR": lambda o, n: lr_scheduler.LinearLR(o, total_iters=n),
    "ExponentialLR": lambda o, n: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "SequentialLR": sequential,
    "PolynomialLR": lambda o, n: lr_scheduler.PolynomialLR(o, total_iters=n, power=2.0),
    "CosineAnnealingLR": lambda o, n: lr_scheduler.CosineAnnealingLR(o, T_max=n),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o, n: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.99),
    "CyclicLR": lambda o, n: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "CosineAnnealingWarmRestarts": lambda o, n: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=max(2, n // 4)),
    "OneCycleLR": lambda o, n: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=n),
}
"""Creates each scheduler from the optimizer and the number of steps that it will make."""


def schedulers_of_pytorch() -> set[str]:
    """Return the names of all schedulers that PyTorch has."""
    base = lr_scheduler.LRScheduler
    found = {name for name, value in vars(lr_scheduler).items() if inspect.isclass(value) and issubclass(value, base)}
    return found - {"LRScheduler", "_LRScheduler"}


def _of_timm() -> dict[str, Callable[[Any, int], Any]]:
    try:
        from timm import scheduler
    except ImportError:
        return {}

    def plateau(optimizer: Any, length: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # timm will remove it
            return scheduler.PlateauLRScheduler(optimizer, 0.5, 0, threshold=0.99, mode="min")

    def with_noise(kind: Any) -> Callable[[Any, int], Any]:
        return lambda optimizer, length: kind(optimizer, length, noise_range_t=1, noise_std=0.1)

    made: dict[str, Callable[[Any, int], Any]] = {
        "MultiStepLRScheduler": lambda o, n: scheduler.MultiStepLRScheduler(o, [1, n - 1], 0.5),
        "StepLRScheduler": lambda o, n: scheduler.StepLRScheduler(o, 1, 0.5, warmup_t=1, warmup_lr_init=0.01),
        "WSDLRScheduler": lambda o, n: scheduler.WSDLRScheduler(o, n, n - 1),
        "PlateauLRScheduler": plateau,
        "CosineLRScheduler": with_noise(scheduler.CosineLRScheduler),
        "PolyLRScheduler": with_noise(scheduler.PolyLRScheduler),
        "TanhLRScheduler": with_noise(scheduler.TanhLRScheduler),
    }
    return made


OF_TIMM = _of_timm()
"""The same for those of timm; empty where it is not installed."""


def schedulers_of_timm() -> set[str]:
    """Return the names of all schedulers that timm has."""
    from timm import scheduler

    return {name for name, value in vars(scheduler).items() if inspect.isclass(value) and name.endswith("Scheduler")}


# --- by hand -----------------------------------------------------------------------------------------------------


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Create an optimizer with the momentum that some schedules change too."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)


def rates_by_hand(
    create: Callable[[Any], Any], after_update: Callable[[Any, int], object], after_epoch: Callable[..., object]
) -> list[float]:
    """Train in a loop of PyTorch, and return the rate of each update.

    Args:
        create: Creates the scheduler.
        after_update: Called with the scheduler and the number of updates.
        after_epoch: Called with the scheduler, the number of epochs and the evaluation loss.
    """
    model, rates = make_model(), []
    optimizer = new_optimizer(model)
    scheduler = create(optimizer)
    for epoch in range(1, NUM_EPOCHS + 1):
        for start in range(0, len(DATASET), TOTAL_BATCH_SIZE):
            inputs, targets = DATASET[start : start + TOTAL_BATCH_SIZE]
            optimizer.zero_grad()
            mse(model(inputs), targets).backward()
            rates.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            after_update(scheduler, len(rates))
        with torch.no_grad():
            inputs, targets = EVAL_DATASET[:]
            after_epoch(scheduler, epoch, float(mse(model(inputs), targets)))
    return rates


# --- with the trainer --------------------------------------------------------------------------------------------


@dataclass
class Recorded:
    """What a run is compared by."""

    rates: list[float] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)


def run(
    create: Callable[[Any], Any], *, folder: Path | None = None, cls: type[Trainer] = Trainer, **kwargs: Any
) -> Any:
    """Train with the trainer, and return rates and weights.

    Args:
        create: Creates the scheduler.
        folder: Where to save states: within the second epoch, after its evaluation, and at its end.
        cls: The class of the trainer.
        kwargs: Further arguments of `train`.
    """
    recorded, model = Recorded(), make_model()

    def record(trainer: Any) -> None:
        recorded.rates.append(float(trainer.optimizer.param_groups[0]["lr"]))

    def save(name: str, is_due: Callable[[Any], bool]) -> Callable[..., None]:
        return lambda trainer, **_: trainer.save_training_state(folder / name) if is_due(trainer) else None

    probes = [Probe(on_optimizer_step_start=record)]
    if folder is not None:
        in_second = lambda trainer: trainer.run_history.current_epoch == 2  # noqa: E731
        probes.append(Probe(on_train_step_end=save("step", lambda t: t.progress.num_updates == 6)))
        probes.append(Probe(on_train_epoch_end=save("train", in_second), on_eval_epoch_end=save("eval", in_second)))
        probes.append(Probe(on_training_run_epoch_end=save("end", in_second)))
    trainer = cls(model, mse, new_optimizer(model), callbacks=probes)
    trainer.train(
        DATASET,
        NUM_EPOCHS,
        eval_dataset=EVAL_DATASET,
        per_device_batch_size=TOTAL_BATCH_SIZE // int(os.environ.get("WORLD_SIZE", "1")),
        train_dataloader_kwargs=IN_ORDER,
        create_scheduler_fn=create,
        **kwargs,
    )
    recorded.weights = weights_of(trainer.model)
    return recorded


STATES = {"step": 6, "train": 8, "eval": 8, "end": 8}
"""The states that `run` saves, with the number of updates done."""


def problems_of(create: Callable[[Any], Any], by_hand: list[float], folder: Path, **kwargs: Any) -> list[str]:
    """Return how a run, and those resumed from its states, differ from the loop written by hand."""
    whole, problems = run(create, folder=folder, **kwargs), []
    if whole.rates != by_hand:
        problems.append(f"rates {whole.rates}, by hand {by_hand}")
    for state, num_done in STATES.items():
        resumed = run(create, resume_from=folder / state, **kwargs)
        if resumed.rates != by_hand[num_done:]:
            problems.append(f"resumed from {state}: rates {resumed.rates}, by hand {by_hand[num_done:]}")
        if any(not torch.equal(value, whole.weights[name]) for name, value in resumed.weights.items()):
            problems.append(f"resumed from {state}: other weights")
    return problems


def nothing(*_: object) -> None:
    """Do nothing."""


def problems_of_pytorch(name: str, interval: str, folder: Path) -> list[str]:
    """Compare a scheduler of PyTorch, stepped at an interval, with the loop by hand."""
    num_steps = NUM_EPOCHS if interval == "epoch" else NUM_UPDATES

    def create(optimizer: Any) -> Any:
        return OF_PYTORCH[name](optimizer, num_steps)

    if name == "ReduceLROnPlateau":
        by_hand = rates_by_hand(create, nothing, lambda scheduler, epoch, loss: scheduler.step(loss))
        return problems_of(create, by_hand, folder)
    if interval == "epoch":
        by_hand = rates_by_hand(create, nothing, lambda scheduler, epoch, loss: scheduler.step())
    else:
        by_hand = rates_by_hand(create, lambda scheduler, num_updates: scheduler.step(), nothing)
    return problems_of(create, by_hand, folder, step_scheduler=interval)


def problems_of_timm(make: Callable[[Any, int], Any], cls: type[Trainer], counts: str, folder: Path) -> list[str]:
    """Compare a scheduler of timm, which counts epochs or updates, with the loop by hand."""

    def create(optimizer: Any) -> Any:
        scheduler = make(optimizer, NUM_EPOCHS if counts == "epochs" else NUM_UPDATES)
        scheduler.t_in_epochs = counts == "epochs"
        return scheduler

    by_hand = rates_by_hand(
        create,
        lambda scheduler, num_updates: scheduler.step_update(num_updates=num_updates),
        lambda scheduler, epoch, loss: scheduler.step(epoch, loss),
    )
    return problems_of(create, by_hand, folder, cls=cls)


def compare_all(folder: Path, every_nth: int = 1) -> dict[str, list[str]]:
    """Return what is wrong with each scheduler, at each interval: an empty list for those that are right.

    Args:
        folder: The folder for training states.
        every_nth: Which part of PyTorch's schedulers to compare; 1 for all.
    """
    found = {}
    for name in [*OF_PYTORCH][::every_nth]:
        for interval in ("update", "epoch") if name != "ReduceLROnPlateau" else ("evaluation",):
            found[f"{name} per {interval}"] = problems_of_pytorch(name, interval, folder / f"{name}-{interval}")
    for name, make in OF_TIMM.items():
        for cls in (Trainer, TrainerWithTimmScheduler):
            for counts in ("epochs", "updates"):
                key = f"{name} of {counts} in {cls.__name__}"
                found[key] = problems_of_timm(make, cls, counts, folder / key.replace(" ", "-"))
    return found
