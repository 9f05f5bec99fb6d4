"""Pictures show the right numbers, are valid for hard cases, and leave matplotlib as it is."""

from __future__ import annotations

import sys
from functools import partial

import numpy as np
import pytest
import torch

from _support import SOURCE
from pytorch_accelerated.plotting import (
    confusion_matrix,
    plot_confusion_matrix,
    plot_layer_statistics,
    plot_learning_curves,
    plot_schedule,
    plot_step_losses,
)

matplotlib = pytest.importorskip("matplotlib", reason="plots need the extra `plots`")

NAN = float("nan")
SERIES = {
    "train_loss_epoch": [1.0, 0.5, 0.25],
    "eval_loss_epoch": [1.0, 0.6, 0.8],
    "train_accuracy": [0.5, 0.6, 0.7],
    "eval_accuracy": [0.5, 0.65, 0.6],
}


def lines_of(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def draw(figure, tmp_path):
    """Draw a figure, in which hard cases may fail, and return the number of bytes."""
    figure.savefig(tmp_path / "figure.png", dpi=20)
    return (tmp_path / "figure.png").stat().st_size


# --- learning curves ---------------------------------------------------------------------------------------------


def test_each_metric_has_a_panel_with_training_evaluation_and_the_best_epoch():
    loss, accuracy = plot_learning_curves(SERIES, title="Run").axes
    assert lines_of(loss) == {
        "training": ([1, 2, 3], [1.0, 0.5, 0.25]),
        "evaluation": ([1, 2, 3], [1.0, 0.6, 0.8]),
        "best: 0.6 (epoch 2)": ([2], [0.6]),
    }
    assert "best: 0.65 (epoch 2)" in lines_of(accuracy)
    assert [axes.get_title() for axes in (loss, accuracy)] == ["Loss", "Accuracy"]
    assert loss.get_xlabel() == "epoch"


def test_the_direction_of_a_metric_can_be_given_or_is_unknown():
    series = {"train_score_x": [1, 2], "eval_score_x": [3, 2]}
    assert not any("best" in label for label in lines_of(plot_learning_curves(series).axes[0]))
    marked = plot_learning_curves(series, greater_is_better={"score_x": True}).axes[0]
    assert "best: 3 (epoch 1)" in lines_of(marked)


def test_a_given_epoch_is_marked_in_all_panels():
    figure = plot_learning_curves(SERIES, best_epoch=3)
    assert all("best model (epoch 3)" in lines_of(axes) for axes in figure.axes)


def test_metrics_can_be_chosen_and_several_datasets_are_drawn():
    series = {**SERIES, "hard_eval_loss_epoch": [2.0, 1.5, 1.4]}
    (axes,) = plot_learning_curves(series, ["loss"]).axes
    assert lines_of(axes)["evaluation (hard)"] == ([1, 2, 3], [2.0, 1.5, 1.4])


def test_the_axis_of_chosen_metrics_is_logarithmic_unless_no_value_is_positive():
    figure = plot_learning_curves(SERIES, log_scale=["loss"])
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear"]
    negative = plot_learning_curves({"train_loss": [-1.0, -2.0]}, log_scale=True)
    assert negative.axes[0].get_yscale() == "linear"


@pytest.mark.parametrize(
    "series",
    [
        {"train_loss": [1.0], "eval_loss": [1.0]},
        {"train_loss": [NAN, NAN], "eval_loss": [NAN, float("inf")]},
        {"train_loss": [0.0, 0.0], "train_a$b_{": [1e-30, 1e30]},
    ],
    ids=["one epoch", "nothing finite", "odd"],
)
def test_hard_curves_can_be_drawn(series, tmp_path):
    assert draw(plot_learning_curves(series, log_scale=True), tmp_path) > 1000


def test_many_metrics_are_drawn_in_rows_of_three():
    figure = plot_learning_curves({f"train_metric_{index}": [1.0, 2.0] for index in range(7)})
    assert [len(figure.axes), *figure.axes[6].get_subplotspec().get_geometry()] == [7, 3, 3, 6, 6]


def test_values_that_are_not_finite_are_counted_in_the_legend():
    (axes,) = plot_learning_curves({"train_loss": [1.0, NAN, 0.5]}).axes
    assert "training (1 not finite)" in lines_of(axes)


# --- schedules ---------------------------------------------------------------------------------------------------


def test_a_schedule_has_a_curve_for_each_parameter_group_that_differs():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in (0.1, 0.2, 0.1)])
    factory = partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.5, total_iters=2)
    axes = plot_schedule(factory, 3, optimizer=optimizer).axes[0]
    assert lines_of(axes) == {
        "parameter group 0": ([1, 2, 3], pytest.approx([0.1, 0.075, 0.05])),
        "parameter group 1": ([1, 2, 3], pytest.approx([0.2, 0.15, 0.1])),
    }


def test_a_schedule_of_several_epochs_can_be_drawn(tmp_path):
    factory = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
    figure = plot_schedule(factory, 10, num_epochs=5, log_scale=True, title="Decay")
    assert figure.axes[0].get_yscale() == "log"
    assert draw(figure, tmp_path) > 1000


# --- losses over steps -------------------------------------------------------------------------------------------


def test_the_band_and_the_median_are_those_of_the_bins():
    losses = np.concatenate([np.linspace(0, 1, 11), np.linspace(2, 3, 11)])
    axes = plot_step_losses(losses, num_bins=2).axes[0]
    (at, medians) = lines_of(axes)["median"]
    assert (at, medians) == ([6, 17], pytest.approx([0.5, 2.5]))
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (pytest.approx(0.1), pytest.approx(2.9))


@pytest.mark.parametrize("losses", [[1.0], torch.rand(300, dtype=torch.bfloat16)])
def test_few_or_odd_losses_can_be_drawn(losses, tmp_path):
    assert draw(plot_step_losses(losses, log_scale=True), tmp_path) > 1000


def test_losses_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match="None of the 2 `losses` is finite"):
        plot_step_losses([NAN, NAN])
    with pytest.raises(ValueError, match=r"There are 1 `steps`, but 2 losses"):
        plot_step_losses([1.0, 2.0], steps=[1])
    with pytest.raises(ValueError, match=r"`losses` has the shape \(1, 2\). Expected 1"):
        plot_step_losses([[1.0, 2.0]])
    with pytest.raises(ValueError, match="num_bins"):
        plot_step_losses([1.0], num_bins=0)


# --- layer statistics --------------------------------------------------------------------------------------------


def test_the_heat_map_has_a_row_for_each_layer_with_the_first_at_the_top():
    axes, bar = plot_layer_statistics([[1.0, 2.0], [3.0, NAN]], ["a", "b"], [10, 30], statistic="norm").axes
    mesh = axes.collections[0]
    assert mesh.get_array().tolist() == [[1.0, 2.0], [3.0, None]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert axes.get_xlim() == (0.0, 40.0)
    assert bar.get_ylabel() == "norm"


def test_zero_is_in_the_middle_of_the_colors_if_there_are_negative_values():
    mesh = plot_layer_statistics([[-1.0, 3.0]]).axes[0].collections[0]
    assert (mesh.norm.vmin, mesh.norm.vmax) == (-3.0, 3.0)


@pytest.mark.parametrize("values", [[[1.0]], [[NAN, NAN]], np.ones((60, 3))])
def test_hard_heat_maps_can_be_drawn(values, tmp_path):
    assert draw(plot_layer_statistics(values), tmp_path) > 1000


def test_heat_maps_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match="`log_scale` is True, but the values are between -1 and 2"):
        plot_layer_statistics([[-1.0, 2.0]], log_scale=True)
    with pytest.raises(ValueError, match=r"There are 2 `layer_names`, but 1 rows"):
        plot_layer_statistics([[1.0]], ["a", "b"])
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_layer_statistics(np.zeros((2, 0)))


# --- confusion matrix --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_confusion_matrix_counts_predictions_or_scores(kind):
    scores = [[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.2, 0.8, 0.0]]
    expected = [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert confusion_matrix(kind(scores), kind([0, 0, 1])).tolist() == expected
    assert confusion_matrix(kind([0, 1, 1]), kind([0, 0, 1]), num_classes=3).tolist() == expected
    assert confusion_matrix(kind(expected)).tolist() == expected


def test_a_confusion_matrix_shows_numbers_and_accuracy():
    axes, bar = plot_confusion_matrix([0, 1, 1, 1], [0, 0, 1, 1], class_names=["cat", "dog"]).axes
    assert axes.get_title() == "Accuracy 75.0% of 4 samples"
    assert [text.get_text() for text in axes.texts] == ["1", "1", "2"]
    assert axes.images[0].get_array().tolist() == [[0.5, 0.5], [0.0, 1.0]]
    assert bar.get_ylabel() == "share of the true class"


@pytest.mark.parametrize(
    ("normalize", "texts"), [("target", ["50%", "50%", "100%"]), ("prediction", ["100%", "33%", "67%"])]
)
def test_a_confusion_matrix_can_show_shares(normalize, texts):
    axes = plot_confusion_matrix([0, 1, 1, 1], [0, 0, 1, 1], normalize=normalize).axes[0]
    assert [text.get_text() for text in axes.texts] == texts


@pytest.mark.parametrize("matrix", [[[0, 0], [0, 0]], [[7]]], ids=["empty", "one"])
def test_hard_matrices_can_be_drawn(matrix, tmp_path):
    assert draw(plot_confusion_matrix(matrix), tmp_path) > 1000


def test_confusion_matrices_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"has the shape \(3,\), and there are no `targets`"):
        plot_confusion_matrix([0, 1, 1])
    with pytest.raises(ValueError, match="There are 1 `predictions`, but 2 targets"):
        plot_confusion_matrix([0], [0, 1])
    with pytest.raises(ValueError, match="has the class -100"):
        plot_confusion_matrix([0, 1], [0, -100])
    with pytest.raises(TypeError, match="has the type float64"):
        plot_confusion_matrix([0.5, 1.0], [0, 1])
    with pytest.raises(ValueError, match="There are 1 `class_names`, but 2 classes"):
        plot_confusion_matrix([0, 1], [0, 1], class_names=["a"])
    with pytest.raises(ValueError, match="`normalize` is 'rows'"):
        plot_confusion_matrix([0, 1], [0, 1], normalize="rows")


# --- matplotlib --------------------------------------------------------------------------------------------------


def test_no_state_of_matplotlib_is_changed_and_no_backend_is_chosen(tmp_path):
    before = dict(matplotlib.rcParams)
    draw(plot_learning_curves(SERIES), tmp_path)
    plot_confusion_matrix([0, 1], [0, 1])
    plot_layer_statistics([[1.0, 2.0]], log_scale=True)
    plot_step_losses([1.0, 2.0])
    assert dict(matplotlib.rcParams) == before


def test_the_part_of_matplotlib_that_has_a_state_is_never_imported():
    assert [path.name for path in SOURCE.rglob("*.py") if "pyplot" in path.read_text()] == []


@pytest.mark.parametrize(
    "plot",
    [
        lambda: plot_learning_curves(SERIES),
        lambda: plot_schedule(partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9), 2),
        lambda: plot_step_losses([1.0]),
        lambda: plot_layer_statistics([[1.0]]),
        lambda: plot_confusion_matrix([0], [0]),
    ],
)
def test_without_matplotlib_one_error_names_the_extra(plot, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pytorch-accelerated\[plots\]'"):
        plot()
