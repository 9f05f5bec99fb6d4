"""A trainer that overrides private methods, and sets attributes whose names others use for something else."""

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from _observing import IN_ORDER, IN_PROCESS, Observer, draw, files_in, main
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback
from pytorch_accelerated.run_config import TrainerRunConfig


@dataclass(frozen=True)
class ExperimentConfig(TrainerRunConfig):
    experiment: str = "unnamed"


class ExperimentTrainer(Trainer):
    """Clips by norm, keeps the last evaluations, and knows which states it was resumed from."""

    def __init__(self, *args, experiment, **kwargs):
        super().__init__(*args, **kwargs)
        self.experiment = experiment
        self._metric_prefix = "smoothed"
        self._window = deque(maxlen=2)
        self._call = "none so far"
        self.calls = []
        self.loaded = []

    def _create_run_config(
        self, per_device_batch_size, num_epochs, gradient_accumulation_steps, max_num_train_steps, gradient_clip_value
    ):
        config = super()._create_run_config(
            per_device_batch_size, num_epochs, gradient_accumulation_steps, max_num_train_steps, gradient_clip_value
        )
        return ExperimentConfig(**vars(config), experiment=self.experiment)

    def _clip_gradients(self):
        self.calls.append("_clip_gradients")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run_config.gradient_clip_value)

    def _run_train_epoch(self, train_dl):
        self._call = f"epoch {self.run_history.current_epoch} of {len(train_dl)} batches"
        self.calls.append(self._call)
        return super()._run_train_epoch(train_dl)

    def eval_epoch_end(self):
        super().eval_epoch_end()
        self._window.append(self._loss_tracker.average)
        self.run_history.update_metric(f"{self._metric_prefix}_loss", sum(self._window) / len(self._window))

    def load_training_state(self, input_dir):
        self.loaded.append(Path(input_dir).name)
        metadata = super().load_training_state(input_dir)
        self.loaded.append({"current_epoch": metadata["current_epoch"], "global_step": metadata["global_step"]})
        return metadata


class OwnLoopTrainer(ExperimentTrainer):
    """Has an epoch of its own, which makes two updates with each batch."""

    def _run_train_epoch(self, train_dl):
        self.train_epoch_start()
        self._loss_tracker.reset()
        self.callback_handler.call_event("on_train_epoch_start", self)
        for step, batch in enumerate(train_dl):
            for _ in range(2):
                self.callback_handler.call_event("on_train_step_start", self)
                self._perform_forward_and_backward_passes(batch, step)
                self._clip_gradients()
                self.optimizer_step()
                self.scheduler_step()
                self.optimizer_zero_grad()
        self.train_epoch_end()
        self._add_epoch_loss_to_run_history("train_loss_epoch")
        self.callback_handler.call_event("on_train_epoch_end", self)
        return False


def create(cls, folder, **when_to_save):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    observer = Observer(optimizer)
    saving = SaveTrainingStateCallback(str(folder), **when_to_save)
    return cls(model, nn.MSELoss(), optimizer, callbacks=[saving, observer], experiment=folder.name), observer


def data(num_samples, seed):
    inputs = draw(num_samples, 4, seed=seed)
    return TensorDataset(inputs, inputs[:, :1] * inputs[:, 1:2])


def train(trainer, **kwargs):
    trainer.train(
        data(20, seed=9),
        eval_dataset=data(12, seed=10),
        per_device_batch_size=5,
        gradient_clip_value=0.1,
        create_scheduler_fn=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5),
        train_dataloader_kwargs=IN_ORDER,
        eval_dataloader_kwargs=IN_PROCESS,
        **kwargs,
    )


def figures_of(trainer, observer):
    figures = {**observer.figures(trainer), "calls": trainer.calls, "loaded": trainer.loaded}
    trainer.calls, trainer.loaded = [], []
    return figures


def program(folder):
    trainer, observer = create(ExperimentTrainer, folder / "first", save_every_n_epochs=2, save_at_end=False)
    train(trainer, num_epochs=2)
    figures = {"run": figures_of(trainer, observer)}
    trainer.evaluate(data(12, seed=11), per_device_batch_size=5, dataloader_kwargs=IN_PROCESS)
    figures["evaluation"] = figures_of(trainer, observer)

    resumed, observer = create(ExperimentTrainer, folder / "second", save_every_n_epochs=1)
    train(resumed, num_epochs=4, resume_from=str(folder / "first" / "epoch_2"))
    figures["resumed run"] = figures_of(resumed, observer)

    uninterrupted, observer = create(ExperimentTrainer, folder / "uninterrupted", save_at_end=False)
    train(uninterrupted, num_epochs=4)
    figures["uninterrupted run"] = figures_of(uninterrupted, observer)

    looping, observer = create(OwnLoopTrainer, folder / "third", save_every_n_steps=3, max_checkpoints=3)
    train(looping, num_epochs=2)
    figures["own loop"] = figures_of(looping, observer)

    figures["files"] = {name: files_in(folder / name) for name in ("first", "second", "third")}
    return figures


if __name__ == "__main__":
    main(program)
