"""`ModelEma` compared with the formula of an exponential moving average."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from pytorch_accelerated._models.ema import ModelEma


def make_model():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def change(model):
    """Change a model like a training step: new weights, new statistics, one more batch seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.train()
    model(torch.randn(8, 4) + 1)


def assert_same_state(model, expected):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, msg=name)


def expected_average(states, decay, copied=()):
    """The formula, written independently. Integers and ``copied`` entries are those of the last state."""
    average = states[0]
    for state in states[1:]:
        average = {
            name: value
            if name in copied or not value.is_floating_point()
            else decay * average[name] + (1 - decay) * value
            for name, value in state.items()
        }
    return average


def run(ema, model, num_updates=4):
    torch.manual_seed(0)
    states = [copy.deepcopy(model.state_dict())]
    for _ in range(num_updates):
        change(model)
        ema.update(model)
        states.append(copy.deepcopy(model.state_dict()))
    return states


def test_floats_are_averaged_by_the_formula_and_integers_are_copied():
    model = make_model()
    ema = ModelEma(model, decay=0.9)
    states = run(ema, model)
    assert_same_state(ema.module, expected_average(states, 0.9))
    assert ema.module[1].num_batches_tracked == 4


def test_float_buffers_are_copied_if_should_average_buffers_is_false():
    model = make_model()
    ema = ModelEma(model, decay=0.9, should_average_buffers=False)
    states = run(ema, model)
    assert_same_state(ema.module, expected_average(states, 0.9, copied={"1.running_mean", "1.running_var"}))


def test_the_average_is_a_copy_in_evaluation_mode_without_gradients():
    model = make_model()
    ema = ModelEma(model)
    assert ema.decay == 0.9999
    assert_same_state(ema.module, copy.deepcopy(model.state_dict()))
    assert not any(p.requires_grad for p in ema.parameters())
    assert not any(module.training for module in ema.module.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert model.training

    ema.update(model)
    assert not any(p.requires_grad for p in ema.parameters())


def test_the_decay_can_be_changed_between_updates():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = ModelEma(model, decay=0.5)
    nn.init.ones_(model.weight)
    ema.update(model)
    assert ema.module.weight.item() == 0.5
    ema.decay = 0.0
    ema.update(model)
    assert ema.module.weight.item() == 1.0


def test_set_resets_the_average_to_the_model():
    model = make_model()
    ema = ModelEma(model, decay=0.9)
    change(model)
    ema.set(model)
    assert_same_state(ema.module, model.state_dict())


class TwoStepsBack(ModelEma):
    """Overrides the formula, and counts its calls."""

    num_calls = 0

    def update_fn(self, ema_model_weights, updated_model_weights):
        self.num_calls += 1
        return ema_model_weights + 2 * updated_model_weights


def test_an_overridden_update_fn_is_called_for_each_averaged_tensor():
    model = make_model()
    ema = TwoStepsBack(model)
    before = copy.deepcopy(ema.module.state_dict())
    change(model)

    ema.update(model)

    assert ema.num_calls == 8  # six parameters and two running statistics
    assert torch.equal(ema.module[0].weight, before["0.weight"] + 2 * model[0].weight)
    assert ema.module[1].num_batches_tracked == 1


def test_an_update_fn_set_on_the_instance_is_used():
    model = make_model()
    ema = ModelEma(model)
    ema.update_fn = lambda ema_model_weights, updated_model_weights: updated_model_weights
    change(model)
    ema.update(model)
    assert_same_state(ema.module, model.state_dict())


class WarmingUpEma(ModelEma):
    """A typical user subclass: positional arguments, an overridden `update`, a changing decay."""

    def __init__(self, model, decay):
        super().__init__(model, decay)
        self.final_decay = decay
        self.num_updates = 0

    def update(self, model):
        self.num_updates += 1
        self.decay = min(self.final_decay, self.num_updates / (10 + self.num_updates))
        super().update(model)


def test_a_subclass_can_change_its_decay_in_update():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = WarmingUpEma(model, 0.99)
    nn.init.ones_(model.weight)
    ema.update(model)
    assert ema.module.weight.item() == pytest.approx(10 / 11)


def test_tied_weights_are_averaged_once_and_stay_tied():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    ema = ModelEma(model, decay=0.5)
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)

    ema.update(model)

    assert ema.module[0].weight is ema.module[1].weight
    torch.testing.assert_close(ema.module[0].weight, start + 0.5)


class MaskedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1), persistent=False)
        self.lookup = nn.Parameter(torch.arange(2), requires_grad=False)
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))


def test_infinities_and_integers_are_copied_and_complex_numbers_are_averaged():
    model = MaskedModel()
    ema = ModelEma(model, decay=0.5)
    with torch.no_grad():
        model.lookup.add_(3)
        model.weight.fill_(2 + 2j)

    ema.update(model)

    assert torch.equal(ema.module.mask, model.mask)
    assert torch.equal(ema.module.lookup, model.lookup)
    assert torch.equal(ema.module.weight, torch.full((2,), 1 + 1j))


def test_the_average_of_frozen_weights_stays_bit_identical_to_them():
    model = make_model()
    model[0].requires_grad_(False)
    ema = ModelEma(model, decay=0.123)
    for _ in range(5):
        ema.update(model)
    assert torch.equal(ema.module[0].weight, model[0].weight)


@pytest.mark.parametrize(
    "wrap", [DataParallel, lambda model: torch.compile(model, backend="eager")], ids=["parallel", "compiled"]
)
def test_update_accepts_the_model_wrapped_or_plain(wrap):
    model = make_model()
    wrapped = wrap(model)
    ema = ModelEma(model, decay=0.5)
    change(model)
    ema.update(wrapped)
    twin = copy.deepcopy(ema)
    twin.update(model)
    ema.update(wrapped)
    assert_same_state(ema.module, twin.module.state_dict())


def test_the_average_of_a_compiled_model_has_the_plain_parameter_names():
    model = make_model()
    ema = ModelEma(torch.compile(model, backend="eager"))
    assert_same_state(ema.module, model.state_dict())


def test_a_float32_average_follows_bfloat16_weights():
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    ema = ModelEma(model, decay=0.999).float()
    nn.init.constant_(model.weight, 2.0)

    for _ in range(10):
        ema.update(model)

    assert ema.module.weight.dtype == torch.float32
    assert ema.module.weight.item() == pytest.approx(2 - 0.999**10)


def test_the_average_follows_the_model_to_its_device():
    model = make_model()
    ema = ModelEma(model)
    ema.update(model.to("meta"))
    assert {tensor.device.type for tensor in (*ema.parameters(), *ema.buffers())} == {"meta"}


@pytest.mark.parametrize("replacement", [nn.Linear(4, 1), nn.Linear(4, 2, bias=False)], ids=["shape", "number"])
@pytest.mark.parametrize("method", ["update", "set"])
def test_update_and_set_reject_a_different_model(replacement, method):
    model = make_model()
    ema = ModelEma(model)
    model[2] = replacement
    with pytest.raises(ValueError, match=r"this Sequential differ in number or shape from the 9 .* a new `ModelEma`"):
        getattr(ema, method)(model)


@pytest.mark.parametrize("decay", [-0.1, 1.5])
def test_a_decay_out_of_range_is_rejected(decay):
    with pytest.raises(ValueError, match=f"`decay` is {decay}. Expected .* between 0 and 1"):
        ModelEma(make_model(), decay)


def test_the_state_dict_restores_the_average():
    model = make_model()
    ema = ModelEma(model, decay=0.5)
    run(ema, model)
    restored = ModelEma(make_model(), decay=0.5)
    restored.load_state_dict(ema.state_dict())
    assert_same_state(restored.module, ema.module.state_dict())
