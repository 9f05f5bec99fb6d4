"""Terminals, files and notebooks; and text that stays clear of an open bar."""

from __future__ import annotations

import io
import logging
import os
import sys
import types

import pytest
from tqdm import tqdm

from _screens import Terminal, use_terminal
from pytorch_accelerated._console.screen import is_notebook, is_terminal, line_width, lines_above_bars


class NoTerminal(io.StringIO):
    def isatty(self):
        return False


def test_a_terminal_is_one_that_can_draw_over_its_last_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    assert is_terminal(Terminal())
    assert not is_terminal(NoTerminal())
    assert not is_terminal(object())
    monkeypatch.setenv("TERM", "dumb")
    assert not is_terminal(Terminal())


def test_only_lines_of_a_terminal_have_a_limit(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    assert line_width() == sys.maxsize
    use_terminal(monkeypatch, columns=50)
    assert line_width() == 50


class Kernel:
    kernel = object()


class SpyderShell(Kernel):
    __module__ = "spyder_kernels.console.shell"


class InForkedProcess:
    kernel = types.SimpleNamespace(session=types.SimpleNamespace(pid=-1))


@pytest.mark.parametrize(
    ("shell", "expected"),
    [(InForkedProcess(), False), (None, False), (object(), False), (Kernel(), True), (SpyderShell(), False)],
)
def test_a_notebook_is_recognized_by_its_kernel(monkeypatch, shell, expected):
    assert not is_notebook()
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert is_notebook() == expected


def write_with_print(text):
    print(text)


def write_in_parts(text):
    for part in text:
        print(part, end="")
    print()


def write_a_warning(text):
    sys.stderr.write(f"{text}\n")


def write_with_logging(text):
    handler = logging.StreamHandler(sys.stderr)
    handler.emit(logging.makeLogRecord({"msg": text}))


@pytest.mark.parametrize("is_older_handle", [False, True], ids=["looked up", "held since before"])
@pytest.mark.parametrize("write", [write_with_print, write_in_parts, write_a_warning, write_with_logging])
def test_text_has_lines_of_its_own_above_an_open_bar(monkeypatch, write, is_older_handle):
    terminal = use_terminal(monkeypatch)
    bar = tqdm(total=4, file=terminal, bar_format="{n_fmt}/{total_fmt}", mininterval=0, miniters=1)
    bar.update()
    with lines_above_bars():
        if is_older_handle:
            monkeypatch.setattr(sys, "stdout", terminal)
        write("one line")
        assert terminal.screen() == ["one line", "1/4"]
        bar.update()
        write("another")
        assert terminal.screen() == ["one line", "another", "2/4"]
    bar.leave = False
    bar.close()
    assert terminal.screen() == ["one line", "another"]
    assert "write" not in vars(terminal), "the stream is as it was"


def test_text_without_an_end_of_line_is_not_lost(monkeypatch):
    terminal = use_terminal(monkeypatch)
    bar = tqdm(total=4, file=terminal, bar_format="{n_fmt}", leave=False)
    with lines_above_bars():
        print("almost", end="")
        assert terminal.screen() == ["0"]
        bar.close()
    assert terminal.screen() == ["almost"]


def test_a_second_bar_is_left_to_draw_itself(monkeypatch):
    terminal = use_terminal(monkeypatch)
    outer = tqdm(total=4, file=terminal, bar_format="outer {n_fmt}", leave=False)
    with lines_above_bars():
        inner = tqdm(total=2, file=terminal, bar_format="inner {n_fmt}", mininterval=0, miniters=1, leave=False)
        inner.update()
        print("told")
        assert terminal.screen()[0] == "told"
        assert {"outer 0", "inner 1"} <= set(terminal.screen())
        inner.close()
    outer.close()
    assert terminal.screen() == ["told"]


def test_a_worker_process_writes_as_if_there_were_no_bar(monkeypatch):
    terminal = use_terminal(monkeypatch)
    bar = tqdm(total=4, file=terminal, bar_format="{n_fmt}", leave=False)
    with lines_above_bars():
        monkeypatch.setattr(os, "getpid", lambda: -1)
        before = terminal.getvalue()
        print("from a worker")
        assert terminal.getvalue() == f"{before}from a worker\n"
    bar.close()


def test_streams_that_are_no_terminals_are_left_alone(monkeypatch):
    stream = NoTerminal()
    monkeypatch.setattr(sys, "stdout", stream)
    bar = tqdm(total=4, file=Terminal(), leave=False)
    with lines_above_bars():
        assert "write" not in vars(stream)
    bar.close()


def test_an_own_write_method_of_a_stream_is_put_back(monkeypatch):
    terminal = use_terminal(monkeypatch)
    own = terminal.write = lambda text: len(text)
    bar = tqdm(total=4, file=Terminal(), leave=False)
    with lines_above_bars():
        assert terminal.write is not own
    assert terminal.write is own
    bar.close()
