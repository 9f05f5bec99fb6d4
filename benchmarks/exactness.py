"""What it costs that a run can be resumed exactly, as ratios to the same thing written by hand.

    python benchmarks/exactness.py
    torchrun --nproc_per_node 2 benchmarks/exactness.py --only step

`save`: a training state of 100 MB, with its manifest and flushed to the disk, over `torch.save` and `os.fsync` of the
same tensors. `step`: a training step of about 10 ms with everything that exactness needs (seeded loading, sums, votes),
over a loop written by hand.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset

from _rounds import interleaved, print_ratios
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import TerminateOnNaNCallback, TrainerCallback

NUM_SAVED_PARAMETERS = 50_000_000 // 4  # and as many numbers of the optimizer: 100 MB
WIDTH, BATCH_SIZE, NUM_STEPS = 768, 64, 40


# --- saving ------------------------------------------------------------------------------------------------------


class SaveOnce(TrainerCallback):
    """Saves a training state after the first step, and takes the time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds = 0.0

    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save, and take the time."""
        start = time.perf_counter()
        trainer.save_training_state(self.folder / "state")
        self.seconds = time.perf_counter() - start


class Vector(nn.Module):
    """Many parameters that cost next to nothing to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(NUM_SAVED_PARAMETERS))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply by the first parameter."""
        return inputs * self.weight[0]


def compare_saving(num_rounds: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="exactness_"))
    model = Vector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def by_hand() -> float:
        contents = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        start = time.perf_counter()
        with (folder / "by_hand.pt").open("wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        return time.perf_counter() - start

    def ours() -> float:
        save = SaveOnce(folder)
        data = [(torch.ones(1), torch.zeros(1))]
        Trainer(model, nn.MSELoss(), optimizer, callbacks=[save]).train(data, num_epochs=1, per_device_batch_size=1)
        return save.seconds

    try:
        ours()  # the optimizer has its momentum from now on
        print_ratios(
            interleaved({"torch.save and fsync": by_hand, "training state": ours}, num_rounds), "torch.save and fsync"
        )
    finally:
        shutil.rmtree(folder)


# --- steps -------------------------------------------------------------------------------------------------------


class Rows(Dataset[Any]):
    """Samples one by one, as a dataset of the user's gives them."""

    def __init__(self, num_samples: int) -> None:
        self.inputs = torch.randn(num_samples, WIDTH)
        self.targets = torch.randn(num_samples, 1)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index], self.targets[index]


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))


class TimedTrainer(Trainer):
    """Takes the time of its training epochs only, as the loop written by hand does."""

    seconds = 0.0

    def _run_train_epoch(self, train_dl: Any) -> bool:
        start = time.perf_counter()
        is_limit_reached = super()._run_train_epoch(train_dl)
        self.seconds += time.perf_counter() - start
        return is_limit_reached


def compare_steps(num_rounds: int) -> None:
    accelerator = Accelerator(cpu=True)
    num_processes = accelerator.num_processes
    dataset = Rows(NUM_STEPS * BATCH_SIZE * num_processes)

    def by_hand() -> float:
        model: Any = make_model()
        if num_processes > 1:
            model = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        start, stop = (NUM_STEPS * BATCH_SIZE * (accelerator.process_index + offset) for offset in (0, 1))
        order = torch.randperm(len(dataset))[start:stop].tolist()
        loader = DataLoader(dataset, batch_size=BATCH_SIZE, sampler=order)
        begin = time.perf_counter()
        for inputs, targets in loader:
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return (time.perf_counter() - begin) / NUM_STEPS

    def ours() -> float:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        trainer = TimedTrainer(
            model, nn.MSELoss(), optimizer, callbacks=[TerminateOnNaNCallback], accelerator=accelerator
        )
        workers = {"num_workers": 0}
        trainer.train(dataset, num_epochs=1, per_device_batch_size=BATCH_SIZE, train_dataloader_kwargs=workers)
        return trainer.seconds / NUM_STEPS

    times = interleaved({"by hand": by_hand, "Trainer": ours}, num_rounds)
    if accelerator.is_main_process:
        print(f"one step, {num_processes} process(es)")
        print_ratios(times, "by hand")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=["save", "step"], help="one of the two comparisons (default: both)")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only != "step":
        compare_saving(arguments.rounds)
    if arguments.only != "save":
        compare_steps(arguments.rounds)


if __name__ == "__main__":
    main()
