"""Random number generators: derived seeds, and states that can be stored and restored."""

from __future__ import annotations

import hashlib
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

T = TypeVar("T")


def derive_seed(seed: int, *keys: int | str) -> int:
    """Derive an independent seed for a purpose. The same arguments give the same seed.

    Args:
        seed: The seed to derive from.
        *keys: The purpose, such as ``"order", epoch``.

    Returns:
        An integer of 63 bits, which fits every generator of PyTorch.

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


def seed_host_generators(seed: int) -> None:
    """Seed only the generators of the host, from which data loading draws. Much faster than `seed_generators`."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


_SPARE_NUMPY_GENERATOR = np.random.MT19937(0)
_NUM_WORDS = 624  # of a Mersenne twister

_saved: list[tuple[torch.Tensor, Any, Any]] = []
"""The global generators that the open ``with`` blocks of this module will restore, outermost first."""


@contextmanager
def restore_generators() -> Iterator[None]:
    """At the end of the body, restore generators that a block inside it could not restore.

    An error raised by a signal handler, such as ``KeyboardInterrupt`` or that of a killed worker, may interrupt the
    first or last statements of such a block.
    """
    depth = len(_saved)
    try:
        yield
    finally:
        _restore(depth)


@contextmanager
def seeded_host_generators(seed: int) -> Iterator[None]:
    """Seed the generators of the host for the body, and restore their state afterwards."""
    depth = len(_saved)
    try:
        _save_and_replace(_SPARE_NUMPY_GENERATOR)
        seed_host_generators(seed)
        yield
    finally:
        _restore(depth)


class RandomStream:
    """A separate stream of random numbers, drawn from the global generators of the host.

    Inside a ``with`` block the global generators continue where the previous block stopped. Outside, their state is as
    if there had been no block.

    Args:
        seed: The seed of the stream.

    Example:
        >>> stream = RandomStream(7)
        >>> with stream:
        ...     first = random.random()
        >>> with stream:
        ...     second = random.random()
        >>> random.seed(7)
        >>> [random.random(), random.random()] == [first, second]
        True
    """

    def __init__(self, seed: int) -> None:
        self._numpy = np.random.MT19937(0)
        self._depth = 0
        with seeded_host_generators(seed):
            self._states = torch.default_generator.get_state(), random.getstate()
        with self:
            np.random.seed(seed % 2**32)

    def __enter__(self) -> None:
        self._depth = len(_saved)
        _save_and_replace(self._numpy)
        torch_state, python_state = self._states
        torch.default_generator.set_state(torch_state)
        random.setstate(python_state)

    def __exit__(self, *exception: object) -> None:
        self._states = torch.default_generator.get_state(), random.getstate()
        _restore(self._depth)


def _save_and_replace(numpy_generator: Any) -> None:
    # Copying NumPy's state is slow, so its generator is exchanged.
    # `get_bit_generator` and `set_bit_generator` are documented, but missing from NumPy's stubs.
    outer = torch.default_generator.get_state(), random.getstate(), np.random.get_bit_generator()  # type: ignore[attr-defined]
    _saved.append(outer)  # first, so that an interruption from here on loses nothing
    np.random.set_bit_generator(numpy_generator)  # type: ignore[attr-defined]


def _restore(depth: int) -> None:
    if len(_saved) > depth:
        torch_state, python_state, numpy_generator = _saved[depth]
        np.random.set_bit_generator(numpy_generator)  # type: ignore[attr-defined]
        torch.default_generator.set_state(torch_state)
        random.setstate(python_state)
        del _saved[depth:]  # last, so that an interrupted call can be repeated


def forget_spare_gaussian(item: T) -> T:
    """Return an item, after NumPy has forgotten a Gaussian that it has in reserve.

    NumPy's legacy generator draws Gaussians in pairs and keeps the second, which is lost whenever the generator is
    replaced. A run that is resumed when the last batch of an epoch has been loaded loads it again, so it would lose a
    number that the uninterrupted run still has. Forgotten before every step, it is the same in both, with any number of
    workers.
    """
    np.random.set_bit_generator(np.random.get_bit_generator())  # type: ignore[attr-defined]
    return item


def get_rng_state() -> dict[str, Any]:
    """Return the state of all global generators as tensors, numbers and lists, which can be stored without pickle."""
    numpy_state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached_gaussian = numpy_state
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": _cuda_states(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached_gaussian],
        "python": [version, list(internal), gauss_next],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `get_rng_state` returned."""
    name, keys, position, has_gauss, cached_gaussian = state["numpy"]
    version, internal, gauss_next = state["python"]
    _set_states(
        state["torch"],
        state["cuda"],
        (name, keys.numpy().astype(np.uint32), position, has_gauss, cached_gaussian),
        (version, tuple(internal), gauss_next),
    )


def check_rng_state(state: Mapping[str, Any]) -> None:
    """Raise if `set_rng_state` would refuse a state, or if a generator would read beyond its numbers.

    Raises:
        ValueError: It is none.
        KeyError, TypeError, AttributeError, OverflowError: A part is missing, or something else.
    """
    name, keys, position, has_gauss, cached_gaussian = state["numpy"]
    version, internal, gauss_next = state["python"]
    is_right = (
        name == "MT19937"
        and 0 <= int(position) <= _NUM_WORDS
        and keys.shape == (_NUM_WORDS,)
        and isinstance(gauss_next, (float, type(None)))
        and isinstance(state["cuda"], (list, tuple))
        and all(isinstance(part, torch.Tensor) for part in (state["torch"], *state["cuda"]))
    )
    if not is_right:
        raise ValueError("the state of the random number generators is none")
    try:
        np.random.RandomState(0).set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached_gaussian))
        random.Random(0).setstate((version, tuple(internal), gauss_next))
        torch.Generator().set_state(state["torch"])
    except RuntimeError as error:
        raise ValueError(f"the state of a random number generator is none: {error}") from error


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the state of all global generators after the body, whatever it draws from them."""
    states = torch.get_rng_state(), _cuda_states(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        _set_states(*states)


def _cuda_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_states(of_torch: torch.Tensor, of_cuda: list[torch.Tensor], of_numpy: Any, of_python: Any) -> None:
    torch.set_rng_state(of_torch)
    if of_cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(of_cuda)
    np.random.set_state(of_numpy)
    random.setstate(of_python)
