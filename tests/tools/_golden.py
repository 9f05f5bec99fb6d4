"""The run whose state is kept in `tests/golden_states`, to prove that later versions of the library can resume from it.

Run as a script, this creates the files of the current format. Never create them again once the format is released:

    python tests/tools/_golden.py

When the format changes, create the files of the new one, and keep the old ones.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from _support import make_dataset
from pytorch_accelerated import Trainer
from pytorch_accelerated._checkpoint.manifest import FORMAT_VERSION
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    ModelEmaCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
)
from pytorch_accelerated.schedulers import CosineLrScheduler

DATA = Path(__file__).parents[1] / "golden_states"
STEP = 8
"""The step after which the state was saved: mid-epoch in the second epoch of five steps, and mid-window."""


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a state. Python 3.14 warns without the argument `filter`, which Python 3.10.0 lacks."""
    with tarfile.open(archive) as file:
        file.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


def draws_same_numbers() -> bool:
    """Return whether dropout draws the same numbers as in the saved runs; older PyTorch draws others."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.functional.dropout(torch.ones(8), 0.5).tolist() == [2, 2, 0, 2, 0, 0, 2, 2]


def make_trainer(folder: Path, seed: int = 4, num_steps: int | None = None) -> Trainer:
    """Create a trainer with every kind of state; it saves a state after every ``num_steps`` steps."""
    torch.manual_seed(seed)
    # A bias there would have a gradient of rounding errors, which AdamW makes large.
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    callbacks = [
        ModelEmaCallback(decay=0.8, save_path=folder / "average.pt"),
        EarlyStoppingCallback(early_stopping_patience=5),
        SaveBestModelCallback(folder / "best.pt"),
        SaveTrainingStateCallback(folder, save_every_n_steps=num_steps, save_at_end=False),
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Trainer(model, nn.functional.mse_loss, optimizer, callbacks=callbacks, seed=6)


def train(trainer: Trainer, **kwargs: Any) -> dict[str, Any]:
    """Train for three epochs, and return the final results to compare."""
    trainer.train(
        make_dataset(18),
        num_epochs=3,
        eval_dataset=make_dataset(8, seed=5),
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1),
        **kwargs,
    )
    average, _, best, _ = trainer.callback_handler.callbacks[:4]
    history = trainer.run_history
    return {
        "weights": {name: value.tolist() for name, value in trainer.model.state_dict().items()},
        "average": {name: value.tolist() for name, value in average.ema_model.module.state_dict().items()},
        "history": {name: list(history.get_metric_values(name)) for name in sorted(history.get_metric_names())},
        "rate": trainer.optimizer.param_groups[0]["lr"],
        "best": best.best_metric,
        "updates": trainer.progress.num_updates,
        "samples": trainer.progress.num_samples,
    }


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def main() -> None:
    name = f"training_state_format_{FORMAT_VERSION}"
    with tempfile.TemporaryDirectory() as folder:
        result = train(make_trainer(Path(folder), num_steps=STEP))
        with tarfile.open(DATA / f"{name}.tar.xz", "w:xz") as archive:
            for saved in (f"step_{STEP}", "best.pt"):
                archive.add(Path(folder) / saved, saved, filter=_anonymous)
    (DATA / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
