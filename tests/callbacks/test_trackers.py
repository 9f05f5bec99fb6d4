"""Trackers get what a run records, with updates as steps; a resumed run continues without doubles."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import pickle
import shutil
import warnings

import pytest
import torch

from _support import Probe, make_dataset, make_trainer, train
from pytorch_accelerated import Trainer
from pytorch_accelerated._recording.steps import StepRecorder
from pytorch_accelerated.callbacks import (
    MLflowCallback,
    SaveTrainingStateCallback,
    TensorBoardCallback,
    TrackerCallback,
    WandbCallback,
)

pytest.importorskip("tensorboard")


class Tracker:
    """Remembers what it is told; like those of Accelerate, but without a base class, which needs no process state."""

    tracker = "raw"

    def __init__(self, failing=()):
        self.calls, self.failing = [], failing

    def _called(self, name, *args):
        self.calls.append((name, *args))
        if name in self.failing:
            raise ConnectionError("no network")

    def store_init_configuration(self, values):
        self._called("hyperparameters", values)

    def log(self, values, step):
        self._called("log", dict(values), step)

    def finish(self):
        self._called("finish")

    def logged(self, name):
        return [(call[2], call[1][name]) for call in self.calls if call[0] == "log" and name in call[1]]


def scalars_of(folder):
    """Read back what TensorBoard shows: step and value of each point, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(point.step, point.value) for point in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def rounded(values):
    return [torch.tensor(value, dtype=torch.float32).item() for value in values]


# --- what is sent ------------------------------------------------------------------------------------------------


def test_what_the_history_records_is_sent_with_its_update():
    tracker = Tracker()
    trainer = make_trainer(callbacks=[TrackerCallback(tracker, every_n_updates=None)])
    train(trainer, make_dataset(12), num_epochs=2, eval_dataset=make_dataset(4))
    trainer.evaluate(make_dataset(4))
    for name in ("train_loss_epoch", "eval_loss_epoch"):
        assert tracker.logged(name) == list(zip([3, 6], trainer.run_history.get_metric_values(name), strict=True))
    assert tracker.logged("evaluation_loss") == [(6, trainer.run_history.get_latest_metric("evaluation_loss"))]
    assert tracker.logged("epoch") == [(3, 1), (6, 2)]
    assert tracker.logged("samples") == [(3, 12), (6, 24)]


def test_means_since_the_last_time_are_sent_every_few_updates():
    tracker, seen = Tracker(), []
    look = Probe(on_train_step_end=lambda trainer, batch_output, **_: seen.append(batch_output["loss"].item()))
    trainer = make_trainer(callbacks=[look, TrackerCallback(tracker, every_n_updates=2)])
    train(trainer, make_dataset(20), num_epochs=2)
    means = [sum(part) / len(part) for part in (seen[0:2], seen[2:4], seen[5:6], seen[6:8], seen[8:10])]
    assert [update for update, _ in tracker.logged("train_loss_step")] == [2, 4, 6, 8, 10]
    assert [value for _, value in tracker.logged("train_loss_step")] == pytest.approx(means)
    assert tracker.logged("learning_rate") == [(update, 0.1) for update in (2, 4, 6, 8, 10)]


def test_metrics_of_steps_and_the_gradient_norm_are_sent_too():
    class Measures(Trainer):
        def calculate_train_batch_loss(self, batch):
            return {**super().calculate_train_batch_loss(batch), "metrics": {"error": 0.5}}

    tracker = Tracker()
    trainer = make_trainer(cls=Measures, callbacks=[TrackerCallback(tracker, every_n_updates=1)])
    train(trainer, make_dataset(8), gradient_clip_norm=1.0)
    assert tracker.logged("train_error_step") == [(1, 0.5), (2, 0.5)]
    assert [update for update, _ in tracker.logged("gradient_norm")] == [1, 2]


def test_each_group_has_its_learning_rate():
    tracker, trainer = Tracker(), make_trainer()
    bias = {"params": [trainer.model.bias], "lr": 0.5}
    trainer.optimizer = torch.optim.SGD([{"params": [trainer.model.weight]}, bias], lr=0.1)
    trainer.callback_handler.add_callback(TrackerCallback(tracker, every_n_updates=1))
    train(trainer, make_dataset(4))
    assert (tracker.logged("learning_rate_0"), tracker.logged("learning_rate_1")) == ([(1, 0.1)], [(1, 0.5)])


@pytest.mark.parametrize(
    "further", [{"depth": 3, "net": {"width": 8}}, argparse.Namespace(depth=3, net={"width": 8})], ids=type
)
def test_hyperparameters_are_sent_once(further):
    tracker = Tracker()
    trainer = make_trainer(callbacks=[TrackerCallback(tracker, hyperparameters=further)])
    train(trainer, make_dataset(8), num_epochs=2)
    ((_, values),) = [call for call in tracker.calls if call[0] == "hyperparameters"]
    expected = {"depth": 3, "net/width": 8, "num_epochs": 2, "train_per_device_batch_size": 4, "model": "Linear"}
    expected |= {"optimizer_groups/0/lr": 0.1, "optimizer_groups/0/momentum": 0}
    assert values.items() >= expected.items()
    assert {type(value) for value in values.values()} <= {int, float, str, bool}


def test_values_that_are_not_numbers_are_not_sent():
    tracker = Tracker()
    record = Probe(on_train_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("matrix", [[1, 2]]))
    train(make_trainer(callbacks=[record, TrackerCallback(tracker)]), make_dataset(8))
    assert tracker.logged("matrix") == []
    assert len(tracker.logged("train_loss_epoch")) == 1


def test_a_second_run_is_a_run_of_its_own():
    tracker = Tracker()
    trainer = make_trainer(callbacks=[TrackerCallback(tracker)])
    for reset_run_history in (True, True, False):
        train(trainer, make_dataset(8), reset_run_history=reset_run_history)
    assert [call[0] for call in tracker.calls] == ["hyperparameters", "log", *["finish", "hyperparameters", "log"] * 2]


def test_values_of_steps_are_taken_only_every_few_updates(monkeypatch):
    times, take = [], StepRecorder.take
    monkeypatch.setattr(StepRecorder, "take", lambda *args: times.append(args[1].update) or take(*args))
    train(make_trainer(callbacks=[TrackerCallback(Tracker(), every_n_updates=3)]), make_dataset(32))
    assert times == [3, 6]
    train(make_trainer(callbacks=[TrackerCallback(Tracker(), every_n_updates=None)]), make_dataset(32))
    assert times == [3, 6]


# --- failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["hyperparameters", "log", "finish"])
def test_a_tracker_that_fails_warns_once_and_training_goes_on(failing):
    tracker = Tracker([failing])
    trainer = make_trainer(callbacks=[callback := TrackerCallback(tracker, every_n_updates=1)])

    def train_twice():
        for _ in range(2):
            train(trainer, make_dataset(8), num_epochs=2)
        callback.close()

    with pytest.warns(UserWarning, match=r"`TrackerCallback` has failed \(ConnectionError: no network\)") as caught:
        train_twice()
    assert len(caught) == 1
    assert trainer.progress.num_updates == 4


def test_a_tracker_that_cannot_be_opened_warns_once_and_training_goes_on(tmp_path):
    (tmp_path / "file").touch()
    trainer = make_trainer(callbacks=[callback := TensorBoardCallback(tmp_path / "file" / "runs")])
    with pytest.warns(UserWarning, match="has failed") as caught:
        train(trainer, make_dataset(8), num_epochs=2)
    assert len(caught) == 1
    assert callback.writer is None


def test_a_failure_can_end_the_run():
    trainer = make_trainer(callbacks=[TrackerCallback(Tracker(["log"]), on_error="raise")])
    with pytest.raises(ConnectionError):
        train(trainer, make_dataset(8))


@pytest.mark.parametrize(
    ("create", "install"),
    [
        (TensorBoardCallback, r"pytorch-accelerated\[trackers\]"),
        (MLflowCallback, r"pytorch-accelerated\[mlflow\]"),
        (WandbCallback, r"pytorch-accelerated\[wandb\]"),
        (lambda: TrackerCallback("comet_ml"), "comet-ml"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch, create, install):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install '{install}'"):
        create()


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="Did you mean 'tensorboard'"):
        TrackerCallback("tensorbord")
    with pytest.raises(ValueError, match="every_n_updates"):
        TensorBoardCallback(every_n_updates=0)
    with pytest.raises(ValueError, match="'warn' or 'raise'"):
        TensorBoardCallback(on_error="ignore")


# --- TensorBoard -------------------------------------------------------------------------------------------------


def hyperparameters_in(reader):
    """Return what the table of TensorBoard shows of a run."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = reader.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}


def test_event_files_have_the_metrics_the_hyperparameters_and_what_the_writer_was_given(tmp_path):
    callback = TensorBoardCallback(tmp_path / "runs" / "a", every_n_updates=2, hyperparameters={"depth": 3})

    def draw(trainer, **_):
        callback.writer.add_text("note", "hello", trainer.progress.num_updates)

    trainer = make_trainer(callbacks=[callback, Probe(on_train_epoch_end=draw)])
    train(trainer, make_dataset(16), num_epochs=2, eval_dataset=make_dataset(4))
    scalars = scalars_of(tmp_path / "runs" / "a")
    for name in ("train_loss_epoch", "eval_loss_epoch"):
        values = rounded(trainer.run_history.get_metric_values(name))
        assert scalars[name] == list(zip([4, 8], values, strict=True))
    assert [step for step, _ in scalars["train_loss_step"]] == [2, 4, 6, 8]
    assert scalars["epoch"] == [(2, 1.0), (4, 1.0), (6, 2.0), (8, 2.0)]
    assert [path.name.partition(".")[0] for path in (tmp_path / "runs" / "a").iterdir()] == ["events"], (
        "there is no run within"
    )

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(tmp_path / "runs" / "a"))
    reader.Reload()
    assert "note/text_summary" in reader.Tags()["tensors"]
    assert hyperparameters_in(reader)["depth"] == 3
    assert hyperparameters_in(reader)["is_distributed"] == "False"


def test_a_run_from_scratch_gets_a_folder_of_its_own(tmp_path):
    callback = TensorBoardCallback(tmp_path / "a")
    trainer = make_trainer(callbacks=[callback])
    assert callback.log_dir == tmp_path / "a"
    for name in ("a", "a_2"):
        train(trainer, make_dataset(8))
        assert callback.log_dir == tmp_path / name
        assert len(scalars_of(callback.log_dir)["train_loss_epoch"]) == 1
    train(make_trainer(callbacks=[callback := TensorBoardCallback(tmp_path / "a")]), make_dataset(8))
    assert callback.log_dir == tmp_path / "a_3"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))])
def test_a_copied_trainer_does_not_write_to_the_run_of_the_original(tmp_path, duplicate):
    trainer = make_trainer(callbacks=[TensorBoardCallback(tmp_path / "a")])
    train(trainer, make_dataset(8))
    before = scalars_of(tmp_path / "a")
    train(duplicate(trainer), make_dataset(8))
    assert scalars_of(tmp_path / "a") == before
    assert scalars_of(tmp_path / "a_2").keys() == before.keys()


@pytest.mark.parametrize("is_saved_first", [True, False])
def test_a_run_resumed_from_any_step_shows_what_the_uninterrupted_one_shows(tmp_path, is_saved_first):
    def make():
        saving = SaveTrainingStateCallback(tmp_path / "states", save_every_n_steps=1, max_checkpoints=100)
        tracking = TensorBoardCallback(tmp_path / "a", every_n_updates=2)
        return make_trainer(callbacks=[saving, tracking] if is_saved_first else [tracking, saving])

    def run(**kwargs):
        return train(make(), make_dataset(12), num_epochs=2, eval_dataset=make_dataset(4), **kwargs)

    run()
    expected = scalars_of(tmp_path / "a")
    assert [step for step, _ in expected["train_loss_step"]] == [2, 4, 6]
    shutil.copytree(tmp_path / "states", tmp_path / "copies")
    for step in (1, 2, 3, 5, 6):
        run(resume_from=tmp_path / "copies" / f"step_{step}")
        assert scalars_of(tmp_path / "a") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"states", "copies", "a"}


# --- trackers that need a server or a package of their own ---------------------------------------------------------


def resumed_run(tmp_path, make_tracking):
    """Train, and resume from a state in the middle: another process would do the same."""

    def run(**kwargs):
        saving = SaveTrainingStateCallback(tmp_path / "states", save_every_n_steps=2, max_checkpoints=100)
        trainer = make_trainer(callbacks=[saving, tracking := make_tracking()])
        train(trainer, make_dataset(12), num_epochs=2, eval_dataset=make_dataset(4), **kwargs)
        tracking.close()
        return trainer, tracking

    trainer, _ = run()
    return trainer, run(resume_from=tmp_path / "states" / "step_2")[1]


def test_mlflow_has_each_value_once_after_a_resume(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer, tracking = resumed_run(tmp_path, lambda: MLflowCallback("digits", uri, every_n_updates=2))
        client = mlflow.MlflowClient(uri)
        run = client.get_run(tracking.run_id)
        history = client.get_metric_history(tracking.run_id, "eval_loss_epoch")
        steps = [metric.step for metric in client.get_metric_history(tracking.run_id, "train_loss_step")]
    assert len(client.search_runs([run.info.experiment_id])) == 1
    assert run.data.params["num_epochs"] == "2"
    assert [metric.step for metric in history] == [3, 6]
    assert [metric.value for metric in history] == trainer.run_history.get_metric_values("eval_loss_epoch")
    assert steps == [2, 4, 6]


def test_wandb_is_given_the_run_that_is_resumed(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    options = {"mode": "offline", "settings": {"console": "off"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, tracking = resumed_run(tmp_path, lambda: WandbCallback("digits", every_n_updates=2, options=options))
    folders = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(folders) == 2
    assert all(f"-{tracking.run_id}" in name for name in folders)
