"""Callbacks that end a run early."""

from __future__ import annotations

import copy
import math
import re
import signal

import pytest
import torch
from torch import nn

from _saved import assert_equal
from _support import (
    IMPOSSIBLE_COUNTS,
    EventRecorder,
    Probe,
    assert_same_weights,
    make_dataset,
    make_model,
    make_trainer,
    train,
    weights_of,
)
from pytorch_accelerated import Trainer
from pytorch_accelerated._recording import loss_monitor
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    LogMetricsCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    TerminateOnNaNCallback,
)
from pytorch_accelerated.exceptions import NonFiniteLossError

NAN = float("nan")


def num_epochs_run(trainer):
    return trainer.run_history.current_epoch - 1


# --- early stopping ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* is NaN")  # which is what they watch
@pytest.mark.parametrize(
    ("losses", "settings", "expected"),
    [
        pytest.param([5, 4, 4, 3, 3, 3, 1], {"early_stopping_patience": 1}, 3, id="one epoch without improvement"),
        pytest.param([5, 4, 4, 3, 3, 3, 1], {"early_stopping_patience": 2}, 6, id="an improvement resets the count"),
        pytest.param([5, 4, 4, 3, 3, 3, 1], {"early_stopping_patience": 3}, 7, id="patience not used up"),
        pytest.param([1, 2, 2, 2, 0.5], {"early_stopping_patience": 3}, 4, id="a worse value is no improvement"),
        pytest.param([1, 0.995, 0.98, 0.1], {}, 2, id="a change up to the threshold is none"),
        pytest.param([1, 0.98, 0.96, 0.1], {}, 4, id="a change above the threshold is one"),
        pytest.param(
            [1, 0.995, 0.985, 0.1], {"early_stopping_patience": 2}, 4, id="small changes add up against the best value"
        ),
        pytest.param([1, 0.9999, 0.9998, 0.9999, 0.1], {"early_stopping_threshold": 0.0}, 4, id="no threshold"),
        pytest.param([1, 2, 3, 3, 9], {"greater_is_better": True}, 4, id="greater is better"),
        pytest.param([NAN, 1, 0.5, NAN, 0.1], {}, 1, id="nan is no improvement, not even on nothing"),
        pytest.param([2, NAN, 1, NAN, NAN, 0.1], {"early_stopping_patience": 2}, 5, id="nan is never the best"),
    ],
)
def test_early_stopping_stops_after_the_given_epochs_without_improvement(scripted, losses, settings, expected):
    trainer = scripted(losses, [EarlyStoppingCallback(**settings)])
    trainer.run()
    assert num_epochs_run(trainer) == expected
    assert ("has not improved" in trainer.stop_reason) == (expected < len(losses))


def test_the_stop_reason_names_the_metric_its_best_value_and_the_epochs(scripted):
    recorder = EventRecorder()
    trainer = scripted([2.5, 3, 3, 3], [EarlyStoppingCallback(early_stopping_patience=2), recorder])
    trainer.run()
    assert trainer.stop_reason == "eval_loss_epoch has not improved on 2.5 for 2 epochs"
    assert recorder.log[-3:] == ["on_training_run_epoch_end", "on_stop_training_error", "on_training_run_end"]


@pytest.mark.parametrize(
    ("metric", "has_table", "is_told"),
    [("own_error", True, False), ("own_error", False, True), ("quality", True, True)],
)
def test_an_improvement_is_told_unless_a_table_marks_it(capsys, metric, has_table, is_told):
    values = iter([4.0, 3.0])
    record = Probe(on_train_epoch_end=lambda trainer, **_: trainer.run_history.update_metric(metric, next(values)))
    callbacks = [record, EarlyStoppingCallback(watch_metric=metric), *[LogMetricsCallback()] * has_table]
    train(make_trainer(callbacks=callbacks), num_epochs=2)
    assert (f"{metric} has improved by 1 to 3" in capsys.readouterr().out) == is_told


def test_early_stopping_can_watch_any_recorded_metric():
    record = Probe(on_train_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("f1", torch.tensor(0.5)))
    stopping = EarlyStoppingCallback(watch_metric="f1", greater_is_better=True)
    trainer = make_trainer(callbacks=[record, stopping])
    trainer.train(make_dataset(8), num_epochs=5)
    assert num_epochs_run(trainer) == 2


def test_each_run_resets_the_patience(scripted):
    trainer = scripted([1, 2, 2], [EarlyStoppingCallback(early_stopping_patience=2)])
    trainer.run(num_epochs=2)
    trainer.run(num_epochs=2)
    assert trainer.stop_reason == "2 epochs are done"


def test_the_patience_is_counted_across_runs_if_reset_on_train_is_false(scripted):
    stopping = EarlyStoppingCallback(early_stopping_patience=2, reset_on_train=False)
    trainer = scripted([1, 2, 2], [stopping])
    trainer.run(num_epochs=2)
    trainer.run(num_epochs=2)
    assert "has not improved on 1.0 for 2 epochs" in trainer.stop_reason
    assert num_epochs_run(trainer) == 1


def test_a_resumed_run_continues_the_patience_count(scripted, tmp_path):
    losses = [1, 2, 2, 2, 2]
    trainer = scripted(losses, [EarlyStoppingCallback(early_stopping_patience=3)])
    trainer.run(num_epochs=3)
    trainer.save_training_state(tmp_path / "state")
    resumed = scripted(losses, [EarlyStoppingCallback(early_stopping_patience=3)])
    resumed.run(resume_from=tmp_path / "state")
    assert num_epochs_run(resumed) == 4
    assert resumed.stop_reason == "eval_loss_epoch has not improved on 1.0 for 3 epochs"


@pytest.mark.parametrize(
    ("losses", "settings", "expected"),
    [
        pytest.param([100, 99.5, 98, 97.5, 1], {"early_stopping_threshold": 0.01}, 2, id="one percent of 100"),
        pytest.param([100, 98, 96.5, 95.6, 1], {"early_stopping_threshold": 0.01}, 4, id="one percent of the best"),
        pytest.param([-100, -100.5, -200], {"early_stopping_threshold": 0.01}, 2, id="of the absolute value"),
        pytest.param([1, 1.5, 1.9, 9], {"early_stopping_threshold": 0.4, "greater_is_better": True}, 3, id="greater"),
    ],
)
def test_a_threshold_can_be_relative_to_the_best_value(scripted, losses, settings, expected):
    trainer = scripted(losses, [EarlyStoppingCallback(threshold_mode="relative", **settings)])
    trainer.run()
    assert num_epochs_run(trainer) == expected
    assert "has not improved" in trainer.stop_reason


def test_values_before_the_start_epoch_do_not_count(scripted):
    stopping = EarlyStoppingCallback(start_epoch=4)
    trainer = scripted([1, 2, 3, 9, 8, 8, 8], [stopping])
    trainer.run()
    assert (num_epochs_run(trainer), stopping.best_metric) == (6, 8)


@pytest.mark.parametrize(
    ("losses", "settings", "expected", "reason"),
    [
        ([1, 5, 5.5, 1], {"divergence_threshold": 5}, 3, "eval_loss_epoch has diverged: 5.5 is worse than 5"),
        ([9, 4, 1], {"divergence_threshold": 5, "greater_is_better": True}, 2, "eval_loss_epoch has diverged: 4.0 is"),
        ([1, math.inf, 1], {"check_finite": True}, 2, "eval_loss_epoch is inf, which is not finite"),
        ([1, NAN, 1], {"check_finite": True}, 2, "eval_loss_epoch is nan, which is not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:.* is NaN")
def test_a_value_beyond_hope_stops_the_run_at_once(scripted, losses, settings, expected, reason):
    trainer = scripted(losses, [EarlyStoppingCallback(early_stopping_patience=9, **settings)])
    trainer.run()
    assert num_epochs_run(trainer) == expected
    assert trainer.stop_reason.startswith(reason)


def test_the_patience_counts_intermediate_evaluations():
    stopping = EarlyStoppingCallback(early_stopping_patience=3, watch_metric="intermediate_eval_loss_epoch")
    trainer = make_trainer(lr=0.0, callbacks=[StepBasedEvaluationCallback(eval_every="2 updates"), stopping])
    train(trainer, make_dataset(40), num_epochs=3, eval_dataset=make_dataset(8))
    assert trainer.progress.num_updates == 8
    assert trainer.stop_reason.startswith("intermediate_eval_loss_epoch has not improved on ")
    assert trainer.stop_reason.endswith(" for 3 evaluations")


class KeepWeights:
    """Keeps the weights after each epoch."""

    def __init__(self):
        self.weights = []

    def on_train_epoch_end(self, trainer, **kwargs):
        self.weights.append(weights_of(trainer.get_model()))


@pytest.mark.parametrize(("losses", "best"), [([3, 1, 2, 2, 2], 1), ([3, 2, 1], 2), ([3, 4, 5], 0)])
def test_the_best_weights_are_restored_however_the_run_ends(scripted, losses, best, capsys):
    keep = KeepWeights()
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    trainer = scripted(losses, [keep, EarlyStoppingCallback(2, restore_best_weights=True)], model=model)
    trainer.run()
    assert_same_weights(weights_of(model), keep.weights[best])
    assert f"Restoring the weights of the best value: eval_loss_epoch {float(losses[best])}" in capsys.readouterr().out


def test_without_a_best_value_the_weights_stay(scripted):
    keep = KeepWeights()
    stopping = EarlyStoppingCallback(start_epoch=9, restore_best_weights=True)
    trainer = scripted([1, 2, 3], [keep, stopping])
    trainer.run()
    assert_same_weights(weights_of(trainer.model), keep.weights[-1])


@pytest.mark.parametrize("saved_after", [1, 2, 3])
def test_the_best_weights_are_restored_after_a_resume(scripted, saved_after, tmp_path):
    losses = [3, 1, 2, 2, 2]

    def run(*callbacks, **kwargs):
        trainer = scripted(losses, [EarlyStoppingCallback(3, restore_best_weights=True), *callbacks], seed=3)
        trainer.run(**kwargs)
        return trainer

    whole = run(SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1, keep_best=9, max_checkpoints=9))
    resumed = run(resume_from=tmp_path / f"epoch_{saved_after}")
    assert resumed.stop_reason == whole.stop_reason
    assert_same_weights(weights_of(resumed.model), weights_of(whole.model))
    again = run(resume_from=tmp_path / "final")
    assert_same_weights(weights_of(again.model), weights_of(whole.model))


def test_a_signal_leaves_the_weights_for_the_run_that_is_resumed(scripted):
    keep = KeepWeights()
    interrupt = Probe(
        on_train_epoch_start=lambda trainer, **_: (
            trainer.run_history.current_epoch == 3 and signal.raise_signal(signal.SIGINT)
        )
    )
    trainer = scripted([1, 2, 3, 4], [keep, EarlyStoppingCallback(9, restore_best_weights=True), interrupt])
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    with pytest.raises(AssertionError):
        assert_same_weights(weights_of(trainer.model), keep.weights[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start_epoch": 0}, "`start_epoch` is 0"),
        ({"threshold_mode": "rel"}, "`threshold_mode` is 'rel'. Expected 'absolute' or 'relative'"),
        ({"divergence_threshold": NAN}, "`divergence_threshold` is nan"),
    ],
)
def test_impossible_settings_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        EarlyStoppingCallback(**settings)


# --- what is watched ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("callback_class", [EarlyStoppingCallback, SaveBestModelCallback])
def test_watching_the_evaluation_loss_without_eval_dataset_is_an_early_error(callback_class, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorder = EventRecorder()
    trainer = make_trainer(callbacks=[recorder, callback_class])
    with pytest.raises(
        ValueError, match=f"`{callback_class.__name__}` watches 'eval_loss_epoch', but .* without `eval_dataset`"
    ):
        trainer.train(make_dataset(8), num_epochs=2)
    assert "on_train_epoch_start" not in recorder.log


@pytest.mark.parametrize("callback_class", [EarlyStoppingCallback, SaveBestModelCallback])
def test_watching_an_unknown_metric_is_an_error_that_lists_the_known_ones(callback_class, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(callbacks=[callback_class(watch_metric="eval_acuracy")])
    known = r"'eval_acuracy', which nothing .* records. It records \['eval_loss_epoch', 'train_loss_epoch'\]"
    with pytest.raises(ValueError, match=known):
        trainer.train(make_dataset(8), num_epochs=2, eval_dataset=make_dataset(4))
    assert num_epochs_run(trainer) == 0


@pytest.mark.parametrize("callback_class", [EarlyStoppingCallback, SaveBestModelCallback])
def test_watching_a_metric_that_is_not_a_number_is_an_error(callback_class, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = Probe(
        on_train_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("matrix", [[1, 0], [0, 1]])
    )
    trainer = make_trainer(callbacks=[record, callback_class(watch_metric="matrix")])
    with pytest.raises(ValueError, match="Expected a single number"):
        trainer.train(make_dataset(8), num_epochs=1)


# --- losses that are not finite ----------------------------------------------------------------------------------


@pytest.fixture
def spoil():
    """Multiply the loss of the fourth update by a number."""

    def make(loss, event="on_backward_start"):
        def multiply(trainer, batch_output, **kwargs):
            if trainer.progress.num_updates == 3:
                batch_output["loss"] = batch_output["loss"] * loss

        return Probe(**{event: multiply})

    return make


@pytest.mark.parametrize("loss", [NAN, float("inf"), -float("inf")])
def test_a_non_finite_training_loss_ends_the_run_with_an_error_that_names_the_first_bad_step(scripted, spoil, loss):
    trainer = scripted([1, 1, 1], [spoil(loss), TerminateOnNaNCallback])
    with pytest.raises(NonFiniteLossError, match=r"The loss is -?(nan|inf) in training, epoch 2, step 1, rank 0\. Try"):
        trainer.run()


@pytest.fixture
def on_an_accelerator(monkeypatch):
    """Let no tensor say that it is in host memory, where reading it is free."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)


@pytest.mark.usefixtures("on_an_accelerator")
def test_on_an_accelerator_a_non_finite_loss_is_found_at_the_next_log_point(scripted, spoil, monkeypatch):
    monkeypatch.setattr(loss_monitor, "SECONDS_BETWEEN_LOG_POINTS", 0.0)
    trainer = scripted([1, 1, 1], [spoil(NAN), TerminateOnNaNCallback])
    with pytest.raises(NonFiniteLossError, match="in training, epoch 2, step 1"):
        trainer.run()
    assert trainer.progress.num_updates == 4


@pytest.mark.parametrize("where", ["on a CPU", "on an accelerator"])
def test_no_training_state_is_saved_after_a_non_finite_loss(scripted, spoil, tmp_path, where, request):
    if where == "on an accelerator":
        request.getfixturevalue("on_an_accelerator")
    states = SaveTrainingStateCallback(tmp_path, save_every_n_steps=1)
    trainer = scripted([1, 1, 1], [states, spoil(NAN), TerminateOnNaNCallback])
    with pytest.raises(NonFiniteLossError, match="in training, epoch 2, step 1"):
        trainer.run()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["step_1", "step_2", "step_3"]


class Rooted(torch.nn.Module):
    """A model whose gradient is NaN, although its output is finite, where ``is_bad``: the square root at 0."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)
        self.embedding = torch.nn.Embedding(4, 1)
        self.is_bad = False

    def forward(self, inputs):
        outputs = self.layer(inputs) + self.embedding(torch.zeros(len(inputs), dtype=torch.long))
        return outputs + torch.sqrt(self.layer.weight.sum() * 0) if self.is_bad else outputs


def train_rooted(bad_update=None, callbacks=(), optimizer_class=torch.optim.SGD, model=None, **kwargs):
    """Train for 2 epochs of 4 batches, with a NaN gradient in one update; return the trainer and the error."""
    model = Rooted() if model is None else model

    def prepare(trainer, **_):
        model.is_bad = trainer.progress.num_updates == bad_update

    trainer = make_trainer(model, callbacks=[Probe(on_train_step_start=prepare), TerminateOnNaNCallback, *callbacks])
    settings = {"momentum": 0.9} if optimizer_class is torch.optim.SGD and not model.embedding.sparse else {}
    trainer.optimizer = optimizer_class(model.parameters(), lr=0.1, **settings)
    try:
        trainer.train(make_dataset(16), num_epochs=2, per_device_batch_size=4, **kwargs)
    except NonFiniteLossError as error:
        return trainer, error
    return trainer, None


def values_of(trainer):
    return copy.deepcopy((trainer.get_model().state_dict(), trainer.optimizer.state_dict()["state"]))


@pytest.mark.parametrize("bad_update", [0, 2, 4, 7])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer_class": torch.optim.Adam},
        {"gradient_clip_norm": 1.0},
        {"gradient_clip_value": 0.1},
        {"gradient_accumulation_steps": 2, "bad_update": 3},
    ],
    ids=str,
)
def test_on_a_cpu_a_bad_gradient_changes_neither_parameters_nor_optimizer_and_no_state_is_saved(
    settings, bad_update, tmp_path
):
    """The error comes in the bad update itself, even if it is the last of the run."""
    seen = []
    keep = Probe(
        on_training_run_start=lambda trainer, **_: seen.append(values_of(trainer)),
        on_optimizer_step_end=lambda trainer, **_: seen.append(values_of(trainer)),
    )
    states = SaveTrainingStateCallback(tmp_path, save_every_n_steps=1)
    settings = {"bad_update": bad_update, **settings}
    trainer, error = train_rooted(callbacks=[keep, states], **settings)
    assert re.match(r"The gradient of `layer.weight`( \(and of \d more\))? is NaN or infinite", str(error))
    assert trainer.progress.num_updates == settings["bad_update"]
    assert_equal(values_of(trainer), seen[-1])
    for path in tmp_path.glob("*/model.pt"):
        assert all(value.isfinite().all() for value in torch.load(path).values())


@pytest.mark.parametrize("has_finite_gradient", [False, True])
@pytest.mark.parametrize("loss", [NAN, math.inf])
def test_on_a_cpu_no_update_follows_a_bad_loss(loss, has_finite_gradient):
    def spoil(trainer, batch_output, **kwargs):
        if trainer.progress.num_updates == 3:
            batch_output["loss"] = batch_output["loss"] + loss if has_finite_gradient else batch_output["loss"] * loss

    trainer = make_trainer(callbacks=[Probe(on_backward_start=spoil), TerminateOnNaNCallback])
    with pytest.raises(NonFiniteLossError, match=r"The loss is (nan|inf) in training, epoch 1, step 3"):
        train(trainer, make_dataset(32), gradient_accumulation_steps=1)
    assert trainer.progress.num_updates == 3


@pytest.mark.parametrize("kind", ["sparse", "complex", "float64 and float32"])
def test_gradients_of_any_kind_are_checked(kind):
    class Special(Rooted):
        def __init__(self):
            super().__init__()
            if kind == "sparse":
                self.embedding = torch.nn.Embedding(4, 1, sparse=True)
            elif kind == "complex":
                self.phase = torch.nn.Parameter(torch.ones(1, dtype=torch.complex64))
            else:
                self.factor = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, inputs):
            outputs = super().forward(inputs)
            if kind == "complex":
                outputs = outputs * self.phase.real
            return outputs * self.factor.float() if hasattr(self, "factor") else outputs

    model = Special()
    trainer, error = train_rooted(2, model=model)
    assert "layer.weight" in str(error)
    assert trainer.progress.num_updates == 2
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_parameters_outside_the_model_are_checked():
    scale = torch.nn.Parameter(torch.zeros(1))
    trainer = make_trainer(
        loss_func=lambda outputs, targets: outputs.mean() + scale.sqrt().sum(), callbacks=[TerminateOnNaNCallback]
    )
    trainer.optimizer.add_param_group({"params": [scale]})
    with pytest.raises(NonFiniteLossError, match="The gradient of a parameter outside the model is NaN or infinite"):
        trainer.train(make_dataset(8), num_epochs=1)
    assert scale.item() == 0


@pytest.mark.usefixtures("on_an_accelerator")
def test_on_an_accelerator_a_state_with_spoilt_parameters_is_not_saved(tmp_path):
    """The gradient is NaN, and no loss has shown it yet."""
    states = SaveTrainingStateCallback(tmp_path, save_every_n_steps=1)
    _, error = train_rooted(2, callbacks=[states])
    assert str(error).startswith("A parameter of the model is NaN or infinite, epoch 1, rank 0, although the losses")
    assert {path.name for path in tmp_path.glob("step_*")} == {"step_1", "step_2"}


@pytest.mark.usefixtures("on_an_accelerator")
def test_on_an_accelerator_a_bad_gradient_in_the_last_update_ends_the_run_with_an_error():
    _, error = train_rooted(7)
    assert str(error).startswith("A parameter of the model is NaN or infinite, epoch 2")


def test_without_the_callback_nothing_is_checked():
    model = Rooted()
    model.is_bad = True
    make_trainer(model).train(make_dataset(8), num_epochs=1)
    assert model.layer.weight.isnan().all()


class ScaledLoss(nn.Module):
    """A loss function with a parameter and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, outputs, targets):
        self.num_calls += 1
        return nn.functional.mse_loss(outputs * self.scale, targets)


def trainer_with_scaled_loss(tmp_path, *, stop_after=None):
    """Watch losses that are best in epoch 2; in epoch 4 the program may die, after its state was saved."""

    def note(trainer, **kwargs):
        epoch = trainer.run_history.current_epoch
        trainer.run_history.update_metric("score", [2.0, 1.0, 3.0, 4.0, 5.0][epoch - 1])
        scales[epoch] = loss.scale.item()

    def die(trainer, **kwargs):
        if trainer.run_history.current_epoch == stop_after:
            raise KeyError

    loss, model, scales, extra = ScaledLoss(), make_model(), {}, nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters(), extra], lr=0.1)
    callbacks = [
        Probe(on_train_epoch_end=note, on_train_step_end=die),
        EarlyStoppingCallback(3, watch_metric="score", restore_best_weights=True),
        SaveTrainingStateCallback(tmp_path / "states"),
    ]
    trainer = Trainer(model, loss, optimizer, callbacks=callbacks)
    trainer.extra = extra
    return trainer, scales


@pytest.mark.parametrize("is_killed", [False, True])
def test_the_best_weights_include_what_is_trained_outside_the_model(tmp_path, is_killed):
    if is_killed:
        with pytest.raises(KeyError):
            train(trainer_with_scaled_loss(tmp_path, stop_after=4)[0], make_dataset(16), num_epochs=9)
    trainer, scales = trainer_with_scaled_loss(tmp_path)
    train(trainer, make_dataset(16), num_epochs=9, resume_from="latest")
    assert trainer.stop_reason.startswith("score has not improved")
    uninterrupted = scales if not is_killed else trained_scales(tmp_path / "again")
    assert trainer.loss_func.scale.item() == uninterrupted[2] != uninterrupted[5]


def trained_scales(path):
    trainer, scales = trainer_with_scaled_loss(path)
    train(trainer, make_dataset(16), num_epochs=9)
    return scales


@pytest.mark.parametrize("clipping", [{}, {"gradient_clip_norm": 1.0}, {"gradient_clip_value": 0.1}])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_on_a_cpu_a_gradient_that_a_callback_has_made_bad_changes_nothing(clipping, accumulation):
    """`on_optimizer_step_start` is the last place to change gradients."""
    before = []

    def spoil(trainer, **kwargs):
        before.append(weights_of(trainer.model))
        if len(before) == 2:
            next(trainer.model.parameters()).grad[0] = math.nan

    trainer = make_trainer(callbacks=[TerminateOnNaNCallback(), Probe(on_optimizer_step_start=spoil)])
    with pytest.raises(NonFiniteLossError, match="The gradient of"):
        train(trainer, make_dataset(32), gradient_accumulation_steps=accumulation, **clipping)
    torch.testing.assert_close(weights_of(trainer.model), before[1], rtol=0, atol=0)


def test_a_callback_may_make_a_bad_gradient_good():
    def mend(trainer, **kwargs):
        for parameter in trainer.model.parameters():
            parameter.grad.nan_to_num_()

    class BadGradient(Trainer):
        def backward_step(self, loss):
            super().backward_step(loss)
            next(self.model.parameters()).grad[0] = math.nan

    callbacks = [TerminateOnNaNCallback(), Probe(on_optimizer_step_start=mend)]
    trainer = make_trainer(cls=BadGradient, callbacks=callbacks)
    train(trainer, make_dataset(32))
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_gradients_that_wait_for_an_update_are_checked_before_a_state_is_saved(tmp_path):
    class Mid(SaveTrainingStateCallback):
        def on_train_step_end(self, trainer, **kwargs):
            trainer.save_training_state(tmp_path / "mid")

    model = Rooted()
    model.is_bad = True
    trainer = make_trainer(model, callbacks=[TerminateOnNaNCallback, Mid(tmp_path / "states")])
    with pytest.raises(NonFiniteLossError, match="The gradient of"):
        trainer.train(make_dataset(16), 1, per_device_batch_size=4, gradient_accumulation_steps=4)
    assert not (tmp_path / "mid").exists()


def test_a_non_finite_training_loss_is_not_attributed_to_an_intermediate_evaluation(scripted, spoil):
    def evaluate(trainer, **kwargs):
        trainer.evaluate_now()

    trainer = scripted([1, 1, 1], [spoil(NAN), Probe(on_train_step_end=evaluate), TerminateOnNaNCallback])
    with pytest.raises(NonFiniteLossError, match="in training, epoch 2, step 1"):
        trainer.run()


def test_a_non_finite_evaluation_loss_ends_the_run(scripted):
    trainer = scripted([1, NAN, 1], [TerminateOnNaNCallback])
    with pytest.raises(NonFiniteLossError, match=r"The loss is nan in evaluation, epoch 2, step 0, rank 0"):
        trainer.run()


def test_finite_losses_do_not_end_the_run(scripted):
    trainer = scripted([1e30, -1e30, 0], [TerminateOnNaNCallback])
    trainer.run()
    assert num_epochs_run(trainer) == 3


def test_check_for_nan_after_batch_raises_if_the_loss_is_not_finite():
    callback = TerminateOnNaNCallback()
    callback.check_for_nan_after_batch({"loss": torch.tensor(1.0)})
    callback.check_for_nan_after_batch({"loss": 1.0}, step="validation")
    with pytest.raises(NonFiniteLossError, match="The loss is nan at step validation"):
        callback.check_for_nan_after_batch({"loss": torch.tensor(NAN)}, step="validation")
    with pytest.raises(ArithmeticError, match=r"The loss is inf\. Try"):
        callback.check_for_nan_after_batch({"loss": math.inf})


@pytest.mark.parametrize(("patience", "error"), IMPOSSIBLE_COUNTS)
def test_an_impossible_patience_is_rejected(patience, error):
    with pytest.raises(error, match=f"`early_stopping_patience` is {patience}.* Expected a whole number of epochs"):
        EarlyStoppingCallback(early_stopping_patience=patience)


@pytest.mark.parametrize("callback_class", [EarlyStoppingCallback, SaveBestModelCallback])
def test_watching_the_unnamed_evaluation_loss_of_several_datasets_is_an_early_error(callback_class):
    recorder = EventRecorder()
    trainer = make_trainer(callbacks=[recorder, callback_class])
    with pytest.raises(ValueError, match="'near_eval_loss_epoch'"):
        trainer.train(make_dataset(8), num_epochs=2, eval_dataset={"near": make_dataset(4)})
    assert "on_train_epoch_start" not in recorder.log
