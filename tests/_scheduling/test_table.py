"""Every scheduler of PyTorch and timm has the rates of a loop written by hand, in a resumed run too.

`tests/distributed/test_states.py` compares them on two processes, and `tests/compare_schedulers.py` prints the table.
"""

from __future__ import annotations

import pytest

import _schedules
from pytorch_accelerated import Trainer
from pytorch_accelerated.trainer import TrainerWithTimmScheduler


def test_the_table_has_every_scheduler_of_pytorch():
    assert set(_schedules.OF_PYTORCH) == _schedules.schedulers_of_pytorch()


@pytest.mark.parametrize("interval", ["update", "epoch"])
@pytest.mark.parametrize("name", _schedules.OF_PYTORCH)
def test_a_scheduler_of_pytorch_has_the_rates_of_a_loop_by_hand(tmp_path, name, interval):
    assert _schedules.problems_of_pytorch(name, interval, tmp_path) == []


def test_the_table_has_every_scheduler_of_timm():
    assert not _schedules.OF_TIMM or set(_schedules.OF_TIMM) == _schedules.schedulers_of_timm()


@pytest.mark.parametrize("cls", [Trainer, TrainerWithTimmScheduler])
@pytest.mark.parametrize("counts", ["epochs", "updates"])
def test_the_schedulers_of_timm_have_the_rates_of_a_loop_by_hand_where_it_is_installed(tmp_path, counts, cls):
    """Where it is not, `test_stepping.py` uses classes with the same methods."""
    for name, make in _schedules.OF_TIMM.items():
        assert _schedules.problems_of_timm(make, cls, counts, tmp_path / name) == [], name
