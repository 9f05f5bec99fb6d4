"""The exceptions, and the notes on them."""

from __future__ import annotations

import pytest

from pytorch_accelerated import exceptions


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (exceptions.StopTrainingError, [Exception]),
        (exceptions.CallbackMethodNotImplementedError, [Exception]),
        (exceptions.CheckpointError, [RuntimeError]),
        (exceptions.NonFiniteLossError, [ArithmeticError]),
        (exceptions.SchedulerSettingsError, [ValueError, AssertionError]),
    ],
)
def test_each_exception_is_a_built_in_one_too(error, bases):
    assert list(error.__bases__) == bases
    assert error.__name__ in exceptions.__doc__


def test_notes_are_added_in_their_order():
    error = ValueError("mine")
    exceptions.add_note(error, "first")
    exceptions.add_note(error, "second")
    assert error.__notes__ == ["first", "second"]


def test_notes_are_kept_where_python_has_no_method_for_them():
    class Old:
        """As exceptions are in Python 3.10."""

    error = Old()
    exceptions.add_note(error, "first")
    exceptions.add_note(error, "second")
    assert error.__notes__ == ["first", "second"]
