"""Every public name and its signature, recorded in `surface.json`, so that no change goes unnoticed.

After an intended change, which needs a line in the changelog, run ``python tests/contract/_surface.py``.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from _support import load_module
from pytorch_accelerated._views import RunAttribute, WritableRunAttribute

_surface = load_module(Path(__file__).with_name("_surface.py"))

EXPECTED = json.loads(_surface.SURFACE.read_text())
PRESENT = _surface.describe_package()


def test_the_public_modules_are_the_recorded_ones():
    assert sorted(PRESENT) == sorted(EXPECTED)


@pytest.mark.parametrize("module", sorted(EXPECTED))
def test_names_and_signatures_of_a_module_are_the_recorded_ones(module):
    assert PRESENT[module] == EXPECTED[module]


def test_every_name_in_the_all_of_a_module_can_be_imported_from_it():
    for module_name in PRESENT:
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{module_name}.{name}"


def test_an_added_argument_changes_the_recorded_signature():
    def with_more(self, batch, *, step=0, more=None):
        """A method with one more argument."""

    assert _surface.arguments_of(with_more) == "self, batch, *, step=0, more=None"


def test_attributes_that_live_in_the_run_are_recorded_as_properties():
    class Documented:
        shown = RunAttribute("shown")
        settable = WritableRunAttribute("settable")
        _hidden = RunAttribute("hidden")

        @property
        def computed(self):
            """A property."""

    assert _surface.describe_class(Documented)["properties"] == ["computed", "settable", "shown"]
