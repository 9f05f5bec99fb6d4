"""A stand-in for a notebook: what IPython displays is kept in a list, as the page that is saved keeps it."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest


class Notebook:
    """The outputs of a cell, and what a notebook draws as a picture."""

    def __init__(self) -> None:
        self.outputs: list[str] = []
        self.num_updates = 0
        self.pictures: dict[type, Callable[[Any], bytes]] = {}

    def lookup_by_type(self, cls: type) -> Callable[[Any], bytes]:
        """Return what makes a picture of an object of a class."""
        return self.pictures[cls]

    def for_type(self, cls: type, draw: Callable[[Any], bytes]) -> None:
        """Set it."""
        self.pictures[cls] = draw

    def display(self, html: str, *, display_id: bool) -> Handle:
        """Add an output, and return a handle that replaces it."""
        assert display_id
        self.outputs.append(html)
        return Handle(self, len(self.outputs) - 1)


class Handle:
    """Replaces an output."""

    def __init__(self, notebook: Notebook, place: int) -> None:
        self._notebook, self._place = notebook, place

    def update(self, html: str) -> None:
        """Replace the output."""
        self._notebook.num_updates += 1
        self._notebook.outputs[self._place] = html


def use_notebook(monkeypatch: pytest.MonkeyPatch) -> Notebook:
    """Let the library believe that it runs in a notebook."""
    notebook = Notebook()
    ipython, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    formatter = types.SimpleNamespace(formatters={"image/png": notebook})
    shell = types.SimpleNamespace(kernel=object(), display_formatter=formatter)
    vars(ipython).update(get_ipython=lambda: shell, version_info=(9, 0))  # matplotlib looks at the version
    vars(display).update(HTML=str, display=notebook.display)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return notebook
