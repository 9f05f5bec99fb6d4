"""Kill a training run mid-epoch, start it again, and end with the same weights, bit for bit.

Run this command twice:

    python examples/resume.py
    python examples/resume.py

The first run kills itself during the third epoch. It uses SIGKILL, so it cannot save anything before it dies. The
second run finds the newest training state, resumes from it and finishes. For comparison, it then repeats the full
training without an interruption, and prints a hash of the weights after each.

Dataloader workers shift the images at random, the model has dropout and batch norm, and the learning rate follows a
schedule. All of this resumes exactly. The states are in the folder `resumable_run`. Delete it to start over.
"""

import argparse
import hashlib
import os
import random
import signal
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, TrainerCallback
from pytorch_accelerated.schedulers import CosineLrScheduler

NUM_TRAINING_IMAGES = 1400

# 1. The data: images with random augmentation.


class ShiftedDigits(Dataset):
    """Handwritten digits, shifted at random and with noise added each time they are loaded."""

    def __init__(self, images, labels):
        self.images = images
        self.labels = labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index].roll((random.randint(-1, 1), random.randint(-1, 1)), dims=(1, 2))
        return image + 0.05 * torch.randn_like(image), self.labels[index]


def load_datasets():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8), from 0 to 1
    labels = torch.tensor(digits.target)
    return (
        ShiftedDigits(images[:NUM_TRAINING_IMAGES], labels[:NUM_TRAINING_IMAGES]),
        TensorDataset(images[NUM_TRAINING_IMAGES:], labels[NUM_TRAINING_IMAGES:]),
    )


# 2. The model.


def create_model():
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(512, 10),
    )


# 3. The interruption.


class KillCallback(TrainerCallback):
    """Kills the process after `num_updates` updates, unless the run was resumed."""

    def __init__(self, num_updates):
        self.num_updates = num_updates

    def on_train_step_end(self, trainer, **kwargs):
        """Kill the process if it is time."""
        if trainer.progress.num_updates == self.num_updates and not trainer.is_resumed:
            trainer.print(
                f"Update {self.num_updates}, in epoch {trainer.run_history.current_epoch}: killed.", flush=True
            )
            os.kill(os.getpid(), signal.SIGKILL)


# 4. The run. `resume_from="latest"` resumes from the newest state. If there is none, the run starts from scratch.


def train(arguments, callbacks=(), resume_from=None):
    torch.manual_seed(0)
    train_dataset, validation_dataset = load_datasets()
    model = create_model()
    trainer = Trainer(
        model=model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=2e-3),
        callbacks=callbacks,
    )
    trainer.train(
        train_dataset=train_dataset,
        eval_dataset=validation_dataset,
        num_epochs=arguments.epochs,
        per_device_batch_size=50,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(),
        train_dataloader_kwargs={"num_workers": 2, "persistent_workers": True},
        eval_dataloader_kwargs={"num_workers": 0},
        resume_from=resume_from,
    )
    return trainer


def hash_weights(model):
    weights = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    return hashlib.sha256(weights).hexdigest()[:16]


def main():
    arguments = parse_arguments()
    save_states = SaveTrainingStateCallback(arguments.folder, save_every_n_updates=10, max_checkpoints=2)
    trainer = train(arguments, [save_states, KillCallback(num_updates=65)], resume_from="latest")
    print(f"{trainer.progress.num_updates} updates, killed and resumed: {hash_weights(trainer.model)}", flush=True)

    uninterrupted = train(arguments)
    print(f"{uninterrupted.progress.num_updates} updates, uninterrupted:      {hash_weights(uninterrupted.model)}")
    is_same = hash_weights(trainer.model) == hash_weights(uninterrupted.model)
    print("The weights are bit-identical." if is_same else "The weights DIFFER.")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=5, help="passes over the images, 28 updates each (default: 5)")
    parser.add_argument("--folder", type=Path, default=Path("resumable_run"), help="folder for the training states")
    return parser.parse_args()


if __name__ == "__main__":
    main()
