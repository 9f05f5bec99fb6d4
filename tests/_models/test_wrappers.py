"""Compiled models: bit-identical to plain ones, no graph break, and no compilation after the first epoch."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import TorchDynamoPlugin
from torch import nn

import _runs
from _support import SOURCE, Probe, losses, make_dataset, make_trainer, mse
from pytorch_accelerated import Trainer

compiled = partial(torch.compile, backend="eager", fullgraph=True)
"""Compiles without a C++ compiler, and raises an error for a graph break."""

NUM_EPOCHS, BATCH_SIZE = 3, 4
FULL, SHORT = 24, 22
"""Numbers of samples with a full and with a short last batch."""


@pytest.fixture(autouse=True)
def _fresh_compiler(_fresh_accelerate_state):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def num_graph_breaks():
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def make_net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))


def run(trainer, num_samples=FULL, *, num_runs=2, drop_last=False, **kwargs):
    """Train, evaluate and predict, ``num_runs`` times.

    Returns:
        All losses, predictions and weights, in order, and the number of graphs compiled by the end of each epoch, and
        by the end of everything.
    """
    results, graphs = [], []
    trainer.callback_handler.add_callback(Probe(on_training_run_epoch_end=lambda _: graphs.append(num_graphs())))
    dataset, sizes = make_dataset(num_samples), {"per_device_batch_size": BATCH_SIZE}
    loading = {"drop_last": drop_last}
    torch.manual_seed(5)
    for _ in range(num_runs):
        trainer.train(
            dataset,
            NUM_EPOCHS,
            dataset,
            train_dataloader_kwargs=loading,
            eval_dataloader_kwargs=loading,
            **sizes,
            **kwargs,
        )
        results += [losses(trainer), losses(trainer, "eval_loss_epoch")]
        trainer.evaluate(dataset, dataloader_kwargs=loading, **sizes)
        results += [losses(trainer, "evaluation_loss"), trainer.predict(make_dataset(FULL), **sizes)]
    results.append(trainer.get_model(keep_torch_compile=False).state_dict())
    return results, [*graphs, num_graphs()]


def train_with_states(folder, *, is_compiled, **kwargs):
    """Train a model with dropout, a schedule, weight averaging and random augmentation; save a state each step."""
    trainer = _runs.make_trainer(folder)
    plain = trainer.model
    if is_compiled:
        trainer.model = compiled(plain)
    return {**_runs.train(trainer, **kwargs), "model": plain.state_dict()}


# --- the numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_accumulated", [1, 4])
def test_a_compiled_model_ends_training_bit_identical_to_the_plain_one(tmp_path, num_accumulated):
    train = partial(train_with_states, gradient_accumulation_steps=num_accumulated)
    expected = train(tmp_path / "plain", is_compiled=False)
    assert num_graphs() == 0
    found = train(tmp_path / "compiled", is_compiled=True)
    assert num_graphs() > 0
    assert _runs.differences(expected, found) == []


def test_a_compiled_model_evaluates_and_predicts_like_the_plain_one():
    expected, _ = run(make_trainer(make_net()), SHORT)
    found, _ = run(make_trainer(compiled(make_net())), SHORT)
    assert _runs.differences(expected, found) == []


def test_a_compiled_backward_pass_trains_like_the_plain_one():
    expected, _ = run(make_trainer(make_net()), SHORT, gradient_accumulation_steps=3)
    model = torch.compile(make_net(), backend="aot_eager", fullgraph=True)
    found, _ = run(make_trainer(model), SHORT, gradient_accumulation_steps=3)
    assert num_graphs() > 0
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("is_compiled_before", "is_compiled_after", "step"), [(True, True, 5), (True, False, 6), (False, True, 8)]
)
def test_a_resumed_run_is_bit_identical_whichever_part_is_compiled(
    tmp_path, is_compiled_before, is_compiled_after, step
):
    """Resumed within an accumulation window, at the end of an epoch, and after an update."""
    train = partial(train_with_states, gradient_accumulation_steps=2)
    expected = train(tmp_path / "uninterrupted", is_compiled=is_compiled_before)
    state = tmp_path / "uninterrupted" / f"step_{step}"
    found = train(tmp_path / "resumed", is_compiled=is_compiled_after, resume_from=state)
    assert _runs.differences(expected, found) == []


def test_files_saved_for_a_compiled_model_have_the_parameter_names_of_the_plain_one(tmp_path):
    trainer = _runs.make_trainer(tmp_path)
    names = set(trainer.model.state_dict())
    trainer.model = compiled(trainer.model)
    _runs.train(trainer, num_epochs=1)
    trainer.save_checkpoint(tmp_path / "checkpoint.pt")
    assert set(torch.load(tmp_path / "step_1" / "model.pt", weights_only=True)) == names
    for saved in ("checkpoint.pt", "average.pt"):
        assert set(torch.load(tmp_path / saved, weights_only=True)["model_state_dict"]) == names


# --- the compilations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_samples", "drop_last", "num_accumulated"), [(FULL, False, 1), (SHORT, True, 3)])
def test_a_model_is_compiled_once_to_train_and_once_to_evaluate(num_samples, drop_last, num_accumulated):
    """In all epochs and runs together. Predictions use the graph that was compiled for evaluation."""
    trainer = make_trainer(compiled(make_net()))
    _, graphs = run(trainer, num_samples, drop_last=drop_last, gradient_accumulation_steps=num_accumulated)
    assert graphs == [2] * (2 * NUM_EPOCHS + 1)


def test_short_last_batches_cause_at_most_one_more_compilation():
    """One each to train and to evaluate. PyTorch then makes the batch size a variable of the graph."""
    _, graphs = run(make_trainer(compiled(make_net())), SHORT)
    assert 2 <= graphs[0] <= 4
    assert graphs == graphs[:1] * (2 * NUM_EPOCHS + 1)


# --- mixed precision ---------------------------------------------------------------------------------------------


def test_a_compiled_model_is_bit_identical_to_the_plain_one_in_bf16():
    """In each run: Accelerate wraps the model again for each."""
    exact, _ = run(make_trainer(make_net()))
    AcceleratorState._reset_state()
    expected, _ = run(make_trainer(make_net(), mixed_precision="bf16"))
    found, graphs = run(make_trainer(compiled(make_net()), mixed_precision="bf16"))
    assert _runs.differences(exact, found) != []
    assert _runs.differences(expected, found) == []
    assert graphs == [2] * (2 * NUM_EPOCHS + 1)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_run_adds_no_attributes_to_the_model_inside_a_compiled_one(mixed_precision):
    net = make_net()
    model = compiled(net)
    names = set(vars(net))
    run(make_trainer(model, mixed_precision=mixed_precision), num_runs=1)
    assert set(vars(net)) == names
    pickle.dumps(net)


# --- compilation by Accelerate -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"dynamo_backend": "eager"}, {"dynamo_plugin": TorchDynamoPlugin(backend="eager", fullgraph=True)}],
    ids=["backend", "plugin"],
)
def test_accelerate_compiles_the_model_for_a_run_and_the_plain_one_is_restored(settings):
    net, seen = make_net(), set()
    look = Probe(on_train_step_end=lambda trainer, **_: seen.add(trainer.model))
    trainer = make_trainer(net, accelerator=settings, callbacks=[look])
    found, graphs = run(trainer)
    assert [model._orig_mod for model in seen] == [net, net], "one wrapper per run"
    assert trainer.model is net
    assert graphs == [2] * (2 * NUM_EPOCHS + 1)
    assert num_graph_breaks() == 0
    expected, _ = run(make_trainer(compiled(make_net())))
    assert _runs.differences(expected, found) == []


def test_a_dynamo_backend_other_than_that_of_the_process_is_refused():
    make_trainer(make_net())
    for settings in ({"dynamo_backend": "eager"}, {"dynamo_plugin": TorchDynamoPlugin(backend="eager")}):
        with pytest.raises(ValueError, match="to compile with 'EAGER', but this process already uses 'NO'"):
            make_trainer(make_net(), accelerator=settings)
    make_trainer(make_net(), accelerator={"dynamo_backend": "no"})


def test_accelerate_compiles_a_model_in_bf16():
    """Once per run, because it wraps the model again for each."""
    net = make_net()
    trainer = make_trainer(net, accelerator={"dynamo_backend": "eager", "mixed_precision": "bf16"})
    found, graphs = run(trainer, num_runs=1)
    assert graphs[:NUM_EPOCHS] == [2] * NUM_EPOCHS
    assert num_graph_breaks() == 0
    assert trainer.model is net
    assert "forward" not in vars(net)
    pickle.dumps(net)
    expected, _ = run(make_trainer(compiled(make_net()), mixed_precision="bf16"), num_runs=1)
    assert _runs.differences(expected, found) == []


# --- other parts of a step ---------------------------------------------------------------------------------------


def mean_square(outputs, targets):
    return mse(outputs, targets)  # older versions of PyTorch cannot compile `mse` itself


@compiled
def loss_of(model, inputs, targets):
    return mse(model(inputs), targets)


class WithCompiledLoss(Trainer):
    """Compiles model and loss function together."""

    def calculate_train_batch_loss(self, batch):
        return {"loss": loss_of(self.model, *batch), "batch_size": len(batch[0])}


class Compiled(Trainer):
    """Compiles the library's code of a step."""

    calculate_train_batch_loss = compiled(Trainer.calculate_train_batch_loss)
    calculate_eval_batch_loss = compiled(Trainer.calculate_eval_batch_loss)
    calculate_predictions = compiled(Trainer.calculate_predictions)


# PyTorch suppresses this warning, but not where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(
    ("settings", "num_expected"),
    [({"loss_func": compiled(mean_square)}, 2), ({"cls": WithCompiledLoss}, 1), ({"cls": Compiled}, 3)],
    ids=["loss function", "model and loss", "steps"],
)
def test_a_step_with_a_compiled_part_is_bit_identical(settings, num_expected):
    expected, _ = run(make_trainer(make_net()), gradient_accumulation_steps=3)
    found, graphs = run(make_trainer(make_net(), **settings), gradient_accumulation_steps=3)
    assert _runs.differences(expected, found) == []
    assert graphs[:NUM_EPOCHS] == graphs[:1] * NUM_EPOCHS
    # The first run ends with predictions. Everything is compiled by then.
    assert graphs[NUM_EPOCHS:] == [num_expected] * (NUM_EPOCHS + 1)


def test_what_compiled_modules_are_called_inside_is_known_in_one_place():
    """Every other module asks `_models/wrappers.py`, which tells them from modules of the user with such a name."""
    found = [path for path in SOURCE.rglob("*.py") if '"_orig_mod' in path.read_text()]
    assert found == [SOURCE / "_models" / "wrappers.py"]
