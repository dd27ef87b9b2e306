"""Which searches there are. A search of one's own is registered here, and runs as those of the package do."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import Field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from pahq_hf.circuit.run_record import TITLES
from pahq_hf.errors import ConfigError
from pahq_hf.search.acdc_options import ACDCConfig
from pahq_hf.search.attribution.kinds import METHODS, OWN
from pahq_hf.search.attribution.options import AttributionConfig
from pahq_hf.search.budget_options import BudgetOptions
from pahq_hf.search.declaration import check_declarations, check_shared, option_name
from pahq_hf.search.kind import Found, OptionsT, SearchKind, check_options
from pahq_hf.search.mask_options import EdgePruningOptions, MaskOptions, UGSOptions
from pahq_hf.search.refine_options import RefineOptions

if TYPE_CHECKING:
    from pahq_hf.engine.setting import Setting
    from pahq_hf.search.work import Work

_NAME = re.compile(r"[a-z][a-z0-9-]*")
FunctionT = TypeVar("FunctionT", bound=Callable[..., Found])
LearnsT = TypeVar("LearnsT", bound=RefineOptions | MaskOptions)


def register_search(
    name: str,
    options: type[OptionsT],
    *,
    title: str | None = None,
    ranks_kept_first: bool = False,
    resolve: Callable[[OptionsT, Setting], OptionsT] | None = None,
    command_line: bool = True,
) -> Callable[[FunctionT], FunctionT]:
    """Register a search of one's own: a decorator of the function that searches.

    It runs by `model.discover(task, search=name, ...)`, and, where it is registered before the command line
    starts, by `pahq discover --search name`. Journal, `--resume`, verification by the hooks engine, record
    and files are those of every search.

    Args:
        name: What it is called: lower-case letters, digits and `-`.
        options: Its options, a frozen dataclass derived from `SearchOptions`.
        title: What it is, in words, for model cards; the name by default.
        ranks_kept_first: Whether kept edges rank before all others: the scores of the two do not compare.
        resolve: Checks options against a `Setting` before any work, and returns them.
        command_line: Whether `pahq discover` offers it. False allows options of any type, as long as their
            `to_dict` is JSON.

    Returns:
        The decorator.

    Raises:
        ConfigError: If the name is taken or is none, the options are no such dataclass, or one of them
            cannot be an option of the command line, or is there another search's of another type.

    Example:
        ```python
        @dataclass(frozen=True)
        class StrongestOptions(SearchOptions):
            edges: int = 100

        @register_search("strongest", StrongestOptions, title="the strongest edges")
        def strongest(work: Work[StrongestOptions]) -> Found: ...
        ```
    """
    if _NAME.fullmatch(str(name)) is None:
        raise ConfigError(f"a search is named by lower-case letters, digits and '-'; got {name!r}")
    if name in _SEARCHES:
        raise ConfigError(f"there is a search {name!r} already")
    check_options(options, name)
    if command_line:
        check_declarations(options, name)
        for other in _SEARCHES.values():
            if other.command == "discover":
                check_shared(options, name, other.options, other.name)

    def registered(function: FunctionT) -> FunctionT:
        _SEARCHES[name] = SearchKind(
            name,
            title or name,
            options,
            function,
            ranks_kept_first=ranks_kept_first,
            resolve=resolve,
            command="discover" if command_line else None,
            is_own=True,
        )
        return function

    return registered


def find_search(name: str) -> SearchKind[Any]:
    """The search of a name.

    Raises:
        ConfigError: If there is none.
    """
    given: object = name
    if not isinstance(given, str) or name not in _SEARCHES:
        raise ConfigError(f"there is no search {name!r}; there are {', '.join(_SEARCHES)}")
    return _SEARCHES[name]


def default_search(given: Collection[str]) -> str:
    """The search that is meant where none is named: `refine` if it is a number of edges that is given.

    Args:
        given: Names of the options that are given.

    Raises:
        ConfigError: If there is a threshold too.
    """
    if {"edges", "threshold"} <= {*given}:
        raise ConfigError(
            "edges (--edges) asks refine for a circuit of that size, threshold (--threshold) asks acdc for "
            "one at that tau: give one of them, or name the search"
        )
    return "refine" if "edges" in given else "acdc"


def searches() -> Mapping[str, SearchKind[Any]]:
    """All searches by name."""
    return dict(_SEARCHES)


def options_of(*commands: str) -> Iterator[tuple[str, Field[Any]]]:
    """Every option that can be given of every search of some commands of `pahq`, after the search's name."""
    for kind in _SEARCHES.values():
        if kind.command in commands:
            yield from ((kind.name, entry) for entry in fields(kind.options) if entry.name in kind.fields)


def advice_on(kind: SearchKind[Any]) -> dict[str, str]:
    """What to do instead of options that a search of `discover` has not, by what is given.

    They are those of other searches, and its own by their names on the command line.
    """
    found: dict[str, list[str]] = {}
    for search, entry in options_of("discover", *([] if kind.command is None else [kind.command])):
        if entry.name not in kind.fields:
            found.setdefault(entry.name, []).append(search)
    advice = {name: f"it is an option of search {' and '.join(others)}" for name, others in found.items()}
    for entry in fields(kind.options):
        typed = option_name(entry)
        if entry.name in kind.fields and typed not in kind.fields:
            advice[typed] = f"in Python it is {entry.name!r}"
    return advice


# -- those of the package: their functions need torch, which most commands do without ---------------------


def _acdc(work: Work[ACDCConfig]) -> Found:
    from pahq_hf.search.acdc_run import acdc

    return acdc(work)


def _resolve_acdc(options: ACDCConfig, setting: Setting) -> ACDCConfig:
    from pahq_hf.search.acdc_run import resolve

    return resolve(options, setting)


def _check_acdc(work: Work[ACDCConfig], found: Found) -> None:
    from pahq_hf.search.acdc_run import check

    check(work, found)


def _budget(work: Work[BudgetOptions]) -> Found:
    from pahq_hf.search.budget import budget

    return budget(work)


def _resolve_budget(options: BudgetOptions, setting: Setting) -> BudgetOptions:
    from pahq_hf.search.budget import resolve

    return resolve(options, setting)


def _check_budget(work: Work[BudgetOptions], found: Found) -> None:
    from pahq_hf.search.budget import check

    check(work, found)


def _attribute(work: Work[AttributionConfig]) -> Found:
    from pahq_hf.search.attribution.run import attribute

    return attribute(work)


def _resolve_attribution(options: AttributionConfig, setting: Setting) -> AttributionConfig:
    from pahq_hf.search.attribution.run import resolve

    return resolve(options, setting)


def _refine(work: Work[RefineOptions]) -> Found:
    from pahq_hf.search.refine import refine

    return refine(work)


def _resolve_learning(options: LearnsT, setting: Setting) -> LearnsT:
    from pahq_hf.search.learners import resolve

    return resolve(options, setting)


def _check_refine(work: Work[RefineOptions], found: Found) -> None:
    from pahq_hf.search.refine import check

    check(work, found)


def _edge_pruning(work: Work[EdgePruningOptions]) -> Found:
    from pahq_hf.search.edge_pruning import edge_pruning

    return edge_pruning(work)


def _ugs(work: Work[UGSOptions]) -> Found:
    from pahq_hf.search.ugs import ugs

    return ugs(work)


def _check_masks(work: Work[MaskOptions], found: Found) -> None:
    from pahq_hf.search.masks import check

    check(work, found)


_SEARCHES: dict[str, SearchKind[Any]] = {
    "acdc": SearchKind(
        "acdc",
        TITLES["acdc"],
        ACDCConfig,
        _acdc,
        ranks_kept_first=True,
        resolve=_resolve_acdc,
        check=_check_acdc,
    ),
    "budget": SearchKind(
        "budget",
        "ACDC within a budget for all removals together",
        BudgetOptions,
        _budget,
        ranks_kept_first=True,
        resolve=_resolve_budget,
        check=_check_budget,
    ),
    **{
        name: SearchKind(
            name,
            method.title,
            AttributionConfig,
            _attribute,
            fixed={"method": name},
            without=frozenset(OWN) - method.takes,
            phase="scores",
            command="attribute",
            resolve=_resolve_attribution,
        )
        for name, method in METHODS.items()
    },
    "refine": SearchKind(
        "refine",
        "learned scores, refined by exact tests",
        RefineOptions,
        _refine,
        in_batches=False,
        resolve=_resolve_learning,
        check=_check_refine,
    ),
    "edge-pruning": SearchKind(
        "edge-pruning",
        "hard concrete masks (Edge Pruning)",
        EdgePruningOptions,
        _edge_pruning,
        in_batches=False,
        resolve=_resolve_learning,
        check=_check_masks,
    ),
    "ugs": SearchKind(
        "ugs",
        "uniform gradient sampling of masks (UGS)",
        UGSOptions,
        _ugs,
        in_batches=False,
        resolve=_resolve_learning,
        check=_check_masks,
    ),
}
