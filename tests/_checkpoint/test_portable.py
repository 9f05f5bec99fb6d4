"""Checkpoints, and the refusal of what they do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pytorch_accelerated._checkpoint import portable
from pytorch_accelerated.exceptions import CheckpointError


def test_a_checkpoint_is_one_flat_dictionary():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    checkpoint = portable.build_checkpoint({"_orig_mod.weight": 1}, optimizer, None, {"epoch": 3})
    assert checkpoint == {
        "model_state_dict": {"weight": 1},
        "optimizer_state_dict": optimizer.state_dict(),
        "epoch": 3,
    }


def test_a_file_without_a_model_is_refused():
    with pytest.raises(CheckpointError, match=r"The file holds no `model_state_dict`, only \['a', '3'\]|\['3', 'a'\]"):
        portable.take_model_state({"a": 1, 3: 2}, "The file")


def test_a_model_with_state_that_is_no_tensor_is_loaded():
    class WithExtra(nn.Linear):
        extra = None

        def get_extra_state(self):
            return {"number": 4}

        def set_extra_state(self, state):
            self.extra = state

    model = WithExtra(2, 1)
    portable.load_model_state(model, WithExtra(2, 1).state_dict(), "The file")
    assert model.extra == {"number": 4}


def test_the_state_of_a_model_is_asked_for_a_fixed_number_of_times():
    """Not once per parameter, which takes long for models with thousands of them."""

    class Counting(nn.Sequential):
        num_calls = 0

        def state_dict(self, *args, **kwargs):
            Counting.num_calls += 1
            return super().state_dict(*args, **kwargs)

    model = Counting(*(nn.Linear(2, 2) for _ in range(20)))
    state = nn.Sequential(*model).state_dict()
    Counting.num_calls = 0
    portable.load_model_state(model, state, "The file")
    assert Counting.num_calls <= 3


def test_all_differences_of_models_are_listed():
    own = {"a": torch.ones(2), "b": torch.ones(1), "c": 1}
    saved = {"a": torch.ones(3), "d": torch.ones(1), "c": 2}
    with pytest.raises(CheckpointError) as caught:
        portable.check_same_model(own, saved, "The file")
    assert str(caught.value).startswith(
        "The file belongs to another model. Parameters missing in it: b; unexpected in it: d; "
        "of another shape: a (3,) instead of (2,). Nothing was loaded."
    )
    portable.check_same_model(own, own, "The file")
