"""A run resumed at any step ends with the same bits as one that was never interrupted."""

from __future__ import annotations

import pytest

import _runs

KINDS = {
    "plain": {"is_noisy": False, "has_scheduler": False},
    "scheduled": {"is_noisy": False},
    "augmented": {},
    "accumulated": {"gradient_accumulation_steps": 4},
    "clipped": {"gradient_clip_norm": 0.5, "gradient_accumulation_steps": 2},
}
STEPS = [1, 3, 5, 6, 7, 12, 17, 18]
"""Steps after which the run is resumed: early, mid-epoch, before and at the end of an epoch, late, and at the end."""


@pytest.fixture(scope="module", params=KINDS)
def uninterrupted(request, tmp_path_factory):
    """The settings of a run, the folder with a state after each step, and its outcome."""
    folder = tmp_path_factory.mktemp(request.param)
    trainer = _runs.make_trainer(folder)
    return KINDS[request.param], folder, _runs.train(trainer, **KINDS[request.param])


@pytest.mark.parametrize("step", STEPS)
def test_a_resumed_run_ends_with_the_same_bits(uninterrupted, tmp_path, step):
    settings, folder, expected = uninterrupted
    trainer = _runs.make_trainer(tmp_path)
    resumed = _runs.train(trainer, **settings, resume_from=folder / f"step_{step}")
    assert _runs.differences(expected, resumed) == []


@pytest.mark.parametrize("step", [3, 12])
def test_saving_states_does_not_change_the_run(uninterrupted, tmp_path, step):
    settings, _, expected = uninterrupted
    trainer = _runs.make_trainer(tmp_path, save_every_n_steps=None)
    assert _runs.differences(expected, _runs.train(trainer, **settings)) == []


@pytest.mark.parametrize(("before", "after"), [(2, 2), (0, 2), (2, 0)])
def test_a_run_resumed_with_another_number_of_workers_ends_with_the_same_bits(tmp_path, before, after):
    expected = _runs.train(_runs.make_trainer(tmp_path), num_workers=before)
    for step in (4, 12, 15):
        trainer = _runs.make_trainer(tmp_path / "resumed")
        resumed = _runs.train(trainer, num_workers=after, resume_from=tmp_path / f"step_{step}")
        assert _runs.differences(expected, resumed) == []


def test_a_run_resumed_twice_ends_with_the_same_bits(tmp_path):
    expected = _runs.train(_runs.make_trainer(tmp_path / "uninterrupted"))
    _runs.train(_runs.make_trainer(tmp_path / "first"))
    _runs.train(_runs.make_trainer(tmp_path / "second"), resume_from=tmp_path / "first" / "step_4")
    resumed = _runs.train(_runs.make_trainer(tmp_path / "third"), resume_from=tmp_path / "second" / "step_9")
    assert _runs.differences(expected, resumed) == []


@pytest.mark.parametrize("limit", [3, 6, 8])
def test_max_num_train_steps_ends_a_resumed_run_at_the_same_update(tmp_path, limit):
    expected = _runs.train(_runs.make_trainer(tmp_path), max_num_train_steps=limit)
    for step in range(1, limit + 1):
        trainer = _runs.make_trainer(tmp_path / "resumed")
        resumed = _runs.train(trainer, max_num_train_steps=limit, resume_from=tmp_path / f"step_{step}")
        assert _runs.differences(expected, resumed) == []
