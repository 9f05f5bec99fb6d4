"""The counters that hold the position of a run."""

from __future__ import annotations

import pytest

from pytorch_accelerated.progress import TrainingProgress

SOME = {
    "num_epochs_completed": 2,
    "num_batches_in_epoch": 5,
    "num_updates": 9,
    "num_samples": 40,
    "phase": "end",
    "num_evaluations_in_epoch": 1,
    "num_batches_in_earlier_epochs": 12,
    "num_skipped_in_epoch": 3,
}


def test_progress_starts_at_zero():
    assert TrainingProgress().state_dict() == {**dict.fromkeys(SOME, 0), "phase": "training"}


def test_end_epoch_counts_the_epoch_and_moves_to_the_start_of_the_next():
    progress = TrainingProgress(**SOME)
    progress.end_epoch()
    assert progress == TrainingProgress(3, 0, 9, 40, "training", num_batches_in_earlier_epochs=17)


@pytest.mark.parametrize(("phase", "num_epochs"), [("training", 2), ("evaluation", 2), ("end", 3)])
def test_the_resume_point_is_the_current_position_or_the_next_epoch_after_a_finished_one(phase, num_epochs):
    progress = TrainingProgress(**{**SOME, "phase": phase})
    point = progress.resume_point()
    assert point.num_epochs_completed == num_epochs
    assert point.phase == ("training" if phase == "end" else phase)
    assert progress == TrainingProgress(**{**SOME, "phase": phase})


def test_load_state_dict_restores_all_counters():
    progress = TrainingProgress()
    progress.load_state_dict(SOME)
    assert progress == TrainingProgress(**SOME)
    assert progress.state_dict() == SOME


def test_a_state_that_lacks_a_counter_is_rejected_and_nothing_changes():
    progress = TrainingProgress()
    with pytest.raises(ValueError, match=r"lacks \['num_updates'\]\. Expected all of"):
        progress.load_state_dict({name: value for name, value in SOME.items() if name != "num_updates"})
    assert progress == TrainingProgress()
