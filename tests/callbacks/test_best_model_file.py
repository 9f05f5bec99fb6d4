"""The file of the best model belongs to the run and the epoch that are told, or it is not loaded as this run's."""

from __future__ import annotations

import shutil
from contextlib import nullcontext

import pytest
import torch

from _support import Probe, assert_same_weights, make_model, weights_of
from pytorch_accelerated.callbacks import ModelEmaCallback, SaveBestModelCallback, SaveTrainingStateCallback

WITH_EACH_SUFFIX = pytest.mark.parametrize("story", [".pt", ".safetensors"], indirect=True)
FIRST_LINE = [4, 2, 3, 1]
"""The losses of the run that is abandoned: best in epoch 2, then in epoch 4."""

KINDS = {
    "best model": lambda path: SaveBestModelCallback(path, save_optimizer=False, save_scheduler=False),
    "not loaded": lambda path: SaveBestModelCallback(path, save_optimizer=False, load_saved_checkpoint=False),
    "average": lambda path: ModelEmaCallback(save_path=path),
}
OTHER_MODEL = "is not the best model that this run saved"


class KilledError(BaseException):
    """Ends a run where a signal would have killed the process."""


class Story:
    """Runs with one path for the best model and one folder of states, one after the other."""

    def __init__(self, scripted, folder, capsys, kind="best model", suffix=".pt"):
        self.scripted, self.folder, self.capsys, self.kind = scripted, folder, capsys, kind
        self.path = folder / f"best{suffix}"
        self.epochs, self.printed = [], ""

    def run(self, losses, resume_from=None, probes=(), seed=2, **kwargs):
        """Train with these evaluation losses, and return the trainer."""
        remember = Probe(on_train_epoch_end=lambda trainer, **_: self.epochs.append(weights_of(trainer.get_model())))
        states = SaveTrainingStateCallback(
            self.folder / "states", save_every_n_epochs=1, keep_best=9, max_checkpoints=9
        )
        self.best = KINDS[self.kind](self.path)
        trainer = self.scripted(losses, [self.best, *probes, remember, states], model=make_model(seed=seed), seed=0)
        if isinstance(resume_from, int):
            resume_from = self.folder / "states" / f"epoch_{resume_from}"
        self.epochs = []
        try:
            trainer.run(resume_from=resume_from, **kwargs)
        finally:
            self.printed = self.capsys.readouterr().out
        return trainer

    def entries(self, path=None):
        """Return epoch and loss in a file."""
        if self.path.suffix == ".pt":
            file = torch.load(path or self.path, weights_only=True)
        else:
            file = self.scripted([1]).load_checkpoint(path or self.path)
        return file["epoch"], next(value for name, value in file.items() if name.endswith("loss_epoch"))

    def files(self):
        """Return the names of the files next to that of the best model, with it."""
        return sorted(path.name for path in self.folder.iterdir() if path.name != "states")


@pytest.fixture
def story(request, scripted, tmp_path, capsys):
    return Story(scripted, tmp_path, capsys, suffix=getattr(request, "param", ".pt"))


# --- after going back to an earlier state ------------------------------------------------------------------------


@pytest.mark.parametrize("state", [2, 3])
def test_the_best_model_of_an_abandoned_run_is_not_loaded_if_the_new_one_has_none_that_is_better(story, state):
    story.run(FIRST_LINE)
    with pytest.warns(
        UserWarning, match=rf"best.*{OTHER_MODEL} \(epoch 2, .* 2.0\).*\(epoch 4.*1.0.*keeps the weights"
    ):
        trainer = story.run([4, 2, 8, 9], resume_from=state)
    assert_same_weights(weights_of(trainer.model), story.epochs[-1])
    assert "Loading the best model" not in story.printed
    assert OTHER_MODEL in story.printed.partition("Saved training state")[0], "it is told when the run starts"
    assert story.entries() == (4, 1)
    assert story.files() == [story.path.name]


@WITH_EACH_SUFFIX
@pytest.mark.parametrize("state", [1, 2])
def test_the_best_model_of_an_abandoned_run_is_kept_when_that_of_the_new_one_replaces_it(story, state):
    """In state 1, which is saved after the first evaluation, the best is that of epoch 1."""
    story.run(FIRST_LINE)
    trainer = story.run([4, 2, 1.5, 1.75, 1.75], resume_from=state)
    assert (story.best.best_metric_epoch, story.best.best_metric) == (3, 1.5)
    assert story.entries() == (3, 1.5)
    assert_same_weights(weights_of(trainer.model), story.epochs[2 - state])
    kept = story.path.with_name(f"best.previous{story.path.suffix}")
    assert story.entries(kept) == (4, 1)
    assert str(kept) in story.printed
    assert story.files() == sorted([story.path.name, kept.name])


def test_only_the_best_model_of_the_last_abandoned_run_is_kept(story):
    story.run(FIRST_LINE)
    story.run([4, 2, 1.5], resume_from=2)
    story.run([4, 2, 9, 1.25], resume_from=2)
    kept = story.path.with_name(f"best.previous{story.path.suffix}")
    assert (story.entries(), story.entries(kept)) == ((4, 1.25), (3, 1.5))


@WITH_EACH_SUFFIX
@pytest.mark.parametrize("state", [1, 2, 4])
def test_a_run_that_only_repeats_what_was_done_keeps_nothing_and_ends_with_the_same_model(story, state):
    expected = weights_of(story.run(FIRST_LINE).model)
    before = story.path.read_bytes()
    trainer = story.run(FIRST_LINE, resume_from=state)
    assert_same_weights(weights_of(trainer.model), expected)
    assert "Loading the best model: eval_loss_epoch 1.0 in epoch 4" in story.printed
    assert story.path.read_bytes() == before
    assert story.files() == [story.path.name]


@pytest.mark.parametrize("kill_epoch", [1, 2, 4])
def test_a_run_that_is_killed_before_it_saves_a_state_with_its_best_model_resumes_to_the_same(story, kill_epoch):
    """A model that an earlier run had abandoned, and that was kept, is still there."""

    def kill(trainer, **_):
        if trainer.run_history.current_epoch == kill_epoch:
            raise KilledError

    expected = weights_of(story.run(FIRST_LINE).model)
    shutil.rmtree(story.folder / "states")
    kept = story.path.with_name(f"best.previous{story.path.suffix}")
    shutil.copy(story.path, kept)
    with pytest.raises(KilledError):
        story.run(FIRST_LINE, probes=[Probe(on_training_run_epoch_end=kill)])
    assert story.entries()[0] == kill_epoch
    trainer = story.run(FIRST_LINE, resume_from="latest")
    assert_same_weights(weights_of(trainer.model), expected)
    assert story.entries() == story.entries(kept) == (4, 1)
    assert story.files() == sorted([story.path.name, kept.name])


@pytest.mark.parametrize("kind", ["not loaded", "average"])
def test_a_file_that_no_run_loads_is_told_of_and_kept_as_well(scripted, tmp_path, capsys, kind):
    story = Story(scripted, tmp_path, capsys, kind)
    story.run(FIRST_LINE)
    story.run([4, 2, 8, 9], resume_from=2)
    assert story.printed.count(OTHER_MODEL) == 2, "at the start of the run, and at its end"
    assert story.entries()[0] == 4
    story.run([4, 2, 1.5], resume_from=2)
    assert (story.entries()[0], story.entries(tmp_path / "best.previous.pt")[0]) == (3, 4)


# --- files of other runs -----------------------------------------------------------------------------------------


def test_a_run_from_scratch_replaces_the_file_of_another(story):
    story.run([1, 2], seed=9)
    story.run([3, 2, 4])
    assert story.entries() == (2, 2)
    assert story.files() == [story.path.name]
    assert OTHER_MODEL not in story.printed


def save_as_0_1_61(path):
    """Without a checksum, under the same epoch and loss."""
    state = make_model(seed=7).state_dict()
    torch.save({"model_state_dict": state, "epoch": 2, "eval_loss_epoch": torch.tensor(2.0)}, path)


@pytest.mark.parametrize("when", ["before the run is resumed", "during the run"])
@pytest.mark.parametrize("origin", ["another run", "0.1.61"])
def test_a_file_that_something_else_has_put_there_is_not_loaded(scripted, tmp_path, capsys, when, origin):
    """Although it has the same epoch and the same loss."""
    elsewhere = tmp_path / "elsewhere"
    if origin == "0.1.61":
        save_as_0_1_61(elsewhere)
    else:
        scripted([3, 2], [SaveBestModelCallback(elsewhere, save_optimizer=False)], model=make_model(seed=7)).run()

    def exchange(trainer, **_):
        if when == "during the run" and trainer.run_history.current_epoch == 3:
            shutil.copy(elsewhere, story.path)

    story = Story(scripted, tmp_path, capsys)
    story.run([3, 2])
    if when != "during the run":
        shutil.copy(elsewhere, story.path)
    with pytest.warns(UserWarning, match=OTHER_MODEL):
        trainer = story.run([3, 2, 4], resume_from=2, probes=[Probe(on_train_epoch_end=exchange)])
    assert_same_weights(weights_of(trainer.model), story.epochs[-1])
    assert story.path.read_bytes() == elsewhere.read_bytes()


@pytest.mark.parametrize("is_own", [True, False])
def test_with_a_state_of_an_earlier_version_epoch_and_value_decide(scripted, tmp_path, capsys, monkeypatch, is_own):
    """It does not know which file it belongs to."""
    state_of = SaveBestModelCallback.state_dict

    def without(self):
        return {name: value for name, value in state_of(self).items() if name != "saved_file"}

    story = Story(scripted, tmp_path, capsys)
    with monkeypatch.context() as patch:
        patch.setattr(SaveBestModelCallback, "state_dict", without)
        story.run([4, 2, 3, 5] if is_own else FIRST_LINE)
    with nullcontext() if is_own else pytest.warns(UserWarning, match=OTHER_MODEL):
        story.run([4, 2, 3, 5], resume_from=3)
    assert ("Loading the best model: eval_loss_epoch 2.0 in epoch 2" in story.printed) == is_own


def test_what_cannot_be_kept_is_told_and_the_run_goes_on(scripted, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    story = Story(scripted, tmp_path, capsys)
    story.run(FIRST_LINE)
    monkeypatch.setattr("os.link", fail)
    monkeypatch.setattr("shutil.copy2", fail)
    with pytest.warns(UserWarning, match="could not be kept.*No space"):
        story.run([4, 2, 1.5], resume_from=2)
    assert story.entries() == (3, 1.5)
    assert story.files() == ["best.pt"]


def test_without_links_the_file_is_copied(scripted, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    story = Story(scripted, tmp_path, capsys)
    story.run(FIRST_LINE)
    monkeypatch.setattr("os.link", fail)
    story.run([4, 2, 1.5], resume_from=2)
    assert (story.entries(), story.entries(tmp_path / "best.previous.pt")) == ((3, 1.5), (4, 1))
