"""The trainer: its accelerator, placeholders of a schedule, tools for callbacks, seeds and teardown."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR, StepLR

from _support import Batches, Samples, make_dataset, make_model, make_trainer, mse, recorder_of, run_python, train
from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated import trainer as trainer_module
from pytorch_accelerated._data import rng as rng_module
from pytorch_accelerated.schedulers import CosineLrScheduler
from pytorch_accelerated.tracking import InMemoryRunHistory
from pytorch_accelerated.trainer import replace_trainer_placeholder_values

# --- the accelerator ---------------------------------------------------------------------------------------------


def test_an_accelerator_of_the_user_is_used_and_keeps_what_it_has_prepared():
    accelerator = Accelerator()
    other_model = accelerator.prepare(make_model())
    trainer = make_trainer(accelerator=accelerator)
    train(trainer)
    trainer.evaluate(make_dataset(4))
    assert trainer._accelerator is accelerator
    assert accelerator._models == [other_model]


def test_an_accelerator_may_be_given_as_keyword_arguments():
    trainer = make_trainer(accelerator={"cpu": True, "project_dir": "somewhere"})
    train(trainer)
    assert trainer._accelerator.project_dir == "somewhere"


@pytest.mark.parametrize("accelerator", ["cpu", 1, Accelerator])
def test_an_accelerator_of_the_wrong_type_is_refused(accelerator):
    with pytest.raises(TypeError, match=r"`accelerator` is a .*Expected an `accelerate.Accelerator`, or a dictionary"):
        make_trainer(accelerator=accelerator)


@pytest.mark.parametrize("accelerator", [Accelerator(), {"mixed_precision": "no"}], ids=["ready", "arguments"])
def test_a_precision_that_contradicts_the_accelerator_is_refused(accelerator):
    with pytest.raises(
        ValueError, match=r"`mixed_precision` is 'bf16', but the `accelerator` has 'no'.*these places only"
    ):
        make_trainer(accelerator=accelerator, mixed_precision="bf16")


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="fp17"):
        make_trainer(mixed_precision="fp17")


def test_one_accelerator_serves_all_runs():
    trainer = make_trainer(mixed_precision="no")
    accelerator = trainer._accelerator
    for _ in range(2):
        train(trainer)
        trainer.evaluate(make_dataset(4))
    assert trainer._accelerator is accelerator


ACCUMULATING = """
import torch
from _support import make_dataset, make_trainer, weights_of, assert_same_weights

def run(num_steps, **kwargs):
    trainer = make_trainer(**kwargs)
    trainer.train(make_dataset(16), num_epochs=2, per_device_batch_size=4, gradient_accumulation_steps=num_steps)
    return weights_of(trainer.model)

expected = run(4)
assert_same_weights(expected, run(4, accelerator={"gradient_accumulation_steps": 4}))
try:
    run(2, accelerator={"gradient_accumulation_steps": 3})
except ValueError as error:
    print(error)
"""


def test_an_accelerator_that_accumulates_does_not_scale_the_loss_twice():
    message = run_python(ACCUMULATING)
    assert "gradient_accumulation_steps=3" in message
    assert "`train` was called with 2" in message


# --- placeholders ------------------------------------------------------------------------------------------------


def test_placeholders_are_replaced_by_the_numbers_of_the_run():
    values = {}

    def create(optimizer, **kwargs):
        values.update(kwargs)
        return LambdaLR(optimizer, lambda step: 1.0)

    placeholders = TrainerPlaceholderValues
    function = partial(
        create,
        epochs=placeholders.NUM_EPOCHS,
        updates=placeholders.NUM_UPDATE_STEPS_PER_EPOCH,
        local_updates=placeholders.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH,
        train_batches=placeholders.TRAIN_DATALOADER_LEN,
        eval_batches=placeholders.EVAL_DATALOADER_LEN,
        nested=[{"total": 2 * placeholders.NUM_EPOCHS * placeholders.NUM_UPDATE_STEPS_PER_EPOCH - 1}],
        plain="unchanged",
    )
    trainer = make_trainer()
    train(
        trainer,
        make_dataset(18),
        num_epochs=3,
        eval_dataset=make_dataset(10),
        gradient_accumulation_steps=2,
        create_scheduler_fn=function,
    )
    assert values == {
        "epochs": 3,
        "updates": 3,
        "local_updates": 3,
        "train_batches": 5,
        "eval_batches": 3,
        "nested": [{"total": 17}],
        "plain": "unchanged",
    }
    assert function.keywords["epochs"] is placeholders.NUM_EPOCHS


def test_eval_dataloader_len_is_the_sum_over_all_evaluation_loaders():
    values = []

    def create(optimizer, num_batches):
        values.append(num_batches)
        return StepLR(optimizer, 1)

    function = partial(create, num_batches=TrainerPlaceholderValues.EVAL_DATALOADER_LEN)
    datasets = {"a": make_dataset(10), "b": make_dataset(6)}
    train(make_trainer(), eval_dataset=datasets, create_scheduler_fn=function)
    assert values == [3 + 2]


def test_a_placeholder_without_a_value_is_refused():
    function = CosineLrScheduler.create_scheduler_fn()
    with pytest.raises(ValueError, match=r"NUM_UPDATE_STEPS_PER_EPOCH` has no value in this run"):
        train(make_trainer(), Batches(make_dataset(8), 4), create_scheduler_fn=function)


def test_placeholders_can_be_replaced_outside_a_run():
    trainer = make_trainer()
    train(trainer, num_epochs=2)
    assert replace_trainer_placeholder_values(trainer, [TrainerPlaceholderValues.NUM_EPOCHS, "x"]) == [2, "x"]


# --- tools -------------------------------------------------------------------------------------------------------


def test_gather_in_a_single_process_returns_the_values_themselves():
    trainer = make_trainer()
    tensor = torch.tensor([1.0, -1.0])
    assert torch.equal(trainer.gather(tensor), tensor)
    assert torch.equal(trainer.gather(tensor, padding_value=-1), tensor)
    nested = trainer.gather({"a": [tensor]}, padding_value=-1)
    assert torch.equal(nested["a"][0], tensor)


def test_print_goes_to_standard_output(capsys):
    make_trainer().print("a", "b", sep="-")
    assert capsys.readouterr().out == "a-b\n"


def test_trainer_and_run_config_describe_the_process():
    trainer = make_trainer()
    assert trainer.device == torch.device("cpu")
    assert trainer.process_index == 0
    train(trainer)
    config = trainer.run_config
    assert config.is_local_process_zero
    assert config.is_world_process_zero
    assert not config.is_distributed
    assert (config.num_processes, config.mixed_precision) == (1, "no")


def test_get_model_returns_the_users_model_during_a_run():
    model = make_model()
    probe, values = recorder_of(lambda trainer: trainer.get_model() is model, "on_training_run_start")
    train(make_trainer(model, callbacks=[probe]))
    assert values == [True]


def test_default_callbacks_report_a_run(capsys):
    model = make_model()
    trainer = Trainer(model, mse, torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.train(make_dataset(8), num_epochs=1, eval_dataset=make_dataset(4))
    printed = capsys.readouterr().out
    for words in ("Starting training run", "epoch ", "train loss  eval loss", "  1/1 ", "Finishing training run"):
        assert words in printed


def test_on_init_end_is_fired_when_the_trainer_has_been_created():
    probe, seen = recorder_of(lambda trainer: (trainer.model, trainer.run_config), "on_init_end")
    trainer = make_trainer(callbacks=(probe,))
    assert seen == [(trainer.model, None)]


def test_metrics_are_recorded_in_the_run_history_of_the_user():
    class UpperCaseHistory(InMemoryRunHistory):
        def update_metric(self, metric_name, metric_value):
            super().update_metric(metric_name.upper(), metric_value)

    trainer = make_trainer(run_history=UpperCaseHistory())
    train(trainer)
    assert trainer.run_history.get_metric_names() == {"TRAIN_LOSS_EPOCH"}


# --- seeds -------------------------------------------------------------------------------------------------------


def test_the_seed_of_the_trainer_seeds_all_global_generators():
    drawn = []
    for _ in range(2):
        make_trainer(make_model(), seed=123)
        drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert drawn[0] == drawn[1]


def test_without_a_seed_a_run_leaves_the_global_generators_unchanged():
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    model = make_model()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    trainer = make_trainer(model)
    train(trainer, num_epochs=2, eval_dataset=Samples(make_dataset(4)))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


# --- teardown ----------------------------------------------------------------------------------------------------


def test_an_interruption_while_generators_are_restored_does_not_leave_them_changed(monkeypatch):
    trainer = make_trainer(make_model())
    generator, state = np.random.get_bit_generator(), torch.get_rng_state()

    def interrupt(depth):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(rng_module, "_restore", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(trainer, Samples(make_dataset(4)))
    assert np.random.get_bit_generator() is generator
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_during_teardown_leaves_a_trainer_that_can_train(monkeypatch):
    """A signal handler may raise one anywhere."""

    def fail(*_):
        raise LookupError("raised by a signal handler")

    trainer = make_trainer()
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "release", fail)
        with pytest.raises(LookupError):
            trainer.train(make_dataset(4), 1)
    trainer.train(make_dataset(4), 1)
    assert trainer.progress.num_epochs_completed == 1
