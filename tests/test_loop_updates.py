"""How many updates a run makes, what ends it, and the learning rate of each update."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import TensorDataset

from _support import (
    IN_ORDER,
    EventRecorder,
    Probe,
    draw_parameters,
    make_dataset,
    make_model,
    make_trainer,
    recorder_of,
    train,
    weights_of,
)
from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated.callbacks import EarlyStoppingCallback, TerminateOnNaNCallback
from pytorch_accelerated.exceptions import NonFiniteLossError
from pytorch_accelerated.schedulers import CosineLrScheduler, WSDLrScheduler, cosine_lr, plan_decays, wsd_lr
from pytorch_accelerated.trainer import TrainerWithTimmScheduler

# --- the number of updates ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`gradient_accumulation_steps` is")
@pytest.mark.parametrize(
    ("num_samples", "num_steps", "num_updates"), [(16, 1, 4), (16, 2, 2), (18, 2, 3), (18, 4, 2), (2, 4, 1)]
)
def test_updates_per_epoch_are_counted_in_optimizer_steps(num_samples, num_steps, num_updates):
    probe, updates = recorder_of(lambda trainer: trainer.progress.num_updates, "on_optimizer_step_start")
    trainer = make_trainer(callbacks=[probe])
    train(trainer, make_dataset(num_samples), num_epochs=2, gradient_accumulation_steps=num_steps)
    config = trainer.run_config
    assert config.num_update_steps_per_epoch == config.num_local_update_steps_per_epoch == num_updates
    assert config.max_num_train_steps == 2 * num_updates
    assert updates == list(range(2 * num_updates))
    assert trainer.progress.num_samples == 2 * num_samples


@pytest.mark.parametrize("max_num_train_steps", [1, 3, 4, 5, 8, 100])
@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_run_ends_exactly_at_the_smaller_of_max_num_train_steps_and_num_epochs(max_num_train_steps, num_steps):
    recorder = EventRecorder()
    trainer = make_trainer(callbacks=[recorder])
    train(
        trainer,
        make_dataset(16),
        num_epochs=2,
        max_num_train_steps=max_num_train_steps,
        gradient_accumulation_steps=num_steps,
    )
    per_epoch = 4 // num_steps
    expected = min(max_num_train_steps, 2 * per_epoch)
    assert recorder.log.count("on_optimizer_step_end") == trainer.progress.num_updates == expected
    assert recorder.log.count("on_train_step_end") == expected * num_steps
    assert recorder.log.count("on_training_run_epoch_end") == math.ceil(expected / per_epoch)
    assert trainer.run_config.max_num_train_steps == expected
    assert trainer.run_history.current_epoch == 1 + math.ceil(expected / per_epoch)


def test_num_epochs_ends_a_run_whose_epochs_differ_in_length():
    """As with loaders whose batches hold a number of tokens, not of samples."""

    class Growing:
        def __init__(self):
            self.num_batches = 1

        def __len__(self):
            return self.num_batches

        def __iter__(self):
            for _ in range(self.num_batches):
                yield make_dataset(2)[:]
            self.num_batches += 1

    recorder = EventRecorder()
    trainer = make_trainer(callbacks=[recorder])
    train(trainer, Growing(), num_epochs=3)
    assert recorder.log.count("on_optimizer_step_end") == 1 + 2 + 3
    assert recorder.log.count("on_training_run_epoch_end") == 3


# --- stopping early ----------------------------------------------------------------------------------------------


def trainer_with_bad_loss(bad_step, factor, stage="train"):
    """Return a trainer class that multiplies the loss of one step of the stage by a value."""

    class BadLossTrainer(Trainer):
        num_steps = 0

        def counted(self, output):
            output["loss"] = output["loss"] * (factor if self.num_steps == bad_step else 1.0)
            self.num_steps += 1
            return output

        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            return self.counted(output) if stage == "train" else output

        def calculate_eval_batch_loss(self, batch):
            output = super().calculate_eval_batch_loss(batch)
            return self.counted(output) if stage == "eval" else output

    return BadLossTrainer


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_loss_ends_the_run_with_an_error_that_names_epoch_step_and_rank(value):
    recorder = EventRecorder()
    model = make_model()
    trainer = make_trainer(model, cls=trainer_with_bad_loss(5, value), callbacks=[TerminateOnNaNCallback, recorder])
    with pytest.raises(NonFiniteLossError, match=r"in training, epoch 2, step 1, rank 0") as caught:
        train(trainer, num_epochs=3)
    assert isinstance(caught.value, ArithmeticError)
    assert recorder.log[-1] == "on_exception"
    assert trainer.model is model


def test_a_non_finite_evaluation_loss_ends_the_run_with_an_error():
    trainer = make_trainer(cls=trainer_with_bad_loss(1, float("nan"), "eval"), callbacks=[TerminateOnNaNCallback])
    with pytest.raises(NonFiniteLossError, match=r"in evaluation, epoch 1, step 1, rank 0"):
        train(trainer, eval_dataset=make_dataset(8))


def test_early_stopping_ends_the_run_and_counts_its_last_epoch():
    stopping = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=0.0)
    trainer = make_trainer(lr=0.0, callbacks=[stopping])
    train(trainer, num_epochs=10, eval_dataset=make_dataset(8))
    assert trainer.run_history.current_epoch == 4  # the first is the best, then two without improvement
    assert "eval_loss_epoch has not improved" in trainer.stop_reason


# --- learning rates ----------------------------------------------------------------------------------------------


def lr_of(trainer):
    return trainer.optimizer.param_groups[0]["lr"]


def lrs_of_run(create_scheduler_fn, num_epochs=3, **kwargs):
    """Train in epochs of five batches; return the learning rate of each update, and the trainer."""
    probe, lrs = recorder_of(lr_of, "on_optimizer_step_start")
    trainer = make_trainer(callbacks=[probe])
    train(trainer, make_dataset(18), num_epochs=num_epochs, create_scheduler_fn=create_scheduler_fn, **kwargs)
    return lrs, trainer


@pytest.mark.parametrize("num_steps", [1, 2])
def test_update_k_uses_the_cosine_learning_rate_of_k(num_steps):
    create = CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1, num_cooldown_epochs=1, lr_min=1e-3)
    lrs, trainer = lrs_of_run(create, gradient_accumulation_steps=num_steps)
    per_epoch = {1: 5, 2: 3}[num_steps]
    curve = [
        cosine_lr(
            update,
            total_updates=3 * per_epoch,
            lr=0.1,
            lr_min=1e-3,
            num_warmup_updates=per_epoch,
            warmup_starting_lr=1e-6,
            num_cooldown_updates=per_epoch,
        )
        for update in range(3 * per_epoch + 1)
    ]
    assert [*lrs, lr_of(trainer)] == pytest.approx(curve, rel=1e-12)
    assert trainer.scheduler.num_updates == 3 * per_epoch


def test_update_k_uses_the_warmup_stable_decay_learning_rate_of_k():
    create = WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=1, num_checkpoints=2, decay_phase_ratio=0.3)
    lrs, trainer = lrs_of_run(create, num_epochs=4)
    decays = plan_decays([10, 20], decay_phase_ratio=0.3)
    curve = [
        wsd_lr(update, decays=decays, lr=0.1, lr_min=1e-6, num_warmup_steps=5, warmup_starting_lr=1e-6)
        for update in range(21)
    ]
    assert [*lrs, lr_of(trainer)] == pytest.approx(curve, rel=1e-12)
    assert curve[10] == 0.1 > curve[9]
    assert curve[20] == pytest.approx(1e-7)


def test_a_one_cycle_schedule_ends_exactly_with_the_last_update():
    def create(optimizer, total_steps):
        return OneCycleLR(optimizer, max_lr=1.0, total_steps=total_steps)

    epochs, updates = TrainerPlaceholderValues.NUM_EPOCHS, TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH
    lrs, _ = lrs_of_run(partial(create, total_steps=epochs * updates), num_epochs=2)
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = OneCycleLR(reference, max_lr=1.0, total_steps=10)
    expected = []
    for _ in range(10):
        expected.append(reference.param_groups[0]["lr"])
        reference.step()
        scheduler.step()
    assert lrs == expected


def test_a_pytorch_scheduler_is_stepped_after_each_update():
    lrs, _ = lrs_of_run(lambda optimizer: StepLR(optimizer, step_size=1, gamma=0.5), num_epochs=1)
    assert lrs == [0.1 * 0.5**update for update in range(5)]


def test_the_new_learning_rate_is_set_before_on_optimizer_step_end():
    probe, lrs = recorder_of(lr_of, "on_optimizer_step_end")
    trainer = make_trainer(callbacks=[probe])
    train(trainer, make_dataset(8), create_scheduler_fn=lambda optimizer: StepLR(optimizer, 1, gamma=0.5))
    assert lrs == [0.05, 0.025]


# --- schedulers of timm ------------------------------------------------------------------------------------------


class RecordingTimmScheduler:
    """Has the two methods of a timm scheduler, and records their calls."""

    def __init__(self, optimizer):
        self.calls = []

    def step_update(self, num_updates):
        self.calls.append(("update", num_updates))

    def step(self, epoch, metric=None):
        self.calls.append(("epoch", epoch))


def test_a_timm_scheduler_is_called_with_updates_and_epochs_from_one_and_not_by_evaluations():
    trainer = make_trainer(cls=TrainerWithTimmScheduler)
    dataset = make_dataset(8)
    train(trainer, dataset, num_epochs=2, eval_dataset=dataset, create_scheduler_fn=RecordingTimmScheduler)
    expected = [("update", 1), ("update", 2), ("epoch", 1), ("update", 3), ("update", 4), ("epoch", 2)]
    assert trainer.scheduler.calls == expected
    assert trainer.num_updates == 4
    trainer.evaluate(dataset)
    assert trainer.scheduler.calls == expected


def test_each_run_counts_the_updates_of_a_timm_scheduler_from_one():
    trainer = make_trainer(cls=TrainerWithTimmScheduler)
    for _ in range(2):
        train(trainer, make_dataset(4), create_scheduler_fn=RecordingTimmScheduler)
        assert trainer.scheduler.calls == [("update", 1), ("epoch", 1)]


def test_a_timm_trainer_trains_without_a_scheduler():
    trainer = make_trainer(cls=TrainerWithTimmScheduler)
    train(trainer)
    assert trainer.num_updates == 4


# --- sparse gradients --------------------------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self, is_sparse):
        super().__init__()
        self.words = nn.Embedding(30, 4, sparse=is_sparse)
        self.out = nn.Linear(4, 1)
        draw_parameters(self, seed=4)

    def forward(self, words):
        return self.out(self.words(words).mean(1))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "clipping",
    [
        {"gradient_clip_norm": 0.1},
        {"gradient_clip_norm": math.inf},
        {"gradient_clip_value": 0.01},
        {"gradient_clip_norm": 0.1, "gradient_clip_value": 0.05},
    ],
)
def test_sparse_gradients_are_clipped_as_dense_ones(clipping, accumulation):
    """Words occur several times in a batch, and the last window of updates is short."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, 30, (22, 5), generator=generator)
    dataset = TensorDataset(words, 5 * torch.randn(22, 1, generator=generator))
    weights, norms = [], []
    for is_sparse in (True, False):
        model = Words(is_sparse)
        of_updates = []
        probe = Probe(on_optimizer_step_end=lambda trainer, seen=of_updates: seen.append(trainer.gradient_norm))
        trainer = Trainer(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.5), callbacks=[probe])
        trainer.train(
            dataset,
            num_epochs=2,
            per_device_batch_size=5,
            train_dataloader_kwargs=IN_ORDER,
            gradient_accumulation_steps=accumulation,
            **clipping,
        )
        weights.append(weights_of(model))
        norms.append([None if norm is None else float(norm) for norm in of_updates])
    torch.testing.assert_close(weights[0], weights[1])
    if "gradient_clip_norm" in clipping:
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    else:
        assert norms[0] == norms[1] == [None] * len(norms[0])


# --- parameters that no optimizer holds --------------------------------------------------------------------------


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 2), nn.Linear(2, 1)
        draw_parameters(self, seed=4)

    def forward(self, inputs):
        return self.head(self.body(inputs).tanh())


def by_hand(dataset, *, num_epochs=2, accumulation=1, max_norm=None, new_group_in_epoch=None):
    """Train the head, with all gradients discarded before each update; return the parameters and the norms."""
    model, norms = TwoLayers(), []
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.5)
    for epoch in range(1, num_epochs + 1):
        if epoch == new_group_in_epoch:
            optimizer.add_param_group({"params": list(model.body.parameters()), "lr": 0.1})
        for start in range(0, len(dataset), 4 * accumulation):
            inputs, targets = dataset[start : start + 4 * accumulation]
            model.zero_grad()
            nn.functional.mse_loss(model(inputs), targets).backward()
            if max_norm is not None:
                norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
            optimizer.step()
    return weights_of(model), norms


@pytest.mark.filterwarnings("ignore:The optimizer does not hold")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("new_group_in_epoch", [None, 2])
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_gradients_that_no_optimizer_discards_do_not_add_up(accumulation, new_group_in_epoch, max_norm):
    """Neither in the norm by which a run clips, nor in the first update of a group that is added later."""

    def add_group(trainer, **kwargs):
        if trainer.run_history.current_epoch == new_group_in_epoch:
            trainer.optimizer.add_param_group({"params": list(trainer.get_model().body.parameters()), "lr": 0.1})

    dataset, model, norms = make_dataset(16), TwoLayers(), []
    note = Probe(on_optimizer_step_end=lambda trainer, **kwargs: norms.append(trainer.gradient_norm))
    callbacks = [Probe(on_train_epoch_start=add_group), note]
    trainer = Trainer(model, nn.MSELoss(), torch.optim.SGD(model.head.parameters(), lr=0.5), callbacks=callbacks)
    trainer.train(
        dataset,
        num_epochs=2,
        per_device_batch_size=4,
        train_dataloader_kwargs=IN_ORDER,
        gradient_accumulation_steps=accumulation,
        gradient_clip_norm=max_norm,
    )
    expected, expected_norms = by_hand(
        dataset, accumulation=accumulation, max_norm=max_norm, new_group_in_epoch=new_group_in_epoch
    )
    torch.testing.assert_close(weights_of(model), expected)
    if max_norm is not None:
        assert [float(norm) for norm in norms] == pytest.approx(expected_norms, rel=1e-5)


@pytest.mark.parametrize("place", ["trainer", "callback"])
def test_gradients_that_an_optimizer_of_the_program_holds_are_left_to_it(place):
    """It may add up those of several updates."""
    model, seen = TwoLayers(), []
    note = Probe(on_train_step_end=lambda trainer, **kwargs: seen.append(trainer.get_model().body.bias.grad.clone()))
    trainer = Trainer(model, nn.MSELoss(), torch.optim.SGD(model.head.parameters(), lr=0.0), callbacks=[note])
    owner = trainer if place == "trainer" else note
    owner.own_optimizer = torch.optim.SGD(model.body.parameters(), lr=0.0)
    trainer.train(make_dataset(8), num_epochs=2, per_device_batch_size=8)
    torch.testing.assert_close(seen[1], 2 * seen[0])
