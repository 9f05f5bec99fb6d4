"""The base classes of schedulers: base values, counting of updates, and state."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from _support import make_optimizer
from pytorch_accelerated.exceptions import SchedulerSettingsError
from pytorch_accelerated.schedulers import SchedulerBase, StatefulSchedulerBase
from pytorch_accelerated.schedulers.scheduler_base import interpolate


def get_lrs(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def state(num_updates, base, present):
    return {
        "param_group_field": "lr",
        "base_lr_values": base,
        "num_updates": num_updates,
        "param_group_values": present,
    }


class Halving(StatefulSchedulerBase):
    def get_updated_values(self, num_updates):
        return [base / 2**num_updates for base in self.base_values]


class Returning(SchedulerBase):
    """Returns the given values."""

    def __init__(self, optimizer, values, param_group_field="lr"):
        super().__init__(optimizer, param_group_field)
        self.values = values

    def get_updated_values(self, num_updates):
        return self.values


def test_a_scheduler_without_get_updated_values_cannot_be_instantiated():
    with pytest.raises(TypeError, match="get_updated_values"):
        SchedulerBase(make_optimizer(1.0))


def test_creating_a_scheduler_does_not_change_the_learning_rates():
    optimizer = make_optimizer(0.5, 0.25)
    Halving(optimizer)
    assert get_lrs(optimizer) == [0.5, 0.25]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.5, 0.25]


def test_step_update_sets_the_values_of_that_update():
    optimizer = make_optimizer(0.5, 0.25)
    Halving(optimizer).step_update(2)
    assert get_lrs(optimizer) == [0.125, 0.0625]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1, 0.2], [0.1, 0.2]),
        ((0.1, 0.2), [0.1, 0.2]),
        (np.array([0.1, 0.2]), [0.1, 0.2]),
        (0.3, [0.3, 0.3]),
        (0, [0.0, 0.0]),
        (np.float32(0.5), [0.5, 0.5]),
    ],
)
def test_values_can_be_one_per_group_or_one_for_all_groups(values, expected):
    optimizer = make_optimizer(1.0, 1.0)
    Returning(optimizer, values).step_update(0)
    assert get_lrs(optimizer) == expected
    assert all(type(lr) is float for lr in get_lrs(optimizer))


def test_no_values_change_nothing():
    optimizer = make_optimizer(1.0, 0.5)
    Returning(optimizer, None).step_update(3)
    assert get_lrs(optimizer) == [1.0, 0.5]


def test_a_wrong_number_of_values_is_an_error_and_changes_no_learning_rate():
    optimizer = make_optimizer(1.0, 1.0)
    with pytest.raises(ValueError, match=r"returned 3 values for 2 parameter groups.*`self.base_values`"):
        Returning(optimizer, [0.1, 0.2, 0.3]).step_update(0)
    assert get_lrs(optimizer) == [1.0, 1.0]


def test_any_field_of_the_groups_can_be_scheduled():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.8)
    scheduler = Returning(optimizer, 0.9, param_group_field="momentum")
    scheduler.step_update(0)
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert optimizer.param_groups[0]["initial_momentum"] == 0.8
    assert get_lrs(optimizer) == [1.0]
    assert scheduler.base_values == [0.8]


def test_a_missing_param_group_field_is_an_error_that_lists_the_existing_fields():
    expected = r"'beta'.*parameter group 0.*'lr', 'maximize', 'momentum'"
    with pytest.raises(SchedulerSettingsError, match=expected):
        Returning(make_optimizer(1.0), 0.5, param_group_field="beta")


def test_any_object_with_param_groups_can_be_scheduled():
    class Wrapper:
        def __init__(self, optimizer):
            self._optimizer = optimizer

        @property
        def param_groups(self):
            return self._optimizer.param_groups

    optimizer = make_optimizer(0.5)
    Halving(Wrapper(optimizer)).step_update(1)
    assert get_lrs(optimizer) == [0.25]


def test_a_learning_rate_stored_in_a_tensor_is_updated_in_place():
    lr = torch.tensor(0.5)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=lr, capturable=False, foreach=False)
    held = optimizer.param_groups[0]["lr"]
    Halving(optimizer).step_update(2)
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == 0.125
    assert optimizer.param_groups[0]["initial_lr"] == 0.5


def test_a_second_scheduler_starts_from_the_base_values_of_the_first():
    optimizer = make_optimizer(0.5)
    Halving(optimizer).step_update(3)
    assert Halving(optimizer).base_values == [0.5]


def test_a_group_added_later_is_included_from_the_next_update():
    optimizer = make_optimizer(0.5)
    scheduler = Halving(optimizer)
    scheduler.step()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.25})
    scheduler.step()
    assert get_lrs(optimizer) == [0.25, 0.125]
    assert optimizer.param_groups[1]["initial_lr"] == 0.25


def test_base_values_survive_a_loaded_optimizer_that_never_had_a_scheduler():
    plain = make_optimizer(0.125)
    optimizer = make_optimizer(0.5)
    scheduler = Halving(optimizer)
    optimizer.load_state_dict(plain.state_dict())
    scheduler.step()
    scheduler.step()
    assert get_lrs(optimizer) == [0.25]


def test_the_nth_step_sets_the_values_for_n_minus_1_updates():
    optimizer = make_optimizer(1.0)
    scheduler = Halving(optimizer)
    assert scheduler.state_dict()["num_updates"] == -1
    seen = []
    for _ in range(4):
        scheduler.step()
        seen += get_lrs(optimizer)
    assert seen == [1.0, 0.5, 0.25, 0.125]
    assert scheduler.state_dict()["num_updates"] == 3


def test_a_loaded_state_restores_position_base_values_and_learning_rates():
    scheduler = Halving(make_optimizer(1.0, 0.5))
    for _ in range(3):
        scheduler.step()
    optimizer = make_optimizer(8.0, 8.0)
    restored = Halving(optimizer)
    restored.load_state_dict(scheduler.state_dict())
    assert restored.state_dict() == scheduler.state_dict() == state(2, base=[1.0, 0.5], present=[0.25, 0.125])
    assert get_lrs(optimizer) == [0.25, 0.125]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1.0, 0.5]
    restored.step()
    assert get_lrs(optimizer) == [0.125, 0.0625]


def test_a_state_from_before_the_first_step_sets_no_learning_rate():
    optimizer = make_optimizer(8.0)
    restored = Halving(optimizer)
    restored.load_state_dict(Halving(make_optimizer(1.0)).state_dict())
    assert get_lrs(optimizer) == [8.0]
    restored.step()
    assert get_lrs(optimizer) == [1.0]


def test_loading_a_state_without_base_values_keeps_those_of_the_optimizer():
    optimizer = make_optimizer(8.0)
    Halving(optimizer).load_state_dict({"num_updates": 1})
    assert get_lrs(optimizer) == [4.0]


def test_loading_a_state_of_the_first_versions_restores_base_values_and_learning_rates():
    optimizer = make_optimizer(8.0)
    scheduler = Halving(optimizer)
    scheduler.load_state_dict({"base_values": [1.0], "num_updates": 2})
    assert scheduler.base_values == [1.0]
    assert get_lrs(optimizer) == [0.25]


def test_loading_a_state_with_fewer_groups_keeps_the_base_values_of_the_others():
    optimizer = make_optimizer(8.0, 4.0)
    Halving(optimizer).load_state_dict({"num_updates": 1, "base_values": [1.0]})
    assert get_lrs(optimizer) == [0.5, 2.0]


def test_base_values_of_groups_that_are_added_later_are_kept_for_them():
    optimizer = make_optimizer(8.0)
    scheduler = Halving(optimizer)
    scheduler.load_state_dict({"num_updates": 1, "base_lr_values": [1.0, 0.5]})
    assert get_lrs(optimizer) == [0.5]
    assert scheduler.base_values == [1.0]
    assert scheduler.state_dict()["base_lr_values"] == [1.0, 0.5]
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 4.0})
    scheduler.step()
    assert get_lrs(optimizer) == [0.25, 0.125]
    assert optimizer.param_groups[1]["initial_lr"] == 0.5


def test_the_base_value_of_a_removed_group_is_kept_for_when_it_is_added_again():
    optimizer = make_optimizer(1.0, 0.5)
    scheduler = Halving(optimizer)
    group = optimizer.param_groups.pop()
    scheduler.step()
    assert scheduler.base_values == [1.0]
    optimizer.param_groups.append(group)
    scheduler.step()
    assert get_lrs(optimizer) == [0.5, 0.25]


def test_a_state_without_position_is_rejected_and_changes_nothing():
    optimizer = make_optimizer(8.0)
    scheduler = Halving(optimizer)
    with pytest.raises(ValueError, match=r"no entry 'num_updates', only \['base_lrs', 'last_epoch'\]"):
        scheduler.load_state_dict({"last_epoch": 3, "base_lrs": [1.0]})
    assert scheduler.state_dict() == state(-1, base=[8.0], present=[8.0])


def test_the_state_can_be_loaded_without_running_code(tmp_path):
    scheduler = Halving(make_optimizer(np.float64(0.5)))
    scheduler.step()
    torch.save(scheduler.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state(0, base=[0.5], present=[0.5])


@pytest.mark.parametrize(("start", "end"), [(1e-6, 0.1), (0.1, 1e-6), (0.3, 0.7), (1e-9, 3.0)])
def test_interpolation_is_exact_at_its_ends(start, end):
    assert interpolate(start, end, 0.0) == start
    assert interpolate(start, end, 1.0) == end
    assert interpolate(start, end, 0.25) == pytest.approx(start + 0.25 * (end - start))
