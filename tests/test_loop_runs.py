"""What a run leaves behind: gradients, optimizer state, history, memory, and the model itself."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR

from _support import (
    IN_ORDER,
    EventRecorder,
    Probe,
    Samples,
    SizedBatches,
    assert_same_weights,
    gradients_of,
    losses,
    make_dataset,
    make_model,
    make_trainer,
    mse,
    raiser,
    recorder_of,
    train,
    weights_of,
)
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import get_default_callbacks
from pytorch_accelerated.exceptions import StopTrainingError

# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The optimizer does not hold")
def test_gradients_from_before_a_run_do_not_enter_its_first_update():
    weights = []
    for value in (None, 1e6):
        model = make_model()
        model.extra = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([model.weight, model.bias], lr=0.1)
        for parameter in model.parameters():
            parameter.grad = None if value is None else torch.full_like(parameter, value)
        train(Trainer(model, mse, optimizer, callbacks=()))
        weights.append(weights_of(model))
    assert_same_weights(*weights)


def test_gradients_of_a_failed_run_do_not_enter_the_next_run():
    in_order = {"train_dataloader_kwargs": {"shuffle": False}}
    reference = make_trainer()
    train(reference, **in_order)

    trainer = make_trainer(callbacks=[EventRecorder(reactions={"on_train_step_end": raiser(LookupError())})])
    with pytest.raises(LookupError):
        train(trainer, gradient_accumulation_steps=4)
    trainer.callback_handler.clear_callbacks()
    train(trainer, **in_order)
    assert_same_weights(weights_of(reference.model), weights_of(trainer.model))


def test_gradients_of_an_epoch_shorter_than_its_loader_reports_do_not_enter_the_next_epoch():
    """A loader that drops bad batches yields fewer than it reports."""
    probe, gradients = recorder_of(gradients_of, "on_optimizer_step_start")
    trainer = make_trainer(lr=0.0, callbacks=[probe])
    dataset = make_dataset(12)
    loader = SizedBatches(dataset, 4, length=4)  # yields three
    train(trainer, loader, num_epochs=2, gradient_accumulation_steps=2)
    model = make_model()
    mse(model(dataset[:8][0]), dataset[:8][1]).backward()
    first_updates = [gradients[0], gradients[len(gradients) // 2]]
    for gradient in first_updates:
        torch.testing.assert_close(gradient["weight"], model.weight.grad)
    assert len(gradients) == 4  # the short windows make updates too


# --- several runs of one trainer ---------------------------------------------------------------------------------


def test_a_second_run_continues_with_the_model_and_the_optimizer_state_of_the_first():
    """Momentum is kept; progress and history start from scratch."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = Trainer(model, mse, optimizer, callbacks=())
    for _ in range(2):
        train(trainer, train_dataloader_kwargs=IN_ORDER)
        assert len(losses(trainer)) == 1
        assert trainer.progress.num_updates == 4
    once = make_model()
    reference = Trainer(once, mse, torch.optim.SGD(once.parameters(), lr=0.1, momentum=0.9), callbacks=())
    train(reference, num_epochs=2, train_dataloader_kwargs=IN_ORDER)
    assert_same_weights(weights_of(once), weights_of(model))


def test_a_run_without_reset_run_history_continues_the_epoch_count():
    epochs = []
    probe = Probe(on_train_epoch_start=lambda trainer, **kwargs: epochs.append(trainer.run_history.current_epoch))
    trainer = make_trainer(callbacks=[probe])
    train(trainer, num_epochs=2)
    train(trainer, num_epochs=2, reset_run_history=False)
    assert epochs == [1, 2, 3, 4]
    assert len(losses(trainer)) == 4
    train(trainer, num_epochs=1)
    assert epochs[4:] == [1]
    assert len(losses(trainer)) == 1


def test_a_second_run_does_not_keep_the_scheduler_the_evaluation_or_the_stop_of_the_first():
    recorder = EventRecorder(reactions={"on_eval_epoch_end": raiser(StopTrainingError())})
    trainer = make_trainer(callbacks=[recorder])
    dataset = make_dataset(8)
    train(trainer, eval_dataset=dataset, create_scheduler_fn=lambda optimizer: StepLR(optimizer, 1))
    assert trainer.stop_reason == "a callback asked to stop"
    recorder.log.clear()
    train(trainer, num_epochs=2)
    assert trainer.scheduler is None
    assert "on_eval_epoch_start" not in recorder.log
    assert recorder.log.count("on_train_epoch_end") == 2
    assert trainer.stop_reason == "2 epochs are done"


def test_parameter_groups_that_the_user_adds_between_runs_are_trained():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    trainer = Trainer(model, mse, optimizer, callbacks=())
    frozen = weights_of(model[0])
    train(trainer)
    assert_same_weights(frozen, weights_of(model[0]))
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})
    rates = []
    probe = Probe(
        on_training_run_start=lambda trainer, **k: rates.extend(group["lr"] for group in trainer.optimizer.param_groups)
    )
    trainer.callback_handler.add_callback(probe)
    train(trainer, create_scheduler_fn=lambda optimizer: LambdaLR(optimizer, lambda step: 1.0))
    assert rates == [0.1, 0.01]
    assert not torch.equal(frozen["weight"], model[0].weight)


# --- memory and the model ----------------------------------------------------------------------------------------


def test_a_trainer_is_freed_with_its_last_reference():
    """Without a garbage collection: until the next one, the workers of its loaders would live on."""
    gc.collect()
    gc.disable()
    try:
        trainer = make_trainer(callbacks=get_default_callbacks(progress_bar=False))
        train(trainer, eval_dataset=make_dataset(8))
        reference = weakref.ref(trainer)
        del trainer
        assert reference() is None
    finally:
        gc.enable()


def test_a_run_keeps_no_reference_to_outputs_and_data():
    class Data(Samples):
        pass

    references = []
    for limit in (None, 1):  # the second run ends mid-epoch
        dataset = Data(make_dataset(8))
        outputs = []
        probe = Probe(
            on_train_step_end=lambda trainer, batch_output, **kwargs: outputs.append(  # noqa: B023
                weakref.ref(batch_output["model_outputs"])
            )
        )
        trainer = make_trainer(callbacks=[probe])
        train(trainer, dataset, eval_dataset=Data(make_dataset(8)), max_num_train_steps=limit)
        references.extend(outputs)
        references.append(weakref.ref(dataset))
        del dataset, trainer, probe
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


def test_after_a_run_the_model_is_unwrapped_and_has_no_new_attributes():
    model = make_model()
    attributes = set(vars(model))
    trainer = make_trainer(model)
    train(trainer)
    trainer.evaluate(make_dataset(4))
    assert trainer.model is model
    assert set(vars(model)) == attributes
    assert trainer._accelerator._models == trainer._accelerator._optimizers == trainer._accelerator._dataloaders == []
