"""Kill a training run in the midst of an epoch, start it again, and end with the same weights, bit by bit.

Run this twice, with the same command:

    python examples/resume.py
    python examples/resume.py

The first run kills itself (SIGKILL: nothing can be saved any more), somewhere in the third epoch. The second one is the
same script with the same arguments. It finds the newest state, goes on, and ends. For comparison it then makes the
whole run once more without an interruption, and prints the hash of the weights of both.

The images are shifted at random, by workers; the model has dropout and batch norms; the learning rate follows a
schedule: all of it goes on as if nothing had happened. States are in the folder `resumable_run`; delete it to start
anew.
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

# 1. The data: images that are shifted at random each time they are loaded.


class ShiftedDigits(Dataset):
    """Handwritten digits, each time a little elsewhere."""

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


# 3. The accident.


class KillCallback(TrainerCallback):
    """Ends the process after some updates, unless it has been started again."""

    def __init__(self, num_updates):
        self.num_updates = num_updates

    def on_train_step_end(self, trainer, **kwargs):
        """Look at the number of updates."""
        if trainer.progress.num_updates == self.num_updates and not trainer.is_resumed:
            trainer.print(
                f"Update {self.num_updates}, in epoch {trainer.run_history.current_epoch}: killed.", flush=True
            )
            os.kill(os.getpid(), signal.SIGKILL)


# 4. The run. All it takes to resume it is `resume_from="latest"`: without a state, it starts from the beginning.


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
    print(f"{uninterrupted.progress.num_updates} updates without a break:  {hash_weights(uninterrupted.model)}")
    is_same = hash_weights(trainer.model) == hash_weights(uninterrupted.model)
    print("The weights are the same, bit by bit." if is_same else "The weights DIFFER.")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=5, help="passes over the images, 28 updates each (default: 5)")
    parser.add_argument("--folder", type=Path, default=Path("resumable_run"), help="where the states go")
    return parser.parse_args()


if __name__ == "__main__":
    main()
