"""Processes that a launcher has started again do not meet those before them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from typing import Any

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined] # public, but not in `__all__`
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

_SCHEME = "restarted"


def init_method_of_restart() -> str | None:
    """Return how processes find each other that torchrun has started again; ``None`` where PyTorch's default is right.

    For all attempts torchrun keeps one store, which still has the addresses of the processes that have died. Their
    successors would try to connect to them. On several machines, nothing tells all processes which attempt it is.
    """
    num_restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    has_former_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    if num_restarts == 0 or not has_former_store or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return None
    _register()
    return f"{_SCHEME}://"


@cache
def _register() -> None:
    register_rendezvous_handler(_SCHEME, _meet)  # type: ignore[no-untyped-call]


def _meet(url: str, timeout: timedelta, **options: Any) -> Iterator[tuple[Store, int, int]]:
    """Yield what PyTorch's default does, but with names in the store that only this attempt uses."""
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    for store, rank, world_size in rendezvous("env://", timeout=timeout, **options):
        yield PrefixStore(f"pytorch_accelerated/attempt_{attempt}", store), rank, world_size
