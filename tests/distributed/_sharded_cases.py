"""The part of `test_sharded.py` that runs on each of several processes, as a script: training with FSDP.

Accelerate shards on GPUs only. PyTorch can shard on CPUs too, over gloo. The script therefore makes Accelerate believe
that the processes have GPUs, unless ``SHARDED_ON=gpu`` is set because they do. The argument after the folder is the
case.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn

from _support import Probe, make_dataset
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback
from pytorch_accelerated.exceptions import CheckpointError

NUM_EPOCHS = 2


def pretend_gpus() -> None:
    if os.environ.get("SHARDED_ON") != "gpu":
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    os.environ["ACCELERATE_USE_FSDP"] = "true"


def make_trainer(state_dict_type: str, seed: int, callbacks: Any = ()) -> Trainer:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10, state_dict_type=state_dict_type
    )
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    accelerator = Accelerator(fsdp_plugin=plugin)
    return Trainer(model, nn.MSELoss(), optimizer, callbacks=callbacks, accelerator=accelerator, seed=3)


def train(trainer: Trainer, **kwargs: Any) -> dict[str, Any]:
    trainer.train(make_dataset(24), num_epochs=NUM_EPOCHS, per_device_batch_size=2, **kwargs)
    weights = {name: value.full_tensor().detach() for name, value in trainer.model.named_parameters()}
    return {"weights": weights, "losses": trainer.run_history.get_metric_values("train_loss_epoch")}


def run_whole(folder: Path, kind: str, accumulation: int) -> dict[str, Any]:
    """Train, save a state and a checkpoint, and resume from the state.

    With accumulation, the ninth step is in the middle of a window. A sharded state is then saved after the tenth.
    """
    save = SaveTrainingStateCallback(folder / "states", save_every_n_steps=9, save_at_end=False)
    refused: list[str] = []

    def try_at_once(trainer: Trainer, step: int, **_: Any) -> None:
        if not trainer.is_between_updates:
            try:
                trainer.save_training_state(folder / "other")
            except CheckpointError as error:
                refused.append(str(error))

    trainer = make_trainer(kind, 0, [save, Probe(on_train_step_end=try_at_once)])
    whole = train(trainer, gradient_accumulation_steps=accumulation)
    trainer.save_checkpoint(folder / "model.pt")
    (state,) = (path for path in (folder / "states").iterdir() if path.name.startswith("step_"))
    resumed = train(make_trainer(kind, 9), gradient_accumulation_steps=accumulation, resume_from=state)
    return {
        "whole": whole,
        "resumed": resumed,
        "sharded": type(next(trainer.model.parameters())).__name__,
        "state": state.name,
        "refused": refused,
    }


def main() -> None:
    folder, case = Path(sys.argv[1]), sys.argv[2]
    pretend_gpus()
    results: dict[str, Any] = {}
    if case == "whole":
        for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
            for accumulation in (1, 2):
                subfolder = folder / f"{kind}_{accumulation}"
                subfolder.mkdir(exist_ok=True)
                results[subfolder.name] = run_whole(subfolder, kind, accumulation)
    else:
        trainer = make_trainer("SHARDED_STATE_DICT", 9)
        results["other number"] = train(
            trainer, resume_from=folder / "SHARDED_STATE_DICT_1" / "states" / "step_9", allow_other_num_processes=True
        )
    torch.save(results, folder / f"{case}-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
