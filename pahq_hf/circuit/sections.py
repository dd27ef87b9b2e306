"""Objects of a JSON file as frozen dataclasses that lose nothing of what they do not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

SectionT = TypeVar("SectionT", bound="Section")
_OWN = ("more", "keys")


@dataclass(frozen=True, kw_only=True)
class Section:
    """An object of a JSON file, with fields that say nothing where the file does not.

    A subclass has fields of a plain type `| None` with the default None, and mappings and sections that are
    empty by default. What a file holds beside them, or of another type than theirs, is kept as it is: newer
    versions write keys that this one does not know.

    Attributes:
        more: What is kept as it is, by key.
        keys: The order of the keys that were read.
    """

    more: Mapping[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def from_json(cls: type[SectionT], document: Mapping[str, Any]) -> SectionT:
        """Read what `to_json` wrote, or what a version before or after this one did."""
        kinds = _kinds(cls)
        fits = {key: value for key, value in document.items() if key in kinds and kinds[key].holds(value)}
        more = {key: value for key, value in document.items() if key not in fits}
        known = {key: kinds[key].read(value) for key, value in fits.items()}
        return cls(**known, more=more, keys=tuple(document))

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Some fields, by name, from the JSON values of their keys."""
        kinds = _kinds(cls)
        return {key: kinds[key].read(value) for key, value in values.items()}

    @classmethod
    def names(cls) -> frozenset[str]:
        """Keys that have a field."""
        return frozenset(_kinds(cls))

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values by key, in the order in which they were read; what says nothing has no key."""
        kinds = _kinds(type(self))
        values = {name: kind.write(getattr(self, name)) for name, kind in kinds.items()}
        document = {name: value for name, value in values.items() if value not in (None, {})}
        document |= self.more
        return {key: document[key] for key in dict.fromkeys((*self.keys, *document)) if key in document}


@dataclass(frozen=True)
class _Kind:
    """What a field takes.

    Attributes:
        holds: Whether a JSON value can be the field's.
        read: The field's value from it.
        write: And back.
    """

    holds: Callable[[Any], bool]
    read: Callable[[Any], Any]
    write: Callable[[Any], Any]


def _kinds(cls: type[Any]) -> dict[str, _Kind]:
    hints = get_type_hints(cls)
    return {entry.name: _kind(hints[entry.name]) for entry in fields(cls) if entry.name not in _OWN}


def _kind(hint: Any) -> _Kind:
    (wanted,) = [kind for kind in get_args(hint) if kind is not NoneType] if _is_optional(hint) else [hint]
    wanted = get_origin(wanted) or wanted
    if issubclass(wanted, Section):
        return _Kind(_is_object, wanted.from_json, lambda value: value.to_json())
    if issubclass(wanted, Mapping):
        return _Kind(_is_object, dict, lambda value: None if value is None else dict(value))
    if hasattr(wanted, "from_dict"):
        return _Kind(
            lambda value: value is not None,
            wanted.from_dict,
            lambda value: None if value is None else value.to_dict(),
        )
    kinds = (int, float) if wanted is float else (wanted,)
    # A truth value is a number to Python only.
    return _Kind(
        lambda value: isinstance(value, kinds) and (wanted is bool or not isinstance(value, bool)),
        lambda value: value,
        lambda value: value,
    )


def _is_optional(hint: Any) -> bool:
    return NoneType in get_args(hint)


def _is_object(value: Any) -> bool:
    """Whether it is an object that says something; an empty one is kept as it is."""
    return isinstance(value, Mapping) and bool(value)
