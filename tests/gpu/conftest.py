"""Marks all tests of this folder as GPU tests, which are skipped without a GPU. Run them with ``pytest tests/gpu``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# cuBLAS reads this when it is first used. Without it, results may differ from run to run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(skip)
