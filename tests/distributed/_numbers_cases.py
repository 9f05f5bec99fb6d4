"""The part of `test_numbers.py` that runs on each of two or three processes, as a script.

Each function `case_<name>` returns plain values and tensors, which are stored for `test_<name>`. With an argument, such
as ``killed``, the script instead starts a run and loses the process of rank 1 in this way.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import signal
import sys
import time
import warnings
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DDPCommunicationHookType

import _measured
import _numbers
import _predicting
from _numbers import IN_ORDER, LossWithParameters, Pair, TextTrainer, gradients_of, make_net, make_texts
from _processes import NUM_REPEATS, WAIT_SECONDS, run_cases
from _support import (
    EventRecorder,
    Probe,
    Samples,
    Stream,
    history_of,
    make_dataset,
    make_indexed_dataset,
    make_model,
    make_trainer,
    mse,
    weights_of,
)
from _support import train as train_for_one_epoch
from pytorch_accelerated import Trainer
from pytorch_accelerated._distributed import consensus
from pytorch_accelerated._distributed.consensus import StopConsensus
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    ModelEmaCallback,
    SaveBestModelCallback,
    TerminateOnNaNCallback,
)
from pytorch_accelerated.exceptions import NonFiniteLossError, StopTrainingError

train = functools.partial(train_for_one_epoch, num_epochs=2, per_device_batch_size=2)


def num_processes() -> int:
    return int(os.environ["WORLD_SIZE"])


# --- metrics -----------------------------------------------------------------------------------------------------


def case_metrics_are_those_of_one_process(rank: int, directory: Path) -> Any:
    return _measured.whole_run(num_processes())


def case_metrics_are_the_same_after_a_resume(rank: int, directory: Path) -> Any:
    """In the middle of an epoch. The states are kept for a single process, which resumes one too."""
    folder = directory / "measured"
    expected = _measured.train(_measured.resumable(folder), num_processes=num_processes())
    resumed = [
        _measured.train(
            _measured.resumable(directory / f"resumed{index}"),
            num_processes=num_processes(),
            resume_from=_measured.states_in(folder)[index],
        )
        for index in (1, 2, 6)
    ]
    return expected, resumed


# --- numbers -----------------------------------------------------------------------------------------------------


def case_gradients_and_losses_match_those_of_big_batches(rank: int, directory: Path) -> Any:
    return _numbers.grid_differences(num_processes())


def case_the_fast_path_gives_the_same_bits(rank: int, directory: Path) -> Any:
    return _numbers.points_where_the_paths_differ(every_nth=4 * (num_processes() - 1))


def case_runs_match_those_of_one_process(rank: int, directory: Path) -> Any:
    return {
        (scheduler, accumulation): _numbers.whole_run(4, accumulation, scheduler)
        for scheduler in ("cosine", "one cycle")
        for accumulation in (1, 2)
    }


def case_batches_of_different_weight_by_rank_are_averaged(rank: int, directory: Path) -> Any:
    """The number of items in a batch differs by rank. In one of the updates no rank has any."""

    class ByRank(TextTrainer):
        def calculate_train_batch_loss(self, batch: Any) -> Any:
            return {**super().calculate_train_batch_loss(batch), "num_items_in_batch": items[rank]}

    differences = []
    for items in ([1, 5, 2], [0, 3, 0], [0, 0, 0]):
        net, gradients = make_net(), []
        probe = Probe(on_optimizer_step_start=lambda t, g=gradients: g.append(gradients_of(t.get_model())))
        trainer = ByRank(net, None, torch.optim.SGD(net.parameters(), lr=0.0), callbacks=[probe])
        dataset = make_texts(4 * num_processes())
        train(trainer, dataset, num_epochs=1, per_device_batch_size=4, train_dataloader_kwargs=IN_ORDER)
        gradients_by_rank = _numbers.big_batch_gradients(dataset, 4, is_weighted=False)
        total = max(1, sum(items[: num_processes()]))
        weighted = [
            [gradient * weight / total for gradient in gradients_of_rank]
            for gradients_of_rank, weight in zip(gradients_by_rank, items, strict=False)
        ]
        expected = [sum(parts) for parts in zip(*weighted, strict=True)]
        differences.append(_numbers.largest_difference(gradients, [expected]))
    return differences


def case_gradients_are_clipped_once_per_update(rank: int, directory: Path) -> Any:
    """Compare with a hand-written loop over the big batches, before and after clipping."""
    results = {}
    for accumulation in (1, 3):
        for kind, limit in (("norm", 0.3), ("norm", 100.0), ("value", 0.05)):
            net, before, after, norms = make_net(), [], [], []

            def see(trainer: Any, after: Any = after, norms: Any = norms) -> None:
                after.append(gradients_of(trainer.get_model()))
                norms.append(None if trainer.gradient_norm is None else float(trainer.gradient_norm))

            probe = Probe(
                on_optimizer_step_start=lambda t, before=before: before.append(gradients_of(t.get_model())),
                on_optimizer_step_end=see,
            )
            trainer = TextTrainer(net, None, torch.optim.SGD(net.parameters(), lr=0.5), callbacks=[probe])
            dataset = make_texts(29)
            trainer.train(
                dataset,
                num_epochs=1,
                per_device_batch_size=2,
                gradient_accumulation_steps=accumulation,
                train_dataloader_kwargs=IN_ORDER,
                **{f"gradient_clip_{kind}": limit},
            )
            big_batches = _numbers.big_batches(dataset, 2 * accumulation * num_processes())
            expected = clipped_by_hand(big_batches, kind, limit)
            results[kind, limit, accumulation] = {
                "before": _numbers.largest_difference(before, expected["before"]),
                "after": _numbers.largest_difference(after, expected["after"]),
                "weights": _numbers.largest_difference([list(net.parameters())], [expected["weights"]]),
                "norms": norms,
                "expected norms": expected["norms"],
                "num_clipped": expected["num_clipped"],
            }
    return results


def clipped_by_hand(batches: Any, kind: str, limit: float) -> dict[str, Any]:
    net = make_net()
    seen: dict[str, Any] = {"before": [], "after": [], "norms": [], "num_clipped": 0}
    for batch in batches:
        net.zero_grad()
        _numbers.mean_loss(net, batch, is_weighted=False)[0].backward()
        gradients = gradients_of(net)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
        if kind == "norm":
            clipped = [gradient * min(1.0, limit / norm) for gradient in gradients]
        else:
            clipped = [gradient.clamp(-limit, limit) for gradient in gradients]
        with torch.no_grad():
            for parameter, gradient in zip(net.parameters(), clipped, strict=True):
                parameter -= 0.5 * gradient
        seen["before"].append(gradients)
        seen["after"].append(clipped)
        seen["norms"].append(norm)
        seen["num_clipped"] += any(not torch.equal(*pair) for pair in zip(gradients, clipped, strict=True))
    return {**seen, "weights": [parameter.detach() for parameter in net.parameters()]}


def case_parameters_outside_the_model_get_the_gradient_of_the_update(rank: int, directory: Path) -> Any:
    """Compare with a hand-written loop over the samples of each update, in their order."""
    results = {}
    dataset = make_dataset(29)
    for accumulation, limit in ((1, None), (3, None), (1, 0.3), (3, 0.3)):
        model, loss_func = (
            torch.nn.Linear(3, 1),
            LossWithParameters(start=float(rank)),
        )  # rank 0 gives the others its value
        parameters = [*model.parameters(), *loss_func.parameters()]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.1)
        trainer = Trainer(model, loss_func, torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1), callbacks=())
        trainer.train(
            dataset,
            num_epochs=2,
            per_device_batch_size=2,
            gradient_accumulation_steps=accumulation,
            gradient_clip_norm=limit,
            train_dataloader_kwargs=IN_ORDER,
        )
        results[accumulation, limit] = [parameter.detach().clone() for parameter in parameters]
    return results


def case_a_second_optimizer_that_nobody_synchronizes_is_named(rank: int, directory: Path) -> Any:
    trainer = make_trainer()
    trainer.critic_optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(trainer, make_dataset(12))
    return [str(warning.message) for warning in caught if "critic_optimizer" in str(warning.message)]


def case_a_bad_gradient_on_one_rank_is_applied_on_none(rank: int, directory: Path) -> Any:
    """Rank 1 gets a NaN loss in update 2, or a NaN gradient of a finite loss, or a NaN while a state is saved."""
    results = {}
    for kind, accumulation in (("loss", 1), ("gradient", 1), ("loss", 3), ("gradient", 3), ("saved", 3)):

        def spoil(trainer: Any, batch_output: Any, step: int, kind: str = kind, **_: Any) -> None:
            if rank == 1 and trainer.progress.num_updates == 2:
                zero = 0 * trainer.model.module.weight.sum()
                batch_output["loss"] = batch_output["loss"] + (zero.sqrt() if kind == "gradient" else zero * math.nan)

        def save(trainer: Any, step: int, kind: str = kind, **_: Any) -> None:
            if kind == "saved" and step % 3 == 1:
                trainer.save_training_state(directory / "saved")

        probe = Probe(on_backward_start=spoil, on_train_step_end=save)
        trainer = make_trainer(callbacks=[probe, TerminateOnNaNCallback])
        try:
            train(trainer, make_dataset(80), gradient_accumulation_steps=accumulation)
        except Exception as error:
            results[kind, accumulation] = (type(error).__name__, str(error), trainer.progress.num_updates)
            assert all(torch.isfinite(parameter).all() for parameter in trainer.get_model().parameters())
    return results


# --- evaluation --------------------------------------------------------------------------------------------------


def case_evaluation_and_prediction_use_each_sample_once(rank: int, directory: Path) -> Any:
    return {
        (length, is_in_memory): _numbers.evaluations(length, is_in_memory)
        for length in _numbers.EVALUATED_LENGTHS
        for is_in_memory in (True, False)
    }


class Shrinking(Samples):
    """A callback shortens it after the first epoch."""

    length = 80

    def __len__(self) -> int:
        return self.length


def case_an_epoch_has_the_length_that_the_dataset_has_at_its_start(rank: int, directory: Path) -> Any:
    """Gradients of the updates of two epochs, and by hand; the last batches are unequal."""
    gradients, shown = [], []

    def start(trainer: Any, **_: Any) -> None:
        shown.append(trainer._train_dataloader.dataset is trainer.train_dataset)
        if trainer.run_history.current_epoch == 2:
            trainer.train_dataset.length = 20 * num_processes() + 1

    class Recording(Trainer):
        def _prepare_model_optimizer_and_dataloaders(self) -> None:
            super()._prepare_model_optimizer_and_dataloaders()
            step = self.optimizer.step
            self.optimizer.step = lambda *args: (gradients.append(self.get_model().weight.grad.clone()), step(*args))[1]

    dataset = Shrinking(make_dataset(80))
    trainer = make_trainer(cls=Recording, lr=0.0, callbacks=[Probe(on_train_epoch_start=start)])
    with mock.patch.object(consensus, "SECONDS_BETWEEN_EXCHANGES", 1000.0):
        train(trainer, dataset, train_dataloader_kwargs={**IN_ORDER, "num_workers": 0})
    expected = []
    for length in (80, 20 * num_processes() + 1):
        for first in range(0, length, 2 * num_processes()):
            samples = [dataset[index] for index in range(first, min(first + 2 * num_processes(), length))]
            inputs, targets = (torch.stack(parts) for parts in zip(*samples, strict=True))
            expected.append(torch.autograd.grad(mse((model := make_model())(inputs), targets), model.weight)[0])
    return {"gradients": gradients, "expected": expected, "shown": shown}


def case_several_datasets_are_evaluated_during_training(rank: int, directory: Path) -> Any:
    """One of the datasets is smaller than the number of processes."""
    trainer = _numbers.Classifier()
    eval_dataset = {"long": _numbers.make_classes(65), "short": _numbers.make_classes(1)}
    train(trainer, _numbers.make_classes(7), eval_dataset=eval_dataset, per_device_batch_size=8)
    history = trainer.run_history
    return {name: history.get_metric_values(name) for name in sorted(history.get_metric_names())}


def case_predictions_are_returned_on_the_requested_processes(rank: int, directory: Path) -> Any:
    trainer = make_trainer()
    dataset = make_dataset(13)
    outputs = {
        (on_every_process, move_to_host): trainer.predict(
            dataset, per_device_batch_size=2, on_every_process=on_every_process, move_to_host=move_to_host
        )
        for on_every_process in (True, False)
        for move_to_host in (True, False)
    }
    return {"outputs": outputs, "expected": trainer.model(dataset.tensors[0]).detach()}


def case_outputs_of_any_form_are_predicted_in_order(rank: int, directory: Path) -> Any:
    return {
        (name, sizes): _predicting.parts_of(_predicting.predict_form(name, *sizes))
        for name in _predicting.FORMS
        for sizes in _predicting.SIZES[::2]
    }


def case_outputs_that_cannot_be_joined_are_refused_on_all_processes(rank: int, directory: Path) -> Any:
    """Also if only the batch of another process shows it."""
    messages = []
    for settings in ({}, {"outputs": "logits"}, {"outputs": "rows", "return_targets": True}):
        trainer = Trainer(_predicting.Predicting(_predicting.ragged), None, None, callbacks=())
        try:
            trainer.predict(_predicting.indices_of(9), 2, **settings)
        except ValueError as error:
            messages.append(str(error))
    return messages


def case_a_language_model_predicts_in_order(rank: int, directory: Path) -> Any:
    return _predicting.language_model_predictions() if importlib.util.find_spec("transformers") else None


def case_each_sample_of_a_stream_is_used_once(rank: int, directory: Path) -> Any:
    """The main process reads such datasets, without length and indices, for all ranks."""
    results = {}
    for length in (1, 2, 13, 16):
        seen: list[Any] = []

        def see(trainer: Any, batch: Any, batch_output: Any, seen: Any = seen, **_: Any) -> None:
            seen.extend(trainer.gather(batch[2]).tolist())
            assert batch_output["batch_size"] == len(batch[2])

        trainer = _numbers.Classifier([Probe(on_train_step_end=see)])
        stream = Stream(_numbers.make_classes(length))
        train(trainer, stream, num_epochs=1, per_device_batch_size=4, eval_dataset=stream)
        results[length] = {
            "seen in training": seen,
            "num_samples": trainer.progress.num_samples,
            "registry": len(trainer._accelerator._dataloaders),
            **_numbers.evaluations(length, is_in_memory=False, wrap=Stream),
        }
    return results


def case_gather_keeps_rows_and_structure(rank: int, directory: Path) -> Any:
    trainer = make_trainer()
    padding = torch.full((1 + rank, 1 + rank), -1)
    nearly_padding = padding.clone()
    nearly_padding[0, 0] = 5
    return {
        "uneven": trainer.gather(torch.full((rank, 2), float(rank))),
        "none on the main process": trainer.gather(torch.arange(2 * rank)),
        "none on the last process": trainer.gather(torch.arange(2)[: 2 * (rank < num_processes() - 1)]),
        "none at all": trainer.gather(torch.ones(0, 3)),
        "no width": trainer.gather(torch.ones(rank + 1, 0)),
        "equal to the padding": trainer.gather(nearly_padding, padding_value=-1),
        "padding only": trainer.gather(padding, padding_value=-1),
        "true": trainer.gather(torch.ones(rank, dtype=torch.bool)),
        "scalar": trainer.gather(torch.tensor(rank)),
        "nested": trainer.gather(
            OrderedDict(a=[torch.full((rank,), rank)], b=Pair(torch.tensor(rank), (torch.ones(rank, 1 + rank),))),
            padding_value=9,
        ),
    }


def case_gather_refuses_different_shapes_on_every_process(rank: int, directory: Path) -> Any:
    trainer = make_trainer()
    messages = []
    for value in (torch.ones(2, 1 + rank), {"a": torch.ones(rank), "b": [torch.ones(rank, 2, 1 + rank)]}):
        try:
            trainer.gather(value)
        except ValueError as error:
            messages.append(str(error))
    return {"messages": messages, "afterwards": trainer.gather(torch.tensor([rank]))}


# --- decisions ---------------------------------------------------------------------------------------------------


class BadLoss(Trainer):
    """The loss is not finite on rank 1, in the batch that the attributes select."""

    stage, bad_epoch, bad_step, bad_loss = "training", 1, 0, float("nan")
    step = -1

    def train_epoch_start(self) -> None:
        super().train_epoch_start()
        self.step = -1

    def eval_epoch_start(self) -> None:
        super().eval_epoch_start()
        self.step = -1

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        return self.spoil(super().calculate_train_batch_loss(batch), "training")

    def calculate_eval_batch_loss(self, batch: Any) -> Any:
        return self.spoil(super().calculate_eval_batch_loss(batch), "evaluation")

    def spoil(self, batch_output: Any, stage: str) -> Any:
        self.step += 1
        place = (1, self.stage, self.bad_epoch, self.bad_step)
        if place == (self.process_index, stage, self.run_history.current_epoch, self.step):
            batch_output["loss"] = batch_output["loss"] * self.bad_loss
        return batch_output


def case_a_non_finite_loss_of_one_rank_stops_all_at_the_same_update(rank: int, directory: Path) -> Any:
    """In the first and second batch of an accumulation window, in a short last one, and in evaluation."""
    places = [("training", 1, 0), ("training", 1, 3), ("training", 2, 4), ("training", 1, 5)]
    places += [("evaluation", 1, 1), ("evaluation", 2, 0)]
    results = []
    for repeat in range(NUM_REPEATS):
        for stage, epoch, step in places:
            log: list[str] = []
            trainer = make_trainer(cls=BadLoss, callbacks=[TerminateOnNaNCallback, EventRecorder(log)])
            trainer.stage, trainer.bad_epoch, trainer.bad_step = stage, epoch, step
            trainer.bad_loss = float("inf") if repeat % 2 else float("nan")
            model, message = trainer.model, None
            dataset = make_dataset(12 * num_processes() - 1)  # 6 batches on each process
            try:
                train(trainer, dataset, eval_dataset=make_dataset(9), gradient_accumulation_steps=2)
            except NonFiniteLossError as error:
                message = str(error)
            results.append(
                {
                    "place": (stage, epoch, step),
                    "message": message,
                    "num_updates": trainer.progress.num_updates,
                    "weights": weights_of(model),
                    "is_plain": trainer.model is model,
                    "last_event": log[-1],
                    "stop_reason": trainer.stop_reason,
                }
            )
    return results


STOPPED_IN = {
    "on_training_run_start": 1,
    "on_train_epoch_start": 2,
    "on_train_step_start": 2,
    "on_backward_start": 5,
    "on_optimizer_step_start": 2,
    "on_optimizer_step_end": 2,
    "on_train_step_end": 3,
    "on_train_epoch_end": 1,
    "on_eval_epoch_start": 1,
    "on_eval_step_start": 1,
    "on_eval_step_end": 2,
    "on_eval_epoch_end": 1,
    "on_training_run_epoch_end": 1,
}
"""The call of each event in which rank 1 requests to stop."""


def case_a_stop_of_one_rank_stops_all_at_the_same_update(rank: int, directory: Path) -> Any:
    results = []
    for _ in range(NUM_REPEATS):
        for event, which in STOPPED_IN.items():
            log: list[str] = []

            def stop(trainer: Any, event: str = event, which: int = which, log: Any = log, **_: Any) -> None:
                if rank == 1 and log.count(event) == which:
                    raise StopTrainingError(f"rank 1 in {event}")

            trainer = make_trainer(callbacks=[EventRecorder(log, {event: stop})])
            dataset = make_dataset(8 * num_processes())  # 4 batches on each process
            train(trainer, dataset, eval_dataset=make_dataset(9), num_epochs=3, gradient_accumulation_steps=2)
            results.append(
                {
                    "event": event,
                    "stop_reason": trainer.stop_reason,
                    "progress": trainer.progress.state_dict(),
                    "weights": weights_of(trainer.model),
                    "log": log,
                }
            )
    return results


def case_a_stop_of_one_rank_ends_an_evaluation_on_all(rank: int, directory: Path) -> Any:
    """After `evaluate` has ended on all ranks, they can train."""

    def stop(trainer: Any, **_: Any) -> None:
        if rank == 1:
            raise StopTrainingError("seen enough")

    trainer = make_trainer(callbacks=[Probe(on_eval_step_end=stop)])
    trainer.evaluate(make_dataset(9))
    reason = trainer.stop_reason
    trainer.callback_handler.clear_callbacks()
    train(trainer, make_dataset(9))
    return {"reason": reason, "afterwards": trainer.stop_reason, "weights": weights_of(trainer.model)}


class MyStopError(StopTrainingError):
    pass


def case_a_subclass_of_the_stop_error_stops_all_ranks(rank: int, directory: Path) -> Any:
    def stop(trainer: Any, **_: Any) -> None:
        if rank == 1:
            raise MyStopError("mine")

    trainer = make_trainer(callbacks=[Probe(on_train_step_end=stop)])
    train(trainer, make_dataset(16))
    return {"reason": trainer.stop_reason, "num_updates": trainer.progress.num_updates}


def by_rank(values: Any) -> Probe:
    """Record a metric that differs by rank after each evaluation."""

    def record(trainer: Any, **_: Any) -> None:
        epoch = trainer.run_history.current_epoch - 1
        trainer.run_history.update_metric("mine", values[trainer.process_index][epoch])

    return Probe(on_eval_epoch_end=record)


METRIC_BY_RANK = [[5.0, 4.0, 3.0, 3.5, 3.6, 2.0], [1.0, 2.0, 3.0, 0.5, 5.0, 6.0], [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]]
"""Only the main process's values do not improve in epochs 4 and 5."""


def case_callbacks_decide_by_the_metric_of_the_main_process(rank: int, directory: Path) -> Any:
    results = []
    for repeat in range(NUM_REPEATS):
        stopping = EarlyStoppingCallback(2, watch_metric="mine")
        best = SaveBestModelCallback(directory / f"best-{repeat}.pt", watch_metric="mine")
        after_epoch = []
        keep = Probe(on_training_run_epoch_end=lambda t, w=after_epoch: w.append(weights_of(t.get_model())))
        trainer = make_trainer(callbacks=[by_rank(METRIC_BY_RANK), keep, best, stopping], lr=0.01)
        train(trainer, make_dataset(16), eval_dataset=make_dataset(9), num_epochs=6)
        results.append(
            {
                "reason": trainer.stop_reason,
                "best": (best.best_metric, best.best_metric_epoch),
                "weights": weights_of(trainer.model),
                "after_epoch": after_epoch,
            }
        )
    return results


def case_metrics_of_some_ranks_are_averaged_over_their_batches(rank: int, directory: Path) -> Any:
    """One metric exists on the last rank only, the other in one batch only."""

    class OfSome(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> Any:
            batch_output = super().calculate_train_batch_loss(batch)
            index = batch[0].flatten().tolist()
            metrics = {"last": 3.0} if rank == num_processes() - 1 else {}
            metrics |= {"first": batch[0].mean()} if 0.0 in index else {}
            return {**batch_output, "metrics": metrics}

    trainer = make_trainer(torch.nn.Linear(1, 1), cls=OfSome, lr=0.0)
    train(trainer, make_indexed_dataset(16), num_epochs=1, train_dataloader_kwargs=IN_ORDER)
    history = trainer.run_history
    return {name: history.get_latest_metric(name) for name in ("train_last", "train_first")}


def case_ctrl_c_on_one_rank_interrupts_all(rank: int, directory: Path) -> Any:
    """Rank 1 alone gets the signal: at the end of a step, in evaluation, or in the middle of an accumulation window."""
    results = []
    for repeat in range(NUM_REPEATS):
        event, which = [("on_train_step_end", 3), ("on_eval_step_start", 1), ("on_backward_start", 2)][repeat % 3]
        log: list[str] = []

        def interrupt(trainer: Any, event: str = event, which: int = which, log: Any = log, **_: Any) -> None:
            if rank == 1 and log.count(event) == which:
                signal.raise_signal(signal.SIGINT)

        trainer = make_trainer(callbacks=[EventRecorder(log, {event: interrupt})])
        is_interrupted = False
        try:
            train(trainer, make_dataset(16 * num_processes()), eval_dataset=make_dataset(9))
        except KeyboardInterrupt:
            is_interrupted = True
        results.append(
            {
                "is_interrupted": is_interrupted,
                "reason": trainer.stop_reason,
                "progress": trainer.progress.state_dict(),
                "weights": weights_of(trainer.model),
                "last_event": log[-1],
            }
        )
    return results


def case_the_limit_of_updates_ends_all_ranks(rank: int, directory: Path) -> Any:
    results = {}
    for limit in (1, 3, 4, 7, 99):
        trainer = make_trainer()
        dataset = make_dataset(16 * num_processes() - 3)  # 8 batches on each process, so 4 updates
        train(trainer, dataset, max_num_train_steps=limit, gradient_accumulation_steps=2)
        results[limit] = (trainer.progress.num_updates, trainer.stop_reason, weights_of(trainer.model))
    return results


# --- skipped exchanges -------------------------------------------------------------------------------------------


def counted_run(num_samples: int, accumulation: int, callbacks: Any = ()) -> dict[str, Any]:
    """Train with the library's own step; return the result, the number of updates, and that of their exchanges."""
    num_exchanges, is_update = 0, True
    start_exchange, sync = StopConsensus.start_exchange, StopConsensus.sync

    def start_and_count(self: Any, *arguments: Any, **kwargs: Any) -> None:
        nonlocal num_exchanges
        start_exchange(self, *arguments, **kwargs)
        num_exchanges += is_update and self._skipped is None

    def sync_uncounted(self: Any) -> None:
        nonlocal is_update
        is_update = False
        sync(self)
        is_update = True

    trainer = make_trainer(callbacks=callbacks, seed=3)
    with (
        mock.patch.object(StopConsensus, "start_exchange", start_and_count),
        mock.patch.object(StopConsensus, "sync", sync_uncounted),
    ):
        train(trainer, Samples(make_dataset(num_samples)), gradient_accumulation_steps=accumulation)
    result = weights_of(trainer.model), history_of(trainer), trainer.progress.state_dict()
    return {"result": result, "num_updates": trainer.progress.num_updates, "num_exchanges": num_exchanges}


def case_skipped_exchanges_change_no_bit(rank: int, directory: Path) -> Any:
    results = []
    for num_samples in (120, 121, 119, 7, 1):
        for accumulation in (1, 3):
            skipping = counted_run(num_samples, accumulation)
            listener = Probe(on_train_step_end=lambda trainer, **_: None)  # it could request a stop in any step
            always = counted_run(num_samples, accumulation, [listener])
            results.append((skipping, always))
    return results


def case_a_stop_by_a_callback_of_one_rank_stops_all_at_the_same_update(rank: int, directory: Path) -> Any:
    """Rank 1 has it. The others learn this in an exchange, so none is skipped."""

    def stop(trainer: Any, step: int, **_: Any) -> None:
        if step == 13:
            raise StopTrainingError("enough")

    trainer = make_trainer(callbacks=[Probe(on_train_step_end=stop)] if rank == 1 else [])
    train(trainer, Samples(make_dataset(120)))
    return {"reason": trainer.stop_reason, "num_updates": trainer.progress.num_updates}


class Altered(Samples):
    """Calls a function with the inputs of one sample when it is loaded."""

    def __init__(self, dataset: Any, index: int, alter: Any) -> None:
        super().__init__(dataset)
        self.index, self.alter = index, alter

    def __getitem__(self, index: int) -> Any:
        inputs, targets = super().__getitem__(index)
        return (self.alter(inputs) if index == self.index else inputs), targets


def case_a_bad_loss_between_exchanges_is_named_on_all_ranks(rank: int, directory: Path) -> Any:
    messages = []
    for _ in range(NUM_REPEATS):
        dataset = Altered(make_dataset(2 * num_processes() * 50), 2 * (5 * num_processes() + 1), lambda x: x * math.nan)
        trainer = make_trainer(callbacks=[TerminateOnNaNCallback])
        try:
            train(trainer, dataset, train_dataloader_kwargs=IN_ORDER)
        except NonFiniteLossError as error:
            messages.append(str(error))
    return messages


def case_a_signal_between_exchanges_interrupts_all_ranks(rank: int, directory: Path) -> Any:
    def interrupt(inputs: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return inputs

    results = []
    for _ in range(NUM_REPEATS):
        dataset = Altered(make_dataset(2 * num_processes() * 500), 2 * (40 * num_processes() + 1), interrupt)
        trainer, is_interrupted = make_trainer(), False
        try:
            train(trainer, dataset, train_dataloader_kwargs=IN_ORDER)
        except KeyboardInterrupt:
            is_interrupted = True
        results.append((is_interrupted, trainer.progress.state_dict(), weights_of(trainer.model)))
    return results


# --- the order of sums -------------------------------------------------------------------------------------------


class LateFirst(torch.nn.Module):
    """Calls its layers in another order than that of their registration, and one not at all if so wanted."""

    def __init__(self, is_one_unused: bool = False) -> None:
        super().__init__()
        self.middle = torch.nn.Linear(33, 57)
        self.first = torch.nn.Linear(3, 33)
        self.last = torch.nn.Linear(57, 1)
        if is_one_unused:
            self.unused = torch.nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(inputs)))))


class Normalized(LateFirst):
    """Has buffers, which DDP sends to all ranks before each step."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Sequential(self.first, torch.nn.BatchNorm1d(33))


class Watched(LateFirst):
    """Has a parameter whose gradient a hook of the user's looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0
        self.first.weight.register_hook(self.count)

    def count(self, gradient: torch.Tensor) -> None:
        self.num_calls += 1


def resume_sums(folder: Path, model: Any, accumulation: int = 1, **ddp: Any) -> tuple[list[int], list[str]]:
    """Count the weights that differ after resuming at some steps of seven, and return what resumed runs print."""

    def make_sum_trainer(callbacks: Any = ()) -> Any:
        torch.manual_seed(3)
        accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(**ddp)])
        return make_trainer(model(), lr=0.02, accelerator=accelerator, callbacks=callbacks)

    def save(trainer: Any, step: int, **_: Any) -> None:
        trainer.save_training_state(folder / f"step_{step}")

    dataset, printed, differing = make_dataset(7 * 3 * num_processes()), [], []
    settings = {"num_epochs": 1, "per_device_batch_size": 3, "gradient_accumulation_steps": accumulation}
    whole = make_sum_trainer([Probe(on_train_step_end=save)])
    train(whole, dataset, **settings)
    for step in (1, 2, 5):
        resumed = make_sum_trainer()
        resumed.print = printed.append
        train(resumed, dataset, **settings, resume_from=folder / f"step_{step}")
        pairs = zip(weights_of(resumed.model).values(), weights_of(whole.model).values(), strict=True)
        differing.append(sum(int((actual != expected).sum()) for actual, expected in pairs))
    return differing, [text for text in printed if "last bit" in text]


def case_a_resumed_run_adds_up_gradients_in_the_order_of_the_uninterrupted_one(rank: int, directory: Path) -> Any:
    unused = functools.partial(LateFirst, is_one_unused=True)
    return {
        "one bucket": resume_sums(directory / "one", LateFirst),
        "small buckets": resume_sums(directory / "small", LateFirst, bucket_cap_mb=0.001),
        "buffers": resume_sums(directory / "buffers", Normalized, bucket_cap_mb=0.001),
        "views": resume_sums(directory / "views", LateFirst, bucket_cap_mb=0.001, gradient_as_bucket_view=True),
        "accumulation": resume_sums(directory / "accumulation", LateFirst, accumulation=3, bucket_cap_mb=0.001),
        "unused": resume_sums(directory / "unused", unused, find_unused_parameters=True, bucket_cap_mb=0.001),
    }


def case_a_resumed_run_says_why_gradients_may_be_added_up_in_another_order(rank: int, directory: Path) -> Any:
    hook = DDPCommunicationHookType.FP16
    return {
        "static graph": resume_sums(directory / "static", LateFirst, static_graph=True)[1],
        "communication hook": resume_sums(directory / "hook", LateFirst, comm_hook=hook)[1],
        "parameters have hooks": resume_sums(directory / "watched", Watched)[1],
    }


# --- last, because a failure may leave the processes out of step ----------------------------------------------------


def case_callbacks_decide_by_a_metric_that_only_the_main_process_records(rank: int, directory: Path) -> Any:
    """Such as a metric that is computed in a function with `world_process_zero_only`."""

    def record(trainer: Any, **_: Any) -> None:
        if trainer.process_index == 0:
            trainer.run_history.update_metric("mine", float(trainer.run_history.current_epoch))

    callbacks = [Probe(on_eval_epoch_end=record), EarlyStoppingCallback(1, watch_metric="mine")]
    trainer = make_trainer(callbacks=callbacks)
    train(trainer, make_dataset(16), eval_dataset=make_dataset(9), num_epochs=6)
    ema = ModelEmaCallback(save_path=directory / "ema.pt", watch_metric="mine", greater_is_better=True)
    train(make_trainer(callbacks=[callbacks[0], ema]), make_dataset(16), eval_dataset=make_dataset(9))
    return {
        "reason": trainer.stop_reason,
        "epochs": trainer.progress.num_epochs_completed,
        "best average": ema.best_metric_epoch,
    }


# --- a process that is lost --------------------------------------------------------------------------------------


def lose_rank_1(how: str) -> None:
    process_group = InitProcessGroupKwargs(timeout=timedelta(seconds=WAIT_SECONDS))
    trainer = make_trainer(accelerator=Accelerator(cpu=True, kwargs_handlers=[process_group]))

    def fail(trainer: Any, step: int, **_: Any) -> None:
        if step == 2 and trainer.process_index == 1:
            if how == "dying":
                raise LookupError("of rank 1 alone")
            if how == "out of memory":
                raise torch.OutOfMemoryError("of rank 1 alone")
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGTERM)

    def tell(trainer: Any, exception: BaseException, **_: Any) -> None:
        print(f"on_exception: {type(exception).__name__}", flush=True)

    trainer.callback_handler.add_callback(Probe(on_train_step_start=fail, on_exception=tell))
    start = time.monotonic()
    try:
        train(trainer, Samples(make_dataset(4000)), train_dataloader_kwargs={"num_workers": 0})
    finally:
        print(f"ended after {time.monotonic() - start:.1f} s in update {trainer.progress.num_updates}", flush=True)


CASES = {name.removeprefix("case_"): value for name, value in list(globals().items()) if name.startswith("case_")}

if __name__ == "__main__":
    if len(sys.argv) > 2:
        lose_rank_1(sys.argv[2])
    else:
        run_cases(CASES)
