"""What the options of a search must be, so that the command line can take them."""

from __future__ import annotations

import keyword
import re
from dataclasses import MISSING, Field, fields
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pahq_hf.errors import ConfigError, first_line

PREFIX = "search_"  # of options that are called as others of the command
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_PLAIN = (bool, int, float, str)
_EVERY_SEARCH = ("metric", "ablation")


def option_name(entry: Field[Any]) -> str:
    """What a field is called on the command line, with `_` for `-`."""
    return str(entry.metadata.get("name", entry.name)).replace("-", "_")


def check_declarations(options: type, name: str) -> None:
    """Check the fields of a search's options.

    Args:
        options: A dataclass.
        name: The search.

    Raises:
        ConfigError: If the command line cannot take one of them.
    """
    where = f"the options of search {name!r}, {options.__name__}"
    try:
        hints = get_type_hints(options)
    except Exception as error:  # whatever stands in an annotation is run
        raise ConfigError(f"{where}: an annotation means nothing ({first_line(error)})") from error
    found: set[str] = set()
    for entry in fields(options):
        called, told = option_name(entry), f"{where}: field {entry.name!r}"
        if not _NAME.fullmatch(called) or keyword.iskeyword(called) or called.startswith(PREFIX):
            raise ConfigError(
                f"{told} cannot be called {called!r} on the command line: letters, digits and '_', no word "
                f"of Python and no {PREFIX!r} before it"
            )
        names = {called, f"no_{called}"} if plain_type(hints[entry.name]) is bool else {called}
        if names & found:
            raise ConfigError(f"{told} is called {min(names & found)!r} on the command line, as another is")
        found |= names
        if entry.name not in _EVERY_SEARCH:
            _check_value(entry, hints[entry.name], told)


def plain_type(hint: Any) -> Any:
    """A type without its None; of several types the union of them."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    kinds = tuple(each for each in get_args(hint) if each is not NoneType)
    return Union[kinds] if kinds else NoneType  # noqa: UP007


def check_shared(options: type, name: str, other: type, known: str) -> None:
    """Check that two searches mean the same where an option of the command line is both's.

    Args:
        options: The options of a search that is registered.
        name: The search.
        other: The options of one that is there.
        known: Its name.

    Raises:
        ConfigError: If a value would be read as the other's.
    """
    read = _read_as(other)
    for called, mine in _read_as(options).items():
        if called in read and mine != read[called]:
            raise ConfigError(
                f"the options of search {name!r}, {options.__name__}: on the command line {called!r} is "
                f"{_in_words(read[called])}, of search {known!r}, and cannot be {_in_words(mine)} too: give "
                "yours another name there, told(..., name=...)"
            )


def _read_as(options: type) -> dict[str, Any]:
    """Type of each option, by its name on the command line."""
    hints = get_type_hints(options)
    return {
        option_name(entry): plain_type(hints[entry.name])
        for entry in fields(options)
        if entry.name not in _EVERY_SEARCH
    }


def _in_words(kind: Any) -> str:
    name = getattr(kind, "__name__", str(kind)) if get_origin(kind) is None else str(kind)
    return name.removeprefix("typing.")


def _check_value(entry: Field[Any], hint: Any, told: str) -> None:
    kind = plain_type(hint)
    names = get_args(kind) if get_origin(kind) is Literal else ()
    is_enum = isinstance(kind, type) and issubclass(kind, Enum) and issubclass(kind, str)  # JSON
    if not (kind in _PLAIN or is_enum or (names and all(isinstance(each, str) for each in names))):
        raise ConfigError(
            f"{told} is a {getattr(hint, '__name__', hint)}: an option is a bool, int, float, str, an Enum "
            "or Literal of strings, or one of these or None; a search for Python alone is registered with "
            "command_line=False"
        )
    default = entry.default
    accepted: Any = (int, float) if kind is float else kind
    right = default in names if names else isinstance(default, accepted)
    if default is not MISSING and default is not None and not right:
        raise ConfigError(f"{told} has the default {default!r}, which is none of its type")
    for fact, types in (("help", str), ("metavar", str), ("min", (int, float))):
        value = entry.metadata.get(fact)
        if value is not None and not isinstance(value, types):
            raise ConfigError(f"{told}: {fact} cannot be {value!r}")
