"""What may be a callback, and what its methods may be: checked when it is added to a trainer."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any

from pytorch_accelerated._hints.classes import find_uncalled, is_of_library
from pytorch_accelerated._hints.hooks import event_meant
from pytorch_accelerated._hints.libraries import describe_foreign_callback, library_of
from pytorch_accelerated._messages import PACKAGE, log_once, warn
from pytorch_accelerated.callbacks.base import EVENTS, TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytorch_accelerated.callbacks.handler import Callbacks

# --- what may be a callback --------------------------------------------------------------------------------------


def as_iterable(callbacks: Callbacks) -> Iterable[Any]:
    """Return callbacks, or a single one, to iterate over.

    Raises:
        TypeError: It is a text or a mapping.
    """
    if callbacks is None:
        return ()
    if inspect.isclass(callbacks) or isinstance(callbacks, TrainerCallback):
        return (callbacks,)
    if isinstance(callbacks, (str, Mapping)):
        raise TypeError(
            f"`callbacks` is a {type(callbacks).__name__}. Expected callbacks, which are instances or classes of "
            "`TrainerCallback`. Pass a list of them."
        )
    return callbacks if hasattr(callbacks, "__iter__") else (callbacks,)


def as_instance(callback: object) -> object:
    """Return a callback, or an instance of its class.

    Raises:
        TypeError: It is no callback, or a class that cannot be instantiated without arguments.
    """
    instance = callback
    if inspect.isclass(callback):
        try:
            instance = callback()
        except TypeError as error:
            raise TypeError(
                f"The callback class `{callback.__name__}` cannot be instantiated without arguments ({error}). "
                f"Pass an instance instead, such as `{callback.__name__}(...)`."
            ) from error
    if isinstance(instance, TrainerCallback):
        return instance
    events = [event for event in EVENTS if callable(getattr(instance, event, None))]
    foreign = describe_foreign_callback(instance)
    if foreign is not None and all(_misfit(instance, event) for event in events):
        raise TypeError(foreign)
    if not events:
        raise TypeError(
            f"{instance!r} is not a callback. Expected a `TrainerCallback` (an instance or a class) in `callbacks`, "
            "or an object with at least one of its events. Define one, such as `on_train_epoch_end(self, trainer, "
            "**kwargs)`."
        )
    return instance


def say_what_is_missing(callbacks: Collection[object], reporting: tuple[type, ...]) -> None:
    """Say once that nothing will be printed if the program has given callbacks, but none that could print.

    A callback of its own may print, so nothing is said if there is one.

    Args:
        callbacks: The callbacks.
        reporting: The classes of the library that print.
    """
    if callbacks and all(is_of_library(type(each)) and not isinstance(each, reporting) for each in callbacks):
        log_once(
            "The callbacks given to the Trainer take the place of the default ones, so it prints no losses. To keep "
            "those, pass `callbacks=[*get_default_callbacks(), ...]`."
        )


# --- its methods -------------------------------------------------------------------------------------------------


def implements(callback: object, event: str) -> bool:
    """Tell whether a callback has a method for an event that is not the empty one of `TrainerCallback`."""
    method = getattr(callback, event, None)
    if not callable(method):
        return False
    return getattr(method, "__func__", method) is not getattr(TrainerCallback, event, None)


def accepted_keywords(method: Callable[..., object]) -> frozenset[str] | None:
    """Return the names of the keyword arguments that a method accepts; ``None`` if it accepts all.

    Some callbacks leave out ``**kwargs``. They receive only the arguments that they name.
    """
    function = getattr(method, "__func__", method)
    if (
        isinstance(function, FunctionType)
        and not vars(function)
        and function.__code__.co_flags & inspect.CO_VARKEYWORDS
    ):
        return None  # not decorated, so the code object suffices; `inspect.signature` takes many times as long
    try:
        parameters = inspect.signature(method).parameters
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return frozenset(parameters)


def warn_about_uncalled_methods(callback: object, other_words: Collection[str]) -> None:
    """Warn about methods that have the name of no event, but look like events, also of other libraries."""
    if any(library_of(cls.__module__) for cls in type(callback).__mro__):  # it serves both libraries
        return
    uncalled = find_uncalled(type(callback), lambda name: event_meant(name, EVENTS), other_words)
    for method, remedy in uncalled.items():
        warn(
            f"`{type(callback).__name__}.{method}` is not an event, so the trainer never calls it. {remedy} If your "
            "program calls it itself, choose a name that differs more."
        )


def warn_about_signatures(callback: object) -> None:
    """Warn about events that cannot be called with the arguments that they get, such as those of other libraries."""
    for event in EVENTS:
        if not implements(callback, event) or _is_of_library(getattr(callback, event)):
            continue
        misfit = _misfit(callback, event)
        if misfit is not None:
            arguments = ", ".join(["self", "trainer", *_keywords_of(event), "**kwargs"])
            warn(
                f"`{type(callback).__name__}.{event}` cannot be called with the arguments of the event ({misfit}). "
                f"Define it as `{event}({arguments})`."
            )


def _misfit(callback: object, event: str) -> str | None:
    """Return why the method for an event cannot be called with what the event passes; ``None`` if it can."""
    method = getattr(callback, event)
    accepted, passed = accepted_keywords(method), _keywords_of(event)
    try:
        inspect.signature(method).bind(None, **{name: None for name in passed if accepted is None or name in accepted})
    except TypeError as error:
        return str(error)
    except ValueError:  # it has no signature
        pass
    return None


def _keywords_of(event: str) -> list[str]:
    parameters = inspect.signature(getattr(TrainerCallback, event)).parameters
    return [name for name in parameters if name not in ("self", "trainer", "kwargs")]


def _is_of_library(method: Callable[..., object]) -> bool:
    module = str(getattr(method, "__module__", ""))
    return module.partition(".")[0] == PACKAGE or library_of(module) is not None
