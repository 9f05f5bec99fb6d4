"""The exceptions, and the notes added to them."""

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
def test_each_exception_derives_from_a_built_in_exception_and_is_in_the_tree(error, bases):
    assert list(error.__bases__) == bases
    assert error.__name__ in exceptions.__doc__


def test_notes_are_kept_in_the_order_they_were_added():
    error = ValueError("mine")
    exceptions.add_note(error, "first")
    exceptions.add_note(error, "second")
    assert error.__notes__ == ["first", "second"]


def test_notes_are_kept_on_python_versions_without_add_note():
    class Old:
        """Like an exception in Python 3.10, which has no `add_note`."""

    error = Old()
    exceptions.add_note(error, "first")
    exceptions.add_note(error, "second")
    assert error.__notes__ == ["first", "second"]
