"""One training state: its contents, how it is written, read and restored, and the rejection of what does not fit."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import _golden
from _saved import (
    assert_equal,
    bytes_in,
    everything_in,
    make_state_trainer,
    make_up_state,
    names_in,
    rewrite_manifest,
    train,
)
from _support import (
    Batches,
    Probe,
    Samples,
    Stream,
    assert_same_weights,
    make_dataset,
    make_model,
    make_trainer,
    weights_of,
)
from pytorch_accelerated import Trainer
from pytorch_accelerated._accumulation import AccumulationWindow
from pytorch_accelerated._checkpoint import companions, parts, reading
from pytorch_accelerated._checkpoint.manifest import read_manifest
from pytorch_accelerated._means import EpochMeans, LossTracker
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    SaveTrainingStateCallback,
    TrainerCallback,
    get_default_callbacks,
)
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.progress import TrainingProgress
from pytorch_accelerated.schedulers import CosineLrScheduler
from pytorch_accelerated.tracking import InMemoryRunHistory

GOLDEN_STATE = Path(__file__).parents[1] / "golden_states" / "training_state_format_1.tar.xz"


def saving_after(num_updates, path, **kwargs):
    """A callback that saves one state after a number of updates."""

    def save(trainer, **_):
        if trainer.progress.num_updates == num_updates and not path.exists():
            trainer.save_training_state(path, **kwargs)

    return Probe(on_train_step_end=save)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """A state from the middle of the second epoch."""
    path = tmp_path_factory.mktemp("states") / "state"
    train(make_state_trainer([saving_after(4, path)]), eval_dataset=make_dataset(8))
    return path


# --- contents ----------------------------------------------------------------------------------------------------


def test_the_manifest_has_the_position_and_the_metrics_of_the_run(state):
    saved = read_manifest(state)
    assert saved.position == TrainingProgress(
        num_epochs_completed=1,
        num_batches_in_epoch=2,
        num_batches_in_earlier_epochs=5,
        num_updates=4,
        num_samples=26,
        phase="training",
    )
    assert set(saved.metrics) == {"train_loss_epoch", "eval_loss_epoch"}
    assert all(isinstance(value, float) for value in saved.metrics.values())
    assert (saved.generation, saved.number, saved.num_processes) == (0, 0, 1)
    assert names_in(state) == sorted([*saved.files, "manifest.json"])


def test_metrics_that_are_not_finite_numbers_are_saved_as_text(tmp_path):
    trainer = make_trainer()
    trainer.run_history.update_metric("nan", float("nan"))
    trainer.run_history.update_metric("tensor", torch.tensor(0.5))
    trainer.run_history.update_metric("words", ["a", "b"])
    trainer.save_training_state(tmp_path / "state")
    assert read_manifest(tmp_path / "state").metrics == {"nan": "nan", "tensor": 0.5, "words": "['a', 'b']"}


def test_a_state_saved_after_an_epoch_resumes_at_the_next(tmp_path):
    save = Probe(on_training_run_epoch_end=lambda trainer, **_: trainer.save_training_state(tmp_path / "state"))
    train(make_state_trainer([save]), num_epochs=1)
    position = read_manifest(tmp_path / "state").position
    assert (position.num_epochs_completed, position.num_batches_in_epoch, position.phase) == (1, 0, "training")


def test_only_parts_with_a_state_dict_are_saved_and_restored():
    class Part:
        value = 1

        def state_dict(self):
            return {"value": self.value}

        def load_state_dict(self, state):
            self.value = state["value"]

    part, other = Part(), Part()
    part.value = 5
    states = parts.state_dicts_of({"one": part, "none": None, "number": 3})
    assert states == {"one": {"value": 5}}
    parts.load_state_dicts({"one": other, "none": None, "absent": Part()}, {**states, "none": {}})
    assert other.value == 5


@pytest.mark.parametrize(
    "value", [lambda: None, argparse.Namespace(), np.array([{}])], ids=["function", "namespace", "array of objects"]
)
def test_saving_what_could_not_be_read_back_raises_and_keeps_the_old_state(tmp_path, value):
    trainer = make_state_trainer()
    trainer.save_training_state(tmp_path / "state", {"number": 1})
    with pytest.raises(CheckpointError):
        trainer.save_training_state(tmp_path / "state", {"mine": value})
    assert names_in(tmp_path) == ["state"]
    assert trainer.load_training_state(tmp_path / "state")["number"] == 1


def test_an_optimizer_state_that_could_not_be_read_back_is_rejected_when_it_is_saved(tmp_path):
    """Rather than when the run is resumed."""
    trainer = make_state_trainer()
    trainer.optimizer.param_groups[0]["mine"] = argparse.Namespace()
    with pytest.raises(
        CheckpointError, match=r"A value of type `Namespace` cannot be saved safely \(at optimizer state.*\['mine'\]\)"
    ):
        trainer.save_training_state(tmp_path / "state")
    assert names_in(tmp_path) == []


# --- writing -----------------------------------------------------------------------------------------------------


def test_a_new_state_replaces_the_old_one(tmp_path):
    trainer = make_state_trainer()
    trainer.save_training_state(tmp_path / "a" / "state", {"number": 1})
    (tmp_path / "a" / "state" / "stray").touch()
    trainer.save_training_state(tmp_path / "a" / "state", {"number": 2})
    assert trainer.load_training_state(tmp_path / "a" / "state") == {"current_epoch": 1, "number": 2}
    assert names_in(tmp_path / "a") == ["state"]
    assert "stray" not in names_in(tmp_path / "a" / "state")


def parts_of(model):
    """The parts of a trainer that has only a model."""
    return parts.Parts(
        model=model,
        optimizer=None,
        scheduler=None,
        progress=TrainingProgress(),
        run_history=InMemoryRunHistory(),
        callbacks=None,
        means=EpochMeans(),
        window=AccumulationWindow(),
        stream=None,
        order=None,
        run_seed=0,
        seed=0,
        run_number=0,
        stop_reason=None,
        settings={},
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_no_tensor_that_was_read_is_still_mapped_to_its_file(tmp_path):
    """The files may be deleted, even on a file server, while the run continues."""
    trainer = make_state_trainer()
    trainer.save_training_state(tmp_path / "state")
    saved = read_manifest(tmp_path / "state")
    contents = reading.read_state(saved, Accelerator(), parts_of(trainer.model))
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    for name in saved.files:
        os.truncate(tmp_path / "state" / name, 0)
    assert_same_weights(contents.weights, trainer.model.state_dict())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_all_files_are_fsynced_before_the_rename_and_the_rename_before_the_old_state_is_deleted(tmp_path, monkeypatch):
    """Otherwise a power loss could lose both states."""
    trainer = make_state_trainer()
    trainer.save_training_state(tmp_path / "state")
    log = []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def record(event, path):
        if Path(path).exists():
            log.append((event, Path(path).relative_to(tmp_path).as_posix()))

    monkeypatch.setattr(os, "fsync", lambda fd: (record("flush", Path(f"/proc/self/fd/{fd}").readlink()), fsync(fd)))
    monkeypatch.setattr(Path, "rename", lambda path, target: (record("rename", path), rename(path, target)))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **kwargs: (record("delete", path), rmtree(path, **kwargs)))
    trainer.save_training_state(tmp_path / "state")
    files = [f".state.tmp/{name}" for name in names_in(tmp_path / "state")]
    assert sorted(log[: len(files)]) == sorted(("flush", name) for name in files)
    assert log[len(files) :] == [
        ("flush", ".state.tmp"),
        ("rename", "state"),
        ("rename", ".state.tmp"),
        ("flush", "."),
        ("delete", ".state.old"),
    ]


@pytest.mark.usefixtures("_full_disk")
@pytest.mark.parametrize("is_replacing", [True, False])
def test_a_full_disk_keeps_the_old_state_and_leaves_nothing_behind(tmp_path, is_replacing):
    if is_replacing:
        make_up_state(tmp_path / "state")
    with pytest.raises(CheckpointError, match=r"'.*state' could not be written: .*No space.*unchanged.*free space"):
        make_state_trainer().save_training_state(tmp_path / "state")
    assert names_in(tmp_path) == (["state"] if is_replacing else [])


@pytest.mark.parametrize("fraction", [0.005, 0.05, 0.3, 0.95])
def test_a_limit_on_the_file_size_raises_an_error_that_names_path_and_reason(tmp_path, fraction):
    """The limit also reaches writers that are not Python; each fraction stops a different file."""
    trainer = make_state_trainer()
    trainer.save_training_state(tmp_path / "state", {"number": 1})
    before = bytes_in(tmp_path)
    limit = int(fraction * max(len(content) for content in before.values()))
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, previous[1]))
    try:
        with pytest.raises(CheckpointError, match=r"state' could not be written: (?s:.*)unchanged") as caught:
            trainer.save_training_state(tmp_path / "state", {"number": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
    if fraction < 0.05:
        assert "File too large" in str(caught.value)
    assert bytes_in(tmp_path) == before
    assert trainer.load_training_state(tmp_path / "state")["number"] == 1


def test_an_interruption_keeps_the_old_state_and_leaves_nothing_behind(tmp_path, monkeypatch):
    """Such as a second Ctrl-C."""
    trainer = make_state_trainer()
    trainer.save_training_state(tmp_path / "state", {"number": 1})

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_training_state(tmp_path / "state", {"number": 2})
    monkeypatch.undo()
    assert names_in(tmp_path) == ["state"]
    assert trainer.load_training_state(tmp_path / "state")["number"] == 1


def test_a_failed_rename_keeps_the_old_state(tmp_path, monkeypatch):
    trainer = make_state_trainer()
    trainer.save_training_state(tmp_path / "state", {"number": 1})
    rename = Path.rename

    def fail(self, target):
        if self.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(CheckpointError, match="unchanged"):
        trainer.save_training_state(tmp_path / "state", {"number": 2})
    monkeypatch.undo()
    assert names_in(tmp_path) == ["state"]
    assert trainer.load_training_state(tmp_path / "state")["number"] == 1


@pytest.mark.parametrize("leftover", [".state.tmp", ".state.old"])
def test_leftovers_of_an_interrupted_save_are_removed(tmp_path, leftover):
    trainer = make_state_trainer()
    trainer.save_training_state(tmp_path / "state")
    (tmp_path / leftover).mkdir()
    (tmp_path / leftover / "stray").touch()
    trainer.save_training_state(tmp_path / "state")
    assert names_in(tmp_path) == ["state"]
    assert "stray" not in names_in(tmp_path / "state")


def test_a_state_whose_replacement_was_interrupted_can_be_loaded(state, tmp_path):
    shutil.copytree(state, tmp_path / ".state.old")
    make_state_trainer().load_training_state(tmp_path / "state")
    assert names_in(tmp_path) == ["state"]


@pytest.mark.usefixtures("_fresh_accelerate_state")
def test_automatic_checkpoint_naming_of_the_accelerator_has_no_effect(tmp_path):
    from accelerate.utils import ProjectConfiguration

    configuration = ProjectConfiguration(project_dir=str(tmp_path / "project"), automatic_checkpoint_naming=True)
    trainer = make_state_trainer(accelerator={"project_config": configuration})
    trainer.save_training_state(tmp_path / "state")
    assert "model.pt" in names_in(tmp_path / "state")
    assert configuration.automatic_checkpoint_naming
    assert not (tmp_path / "project" / "checkpoints").exists()


def test_saving_and_loading_do_not_unregister_what_the_user_prepared(tmp_path):
    accelerator = Accelerator()
    other = accelerator.prepare(make_model())
    trainer = make_trainer(accelerator=accelerator)
    trainer.train(make_dataset(4), num_epochs=1)
    trainer.save_training_state(tmp_path / "state")
    trainer.load_training_state(tmp_path / "state")
    assert accelerator._models == [other]


# --- reading and restoring---------------------------------------------------------------------------------------


def test_a_state_restores_model_optimizer_history_and_generators(tmp_path):
    first = make_state_trainer()
    train(first, num_epochs=1)
    first.save_training_state(tmp_path / "state")
    expected, drawn = everything_in(first), torch.rand(2)
    other = make_state_trainer(seed=9)
    other.optimizer.param_groups[0]["lr"] = 0.5
    other.load_training_state(tmp_path / "state")
    assert_equal(everything_in(other), expected)
    assert torch.equal(torch.rand(2), drawn)


@pytest.mark.filterwarnings("ignore:`gradient_accumulation_steps` is")
def test_a_state_of_a_compiled_model_loads_into_the_plain_one_mid_window(tmp_path):
    model = torch.compile(make_model(), backend="eager")
    trainer = make_trainer(model)
    save = Probe(on_train_step_end=lambda trainer, **_: trainer.save_training_state(tmp_path / "state"))
    trainer.callback_handler.add_callback(save)
    trainer.train(make_dataset(4), num_epochs=1, per_device_batch_size=4, gradient_accumulation_steps=2)
    other = make_trainer(make_model(seed=8))
    other.load_training_state(tmp_path / "state")
    assert torch.equal(other.model.weight, model.weight)


def test_gradients_of_a_compiled_model_load_into_the_plain_one():
    model, plain = torch.compile(make_model(), backend="eager"), make_model()
    model(torch.ones(1, 3)).sum().backward()
    companions.load_gradients(plain, companions.gradients_of(model))
    assert torch.equal(plain.weight.grad, model.weight.grad)


def test_shared_weights_stay_shared(tmp_path):
    def tied(seed):
        model = nn.Sequential(make_model(seed=seed), nn.Linear(1, 3), make_model(seed=seed + 1))
        model[2].weight = model[0].weight
        return make_trainer(model)

    trainer, other = tied(1), tied(5)
    trainer.save_training_state(tmp_path / "state")
    other.load_training_state(tmp_path / "state")
    assert_same_weights(weights_of(trainer.model), weights_of(other.model))
    assert other.model[2].weight is other.model[0].weight


def with_scaler(scale):
    """Return a trainer and its accelerator, whose scaler works without the device that mixed precision needs."""
    accelerator = Accelerator()
    accelerator.scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    return make_state_trainer(accelerator=accelerator), accelerator


@pytest.mark.parametrize(("saved", "present", "expected"), [(64.0, 2.0, 64.0), (None, 2.0, 2.0), (64.0, None, None)])
def test_the_gradient_scaler_is_restored_if_there_is_one(tmp_path, saved, present, expected):
    with_scaler(saved)[0].save_training_state(tmp_path / "state")
    trainer, accelerator = with_scaler(present)
    trainer.load_training_state(tmp_path / "state")
    scaler = accelerator.scaler
    assert (None if scaler is None else scaler.get_scale()) == expected


def test_a_run_history_without_state_dict_is_skipped(tmp_path):
    class Plain(InMemoryRunHistory):
        state_dict = load_state_dict = property()

    trainer = make_trainer(run_history=Plain())
    trainer.save_training_state(tmp_path / "state")
    trainer.load_training_state(tmp_path / "state")


class Numbered(IterableDataset):
    """A stream that can store its position, and that records the numbers of the samples that were read."""

    def __init__(self, num_samples=18):
        self.samples = make_dataset(num_samples)
        self.next, self.read = 0, []

    def __iter__(self):
        while self.next < len(self.samples):
            self.next += 1
            self.read.append(self.next - 1)
            yield self.samples[self.next - 1]
        self.next = 0

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [
        (2, [*range(8, 18), *range(18)]),
        (3, [*range(12, 18), *range(18)]),
        (5, [*range(18), *range(18)]),
        (6, [*range(4, 18)]),
    ],
)
def test_a_stream_with_state_dict_resumes_without_reading_earlier_samples(tmp_path, num_steps, expected):
    """After the fifth step, whose batch is a short one, the position is unknown, so batches are skipped instead."""
    seen = []

    def save(trainer, **_):
        seen.append(1)
        if len(seen) == num_steps:
            trainer.save_training_state(tmp_path / "state")

    uninterrupted = make_state_trainer([Probe(on_train_step_end=save)])
    train(uninterrupted, Numbered(), num_epochs=2, gradient_accumulation_steps=1)
    resumed, stream = make_state_trainer(seed=9), Numbered()
    train(resumed, stream, num_epochs=2, gradient_accumulation_steps=1, resume_from=tmp_path / "state")
    assert stream.read == expected
    assert_equal(everything_in(resumed), everything_in(uninterrupted))


@pytest.mark.parametrize("event", ["on_train_epoch_end", "on_training_run_epoch_end"])
def test_a_stream_with_state_dict_resumes_after_an_epoch(tmp_path, event):
    def save(trainer, **_):
        if trainer.run_history.current_epoch == 1:
            trainer.save_training_state(tmp_path / "state")

    uninterrupted = make_state_trainer([Probe(**{event: save})])
    train(uninterrupted, Numbered(), num_epochs=2)
    resumed, stream = make_state_trainer(seed=9), Numbered()
    stream.next = 7  # overwritten by the state
    train(resumed, stream, num_epochs=2, resume_from=tmp_path / "state")
    assert stream.read == list(range(18))
    assert_equal(everything_in(resumed), everything_in(uninterrupted))


def test_batches_are_skipped_if_the_stream_no_longer_has_state_dict(tmp_path):
    save = saving_after(2, tmp_path / "state")
    uninterrupted = make_state_trainer([save])
    train(uninterrupted, Numbered(), num_epochs=1, gradient_accumulation_steps=1)
    resumed = make_state_trainer(seed=9)
    with pytest.warns(UserWarning, match="dataset: 'Numbered' -> 'Stream'"):
        train(
            resumed,
            Stream(make_dataset(18)),
            num_epochs=1,
            gradient_accumulation_steps=1,
            resume_from=tmp_path / "state",
        )
    assert_equal(everything_in(resumed), everything_in(uninterrupted))


def test_loading_a_missing_state_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no training state '.*nothing'.*`save_training_state`"):
        make_trainer().load_training_state(tmp_path / "nothing")


def test_loading_a_folder_of_states_explains_the_mistake(state):
    with pytest.raises(
        CheckpointError, match=r"is a folder of training states, not a training state.*state'.*\"latest\""
    ):
        make_trainer().load_training_state(state.parent)


def test_loading_a_folder_without_states_raises(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a complete training state: it has no readable manifest.json"):
        make_trainer().load_training_state(tmp_path)


# --- rejecting ---------------------------------------------------------------------------------------------------


def assert_rejected(trainer, path, message, is_only_resumed=False, **kwargs):
    """Assert that `load_training_state` and `train` reject a state and change nothing."""
    trainer.run_history.update_metric("mine", 1.0)
    before = everything_in(trainer)
    if not is_only_resumed:
        with pytest.raises(CheckpointError, match=message):
            trainer.load_training_state(path, **kwargs)
        assert_equal(everything_in(trainer), before)
    with pytest.raises(CheckpointError, match=message):
        train(trainer, resume_from=path, **kwargs)
    assert_equal(everything_in(trainer), before)


def with_model(model):
    return Trainer(model, nn.functional.mse_loss, torch.optim.AdamW(model.parameters(), lr=0.01), callbacks=())


def test_the_state_of_another_model_is_rejected_and_changes_nothing(state):
    assert_rejected(
        with_model(make_model()), state, r"a different model.*missing from it: bias, weight; unexpected in it: 0\.b"
    )


def test_the_state_of_another_optimizer_is_rejected_and_changes_nothing(state):
    trainer = make_state_trainer()
    groups = [{"params": layer.parameters()} for layer in (trainer.model[0], trainer.model[2])]
    trainer.optimizer = torch.optim.AdamW(groups, lr=0.01)
    assert_rejected(trainer, state, r"a different optimizer: its groups have \[4\] parameters instead of \[2, 2\]")


class Remembering(TrainerCallback):
    """Has a state in an attribute, in a list and in an object."""

    def __init__(self):
        self.number, self.numbers, self.tracker = 1, [1], LossTracker()

    def state_dict(self):
        return {"number": self.number, "tracker": self.tracker.state_dict()}

    def load_state_dict(self, state):
        self.number = state["number"]
        self.numbers.append(self.number)
        self.tracker.load_state_dict(state["tracker"])

    def content(self):
        return self.number, list(self.numbers), self.tracker.average


class Refusing(Remembering):
    """Changes something, and then refuses its state."""

    def load_state_dict(self, state):
        super().load_state_dict(state)
        torch.rand(1)
        raise LookupError("not with me")


class PlainHistory(InMemoryRunHistory):
    """Cannot be saved."""

    state_dict = load_state_dict = property()


@pytest.mark.parametrize("history", [InMemoryRunHistory, PlainHistory])
def test_a_callback_that_refuses_its_state_leaves_everything_as_it_was(tmp_path, history):
    saved = make_state_trainer([Remembering(), Refusing(), SaveTrainingStateCallback(tmp_path)])
    saved.callback_handler.callbacks[0].number = 5
    train(saved, num_epochs=1)
    trainer = make_state_trainer(
        [Remembering(), Refusing(), SaveTrainingStateCallback(tmp_path)], seed=8, run_history=history()
    )
    contents = [callback.content() for callback in trainer.callback_handler.callbacks[:2]]
    message = r"does not fit this run. The callback `Refusing` could not load its state \(LookupError: not with me\)"
    assert_rejected(trainer, tmp_path / "final", message)
    assert_rejected(trainer, "latest", message, is_only_resumed=True)
    assert repr([callback.content() for callback in trainer.callback_handler.callbacks[:2]]) == repr(contents)
    train(trainer)
    assert_rejected(trainer, tmp_path / "final", message)


def test_a_rejected_state_does_not_change_what_the_trainer_carries_along(tmp_path):
    class Carrying(Trainer):
        def __init__(self, refuses):
            torch.manual_seed(3)
            model = make_model()
            super().__init__(model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1), callbacks=())
            self.network = nn.Linear(2, 2)
            self.second = torch.optim.Adam(self.network.parameters())
            self.generator = torch.Generator().manual_seed(4)
            self.metric = Refusing() if refuses else Remembering()

        def content(self):
            self.network(torch.ones(1, 2)).sum().backward()
            weights = {name: value.clone() for name, value in self.network.state_dict().items()}
            return {**weights, "generator": self.generator.get_state(), "second": str(self.second.state_dict())}

    saved = Carrying(refuses=False)
    saved.content()
    saved.second.step()
    torch.rand(5, generator=saved.generator)
    saved.save_training_state(tmp_path / "state")
    trainer = Carrying(refuses=True)
    before = trainer.content()
    with pytest.raises(CheckpointError, match="does not fit what the trainer carries along: LookupError"):
        trainer.load_training_state(tmp_path / "state")
    assert_equal(trainer.content(), before)
    assert trainer.metric.number == 1


def test_what_a_trainer_saves_after_a_rejected_state_has_its_own_settings(tmp_path, state):
    """Those of the run before, not of the run that did not take place."""
    trainer = make_state_trainer()
    train(trainer, num_epochs=1)
    trainer.save_training_state(tmp_path / "before")
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    with pytest.raises(CheckpointError, match="its class is 'AdamW' instead of 'SGD'"):
        train(trainer, resume_from=state, gradient_clip_norm=5.0)
    trainer.save_training_state(tmp_path / "after")
    before, after = (read_manifest(tmp_path / name) for name in ("before", "after"))
    assert (after.settings, after.position) == (before.settings, before.position)


def test_the_gradients_of_a_trainer_survive_a_rejected_state(tmp_path, state):
    path = tmp_path / "state"
    shutil.copytree(state, path)
    torch.save({"something": "else"}, path / "trainer_state.pt")
    rewrite_manifest(path)
    trainer = make_state_trainer()
    trainer.model(torch.ones(2, 3)).sum().backward()
    gradients = companions.gradients_of(trainer.model)
    assert gradients
    with pytest.raises(CheckpointError, match="has unexpected contents"):
        train(trainer, resume_from=path)
    with pytest.raises(ZeroDivisionError):
        train(trainer, resume_from=state, create_scheduler_fn=lambda optimizer: 1 / 0)
    assert_equal(companions.gradients_of(trainer.model), gradients)


def test_a_state_of_another_number_of_processes_is_rejected_unless_that_is_allowed(tmp_path, state):
    path = tmp_path / "state"
    shutil.copytree(state, path)
    shutil.copy(path / "process_0.pt", path / "process_1.pt")
    rewrite_manifest(path, num_processes=2)
    message = (
        r"num_processes=2, but this run has num_processes=1.*Start 2 processes, or pass `allow_other_num_processes"
    )
    assert_rejected(make_state_trainer(seed=8), path, message)
    make_state_trainer().load_training_state(path, allow_other_num_processes=True)


@pytest.mark.parametrize("name", ["trainer_state.pt", "process_0.pt", "optimizer.pt"])
def test_files_with_unexpected_contents_are_rejected_and_change_nothing(tmp_path, state, name):
    """Although their checksums match."""
    path = tmp_path / "state"
    shutil.copytree(state, path)
    torch.save({"something": "else"}, path / name)
    rewrite_manifest(path)
    assert_rejected(make_state_trainer(seed=8), path, r"has unexpected contents.*Nothing was loaded")


def test_a_run_can_be_started_again_after_its_state_was_rejected(state):
    trainer, other = make_state_trainer(), make_state_trainer()
    with pytest.raises(FileNotFoundError):
        train(trainer, resume_from=state / "nothing")
    torch.manual_seed(4)
    make_state_trainer()
    train(trainer)
    torch.manual_seed(4)
    make_state_trainer()
    train(other)
    assert_same_weights(weights_of(trainer.model), weights_of(other.model))


def test_the_default_callbacks_tolerate_a_rejected_state(state):
    trainer = make_state_trainer(get_default_callbacks())
    with pytest.raises(FileNotFoundError):
        train(trainer, resume_from=state / "nothing")
    trainer.load_training_state(state)


# --- earlier formats ---------------------------------------------------------------------------------------------


@pytest.fixture
def golden(tmp_path):
    """A state in format 1, saved after the eighth step: mid-epoch in the second epoch, and mid-window."""
    _golden.unpack(GOLDEN_STATE, tmp_path)
    return tmp_path / "step_8"


def train_as_golden(trainer, **kwargs):
    create_scheduler_fn = CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1)
    train(trainer, eval_dataset=make_dataset(8, seed=5), create_scheduler_fn=create_scheduler_fn, **kwargs)


def test_a_state_of_format_1_resumes_exactly(golden):
    uninterrupted = make_state_trainer([EarlyStoppingCallback(early_stopping_patience=5)])
    train_as_golden(uninterrupted)
    resumed = make_state_trainer(
        [EarlyStoppingCallback(early_stopping_patience=5), SaveTrainingStateCallback(golden.parent)], seed=9
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # older versions saved it
        train_as_golden(resumed, resume_from="latest")
    resumed.progress.num_batches_in_earlier_epochs += 5  # of the first epoch, which the state does not know
    assert resumed.progress == uninterrupted.progress
    assert resumed.callback_handler.callbacks[1].state_dict() == {"num_steps": 15}
    if not _golden.draws_same_numbers():
        pytest.skip("the rest of the run draws other numbers with this PyTorch")
    torch.testing.assert_close(weights_of(resumed.model), weights_of(uninterrupted.model))
    for name in ("train_loss_epoch", "eval_loss_epoch"):
        values = (trainer.run_history.get_metric_values(name) for trainer in (resumed, uninterrupted))
        assert next(values) == pytest.approx(next(values))


def test_a_state_of_format_1_has_position_and_metrics(golden):
    saved = read_manifest(golden)
    assert (saved.format_version, saved.generation, saved.settings) == (1, 0, {})
    assert (saved.position.num_epochs_completed, saved.position.num_batches_in_epoch) == (1, 3)
    assert saved.metrics == {"train_loss_epoch": pytest.approx(3.73359), "eval_loss_epoch": pytest.approx(1.87388)}


def test_damage_to_a_state_of_format_1_is_detected(golden):
    contents = {name: content for name, content in bytes_in(golden).items() if name != "manifest.json"}
    for name, content in contents.items():
        (golden / name).write_bytes(content[:100])
        assert_rejected(make_state_trainer(), golden, f"is damaged: {name} is missing or altered")
        (golden / name).write_bytes(content)
    manifest = json.loads((golden / "manifest.json").read_text())
    (golden / "manifest.json").write_text(json.dumps({**manifest, "format_version": 0}))
    assert_rejected(make_state_trainer(), golden, "no readable manifest")


# --- how the data resumes ----------------------------------------------------------------------------------------


def batches_of(dataset):
    return list(DataLoader(dataset, batch_size=2))


@pytest.mark.parametrize(
    ("make_data", "printed"),
    [
        (lambda dataset: dataset, "exactly"),
        (Samples, "exactly"),
        (lambda dataset: Numbered(), "exactly"),
        (Stream, "read again"),
        (lambda dataset: Batches(dataset, 2), "read again"),
        (lambda dataset: iter(batches_of(dataset)), "iterator"),
    ],
)
def test_a_resumed_run_prints_how_exactly_the_data_resumes(tmp_path, capsys, make_data, printed):
    dataset = make_dataset(8)

    def run(**kwargs):
        save = Probe(on_train_step_end=lambda trainer, step, **_: step == 2 and trainer.save_training_state(path))
        path = tmp_path / "state"
        trainer = make_trainer(callbacks=[save])
        settings = {"num_epochs": 1, "per_device_batch_size": 2, **kwargs}
        trainer.train(make_data(dataset), **settings, train_dataloader_kwargs={"num_workers": 0})
        return weights_of(trainer.model)

    uninterrupted = run()
    assert "Resuming" not in capsys.readouterr().out
    assert_equal(run(resume_from=tmp_path / "state"), uninterrupted)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Resuming epoch")]
    assert line.startswith("Resuming epoch 1 after batch 3. ")
    assert printed in line
