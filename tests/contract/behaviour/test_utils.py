"""What programs written for 0.1.61 observe of `utils` and of import paths: section 13 of the table."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from _support import run_python
from pytorch_accelerated import exceptions, tracking, utils
from pytorch_accelerated.utils import DataLoaderSlice, ModelEma


def make_net():
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def fill(model, value):
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)
    return model


class CopyEma(ModelEma):
    def update(self, model):
        self._update(model, update_fn=lambda average, current: current)


class WarmedUpEma(ModelEma):
    """As in recipes: a decay that grows with the number of updates."""

    def __init__(self, model, decay=0.9):
        super().__init__(model, decay)
        self.num_updates = 0

    def update(self, model):
        self.num_updates += 1
        decay = min(self.decay, self.num_updates / (1 + self.num_updates))
        self._update(model, update_fn=lambda average, current: decay * average + (1 - decay) * current)


def test_a_subclass_builds_its_update_from_the_function_for_one_tensor():
    """Row 13.1: every parameter and buffer, integers too."""
    model = make_net()
    ema = CopyEma(model)
    ema.update(fill(model, 7))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in ema.module.state_dict().items())
    assert ema.module[1].num_batches_tracked == 7


def test_a_subclass_averages_with_a_decay_of_its_own():
    """Row 13.1: 0, then 1/2 * 0 + 1/2 * 6 = 3, then 2/3 * 3 + 1/3 * 6 = 4."""
    model = fill(make_net(), 0)
    ema = WarmedUpEma(model)
    for expected in (3.0, 4.0):
        ema.update(fill(model, 6))
        torch.testing.assert_close(ema.module[0].weight, torch.full((2, 2), expected))
    assert not ema.module[0].weight.requires_grad


def test_the_function_for_one_tensor_is_called_once_for_tied_weights():
    """Row 13.1: 0.1.61 averages them twice."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    ema, calls = ModelEma(model), []
    ema._update(model, lambda average, current: calls.append(1) or average + 1)
    assert len(calls) == 3
    torch.testing.assert_close(ema.module[1].weight, model[0].weight + 1)


def test_integer_buffers_are_copied_by_the_usual_update():
    """Row 13.2, ours: an average of counters is truncated."""
    model = fill(make_net(), 0)
    ema = ModelEma(model, decay=0.5)
    ema.update(fill(model, 3))
    assert ema.module[1].num_batches_tracked == 3


def test_the_length_of_a_slice_is_the_number_of_its_batches():
    """Row 13.2, ours: 0.1.61 says 5 and yields 2."""
    loader = DataLoaderSlice([torch.zeros(1)] * 2, 5)
    assert len(loader) == len(list(loader)) == 2


@pytest.mark.parametrize(
    ("module", "name", "home"),
    [
        ("callbacks", "LossTracker", tracking),
        ("callbacks", "ModelEma", utils),
        ("callbacks", "DataLoaderSlice", utils),
        ("trainer", "LossTracker", tracking),
        ("trainer", "InMemoryRunHistory", tracking),
        ("trainer", "RunHistory", tracking),
        ("trainer", "StopTrainingError", exceptions),
        ("trainer", "LogMetricsCallback", None),
        ("trainer", "MoveModulesToDeviceCallback", None),
        ("trainer", "PrintProgressCallback", None),
        ("trainer", "ProgressBarCallback", None),
        ("trainer", "TerminateOnNaNCallback", None),
        ("trainer", "worker_init_fn", utils),
    ],
)
def test_a_name_can_be_imported_from_where_programs_found_it(module, name, home):
    """Row 13.3."""
    found = getattr(importlib.import_module(f"pytorch_accelerated.{module}"), name)
    assert found is getattr(home or importlib.import_module("pytorch_accelerated.callbacks"), name)


def test_importing_seeds_nothing(tmp_path):
    """Row 13.4, ours."""
    program = """
import random
import numpy, torch
torch.manual_seed(3), numpy.random.seed(3), random.seed(3)
expected = torch.rand(1), numpy.random.rand(), random.random()
torch.manual_seed(3), numpy.random.seed(3), random.seed(3)
import pytorch_accelerated.callbacks, pytorch_accelerated.trainer, pytorch_accelerated.utils
assert (torch.rand(1), numpy.random.rand(), random.random()) == expected
"""
    run_python(program, cwd=tmp_path)
