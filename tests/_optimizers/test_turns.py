"""Networks that are trained in turns, by several optimizers of one trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import TensorDataset

from _runs import differences
from _support import IN_ORDER, Probe, assert_same_weights, make_dataset, make_trainer, train, weights_of
from pytorch_accelerated import Trainer
from pytorch_accelerated.exceptions import NonFiniteLossError

POINTS = TensorDataset(torch.randn(24, 2, generator=torch.Generator().manual_seed(0)))


def make_networks():
    torch.manual_seed(1)
    return nn.Linear(2, 2), nn.Linear(2, 1)


def make_optimizers(generator, discriminator):
    return {
        "generator": torch.optim.Adam(generator.parameters(), lr=0.05),
        "discriminator": torch.optim.SGD(discriminator.parameters(), lr=0.1, momentum=0.9),
    }


class Adversarial(Trainer):
    """Updates the discriminator in the step, and leaves the generator to the update of the run."""

    every = 1

    def __init__(self, **kwargs):
        generator, discriminator = make_networks()
        super().__init__(generator, None, make_optimizers(generator, discriminator), **{"callbacks": (), **kwargs})
        self.discriminator = discriminator
        self.num_turns = 0

    def calculate_train_batch_loss(self, batch):
        (real,) = batch
        generated = self.model(real.flip(1))
        if self.num_turns % self.every == 0:
            scores, real_scores = self.discriminator(generated.detach()), self.discriminator(real)
            self.update_discriminator((softplus(scores) + softplus(-real_scores)).mean(), len(real))
        self.num_turns += 1
        return {"loss": softplus(-self.discriminator(generated)).mean(), "batch_size": len(real)}

    def update_discriminator(self, loss, batch_size):
        self.make_update(loss, "discriminator", batch_size)


class SteppingByHand(Adversarial):
    """Does the same with the methods of the optimizer."""

    def update_discriminator(self, loss, batch_size):
        optimizer = self.optimizer["discriminator"]
        optimizer.zero_grad()
        loss.backward()
        if self.run_config.gradient_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.discriminator.parameters(), self.run_config.gradient_clip_norm)
        optimizer.step()


def train_by_hand(num_batches=1, clip_norm=None, num_epochs=2):
    """Train both networks in a plain loop, and return their weights."""
    generator, discriminator = make_networks()
    optimizers = make_optimizers(generator, discriminator)
    for _ in range(num_epochs):
        for step in range(6):
            real = POINTS[4 * step : 4 * step + 4][0]
            generated = generator(real.flip(1))
            loss = (softplus(discriminator(generated.detach())) + softplus(-discriminator(real))).mean()
            update(optimizers["discriminator"], discriminator, loss, clip_norm)
            gradients = torch.autograd.grad(
                softplus(-discriminator(generated)).mean() / num_batches, generator.parameters()
            )
            for parameter, gradient in zip(generator.parameters(), gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            if (step + 1) % num_batches == 0:
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(generator.parameters(), clip_norm)
                optimizers["generator"].step()
                optimizers["generator"].zero_grad()
    return weights_of(generator), weights_of(discriminator)


def update(optimizer, network, loss, clip_norm):
    optimizer.zero_grad()
    loss.backward()
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
    optimizer.step()


def train_adversarial(trainer, num_batches=1, clip_norm=None, **kwargs):
    return train(
        trainer,
        POINTS,
        **{"num_epochs": 2, "train_dataloader_kwargs": IN_ORDER, "gradient_accumulation_steps": num_batches, **kwargs},
        gradient_clip_norm=clip_norm,
    )


@pytest.mark.parametrize("kind", [Adversarial, SteppingByHand])
@pytest.mark.parametrize(("num_batches", "clip_norm"), [(1, None), (2, None), (3, 0.05)])
def test_two_networks_in_turns_have_the_weights_of_a_loop_by_hand(kind, num_batches, clip_norm):
    trainer = train_adversarial(kind(), num_batches, clip_norm)
    generator, discriminator = train_by_hand(num_batches, clip_norm)
    assert_same_weights(generator, trainer.model.state_dict())
    assert_same_weights(discriminator, trainer.discriminator.state_dict())
    assert trainer.progress.num_updates == 12 // num_batches


class Rarely(Adversarial):
    """Updates the discriminator at every third batch only."""

    every = 3


@pytest.mark.parametrize("kind", [Adversarial, SteppingByHand, Rarely])
def test_a_run_in_turns_is_resumed_exactly_within_a_window(kind, tmp_path):
    """In the window of three batches that is open, the discriminator has been updated before the state is saved."""

    def stop(trainer, step, **_):
        if trainer.progress.num_batches_in_epoch == 4 and trainer.run_history.current_epoch == 2:
            trainer.save_training_state(tmp_path / "state", {"num_turns": trainer.num_turns})
            raise LookupError

    whole = train_adversarial(kind(), 3)
    with pytest.raises(LookupError):
        train_adversarial(kind(callbacks=[Probe(on_train_step_end=stop)]), 3)
    resumed = kind()
    resumed.num_turns = 10
    train_adversarial(resumed, 3, resume_from=tmp_path / "state")
    for part in ("model", "discriminator", "optimizer"):
        assert differences(getattr(whole, part).state_dict(), getattr(resumed, part).state_dict()) == []


def test_an_optimizer_without_an_update_of_its_own_takes_part_in_that_of_the_run():
    class Joint(Adversarial):
        def update_discriminator(self, loss, batch_size):
            pass

    trainer = Joint()
    before = weights_of(trainer.discriminator)
    train_adversarial(trainer, num_epochs=1)
    assert not torch.equal(before["weight"], trainer.discriminator.weight)


def test_a_hook_may_step_the_optimizers_one_by_one():
    """What it has stepped does not count as an update before the next step."""

    class Stepping(Adversarial):
        def update_discriminator(self, loss, batch_size):
            pass

        def optimizer_step(self):
            for name in self.optimizer:
                self.optimizer[name].step()

    class Usual(Stepping):
        def optimizer_step(self):
            super(Stepping, self).optimizer_step()

    for part in ("model", "discriminator"):
        weights = [weights_of(getattr(train_adversarial(kind()), part)) for kind in (Stepping, Usual)]
        assert_same_weights(*weights)


def test_a_loss_that_is_not_finite_is_not_applied():
    class Broken(Adversarial):
        def update_discriminator(self, loss, batch_size):
            super().update_discriminator(loss * float("nan"), batch_size)

    from pytorch_accelerated.callbacks import TerminateOnNaNCallback

    trainer = Broken(callbacks=[TerminateOnNaNCallback()])
    before = weights_of(trainer.discriminator)
    with pytest.raises(NonFiniteLossError):
        train_adversarial(trainer)
    assert_same_weights(before, trainer.discriminator.state_dict())


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [("critic", KeyError, r"`optimizer` is 'critic'. Expected one of \['generator', 'discriminator'\]")],
)
def test_an_unknown_optimizer_is_named(name, kind, words):
    class Wrong(Adversarial):
        def update_discriminator(self, loss, batch_size):
            self.make_update(loss, name)

    with pytest.raises(kind, match=words):
        train_adversarial(Wrong())


def test_an_update_of_ones_own_needs_several_optimizers():
    class Single(Trainer):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            self.make_update(output["loss"], 0)
            return output

    with pytest.raises(
        TypeError, match=r"`make_update` needs several optimizers, but `optimizer` is a SGD.* dictionary"
    ):
        train(make_trainer(cls=Single))


def test_an_update_of_ones_own_needs_a_training_run():
    with pytest.raises(RuntimeError, match="`make_update` was called while no training run is under way"):
        Adversarial().make_update(torch.zeros(()), "discriminator")


def test_an_optimizer_with_a_closure_makes_no_update_of_its_own():
    model = nn.Linear(3, 1)

    class Turning(Trainer):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            self.make_update(output["loss"], 1)
            return output

    optimizers = [torch.optim.SGD([model.weight]), torch.optim.LBFGS([model.bias])]
    with pytest.raises(TypeError, match="`make_update` cannot use the optimizer 1, a LBFGS, which needs a closure"):
        train(Turning(model, nn.MSELoss(), optimizers, callbacks=()), make_dataset(8))
