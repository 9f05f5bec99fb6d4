"""What a run history tells of a run: moments, rows, tables and files; what `train` and `evaluate` return."""

from __future__ import annotations

import copy
import csv
import pickle
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from _support import Probe, history_of, make_dataset, make_trainer, train
from pytorch_accelerated import Trainer
from pytorch_accelerated._recording.host_copy import HostCopy
from pytorch_accelerated._views import run_of
from pytorch_accelerated.callbacks import CSVLogCallback, SaveTrainingStateCallback, StepBasedEvaluationCallback
from pytorch_accelerated.tracking import InMemoryRunHistory, JsonlRunHistory, RunHistory

POSITION = ("epoch", "update", "samples")


class HistoryOf0161(RunHistory):
    """Implements the abstract methods of 0.1.61, and uses names that it did not have for its own purposes."""

    def __init__(self):
        self.values, self.epoch, self.prefix = {}, 1, ""
        self.records = self.follow = self.path = None

    def get_metric_names(self):
        return self.values.keys()

    def get_metric_values(self, metric_name):
        return self.values.get(metric_name, [])

    def get_latest_metric(self, metric_name):
        return self.values[metric_name][-1]

    def update_metric(self, metric_name, metric_value):
        self.values.setdefault(self.prefix + metric_name, []).append(metric_value)

    def delete_metric(self, metric_name):
        del self.values[metric_name]

    metric_name_prefix = property(lambda self: self.prefix)
    current_epoch = property(lambda self: self.epoch)

    def set_metric_name_prefix(self, prefix=""):
        self.prefix = prefix

    def _set_epoch(self, epoch):
        self.epoch = epoch

    def _increment_epoch(self):
        self.epoch += 1

    def reset(self):
        self.values, self.epoch = {}, 1


def positions_of(history):
    return [tuple(row[name] for name in POSITION) for row in history.to_rows()]


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


# --- moments and rows --------------------------------------------------------------------------------------------


def test_every_value_has_epoch_update_samples_and_time():
    before = time.time()
    trainer = make_trainer(callbacks=[StepBasedEvaluationCallback(2)])
    train(trainer, make_dataset(12), num_epochs=2, eval_dataset=make_dataset(4))
    history, times = trainer.run_history, [row["time"] for row in trainer.run_history.to_rows()]
    assert positions_of(history) == [(1, 2, 8), (1, 3, 12), (2, 4, 16), (2, 6, 24)]
    assert before <= times[0] <= times[-1] <= time.time()
    assert times == sorted(times)
    ends = history.to_rows()[1], history.to_rows()[-1]
    assert [row["train_loss_epoch"] for row in ends] == history.get_metric_values("train_loss_epoch")
    assert [row["eval_loss_epoch"] for row in ends] == history.get_metric_values("eval_loss_epoch")


def test_an_evaluation_belongs_to_the_last_epoch_that_is_done():
    trainer = make_trainer()
    trainer.evaluate(make_dataset(4))
    assert positions_of(trainer.run_history) == [(0, 0, 0)]
    train(trainer, make_dataset(8), num_epochs=2)
    trainer.evaluate(make_dataset(4))
    assert positions_of(trainer.run_history) == [(1, 2, 8), (2, 4, 16)]
    assert trainer.run_history.to_rows()[-1].keys() >= {"train_loss_epoch", "evaluation_loss"}


def test_an_evaluation_by_a_callback_belongs_to_the_epoch_under_way():
    evaluate = Probe(on_train_epoch_end=lambda trainer, **_: trainer.evaluate(make_dataset(4)))
    trainer = make_trainer(callbacks=[evaluate])
    train(trainer, make_dataset(8), num_epochs=2)
    assert positions_of(trainer.run_history) == [(1, 2, 8), (2, 4, 16)]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))])
def test_a_copied_trainer_records_moments_of_its_own(duplicate):
    trainer = make_trainer()
    train(trainer, make_dataset(8))
    other = duplicate(trainer)
    train(other, make_dataset(16), num_epochs=2)
    assert positions_of(trainer.run_history) == [(1, 2, 8)]
    assert positions_of(other.run_history) == [(1, 4, 16), (2, 8, 32)]


def test_deleting_and_resetting_delete_the_moments():
    trainer = make_trainer()
    train(trainer, make_dataset(8), eval_dataset=make_dataset(4))
    trainer.run_history.delete_metric("train_loss_epoch")
    assert [row.keys() - {*POSITION, "time"} for row in trainer.run_history.to_rows()] == [{"eval_loss_epoch"}]
    trainer.run_history.reset()
    assert trainer.run_history.to_rows() == []


def test_a_resumed_run_has_the_moments_of_an_uninterrupted_one(tmp_path):
    def make():
        return make_trainer(callbacks=[SaveTrainingStateCallback(tmp_path, save_every_n_steps=1)])

    trainer = make()
    train(trainer, make_dataset(12), num_epochs=2, eval_dataset=make_dataset(4))
    for step in range(1, 7):
        other = make()
        state = tmp_path / f"step_{step}"
        if state.exists():
            train(other, make_dataset(12), num_epochs=2, eval_dataset=make_dataset(4), resume_from=state)
            assert history_of(other) == history_of(trainer)


def test_a_state_of_an_earlier_version_has_no_moments():
    history = InMemoryRunHistory()
    history.load_state_dict({"current_epoch": 3, "metrics": {"b": [1, 2], "a": [3, 4]}})
    assert positions_of(history) == [(None, None, None)] * 2
    assert without_time(history.to_rows())[0] == {**dict.fromkeys(POSITION), "a": 3, "b": 1}
    trainer = make_trainer(run_history=history)
    train(trainer, make_dataset(8), reset_run_history=False)
    assert positions_of(history) == [(None, None, None)] * 2 + [(3, 2, 8)]
    assert "nothing" not in repr(history)


# --- histories of programs written for 0.1.61 --------------------------------------------------------------------


def test_a_history_written_for_0_1_61_works_and_has_the_new_methods(tmp_path):
    history = HistoryOf0161()
    trainer = make_trainer(run_history=history)
    assert trainer.train(make_dataset(8), 2, make_dataset(4), 4) is history
    assert trainer.evaluate(make_dataset(4)) == {"loss": history.values["evaluation_loss"][0]}
    assert [row["train_loss_epoch"] for row in history.to_rows()[:2]] == history.values["train_loss_epoch"]
    history.to_csv(tmp_path / "log.csv")
    assert (tmp_path / "log.csv").read_text().startswith("epoch,update,samples,time,eval_loss_epoch,")
    assert repr(history).startswith("HistoryOf0161, 3 metrics in 2 rows:\n")


# --- text, HTML, CSV, pandas -------------------------------------------------------------------------------------


def test_a_history_shows_itself_as_a_table():
    trainer = make_trainer()
    assert repr(trainer.run_history) == "InMemoryRunHistory: nothing recorded yet"
    train(trainer, make_dataset(8), num_epochs=2)
    title, header, *lines = repr(trainer.run_history).splitlines()
    assert title == "InMemoryRunHistory, 1 metrics in 2 rows:"
    assert header.split() == ["epoch", "update", "samples", "time", "train_loss_epoch"]
    assert [line.split()[:3] for line in lines] == [["1", "2", "8"], ["2", "4", "16"]]
    page = trainer.run_history._repr_html_()
    assert page.count("<tr>") == 3
    assert "<th>train_loss_epoch</th>" in page


def test_a_csv_file_has_all_digits(tmp_path):
    trainer = make_trainer()
    train(trainer, make_dataset(8), num_epochs=2, eval_dataset=make_dataset(4))
    path = tmp_path / "new" / "log.csv"
    for _ in range(2):
        trainer.run_history.to_csv(path)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [float(row["eval_loss_epoch"]) for row in rows] == trainer.run_history.get_metric_values("eval_loss_epoch")
    assert [path.name for path in path.parent.iterdir()] == ["log.csv"]


def test_a_data_frame_has_the_rows(monkeypatch):
    """Pandas is large, so a stand-in shows what it is given."""
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda rows, columns: (rows, columns)))
    trainer = make_trainer()
    train(trainer, make_dataset(8), num_epochs=2)
    rows, columns = trainer.run_history.to_pandas()
    assert rows == trainer.run_history.to_rows()
    assert columns == [*POSITION, "time", "train_loss_epoch"]
    assert InMemoryRunHistory().to_pandas() == ([], [*POSITION, "time"])


def test_without_pandas_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pytorch-accelerated\[pandas\]'"):
        InMemoryRunHistory().to_pandas()


# --- what `train` and `evaluate` return --------------------------------------------------------------------------


def test_train_returns_the_run_history():
    trainer = make_trainer()
    assert trainer.train(make_dataset(8), 1, per_device_batch_size=4) is trainer.run_history


def test_evaluate_returns_what_it_recorded_by_plain_names():
    def record(trainer, **_):
        trainer.run_history.update_metric("accuracy", 0.75)

    trainer = make_trainer(callbacks=[Probe(on_eval_epoch_end=record)])
    train(trainer, make_dataset(8), eval_dataset=make_dataset(4))
    for _ in range(2):
        metrics = trainer.evaluate(make_dataset(4))
        assert metrics == {"loss": trainer.run_history.get_latest_metric("evaluation_loss"), "accuracy": 0.75}


def test_of_several_datasets_evaluate_returns_a_mapping_each():
    trainer = make_trainer()
    metrics = trainer.evaluate({"a": make_dataset(4), "a_b": make_dataset(8, seed=5)})
    history = trainer.run_history
    assert metrics == {
        "a": {"loss": history.get_latest_metric("a_evaluation_loss")},
        "a_b": {"loss": history.get_latest_metric("a_b_evaluation_loss")},
    }


# --- JSONL -------------------------------------------------------------------------------------------------------


def test_a_file_has_each_value_at_once_and_is_read_back(tmp_path):
    path, seen = tmp_path / "new" / "history.jsonl", []
    look = Probe(on_train_epoch_end=lambda trainer, **_: seen.append(path.read_text().count("\n")))
    trainer = make_trainer(run_history=JsonlRunHistory(path), callbacks=[look])
    train(trainer, make_dataset(8), num_epochs=2, eval_dataset=make_dataset(4))
    assert seen == [2, 4]  # the first line tells what the run is made of
    read = JsonlRunHistory(path)
    assert read.path == path
    assert read.to_rows() == trainer.run_history.to_rows()
    assert read.current_epoch == trainer.run_history.current_epoch == 3
    assert sorted(read.get_metric_names()) == sorted(trainer.run_history.get_metric_names())


def test_another_run_sets_the_file_aside_and_one_that_goes_on_continues_it(tmp_path):
    path = tmp_path / "history.jsonl"
    train(make_trainer(run_history=JsonlRunHistory(path)), make_dataset(8))
    first = path.read_text().splitlines()
    trainer = make_trainer(run_history=JsonlRunHistory(path))
    train(trainer, make_dataset(8), reset_run_history=False)
    both = path.read_text()
    assert both.splitlines()[1:-1] == first[1:]
    train(make_trainer(run_history=JsonlRunHistory(path)), make_dataset(8))
    assert (tmp_path / "history.1.jsonl").read_text() == both
    assert path.read_text().count("\n") == 2


def test_deleting_a_metric_deletes_it_from_the_file(tmp_path):
    trainer = make_trainer(run_history=JsonlRunHistory(tmp_path / "history.jsonl"))
    train(trainer, make_dataset(8), eval_dataset=make_dataset(4))
    trainer.run_history.delete_metric("train_loss_epoch")
    assert JsonlRunHistory(tmp_path / "history.jsonl").get_metric_names() == {"eval_loss_epoch"}
    assert [path.name for path in tmp_path.iterdir()] == ["history.jsonl"]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "history.jsonl"
    train(make_trainer(run_history=JsonlRunHistory(path)), make_dataset(8), num_epochs=2)
    lines = path.read_text().splitlines()
    path.write_text(f"{lines[0]}\n{lines[1][:9]}\n{lines[1]}\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*history.jsonl' is no record of a run history"):
        JsonlRunHistory(path)


# --- values of steps ---------------------------------------------------------------------------------------------


class Measures(Trainer):
    def calculate_train_batch_loss(self, batch):
        return {**super().calculate_train_batch_loss(batch), "metrics": {"error": 0.5}}


def without_times(history):
    return [{**row, "time": None} for row in history.to_rows()]


def test_values_of_steps_are_recorded_every_few_updates_and_are_no_metrics_of_a_pass():
    losses, rows = [], []
    look = Probe(
        on_train_step_end=lambda trainer, batch_output, **_: losses.append(batch_output["loss"].item()),
        on_step_values=lambda trainer, row, **_: rows.append(row),
    )
    history = InMemoryRunHistory(record_every_n_updates=2)
    trainer = make_trainer(cls=Measures, callbacks=[look], run_history=history, metrics={"half": lambda *_: 0.25})
    train(trainer, make_dataset(20), num_epochs=2, gradient_clip_norm=1.0)
    means = [sum(part) / len(part) for part in (losses[0:2], losses[2:4], losses[5:6], losses[6:8], losses[8:10])]
    assert history.get_metric_values("train_loss_step") == pytest.approx(means)
    assert history.get_metric_values("train_error_step") == [0.5] * 5
    assert history.get_metric_values("train_half_step") == [0.25] * 5
    assert history.get_metric_values("learning_rate") == [0.1] * 5
    assert len(history.get_metric_values("gradient_norm")) == 5
    assert history.get_metric_names() == {"train_loss_epoch", "train_error", "train_half"}
    assert [(row["epoch"], row["update"], row["samples"]) for row in rows] == [
        (1, 2, 8),
        (1, 4, 16),
        (2, 6, 24),
        (2, 8, 32),
        (2, 10, 40),
    ]
    assert [row["update"] for row in history.to_rows() if "train_loss_step" in row] == [2, 4, 6, 8, 10]
    assert "train_loss_step" not in repr(history)


def test_a_callback_may_want_them_more_often_but_does_not_fill_a_history_without():
    def ask(trainer, **_):
        run_of(trainer).record_steps_every(1)

    rows = []
    look = Probe(on_training_run_start=ask, on_step_values=lambda trainer, row, **_: rows.append(row["update"]))
    for every, expected in ((4, [1, 2, 3]), (None, [])):
        history = InMemoryRunHistory(record_every_n_updates=every)
        train(make_trainer(callbacks=[look], run_history=history), make_dataset(12))
        assert [row["update"] for row in history.to_rows() if "train_loss_step" in row] == expected
    assert rows == [1, 2, 3] * 2


def test_updates_between_records_must_be_a_positive_number():
    with pytest.raises(ValueError, match="record_every_n_updates"):
        InMemoryRunHistory(record_every_n_updates=0)


def test_values_that_the_device_sends_later_are_recorded_with_the_next_ones_or_before_anything_else(monkeypatch):
    monkeypatch.setattr(HostCopy, "is_on_host", False)
    seen = []
    look = Probe(on_step_values=lambda trainer, row, **_: seen.append((trainer.progress.num_updates, row["update"])))
    history = InMemoryRunHistory(record_every_n_updates=2)
    train(make_trainer(callbacks=[look], run_history=history), make_dataset(28), num_epochs=2)
    assert seen == [(4, 2), (6, 4), (7, 6), (10, 8), (12, 10), (14, 12), (14, 14)]
    assert [row["update"] for row in history.to_rows()] == [2, 4, 6, 7, 8, 10, 12, 14]


@pytest.mark.parametrize("is_on_host", [True, False])
def test_a_resumed_run_has_the_values_of_steps_of_an_uninterrupted_one(tmp_path, monkeypatch, is_on_host):
    monkeypatch.setattr(HostCopy, "is_on_host", is_on_host)

    def run(name, **kwargs):
        history = JsonlRunHistory(tmp_path / name, record_every_n_updates=3)
        saving = SaveTrainingStateCallback(tmp_path / "states", save_every_n_steps=1, max_checkpoints=100)
        trainer = make_trainer(callbacks=[saving], run_history=history)
        train(trainer, make_dataset(20), num_epochs=2, eval_dataset=make_dataset(4), **kwargs)
        return without_times(history)

    expected = run("whole.jsonl")
    assert [row["update"] for row in expected if "train_loss_step" in row] == [3, 6, 9]
    shutil.copytree(tmp_path / "states", tmp_path / "copies")
    for step in (2, 3, 8):
        path = tmp_path / "copies" / f"step_{step}"
        assert run(f"{step}.jsonl", resume_from=path) == expected
        assert without_times(JsonlRunHistory(tmp_path / f"{step}.jsonl")) == expected


def test_what_the_run_is_made_of_is_kept_with_its_values(tmp_path):
    path = tmp_path / "a.jsonl"
    trainer = make_trainer(lr=0.25, run_history=JsonlRunHistory(path))
    train(trainer, make_dataset(8), num_epochs=2)
    info = JsonlRunHistory(path).run_info
    assert info == trainer.run_history.run_info
    assert (info["settings"]["num_epochs"], info["settings"]["optimizer_groups/0/lr"]) == (2, 0.25)
    assert info["versions"]["torch"] == torch.__version__
    assert info.keys() == {"settings", "versions", "code"}


def test_a_history_read_back_has_the_same_newest_values(tmp_path):
    """Whether training or `evaluate` has recorded a metric of a callback last."""

    def record(trainer, **kwargs):
        trainer.run_history.update_metric("custom", float(len(values)))
        values.append(None)

    values = []
    history = JsonlRunHistory(tmp_path / "history.jsonl")
    trainer = make_trainer(callbacks=[Probe(on_eval_epoch_end=record)], run_history=history)
    trainer.evaluate(make_dataset(8))
    for _ in range(2):
        read = JsonlRunHistory(history.path)
        assert read.get_latest_metric("custom") == history.get_latest_metric("custom") == len(values) - 1
        assert read.get_metric_values("custom") == history.get_metric_values("custom")
        train(trainer, eval_dataset=make_dataset(8), reset_run_history=False)
        read = JsonlRunHistory(history.path)
        assert read.get_latest_metric("custom") == history.get_latest_metric("custom") == len(values) - 1
        trainer.evaluate(make_dataset(8))


@pytest.mark.parametrize("prefix", ["", "intermediate_"])
def test_in_an_event_loss_means_that_of_the_pass_under_way(prefix):
    seen = []

    def note(trainer, **kwargs):
        history = trainer.run_history
        if history.metric_name_prefix == prefix:
            seen.append(history.get_latest_metric("loss"))

    callbacks = [Probe(on_eval_epoch_end=note, on_train_epoch_end=note), StepBasedEvaluationCallback(2)]
    trainer = make_trainer(callbacks=callbacks)
    train(trainer, eval_dataset=make_dataset(8), num_epochs=2)
    of_evaluations = trainer.run_history.get_metric_values(f"{prefix}eval_loss_epoch")
    of_training = trainer.run_history.get_metric_values("train_loss_epoch")
    expected = of_evaluations if prefix else [x for pair in zip(of_training, of_evaluations, strict=True) for x in pair]
    assert seen == expected
    trainer.run_history.reset()
    with pytest.raises(ValueError, match="Nothing was recorded under the metric name 'loss'"):
        trainer.run_history.get_latest_metric("loss")


@pytest.mark.parametrize("make", [JsonlRunHistory, CSVLogCallback, InMemoryRunHistory().to_csv])
def test_what_is_no_file_is_refused_at_once(make, tmp_path):
    with pytest.raises(IsADirectoryError, match=r"which is a folder. Pass the path of a file in it"):
        make(tmp_path)
    with pytest.raises(TypeError, match=r"`path` is None, of type NoneType. Expected the path of a file"):
        make(None)


@pytest.mark.parametrize("history", ["runs/history.jsonl", Path("runs/history.jsonl"), JsonlRunHistory])
def test_what_is_no_run_history_is_answered_with_one(history):
    with pytest.raises(TypeError, match=r"Expected (a run history|an instance).* `JsonlRunHistory\("):
        make_trainer(run_history=history)
