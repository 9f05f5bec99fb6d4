"""`CallbackHandler` dispatches each event to the callbacks that implement it, in list order."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, TypeAlias

from pytorch_accelerated._hints.classes import describe_forgotten_init
from pytorch_accelerated._run import Run
from pytorch_accelerated.callbacks._checks import (
    accepted_keywords,
    as_instance,
    as_iterable,
    implements,
    warn_about_signatures,
    warn_about_uncalled_methods,
)
from pytorch_accelerated.callbacks.base import EVENTS, TrainerCallback
from pytorch_accelerated.exceptions import CheckpointError, NonFiniteLossError, StopTrainingError, add_note
from pytorch_accelerated.time_ledger import CALLBACK_PREFIX, TimeLedger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytorch_accelerated._types import StateDict, StateMapping

_EVENTS_OF_RUNS = frozenset(event for event in EVENTS if "_run_start" in event or "_run_end" in event) | {
    "on_init_end",
    "on_training_state_save",
    "on_stop_training_error",
    "on_exception",
}
"""The trainer's events that callbacks nested in another one receive as well, so that they can set up and clean up.

All others they receive only from the evaluations of that one. A metric would be recorded twice otherwise.
"""

_UNREAD_LEDGER = TimeLedger()

Callbacks: TypeAlias = Iterable[Any] | TrainerCallback | type[TrainerCallback] | None
"""What is meant by ``callbacks``: several, a single one, or none. Open: any object with an event is a callback."""


class CallbackHandler:
    """Holds the callbacks of a trainer, and calls them. Iterating over it yields them in order.

    For each event it caches the callbacks that implement it, so an event without listeners costs one lookup. A callback
    such as `ModelEmaCallback`, which has a ``nested_handler``, comes with the callbacks of that handler.

    Args:
        callbacks: Callbacks, as instances or as classes that can be instantiated without arguments; or one of these, or
            ``None``.

    Raises:
        TypeError: ``callbacks``, or an entry of it, is not a callback.
        ValueError: The same object was passed twice.
    """

    other_words: Collection[str] = ()
    """Names that the program uses elsewhere, such as those of events that it fires itself: they are not misspelled."""

    requested_stop: StopTrainingError | None = None
    """The request of a callback to stop, while the later callbacks get the event in which it was made."""

    def __init__(self, callbacks: Callbacks) -> None:
        self._callbacks = _ObservedList([], self._forget_listeners)
        self.events_without_listeners: set[str] = set()
        """Names of events known to have no listener: the loop may skip `call_event` for them."""

        self._listeners: dict[str, tuple[_Listener, ...]] = {}
        self.add_callbacks(callbacks)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy of another handler, or the one that was pickled."""
        vars(self).update(state)
        self._callbacks = _ObservedList(self._callbacks, self._forget_listeners)

    @property
    def callbacks(self) -> list[object]:
        """The callbacks, in order. The list may be changed at any time, in an event too, or replaced."""
        return self._callbacks

    @callbacks.setter
    def callbacks(self, callbacks: Iterable[object]) -> None:
        self._callbacks = _ObservedList(callbacks, self._forget_listeners)
        self._forget_listeners()

    @property
    def callback_list(self) -> list[str]:
        """The class names of the callbacks, in order."""
        return [type(callback).__name__ for callback in self.callbacks]

    def __iter__(self) -> Iterator[object]:
        return iter(self.callbacks)

    def add_callbacks(self, callbacks: Callbacks) -> None:
        """Append callbacks, in order; a single one and ``None`` are fine too."""
        for callback in as_iterable(callbacks):
            self.add_callback(callback)

    def add_callback(self, callback: object) -> None:
        """Append one callback.

        Args:
            callback: An instance, or a class that can be instantiated without arguments.

        Raises:
            TypeError: ``callback`` is not a callback.
            ValueError: The same object is in the list already. Two instances of one class are fine.
        """
        instance = as_instance(callback)
        if any(instance is present for present in self.callbacks):
            raise ValueError(
                f"The callback object {instance!r} was added twice. Each object receives every event once. To have two "
                "callbacks of this class, pass a second instance."
            )
        warn_about_uncalled_methods(instance, self.other_words)
        warn_about_signatures(instance)
        self.callbacks.append(instance)

    def clear_callbacks(self) -> None:
        """Remove all callbacks."""
        self.callbacks = []

    def refresh(self) -> None:
        """Clear the cache of who implements what. Call this after a callback got another method."""
        self.requested_stop = None  # that of an event which failed otherwise
        self._forget_listeners()

    def _forget_listeners(self) -> None:
        self._listeners, self.events_without_listeners = {}, set()

    def call_event(self, event: str, *args: object, **kwargs: object) -> None:
        """Call the method named ``event`` of every callback that implements it.

        Any name is allowed, so subclasses of the trainer can define their own events. Callbacks without such a method
        are skipped. If a callback changes the list, those that it removes do not get the event any more, and those that
        it adds get it last.

        Args:
            event: Name of the event, usually a method of `TrainerCallback`.
            *args: Positional arguments of the event; the trainer's own events pass the trainer.
            **kwargs: Keyword arguments of the event.

        Raises:
            StopTrainingError: A callback asked to stop. Raised after all callbacks have received the event.
            NonFiniteLossError: A callback found one. With several processes, raised after all callbacks have received
                the event, because those of the other processes may wait for them.
            Exception: Any other error of a callback, raised immediately, with a note that names the callback, event,
                epoch and step.
        """
        stop_request: StopTrainingError | None = None
        bad_loss: NonFiniteLossError | None = None
        listeners = self._listeners.get(event)
        due = told = self._find_listeners(event) if listeners is None else listeners
        ledger = _ledger_of(args)
        outer = ledger.part
        try:
            while due:
                known = self._listeners  # another one as soon as the list has changed
                for method, accepted, callback, part in due:
                    if self._listeners is not known and not self._holds(callback):
                        continue
                    ledger.switch(part)
                    try:
                        method(*args, **(kwargs if accepted is None else _only(accepted, kwargs)))
                    except StopTrainingError as error:
                        stop_request = self.requested_stop = stop_request or error
                    except Exception as error:
                        add_note(error, _describe_origin(error, callback, event, args, kwargs))
                        if not (isinstance(error, NonFiniteLossError) and _has_other_ranks(args)):
                            raise
                        bad_loss = bad_loss or error
                due = () if self._listeners is known else _without(told, self._find_listeners(event))
                told += due
        finally:
            ledger.switch(outer)
        if stop_request is not None:
            self.requested_stop = None
        if (reason := bad_loss or stop_request) is not None:
            raise reason

    def call_event_on_all(self, event: str, *args: object, **kwargs: object) -> list[Exception]:
        """Call ``event`` on every callback, even if some fail, and return their errors. Used for clean-up."""
        errors: list[Exception] = []
        for method, accepted, *_ in self._find_listeners(event):
            try:
                method(*args, **(kwargs if accepted is None else _only(accepted, kwargs)))
            except Exception as error:
                errors.append(error)
        return errors

    def state_dict(self) -> StateDict:
        """Return the state of each callback that has one, by class name and index among callbacks of that class."""
        return {
            name: callback.state_dict()
            for name, callback in self._named_callbacks()
            if callable(getattr(callback, "state_dict", None))
        }

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned. Callbacks without an entry keep their state.

        Raises:
            CheckpointError: A callback could not load its state.
        """
        for name, callback in self._named_callbacks():
            if name in state_dict:
                with _explained_failure_to_load(callback):
                    callback.load_state_dict(state_dict[name])

    def with_nested_callbacks(self) -> list[object]:
        """Return the callbacks, each followed by those that are nested in it."""
        callbacks: list[object] = []
        for callback in self.callbacks:
            callbacks.append(callback)
            nested = getattr(callback, "nested_handler", None)
            if isinstance(nested, CallbackHandler):
                callbacks += nested.with_nested_callbacks()
        return callbacks

    def nested_last(self) -> list[object]:
        """Return the callbacks, then those that are nested in one, which leaves the position of the others as it is."""
        return [*self.callbacks, *(each for each in self.with_nested_callbacks() if each not in self.callbacks)]

    def _holds(self, callback: object) -> bool:
        return any(callback is each for each in self.with_nested_callbacks())

    def _named_callbacks(self) -> Iterator[tuple[str, Any]]:
        num_seen: Counter[str] = Counter()
        for callback in self.callbacks:
            class_name = type(callback).__qualname__
            yield f"{class_name}/{num_seen[class_name]}", callback
            num_seen[class_name] += 1

    def _find_listeners(self, event: str) -> tuple[_Listener, ...]:
        callbacks = self.with_nested_callbacks() if event in _EVENTS_OF_RUNS else self.callbacks
        in_order = sorted(callbacks, key=lambda callback: getattr(callback, "is_called_last", False) is True)
        self._listeners[event] = tuple(
            _Listener(
                getattr(callback, event),
                accepted_keywords(getattr(callback, event)),
                callback,
                CALLBACK_PREFIX + _name_among(callback, callbacks),
            )
            for callback in in_order
            if implements(callback, event)
        )
        is_plain = getattr(self.call_event, "__func__", None) is CallbackHandler.call_event
        if is_plain and not self._listeners[event]:  # a replaced `call_event` is meant to see every event
            self.events_without_listeners.add(event)
        return self._listeners[event]


def _and_tell(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def change(self: _ObservedList, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        self.on_change()
        return result

    return change


class _ObservedList(list[object]):
    """A list that tells of each change. A copy is a plain list.

    Args:
        items: What it contains.
        on_change: Called after each change.
    """

    def __init__(self, items: Iterable[object], on_change: Callable[[], None]) -> None:
        super().__init__(items)
        self.on_change = on_change

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return list, (), None, iter(self)

    append = _and_tell(list.append)
    extend = _and_tell(list.extend)
    insert = _and_tell(list.insert)
    remove = _and_tell(list.remove)
    pop = _and_tell(list.pop)
    clear = _and_tell(list.clear)
    sort = _and_tell(list.sort)
    reverse = _and_tell(list.reverse)
    __setitem__ = _and_tell(list.__setitem__)
    __delitem__ = _and_tell(list.__delitem__)
    __iadd__ = _and_tell(list.__iadd__)


class _Listener(NamedTuple):
    method: Callable[..., object]
    accepted: frozenset[str] | None
    """Names of the keyword arguments that the method accepts; ``None`` if it accepts all."""

    callback: object
    part: str
    """What its time belongs to in the ledger of a run."""


def _name_among(callback: object, callbacks: Iterable[object]) -> str:
    """Return the name of the class of a callback, with a number from the second one of that class on."""
    kin = [each for each in callbacks if type(each).__name__ == type(callback).__name__]
    number = 1 + next(index for index, each in enumerate(kin) if each is callback)
    return type(callback).__name__ + (f"_{number}" if number > 1 else "")


def _ledger_of(args: tuple[object, ...]) -> TimeLedger:
    """Return the ledger of the trainer that an event passes; one that nobody reads if no run of it is under way."""
    ledger = getattr(getattr(args[0], "_loop_run", None), "ledger", None) if args else None
    return ledger if isinstance(ledger, TimeLedger) and ledger.is_running else _UNREAD_LEDGER


def _without(known: Iterable[_Listener], listeners: Iterable[_Listener]) -> tuple[_Listener, ...]:
    """Return the listeners whose callbacks are not among the known ones."""
    known_callbacks = [listener.callback for listener in known]
    return tuple(new for new in listeners if not any(new.callback is each for each in known_callbacks))


def _only(accepted: frozenset[str], kwargs: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in kwargs.items() if name in accepted}


@contextmanager
def _explained_failure_to_load(callback: object) -> Iterator[None]:
    try:
        yield
    except (StopTrainingError, CheckpointError):
        raise
    except Exception as error:
        name = type(callback).__name__
        raise CheckpointError(
            f"The callback `{name}` could not load its state ({type(error).__name__}: {error}). Another version of it, "
            f"or another callback of this name, may have saved the state. Let `{name}.load_state_dict` accept that "
            "state, or remove the callback."
        ) from error


def _has_other_ranks(args: tuple[object, ...]) -> bool:
    """Tell whether an event belongs to a run on several processes, from its arguments, of which the first is a trainer.

    A test double of the trainer has no run.
    """
    run: object = getattr(args[0], "_loop_run", None) if args else None
    return isinstance(run, Run) and run.consensus.is_needed


def _describe_origin(
    error: Exception, callback: object, event: str, args: tuple[object, ...], kwargs: dict[str, object]
) -> str:
    place = f"raised by the callback `{type(callback).__name__}` in `{event}`"
    history = getattr(args[0], "run_history", None) if args else None
    epoch = getattr(history, "current_epoch", None)
    if isinstance(epoch, int):
        place += f", epoch {epoch}"
    if "step" in kwargs:
        place += f", step {kwargs['step']}"
    if isinstance(error, AttributeError) and getattr(error, "obj", None) is callback:
        forgotten = describe_forgotten_init(type(callback))
        place += "" if forgotten is None else f". {forgotten}"
    return place
