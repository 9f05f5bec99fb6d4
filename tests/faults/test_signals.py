"""Real signals to real processes: each run ends gracefully, and a resumed run ends with the same bits."""

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
"""The step, of 15, at which each signal arrives: at the end of an epoch, mid-window, in the last step."""

SECONDS_TO_END = 10
TIMEOUT_SECONDS = 120


def exit_code_of(number):
    """After a `KeyboardInterrupt`, Python ends itself by SIGINT, so that shells notice."""
    return -number if number == signal.SIGINT else 128 + number


@dataclass
class Running:
    """A process with its stdin and stdout."""

    process: Started
    stdin: IO[str]
    stdout: IO[str]


@contextmanager
def running(folder, **settings):
    """Start the run in a separate process, which is killed if it is still running at the end of the block."""
    (child_stdin, stdin_end), (stdout_end, child_stdout) = os.pipe(), os.pipe()
    with os.fdopen(stdin_end, "w") as stdin, os.fdopen(stdout_end) as stdout:
        arguments = (str(folder), json.dumps(settings))
        process = start(SCRIPT, *arguments, stdin=child_stdin, stdout=child_stdout, has_own_group=True)
        os.close(child_stdin)
        os.close(child_stdout)
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
    pytest.fail(f"the process ended without printing {line!r}:\n{''.join(output)}")


def end(running):
    """Let the process continue, and return its output and the seconds it took to end."""
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
    """Compare nested dictionaries and lists bit by bit."""
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
def uninterrupted_run(tmp_path_factory):
    """The results of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with running(folder) as training:
        output, _ = end(training)
    assert training.process.returncode == 0, output
    return read(folder, "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_the_run_with_a_state_that_resumes_with_the_same_bits(tmp_path, uninterrupted_run, number):
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
    assert same(read(tmp_path, "resumed"), uninterrupted_run)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_to_the_process_group_does_not_kill_the_workers(tmp_path, uninterrupted_run, number):
    """Terminals and schedulers signal the whole group. The resumed run starts as many workers again."""
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
    assert same(read(tmp_path, "resumed"), uninterrupted_run)


@pytest.mark.slow
def test_sigterm_ends_the_process_immediately_if_no_callback_handles_it(tmp_path):
    with running(tmp_path, tell_at=3, saves=False) as training:
        wait_for_line(training, "at step 3")
        training.process.terminate()
        output, _ = end(training)
    assert training.process.returncode == -signal.SIGTERM
    assert output == ""


@pytest.mark.slow
@pytest.mark.parametrize("has_state", [False, True])
def test_sigterm_before_the_run_handles_it_loses_nothing(tmp_path, uninterrupted_run, has_state):
    """The process ends immediately. Nothing was trained since the state that the run resumes from, if there is one."""
    if has_state:
        with running(tmp_path, signal_at=["on_train_step_end", 7, signal.SIGTERM, 0]) as training:
            output, _ = end(training)
        assert training.process.returncode == 128 + signal.SIGTERM, output
    states = tmp_path / "run" / "states"
    before = bytes_in(states) if has_state else {}
    settings = {"runs": {"run": "latest" if has_state else None}, "num_workers": 2}
    with running(tmp_path, signal_at=["on_training_run_start", 1, signal.SIGTERM, 0], **settings) as training:
        output, _ = end(training)  # the end of its output also proves that no worker is left
    assert training.process.returncode == -signal.SIGTERM, output
    assert {**bytes_in(states), ".lock": b""} == {**before, ".lock": b""}
    with running(tmp_path, **settings) as training:
        output, _ = end(training)
    assert training.process.returncode == 0, output
    assert ("Resuming from" in output) == has_state
    assert same(read(tmp_path, "run"), uninterrupted_run)


@pytest.mark.slow
def test_a_second_ctrl_c_interrupts_a_slow_step_immediately(tmp_path):
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
    "evaluation": ["on_eval_step_start", 5, signal.SIGUSR1, 1],  # the first four were mid-epoch
    "end": ["on_training_run_end", 1, signal.SIGTERM, 1],
}
"""By phase: event, number of the call, signal, rank."""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Runs on two processes of which only rank 1 received a signal, an uninterrupted run, and the resumed runs."""
    folder = tmp_path_factory.mktemp("interrupted")
    codes, states = {}, {}
    for place, signal_at in SIGNALLED_AT.items():
        (folder / place).mkdir()
        settings = json.dumps({"signal_at": signal_at, "has_late_stop": place == "end"})
        ended = launch(SCRIPT, folder / place, 2, settings, timeout=TIMEOUT_SECONDS)
        codes[place] = [process.returncode for process in ended]
        states[place] = names_in(folder / place / "run" / "states")
    resumed = {place: str(folder / place / "run" / "states" / names[0]) for place, names in states.items()}
    launch(SCRIPT, folder, 2, json.dumps({"runs": {"uninterrupted": None, **resumed}}), timeout=TIMEOUT_SECONDS)
    return folder, codes, states


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("place", SIGNALLED_AT)
def test_a_signal_to_one_process_ends_all_of_them_and_a_resumed_run_ends_with_the_same_bits(interrupted, place):
    folder, codes, states = interrupted
    outputs = "".join((folder / place / f"output-{rank}.txt").read_text() for rank in range(2))
    number = SIGNALLED_AT[place][2]
    assert codes[place] == [128 + number] * 2, outputs
    # Mid-window, the other process learns of the signal at the next update. An evaluation is finished first.
    assert states[place] == [{"training": "step_7", "evaluation": "step_5", "end": "final"}[place]], outputs
    assert outputs.count("To resume: ") == (0 if place == "end" else 1)
    assert outputs.count("handlers are as before") == 2
    for rank in range(2):
        assert same(read(folder, place, rank), read(folder, "uninterrupted", rank))
