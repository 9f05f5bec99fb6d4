"""The part of `test_stopping_and_saving.py` that runs on each of two processes, as a script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _runs
from _processes import run_cases
from _saved import names_in
from _support import Probe
from pytorch_accelerated.callbacks import StepBasedEvaluationCallback

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "background": {"in_background": True},
    "keep_best": {"max_checkpoints": 9, "keep_best": 1},
}


def run(folder: Path, settings: dict[str, Any], **kwargs: Any) -> tuple[dict[str, Any], list[Any]]:
    """Train with a state an epoch, and return the outcome, and what was in the folder at each evaluation."""
    seen: list[list[str]] = []

    def look(trainer: Any, is_intermediate: bool, **_: Any) -> None:
        if not is_intermediate:
            seen.append([name for name in names_in(folder) if name.startswith("epoch")])

    callbacks = [StepBasedEvaluationCallback(2), Probe(on_eval_epoch_start=look)]
    trainer = _runs.make_trainer(
        folder, callbacks=callbacks, save_every_n_steps=None, save_every_n_epochs=1, **settings
    )
    return _runs.train(trainer, **kwargs), seen


def compare(kind: str) -> dict[str, Any]:
    expected, seen = run(Path(f"{kind}_whole"), KINDS[kind])
    found = {}
    for name in ("epoch_1", "epoch_2", "epoch_3"):
        resumed, _ = run(Path(f"{kind}_{name}"), KINDS[kind], resume_from=Path(f"{kind}_whole") / name)
        found[name] = _runs.differences(expected, resumed)
    return {"differences": found, "seen": seen}


def case_plain(rank: int, folder: Path) -> Any:
    return compare("plain")


def case_background(rank: int, folder: Path) -> Any:
    return compare("background")


def case_keep_best(rank: int, folder: Path) -> Any:
    return compare("keep_best")


if __name__ == "__main__":
    run_cases({name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")})
