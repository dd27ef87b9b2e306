"""Commands whose options are declared elsewhere, once: in groups that many of them take, and by searches."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Container, Iterable, Mapping
from copy import copy
from dataclasses import MISSING, fields, is_dataclass
from functools import update_wrapper
from typing import Annotated, Any, get_args, get_type_hints

import typer

from pahq_hf.cli.ending import is_given
from pahq_hf.cli.options import AblationOption, MetricOption
from pahq_hf.errors import ConfigError
from pahq_hf.search.declaration import PREFIX, option_name, plain_type
from pahq_hf.search.kind import SearchKind, shifted
from pahq_hf.search.registry import options_of as options_of_searches

_ABSENT = inspect.Parameter.empty
_EVERY_SEARCH: dict[str, Any] = {"metric": MetricOption, "ablation": AblationOption}


class Command:
    """A command that takes the fields of its groups as options, and beside them what searches declare.

    Args:
        command: The command. A parameter that is a dataclass is a group; where there is an `options`, it
            gets by name what was given of the searches' options, as its `context` tells.
        declared: The searches whose options it takes, asked when the command line starts.
        without: Options of theirs that it does not take.
    """

    def __init__(
        self,
        command: Callable[..., None],
        declared: Callable[[], Iterable[SearchKind[Any]]] = tuple,
        without: Iterable[str] = (),
    ) -> None:
        update_wrapper(self, command)
        self.__annotations__ = {}  # they are in the signature
        self._command = command
        self._declared = declared
        self._without = frozenset(without)
        self._plain: dict[str, inspect.Parameter] = {}
        self._groups: dict[str, type] = {}
        hints = get_type_hints(command, include_extras=True)
        for name, parameter in inspect.signature(command).parameters.items():
            if name == "options":
                continue
            if is_dataclass(hints[name]):
                self._groups[name] = hints[name]
                self._plain |= _fields_of(hints[name])
            else:
                self._plain[name] = _keyword(name, hints[name], parameter.default)

    @property
    def _taken(self) -> set[str]:
        """Names of the command's own parameters, and of the options they are: `as_json` is `--json`."""
        flags = set()
        for parameter in self._plain.values():
            for fact in getattr(parameter.annotation, "__metadata__", ()):
                # Inside `Annotated`, Typer takes what is called the default for the first flag.
                for flags_of in (getattr(fact, "default", None), *(getattr(fact, "param_decls", None) or ())):
                    if isinstance(flags_of, str):
                        flags |= {flag.strip("-").replace("-", "_") for flag in flags_of.split("/")}
        return {"help", *self._plain, *flags}

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.Signature([*self._plain.values(), *self._searched().values()])

    def __call__(self, **values: Any) -> None:
        """Run it with the options of the command line."""
        searched = self._searched()
        arguments: dict[str, Any] = {}
        taken: set[str] = set(searched)
        for name, group in self._groups.items():
            arguments[name] = _filled(group, values)
            taken |= set(_fields_of(group))
        arguments |= {name: value for name, value in values.items() if name not in taken}
        if "options" in inspect.signature(self._command).parameters:
            context = values["context"]
            arguments["options"] = {name: values[name] for name in searched if is_given(context, name)}
        self._command(**arguments)

    def _searched(self) -> dict[str, inspect.Parameter]:
        """Options of the searches by the names of their parameters.

        The first that declares one says how; of several least values it is the lowest that all take, and
        whichever search is run checks its own. Where searches say different things of an option, its help has
        what each says.
        """
        found: dict[str, inspect.Parameter] = {}
        helps: dict[str, dict[str, list[str]]] = {}  # by option and text: the searches that say it
        kinds = list(self._declared())
        for kind in kinds:
            for name, parameter in options_of(kind, self._taken).items():
                if name in self._without:
                    continue
                helps.setdefault(name, {}).setdefault(_help(parameter), []).append(kind.name)
                if name not in found or _least(parameter) < _least(found[name]):
                    found[name] = parameter
        names = [kind.name for kind in kinds]
        return {
            name: _told(parameter, helps[name], alone=list(helps[name].values()) == [names])
            for name, parameter in found.items()
        }


def _least(parameter: inspect.Parameter) -> float:
    """The least value that an option takes."""
    facts = getattr(parameter.annotation, "__metadata__", ())
    least = next((fact.min for fact in facts if getattr(fact, "min", None) is not None), None)
    return -math.inf if least is None else least


def _help(parameter: inspect.Parameter) -> str:
    """What is said of an option."""
    facts = getattr(parameter.annotation, "__metadata__", ())
    return next((fact.help for fact in facts if getattr(fact, "help", None)), "")


def _told(parameter: inspect.Parameter, helps: Mapping[str, list[str]], *, alone: bool) -> inspect.Parameter:
    """An option with the help of all searches that have it, each named unless all searches say the same.

    Args:
        parameter: The option.
        helps: What is said of it, and by which searches.
        alone: Whether all searches say the same.
    """
    if alone or parameter.name in _EVERY_SEARCH:
        return parameter
    hint, option = get_args(parameter.annotation)
    option = copy(option)
    option.help = " ".join(f"{', '.join(names)}: {text}" for text, names in helps.items() if text) or None
    return parameter.replace(annotation=Annotated[hint, option])


def options_of(kind: SearchKind[Any], taken: Container[str] = ()) -> dict[str, inspect.Parameter]:
    """The options of a search as parameters, by name.

    Args:
        kind: The search.
        taken: Names of other options: one of the search that is called so gets `search_` before its name.
    """
    hints = get_type_hints(kind.options)
    found = {}
    for entry in fields(kind.options):
        if entry.name not in kind.fields:
            continue
        told, hint = entry.metadata, hints[entry.name]
        name, default = option_name(entry), None if entry.default is MISSING else entry.default
        name = PREFIX + name if name in taken else name
        annotation = _EVERY_SEARCH.get(entry.name)
        if annotation is None:
            flag = "--" + name.replace("_", "-")
            if plain_type(hint) is bool:
                flag += "/--no-" + name.replace("_", "-")
            option = typer.Option(
                flag, help=told.get("help"), metavar=told.get("metavar"), min=told.get("min")
            )
            annotation = Annotated[hint | None if default is None else hint, option]
        found[name] = _keyword(name, annotation, default)
    return found


def chosen_options(kind: SearchKind[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given on the command line as fields of a search's options.

    Args:
        kind: The search.
        given: Values by the names of parameters.

    Raises:
        ConfigError: If the search has no such option.
    """
    names = {option_name(entry): entry.name for entry in fields(kind.options) if entry.name in kind.fields}
    found = {}
    for name, value in given.items():
        own = name if name in names else name.removeprefix(PREFIX)
        if own not in names:
            what = "method" if kind.command == "attribute" else "search"
            flag = name.replace("_", "-")
            raise ConfigError(f"{what} {kind.name!r} takes no --{flag}{_whose(name, kind.command, what)}")
        found[names[own]] = value
    return found


def _whose(name: str, command: str | None, what: str) -> str:
    """Which searches of a command take an option, if some do."""
    declared = options_of_searches(command or "discover")
    takers = [search for search, entry in declared if option_name(entry) == name]
    return f", which is of --{what} {' and '.join(takers)}" if takers else ""


def turned(kind: SearchKind[Any], options: Any, *, more: bool, total: int) -> dict[str, Any] | None:
    """Options of another run that would keep more edges, or fewer.

    Args:
        kind: The search.
        options: Its options, which may know (`turned`); else it is the search's threshold that is shifted.
        more: Whether more are wanted.
        total: Edges of the graph.

    Returns:
        New values by the names of options, None for one to leave away; None where nothing is known to help.
    """
    if hasattr(options, "turned"):
        found: dict[str, Any] | None = options.turned(more=more, total=total)
        return found
    declared = next((entry for entry in fields(kind.options) if entry.name == "threshold"), None)
    if declared is None or declared.name not in kind.fields or "name" in declared.metadata:
        return None
    value, hint = options.threshold, get_type_hints(kind.options)["threshold"]
    if hint not in (float, float | None) or type(value) not in (int, float) or not math.isfinite(value):
        return None
    if value < 0 or (value == 0 and more):
        return None
    return {"threshold": shifted(value, 1 / 3) if more else shifted(value or 0.001, 3)}


def _fields_of(group: type) -> dict[str, inspect.Parameter]:
    """The options of a group, those of groups in it included."""
    hints = get_type_hints(group, include_extras=True)
    found: dict[str, inspect.Parameter] = {}
    for entry in fields(group):
        if is_dataclass(hints[entry.name]):
            found |= _fields_of(hints[entry.name])
            continue
        default = _ABSENT if entry.default is MISSING else entry.default
        found[entry.name] = _keyword(entry.name, hints[entry.name], default)
    return found


def _filled(group: type, values: Mapping[str, Any]) -> Any:
    """A group with what was given of its options."""
    hints = get_type_hints(group)
    return group(
        **{
            entry.name: _filled(hints[entry.name], values)
            if is_dataclass(hints[entry.name])
            else values[entry.name]
            for entry in fields(group)
        }
    )


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
