"""The state of one run: what it takes over from the run before, when it ends, and how the trainer shows it."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch

from _support import (
    IN_ORDER,
    EventRecorder,
    Probe,
    Samples,
    assert_same_weights,
    make_dataset,
    make_model,
    make_trainer,
    train,
    weights_of,
)
from pytorch_accelerated import Trainer, callbacks
from pytorch_accelerated._accumulation import AccumulationWindow
from pytorch_accelerated._position import DataPass
from pytorch_accelerated._run import Run
from pytorch_accelerated._views import RunAttribute, WritableRunAttribute
from pytorch_accelerated.tracking import LossTracker


def config_with(**settings):
    trainer = make_trainer()
    train(trainer)
    return dataclasses.replace(trainer.run_config, **settings)


# --- one run after another ---------------------------------------------------------------------------------------


def test_a_run_shares_the_position_in_training_with_the_run_before_and_nothing_else():
    previous = Run(seed=1)
    previous.start_training(2, 3, AccumulationWindow(4))
    previous.is_resumed, previous.stop_reason, previous.train_dataloader = True, "3 epochs are done", []
    run = Run(seed=2, previous=previous)
    assert run.training is previous.training
    assert run.config is previous.config
    assert (run.seed, run.training.seed) == (2, 1)
    assert (run.is_resumed, run.stop_reason, run.train_dataloader) == (False, None, None)


def test_a_training_has_a_position_of_its_own():
    previous = Run(seed=1)
    run = Run(seed=2, previous=previous)
    run.start_training(num_epochs_completed=3, num_epochs=2, window=AccumulationWindow(4))
    assert run.training is not previous.training
    assert (run.training.seed, run.progress.num_epochs_completed, run.total_num_epochs) == (2, 3, 5)


@pytest.mark.parametrize("is_active", [True, False])
def test_a_nested_run_shares_the_signals_of_the_outer_one(is_active):
    previous = Run()
    previous.is_active = is_active
    assert (Run(previous=previous).interrupt is previous.interrupt) is is_active


def test_an_evaluation_in_a_callback_leaves_the_data_order_of_a_resumed_run_as_it_is(tmp_path):
    """Its seed is that of the saved state, not the one of the trainer that resumes it."""
    dataset = make_dataset(16)

    def run(is_resumed, evaluates):
        order = []

        def note(trainer, batch, **kwargs):
            order.append(batch[0][:, 0].tolist())
            if not is_resumed and len(order) == 2:
                trainer.save_training_state(tmp_path / "state")
            if evaluates:
                trainer.evaluate(make_dataset(4))

        seed = 7 if is_resumed else 3
        trainer = make_trainer(model=make_model(), callbacks=[Probe(on_train_step_end=note)], seed=seed)
        trainer.train(
            Samples(dataset),
            num_epochs=3,
            per_device_batch_size=4,
            resume_from=tmp_path / "state" if is_resumed else None,
        )
        return order, weights_of(trainer.model)

    whole_order, whole_weights = run(is_resumed=False, evaluates=False)
    for evaluates in (False, True):
        with pytest.warns(UserWarning, match="seed: 3 -> 7"):
            order, weights = run(is_resumed=True, evaluates=evaluates)
        assert order == whole_order[2:]
        assert_same_weights(weights, whole_weights)


def test_an_evaluation_after_a_resumed_run_leaves_the_seed_of_its_training_states_as_it_is(tmp_path):
    trainer = make_trainer(seed=3)
    train(trainer)
    trainer.save_training_state(tmp_path / "first")
    resumed = make_trainer(seed=7)
    with pytest.warns(UserWarning, match="seed: 3 -> 7"):
        train(resumed, resume_from=tmp_path / "first")
    resumed.evaluate(make_dataset(4))
    resumed.save_training_state(tmp_path / "second")
    first, second = (
        torch.load(tmp_path / name / "trainer_state.pt", weights_only=True) for name in ("first", "second")
    )
    assert second["trainer"]["seed"] == first["trainer"]["seed"] == 3


def test_a_run_that_fails_during_an_evaluation_in_a_callback_is_the_one_that_ends():
    def evaluate(trainer, **kwargs):
        with pytest.raises(ZeroDivisionError):
            trainer.evaluate(make_dataset(4))
        assert trainer.run_config.num_epochs == 3
        assert trainer.train_dataloader is not None

    def fail(trainer, **kwargs):
        if not trainer.is_evaluating or trainer.train_dataloader is None:
            raise ZeroDivisionError

    recorder = EventRecorder()
    trainer = make_trainer(callbacks=[Probe(on_train_step_end=evaluate, on_eval_step_end=fail), recorder])
    train(trainer, num_epochs=3)
    assert trainer.stop_reason == "3 epochs are done"
    assert recorder.log.count("on_exception") == 12  # of the evaluations
    assert recorder.log[-1] == "on_training_run_end"


# --- passes over the data ----------------------------------------------------------------------------------------


def test_the_pass_under_way_is_the_innermost_evaluation_or_else_the_training_epoch():
    run, evaluation = Run(), DataPass("evaluation", ["batch"], is_intermediate=True)
    assert (run.training.current_pass, run.is_evaluating) == (run.training.epoch, False)
    with run.training.suspended_by(evaluation):
        assert (run.current_dataloader, run.is_evaluating, run.is_intermediate_evaluation) == (["batch"], True, True)
        with run.training.suspended_by(DataPass("evaluation")):
            assert (run.current_dataloader, run.is_intermediate_evaluation) == (None, False)
            assert run.training.suspended_passes == [run.training.epoch, evaluation]
        assert run.training.current_pass is evaluation
    assert run.training.current_pass is run.training.epoch


def test_an_evaluation_that_fails_is_no_longer_the_pass_under_way():
    run = Run()
    with pytest.raises(ZeroDivisionError), run.training.suspended_by(DataPass("evaluation")):
        raise ZeroDivisionError
    assert run.training.current_pass is run.training.epoch
    assert run.training.suspended_passes == []


@pytest.mark.parametrize("num_done", [0, 3])
def test_the_sums_of_an_epoch_start_from_zero_unless_it_is_resumed(num_done):
    run = Run()
    run.config = config_with()
    run.training.epoch.means.loss.update(2.0, 4)
    run.training.window.add(8, num_samples=4)
    run.num_batches_to_skip = num_done
    assert run.start_train_epoch([]) == num_done
    assert run.num_batches_done == num_done
    assert run.num_batches_to_skip == 0
    assert run.training.epoch.means.loss.running_count == (4 if num_done else 0)
    assert run.is_between_updates is (num_done == 0)


def test_the_windows_of_an_epoch_have_the_length_in_the_configuration():
    """A hook may change it at the start of a run."""

    class Accumulating(Trainer):
        def training_run_start(self):
            self.run_config = dataclasses.replace(self.run_config, gradient_accumulation_steps=2)

    changed, given = make_trainer(cls=Accumulating), make_trainer()
    train(changed, num_epochs=2)
    train(given, num_epochs=2, gradient_accumulation_steps=2)
    assert_same_weights(weights_of(changed.model), weights_of(given.model))


@pytest.mark.parametrize(
    ("loaders", "expected"),
    [(None, {}), ([1], {"": [1]}), ({"a": [1], "b": [2]}, {"a": [1], "b": [2]}), ({"a": None, "b": [2]}, {"b": [2]})],
)
def test_evaluation_loaders_have_names(loaders, expected):
    run = Run()
    run.eval_dataloader = loaders
    assert run.eval_dataloaders == expected


@pytest.mark.parametrize("loaders", [None, [1], {"a": [1], "b": [2]}])
def test_evaluation_loaders_are_shown_as_they_were_set(loaders):
    run = Run()
    run.eval_dataloader = loaders
    assert run.eval_dataloader == loaders


def test_the_first_loss_that_is_not_finite_is_found_in_the_outermost_pass():
    run = Run(process_index=3)
    assert run.find_non_finite_loss() is None
    run.progress.num_epochs_completed = 1
    run.training.epoch.means.loss.update(torch.tensor(1.0))
    run.training.epoch.means.loss.update(torch.tensor(float("inf")))
    with run.training.suspended_by(DataPass("evaluation")):
        run.training.current_pass.means.loss.update(torch.tensor(float("nan")))
        error = run.find_non_finite_loss()
        assert error.step == 1
        assert "The loss is inf in training, epoch 2, step 1, rank 3." in str(error)
        run.training.epoch.means.loss.reset()
        assert "The loss is nan in evaluation, epoch 2, step 0" in str(run.find_non_finite_loss())


def test_the_training_data_are_not_kept_in_memory_after_the_run():
    dataset = Samples(make_dataset(8))
    reference = weakref.ref(dataset)
    trainer = make_trainer()
    train(trainer, dataset)
    trainer.train_dataset = None
    del dataset
    trainer.evaluate(make_dataset(4))
    gc.collect()
    assert reference() is None


# --- the end of a run --------------------------------------------------------------------------------------------


def steps_of(num_steps, fetched):
    for step in range(num_steps):
        fetched.append(step)
        yield step, None, step == num_steps - 1


@pytest.mark.parametrize(("limit", "expected"), [(2, [0, 1]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])])
def test_the_steps_of_an_epoch_end_with_the_last_update_and_no_batch_is_fetched_after_it(limit, expected):
    run, fetched, seen = Run(), [], []
    run.config = config_with(max_num_train_steps=limit, is_limited_by_steps=True)
    for step, _, _ in run.until_update_limit(steps_of(4, fetched)):
        seen.append(step)
        run.progress.num_updates += 1
    assert seen == fetched == expected


def test_the_steps_of_an_epoch_are_all_there_without_a_limit():
    run = Run()
    run.config = config_with(max_num_train_steps=2, is_limited_by_steps=False)  # a number that nobody asked for
    run.progress.num_updates = 5
    assert [step for step, _, _ in run.until_update_limit(steps_of(3, []))] == [0, 1, 2]
    assert run.is_update_limit_reached is False


def test_a_run_continues_until_its_epochs_or_its_updates_are_done():
    run = Run()
    run.config = config_with(max_num_train_steps=5, is_limited_by_steps=True)
    run.start_training(1, 2, AccumulationWindow())
    assert run.should_continue()
    run.progress.num_updates = 5
    assert not run.should_continue()
    run.progress.phase = "evaluation"  # which is left of an epoch that was resumed
    assert run.should_continue()
    run.progress.end_epoch()
    run.progress.num_updates = 4
    assert run.should_continue()
    run.progress.end_epoch()
    assert not run.should_continue()


def test_a_run_ends_with_the_epoch_that_says_so():
    run = Run()
    run.config = config_with()
    run.start_training(0, 5, AccumulationWindow())
    run.was_last_epoch = True
    assert not run.should_continue()


# --- attributes of the trainer -----------------------------------------------------------------------------------


def test_an_attribute_of_the_run_shows_what_the_run_holds():
    trainer = make_trainer()
    train(trainer, num_epochs=2)
    assert trainer.progress is trainer._loop_run.progress
    assert trainer.progress.num_epochs_completed == 2
    assert isinstance(Trainer.progress, RunAttribute)
    assert not isinstance(Trainer.progress, WritableRunAttribute)


def test_an_attribute_that_programs_set_is_set_in_the_run():
    trainer = make_trainer()
    tracker = trainer._loss_tracker = LossTracker()
    assert trainer._loop_run.training.current_pass.means.loss is tracker
    assert "_loss_tracker" not in vars(trainer)


SHADOWED = [name for name in dir(Trainer) if type(getattr(Trainer, name)) is RunAttribute]
CHOSEN = [
    "_run",
    "_call",
    "_window",
    "_interrupt",
    "_metric_prefix",
    "_monitor",
    "_means",
    "_seed",
    "_step",
    "_progress",
]


def callbacks_that_ask_the_trainer(folder):
    return [
        callbacks.MoveModulesToDeviceCallback,
        callbacks.TerminateOnNaNCallback,
        callbacks.ProgressBarCallback,
        callbacks.StepBasedEvaluationCallback(2),
        callbacks.LimitEvalStepsCallback(1),
        callbacks.GradientNormCallback(),
        callbacks.ModelEmaCallback(save_path=folder / "average.pt"),
        callbacks.EarlyStoppingCallback(early_stopping_patience=9),
        callbacks.SaveBestModelCallback(folder / "best.pt"),
        callbacks.SaveTrainingStateCallback(folder / "states", save_every_n_updates=3),
    ]


@pytest.mark.parametrize("has_callbacks", [False, True])
@pytest.mark.parametrize("name", [*CHOSEN, *SHADOWED])
def test_a_subclass_may_choose_any_name_for_its_own_attributes(name, has_callbacks, tmp_path, capsys):
    class Own(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            setattr(self, name, "mine")

    trainers = {}
    for cls in (Own, Trainer):
        folder = tmp_path / cls.__name__
        chosen = callbacks_that_ask_the_trainer(folder) if has_callbacks else ()
        trainer = trainers[cls] = make_trainer(cls=cls, callbacks=chosen)
        more = {"train_dataloader_kwargs": IN_ORDER, "gradient_clip_norm": 1e9}
        train(trainer, num_epochs=2, eval_dataset=make_dataset(4), **more)
        trainer.evaluate(make_dataset(4))
    assert getattr(trainers[Own], name) == "mine"
    assert_same_weights(weights_of(trainers[Own].model), weights_of(trainers[Trainer].model))
    history, expected = trainers[Own].run_history, trainers[Trainer].run_history
    assert {name: history.get_metric_values(name) for name in history.get_metric_names()} == {
        name: expected.get_metric_values(name) for name in expected.get_metric_names()
    }


def test_the_names_in_the_test_above_are_those_of_the_trainer():
    assert {"progress", "stop_reason", "is_resumed", "recent_loss", "train_dataloader"} <= set(SHADOWED)
    assert not set(CHOSEN) & set(dir(make_trainer()))
