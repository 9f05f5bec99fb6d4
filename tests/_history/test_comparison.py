"""What differs between two runs, and several runs as one table."""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec

import pytest
import torch

from _support import make_dataset, make_trainer, train
from pytorch_accelerated.plotting import plot_learning_curves
from pytorch_accelerated.tracking import InMemoryRunHistory, JsonlRunHistory, compare


def history_of(lr=0.1, num_samples=24, history=None, **kwargs):
    torch.manual_seed(1)
    history = InMemoryRunHistory(record_every_n_updates=2) if history is None else history
    dataset = make_dataset(num_samples)
    trainer = make_trainer(lr=lr, run_history=history)
    return train(trainer, dataset, num_epochs=2, eval_dataset=dataset, **kwargs).run_history


def recorded(**series):
    history = InMemoryRunHistory()
    for name, values in series.items():
        for value in values:
            history.update_metric(name, value)
    return history


def test_equal_runs_do_not_differ():
    diff = history_of().diff(history_of())
    assert not diff
    assert (diff.first, repr(diff)) == (None, "the values are equal")


def test_the_first_update_after_which_two_runs_part_is_found_in_the_values_of_steps():
    diff = history_of().diff(history_of(lr=0.2))
    assert diff.settings == {"optimizer_groups/0/lr": (0.1, 0.2)}
    assert (diff.first.metric, diff.first.moments[0][:2], diff.first.values) == ("learning_rate", (1, 2), (0.1, 0.2))
    assert "optimizer_groups/0/lr: 0.1 and 0.2" in repr(diff)
    assert "`learning_rate` after update 2 of epoch 1: 0.1 and 0.2" in repr(diff)


def test_equal_values_recorded_after_different_updates_differ():
    one, other = (history_of(num_samples=number, lr=0.0, history=InMemoryRunHistory()) for number in (24, 20))
    for history in (one, other):
        history.delete_metric("train_loss_epoch")
        history.delete_metric("eval_loss_epoch")
        history.update_metric("constant", 1.0)
    assert str(one.diff(other).first) == "`constant` after update 12 of epoch 3 and update 10 of epoch 3: 1.0 and 1.0"


def test_a_run_that_ended_earlier_is_not_different():
    assert recorded(loss=[3.0, 2.0, 1.0]).diff(recorded(loss=[3.0, 2.0])).first is None


def test_two_nan_are_equal_and_values_that_are_not_numbers_are_compared():
    assert not recorded(loss=[math.nan], matrix=[[1]]).diff(recorded(loss=[math.nan], matrix=[[1]]))
    assert recorded(matrix=[[1]]).diff(recorded(matrix=[[2]])).first.metric == "matrix"


def test_metrics_of_one_run_and_versions_are_told():
    one, other = recorded(a=[1]), recorded(b=[1])
    one._start_run({"versions": {"torch": "2.0"}, "code": "abc"})
    other._start_run({"versions": {"torch": "2.1"}, "code": "def"})
    diff = one.diff(other)
    assert diff.versions == {"torch": ("2.0", "2.1"), "code": ("abc", "def")}
    assert diff.metrics == (["a"], ["b"])
    assert "version of code: abc and def\nonly the first run has a\nonly the second run has b" in repr(diff)


def test_files_are_compared_with_histories(tmp_path):
    path = tmp_path / "a.jsonl"
    history = history_of(history=JsonlRunHistory(path, record_every_n_updates=2))
    assert not history.diff(path)
    assert not history_of().diff(path)
    rows = compare([path, history_of(lr=0.2)]).to_rows()
    assert [row["run"] for row in rows] == [str(path), "2"]
    assert [row["optimizer_groups/0/lr"] for row in rows] == [0.1, 0.2]
    assert rows[0]["eval_loss_epoch"] == history.get_latest_metric("eval_loss_epoch")
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        compare([tmp_path / "missing.jsonl"])


def test_a_table_of_runs_has_their_names_what_differs_and_the_newest_values(tmp_path):
    table = compare({"one": recorded(loss=[3.0, 2.0], updates=[7]), "other": recorded(loss=[1.0])})
    assert [row["run"] for row in table.to_rows()] == ["one", "other"]
    assert [row["loss"] for row in table.to_rows()] == [2.0, 1.0]
    assert table.to_rows()[0]["updates (metric)"] == 7
    lines = repr(table).splitlines()
    assert lines[0].split()[:3] == ["run", "updates", "seconds"]
    assert "<caption>2 runs</caption>" in table._repr_html_()
    table.to_csv(tmp_path / "runs.csv")
    assert (tmp_path / "runs.csv").read_text().splitlines()[0].startswith("run,updates,seconds,loss")


# --- plots -------------------------------------------------------------------------------------------------------


needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs the extra `plots`")


def curves_of(diagram):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in diagram.lines}


@needs_matplotlib
def test_the_curves_are_what_was_recorded_one_diagram_for_each_quantity():
    history = history_of()
    loss, learning_rate = history.plot().axes
    assert (loss.get_ylabel(), learning_rate.get_ylabel()) == ("loss", "learning rate")
    curves = curves_of(loss)
    assert curves.keys() == {"train_loss_step", "train_loss_epoch", "eval_loss_epoch"}
    assert curves["eval_loss_epoch"] == ([6, 12], history.get_metric_values("eval_loss_epoch"))
    assert curves["train_loss_step"][0] == [2, 4, 6, 8, 10, 12]
    assert curves_of(learning_rate)["learning_rate"][1] == [0.1] * 6


@needs_matplotlib
@pytest.mark.parametrize(("x", "places"), [("epoch", [1, 2]), ("samples", [24, 48])])
def test_other_axes_and_a_choice_of_metrics(x, places):
    (diagram,) = history_of().plot(["eval_loss_epoch"], x=x).axes
    assert curves_of(diagram)["eval_loss_epoch"][0] == places
    assert diagram.get_xlabel() == x


@needs_matplotlib
def test_a_history_is_drawn_like_any_other_learning_curves():
    history = history_of()
    drawn, expected = history.plot(["eval_loss_epoch"], x="epoch"), plot_learning_curves(history, ["loss"])
    (panel,), (other,) = drawn.axes, expected.axes
    assert drawn.get_size_inches().tolist() == expected.get_size_inches().tolist()
    (line,) = panel.lines
    (expected_line,) = (each for each in other.lines if each.get_label() == "evaluation")
    assert line.get_xydata().tolist() == expected_line.get_xydata().tolist()
    assert (line.get_linewidth(), line.get_markersize()) == (expected_line.get_linewidth(), 3.5)


@needs_matplotlib
def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match=r"Nothing was recorded of \['accuracy'\] that can be drawn over `update`"):
        history_of().plot(["accuracy"])


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pytorch-accelerated\[plots\]'"):
        history_of().plot()


@pytest.mark.parametrize("histories", ["history.jsonl", None, InMemoryRunHistory(), [None], {"a": 3}])
def test_what_are_no_histories_is_told(histories):
    with pytest.raises(TypeError, match=r"Expected (one, or the file of a|a list of run histories)"):
        compare(histories)


@pytest.mark.parametrize("other", [None, 3])
def test_what_is_no_history_has_no_difference(other):
    with pytest.raises(TypeError, match=f"{other}, of type {type(other).__name__}, is no run history"):
        InMemoryRunHistory().diff(other)
