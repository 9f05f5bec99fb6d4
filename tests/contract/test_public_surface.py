"""Every public name and how it is called, written down in `surface.json`, so that a change cannot go unnoticed.

After an intended change (which needs a line in the changelog): ``python tests/contract/_surface.py``.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("_surface", Path(__file__).with_name("_surface.py"))
_surface = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_surface)

EXPECTED = json.loads(_surface.SURFACE.read_text())
PRESENT = _surface.describe_package()


def test_the_public_modules_are_those_written_down():
    assert sorted(PRESENT) == sorted(EXPECTED)


@pytest.mark.parametrize("module", sorted(EXPECTED))
def test_names_and_signatures_of_a_module_are_those_written_down(module):
    assert PRESENT[module] == EXPECTED[module]


def test_each_public_name_that_a_module_names_in_all_can_be_imported_from_it():
    for module_name in PRESENT:
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{module_name}.{name}"


def test_an_argument_that_is_added_is_noticed():
    def with_more(self, batch, *, step=0, more=None):
        """Stand-in."""

    assert _surface.arguments_of(with_more) == "self, batch, *, step=0, more=None"
