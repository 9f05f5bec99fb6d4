"""Callbacks that save the best model, and training states to resume from."""

from __future__ import annotations

import itertools
import os
import signal
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import _support
from _support import (
    IMPOSSIBLE_COUNTS,
    EventRecorder,
    Probe,
    assert_same_weights,
    make_dataset,
    make_model,
    make_trainer,
    weights_of,
)
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    ModelEmaCallback,
    PreemptionCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    StopTrainingError,
    TrainerCallback,
)
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.schedulers import CosineLrScheduler
from pytorch_accelerated.states import verify_state

NAN = float("nan")


# --- the best model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("callback", [SaveBestModelCallback, ModelEmaCallback])
def test_a_path_that_cannot_be_written_is_an_error_before_training(tmp_path, callback):
    """Not at the end of training, when there is something to lose."""
    (tmp_path / "file").touch()
    recorder = EventRecorder()
    trainer = make_trainer(callbacks=[recorder, callback(save_path=tmp_path / "file" / "model.pt")])
    with pytest.raises(CheckpointError, match=r"file/model.pt"):
        trainer.train(make_dataset(8), 1, eval_dataset=make_dataset(4))
    assert "on_train_step_start" not in recorder.log


class RememberWeights(TrainerCallback):
    """Keeps a copy of the model after each epoch."""

    def __init__(self):
        self.epochs = []

    def on_training_run_epoch_end(self, trainer, **kwargs):
        self.epochs.append(weights_of(trainer.get_model()))


def is_same(left, right):
    return all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "models" / "best.pt"


@pytest.mark.filterwarnings("ignore:.* is NaN")  # which is what they watch
@pytest.mark.parametrize(
    ("losses", "settings", "best_epoch"),
    [
        pytest.param([3, 1, 2], {}, 2, id="the lowest"),
        pytest.param([3, 2, 1], {}, 3, id="the last"),
        pytest.param([1, 1, 1], {}, 1, id="the first of equals"),
        pytest.param([3, 1, 2], {"greater_is_better": True}, 1, id="the greatest"),
        pytest.param([NAN, 2, NAN, 1, NAN], {}, 4, id="nan is never the best"),
        pytest.param([NAN, 2, NAN], {"greater_is_better": True}, 2, id="nan is never the greatest"),
    ],
)
def test_the_best_model_is_saved_and_loaded_at_the_end(scripted, path, losses, settings, best_epoch):
    remember = RememberWeights()
    save = SaveBestModelCallback(path, **settings)
    trainer = scripted(losses, [save, remember])
    trainer.run()
    best = remember.epochs[best_epoch - 1]
    assert not any(is_same(best, other) for other in remember.epochs if other is not best)
    assert_same_weights(weights_of(trainer.model), best)
    assert (save.best_metric, save.best_metric_epoch) == (losses[best_epoch - 1], best_epoch)

    checkpoint = torch.load(path, weights_only=True)
    assert_same_weights(checkpoint["model_state_dict"], best)
    assert (checkpoint["eval_loss_epoch"], checkpoint["epoch"]) == (losses[best_epoch - 1], best_epoch)
    assert [file.name for file in path.parent.iterdir()] == ["best.pt"]


def test_loading_the_best_model_is_printed(scripted, path, capsys):
    scripted([3, 1, 2], [SaveBestModelCallback(path)]).run()
    assert capsys.readouterr().out == "Loading the best model: eval_loss_epoch 1.0 in epoch 2\n"


def test_the_model_of_the_last_epoch_is_kept_if_load_saved_checkpoint_is_false(scripted, path, capsys):
    remember = RememberWeights()
    trainer = scripted([3, 1, 2], [SaveBestModelCallback(path, load_saved_checkpoint=False), remember])
    trainer.run()
    assert_same_weights(weights_of(trainer.model), remember.epochs[-1])
    assert_same_weights(torch.load(path, weights_only=True)["model_state_dict"], remember.epochs[1])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("save_optimizer", [True, False])
@pytest.mark.parametrize("save_scheduler", [True, False])
def test_optimizer_and_scheduler_are_saved_and_loaded_on_request(scripted, path, save_optimizer, save_scheduler):
    """Each epoch has two updates, so the learning rate is halved in each. The first epoch is the best."""
    save = SaveBestModelCallback(path, save_optimizer=save_optimizer, save_scheduler=save_scheduler)
    trainer = scripted([1, 2, 3], [save])
    trainer.run(create_scheduler_fn=partial(StepLR, step_size=2, gamma=0.5))
    checkpoint = torch.load(path, weights_only=True)
    assert ("optimizer_state_dict" in checkpoint) == save_optimizer
    assert ("scheduler_state_dict" in checkpoint) == save_scheduler
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 if save_optimizer else 0.0125)
    assert trainer.scheduler.last_epoch == (2 if save_scheduler else 6)


def test_the_best_model_can_be_chosen_by_any_recorded_metric(path):
    """Including one that is a tensor."""
    scores = iter([0.25, 0.75, 0.5])
    record = Probe(
        on_train_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("f1", torch.tensor(next(scores)))
    )
    save = SaveBestModelCallback(path, watch_metric="f1", greater_is_better=True)
    make_trainer(callbacks=[record, save]).train(make_dataset(4), num_epochs=3)
    assert (save.best_metric, save.best_metric_epoch) == (0.75, 2)
    assert torch.load(path, weights_only=True)["f1"] == 0.75


def test_each_run_forgets_the_best_value_of_earlier_runs(scripted, path):
    save = SaveBestModelCallback(path)
    trainer = scripted([1], [save])
    trainer.run()
    trainer.eval_losses = [5, 4, 6]
    trainer.run(num_epochs=3)
    assert (save.best_metric, save.best_metric_epoch) == (4, 2)


def test_the_best_value_is_kept_across_runs_if_reset_on_train_is_false(scripted, path):
    """The second run is never better, so it saves nothing and keeps its last weights."""
    save = SaveBestModelCallback(path, reset_on_train=False)
    remember = RememberWeights()
    trainer = scripted([1], [save, remember])
    trainer.run()
    trainer.eval_losses = [5, 4]
    trainer.run(num_epochs=2)
    assert (save.best_metric, save.best_metric_epoch) == (1, 1)
    assert_same_weights(torch.load(path, weights_only=True)["model_state_dict"], remember.epochs[0])
    assert_same_weights(weights_of(trainer.model), remember.epochs[-1])


@pytest.mark.filterwarnings("ignore:.* is NaN")  # which is what they watch
@pytest.mark.parametrize("losses", [[NAN, NAN], [NAN]])
def test_a_best_model_saved_by_another_run_is_not_loaded(scripted, path, losses):
    scripted([1], [SaveBestModelCallback(path)], model=make_model(seed=9)).run()
    before = path.read_bytes()
    remember = RememberWeights()
    trainer = scripted(losses, [SaveBestModelCallback(path), remember])
    trainer.run()
    assert path.read_bytes() == before
    assert_same_weights(weights_of(trainer.model), remember.epochs[-1])


def test_the_best_model_is_loaded_after_an_early_stop(scripted, path):
    remember = RememberWeights()
    callbacks = [EarlyStoppingCallback(early_stopping_patience=2), SaveBestModelCallback(path), remember]
    trainer = scripted([3, 1, 2, 2, 2], callbacks)
    trainer.run()
    assert len(remember.epochs) == 4
    assert_same_weights(weights_of(trainer.model), remember.epochs[1])


@pytest.mark.parametrize("num_epochs_before", [1, 2, 3])
def test_a_resumed_run_remembers_the_best_model(scripted, path, tmp_path, num_epochs_before):
    losses = [3, 1, 2, 2]
    remember = RememberWeights()
    uninterrupted = scripted(losses, [SaveBestModelCallback(path), remember])
    uninterrupted.run()

    path.unlink()
    state = tmp_path / "state"

    def save_state(trainer, **_):
        if trainer.progress.num_epochs_completed + 1 == num_epochs_before:
            trainer.save_training_state(state)

    scripted(
        losses, [SaveBestModelCallback(path, load_saved_checkpoint=False), Probe(on_training_run_epoch_end=save_state)]
    ).run(num_epochs=num_epochs_before)
    save = SaveBestModelCallback(path)
    resumed = scripted(losses, [save])
    resumed.run(resume_from=state)
    assert (save.best_metric, save.best_metric_epoch) == (1, 2)
    assert_same_weights(weights_of(resumed.model), weights_of(uninterrupted.model))


def test_the_best_model_is_not_loaded_after_an_error(scripted, path):
    def fail(trainer, **_):
        if trainer.run_history.current_epoch == 3:
            raise ValueError("mine")

    remember = RememberWeights()
    trainer = scripted([1, 2, 3], [SaveBestModelCallback(path), remember, Probe(on_train_epoch_start=fail)])
    with pytest.raises(ValueError, match="mine"):
        trainer.run()
    assert_same_weights(weights_of(trainer.model), remember.epochs[-1])


def add_group(trainer, **_):
    """Train another layer from the second epoch on."""
    if trainer.run_history.current_epoch == 2:
        trainer.optimizer.add_param_group({"params": list(trainer.get_model()[0].parameters()), "lr": 0.01})


@pytest.mark.filterwarnings("ignore:The optimizer does not hold")
@pytest.mark.parametrize("create_scheduler_fn", [None, CosineLrScheduler.create_scheduler_fn()], ids=["", "schedule"])
def test_the_best_model_is_loaded_although_the_optimizer_has_another_group_since(path, create_scheduler_fn, capsys):
    torch.manual_seed(1)
    remember = RememberWeights()
    score = Probe(on_train_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("score", len(states)))
    states = remember.epochs
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1, momentum=0.9)
    best = SaveBestModelCallback(path, watch_metric="score")
    callbacks = [Probe(on_train_epoch_start=add_group), score, best, remember]
    trainer = Trainer(model, torch.nn.functional.mse_loss, optimizer, callbacks=callbacks, seed=0)
    trainer.train(make_dataset(8), 3, create_scheduler_fn=create_scheduler_fn)
    assert best.best_metric_epoch == 1
    assert_same_weights(weights_of(model), states[0])
    assert len(trainer.optimizer.param_groups) == 2
    assert "Only the model is loaded, because optimizer or scheduler have changed since: The checkpoint" in (
        capsys.readouterr().out
    )


def test_the_best_model_is_loaded_although_the_scheduler_is_another_one_since(scripted, path):
    def exchange(trainer, **_):
        if trainer.run_history.current_epoch == 2:
            trainer.scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.9)

    remember = RememberWeights()
    trainer = scripted([1, 2, 3], [Probe(on_train_epoch_start=exchange), SaveBestModelCallback(path), remember])
    trainer.run(create_scheduler_fn=partial(StepLR, step_size=2, gamma=0.5))
    assert_same_weights(weights_of(trainer.model), remember.epochs[0])
    assert isinstance(trainer.scheduler, torch.optim.lr_scheduler.ExponentialLR)
    assert trainer.scheduler.gamma == 0.9


def replace_optimizer(trainer):
    trainer.optimizer = torch.optim.Adam(trainer.get_model().parameters())


def remove_group(trainer):
    del trainer.optimizer.param_groups[0]


def move_to_another_group(trainer):
    first, second = trainer.optimizer.param_groups
    second["params"].append(first["params"].pop())


def refuse_states(trainer):
    def fail(state):
        raise KeyError("mine")

    trainer.optimizer.load_state_dict = fail


def freeze_and_drop(trainer):
    trainer.get_model()[0].requires_grad_(False)
    remove_group(trainer)


@pytest.mark.parametrize(
    "change", [replace_optimizer, remove_group, move_to_another_group, refuse_states, freeze_and_drop]
)
def test_the_best_model_is_loaded_whatever_has_become_of_the_optimizer(path, change, capsys):
    torch.manual_seed(1)
    states = RememberWeights()
    score = Probe(on_train_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("score", 1))
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    optimizer = torch.optim.SGD([{"params": list(layer.parameters())} for layer in model], lr=0.1, momentum=0.9)
    callbacks = [score, SaveBestModelCallback(path, watch_metric="score"), states]
    callbacks.insert(0, Probe(on_train_epoch_start=lambda t, **_: t.run_history.current_epoch == 2 and change(t)))
    Trainer(model, torch.nn.functional.mse_loss, optimizer, callbacks=callbacks, seed=0).train(make_dataset(8), 3)
    assert_same_weights(weights_of(model), states.epochs[0])
    assert "Only the model is loaded" in capsys.readouterr().out


@pytest.mark.parametrize("is_unfrozen", [False, True])
def test_the_best_model_without_its_frozen_parameters_is_loaded_or_what_is_lacking_is_told(path, is_unfrozen):
    """A parameter that was unfrozen after the best epoch is not in the file."""
    torch.manual_seed(1)
    states = RememberWeights()
    score = Probe(on_train_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("score", 1))
    model = torch.nn.Sequential(torch.nn.Linear(3, 3).requires_grad_(False), torch.nn.Linear(3, 1))
    best = SaveBestModelCallback(path, watch_metric="score", trainable_only=True)

    def unfreeze(trainer, **_):
        if is_unfrozen and trainer.run_history.current_epoch == 2:
            trainer.get_model()[0].requires_grad_(True)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callbacks = [Probe(on_train_epoch_start=unfreeze), score, best, states]
    trainer = Trainer(model, torch.nn.functional.mse_loss, optimizer, callbacks=callbacks, seed=0)
    with pytest.warns(UserWarning, match=r"unfrozen since") if is_unfrozen else nullcontext():
        trainer.train(make_dataset(8), 3)
    assert list(torch.load(path, weights_only=True)["model_state_dict"]) == ["1.weight", "1.bias"]
    assert torch.equal(model[1].weight, states.epochs[0]["1.weight"])
    assert torch.equal(model[0].weight, states.epochs[0]["0.weight"]) != is_unfrozen


# --- paths -------------------------------------------------------------------------------------------------------


class GoAway(TrainerCallback):
    """Changes the current folder in the second epoch, as some launchers and loggers do."""

    def __init__(self, folder):
        folder.mkdir()
        self.folder = folder

    def on_train_epoch_end(self, trainer, **kwargs):
        if trainer.run_history.current_epoch == 2:
            os.chdir(self.folder)


KINDS_OF_FILES = {
    "best model": lambda path: SaveBestModelCallback(path),
    "average": lambda path: ModelEmaCallback(save_path=path),
    "states": lambda path: SaveTrainingStateCallback(path, save_every_n_epochs=1),
    "states in the background": lambda path: SaveTrainingStateCallback(path, save_every_n_epochs=1, in_background=True),
    "rotated states": lambda path: SaveTrainingStateCallback(path, save_every_n_epochs=1, max_checkpoints=1),
}


def save_with(make, path, callbacks=(), **kwargs):
    trainer = make_trainer(callbacks=[*callbacks, make(path)], seed=0)
    train(trainer, eval_dataset=make_dataset(4), **kwargs)
    return trainer


@pytest.mark.parametrize("kind", KINDS_OF_FILES)
@pytest.mark.parametrize("as_path", [str, Path])
def test_a_relative_path_means_the_folder_in_which_it_was_given(tmp_path, monkeypatch, kind, as_path):
    monkeypatch.chdir(tmp_path)
    save_with(KINDS_OF_FILES[kind], as_path("a/b"), [GoAway(tmp_path / "away")])
    assert Path.cwd() == tmp_path / "away"
    assert list((tmp_path / "away").iterdir()) == []
    saved = tmp_path / "a" / "b"
    if "states" not in kind:
        assert torch.load(saved, weights_only=True)["epoch"] in (1, 2, 3)
        return
    expected = ["final"] if kind == "rotated states" else ["epoch_1", "epoch_2", "epoch_3", "final"]
    assert states_in(saved) == expected
    monkeypatch.chdir(tmp_path)
    resumed = save_with(KINDS_OF_FILES[kind], as_path("a/b"), num_epochs=4, resume_from="latest")
    assert resumed.progress.num_updates == 12


def test_a_background_save_is_written_where_it_was_meant_when_it_was_started(tmp_path, monkeypatch):
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer()
    trainer.save_training_state("state", in_background=True)
    monkeypatch.chdir(tmp_path / "away")
    trainer.wait_for_training_state()
    assert (tmp_path / "state" / "manifest.json").is_file()
    assert list((tmp_path / "away").iterdir()) == []


@pytest.mark.parametrize("kind", KINDS_OF_FILES)
def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, kind):
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    save_with(KINDS_OF_FILES[kind], "~/a/b")
    assert (tmp_path / "home" / "a" / "b").exists()
    assert list((tmp_path / "work").iterdir()) == []
    if "states" in kind:
        resumed = save_with(KINDS_OF_FILES[kind], "~/a/b", num_epochs=4, resume_from="~/a/b/final")
        resumed.load_training_state("~/a/b/final")
        assert save_with(KINDS_OF_FILES[kind], "~/a/b", num_epochs=4, resume_from="latest").progress.num_updates == 12
    else:
        make_trainer().load_checkpoint("~/a/b")


@pytest.mark.parametrize("kind", KINDS_OF_FILES)
@pytest.mark.parametrize("path", ["s3://bucket/a", Path("gs://bucket/a"), "m" * 256, "~nobody-of-this-name/a"])
def test_a_path_that_is_not_meant_or_not_possible_is_refused_before_training(tmp_path, monkeypatch, kind, path):
    monkeypatch.chdir(tmp_path)
    recorder = EventRecorder()
    with pytest.raises((ValueError, CheckpointError), match=r"s3://|gs://|too long|nobody"):
        save_with(KINDS_OF_FILES[kind], path, [recorder])
    assert "on_train_step_start" not in recorder.log
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS_OF_FILES)
def test_the_longest_name_works(tmp_path, kind):
    for _ in range(2):
        save_with(KINDS_OF_FILES[kind], tmp_path / ("m" * 255))
    assert [path.name for path in tmp_path.iterdir()] == ["m" * 255]


NOT_UTF_8 = os.fsdecode(b"caf\xe9")


@pytest.mark.filterwarnings("ignore:.*but not these entries")  # of the optimizer
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("kind", KINDS_OF_FILES)
def test_names_that_are_not_utf_8_work(tmp_path, kind, name, capsys):
    """Both that of the folder and that of the file."""
    path = tmp_path / NOT_UTF_8 / f"{NOT_UTF_8}{name}"
    save_with(KINDS_OF_FILES[kind], path)
    if "states" in kind:
        resumed = save_with(KINDS_OF_FILES[kind], path, num_epochs=4, resume_from="latest")
        assert resumed.progress.num_updates == 12
        assert (
            save_with(KINDS_OF_FILES[kind], path, num_epochs=5, resume_from=path / "final").progress.num_updates == 15
        )
    else:
        other = make_model()
        other.more = torch.nn.Linear(1, 1)
        loaded = make_trainer(model=other).load_checkpoint(path, strict=False)  # which prints what is missing
        assert loaded["epoch"] in (1, 2, 3)
    capsys.readouterr().out.encode()


@pytest.mark.parametrize("address", ["s3://bucket/a", Path("s3://bucket/a")])
def test_the_trainer_saves_to_no_remote_store(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer()
    for save in (trainer.save_checkpoint, trainer.save_training_state, trainer.load_checkpoint):
        with pytest.raises(ValueError, match=r"'s3://.*not the path of a local file"):
            save(address)
    with pytest.raises(ValueError, match="not the path of a local file"):
        train(trainer, resume_from=address)
    assert list(tmp_path.iterdir()) == []


# --- links to states ---------------------------------------------------------------------------------------------


def move_elsewhere(state, folder):
    """Move a state to another disk, and put a link in its place."""
    folder.mkdir(exist_ok=True)
    state.rename(folder / state.name)
    state.symlink_to(folder / state.name)


@pytest.mark.parametrize("in_background", [False, True])
def test_states_that_are_links_are_saved_over_and_what_they_point_to_stays_valid(tmp_path, in_background):
    def run(num_epochs, **kwargs):
        save = SaveTrainingStateCallback(
            tmp_path / "states", save_every_n_steps=1, max_checkpoints=2, in_background=in_background
        )
        return train(make_trainer(callbacks=[save]), num_epochs=num_epochs, **kwargs)

    run(1)
    for name in ("final", "step_3"):
        move_elsewhere(tmp_path / "states" / name, tmp_path / "elsewhere")
    for num_epochs in (2, 3, 4):
        assert run(num_epochs, resume_from="latest").progress.num_updates == 3 * num_epochs
        names = [f"step_{3 * num_epochs}", "final"]
        assert sorted(states_in(tmp_path / "states")) == sorted(names)
        assert verify_state(tmp_path / "states" / "final").position.num_updates == 3 * num_epochs
    moved = {name: verify_state(tmp_path / "elsewhere" / name).position.num_updates for name in ("final", "step_3")}
    assert moved == {"final": 3, "step_3": 3}


def test_a_linked_state_that_is_the_best_is_kept(tmp_path):
    def run(num_epochs, scores, **kwargs):
        record = Probe(
            on_train_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("score", scores.pop(0))
        )
        save = SaveTrainingStateCallback(
            tmp_path / "states", save_every_n_epochs=1, max_checkpoints=1, keep_best=1, watch_metric="score"
        )
        train(make_trainer(callbacks=[record, save]), num_epochs=num_epochs, **kwargs)

    run(1, [1.0])
    move_elsewhere(tmp_path / "states" / "epoch_1", tmp_path / "elsewhere")
    run(3, [2.0, 3.0], resume_from="latest")
    assert states_in(tmp_path / "states") == ["epoch_1", "final"]
    run(4, [0.5], resume_from="latest")
    assert states_in(tmp_path / "states") == ["epoch_4", "final"]
    assert verify_state(tmp_path / "elsewhere" / "epoch_1").position.num_updates == 3


def test_a_folder_of_states_that_is_a_link_is_one_folder(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    train(make_trainer(callbacks=[SaveTrainingStateCallback(tmp_path / "link", save_every_n_epochs=1)]))
    assert states_in(tmp_path / "elsewhere") == ["epoch_1", "epoch_2", "epoch_3", "final"]
    resumed = make_trainer(callbacks=[SaveTrainingStateCallback(tmp_path / "elsewhere")])
    train(resumed, num_epochs=4, resume_from="latest")
    assert verify_state(tmp_path / "link" / "final").position.num_updates == 12


# --- training states: which, and how many ------------------------------------------------------------------------


def states_in(folder):
    """The names of the state folders, ``final`` last."""
    names = (path.name for path in Path(folder).iterdir() if path.name != ".lock")
    return sorted(names, key=lambda name: (name == "final", name))


train = partial(_support.train, dataset=12, num_epochs=3)  # three steps per epoch


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param({}, ["final"], id="the end by default"),
        pytest.param({"save_at_end": False}, [], id="nothing"),
        pytest.param({"save_every_n_epochs": 1}, ["epoch_1", "epoch_2", "epoch_3", "final"], id="each epoch"),
        pytest.param({"save_every_n_epochs": 2}, ["epoch_2", "final"], id="every other epoch"),
        pytest.param({"save_every_n_steps": 4, "save_at_end": False}, ["step_4", "step_8"], id="steps, across epochs"),
        pytest.param(
            {"save_every_n_epochs": 3, "save_every_n_steps": 4}, ["epoch_3", "step_4", "step_8", "final"], id="both"
        ),
    ],
)
def test_states_are_saved_at_the_requested_epochs_and_steps(tmp_path, settings, expected):
    train(make_trainer(callbacks=[SaveTrainingStateCallback(tmp_path / "states", **settings)]))
    assert states_in(tmp_path / "states") == expected


def test_states_are_saved_to_training_states_in_the_working_directory_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(make_trainer(callbacks=[SaveTrainingStateCallback()]))
    assert (tmp_path / "training_states" / "final" / "manifest.json").is_file()


@pytest.mark.parametrize("max_checkpoints", [1, 2, 3, 20])
@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"save_every_n_epochs": 1}, [f"epoch_{number}" for number in range(1, 5)]),
        ({"save_every_n_steps": 2}, [f"step_{number}" for number in range(2, 13, 2)]),
        ({"save_every_n_epochs": 2, "save_every_n_steps": 5}, ["step_5", "epoch_2", "step_10", "epoch_4"]),
    ],
    ids=["epochs", "steps", "both"],
)
def test_exactly_the_newest_states_are_kept_at_any_time(tmp_path, settings, names, max_checkpoints):
    """Checked after each save. The final state counts like the others."""
    seen = []

    class Watched(Trainer):
        def save_training_state(self, output_dir, checkpoint_kwargs=None):
            super().save_training_state(output_dir, checkpoint_kwargs)
            seen.append((Path(output_dir).name, set(states_in(tmp_path))))

    def look(trainer, **_):
        if seen and len(seen[-1]) == 2:
            seen[-1] = (*seen[-1], set(states_in(tmp_path)))

    save = SaveTrainingStateCallback(tmp_path, max_checkpoints=max_checkpoints, **settings)
    look_after = Probe(on_train_step_end=look, on_train_epoch_end=look, on_training_run_end=look)
    look_after.is_called_last = True
    train(make_trainer(cls=Watched, callbacks=[save, look_after]), num_epochs=4)
    names = [*names, "final"]
    assert [name for name, *_ in seen] == names
    for count, (name, before_deleting, after_deleting) in enumerate(seen, start=1):
        newest = set(names[max(0, count - max_checkpoints) : count])
        assert after_deleting == newest
        oldest = {names[count - max_checkpoints - 1]} if count > max_checkpoints else set()
        assert before_deleting == newest | oldest, f"{name}: the old state is deleted only once the new one is complete"


def test_rotation_does_not_delete_other_folders(tmp_path):
    (tmp_path / "epoch_0").mkdir()
    (tmp_path / "notes").mkdir()
    train(make_trainer(callbacks=[SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1, max_checkpoints=1)]))
    assert states_in(tmp_path) == ["epoch_0", "notes", "final"]


def test_a_resumed_run_continues_the_rotation(tmp_path):
    settings = {"save_every_n_epochs": 1, "max_checkpoints": 2, "save_at_end": False}
    train(make_trainer(callbacks=[SaveTrainingStateCallback(tmp_path, **settings)]))
    assert states_in(tmp_path) == ["epoch_2", "epoch_3"]
    resumed = make_trainer(callbacks=[SaveTrainingStateCallback(tmp_path, **settings)])
    train(resumed, num_epochs=4, resume_from=tmp_path / "epoch_3")
    assert states_in(tmp_path) == ["epoch_3", "epoch_4"]


def test_a_resumed_run_continues_the_step_count(tmp_path):
    callback = partial(SaveTrainingStateCallback, tmp_path, save_every_n_steps=4, save_at_end=False)
    train(make_trainer(callbacks=[callback()]), num_epochs=2)
    resumed = make_trainer(callbacks=[callback()])
    train(resumed, resume_from=tmp_path / "step_4")
    assert states_in(tmp_path) == ["step_4", "step_8"]


def test_each_run_counts_its_steps_from_zero(tmp_path):
    trainer = make_trainer(callbacks=[SaveTrainingStateCallback(tmp_path, save_every_n_steps=2, save_at_end=False)])
    train(trainer, num_epochs=1)
    train(trainer, num_epochs=1)
    assert states_in(tmp_path) == ["step_2"]


def test_a_second_run_overwrites_states_of_the_same_name(tmp_path):
    save = SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1, max_checkpoints=2, save_at_end=False)
    trainer = make_trainer(callbacks=[save])
    train(trainer)
    train(trainer, num_epochs=2)
    assert {"epoch_1", "epoch_2"} <= set(states_in(tmp_path))
    resumed = train(make_trainer(), num_epochs=2, resume_from=tmp_path / "epoch_2")
    assert_same_weights(weights_of(resumed.model), weights_of(trainer.model))


@pytest.mark.parametrize(
    "name", ["save_every_n_epochs", "save_every_n_steps", "save_every_n_updates", "max_checkpoints", "keep_best"]
)
@pytest.mark.parametrize(("number", "error"), IMPOSSIBLE_COUNTS)
def test_impossible_numbers_are_rejected(name, number, error):
    with pytest.raises(error, match=f"`{name}` is {number}.* Expected a whole number of .*, at least 1"):
        SaveTrainingStateCallback(**{name: number})


# --- training states: signals ------------------------------------------------------------------------------------


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def sender(number=signal.SIGTERM, which=1):
    """A reaction that sends a real signal to this process in the n-th call."""
    num_calls = itertools.count(1)

    def react(trainer, **kwargs):
        if next(num_calls) == which:
            os.kill(os.getpid(), number)

    return react


def end_of(run, *arguments, **kwargs):
    """Run, and return the exception that ended it, if any."""
    try:
        run(*arguments, **kwargs)
    except (KeyboardInterrupt, SystemExit) as end:
        return end
    return None


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_saves_a_state_of_the_current_step_and_no_final_one(tmp_path, capsys, number):
    probe = Probe(on_backward_start=sender(number, which=5))
    trainer = make_trainer(callbacks=[SaveTrainingStateCallback(tmp_path), probe])
    end = end_of(train, trainer)
    assert end.code == 128 + number if number != signal.SIGINT else isinstance(end, KeyboardInterrupt)
    assert states_in(tmp_path) == ["step_5"]
    path = str(tmp_path / "step_5")
    assert capsys.readouterr().out.splitlines() == [
        *["", f"Stopping: {trainer.stop_reason}", f"Saved training state to {path}"],
        f"To resume: train(..., resume_from={path!r})",
    ]


def test_the_state_of_an_interrupted_run_is_rotated_like_the_others(tmp_path):
    save = SaveTrainingStateCallback(tmp_path, save_every_n_steps=2, max_checkpoints=2)
    assert end_of(train, make_trainer(callbacks=[save, Probe(on_train_step_end=sender(which=7))])) is not None
    assert states_in(tmp_path) == ["step_6", "step_7"]
    resumed = make_trainer(callbacks=[SaveTrainingStateCallback(tmp_path, save_every_n_steps=2, max_checkpoints=2)])
    train(resumed, resume_from=tmp_path / "step_7")
    assert states_in(tmp_path) == ["step_8", "final"]


@pytest.mark.parametrize(("which", "saved"), [(4, ["step_2", "step_4"]), (5, ["step_2", "step_4", "step_5"])])
def test_a_signal_does_not_save_the_same_position_twice(tmp_path, capsys, which, saved):
    class Watched(Trainer):
        def save_training_state(self, output_dir, checkpoint_kwargs=None):
            super().save_training_state(output_dir, checkpoint_kwargs)
            names.append(Path(output_dir).name)

    names = []
    save = SaveTrainingStateCallback(tmp_path, save_every_n_steps=2)
    trainer = make_trainer(cls=Watched, callbacks=[save, Probe(on_train_step_end=sender(which=which))])
    assert end_of(train, trainer) is not None
    assert names == saved
    assert saved[-1] in capsys.readouterr().out


def test_an_interrupted_run_saves_its_state_even_if_an_earlier_run_saved_that_position(tmp_path):
    """A state that an earlier run saved at the same position is another state."""
    save = SaveTrainingStateCallback(tmp_path)
    for _ in range(2):
        trainer = make_trainer(callbacks=[save, Probe(on_train_step_end=sender())])
        assert end_of(train, trainer) is not None
        assert states_in(tmp_path) == ["step_1"]
        (tmp_path / "step_1").rename(tmp_path.with_name(f"{tmp_path.name}-{id(trainer)}"))


def test_a_signal_after_the_last_step_still_saves_the_final_state(tmp_path):
    save = SaveTrainingStateCallback(tmp_path)
    trainer = make_trainer(callbacks=[save, Probe(on_training_run_end=sender())])
    assert end_of(train, trainer).code == 128 + signal.SIGTERM
    assert states_in(tmp_path) == ["final"]


def test_a_run_stopped_by_a_callback_saves_the_final_state(tmp_path):
    def stop(trainer, **_):
        raise StopTrainingError("enough")

    train(make_trainer(callbacks=[SaveTrainingStateCallback(tmp_path), Probe(on_train_step_end=stop)]))
    assert states_in(tmp_path) == ["final"]


def test_no_signal_is_handled_and_no_state_saved_if_save_on_preemption_is_false(tmp_path):
    before = [signal.getsignal(number) for number in SIGNALS[1:]]
    seen = []
    look = Probe(on_train_step_start=lambda trainer, **kwargs: seen.append([signal.getsignal(n) for n in SIGNALS[1:]]))
    save = SaveTrainingStateCallback(tmp_path, save_on_preemption=False)
    trainer = make_trainer(callbacks=[save, look, Probe(on_train_step_end=sender(signal.SIGINT))])
    assert isinstance(end_of(train, trainer), KeyboardInterrupt)
    assert seen == [before]
    assert states_in(tmp_path) == []


def test_the_state_of_an_interrupted_run_includes_what_other_callbacks_did_on_the_stop(tmp_path):
    class Counter(TrainerCallback):
        num_stops = 0

        def on_stop_training_error(self, trainer, **kwargs):
            self.num_stops += 1

        def state_dict(self):
            return {"num_stops": self.num_stops}

        def load_state_dict(self, state_dict):
            self.num_stops = state_dict["num_stops"]

    save = SaveTrainingStateCallback(tmp_path)
    assert end_of(train, make_trainer(callbacks=[save, Counter(), Probe(on_train_step_end=sender())])) is not None
    counter = Counter()
    train(make_trainer(callbacks=[counter]), resume_from=tmp_path / "step_1")
    assert counter.num_stops == 1


# --- training states: resume -------------------------------------------------------------------------------------


class NoisyTrainer(Trainer):
    """Also draws random numbers in the step, and returns a metric."""

    def calculate_train_batch_loss(self, batch):
        inputs, targets = batch
        output = super().calculate_train_batch_loss((inputs + 0.1 * torch.randn_like(inputs), targets))
        return {**output, "metrics": {"error": (output["model_outputs"] - targets).abs().mean()}}


def make_noisy_trainer(save_dir, saves=True):
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    save = SaveTrainingStateCallback(save_dir, save_every_n_epochs=1, save_every_n_steps=1)
    return NoisyTrainer(
        model,
        nn.functional.mse_loss,
        torch.optim.AdamW(model.parameters(), lr=0.05),
        callbacks=[
            StepBasedEvaluationCallback(2),
            ModelEmaCallback(decay=0.8, save_path=save_dir / "ema.pt"),
            SaveBestModelCallback(save_dir / "best.pt"),
            EarlyStoppingCallback(early_stopping_patience=10),
            *([save] if saves else []),
        ],
    )


def train_noisily(trainer, **kwargs):
    trainer.train(
        make_dataset(18),  # five steps and three updates per epoch, the last batch short
        num_epochs=3,
        eval_dataset=make_dataset(7, seed=5),
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_clip_value=0.5,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1),
        **kwargs,
    )


def results_of(trainer):
    history = trainer.run_history
    return {
        "history": {name: history.get_metric_values(name) for name in history.get_metric_names()},
        "epoch": history.current_epoch,
        "num_updates": trainer.progress.num_updates,
        "lr": trainer.optimizer.param_groups[0]["lr"],
        "stop_reason": trainer.stop_reason,
    }


def assert_same_end(resumed, uninterrupted):
    """Weights, optimizer state and history are bit-identical."""
    assert results_of(resumed) == results_of(uninterrupted)
    assert_same_weights(weights_of(resumed.model), weights_of(uninterrupted.model))
    states = (trainer.optimizer.state_dict()["state"].values() for trainer in (resumed, uninterrupted))
    for left, right in zip(*states, strict=True):
        assert_same_weights(left, right)


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory):
    """An uninterrupted run, and all states that it saved."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = make_noisy_trainer(folder)
    train_noisily(trainer)
    return trainer, folder


# Updates come after steps 2, 4 and 5 of each epoch, so some states are from the middle of an accumulation window.
STATES = [*(f"step_{number}" for number in range(1, 16)), "epoch_1", "epoch_2", "epoch_3", "final"]


@pytest.mark.parametrize("state", STATES)
def test_a_run_resumed_from_any_state_ends_identical_to_an_uninterrupted_one(uninterrupted_run, tmp_path, state):
    """Weights, optimizer and history are bit-identical, for states in and at the end of a window and of an epoch."""
    uninterrupted, folder = uninterrupted_run
    for name in ("best.pt", "ema.pt"):  # the files that the interrupted run had saved
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    resumed = make_noisy_trainer(tmp_path, saves=False)
    torch.manual_seed(1234)
    train_noisily(resumed, resume_from=folder / state)
    assert_same_end(resumed, uninterrupted)


# --- training states: resume after a signal ----------------------------------------------------------------------


def make_busy_trainer(save_dir, callbacks=()):
    """A trainer with many stateful parts: two evaluation datasets, intermediate evaluations, and an averaged model."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    return NoisyTrainer(
        model,
        nn.functional.mse_loss,
        torch.optim.AdamW(model.parameters(), lr=0.05),
        callbacks=[
            PreemptionCallback(),  # the saving callback is called last, at the start of the run too
            SaveTrainingStateCallback(save_dir),
            StepBasedEvaluationCallback(2),
            ModelEmaCallback(decay=0.8, save_path=save_dir / "ema.pt", watch_metric="b_ema_model_eval_loss_epoch"),
            SaveBestModelCallback(save_dir / "best.pt", watch_metric="b_eval_loss_epoch"),
            EarlyStoppingCallback(early_stopping_patience=2, watch_metric="a_eval_loss_epoch"),
            *callbacks,
        ],
    )


def train_busily(trainer, **kwargs):
    trainer.train(
        make_dataset(18),  # five steps and three updates per epoch, the last batch short
        num_epochs=3,
        eval_dataset={"a": make_dataset(7, seed=5), "b": make_dataset(6, seed=6)},
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1),
        **kwargs,
    )


@pytest.fixture(
    scope="module", params=[None, 8, 6], ids=["complete epochs", "cut off mid-epoch", "limit at the end of an epoch"]
)
def busy_run(request, tmp_path_factory):
    """An uninterrupted run, its limit of updates, and the number of its steps."""
    trainer = make_busy_trainer(tmp_path_factory.mktemp("busy"))
    train_busily(trainer, max_num_train_steps=request.param)
    return trainer, request.param, {None: 15, 8: 14, 6: 10}[request.param]


# By event, the calls of it in which the signal arrives. An epoch has five steps. Its evaluations have two steps each,
# first on `a`, then on `b`; after each of them the average is evaluated.
INTERRUPTED_IN = {
    "on_training_run_start": [1],
    "on_train_epoch_start": [1, 2],
    "on_train_step_start": [1, 4, 5, 7],
    "on_backward_start": [2, 8],
    "on_optimizer_step_end": [1, 5],
    "on_train_step_end": [1, 2, 5, 8, "last"],
    "on_train_epoch_end": [1, 2],
    "on_eval_epoch_start": [1, 2, 3, 4, 5],
    "on_eval_step_start": [1, 3, 5, 6, 7, 8, 10],
    "on_eval_step_end": [1, 4, 6, 7, 8, 12],
    "on_eval_epoch_end": [1, 3, 4, 7],
}


@pytest.mark.parametrize(
    ("event", "which"), [(event, which) for event, calls in INTERRUPTED_IN.items() for which in calls]
)
def test_a_run_interrupted_anywhere_and_resumed_ends_identical_to_an_uninterrupted_one(
    busy_run, tmp_path, event, which
):
    """Including mid-window, between training and evaluation, between two evaluations, and in the last step."""
    uninterrupted, max_num_train_steps, num_steps = busy_run
    send = sender(which=num_steps if which == "last" else which)
    interrupted = make_busy_trainer(tmp_path, [Probe(**{event: send})])
    end = end_of(train_busily, interrupted, max_num_train_steps=max_num_train_steps)
    assert end.code == 128 + signal.SIGTERM
    (state,) = tmp_path.glob("step_*")
    resumed = make_busy_trainer(tmp_path)
    torch.manual_seed(1234)
    train_busily(resumed, resume_from=state, max_num_train_steps=max_num_train_steps)
    assert_same_end(resumed, uninterrupted)
    averages = [trainer.callback_handler.callbacks[3].ema_model for trainer in (resumed, uninterrupted)]
    assert_same_weights(*map(weights_of, averages))


def test_resuming_a_finished_run_trains_no_further(uninterrupted_run, tmp_path):
    _, folder = uninterrupted_run
    recorder = EventRecorder()
    resumed = make_noisy_trainer(tmp_path, saves=False)
    (tmp_path / "best.pt").write_bytes((folder / "best.pt").read_bytes())
    resumed.callback_handler.add_callback(recorder)
    train_noisily(resumed, resume_from=folder / "final")
    assert set(recorder.log) == {"on_training_run_start", "on_training_run_end"}


@pytest.mark.parametrize("is_first", [False, True])
def test_the_position_of_the_saving_callback_in_the_list_does_not_matter(scripted, tmp_path, is_first):
    losses = [1, 2, 3, 4, 5]

    def make_callbacks(save_dir):
        save = SaveTrainingStateCallback(save_dir, save_every_n_epochs=1)
        others = [SaveBestModelCallback(tmp_path / "best.pt"), EarlyStoppingCallback(early_stopping_patience=3)]
        return [save, *others] if is_first else [*others, save]

    uninterrupted = scripted(losses, make_callbacks(tmp_path / "uninterrupted"))
    uninterrupted.run()
    resumed = scripted(losses, make_callbacks(tmp_path / "resumed"))
    resumed.run(resume_from=tmp_path / "uninterrupted" / "epoch_1")
    assert resumed.stop_reason == uninterrupted.stop_reason == "eval_loss_epoch has not improved on 1.0 for 3 epochs"
    assert_same_weights(weights_of(resumed.model), weights_of(uninterrupted.model))


def test_resuming_a_run_that_stopped_early_trains_no_further(scripted, tmp_path):
    def make_callbacks(save_dir):
        return [EarlyStoppingCallback(early_stopping_patience=2), SaveTrainingStateCallback(tmp_path / save_dir)]

    losses = [1, 2, 3, 4, 5]
    scripted(losses, make_callbacks("uninterrupted")).run()
    resumed = scripted(losses, make_callbacks("resumed"))
    resumed.run(resume_from=tmp_path / "uninterrupted" / "final")
    assert resumed.run_history.current_epoch - 1 == 3


def test_a_run_that_stopped_early_continues_from_an_earlier_state(scripted, tmp_path):
    save = SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1)
    scripted([1, 2, 3, 4, 5], [EarlyStoppingCallback(early_stopping_patience=2), save]).run()
    resumed = scripted([1, 2, 3, 4, 5], [])
    resumed.run(resume_from=tmp_path / "epoch_2")
    assert resumed.run_history.current_epoch - 1 == 5


def test_resuming_without_the_saved_best_model_is_an_error(scripted, path, tmp_path):
    save_state = SaveTrainingStateCallback(tmp_path / "states", save_every_n_epochs=1)
    scripted([1, 2, 3], [SaveBestModelCallback(path), save_state]).run()
    path.unlink()
    resumed = scripted([1, 2, 3], [SaveBestModelCallback(path)])
    with pytest.raises(FileNotFoundError, match=r"best\.pt"):
        resumed.run(resume_from=tmp_path / "states" / "epoch_2")  # saved after the first best model
    assert resumed.run_history.current_epoch - 1 == 1
