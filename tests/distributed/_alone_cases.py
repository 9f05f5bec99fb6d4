"""A run that one process ends alone, within a step: ``_alone_cases.py <folder> <rank> <method> <exception>``."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator, InitProcessGroupKwargs

from _support import make_dataset, make_trainer
from pytorch_accelerated import Trainer
from pytorch_accelerated._distributed import waiting
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, StopTrainingError
from pytorch_accelerated.exceptions import NonFiniteLossError

EXCEPTIONS: dict[str, BaseException] = {
    "stop": StopTrainingError("mine"),
    "non-finite": NonFiniteLossError("mine", 3),
    "error": LookupError("mine"),
    "interrupt": KeyboardInterrupt("mine"),
}


def main(folder: Path, raising_rank: str, name: str, exception: str) -> None:
    """Train, and raise in a method of the third step; on all processes if the rank is "all"."""
    waiting.TIME_TO_AGREE = timedelta(seconds=0.3 if raising_rank != "all" else 10)
    handlers = [InitProcessGroupKwargs(timeout=timedelta(seconds=60))]
    trainer_kwargs = {"cpu": True, "kwargs_handlers": handlers}
    rank = Accelerator(**trainer_kwargs).process_index
    calls = 0

    def method(self: Any, *arguments: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3 and raising_rank in ("all", str(rank)):
            if raising_rank == "all":
                time.sleep(0.2 * rank)
            raise EXCEPTIONS[exception]
        return getattr(Trainer, name)(self, *arguments, **kwargs)

    cls = type("Alone", (Trainer,), {name: method})
    saving = SaveTrainingStateCallback(folder / "states", save_every_n_steps=1, in_background=True)
    trainer = make_trainer(cls=cls, callbacks=[saving], accelerator=trainer_kwargs)
    try:
        trainer.train(
            make_dataset(40),
            num_epochs=4,
            per_device_batch_size=2,
            gradient_clip_value=1.0,
            create_scheduler_fn=lambda optimizer: __import__("torch").optim.lr_scheduler.StepLR(optimizer, 1),
        )
    except BaseException as error:
        (folder / f"error-{rank}.txt").write_text("\n".join([repr(error), *getattr(error, "__notes__", ())]))
        raise
    (folder / f"error-{rank}.txt").write_text(f"returned: {trainer.stop_reason}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
