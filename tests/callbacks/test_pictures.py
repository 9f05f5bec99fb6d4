"""The callback that keeps a picture of the learning curves up to date."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace

import pytest

from _support import Probe, make_dataset, make_trainer, raiser, train
from pytorch_accelerated._views import run_of
from pytorch_accelerated.callbacks import LearningCurveCallback, pictures

pytest.importorskip("matplotlib", reason="plots need the extra `plots`")


class Drawn(list):
    """Stands for the function that draws: notes the lengths of the curves, and draws nothing."""

    def __call__(self, history, metrics, **kwargs):
        self.append(len(history.get_metric_values("eval_loss_epoch")))
        return self

    def savefig(self, path, **kwargs):
        path.write_bytes(b"picture")


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn instead of pictures."""
    monkeypatch.setattr(pictures, "plot_learning_curves", drawn := Drawn())
    return drawn


def run(*callbacks, num_epochs=3):
    return train(make_trainer(callbacks=callbacks), num_epochs=num_epochs, eval_dataset=make_dataset(4))


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture_is_in_the_format_of_its_suffix(tmp_path, suffix):
    path = tmp_path / "new" / f"curves{suffix}"
    run(LearningCurveCallback(path, log_scale=True), num_epochs=1)
    assert path.read_bytes()[:5] == {".png": b"\x89PNG\r", ".svg": b"<?xml"}[suffix]
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_it_is_drawn_after_each_epoch_if_there_is_time_and_at_the_end(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(pictures, "_SHARE_OF_TIME", float("inf"))
    run(LearningCurveCallback(tmp_path / "curves.png"))
    assert drawn == [1, 2, 3, 3]
    monkeypatch.setattr(pictures, "_SHARE_OF_TIME", 1e-9)
    drawn.clear()
    run(LearningCurveCallback(tmp_path / "curves.png"))
    assert drawn == [1, 3]


def test_it_is_drawn_when_a_run_fails(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(pictures, "_SHARE_OF_TIME", 1e-9)  # so that it would not be drawn again

    def fail_in_third_epoch(trainer, **kwargs):
        if trainer.run_history.current_epoch == 3:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run(LearningCurveCallback(tmp_path / "curves.png"), Probe(on_train_epoch_start=fail_in_third_epoch))
    assert drawn == [1, 2]


def test_a_run_that_fails_before_anything_is_recorded_draws_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="broken"):
        run(LearningCurveCallback(tmp_path / "a.png"), Probe(on_training_run_start=raiser(RuntimeError("broken"))))
    assert list(tmp_path.iterdir()) == []


def test_only_the_main_process_draws(tmp_path, drawn):
    def be_another_process(trainer, **kwargs):
        run_of(trainer).config = replace(run_of(trainer).config, is_world_process_zero=False)

    run(LearningCurveCallback(tmp_path / "curves.png"), Probe(on_train_epoch_start=be_another_process))
    assert drawn == []


def test_the_file_is_replaced_as_a_whole(tmp_path, drawn, monkeypatch):
    path = tmp_path / "curves.png"
    seen = []
    monkeypatch.setattr(pictures, "_SHARE_OF_TIME", float("inf"))
    monkeypatch.setattr(
        Drawn,
        "savefig",
        lambda self, given, **kwargs: (seen.append(path.exists() and path.read_bytes()), given.write_bytes(b"new")),
    )
    path.write_bytes(b"old")
    run(LearningCurveCallback(path), num_epochs=1)
    assert seen == [b"old", b"new"]


@pytest.mark.skipif(os.name == "nt", reason="folders have other permissions")
def test_a_file_that_cannot_be_written_is_told_of_once_and_training_goes_on(tmp_path, drawn):
    (tmp_path / "file").write_text("")
    callback = LearningCurveCallback(tmp_path / "file" / "curves.png")
    with pytest.warns(
        UserWarning, match=r"The learning curves were not drawn\. .*curves.png' cannot be written"
    ) as caught:
        trainer = run(callback)
    assert len(caught) == 1
    assert trainer.run_history.current_epoch == 4


def test_an_unknown_metric_is_told_of_at_the_end(tmp_path):
    with pytest.warns(UserWarning, match=r"no curves of 'acuracy'\. Expected one of \['loss'\]") as caught:
        run(LearningCurveCallback(tmp_path / "curves.png", ["acuracy"]))
    assert len(caught) == 1


def test_a_path_that_is_no_picture_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"`path` has the suffix '\.txt'. Expected that of a picture"):
        LearningCurveCallback(tmp_path / "curves.txt")


def test_without_matplotlib_the_callback_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pytorch-accelerated\[plots\]"):
        LearningCurveCallback(tmp_path / "curves.png")


def test_drawing_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    times = []
    monkeypatch.setattr(pictures, "plot_learning_curves", lambda *_, **__: (times.append(time.monotonic()), Drawn())[1])
    callback = LearningCurveCallback(tmp_path / "curves.png")
    start = time.monotonic()
    run(callback, num_epochs=1)
    assert callback._next_time > start
    assert callback._next_time - times[-1] < 60


def test_the_time_it_takes_counts_as_saving(tmp_path, drawn):
    trainer = run(LearningCurveCallback(tmp_path / "curves.png"))
    seconds = trainer.time_ledger.seconds
    assert seconds["saving"] > seconds["callback_LearningCurveCallback"]
