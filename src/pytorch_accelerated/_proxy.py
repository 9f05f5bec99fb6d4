"""Wrappers that pass attribute lookups on to the object they wrap."""

from __future__ import annotations

from typing import Any, ClassVar


def lookup_in_wrapped(wrapper: Any, wrapped_attribute: str, name: str) -> Any:
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

    def __init_subclass__(cls, *, wraps: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._wrapped_attribute = wraps

    def __getattr__(self, name: str) -> Any:
        return lookup_in_wrapped(self, self._wrapped_attribute, name)


def unwrap(value: Any) -> Any:
    """Return the object that a proxy wraps; any other value is returned unchanged."""
    return getattr(value, value._wrapped_attribute) if isinstance(value, Proxy) else value  # noqa: SLF001 - same module
