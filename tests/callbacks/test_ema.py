"""`ModelEmaCallback` in tiny real trainings."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import _support
from _processes import launch
from _support import IMPOSSIBLE_COUNTS, EventRecorder, assert_same_weights, make_dataset
from pytorch_accelerated._models.ema import ModelEma
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    ModelEmaCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    StopTrainingError,
    TrainerCallback,
)
from pytorch_accelerated.trainer import Trainer

EMA_LOSS = "ema_model_eval_loss_epoch"


pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")


def make_trainer(callbacks, **kwargs):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return Trainer(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.05), callbacks, **kwargs)


def train(trainer, num_epochs=2, eval_dataset="same", **kwargs):
    """Four updates per epoch, and an evaluation on the training data."""
    eval_dataset = make_dataset(32) if eval_dataset == "same" else eval_dataset
    settings = {"num_epochs": num_epochs, "eval_dataset": eval_dataset, "per_device_batch_size": 8, **kwargs}
    return _support.train(trainer, 32, **settings)


def evaluate(model):
    inputs, targets = make_dataset(32).tensors
    with torch.no_grad():
        return nn.functional.mse_loss(copy.deepcopy(model).eval()(inputs), targets).item()


class RecordWeights(TrainerCallback):
    """Keeps the state of the model before the run and after each update."""

    def on_training_run_start(self, trainer, **kwargs):
        self.states = [copy.deepcopy(trainer.get_model().state_dict())]

    def on_optimizer_step_end(self, trainer, **kwargs):
        self.states.append(copy.deepcopy(trainer.get_model().state_dict()))


class Score(TrainerCallback):
    """Records the next of the given values as the metric ``score``."""

    def __init__(self, *values):
        self.values = iter(values)

    def on_eval_epoch_end(self, trainer, **kwargs):
        trainer.run_history.update_metric("score", next(self.values))


# --- averaging -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gradient_accumulation_steps", "update_every_n_updates", "num_averaged"), [(1, 1, 8), (2, 1, 4), (1, 3, 2)]
)
def test_the_average_follows_the_updates_of_the_model(
    gradient_accumulation_steps, update_every_n_updates, num_averaged
):
    recorder = RecordWeights()
    ema = ModelEmaCallback(decay=0.8, update_every_n_updates=update_every_n_updates)
    train(make_trainer([recorder, ema]), gradient_accumulation_steps=gradient_accumulation_steps)

    first, *updated = recorder.states
    updated = updated[update_every_n_updates - 1 :: update_every_n_updates]
    assert len(updated) == num_averaged
    average = first["2.weight"]
    for state in updated:
        average = 0.8 * average + 0.2 * state["2.weight"]
    torch.testing.assert_close(ema.ema_model.module[2].weight, average)
    assert ema.ema_model.module[1].num_batches_tracked == updated[-1]["1.num_batches_tracked"]


def test_the_callback_does_not_change_training():
    plain = train(make_trainer([]))
    averaged = train(make_trainer([ModelEmaCallback()]))
    assert_same_weights(averaged.model.state_dict(), plain.model.state_dict())
    for name in plain.run_history.get_metric_names():
        assert averaged.run_history.get_metric_values(name) == plain.run_history.get_metric_values(name)


def test_each_run_creates_a_new_average():
    ema = ModelEmaCallback(decay=1.0)
    trainer = train(make_trainer([ema]))
    first = ema.ema_model
    start_of_second_run = copy.deepcopy(trainer.model.state_dict())

    train(trainer)

    assert ema.ema_model is not first
    assert torch.equal(ema.ema_model.module[0].weight, start_of_second_run["0.weight"])


def test_a_model_replaced_during_the_run_is_averaged_from_then_on():
    class Replace(TrainerCallback):
        def on_train_epoch_end(self, trainer, **kwargs):
            trainer.model = copy.deepcopy(trainer.model)  # unknown to the optimizer, so training does not change it
            nn.init.zeros_(trainer.model[0].weight)

    ema = ModelEmaCallback(decay=0.0)
    train(make_trainer([Replace(), ema]))
    assert torch.equal(ema.ema_model.module[0].weight, torch.zeros(4, 3))


def test_the_average_is_created_by_the_given_class_or_partial():
    class OwnEma(ModelEma):
        def __init__(self, model, decay):
            super().__init__(model, decay)

    subclassed = ModelEmaCallback(decay=0.5, model_ema=OwnEma)
    copying = ModelEmaCallback(model_ema=partial(ModelEma, should_average_buffers=False))
    trainer = train(make_trainer([subclassed, copying]))
    assert type(subclassed.ema_model) is OwnEma
    assert subclassed.ema_model.decay == 0.5
    assert torch.equal(copying.ema_model.module[1].running_mean, trainer.model[1].running_mean)


class NoteModels(ModelEma):
    """Remembers which models it averages."""

    models = ()

    def update(self, model):
        self.models = {*self.models, model}
        super().update(model)


def test_the_average_of_a_compiled_model_has_the_plain_parameter_names():
    ema = ModelEmaCallback(model_ema=NoteModels)
    trainer = make_trainer([ema])
    plain = trainer.model
    names = list(plain.state_dict())
    trainer.model = torch.compile(plain, backend="eager")
    train(trainer)
    assert ema.ema_model.models == {plain}
    assert list(ema.ema_model.module.state_dict()) == names
    assert trainer.run_history.get_latest_metric(EMA_LOSS) == pytest.approx(evaluate(ema.ema_model.module))


@pytest.mark.usefixtures("_fresh_accelerate_state")
def test_the_average_is_evaluated_with_its_own_weights_in_mixed_precision():
    ema = ModelEmaCallback(decay=0.9)
    trainer = train(make_trainer([ema], mixed_precision="bf16"))
    loss = trainer.run_history.get_latest_metric(EMA_LOSS)
    assert loss == pytest.approx(evaluate(ema.ema_model.module), rel=0.02)
    assert loss != pytest.approx(trainer.run_history.get_latest_metric("eval_loss_epoch"), rel=0.02)


def test_a_sharded_model_is_rejected(monkeypatch):
    monkeypatch.setattr("pytorch_accelerated.trainer.is_sharded", lambda accelerator: True)
    with pytest.raises(RuntimeError, match=r"needs the full model on each process, but FSDP or DeepSpeed shards it"):
        train(make_trainer([ModelEmaCallback()]))


@pytest.mark.parametrize(("num_updates", "error"), IMPOSSIBLE_COUNTS)
def test_an_impossible_update_interval_is_rejected(num_updates, error):
    with pytest.raises(error, match=f"`update_every_n_updates` is {num_updates}.* Expected a whole number of updates"):
        ModelEmaCallback(update_every_n_updates=num_updates)


# --- evaluating ------------------------------------------------------------------------------------------------


def test_the_average_is_evaluated_after_each_epoch():
    ema = ModelEmaCallback(decay=0.9)
    trainer = train(make_trainer([ema]), num_epochs=3)
    assert len(trainer.run_history.get_metric_values(EMA_LOSS)) == 3
    assert trainer.run_history.get_latest_metric(EMA_LOSS) == pytest.approx(evaluate(ema.ema_model.module))
    assert trainer.run_history.get_latest_metric("eval_loss_epoch") == pytest.approx(evaluate(trainer.model))


def test_callbacks_that_watch_the_average_can_come_before_it_in_the_list():
    best = SaveBestModelCallback(watch_metric=EMA_LOSS, load_saved_checkpoint=False)
    stopping = EarlyStoppingCallback(watch_metric=EMA_LOSS, early_stopping_threshold=1e9)
    trainer = train(make_trainer([best, stopping, ModelEmaCallback()]), num_epochs=5)
    assert best.best_metric_epoch == len(trainer.run_history.get_metric_values(EMA_LOSS)) == 2


def test_only_the_callbacks_of_the_average_receive_the_events_of_its_evaluation():
    inner, outer = EventRecorder(), EventRecorder()
    train(make_trainer([outer, ModelEmaCallback(callbacks=[inner, EventRecorder])]), num_epochs=1)
    steps = ["on_eval_step_start", "on_eval_step_end"] * 4
    expected = ["on_eval_epoch_start", *steps, "on_eval_epoch_end"]
    assert [event for event in inner.log if "_eval_" in event] == expected
    assert [event for event in outer.log if "_eval_" in event] == expected


def test_intermediate_evaluations_do_not_evaluate_the_average():
    inner = EventRecorder()
    callbacks = [StepBasedEvaluationCallback(eval_every_n_steps=1), ModelEmaCallback(callbacks=[inner])]
    train(make_trainer(callbacks), num_epochs=1)
    assert inner.log.count("on_eval_epoch_start") == 1


def test_the_average_is_evaluated_on_each_of_several_datasets():
    ema = ModelEmaCallback(watch_metric="near_" + EMA_LOSS)
    trainer = train(make_trainer([ema]), eval_dataset={"near": make_dataset(32), "far": make_dataset(16)})
    names = {name for name in trainer.run_history.get_metric_names() if "ema" in name}
    assert names == {"near_" + EMA_LOSS, "far_" + EMA_LOSS}
    assert ema.best_metric == min(trainer.run_history.get_metric_values("near_" + EMA_LOSS))


def test_the_average_is_not_evaluated_if_evaluate_during_training_is_false():
    trainer = train(make_trainer([ModelEmaCallback(evaluate_during_training=False)]))
    assert trainer.run_history.get_metric_names() == {"train_loss_epoch", "eval_loss_epoch"}


class Fail(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_eval_step_end(self, trainer, batch, batch_output, **kwargs):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), StopTrainingError("enough")])
def test_the_model_and_callbacks_are_restored_when_the_evaluation_of_the_average_fails(error):
    trainer = make_trainer([ModelEmaCallback(callbacks=[Fail(error)])])
    model, handler = trainer.model, trainer.callback_handler

    if isinstance(error, StopTrainingError):
        train(trainer)
        assert "enough" in trainer.stop_reason
    else:
        with pytest.raises(type(error)):
            train(trainer)

    assert trainer.model is model
    assert trainer.callback_handler is handler
    assert trainer.run_history.metric_name_prefix == ""


def test_a_watched_metric_that_is_never_recorded_is_an_error():
    trainer = make_trainer([ModelEmaCallback(watch_metric="ema_model_accuracy", greater_is_better=True)])
    with pytest.raises(ValueError, match=r"'ema_model_accuracy'.*ema_model_eval_loss_epoch"):
        train(trainer)


# --- saving ----------------------------------------------------------------------------------------------------


class NoteAverages(TrainerCallback):
    """Keeps a copy of the average after each epoch."""

    def __init__(self, ema):
        self.ema = ema
        self.states = []

    def on_training_run_epoch_end(self, trainer, **kwargs):
        self.states.append(copy.deepcopy(self.ema.ema_model.module.state_dict()))


@pytest.mark.filterwarnings("ignore:.* is NaN")  # which is what they watch
@pytest.mark.parametrize(
    ("scores", "greater_is_better", "best"),
    [
        ((0.1, 0.9, 0.5), True, 2),
        ((0.9, 0.5, 0.7), False, 2),
        ((float("nan"), 0.9, 0.5), True, 2),
        ((1, 1, 1), True, 1),
    ],
)
def test_the_best_average_is_saved(scores, greater_is_better, best):
    ema = ModelEmaCallback(
        save_path="averages/best.pt",
        watch_metric="ema_model_score",
        greater_is_better=greater_is_better,
        callbacks=[Score(*scores)],
    )
    noted = NoteAverages(ema)
    trainer = train(make_trainer([ema, noted]), num_epochs=3)

    checkpoint = torch.load("averages/best.pt", weights_only=True)
    assert checkpoint.keys() == {"model_state_dict", "ema_model_score", "epoch"}
    assert checkpoint["epoch"] == ema.best_metric_epoch == best
    assert checkpoint["ema_model_score"] == ema.best_metric == scores[best - 1]
    assert_same_weights(checkpoint["model_state_dict"], noted.states[best - 1])
    trainer.load_checkpoint("averages/best.pt")
    assert_same_weights(trainer.model.state_dict(), noted.states[best - 1])


@pytest.mark.parametrize(
    ("settings", "eval_dataset"), [({"evaluate_during_training": False}, "same"), ({}, None)], ids=["off", "no data"]
)
def test_without_evaluation_the_last_average_is_saved(settings, eval_dataset):
    ema = ModelEmaCallback(**settings)
    train(make_trainer([ema]), eval_dataset=eval_dataset)
    checkpoint = torch.load("ema_model.pt", weights_only=True)
    assert_same_weights(checkpoint["model_state_dict"], ema.ema_model.module.state_dict())
    assert checkpoint["epoch"] == 2


def test_the_model_itself_is_saved_and_kept_unchanged():
    trainer = train(make_trainer([ModelEmaCallback(decay=1.0), SaveBestModelCallback()]))
    saved = torch.load("best_model.pt", weights_only=True)["model_state_dict"]
    assert_same_weights(trainer.model.state_dict(), saved)
    assert not torch.equal(saved["0.weight"], torch.load("ema_model.pt")["model_state_dict"]["0.weight"])


# --- resuming --------------------------------------------------------------------------------------------------


class CountingEma(ModelEma):
    """Its decay grows with its own update count, a common pattern."""

    def __init__(self, model, decay):
        super().__init__(model, decay)
        self.num_updates = 0

    def update(self, model):
        self.num_updates += 1
        self.decay = self.num_updates / (10 + self.num_updates)
        super().update(model)


@pytest.mark.parametrize("state", ["step_3", "epoch_1"])
@pytest.mark.parametrize("is_saved_first", [True, False])
def test_a_resumed_run_ends_with_the_same_average_as_an_uninterrupted_one(state, is_saved_first, tmp_path):
    def make(folder):
        ema = ModelEmaCallback(save_path=folder / "ema.pt", model_ema=CountingEma)
        saving = SaveTrainingStateCallback(folder, save_every_n_epochs=1, save_every_n_steps=3)
        return ema, make_trainer([saving, ema] if is_saved_first else [ema, saving])

    uninterrupted, trainer = make(tmp_path / "uninterrupted")
    expected = train(trainer, num_epochs=3)
    resumed, trainer = make(tmp_path / "resumed")
    with torch.no_grad():
        trainer.model[0].weight.zero_()

    train(trainer, num_epochs=3, resume_from=str(tmp_path / "uninterrupted" / state))

    assert_same_weights(resumed.ema_model.state_dict(), uninterrupted.ema_model.state_dict())
    assert resumed.ema_model.num_updates == 12
    assert resumed.ema_model.decay == uninterrupted.ema_model.decay
    assert (resumed.best_metric, resumed.best_metric_epoch) == (
        uninterrupted.best_metric,
        uninterrupted.best_metric_epoch,
    )
    assert trainer.run_history.get_metric_values(EMA_LOSS) == expected.run_history.get_metric_values(EMA_LOSS)


def test_a_resumed_run_does_not_replace_the_best_average_with_a_worse_one(tmp_path):
    settings = {"save_path": tmp_path / "ema.pt", "watch_metric": "ema_model_score", "greater_is_better": True}
    saving = SaveTrainingStateCallback(tmp_path)
    train(make_trainer([ModelEmaCallback(**settings, callbacks=[Score(0.9)]), saving]), num_epochs=1)

    resumed = ModelEmaCallback(**settings, callbacks=[Score(0.5)])
    train(make_trainer([resumed]), num_epochs=2, resume_from=str(tmp_path / "final"))

    assert resumed.best_metric == 0.9
    assert torch.load(tmp_path / "ema.pt")["epoch"] == 1


def test_the_run_after_a_resumed_one_starts_with_a_new_average_and_keeps_the_best_value(tmp_path):
    settings = {"watch_metric": "ema_model_score", "greater_is_better": True}
    saving = SaveTrainingStateCallback(tmp_path)
    train(make_trainer([ModelEmaCallback(**settings, callbacks=[Score(0.9)]), saving]), num_epochs=1)
    ema = ModelEmaCallback(decay=1.0, **settings, callbacks=[Score(0.5, 0.1)])
    trainer = train(make_trainer([ema]), num_epochs=2, resume_from=str(tmp_path / "final"))
    after_resumed_run = copy.deepcopy(trainer.model.state_dict())

    train(trainer, num_epochs=1)

    assert torch.equal(ema.ema_model.module[0].weight, after_resumed_run["0.weight"])
    assert ema.best_metric == 0.9
    assert torch.load("ema_model.pt")["ema_model_score"] == 0.9


class CountEvaluations(TrainerCallback):
    num_evaluations = 0

    def on_eval_epoch_end(self, trainer, **kwargs):
        self.num_evaluations += 1

    def state_dict(self):
        return {"num_evaluations": self.num_evaluations}

    def load_state_dict(self, state_dict):
        self.num_evaluations = state_dict["num_evaluations"]


def test_the_callbacks_of_the_average_are_restored_on_resume(tmp_path):
    first, resumed = CountEvaluations(), CountEvaluations()
    saving = SaveTrainingStateCallback(tmp_path)
    train(make_trainer([ModelEmaCallback(callbacks=[first]), saving]), num_epochs=2)
    train(
        make_trainer([ModelEmaCallback(callbacks=[resumed])]),
        num_epochs=3,
        resume_from=str(tmp_path / "final"),
    )
    assert resumed.num_evaluations == 3


def test_a_resumed_run_uses_the_decay_of_its_own_callback(tmp_path):
    train(make_trainer([ModelEmaCallback(decay=0.5), SaveTrainingStateCallback(tmp_path)]), num_epochs=1)
    resumed = ModelEmaCallback(decay=0.25)
    train(make_trainer([resumed]), num_epochs=2, resume_from=str(tmp_path / "final"))
    assert resumed.ema_model.decay == 0.25


def test_the_state_is_empty_before_the_first_run_and_can_be_loaded():
    ema = ModelEmaCallback()
    assert ema.state_dict() == {}
    ema.load_state_dict({})
    train(make_trainer([ema]))


# --- several processes -----------------------------------------------------------------------------------------

DISTRIBUTED_RUN = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from pytorch_accelerated.callbacks import ModelEmaCallback
from pytorch_accelerated.trainer import Trainer

torch.manual_seed(0)
inputs = torch.randn(32, 3)
data = TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
ema = ModelEmaCallback(decay=0.5, save_path="ema.pt")
trainer = Trainer(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.05), [ema])
trainer.train(data, 2, data, 8)
loss = trainer.run_history.get_metric_values("ema_model_eval_loss_epoch")
torch.save((ema.ema_model.module.state_dict(), loss), f"rank_{trainer.process_index}.pt")
"""


@pytest.mark.distributed
def test_all_processes_have_the_same_average_with_the_buffers_of_rank_0():
    Path("run.py").write_text(DISTRIBUTED_RUN)
    launch(Path("run.py").resolve(), Path.cwd(), num_processes=2)

    (main, main_loss), (other, other_loss) = (torch.load(f"rank_{rank}.pt") for rank in range(2))
    assert_same_weights(other, main)
    assert main_loss == other_loss
    assert sorted(path.name for path in Path().glob("*.pt")) == ["ema.pt", "rank_0.pt", "rank_1.pt"]


@pytest.mark.parametrize(("decay", "error"), [("average.pt", TypeError), (None, TypeError), (1.5, ValueError)])
def test_a_decay_that_cannot_be_meant_is_refused_at_construction(decay, error):
    with pytest.raises(error, match=r"`decay` is .* Expected the weight of the past"):
        ModelEmaCallback(decay)
