"""The private names that subclasses and tools use, and how each is called or set.

They are not documented for users, but programs written for 0.1.61 override, read and replace them.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.data import DataLoader

from _support import Batches, EventRecorder, Probe, make_dataset, make_model, make_trainer
from pytorch_accelerated import Trainer
from pytorch_accelerated import trainer as trainer_module
from pytorch_accelerated.callbacks import CallbackHandler
from pytorch_accelerated.run_config import TrainerRunConfig
from pytorch_accelerated.tracking import InMemoryRunHistory, LossTracker

METHODS = {
    "_create_accelerator": ("self", "tools put a configured accelerator in its place"),
    "_create_callback_handler": ("self", "subclasses add callbacks of their own to `_callbacks`"),
    "_create_run_config": (
        "self, per_device_batch_size, num_epochs, gradient_accumulation_steps, max_num_train_steps, "
        "gradient_clip_value, gradient_clip_norm=None",
        "subclasses return a configuration with more fields",
    ),
    "_prepare_model_optimizer_and_dataloaders": ("self", "subclasses prepare further objects, or nothing"),
    "_perform_forward_and_backward_passes": ("self, batch, step", "subclasses replace the step, for GANs for example"),
    "_run_training": ("self", "subclasses wrap the run in a profiler"),
    "_run_evaluation": ("self", "subclasses wrap the evaluation"),
    "_run_train_epoch": ("self, train_dl", "tools drive single epochs"),
    "_run_eval_epoch": ("self, valid_dl, is_training=True, is_intermediate=False", "tools drive single evaluations"),
    "_update_loss_tracker": ("self, loss, batch_size", "subclasses track another value"),
    "_add_epoch_loss_to_run_history": ("self, name", "subclasses record under another name"),
    "_clip_gradients": ("self", "subclasses clip by norm"),
    "_check_eval_batch_size": ("self", "subclasses demand more, or less, of the loader"),
}


def arguments_of(function):
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(str(parameter.replace(annotation=parameter.empty)) for parameter in parameters)


def train(trainer, num_samples=8, **kwargs):
    trainer.train(make_dataset(num_samples), **{"num_epochs": 1, "per_device_batch_size": 4, **kwargs})


def subclass(**members):
    return type("Subclass", (Trainer,), members)


@pytest.mark.parametrize("name", METHODS)
def test_a_seam_keeps_its_arguments(name):
    assert arguments_of(getattr(Trainer, name)) == METHODS[name][0]


@pytest.mark.parametrize("name", ["_set_epoch", "_increment_epoch"])
def test_a_run_history_has_the_methods_that_the_loop_calls(name):
    history = InMemoryRunHistory()
    getattr(history, name)(*([7] if name == "_set_epoch" else []))
    assert history.current_epoch == (7 if name == "_set_epoch" else 2)


# --- attributes --------------------------------------------------------------------------------------------------


def at(event, function):
    """A trainer that calls a function of the trainer at an event, and a recorder of its events."""
    recorder = EventRecorder()
    return make_trainer(callbacks=[Probe(**{event: lambda trainer, **kwargs: function(trainer)}), recorder]), recorder


def test_the_accelerator_is_there_from_construction_on_and_the_one_that_was_set_is_used():
    trainer = make_trainer()
    assert (trainer._accelerator.num_processes, trainer._accelerator.process_index) == (1, 0)

    class Silent(Accelerator):
        def print(self, *args, **kwargs):
            raise AssertionError(args)

    trainer._accelerator = Silent()
    train(trainer)
    with pytest.raises(AssertionError, match="hello"):
        trainer.print("hello")


def test_the_loaders_in_a_run_are_those_that_are_iterated():
    seen = []
    trainer, recorder = at(
        "on_training_run_start",
        lambda trainer: seen.extend([len(trainer._train_dataloader), len(trainer._eval_dataloader)]),
    )
    train(trainer, num_samples=12, eval_dataset=make_dataset(20))
    assert seen == [recorder.log.count("on_train_step_end"), recorder.log.count("on_eval_step_end")] == [3, 5]


def test_the_loaders_that_are_set_in_a_run_are_iterated():
    def limit(trainer):
        trainer._train_dataloader = list(trainer._train_dataloader)[:2]
        trainer._eval_dataloader = list(trainer._eval_dataloader)[:1]

    trainer, recorder = at("on_training_run_start", limit)
    train(trainer, num_samples=12, eval_dataset=make_dataset(20))
    assert (recorder.log.count("on_train_step_end"), recorder.log.count("on_eval_step_end")) == (2, 1)


def test_the_arguments_of_the_loaders_are_there_in_a_run():
    seen = []
    trainer, _ = at(
        "on_training_run_start", lambda trainer: seen.extend([trainer._train_dl_kwargs, trainer._eval_dl_kwargs])
    )
    train(trainer, eval_dataset=make_dataset(4), train_dataloader_kwargs={"batch_size": 2})
    assert [kwargs["batch_size"] for kwargs in seen] == [2, 4]


def test_the_arguments_that_a_method_sets_for_its_loader_tell_the_batch_size():
    def create_train_dataloader(self, batch_size, train_dl_kwargs=None):
        self._train_dl_kwargs = {"batch_size": 3}
        return DataLoader(self.train_dataset, batch_size=3)

    trainer = make_trainer(cls=subclass(create_train_dataloader=create_train_dataloader))
    train(trainer)
    assert trainer.run_config.train_per_device_batch_size == 3
    assert trainer.run_config.train_dl_kwargs == {"batch_size": 3}


def test_the_loss_tracker_tells_the_running_loss_of_the_epoch():
    running = []
    trainer = make_trainer(
        callbacks=[Probe(on_train_step_end=lambda trainer, **kwargs: running.append(trainer._loss_tracker.average))]
    )
    train(trainer)
    assert running[-1] == trainer.run_history.get_latest_metric("train_loss_epoch") != running[0]


def test_a_callback_handler_that_is_set_gets_the_events():
    trainer, recorder = make_trainer(), EventRecorder()
    trainer.callback_handler = CallbackHandler([recorder])
    train(trainer)
    assert recorder.log[-1] == "on_training_run_end"


def test_a_run_history_that_is_set_gets_the_metrics():
    trainer, history = make_trainer(), InMemoryRunHistory()
    trainer.run_history = history
    train(trainer)
    assert history.get_metric_names() == {"train_loss_epoch"}


def test_a_run_config_that_is_set_in_a_run_is_used():
    def freeze(trainer):
        trainer.run_config = TrainerRunConfig(**{**trainer.run_config.to_dict(), "gradient_clip_value": 0.0})

    trainer, _ = at("on_training_run_start", freeze)
    before = trainer.model.weight.clone()
    train(trainer)
    assert trainer.run_config.gradient_clip_value == 0.0
    assert torch.equal(trainer.model.weight, before)  # all gradients were clipped to zero


def test_a_scheduler_that_is_set_in_a_run_is_stepped():
    class Scheduler:
        num_steps = 0

        def step(self):
            self.num_steps += 1

    scheduler = Scheduler()
    trainer, _ = at("on_training_run_start", lambda trainer: setattr(trainer, "scheduler", scheduler))
    train(trainer)
    assert scheduler.num_steps == 2


# --- loaders -----------------------------------------------------------------------------------------------------


def test_the_module_calls_data_loader_by_its_own_name(monkeypatch):
    """Tests replace `pytorch_accelerated.trainer.DataLoader` to see its arguments."""
    calls = []

    class Recorded(DataLoader):
        def __init__(self, *args, **kwargs):
            calls.append(kwargs)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(trainer_module, "DataLoader", Recorded)
    train(make_trainer(), eval_dataset=make_dataset(8))
    assert [call["batch_size"] for call in calls] == [4, 4]
    assert [call["shuffle"] for call in calls] == [True, False]


def test_the_methods_that_make_loaders_are_called_by_keyword_and_may_ignore_the_rest():
    """Overriding them without setting `_train_dl_kwargs` has to work."""
    calls = []
    data = make_dataset(8)

    def create_train_dataloader(self, batch_size, train_dl_kwargs=None):
        calls.append(("train", batch_size, train_dl_kwargs))
        return DataLoader(data, batch_size=2)

    def create_eval_dataloader(self, batch_size, eval_dl_kwargs=None):
        calls.append(("eval", batch_size, eval_dl_kwargs))
        return [data[:4], data[4:]]

    steps = []
    trainer = make_trainer(
        cls=subclass(create_train_dataloader=create_train_dataloader, create_eval_dataloader=create_eval_dataloader),
        callbacks=[Probe(on_train_step_end=lambda trainer, **kwargs: steps.append(kwargs["step"]))],
    )
    kwargs = {"train_dataloader_kwargs": {"a": 1}, "eval_dataloader_kwargs": {"b": 2}}
    trainer.train(None, num_epochs=1, eval_dataset=data, per_device_batch_size=4, **kwargs)
    assert calls == [("train", 4, {"a": 1}), ("eval", 4, {"b": 2})]
    assert steps == [0, 1, 2, 3]
    assert trainer.run_config.num_update_steps_per_epoch == 4


def test_the_default_arguments_of_loaders_can_be_overridden():
    def kwargs_with(**more):
        return lambda self, batch_size: {"batch_size": batch_size, **more}

    trainer = make_trainer(
        cls=subclass(
            get_default_train_dl_kwargs=kwargs_with(shuffle=False, drop_last=True),
            get_default_eval_dl_kwargs=kwargs_with(drop_last=True),
        )
    )
    num_batches = []
    probe = Probe(
        on_training_run_start=lambda trainer, **kwargs: num_batches.extend(
            [len(trainer._train_dataloader), len(trainer._eval_dataloader)]
        )
    )
    trainer.callback_handler.add_callback(probe)
    train(trainer, num_samples=10, eval_dataset=make_dataset(7))
    assert num_batches == [2, 1]


# --- making the parts --------------------------------------------------------------------------------------------


def test_create_accelerator_may_return_an_accelerator_of_the_users():
    accelerator = Accelerator()
    trainer = make_trainer(cls=subclass(_create_accelerator=lambda self: accelerator))
    train(trainer)
    assert trainer._accelerator is accelerator


def test_create_callback_handler_may_return_a_handler_of_the_users():
    class Handler(CallbackHandler):
        pass

    recorder = EventRecorder()
    trainer = make_trainer(cls=subclass(_create_callback_handler=lambda self: Handler([recorder])))
    assert type(trainer.callback_handler) is Handler
    train(trainer)
    assert recorder.log[-1] == "on_training_run_end"


def test_prepare_may_be_extended_and_sees_model_optimizer_and_loaders():
    seen = []

    def prepare(self):
        seen.append((self.model, self.optimizer, len(self._train_dataloader), len(self._eval_dataloader)))
        Trainer._prepare_model_optimizer_and_dataloaders(self)
        seen.append(self.run_history)

    trainer = make_trainer(cls=subclass(_prepare_model_optimizer_and_dataloaders=prepare))
    model, optimizer = trainer.model, trainer.optimizer
    train(trainer, eval_dataset=make_dataset(4))
    assert seen == [(model, optimizer, 2, 1), trainer.run_history]


def test_prepare_may_be_replaced_by_nothing():
    trainer = make_trainer(cls=subclass(_prepare_model_optimizer_and_dataloaders=lambda self: None))
    before = trainer.model.weight.clone()
    train(trainer, eval_dataset=make_dataset(4))
    assert not torch.equal(trainer.model.weight, before)


def test_create_run_config_is_called_by_keyword_and_its_result_is_used():
    def create_run_config(self, **kwargs):
        config = Trainer._create_run_config(self, **kwargs)
        return TrainerRunConfig(**{**config.to_dict(), "gradient_clip_value": 0.0})

    trainer = make_trainer(cls=subclass(_create_run_config=create_run_config))
    before = trainer.model.weight.clone()
    train(trainer)
    assert trainer.run_config.gradient_clip_value == 0.0
    assert torch.equal(trainer.model.weight, before)  # all gradients were clipped to zero


def test_create_scheduler_may_be_overridden_without_a_function():
    class Scheduler:
        num_steps = 0

        def step(self):
            self.num_steps += 1

    scheduler = Scheduler()
    trainer = make_trainer(cls=subclass(create_scheduler=lambda self: scheduler))
    train(trainer)
    assert trainer.scheduler is scheduler
    assert scheduler.num_steps == 2


def test_check_eval_batch_size_may_refuse():
    def refuse(self):
        raise ValueError("too small for me")

    trainer = make_trainer(cls=subclass(_check_eval_batch_size=refuse))
    with pytest.raises(ValueError, match="too small for me"):
        train(trainer, eval_dataset=make_dataset(4))


# --- the loop ----------------------------------------------------------------------------------------------------


def test_the_step_is_called_by_position_within_nothing_but_no_sync():
    calls = []

    def step(*args, **kwargs):
        calls.append((args[1:], kwargs))
        return Trainer._perform_forward_and_backward_passes(*args)

    recorder = EventRecorder()
    trainer = make_trainer(cls=subclass(_perform_forward_and_backward_passes=step), callbacks=[recorder])
    train(trainer)
    assert [(len(args), args[1], kwargs) for args, kwargs in calls] == [(2, 0, {}), (2, 1, {})]
    assert recorder.log.count("on_train_step_end") == 2


def test_the_accelerator_tells_whether_a_step_ends_in_an_update():
    """Subclasses ask `_accelerator.sync_gradients`, as users of Accelerate do."""
    synced = []
    probe = Probe(on_backward_start=lambda trainer, **kwargs: synced.append(trainer._accelerator.sync_gradients))
    train(make_trainer(callbacks=[probe]), num_samples=20, gradient_accumulation_steps=2)
    assert synced == [False, True, False, True, True]


def test_a_step_that_returns_none_and_reports_nothing_never_fires_the_end_of_a_step():
    """A replaced step fires the events itself, if it wants them."""
    steps = []
    recorder = EventRecorder()
    trainer = make_trainer(
        cls=subclass(_perform_forward_and_backward_passes=lambda self, batch, step: steps.append(step)),
        callbacks=[recorder],
    )
    train(trainer, num_epochs=2)
    assert steps == [0, 1, 0, 1]
    assert "on_train_step_end" not in recorder.log
    assert recorder.log.count("on_optimizer_step_end") == 4
    assert recorder.log[-1] == "on_training_run_end"
    loss = trainer.run_history.get_metric_values("train_loss_epoch")
    assert [value != value for value in loss] == [True, True]  # NaN: nothing was tracked


@pytest.mark.parametrize(("max_num_train_steps", "expected"), [(10, [False]), (1, [True]), (2, [True])])
def test_an_epoch_gets_its_loader_by_position_and_returns_whether_the_limit_was_reached(max_num_train_steps, expected):
    results = []

    def run_epoch(*args, **kwargs):
        assert len(args) == 2
        assert not kwargs
        results.append(Trainer._run_train_epoch(*args))
        return results[-1]

    trainer = make_trainer(cls=subclass(_run_train_epoch=run_epoch))
    trainer.train(Batches(make_dataset(8), 4), num_epochs=1, max_num_train_steps=max_num_train_steps)
    assert results == expected


def test_what_an_epoch_returns_decides_whether_another_follows():
    recorder = EventRecorder()
    trainer = make_trainer(cls=subclass(_run_train_epoch=lambda self, train_dl: True), callbacks=[recorder])
    train(trainer, num_epochs=5)
    assert recorder.log.count("on_training_run_epoch_end") == 1


def test_an_evaluation_gets_its_loader_and_knows_what_it_is_for():
    calls = []

    def run_eval_epoch(self, valid_dl, is_training=True, is_intermediate=False):
        calls.append((len(valid_dl), is_training, is_intermediate))
        Trainer._run_eval_epoch(self, valid_dl, is_training, is_intermediate)

    trainer = make_trainer(cls=subclass(_run_eval_epoch=run_eval_epoch))
    train(trainer, eval_dataset=make_dataset(8))
    trainer.evaluate(make_dataset(12), per_device_batch_size=4)
    assert calls == [(2, True, False), (3, False, False)]


def test_run_training_and_run_evaluation_may_be_wrapped():
    log = []

    def wrap(name):
        def run(self):
            log.append(f"before {name}")
            getattr(Trainer, name)(self)
            log.append(f"after {name}")

        return run

    names = ("_run_training", "_run_evaluation")
    trainer = make_trainer(cls=subclass(**{name: wrap(name) for name in names}))
    train(trainer)
    trainer.evaluate(make_dataset(4))
    assert log == [f"{when} {name}" for name in names for when in ("before", "after")]


def test_update_loss_tracker_decides_what_is_tracked():
    def track(self, loss, batch_size):
        assert isinstance(loss, torch.Tensor)
        self._loss_tracker.update(2.0, batch_size)

    trainer = make_trainer(cls=subclass(_update_loss_tracker=track))
    train(trainer, eval_dataset=make_dataset(4))
    assert trainer.run_history.get_metric_values("train_loss_epoch") == [2.0]
    assert trainer.run_history.get_metric_values("eval_loss_epoch") == [2.0]


def test_a_replaced_loss_tracker_is_used_until_the_epoch_ends():
    class Doubled(LossTracker):
        def update(self, loss_batch_value, batch_size=1):
            super().update(2 * loss_batch_value, batch_size)

    def replace(trainer, **kwargs):
        trainer._loss_tracker = Doubled()

    plain, doubled = make_trainer(lr=0.0), make_trainer(lr=0.0, callbacks=[Probe(on_train_epoch_start=replace)])
    train(plain)
    train(doubled)
    loss = plain.run_history.get_latest_metric("train_loss_epoch")
    assert doubled.run_history.get_latest_metric("train_loss_epoch") == pytest.approx(2 * loss, rel=1e-12)


def test_add_epoch_loss_to_run_history_gets_the_name():
    names = []

    def add(self, name):
        names.append(name)
        Trainer._add_epoch_loss_to_run_history(self, name)

    trainer = make_trainer(cls=subclass(_add_epoch_loss_to_run_history=add))
    train(trainer, eval_dataset=make_dataset(4))
    trainer.evaluate(make_dataset(4))
    assert names == ["train_loss_epoch", "eval_loss_epoch", "evaluation_loss"]


def test_clip_gradients_is_called_once_per_update_with_the_gradients_there():
    gradients = []

    def clip(self):
        gradients.append(self.model.weight.grad.norm().item())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1e-3)

    norms = []
    probe = Probe(on_optimizer_step_end=lambda trainer, **kwargs: norms.append(trainer.model.weight.grad.norm().item()))
    trainer = make_trainer(cls=subclass(_clip_gradients=clip), callbacks=[probe])
    train(trainer, num_samples=16, gradient_accumulation_steps=2, gradient_clip_value=1.0)
    assert len(gradients) == 2
    assert min(gradients) > 1e-3
    assert max(norms) <= 1e-3 * 1.001


def test_optimizer_step_may_read_gradients_and_comes_before_the_scheduler_and_before_zeroing():
    """Subclasses log gradient norms there."""
    log = []

    def optimizer_step(self):
        log.append(("optimizer", self.model.weight.grad is not None))
        Trainer.optimizer_step(self)

    def scheduler_step(self):
        log.append(("scheduler", self.model.weight.grad is not None))

    trainer = make_trainer(cls=subclass(optimizer_step=optimizer_step, scheduler_step=scheduler_step))
    train(trainer, num_samples=4, create_scheduler_fn=lambda optimizer: ConstantLR(optimizer, 1.0))
    assert log == [("optimizer", True), ("scheduler", True)]


def test_the_constructor_asks_nothing_of_its_parts():
    """Tests and tools make trainers out of stand-ins, or of nothing."""
    trainer = Trainer(None, None, None, callbacks=())
    assert trainer.model is None
    assert trainer._accelerator.num_processes == 1
    model = make_model()
    trainer.model = model
    assert trainer.get_model() is model
