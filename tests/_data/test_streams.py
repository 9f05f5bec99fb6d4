"""Iterables with a state: the position of a run in them."""

from __future__ import annotations

import copy
import itertools

import pytest

from pytorch_accelerated._data.streams import TrackedStream


class Counter:
    """Yields numbers, continues with the next ones in the next epoch, and counts those that it produced."""

    def __init__(self, length=10):
        self.length = length
        self.next = 0
        self.num_produced = 0

    def __iter__(self):
        start = self.next
        for number in range(start - start % self.length, start - start % self.length + self.length):
            if number >= start:
                self.next = number + 1
                self.num_produced += 1
                yield number

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]

    def __len__(self):
        return self.length


@pytest.mark.parametrize("num_items_per_step", [1, 2, 3])
def test_a_stream_continues_after_any_step_however_far_ahead_it_was_read(num_items_per_step):
    for num_steps, num_ahead in itertools.product(range(1, 10 // num_items_per_step), (0, 1, 2)):
        stream = TrackedStream(Counter(), num_items_per_step)
        num_done = num_steps * num_items_per_step
        list(itertools.islice(stream, num_done + num_ahead * num_items_per_step))
        position = stream.position(num_steps)
        other = TrackedStream(Counter(), num_items_per_step)
        other.resume(position, num_steps)
        assert list(other) == list(range(num_done, 10))
        assert other.source.num_produced == 10 - num_done, "items were read only to be skipped"
        assert list(other) == list(range(10, 20)), "the next epoch does not start at its beginning"


def test_a_resumed_stream_can_be_resumed_again():
    stream = TrackedStream(Counter(), 2)
    list(itertools.islice(stream, 4))
    second = TrackedStream(Counter(), 2)
    second.resume(stream.position(2), 2)
    list(itertools.islice(second, 2))
    third = TrackedStream(Counter(), 2)
    third.resume(second.position(3), 3)
    assert list(third) == [6, 7, 8, 9]


def test_between_epochs_the_position_is_the_current_state_of_the_source():
    stream = TrackedStream(Counter(), 3)
    list(stream)
    other = TrackedStream(Counter(), 3)
    other.resume(stream.position(0), 0)
    assert list(other) == list(range(10, 20))


def test_a_position_does_not_change_when_the_source_moves_on():
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


def test_the_source_of_a_process_that_has_not_read_is_left_unchanged():
    stream = TrackedStream(Counter(), 1)
    assert stream.position(3) == {"state": None}
    stream.resume({"state": None}, 3)
    assert stream.source.next == 0


def test_the_length_and_other_attributes_of_the_source_are_passed_through():
    stream = TrackedStream(Counter(), 1)
    assert (len(stream), stream.length) == (10, 10)
    assert copy.copy(stream).source is stream.source
    with pytest.raises(AttributeError):
        stream.nothing_like_it  # noqa: B018 - the error is what is tested
    with pytest.raises(TypeError):
        len(TrackedStream(iter([]), 1))
