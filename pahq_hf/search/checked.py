"""What a search returned, checked before anything is made of it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.graph import Graph
from pahq_hf.errors import ConfigError, describe
from pahq_hf.search.kind import Found


def checked(found: object, graph: Graph, search: str) -> Found:
    """What a search found, with arrays of its own.

    Args:
        found: What it returned.
        graph: The graph it searched.
        search: Its name.

    Returns:
        The same, if it can be a circuit of the graph; scores are 0 where there is no edge.

    Raises:
        ConfigError: If it cannot, naming the search and the field.
    """
    if not isinstance(found, Found):
        raise ConfigError(f"search {search!r} must return a Found; got {describe(found)}")
    try:
        edges = graph.all_edges
        kept = _edges("kept", found.kept, graph)
        scores = _array("scores", found.scores, edges.shape, np.dtype(np.float64), "readers, writers")
        if not np.isfinite(scores[edges]).all():
            wrong = int((~np.isfinite(scores[edges])).sum())
            raise ConfigError(f"scores are NaN or infinite for {wrong:,} of {graph.edge_count:,} edges")
        readers = edges.shape[:1]
        return replace(
            found,
            kept=kept,
            scores=np.where(edges, scores, 0.0),
            tested=_edges("tested", found.tested, graph),
            estimated=None if found.estimated is None else _estimated(found, graph),
            searched=None
            if found.searched is None
            else _array("searched", found.searched, readers, np.dtype(np.bool_), "readers"),
            final=_final(found.final),
            facts=_facts(found.facts),
            label=_label(found.label),
        )
    except ConfigError as error:
        raise ConfigError(f"search {search!r} returned a Found that is no circuit: its {error}") from None


def _array(name: str, value: object, shape: tuple[int, ...], dtype: np.dtype[Any], axes: str) -> NDArray[Any]:
    """A copy of an array, which must be one of NumPy's: others would only nearly do what is done with it."""
    wanted = f"a NumPy array of {dtype.name}, [{axes}] = {shape}"
    if not isinstance(value, np.ndarray):
        raise ConfigError(f"{name} must be {wanted}; got {describe(value)}")
    if value.shape != shape or value.dtype != dtype:
        raise ConfigError(f"{name} must be {wanted}; got {value.dtype.name} of shape {value.shape}")
    return np.array(value)


def _edges(name: str, value: object, graph: Graph) -> NDArray[np.bool_]:
    edges = _array(name, value, graph.all_edges.shape, np.dtype(np.bool_), "readers, writers")
    beyond = np.argwhere(edges & ~graph.all_edges)
    if len(beyond):
        reader, writer = beyond[0]
        raise ConfigError(
            f"{name} has {len(beyond):,} edges that the graph does not, such as "
            f"{graph.edge_name(int(reader), int(writer))}: take it & work.graph.all_edges"
        )
    return edges


def _estimated(found: Found, graph: Graph) -> NDArray[np.bool_]:
    estimated = _edges("estimated", found.estimated, graph)
    if (estimated & ~found.tested).any():
        raise ConfigError("estimated has edges that tested does not have: an estimate is a score")
    return estimated


def _final(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ConfigError(f"final must be a finite number or None; got {describe(value)}")
    return float(value)


def _facts(value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"facts must be a mapping from names; got {describe(value)}")
    return dict(value)


def _label(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"label must be a string or None; got {describe(value)}")
    return value
