"""Wrappers that pass attribute lookups on."""

from __future__ import annotations

import copy
import pickle

import pytest

from pytorch_accelerated._proxy import Proxy, lookup_in_wrapped, unwrap


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
