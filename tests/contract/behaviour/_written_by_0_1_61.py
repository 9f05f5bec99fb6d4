"""Writes the files in `written_by_0_1_61`: run it with version 0.1.61 of the library, never with a later one.

    python tests/contract/behaviour/_written_by_0_1_61.py

``wsd.pt`` and ``cosine.pt`` are checkpoints that `Trainer.save_checkpoint` wrote after `NUM_UPDATES` of 20 updates;
``curves.json`` has the rates that `get_updated_values` returned for each number of updates.
"""

import json
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

FOLDER = Path(__file__).with_name("written_by_0_1_61")
NUM_UPDATES = 12
LRS = (0.01, 0.3)
NUM_STEPS = 40
WSD = {"decay_phase_ratio": 0.3, "lr_min": 0.2, "use_inverse_sqrt_decay": False}
COSINE = {"lr_min": 1e-3, "k_decay": 1.5}
CURVES = [
    {},
    {"lr_min": 0.1},
    {"lr_min": 0.1, "use_inverse_sqrt_decay": False},
    {"lr_min": 0.0},
    {"num_checkpoints": 3, "lr_min": 0.1, "decay_phase_ratio": 0.2},
    {"num_checkpoints": 3, "lr_min": 0.1, "decay_phase_ratio": 0.3, "use_inverse_sqrt_decay": False},
    {"num_warmup_steps": 7, "warmup_starting_lr": 1e-3},
    {"num_warmup_steps": 2.5, "decay_phase_ratio": 0.5},
    {"num_warmup_steps": 40, "warmup_starting_lr": 1e-3, "lr_min": 0.5},
    {"num_warmup_steps": 15, "num_checkpoints": 3, "decay_phase_ratio": 0.33, "lr_min": 0.01},
    {"decay_phase_ratio": 1.0, "lr_min": 0.05},
    {"num_warmup_steps": 7, "is_continuation_from_checkpoint": True},
]
"""Settings of the WSD scheduler for `NUM_STEPS` updates."""


def make_optimizer():
    """Create an optimizer with a group for each rate."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in LRS]
    return torch.optim.SGD(groups, lr=1.0)


def main():
    """Write the files."""
    from pytorch_accelerated import Trainer
    from pytorch_accelerated.callbacks import TrainerCallback
    from pytorch_accelerated.schedulers import CosineLrScheduler
    from pytorch_accelerated.schedulers.wsd_scheduler import WSDLrScheduler

    class Save(TrainerCallback):
        def __init__(self, path):
            self.path, self.num_steps = path, 0

        def on_train_step_end(self, trainer, **kwargs):
            self.num_steps += 1
            if self.num_steps == NUM_UPDATES + 1:  # there this event comes before the update
                trainer.save_checkpoint(self.path)

    for name, create in {
        "wsd": WSDLrScheduler.create_scheduler_fn(**WSD),
        "cosine": CosineLrScheduler.create_scheduler_fn(**COSINE),
    }.items():
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(
            [{"params": [model.weight], "lr": LRS[0]}, {"params": [model.bias], "lr": LRS[1]}], momentum=0.9
        )
        inputs = torch.randn(40, 3)
        trainer = Trainer(model, torch.nn.MSELoss(), optimizer, callbacks=[Save(FOLDER / f"{name}.pt")])
        trainer.train(
            TensorDataset(inputs, inputs.sum(1, keepdim=True)),
            num_epochs=2,
            per_device_batch_size=4,
            create_scheduler_fn=create,
            train_dataloader_kwargs={"num_workers": 0},
        )
    curves = []
    for settings in CURVES:
        scheduler = WSDLrScheduler(make_optimizer(), total_steps=NUM_STEPS, **settings)
        rates = [scheduler.get_updated_values(num_updates) for num_updates in range(NUM_STEPS + 1)]
        curves.append({"settings": settings, "rates": rates})
    lines = ",\n".join(json.dumps(curve) for curve in curves)
    (FOLDER / "curves.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
