"""The flag that signals set, and the error that ends an interrupted run."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from _support import run_python
from pytorch_accelerated._distributed.reasons import RunInterruptedError
from pytorch_accelerated._requests.signals import PREEMPTION_SIGNALS, InterruptFlag

SIGNALS = (signal.SIGINT, *PREEMPTION_SIGNALS)

pytestmark = pytest.mark.usefixtures("_handlers_are_restored")


@pytest.fixture(params=SIGNALS, ids=lambda number: number.name)
def number(request):
    return request.param


def send(*numbers):
    """Send real signals to this process."""
    for number in numbers:
        os.kill(os.getpid(), number)


def test_the_preemption_signals_are_sigterm_and_sigusr1():
    assert PREEMPTION_SIGNALS == (signal.SIGTERM, signal.SIGUSR1)


def test_a_signal_sets_the_flag_until_the_next_with_block(number):
    flag = InterruptFlag()
    for _ in range(2):
        with flag:
            flag.listen_to(*PREEMPTION_SIGNALS)
            assert (flag.is_active, flag.signal_number) == (True, None)
            send(number)
            assert flag.signal_number == number
        assert (flag.is_active, flag.signal_number) == (False, number)


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGTERM, signal.SIGTERM, signal.SIGTERM),
        (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1),
        (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1),
        (signal.SIGINT, signal.SIGTERM, signal.SIGTERM),
    ],
)
def test_the_flag_holds_the_first_signal_and_later_ones_do_not_change_it(numbers):
    with InterruptFlag() as flag:
        flag.listen_to(*PREEMPTION_SIGNALS)
        send(*numbers)
    assert flag.signal_number == numbers[0]


@pytest.mark.parametrize("between", [(), (signal.SIGTERM,)])
def test_a_second_ctrl_c_in_a_with_block_interrupts_immediately(between):
    flag = InterruptFlag()

    def press_twice():
        with flag:
            flag.listen_to(*PREEMPTION_SIGNALS)
            send(signal.SIGINT, *between)
            reached.append(flag.signal_number)
            send(signal.SIGINT)

    for _ in range(2):
        reached = []
        with pytest.raises(KeyboardInterrupt):
            press_twice()
        assert reached == [signal.SIGINT]


def test_the_flag_listens_to_signals_other_than_ctrl_c_only_on_request():
    before = [signal.getsignal(number) for number in PREEMPTION_SIGNALS]
    with InterruptFlag() as flag:
        assert [signal.getsignal(number) for number in PREEMPTION_SIGNALS] == before
        flag.listen_to(signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) != before[1]
        assert signal.getsignal(signal.SIGTERM) == before[0]


def test_the_handler_of_the_program_is_called_for_each_signal_and_restored(number):
    calls = []

    def handler(received, frame):
        calls.append(received)

    before = signal.signal(number, handler)
    try:
        with InterruptFlag() as flag:
            flag.listen_to(*PREEMPTION_SIGNALS)
            flag.listen_to(*PREEMPTION_SIGNALS)  # as several callbacks may do
            send(number)
            if number != signal.SIGINT:
                send(number)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert calls == [number] * (1 if number == signal.SIGINT else 2)


def test_the_default_handler_is_restored_and_not_called(number):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with InterruptFlag() as flag:
            flag.listen_to(*PREEMPTION_SIGNALS)
            send(number)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert flag.signal_number == number


def test_a_signal_that_the_program_ignores_does_not_set_the_flag(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with InterruptFlag() as flag:
            flag.listen_to(*PREEMPTION_SIGNALS)
            send(number)
    finally:
        signal.signal(number, before)
    assert flag.signal_number is None


def test_a_handler_installed_from_c_is_not_replaced(monkeypatch):
    """Python does not know it, so it could not be restored."""
    installed = []
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *arguments: installed.append(arguments))
    with InterruptFlag() as flag:
        flag.listen_to(*PREEMPTION_SIGNALS)
    monkeypatch.undo()
    assert installed == []


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt, SystemExit])
def test_handlers_are_restored_after_an_error(error):
    def fail():
        with InterruptFlag() as flag:
            flag.listen_to(*PREEMPTION_SIGNALS)
            raise error

    with pytest.raises(error):
        fail()
    # `_handlers_are_restored` checks the handlers.


def test_listening_to_a_signal_that_no_program_can_handle_is_refused():
    with InterruptFlag() as flag, pytest.raises(ValueError, match="No program can handle SIGKILL, so a run cannot"):
        flag.listen_to(signal.SIGKILL)


def test_no_handler_is_installed_outside_the_main_thread():
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    def run():
        with InterruptFlag() as flag:
            flag.listen_to(*PREEMPTION_SIGNALS)
            seen.append((flag.is_active, [signal.getsignal(number) for number in SIGNALS]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=60)
    assert seen == [(True, before)]


FORK = """
import os, signal, sys
from pytorch_accelerated._requests.signals import InterruptFlag

signal.signal(signal.SIGTERM, {handler})
with InterruptFlag() as flag:
    flag.listen_to(signal.SIGTERM)
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flag.signal_number)
"""


@pytest.mark.parametrize(("handler", "code"), [("signal.SIG_DFL", -15), ("lambda *_: os._exit(7)", 7)])
def test_sigterm_ends_a_forked_process_as_it_would_without_a_run(handler, code):
    """`multiprocessing` ends its processes with SIGTERM."""
    assert run_python(FORK.format(handler=handler)).split() == [str(code), "None"]


# --- the exception that ends an interrupted run ------------------------------------------------------------------


def test_the_error_that_ends_an_interrupted_run_names_the_signal():
    assert [str(RunInterruptedError(number)) for number in (*SIGNALS, 99)] == [
        "interrupted by Ctrl-C",
        "interrupted by SIGTERM",
        "interrupted by SIGUSR1",
        "interrupted by signal 99",
    ]


def test_ctrl_c_becomes_a_keyboard_interrupt_and_other_signals_exit_with_128_plus_their_number():
    error = RunInterruptedError(signal.SIGINT).to_exit_exception()
    assert (type(error), str(error)) == (KeyboardInterrupt, "interrupted by Ctrl-C")
    for number in PREEMPTION_SIGNALS:
        end = RunInterruptedError(number).to_exit_exception()
        assert (type(end), end.code) == (SystemExit, 128 + number)
        assert end.__notes__ == [f"interrupted by {number.name}"]
