"""A run that is killed leaves readable logs, and has the rows of an uninterrupted one after it was resumed."""

from __future__ import annotations

import csv
import os
import signal

import pytest
import torch

import _kills
from _support import Probe, make_dataset, make_trainer, train
from pytorch_accelerated.callbacks import (
    CSVLogCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    TensorBoardCallback,
)
from pytorch_accelerated.tracking import JsonlRunHistory

pytest.importorskip("torch.utils.tensorboard")  # once here rather than in each forked process
event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")

NEVER = {}
KILLS = {
    "within the first epoch": {"on_train_step_end": 3},
    "within the second epoch, after an evaluation": {"on_train_step_end": 8},
    "between training and evaluation": {"on_train_epoch_end": 6},
    "before the second epoch is complete": {"on_eval_epoch_end": 12},
    "at the end": {"on_training_run_end": 12},
}


def run(folder, kill, is_killed_last):
    """Train from the newest state, and kill the process in an event after a number of updates."""

    def act(update):
        def end(trainer, **_):
            if trainer.progress.num_updates == update and not (folder / "killed").exists():
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)

        return end

    torch.manual_seed(5)
    killer = Probe(**{event: act(update) for event, update in kill.items()})
    killer.is_called_last = is_killed_last
    callbacks = [
        SaveTrainingStateCallback(folder / "states", save_every_n_steps=5, save_every_n_epochs=1),
        StepBasedEvaluationCallback(4),
        CSVLogCallback(folder / "log.csv"),
        TensorBoardCallback(folder / "events", every_n_updates=3),
        killer,
    ]
    trainer = make_trainer(
        callbacks=callbacks, run_history=JsonlRunHistory(folder / "history.jsonl", record_every_n_updates=3)
    )
    data = {"num_epochs": 2, "eval_dataset": make_dataset(4), "resume_from": "latest"}
    train(trainer, make_dataset(24), **data)
    trainer.callback_handler.callbacks[3].close()


def logs_of(folder):
    """Return what each log shows, without times."""
    history = [{**row, "time": None} for row in JsonlRunHistory(folder / "history.jsonl").to_rows()]
    path = folder / "log.csv"
    rows = [{**row, "time": None} for row in csv.DictReader(path.read_text().splitlines())] if path.exists() else []
    reader = event_accumulator.EventAccumulator(str(folder / "events"))
    reader.Reload()
    points = {tag: [(each.step, each.value) for each in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    return history, rows, points


def start(folder, kill, is_killed_last=False):
    folder.mkdir(exist_ok=True)
    child = _kills.start(folder / "output.txt", lambda: run(folder, kill, is_killed_last))
    status = _kills.wait(child, seconds=60)
    assert status is not None, "it hangs"
    return status


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(folder, NEVER, is_killed_last=False)  # in this process, from which the others inherit what was imported
    return logs_of(folder)


def test_an_uninterrupted_run_has_what_the_others_are_compared_with(uninterrupted):
    history, rows, points = uninterrupted
    assert [row["update"] for row in history] == [3, 4, 6, 8, 9, 12]
    assert [row["update"] for row in rows] == ["4", "6", "8", "12"]
    assert [step for step, _ in points["train_loss_step"]] == [3, 6, 9, 12]
    assert [step for step, _ in points["eval_loss_epoch"]] == [6, 12]


@pytest.mark.parametrize("is_killed_last", [True, False])
@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS)
def test_a_killed_and_resumed_run_has_the_rows_of_an_uninterrupted_one(tmp_path, uninterrupted, kill, is_killed_last):
    assert os.WTERMSIG(start(tmp_path, kill, is_killed_last)) == signal.SIGKILL
    logs_of(tmp_path)
    assert start(tmp_path, kill) == 0, (tmp_path / "output.txt").read_text()
    events = [tmp_path / "events", *sorted(tmp_path.glob("events_*"))]
    if len(events) > 1:  # no state had been saved yet, so it is another run
        events[-1].rename(tmp_path / "renamed")
        events[0].rename(tmp_path / "first")
        (tmp_path / "renamed").rename(events[0])
    assert logs_of(tmp_path) == uninterrupted
