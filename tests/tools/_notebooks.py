"""A stand-in for a notebook: what IPython displays is kept in a list, as the page that is saved keeps it."""

from __future__ import annotations

import sys
import types

import pytest


class Notebook:
    """The outputs of a cell."""

    def __init__(self) -> None:
        self.outputs: list[str] = []
        self.num_updates = 0

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
    vars(ipython)["get_ipython"] = lambda: types.SimpleNamespace(kernel=object())
    vars(display).update(HTML=str, display=notebook.display)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return notebook
