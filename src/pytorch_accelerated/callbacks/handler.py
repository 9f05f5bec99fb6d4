"""`CallbackHandler` forwards each event to the callbacks that implement it, in list order."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections import Counter
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

from pytorch_accelerated.callbacks.base import EVENTS, TrainerCallback
from pytorch_accelerated.exceptions import StopTrainingError, add_note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

_SIMILAR_ENOUGH = 0.8


class CallbackHandler:
    """Holds the callbacks of a trainer and calls them.

    Per event it keeps the callbacks that really implement it, so an event nobody listens to costs one look-up.

    Args:
        callbacks: Callbacks, as instances or as classes that can be made without arguments.

    Raises:
        TypeError: Something in ``callbacks`` is no callback.
        ValueError: The same object was given twice.
    """

    def __init__(self, callbacks: Iterable[Any]) -> None:
        self.callbacks: list[Any] = []
        self.events_without_listeners: set[str] = set()
        """Events of which it is known that `call_event` does nothing, so that it need not be called."""

        self._listeners: dict[str, tuple[_Listener, ...]] = {}
        self.add_callbacks(callbacks)

    @property
    def callback_list(self) -> str:
        """The class names of the callbacks, one per line."""
        return "\n".join(type(callback).__name__ for callback in self.callbacks)

    def add_callbacks(self, callbacks: Iterable[Any]) -> None:
        """Append several callbacks, in their order."""
        for callback in callbacks:
            self.add_callback(callback)

    def add_callback(self, callback: Any) -> None:
        """Append one callback.

        Args:
            callback: An instance, or a class that can be made without arguments.

        Raises:
            TypeError: It is no callback.
            ValueError: This very object is in the list already. (Two instances of one class are fine.)
        """
        instance = _make_callback(callback)
        if any(instance is present for present in self.callbacks):
            raise ValueError(
                f"The callback object {instance!r} was added twice. Each object gets every event once; "
                "pass a second instance of its class if you want two."
            )
        _warn_about_misspelt_events(instance)
        self.callbacks.append(instance)
        self.refresh()

    def clear_callbacks(self) -> None:
        """Remove all callbacks."""
        self.callbacks = []
        self.refresh()

    def refresh(self) -> None:
        """Work out anew who implements what; needed after ``callbacks`` was changed by hand."""
        self._listeners = {}
        self.events_without_listeners.clear()

    def call_event(self, event: str, *args: Any, **kwargs: Any) -> None:
        """Call the method named ``event`` of every callback that implements it.

        Any name may be called, so that subclasses of the trainer can have events of their own; callbacks without such
        a method are passed over.

        Args:
            event: Name of the event, usually one of `TrainerCallback`'s methods.
            *args: Passed on; for the trainer's own events the trainer.
            **kwargs: Passed on.

        Raises:
            StopTrainingError: A callback asked to stop; raised after all callbacks have had the event.
            Exception: Whatever else a callback raises, at once, with a note naming callback, event, epoch and step.
        """
        stop_request: StopTrainingError | None = None
        listeners = self._listeners.get(event)
        for method, accepted, callback in self._find_listeners(event) if listeners is None else listeners:
            try:
                if accepted is None:
                    method(*args, **kwargs)
                else:
                    method(*args, **_only(accepted, kwargs))
            except StopTrainingError as error:
                stop_request = stop_request or error
            except Exception as error:
                add_note(error, _describe_origin(callback, event, args, kwargs))
                raise
        if stop_request is not None:
            raise stop_request

    def call_event_on_all(self, event: str, *args: Any, **kwargs: Any) -> list[Exception]:
        """Call ``event`` on every callback even if some fail, and return their errors: for cleaning up."""
        errors: list[Exception] = []
        for method, accepted, _ in self._find_listeners(event):
            try:
                method(*args, **(kwargs if accepted is None else _only(accepted, kwargs)))
            except Exception as error:
                errors.append(error)
        return errors

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the callbacks that have one, by class name and place among their like."""
        return {
            name: callback.state_dict()
            for name, callback in self._named_callbacks()
            if callable(getattr(callback, "state_dict", None))
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; callbacks that were not there then keep their state."""
        for name, callback in self._named_callbacks():
            if name in state_dict:
                callback.load_state_dict(state_dict[name])

    def _named_callbacks(self) -> Iterator[tuple[str, Any]]:
        num_seen: Counter[str] = Counter()
        for callback in self.callbacks:
            class_name = type(callback).__qualname__
            yield f"{class_name}/{num_seen[class_name]}", callback
            num_seen[class_name] += 1

    def _find_listeners(self, event: str) -> tuple[_Listener, ...]:
        in_order = sorted(self.callbacks, key=lambda callback: getattr(callback, "is_called_last", False) is True)
        self._listeners[event] = tuple(
            _Listener(getattr(callback, event), _accepted_keywords(getattr(callback, event)), callback)
            for callback in in_order
            if _implements(callback, event)
        )
        is_plain = getattr(self.call_event, "__func__", None) is CallbackHandler.call_event
        if is_plain and not self._listeners[event]:  # who replaces `call_event` wants to see every event
            self.events_without_listeners.add(event)
        return self._listeners[event]


class _Listener(NamedTuple):
    method: Callable[..., Any]
    accepted: frozenset[str] | None
    """Names of the keyword arguments the method takes; ``None`` if it takes all."""

    callback: Any


def _implements(callback: Any, event: str) -> bool:
    method = getattr(callback, event, None)
    if not callable(method):
        return False
    return getattr(method, "__func__", method) is not getattr(TrainerCallback, event, None)


def _only(accepted: frozenset[str], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name in accepted}


def _accepted_keywords(method: Callable[..., Any]) -> frozenset[str] | None:
    # Programs leave out ``**kwargs`` now and then; they get what they name.
    function = getattr(method, "__func__", method)
    if (
        isinstance(function, FunctionType)
        and not vars(function)
        and function.__code__.co_flags & inspect.CO_VARKEYWORDS
    ):
        return None  # it is not decorated: what `inspect.signature` would find out in many times as long
    try:
        parameters = inspect.signature(method).parameters
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return frozenset(parameters)


def _make_callback(callback: Any) -> Any:
    if inspect.isclass(callback):
        try:
            callback = callback()
        except TypeError as error:
            raise TypeError(
                f"The callback class `{callback.__name__}` cannot be made without arguments ({error}). "
                f"Pass an instance instead, such as `{callback.__name__}(...)`."
            ) from error
    is_callback = isinstance(callback, TrainerCallback) or any(
        callable(getattr(callback, event, None)) for event in EVENTS
    )
    if not is_callback:
        raise TypeError(
            f"{callback!r} is no callback. Expected a `TrainerCallback` (an instance or a class), or an object with at "
            "least one of its events, such as `on_train_epoch_end(self, trainer, **kwargs)`."
        )
    return callback


def _warn_about_misspelt_events(callback: Any) -> None:
    for name in dir(type(callback)):
        if not name.startswith("on_") or name in EVENTS:
            continue
        nearest = difflib.get_close_matches(name, EVENTS, n=1, cutoff=_SIMILAR_ENOUGH)
        if nearest:
            warnings.warn(
                f"`{type(callback).__name__}.{name}` resembles the event `{nearest[0]}` but is none, so the trainer "
                f"will never call it. Rename it to `{nearest[0]}`, or, if it is an event of your own, "
                "give it a name that differs more.",
                stacklevel=4,
            )


def _describe_origin(callback: Any, event: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    place = f"raised by the callback `{type(callback).__name__}` in `{event}`"
    history = getattr(args[0], "run_history", None) if args else None
    epoch = getattr(history, "current_epoch", None)
    if isinstance(epoch, int):
        place += f", epoch {epoch}"
    if "step" in kwargs:
        place += f", step {kwargs['step']}"
    return place
