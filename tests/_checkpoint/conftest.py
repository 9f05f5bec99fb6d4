"""Fixtures for the tests of checkpoints and training states."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def _full_disk(monkeypatch):
    """`torch.save` writes half of a file and then fails."""
    save = torch.save

    def fail(contents, file, *args, **kwargs):
        save({"half": 1}, file)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
