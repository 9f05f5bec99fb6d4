"""Iterables with a state: where in them a run stands."""

from __future__ import annotations

import copy
import itertools

import pytest
from torch.utils.data import DataLoader, IterableDataset

from pytorch_accelerated._data.determinism import SeededLoader
from pytorch_accelerated._data.loaders import has_state
from pytorch_accelerated._data.streams import TrackedStream


class Counter:
    """Gives numbers, goes on where it was in the next epoch, and counts those it has made."""

    def __init__(self, length=10):
        self.length = length
        self.next = 0
        self.num_made = 0

    def __iter__(self):
        start = self.next
        for number in range(start - start % self.length, start - start % self.length + self.length):
            if number >= start:
                self.next = number + 1
                self.num_made += 1
                yield number

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]

    def __len__(self):
        return self.length


@pytest.mark.parametrize("num_items_per_step", [1, 2, 3])
def test_a_stream_goes_on_after_any_step_however_far_it_was_read(num_items_per_step):
    for num_steps, num_ahead in itertools.product(range(1, 10 // num_items_per_step), (0, 1, 2)):
        stream = TrackedStream(Counter(), num_items_per_step)
        num_done = num_steps * num_items_per_step
        list(itertools.islice(stream, num_done + num_ahead * num_items_per_step))
        position = stream.position(num_steps)
        other = TrackedStream(Counter(), num_items_per_step)
        other.resume(position, num_steps)
        assert list(other) == list(range(num_done, 10))
        assert other.source.num_made == 10 - num_done, "nothing is read to be thrown away"
        assert list(other) == list(range(10, 20)), "the next epoch starts at its beginning"


def test_a_resumed_stream_can_be_resumed():
    stream = TrackedStream(Counter(), 2)
    list(itertools.islice(stream, 4))
    second = TrackedStream(Counter(), 2)
    second.resume(stream.position(2), 2)
    list(itertools.islice(second, 2))
    third = TrackedStream(Counter(), 2)
    third.resume(second.position(3), 3)
    assert list(third) == [6, 7, 8, 9]


def test_between_epochs_the_state_is_the_present_one():
    stream = TrackedStream(Counter(), 3)
    list(stream)
    other = TrackedStream(Counter(), 3)
    other.resume(stream.position(0), 0)
    assert list(other) == list(range(10, 20))


def test_positions_do_not_change_with_the_source():
    class Shared(Counter):
        def __init__(self):
            super().__init__()
            self.state = {"next": 0}

        def state_dict(self):
            self.state["next"] = self.next
            return self.state

    stream = TrackedStream(Shared(), 1)
    list(itertools.islice(stream, 5))
    assert stream.position(3) == {"state": {"next": 3}}


def test_a_process_that_has_not_read_leaves_its_source_alone():
    stream = TrackedStream(Counter(), 1)
    assert stream.position(3) == {"state": None}
    stream.resume({"state": None}, 3)
    assert stream.source.next == 0


def test_what_the_source_offers_is_passed_through():
    stream = TrackedStream(Counter(), 1)
    assert (len(stream), stream.length) == (10, 10)
    assert copy.copy(stream).source is stream.source
    with pytest.raises(AttributeError):
        stream.nothing_like_it  # noqa: B018 - the error is what is tested
    with pytest.raises(TypeError):
        len(TrackedStream(iter([]), 1))


def test_which_data_have_a_state():
    assert has_state(Counter())
    assert not has_state([1])
    assert not has_state(type("Saves", (), {"state_dict": lambda self: {}})())


def test_a_loader_of_batches_with_a_state_is_tracked():
    source = Counter()
    randomness = SeededLoader(source, 0)
    assert randomness.loader is randomness.stream
    assert randomness.stream.source is source
    assert SeededLoader([1, 2], 0).stream is None


@pytest.mark.parametrize(
    ("num_workers", "batch_size", "num_per_step", "expected"),
    [(0, 4, 1, 4), (0, 4, 3, 12), (0, None, 2, 2), (1, 4, 1, None)],
)
def test_an_iterable_dataset_is_tracked_if_this_process_reads_it(num_workers, batch_size, num_per_step, expected):
    source = type("Numbers", (Counter, IterableDataset), {})()
    loader = DataLoader(source, batch_size=batch_size, num_workers=num_workers)
    stream = SeededLoader(loader, 0, num_per_step).stream
    assert (None if stream is None else stream.num_items_per_step) == expected
