"""The table of a model: its rows, and that finding the shapes leaves no trace."""

from __future__ import annotations

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from _support import IMPOSSIBLE_COUNTS
from pytorch_accelerated.finetuning import ModelFreezer
from pytorch_accelerated.summary import modules_left_in_eval_mode, summarize


class Net(nn.Module):
    """Has shared, frozen, integer and own parameters, nested outputs, and a module that is never called."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(4))
        self.embedding = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.table = nn.Module()
        self.table.codes = nn.Parameter(torch.zeros(6, dtype=torch.int8), requires_grad=False)
        self.blocks[0].requires_grad_(False)

    def forward(self, ids, scale=1.0):
        hidden = self.embedding(ids) * scale + self.token
        for block in self.blocks:
            hidden = block(hidden)
        return {"logits": self.head(self.norm(hidden)), "states": (hidden, hidden), "name": "net"}


IDS = torch.zeros(3, dtype=torch.long)
OUTPUT_OF_NET = {"logits": (3, 10), "states": [(3, 4), (3, 4)], "name": None}


def columns(summary, *names):
    return [tuple(row[name] for name in names) for row in summary.to_rows()]


# --- rows --------------------------------------------------------------------------------------------------------


def test_the_rows_are_the_model_its_own_parameters_and_its_layer_groups():
    summary = summarize(Net(), IDS)
    assert columns(summary, "layer_group", "name", "module_class", "output_shape", "num_parameters", "state") == [
        (None, "", "Net", OUTPUT_OF_NET, 98, "partly"),
        (0, "(own parameters)", "Parameter", None, 4, "trainable"),
        (0, "embedding", "Embedding", (3, 4), 40, "trainable"),
        (1, "blocks", "ModuleList", None, 40, "partly"),
        (2, "norm", "BatchNorm1d", (3, 4), 8, "trainable"),
        (3, "head", "Linear", (3, 10), 40, "trainable"),
        (4, "table", "Module", None, 6, "frozen"),
    ]
    assert (summary.num_parameters, summary.num_trainable, summary.num_frozen) == (98, 72, 26)


def test_layer_groups_are_those_of_the_freezer():
    model = Net()
    groups = [row.name for row in summarize(model).rows if row.layer_group is not None and "own" not in row.name]
    assert [dict(model.named_children())[name] for name in groups] == [
        group.module for group in ModelFreezer(model).get_layer_groups()
    ]


def test_shared_parameters_are_marked_and_count_once_in_the_total():
    summary = summarize(Net())
    assert [row.name for row in summary.rows if row.num_shared == 40] == ["embedding", "head"]
    assert sum(row.num_shared for row in summary.rows) == 80
    assert "40*" in str(summary)
    assert "98 parameters" in str(summary)


def test_data_types_and_sizes_include_integers_and_buffers():
    summary = summarize(Net())
    assert columns(summary, "dtypes", "num_bytes")[0] == (("float32", "int8"), 92 * 4 + 6 + 2 * 4 * 4 + 8)
    assert columns(summary, "dtypes", "num_bytes")[-1] == (("int8",), 6)
    assert summary.num_bytes == summary.rows[0].num_bytes


@pytest.mark.parametrize(
    ("depth", "names"),
    [(1, ["", "0", "1"]), (2, ["", "0", "0.0", "0.1", "1"]), (None, ["", "0", "0.0", "0.1", "0.1.0", "1"])],
)
def test_the_depth_decides_how_many_levels_are_shown(depth, names):
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU())), nn.Linear(2, 1))
    assert [row.name for row in summarize(model, depth=depth).rows] == names


def test_a_model_without_submodules_or_parameters_has_one_row():
    summary = summarize(nn.ReLU(), torch.zeros(2, 3))
    assert columns(summary, "layer_group", "output_shape", "num_parameters", "state", "dtypes") == [
        (0, (2, 3), 0, "", ())
    ]
    assert "0 parameters (0 trainable, 0 frozen), 0 B" in str(summary)


def test_several_models_have_a_row_each_and_their_names_in_front():
    models = {"generator": nn.Sequential(nn.Linear(2, 3)), "critic": nn.Linear(3, 1)}
    summary = summarize(models, {"generator": torch.zeros(4, 2)})
    assert columns(summary, "name", "output_shape", "num_parameters") == [
        ("generator", (4, 3), 9),
        ("generator.0", (4, 3), 9),
        ("critic", None, 4),
    ]
    assert summary.num_parameters == 13


def test_parameters_that_two_models_share_count_once():
    encoder = nn.Linear(2, 3)
    summary = summarize({"a": nn.Sequential(encoder), "b": nn.Sequential(encoder, nn.ReLU())})
    assert summary.num_parameters == 9
    assert [row.num_shared for row in summary.rows] == [0] * 5  # the same module, not another that uses its weights


def test_a_model_on_the_meta_device_has_shapes_and_sizes():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1000, 10_000), nn.Dropout())
    summary = summarize(model, torch.zeros(2, 1000))
    assert summary.rows[0].output_shape == (2, 10_000)
    assert (summary.num_parameters, summary.num_bytes) == (10_010_000, 40_040_000)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrappers_are_looked_through(wrap):
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert summarize(wrap(plain), torch.zeros(3, 2)) == summarize(plain, torch.zeros(3, 2))


def test_a_model_in_ddp_is_looked_through():
    plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(plain)
        summary = summarize(wrapped, torch.zeros(3, 2))
        del wrapped
    finally:
        torch.distributed.destroy_process_group()
    assert summary == summarize(plain, torch.zeros(3, 2))


def test_compiled_models_are_called_without_compilation():
    num_compilations = []

    def backend(graph, inputs):
        num_compilations.append(1)
        return graph

    inner = torch.compile(nn.Linear(2, 2), backend=backend)
    in_place = nn.Linear(2, 2)
    in_place.compile(backend=backend)
    model = torch.compile(nn.Sequential(inner, in_place), backend=backend)
    summary = summarize(model, torch.zeros(3, 2), depth=None)
    assert columns(summary, "name", "output_shape") == [("", (3, 2)), ("0", (3, 2)), ("1", (3, 2))]
    assert num_compilations == []
    model(torch.zeros(3, 2))
    assert num_compilations == [1]


# --- inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example_input", [IDS, (IDS, 2.0), {"ids": IDS, "scale": 2.0}])
def test_an_input_is_one_argument_a_tuple_of_them_or_a_mapping(example_input):
    assert summarize(Net(), example_input).rows[0].output_shape == OUTPUT_OF_NET


def test_the_error_of_a_model_tells_what_an_input_may_be():
    with pytest.raises(TypeError) as caught:
        summarize(nn.Linear(2, 2), (2, 3))
    assert "Expected its argument, a tuple of its positional arguments" in caught.value.__notes__[0]


@pytest.mark.parametrize("depth", [depth for depth, _ in IMPOSSIBLE_COUNTS])
def test_an_impossible_depth_is_refused(depth):
    with pytest.raises((TypeError, ValueError), match="depth"):
        summarize(Net(), depth=depth)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"`model` is a str\. Expected a module"):
        summarize("resnet")
    with pytest.raises(TypeError, match=r"`model\['a'\]` is a str"):
        summarize({"a": "resnet"})


def test_an_input_for_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match=r"`example_input` has \['c'\], but the models are \['a', 'b'\]"):
        summarize({"a": nn.ReLU(), "b": nn.ReLU()}, {"c": IDS})


def test_a_trainable_parameter_that_no_optimizer_holds_is_told_of():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model)
    with pytest.warns(UserWarning, match=r"does not hold 2 of the 4 .*'1.weight', '1.bias'"):
        summarize(model, optimizer=first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summarize(model, optimizer=[first, second])
        summarize(model, optimizer={"first": first, "second": second})
        summarize(model)


# --- no trace ----------------------------------------------------------------------------------------------------


class Messy(nn.Module):
    """Changes everything that a forward pass can change."""

    def __init__(self, error=None):
        super().__init__()
        self.embedding = nn.Embedding(5, 4, max_norm=0.1)  # scales its weights in place
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("late", None)
        self.calls, self.seen, self.cache, self.error = 0, [], {}, error

    def forward(self, ids):
        self.train()
        hidden = self.dropout(self.norm(self.embedding(ids)))
        self.count += 1
        self.replaced = self.replaced + torch.rand(2)
        self.late = torch.ones(1) * random.random() * np.random.rand()
        self.calls += 1
        self.seen.append(ids)
        self.cache["last"] = hidden
        self.new_attribute = hidden
        self.norm.weight.grad = torch.ones(4)
        ids += 1
        if self.error is not None:
            raise RuntimeError(self.error)
        return hidden


def state_of(model):
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    return copy.deepcopy(
        (attributes, model.state_dict(), torch.get_rng_state(), random.getstate(), np.random.get_state())
    )


def assert_equal(left, right):
    assert type(left) is type(right)
    if isinstance(left, (torch.Tensor, np.ndarray)):
        assert (left == right).all()
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for name, item in left.items():
            assert_equal(item, right[name])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for items in zip(left, right, strict=True):
            assert_equal(*items)
    elif not isinstance(left, nn.Module):
        assert left == right


@pytest.mark.parametrize("error", [None, "out of memory"])
def test_finding_the_shapes_leaves_no_trace(error):
    model, ids = Messy(error), torch.tensor([1, 2, 3])
    model.dropout.eval()
    model.norm.bias.grad = torch.ones(4)
    tensors = {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    before = state_of(model)
    if error is None:
        assert summarize(model, ids).rows[0].output_shape == (3, 4)
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            summarize(model, ids)
    assert_equal(state_of(model), before)
    assert model.norm.weight.grad is None
    assert model.norm.bias.grad.tolist() == [1] * 4
    assert {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]} == tensors
    assert ids.tolist() == [1, 2, 3]
    assert not any(module._forward_hooks for module in model.modules())


def test_lazy_modules_are_counted_and_stay_uninitialized():
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.LazyBatchNorm1d())
    before = torch.get_rng_state()
    known = summarize(model, torch.zeros(2, 5))
    assert columns(known, "module_class", "num_parameters", "output_shape")[1] == ("Linear", 18, (2, 3))
    assert (known.num_parameters, known.num_uninitialized) == (24, 0)
    assert torch.equal(torch.get_rng_state(), before)
    unknown = summarize(model)
    assert (unknown.num_parameters, unknown.num_uninitialized) == (0, 6)
    assert "? without 6 tensors" in str(unknown)
    assert model(torch.zeros(2, 7)).shape == (2, 3)


# --- modes -------------------------------------------------------------------------------------------------------


def create_model():
    return nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout()), nn.Linear(2, 1))


def test_modules_left_in_eval_mode_are_named_by_the_outermost():
    model = create_model()
    assert modules_left_in_eval_mode(model) == []
    model[0].eval()
    assert modules_left_in_eval_mode(model) == ["0"]
    model[0][0].train()
    assert modules_left_in_eval_mode(model) == ["0", "0.1", "0.2"]
    assert modules_left_in_eval_mode(model.eval()) == ["Sequential"]


def test_frozen_parts_may_be_in_eval_mode():
    frozen = create_model()
    frozen[0].eval().requires_grad_(False)
    assert modules_left_in_eval_mode(frozen) == []
    kept = create_model()
    ModelFreezer(kept).freeze(0, 0, set_modules_as_eval=True)
    kept.train()
    for parameter in kept[0][1].parameters():
        parameter.requires_grad = True
    assert not kept[0][1].training
    assert modules_left_in_eval_mode(kept) == []
