"""The state of one run: what it takes over from the run before, when it ends, and how the trainer shows it."""

from __future__ import annotations

import dataclasses

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
from pytorch_accelerated import Trainer
from pytorch_accelerated._accumulation import AccumulationWindow
from pytorch_accelerated._run import DataPass, Run, RunAttribute, WritableRunAttribute
from pytorch_accelerated.tracking import LossTracker


def config_with(**settings):
    trainer = make_trainer()
    train(trainer)
    return dataclasses.replace(trainer.run_config, **settings)


# --- one run after another ---------------------------------------------------------------------------------------


def test_a_run_inherits_the_position_in_training_and_nothing_else():
    previous = Run(seed=1)
    previous.start_training(2, 3, AccumulationWindow(4))
    previous.is_resumed, previous.stop_reason, previous.train_loader = True, "3 epochs are done", []
    run = Run(seed=2)
    run.inherit(previous)
    for name in ("config", "progress", "passes", "window", "lineage", "settings"):
        assert getattr(run, name) is getattr(previous, name), name
    assert run.training_seed == 1
    assert run.seed == 2
    assert (run.is_resumed, run.stop_reason, run.train_loader) == (False, None, None)


@pytest.mark.parametrize("is_active", [True, False])
def test_a_nested_run_shares_the_signals_of_the_outer_one(is_active):
    previous, run = Run(), Run()
    previous.is_active = is_active
    run.inherit(previous)
    assert (run.interrupt is previous.interrupt) is is_active


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


def test_the_pass_under_way_is_the_innermost():
    run = Run()
    assert (run.current_pass, run.is_evaluating) == (run.passes[0], False)
    run.passes.append(DataPass("evaluation", "loader", is_intermediate=True))
    assert (run.current_pass.loader, run.is_evaluating) == ("loader", True)


@pytest.mark.parametrize("num_done", [0, 3])
def test_the_sums_of_an_epoch_start_from_zero_unless_it_is_resumed(num_done):
    run = Run()
    run.passes[0].means.loss.update(2.0, 4)
    run.window.add(8, num_samples=4)
    run.num_batches_to_skip = num_done
    assert run.start_train_epoch([], index=0) == num_done
    assert run.current_pass.num_batches_done == num_done
    assert run.num_batches_to_skip == 0
    assert run.current_pass.means.loss.running_count == (4 if num_done else 0)
    assert run.window.num_samples == (4 if num_done else 0)


@pytest.mark.parametrize(
    ("loader", "expected"), [(None, {}), ([1], {"": [1]}), ({"a": [1], "b": [2]}, {"a": [1], "b": [2]})]
)
def test_evaluation_loaders_have_names(loader, expected):
    run = Run()
    run.eval_loader = loader
    assert run.eval_loaders == expected


def test_the_first_loss_that_is_not_finite_is_found_in_the_outermost_pass():
    run = Run()
    assert run.find_non_finite_loss(epoch=1, process_index=0) is None
    run.passes[0].means.loss.update(torch.tensor(1.0))
    run.passes[0].means.loss.update(torch.tensor(float("inf")))
    run.passes.append(DataPass("evaluation"))
    run.passes[1].means.loss.update(torch.tensor(float("nan")))
    error = run.find_non_finite_loss(epoch=2, process_index=3)
    assert error.step == 1
    assert "The loss is inf in training, epoch 2, step 1, rank 3." in str(error)
    run.passes[0].means.loss.reset()
    assert "The loss is nan in evaluation, epoch 2, step 0" in str(run.find_non_finite_loss(2, 3))


# --- the end of a run --------------------------------------------------------------------------------------------


def steps_of(num_steps, fetched):
    for step in range(num_steps):
        fetched.append(step)
        yield step, None, step == num_steps - 1


@pytest.mark.parametrize(
    ("limit", "expected", "is_cut_short"), [(2, [0, 1], True), (4, [0, 1, 2, 3], False), (9, [0, 1, 2, 3], False)]
)
def test_the_steps_of_an_epoch_end_with_the_last_update_and_no_batch_is_fetched_after_it(limit, expected, is_cut_short):
    run, fetched, seen = Run(), [], []
    run.config = config_with(max_num_train_steps=limit, is_limited_by_steps=True)
    for step, _, _ in run.until_update_limit(steps_of(4, fetched)):
        seen.append(step)
        run.progress.num_updates += 1
    assert seen == fetched == expected
    assert run.is_epoch_cut_short is is_cut_short


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
    run.is_last_epoch = True
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
    assert trainer._loop_run.current_pass.means.loss is tracker
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


@pytest.mark.parametrize("name", [*CHOSEN, *SHADOWED])
def test_a_subclass_may_choose_any_name_for_its_own_attributes(name):
    class Own(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            setattr(self, name, "mine")

    trainer, plain = make_trainer(cls=Own), make_trainer()
    for one in (trainer, plain):
        train(one, num_epochs=2, eval_dataset=make_dataset(4), train_dataloader_kwargs=IN_ORDER)
        one.evaluate(make_dataset(4))
    assert getattr(trainer, name) == "mine"
    assert_same_weights(weights_of(trainer.model), weights_of(plain.model))
    assert trainer.run_history.get_metric_names() == plain.run_history.get_metric_names()


def test_the_names_in_the_test_above_are_those_of_the_trainer():
    assert {"progress", "stop_reason", "is_resumed", "recent_loss", "train_dataloader"} <= set(SHADOWED)
    assert not set(CHOSEN) & set(dir(make_trainer()))
