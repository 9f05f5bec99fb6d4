"""What programs written for 0.1.61 set by hand, override with the arguments they knew, and change in an event.

The expectations were measured with 0.1.61. Only the rates of a schedule come one update earlier here.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch.optim import lr_scheduler

import pytorch_accelerated.callbacks as callbacks_module
import pytorch_accelerated.trainer as trainer_module
from _support import (
    EventRecorder,
    Probe,
    assert_same_weights,
    losses,
    make_dataset,
    make_optimizer,
    make_trainer,
    raiser,
    recorder_of,
    train,
    weights_of,
)
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    CallbackHandler,
    EarlyStoppingCallback,
    ModelEmaCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    StopTrainingError,
    TrainerCallback,
    WSDCheckpointCallback,
)
from pytorch_accelerated.schedulers import CosineLrScheduler, WSDLrScheduler
from pytorch_accelerated.trainer import TrainerWithTimmScheduler


@pytest.fixture(autouse=True)
def _files_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def subclass(base=Trainer, **members):
    return type("Subclass", (base,), members)


def rate_of(trainer):
    return trainer.optimizer.param_groups[0]["lr"]


# --- a scheduler that the program sets by hand -------------------------------------------------------------------


class InConstructor(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scheduler = self.make(self.optimizer)


class InMethod(Trainer):
    def create_scheduler(self):
        self.scheduler = self.make(self.optimizer)


class InHook(Trainer):
    def training_run_start(self):
        self.scheduler = self.make(self.optimizer)


class SetsScheduler(TrainerCallback):
    def on_training_run_start(self, trainer, **kwargs):
        trainer.scheduler = trainer.make(trainer.optimizer)


PLACES = [InConstructor, InMethod, InHook, Trainer]
SCHEDULERS = {
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.5),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda update: 1 / (1 + update)),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=13),
    "cosine": lambda optimizer: CosineLrScheduler(optimizer, 3, 12, num_warmup_epochs=1),
}


def make_with_scheduler(place, name, callbacks=(), **kwargs):
    """Return a trainer that sets its scheduler in some place; a callback does it if it is none of the trainer's."""
    setter = [SetsScheduler()] if place is Trainer else []
    cls = subclass(place, make=staticmethod(SCHEDULERS[name]))
    return make_trainer(cls=cls, callbacks=[*setter, *callbacks], **kwargs)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_that_is_set_by_hand_is_stepped_after_each_update(place, name):
    record, rates = recorder_of(rate_of, "on_train_step_start")
    trainer = train(make_with_scheduler(place, name, [record]), num_epochs=3)
    created, expected_rates = recorder_of(rate_of, "on_train_step_start")
    train(make_trainer(callbacks=[created]), num_epochs=3, create_scheduler_fn=SCHEDULERS[name])
    assert rates == expected_rates
    assert len(set(rates)) > 6
    assert isinstance(trainer.scheduler, type(SCHEDULERS[name](make_optimizer(0.1))))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("state", ["step_3", "step_6", "epoch_2"])
def test_a_run_with_a_scheduler_that_is_set_by_hand_resumes_exactly(tmp_path, place, name, state):
    saving = SaveTrainingStateCallback(tmp_path, save_every_n_steps=3, save_every_n_epochs=1, max_checkpoints=None)
    uninterrupted = train(make_with_scheduler(place, name, [saving]), num_epochs=3)
    record, rates = recorder_of(rate_of, "on_train_step_end")
    resumed = train(make_with_scheduler(place, name, [record]), num_epochs=3, resume_from=tmp_path / state)
    assert rates[-1] == rate_of(uninterrupted)
    assert_same_weights(weights_of(uninterrupted.model), weights_of(resumed.model))
    assert uninterrupted.scheduler.state_dict() == resumed.scheduler.state_dict()


def test_a_scheduler_that_is_set_by_hand_goes_on_in_the_next_run():
    record, rates = recorder_of(rate_of, "on_train_step_end")
    trainer = make_trainer(callbacks=[record])
    trainer.scheduler = SCHEDULERS["exponential"](trainer.optimizer)
    train(train(trainer))
    assert rates == pytest.approx([0.1 * 0.5**update for update in range(1, 9)])


def test_a_scheduler_that_the_trainer_created_does_not_go_on_in_the_next_run():
    trainer = train(make_trainer(), create_scheduler_fn=SCHEDULERS["exponential"])
    train(trainer)
    assert trainer.scheduler is None


def test_a_function_that_is_passed_replaces_the_scheduler_that_was_set_by_hand():
    trainer = make_trainer()
    trainer.scheduler = SCHEDULERS["exponential"](trainer.optimizer)
    train(trainer, create_scheduler_fn=SCHEDULERS["cosine"])
    assert isinstance(trainer.scheduler, CosineLrScheduler)
    train(trainer)
    assert trainer.scheduler is None


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step")  # PyTorch does not recognize its copies
def test_a_copy_of_a_trainer_keeps_the_scheduler_that_was_set_by_hand():
    trainer = make_trainer()
    trainer.scheduler = SCHEDULERS["exponential"](trainer.optimizer)
    copied = copy.deepcopy(trainer)
    train(copied)
    assert (rate_of(copied), rate_of(trainer)) == (0.1 * 0.5**4, 0.1)


def test_what_is_set_by_hand_must_be_a_scheduler():
    trainer = make_trainer()
    trainer.scheduler = trainer.optimizer
    with pytest.raises(TypeError, match="Expected a scheduler"):
        train(trainer)


@pytest.mark.parametrize("schedule", [None, SCHEDULERS["exponential"]])
def test_the_step_of_the_scheduler_is_called_only_if_there_is_one(schedule):
    """Overrides use the scheduler without asking."""
    rates = []

    def scheduler_step(self):
        self.scheduler.step()
        rates.append(self.scheduler.get_last_lr())

    train(make_trainer(cls=subclass(scheduler_step=scheduler_step)), create_scheduler_fn=schedule)
    assert len(rates) == (4 if schedule else 0)


def test_a_timm_trainer_without_a_scheduler_counts_its_updates():
    assert train(make_trainer(cls=TrainerWithTimmScheduler), num_epochs=2).num_updates == 8


@pytest.mark.filterwarnings("ignore:`num_warmup_epochs` is 1")
@pytest.mark.parametrize("limit", [3, 6, 10])
@pytest.mark.parametrize("num_accumulated", [1, 2])
@pytest.mark.parametrize(
    "create",
    [
        CosineLrScheduler.create_scheduler_fn(),
        CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1),
        WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=0),
        WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=0, num_checkpoints=2),
    ],
)
def test_a_limit_that_is_no_complete_epoch_follows_the_curve_up_to_the_last_update(limit, num_accumulated, create):
    """Row 4.1: the schedule is that of the run's epochs; of the last one the run does the first part."""
    record, rates = recorder_of(rate_of, "on_optimizer_step_start")
    trainer = make_trainer(callbacks=[record])
    accumulation = {"gradient_accumulation_steps": num_accumulated}
    train(trainer, num_epochs=20, max_num_train_steps=limit, create_scheduler_fn=create, **accumulation)
    assert trainer.run_config.num_epochs == -(-limit * num_accumulated // 4)
    length = getattr(trainer.scheduler, "total_steps", None) or trainer.scheduler.total_iterations
    assert limit <= length < limit + 4 // num_accumulated
    curve = [trainer.scheduler.get_updated_values(update)[0] for update in range(limit)]
    assert rates == pytest.approx(curve)


# --- methods with the arguments of 0.1.61 ------------------------------------------------------------------------


def calls_of(method, calls):
    """Return an override that notes the arguments it is called with, and calls the method of the library."""

    def override(self, *args, **kwargs):
        calls.append((args[1:] if method == "_run_eval_epoch" else args, kwargs))
        return getattr(Trainer, method)(self, *args, **kwargs)

    return override


def test_an_evaluation_is_called_with_what_differs_from_the_defaults():
    """As 0.1.61 did, so that an override may lack the arguments that it has no use for."""
    calls = []
    trainer = make_trainer(
        cls=subclass(_run_eval_epoch=calls_of("_run_eval_epoch", calls)),
        callbacks=[StepBasedEvaluationCallback(3), ModelEmaCallback()],
    )
    train(trainer, eval_dataset=make_dataset(4))
    trainer.evaluate(make_dataset(4))
    average = ((), {})
    assert calls == [((), {"is_intermediate": True}), ((), {}), average, ((), {"is_training": False}), average]


def test_an_evaluation_of_ones_own_needs_no_argument_that_0_1_61_did_not_pass():
    def run_eval_epoch(self, valid_dl, is_training=True):
        seen.append(is_training)
        Trainer._run_eval_epoch(self, valid_dl, is_training)

    seen = []
    trainer = make_trainer(cls=subclass(_run_eval_epoch=run_eval_epoch))
    train(trainer, eval_dataset={"near": make_dataset(4), "far": make_dataset(4)}, num_epochs=2)
    trainer.evaluate(make_dataset(4))
    assert seen == [True] * 4 + [False]


@pytest.mark.parametrize("make", [SaveBestModelCallback, ModelEmaCallback])
def test_the_best_model_is_saved_and_loaded_with_the_arguments_of_0_1_61(make):
    saved, loaded = [], []
    members = {
        "save_checkpoint": calls_of("save_checkpoint", saved),
        "load_checkpoint": calls_of("load_checkpoint", loaded),
    }
    callback = make(save_path="best.pt")
    train(make_trainer(cls=subclass(**members), callbacks=[callback]), eval_dataset=make_dataset(4))
    ((args, kwargs),) = saved
    assert args == ()
    assert kwargs.keys() == {"save_path", "checkpoint_kwargs", "save_optimizer"}
    assert kwargs["save_optimizer"] is (make is SaveBestModelCallback)
    assert loaded == ([((callback.save_path,), {})] if make is SaveBestModelCallback else [])


@pytest.mark.parametrize("part", ["optimizer", "scheduler"])
def test_the_best_model_is_loaded_without_what_was_not_saved(part):
    loaded = []
    callback = SaveBestModelCallback("best.pt", **{f"save_{part}": False})
    trainer = make_trainer(cls=subclass(load_checkpoint=calls_of("load_checkpoint", loaded)), callbacks=[callback])
    train(trainer, eval_dataset=make_dataset(4), create_scheduler_fn=SCHEDULERS["exponential"])
    assert f"{part}_state_dict" not in torch.load("best.pt")
    assert loaded[0][1] == {f"load_{part}": False}


@pytest.mark.parametrize("save_scheduler", [True, False])
def test_the_file_of_the_average_has_the_state_of_the_scheduler_unless_it_is_left_out(save_scheduler):
    """Row 10.3: `save_scheduler` is True, and can be set."""
    ema = ModelEmaCallback()
    assert ema.save_scheduler
    ema.save_scheduler = save_scheduler
    create = SCHEDULERS["exponential"]
    train(make_trainer(callbacks=[ema]), eval_dataset=make_dataset(4), create_scheduler_fn=create)
    assert ("scheduler_state_dict" in torch.load("ema_model.pt")) == save_scheduler


def returning(value, method):
    def load(self, *args, **kwargs):
        getattr(Trainer, method)(self, *args, **kwargs)
        return value

    return subclass(**{method: load})


@pytest.mark.parametrize("returned", [None, {}, {"note": 1}])
@pytest.mark.parametrize("state", ["step_2", "epoch_1", "final"])
def test_a_load_method_need_not_return_the_epoch(tmp_path, returned, state):
    """The state that the library's method has restored says where training continues."""
    saving = SaveTrainingStateCallback(tmp_path, save_every_n_steps=2, save_every_n_epochs=1)
    train(make_trainer(callbacks=[saving]), 12, num_epochs=1)
    expected = train(make_trainer(), 12, num_epochs=3, resume_from=tmp_path / state)
    trainer = make_trainer(cls=returning(returned, "load_training_state"))
    train(trainer, 12, num_epochs=3, resume_from=tmp_path / state)
    assert_same_weights(weights_of(expected.model), weights_of(trainer.model))
    assert losses(trainer) == losses(expected)
    assert trainer.run_history.current_epoch == 4


def test_a_load_method_that_restores_nothing_starts_in_the_first_epoch(tmp_path):
    trainer = make_trainer(cls=subclass(load_training_state=lambda self, input_dir: None))
    record, epochs = recorder_of(lambda trainer: trainer.run_history.current_epoch, "on_train_epoch_start")
    trainer.callback_handler.add_callback(record)
    train(trainer, num_epochs=2, resume_from=tmp_path)
    assert epochs == [1, 2]


def test_a_load_method_that_returns_something_else_is_named(tmp_path):
    trainer = make_trainer(cls=subclass(load_training_state=lambda self, input_dir: 3))
    with pytest.raises(TypeError, match=r"`load_training_state` returned 3\. Expected a dictionary"):
        train(trainer, resume_from=tmp_path)


@pytest.mark.parametrize("returned", [None, {}])
@pytest.mark.parametrize("kind", ["pre_decay", "post_decay.pt"])
def test_a_continuation_of_a_schedule_does_not_need_what_a_load_method_returns(returned, kind):
    create = WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=0)
    train(make_trainer(callbacks=[WSDCheckpointCallback("first")]), num_epochs=5, create_scheduler_fn=create)
    (initial,) = Path("first").glob(f"*{kind}")
    method = "load_checkpoint" if kind.endswith(".pt") else "load_training_state"
    again = WSDLrScheduler.create_scheduler_fn(is_continuation_from_checkpoint=True)
    results = []
    for cls in (Trainer, returning(returned, method)):
        callback = WSDCheckpointCallback("second", initial_checkpoint=initial)
        trainer = make_trainer(cls=cls, callbacks=[callback])
        results.append(weights_of(train(trainer, num_epochs=1, create_scheduler_fn=again).model))
    assert_same_weights(*results)


# --- callbacks that change the list in an event ------------------------------------------------------------------


class Named(TrainerCallback):
    def __init__(self, log, name, react=None):
        self.log, self.name, self.react = log, name, react

    def on_train_step_end(self, trainer, **kwargs):
        self.log.append(self.name)
        if self.react is not None:
            self.react(self, trainer.callback_handler)


def removes(*names):
    def react(callback, handler):
        for each in list(handler.callbacks):
            if each.name in names:
                handler.callbacks.remove(each)

    return react


def log_of_two_steps(*reactions):
    log = []
    callbacks = [Named(log, name, react) for name, react in zip("abcd", reactions, strict=False)]
    train(make_trainer(callbacks=callbacks), 8)
    return "".join(log)


def test_a_callback_that_removes_itself_gets_no_further_event_and_the_next_one_gets_this_one():
    """0.1.61 passed over the next callback in that event."""
    assert log_of_two_steps(removes("a"), None, None) == "abc" + "bc"
    assert log_of_two_steps(None, removes("b"), None) == "abc" + "ac"
    assert log_of_two_steps(None, None, removes("c")) == "abc" + "ab"


def test_a_callback_that_another_one_removes_does_not_get_the_event_any_more():
    assert log_of_two_steps(removes("b", "c"), None, None, None) == "ad" + "ad"
    assert log_of_two_steps(None, removes("a"), None) == "abc" + "bc"


@pytest.mark.parametrize("add", ["append", "add_callback"])
def test_a_callback_that_is_added_in_an_event_gets_this_event_too(add):
    def react(callback, handler):
        if len(handler.callbacks) == 2:
            new = Named(callback.log, "new")
            handler.callbacks.append(new) if add == "append" else handler.add_callback(new)

    assert log_of_two_steps(react, None) == "abnew" + "abnew"


def test_a_callback_that_is_added_at_the_start_of_a_run_gets_its_start():
    added = EventRecorder()
    adds = Probe(on_training_run_start=lambda trainer, **_: trainer.callback_handler.add_callback(added))
    train(make_trainer(callbacks=[adds, EventRecorder()]))
    assert added.log[0] == "on_training_run_start"
    assert added.log.count("on_train_step_start") == 4


def test_a_callback_that_is_appended_to_the_list_gets_events_that_had_no_listener():
    trainer, added = make_trainer(), EventRecorder()
    train(trainer)
    stops = Probe(on_train_step_end=lambda trainer, step, **_: trainer.callback_handler.callbacks.append(added))
    trainer.callback_handler.callbacks += [stops]
    train(trainer, 4)
    assert added.log[0] == "on_train_step_end"
    assert trainer.callback_handler.callbacks == [stops, added]


def test_a_change_of_the_list_leaves_a_stop_that_was_asked_for_in_the_same_event():
    def leave(trainer, **_):
        trainer.callback_handler.callbacks.remove(leaves)
        seen.append(str(trainer.callback_handler.requested_stop))

    seen = []
    leaves = Probe(on_train_step_end=leave)
    trainer = make_trainer(callbacks=[Probe(on_train_step_end=raiser(StopTrainingError("enough"))), leaves])
    train(trainer)
    assert (seen, trainer.stop_reason) == (["enough"], "enough")


CHANGES = {
    "append": lambda callbacks, new: callbacks.append(new),
    "insert": lambda callbacks, new: callbacks.insert(0, new),
    "extend": lambda callbacks, new: callbacks.extend([new]),
    "replace": lambda callbacks, new: callbacks.__setitem__(0, new),
    "slice": lambda callbacks, new: callbacks.__setitem__(slice(0, 1), [new]),
    "pop": lambda callbacks, new: callbacks.pop(0),
    "delete": lambda callbacks, new: callbacks.__delitem__(0),
    "clear": lambda callbacks, new: callbacks.clear(),
    "reverse": lambda callbacks, new: callbacks.reverse(),
    "sort": lambda callbacks, new: callbacks.sort(key=lambda each: each.name, reverse=True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("copied", [lambda handler: handler, copy.copy, copy.deepcopy])
def test_every_change_of_the_list_is_noticed(change, copied):
    class Speaker(TrainerCallback):
        def __init__(self, name):
            self.name = name

        def speak(self, log):
            log.append(self.name)

    original = CallbackHandler([Speaker("a"), Speaker("b")])
    original.call_event("speak", [])
    handler, log = copied(original), []
    CHANGES[change](handler.callbacks, Speaker("c"))
    handler.call_event("speak", log)
    assert log == [callback.name for callback in handler.callbacks] != ["a", "b"]
    if handler is not original:
        original.call_event("speak", log := [])
        assert log == ["a", "b"]


def test_a_list_can_be_assigned_and_a_handler_pickled():
    handler = CallbackHandler([EventRecorder()])
    handler.call_event("on_train_epoch_end", None)
    handler.callbacks = [new := EventRecorder()]
    handler.call_event("on_train_epoch_end", None)
    assert new.log == ["on_train_epoch_end"]
    assert pickle.loads(pickle.dumps(CallbackHandler([SetsScheduler]))).callback_list == ["SetsScheduler"]


# --- what programs read after a pass -----------------------------------------------------------------------------


def test_the_loss_tracker_shows_the_last_pass():
    """0.1.61 had one tracker, which each pass used anew."""
    record, counts = recorder_of(
        lambda trainer: trainer._loss_tracker.running_count,
        *("on_train_epoch_end", "on_eval_epoch_end", "on_training_run_epoch_end", "on_training_run_end"),
    )
    trainer = train(make_trainer(callbacks=[record]), 16, num_epochs=2, eval_dataset=make_dataset(12))
    assert counts == [16, 12, 12, 16, 12, 12, 12]
    assert trainer._loss_tracker.average == losses(trainer, "eval_loss_epoch")[-1]
    trainer.evaluate(make_dataset(8), per_device_batch_size=4)
    assert trainer._loss_tracker.running_count == 8
    assert trainer._loss_tracker.average == losses(trainer, "evaluation_loss")[-1]
    train(trainer, 4)
    assert trainer._loss_tracker.running_count == 4


def test_the_loss_tracker_shows_training_again_after_an_evaluation_within_an_epoch():
    """So that an override of `_update_loss_tracker` goes on with the right one."""

    def update(self, loss, batch_size):
        self._loss_tracker.update(loss, batch_size)

    def evaluate(trainer, step, **_):
        if step == 1:
            trainer.evaluate(make_dataset(4))
        counts.append(trainer._loss_tracker.running_count)

    counts = []
    callbacks = [StepBasedEvaluationCallback(3), ModelEmaCallback(), Probe(on_train_step_end=evaluate)]
    trainer = make_trainer(cls=subclass(_update_loss_tracker=update), callbacks=callbacks)
    train(trainer, 16, num_epochs=2, eval_dataset=make_dataset(12))
    assert counts == [4, 8, 12, 16] * 2
    reference = train(make_trainer(), 16, num_epochs=2)
    assert losses(trainer) == losses(reference)


def test_the_average_is_evaluated_in_evaluate_too():
    """0.1.61 did, so that programs read the result of a test under these names. The best file stays as it is."""
    rows = Probe(on_eval_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("rows", count(trainer)))

    def count(trainer):
        return trainer._loss_tracker.running_count

    ema = ModelEmaCallback(callbacks=[rows])
    trainer = train(make_trainer(callbacks=[rows, ema]), num_epochs=2, eval_dataset=make_dataset(8))
    training_losses = losses(trainer, "ema_model_eval_loss_epoch")
    before = Path("ema_model.pt").stat().st_mtime_ns
    trainer.evaluate(make_dataset(12, seed=5))
    history = trainer.run_history
    assert history.get_latest_metric("ema_model_rows") == history.get_latest_metric("rows") == 12
    assert history.get_latest_metric("ema_model_eval_loss_epoch") not in training_losses
    assert losses(trainer, "ema_model_eval_loss_epoch") == training_losses
    assert Path("ema_model.pt").stat().st_mtime_ns == before
    reference = make_trainer(ema.ema_model.module)
    reference.evaluate(make_dataset(12, seed=5))
    assert history.get_latest_metric("ema_model_eval_loss_epoch") == losses(reference, "evaluation_loss")[0]


@pytest.mark.parametrize("evaluate_during_training", [True, False])
def test_evaluate_without_an_average_evaluates_the_model_only(evaluate_during_training):
    """Before training, where 0.1.61 failed."""
    ema = ModelEmaCallback(evaluate_during_training=evaluate_during_training)
    trainer = make_trainer(callbacks=[ema])
    trainer.evaluate(make_dataset(8))
    assert trainer.run_history.get_metric_names() == {"evaluation_loss"}


# --- a metric that comes later than the first epoch --------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "far_"])
def test_a_metric_of_an_intermediate_evaluation_may_come_after_the_first_epoch(name):
    data = {"near": make_dataset(4), "far": make_dataset(8)} if name else make_dataset(8)
    metric = f"{name}intermediate_eval_loss_epoch"
    best, early = SaveBestModelCallback("best.pt", metric), EarlyStoppingCallback(9, watch_metric=metric)
    trainer = make_trainer(callbacks=[StepBasedEvaluationCallback(6), best, early])
    train(trainer, 16, num_epochs=5, eval_dataset=data)
    assert best.best_metric == min(losses(trainer, metric))
    assert len(losses(trainer, metric)) == 3


def test_a_metric_that_the_first_intermediate_evaluation_does_not_record_is_told_of():
    best = SaveBestModelCallback("best.pt", "intermediate_accuracy", greater_is_better=True)
    trainer = make_trainer(callbacks=[StepBasedEvaluationCallback(6), best])
    trainer.run_history.update_metric("mine", 1.0)
    own = Probe(on_train_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("mine", 2.0))
    trainer.callback_handler.add_callback(own)  # a program that records something might record anything
    with pytest.warns(UserWarning, match="watches 'intermediate_accuracy', (but|which)"):
        train(trainer, 16, num_epochs=5, eval_dataset=make_dataset(4))
    assert losses(trainer, "intermediate_update") == [6, 12, 18]
    assert best.best_metric is None


def test_a_metric_that_no_intermediate_evaluation_can_record_is_an_error_at_the_start():
    best = SaveBestModelCallback("best.pt", "intermediate_accuracy", greater_is_better=True)
    trainer = make_trainer(callbacks=[StepBasedEvaluationCallback(6), best])
    with pytest.raises(ValueError, match="'intermediate_accuracy', which nothing in this run records"):
        train(trainer, 16, num_epochs=5, eval_dataset=make_dataset(4))
    assert losses(trainer, "intermediate_update") == []


def test_a_run_that_ends_before_its_first_intermediate_evaluation_warns_that_nothing_was_saved():
    best = SaveBestModelCallback("best.pt", "intermediate_eval_loss_epoch")
    trainer = make_trainer(callbacks=[StepBasedEvaluationCallback(100), best])
    with pytest.warns(UserWarning, match="which the run has not recorded, so no model was saved"):
        train(trainer, eval_dataset=make_dataset(4))
    assert not Path("best.pt").exists()


def test_a_metric_of_the_programs_own_whose_name_begins_like_one_of_these_is_read():
    def record(trainer, **_):
        trainer.run_history.update_metric("intermediate_score", 1.0)

    best = SaveBestModelCallback("best.pt", "intermediate_score", greater_is_better=True)
    with warnings.catch_warnings():
        train(make_trainer(callbacks=[Probe(on_train_epoch_end=record), best]))
    assert best.best_metric == 1.0


# --- the end of a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_epochs", "limit"), [(2, 6), (1, 3), (2, 8)])
def test_a_run_resumed_from_an_epoch_that_the_limit_cut_short_ends_for_the_same_reason(tmp_path, num_epochs, limit):
    saving = SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1)
    kwargs = {"num_epochs": num_epochs, "max_num_train_steps": limit, "eval_dataset": make_dataset(4)}
    first = train(make_trainer(callbacks=[saving]), **kwargs)
    resumed = train(make_trainer(), **kwargs, resume_from=tmp_path / f"epoch_{num_epochs}")
    assert resumed.stop_reason == first.stop_reason
    assert losses(resumed, "eval_loss_epoch") == losses(first, "eval_loss_epoch")


def test_what_the_trainer_prints_goes_through_the_accelerator_that_was_set():
    class Accelerator:
        def print(self, *args, **kwargs):
            printed.append((args, kwargs))

    printed = []
    trainer = make_trainer()
    trainer._accelerator = Accelerator()
    trainer.print("loss", 1, sep="=")
    assert printed == [(("loss", 1), {"sep": "="})]


@pytest.mark.parametrize(("module", "name"), [(callbacks_module, "tqdm"), (trainer_module, "remove_padding")])
def test_names_that_were_importable_by_accident_still_are(module, name):
    """Row 13.3."""
    assert callable(getattr(module, name))


@pytest.mark.parametrize(
    ("num_done", "expected"), [(0, (250, 0)), (249, (250, 249)), (250, (250, 0)), (600, (500, 100))]
)
def test_the_period_of_a_schedule_is_found_by_the_number_of_updates(num_done, expected):
    """Row 1.18."""
    scheduler = WSDLrScheduler(make_optimizer(0.1), total_steps=1000, num_checkpoints=3)
    assert scheduler._get_checkpoint_info(num_done) == expected
    assert WSDLrScheduler(make_optimizer(0.1), total_steps=100)._get_checkpoint_info(95) == (100, 95)
