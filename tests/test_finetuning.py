"""Freezing, unfreezing and learning rates by layer groups, on tiny real models."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from pytorch_accelerated.finetuning import BN_MODULES, ModelFreezer, discriminative_parameter_groups, group_parameters


class TinyViT(nn.Module):
    """A model with a parameter on the root, one on a non-leaf module, and an attention layer with its own weights."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.patches = nn.Linear(4, 8)
        self.block = Block()
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):  # x: (batch, patches, 4)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patches(x)], dim=1)
        return self.head(self.norm(self.block(tokens))[:, 0])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.attention = nn.MultiheadAttention(8, num_heads=2, batch_first=True)

    def forward(self, x):
        return x + self.scale * self.attention(x, x, x)[0]


class TiedLanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens)))


class WithIntegerParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.lookup = nn.ParameterList([nn.Parameter(torch.arange(3), requires_grad=False)])
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x + self.lookup[0])


def make_conv_net():
    return nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), nn.ReLU(), nn.Linear(4, 2))


def trainable_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def train_one_epoch(model, optimizer, make_batch, num_steps=3):
    model.train()
    for _ in range(num_steps):
        model(make_batch()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# --- layer groups and layers --------------------------------------------------------------------------------


def test_creating_a_freezer_that_keeps_frozen_parameters_does_not_change_the_model():
    model = TinyViT()
    model.head.requires_grad_(False)
    before = trainable_names(model)

    ModelFreezer(model, should_keep_frozen=True)

    assert trainable_names(model) == before
    assert model.training


def test_layer_groups_are_the_direct_children_of_the_model_in_order():
    model = TinyViT()
    groups = ModelFreezer(model).get_layer_groups()
    assert [group.module for group in groups] == [model.patches, model.block, model.norm, model.head]
    assert [group.layer_group_idx for group in groups] == [(0, -4), (1, -3), (2, -2), (3, -1)]
    assert not any(group.is_frozen for group in groups)


def test_layers_are_the_modules_without_submodules_each_with_the_index_of_its_group():
    model = TinyViT()
    layers = ModelFreezer(model).get_layers()
    assert [(layer.layer_group_idx, layer.module) for layer in layers] == [
        ((0, -4), model.patches),
        ((1, -3), model.block.attention.out_proj),
        ((2, -2), model.norm),
        ((3, -1), model.head),
    ]


def test_layers_and_groups_report_whether_they_are_frozen():
    model = make_conv_net()
    freezer = ModelFreezer(model, freeze_batch_norms=True)

    freezer.freeze()

    assert [group.is_frozen for group in freezer.get_layer_groups()] == [True, False, False]
    assert [layer.is_frozen for layer in freezer.get_layers()] == [True, True, False, False, False]


@pytest.mark.parametrize(
    "wrap", [DataParallel, lambda model: torch.compile(model, backend="eager")], ids=["parallel", "compiled"]
)
def test_layer_groups_are_found_inside_wrappers(wrap):
    model = TinyViT()
    wrapped = wrap(model)
    freezer = ModelFreezer(wrapped)

    freezer.freeze()

    assert [group.module for group in freezer.get_layer_groups()] == list(model.children())
    assert trainable_names(model) == {"head.weight", "head.bias"}


def test_training_a_frozen_compiled_model_changes_only_its_last_group():
    torch.manual_seed(0)
    model = TinyViT()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ModelFreezer(compiled).freeze(set_modules_as_eval=True)
    before = copy.deepcopy(model.state_dict())

    train_one_epoch(compiled, torch.optim.SGD(model.parameters(), lr=0.1), lambda: torch.randn(2, 3, 4))

    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}
    assert [module.training for module in model.children()] == [False, False, False, True]


def test_batch_norms_are_recognized_by_class_and_subclass():
    class OwnNorm(nn.BatchNorm2d):
        pass

    is_batch_norm = ModelFreezer(TinyViT())._module_is_batch_norm
    assert all(is_batch_norm(norm) for norm in (nn.BatchNorm1d(2), nn.SyncBatchNorm(2), OwnNorm(2)))
    assert not any(is_batch_norm(module) for module in (nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.Linear(2, 2)))
    assert nn.SyncBatchNorm in BN_MODULES


# --- freezing -----------------------------------------------------------------------------------------------


def test_freeze_also_freezes_parameters_of_the_root_and_of_non_leaf_modules():
    model = TinyViT()
    freezer = ModelFreezer(model)

    freezer.freeze()

    assert trainable_names(model) == {"head.weight", "head.bias"}
    assert freezer.get_trainable_parameters() == list(model.head.parameters())


def test_root_parameters_are_frozen_only_with_group_0():
    model = TinyViT()
    ModelFreezer(model).freeze(from_index=1)
    assert trainable_names(model) == {
        "cls_token",
        "patches.weight",
        "patches.bias",
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize(("from_index", "to_index"), [(1, 2), (2, 1), (-3, -2), (-2, 1)])
def test_freeze_accepts_an_inclusive_range_in_either_order(from_index, to_index):
    model = TinyViT()
    freezer = ModelFreezer(model)
    freezer.freeze(from_index, to_index)
    assert [group.is_frozen for group in freezer.get_layer_groups()] == [False, True, True, False]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))], ids=["leaf", "child"])
def test_freeze_never_freezes_the_only_group_unless_its_index_is_passed(model):
    freezer = ModelFreezer(model)
    assert len(freezer.get_layer_groups()) == 1

    freezer.freeze()
    assert len(trainable_names(model)) == 2

    freezer.freeze(to_index=-1, set_modules_as_eval=True)
    assert not trainable_names(model)
    assert not list(model.train().modules())[-1].training


def test_freeze_warns_when_the_last_group_has_nothing_to_train():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Softmax(dim=1))
    with pytest.warns(UserWarning, match="left nothing to train.*3 layer groups, Softmax, has no parameters"):
        ModelFreezer(model).freeze()


def test_a_parameter_shared_by_groups_belongs_to_the_last_of_them():
    model = TiedLanguageModel()
    freezer = ModelFreezer(model)

    freezer.freeze()

    assert freezer.get_trainable_parameters() == [model.head.weight]
    assert model.embedding.weight is model.head.weight
    (body,) = freezer.unfreeze().values()
    assert {id(p) for p in body["params"]} == {id(p) for p in model.body.parameters()}


def test_integer_parameters_stay_untrainable_through_freeze_and_unfreeze():
    model = WithIntegerParameter()
    freezer = ModelFreezer(model)

    freezer.freeze(to_index=-1)
    (head,) = freezer.unfreeze().values()

    assert head["params"] == list(model.head.parameters())
    assert trainable_names(model) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("index", [4, -5])
@pytest.mark.parametrize("method", ["freeze", "unfreeze"])
@pytest.mark.parametrize("argument", ["from_index", "to_index"])
def test_an_index_out_of_range_is_an_error_that_lists_the_groups(method, argument, index):
    model = TinyViT()
    expected = f"`{argument}` is {index}, but the model has 4 layer groups .0 Linear, 1 Block.* from -4 to 3"
    with pytest.raises(IndexError, match=expected):
        getattr(ModelFreezer(model), method)(**{argument: index})
    assert len(trainable_names(model)) == len(list(model.parameters()))


def test_a_gradient_from_before_freezing_does_not_change_a_frozen_parameter():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    before = model[0].weight.clone()

    ModelFreezer(model).freeze()
    optimizer.step()

    assert torch.equal(model[0].weight, before)


# --- batch norms and evaluation mode ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freeze_batch_norms", "set_modules_as_eval", "is_affine_fixed", "are_statistics_fixed"),
    [
        (False, False, False, False),
        (False, True, False, True),
        (True, False, True, True),
        (True, True, True, True),
    ],
)
def test_batch_norms_in_frozen_groups_learn_only_what_the_options_allow(
    freeze_batch_norms, set_modules_as_eval, is_affine_fixed, are_statistics_fixed
):
    torch.manual_seed(0)
    model = make_conv_net()
    norm = model[0][1]
    ModelFreezer(model, freeze_batch_norms).freeze(set_modules_as_eval=set_modules_as_eval)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(norm.state_dict())

    train_one_epoch(model, optimizer, lambda: torch.randn(8, 4) + 3)

    after = norm.state_dict()
    assert torch.equal(after["bias"], before["bias"]) == is_affine_fixed
    assert torch.equal(after["running_mean"], before["running_mean"]) == are_statistics_fixed
    assert (after["num_batches_tracked"] == before["num_batches_tracked"]) == are_statistics_fixed


def test_frozen_modules_stay_in_evaluation_mode_while_the_others_follow_the_model():
    model = make_conv_net()
    ModelFreezer(model).freeze(set_modules_as_eval=True)

    model.train()
    assert not any(module.training for module in model[0].modules())
    assert model.training
    assert model[2].training

    model.eval()
    assert not any(module.training for module in model.modules())
    assert model[0].train() is model[0]


def test_a_module_added_to_a_frozen_group_later_follows_the_mode_of_the_model():
    model = make_conv_net()
    ModelFreezer(model).freeze(set_modules_as_eval=True)
    model[0].append(nn.Dropout())
    model.eval()
    assert not model[0][3].training
    model.train()
    assert [module.training for module in model[0]] == [False, False, False, True]


def test_freeze_does_not_change_module_modes_by_default():
    model = make_conv_net()
    ModelFreezer(model).freeze()
    assert all(module.training for module in model.modules())


def test_unfreeze_makes_the_modules_follow_the_mode_of_the_model_again():
    model = make_conv_net()
    freezer = ModelFreezer(model, freeze_batch_norms=True)
    freezer.freeze(set_modules_as_eval=True)

    freezer.unfreeze()
    assert all(module.training for module in model.modules())
    model.eval()
    assert not any(module.training for module in model.modules())
    model.train()
    assert all(module.training for module in model.modules())
    assert all("train" not in vars(module) for module in model.modules())


def test_unfreeze_leaves_modules_in_evaluation_mode_if_set_modules_as_training_is_false():
    model = make_conv_net()
    freezer = ModelFreezer(model)
    freezer.freeze(set_modules_as_eval=True)

    freezer.unfreeze(set_modules_as_training=False)

    model.train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model[0].modules())


def test_unfreeze_keeps_a_train_method_that_the_module_overrides():
    class FixedNorm(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), FixedNorm(2)), nn.Linear(2, 2))
    freezer = ModelFreezer(model)
    freezer.freeze(set_modules_as_eval=True)
    freezer.unfreeze()
    assert [module.training for module in model[0].children()] == [True, False]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_frozen_model_stays_in_evaluation_mode_independently(duplicate):
    model = make_conv_net()
    ModelFreezer(model).freeze(set_modules_as_eval=True)

    twin = duplicate(model)
    del model
    gc.collect()
    twin.train()
    assert not any(module.training for module in twin[0].modules())
    assert twin[2].training

    ModelFreezer(twin).unfreeze()
    assert all(module.training for module in twin.modules())


def test_unfreezing_a_copy_leaves_the_original_frozen():
    model = make_conv_net()
    ModelFreezer(model).freeze(set_modules_as_eval=True)
    ModelFreezer(copy.deepcopy(model)).unfreeze()
    assert not any(module.training for module in model.train()[0].modules())
    assert trainable_names(model) == {"0.1.weight", "0.1.bias", "2.weight", "2.bias"}


def test_a_frozen_model_is_freed_without_garbage_collection():
    model = make_conv_net()
    ModelFreezer(model).freeze(set_modules_as_eval=True)
    weight = weakref.ref(model[0][0].weight)
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_freezing_does_not_change_the_names_in_the_state_dict():
    model = make_conv_net()
    names = list(model.state_dict())
    ModelFreezer(model).freeze(set_modules_as_eval=True)
    assert list(model.state_dict()) == names


# --- unfreezing ---------------------------------------------------------------------------------------------


def test_unfreeze_returns_the_newly_trainable_parameters_by_group_in_ascending_order():
    model = TinyViT()
    freezer = ModelFreezer(model)
    freezer.freeze()

    assert freezer.unfreeze(to_index=1) == {
        1: {"params": list(model.block.parameters())},
        2: {"params": list(model.norm.parameters())},
    }
    assert freezer.unfreeze() == {0: {"params": [model.cls_token, *model.patches.parameters()]}}
    assert freezer.unfreeze() == {}


def test_unfreeze_returns_no_group_for_parameters_that_were_not_frozen():
    model = make_conv_net()
    freezer = ModelFreezer(model)
    freezer.freeze()
    assert [len(group["params"]) for group in freezer.unfreeze().values()] == [2]  # the norm was never frozen


@pytest.mark.parametrize(("from_index", "to_index"), [(-1, 2), (2, 3), (3, -2)])
def test_unfreeze_accepts_an_inclusive_range_in_either_order(from_index, to_index):
    model = TinyViT()
    freezer = ModelFreezer(model)
    freezer.freeze(to_index=-1)
    freezer.unfreeze(from_index, to_index)
    assert [group.is_frozen for group in freezer.get_layer_groups()] == [True, True, False, False]


# --- parameter groups ---------------------------------------------------------------------------------------


def test_every_floating_point_parameter_is_in_exactly_one_group():
    for model in (TinyViT(), TiedLanguageModel(), WithIntegerParameter(), nn.Linear(2, 2)):
        ModelFreezer(model).freeze()
        grouped = [parameter for group in group_parameters(model) for parameter in group]
        expected = {parameter for parameter in model.parameters() if parameter.is_floating_point()}
        assert len(grouped) == len(expected)
        assert set(grouped) == expected


def test_learning_rates_fall_geometrically_towards_the_input_ignoring_groups_without_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
    groups = discriminative_parameter_groups(model, lr=1.0, decay_factor=0.1)
    assert [group["lr"] for group in groups] == pytest.approx([0.01, 0.1, 1.0])
    assert [group["params"] for group in groups] == [list(model[idx].parameters()) for idx in (0, 2, 4)]


def test_the_default_decay_factor_is_that_of_the_paper():
    groups = discriminative_parameter_groups(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), lr=2.6)
    assert [group["lr"] for group in groups] == pytest.approx([1.0, 2.6])


def test_biases_and_norms_get_no_weight_decay_if_should_decay_1d_weights_is_false():
    model = TinyViT()
    groups = discriminative_parameter_groups(model, lr=0.1, should_decay_1d_weights=False)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.5)

    decay_of = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay_of[model.head.weight] == decay_of[model.cls_token] == 0.5
    assert decay_of[model.head.bias] == decay_of[model.norm.weight] == decay_of[model.block.scale] == 0.0
    assert decay_of.keys() == set(model.parameters())
