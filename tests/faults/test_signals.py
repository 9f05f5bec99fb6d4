"""Real signals to real processes: each ends in good order, and another process goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest
import torch

from _processes import launch
from _saved import bytes_in, names_in
from _starting import Started, start

SCRIPT = Path(__file__).with_name("_signalled_training.py")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STEPS = {signal.SIGINT: 5, signal.SIGTERM: 7, signal.SIGUSR1: 15}
"""At which step of 15 each signal comes: at the end of an epoch, within a window, in the last."""

SECONDS_TO_END = 10
TIMEOUT_SECONDS = 120


def exit_code_of(number):
    """Python itself ends by SIGINT after a `KeyboardInterrupt`, so that shells know of it."""
    return -number if number == signal.SIGINT else 128 + number


@dataclass
class Running:
    """A process, what it is told, and what it says."""

    process: Started
    stdin: IO[str]
    stdout: IO[str]


@contextmanager
def running(folder, **settings):
    """Start the training in a process of its own, which is killed if it is still there at the end of the block."""
    (its_input, told), (said, its_output) = os.pipe(), os.pipe()
    with os.fdopen(told, "w") as stdin, os.fdopen(said) as stdout:
        arguments = (str(folder), json.dumps(settings))
        process = start(SCRIPT, *arguments, stdin=its_input, stdout=its_output, has_own_group=True)
        os.close(its_input)
        os.close(its_output)
        try:
            yield Running(process, stdin, stdout)
        finally:
            process.kill()
            process.wait()


def wait_for_line(running, line):
    output = []
    while printed := running.stdout.readline():
        output.append(printed)
        if printed.strip() == line:
            return
    pytest.fail(f"the process ended without saying {line!r}:\n{''.join(output)}")


def end(running):
    """Let it go on, and return its output and how many seconds it took to end."""
    begin = time.monotonic()
    with suppress(BrokenPipeError):
        running.stdin.write("go on\n")
        running.stdin.close()
    guard = threading.Timer(TIMEOUT_SECONDS, running.process.kill)
    guard.start()
    output = running.stdout.read()
    running.process.wait()
    guard.cancel()
    return output, time.monotonic() - begin


def same(left, right):
    """Bit by bit, in nested dictionaries and lists too."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def read(folder, name, rank=0):
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


# --- one process -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """What a run leaves that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with running(folder) as training:
        output, _ = end(training)
    assert training.process.returncode == 0, output
    return read(folder, "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_process_that_gets_a_signal_saves_and_ends_and_another_goes_on(tmp_path, whole_run, number):
    with running(tmp_path, tell_at=STEPS[number]) as training:
        wait_for_line(training, f"at step {STEPS[number]}")
        training.process.send_signal(number)
        output, seconds = end(training)
    assert training.process.returncode == exit_code_of(number), output
    assert seconds < SECONDS_TO_END
    states = tmp_path / "run" / "states"
    assert names_in(states) == [f"step_{STEPS[number]}"]  # no step was lost
    assert f"resume_from={str(states / f'step_{STEPS[number]}')!r}" in output
    assert "handlers are as before" in output
    with running(tmp_path, runs={"resumed": str(states / f"step_{STEPS[number]}")}) as training:
        output, _ = end(training)
    assert training.process.returncode == 0, output
    assert same(read(tmp_path, "resumed"), whole_run)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_to_the_whole_group_does_not_take_the_workers_away(tmp_path, whole_run, number):
    """As a terminal or a scheduler sends it; on the resume the workers are others, and as many as before."""
    with running(tmp_path, tell_at=STEPS[number], num_workers=2) as training:
        wait_for_line(training, f"at step {STEPS[number]}")
        os.killpg(training.process.pid, number)
        output, seconds = end(training)
    assert training.process.returncode == exit_code_of(number), output
    assert seconds < SECONDS_TO_END
    state = tmp_path / "run" / "states" / f"step_{STEPS[number]}"
    with running(tmp_path, runs={"resumed": str(state)}, num_workers=2) as training:
        output, _ = end(training)
    assert training.process.returncode == 0, output
    assert same(read(tmp_path, "resumed"), whole_run)


@pytest.mark.slow
def test_sigterm_ends_a_process_at_once_if_no_callback_listens_to_it(tmp_path):
    with running(tmp_path, tell_at=3, saves=False) as training:
        wait_for_line(training, "at step 3")
        training.process.terminate()
        output, _ = end(training)
    assert training.process.returncode == -signal.SIGTERM
    assert output == ""


@pytest.mark.slow
@pytest.mark.parametrize("is_begun", [False, True])
def test_sigterm_before_the_run_listens_loses_nothing(tmp_path, whole_run, is_begun):
    """The process ends at once: nothing was trained since the state that the run goes on from, if there is one."""
    if is_begun:
        with running(tmp_path, signal_at=["on_train_step_end", 7, signal.SIGTERM, 0]) as training:
            output, _ = end(training)
        assert training.process.returncode == 128 + signal.SIGTERM, output
    states = tmp_path / "run" / "states"
    before = bytes_in(states) if is_begun else {}
    settings = {"runs": {"run": "latest" if is_begun else None}, "num_workers": 2}
    with running(tmp_path, signal_at=["on_training_run_start", 1, signal.SIGTERM, 0], **settings) as training:
        output, _ = end(training)  # which also tells that nobody else is left to write to its pipe, such as a worker
    assert training.process.returncode == -signal.SIGTERM, output
    assert {**bytes_in(states), ".lock": b""} == {**before, ".lock": b""}
    with running(tmp_path, **settings) as training:
        output, _ = end(training)
    assert training.process.returncode == 0, output
    assert ("Resuming from" in output) == is_begun
    assert same(read(tmp_path, "run"), whole_run)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_slow_step_at_once(tmp_path):
    with running(tmp_path, is_slow=True) as training:
        wait_for_line(training, "a slow step")
        training.process.send_signal(signal.SIGINT)
        wait_for_line(training, "a signal has come")
        training.process.send_signal(signal.SIGINT)
        output, seconds = end(training)
    print(f"ended after {seconds:.2f} s")
    assert training.process.returncode == -signal.SIGINT, output
    assert seconds < SECONDS_TO_END  # the step takes a minute
    assert "handlers are as before" in output
    assert names_in(tmp_path / "run" / "states") == []


# --- two processes -----------------------------------------------------------------------------------------------


SIGNALLED_AT = {
    "training": ["on_backward_start", 6, signal.SIGTERM, 1],
    "evaluation": ["on_eval_step_start", 5, signal.SIGUSR1, 1],  # four were within the epoch
    "end": ["on_training_run_end", 1, signal.SIGTERM, 1],
}
"""By place: event, in which call of it, signal, rank."""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Runs on two processes of which rank 1 alone got a signal; then a whole run, and those that are resumed."""
    folder = tmp_path_factory.mktemp("interrupted")
    codes, states = {}, {}
    for place, signal_at in SIGNALLED_AT.items():
        (folder / place).mkdir()
        settings = json.dumps({"signal_at": signal_at, "has_late_stop": place == "end"})
        ended = launch(SCRIPT, folder / place, 2, settings, timeout=TIMEOUT_SECONDS)
        codes[place] = [process.returncode for process in ended]
        states[place] = names_in(folder / place / "run" / "states")
    resumed = {place: str(folder / place / "run" / "states" / names[0]) for place, names in states.items()}
    launch(SCRIPT, folder, 2, json.dumps({"runs": {"whole": None, **resumed}}), timeout=TIMEOUT_SECONDS)
    return folder, codes, states


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("place", SIGNALLED_AT)
def test_a_signal_to_one_process_ends_all_alike_and_others_go_on(interrupted, place):
    folder, codes, states = interrupted
    outputs = "".join((folder / place / f"output-{rank}.txt").read_text() for rank in range(2))
    number = SIGNALLED_AT[place][2]
    assert codes[place] == [128 + number] * 2, outputs
    # Within a window the other process hears of it at the next update, and an evaluation is finished.
    assert states[place] == [{"training": "step_7", "evaluation": "step_5", "end": "final"}[place]], outputs
    assert outputs.count("The run is saved in ") == (0 if place == "end" else 1)
    assert outputs.count("handlers are as before") == 2
    for rank in range(2):
        assert same(read(folder, place, rank), read(folder, "whole", rank))
