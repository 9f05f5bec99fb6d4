"""`ModelEmaCallback` in tiny real trainings."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from _processes import launch
from pytorch_accelerated._ema import ModelEma
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


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_data(num_samples=32):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_samples, 3, generator=generator)
    return TensorDataset(inputs, inputs.sum(dim=1, keepdim=True) + 1)


def make_trainer(callbacks, **kwargs):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return Trainer(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.05), callbacks, **kwargs)


def train(trainer, num_epochs=2, eval_dataset="same", **kwargs):
    eval_dataset = make_data() if eval_dataset == "same" else eval_dataset
    settings = {"per_device_batch_size": 8, "train_dataloader_kwargs": {"num_workers": 0}}
    trainer.train(make_data(), num_epochs, eval_dataset, **{**settings, **kwargs})
    return trainer


def evaluate(model):
    inputs, targets = make_data().tensors
    with torch.no_grad():
        return nn.functional.mse_loss(copy.deepcopy(model).eval()(inputs), targets).item()


def assert_same_state(state, expected):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


class RecordWeights(TrainerCallback):
    """Notes the state of the model before the run and after each update."""

    def on_training_run_start(self, trainer, **kwargs):
        self.states = [copy.deepcopy(trainer.get_model().state_dict())]

    def on_optimizer_step_end(self, trainer, **kwargs):
        self.states.append(copy.deepcopy(trainer.get_model().state_dict()))


class RecordEvents(TrainerCallback):
    def __init__(self):
        self.events = []

    def on_eval_epoch_start(self, trainer, **kwargs):
        self.events.append("start")

    def on_eval_step_end(self, trainer, batch, batch_output, **kwargs):
        self.events.append("step")

    def on_eval_epoch_end(self, trainer, **kwargs):
        self.events.append("end")


class Score(TrainerCallback):
    """Records the next of some given values as the metric ``score``."""

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


def test_training_goes_as_without_the_callback():
    plain = train(make_trainer([]))
    averaged = train(make_trainer([ModelEmaCallback()]))
    assert_same_state(averaged.model.state_dict(), plain.model.state_dict())
    for name in plain.run_history.get_metric_names():
        assert averaged.run_history.get_metric_values(name) == plain.run_history.get_metric_values(name)


def test_each_run_makes_an_average_of_its_own():
    ema = ModelEmaCallback(decay=1.0)
    trainer = train(make_trainer([ema]))
    first = ema.ema_model
    start_of_second_run = copy.deepcopy(trainer.model.state_dict())

    train(trainer)

    assert ema.ema_model is not first
    assert torch.equal(ema.ema_model.module[0].weight, start_of_second_run["0.weight"])


def test_a_model_put_in_place_during_the_run_is_averaged_from_then_on():
    class Replace(TrainerCallback):
        def on_train_epoch_end(self, trainer, **kwargs):
            trainer.model = copy.deepcopy(trainer.model)  # The optimizer does not know it, so it stays as it is.
            nn.init.zeros_(trainer.model[0].weight)

    ema = ModelEmaCallback(decay=0.0)
    train(make_trainer([Replace(), ema]))
    assert torch.equal(ema.ema_model.module[0].weight, torch.zeros(4, 3))


def test_the_average_may_be_of_any_kind():
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
    """Notes which model it averages."""

    models = ()

    def update(self, model):
        self.models = {*self.models, model}
        super().update(model)


def test_a_compiled_model_is_averaged_under_its_plain_names():
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
def test_with_mixed_precision_the_average_computes_with_its_own_weights():
    ema = ModelEmaCallback(decay=0.9)
    trainer = train(make_trainer([ema], mixed_precision="bf16"))
    loss = trainer.run_history.get_latest_metric(EMA_LOSS)
    assert loss == pytest.approx(evaluate(ema.ema_model.module), rel=0.02)
    assert loss != pytest.approx(trainer.run_history.get_latest_metric("eval_loss_epoch"), rel=0.02)


def test_a_model_that_is_split_over_processes_is_refused(monkeypatch):
    monkeypatch.setattr("pytorch_accelerated.callbacks.ema.is_sharded", lambda accelerator: True)
    with pytest.raises(RuntimeError, match=r"needs the whole model on each process, but FSDP or DeepSpeed has split"):
        train(make_trainer([ModelEmaCallback()]))


@pytest.mark.parametrize("num_updates", [0, -1])
def test_an_interval_below_one_update_is_refused(num_updates):
    with pytest.raises(ValueError, match=f"`update_every_n_updates` is {num_updates}. Expected at least 1"):
        ModelEmaCallback(update_every_n_updates=num_updates)


# --- evaluating ------------------------------------------------------------------------------------------------


def test_the_average_is_evaluated_after_each_epoch():
    ema = ModelEmaCallback(decay=0.9)
    trainer = train(make_trainer([ema]), num_epochs=3)
    assert len(trainer.run_history.get_metric_values(EMA_LOSS)) == 3
    assert trainer.run_history.get_latest_metric(EMA_LOSS) == pytest.approx(evaluate(ema.ema_model.module))
    assert trainer.run_history.get_latest_metric("eval_loss_epoch") == pytest.approx(evaluate(trainer.model))


def test_callbacks_that_watch_the_average_may_stand_before_it():
    best = SaveBestModelCallback(watch_metric=EMA_LOSS, load_saved_checkpoint=False)
    stopping = EarlyStoppingCallback(watch_metric=EMA_LOSS, early_stopping_threshold=1e9)
    trainer = train(make_trainer([best, stopping, ModelEmaCallback()]), num_epochs=5)
    assert best.best_metric_epoch == len(trainer.run_history.get_metric_values(EMA_LOSS)) == 2


def test_its_own_callbacks_get_the_events_of_its_evaluation_and_the_others_do_not():
    own, other = RecordEvents(), RecordEvents()
    train(make_trainer([other, ModelEmaCallback(callbacks=[own, RecordEvents])]), num_epochs=1)
    assert own.events == other.events == ["start", "step", "step", "step", "step", "end"]


def test_intermediate_evaluation_and_evaluate_leave_the_average_out():
    own = RecordEvents()
    callbacks = [StepBasedEvaluationCallback(eval_every_n_steps=1), ModelEmaCallback(callbacks=[own])]
    trainer = train(make_trainer(callbacks), num_epochs=1)
    trainer.evaluate(make_data(), dataloader_kwargs={"num_workers": 0})
    assert own.events.count("start") == 1


def test_each_of_several_datasets_has_a_metric_of_the_average():
    ema = ModelEmaCallback(watch_metric="near_" + EMA_LOSS)
    trainer = train(make_trainer([ema]), eval_dataset={"near": make_data(), "far": make_data(16)})
    names = {name for name in trainer.run_history.get_metric_names() if "ema" in name}
    assert names == {"near_" + EMA_LOSS, "far_" + EMA_LOSS}
    assert ema.best_metric == min(trainer.run_history.get_metric_values("near_" + EMA_LOSS))


def test_evaluation_can_be_left_out():
    trainer = train(make_trainer([ModelEmaCallback(evaluate_during_training=False)]))
    assert trainer.run_history.get_metric_names() == {"train_loss_epoch", "eval_loss_epoch"}


class Fail(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_eval_step_end(self, trainer, batch, batch_output, **kwargs):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), StopTrainingError("enough")])
def test_the_average_is_never_left_in_the_place_of_the_model(error):
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


def test_a_metric_to_watch_that_nobody_records_is_an_error():
    trainer = make_trainer([ModelEmaCallback(watch_metric="ema_model_accuracy")])
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
    assert_same_state(checkpoint["model_state_dict"], noted.states[best - 1])
    trainer.load_checkpoint("averages/best.pt")
    assert_same_state(trainer.model.state_dict(), noted.states[best - 1])


@pytest.mark.parametrize(
    ("settings", "eval_dataset"), [({"evaluate_during_training": False}, "same"), ({}, None)], ids=["off", "no data"]
)
def test_without_evaluation_the_last_average_is_saved(settings, eval_dataset):
    ema = ModelEmaCallback(**settings)
    train(make_trainer([ema]), eval_dataset=eval_dataset)
    checkpoint = torch.load("ema_model.pt", weights_only=True)
    assert_same_state(checkpoint["model_state_dict"], ema.ema_model.module.state_dict())
    assert checkpoint["epoch"] == 2


def test_the_model_is_saved_and_left_as_it_is():
    trainer = train(make_trainer([ModelEmaCallback(decay=1.0), SaveBestModelCallback()]))
    saved = torch.load("best_model.pt", weights_only=True)["model_state_dict"]
    assert_same_state(trainer.model.state_dict(), saved)
    assert not torch.equal(saved["0.weight"], torch.load("ema_model.pt")["model_state_dict"]["0.weight"])


# --- resuming --------------------------------------------------------------------------------------------------


class CountingEma(ModelEma):
    """Its decay grows with a count of its own, as in many programs."""

    def __init__(self, model, decay):
        super().__init__(model, decay)
        self.num_updates = 0

    def update(self, model):
        self.num_updates += 1
        self.decay = self.num_updates / (10 + self.num_updates)
        super().update(model)


@pytest.mark.parametrize("state", ["step_3", "epoch_1"])
@pytest.mark.parametrize("is_saved_first", [True, False])
def test_a_resumed_run_ends_with_the_same_average(state, is_saved_first, tmp_path):
    def make(folder):
        ema = ModelEmaCallback(save_path=folder / "ema.pt", model_ema=CountingEma)
        saving = SaveTrainingStateCallback(folder, save_every_n_epochs=1, save_every_n_steps=3)
        return ema, make_trainer([saving, ema] if is_saved_first else [ema, saving])

    whole, trainer = make(tmp_path / "whole")
    expected = train(trainer, num_epochs=3)
    resumed, trainer = make(tmp_path / "resumed")
    with torch.no_grad():
        trainer.model[0].weight.zero_()

    train(trainer, num_epochs=3, resume_from=str(tmp_path / "whole" / state))

    assert_same_state(resumed.ema_model.state_dict(), whole.ema_model.state_dict())
    assert resumed.ema_model.num_updates == 12
    assert resumed.ema_model.decay == whole.ema_model.decay
    assert (resumed.best_metric, resumed.best_metric_epoch) == (whole.best_metric, whole.best_metric_epoch)
    assert trainer.run_history.get_metric_values(EMA_LOSS) == expected.run_history.get_metric_values(EMA_LOSS)


def test_a_worse_average_of_a_resumed_run_does_not_replace_the_best(tmp_path):
    settings = {"save_path": tmp_path / "ema.pt", "watch_metric": "ema_model_score", "greater_is_better": True}
    saving = SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1)
    train(make_trainer([ModelEmaCallback(**settings, callbacks=[Score(0.9)]), saving]), num_epochs=1)

    resumed = ModelEmaCallback(**settings, callbacks=[Score(0.5)])
    train(make_trainer([resumed]), num_epochs=2, resume_from=str(tmp_path / "epoch_1"))

    assert resumed.best_metric == 0.9
    assert torch.load(tmp_path / "ema.pt")["epoch"] == 1


def test_the_run_after_a_resumed_one_begins_anew(tmp_path):
    settings = {"watch_metric": "ema_model_score", "greater_is_better": True}
    saving = SaveTrainingStateCallback(tmp_path)
    train(make_trainer([ModelEmaCallback(**settings, callbacks=[Score(0.9)]), saving]), num_epochs=1)
    ema = ModelEmaCallback(decay=1.0, **settings, callbacks=[Score(0.5, 0.1)])
    trainer = train(make_trainer([ema]), num_epochs=2, resume_from=str(tmp_path / "final"))
    after_resumed_run = copy.deepcopy(trainer.model.state_dict())

    train(trainer, num_epochs=1)

    assert torch.equal(ema.ema_model.module[0].weight, after_resumed_run["0.weight"])
    assert ema.best_metric == 0.1
    assert torch.load("ema_model.pt")["ema_model_score"] == 0.1


class CountEvaluations(TrainerCallback):
    num_evaluations = 0

    def on_eval_epoch_end(self, trainer, **kwargs):
        self.num_evaluations += 1

    def state_dict(self):
        return {"num_evaluations": self.num_evaluations}

    def load_state_dict(self, state_dict):
        self.num_evaluations = state_dict["num_evaluations"]


def test_its_own_callbacks_are_resumed_too(tmp_path):
    first, resumed = CountEvaluations(), CountEvaluations()
    saving = SaveTrainingStateCallback(tmp_path)
    train(make_trainer([ModelEmaCallback(callbacks=[first]), saving]), num_epochs=2)
    train(
        make_trainer([ModelEmaCallback(callbacks=[resumed])]),
        num_epochs=3,
        resume_from=str(tmp_path / "final"),
    )
    assert resumed.num_evaluations == 3


def test_a_resumed_run_takes_the_decay_it_is_given(tmp_path):
    train(make_trainer([ModelEmaCallback(decay=0.5), SaveTrainingStateCallback(tmp_path)]), num_epochs=1)
    resumed = ModelEmaCallback(decay=0.25)
    train(make_trainer([resumed]), num_epochs=2, resume_from=str(tmp_path / "final"))
    assert resumed.ema_model.decay == 0.25


def test_before_the_first_run_there_is_no_state():
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
trainer.train(data, 2, data, 8, train_dataloader_kwargs={"num_workers": 0})
loss = trainer.run_history.get_metric_values("ema_model_eval_loss_epoch")
torch.save((ema.ema_model.module.state_dict(), loss), f"rank_{trainer.process_index}.pt")
"""


@pytest.mark.distributed
def test_all_processes_have_the_same_average_with_the_buffers_of_the_main_process():
    Path("run.py").write_text(DISTRIBUTED_RUN)
    launch(Path("run.py").resolve(), Path.cwd(), num_processes=2)

    (main, main_loss), (other, other_loss) = (torch.load(f"rank_{rank}.pt") for rank in range(2))
    assert_same_state(other, main)
    assert main_loss == other_loss
    assert sorted(path.name for path in Path().glob("*.pt")) == ["ema.pt", "rank_0.pt", "rank_1.pt"]
