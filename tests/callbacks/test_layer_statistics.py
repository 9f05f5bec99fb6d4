"""The callback that looks into the layers. Its resume is tested with that of the other diagnostics."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import _support
from _support import Probe, make_trainer, raiser
from pytorch_accelerated.callbacks import LayerStatisticsCallback, StopTrainingError

# five steps and three updates per epoch
train = partial(_support.train, dataset=10, num_epochs=2, per_device_batch_size=2, gradient_accumulation_steps=2)


def make_network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 1))


def statistics_of(values):
    values = torch.cat([each.flatten() for each in values]).double()
    return [values.mean().item(), values.std(correction=0).item(), (values == 0).double().mean().item()]


def look(look_at):
    return np.stack([look_at(statistic) for statistic in ("mean", "std", "zeros")], axis=-1)  # (updates, layers, 3)


def hooks_of(model):
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


def test_the_statistics_are_those_of_all_batches_of_the_sampled_updates():
    outputs, gradients = [], []
    model = make_network()

    def note_activations(trainer, batch, **kwargs):
        with torch.no_grad():
            hidden = model[0](batch[0])
            outputs.append([hidden, hidden.relu(), model[2](hidden.relu())])

    def note_gradients(trainer, **kwargs):
        gradients.append([[p.grad.clone() for p in model[index].parameters()] for index in (0, 2)])

    probe = Probe(on_train_step_start=note_activations, on_optimizer_step_start=note_gradients)
    callback = LayerStatisticsCallback(every_n_updates=2)
    train(make_trainer(model, callbacks=[probe, callback]))

    assert callback.updates == [1, 3, 5]
    assert callback.activation_layers == ["0", "1", "2"]
    assert callback.gradient_layers == ["0", "2"]
    batches_of_update = [outputs[0:2], outputs[4:5], outputs[7:9]]
    expected = [
        [statistics_of([each[layer] for each in batches]) for layer in range(3)] for batches in batches_of_update
    ]
    # The inplace ReLU changes what the first layer has returned only after its hook.
    np.testing.assert_allclose(look(callback.activations), expected, rtol=1e-5, atol=1e-6)
    expected = [[statistics_of(layer) for layer in gradients[index]] for index in (0, 2, 4)]
    np.testing.assert_allclose(look(callback.gradients), expected, rtol=1e-5, atol=1e-6)


def test_hooks_are_there_only_during_the_forward_passes_that_are_looked_at():
    counts = []
    probe = Probe(
        on_train_step_start=lambda trainer, **_: counts.append(len(hooks_of(trainer.model))),
        on_backward_start=lambda trainer, **_: counts.append(len(hooks_of(trainer.model))),
    )
    callback = LayerStatisticsCallback(every_n_updates=2)
    train(make_trainer(make_network(), callbacks=[callback, probe]), num_epochs=1)
    assert counts == [3, 0, 3, 0, 0, 0, 0, 0, 3, 0]


class BrokenForward(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, inputs):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("broken"), StopTrainingError("enough"), KeyboardInterrupt()])
def test_no_hook_stays_after_an_error_in_the_forward_pass(error):
    model = nn.Sequential(nn.Linear(3, 1), BrokenForward(error))
    trainer = make_trainer(model, callbacks=[LayerStatisticsCallback(1)])
    if isinstance(error, StopTrainingError):
        train(trainer)
    else:
        with pytest.raises(type(error)):
            train(trainer)
    assert hooks_of(model) == []


def test_a_run_that_is_stopped_has_what_was_seen_until_then_and_a_second_run_starts_anew():
    stop = Probe(on_train_epoch_start=lambda trainer, **_: None)
    callback = LayerStatisticsCallback(1)
    trainer = make_trainer(make_network(), callbacks=[callback, stop])
    trainer.callback_handler.add_callback(Probe(on_optimizer_step_end=raiser(StopTrainingError("enough"))))
    train(trainer)
    assert callback.updates == [1]
    assert callback.activations("std").shape == (1, 3)
    trainer.callback_handler.callbacks.pop()
    train(trainer)
    assert callback.updates == [1, 2, 3, 4, 5, 6]


class Odd(nn.Module):
    """Has a layer that is never called, one that is called twice, and outputs that are no single tensor."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(1, 1)
        self.twice = nn.Linear(3, 3)
        self.recurrent = nn.LSTM(3, 2)
        self.head = nn.Linear(2, 1)

    def forward(self, inputs):
        hidden, _ = self.recurrent(self.twice(self.twice(inputs)))
        return self.head(hidden)


def test_layers_of_all_kinds_are_looked_at():
    model = Odd()
    model.unused.requires_grad_(False)
    callback = LayerStatisticsCallback(1)
    train(make_trainer(model, callbacks=[callback]), num_epochs=1)
    assert callback.activation_layers == ["unused", "twice", "recurrent", "head"]
    assert callback.gradient_layers == ["twice", "recurrent", "head"]
    assert np.isnan(callback.activations("mean")[:, 0]).all()
    assert np.isfinite(callback.activations("mean")[:, 1:]).all()
    assert np.isfinite(callback.gradients("std")).all()
    with pytest.raises(ValueError, match="`statistic` is 'median'"):
        callback.activations("median")


def test_the_table_is_printed_if_asked_for(capsys):
    callback = LayerStatisticsCallback(2, print_table=True)
    assert str(callback) == "no update looked at so far"
    train(make_trainer(make_network(), callbacks=[callback]))
    lines = str(callback).splitlines()
    assert [line.split()[0] for line in lines] == ["update", "activations", "0", "1", "2", "gradients", "0", "2"]
    assert lines[1].split() == ["activations", "mean", "std", "zeros"]
    assert str(callback) in capsys.readouterr().out


def test_of_a_compiled_model_only_the_gradients_are_looked_at():
    model = torch.compile(make_network(), backend="eager")
    callback = LayerStatisticsCallback(1)
    with pytest.warns(UserWarning, match="no activations of a compiled model"):
        train(make_trainer(model, callbacks=[callback]), num_epochs=1)
    assert callback.activations("mean").shape[1] == 0
    assert callback.gradients("mean").shape == (3, 2)
