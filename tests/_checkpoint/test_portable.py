"""Checkpoints, and the rejection of checkpoints that belong to something else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pytorch_accelerated._checkpoint import portable
from pytorch_accelerated._checkpoint.weights import find_weights
from pytorch_accelerated.exceptions import CheckpointError


def test_a_checkpoint_is_one_flat_dictionary():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    checkpoint = portable.build_checkpoint({"weight": 1}, optimizer, None, {"epoch": 3})
    assert checkpoint == {
        "model_state_dict": {"weight": 1},
        "optimizer_state_dict": optimizer.state_dict(),
        "epoch": 3,
    }


@pytest.mark.parametrize("is_writer", [True, False])
def test_only_the_writer_touches_the_disk(tmp_path, is_writer):
    path = tmp_path / "folder" / "model.pt"
    portable.check_save_path(path, is_writer, num_processes=1)
    assert path.parent.exists() == is_writer
    portable.save_checkpoint({"model_state_dict": {}, "epoch": 3}, path, is_writer, num_processes=1)
    assert path.exists() == is_writer


def test_a_checkpoint_restores_model_and_optimizer_and_returns_all_entries(tmp_path):
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoint = portable.build_checkpoint(model.state_dict(), optimizer, None, {"epoch": 3})
    portable.save_checkpoint(checkpoint, tmp_path / "model.pt", is_writer=True, num_processes=1)
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.5)
    loaded = portable.load_checkpoint(tmp_path / "model.pt", other, other_optimizer)
    assert set(loaded) == {"model_state_dict", "optimizer_state_dict", "epoch"}
    assert torch.equal(other.weight, model.weight)
    assert other_optimizer.param_groups[0]["lr"] == 0.1


def test_a_checkpoint_of_another_optimizer_is_rejected_before_the_model_is_loaded(tmp_path):
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    checkpoint = portable.build_checkpoint(model.state_dict(), torch.optim.SGD(model.parameters(), lr=0.1), None, None)
    portable.save_checkpoint(checkpoint, tmp_path / "model.pt", is_writer=True, num_processes=1)
    before = other.weight.clone()
    with pytest.raises(
        CheckpointError, match=r"different optimizer: its groups have \[2\] parameters instead of \[1\]"
    ):
        portable.load_checkpoint(tmp_path / "model.pt", other, torch.optim.SGD([other.weight], lr=0.1))
    assert torch.equal(other.weight, before)


def test_a_file_without_a_model_is_rejected():
    with pytest.raises(CheckpointError, match=r"The file has no `model_state_dict`, only the entries \['3', 'a'\]"):
        find_weights({"a": 1, 3: 2}, "The file")
