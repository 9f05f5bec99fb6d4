"""A process that is stopped while others wait for it: ``_waits_cases.py <folder> <rank to stop> <where>``."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator, InitProcessGroupKwargs

from _support import Probe, make_dataset, make_trainer, train
from pytorch_accelerated._checkpoint import writer
from pytorch_accelerated._distributed import waiting
from pytorch_accelerated.callbacks import SaveTrainingStateCallback

TIMEOUT_SECONDS, LONG_SECONDS = 1, 60


def main(folder: Path, stopped_rank: int, where: str) -> None:
    """Train, and stop one of the processes."""
    seconds = LONG_SECONDS if where == "new group" else TIMEOUT_SECONDS
    process_group = InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))
    waiting.TIME_TO_CONNECT = timedelta(seconds=TIMEOUT_SECONDS)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[process_group])
    rank = accelerator.process_index
    (folder / f"pid-{rank}").write_text(str(os.getpid()))

    def stop(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGSTOP)

    callbacks: list[Any] = []
    if where == "background save":
        callbacks.append(SaveTrainingStateCallback(folder / "states", save_every_n_steps=2, in_background=True))
        if rank == stopped_rank:
            writer._write_files = stop
    elif where == "new group":
        callbacks.append(SaveTrainingStateCallback(folder / "states", save_every_n_steps=2, in_background=True))
        if rank == stopped_rank:
            waiting.distributed.new_group = lambda **_: os.kill(os.getpid(), signal.SIGKILL)
    elif rank == stopped_rank:
        callbacks.append(Probe(on_train_step_end=stop))
    start = time.monotonic()
    try:
        train(make_trainer(accelerator=accelerator, callbacks=callbacks), make_dataset(4000))
    except Exception as error:
        text = "\n".join([str(error), *getattr(error, "__notes__", ())])
        (folder / f"error-{rank}.txt").write_text(f"{time.monotonic() - start}\n{text}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
