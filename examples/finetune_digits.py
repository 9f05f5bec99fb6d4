"""Fine-tune a network on new digits, one layer group at a time.

A small network is pretrained on the digits 0 to 4. It then gets a new head and 20 images of each digit from 5 to 9, and
is fine-tuned in two ways:

* Train only the head, with the rest of the network frozen.
* Train the head first, then unfreeze the other layer groups one at a time, from output to input.

After each stage, the script prints a table row that shows how many tensors of each layer group changed, both weights
and batch norm statistics. Run it with

    python examples/finetune_digits.py

To unfreeze on a schedule within a single run instead, pass `GradualUnfreezingCallback` to the trainer.
"""

import argparse
import copy

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import TerminateOnNaNCallback
from pytorch_accelerated.finetuning import ModelFreezer

PRETRAINING_LR = 3e-3
HEAD_LR = 2e-2
LR_DECAY = 1 / 3  # per layer group towards the input, where features are more general


# 1. The data: two tasks of five digits each.


def load_task(digits, train_size):
    """Return a training and a test dataset for these digits, with labels that start from 0."""
    images, targets = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    targets = torch.tensor(targets)
    chosen = torch.isin(targets, torch.tensor(digits))
    images, labels = images[chosen], targets[chosen] - min(digits)
    train, test = train_test_split(range(len(labels)), train_size=train_size, stratify=labels, random_state=0)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


# 2. The model: its direct children are the layer groups that are frozen and unfrozen.


class Network(nn.Module):
    """Three convolutions with batch norm, and a linear head for five digits."""

    def __init__(self):
        super().__init__()
        self.stem = convolution(1, 16)
        self.lower = convolution(16, 32)
        self.upper = nn.Sequential(nn.MaxPool2d(2), convolution(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(64, 5)

    def forward(self, images):
        """Return the logits of the five digits, shape (batch, 5)."""
        return self.head(self.upper(self.lower(self.stem(images))))


def convolution(num_inputs, num_outputs):
    return nn.Sequential(
        nn.Conv2d(num_inputs, num_outputs, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(num_outputs),
        nn.ReLU(),
    )


# 3. The trainer: measures the accuracy, and shows what each stage changed.


class StageTrainer(Trainer):
    """Trains in stages, and prints a table row after each stage."""

    def calculate_eval_batch_loss(self, batch):
        """Add the accuracy to the output. Its mean is recorded like the loss."""
        batch_output = super().calculate_eval_batch_loss(batch)
        is_right = batch_output["model_outputs"].argmax(dim=1) == batch[1]
        return {**batch_output, "metrics": {"accuracy": is_right.float().mean()}}

    def train_stage(self, name, train_dataset, test_dataset, num_epochs):
        """Train, evaluate, print the table row of this stage, and return the accuracy."""
        before = copy.deepcopy(self.get_model().state_dict())
        self.train(train_dataset, num_epochs, per_device_batch_size=20)
        self.evaluate(test_dataset, per_device_batch_size=100)
        accuracy = self.run_history.get_latest_metric("evaluation_accuracy")
        cells = [describe_changes(group, before, self.get_model()) for group, _ in self.get_model().named_children()]
        print_row(self, name, *cells, f"{accuracy:.4f}")
        return accuracy


def create_trainer(model, parameters, lr):
    optimizer = torch.optim.AdamW(parameters, lr)
    return StageTrainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=[TerminateOnNaNCallback])


def describe_changes(group, before, model):
    """Describe how many tensors of a layer group, parameters and statistics, differ from `before`."""
    after = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(f"{group}.")}
    num_changed = sum(not torch.equal(tensor, before[name]) for name, tensor in after.items())
    return f"{num_changed} of {len(after)}" if num_changed else "unchanged"


def print_row(trainer, stage, *cells):
    trainer.print(f"{stage:<22}" + "".join(f"{cell:>11}" for cell in cells))


# 4. The run.


def main():
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    old_task = load_task(digits=[0, 1, 2, 3, 4], train_size=0.75)
    new_task = load_task(digits=[5, 6, 7, 8, 9], train_size=100)

    model = Network()
    trainer = create_trainer(model, model.parameters(), PRETRAINING_LR)
    print_row(trainer, "changed tensors", *(group for group, _ in model.named_children()), "accuracy")
    trainer.train_stage("pretrain on 0-4", *old_task, arguments.epochs)

    model.head = nn.Linear(64, 5)  # a new head for the new digits
    head_only = train_head_only(copy.deepcopy(model), new_task, arguments.epochs)
    gradual = unfreeze_gradually(copy.deepcopy(model), new_task, arguments.epochs)
    trainer.print(f"\nTest accuracy on 5-9 with the head only: {head_only:.4f}")
    trainer.print(f"Test accuracy on 5-9 with gradual unfreezing: {gradual:.4f}")


def train_head_only(model, task, num_epochs):
    freezer = ModelFreezer(model, freeze_batch_norms=True)
    freezer.freeze()  # all layer groups except the last
    trainer = create_trainer(model, freezer.get_trainable_parameters(), HEAD_LR)
    num_stages = len(freezer.get_layer_groups())  # as many epochs in total as gradual unfreezing
    return trainer.train_stage("5-9: head only", *task, num_stages * num_epochs)


def unfreeze_gradually(model, task, num_epochs):
    freezer = ModelFreezer(model, freeze_batch_norms=True)
    freezer.freeze()
    trainer = create_trainer(model, freezer.get_trainable_parameters(), HEAD_LR)
    accuracy = trainer.train_stage("5-9: head first", *task, num_epochs)
    lr = HEAD_LR
    for idx in (2, 1, 0):  # from output to input
        lr *= LR_DECAY
        for param_group in freezer.unfreeze(from_index=idx, to_index=idx).values():  # only what this call unfroze
            trainer.optimizer.add_param_group({**param_group, "lr": lr})
        name = list(dict(model.named_children()))[idx]
        accuracy = trainer.train_stage(f"5-9: unfreeze {name}", *task, num_epochs)
    return accuracy


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=10, help="epochs per stage (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the weights and the data order (default: 0)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
