"""Improvement, patience, and the flag of Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from pytorch_accelerated._stopping import InterruptFlag, PatienceCounter, is_better

NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "best", "greater_is_better", "threshold", "expected"),
    [
        (1.0, 2.0, False, 0.0, True),
        (2.0, 1.0, False, 0.0, False),
        (1.0, 1.0, False, 0.0, False),
        (2.0, 1.0, True, 0.0, True),
        (1.0, 2.0, True, 0.0, False),
        (1.5, 2.0, False, 0.5, False),
        (1.25, 2.0, False, 0.5, True),
        (2.75, 2.0, True, 0.5, True),
        (5.0, None, False, 9.0, True),
        (NAN, None, False, 0.0, False),
        (NAN, 1.0, True, 0.0, False),
        (1.0, float("inf"), False, 0.0, True),
    ],
)
def test_what_is_better(value, best, greater_is_better, threshold, expected):
    assert is_better(value, best, greater_is_better, threshold) is expected


def test_patience_is_used_up_by_evaluations_in_a_row():
    counter = PatienceCounter(patience=2, greater_is_better=True, threshold=0.1)
    values = [0.5, 0.55, 0.7, 0.7, NAN]
    assert [counter.update(value) for value in values] == [False, False, False, False, True]
    assert (counter.best, counter.num_without_improvement) == (0.7, 2)
    counter.reset()
    assert (counter.best, counter.num_without_improvement) == (None, 0)


@pytest.fixture(autouse=True)
def _handler_stays():
    before = signal.getsignal(signal.SIGINT)
    yield
    after = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert after is before


def press():
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_press_raises_the_flag_and_the_second_interrupts():
    flag = InterruptFlag()
    seen = []

    def press_twice():
        with flag:
            for _ in range(2):
                seen.append(flag.is_set)
                press()

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert seen == [False, True]
    with flag:
        assert not flag.is_set


def test_a_handler_of_the_program_is_called_and_put_back():
    calls = []

    def handler(number, frame):
        calls.append(number)

    before = signal.signal(signal.SIGINT, handler)
    with InterruptFlag() as flag:
        press()
        assert flag.is_set
    assert signal.getsignal(signal.SIGINT) is handler
    signal.signal(signal.SIGINT, before)
    assert calls == [signal.SIGINT]


def test_a_handler_of_the_system_is_put_back():
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    with InterruptFlag() as flag:
        press()
        assert flag.is_set
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    signal.signal(signal.SIGINT, before)


def test_a_handler_that_python_does_not_know_is_left_alone(monkeypatch):
    """One that was installed from C could not be put back."""
    installed = []
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *arguments: installed.append(arguments))
    with InterruptFlag():
        pass
    monkeypatch.undo()
    assert installed == []


def test_another_thread_installs_nothing():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def run():
        with InterruptFlag():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=60)
    assert seen == [before]
