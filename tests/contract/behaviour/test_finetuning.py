"""What programs written for 0.1.61 observe of `ModelFreezer`: section 12 of the table."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from _support import make_dataset
from pytorch_accelerated import Trainer, finetuning
from pytorch_accelerated.callbacks import GradualUnfreezingCallback, TrainerCallback
from pytorch_accelerated.finetuning import BN_MODULES, ModelFreezer


def make_net():
    """Four layer groups; the second is a block with a batch norm, the third has no parameters."""
    block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    return nn.Sequential(nn.Linear(3, 4), block, nn.Tanh(), nn.Linear(4, 1))


class WithInteger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lookup = nn.ParameterList([nn.Parameter(torch.arange(3), requires_grad=False)])
        self.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64), requires_grad=False)
        self.head = nn.Linear(3, 2).requires_grad_(False)


def frozen_groups(freezer):
    return [group.is_frozen for group in freezer.get_layer_groups()]


# --- 12.1: the constructor ---------------------------------------------------------------------------------------


def test_a_freezer_makes_all_parameters_trainable():
    """Row 12.1."""
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    assert len(ModelFreezer(model).get_trainable_parameters()) == 4


def test_a_freezer_of_a_model_in_evaluation_mode_leaves_modes_alone():
    """Row 12.1: only `requires_grad` changes."""
    model = make_net().eval().requires_grad_(False)
    ModelFreezer(model, freeze_batch_norms=True)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_a_second_freezer_makes_trainable_what_the_first_froze_so_its_unfreeze_returns_nothing():
    """Row 12.1."""
    model = make_net()
    ModelFreezer(model).freeze()
    assert ModelFreezer(model).unfreeze() == {}


def test_a_freezer_passes_over_parameters_that_cannot_be_trained():
    """Row 12.1, with F3: 0.1.61 raises for integer parameters."""
    model = WithInteger()
    ModelFreezer(model)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == {"lookup.0"}


def test_frozen_parameters_stay_so_on_request():
    """Row 12.1: what a freezer did before this row was built is still possible."""
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    assert len(ModelFreezer(model, should_keep_frozen=True).get_trainable_parameters()) == 2


def test_unfreezing_on_a_schedule_does_not_make_groups_trainable_that_are_not_due():
    """Row 12.1: the callback uses freezers during a run, and one that makes everything trainable would spoil it."""

    class NoteTrainable(TrainerCallback):
        def __init__(self):
            self.num_trainable = []

        def on_train_epoch_end(self, trainer, **kwargs):
            self.num_trainable.append(sum(p.requires_grad for p in trainer.model.parameters()))

    model, noted = make_net(), NoteTrainable()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callbacks = [GradualUnfreezingCallback(freeze_batch_norms=True), noted]
    Trainer(model, nn.MSELoss(), optimizer, callbacks).train(make_dataset(), 3)
    assert noted.num_trainable == [2, 6, 8]


# --- 12.2: what `unfreeze` returns -------------------------------------------------------------------------------


def test_unfreeze_returns_parameter_groups_by_the_index_of_the_layer_group_in_ascending_order():
    """Row 12.2."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    freezer = ModelFreezer(model)
    freezer.freeze()

    unfrozen = freezer.unfreeze()

    assert list(unfrozen) == [0, 1, 2]
    assert [list(group) for group in unfrozen.values()] == [["params"]] * 3
    assert [group["params"] for group in unfrozen.values()] == [list(model[idx].parameters()) for idx in range(3)]


@pytest.mark.parametrize(("from_index", "to_index"), [(1, 2), (2, 1), (-3, -2)])
def test_unfreeze_of_a_range_returns_only_its_groups(from_index, to_index):
    """Row 12.2."""
    freezer = ModelFreezer(nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))))
    freezer.freeze()
    assert list(freezer.unfreeze(from_index, to_index)) == [1, 2]
    assert list(freezer.unfreeze()) == [0]


def test_unfreeze_returns_no_group_without_newly_trainable_parameters():
    """Row 12.2: neither the group without parameters nor the one that was trainable."""
    freezer = ModelFreezer(make_net())
    freezer.freeze(to_index=1)
    assert list(freezer.unfreeze()) == [0, 1]
    assert freezer.unfreeze() == {}


def test_a_program_adds_what_unfreeze_returned_to_the_optimizer():
    """Row 12.2: the loop that programs have, with a learning rate for each group."""
    model = make_net()
    freezer = ModelFreezer(model)
    freezer.freeze()
    optimizer = torch.optim.SGD(freezer.get_trainable_parameters(), lr=1.0)
    for idx, group in freezer.unfreeze().items():
        optimizer.add_param_group({**group, "lr": 10.0**idx})
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0, 10.0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 8


# --- 12.3 to 12.5: layers and groups ------------------------------------------------------------------------------


def test_the_index_of_a_layer_group_is_a_pair_from_the_start_and_from_the_end():
    """Row 12.3."""
    freezer = ModelFreezer(make_net())
    assert [group.layer_group_idx for group in freezer.get_layer_groups()] == [(0, -4), (1, -3), (2, -2), (3, -1)]
    assert [layer.layer_group_idx[1] for layer in freezer.get_layers()] == [-4, -3, -3, -3, -2, -1]
    assert ModelFreezer(nn.Linear(2, 2)).get_layer_groups()[0].layer_group_idx == (0, -1)


def test_both_numbers_of_a_pair_freeze_the_group():
    """Row 12.3: programs pass the numbers on to `freeze`."""
    for counted in (0, 1):
        freezer = ModelFreezer(make_net())
        index = freezer.get_layer_groups()[3].layer_group_idx[counted]
        freezer.freeze(index, index)
        assert frozen_groups(freezer) == [False, False, False, True]


def test_a_group_is_frozen_if_any_of_its_parameters_is():
    """Row 12.4."""
    freezer = ModelFreezer(make_net())
    freezer.freeze(1, 1)
    assert frozen_groups(freezer) == [False, True, False, False]
    assert [layer.is_frozen for layer in freezer.get_layers()] == [False, True, False, False, False, False]


def test_a_layer_with_a_single_frozen_parameter_is_frozen():
    """Row 12.4: 0.1.61 gives such a group as frozen, and raises an error without a message for the layer."""
    model = make_net()
    freezer = ModelFreezer(model)
    model[3].bias.requires_grad = False
    assert frozen_groups(freezer) == [False, False, False, True]
    assert freezer.get_layers()[-1].is_frozen


def test_an_integer_parameter_does_not_make_its_group_count_as_frozen():
    """Row 12.4, with F3."""
    assert frozen_groups(ModelFreezer(WithInteger())) == [False, False]


def test_a_layer_without_parameters_is_frozen_if_it_is_in_evaluation_mode():
    """Row 12.5; a group without parameters is never frozen."""
    freezer = ModelFreezer(make_net())
    assert not any(layer.is_frozen for layer in freezer.get_layers())
    freezer.freeze(0, 2, set_modules_as_eval=True)
    assert [layer.is_frozen for layer in freezer.get_layers()] == [True, True, False, True, True, False]
    assert frozen_groups(freezer) == [True, True, False, False]


# --- 12.6: names --------------------------------------------------------------------------------------------------


def test_the_freezer_has_the_attributes_of_0_1_61():
    """Row 12.6."""
    freezer = ModelFreezer(make_net(), freeze_batch_norms=True)
    assert freezer.num_groups == 4
    assert freezer.freeze_bn is True
    freezer.freeze_bn = False
    assert freezer.freeze_batch_norms is False


@pytest.mark.parametrize(
    ("indices", "expected"),
    [((-1, -2), (2, 3)), ((0, -2), (0, 2)), ((3, 1), (1, 3)), ((2, 2), (2, 2)), ((-1, 0), (0, 3))],
)
def test_indices_are_converted_to_ascending_ones_from_the_start(indices, expected):
    """Row 12.6."""
    assert ModelFreezer(make_net())._convert_idxs(*indices) == expected


def test_the_module_has_the_function_that_recognizes_batch_norms():
    """Row 12.6: and the method, which subclasses may override to freeze more."""
    assert all(finetuning._module_is_batch_norm(norm(2)) for norm in BN_MODULES)
    assert not finetuning._module_is_batch_norm(nn.LayerNorm(2))

    class SpareTheFirst(ModelFreezer):
        def _module_is_batch_norm(self, module):
            return module is self.model[0]

    freezer = SpareTheFirst(make_net())
    freezer.freeze()
    assert frozen_groups(freezer) == [False, True, False, False]


# --- 12.7, 12.8: what differs on purpose --------------------------------------------------------------------------


def test_freezing_drops_gradients():
    """Row 12.7, ours: an optimizer would apply them, and change frozen parameters."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    ModelFreezer(model).freeze()
    assert model[0].weight.grad is None
    assert model[1].weight.grad is not None


def test_frozen_batch_norms_are_in_evaluation_mode_and_wrong_indices_are_errors_and_a_single_group_stays_trainable():
    """Row 12.8, ours."""
    model = make_net()
    ModelFreezer(model, freeze_batch_norms=True).freeze()
    assert not model.train()[1][1].training
    with pytest.raises(IndexError, match="4 layer groups"):
        ModelFreezer(model).freeze(0, 4)
    single = nn.Sequential(nn.Linear(2, 2))
    ModelFreezer(single).freeze()
    assert all(parameter.requires_grad for parameter in single.parameters())
