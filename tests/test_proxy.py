"""Wrappers that pass attribute lookups on."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest

from pytorch_accelerated._proxy import Forwarded, Proxy, WritableForwarded, lookup_in_wrapped, unwrap


class Named:
    def __init__(self, name):
        self.name = name
        self.shared = "wrapped"


class Wrapper(Proxy, wraps="inner"):
    def __init__(self, inner):
        self.inner = inner
        self.shared = "wrapper"


def test_an_attribute_that_the_wrapper_lacks_is_that_of_the_wrapped_object():
    wrapper = Wrapper(Named("a"))
    assert wrapper.name == "a"
    assert wrapper.shared == "wrapper"
    wrapper.inner.name = "b"
    assert wrapper.name == "b"


def test_an_attribute_that_both_lack_is_reported_as_missing_on_the_wrapped_object():
    with pytest.raises(AttributeError, match="'Named' object has no attribute 'nonsense'"):
        _ = Wrapper(Named("a")).nonsense
    assert not hasattr(Wrapper(Named("a")), "nonsense")


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda wrapper: pickle.loads(pickle.dumps(wrapper))],
    ids=["copy", "deep", "pickle"],
)
def test_a_wrapper_can_be_copied_and_pickled(duplicate):
    """Both look attributes up before any is set, which must not recurse."""
    twin = duplicate(Wrapper(Named("a")))
    assert (type(twin), twin.name) == (Wrapper, "a")


def test_a_lookup_before_anything_is_wrapped_is_an_attribute_error():
    empty = Wrapper.__new__(Wrapper)
    with pytest.raises(AttributeError):
        _ = empty.name
    with pytest.raises(AttributeError, match="inner"):
        lookup_in_wrapped(empty, "inner", "inner")


def test_unwrap_returns_the_object_inside_one_wrapper_and_other_values_themselves():
    inner = Named("a")
    assert unwrap(Wrapper(inner)) is inner
    outer = Wrapper(Wrapper(inner))
    assert unwrap(outer) is outer.inner
    assert unwrap(inner) is inner


# --- single attributes -------------------------------------------------------------------------------------------


class Car:
    speed = Forwarded[int]("_engine.speed")
    fuel = WritableForwarded[str]("_engine.tank.fuel")

    def __init__(self):
        self._engine = SimpleNamespace(speed=3, tank=SimpleNamespace(fuel="diesel"))


def test_a_forwarded_attribute_shows_the_part_as_it_is_now():
    car = Car()
    assert (car.speed, car.fuel) == (3, "diesel")
    car._engine.speed = 5
    assert car.speed == 5


def test_a_writable_attribute_is_set_in_the_part():
    car = Car()
    car.fuel = "petrol"
    assert car._engine.tank.fuel == "petrol"
    assert "fuel" not in vars(car)


def test_a_read_only_attribute_may_be_replaced_on_the_object_without_changing_the_part():
    car = Car()
    car.speed = "fast"
    assert car.speed == "fast"
    assert car._engine.speed == 3


def test_on_the_class_a_forwarded_attribute_is_itself():
    assert isinstance(Car.speed, Forwarded)
    assert isinstance(Car.fuel, WritableForwarded)


def test_a_missing_part_is_an_attribute_error():
    car = Car()
    del car._engine
    assert not hasattr(car, "speed")
