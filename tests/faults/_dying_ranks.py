"""A run on several processes, one of which ends or stops when it takes part in the n-th thing that they do together.

    _dying_ranks.py <folder> <rank that dies> <how> <n>

``how`` is ``killed``; ``unnoticed``, which leaves a process behind that keeps the connections open, so that the others
cannot notice the death; or ``stopped``. n counts everything, or as in ``broadcast:20`` what has a name. With 0, nobody
dies, and the names are written to ``places``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import distributed, nn

import _runs
from pytorch_accelerated import Trainer
from pytorch_accelerated._distributed import peers
from pytorch_accelerated.callbacks import (
    ModelEmaCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    TrainerCallback,
)

TIMEOUT = timedelta(seconds=120)
GRACE_SECONDS = 0.3
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "barrier",
    "broadcast",
    "gather",
    "new_group",
    "reduce",
    "_broadcast_coalesced",
)


class Death:
    """Ends or stops the process at one of the places.

    Args:
        folder: Where the file ``died`` tells of it.
        how: How.
        place: The number of the place, from 1, or a name and the number among those; 0 for none.
    """

    def __init__(self, folder: Path, how: str, place: str) -> None:
        self.folder, self.how = folder, how
        self.name, _, number = place.rpartition(":")
        self.number = int(number)
        self.places: list[str] = []
        self._lock = threading.Lock()

    def reach(self, name: str) -> None:
        """Count a place, and die if it is the one."""
        if threading.current_thread() is not threading.main_thread():
            name += " in the background"
        with self._lock:
            self.places.append(name)
            is_counted = self.name in ("", name)
            number = self.places.count(name) if self.name else len(self.places)
            if not is_counted or number != self.number:
                return
        (self.folder / "died").write_text(name)
        if self.how == "unnoticed" and os.fork() == 0:
            time.sleep(60)  # the test ends it
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP if self.how == "stopped" else signal.SIGKILL)

    def before(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a collective that is preceded by this."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.reach(name)
            return function(*args, **kwargs)

        return call

    def watch_collectives(self) -> None:
        """Count the calls of collectives from now on."""
        for name in COLLECTIVES:
            for module in (distributed, distributed.distributed_c10d):
                if hasattr(module, name):
                    setattr(module, name, self.before(name, getattr(module, name)))

    def watch_gradients(self, model: nn.Module) -> None:
        """Count the gradients of the first layer, for which the others wait in their backward pass."""
        next(iter(model.parameters())).register_hook(lambda gradient: self.reach("backward"))


class Slow(TrainerCallback):
    """Gives the others time to wait for this rank."""

    def on_train_step_end(self, trainer: Any, **kwargs: Any) -> None:
        time.sleep(0.002)


def main(folder: Path, dying_rank: int, how: str, place: str) -> None:
    """Train on few batches, with everything that processes do together."""
    torch.set_num_threads(1)
    peers.GRACE_SECONDS = GRACE_SECONDS
    handlers = [InitProcessGroupKwargs(timeout=TIMEOUT)]
    accelerator = Accelerator(cpu=True, kwargs_handlers=handlers)
    death, model = Death(folder, how, place), _runs.Net()
    if accelerator.process_index == dying_rank:
        death.watch_collectives()
        death.watch_gradients(model)
    trainer = Trainer(
        model,
        nn.functional.mse_loss,
        torch.optim.AdamW(model.parameters(), lr=0.01),
        callbacks=[
            Slow(),
            ModelEmaCallback(save_path=folder / "average.pt"),
            SaveBestModelCallback(folder / "best.pt"),
            StepBasedEvaluationCallback(3),
            SaveTrainingStateCallback(folder / "states", save_every_n_steps=2, in_background=True),
        ],
        accelerator=accelerator,
    )
    data = _runs.NoisySamples(is_noisy=False)
    trainer.train(data, num_epochs=1, eval_dataset=data, per_device_batch_size=3)
    if death.number == 0 and death.places:
        (folder / "places").write_text("\n".join(death.places))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
