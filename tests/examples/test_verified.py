"""`verify_resume` passes for every example, with random augmentation in two workers."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from _support import load_module
from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated.callbacks import GradualUnfreezingCallback
from pytorch_accelerated.finetuning import ModelFreezer
from pytorch_accelerated.metrics import Accuracy
from pytorch_accelerated.schedulers import CosineLrScheduler
from pytorch_accelerated.verification import verify_resume

EXAMPLES = Path(__file__).parents[2] / "examples"
WORKERS = {"num_workers": 2, "persistent_workers": True}
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Augmented(Dataset):
    """Changes each sample by a function that draws from the global generators."""

    def __init__(self, dataset, change):
        self.dataset = dataset
        self.change = change

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.change(self.dataset[index])


def shift_and_darken(sample):
    image, label = sample
    image = image.roll((random.randint(-1, 1), int(np.random.randint(-1, 2))), dims=(1, 2))
    return image * (1 - 0.3 * torch.rand(())), label


def mask_characters(piece):
    return torch.where(torch.rand(len(piece)) < 0.02 * random.random(), 1 + np.random.randint(100), piece)


def test_train_digits_resumes_exactly():
    digits = load_module(EXAMPLES / "train_digits.py")
    train, validation, _ = digits.load_datasets()

    def make_trainer():
        model = digits.create_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)
        return Trainer(model, nn.CrossEntropyLoss(), optimizer, metrics={"accuracy": Accuracy()})

    verify_resume(
        make_trainer,
        Augmented(Subset(train, range(200)), shift_and_darken),
        eval_dataset=validation,
        per_device_batch_size=32,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(
            num_warmup_epochs=TrainerPlaceholderValues.NUM_EPOCHS / 10
        ),
        train_dataloader_kwargs=WORKERS,
    ).raise_if_different()


@pytest.mark.parametrize("way", ["head only", "gradual"])
def test_finetune_digits_resumes_exactly(way):
    finetuning = load_module(EXAMPLES / "finetune_digits.py")
    task, _ = finetuning.load_task(digits=[5, 6, 7, 8, 9], train_size=100)

    def make_trainer():
        model = finetuning.Network()
        callbacks = [GradualUnfreezingCallback(freeze_batch_norms=True)] if way == "gradual" else []
        parameters = list(model.parameters())
        if way == "head only":
            freezer = ModelFreezer(model, freeze_batch_norms=True)
            freezer.freeze()
            parameters = freezer.get_trainable_parameters()
        optimizer = torch.optim.AdamW(parameters, finetuning.HEAD_LR)
        return finetuning.StageTrainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=callbacks)

    verify_resume(
        make_trainer,
        Augmented(task, shift_and_darken),
        num_epochs=3,
        per_device_batch_size=20,
        train_dataloader_kwargs=WORKERS,
    ).raise_if_different()


def test_char_gpt_resumes_exactly():
    char_gpt = load_module(EXAMPLES / "char_gpt.py")
    pieces, validation = char_gpt.load_datasets()

    def make_trainer():
        model = char_gpt.GPT(width=24, num_blocks=2, num_heads=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.99), weight_decay=0.1)
        return char_gpt.LanguageModelTrainer(model, char_gpt.language_model_loss, optimizer)

    verify_resume(
        make_trainer,
        Augmented(Subset(pieces, range(60)), mask_characters),
        eval_dataset=Subset(validation, range(20)),
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_clip_norm=1.0,
        train_dataloader_kwargs=WORKERS,
        collate_fn=char_gpt.collate,
    ).raise_if_different()
