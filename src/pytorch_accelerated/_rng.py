"""Random number generators: derived seeds, and states that can be kept, stored and restored."""

from __future__ import annotations

import hashlib
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def derive_seed(seed: int, *keys: int | str) -> int:
    """Make an independent seed for a purpose, the same one each time.

    Args:
        seed: The seed to derive from.
        *keys: What the new seed is for, such as ``"order", epoch``.

    Returns:
        An integer of 63 bits, so that it fits every generator of PyTorch.

    Example:
        >>> derive_seed(7, "order", 0) == derive_seed(7, "order", 0)
        True
        >>> derive_seed(7, "order", 0) == derive_seed(7, "order", 1)
        False
    """
    text = "/".join(map(str, (seed, *keys)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_generators(seed: int) -> None:
    """Seed PyTorch on every device, NumPy's legacy generator and `random`."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def get_rng_state() -> dict[str, Any]:
    """Return the state of all global generators as tensors, numbers and lists, so that it can be stored safely."""
    numpy_state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached_gaussian = numpy_state
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached_gaussian],
        "python": [version, list(internal), gauss_next],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `get_rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, cached_gaussian = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached_gaussian))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


@contextmanager
def preserved_rng_state() -> Iterator[None]:
    """Leave all global generators as they were, whatever the body draws from them."""
    state = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
