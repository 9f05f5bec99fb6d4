"""Curves are read from histories, rows, mappings and files, and put together by metric."""

from __future__ import annotations

import json
from itertools import zip_longest

import numpy as np
import pytest
import torch

from pytorch_accelerated._history.curves import Curve, choose_metrics, finite, group_by_metric
from pytorch_accelerated._history.sources import read_curves
from pytorch_accelerated.tracking import InMemoryRunHistory

EXPECTED = {"train_loss_epoch": Curve([1, 2], [0.5, 0.25]), "eval_loss_epoch": Curve([1, 2], [0.75, 0.5])}
ROWS = [
    {"epoch": 1, "update": 10, "samples": 80, "time": 1.5, "train_loss_epoch": 0.5, "eval_loss_epoch": 0.75},
    {"epoch": 2, "update": 20, "samples": 160, "time": 2.5, "train_loss_epoch": 0.25, "eval_loss_epoch": 0.5},
]


def history_of(series):
    history = InMemoryRunHistory()
    for values in zip_longest(*series.values()):
        for name, value in zip(series, values, strict=True):
            if value is not None:
                history.update_metric(name, value)
        history._increment_epoch()
    return history


def write_csv(path):
    lines = ["epoch,update,samples,time,train_loss_epoch,eval_loss_epoch,note"]
    lines += [",".join(map(str, [*row.values(), "text"])) for row in ROWS]
    path.write_text("".join(f"{line}\n" for line in [*lines]) + "3,30,240,3.5,0.1")
    return path


def write_json_lines(path):
    lines = [
        json.dumps({"metric": name, "value": row[name], "epoch": row["epoch"], "update": row["update"]})
        for row in ROWS
        for name in ("train_loss_epoch", "eval_loss_epoch")
    ]
    path.write_text("".join(f"{line}\n" for line in lines) + '{"metric": "train_loss_epoch", "val')
    return path


# --- sources -----------------------------------------------------------------------------------------------------


def test_a_history_a_mapping_and_rows_have_the_same_curves():
    series = {"train_loss_epoch": [0.5, torch.tensor(0.25)], "eval_loss_epoch": [0.75, np.float32(0.5)]}
    for source in (series, history_of(series), ROWS, iter(ROWS)):
        assert read_curves(source) == EXPECTED


def test_a_history_that_knows_when_each_value_was_recorded_is_read_by_its_rows():
    class WithRows(InMemoryRunHistory):
        def to_rows(self):
            return ROWS

    assert read_curves(WithRows()) == EXPECTED


@pytest.mark.parametrize(("name", "write"), [("log.csv", write_csv), ("log.jsonl", write_json_lines)])
def test_a_file_of_a_killed_run_is_read_without_its_torn_last_line(tmp_path, name, write):
    path = write(tmp_path / name)
    assert read_curves(path) == read_curves(str(path)) == EXPECTED


def test_rows_of_json_may_have_one_entry_per_metric_and_values_that_are_not_finite(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"epoch": 1, "train_loss": 0.5, "name": "a"}\n\n{"epoch": 2, "train_loss": "nan"}\n')
    assert str(read_curves(path)) == str({"train_loss": Curve([1.0, 2.0], [0.5, float("nan")])})


def test_values_that_are_not_numbers_are_left_out():
    assert read_curves({"a": [1, 2], "matrix": [np.zeros((2, 2))], "text": ["x"], "none": []}) == {
        "a": Curve([1, 2], [1, 2])
    }
    assert read_curves([{"epoch": 1, "a": 1, "matrix": [[1]]}, {"epoch": 2, "a": None}]) == {"a": Curve([1], [1])}


def test_evaluations_within_an_epoch_are_placed_by_their_update_or_left_out():
    rows = [{"epoch": 1, "update": 5, "intermediate_eval_loss_epoch": 0.9}, *ROWS]
    assert read_curves(rows)["intermediate_eval_loss_epoch"] == Curve([0.5], [0.9])
    assert read_curves({"intermediate_eval_loss_epoch": [0.9], "a": [1]}) == {"a": Curve([1], [1])}


def test_rows_without_epochs_are_counted():
    assert read_curves([{"a": 1}, {"a": 2}]) == {"a": Curve([1, 2], [1, 2])}


def test_unknown_formats_and_broken_lines_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"suffix '\.txt'. Expected a file of the format CSV"):
        read_curves(tmp_path / "log.txt")
    with pytest.raises(FileNotFoundError):
        read_curves(tmp_path / "log.csv")
    (tmp_path / "log.jsonl").write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"Line 2 of .* is 'nonsense'. Expected an object of JSON"):
        read_curves(tmp_path / "log.jsonl")
    with pytest.raises(TypeError, match=r"is a int\. Expected a run history"):
        read_curves(3)


# --- metrics -----------------------------------------------------------------------------------------------------


def test_the_stages_of_a_metric_belong_together_and_the_loss_comes_first():
    names = (
        "train_accuracy",
        "easy_eval_accuracy",
        "hard_eval_accuracy",
        "lr",
        "train_loss_epoch",
        "eval_loss_epoch",
        "evaluation_loss",
        "easy_evaluation_accuracy",
    )
    grouped = group_by_metric({name: Curve([1], [index]) for index, name in enumerate(names)})
    assert list(grouped) == ["loss", "accuracy", "lr"]
    assert grouped["accuracy"].train == Curve([1], [0])
    assert list(grouped["accuracy"].evaluations) == ["easy", "hard"]
    assert grouped["loss"].evaluation == Curve([1], [5])
    assert grouped["lr"].other == Curve([1], [3])


@pytest.mark.parametrize(
    "names", [("loss", "val_loss"), ("train_loss", "valid_loss"), ("training_loss", "validation_loss")]
)
def test_names_of_other_libraries_are_understood(names):
    grouped = group_by_metric({name: Curve([1], [1]) for name in names})
    assert list(grouped) == ["loss"]
    assert grouped["loss"].train is not None
    assert grouped["loss"].evaluation is not None


def test_metrics_are_chosen_by_plain_or_recorded_names():
    grouped = group_by_metric({**EXPECTED, "train_accuracy": Curve([1], [1]), "lr": Curve([1], [1])})
    assert [each.name for each in choose_metrics(grouped, None)] == ["loss", "accuracy"]
    assert [each.name for each in choose_metrics(grouped, ["lr", "eval_loss_epoch", "loss"])] == ["lr", "loss"]
    assert [each.name for each in choose_metrics({"lr": grouped["lr"]}, None)] == ["lr"]
    with pytest.raises(ValueError, match=r"no curves of 'acuracy'.*Did you mean 'accuracy'"):
        choose_metrics(grouped, ["acuracy"])
    with pytest.raises(ValueError, match="Nothing was recorded"):
        choose_metrics({}, None)


def test_values_that_are_not_finite_can_be_left_out():
    assert finite(Curve([1, 2, 3], [1.0, float("nan"), float("inf")])) == Curve([1], [1.0])


def test_the_values_of_steps_belong_to_their_metric_and_are_placed_within_the_epoch():
    steps = [{"epoch": 1 + update // 5, "update": update, "train_loss_step": 1.0} for update in (2, 4, 6, 8)]
    rows = [{"epoch": 1, "update": 4, "train_loss_epoch": 1.0, "train_time_per_step": 2.0}, *steps]
    curves = group_by_metric(read_curves(rows))
    assert curves["loss"].steps == Curve([0.5, 1.0, 1.5, 2.0], [1.0] * 4)
    assert curves["loss"].train == Curve([1.0], [1.0])
    assert list(curves) == ["loss", "time_per_step"], "a metric whose name ends like one of steps"
