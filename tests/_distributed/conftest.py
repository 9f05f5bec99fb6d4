"""An accelerator for the tests of this folder."""

from __future__ import annotations

import pytest
from accelerate import Accelerator


@pytest.fixture
def accelerator():
    return Accelerator()
