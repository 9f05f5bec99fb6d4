"""The CSV file of a run: stable columns, up to date after each epoch, continued by a resumed run."""

from __future__ import annotations

import csv
import shutil

import pytest

from _support import Probe, make_dataset, make_trainer, train
from pytorch_accelerated.callbacks import CSVLogCallback, SaveTrainingStateCallback, StepBasedEvaluationCallback

POSITION = ["epoch", "update", "samples", "time"]


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def without_time(path):
    return [{name: value for name, value in row.items() if name != "time"} for row in rows_of(path)]


def test_the_file_has_a_row_for_each_epoch_when_the_epoch_ends(tmp_path):
    path, seen = tmp_path / "new" / "log.csv", []
    look = Probe(on_train_epoch_start=lambda trainer, **_: seen.append(len(rows_of(path))))
    trainer = make_trainer(callbacks=[CSVLogCallback(path), look])
    train(trainer, make_dataset(8), num_epochs=3, eval_dataset=make_dataset(4))
    assert seen == [0, 1, 2]
    assert path.read_text().splitlines()[0].split(",") == [*POSITION, "train_loss_epoch", "eval_loss_epoch"]
    losses = [float(row["eval_loss_epoch"]) for row in rows_of(path)]
    assert losses == trainer.run_history.get_metric_values("eval_loss_epoch")


def test_a_new_metric_becomes_the_last_column(tmp_path):
    path, headers = tmp_path / "log.csv", []

    def record(trainer, **_):
        if trainer.run_history.current_epoch == 2:
            trainer.run_history.update_metric("accuracy", 0.5)

    def look(trainer, **_):
        headers.append(path.read_text().splitlines()[0].split(","))

    trainer = make_trainer(
        callbacks=[CSVLogCallback(path), Probe(on_train_epoch_end=record, on_train_epoch_start=look)]
    )
    train(trainer, make_dataset(8), num_epochs=3)
    assert headers == [POSITION, [*POSITION, "train_loss_epoch"], [*POSITION, "train_loss_epoch", "accuracy"]]
    assert [row["accuracy"] for row in rows_of(path)] == ["", "0.5", ""]


def test_intermediate_evaluations_and_evaluations_afterwards_are_in_it(tmp_path):
    trainer = make_trainer(callbacks=[CSVLogCallback(tmp_path / "log.csv"), StepBasedEvaluationCallback(1)])
    train(trainer, make_dataset(8), eval_dataset=make_dataset(4))
    trainer.evaluate(make_dataset(4))
    rows = rows_of(tmp_path / "log.csv")
    assert [row["update"] for row in rows] == [str(row["update"]) for row in trainer.run_history.to_rows()]
    assert rows[-1]["evaluation_loss"]
    assert all(row["intermediate_eval_loss_epoch"] for row in rows[:2])


def test_another_run_sets_the_file_aside_and_one_that_goes_on_continues_it(tmp_path):
    path, trainer = tmp_path / "log.csv", make_trainer(callbacks=[CSVLogCallback(tmp_path / "log.csv")])
    train(trainer, make_dataset(8))
    train(trainer, make_dataset(8), reset_run_history=False)
    assert [row["epoch"] for row in rows_of(path)] == ["1", "2"]
    train(trainer, make_dataset(8))
    assert [row["epoch"] for row in rows_of(path)] == ["1"]
    assert [row["epoch"] for row in rows_of(tmp_path / "log.1.csv")] == ["1", "2"]


@pytest.mark.parametrize("is_saved_first", [True, False])
def test_a_run_resumed_from_any_step_has_the_rows_of_the_uninterrupted_one(tmp_path, is_saved_first):
    """Even if the file has rows of later epochs: those go."""
    path = tmp_path / "log.csv"

    def make():
        saving = SaveTrainingStateCallback(tmp_path / "states", save_every_n_steps=1, max_checkpoints=100)
        callbacks = [saving, CSVLogCallback(path)] if is_saved_first else [CSVLogCallback(path), saving]
        return make_trainer(callbacks=callbacks)

    def run(**kwargs):
        return train(make(), make_dataset(12), num_epochs=2, eval_dataset=make_dataset(4), **kwargs)

    run()
    expected = without_time(path)
    shutil.copytree(tmp_path / "states", tmp_path / "copies")
    for step in range(1, 7):
        run(resume_from=tmp_path / "copies" / f"step_{step}")
        assert without_time(path) == expected
    assert len(list(tmp_path.glob("log.*.csv"))) <= 4  # states before the first row do not know whose file it is
