"""Programs written for 0.1.61 observe what they observed with that version.

Each program in `programs/` runs unchanged with both versions. Next to it are the figures that it printed with 0.1.61.
Those of this version are the same, except for the differences listed here, each with what has to be there instead.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from _starting import run

PROGRAMS = Path(__file__).parent / "programs"

Figures = Mapping[str, Any]
"""Figures by their path, such as ``training/metrics/eval_loss_epoch``."""

ABSENT = "absent"
"""Stands for a figure that a version does not have."""


# --- what this version has instead -------------------------------------------------------------------------------


class Difference(NamedTuple):
    """Figures that are not those of 0.1.61.

    Args:
        path: Their path, with ``*`` for any text.
        reason: What was changed on purpose.
        expected: Returns the figure of this version, from its path and the figures of 0.1.61.
    """

    path: str
    reason: str
    expected: Callable[[str, Figures], Any]


class AnyFigure:
    """Stands for any figure, but not for its absence."""


class Including(NamedTuple):
    """Stands for a list that has these elements, and perhaps more."""

    elements: list[Any]


def changed(path: str, old: Figures) -> Any:
    """Expect any figure."""
    return AnyFigure()


def added(path: str, old: Figures) -> Any:
    """Expect any figure where 0.1.61 has none."""
    return old.get(path, AnyFigure())


def extended(path: str, old: Figures) -> Any:
    """Expect a list with more elements."""
    return Including(old[path])


def fixed(figure: Any) -> Callable[[str, Figures], Any]:
    """Expect this figure."""
    return lambda path, old: figure


def derived(change: Callable[[Any], Any]) -> Callable[[str, Figures], Any]:
    """Expect a function of the figure of 0.1.61."""
    return lambda path, old: change(old[path])


def as_in(stage: str) -> Callable[[str, Figures], Any]:
    """Expect the figure that 0.1.61 has in another stage of the program."""
    return lambda path, old: old[f"{stage}/{path.partition('/')[2]}"]


def without_extra_update(path: str, old: Figures) -> Any:
    """Expect the updates of all epochs where 0.1.61 has one more, and the limit where one was given."""
    num_epochs, num_updates = (
        old[path.replace("max_num_train_steps", name)] for name in ("num_epochs", "num_update_steps_per_epoch")
    )
    return min(old[path], num_epochs * num_updates)


def after_training(stage: str, *names: str) -> list[Difference]:
    """Expect that `evaluate` keeps the metrics of a stage, and has series of its own for those with the same names."""
    kept = [Difference("evaluation/metrics/*_loss_epoch", "`evaluate` keeps the history", as_in(stage))]
    for name in names:
        kept += [
            Difference(f"evaluation/metrics/{name}", "`evaluate` keeps the history", as_in(stage)),
            Difference(
                f"evaluation/*metrics/evaluation_{name}",
                "what is recorded during `evaluate` is a series of its own",
                lambda path, old: old[path.replace("evaluation_", "")],
            ),
        ]
    return [*kept, Difference("evaluation/latest_metrics/*_loss_epoch", "`evaluate` keeps the history", added)]


# --- the differences ---------------------------------------------------------------------------------------------

EVERYWHERE = [
    Difference("*/run_config/seed", "the seed is a setting of a run", added),
    Difference("*/run_config/gradient_clip_norm", "so is clipping by norm", added),
    Difference("*/run_config/is_limited_by_steps", "so is whether `max_num_train_steps` was given", added),
    Difference("evaluation/run_config/max_num_train_steps", "`evaluate` makes no updates", changed),
    Difference("*/run_config/max_num_train_steps", "0.1.61 has one update too many", without_extra_update),
]
"""Differences that all programs observe."""


# `detection.py`: accumulates two batches, and stops early after its ninth epoch.


def doubled(losses: Any) -> Any:
    """The losses of 0.1.61, which divides them by the number of accumulated batches."""
    return [2 * loss for loss in losses] if isinstance(losses, list) else 2 * losses


DETECTION = [
    Difference(
        "evaluation/metrics/train_loss_epoch",
        "`evaluate` keeps the history; the loss is not divided",
        lambda path, old: doubled(old["training/metrics/train_loss_epoch"]),
    ),
    Difference("training/*metrics/train_loss_epoch", "the loss is not divided", derived(doubled)),
    Difference("training/current_epoch", "the last epoch counts, because it was trained", fixed(10)),
    Difference(
        "training/num_events/training_run_epoch_end", "callbacks after the one that stops get the event", fixed(9)
    ),
    Difference(
        "training/order_of_events",
        "callbacks after the one that stops get the event",
        derived(lambda order: order.replace("stop_training_error", "training_run_epoch_end stop_training_error")),
    ),
    Difference("evaluation/current_epoch", "`evaluate` does not change the epoch", fixed(10)),
    Difference("files/best_model.pt/loss", "the metric has one key", fixed(ABSENT)),
    Difference("files/best_model.pt/num_boxes", "the metric has one key", fixed(13)),
    Difference("files/best_model.pt/epoch", "the epoch is saved, too", fixed(7)),
    *after_training("training", "num_boxes", "mean_score"),
]


# `transfer_learning.py`: three groups; the first of three epochs of six updates warms up, down to 1e-4.


def cosine_after_warmup(base: float, k: int) -> float:
    """Half a period of the cosine from the end of the warm-up to the end of the run."""
    return 1e-4 + (base - 1e-4) * (1 + math.cos(math.pi * (k - 6) / 12)) / 2


TRANSFER_LEARNING = [
    Difference(
        "everything/learning_rates",
        "update k trains at curve(k), not at curve(k - 1); the cosine is not cut off after two of three epochs",
        derived(
            lambda rates: [
                *rates[1:13],
                *([cosine_after_warmup(base, k) for base in (0.1, 0.005, 0.0025)] for k in range(12, 18)),
            ]
        ),
    ),
    Difference("everything/*metrics/*", "other learning rates", changed),
    Difference("everything/weights/*", "other learning rates", changed),
    Difference("files/best.pt/epoch", "the epoch is saved, too", added),
    Difference(
        "files/best.pt/scheduler_state_dict", "it has the position in the schedule under our name, too", extended
    ),
]


# `pretraining.py`: two groups, with rates of 0.02 and 0.01.


def rates_in_decay(t: float) -> list[float]:
    """The learning rates when a fraction t of the decay to 0.05 of them is done."""
    return [base * (0.05 + 0.95 * (1 - math.sqrt(t))) for base in (0.02, 0.01)]


PRETRAINING = [
    Difference(
        "run/learning_rates",
        "update k trains at curve(k), not at curve(k - 1)",
        derived(lambda rates: [*rates[1:], rates_in_decay(3 / 4)]),
    ),
    Difference(
        "continuation/learning_rates",
        "update k trains at curve(k); a continuation does not warm up",
        fixed([[0.02, 0.01]] * 19 + [rates_in_decay(1 / 2)]),
    ),
    Difference(
        "*/current_steps",
        "the updates done, after that of the step; 0.1.61 has those before it, less one",
        derived(lambda steps: [step + 2 for step in steps]),
    ),
    Difference("*/*metrics/train_loss_epoch", "other learning rates", changed),
    Difference("*/weights/*", "other learning rates", changed),
    Difference("*_wsd_post_decay.pt/scheduler_state_dict", "it has the position in the schedule, too", extended),
]


# `own_trainer.py`: resumes a run of two epochs of four updates, to four epochs.

EVALUATION = "eval_epoch_start 3*(eval_step_start eval_step_end) eval_epoch_end training_run_epoch_end "


def smoothed_again(path: str, old: Figures) -> list[float]:
    """The means over two evaluations if that of epoch 2 belongs to the resumed run, which remembers no earlier one."""
    first, second = old["run/metrics/smoothed_loss"]
    third, last = old["resumed run/metrics/smoothed_loss"][:2]  # the first of these is of one evaluation
    loss_of_epoch_2 = 2 * second - first
    return [first, loss_of_epoch_2, (loss_of_epoch_2 + third) / 2, last]


OWN_TRAINER = [
    Difference("resumed run/metrics/smoothed_loss", "the evaluation of epoch 2 is repeated", smoothed_again),
    *(
        Difference(
            f"resumed run/num_events/{event}",
            "the evaluation of epoch 2 is repeated: its state was saved before it",
            lambda path, old: old[path.replace("resumed run", "run")] * 3 // 2,
        )
        for event in ("eval_*", "training_run_epoch_end")
    ),
    Difference(
        "resumed run/order_of_events",
        "the evaluation of epoch 2 is repeated: its state was saved before it",
        lambda path, old: old["run/order_of_events"].replace(
            "training_run_start ", f"training_run_start {EVALUATION}", 1
        ),
    ),
    Difference(
        "resumed run/metrics/*",
        "the history is restored; the epochs end at `num_epochs`",
        lambda path, old: old[path.replace("resumed run", "run")] + old[path][:2],
    ),
    Difference(
        "resumed run/latest_metrics/*",
        "the epochs end at `num_epochs`",
        lambda path, old: old[path.replace("latest_metrics", "metrics")][1],
    ),
    Difference("resumed run/epochs", "the two epochs that were trained are not repeated", fixed([3, 4])),
    Difference("resumed run/current_epoch", "the epochs end at `num_epochs`", fixed(5)),
    Difference("resumed run/num_events/*", "two epochs, as in the first run", as_in("run")),
    Difference("resumed run/learning_rates", "two epochs of four updates", derived(lambda rates: rates[:8])),
    Difference(
        "resumed run/calls",
        "two epochs of four updates",
        fixed([call for epoch in (3, 4) for call in (f"epoch {epoch} of 4 batches", *["_clip_gradients"] * 4)]),
    ),
    Difference("resumed run/weights/*", "as if there had been no interruption", as_in("uninterrupted run")),
    Difference("files/second/epoch_[25]", "epochs 3 and 4 were trained", fixed(ABSENT)),
    Difference("evaluation/current_epoch", "`evaluate` does not change the epoch", as_in("run")),
    *after_training("run", "smoothed_loss"),
]

DIFFERENCES = {
    "detection": DETECTION,
    "transfer_learning": TRANSFER_LEARNING,
    "pretraining": PRETRAINING,
    "own_trainer": OWN_TRAINER,
}


# --- comparing ---------------------------------------------------------------------------------------------------


def by_path(figures: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the figures of nested dictionaries with their paths."""
    if isinstance(figures, dict) and figures:
        for name, figure in figures.items():
            yield from by_path(figure, f"{path}/{name}" if path else name)
    else:
        yield path, figures


def agrees(figure: Any, expected: Any) -> bool:
    """Return whether a figure is the expected one, up to rounding."""
    if isinstance(expected, AnyFigure):
        return figure is not ABSENT
    if isinstance(expected, Including):
        return set(expected.elements) <= set(figure)
    if isinstance(expected, float) and isinstance(figure, (int, float)):
        return math.isclose(figure, expected, rel_tol=1e-5, abs_tol=1e-8)
    if isinstance(expected, list) and isinstance(figure, list):
        return len(figure) == len(expected) and all(map(agrees, figure, expected))
    return bool(figure == expected)


def deviations(new: Figures, old: Figures, differences: Sequence[Difference], stage: str = "*") -> list[str]:
    """Describe each figure of a stage that is neither that of 0.1.61 nor what a difference expects."""
    found = []
    for path in sorted(old.keys() | new.keys()):
        if not fnmatchcase(path.partition("/")[0], stage):
            continue
        difference = first_match(path, differences)
        expected = difference.expected(path, old) if difference else old.get(path, ABSENT)
        figure = new.get(path, ABSENT)
        if not agrees(figure, expected):
            reason = f", because {difference.reason}" if difference else ", as with 0.1.61"
            found.append(f"{path}: {figure!r} instead of {expected!r}{reason}")
    return found


def first_match(path: str, differences: Sequence[Difference]) -> Difference | None:
    return next((difference for difference in differences if fnmatchcase(path, difference.path)), None)


@functools.cache
def run_program(program: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        return run(PROGRAMS / f"{program}.py", folder)


def figures_of(program: str) -> Figures:
    """Return what a program prints with this version."""
    finished = run_program(program)
    if finished.returncode != 0:
        pytest.fail("\n".join(finished.stderr.splitlines()[-10:]), pytrace=False)
    return dict(by_path(json.loads(finished.stdout)))


def recorded(program: str) -> Figures:
    """Return what a program printed with 0.1.61."""
    return dict(by_path(json.loads((PROGRAMS / f"{program}.json").read_text())))


STAGES = [
    (program, stage)
    for program in DIFFERENCES
    for stage in dict.fromkeys(path.partition("/")[0] for path in recorded(program))
]


# --- tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("program", "stage"), STAGES)
def test_a_program_of_0_1_61_observes_the_same_or_a_listed_difference(program, stage):
    assert deviations(figures_of(program), recorded(program), [*DIFFERENCES[program], *EVERYWHERE], stage) == []


@pytest.mark.parametrize("program", DIFFERENCES)
def test_each_listed_difference_is_observed(program):
    new, old = figures_of(program), recorded(program)
    differences = [*DIFFERENCES[program], *EVERYWHERE]
    used = {first_match(path, differences) for path in old.keys() | new.keys() if new.get(path) != old.get(path)}
    assert [difference.path for difference in DIFFERENCES[program] if difference not in used] == []


def test_each_program_in_the_folder_is_compared():
    assert {path.stem for path in PROGRAMS.glob("[!_]*.py")} == set(DIFFERENCES)
    assert {path.stem for path in PROGRAMS.glob("*.json")} == set(DIFFERENCES)


@pytest.mark.parametrize(
    ("new", "deviation"),
    [
        ({"a/rates": [0.1, 0.2]}, None),
        ({"a/rates": [0.1, 0.2000001]}, None),
        ({"a/rates": [0.1, 0.21]}, "a/rates: [0.1, 0.21] instead of [0.1, 0.2], as with 0.1.61"),
        ({"a/rates": [0.1]}, "a/rates: [0.1] instead of [0.1, 0.2], as with 0.1.61"),
        ({}, "a/rates: 'absent' instead of [0.1, 0.2], as with 0.1.61"),
        ({"a/rates": [0.1, 0.2], "b": 1}, "b: 1 instead of 'absent', as with 0.1.61"),
    ],
)
def test_a_changed_missing_or_additional_figure_is_found(new, deviation):
    assert deviations(new, {"a/rates": [0.1, 0.2]}, []) == ([] if deviation is None else [deviation])


@pytest.mark.parametrize(
    ("expected", "good", "bad"),
    [
        (fixed(3), 3, 1),
        (derived(lambda number: number + 1), 2, 1),
        (changed, 7, ABSENT),
        (as_in("b"), 5, 1),
    ],
)
def test_a_difference_demands_what_it_expects(expected, good, bad):
    old = {"a/number": 1, "b/number": 5}
    difference = Difference("a/*", "of a reason", expected)
    assert deviations({"a/number": good}, old, [difference], stage="a") == []
    (found,) = deviations({"a/number": bad}, old, [difference], stage="a")
    assert found.startswith(f"a/number: {bad!r} instead of ")
    assert found.endswith(", because of a reason")


def test_an_addition_leaves_the_figures_of_0_1_61_as_they_are():
    additions = [Difference("*", "ours", added)]
    assert deviations({"keys": 1, "more": 2}, {"keys": 1}, additions) == []
    assert deviations({"keys": 2, "more": 2}, {"keys": 1}, additions) != []
    assert deviations({"keys": [1, 2]}, {"keys": [2]}, [Difference("keys", "ours", extended)]) == []
    assert deviations({"keys": [1]}, {"keys": [2]}, [Difference("keys", "ours", extended)]) != []
