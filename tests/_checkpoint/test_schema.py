"""Contents of states that lie: whatever is in the place of an entry, the state is refused and nothing has changed.

The checksums are right, as those of somebody with bad intentions would be.
"""

from __future__ import annotations

import copy
import math
import os
import random
import shutil
import time
import warnings
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch

from _saved import assert_equal, everything_in, falsify_manifest, make_state_trainer, train
from pytorch_accelerated._checkpoint.files import crc32_of
from pytorch_accelerated.callbacks import EarlyStoppingCallback, ModelEmaCallback, SaveTrainingStateCallback
from pytorch_accelerated.exceptions import CheckpointError

SHARED, LOCAL = "trainer_state.pt", "process_0.pt"
NUM_FUZZED = int(os.environ.get("NUM_FUZZED", "0"))
"""How many random changes are tried: ``NUM_FUZZED=2000 pytest ...``, which also tries all of the others."""

SECONDS = 20
DELETED = object()
CALLBACKS = ("trainer", "callbacks")
AVERAGE, STOPPING = (*CALLBACKS, "ModelEmaCallback/0"), (*CALLBACKS, "EarlyStoppingCallback/0")
LIES: list[tuple[str, tuple[Any, ...], Any]] = [
    (SHARED, ("trainer",), 3),
    (SHARED, ("current_epoch",), "text"),
    (SHARED, ("trainer", "progress", "num_updates"), 10**18),
    (SHARED, ("trainer", "progress", "num_batches_in_epoch"), torch.zeros(3)),
    (SHARED, ("trainer", "progress", "phase"), "nowhere"),
    (SHARED, ("trainer", "progress"), []),
    (SHARED, ("trainer", "seed"), float("nan")),
    (SHARED, ("trainer", "run_number"), (1,)),
    (SHARED, ("trainer", "stopped"), 3),
    (SHARED, ("trainer", "num_metric_values_seen"), -1),
    (SHARED, ("trainer", "is_epoch_cut_short"), torch.zeros(0)),
    (SHARED, ("trainer", "run_history"), "text"),
    (SHARED, ("trainer", "run_history", "metrics"), {3: [1.0]}),
    (SHARED, ("trainer", "run_history", "moments", 0), True),
    (SHARED, ("trainer", "scheduler", "step_size"), b"x"),
    (SHARED, ("trainer", "scheduler", "last_epoch"), {"a": 1}),
    (SHARED, ("trainer", "scheduler", "base_lrs"), "text"),
    (SHARED, (*CALLBACKS, "SaveTrainingStateCallback/0", "num_steps"), torch.zeros(0)),
    (SHARED, (*STOPPING, "best"), "text"),
    (SHARED, (*STOPPING, "num_values_seen"), []),
    (SHARED, (*AVERAGE, "ema_model"), None),
    (SHARED, (*AVERAGE, "ema_model"), DELETED),
    (SHARED, (*AVERAGE, "ema_model_numbers"), 3),
    (SHARED, (*AVERAGE, "best_metric"), {"a": 1}),
    (LOCAL, ("rng",), {}),
    (LOCAL, ("rng", "python", 1, 5), -1),
    (LOCAL, ("rng", "python", 1, 5), DELETED),
    (LOCAL, ("rng", "numpy", 1), torch.zeros(3, dtype=torch.int64)),
    (LOCAL, ("rng", "numpy", 2), 10**6),
    (LOCAL, ("rng", "numpy", 2), -5),
    (LOCAL, ("rng", "torch"), torch.zeros(3, dtype=torch.uint8)),
    (LOCAL, ("rng", "torch"), "text"),
    (LOCAL, ("window", "total"), "text"),
    (LOCAL, ("window", "num_samples"), 1.5),
    (LOCAL, ("window", "num_samples"), DELETED),
    (LOCAL, ("window", "end_of_epoch"), [1, 2, 3]),
    (LOCAL, ("gradients", "0.weight"), torch.zeros(7)),
    (LOCAL, ("gradients", "0.weight"), 3),
    (LOCAL, ("means", "loss", "values"), [None]),
    (LOCAL, ("means", "metrics"), 3),
    (LOCAL, ("order",), 3),
    (LOCAL, ("companions",), "text"),
    (LOCAL, ("companions", "others"), 0),
    (LOCAL, ("window", "expected"), math.nan),
]


def make_trainer(folder):
    callbacks = [
        EarlyStoppingCallback(9, watch_metric="train_loss_epoch"),
        ModelEmaCallback(save_path=folder / "average.pt", evaluate_during_training=False),
        SaveTrainingStateCallback(folder / "states", save_every_n_steps=1),
    ]
    return make_state_trainer(callbacks)


def run(trainer, **kwargs):
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=2)
    train(trainer, create_scheduler_fn=schedule, **kwargs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A state within an epoch, and within an accumulation window, and the contents of its files."""
    folder = tmp_path_factory.mktemp("saved")
    run(make_trainer(folder), num_epochs=2)
    path = folder / "states" / "step_8"
    return path, {name: torch.load(path / name, weights_only=True) for name in (SHARED, LOCAL)}


def changed(contents, place, value):
    """Return contents with another value at a place, or without one."""
    if not place:
        return value
    key, *rest = place
    contents = list(contents) if isinstance(contents, tuple) else contents
    if value is DELETED and not rest:
        del contents[key]
    else:
        contents[key] = changed(contents[key] if rest else None, rest, value)
    return contents


def places_in(contents, place=()):
    """Return the places of all values."""
    items = contents.items() if isinstance(contents, dict) else ()
    items = enumerate(contents) if isinstance(contents, (list, tuple)) else items
    for key, value in items:
        yield (*place, key)
        yield from places_in(value, (*place, key))


def lie(saved, folder, file, place, value):
    """Return a copy of the state with another value in a file, and the right checksum of that."""
    source, contents = saved
    path = shutil.copytree(source, folder / source.name)
    torch.save(changed(copy.deepcopy(contents[file]), place, value), path / file)

    def declare(manifest):
        manifest["files"][file] = {"size": (path / file).stat().st_size, "crc32": crc32_of(path / file)}

    falsify_manifest(path, declare)
    return path


def resume(trainer, path):
    """Resume, and return the error if there is one."""
    try:
        run(trainer, num_epochs=2, resume_from=path)
    except CheckpointError as error:
        return error
    return None


@pytest.mark.parametrize(("file", "place", "value"), LIES if NUM_FUZZED else LIES[::2])
def test_a_value_that_cannot_be_there_is_refused_and_nothing_is_changed(saved, tmp_path, file, place, value):
    path = lie(saved, tmp_path, file, place, value)
    trainer = make_trainer(tmp_path)
    before = everything_in(trainer)
    error = resume(trainer, path)
    assert error is not None
    assert str(path) in str(error)
    assert all(line.isprintable() for line in str(error).splitlines())
    assert_equal(everything_in(trainer), before)


def test_the_state_itself_is_resumed(saved, tmp_path):
    path = shutil.copytree(saved[0], tmp_path / "copy")
    assert resume(make_trainer(tmp_path), path) is None


VALUES: list[Any] = [
    None,
    -1,
    0,
    3,
    10**18,
    2**70,
    1.5,
    math.nan,
    math.inf,
    "text",
    "",
    [],
    {},
    {"a": 1},
    [1, 2],
    True,
    b"x",
]
VALUES += [torch.zeros(0), torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), (1,), "\x1b[2J", DELETED]


@pytest.mark.skipif(NUM_FUZZED == 0, reason="takes minutes; set NUM_FUZZED")
def test_random_lies_are_refused_or_do_no_harm(saved, tmp_path, capsys):
    """A lie that goes unnoticed may train on other numbers, but it must not fail without a word on the state."""
    generator = random.Random(1)
    _, contents = saved
    places = [(file, place) for file in (SHARED, LOCAL) for place in places_in(contents[file])]
    ends: Counter[str] = Counter()
    for number in range(NUM_FUZZED):
        (file, place), value = generator.choice(places), generator.choice(VALUES)
        folder = tmp_path / str(number)
        folder.mkdir()
        trainer = make_trainer(folder)
        before = everything_in(trainer)
        begin = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                error = resume(trainer, lie(saved, folder, file, place, value))
        except ZeroDivisionError:
            ends["resumed"] += 1  # with a schedule of no steps, which is a number like any other
        except Exception as other:
            ends[f"{type(other).__name__} at {file} {place}: {value!r}: {other}"] += 1
        else:
            ends["resumed" if error is None else "refused"] += 1
            if error is not None and "ema_model" not in place:  # whose shapes are compared when the run starts
                assert_equal(everything_in(trainer), before)
        assert time.monotonic() - begin < SECONDS
        shutil.rmtree(folder)
    capsys.readouterr()
    print(ends)
    assert ends.keys() <= {"resumed", "refused"}, ends
