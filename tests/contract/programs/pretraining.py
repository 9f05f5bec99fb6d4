"""Pre-training with a warmup-stable-decay schedule and its checkpoints, then a continuation before the decay."""

import torch
from torch import nn
from torch.utils.data import Dataset

from _observing import IN_ORDER, Observer, draw, files_in, main, plain
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import TrainerCallback, WSDCheckpointCallback
from pytorch_accelerated.schedulers.wsd_scheduler import WSDLrScheduler

CONTEXT = 6
VOCABULARY = 11


class Tokens(Dataset):
    """Sequences whose next token depends on the last two."""

    def __init__(self, num_sequences, seed):
        starts = (draw(num_sequences, 2, seed=seed).abs() * 10).long() % VOCABULARY
        columns = list(starts.unbind(dim=1))
        while len(columns) <= CONTEXT:
            columns.append((3 * columns[-1] + columns[-2]) % VOCABULARY)
        self.tokens = torch.stack(columns, dim=1)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index, :-1], "labels": self.tokens[index, 1:]}


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 12)
        self.recurrence = nn.GRU(12, 12, batch_first=True)
        self.head = nn.Linear(12, VOCABULARY)

    def forward(self, input_ids):
        return self.head(self.recurrence(self.embedding(input_ids))[0])


class LanguageTrainer(Trainer):
    def calculate_train_batch_loss(self, batch):
        logits = self.model(batch["input_ids"])
        loss = self.loss_func(logits.flatten(0, 1), batch["labels"].flatten())
        return {"loss": loss, "model_outputs": logits, "batch_size": len(batch["labels"])}


class ScheduleLog(TrainerCallback):
    """Asks the scheduler for its plan, and after each step for its position."""

    def on_training_run_start(self, trainer, **kwargs):
        scheduler = trainer.scheduler
        self.plan = {
            "total_steps": scheduler.total_steps,
            "num_warmup_steps": scheduler.num_warmup_steps,
            "lr_min": scheduler.lr_min,
            "decay_phase_ratio": scheduler.decay_phase_ratio,
            "base_lr_values": plain(scheduler.base_lr_values),
            "checkpoint_steps": list(scheduler.get_checkpoint_steps()),
            "decay_info": plain(scheduler.get_decay_info()),
        }
        self.steps = []

    def on_train_step_end(self, trainer, **kwargs):
        self.steps.append(trainer.scheduler.get_current_step())

    def figures(self):
        return {"plan": self.plan, "current_steps": self.steps}


def pre_train(folder, max_num_train_steps, initial_checkpoint=None, **settings):
    torch.manual_seed(0)
    model = LanguageModel()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "lr": 0.02}, {"params": vectors, "lr": 0.01, "weight_decay": 0.0}], weight_decay=0.1
    )
    checkpoints = WSDCheckpointCallback(save_dir=str(folder), initial_checkpoint=initial_checkpoint)
    observer, log = Observer(optimizer), ScheduleLog()
    trainer = LanguageTrainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=[checkpoints, log, observer])
    trainer.train(
        train_dataset=Tokens(40, seed=8),
        num_epochs=100,
        max_num_train_steps=max_num_train_steps,
        per_device_batch_size=8,
        gradient_clip_value=0.5,
        create_scheduler_fn=WSDLrScheduler.create_scheduler_fn(
            num_warmup_epochs=1, num_checkpoints=3, decay_phase_ratio=0.2, lr_min=0.05, **settings
        ),
        train_dataloader_kwargs=IN_ORDER,
    )
    return {
        **observer.figures(trainer),
        **log.figures(),
        "last_checkpoint_step": checkpoints.last_checkpoint_step,
        "files": files_in(folder),
    }


def program(folder):
    figures = {"run": pre_train(folder / "first", max_num_train_steps=40)}
    figures["continuation"] = pre_train(
        folder / "second",
        max_num_train_steps=20,
        initial_checkpoint=str(folder / "first" / "checkpoint_8_wsd_pre_decay"),
        is_continuation_from_checkpoint=True,
    )
    return figures


if __name__ == "__main__":
    main(program)
