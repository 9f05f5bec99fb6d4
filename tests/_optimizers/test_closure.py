"""Optimizers that compute the loss again, by a closure: LBFGS, and sharpness-aware ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from _optimizing import SharpnessAware
from _support import IN_ORDER, EventRecorder, Probe, assert_same_weights, losses, make_dataset, mse, train, weights_of
from pytorch_accelerated import Trainer
from pytorch_accelerated._optimizers.closure import WindowClosure
from pytorch_accelerated.callbacks import TerminateOnNaNCallback
from pytorch_accelerated.exceptions import NonFiniteLossError

DATASET = make_dataset(14)


def make_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def lbfgs(model, **kwargs):
    return torch.optim.LBFGS(model.parameters(), **{"lr": 0.5, "max_iter": 4, **kwargs})


class Twice(torch.optim.SGD):
    """Makes two steps in each update."""

    def step(self, closure):
        for _ in range(2):
            closure()
            super().step()


def make_trainer(create=lbfgs, cls=Trainer, loss_func=mse, **kwargs):
    model = make_model()
    return cls(model, loss_func, create(model), **{"callbacks": (), **kwargs})


# --- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"line_search_fn": "strong_wolfe"}], ids=["", "line search"])
@pytest.mark.parametrize("num_batches", [1, 2, 4])
def test_an_update_of_several_batches_is_that_of_one_big_batch(num_batches, kwargs):
    """The last batch is short, and so is the last window: each sample weighs the same."""

    def run(batch_size, num_batches):
        trainer = make_trainer(lambda model: lbfgs(model, **kwargs))
        train(
            trainer,
            DATASET,
            num_epochs=2,
            per_device_batch_size=batch_size,
            gradient_accumulation_steps=num_batches,
            train_dataloader_kwargs=IN_ORDER,
        )
        return weights_of(trainer.model)

    split, whole = run(4, num_batches), run(4 * num_batches, 1)
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=1e-3, atol=1e-5)


def test_gradients_are_clipped_in_each_evaluation():
    norms = []

    class Recording(torch.optim.SGD):
        def step(self, closure):
            for _ in range(3):
                closure()
                gradients = [parameter.grad.norm() for parameter in self.param_groups[0]["params"]]
                norms.append(torch.stack(gradients).norm().item())
                super().step()

    create = lambda model: Recording(model.parameters(), lr=0.1)  # noqa: E731
    train(make_trainer(create), DATASET, gradient_clip_norm=0.01)
    assert len(norms) == 12
    assert max(norms) <= 0.01001


def test_loss_metrics_and_events_of_an_update_are_recorded_once():
    recorder = EventRecorder()

    class Measuring(Trainer):
        def calculate_train_batch_loss(self, batch):
            return {**super().calculate_train_batch_loss(batch), "metrics": {"one": 1.0}}

    trainer = make_trainer(cls=Measuring, callbacks=[recorder])
    first = mse(trainer.model(DATASET[:][0]), DATASET[:][1]).item()
    train(trainer, DATASET, per_device_batch_size=14)
    assert losses(trainer) == [pytest.approx(first)]
    assert losses(trainer, "train_one") == [1.0]
    assert trainer.progress.num_updates == 1
    assert recorder.log.count("on_train_step_end") == recorder.log.count("on_optimizer_step_end") == 1


def test_a_callback_that_replaces_the_loss_does_so_in_each_evaluation():
    def double(trainer, batch_output, **_):
        batch_output["loss"] = 2 * batch_output["loss"]

    doubled = train(
        make_trainer(callbacks=[Probe(on_backward_start=double)]), DATASET, train_dataloader_kwargs=IN_ORDER
    )
    by_loss = train(make_trainer(loss_func=lambda *it: 2 * mse(*it)), DATASET, train_dataloader_kwargs=IN_ORDER)
    assert_same_weights(weights_of(doubled.model), weights_of(by_loss.model))


def test_the_first_evaluation_is_that_of_the_steps_unless_the_optimizer_has_moved():
    calls = []

    class Counting(Trainer):
        def calculate_train_batch_loss(self, batch):
            calls.append(len(batch[0]))
            return super().calculate_train_batch_loss(batch)

    class Once(torch.optim.SGD):
        def step(self, closure):
            closure()
            return super().step()

    class Moved(Once):
        def step(self, closure):
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(0.1)
            return super().step(closure)

    class Zeroed(Once):
        def step(self, closure):
            self.zero_grad()
            return super().step(closure)

    counts = {}
    for kind in (Once, Moved, Zeroed, lambda parameters, lr: SharpnessAware(torch.optim.SGD(parameters, lr=lr))):
        calls.clear()
        create = lambda model, kind=kind: kind(model.parameters(), lr=0.1)  # noqa: E731
        train(make_trainer(create, cls=Counting), DATASET, per_device_batch_size=7)
        counts[getattr(kind, "__name__", "")] = len(calls)
    assert counts == {"Once": 2, "Moved": 4, "Zeroed": 4, "<lambda>": 4}


def test_a_second_network_that_the_optimizer_trains_is_evaluated_again_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, outputs, targets):
            return mse(outputs * self.scale, targets)

    def make():
        model, loss_func = make_model(), Scaled()
        return model, loss_func, torch.optim.LBFGS([*model.parameters(), *loss_func.parameters()], lr=0.5, max_iter=3)

    model, loss_func, optimizer = make()
    train(Trainer(model, loss_func, optimizer, callbacks=()), DATASET, per_device_batch_size=14, num_epochs=3)
    by_hand, hand_loss, optimizer = make()

    def closure():
        optimizer.zero_grad()
        loss = hand_loss(by_hand(DATASET[:][0]), DATASET[:][1])
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    for name, value in weights_of(by_hand).items():
        torch.testing.assert_close(weights_of(model)[name], value, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(loss_func.scale, hand_loss.scale, rtol=1e-3, atol=1e-5)


# --- what may fail -----------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_put_back():
    class Diverging(torch.optim.SGD):
        def step(self, closure):
            closure()
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("inf"))
            return closure()

    trainer = make_trainer(lambda model: Diverging(model.parameters(), lr=0.1), callbacks=[TerminateOnNaNCallback()])
    before = weights_of(trainer.model)
    with pytest.raises(NonFiniteLossError, match="parameter"):
        train(trainer, DATASET)
    assert_same_weights(before, weights_of(trainer.model))


def test_an_error_in_an_evaluation_leaves_the_weights_from_before_the_update():
    class Failing(Trainer):
        num_calls = 0

        def calculate_train_batch_loss(self, batch):
            self.num_calls += 1
            if self.num_calls == 3:
                raise LookupError("in the second evaluation")
            return super().calculate_train_batch_loss(batch)

    trainer = make_trainer(cls=Failing)
    before = weights_of(trainer.model)
    with pytest.raises(LookupError, match="in the second evaluation"):
        train(trainer, DATASET)
    assert_same_weights(before, weights_of(trainer.model))


def test_a_closure_belongs_to_its_update():
    with pytest.raises(RuntimeError, match=r"The closure was called outside an update\. It belongs to one update"):
        WindowClosure(torch.device("cpu"))()


def test_a_subclass_with_an_epoch_of_its_own_is_told_to_pass_a_closure_of_its_own_too():
    class Own(Trainer):
        def _run_train_epoch(self, train_dl):
            for step, batch in enumerate(train_dl):
                self._perform_forward_and_backward_passes(batch, step)
                self.optimizer_step()

    with pytest.raises(RuntimeError, match="has to pass a closure of its own, too, in `optimizer_step`"):
        train(make_trainer(cls=Own), DATASET)


def test_a_subclass_that_passes_a_closure_of_its_own_is_left_alone():
    class Own(Trainer):
        def calculate_train_batch_loss(self, batch):
            self.batch = batch
            return super().calculate_train_batch_loss(batch)

        def optimizer_step(self):
            def closure():
                self.optimizer.zero_grad()
                loss = self.loss_func(self.model(self.batch[0]), self.batch[1])
                loss.backward()
                return loss

            self.optimizer.step(closure)

    trainers = [train(make_trainer(cls=kind), DATASET, train_dataloader_kwargs=IN_ORDER) for kind in (Own, Trainer)]
    assert_same_weights(*(weights_of(trainer.model) for trainer in trainers))
    assert trainers[0]._loop_run.closure is None


def test_an_optimizer_that_refuses_to_work_without_a_closure_gets_one():
    """As published implementations do, whose argument has a default nevertheless."""

    class Asserting(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            assert closure is not None, "it requires a closure"
            torch.enable_grad()(closure)()
            return super().step()

    class Raising(torch.optim.SGD):
        def step(self, closure=None):
            if closure is None:
                raise RuntimeError("it requires a closure")
            closure()
            return super().step()

    class Convention(torch.optim.SGD):
        def step(self, closure=None):
            assert closure_was_given == (closure is not None)
            return super().step()

    closure_was_given = False
    for kind in (Asserting, Raising, Convention):
        train(make_trainer(lambda model, kind=kind: kind(model.parameters(), lr=0.1)), DATASET)


def test_an_optimizer_says_by_an_attribute_that_it_needs_a_closure_in_spite_of_a_default():
    class Optional(torch.optim.SGD):
        requires_closure = True

        def step(self, closure=None):
            assert closure is not None
            closure()
            return super().step()

    train(make_trainer(lambda model: Optional(model.parameters(), lr=0.1)), DATASET)


def test_a_trainer_with_a_closure_is_copied_after_a_run():
    trainer = train(make_trainer(lambda model: Twice(model.parameters(), lr=0.1)), DATASET)
    copied = copy.deepcopy(trainer)  # LBFGS of PyTorch itself cannot be copied
    assert_same_weights(*(weights_of(train(each, DATASET).model) for each in (trainer, copied)))
