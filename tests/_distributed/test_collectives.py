"""What is decided, or done, as one; with several processes in `distributed/`."""

from __future__ import annotations

import pytest

from pytorch_accelerated._distributed import collectives


def fail():
    raise LookupError("mine")


def test_a_single_process_decides_for_itself():
    assert collectives.run_on_main(lambda: 3, is_main=True, num_processes=1) == 3
    with pytest.raises(LookupError, match="mine"):
        collectives.run_on_main(fail, is_main=True, num_processes=1)


def test_a_single_process_does_what_it_does_and_raises_its_own_error():
    assert collectives.run_on_all(lambda: 3, num_processes=1) == 3
    with pytest.raises(LookupError, match="mine"):
        collectives.run_on_all(fail, num_processes=1)


def test_processes_that_pytorch_does_not_know_at_least_wait_for_each_other(monkeypatch):
    """Such as those of XLA."""
    exchanges = []
    monkeypatch.setattr(collectives, "broadcast_from_main", lambda *arguments: exchanges.append(arguments))
    assert collectives.run_on_all(lambda: 3, num_processes=2) == 3
    assert exchanges == [(None, 2)]
