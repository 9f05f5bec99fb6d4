"""The callback that prints a table of the model when training starts."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from _support import (
    IMPOSSIBLE_COUNTS,
    Probe,
    assert_same_weights,
    make_dataset,
    make_trainer,
    raiser,
    train,
    weights_of,
)
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import ModelSummaryCallback
from pytorch_accelerated.finetuning import ModelFreezer


def create_model():
    return nn.Sequential(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout()), nn.Sequential(nn.ReLU(), nn.Linear(4, 1))
    )


def create_trainer(*callbacks, model=None, cls=Trainer, **kwargs):
    model = create_model() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return cls(model, nn.functional.mse_loss, optimizer, callbacks=callbacks, **kwargs)


def run(trainer, **kwargs):
    trainer.train(make_dataset(12), num_epochs=2, per_device_batch_size=4, **kwargs)
    return trainer


def shapes(callback):
    return {row.name: row.output_shape for row in callback.summary.rows}


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


# --- the table ---------------------------------------------------------------------------------------------------


def test_the_table_is_printed_once_a_run_before_the_first_update(capsys):
    printed = []
    probe = Probe(on_optimizer_step_start=lambda *_, **__: printed.append(capsys.readouterr().out))
    trainer = run(create_trainer(callback := ModelSummaryCallback(), probe))
    assert str(callback.summary) in printed[0]
    assert not any("parameters" in text for text in printed[1:])
    printed.clear()
    run(trainer)
    assert str(callback.summary) in printed[0]


@pytest.mark.parametrize("depth", [1, None])
def test_shapes_are_those_of_the_first_batch(depth):
    run(create_trainer(callback := ModelSummaryCallback(depth)))
    assert shapes(callback)["1"] == (4, 1)
    assert shapes(callback).get("0.2", (4, 4)) == (4, 4)
    assert len(callback.summary.rows) == (3 if depth == 1 else 8)
    assert callback.summary.num_parameters == 29


def test_training_is_bit_for_bit_the_same_with_the_callback():
    results = []
    for callbacks in ([], [ModelSummaryCallback()]):
        torch.manual_seed(0)
        trainer = run(create_trainer(*callbacks), eval_dataset=make_dataset(4))
        results.append(
            (weights_of(trainer.model), trainer.run_history.get_metric_values("eval_loss_epoch"), torch.rand(1))
        )
    assert results[0][1:] == results[1][1:]
    assert_same_weights(results[0][0], results[1][0])


@pytest.mark.parametrize("event", ["on_train_epoch_start", "on_train_step_start", "on_backward_start"])
def test_no_hook_is_left_when_a_run_fails_or_succeeds(event):
    trainer = create_trainer(ModelSummaryCallback(), Probe(**{event: raiser(RuntimeError("broken"))}))
    with pytest.raises(RuntimeError, match="broken"):
        run(trainer)
    assert hooks_of(trainer.model) == []
    assert hooks_of(run(create_trainer(ModelSummaryCallback())).model) == []


def test_parts_have_shapes_even_if_the_model_itself_is_never_called():
    class CallsParts(Trainer):
        def calculate_train_batch_loss(self, batch):
            hidden = self.get_model()[0](batch[0])
            return {"loss": hidden.square().mean(), "batch_size": len(hidden)}

    run(create_trainer(callback := ModelSummaryCallback(), cls=CallsParts))
    assert shapes(callback) == {"": None, "0": (4, 4), "1": None}


def test_all_models_of_a_trainer_are_shown_but_no_parts_of_others():
    class TwoModels(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.part = self.model[0]
            self.same = self.model
            self.critic = nn.Linear(1, 2)
            self.no_parameters = nn.ReLU()

        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            self.critic(output["model_outputs"].detach())
            return output

    trainer = run(create_trainer(callback := ModelSummaryCallback(), cls=TwoModels))
    assert shapes(callback) == {"model": (4, 1), "model.0": (4, 4), "model.1": (4, 1), "critic": (4, 2)}
    assert hooks_of(trainer.critic) == []


@pytest.mark.parametrize("is_part_compiled", [True, False])
def test_a_compiled_model_has_shapes_and_is_compiled_as_often_as_without_the_callback(is_part_compiled):
    def num_compilations(*callbacks):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        torch._dynamo.reset()
        model = create_model()
        if is_part_compiled:
            model[0] = torch.compile(model[0], backend=backend)
        else:
            model = torch.compile(model, backend=backend)
        trainer = run(create_trainer(*callbacks, model=model))
        assert hooks_of(trainer.model) == []
        return len(graphs)

    assert num_compilations(callback := ModelSummaryCallback()) == num_compilations()
    assert shapes(callback) == {"": (4, 1), "0": (4, 4), "1": (4, 1)}


@pytest.mark.parametrize("is_compiled", [False, True])
def test_what_a_callback_evaluates_and_predicts_before_the_first_step_does_not_count(is_compiled):
    def evaluate(trainer, **kwargs):
        if trainer.run_history.current_epoch == 1:
            trainer.evaluate(make_dataset(2), per_device_batch_size=2)
            trainer.predict(make_dataset(2), per_device_batch_size=2)

    model = torch.compile(create_model(), backend="eager") if is_compiled else create_model()
    callback = ModelSummaryCallback()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(create_trainer(callback, Probe(on_train_epoch_start=evaluate), model=model))
    assert shapes(callback)[""] == (4, 1)


def test_a_model_that_is_compiled_in_place_is_shown_without_shapes():
    model = create_model()
    model.compile(backend="eager")
    run(create_trainer(callback := ModelSummaryCallback(), model=model))
    assert shapes(callback) == {"": None, "0": None, "1": None}


def test_lazy_modules_are_initialized_by_the_first_batch():
    model = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1))
    trainer = create_trainer(callback := ModelSummaryCallback(), model=model)
    run(trainer)
    assert (callback.summary.num_parameters, callback.summary.num_uninitialized) == (11, 0)


@pytest.mark.parametrize(("depth", "error"), IMPOSSIBLE_COUNTS)
def test_an_impossible_depth_is_refused(depth, error):
    with pytest.raises(error, match="depth"):
        ModelSummaryCallback(depth)


# --- warnings ----------------------------------------------------------------------------------------------------


class LeavesNormsInEvalMode(Trainer):
    def train_epoch_start(self):
        super().train_epoch_start()
        self.model[0][1].eval()


class LeavesModelInEvalMode(Trainer):
    def train_epoch_start(self):
        self.model.eval()


@pytest.mark.parametrize(
    ("cls", "named"), [(LeavesNormsInEvalMode, r"'0\.1'\. There"), (LeavesModelInEvalMode, r"'Sequential'\. There")]
)
def test_modules_left_in_eval_mode_are_told_of_once_at_the_line_of_the_program(cls, named):
    trainer = create_trainer(ModelSummaryCallback(), cls=cls)
    with pytest.warns(UserWarning, match=f"parts of the model in evaluation mode: {named}") as caught:
        run(trainer)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_modules_that_are_frozen_on_purpose_are_not_told_of():
    class KeepsFrozenPartInEvalMode(Trainer):
        def train_epoch_start(self):
            super().train_epoch_start()
            self.model[0].eval()

    frozen, kept = create_model(), create_model()
    frozen[0].requires_grad_(False)
    ModelFreezer(kept).freeze(0, 0, set_modules_as_eval=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(create_trainer(ModelSummaryCallback(), model=frozen, cls=KeepsFrozenPartInEvalMode))
        run(create_trainer(ModelSummaryCallback(), model=kept))
        run(create_trainer(ModelSummaryCallback()))


def test_what_the_trainer_warns_of_itself_is_told_of_once():
    model = create_model()
    trainer = Trainer(
        model,
        nn.functional.mse_loss,
        torch.optim.SGD(model[0].parameters(), lr=0.1),
        callbacks=[ModelSummaryCallback()],
    )
    with pytest.warns(UserWarning, match="does not hold|gradient_accumulation_steps") as caught:
        run(trainer, gradient_accumulation_steps=9)
    texts = [str(each.message) for each in caught]
    assert len(texts) == 2
    assert sum("does not hold 2 of the 6 parameters" in text for text in texts) == 1
    assert sum("`gradient_accumulation_steps` is 9 batches" in text for text in texts) == 1


def test_the_callback_adds_no_event_of_a_step():
    """Otherwise, processes would have to talk to each other at each update."""
    trainer = make_trainer(callbacks=[ModelSummaryCallback()])
    train(trainer)
    events = {"on_train_step_start", "on_backward_start", "on_train_step_end", "on_optimizer_step_start"}
    assert events <= set(trainer.callback_handler.events_without_listeners)
