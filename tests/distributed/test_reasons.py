"""What ends a run has the same meaning on all processes, wherever one of them raises it.

The default suite tries two reasons at the places that matter most; ``REPEAT=2`` tries each one at each event.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

pytestmark = pytest.mark.distributed

CASES = Path(__file__).with_name("_reasons_cases.py")
TIMEOUT_SECONDS = 150
"""Far more than the cases need. A run that takes longer is stuck."""


def assert_all_end_alike(results):
    assert results[0] == results[1]
    for place, ended in results[0].items():
        for reason, (end, stop_reason, _, num_epochs) in ended.items():
            if place.endswith("run_end"):  # the run has ended anyway, but a bad number is an error even then
                assert end in ("returned", "NonFiniteLossError: mine"), (place, reason)
                continue
            is_failure = reason.startswith("non-finite")
            expected = ("NonFiniteLossError: mine", "NonFiniteLossError: mine") if is_failure else ("returned", "mine")
            assert (end, stop_reason) == expected, (place, reason)
            assert num_epochs <= 2


def test_in_an_event_before_those_that_do_something_together(results):
    assert_all_end_alike(results)


def test_in_an_event_after_them_with_saves_in_the_background(results):
    assert_all_end_alike(results)


def test_in_a_hook(results):
    assert_all_end_alike(results)


def test_in_what_is_saved_and_recorded(results):
    assert_all_end_alike(results)


def test_an_error_of_the_program_is_no_failed_save_that_the_others_go_on_without(results):
    assert results == [("CheckpointError: mine", 2), ("LookupError: mine", 2)]
