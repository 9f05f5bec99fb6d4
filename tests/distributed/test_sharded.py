"""Training states of a model that FSDP has sharded over several real processes."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import nn

from _processes import launch

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        "fsdp_version" not in inspect.signature(FullyShardedDataParallelPlugin).parameters,
        reason="the oldest supported version of Accelerate has no FSDP2",
    ),
]

CASES = Path(__file__).with_name("_sharded_cases.py")
TIMEOUT_SECONDS = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two processes save states in this folder, and three resume one of them."""
    path = tmp_path_factory.mktemp("sharded")
    for case, num_processes in (("whole", 2), ("other", 3)):
        ended = launch(CASES, path, num_processes, case, timeout=TIMEOUT_SECONDS)
        outputs = "\n".join((path / f"output-{rank}.txt").read_text()[-3000:] for rank in range(num_processes))
        assert [process.returncode for process in ended] == [0] * num_processes, outputs
    return path


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_a_sharded_model_resumes_exactly(folder, kind, accumulation):
    for rank in range(2):
        result = torch.load(folder / f"whole-{rank}.pt", weights_only=True)[f"{kind}_{accumulation}"]
        assert result["sharded"] == "DTensor"
        assert result["whole"]["losses"] == result["resumed"]["losses"]
        for name, value in result["whole"]["weights"].items():
            assert torch.equal(value, result["resumed"]["weights"][name]), name
        assert result["state"] == ("step_9" if accumulation == 1 else "step_10")
        assert len(result["refused"]) == (0 if accumulation == 1 else 6)


def test_a_checkpoint_of_a_sharded_model_holds_the_full_weights(folder):
    expected = torch.load(folder / "whole-0.pt", weights_only=True)["SHARDED_STATE_DICT_1"]["whole"]["weights"]
    checkpoint = torch.load(folder / "SHARDED_STATE_DICT_1" / "model.pt", weights_only=True)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 1))
    model.load_state_dict(checkpoint["model_state_dict"])
    for name, value in model.named_parameters():
        assert torch.equal(value, expected[name]), name


def test_another_number_of_processes_reshards_a_state(folder):
    """The loss of the epoch is close to that of two processes, because the weights come from the shards of both."""
    expected = torch.load(folder / "whole-0.pt", weights_only=True)["SHARDED_STATE_DICT_1"]["whole"]
    for rank in range(3):
        result = torch.load(folder / f"other-{rank}.pt", weights_only=True)["other number"]
        assert len(result["losses"]) == 2
        assert result["losses"][0] == pytest.approx(expected["losses"][0], rel=0.3)
        assert all(bool(value.isfinite().all()) for value in result["weights"].values())
