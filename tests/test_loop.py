"""The loop: numbers, schedules, limits, stopping, evaluation, what a run leaves behind."""

from __future__ import annotations

import gc
import math
import weakref
from functools import partial
from itertools import chain

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from _support import (
    IN_ORDER,
    Batches,
    EventRecorder,
    Probe,
    Samples,
    SizedBatches,
    Stream,
    assert_same_weights,
    losses,
    make_dataset,
    make_model,
    make_trainer,
    mse,
    raiser,
    run_python,
    train,
    weights_of,
)
from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    LimitBatchesCallback,
    LimitEvalStepsCallback,
    StepBasedEvaluationCallback,
    TerminateOnNaNCallback,
    get_default_callbacks,
)
from pytorch_accelerated.exceptions import NonFiniteLossError, StopTrainingError
from pytorch_accelerated.schedulers import CosineLrScheduler, WSDLrScheduler, cosine_lr, plan_decays, wsd_lr
from pytorch_accelerated.tracking import InMemoryRunHistory
from pytorch_accelerated.trainer import TrainerWithTimmScheduler


def at_updates(function):
    """A probe that keeps what the function returns when an update begins, and the list of it."""
    values = []
    return Probe(on_optimizer_step_start=lambda trainer, **kwargs: values.append(function(trainer))), values


def lr_of(trainer):
    return trainer.optimizer.param_groups[0]["lr"]


def gradients_of(trainer):
    return {name: parameter.grad.clone() for name, parameter in trainer.get_model().named_parameters()}


# --- the numbers of an epoch (N1, N2, N8) ------------------------------------------------------------------------


def test_the_epoch_loss_is_the_weighted_mean_of_the_true_batch_losses():
    dataset = make_dataset(10)  # batches of 4, 4 and 2
    trainer = make_trainer(lr=0.0)
    train(trainer, dataset, eval_dataset=make_dataset(7, seed=3))
    model = trainer.model
    assert losses(trainer) == [pytest.approx(mse(model(dataset.tensors[0]), dataset.tensors[1]).item(), rel=1e-6)]
    inputs, targets = make_dataset(7, seed=3).tensors
    assert losses(trainer, "eval_loss_epoch") == [pytest.approx(mse(model(inputs), targets).item(), rel=1e-6)]


@pytest.mark.parametrize("num_samples", [16, 18, 21, 25])
def test_accumulation_reports_the_same_epoch_loss_as_none(num_samples):
    """Windows of four micro-batches of two; the last window and the last batch are short."""
    results = []
    for num_steps in (1, 4):
        trainer = make_trainer(lr=0.0)
        dataset = make_dataset(num_samples)
        train(trainer, dataset, per_device_batch_size=2, gradient_accumulation_steps=num_steps)
        results.extend(losses(trainer))
    assert results[1] == pytest.approx(results[0], abs=1e-6)


@pytest.mark.parametrize("num_samples", [16, 18, 21, 25])
@pytest.mark.parametrize("is_sized", [True, False])
def test_an_accumulated_gradient_equals_that_of_one_big_batch(num_samples, is_sized):
    dataset = make_dataset(num_samples)
    probe, gradients = at_updates(gradients_of)
    trainer = make_trainer(lr=0.0, callbacks=[probe])
    data = dataset if is_sized else Batches(dataset, 2)
    train(
        trainer,
        data,
        per_device_batch_size=2,
        gradient_accumulation_steps=4,
        train_dataloader_kwargs=IN_ORDER,
    )
    assert len(gradients) == math.ceil(num_samples / 8)
    for update, gradient in enumerate(gradients):
        model = make_model()
        inputs, targets = dataset[8 * update : 8 * update + 8]
        mse(model(inputs), targets).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradient[name], parameter.grad, rtol=0, atol=1e-6)


def test_accumulated_training_gives_the_weights_of_training_with_big_batches():
    weights = []
    for batch_size, num_steps in ((8, 1), (2, 4)):
        trainer = make_trainer()
        train(
            trainer,
            make_dataset(21),
            num_epochs=3,
            per_device_batch_size=batch_size,
            gradient_accumulation_steps=num_steps,
            train_dataloader_kwargs=IN_ORDER,
        )
        weights.append(weights_of(trainer.model))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_batches_weigh_what_their_step_says_in_loss_and_gradient(as_tensor):
    """Like tokens: the weight of a batch is `num_items_in_batch`, not its number of samples."""
    dataset = TensorDataset(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.zeros(4, 1))
    num_items = [1, 5, 2, 8]

    class Weighted(Trainer):
        def calculate_train_batch_loss(self, batch):
            number = num_items[int(batch[0].item()) - 1]
            loss = self.model(batch[0]).sum()
            number = torch.tensor(number) if as_tensor else number
            return {"loss": loss, "batch_size": 1, "num_items_in_batch": number}

    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    probe, gradients = at_updates(gradients_of)
    trainer = make_trainer(model, lr=0.0, cls=Weighted, callbacks=[probe])
    train(trainer, dataset, per_device_batch_size=1, gradient_accumulation_steps=4, train_dataloader_kwargs=IN_ORDER)
    expected = sum(number * value for number, value in zip(num_items, (1, 2, 3, 4), strict=True)) / sum(num_items)
    assert gradients[0]["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert losses(trainer) == [pytest.approx(expected, rel=1e-6)]


def test_callbacks_see_the_loss_unscaled_and_the_output_unchanged():
    seen = []

    class Remembering(Trainer):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            self.remembered = (output["loss"], output["loss"].item(), dict(output))
            return output

    def compare(trainer, batch_output, **kwargs):
        loss, value, entries = trainer.remembered
        seen.append(batch_output["loss"] is loss and loss.item() == value and dict(batch_output) == entries)

    probe = Probe(on_backward_start=compare, on_train_step_end=compare)
    train(make_trainer(cls=Remembering, callbacks=[probe]), gradient_accumulation_steps=4)
    assert seen == [True] * 8


def test_the_users_tensors_are_never_changed():
    dataset = make_dataset(10)
    before = [tensor.clone() for tensor in dataset.tensors]
    train(make_trainer(), dataset, eval_dataset=dataset, gradient_accumulation_steps=3, gradient_clip_value=0.1)
    assert all(torch.equal(old, new) for old, new in zip(before, dataset.tensors, strict=True))


def test_a_callback_may_replace_the_loss_before_the_backward_pass():
    def double(trainer, batch_output, **kwargs):
        batch_output["loss"] = batch_output["loss"] * 2

    results = []
    for callbacks in ((), [Probe(on_backward_start=double)]):
        probe, gradients = at_updates(gradients_of)
        trainer = make_trainer(lr=0.0, callbacks=[*callbacks, probe])
        train(trainer, make_dataset(4))
        results.append((losses(trainer)[0], gradients[0]["weight"]))
    assert results[1][0] == pytest.approx(2 * results[0][0], rel=1e-6)
    torch.testing.assert_close(results[1][1], 2 * results[0][1])


def test_metrics_of_a_step_are_averaged_like_the_loss():
    class WithMetrics(Trainer):
        def calculate_train_batch_loss(self, batch):
            return {**super().calculate_train_batch_loss(batch), "metrics": self.metrics(batch)}

        def calculate_eval_batch_loss(self, batch):
            return {**super().calculate_eval_batch_loss(batch), "metrics": self.metrics(batch)}

        def metrics(self, batch):
            mean = batch[0].mean()
            return {"mean": mean, "as_number": mean.item(), "size": len(batch[0]), "hit": True}

    trainer = make_trainer(cls=WithMetrics, lr=0.0)
    dataset, evaluated = make_dataset(10), make_dataset(6, seed=3)
    train(trainer, dataset, eval_dataset=evaluated, gradient_accumulation_steps=2)
    trainer.evaluate(evaluated, per_device_batch_size=4)
    for stage, tensor, size in (
        ("train", dataset.tensors[0], (16 + 16 + 4) / 10),
        ("eval", evaluated.tensors[0], (16 + 4) / 6),
        ("evaluation", evaluated.tensors[0], (16 + 4) / 6),
    ):
        for name in ("mean", "as_number"):
            assert losses(trainer, f"{stage}_{name}") == [pytest.approx(tensor.mean().item(), abs=1e-6)]
        assert losses(trainer, f"{stage}_size") == [pytest.approx(size)]
        assert losses(trainer, f"{stage}_hit") == [1.0]


def test_a_metric_that_only_some_batches_have_is_the_mean_over_those():
    class Sometimes(Trainer):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            return {**output, "metrics": {"size": 2.0} if len(batch[0]) == 2 else None}

    trainer = make_trainer(cls=Sometimes)
    train(trainer, make_dataset(10))
    assert losses(trainer, "train_size") == [2.0]


# --- clipping (N3, one process) ----------------------------------------------------------------------------------


def test_clipping_by_value_happens_once_per_update_on_the_complete_gradient():
    probe = Probe(on_optimizer_step_end=lambda trainer, **kwargs: clipped.append(gradients_of(trainer)))
    before, complete = at_updates(gradients_of)
    clipped = []
    trainer = make_trainer(lr=0.0, callbacks=[before, probe])
    train(trainer, gradient_accumulation_steps=2, gradient_clip_value=0.05)
    assert len(complete) == len(clipped) == 2
    for whole, after in zip(complete, clipped, strict=True):
        assert whole["weight"].abs().max() > 0.05
        torch.testing.assert_close(after["weight"], whole["weight"].clamp(-0.05, 0.05))


# --- updates, limits, schedules (N4, L1) -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_samples", "num_steps", "num_updates"), [(16, 1, 4), (16, 2, 2), (18, 2, 3), (18, 4, 2), (2, 4, 1)]
)
def test_updates_per_epoch_are_counted_in_optimizer_steps(num_samples, num_steps, num_updates):
    probe, updates = at_updates(lambda trainer: trainer.progress.num_updates)
    trainer = make_trainer(callbacks=[probe])
    train(trainer, make_dataset(num_samples), num_epochs=2, gradient_accumulation_steps=num_steps)
    config = trainer.run_config
    assert config.num_update_steps_per_epoch == config.num_local_update_steps_per_epoch == num_updates
    assert config.max_num_train_steps == 2 * num_updates
    assert updates == list(range(2 * num_updates))
    assert trainer.progress.num_samples == 2 * num_samples


@pytest.mark.parametrize("max_num_train_steps", [1, 3, 4, 5, 8, 100])
@pytest.mark.parametrize("num_steps", [1, 2])
def test_the_smaller_of_updates_and_epochs_ends_the_run_exactly(max_num_train_steps, num_steps):
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


def test_epochs_end_a_run_whose_epochs_differ_in_length():
    """As with loaders that put tokens, not samples, into batches."""

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


def lrs_of_run(create_scheduler_fn, num_epochs=3, **kwargs):
    probe, lrs = at_updates(lr_of)
    trainer = make_trainer(callbacks=[probe])
    train(trainer, make_dataset(18), num_epochs=num_epochs, create_scheduler_fn=create_scheduler_fn, **kwargs)
    return lrs, trainer


@pytest.mark.parametrize("num_steps", [1, 2])
def test_update_k_trains_at_the_cosine_of_k(num_steps):
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


def test_update_k_trains_at_the_warmup_stable_decay_of_k():
    create = WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=1, num_checkpoints=2, decay_phase_ratio=0.3)
    lrs, trainer = lrs_of_run(create, num_epochs=4)
    decays = plan_decays([10, 20], decay_phase_ratio=0.3, num_warmup_steps=5)
    curve = [
        wsd_lr(update, decays=decays, lr=0.1, lr_min=1e-6, num_warmup_steps=5, warmup_starting_lr=1e-6)
        for update in range(21)
    ]
    assert [*lrs, lr_of(trainer)] == pytest.approx(curve, rel=1e-12)
    assert curve[10] == pytest.approx(1e-6)


def test_one_cycle_ends_exactly_at_its_last_step():
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


def test_a_scheduler_of_torch_is_stepped_after_each_update():
    lrs, _ = lrs_of_run(lambda optimizer: StepLR(optimizer, step_size=1, gamma=0.5), num_epochs=1)
    assert lrs == [0.1 * 0.5**update for update in range(5)]


def test_the_new_rate_is_set_before_the_event_of_the_end_of_the_update():
    lrs = []
    probe = Probe(on_optimizer_step_end=lambda trainer, **kwargs: lrs.append(lr_of(trainer)))
    trainer = make_trainer(callbacks=[probe])
    train(trainer, make_dataset(8), create_scheduler_fn=lambda optimizer: StepLR(optimizer, 1, gamma=0.5))
    assert lrs == [0.05, 0.025]


class RecordingTimmScheduler:
    """Has the two methods of timm's schedulers."""

    def __init__(self, optimizer):
        self.calls = []

    def step_update(self, num_updates):
        self.calls.append(("update", num_updates))

    def step(self, epoch, metric=None):
        self.calls.append(("epoch", epoch))


def test_timm_schedulers_get_updates_and_epochs_counted_from_one_and_no_evaluation():
    trainer = make_trainer(cls=TrainerWithTimmScheduler)
    dataset = make_dataset(8)
    train(trainer, dataset, num_epochs=2, eval_dataset=dataset, create_scheduler_fn=RecordingTimmScheduler)
    expected = [("update", 1), ("update", 2), ("epoch", 1), ("update", 3), ("update", 4), ("epoch", 2)]
    assert trainer.scheduler.calls == expected
    assert trainer.num_updates == 4
    trainer.evaluate(dataset)
    assert trainer.scheduler.calls == expected


def test_a_second_run_counts_updates_for_timm_schedulers_anew():
    trainer = make_trainer(cls=TrainerWithTimmScheduler)
    for _ in range(2):
        train(trainer, make_dataset(4), create_scheduler_fn=RecordingTimmScheduler)
        assert trainer.scheduler.calls == [("update", 1), ("epoch", 1)]


def test_a_timm_trainer_needs_no_scheduler():
    trainer = make_trainer(cls=TrainerWithTimmScheduler)
    train(trainer)
    assert trainer.num_updates == 4


# --- randomness (N5, N6) -----------------------------------------------------------------------------------------


def orders_of(num_epochs=2, runs=1, dataset=None, trainer_seed=None, dl_kwargs=None, **kwargs):
    """Return the inputs of each batch, in the order of training."""
    seen = []
    probe = Probe(on_train_step_start=lambda trainer, batch, **kwargs: seen.append(batch[0].flatten().tolist()))
    trainer = make_trainer(callbacks=[probe], lr=0.0, seed=trainer_seed)
    for _ in range(runs):
        data = dataset if dataset is not None else make_dataset(16)
        train(trainer, data, num_epochs=num_epochs, train_dataloader_kwargs=dl_kwargs, **kwargs)
    return seen


def test_the_same_seed_gives_a_bit_identical_run():
    results = []
    for _ in range(2):
        torch.manual_seed(11)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        trainer = make_trainer(model)
        train(trainer, num_epochs=3, eval_dataset=make_dataset(8))
        results.append((weights_of(model), losses(trainer), losses(trainer, "eval_loss_epoch")))
    assert_same_weights(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


def test_the_seed_of_the_trainer_gives_a_bit_identical_run_whatever_came_before():
    results = []
    for number in range(2):
        torch.manual_seed(number)
        trainer = Trainer(None, mse, None, callbacks=(), seed=5)
        trainer.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
        train(trainer, num_epochs=2)
        results.append(weights_of(trainer.model))
    assert_same_weights(*results)


def test_the_order_follows_the_seed_and_differs_between_epochs():
    torch.manual_seed(1)
    one = orders_of()
    torch.manual_seed(2)
    other = orders_of()
    torch.manual_seed(1)
    assert orders_of() == one
    assert one != other
    assert one[:4] != one[4:]
    assert sorted(chain(*one[:4])) == sorted(chain(*one[4:]))


def test_the_order_does_not_depend_on_what_was_drawn_before():
    torch.manual_seed(1)
    one = orders_of()
    torch.manual_seed(1)
    torch.rand(100)
    assert orders_of() == one


def test_the_seed_of_the_trainer_decides_the_order():
    assert orders_of(trainer_seed=3) == orders_of(trainer_seed=3)
    assert orders_of(trainer_seed=3) != orders_of(trainer_seed=4)


@pytest.mark.parametrize("kind", ["loader", "sampler"])
def test_the_order_of_an_epoch_does_not_depend_on_what_the_loader_was_used_for_before(kind):
    dataset = make_dataset(16)
    if kind == "loader":
        kwargs = {"dataset": DataLoader(dataset, batch_size=4, shuffle=True)}
    else:
        kwargs = {"dataset": dataset, "dl_kwargs": {"sampler": RandomSampler(dataset)}}
    first = orders_of(num_epochs=2, **kwargs)
    assert orders_of(num_epochs=2, **kwargs) == first


def test_a_run_draws_nothing_from_the_global_generators_for_its_data():
    trainer = make_trainer()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    train(trainer, num_epochs=2, eval_dataset=make_dataset(8))
    assert torch.equal(torch.rand(4), expected)


def dropout_run(eval_dataset=None, callbacks=(), draw=False, **kwargs):
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    class Drawing(Trainer):
        def calculate_eval_batch_loss(self, batch):
            torch.rand(3)  # an evaluation that samples
            return super().calculate_eval_batch_loss(batch)

    trainer = make_trainer(model, cls=Drawing, callbacks=callbacks)
    train(trainer, num_epochs=2, eval_dataset=eval_dataset, **kwargs)
    return weights_of(model)


def test_evaluation_does_not_disturb_training():
    eval_dataset = Samples(make_dataset(8))
    plain = dropout_run()
    shuffled = {"eval_dataloader_kwargs": {"shuffle": True, "num_workers": 0}}
    assert_same_weights(plain, dropout_run(eval_dataset, **shuffled))
    assert_same_weights(plain, dropout_run(eval_dataset, [StepBasedEvaluationCallback(1)], **shuffled))


# --- what a run leaves behind (N6b, N7) --------------------------------------------------------------------------


def test_gradients_from_before_the_run_do_not_enter_it():
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


def test_gradients_of_a_run_that_failed_do_not_enter_the_next():
    reference = make_trainer()
    train(reference)

    trainer = make_trainer(callbacks=[EventRecorder(reactions={"on_train_step_end": raiser(LookupError())})])
    with pytest.raises(LookupError):
        train(trainer, gradient_accumulation_steps=4)
    trainer.callback_handler.clear_callbacks()
    train(trainer)
    assert_same_weights(weights_of(reference.model), weights_of(trainer.model))


def test_gradients_of_an_epoch_whose_length_was_overstated_do_not_enter_the_next():
    """Loaders that drop bad batches give fewer than they say."""
    probe, gradients = at_updates(gradients_of)
    trainer = make_trainer(lr=0.0, callbacks=[probe])
    dataset = make_dataset(12)
    loader = SizedBatches(dataset, 4, length=4)  # three in truth
    train(trainer, loader, num_epochs=2, gradient_accumulation_steps=2)
    model = make_model()
    mse(model(dataset[:8][0]), dataset[:8][1]).backward()
    first_updates = [gradients[0], gradients[len(gradients) // 2]]
    for gradient in first_updates:
        torch.testing.assert_close(gradient["weight"], model.weight.grad)
    assert len(gradients) == 4  # the short windows train too


def test_two_runs_are_as_one_for_model_and_optimizer():
    """Momentum goes on; the schedule, progress and history start anew."""
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


def test_a_second_run_may_go_on_counting_epochs():
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


def test_a_second_run_has_neither_the_scheduler_nor_the_evaluation_nor_the_stop_of_the_first():
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


def test_the_users_optimizer_stays_linked_and_may_get_groups_between_runs():
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


def test_a_trainer_goes_when_the_program_lets_it_go():
    """Not with the next full garbage collection: workers of its loaders would live on until then."""
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


def test_after_a_run_the_loops_tensors_and_the_data_are_free():
    class Data(Samples):
        pass

    references = []
    for limit in (None, 1):  # a loader that was left in the middle too
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


def test_the_model_is_the_plain_one_after_a_run_and_nothing_is_wrapped_around_its_forward():
    model = make_model()
    attributes = set(vars(model))
    trainer = make_trainer(model)
    train(trainer)
    trainer.evaluate(make_dataset(4))
    assert trainer.model is model
    assert set(vars(model)) == attributes
    assert trainer._accelerator._models == trainer._accelerator._optimizers == trainer._accelerator._dataloaders == []


BF16 = """
import copy, pickle
import torch
from _support import make_dataset, make_model, make_trainer, Probe, mse

def forward_of(model):
    return {name: value for name, value in vars(model).items() if "forward" in name}

kinds = []
probe = Probe(on_train_step_end=lambda trainer, batch_output, **k: kinds.append(batch_output["model_outputs"].dtype),
              on_eval_step_end=lambda trainer, batch_output, **k: kinds.append(batch_output["model_outputs"].dtype))

class Linear(torch.nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        inner.append(y.dtype)
        return y

inner = []
model = Linear(3, 1)
attributes, before = set(vars(model)), forward_of(model)
trainer = make_trainer(model, mixed_precision="bf16", callbacks=[probe])
accelerator = trainer._accelerator
dataset = make_dataset(8)
trainer.evaluate(dataset)
for _ in range(2):
    weights = model.weight.clone()
    trainer.train(dataset, num_epochs=1, eval_dataset=dataset, per_device_batch_size=4)
    assert not torch.equal(model.weight, weights)
    assert model.weight.dtype == torch.float32
    assert trainer.model is model
    assert set(vars(model)) == attributes, set(vars(model)) - attributes
    assert forward_of(model) == before
    assert trainer.run_config.mixed_precision == "bf16"
    assert trainer._accelerator is accelerator
    assert "forward" not in vars(model)
assert set(inner) == {torch.bfloat16}, inner
assert set(kinds) == {torch.float32}, kinds      # what Accelerate hands to the loss function
inner.clear()
model(dataset.tensors[0])
assert inner == [torch.float32]
pickle.dumps(model.state_dict())
copy.deepcopy(model)

own = make_model()
own.forward = lambda inputs: inputs.sum(dim=1, keepdim=True) * own.weight.sum()
mine = own.forward
make_trainer(own).train(dataset, num_epochs=1)
assert own.forward is mine

try:
    make_trainer(mixed_precision="fp16")
except ValueError as error:
    print(error)
"""


def test_a_bf16_run_leaves_the_forward_method_as_it_found_it_and_can_be_repeated():
    message = run_python(BF16.replace(", mse", ""))
    assert "`mixed_precision` is 'fp16'" in message
    assert "already uses 'bf16'" in message
    assert "Restart the process" in message


SCALED = """
import torch
from accelerate import AutocastKwargs
from _support import EventRecorder, Probe, make_dataset, make_trainer, weights_of, assert_same_weights
from torch.optim.lr_scheduler import StepLR

def use_scaler(accelerator):
    # Accelerate refuses fp16 without a GPU. Only the scaler is looked at here: the model computes as it is.
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.autocast_handler = AutocastKwargs(enabled=False)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

def run(has_scaler, num_steps=2, **kwargs):
    seen = []
    probe = Probe(on_optimizer_step_start=lambda trainer, **k: seen.append(trainer.model.weight.grad.clone()))
    trainer = make_trainer(callbacks=[probe])
    if has_scaler:
        use_scaler(trainer._accelerator)
    for _ in range(2):
        trainer.train(make_dataset(18), num_epochs=2, per_device_batch_size=4, gradient_clip_value=0.05,
                      gradient_accumulation_steps=num_steps, **kwargs)
        trainer.evaluate(make_dataset(4))
    return trainer, seen

plain, gradients = run(False)
scaled, unscaled = run(True)
assert_same_weights(weights_of(plain.model), weights_of(scaled.model))
assert all(torch.equal(one, other) for one, other in zip(gradients, unscaled, strict=True))
assert scaled._accelerator.scaler.get_scale() == 1024.0

recorder = EventRecorder()
trainer = make_trainer(callbacks=[recorder])
accelerator = trainer._accelerator
use_scaler(accelerator)
def overflow(trainer, batch_output, step, **kwargs):
    if step == 1:
        batch_output["loss"] = batch_output["loss"] * float("inf")
recorder.reactions["on_backward_start"] = overflow
rates = []
recorder.reactions["on_optimizer_step_end"] = lambda trainer, **k: rates.append(
    (trainer.optimizer.param_groups[0]["lr"], trainer.model.weight.isfinite().all().item()))
trainer.train(make_dataset(12), num_epochs=1, per_device_batch_size=4,
              create_scheduler_fn=lambda optimizer: StepLR(optimizer, 1, gamma=0.5))
assert rates == [(0.05, True), (0.05, True), (0.025, True)], rates
assert accelerator.scaler.get_scale() == 512.0
print("done")
"""


def test_scaled_gradients_are_unscaled_once_and_a_skipped_update_steps_no_scheduler():
    """The scaler of fp16 works on the host too, where powers of two scale without a rounding error."""
    assert run_python(SCALED) == "done\n"


# --- stopping (S3) -----------------------------------------------------------------------------------------------


def loss_of_step(bad_step, bad_value, stage="train"):
    """A trainer whose loss is bad in one step."""

    class Bad(Trainer):
        num_steps = 0

        def bad(self, output):
            output["loss"] = output["loss"] * (bad_value if self.num_steps == bad_step else 1.0)
            self.num_steps += 1
            return output

        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            return self.bad(output) if stage == "train" else output

        def calculate_eval_batch_loss(self, batch):
            output = super().calculate_eval_batch_loss(batch)
            return self.bad(output) if stage == "eval" else output

    return Bad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_with_an_error_that_names_the_place(value):
    recorder = EventRecorder()
    model = make_model()
    trainer = make_trainer(model, cls=loss_of_step(5, value), callbacks=[TerminateOnNaNCallback, recorder])
    with pytest.raises(NonFiniteLossError, match=r"in training, epoch 2, step 1, rank 0") as caught:
        train(trainer, num_epochs=3)
    assert isinstance(caught.value, ArithmeticError)
    assert recorder.log[-1] == "on_exception"
    assert trainer.model is model


def test_an_evaluation_loss_that_is_not_finite_ends_the_run_too():
    trainer = make_trainer(cls=loss_of_step(1, float("nan"), "eval"), callbacks=[TerminateOnNaNCallback])
    with pytest.raises(NonFiniteLossError, match=r"in evaluation, epoch 1, step 1, rank 0"):
        train(trainer, eval_dataset=make_dataset(8))


def test_early_stopping_ends_the_run_and_the_epoch_counts():
    stopping = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=0.0)
    trainer = make_trainer(lr=0.0, callbacks=[stopping])
    train(trainer, num_epochs=10, eval_dataset=make_dataset(8))
    assert trainer.run_history.current_epoch == 4  # best in the first, then twice no better
    assert "eval_loss_epoch has not improved" in trainer.stop_reason


# --- evaluation (E2, E3, E4) -------------------------------------------------------------------------------------


def test_evaluation_keeps_the_history_of_training():
    trainer = make_trainer()
    train(trainer, num_epochs=2, eval_dataset=make_dataset(8))
    before = {name: losses(trainer, name) for name in trainer.run_history.get_metric_names()}
    trainer.evaluate(make_dataset(8))
    trainer.evaluate(make_dataset(8))
    after = {name: losses(trainer, name) for name in trainer.run_history.get_metric_names()}
    assert len(after.pop("evaluation_loss")) == 2
    assert after == before
    assert trainer.run_history.current_epoch == 3


def test_evaluation_works_before_training_and_without_an_optimizer():
    model, dataset = make_model(), make_dataset(10)
    trainer = Trainer(model, mse, None, callbacks=())
    before = weights_of(model)
    trainer.evaluate(dataset, per_device_batch_size=4)
    expected = mse(model(dataset.tensors[0]), dataset.tensors[1]).item()
    assert losses(trainer, "evaluation_loss") == [pytest.approx(expected, rel=1e-6)]
    assert_same_weights(before, weights_of(model))
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(trainer)
    assert len(losses(trainer)) == 1


def test_evaluation_before_training_does_not_change_training():
    plain, evaluated = make_trainer(), make_trainer()
    evaluated.evaluate(make_dataset(8))
    for trainer in (plain, evaluated):
        train(trainer, num_epochs=2)
    assert_same_weights(weights_of(plain.model), weights_of(evaluated.model))


def test_evaluation_uses_the_last_dataset_if_none_is_given():
    trainer = make_trainer(lr=0.0)
    train(trainer, eval_dataset=make_dataset(8))
    trainer.evaluate()
    assert losses(trainer, "evaluation_loss") == pytest.approx(losses(trainer, "eval_loss_epoch"))


def test_evaluation_makes_no_gradients():
    states = []
    probe = Probe(on_eval_step_end=lambda trainer, batch_output, **kwargs: states.append(batch_output["loss"]))
    trainer = make_trainer(callbacks=[probe])
    trainer.evaluate(make_dataset(4))
    assert not states[0].requires_grad
    assert not trainer.model.training


def test_an_intermediate_evaluation_keeps_mode_sums_and_history():
    """It comes at step 0 and across epochs; each module gets its own mode back."""
    modes = []
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    class Frozen(Trainer):
        def train_epoch_start(self):
            super().train_epoch_start()
            self.model[1].eval()

    class Remember(EventRecorder):
        def on_train_step_end(self, trainer, **kwargs):
            modes.append([module.training for module in trainer.model.modules()])

    trainer = make_trainer(model, cls=Frozen, callbacks=[StepBasedEvaluationCallback(3), Remember()])
    train(trainer, num_epochs=3, eval_dataset=make_dataset(8))
    assert modes == [[True, True, False, True]] * 12
    assert losses(trainer, "intermediate_update") == [3, 6, 9, 12]
    assert len(losses(trainer, "intermediate_eval_loss_epoch")) == 4
    assert len(losses(trainer, "eval_loss_epoch")) == 3
    assert len(losses(trainer)) == 3

    plain = make_trainer(lr=0.0)
    evaluated = make_trainer(lr=0.0, callbacks=[StepBasedEvaluationCallback(1)])
    train(plain)
    train(evaluated, eval_dataset=make_dataset(8))
    assert losses(evaluated) == losses(plain)
    assert losses(evaluated, "intermediate_update") == [1, 2, 3, 4]


def test_an_intermediate_evaluation_counts_updates_not_steps():
    trainer = make_trainer(callbacks=[StepBasedEvaluationCallback(1)])
    train(trainer, gradient_accumulation_steps=2, eval_dataset=make_dataset(4))
    assert losses(trainer, "intermediate_update") == [1, 2]


def test_an_evaluation_can_be_limited_to_some_steps():
    recorder = EventRecorder()
    trainer = make_trainer(callbacks=[LimitEvalStepsCallback(1, limit_intermediate_only=False), recorder])
    train(trainer, eval_dataset=make_dataset(16))
    assert recorder.log.count("on_eval_step_end") == 1
    trainer.callback_handler.callbacks.pop(0)
    trainer.evaluate(make_dataset(16), per_device_batch_size=4)
    assert recorder.log.count("on_eval_step_end") == 1 + 4


def test_the_metrics_of_several_evaluation_datasets_carry_their_names():
    trainer = make_trainer(lr=0.0, callbacks=[StepBasedEvaluationCallback(4)])
    datasets = {"near": make_dataset(8, seed=3), "far": make_dataset(6, seed=4)}
    train(trainer, eval_dataset=datasets)
    trainer.evaluate({"other": make_dataset(4, seed=5)})
    model = trainer.model
    for name, dataset in datasets.items():
        expected = [pytest.approx(mse(model(dataset.tensors[0]), dataset.tensors[1]).item(), rel=1e-6)]
        assert losses(trainer, f"{name}_eval_loss_epoch") == expected
        assert losses(trainer, f"{name}_intermediate_eval_loss_epoch") == expected
    assert len(losses(trainer, "other_evaluation_loss")) == 1
    assert "eval_loss_epoch" not in trainer.run_history.get_metric_names()
    assert trainer.eval_dataset.keys() == {"other"}
    assert trainer.run_history.metric_name_prefix == ""


def test_an_evaluation_within_a_run_leaves_the_run_as_it_was():
    def evaluate(trainer, **kwargs):
        trainer.evaluate(make_dataset(4), per_device_batch_size=2)
        trainer.model.train()

    plain, nested = make_trainer(), make_trainer(callbacks=[Probe(on_train_epoch_end=evaluate)])
    for trainer in (plain, nested):
        train(trainer, num_epochs=2, eval_dataset=make_dataset(8))
    assert_same_weights(weights_of(plain.model), weights_of(nested.model))
    assert losses(nested) == losses(plain)
    assert losses(nested, "eval_loss_epoch") == losses(plain, "eval_loss_epoch")
    assert len(losses(nested, "evaluation_loss")) == 2
    assert nested.run_config.num_epochs == 2


# --- data of every kind (D4) -------------------------------------------------------------------------------------


def trained_on(data, **kwargs):
    """Return the weights, and how many batches and updates there were."""
    recorder = EventRecorder()
    trainer = make_trainer(callbacks=[recorder])
    train(trainer, data, train_dataloader_kwargs=None, **kwargs)
    counts = [recorder.log.count(event) for event in ("on_train_step_end", "on_optimizer_step_end")]
    return weights_of(trainer.model), counts, trainer


def reference_weights(num_samples=10, num_epochs=1, num_steps=1):
    trainer = make_trainer()
    train(
        trainer,
        make_dataset(num_samples),
        num_epochs=num_epochs,
        train_dataloader_kwargs=IN_ORDER,
        gradient_accumulation_steps=num_steps,
    )
    return weights_of(trainer.model)


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize(
    "make_data",
    [
        lambda dataset: Stream(dataset),
        lambda dataset: Batches(dataset, 4),
        lambda dataset: SizedBatches(dataset, 4, 3),
        lambda dataset: DataLoader(dataset, batch_size=4),
        lambda dataset: DataLoader(Stream(dataset), batch_size=4),
    ],
    ids=["iterable dataset", "iterable of batches", "sized iterable of batches", "loader", "loader of a stream"],
)
def test_data_of_any_kind_trains_like_a_dataset(make_data, num_steps):
    data = make_data(make_dataset(10))
    weights, counts, _ = trained_on(data, num_epochs=2, gradient_accumulation_steps=num_steps)
    assert counts == [6, 6 if num_steps == 1 else 4]
    expected = reference_weights(num_epochs=2, num_steps=num_steps)
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-6)


def test_a_generator_trains_for_one_epoch():
    dataset = make_dataset(10)
    weights, counts, trainer = trained_on(dataset[start : start + 4] for start in (0, 4, 8))
    assert counts == [3, 3]
    assert_same_weights(weights, reference_weights())
    assert trainer.run_config.num_update_steps_per_epoch is None


def test_a_generator_that_is_used_up_is_no_silent_epoch():
    dataset = make_dataset(10)
    with pytest.raises(ValueError, match=r"is an iterator \(generator\).* such as a list"):
        trained_on((dataset[start : start + 4] for start in (0, 4, 8)), num_epochs=2)


def test_a_list_of_batches_from_an_overridden_method_trains():
    dataset = make_dataset(10)

    class Listed(Trainer):
        def create_train_dataloader(self, batch_size, train_dl_kwargs=None):
            return [dataset[start : start + 4] for start in (0, 4, 8)]

    trainer = make_trainer(cls=Listed)
    train(trainer, None)
    assert_same_weights(weights_of(trainer.model), reference_weights())


def test_data_without_length_is_bounded_by_updates():
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield from make_dataset(4)

    recorder = EventRecorder()
    trainer = make_trainer(callbacks=[recorder])
    train(trainer, Endless(), num_epochs=1, max_num_train_steps=7)
    assert recorder.log.count("on_optimizer_step_end") == 7
    assert trainer.run_config.num_update_steps_per_epoch is None
    assert trainer.run_config.max_num_train_steps == 7
    assert trainer.stop_reason == "7 updates are done (`max_num_train_steps`)"


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("length", [3, 5, 10, 17, 40])
@pytest.mark.filterwarnings("ignore:Length of IterableDataset:UserWarning")  # that is what this is about
def test_the_length_of_an_iterable_dataset_may_be_an_estimate(length, num_steps):
    """Ten samples in truth, in three batches."""

    class Estimated(Stream):
        def __len__(self):
            return length

    weights, counts, _ = trained_on(Estimated(make_dataset(10)), gradient_accumulation_steps=num_steps)
    assert counts == [3, 3 if num_steps == 1 else 2]
    expected = reference_weights(num_steps=num_steps)
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-6)


def test_evaluation_data_of_any_kind_is_evaluated():
    dataset = make_dataset(10)
    trainer = make_trainer()
    kinds = {
        "stream": Stream(dataset),
        "batches": Batches(dataset, 4),
        "loader": DataLoader(dataset, batch_size=4),
        "samples": Samples(dataset),
        "list": [dataset[index] for index in range(10)],
    }
    for data in kinds.values():
        trainer.evaluate(data, per_device_batch_size=4)
    assert losses(trainer, "evaluation_loss") == [pytest.approx(losses(trainer, "evaluation_loss")[0])] * len(kinds)


def test_limited_batches_train_with_the_limit():
    recorder = EventRecorder()
    trainer = make_trainer(callbacks=[LimitBatchesCallback(3), recorder])
    train(trainer, num_epochs=2, eval_dataset=make_dataset(32), gradient_accumulation_steps=2)
    assert recorder.log.count("on_train_step_end") == 6
    assert recorder.log.count("on_optimizer_step_end") == 4
    assert recorder.log.count("on_eval_step_end") == 6


def test_a_history_of_the_users_own_is_used():
    class Shouting(InMemoryRunHistory):
        def update_metric(self, metric_name, metric_value):
            super().update_metric(metric_name.upper(), metric_value)

    trainer = make_trainer(run_history=Shouting())
    train(trainer)
    assert trainer.run_history.get_metric_names() == {"TRAIN_LOSS_EPOCH"}
