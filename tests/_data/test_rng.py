"""Seeds and states of the global generators."""

from __future__ import annotations

import random
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from pytorch_accelerated._data import rng as rng_module
from pytorch_accelerated._data.rng import (
    RandomStream,
    derive_seed,
    get_rng_state,
    preserve_rng_state,
    restore_generators,
    seed_generators,
    seeded_host_generators,
    set_rng_state,
)


def draw():
    return torch.rand(2).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1)


def test_derived_seeds_are_stable_and_independent():
    """The number is written down: another one would change every run that is resumed."""
    assert derive_seed(7, "order", 0) == derive_seed(7, "order", 0) == 3760711855866516816
    seeds = {derive_seed(seed, key, epoch) for seed in range(10) for key in ("order", "workers") for epoch in range(10)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)


@contextmanager
def interrupted_at(line):
    """Raise `KeyboardInterrupt` before that many lines of the module have run, as a signal may."""
    lines_left = line

    def trace(frame, event, _):
        nonlocal lines_left
        if frame.f_code.co_filename != rng_module.__file__:
            return None
        lines_left -= event == "line"
        if lines_left < 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(outer)


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 - 1])
def test_all_generators_are_seeded(seed):
    drawn = []
    for _ in range(2):
        seed_generators(seed)
        drawn.append(draw())
    assert drawn[0] == drawn[1]


def test_a_state_can_be_stored_without_code_and_restored(tmp_path):
    seed_generators(3)
    np.random.randn()  # leaves a second number for later
    random.gauss(0, 1)
    torch.save(get_rng_state(), tmp_path / "state.pt")
    expected = draw()
    seed_generators(4)
    set_rng_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected


def test_generators_are_preserved_whatever_happens():
    seed_generators(3)
    expected = draw()
    seed_generators(3)

    def fail():
        with preserve_rng_state():
            draw()
            seed_generators(9)
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert draw() == expected


def test_states_of_gpus_are_kept_where_there_are_any(monkeypatch):
    kept = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["of the gpu"])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", kept.append)
    state = get_rng_state()
    set_rng_state(state)
    assert kept == [["of the gpu"]]
    set_rng_state({**state, "cuda": []})
    assert len(kept) == 1


@pytest.mark.parametrize("make_block", [lambda: seeded_host_generators(8), lambda: RandomStream(8)])
def test_generators_are_put_back_wherever_a_signal_strikes(make_block):
    seed_generators(3)
    users_generator = np.random.get_bit_generator()
    expected = draw()
    num_strikes, is_struck = 0, True
    while is_struck:
        seed_generators(3)
        is_struck = False
        with restore_generators():
            block = make_block()
            try:
                with interrupted_at(num_strikes), block:
                    np.random.randn()
            except KeyboardInterrupt:
                is_struck = True
        assert np.random.get_bit_generator() is users_generator
        assert draw() == expected
        num_strikes += is_struck
    assert num_strikes > 10


def test_blocks_that_are_still_open_keep_what_they_put_aside():
    """A sampler may evaluate a model."""
    with RandomStream(8):
        expected = draw()
    with RandomStream(8):
        with restore_generators(), seeded_host_generators(9):
            draw()
        assert draw() == expected
