"""What a program has written in a class: methods that nobody calls, and an ``__init__`` without that of its base."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from pytorch_accelerated._messages import PACKAGE

# --- methods -----------------------------------------------------------------------------------------------------


def find_uncalled(
    cls: type, meant: Callable[[str], str | None], other_words: Collection[str] = frozenset()
) -> dict[str, str]:
    """Return the methods of a class that the program has written for another library, or has misspelled.

    A method that other code of the program mentions, by its name or as text, is a helper, whatever it is called.

    Args:
        cls: The class.
        meant: Returns a sentence about a name that nothing calls; ``None`` for any name of the program's choice.
        other_words: Names that occur elsewhere in the program.

    Returns:
        A sentence about each method, by its name.
    """
    own = {name for base in cls.__mro__ if is_of_library(base) for name in vars(base)}
    names = [name for base in _classes_of_user(cls) for name, _ in _functions_in(vars(base)) if name not in own]
    sentences = {name: sentence for name in names if (sentence := meant(name)) is not None}
    if not sentences:
        return {}
    mentioned = words_around(cls, other_than=sentences) | set(other_words)
    return {name: sentence for name, sentence in sentences.items() if name not in mentioned}


def words_of_user(cls: type) -> set[str]:
    """Return the names and texts that occur in the methods that the program has written in a class."""
    functions = [function for base in _classes_of_user(cls) for _, function in _functions_in(vars(base))]
    return {word for function in functions for word in _words_of(function.__code__)}


def words_around(cls: type, other_than: Collection[str] = ()) -> set[str]:
    """Return the words of the methods of a class, and of all functions and classes beside it.

    Args:
        cls: The class.
        other_than: Names of functions that do not count.
    """
    words: set[str] = set()
    for base in _classes_of_user(cls):
        words |= _words_at_top_of(base.__module__)
        beside = vars(sys.modules[base.__module__]) if base.__module__ in sys.modules else {}
        for owner in (vars(base), beside, *(vars(each) for each in beside.values() if _is_of(each, base.__module__))):
            for name, function in _functions_in(owner):
                if name not in other_than:
                    words.update(_words_of(function.__code__))
    return words


def _words_at_top_of(module: str) -> set[str]:
    """Return the names in the statements of a module, such as those of a script, outside its functions and classes."""
    try:
        statements = ast.parse(inspect.getsource(sys.modules[module])).body
    except (KeyError, OSError, TypeError, SyntaxError):  # it has no source, as in an interactive session
        return set()
    in_place = [each for each in statements if not isinstance(each, (ast.FunctionDef, ast.ClassDef))]
    nodes = [node for each in in_place for node in ast.walk(each)]
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def _is_of(value: object, module: str) -> bool:
    return inspect.isclass(value) and value.__module__ == module


def _classes_of_user(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if not is_of_library(base) and base is not object]


def is_of_library(cls: type) -> bool:
    """Tell whether this library defines a class, and not the program."""
    return cls.__module__.partition(".")[0] == PACKAGE


def _functions_in(owner: Mapping[str, Any]) -> Iterator[tuple[str, FunctionType]]:
    for name, member in owner.items():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)  # of a property, a classmethod
        if isinstance(function, FunctionType):
            yield name, inspect.unwrap(function)


def _words_of(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _words_of(constant)


# --- `__init__` --------------------------------------------------------------------------------------------------


def describe_forgotten_init(cls: type) -> str | None:
    """Return a sentence if the ``__init__`` of a class does not call that of its base class; ``None`` if it does.

    Example:
        >>> class Base:
        ...     def __init__(self):
        ...         self.size = 1
        >>> class Own(Base):
        ...     def __init__(self):
        ...         pass
        >>> describe_forgotten_init(Own)
        '`Own.__init__` does not call that of its base class `Base`. Call `super().__init__(...)` in it.'
    """
    owners = [base for base in cls.__mro__[:-1] if "__init__" in vars(base)]
    own = inspect.unwrap(vars(owners[0])["__init__"]) if owners else None
    if len(owners) < 2 or not isinstance(own, FunctionType) or "__init__" in own.__code__.co_names:
        return None
    return (
        f"`{owners[0].__name__}.__init__` does not call that of its base class `{owners[1].__name__}`. Call "
        "`super().__init__(...)` in it."
    )
