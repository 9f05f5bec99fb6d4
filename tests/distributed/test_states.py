"""Training states of two true processes; each test looks at what one case of `_state_cases.py` left behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from _processes import launch, read_results

sys.path.insert(0, str(Path(__file__).parent))

from _state_cases import NUM_SAMPLES, STATES_OF_ONE, make_order_trainer, resume_in_order, train_in_order

pytestmark = pytest.mark.distributed

CASES = Path(__file__).with_name("_state_cases.py")
TIMEOUT_SECONDS = 150
"""Far more than the cases need; what takes longer hangs."""


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """One process's run that was never interrupted, and its states of the second epoch."""
    folder = tmp_path_factory.mktemp("results")
    trainer = make_order_trainer([], save_at=range(11), folder=folder / STATES_OF_ONE)
    torch.manual_seed(0)
    train_in_order(trainer)
    return folder, trainer.run_history.get_metric_values("train_loss_epoch")


@pytest.fixture(scope="module")
def directory(whole_run):
    """Run all cases and return the folder with their results."""
    launch(CASES, whole_run[0], num_processes=2, timeout=TIMEOUT_SECONDS)
    return whole_run[0]


@pytest.fixture
def results(request, directory):
    """What the case of this test returned on each rank."""
    return read_results(directory, request.node.originalname.removeprefix("test_"), num_processes=2)


def assert_alike(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_together(results):
    """What the main process decides, or fails at, all do; what one fails at, none has done."""
    for rank, result in enumerate(results):
        assert result["decided"] == {"by": 0}
        assert result["not decided"] == "KeyError: 'mine'"
        assert result["done"] == rank
        assert result["not done"] == "CheckpointError: full"
    assert [result["wrong"] for result in results] == ["CheckpointError: mine", "LookupError: mine"]


# --- another number of processes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "first"), [(0, 8), (2, 24), (4, 40), (5, 44)])
def test_fewer_processes(directory, whole_run, capsys, step, first):
    """One process goes on at the same sample, and the loss of the epoch is that of all."""
    results = read_results(directory, "fewer_processes", num_processes=2)
    path = directory / "fewer_processes" / f"step_{step}"
    resumed = resume_in_order(path, allow_other_num_processes=True)
    assert resumed["seen"] == list(range(first, NUM_SAMPLES))
    for result in results:
        assert result["losses"] == pytest.approx(resumed["losses"])
    assert whole_run[1] == pytest.approx(resumed["losses"])
    assert resumed["progress"]["num_samples"] == 2 * NUM_SAMPLES
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"'{path}' was saved by 2 processes and is resumed by 1: random numbers and the last bits"
    )
    assert printed.count("\n") == 2


def test_fewer_processes_with_accumulation(directory):
    """An update comes again as a whole."""
    path = directory / "fewer_processes" / "step_2"
    with pytest.warns(UserWarning, match="gradient_accumulation_steps: 1 -> 4"):
        resumed = resume_in_order(path, allow_other_num_processes=True, gradient_accumulation_steps=4)
    assert resumed["seen"] == list(range(16, NUM_SAMPLES))


def test_more_processes(results, whole_run):
    """Two processes go on where one was, as far as whole steps allow, with random numbers of their own."""
    for result in results:
        assert "saved by 1 processes, but there are 2 now" in result["refused"]
        assert "`allow_other_num_processes=True`" in result["refused"]
        assert result["is unchanged"]
        assert result["again"] == result["resumed"][3]["drawn"]
    for step, first in ((2, 8), (3, 16), (5, 24), (10, 44)):
        seen = sorted(index for result in results for index in result["resumed"][step]["seen"])
        assert seen == list(range(first, NUM_SAMPLES))
        assert results[0]["resumed"][step]["drawn"] != results[1]["resumed"][step]["drawn"]
    for result in results:  # no sample came again
        assert result["resumed"][3]["losses"] == pytest.approx(whole_run[1])


# --- the folder --------------------------------------------------------------------------------------------------


def test_rotation(results):
    """Both processes see the same, at each step: what is saved and deleted is so for all before any goes on."""
    for result in results:
        assert [len(names) for names in result["seen"]] == [0, 1, 2, 2, 2, 2]
        assert result["seen"][-1] == ["step_4", "step_5"]
        assert result["left"] == ["step_5", "step_6"]
    assert_alike(results[0]["weights"], results[1]["weights"])


def test_latest(results):
    for result in results:
        assert result["is_resumed"]
        assert_alike(result["weights"], result["expected"])
        assert len(result["printed"]) == 3
        assert "step_6' is damaged: process_1.pt is missing or altered" in result["printed"][0]
        assert "step_5'" in result["printed"][1]
        assert result["printed"][2] == "Going on after batch 2 of epoch 2. The data go on exactly where they were."
        assert result["generations"] == [0, 0, 0, 0, 0, 1]


def test_nothing_to_resume(results):
    for result in results:
        assert not result["is_resumed"]
        assert result["names"] == [f"step_{number}" for number in range(1, 7)]


def test_lock(results):
    for result in results:
        for refused in result["refused"]:
            assert refused.startswith("CheckpointError: Another run saves its training states in")
            assert "process 7 on mars" in refused
        assert result["steps"] == []
        assert result["names"] == ["step_1", "step_2", "step_3"]


def test_impossible_folder(results):
    for refused in results:
        assert refused.startswith("CheckpointError: Training states cannot be saved in")


def test_minutes(results):
    """States are saved at the same updates on both, and few exchanges are needed to agree on them."""
    for result in results:
        assert result["names"] == ["step_120", "step_60"]
        assert result["num_exchanges"] < 30
    assert_alike(results[0]["weights"], results[1]["weights"])


# --- failures ----------------------------------------------------------------------------------------------------


def test_save_error(results):
    """Neither process waits for the other, both tell the same, and what was there before is intact."""
    for result in results:
        for kind, name in (("direct", "step_3"), ("raise", "step_1")):
            assert result[kind].startswith("CheckpointError: The training state")
            assert f"{name}' could not be written: [Errno 28] No space left on device" in result[kind]
        assert result["names"] == ["step_1", "step_2", "step_3"]
        assert result["is intact"]
        assert_alike(result["weights"], result["expected"])
    assert results[0]["raise"] == results[1]["raise"]
    assert len(results[0]["warnings"]) == 6
    assert all(warning.endswith("The run goes on without it.") for warning in results[0]["warnings"])
    assert results[1]["warnings"] == []


def test_background(results):
    for result in results:
        assert result["differences"] == {"step_2": [], "step_3": [], "step_8": []}
        assert "step_4' could not be written: [Errno 28] No space left on device" in result["refused"]
        assert result["update"] == 5, "the next save tells"
    assert results[0]["refused"] == results[1]["refused"]


def test_unsaveable_callback(results):
    for message, names in results:
        assert message.startswith("CheckpointError: A object cannot be saved")
        assert names == []


def test_unreadable_on_one(results):
    for result in results:
        assert "holds something else than expected" in result["refused"]
        assert result["is unchanged"]


def test_checkpoint_error(results):
    for message in results:
        assert "model.pt' could not be written" in message
