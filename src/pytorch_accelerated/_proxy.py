"""Objects that pass attributes on to another object: all of them, or single ones."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, overload

if TYPE_CHECKING:
    from typing_extensions import Self

Value = TypeVar("Value")


def lookup_in_wrapped(wrapper: object, wrapped_attribute: str, name: str) -> Any:
    """Return an attribute of the wrapped object: the body of a wrapper's ``__getattr__``.

    Args:
        wrapper: The wrapper, which lacks the attribute.
        wrapped_attribute: The wrapper's attribute that holds the wrapped object.
        name: The attribute to look up.

    Raises:
        AttributeError: The wrapped object lacks it too, or nothing is wrapped yet: `copy` and `pickle` look up
            attributes of an object before they set any.
    """
    if name == wrapped_attribute:
        raise AttributeError(name)
    return getattr(getattr(wrapper, wrapped_attribute), name)


class Proxy:
    """Base class of wrappers: an attribute that the wrapper lacks is looked up on the wrapped object.

    Example:
        >>> class CountingSampler(Proxy, wraps="sampler"):
        ...     def __init__(self, sampler):
        ...         self.sampler = sampler
        >>> CountingSampler(range(3)).stop
        3
    """

    _wrapped_attribute: ClassVar[str]

    def __init_subclass__(cls, *, wraps: str, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls._wrapped_attribute = wraps

    def __getattr__(self, name: str) -> Any:
        return lookup_in_wrapped(self, self._wrapped_attribute, name)


def unwrap(value: Any) -> Any:
    """Return the object that a proxy wraps; any other value is returned unchanged."""
    return getattr(value, value._wrapped_attribute) if isinstance(value, Proxy) else value  # noqa: SLF001 - same module


class Forwarded(Generic[Value]):
    """A read-only attribute that shows an attribute of a part of the object.

    It is not a data descriptor: a subclass may use the name for an attribute of its own.

    Args:
        path: Where it is, seen from the object, such as ``"_engine.speed"``.

    Example:
        >>> class Car:
        ...     is_electric = Forwarded[bool]("_engine.is_electric")
        ...
        ...     def __init__(self, engine):
        ...         self._engine = engine
        >>> from types import SimpleNamespace
        >>> Car(SimpleNamespace(is_electric=True)).is_electric
        True
    """

    def __init__(self, path: str) -> None:
        part, _, self._name = path.rpartition(".")
        self._get_part = attrgetter(part)

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type) -> Value: ...

    def __get__(self, instance: object, owner: type) -> object:
        return self if instance is None else getattr(self._get_part(instance), self._name)


class WritableForwarded(Forwarded[Value]):
    """The same for an attribute that can be set: it is set in the part."""

    def __set__(self, instance: object, value: Value) -> None:
        setattr(self._get_part(instance), self._name, value)
