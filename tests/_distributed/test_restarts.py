"""Processes that torchrun has started again use names of their own in its store."""

from __future__ import annotations

from datetime import timedelta

import pytest
from accelerate import InitProcessGroupKwargs
from torch.distributed import HashStore
from torch.distributed import rendezvous as find_others

from _processes import free_port
from pytorch_accelerated._distributed import restarts
from pytorch_accelerated._distributed.accelerator import _complete_settings

RESTARTED = {"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "1"}


@pytest.fixture
def _restarted(monkeypatch):
    for name, value in RESTARTED.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("_restarted")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TORCHELASTIC_RESTART_COUNT", "0"),
        ("TORCHELASTIC_RESTART_COUNT", None),
        ("TORCHELASTIC_USE_AGENT_STORE", "False"),
        ("TORCHELASTIC_USE_AGENT_STORE", None),
        ("GROUP_WORLD_SIZE", "2"),
    ],
)
def test_the_first_attempt_and_a_new_store_use_the_default(monkeypatch, name, value):
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    assert restarts.init_method_of_restart() is None


@pytest.mark.usefixtures("_restarted")
def test_the_names_of_a_restart_differ_from_those_of_the_first_attempt(monkeypatch):
    store = HashStore()
    monkeypatch.setattr(restarts, "rendezvous", lambda url, **_: iter([(store, 0, 1)]))
    method = restarts.init_method_of_restart()
    assert method == restarts.init_method_of_restart()
    store.set("address", "of a process that has died")
    own, rank, world_size = next(find_others(method, timeout=timedelta(seconds=5)))
    assert (rank, world_size) == (0, 1)
    assert not own.check(["address"])


@pytest.mark.usefixtures("_restarted")
def test_the_timeout_and_the_method_of_the_user_are_kept():
    timeout = timedelta(seconds=7)
    settings = {"kwargs_handlers": [InitProcessGroupKwargs(timeout=timeout)]}
    _complete_settings(settings)
    (handler,) = settings["kwargs_handlers"]
    assert (handler.init_method, handler.timeout) == ("restarted://", timeout)
    address = f"tcp://127.0.0.1:{free_port()}"
    settings = {"kwargs_handlers": [InitProcessGroupKwargs(init_method=address)]}
    _complete_settings(settings)
    assert settings["kwargs_handlers"][0].init_method == address
