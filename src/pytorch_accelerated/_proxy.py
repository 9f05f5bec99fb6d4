"""Objects that wrap another one and pass on the attributes they do not define themselves."""

from __future__ import annotations

from typing import Any, ClassVar


class Proxy:
    """Base class of wrappers: an attribute that the wrapper lacks is looked up on the wrapped object.

    Example:
        >>> class Counted(Proxy, wraps="sampler"):
        ...     def __init__(self, sampler):
        ...         self.sampler = sampler
        >>> Counted(range(3)).stop
        3
    """

    _wrapped_attribute: ClassVar[str]

    def __init_subclass__(cls, *, wraps: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._wrapped_attribute = wraps

    def __getattr__(self, name: str) -> Any:
        if name == self._wrapped_attribute:  # `copy` and `pickle` look attributes up before any is set
            raise AttributeError(name)
        return getattr(getattr(self, self._wrapped_attribute), name)


def unwrap(value: Any) -> Any:
    """Return the object inside a proxy; anything else as it is."""
    return getattr(value, value._wrapped_attribute) if isinstance(value, Proxy) else value  # noqa: SLF001 - its own module
