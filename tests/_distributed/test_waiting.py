"""What a process does at its end for others that wait for it."""

from __future__ import annotations

import atexit
import sys

import pytest

from pytorch_accelerated._distributed import waiting

LAST = ("last_exc", "last_value", "last_traceback")
"""What Python sets when an exception ends a program."""


@pytest.fixture(autouse=True)
def _no_exception_before(monkeypatch):
    for name in LAST:
        monkeypatch.delattr(sys, name, raising=False)


class StoreIsUsedError(Exception):
    pass


def use_store():
    raise StoreIsUsedError


def test_only_a_program_that_an_exception_ends_stays_for_the_others(monkeypatch):
    """One that has caught the exceptions of its runs ends at once."""
    monkeypatch.setattr(waiting.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(waiting, "_store", use_store)
    waiting._let_others_read()
    sys.last_value = LookupError("of the program")  # which the call removes
    with pytest.raises(StoreIsUsedError):
        waiting._let_others_read()
    assert not hasattr(sys, "last_value")


def test_a_program_stays_once_however_many_runs_have_failed(monkeypatch):
    registered = []
    monkeypatch.setattr(atexit, "register", registered.append)
    waiting._keep_store_at_exit.cache_clear()
    for _ in range(3):
        waiting._keep_store_at_exit()
    waiting._keep_store_at_exit.cache_clear()
    assert registered == [waiting._let_others_read]
