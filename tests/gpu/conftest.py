"""All tests of this folder need a GPU, and are skipped where there is none: ``pytest tests/gpu`` is the one command."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# cuBLAS reads it when it is first used; without it, its results may differ from run to run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(skip)
