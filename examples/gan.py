"""Train two networks in turns: a generator of points in the plane, and a discriminator that tells them from real ones.

The real points lie near eight places on a circle. Run it with

    python examples/gan.py

The trainer gets both optimizers, by name. In each step the discriminator makes its own update first; the loss that the
step returns is that of the generator. The script prints how many of the eight places the generator has learned, and how
many of its points are near one of them.
"""

import argparse
import math

import torch
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import TensorDataset

from pytorch_accelerated import Trainer

NUM_PLACES, SPREAD, NOISE_SIZE = 8, 0.1, 8


# 1. The data: 10,000 points, and what a sample of points has to be compared with.


def places():
    angles = torch.arange(NUM_PLACES) * (2 * math.pi / NUM_PLACES)
    return torch.stack([angles.cos(), angles.sin()], dim=1)  # (NUM_PLACES, 2)


def make_points(num_points):
    index = torch.randint(NUM_PLACES, (num_points,))
    return places()[index] + SPREAD * torch.randn(num_points, 2)


def describe(points):
    """Return how many places have points near them, and the share of points that are near one."""
    distances, nearest = torch.cdist(points.cpu(), places()).min(dim=1)
    is_near = distances < 3 * SPREAD
    counts = torch.bincount(nearest[is_near], minlength=NUM_PLACES)
    return int((counts > len(points) / (4 * NUM_PLACES)).sum()), is_near.float().mean().item()


# 2. The networks: plain PyTorch.


def create_network(num_inputs, num_outputs):
    return nn.Sequential(
        nn.Linear(num_inputs, 128),
        nn.LeakyReLU(0.2),
        nn.Linear(128, 128),
        nn.LeakyReLU(0.2),
        nn.Linear(128, num_outputs),
    )


# 3. The trainer: its model is the generator. The discriminator is an attribute, so training states contain it, too.


class AdversarialTrainer(Trainer):
    """Trains a generator and a discriminator in turns."""

    def __init__(self, generator, discriminator, **kwargs):
        optimizers = {
            "generator": torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.99)),
            "discriminator": torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.99)),
        }
        super().__init__(generator, loss_func=None, optimizer=optimizers, **kwargs)
        self.discriminator = discriminator

    def calculate_train_batch_loss(self, batch):
        """Update the discriminator, and return the loss of the generator."""
        (real,) = batch
        generated = self.model(torch.randn(len(real), NOISE_SIZE, device=self.device))

        scores, real_scores = self.discriminator(generated.detach()), self.discriminator(real)
        discriminator_loss = softplus(scores).mean() + softplus(-real_scores).mean()
        self.make_update(discriminator_loss, "discriminator", num_items=len(real))

        loss = softplus(-self.discriminator(generated)).mean()
        return {"loss": loss, "batch_size": len(real), "metrics": {"discriminator_loss": discriminator_loss.detach()}}


# 4. The run.


def main():
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    dataset = TensorDataset(make_points(10_000))
    generator = create_network(NOISE_SIZE, 2)
    trainer = AdversarialTrainer(generator, create_network(2, 1))
    trainer.train(dataset, num_epochs=arguments.epochs, per_device_batch_size=256)

    with torch.no_grad():
        points = generator(torch.randn(2_000, NOISE_SIZE, device=trainer.device))
    num_places, share = describe(points)
    trainer.print(f"\nPlaces that the generator has learned: {num_places} of {NUM_PLACES}")
    trainer.print(f"Points near one of them: {share:.0%}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=30, help="passes over the points (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the weights and the data order (default: 0)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
