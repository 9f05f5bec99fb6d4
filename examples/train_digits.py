"""Train a small convolutional network on handwritten digits.

The data comes with scikit-learn: 1,797 real images of 8x8 pixels. Run it with

    python examples/train_digits.py

The script prints the loss and accuracy of each epoch. At the end, it prints the accuracy of the best model on test
images that were used neither for training nor for model selection. It writes `best_model.pt` and `learning_curves.png`
to the current folder.
"""

import argparse
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated.callbacks import SaveBestModelCallback, get_default_callbacks
from pytorch_accelerated.metrics import Accuracy
from pytorch_accelerated.plotting import plot_learning_curves
from pytorch_accelerated.schedulers import CosineLrScheduler

# 1. The data: 1,077 images for training, 360 for choosing the best model, 360 for testing it. The split is fixed.


def load_datasets():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8), from 0 to 1
    labels = torch.tensor(digits.target)
    rest, test = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=360, stratify=labels[rest], random_state=0)
    return [TensorDataset(images[indices], labels[indices]) for indices in (train, validation, test)]


# 2. The model: plain PyTorch.


def create_model():
    return nn.Sequential(
        *convolution(1, 32),
        *convolution(32, 64),
        nn.MaxPool2d(2),  # 8x8 -> 4x4
        *convolution(64, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(128, 10),
    )


def convolution(num_inputs, num_outputs):
    return (
        nn.Conv2d(num_inputs, num_outputs, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(num_outputs),
        nn.ReLU(),
    )


# 3. The run: train, then test the model with the lowest validation loss.


def main():
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    train_dataset, validation_dataset, test_dataset = load_datasets()
    model = create_model()
    save_best_model = SaveBestModelCallback(arguments.output_dir / "best_model.pt")

    trainer = Trainer(
        model=model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05),
        callbacks=[*get_default_callbacks(), save_best_model],
        metrics={"accuracy": Accuracy()},
    )
    start = time.perf_counter()
    trainer.train(
        train_dataset=train_dataset,
        eval_dataset=validation_dataset,
        num_epochs=arguments.epochs,
        per_device_batch_size=64,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(
            num_warmup_epochs=TrainerPlaceholderValues.NUM_EPOCHS / 10
        ),
    )
    seconds = time.perf_counter() - start

    accuracy = trainer.evaluate(test_dataset, per_device_batch_size=64)["accuracy"]  # of the best model
    best_epoch = save_best_model.best_metric_epoch
    trainer.print(f"\nTrained for {arguments.epochs} epochs in {seconds:.1f} s; the best epoch was {best_epoch}.")
    trainer.print(f"Test accuracy of the best model: {accuracy:.4f}")

    if trainer.run_config.is_world_process_zero:  # once, not on every process
        figure = plot_learning_curves(
            trainer.run_history,
            log_scale=["loss"],
            best_epoch=best_epoch,
            title=f"Handwritten digits: test accuracy {accuracy:.1%}",
        )
        figure.savefig(arguments.output_dir / "learning_curves.png", dpi=150)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the weights and the data order (default: 0)")
    parser.add_argument("--output-dir", type=Path, default=Path(), help="output folder (default: current folder)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
