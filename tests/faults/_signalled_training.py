"""A training run that receives signals; run as a script, on one process or several, for `test_signals.py`.

The arguments are a folder and settings in JSON. Without ``tell_at`` and ``signal_at``, nothing interrupts the run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from _support import Probe, Samples, make_dataset, weights_of
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    ModelEmaCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    StopTrainingError,
)
from pytorch_accelerated.schedulers import CosineLrScheduler

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def train(
    folder: Path, saves: bool = True, callbacks: Any = (), resume_from: str | None = None, num_workers: int = 0
) -> Trainer:
    """Train for three epochs of five steps and three updates per process; each of two evaluations has two steps."""
    torch.manual_seed(7 if resume_from is None else 1234)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    others = [StepBasedEvaluationCallback(2), average(folder / "ema.pt")]
    save = [SaveTrainingStateCallback(folder / "states")] if saves else []
    torch.manual_seed(7)
    trainer = Trainer(
        model, nn.functional.mse_loss, torch.optim.AdamW(model.parameters(), lr=0.05), [*save, *others, *callbacks]
    )
    if resume_from is not None:
        torch.manual_seed(1234)  # random numbers must come from the state
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    trainer.train(
        Samples(make_dataset(18 * num_processes)),
        num_epochs=3,
        eval_dataset={name: make_dataset(7 * num_processes, seed=seed) for seed, name in enumerate("ab")},
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1),
        train_dataloader_kwargs={"num_workers": num_workers},
        resume_from=resume_from,
    )
    return trainer


def average(save_path: Path) -> ModelEmaCallback:
    return ModelEmaCallback(decay=0.8, save_path=save_path, watch_metric="b_ema_model_eval_loss_epoch")


def results_of(trainer: Trainer) -> dict[str, Any]:
    history = trainer.run_history
    return {
        "weights": weights_of(trainer.model),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
        "history": {name: history.get_metric_values(name) for name in sorted(history.get_metric_names())},
        "epoch": history.current_epoch,
        "progress": trainer.progress.state_dict(),
    }


def teller(which: int) -> Probe:
    """At the n-th step, notify the parent, and continue when it answers."""
    steps = []

    def tell(trainer: Any, **_: Any) -> None:
        steps.append(trainer)
        if len(steps) == which:
            print(f"at step {which}", flush=True)
            sys.stdin.readline()

    return Probe(on_backward_start=tell)


def sender(event: str, which: int, number: int, rank: int) -> Probe:
    """In the n-th call of an event, send a signal to this process if it has the given rank."""
    calls = []

    def send(trainer: Any, **_: Any) -> None:
        calls.append(trainer)
        if len(calls) == which and trainer.process_index == rank:
            os.kill(os.getpid(), number)

    return Probe(**{event: send})


def late_stop() -> Probe:
    """A callback that requests a stop when the run has already ended."""

    def stop(trainer: Any, **_: Any) -> None:
        raise StopTrainingError("too late")

    return Probe(on_training_run_end=stop)


def slow_step() -> Probe:
    """A step of one minute that prints when the first signal has arrived."""

    def wait(trainer: Any, **_: Any) -> None:
        print("a slow step", flush=True)
        flag = signal.getsignal(signal.SIGINT).__self__  # the run's `InterruptFlag`, whose method is the handler
        is_told = False
        for _ in range(1200):
            time.sleep(0.05)
            if flag.signal_number is not None and not is_told:
                print("a signal has come", flush=True)
                is_told = True

    return Probe(on_backward_start=wait)


def main(folder: Path, settings: dict[str, Any]) -> None:
    callbacks = []
    if "tell_at" in settings:
        callbacks.append(teller(settings["tell_at"]))
    if "signal_at" in settings:
        callbacks.append(sender(*settings["signal_at"]))
    if settings.get("is_slow"):
        callbacks.append(slow_step())
    if settings.get("has_late_stop"):
        callbacks.append(late_stop())
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        for name, resume_from in settings.get("runs", {"run": None}).items():
            num_workers = settings.get("num_workers", 0)
            trainer = train(folder / name, settings.get("saves", True), callbacks, resume_from, num_workers)
            torch.save(results_of(trainer), folder / f"{name}-{trainer.process_index}.pt")
    finally:
        if [signal.getsignal(number) for number in SIGNALS] == before:
            print("handlers are as before", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
