"""Canonical circuits as edge sets on a graph.

Papers name heads by role and say what composes with what; edges of a graph (which of q, k, v; MLPs; `input`)
need choices beyond that. Those taken here are of the ACDC repository,
github.com/ArthurConmy/Automatic-Circuit-Discovery (`get_ioi_true_edges`, `get_greaterthan_true_edges`,
`get_docstring_subgraph_true_edges`), so that areas under ROC curves can be compared with published ones:

* IOI (Wang et al. 2022, arXiv 2211.00593, section 3, figure 2): the paper speaks of heads and lets MLPs be
  part of the paths between them. So all MLPs belong: they read `input`, each other and all heads of the
  circuit, are read by all of those, and `input->logits` is kept.
* Greater-than (Hanna et al. 2023, arXiv 2305.00586): MLPs are nodes. The paper leaves the queries of heads
  5.5 to 9.1 clean; instead of all edges into them, those from earlier MLPs belong, and with them the edges
  between MLPs 0 to 8. So MLPs 4 to 7, which the paper does not name, are touched too.
* Docstring (Heimersheim & Janiak 2023, "A circuit for Python docstrings in a 4-layer attention-only
  transformer"): edge by edge, as its author gave them to ACDC.

The repository also counts implicit links inside a head (docstring: 13 of its 37); they are no edges here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.graph import BoolArray, Graph, GraphSpec
from pahq_hf.errors import CircuitError, ConfigError

Head = tuple[int, int]

_GPT2_SMALL = GraphSpec(layers=12, heads=12, kv_groups=12)
_ATTN_ONLY_4L = GraphSpec(layers=4, heads=8, kv_groups=8, mlps=False)

# Wang et al. 2022, section 3 and figure 2. Heads are (layer, head).
IOI_HEADS: dict[str, tuple[Head, ...]] = {
    "name mover": ((9, 9), (10, 0), (9, 6)),
    "backup name mover": ((10, 10), (10, 6), (10, 2), (10, 1), (11, 2), (9, 7), (9, 0), (11, 9)),
    "negative name mover": ((10, 7), (11, 10)),
    "S-inhibition": ((7, 3), (7, 9), (8, 6), (8, 10)),
    "induction": ((5, 5), (5, 8), (5, 9), (6, 9)),
    "duplicate token": ((0, 1), (0, 10), (3, 0)),
    "previous token": ((2, 2), (4, 11)),
}

# Who reads whom, by which of q, k, v. "input" and "logits" include MLPs on the way.
_IOI_COMPOSITION: tuple[tuple[str, str, str], ...] = (
    ("input", "previous token", "qkv"),
    ("input", "duplicate token", "qkv"),
    ("input", "S-inhibition", "q"),
    ("input", "negative name mover", "kv"),
    ("input", "name mover", "kv"),
    ("input", "backup name mover", "kv"),
    ("previous token", "induction", "kv"),
    ("induction", "S-inhibition", "kv"),
    ("duplicate token", "S-inhibition", "kv"),
    ("S-inhibition", "negative name mover", "q"),
    ("S-inhibition", "name mover", "q"),
    ("S-inhibition", "backup name mover", "q"),
    ("negative name mover", "logits", ""),
    ("name mover", "logits", ""),
    ("backup name mover", "logits", ""),
)

# Hanna et al. 2023: groups of nodes that are wired alike.
GREATER_THAN_HEADS: dict[str, tuple[Head, ...]] = {
    "early, to the middle heads": ((0, 3), (0, 5)),
    "early, to MLPs too": ((0, 1),),
    "middle": ((5, 5), (6, 1), (6, 9), (7, 10), (8, 11), (9, 1)),
}
GREATER_THAN_MLPS: dict[str, tuple[int, ...]] = {"early": (0, 1, 2, 3), "late": (8, 9, 10, 11)}

# Heimersheim & Janiak 2023, as edges by its author in ACDC's acdc/docstring/utils.py.
_DOCSTRING_READS: dict[str, tuple[str, ...]] = {
    "a0.h5<v>": ("input",),
    "a1.h4<v>": ("input", "a0.h5"),
    "a1.h2<q>": ("input", "a0.h5"),
    "a1.h2<k>": ("input", "a0.h5"),
    "a2.h0<q>": ("input", "a0.h5"),
    "a2.h0<k>": ("input", "a0.h5"),
    "a2.h0<v>": ("a1.h4",),
    "a3.h0<q>": ("a1.h4",),
    "a3.h0<k>": ("a2.h0", "a1.h2"),
    "a3.h0<v>": ("input", "a0.h5"),
    "a3.h6<q>": ("a1.h4",),
    "a3.h6<k>": ("a2.h0", "a1.h2"),
    "a3.h6<v>": ("input", "a0.h5"),
    "logits": ("a3.h0", "a3.h6"),
}


def _writer(head: Head) -> str:
    return f"a{head[0]}.h{head[1]}"


def _readers(head: Head, kinds: str = "qkv") -> list[str]:
    return [f"{_writer(head)}<{kind}>" for kind in kinds]


def _ioi() -> Iterator[tuple[str, str]]:
    layers = range(_GPT2_SMALL.layers)
    mlps = [f"m{layer}" for layer in layers]
    heads = [head for group in IOI_HEADS.values() for head in group]
    # MLPs read and are read by each other, and `input` and every head reach every later MLP and the end ...
    for reader in mlps:
        for writer in ("input", *mlps, *map(_writer, heads)):
            yield writer, reader
    for writer in ("input", *mlps):
        yield writer, "logits"
    # ... and every head reads every earlier MLP, by q, k and v.
    for head in heads:
        for reader in _readers(head):
            for writer in mlps:
                yield writer, reader
    for source, target, kinds in _IOI_COMPOSITION:
        writers = ["input"] if source == "input" else [_writer(head) for head in IOI_HEADS[source]]
        readers = ["logits"]
        if target != "logits":
            readers = [reader for head in IOI_HEADS[target] for reader in _readers(head, kinds)]
        for writer in writers:
            for reader in readers:
                yield writer, reader


def _greater_than() -> Iterator[tuple[str, str]]:
    near, both, middle = GREATER_THAN_HEADS.values()
    early, late = ([f"m{layer}" for layer in group] for group in GREATER_THAN_MLPS.values())
    middle_readers = [reader for head in middle for reader in _readers(head)]
    for reader in (*(r for head in (*near, *both) for r in _readers(head)), *early):
        yield "input", reader
    for writer in (*map(_writer, middle), *late):
        yield writer, "logits"
    for group in (early, late):
        yield from ((writer, reader) for writer in group for reader in group)
    yield from ((_writer(head), mlp) for head in both for mlp in early)
    for writer in (*map(_writer, (*near, *both)), *early):
        yield from ((writer, reader) for reader in middle_readers)
    yield from ((_writer(head), mlp) for head in middle for mlp in late)
    # What queries of the middle heads may need: all MLPs before them.
    before = [f"m{layer}" for layer in range(max(layer for layer, _ in middle))]
    yield from ((writer, reader) for writer in before for reader in before)
    yield from ((writer, reader) for writer in before for head in middle for reader in _readers(head, "q"))


def _docstring() -> Iterator[tuple[str, str]]:
    for reader, writers in _DOCSTRING_READS.items():
        for writer in writers:
            yield writer, reader


@dataclass(frozen=True)
class _Canonical:
    """A published circuit: the graph it is of, its pairs (writer, reader), and where it is from.

    Pairs that are no edge of the graph, because the writer comes after the reader, are passed over.
    """

    spec: GraphSpec
    shape: str
    pairs: Callable[[], Iterable[tuple[str, str]]]
    source: str


_CANONICAL: dict[str, _Canonical] = {
    "ioi": _Canonical(
        _GPT2_SMALL, "GPT-2 small", _ioi, "Wang et al. 2022, arXiv 2211.00593; edges as in ACDC's repository"
    ),
    "greater_than": _Canonical(
        _GPT2_SMALL,
        "GPT-2 small",
        _greater_than,
        "Hanna et al. 2023, arXiv 2305.00586; edges as in ACDC's repository",
    ),
    "docstring": _Canonical(
        _ATTN_ONLY_4L,
        "the 4-layer 8-head attention-only model",
        _docstring,
        "Heimersheim & Janiak 2023, LessWrong; edges as in ACDC's repository",
    ),
}
CANONICAL_CIRCUITS = tuple(_CANONICAL)


def canonical_graph(name: str) -> Graph:
    """The graph that a published circuit is of.

    Args:
        name: One of `CANONICAL_CIRCUITS`.

    Raises:
        ConfigError: If the name is unknown.
    """
    return Graph(_find(name).spec)


def canonical_edges(name: str, graph: Graph) -> BoolArray:
    """A published circuit as an edge set.

    Args:
        name: One of `CANONICAL_CIRCUITS`.
        graph: A graph of the shape it was found in.

    Returns:
        Its edges. [readers, writers]

    Raises:
        ConfigError: If the name is unknown.
        CircuitError: If the graph has another shape.
    """
    canonical = _find(name)
    wanted = Graph(canonical.spec)
    names = [reader.name for reader in graph.readers] == [reader.name for reader in wanted.readers]
    if not names or not np.array_equal(graph.all_edges, wanted.all_edges):
        raise CircuitError(
            f"the {name} circuit is of {canonical.shape}; this graph has another shape "
            f"({graph.spec.layers} layers, {graph.spec.heads} heads)"
        )
    readers = {reader.name: index for index, reader in enumerate(graph.readers)}
    writers = {writer.name: index for index, writer in enumerate(graph.writers)}
    kept = graph.no_edges()
    for writer, reader in canonical.pairs():
        kept[readers[reader], writers[writer]] = True
    return kept & graph.all_edges


def canonical_circuit(name: str, graph: Graph | None = None) -> Circuit:
    """A published circuit as a `Circuit`, which can be saved and be a reference.

    The circuit has no scores, and names no weights: it fits every model of its shape.

    Args:
        name: One of `CANONICAL_CIRCUITS`.
        graph: The model's graph; by default that of `canonical_graph`.

    Returns:
        The circuit.

    Raises:
        ConfigError: If the name is unknown.
        CircuitError: If the graph has another shape.
    """
    graph = graph or canonical_graph(name)
    kept = canonical_edges(name, graph)
    return Circuit(
        graph=graph,
        kept=kept,
        scores=np.zeros(kept.shape),
        tested=graph.no_edges(),
        discovery={"method": "published", "source": _find(name).source},
    )


def _find(name: str) -> _Canonical:
    if name not in _CANONICAL:
        raise ConfigError(f"unknown canonical circuit {name!r}; known: {', '.join(CANONICAL_CIRCUITS)}")
    return _CANONICAL[name]
