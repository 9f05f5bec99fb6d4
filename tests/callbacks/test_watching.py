"""A watched metric that nothing records is told of at the start of the run, where that can be known."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch

from _support import Probe, make_dataset, make_trainer, train
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    GradientNormCallback,
    ModelEmaCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
)

WATCHING = {
    EarlyStoppingCallback: {},
    SaveBestModelCallback: {},
    ModelEmaCallback: {},
    SaveTrainingStateCallback: {"keep_best": 1, "max_checkpoints": 1},
}


pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")


def run(*callbacks, cls=Trainer, **kwargs):
    trainer = make_trainer(cls=cls, callbacks=callbacks)
    train(trainer, **{"eval_dataset": make_dataset(8), "num_epochs": 2, **kwargs})
    return trainer


@pytest.mark.parametrize("callback_class", WATCHING)
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("val_loss", "eval_loss_epoch"),
        ("valid_loss", "eval_loss_epoch"),
        ("eval_loss", "eval_loss_epoch"),
        ("eval_los_epoch", "eval_loss_epoch"),
        ("loss", "train_loss_epoch"),
        ("training_loss", "train_loss_epoch"),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_one_before_training(callback_class, name, meant):
    trainer = make_trainer(callbacks=[callback_class(watch_metric=name, **WATCHING[callback_class])])
    words = f"`{callback_class.__name__}` watches '{name}', which nothing in this run records.*Watch '{meant}'."
    with pytest.raises(ValueError, match=words):
        train(trainer, eval_dataset=make_dataset(8))
    assert trainer.progress.num_updates == 0


@pytest.mark.parametrize(
    ("names", "others", "kwargs"),
    [
        (["train_loss_epoch", "eval_loss_epoch"], [], {}),
        (["train_gradient_norm"], [GradientNormCallback()], {"gradient_clip_norm": 1.0}),
        (["train_size"], [GradientNormCallback("train_size")], {"gradient_clip_norm": 1.0}),
        (["intermediate_eval_loss_epoch"], [StepBasedEvaluationCallback(eval_every_n_updates=1)], {}),
        (["ema_model_eval_loss_epoch"], [ModelEmaCallback], {}),
        (
            ["a_eval_loss_epoch", "b_eval_loss_epoch", "a_ema_model_eval_loss_epoch"],
            [partial(ModelEmaCallback, watch_metric="b_ema_model_eval_loss_epoch")],
            {"eval_dataset": {"a": make_dataset(8), "b": make_dataset(8)}},
        ),
    ],
)
def test_a_name_that_the_library_records_is_known(names, others, kwargs):
    watching = [EarlyStoppingCallback(5, watch_metric=name) for name in names]
    made = [other() if callable(other) else other for other in others]  # in the folder of this test
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(*made, *watching, **kwargs)


def test_a_name_that_is_in_the_history_already_is_known():
    trainer = make_trainer(callbacks=[EarlyStoppingCallback(watch_metric="mine")])
    trainer.run_history.update_metric("mine", 1.0)
    train(trainer, reset_run_history=False)


class RecordsItself(Trainer):
    """Records metrics under names of the program's choice."""

    def eval_epoch_end(self):
        self.run_history.update_metric("val_loss", 1.0)
        self.run_history.update_metric("score", 1.0)


@pytest.mark.parametrize("name", ["val_loss", "score"])
@pytest.mark.parametrize("callback_class", WATCHING)
def test_a_name_that_the_program_records_is_not_told_of(name, callback_class):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(callback_class(watch_metric=name, **WATCHING[callback_class]), cls=RecordsItself)


def test_a_name_that_a_callback_of_the_program_records_is_not_refused():
    record = Probe(on_eval_epoch_end=lambda trainer, **kwargs: trainer.run_history.update_metric("score", 1.0))
    run(record, EarlyStoppingCallback(watch_metric="score"))


def test_a_name_that_a_step_records_is_not_refused():
    class Own(Trainer):
        def calculate_eval_batch_loss(self, batch):
            return {**super().calculate_eval_batch_loss(batch), "metrics": {"score": 1.0}}

    run(EarlyStoppingCallback(watch_metric="eval_score"), cls=Own)


def test_a_hook_on_the_instance_may_record_anything():
    trainer = make_trainer(callbacks=[EarlyStoppingCallback(watch_metric="score")])
    trainer.train_epoch_end = lambda: trainer.run_history.update_metric("score", 1.0)
    train(trainer)


class RecordsOthers(Trainer):
    def eval_epoch_end(self):
        self.run_history.update_metric("score", 1.0)


def test_the_name_of_another_library_is_warned_of_if_the_program_records_metrics_itself():
    foreign = "_".join(["valid", "loss"])
    trainer = make_trainer(cls=RecordsOthers, callbacks=[EarlyStoppingCallback(watch_metric=foreign)])
    with (
        pytest.warns(UserWarning, match=f"watches '{foreign}'. Unless your program .*, watch 'eval_loss_epoch'"),
        pytest.raises(ValueError, match=f"'{foreign}'. Recorded so far: .* Did you mean 'eval_loss_epoch'?"),
    ):
        train(trainer, eval_dataset=make_dataset(8))


@pytest.mark.parametrize("callback_class", [EarlyStoppingCallback, SaveBestModelCallback, ModelEmaCallback])
def test_a_value_that_is_not_a_number_is_told_of(callback_class):
    class Own(RecordsOthers):
        def eval_epoch_end(self):
            self.run_history.update_metric("score", float("nan"))

    with pytest.warns(UserWarning, match=f"`{callback_class.__name__}` watches 'score', which is NaN"):
        run(callback_class(watch_metric="score"), cls=Own, num_epochs=1)


# --- metrics that are measured in some epochs only ---------------------------------------------------------------


def measured(values):
    """Return a callback that records ``score`` in the epochs that are the keys, from 1."""

    def record(trainer, **kwargs):
        epoch = trainer.run_history.current_epoch
        if epoch in values:
            trainer.run_history.update_metric("score", values[epoch])

    return Probe(on_eval_epoch_end=record)


def test_the_first_value_may_be_measured_in_a_later_epoch(tmp_path):
    """Those epochs say nothing, so they do not count for the patience."""
    stopping = EarlyStoppingCallback(2, 0.0, watch_metric="score")
    saving = SaveBestModelCallback(tmp_path / "best.pt", watch_metric="score")
    trainer = make_trainer(callbacks=[measured({3: 0.5, 5: 0.6, 6: 0.7, 7: 0.8}), stopping, saving])
    with pytest.warns(UserWarning, match="watches 'score', but nothing has been recorded under this name so far"):
        train(trainer, num_epochs=8, eval_dataset=make_dataset(8))
    assert trainer.progress.num_epochs_completed == 6
    assert (stopping.best_metric, saving.best_metric) == (0.5, 0.5)
    assert torch.load(tmp_path / "best.pt", weights_only=True)["epoch"] == 3


def test_the_average_may_be_chosen_by_a_metric_that_is_first_measured_in_a_later_epoch(tmp_path):
    average = ModelEmaCallback(
        0.9, save_path=tmp_path / "average.pt", watch_metric="ema_model_score", callbacks=[measured({2: 0.5})]
    )
    trainer = make_trainer(callbacks=[average])
    with pytest.warns(UserWarning, match="nothing has been recorded under this name so far"):
        train(trainer, num_epochs=3, eval_dataset=make_dataset(8))
    assert torch.load(tmp_path / "average.pt", weights_only=True)["ema_model_score"] == 0.5


def test_a_name_without_that_of_its_entry_is_an_error_after_the_first_epoch():
    trainer = make_trainer(
        callbacks=[EarlyStoppingCallback(watch_metric="eval_m")], metrics={"m": lambda outputs, targets: [0.0, 1.0]}
    )
    with pytest.raises(ValueError, match=r"'eval_m'. Recorded so far: .* Did you mean 'eval_m_1'?"):
        train(trainer, eval_dataset=make_dataset(8))


def test_an_average_of_several_datasets_is_answered_with_a_name_that_is_recorded():
    trainer = make_trainer(callbacks=[ModelEmaCallback()])
    with pytest.raises(ValueError, match=r"It records \[(.*)\]. Watch '(a|b)_ema_model_eval_loss_epoch'.") as caught:
        train(trainer, eval_dataset={"a": make_dataset(8), "b": make_dataset(8)})
    assert "'ema_model_a" not in str(caught.value)
