"""A detector whose steps return a row of padding where it predicts nothing, and gather it."""

from functools import partial

import torch
from torch import nn
from torch.utils.data import Dataset

from _observing import IN_ORDER, IN_PROCESS, Observer, draw, files_in, main
from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    SaveBestModelCallback,
    TrainerCallback,
    get_default_callbacks,
)

PADDING_VALUE = -1
NUM_BOXES = 3
SCORE_THRESHOLD = 1.0


class Images(Dataset):
    """Images of 8 x 8 pixels, with one to three boxes each."""

    def __init__(self, num_images, seed):
        self.images = draw(num_images, 1, 8, 8, seed=seed)
        self.boxes = draw(num_images, NUM_BOXES, 4, seed=seed + 1).abs()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        boxes = self.boxes[index][: 1 + index % NUM_BOXES]
        labels = torch.cat([torch.zeros(len(boxes), 1), torch.full((len(boxes), 1), index % 2), boxes], dim=1)
        return self.images[index], labels, index, (8, 8)


def collate(samples):
    images, labels, image_ids, sizes = zip(*samples, strict=True)
    for position, rows in enumerate(labels):
        rows[:, 0] = position  # the position of the image in the batch
    return torch.stack(images), torch.cat(labels), torch.tensor(image_ids), torch.tensor(sizes)


class Detector(nn.Module):
    """Predicts a fixed number of boxes and scores."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(36, NUM_BOXES * 5)

    def forward(self, images):
        return self.head(self.backbone(images)).reshape(-1, NUM_BOXES, 5)


def detection_loss(outputs, labels):
    loss = outputs.new_zeros(())
    for position, predicted in enumerate(outputs):
        boxes = labels[labels[:, 0] == position, 2:]
        loss = loss + nn.functional.smooth_l1_loss(predicted[: len(boxes), :4], boxes)
        loss = loss + 0.1 * (predicted[:, 4] - 1).square().mean()
    return loss / len(outputs)


class DetectionTrainer(Trainer):
    def __init__(self, model, loss_func, optimizer, score_threshold=SCORE_THRESHOLD, **kwargs):
        super().__init__(model, loss_func, optimizer, **kwargs)
        self.score_threshold = score_threshold

    def calculate_train_batch_loss(self, batch):
        images, labels, _, _ = batch
        outputs = self.model(images)
        return {"loss": self.loss_func(outputs, labels), "model_outputs": outputs, "batch_size": images.size(0)}

    def calculate_eval_batch_loss(self, batch):
        images, labels, image_ids, sizes = batch
        outputs = self.get_model()(images)
        predictions = self.format_predictions(outputs.numpy(), image_ids, sizes)
        return {
            "loss": self.loss_func(outputs, labels),
            "model_outputs": outputs,
            "predictions": self.gather(predictions, padding_value=PADDING_VALUE).detach().cpu(),
            "batch_size": images.size(0),
        }

    def format_predictions(self, outputs, image_ids, sizes):
        """Return one row for each box: image, four coordinates, score and class."""
        rows = []
        for predicted, image_id, size in zip(torch.from_numpy(outputs), image_ids, sizes, strict=True):
            kept = predicted[predicted[:, 4] > self.score_threshold]
            if len(kept) == 0:
                continue
            image_column = torch.full((len(kept), 1), image_id.item())
            rows.append(torch.cat([image_column, kept[:, :4] * size[0], kept[:, 4:], torch.zeros(len(kept), 1)], dim=1))
        if not rows:
            return torch.tensor([PADDING_VALUE] * 7, device=self.device)
        return torch.vstack(rows).to(self.device)


class BoxMetrics(TrainerCallback):
    """Counts predicted boxes, and averages their scores."""

    def __init__(self):
        self.steps = []

    def on_eval_epoch_start(self, trainer, **kwargs):
        self.rows = []

    def on_eval_step_end(self, trainer, batch, batch_output, **kwargs):
        predictions = batch_output["predictions"]
        self.steps.append(len(predictions))
        if len(predictions) > 0:
            assert predictions[:, -1].eq(0).all()
            self.rows.append(predictions)

    def on_eval_epoch_end(self, trainer, **kwargs):
        scores = torch.cat(self.rows)[:, 5] if self.rows else torch.zeros(1)
        trainer.run_history.update_metric("num_boxes", sum(map(len, self.rows)))
        trainer.run_history.update_metric("mean_score", scores.mean().item())


def program(folder):
    torch.manual_seed(0)
    model = Detector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    observer, metrics = Observer(optimizer), BoxMetrics()
    trainer = DetectionTrainer(
        model=model,
        loss_func=detection_loss,
        optimizer=optimizer,
        callbacks=[
            metrics,
            *get_default_callbacks(progress_bar=False),
            SaveBestModelCallback(
                save_path=str(folder / "best_model.pt"), watch_metric="num_boxes", greater_is_better=True
            ),
            EarlyStoppingCallback(
                early_stopping_patience=2,
                early_stopping_threshold=0,
                watch_metric="num_boxes",
                greater_is_better=True,
            ),
            observer,
        ],
    )
    trainer.train(
        num_epochs=9,
        train_dataset=Images(24, seed=1),
        eval_dataset=Images(10, seed=2),
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        collate_fn=collate,
        create_scheduler_fn=partial(
            torch.optim.lr_scheduler.OneCycleLR,
            max_lr=0.05,
            epochs=TrainerPlaceholderValues.NUM_EPOCHS,
            steps_per_epoch=TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
        ),
        train_dataloader_kwargs=IN_ORDER,
        eval_dataloader_kwargs=IN_PROCESS,
    )
    figures = {"training": observer.figures(trainer), "files": files_in(folder)}
    figures["training"]["predictions_of_steps"] = metrics.steps
    metrics.steps = []

    trainer.evaluate(
        dataset=Images(10, seed=2), per_device_batch_size=4, collate_fn=collate, dataloader_kwargs=IN_PROCESS
    )
    figures["evaluation"] = observer.figures(trainer)
    figures["evaluation"]["predictions_of_steps"] = metrics.steps
    return figures


if __name__ == "__main__":
    main(program)
