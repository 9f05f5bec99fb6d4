"""Training states of two real processes. Each test checks the results of the case of its name in `_state_cases.py`."""

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
"""Far more than the cases need. A run that takes longer is stuck."""


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Train on one process without interruption, and save states during the second epoch."""
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


def assert_equal(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_run_on_main_and_run_on_all_have_the_same_outcome_everywhere(results):
    """All return the main process's result, or raise the error of the process that failed."""
    for rank, result in enumerate(results):
        assert result["main"] == {"by": 0}
        assert result["main fails"] == "KeyError: 'mine'"
        assert result["all"] == rank
        assert result["one cannot save"] == "CheckpointError: full"
    assert [result["one fails"] for result in results] == ["CheckpointError: mine", "LookupError: mine"]


def test_schedulers_have_the_rates_of_a_loop_by_hand(results):
    """A third of PyTorch's, and timm's if it is installed, in runs that are resumed in the middle too.

    One process tries all of them, and `compare_schedulers.py` does on two as well.
    """
    assert results == [{}, {}]


# --- another number of processes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "first"), [(0, 8), (2, 24), (4, 40), (5, 44)])
def test_fewer_processes_resume_at_the_same_sample(directory, whole_run, capsys, step, first):
    """The loss of the epoch is that of two processes."""
    results = read_results(directory, "fewer_processes_resume_at_the_same_sample", num_processes=2)
    path = directory / "fewer_processes_resume_at_the_same_sample" / f"step_{step}"
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
    assert printed.count("\n") == 3


def test_fewer_processes_resume_at_the_start_of_an_accumulation_window(directory):
    """Training continues at the start of an accumulation window."""
    path = directory / "fewer_processes_resume_at_the_same_sample" / "step_2"
    with pytest.warns(UserWarning, match="gradient_accumulation_steps: 1 -> 4"):
        resumed = resume_in_order(path, allow_other_num_processes=True, gradient_accumulation_steps=4)
    assert resumed["seen"] == list(range(16, NUM_SAMPLES))


def test_more_processes_resume_at_the_last_complete_step(results, whole_run):
    """Steps of two processes take twice as many samples. Each rank draws different random numbers."""
    for result in results:
        assert "saved by a run with num_processes=1, but this run has num_processes=2" in result["refused"]
        assert "`allow_other_num_processes=True`" in result["refused"]
        assert result["is unchanged"]
        assert result["again"] == result["resumed"][3]["drawn"]
    for step, first in ((2, 8), (3, 16), (5, 24), (10, 44)):
        seen = sorted(index for result in results for index in result["resumed"][step]["seen"])
        assert seen == list(range(first, NUM_SAMPLES))
        assert results[0]["resumed"][step]["drawn"] != results[1]["resumed"][step]["drawn"]
    for result in results:  # no sample was used twice
        assert result["resumed"][3]["losses"] == pytest.approx(whole_run[1])


# --- states that do not fit --------------------------------------------------------------------------------------


def test_a_state_that_one_process_refuses_is_refused_on_all_with_nothing_changed(results):
    for result in results:
        said, number = result["callback"]
        assert "could not load its state (LookupError: not with me)" in said
        assert number == 0
        for name in ("optimizer", "optimizer on one"):
            assert "different optimizer: its class is 'Adam' instead of 'SGD'. Nothing was loaded" in result[name][0]


def test_averages_follow_the_names_of_their_parameters(results):
    for result in results:
        assert_equal(result["resumed"], result["whole"])


def test_a_schedule_follows_the_new_length_of_the_run(results):
    for rates in results:
        num_updates = len(rates["first"])
        assert len(rates["whole"]) == 3 * num_updates
        assert rates["resumed"] == pytest.approx(rates["whole"][num_updates:])


# --- the folder --------------------------------------------------------------------------------------------------


def test_all_processes_see_the_same_states_after_each_step(results):
    """Saving and deleting are complete on both processes before one of them continues."""
    for result in results:
        assert [len(names) for names in result["seen"]] == [0, 1, 2, 2, 2, 2]
        assert result["seen"][-1] == ["step_4", "step_5"]
        assert result["left"] == ["step_5", "step_6"]
    assert_equal(results[0]["weights"], results[1]["weights"])


def test_resuming_the_latest_state_skips_a_damaged_one(results):
    for result in results:
        assert result["is_resumed"]
        assert_equal(result["weights"], result["expected"])
        assert "step_6' is damaged: process_1.pt is missing or altered" in result["printed"][0]
        assert "step_5' in epoch 2" in result["printed"][1]
        assert result["printed"][2] == "Resuming epoch 2 after batch 2. The data continue exactly where they stopped."
        assert result["generations"] == [0, 0, 0, 0, 0, 1]


def test_resuming_without_a_state_starts_a_new_run(results):
    for result in results:
        assert not result["is_resumed"]
        assert result["names"] == [f"step_{number}" for number in range(1, 7)]


def test_a_folder_in_use_by_another_run_is_refused(results):
    for result in results:
        for refused in result["refused"]:
            assert refused.startswith("CheckpointError: Another run is saving its training states in")
            assert "process 7 on mars" in refused
        assert result["steps"] == []
        assert result["names"] == ["step_1", "step_2", "step_3"]


def test_a_folder_that_cannot_be_created_is_refused(results):
    for refused in results:
        assert refused.startswith("CheckpointError: Training states cannot be saved in")


def test_states_are_saved_by_the_clock_of_the_main_process(results):
    """Both processes save at the same updates, and few exchanges are needed for that."""
    for result in results:
        assert result["names"] == ["step_120", "step_60"]
        assert result["num_exchanges"] < 30
    assert_equal(results[0]["weights"], results[1]["weights"])


# --- failures ----------------------------------------------------------------------------------------------------


def test_a_failed_save_of_one_process_fails_on_all(results):
    """Neither process waits for the other, both report the same error, and the earlier state is intact."""
    for result in results:
        for kind, name in (("direct", "step_3"), ("raise", "step_1")):
            assert result[kind].startswith("CheckpointError: The training state")
            assert f"{name}' could not be written: [Errno 28] No space left on device" in result[kind]
        assert result["names"] == ["step_1", "step_2", "step_3"]
        assert result["is intact"]
        assert_equal(result["weights"], result["expected"])
    assert results[0]["raise"] == results[1]["raise"]
    assert len(results[0]["warnings"]) == 6
    assert all(warning.endswith("Training continues without this state.") for warning in results[0]["warnings"])
    assert results[1]["warnings"] == []


def test_states_saved_in_the_background_resume_exactly(results):
    for result in results:
        assert result["differences"] == {"step_2": [], "step_3": [], "step_8": []}
        assert "step_4' could not be written: [Errno 28] No space left on device" in result["refused"]
        assert result["update"] == 5, "the next save reports the error"
    assert results[0]["refused"] == results[1]["refused"]


def test_a_callback_that_cannot_be_saved_on_one_process_fails_on_all(results):
    for message, names in results:
        assert message.startswith("CheckpointError: A value of type `object` cannot be saved")
        assert names == []


def test_a_state_that_one_process_cannot_read_is_loaded_by_none(results):
    for result in results:
        assert "has unexpected contents" in result["refused"]
        assert result["is unchanged"]


def test_a_checkpoint_that_cannot_be_written_fails_on_all(results):
    for message in results:
        assert "model.pt' could not be written" in message


def test_the_best_model_of_an_abandoned_run_is_loaded_by_no_process(results):
    for rank, result in enumerate(results):
        assert (result["worse"]["is last"], result["better"]["is last"]) == (True, False)
        assert ["is not the best model that this run saved" in text for text in result["worse"]["warnings"]] == (
            [True] if rank == 0 else []
        )
        assert result["better"]["warnings"] == []
        assert result["names"] == ["best.previous.pt", "best.pt", "states"]
    for name in ("worse", "better"):
        assert results[0][name]["best"] == results[1][name]["best"]


def test_the_buffers_of_each_process_resume_exactly_within_a_window(results):
    assert results == [{1: [], 2: [], 3: [], 5: [], 8: []}] * 2
