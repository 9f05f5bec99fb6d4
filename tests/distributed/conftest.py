"""Starts the processes of a test module once, and hands each test the results of the case of its name."""

from __future__ import annotations

import pytest

from _processes import launch, read_results


@pytest.fixture(scope="module")
def num_processes():
    """The number of processes; a module that tries several has a fixture of this name."""
    return 2


@pytest.fixture(scope="module")
def directory(request, num_processes, tmp_path_factory):
    """Run all cases of the module, those in its `CASES`, and return the folder with their results."""
    folder = tmp_path_factory.mktemp("results")
    launch(request.module.CASES, folder, num_processes, timeout=request.module.TIMEOUT_SECONDS)
    return folder


@pytest.fixture
def results(request, directory, num_processes):
    """The return values of this test's case, by rank."""
    return read_results(directory, request.node.originalname.removeprefix("test_"), num_processes)
