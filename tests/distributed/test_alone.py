"""An exception that one process raises alone within a step ends the others, soon, and with its reason.

The default suite tries some; ``REPEAT=2`` tries each exception in each method on each rank.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from _processes import NUM_REPEATS, launch
from pytorch_accelerated.states import list_states, verify_state

pytestmark = pytest.mark.distributed

CASES = Path(__file__).with_name("_alone_cases.py")
METHODS = [
    "calculate_train_batch_loss",
    "backward_step",
    "_clip_gradients",
    "optimizer_step",
    "scheduler_step",
    "optimizer_zero_grad",
]
NAMES = {
    "stop": "StopTrainingError",
    "non-finite": "NonFiniteLossError",
    "error": "LookupError",
    "interrupt": "KeyboardInterrupt",
}
TRIED = [(2, 1, "calculate_train_batch_loss", "stop"), (3, 0, "optimizer_step", "error")]
if NUM_REPEATS > 1:
    TRIED = [
        (num_processes, rank, method, exception)
        for num_processes, rank in ((2, 0), (2, 1), (3, 0), (3, 2))
        for method in METHODS
        for exception in NAMES
    ]


def run(folder: Path, num_processes: int, *arguments: str) -> tuple[list[int], list[str], float]:
    """Return the exit codes, how the call of `train` ended, and the seconds that all took."""
    begin = time.monotonic()
    ended = launch(CASES, folder, num_processes, *arguments, timeout=50)
    seconds = time.monotonic() - begin
    texts = []
    for rank in range(num_processes):
        path = folder / f"error-{rank}.txt"
        texts.append(path.read_text() if path.exists() else (folder / f"output-{rank}.txt").read_text()[-2000:])
    for state in list_states(folder / "states"):
        verify_state(state.path)
    return [each.returncode for each in ended], texts, seconds


@pytest.mark.parametrize(("num_processes", "rank", "method", "exception"), TRIED)
def test_an_exception_on_one_rank_ends_the_others_with_its_reason(tmp_path, num_processes, rank, method, exception):
    codes, texts, seconds = run(tmp_path, num_processes, str(rank), method, exception)
    print(texts)
    assert seconds < 15
    assert all(codes)
    name = NAMES[exception]
    if exception == "stop":
        assert texts[rank].startswith(f"RuntimeError('Rank {rank} raised StopTrainingError in `method`")
    else:
        assert texts[rank].startswith(f"{name}('mine'")
    for other in set(range(num_processes)) - {rank}:
        assert f"Rank {rank} has ended with " in texts[other]
        assert name in texts[other]
        assert ": mine" in texts[other]
        assert f"Rank {other} waited in `" in texts[other]


@pytest.mark.parametrize("method", METHODS if NUM_REPEATS > 1 else METHODS[:1])
def test_a_stop_that_all_ranks_raise_in_the_same_step_ends_the_run_gracefully(tmp_path, method):
    codes, texts, _ = run(tmp_path, 2, "all", method, "stop")
    assert (codes, texts) == ([0, 0], ["returned: mine"] * 2)
    assert "final" in [state.path.name for state in list_states(tmp_path / "states")]
