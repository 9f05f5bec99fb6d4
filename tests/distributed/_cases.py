"""The part of `test_two_processes.py` that runs on each of two processes, as a script.

Each function `case_<name>` returns plain values and tensors, which are stored for `test_<name>`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Sampler

from _processes import run_cases
from _screens import Terminal
from _support import (
    IN_ORDER,
    Batches,
    Probe,
    Samples,
    make_dataset,
    make_indexed_dataset,
    make_model,
    make_trainer,
    mse,
    recorder_of,
    train,
    weights_of,
)
from pytorch_accelerated import Trainer
from pytorch_accelerated._checkpoint import portable
from pytorch_accelerated._distributed import collectives
from pytorch_accelerated._recording import cadence, loss_monitor
from pytorch_accelerated._requests import time_limit
from pytorch_accelerated.callbacks import (
    CSVLogCallback,
    EarlyStoppingCallback,
    GradientNormCallback,
    LayerStatisticsCallback,
    LearningRateCallback,
    ModelEmaCallback,
    ProfilerCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    TensorBoardCallback,
    ThroughputCallback,
    TimeLedgerCallback,
    UpdateRatioCallback,
    WSDCheckpointCallback,
    get_default_callbacks,
)
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.schedulers import CosineLrScheduler, WSDLrScheduler
from pytorch_accelerated.tracking import JsonlRunHistory
from pytorch_accelerated.utils import local_process_zero_first, local_process_zero_only, world_process_zero_only


def metrics_of(trainer: Any) -> dict[str, list[float]]:
    history = trainer.run_history
    return {name: history.get_metric_values(name) for name in sorted(history.get_metric_names())}


# --- numbers -----------------------------------------------------------------------------------------------------


def case_the_file_of_an_average_holds_the_batch_statistics_of_the_main_process(rank: int, directory: Path) -> Any:
    found = {}
    for is_evaluated in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
        path = directory / f"average_{is_evaluated}.pt"
        ema = ModelEmaCallback(0.5, is_evaluated, path)
        trainer = make_trainer(model, callbacks=[ema], seed=3)
        train(trainer, num_epochs=2, eval_dataset=make_dataset(8))
        found[is_evaluated] = weights_of(ema.ema_model.module), torch.load(path)["model_state_dict"]
    return found


class ByRank(Trainer):
    """Its losses, weights and metrics are functions of the rank."""

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        rank = self.process_index
        loss = self.model(batch[0]).mean() * 0 + rank + 1
        items = 1 + 2 * rank
        return {"loss": loss, "batch_size": len(batch[0]), "num_items_in_batch": items, "metrics": {"rank": rank}}

    def calculate_eval_batch_loss(self, batch: Any) -> Any:
        return self.calculate_train_batch_loss(batch)


def case_losses_and_metrics_are_weighted_means_over_processes(rank: int, directory: Path) -> Any:
    trainer = make_trainer(cls=ByRank, lr=0.0)
    train(trainer, make_dataset(16), eval_dataset=make_dataset(16))
    trainer.evaluate({"a": make_dataset(8)}, per_device_batch_size=4)
    return metrics_of(trainer)


def case_training_matches_the_combined_batch_of_one_process(rank: int, directory: Path) -> Any:
    """Train twice with two processes and accumulation, and by hand with the combined batch."""
    model = make_model()
    trainer = make_trainer(model)
    dataset = make_dataset(32)
    wrapped, synced = [], []
    trainer.callback_handler.add_callback(
        Probe(
            on_training_run_start=lambda trainer, **kwargs: wrapped.append(type(trainer.model).__name__),
            on_backward_start=lambda trainer, **kwargs: synced.append(trainer.model.require_backward_grad_sync),
        )
    )
    kwargs = {"train_dataloader_kwargs": {"shuffle": False}, "gradient_accumulation_steps": 2}
    runs = []
    for _ in range(2):
        train(trainer, dataset, **kwargs)
        runs.append(weights_of(model))
    reference = make_model()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    expected = []
    for _ in range(2):
        for start in (0, 16):
            inputs, targets = dataset[start : start + 16]
            mse(reference(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        expected.append(weights_of(reference))
    return {
        "runs": runs,
        "expected": expected,
        "wrapped": wrapped,
        "synced": synced,
        "is_plain": trainer.model is model and trainer.get_model() is model,
        "output": trainer.model(dataset.tensors[0]).detach(),
        "attributes": sorted(set(vars(model)) - set(vars(make_model()))),
        "registries": [len(registry) for registry in (trainer._accelerator._models, trainer._accelerator._optimizers)],
    }


def case_all_processes_together_make_one_update(rank: int, directory: Path) -> Any:
    rates = []
    probe = Probe(on_optimizer_step_start=lambda trainer, **k: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    trainer = make_trainer(callbacks=[probe])
    create = CosineLrScheduler.create_scheduler_fn(lr_min=0.0)
    train(trainer, make_dataset(40), num_epochs=2, gradient_accumulation_steps=2, create_scheduler_fn=create)
    config = trainer.run_config.to_dict()
    limited = make_trainer()
    train(limited, make_dataset(40), num_epochs=2, max_num_train_steps=7)
    names = ("num_update_steps_per_epoch", "num_local_update_steps_per_epoch", "max_num_train_steps", "is_distributed")
    names += ("train_total_batch_size", "num_processes", "is_world_process_zero", "is_local_process_zero")
    return {
        "config": {name: config[name] for name in names},
        "num_updates": trainer.progress.num_updates,
        "num_samples": trainer.progress.num_samples,
        "scheduler": trainer.scheduler.num_updates,
        "rates": rates,
        "limited": limited.progress.num_updates,
    }


def case_evaluation_losses_are_means_over_processes(rank: int, directory: Path) -> Any:
    trainer = make_trainer(lr=0.0, callbacks=[StepBasedEvaluationCallback(1)])
    train(trainer, make_dataset(16), eval_dataset={"a": make_dataset(16, seed=4), "b": make_dataset(8, seed=5)})
    expected = {
        name: mse(trainer.model(inputs), targets).item()
        for name, (inputs, targets) in {"a": make_dataset(16, seed=4)[:], "b": make_dataset(8, seed=5)[:]}.items()
    }
    return {"metrics": metrics_of(trainer), "expected": expected}


def case_early_stopping_ends_all_processes_in_the_same_epoch(rank: int, directory: Path) -> Any:
    """The watched metric is identical on every rank."""
    trainer = make_trainer(lr=0.0, callbacks=[EarlyStoppingCallback(early_stopping_patience=1)])
    train(trainer, make_dataset(16), num_epochs=9, eval_dataset=make_dataset(16))
    return {"epoch": trainer.run_history.current_epoch, "reason": trainer.stop_reason}


# --- requests ----------------------------------------------------------------------------------------------------


def asking(rank: int, batch: int, request: str, event: str = "on_train_step_end", on_rank: int = 1) -> Probe:
    """Ask for something on one rank, at one batch, counted from 1 over the whole run."""

    def ask(trainer: Any, **kwargs: Any) -> None:
        if rank == on_rank and trainer.progress.num_batches + (event != "on_train_step_end") == batch:
            getattr(trainer, request)()

    return Probe(**{event: ask})


def outcome_of(trainer: Any) -> dict[str, Any]:
    progress = trainer.progress
    return {
        "epochs": progress.num_epochs_completed,
        "batches": progress.num_batches,
        "updates": progress.num_updates,
        "samples": progress.num_samples,
        "reason": trainer.stop_reason,
        "metrics": metrics_of(trainer),
        "weights": weights_of(trainer.model),
    }


def case_requests_of_one_rank_are_followed_by_all_at_the_same_update(rank: int, directory: Path) -> Any:
    found = {}
    for request in ("stop", "end_epoch"):
        for event in ("on_train_step_start", "on_train_step_end"):
            for accumulation in (1, 3):
                trainer = make_trainer(callbacks=[asking(rank, 2, request, event)], seed=3)
                train(trainer, make_dataset(64), num_epochs=2, gradient_accumulation_steps=accumulation)
                found[request, event, accumulation] = outcome_of(trainer)
    return found


def case_an_end_of_an_epoch_that_one_rank_asked_for_is_the_same_after_a_resume(rank: int, directory: Path) -> Any:
    found = {}
    for saved_at in (None, 1, 2, 3, 4):
        saving = SaveTrainingStateCallback(directory / "ends", save_every_n_steps=1, save_at_end=False)
        callbacks = [asking(rank, 2, "end_epoch"), *([saving] if saved_at is None else [])]
        trainer = make_trainer(callbacks=callbacks, seed=3)
        resume_from = None if saved_at is None else directory / "ends" / f"step_{saved_at}"
        train(trainer, make_dataset(64), num_epochs=2, gradient_accumulation_steps=2, resume_from=resume_from)
        found[saved_at] = outcome_of(trainer)
    return found


def case_a_batch_that_one_rank_skips_leaves_the_others_of_the_update(rank: int, directory: Path) -> Any:
    """Skip a batch on one rank, before its forward pass or after it, when its loss is NaN; or on both ranks."""
    found = {}
    for event in ("on_train_step_start", "on_backward_start"):
        for accumulation in (1, 2):
            for ranks in ([1], [0, 1]):
                dataset = make_dataset(32)
                if ranks == [1] and event == "on_backward_start":
                    dataset.tensors[0][12:16] = float("nan")  # the second batch of rank 1
                callbacks = [asking(rank, 2, "skip_batch", event, on_rank) for on_rank in ranks]
                trainer = make_trainer(callbacks=callbacks, seed=3)
                kwargs = {"shuffle": False}
                train(trainer, dataset, train_dataloader_kwargs=kwargs, gradient_accumulation_steps=accumulation)
                found[event, accumulation, len(ranks)] = outcome_of(trainer)
    return found


def case_the_main_process_decides_when_the_time_is_over_and_when_something_is_due(rank: int, directory: Path) -> Any:
    """Each rank has a clock of its own; that of rank 1 is far ahead."""
    clock = SimpleNamespace(now=0.0)
    moments = []

    def go_on(trainer: Any, **kwargs: Any) -> None:
        clock.now += 60 if rank == 0 else 3600

    modules = (time_limit, cadence)
    times = [mock.patch.object(module, "time", SimpleNamespace(monotonic=lambda: clock.now)) for module in modules]
    no_wait = mock.patch.object(loss_monitor, "SECONDS_BETWEEN_LOG_POINTS", 0)
    recorder, moments = recorder_of(lambda trainer: trainer.progress.num_updates, "on_eval_epoch_end")
    evaluating = StepBasedEvaluationCallback(eval_every="2 min")
    trainer = make_trainer(callbacks=[Probe(on_train_step_start=go_on), evaluating, recorder], seed=3)
    with times[0], times[1], no_wait:
        train(trainer, make_dataset(64), num_epochs=2, eval_dataset=make_dataset(8), max_time="5 min")
    return {"moments": moments, **outcome_of(trainer)}


# --- programs written for 0.1.61 ---------------------------------------------------------------------------------


class OwnEpochs(Trainer):
    """Has an epoch loop of its own, as programs for 0.1.61 write it."""

    def _run_train_epoch(self, train_dl: Any) -> None:
        self.train_epoch_start()
        self._loss_tracker.reset()
        for step, batch in enumerate(train_dl):
            self.callback_handler.call_event("on_train_step_start", self, batch=batch, step=step)
            self._perform_forward_and_backward_passes(batch, step)
            self.optimizer_step()
            self.scheduler_step()
            self.optimizer_zero_grad()
        self.train_epoch_end()
        self._add_epoch_loss_to_run_history("train_loss_epoch")


def case_an_own_epoch_loop_trains_like_that_of_the_library(rank: int, directory: Path) -> Any:
    trained = {}
    for cls in (OwnEpochs, Trainer):
        num_steps: list[int] = []
        probe = Probe(on_train_step_end=lambda trainer, step, seen=num_steps, **kwargs: seen.append(step))
        trainer = make_trainer(cls=cls, seed=5, callbacks=[probe])
        train(trainer, make_dataset(32), num_epochs=3, eval_dataset=make_dataset(8))
        trained[cls.__name__] = {
            "weights": weights_of(trainer.model),
            "metrics": metrics_of(trainer),
            "steps": num_steps,
        }
        trained[cls.__name__]["progress"] = vars(trainer.progress)
    return trained


class TimeFirst(nn.Module):
    """Inputs of shape (time, batch, features), and targets of shape (time, batch, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = make_model()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs)


def time_first(samples: Any) -> Any:
    inputs = torch.stack([inputs for inputs, _ in samples]).expand(7, -1, -1)
    return inputs, torch.stack([targets for _, targets in samples]).expand(7, -1, -1)


def case_batches_whose_targets_are_longer_than_the_number_of_samples_train(rank: int, directory: Path) -> Any:
    """The default step weighs a batch by the first dimension of its targets, as 0.1.61 does: here the time."""
    trainer = make_trainer(TimeFirst(), seed=5)
    kwargs = {"train_dataloader_kwargs": {"shuffle": False, "num_workers": 0}, "collate_fn": time_first}
    train(trainer, make_dataset(64), num_epochs=3, **kwargs)
    expected = make_trainer(make_model(), seed=5)
    train(expected, make_dataset(64), num_epochs=3, train_dataloader_kwargs={"shuffle": False})
    return {"weights": weights_of(trainer.model.layer), "expected": weights_of(expected.model)}


def case_an_own_method_resumes_on_every_process(rank: int, directory: Path) -> Any:
    calls = []

    class Extended(Trainer):
        def load_training_state(self, path: Any) -> Any:
            calls.append(str(path))
            return super().load_training_state(path)

    saving = SaveTrainingStateCallback(directory / "own_states", save_every_n_steps=3)
    uninterrupted = train(make_trainer(seed=5, callbacks=[saving]), make_dataset(32), num_epochs=2)
    state = directory / "own_states" / "step_3"
    resumed = train(make_trainer(cls=Extended, seed=5), make_dataset(32), num_epochs=2, resume_from=state)
    return {
        "calls": calls == [str(state)],
        "weights": weights_of(resumed.model),
        "expected": weights_of(uninterrupted.model),
        "metrics": metrics_of(resumed) == metrics_of(uninterrupted),
    }


# --- collectives -------------------------------------------------------------------------------------------------


def case_gather_concatenates_uneven_rows_without_padding(rank: int, directory: Path) -> Any:
    trainer = make_trainer()
    rows = torch.tensor([[1.0, -1.0], [-1.0, -1.0]]) if rank == 0 else torch.tensor([[-1.0, 2.0]])
    wide = torch.ones(1, 2 + rank) * (rank + 1)
    uneven = {
        "rows": trainer.gather(rows, padding_value=-1),
        "vector": trainer.gather(torch.arange(rank + 1), padding_value=9),
        "none": trainer.gather(torch.ones(2 * rank, 3), padding_value=0),
        "wide": trainer.gather(wide, padding_value=-5),
        "scalar": trainer.gather(torch.tensor(float(rank)), padding_value=0),
        "mask": trainer.gather(torch.tensor([True] * (rank + 1)), padding_value=0),
        "nested": trainer.gather({"a": [rows, (torch.full((1 + rank,), rank),)]}, padding_value=-1),
    }
    return {**uneven, "even": trainer.gather(torch.tensor([rank]))}


def case_a_process_with_nothing_to_gather_passes_padding(rank: int, directory: Path) -> Any:
    """The padding may have other dimensions, and another type, than what the other process has."""
    trainer = make_trainer()
    rows = torch.tensor([[1.5, -1.0], [-1.0, -1.0]])
    return {
        "row": trainer.gather(rows if rank == 0 else torch.tensor([[-1.0, -1.0]]), padding_value=-1),
        "vector": trainer.gather(rows if rank == 1 else torch.tensor([-1] * 2), padding_value=-1),
        "wider": trainer.gather(rows if rank == 1 else torch.full((3, 7), -1.0), padding_value=-1),
        "none": trainer.gather(torch.tensor([[-1, -1]]), padding_value=-1),
        "nested": trainer.gather([{"a": rows if rank == 0 else torch.tensor([-1.0])}], padding_value=-1),
        "refused": message_of(lambda: trainer.gather(rows if rank == 0 else rows[0], padding_value=-1)),
    }


def message_of(function: Any) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return ""


def case_decorators_choose_the_processes_that_call(rank: int, directory: Path) -> Any:
    path = directory / "made_first"

    @local_process_zero_first
    def make() -> bool:
        was_there = path.exists()
        path.touch()
        return was_there

    return {
        "world": world_process_zero_only(lambda value: value)(rank),
        "local": local_process_zero_only(lambda value: value)(rank),
        "was_there": make(),
    }


def case_broadcasts_and_sums_cover_all_processes(rank: int, directory: Path) -> Any:
    pairs = {f"of {rank}": (7.0, 1), "both": (rank, torch.tensor(2.0))}
    sums = collectives.sum_over_processes(pairs, Accelerator().device)
    return {
        "value": collectives.broadcast_from_main({"rank": rank}, 2),
        "sums": {name: [float(number) for number in pair] for name, pair in sums.items()},
    }


def case_one_process_shows_one_bar_and_one_line_per_epoch(rank: int, directory: Path) -> Any:
    loss_monitor.SECONDS_BETWEEN_LOG_POINTS = 0.0
    os.environ["TERM"] = "xterm"
    terminal = Terminal()
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        trainer = make_trainer(callbacks=get_default_callbacks())
        train(trainer, num_epochs=2, eval_dataset=make_dataset(8))
        trainer.predict(make_dataset(8), per_device_batch_size=4)
    loss_monitor.SECONDS_BETWEEN_LOG_POINTS = 0.1
    return {"written": terminal.getvalue(), "screen": terminal.screen(), "metrics": metrics_of(trainer)}


def case_print_writes_on_the_main_process_only(rank: int, directory: Path) -> Any:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        make_trainer().print("hello")
    return printed.getvalue()


# --- randomness and data -----------------------------------------------------------------------------------------


class GlobalSampler(Sampler):
    """Draws its order from NumPy's global generator, as many users' samplers do."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __iter__(self) -> Any:
        return iter(np.random.permutation(self.num_samples).tolist())

    def __len__(self) -> int:
        return self.num_samples


def order_of(dataset: Any, seed: int | None = None, **kwargs: Any) -> list[list[int]]:
    """Return the samples that this process saw in each epoch."""
    seen: list[list[int]] = []
    probe = Probe(
        on_train_epoch_start=lambda trainer, **k: seen.append([]),
        on_train_step_start=lambda trainer, batch, **k: seen[-1].extend(batch[0].flatten().int().tolist()),
    )
    trainer = make_trainer(make_model(1), callbacks=[probe], lr=0.0, seed=seed)
    train(trainer, dataset, num_epochs=2, train_dataloader_kwargs=kwargs)
    return seen


def case_each_sample_is_seen_once_per_epoch_in_a_seeded_order(rank: int, directory: Path) -> Any:
    dataset = make_indexed_dataset(16)
    torch.manual_seed(1)
    np.random.seed(rank)
    first = order_of(dataset)
    torch.manual_seed(1)
    return {
        "whole batches": first,
        "again": order_of(dataset),
        "samples": order_of(Samples(dataset), num_workers=0),
        "custom sampler": order_of(Samples(dataset), num_workers=0, sampler=GlobalSampler(16)),
        "seeded": order_of(dataset, seed=3),
        "other seed": order_of(dataset, seed=4),
    }


def case_random_numbers_differ_by_rank_but_the_data_order_does_not(rank: int, directory: Path) -> Any:
    drawn = {}
    for name, seed in (("program", None), ("trainer", 7)):
        torch.manual_seed(5)
        trainer = make_trainer(seed=seed)
        train(trainer, make_dataset(8))
        drawn[name] = (torch.rand(1).item(), np.random.rand(), trainer.run_config.seed)
    torch.manual_seed(5 + rank)  # the user has seeded the ranks differently: their generators are left alone
    trainer = make_trainer()
    torch.manual_seed(5 + rank)
    train(trainer, make_dataset(8))
    drawn["different"] = torch.rand(1).item()
    torch.manual_seed(5 + rank)
    drawn["expected"] = torch.rand(1).item()
    return drawn


def case_each_process_trains_on_its_local_iterable_of_batches(rank: int, directory: Path) -> Any:
    """A plain iterable of batches is not sharded: each process reads its local one."""
    trainer = make_trainer()
    train(trainer, Batches(make_dataset(8, seed=rank), 4))
    return {"weights": weights_of(trainer.model), "samples": trainer.progress.num_samples}


# --- files -------------------------------------------------------------------------------------------------------


def case_only_the_main_process_writes_checkpoints(rank: int, directory: Path) -> Any:
    written = []
    save_file = portable.save_file
    portable.save_file = lambda contents, path: (written.append(str(path)), save_file(contents, path))[1]
    try:
        trainer = make_trainer()
        probe = Probe(on_training_run_epoch_end=lambda trainer, **k: trainer.save_checkpoint(directory / "during.pt"))
        trainer.callback_handler.add_callback(probe)
        train(trainer, make_dataset(16))
        trainer.save_checkpoint(directory / "after.pt", save_per_node=False)
    finally:
        portable.save_file = save_file
    other = make_trainer(make_model(seed=9))
    other.load_checkpoint(directory / "during.pt")
    names = sorted(torch.load(directory / "during.pt", weights_only=True)["model_state_dict"])
    return {
        "written": written,
        "names": names,
        "weights": weights_of(trainer.model),
        "loaded": weights_of(other.model),
    }


def case_weights_in_other_forms_are_saved_and_loaded_on_all(rank: int, directory: Path) -> Any:
    trainer, path = make_trainer(), directory / "adapter.safetensors"
    trainer.model.bias.requires_grad_(False)
    save = lambda trainer, **_: trainer.save_checkpoint(path, {}, save_optimizer=False, trainable_only=True)  # noqa: E731
    trainer.callback_handler.add_callback(Probe(on_training_run_epoch_end=save))
    train(trainer, make_dataset(16))
    other = make_trainer(make_model(seed=9))
    other.model.bias.data.copy_(trainer.model.bias)
    other.load_checkpoint(path)
    head = make_trainer(nn.Linear(3, 1, bias=False))
    loaded = head.load_checkpoint(path, strict=False)
    trainer._accelerator.wait_for_everyone()
    if rank == 0:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    trainer._accelerator.wait_for_everyone()
    try:
        head.load_checkpoint(path)
    except CheckpointError as error:
        refusal = str(error)
    return {
        "weights": weights_of(trainer.model),
        "loaded": weights_of(other.model),
        "rest": loaded.describe_rest(),
        "refusal": refusal,
    }


def dropout_trainer(callbacks: Any = ()) -> Any:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    return Trainer(model, mse, torch.optim.Adam(model.parameters(), lr=0.01), callbacks=callbacks)


def case_a_resumed_run_ends_with_the_same_weights_and_history(rank: int, directory: Path) -> Any:
    dataset = Samples(make_dataset(32))
    kwargs = {"num_epochs": 2, "eval_dataset": make_dataset(16), "train_dataloader_kwargs": {"num_workers": 0}}

    def save(trainer: Any, **_: Any) -> None:
        if trainer.progress.num_updates in (2, 4):
            trainer.save_training_state(directory / f"state_{trainer.progress.num_updates}")

    whole = dropout_trainer([Probe(on_train_step_end=save)])
    train(whole, dataset, **kwargs)
    resumed = {}
    for number in (2, 4):
        trainer = dropout_trainer()
        torch.manual_seed(77)
        train(trainer, dataset, resume_from=directory / f"state_{number}", **kwargs)
        resumed[number] = {"weights": weights_of(trainer.model), "metrics": metrics_of(trainer)}
    files = sorted(path.name for path in (directory / "state_2").iterdir())
    left = sorted(path.name for path in directory.iterdir() if path.name.startswith(".state"))
    whole_result = {"weights": weights_of(whole.model), "metrics": metrics_of(whole)}
    return {"whole": whole_result, "resumed": resumed, "files": files, "left": left}


# --- last, because a failure may leave the processes out of step --------------------------------------------------


def case_a_run_continues_from_before_the_decay_of_another(rank: int, directory: Path) -> Any:
    """The first run makes 12 updates, and the continuation as many."""
    results = []
    for name, initial in [("wsd", None), ("wsd_next", directory / "wsd" / "checkpoint_9_wsd_pre_decay")]:
        callback = WSDCheckpointCallback(directory / name, initial_checkpoint=initial)
        recorder, rates = recorder_of(
            lambda trainer: trainer.optimizer.param_groups[0]["lr"], "on_optimizer_step_start"
        )
        trainer = make_trainer(make_model(seed=len(name)), callbacks=[callback, recorder])
        create = WSDLrScheduler.create_scheduler_fn(
            decay_phase_ratio=0.25, lr_min=0.1, is_continuation_from_checkpoint=initial is not None
        )
        train(trainer, make_dataset(48), num_epochs=2, create_scheduler_fn=create)
        results.append({"rates": rates, "weights": weights_of(trainer.model), "step": callback.last_checkpoint_step})
    return results


def case_the_trainer_trains_again_after_an_exception(rank: int, directory: Path) -> Any:
    """The error happens on both processes."""
    model = make_model()

    def fail(trainer: Any, **_: Any) -> None:
        raise LookupError("mine")

    trainer = make_trainer(model, callbacks=[Probe(on_train_step_end=fail)])
    try:
        train(trainer, make_dataset(16))
    except LookupError:
        is_plain = trainer.model is model
    trainer.callback_handler.clear_callbacks()
    train(trainer, make_dataset(16))
    return {"is_plain": is_plain, "num_losses": len(metrics_of(trainer)["train_loss_epoch"])}


def case_a_copied_trainer_trains_on_as_the_original(rank: int, directory: Path) -> Any:
    results = []
    for duplicate in (copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))):
        trainer = train(make_trainer(), make_dataset(16))
        other = duplicate(trainer)
        results.append([weights_of(train(each, make_dataset(16)).model) for each in (other, trainer)])
    return results


def case_a_metric_of_one_process_is_averaged_over_its_batches(rank: int, directory: Path) -> Any:
    class OnlyMain(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> Any:
            metrics = {"rare": 3.0} if self.process_index == 0 else {}
            return {**super().calculate_train_batch_loss(batch), "metrics": metrics}

    trainer = make_trainer(cls=OnlyMain, lr=0.0)
    train(trainer, make_dataset(16))
    return metrics_of(trainer)


def case_only_the_main_process_writes_logs_and_they_have_the_means_over_all(rank: int, directory: Path) -> Any:
    folder = directory / "logs"  # the same on both
    tracking = TensorBoardCallback(folder / "events", every_n_updates=2)
    callbacks = [CSVLogCallback(folder / "log.csv"), tracking]
    history = JsonlRunHistory(folder / "history.jsonl", record_every_n_updates=2)
    trainer = make_trainer(callbacks=callbacks, run_history=history)
    train(trainer, Samples(make_dataset(24)), num_epochs=2, eval_dataset=make_dataset(6), per_device_batch_size=2)
    metrics = trainer.evaluate(make_dataset(6))
    trainer._accelerator.wait_for_everyone()
    return {
        "has_writer": tracking.writer is not None,
        "files": sorted(path.name for path in folder.iterdir()),
        "num_event_files": len(list((folder / "events").glob("events.*"))),
        "num_lines": len((folder / "history.jsonl").read_text().splitlines()),
        "num_rows": len((folder / "log.csv").read_text().splitlines()),
        "steps": _scalars_of(folder / "events", "train_loss_step"),
        "steps_in_history": history.get_metric_values("train_loss_step"),
        "losses": metrics_of(trainer)["train_loss_epoch"],
        "metrics": metrics,
    }


def _scalars_of(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return [(point.step, point.value) for point in reader.Scalars(tag)]


def case_what_looks_on_sees_all_processes_and_changes_nothing(rank: int, directory: Path) -> Any:
    states, traces = directory / "lookers_on", directory / "traces"

    def run(has_lookers_on: bool, **kwargs: Any) -> Any:
        statistics = LayerStatisticsCallback(1)
        callbacks = [
            statistics,
            ThroughputCallback(count_tokens=lambda batch: 10 * len(batch[0])),
            GradientNormCallback(per_layer=True),
            UpdateRatioCallback(every_n_updates=1),
            LearningRateCallback(),
            TimeLedgerCallback(record_epochs=True, print_table=False),
            ProfilerCallback(traces, wait=0, warmup=1, active=1),
            SaveTrainingStateCallback(states, save_every_n_steps=3, save_at_end=False),
        ]
        trainer = make_trainer(callbacks=callbacks if has_lookers_on else [])
        settings = {"num_epochs": 2, "per_device_batch_size": 2, "gradient_accumulation_steps": 2, **kwargs}
        train(trainer, make_dataset(14), train_dataloader_kwargs=IN_ORDER, **settings)
        metrics = {name: values for name, values in metrics_of(trainer).items() if not name.startswith("seconds")}
        per_second = [metrics.pop(f"train_{what}_per_second", [1.0]) for what in ("tokens", "samples", "updates")]
        metrics["tokens of a sample"] = [tokens / samples for tokens, samples in zip(*per_second[:2], strict=True)]
        looks = [
            look(name) for look in (statistics.activations, statistics.gradients) for name in ("mean", "std", "zeros")
        ]
        ledger = trainer.time_ledger
        return weights_of(trainer.model), metrics, [look.tolist() for look in looks], sum(ledger.seconds.values()) > 0

    without, complete = run(False)[0], run(True)
    resumed = run(True, resume_from=states / "step_3")  # within an accumulation window
    return without, complete, resumed, sorted(path.name.partition(".")[0] for path in traces.iterdir())


CASES = {name.removeprefix("case_"): value for name, value in list(globals().items()) if name.startswith("case_")}

if __name__ == "__main__":
    run_cases(CASES)
