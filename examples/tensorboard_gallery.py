"""Draw with TensorBoard whatever it can draw, while a small network learns handwritten digits.

Run it with

    python examples/tensorboard_gallery.py
    tensorboard --logdir runs

`TensorBoardCallback` sends the scalars and the hyper-parameters. Everything else is one call of its `writer`, which is
PyTorch's own `SummaryWriter`: several curves in one chart, histograms, images, figures, text, audio, video, a mesh, the
graph of the model, precision-recall curves and an embedding. Take from the gallery what you need.
"""

import argparse
import io

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import nn
from torch.utils.data import TensorDataset, random_split

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    TensorBoardCallback,
    TimeLedgerCallback,
    TrainerCallback,
    get_default_callbacks,
)
from pytorch_accelerated.metrics import Accuracy

SAMPLE_RATE = 8000  # of the sound, in hertz


def load_data():
    """Return images of 8 x 8 pixels with values from 0 to 1, of shape ``(N, 1, 8, 8)``, and the digits on them."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return random_split(TensorDataset(images, torch.tensor(digits.target)), [0.8, 0.2])


def create_model():
    features = [nn.Conv2d(1, 16, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*features, nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))


class Gallery(TrainerCallback):
    """Draws some images and what the model makes of them.

    Args:
        tracking: Has the writer.
        images: The images, of shape ``(N, 1, height, width)``.
        targets: The digits on them.
    """

    is_called_last = True  # after the tracker, which is called last too, and opens its writer when the run starts

    def __init__(self, tracking, images, targets):
        self.tracking, self.images, self.targets = tracking, images, targets
        self.filters = []
        self.losses = []

    def on_training_run_start(self, trainer, **kwargs):
        """Draw what does not change."""
        writer = self.tracking.writer
        if writer is None:  # on all processes but the main one
            return
        writer.add_text("about", "A *small* network that learns **handwritten digits**.")
        writer.add_image("digits/first", self.images[0])
        writer.add_images("digits/grid", nn.functional.pad(self.images[:32], (1, 1, 1, 1), value=0.3))  # with a frame
        writer.add_graph(trainer.get_model(), self.images[:1].to(trainer.device))

    def on_optimizer_step_end(self, trainer, **kwargs):
        """Draw histograms of weights and gradients, every 20 updates."""
        if self.tracking.writer is not None and trainer.progress.num_updates % 20 == 0:
            for name, parameter in trainer.get_model().named_parameters():  # the gradients still exist
                self.tracking.writer.add_histogram(f"weights/{name}", parameter, trainer.progress.num_updates)
                self.tracking.writer.add_histogram(f"gradients/{name}", parameter.grad, trainer.progress.num_updates)

    def on_training_run_epoch_end(self, trainer, **kwargs):
        """Draw what the model makes of the images."""
        writer, update, history = self.tracking.writer, trainer.progress.num_updates, trainer.run_history
        if writer is None:
            return
        self.losses = history.get_metric_values("eval_loss_epoch")
        losses = {"train": history.get_latest_metric("train_loss_epoch"), "eval": self.losses[-1]}
        writer.add_scalars("loss of training and evaluation", losses, update)  # in one chart
        self.filters.append(trainer.get_model()[0].weight.detach().cpu().clone())
        logits = self.logits_of(trainer)
        probabilities = logits.softmax(dim=1)
        for digit in range(3):
            writer.add_pr_curve(f"precision and recall/{digit}", self.targets == digit, probabilities[:, digit], update)
        writer.add_figure("confusion", draw_confusion(self.targets, logits.argmax(dim=1)), update)
        writer.add_embedding(logits, self.targets.tolist(), self.images, update, tag="outputs")

    def on_training_run_end(self, trainer, **kwargs):
        """Draw what has become of the run."""
        writer, update = self.tracking.writer, trainer.progress.num_updates
        if writer is None:
            return
        writer.add_audio("loss as a melody", make_melody(self.losses), update, SAMPLE_RATE)
        add_video(writer, "filters", torch.stack(self.filters), update)
        vertices, colors, faces = make_surface(self.images[self.targets == 0].mean(dim=0).squeeze(0))
        writer.add_mesh("digits/mean of the zeros", vertices, colors, faces, global_step=update)

    def logits_of(self, trainer):
        """Return the outputs for the images, of shape ``(N, 10)``."""
        with torch.no_grad():
            return trainer.get_model()(self.images.to(trainer.device)).cpu()


# What is drawn, as numbers and pictures.


def draw_confusion(targets, predictions):
    counts = torch.bincount(targets * 10 + predictions, minlength=100).view(10, 10)
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(counts.numpy(), cmap="Blues")
    axes.set(xlabel="predicted digit", ylabel="true digit", xticks=range(10), yticks=range(10))
    return figure


def make_melody(losses):
    """Return a tone of a quarter of a second for each loss, of shape ``(1, samples)``: the lower, the better."""
    times = torch.arange(SAMPLE_RATE // 4) / SAMPLE_RATE
    tones = [torch.sin(2 * torch.pi * 220 * (1 + loss) * times) for loss in losses]
    return 0.5 * torch.cat(tones).unsqueeze(0)


def add_video(writer, tag, frames, update, size=24):
    """Add a video of filters, one frame an epoch. `SummaryWriter.add_video` does the same, with the package MoviePy.

    Args:
        writer: The writer.
        tag: The name of the video.
        frames: The filters of a convolution in each epoch, of shape ``(epochs, filters, 1, height, width)``.
        update: The number of updates.
        size: The width of a pixel of a filter.
    """
    rows = frames.flatten(1, 2).transpose(1, 2).flatten(2)  # (epochs, height, filters * width)
    scaled = 255 * (rows - rows.min()) / (rows.max() - rows.min())
    pixel = np.ones((size, size), dtype=np.uint8)
    pictures = [Image.fromarray(np.kron(row.byte().numpy(), pixel)) for row in scaled]
    gif = io.BytesIO()
    pictures[0].save(gif, format="GIF", save_all=True, append_images=pictures[1:], duration=250, loop=0)
    image = Summary.Image(width=pictures[0].width, height=pictures[0].height, encoded_image_string=gif.getvalue())
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), update)


def make_surface(image):
    """Return an image of shape ``(rows, columns)`` as a surface, as high as it is bright: vertices, colors, triangles.

    Their shapes are ``(1, points, 3)``, ``(1, points, 3)`` and ``(1, triangles, 3)``.
    """
    num_rows, num_columns = image.shape
    row, column = torch.meshgrid(torch.arange(num_rows), torch.arange(num_columns), indexing="ij")
    places = [column - num_columns / 2, num_rows / 2 - row, 3 * image]
    vertices = torch.stack(places, dim=2).view(1, -1, 3)
    colors = torch.stack([255 * image, 90 + 0 * image, 255 * (1 - image)], dim=2).int().view(1, -1, 3)
    corner = (row * num_columns + column)[:-1, :-1].flatten()
    right, below = corner + 1, corner + num_columns
    faces = torch.cat([torch.stack([corner, below, right], 1), torch.stack([right, below, below + 1], 1)]).unsqueeze(0)
    return vertices, colors, faces


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--log-dir", default="runs/gallery")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    train_set, eval_set = load_data()
    images, targets = eval_set[:100]
    model = create_model()
    tracking = TensorBoardCallback(options.log_dir, every_n_updates=10, hyperparameters=options)
    silent = TimeLedgerCallback(
        max_share=None, print_table=False
    )  # to draw so much takes longer than to train so small a network
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.AdamW(model.parameters(), lr=options.lr),
        callbacks=[*get_default_callbacks(progress_bar=False), tracking, Gallery(tracking, images, targets), silent],
        metrics={"accuracy": Accuracy()},
    )
    trainer.train(train_set, options.epochs, eval_set, per_device_batch_size=32)
    tracking.close()
    print(f"Run `tensorboard --logdir {tracking.log_dir.parent}` to look at the gallery.")


if __name__ == "__main__":
    main()
