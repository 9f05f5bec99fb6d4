"""Transfer learning in stages: the head first, then the last block, then everything, each with its own rate."""

from functools import partial

import torch
from torch import nn
from torch.utils.data import TensorDataset

from _observing import IN_ORDER, IN_PROCESS, Observer, draw, files_in, main, plain
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LogMetricsCallback, SaveBestModelCallback, get_default_callbacks
from pytorch_accelerated.finetuning import ModelFreezer
from pytorch_accelerated.schedulers import CosineLrScheduler

IMAGE_SIZE = 6


class Classifier(nn.Module):
    """Three convolutional blocks and a head."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(16, num_classes)

    def forward(self, images):
        return self.head(self.pool(self.block(self.stem(images))).flatten(1))


class ClassificationTrainer(Trainer):
    def eval_epoch_start(self):
        super().eval_epoch_start()
        self.num_right = self.num_seen = 0

    def calculate_eval_batch_loss(self, batch):
        output = super().calculate_eval_batch_loss(batch)
        predicted = self.gather(output["model_outputs"].argmax(dim=-1))
        labels = self.gather(batch[1])
        self.num_right += (predicted == labels).sum().item()
        self.num_seen += len(labels)
        return output

    def eval_epoch_end(self):
        super().eval_epoch_end()
        self.run_history.update_metric("accuracy", self.num_right / self.num_seen)


class KeepMetrics(LogMetricsCallback):
    def __init__(self):
        self.logged = []

    def log_metrics(self, trainer, metrics):
        if trainer.run_config.is_world_process_zero:
            self.logged.append(sorted(metrics))


def images(num_images, seed):
    pixels = draw(num_images, 1, IMAGE_SIZE, IMAGE_SIZE, seed=seed)
    labels = torch.bucketize(pixels.mean(dim=(1, 2, 3)), torch.tensor([-0.06, 0.06]))
    return TensorDataset(pixels, labels)


def describe(freezer):
    return [
        {"index": plain(group.layer_group_idx), "module": type(group.module).__name__, "is_frozen": group.is_frozen}
        for group in freezer.get_layer_groups()
    ]


def program(folder):
    torch.manual_seed(0)
    model = Classifier()
    model.stem[0].requires_grad_(False)  # the model comes with its first layer frozen
    freezer = ModelFreezer(model)
    figures = {"groups": describe(freezer)}

    freezer.freeze()
    figures["groups with all but the head frozen"] = describe(freezer)
    optimizer = torch.optim.SGD(freezer.get_trainable_parameters(), lr=0.1, momentum=0.9)
    observer, log = Observer(optimizer), KeepMetrics()
    trainer = ClassificationTrainer(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        callbacks=(
            *get_default_callbacks(progress_bar=False),
            SaveBestModelCallback(str(folder / "best.pt"), "accuracy", greater_is_better=True),
            log,
            observer,
        ),
    )
    train = partial(
        trainer.train,
        train_dataset=images(36, seed=6),
        eval_dataset=images(15, seed=7),
        per_device_batch_size=6,
        train_dataloader_kwargs=IN_ORDER,
        eval_dataloader_kwargs=IN_PROCESS,
    )
    train(num_epochs=1)
    figures["head alone"] = observer.figures(trainer)

    stages = {
        "last block": ({"from_index": -2, "to_index": -3}, None),
        "everything": ({}, CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1, lr_min=1e-4)),
    }
    for stage, (indices, create_scheduler_fn) in stages.items():
        added = {}
        for group_index, group in freezer.unfreeze(**indices).items():
            added[group_index] = [list(parameter.shape) for parameter in group["params"]]
            optimizer.add_param_group({**group, "lr": 0.02 * 0.5 ** (3 - group_index)})
        figures[f"groups with {stage} unfrozen"] = describe(freezer)
        train(num_epochs=3, create_scheduler_fn=create_scheduler_fn)
        figures[stage] = {"added": plain(added), **observer.figures(trainer)}

    figures["logged"] = log.logged
    figures["files"] = files_in(folder)
    return figures


if __name__ == "__main__":
    main(program)
