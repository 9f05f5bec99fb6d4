"""When schedulers are stepped, and with what: any object that is one, in any trainer, in resumed runs too."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR

from _support import (
    HookRecorder,
    Probe,
    losses,
    make_dataset,
    make_model,
    make_optimizer,
    make_trainer,
    mse,
    recorder_of,
    train,
    weights_of,
)
from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated._scheduling.stepping import rule_of
from pytorch_accelerated.callbacks import StepBasedEvaluationCallback
from pytorch_accelerated.schedulers import CosineLrScheduler
from pytorch_accelerated.schedulers.scheduler_base import SchedulerBase
from pytorch_accelerated.trainer import TrainerWithTimmScheduler

DATASET = make_dataset(8)  # two updates in an epoch


class Recording:
    """Records the arguments of its steps."""

    def __init__(self, optimizer=None):
        self.calls = []

    def state_dict(self):
        return {"calls": [list(call) for call in self.calls]}

    def load_state_dict(self, state):
        self.calls = [tuple(call) for call in state["calls"]]


class Plain(Recording):
    def step(self):
        self.calls.append(("step",))


class WithOptionalEpoch(Recording):
    def step(self, epoch=None):
        self.calls.append(("step", epoch))


class WithAnything(Recording):
    def step(self, *args, **kwargs):
        self.calls.append(("step", *args, *kwargs.values()))


class WithMetric(Recording):
    def step(self, metrics, epoch=None):
        self.calls.append(("step", metrics, epoch))


class WithLossByKeyword(Recording):
    def step(self, *, val_loss):
        self.calls.append(("step", val_loss))


class WithOptionalMetric(Recording):
    def step(self, metric=None):
        self.calls.append(("step", metric))


class WithEpoch(Recording):
    def step(self, epoch):
        self.calls.append(("step", epoch))


class OfTimm(Recording):
    def step(self, epoch, metric=None):
        self.calls.append(("epoch", epoch, metric))

    def step_update(self, num_updates, metric=None):
        self.calls.append(("update", num_updates))


class WithBothRequired(Recording):
    def step(self, epoch, score):
        self.calls.append(("step", epoch, score))


def calls_of(scheduler_class, cls=Trainer, **kwargs):
    """Train for two epochs of two updates and an evaluation; return the calls, and the evaluation losses."""
    trainer = make_trainer(cls=cls)
    train(trainer, DATASET, **{"num_epochs": 2, "create_scheduler_fn": scheduler_class, **kwargs})
    return trainer.scheduler.calls, losses(
        trainer, "eval_loss_epoch" if "eval_dataset" in kwargs else "train_loss_epoch"
    )


with_evaluation = partial(calls_of, eval_dataset=make_dataset(4, seed=3))


# --- one scheduler -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheduler_class", "call"), [(Plain, ()), (WithOptionalEpoch, (None,)), (WithAnything, ())])
def test_a_scheduler_without_arguments_is_stepped_after_each_update_or_each_epoch(scheduler_class, call):
    for interval, num_calls in ((None, 4), ("update", 4), ("epoch", 2)):
        calls, _ = with_evaluation(scheduler_class, step_scheduler=interval)
        assert calls == [("step", *call)] * num_calls


@pytest.mark.parametrize(("scheduler_class", "more"), [(WithMetric, (None,)), (WithLossByKeyword, ())])
@pytest.mark.parametrize("interval", [None, "epoch"])
def test_a_scheduler_that_requires_a_metric_gets_that_of_each_epoch(scheduler_class, more, interval):
    calls, values = with_evaluation(scheduler_class, step_scheduler=interval)
    assert calls == [("step", value, *more) for value in values]
    calls, values = calls_of(scheduler_class, step_scheduler=interval)
    assert calls == [("step", value, *more) for value in values]


def test_an_optional_metric_is_passed_if_one_is_named():
    calls, values = with_evaluation(WithOptionalMetric, scheduler_metric="eval_loss_epoch")
    assert calls == [("step", value) for value in values]
    calls, _ = with_evaluation(WithOptionalMetric)
    assert calls == [("step", None)] * 4


def test_a_number_of_epochs_is_passed_to_a_scheduler_that_requires_it():
    assert with_evaluation(WithEpoch)[0] == [("step", 1), ("step", 2)]
    calls, values = with_evaluation(WithBothRequired)
    assert calls == [("step", 1, values[0]), ("step", 2, values[1])]


@pytest.mark.parametrize("cls", [Trainer, TrainerWithTimmScheduler])
def test_a_scheduler_of_timm_gets_updates_epochs_and_the_metric_in_any_trainer(cls):
    calls, values = with_evaluation(OfTimm, cls)
    expected = [("update", 1), ("update", 2), ("epoch", 1, values[0])]
    assert calls == [*expected, ("update", 3), ("update", 4), ("epoch", 2, values[1])]


def test_a_trainer_for_timm_steps_schedulers_of_pytorch_too():
    for interval, num_calls in ((None, 4), ("epoch", 2)):
        calls, _ = with_evaluation(Plain, TrainerWithTimmScheduler, step_scheduler=interval)
        assert calls == [("step",)] * num_calls
    calls, values = with_evaluation(WithMetric, TrainerWithTimmScheduler)
    assert calls == [("step", value, None) for value in values]


@pytest.mark.parametrize("cls", [Trainer, TrainerWithTimmScheduler])
def test_schedulers_of_the_library_have_the_same_rates_in_any_trainer(cls):
    class Halving(SchedulerBase):
        def get_updated_values(self, num_updates):
            return [base / 2**num_updates for base in self.base_values]

    probe, rates = recorder_of(lambda trainer: trainer.optimizer.param_groups[0]["lr"], "on_optimizer_step_start")
    train(make_trainer(cls=cls, callbacks=[probe]), DATASET, create_scheduler_fn=Halving)
    assert rates == [0.1, 0.05]
    train(make_trainer(cls=cls, callbacks=[probe]), DATASET, create_scheduler_fn=lambda o: CosineLrScheduler(o, 1, 2))
    assert rates[2:] == [0.1, pytest.approx(0.05, rel=1e-4)]


def test_a_scheduler_that_a_callback_puts_in_its_place_is_stepped_by_its_own_rule():
    other = WithMetric()

    def replace(trainer):
        trainer.scheduler = other

    trainer = make_trainer(callbacks=[Probe(on_training_run_start=replace)])
    train(trainer, DATASET, create_scheduler_fn=WithMetric)
    assert [call[1] for call in other.calls] == losses(trainer)


class Wrapper:
    """Passes everything on, as `AcceleratedScheduler` does."""

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def step(self, *args, **kwargs):
        self.scheduler.step(*args, **kwargs)

    def state_dict(self):
        return {"scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state):
        self.scheduler.load_state_dict(state["scheduler"])


class GradualWarmUp(Wrapper):
    """All arguments of its step are optional, but the scheduler in it needs one."""

    def step(self, epoch=None, metrics=None):
        self.scheduler.step(metrics)


@pytest.mark.parametrize("wrap", [Wrapper, lambda scheduler: Wrapper(Wrapper(scheduler)), GradualWarmUp])
def test_a_scheduler_around_a_plateau_gets_the_metric(wrap):
    values = []

    class Recorded(ReduceLROnPlateau):
        def step(self, metrics, epoch=None):
            values.append(metrics)
            super().step(metrics)

    trainer = make_trainer()
    kwargs = {"create_scheduler_fn": lambda optimizer: wrap(Recorded(optimizer)), "eval_dataset": DATASET}
    train(trainer, DATASET, num_epochs=2, **kwargs)
    assert values == losses(trainer, "eval_loss_epoch")


def test_a_scheduler_that_passes_everything_on_is_stepped_like_the_one_in_it():
    for scheduler_class, num_calls in ((Plain, 4), (WithEpoch, 2), (WithLossByKeyword, 2)):
        inner = scheduler_class()
        train(make_trainer(), DATASET, num_epochs=2, create_scheduler_fn=lambda _, inner=inner: Wrapper(inner))
        assert len(inner.calls) == num_calls


def test_a_step_without_a_signature_is_called_without_arguments():
    class Odd(Recording):
        step = property(lambda self: self.calls.clear)  # a function written in C

    assert rule_of(Odd()).is_plain


# --- what counts as an update, and as an epoch ----------------------------------------------------------------------


@pytest.mark.parametrize(("interval", "num_steps"), [("update", 1), ("epoch", 2)])
def test_an_update_that_the_gradient_scaler_skipped_is_no_step_but_its_epoch_is(monkeypatch, interval, num_steps):
    trainer = make_trainer(accelerator={"cpu": True})
    was_skipped = iter([True, False, True, True])
    monkeypatch.setattr("pytorch_accelerated.trainer.can_use_fast_path", lambda accelerator: False)
    monkeypatch.setattr(
        type(trainer._accelerator), "optimizer_step_was_skipped", property(lambda self: next(was_skipped))
    )
    train(trainer, DATASET, num_epochs=2, create_scheduler_fn=Plain, step_scheduler=interval)
    assert len(trainer.scheduler.calls) == num_steps


@pytest.mark.parametrize(("max_num_train_steps", "num_steps"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_an_epoch_that_the_limit_of_updates_cuts_short_is_an_epoch(max_num_train_steps, num_steps):
    calls, _ = calls_of(Plain, step_scheduler="epoch", num_epochs=9, max_num_train_steps=max_num_train_steps)
    assert len(calls) == num_steps


def test_a_schedule_of_epochs_ends_with_the_run():
    create = partial(LinearLR, start_factor=1.0, end_factor=0.0, total_iters=TrainerPlaceholderValues.NUM_EPOCHS)
    for limit in ({"num_epochs": 3}, {"num_epochs": 9, "max_num_train_steps": 5}):
        trainer = make_trainer()
        train(trainer, DATASET, create_scheduler_fn=create, step_scheduler="epoch", **limit)
        assert trainer.scheduler.last_epoch == 3
        assert trainer.optimizer.param_groups[0]["lr"] == 0.0


def test_the_rate_is_stepped_after_the_evaluation_and_before_the_end_of_the_epoch():
    log = []

    class Logged(Plain):
        def step(self):
            log.append("step")

    events = ("on_eval_epoch_end", "on_training_run_epoch_end")
    probe = Probe(**{event: lambda trainer, event=event: log.append(event) for event in events})
    train(make_trainer(callbacks=[probe]), 4, eval_dataset=DATASET, create_scheduler_fn=Logged, step_scheduler="epoch")
    assert log == ["on_eval_epoch_end", "step", "on_training_run_epoch_end"]


# --- the metric ------------------------------------------------------------------------------------------------------


def test_only_values_that_are_new_count():
    """A metric that is recorded every second epoch, as by evaluations that a callback makes."""

    def record(trainer):
        if trainer.run_history.current_epoch % 2 == 0:
            trainer.run_history.update_metric("score", trainer.run_history.current_epoch)

    trainer = make_trainer(callbacks=[Probe(on_train_epoch_end=record)])
    with pytest.warns(UserWarning, match="'score', but nothing has been recorded.*Recorded so far: "):
        train(trainer, DATASET, num_epochs=5, create_scheduler_fn=WithMetric, scheduler_metric="score")
    assert [call[1] for call in trainer.scheduler.calls] == [2, 4]


def test_a_scheduler_of_timm_is_passed_no_metric_where_there_is_no_new_one():
    def record(trainer):
        if trainer.run_history.current_epoch == 2:
            trainer.run_history.update_metric("score", 0.5)

    trainer = make_trainer(cls=TrainerWithTimmScheduler, callbacks=[Probe(on_train_epoch_end=record)])
    train(trainer, 4, num_epochs=3, create_scheduler_fn=OfTimm, scheduler_metric="score")
    assert [call for call in trainer.scheduler.calls if call[0] == "epoch"] == [
        ("epoch", 1, None),
        ("epoch", 2, 0.5),
        ("epoch", 3, None),
    ]


def test_values_of_an_earlier_run_are_not_new():
    trainer = make_trainer(callbacks=[Probe(on_training_run_start=lambda t: t.run_history.update_metric("mine", 7))])
    for num_calls in (1, 1):  # each run records one value at its start
        train(
            trainer, 4, num_epochs=2, create_scheduler_fn=WithMetric, scheduler_metric="mine", reset_run_history=False
        )
        assert len(trainer.scheduler.calls) == num_calls
    trainer.callback_handler.callbacks.clear()
    trainer.callback_handler.refresh()
    train(trainer, 4, num_epochs=2, create_scheduler_fn=WithMetric, scheduler_metric="mine", reset_run_history=False)
    assert trainer.scheduler.calls == []


def test_of_several_evaluations_in_an_epoch_the_last_one_counts():
    trainer = make_trainer(callbacks=[StepBasedEvaluationCallback(eval_every_n_steps=1)])
    kwargs = {"eval_dataset": DATASET, "create_scheduler_fn": WithMetric}
    train(trainer, DATASET, num_epochs=2, scheduler_metric="intermediate_eval_loss_epoch", **kwargs)
    values = losses(trainer, "intermediate_eval_loss_epoch")
    assert [call[1] for call in trainer.scheduler.calls] == values[1::2]
    train(trainer, DATASET, num_epochs=2, **kwargs)
    assert [call[1] for call in trainer.scheduler.calls] == losses(trainer, "eval_loss_epoch")


def test_metrics_of_a_step_and_of_a_named_dataset_can_be_watched():
    class WithAccuracy(Trainer):
        def calculate_eval_batch_loss(self, batch):
            return {**super().calculate_eval_batch_loss(batch), "metrics": {"accuracy": batch[0].mean()}}

    kwargs = {"eval_dataset": {"a": DATASET, "b": make_dataset(4)}, "create_scheduler_fn": WithMetric}
    for metric in ("b_eval_accuracy", "a_eval_loss_epoch"):
        trainer = train(make_trainer(cls=WithAccuracy), DATASET, scheduler_metric=metric, **kwargs)
        assert [call[1] for call in trainer.scheduler.calls] == losses(trainer, metric)
    only = {**kwargs, "eval_dataset": {"a": DATASET}}
    trainer = train(make_trainer(), DATASET, **only)
    assert [call[1] for call in trainer.scheduler.calls] == losses(trainer, "a_eval_loss_epoch")


def test_a_metric_that_is_nan_is_passed_on_as_in_a_loop_by_hand():
    probe = Probe(on_eval_epoch_end=lambda trainer: trainer.run_history.update_metric("mine", float("nan")))
    trainer = make_trainer(callbacks=[probe])
    create = partial(ReduceLROnPlateau, patience=0, factor=0.5)
    train(trainer, 4, num_epochs=2, eval_dataset=DATASET, create_scheduler_fn=create, scheduler_metric="mine")
    assert trainer.optimizer.param_groups[0]["lr"] == 0.025


# --- subclasses ------------------------------------------------------------------------------------------------------


class Counting(Trainer):
    """Steps the scheduler in its own way, as programs written for 0.1.61 do."""

    num_calls = 0

    def scheduler_step(self):
        self.num_calls += 1


class Delegating(Counting):
    def scheduler_step(self):
        self.num_calls += 1
        Trainer.scheduler_step(self)


@pytest.mark.parametrize("scheduler_class", [Plain, WithMetric, OfTimm])
def test_a_subclass_that_steps_the_scheduler_itself_is_asked_and_nothing_else_steps_it(scheduler_class):
    for interval, num_calls in ((None, 4), ("update", 4), ("epoch", 2)):
        trainer = make_trainer(cls=Counting)
        kwargs = {"create_scheduler_fn": scheduler_class, "step_scheduler": interval, "eval_dataset": DATASET}
        train(trainer, DATASET, num_epochs=2, **kwargs)
        assert trainer.num_calls == num_calls
        assert trainer.scheduler.calls == []


def test_a_subclass_that_calls_the_library_is_also_asked_where_the_library_steps():
    trainer = train(make_trainer(cls=Delegating), DATASET, num_epochs=2, create_scheduler_fn=WithMetric)
    assert (trainer.num_calls, len(trainer.scheduler.calls)) == (6, 2)
    trainer = train(make_trainer(cls=Delegating), DATASET, num_epochs=2, create_scheduler_fn=Plain)
    assert (trainer.num_calls, len(trainer.scheduler.calls)) == (4, 4)
    kwargs = {"create_scheduler_fn": Plain, "step_scheduler": "epoch"}
    trainer = train(make_trainer(cls=Delegating), DATASET, num_epochs=2, **kwargs)
    assert (trainer.num_calls, len(trainer.scheduler.calls)) == (2, 2)


def test_a_subclass_for_timm_may_pass_the_metric_itself():
    class Own(TrainerWithTimmScheduler):
        def training_run_epoch_end(self):
            self.scheduler.step(self.run_history.current_epoch, metric=0.5)

    datasets = {"a": DATASET, "b": DATASET}
    trainer = train(make_trainer(cls=Own), 4, num_epochs=2, eval_dataset=datasets, create_scheduler_fn=OfTimm)
    assert trainer.scheduler.calls == [("update", 1), ("epoch", 1, 0.5), ("update", 2), ("epoch", 2, 0.5)]


def test_a_subclass_may_make_the_updates_of_an_epoch_itself():
    class Own(Trainer):
        def _run_train_epoch(self, train_dl):
            for step, batch in enumerate(train_dl):
                self._perform_forward_and_backward_passes(batch, step)
                self.optimizer_step()
                self.scheduler_step()
                self.optimizer_zero_grad()
            self._add_epoch_loss_to_run_history("train_loss_epoch")
            return False

    for scheduler_class, interval, num_calls in ((Plain, None, 4), (Plain, "epoch", 2), (WithMetric, None, 2)):
        trainer = make_trainer(cls=Own)
        kwargs = {"create_scheduler_fn": scheduler_class, "step_scheduler": interval}
        train(trainer, DATASET, num_epochs=2, **kwargs)
        assert len(trainer.scheduler.calls) == num_calls


@pytest.mark.parametrize("interval", ["update", "epoch"])
def test_without_a_scheduler_the_hook_is_not_called(interval):
    log = []
    train(make_trainer(cls=HookRecorder, log=log), DATASET, step_scheduler=interval)
    assert "scheduler_step" not in log


# --- groups ----------------------------------------------------------------------------------------------------------


def warm_up_and_plateau(optimizer):
    return [
        LinearLR(optimizer, 0.5, total_iters=2),
        ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.9),
    ]


@pytest.mark.parametrize("form", [list, tuple, lambda schedulers: dict(zip("ab", schedulers, strict=True))])
def test_each_scheduler_of_a_group_is_stepped_by_its_own_rule(form):
    trainer = make_trainer()
    create = lambda optimizer: form([Plain(), WithMetric()])  # noqa: E731
    train(trainer, DATASET, num_epochs=2, eval_dataset=DATASET, create_scheduler_fn=create)
    first, second = trainer.scheduler.schedulers
    assert first.calls == [("step",)] * 4
    assert [call[1] for call in second.calls] == losses(trainer, "eval_loss_epoch")
    assert len(trainer.scheduler) == 2


def test_a_group_is_used_like_what_was_returned():
    class Own(Trainer):
        def scheduler_step(self):
            for scheduler in self.scheduler:
                scheduler.step()

    trainer = train(make_trainer(cls=Own), DATASET, create_scheduler_fn=lambda optimizer: [Plain(), Plain()])
    assert [len(each.calls) for each in trainer.scheduler] == [2, 2]
    assert trainer.scheduler[1] is list(trainer.scheduler)[1]
    trainer = train(make_trainer(), DATASET, create_scheduler_fn=lambda optimizer: {"one": Plain()})
    assert list(trainer.scheduler) == ["one"]
    assert len(trainer.scheduler["one"].calls) == 2
    trainer.scheduler.step()
    assert len(trainer.scheduler["one"].calls) == 3


# --- resume ----------------------------------------------------------------------------------------------------------


class OfTimmWithPlateau:
    """Like timm's: it has a scheduler in it, whose memory is not in its own state."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.inner = ReduceLROnPlateau(optimizer, factor=0.5, patience=1, threshold=0.99)

    def step(self, epoch, metric=None):
        self.inner.step(metric)

    def step_update(self, num_updates, metric=None):
        pass

    def state_dict(self):
        return {"best": self.inner.best}

    def load_state_dict(self, state):
        self.inner.best = state["best"]


SCHEDULES = {
    "epochs": (partial(StepLR, step_size=1, gamma=0.5), {"step_scheduler": "epoch"}),
    "plateau": (partial(ReduceLROnPlateau, factor=0.5, patience=1, threshold=0.99), {}),
    "train loss": (
        partial(ReduceLROnPlateau, factor=0.5, patience=1, threshold=0.99),
        {"scheduler_metric": "train_loss_epoch"},
    ),
    "first dataset": (
        partial(ReduceLROnPlateau, factor=0.5, patience=1, threshold=0.99),
        {"scheduler_metric": "a_eval_loss_epoch", "eval_dataset": {"a": DATASET, "b": make_dataset(4)}},
    ),
    "group": (warm_up_and_plateau, {}),
    "group of epochs": (lambda optimizer: {"a": ExponentialLR(optimizer, 0.9)}, {"step_scheduler": "epoch"}),
    "timm": (OfTimmWithPlateau, {}),
    "recording": (lambda optimizer: [Plain(), WithMetric(), OfTimm()], {}),
    "library": (lambda optimizer: [CosineLrScheduler(optimizer, 5, 2), Plain()], {}),
}


def train_with_states(schedule, folder=None, **kwargs):
    """Train for five epochs, and save a state in each event of the third one."""
    create, more = SCHEDULES[schedule]
    rates, trainer = [], None

    def save(name):
        def act(trainer):
            count = sum(path.name.startswith(name) for path in folder.iterdir())
            if trainer.run_history.current_epoch == 3:
                trainer.save_training_state(folder / f"{name}-{count}")

        return act

    events = (
        "on_train_step_end",
        "on_train_epoch_end",
        "on_eval_step_end",
        "on_eval_epoch_end",
        "on_training_run_epoch_end",
    )
    probes = [] if folder is None else [Probe(**{event: save(event) for event in events})]
    record = Probe(on_optimizer_step_start=lambda trainer: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    trainer = make_trainer(callbacks=[record, *probes], seed=3)
    train(
        trainer, DATASET, **{"num_epochs": 5, "eval_dataset": DATASET, "create_scheduler_fn": create, **more, **kwargs}
    )
    return rates, trainer.scheduler.state_dict(), weights_of(trainer.model)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_resumed_from_any_event_has_the_same_rates_and_weights(tmp_path, schedule):
    rates, state, weights = train_with_states(schedule, tmp_path)
    states = sorted(tmp_path.iterdir())
    assert len(states) >= 7
    for path in states:
        num_done = 5 if path.name == "on_train_step_end-0" else 6
        resumed_rates, resumed_state, resumed_weights = train_with_states(schedule, resume_from=path)
        assert resumed_rates == rates[num_done:], path.name
        assert resumed_state == state, path.name
        assert all(torch.equal(value, weights[name]) for name, value in resumed_weights.items()), path.name


@pytest.mark.parametrize(
    ("schedule", "changed", "message"),
    [
        ("epochs", {"step_scheduler": None}, "step_scheduler: 'epoch' -> 'update': the learning rates differ"),
        ("plateau", {"scheduler_metric": "train_loss_epoch"}, "scheduler_metric: 'eval_loss_epoch' -> 'train_loss"),
    ],
)
def test_a_run_that_is_resumed_with_another_interval_or_metric_is_told_of_it(tmp_path, schedule, changed, message):
    train_with_states(schedule, tmp_path)
    path = tmp_path / "on_training_run_epoch_end-0"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_with_states(schedule, resume_from=path, **changed)
    assert any(message in str(warning.message) for warning in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_with_states(schedule, resume_from=path)


def test_a_resumed_schedule_of_epochs_follows_a_new_length_of_the_run(tmp_path):
    create = partial(LinearLR, start_factor=1.0, end_factor=0.1, total_iters=TrainerPlaceholderValues.NUM_EPOCHS)
    kwargs = {"create_scheduler_fn": create, "step_scheduler": "epoch"}

    def rates_of(num_epochs, dataset=DATASET, **more):
        probe, rates = recorder_of(lambda trainer: trainer.optimizer.param_groups[0]["lr"], "on_train_epoch_end")
        trainer = train(make_trainer(callbacks=[probe]), dataset, num_epochs=num_epochs, **kwargs, **more)
        return trainer, rates

    for num_samples in (8, 4):  # also with one update per epoch
        dataset = make_dataset(num_samples)
        trainer, _ = rates_of(2, dataset)
        trainer.save_training_state(tmp_path / str(num_samples))
        _, rates = rates_of(4, dataset, resume_from=tmp_path / str(num_samples))
        assert rates == pytest.approx(rates_of(4, dataset)[1][2:])


def test_a_checkpoint_has_the_states_of_a_group(tmp_path):
    trainer = make_trainer()
    train(trainer, DATASET, num_epochs=2, create_scheduler_fn=warm_up_and_plateau)
    trainer.save_checkpoint(tmp_path / "model.pt")
    other = make_trainer()
    other.load_checkpoint(tmp_path / "model.pt")
    at_start = Probe(on_training_run_start=lambda t: states.append(t.scheduler.state_dict()))
    states = []
    other.callback_handler.add_callback(at_start)
    train(other, DATASET, create_scheduler_fn=warm_up_and_plateau)
    assert states == [trainer.scheduler.state_dict()]


def test_a_plateau_by_hand_has_the_same_rates():
    """The evaluation losses decide, not their number."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=0.2)
    inputs, targets = DATASET[:]
    by_hand = []
    for _ in range(6):
        by_hand.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        mse(model(inputs), targets).backward()
        optimizer.step()
        with torch.no_grad():
            scheduler.step(mse(model(inputs), targets).item())
    probe, rates = recorder_of(lambda trainer: trainer.optimizer.param_groups[0]["lr"], "on_train_epoch_start")
    create = partial(ReduceLROnPlateau, factor=0.1, patience=0, threshold=0.2)
    trainer = make_trainer(lr=0.5, callbacks=[probe])
    train(trainer, DATASET, num_epochs=6, eval_dataset=DATASET, per_device_batch_size=8, create_scheduler_fn=create)
    assert rates == by_hand
    assert 1 < len(set(by_hand)) < 6


def test_rules_of_a_plateau_and_of_a_function():
    assert rule_of(ReduceLROnPlateau(make_optimizer(0.1))).needs_metric
    assert rule_of(StepLR(make_optimizer(0.1), 1)).is_plain


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"step_scheduler": "epoch"}, "`step_scheduler` has no effect"),
        ({"scheduler_metric": "train_loss_epoch"}, "`scheduler_metric` has no effect"),
        ({"step_scheduler": "update", "scheduler_metric": "x"}, "`step_scheduler` and `scheduler_metric` have no"),
    ],
)
def test_arguments_for_a_scheduler_that_the_run_does_not_have_are_told_of(kwargs, words):
    with pytest.warns(UserWarning, match=words):
        train(make_trainer(), **kwargs)


@pytest.mark.parametrize("is_late", [False, True])
def test_they_count_for_a_scheduler_that_the_program_sets(is_late):
    def set_scheduler(trainer, **kwargs):
        trainer.scheduler = StepLR(trainer.optimizer, step_size=1, gamma=0.5)

    trainer = make_trainer(callbacks=[Probe(on_training_run_start=set_scheduler if is_late else lambda trainer: None)])
    if not is_late:
        set_scheduler(trainer)
    before = trainer.optimizer.param_groups[0]["lr"]
    train(trainer, num_epochs=2, step_scheduler="epoch")
    assert trainer.optimizer.param_groups[0]["lr"] == before / 4
