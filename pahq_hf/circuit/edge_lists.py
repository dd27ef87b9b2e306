"""Circuits as lists of named edges: those of ACDC, AutoCircuit and Edge Pruning, as JSON.

Such a list says neither how many layers and heads there are nor what they share, so that a model's graph is
needed to read it. Names of nodes, each in its writing form and, of heads, with what is read:

- here and of EAP-IG: `a1.h2`, `a1.h2<q>`, `a1.kv0<k>`, `m1`, `input`, `logits`
- ACDC: `blocks.1.attn.hook_result[:, :, 2]`, `blocks.1.hook_q_input[:, :, 2]`, `blocks.1.hook_mlp_out` and
  `hook_mlp_in`, `blocks.0.hook_resid_pre`, `blocks.3.hook_resid_post`
- ACDC by Edge Pruning's script: `head.1.2`, `head.1.2.q`, `mlp.1`, `resid_post`, and in `extra` what
  reads the embedding
- AutoCircuit: `A1.2`, `A1.2.Q`, `MLP 1`, `Resid Start`, `Resid End`
- Edge Pruning: `a1.h2`, `a1.h2.q`, `m1`, `embeds`, `tok_embeds`, `pos_embeds`, `resid_post`
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.graph import EDGE_SEPARATOR, Graph, GraphSpec
from pahq_hf.errors import CircuitError

_INPUT = re.compile(
    r"input|(tok_|pos_)?embeds|Resid Start|hook_(pos_)?embed|blocks\.0\.hook_resid_pre|blocks\.0\.hook_embed"
)
_LOGITS = re.compile(r"logits|resid_post|Resid End|blocks\.(\d+)\.hook_resid_post")
_HEAD = re.compile(
    r"a(\d+)\.h(\d+)|A(\d+)\.(\d+)|head\.(\d+)\.(\d+)|blocks\.(\d+)\.attn\.hook_(?:result|z)\[(\d+)\]"
)
_MLP = re.compile(r"m(\d+)|MLP (\d+)|mlp\.(\d+)|blocks\.(\d+)\.(?:hook_mlp_(?:in|out)|mlp)")
_OF_HEAD = re.compile(
    r"a(\d+)\.h(\d+)<([qkv])>|A(\d+)\.(\d+)\.([QKV])|head\.(\d+)\.(\d+)\.([qkv])"
    r"|a(\d+)\.h(\d+)\.(q)|blocks\.(\d+)\.hook_([qkv])_input\[(\d+)\]"
)
_NUMBERED = re.compile(r"a(\d+)\.h(\d+)\.([kv])")  # of a head or a group
_OF_GROUP = re.compile(r"a(\d+)\.kv(\d+)<([kv])>")
_INDEXED = re.compile(r"(.*?)\s*\[([^\[\]]*)\]")
_IMPLICIT = re.compile(
    r"blocks\.\d+\.(attn\.hook_[qkvz]|attn\.hook_result|hook_mlp_out|hook_resid_pre)(\[\d+\])?"
)
_PAIRS = (("from", "to"), ("writer", "reader"), ("source", "target"), ("src", "dest"), ("parent", "child"))


@dataclass(frozen=True)
class NamedEdge:
    """An edge as a file names it.

    Attributes:
        writer: The node that writes.
        reader: The node that reads.
        score: Its score; 0 where there is none.
        kept: Whether it is in the circuit.
    """

    writer: str
    reader: str
    score: float = 0.0
    kept: bool = True


def is_edge_list(document: object) -> bool:
    """Whether a JSON document is a list of edges, under one of the names there are for that."""
    try:
        _entries(document)
    except CircuitError:
        return False
    return True


def read_edge_list(document: object, spec: GraphSpec) -> Circuit:
    """The circuit of a list of edges, a key and a value for every head.

    Args:
        document: What the JSON file holds.
        spec: The shape of the model's graph.

    Returns:
        The circuit, in a graph of heads; edges with a score other than 0 count as tested.

    Raises:
        CircuitError: If it is no list of edges, or names one that the graph does not have.
    """
    edges = [edge for edge in map(_read_entry, *_numbered(document)) if edge is not None]
    graph = Graph(replace(spec, kv_groups=spec.heads, split_kv_groups=False))
    kept, scores = graph.no_edges(), np.zeros(graph.all_edges.shape)
    names = _Names(graph, spec, _numbers_heads(edges, spec))
    for edge in edges:
        writer = names.writer(edge.writer)
        readers = names.readers(edge.reader)
        rows = [] if writer is None else [r for r in readers if writer < graph.prefix[r]]
        if writer is None or not rows or len(rows) < len(readers):
            name = f"{edge.writer}{EDGE_SEPARATOR}{edge.reader}"
            raise CircuitError(f"{name[:80]!r} is not an edge of this model's graph")
        kept[rows, writer] |= edge.kept
        scores[rows, writer] = edge.score
    if _leaves_input_out(edges):
        kept[:, 0] = True
    return Circuit(graph, kept, scores, scores != 0)


def _leaves_input_out(edges: list[NamedEdge]) -> bool:
    """Whether a list is of Edge Pruning without nodes for embeddings, which every reader reads then."""
    own = re.compile(r"[am]\d+(\.h\d+)?->resid_post|.*->a\d+\.h\d+\.[qkv]")
    of_it = any(own.fullmatch(f"{edge.writer}{EDGE_SEPARATOR}{edge.reader}") for edge in edges)
    return of_it and not any(_INPUT.fullmatch(edge.writer) for edge in edges)


def _numbers_heads(edges: list[NamedEdge], spec: GraphSpec) -> bool:
    """Whether a number in `a1.h2.k` is a head's: Edge Pruning numbers groups, some of its variants heads."""
    numbers = [_NUMBERED.fullmatch(edge.reader) for edge in edges]
    return any(found is not None and _number(found[2]) >= spec.kv_groups for found in numbers)


# -- nodes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Names:
    """What nodes are called, in a graph of heads."""

    graph: Graph
    spec: GraphSpec
    numbers_heads: bool

    def writer(self, name: str) -> int | None:
        """The writer of a name; None if there is none."""
        if _INPUT.fullmatch(name):
            return 0
        head, mlp = _HEAD.fullmatch(name), _MLP.fullmatch(name)
        if head is not None:
            layer, index = map(_number, _groups(head))
            return self.graph.head_writer(layer, index) if self._has(layer, index) else None
        if mlp is not None and self.spec.mlps and self._has(layer := _number(_groups(mlp)[0])):
            return self.graph.mlp_writer(layer)
        return None

    def readers(self, name: str) -> list[int]:
        """The readers of a name; all three of a head whose queries, keys and values are one."""
        last = _LOGITS.fullmatch(name)
        if last is not None and last[1] in (None, str(self.spec.layers - 1)):
            return [self.graph.logits_reader]
        found, mlp, head = _OF_HEAD.fullmatch(name), _MLP.fullmatch(name), _HEAD.fullmatch(name)
        shared = _OF_GROUP.fullmatch(name) or _NUMBERED.fullmatch(name)
        if mlp is not None:
            layer = _number(_groups(mlp)[0])
            return list(self.graph.layer_readers(layer, "mlp")) if self._has(layer) else []
        if found is not None:
            first, *more = _groups(found)
            kind, index = more if more[0] in "qkv" else more[::-1]
            return self._of(first, kind.lower(), [_number(index)])
        if shared is not None:
            number = _number(shared[2])
            by_head = self.numbers_heads and _NUMBERED.fullmatch(name)
            size = 1 if by_head else self.spec.heads // self.spec.kv_groups
            return self._of(shared[1], shared[3], list(range(number * size, (number + 1) * size)))
        if head is not None:
            layer_text, index = _groups(head)
            return [r for kind in "qkv" for r in self._of(layer_text, kind, [_number(index)])]
        return []

    def _of(self, layer_text: str, kind: str, heads: list[int]) -> list[int]:
        layer = _number(layer_text)
        if not all(self._has(layer, head) for head in heads):
            return []
        return [self.graph.reader_index(f"a{layer}.h{head}<{kind}>") for head in heads]

    def _has(self, layer: int, head: int = 0) -> bool:
        return layer < self.spec.layers and head < self.spec.heads


def _groups(found: re.Match[str]) -> list[str]:
    """The groups that took part in a match."""
    return [text for text in found.groups() if text is not None]


def _number(text: str) -> int:
    """A number of a layer or a head; long ones are beyond all of them."""
    return int(text) if len(text) < 7 else 10**7


# -- entries ----------------------------------------------------------------------------------------


def _numbered(document: object) -> tuple[list[object], range]:
    entries = _entries(document)
    return entries, range(1, len(entries) + 1)


def _entries(document: object) -> list[object]:
    """The entries of a document that is a list of edges.

    Raises:
        CircuitError: If it is none.
    """
    if isinstance(document, Mapping):
        if isinstance(document.get("original"), list):  # of ACDC, with the edges of the embedding in `extra`
            extra = document.get("extra", [])
            return [*document["original"], *(extra if isinstance(extra, list) else [])]
        if isinstance(document.get("edges"), list | Mapping):
            return _entries(document["edges"])
        if document and all(isinstance(name, str) and EDGE_SEPARATOR in name for name in document):
            return [[name, facts] for name, facts in document.items()]
    if isinstance(document, list) and document:
        return document
    raise CircuitError("there is no list of edges")


def _read_entry(entry: object, number: int) -> NamedEdge | None:
    """An edge of a list; None where it is one that every circuit has.

    Raises:
        CircuitError: If it is none.
    """
    names, facts = _split(entry, number)
    writer, reader = (_plain(name, number) for name in names)
    if _IMPLICIT.fullmatch(reader) or re.fullmatch(r"blocks\.\d+\.hook_mlp_in", writer):
        return None  # inside a head or an MLP
    score, kept = _facts(facts, number)
    return NamedEdge(writer, reader, score, kept)


def _split(entry: object, number: int) -> tuple[tuple[object, object], object]:
    """The names of an edge, of who writes and who reads, and what else is said of it.

    Raises:
        CircuitError: If it is no edge.
    """
    if isinstance(entry, str):
        writer, arrow, reader = entry.partition(EDGE_SEPARATOR)
        if arrow:
            return (writer, reader), None
    if isinstance(entry, Mapping):
        for writing, reading in _PAIRS:
            if writing in entry and reading in entry:
                return (entry[writing], entry[reading]), entry
    if isinstance(entry, list):
        if len(entry) == 2 and all(isinstance(name, str) and EDGE_SEPARATOR not in name for name in entry):
            return (entry[0], entry[1]), None
        if len(entry) == 4 and isinstance(entry[0], str) and isinstance(entry[2], str):
            # ACDC's own order: who reads, its index, who writes, its index.
            return ((entry[2], entry[3]), (entry[0], entry[1])), None
        if len(entry) == 2 and isinstance(entry[0], str | list):
            return (_split(entry[0], number)[0], entry[1])
    raise CircuitError(f"entry {number:,} is no edge: {' '.join(repr(entry).split()):.60}")


def _plain(name: object, number: int) -> str:
    """A node's name, with its head's number in brackets where it is given by an index of a tensor.

    Raises:
        CircuitError: If it is none, or is about single positions.
    """
    index: object = None
    if isinstance(name, tuple):
        name, index = name
    if isinstance(name, str):
        found = _INDEXED.fullmatch(name)
        if found is not None:
            name, index = found[1], found[2].split(",")
        if isinstance(index, str):
            index = index.strip("[]()").split(",")
        places = index if isinstance(index, list) else [] if index is None else [index]
        numbers = [str(place).strip() for place in places]
        *before, last = numbers or [""]
        if any(place.isdigit() for place in before):
            raise CircuitError(f"entry {number:,} is an edge at single positions, {name[:60]!r}: not read")
        return f"{name}[{last}]" if last.isdigit() else name
    raise CircuitError(f"entry {number:,} has no name of a node: {' '.join(repr(name).split()):.60}")


def _facts(facts: object, number: int) -> tuple[float, bool]:
    """Score of an edge, and whether it is in.

    Raises:
        CircuitError: If there is something else.
    """
    values = (
        facts if isinstance(facts, Mapping) else {"in_graph" if isinstance(facts, bool) else "score": facts}
    )
    score, inside = values.get("score"), values.get("in_graph", True)
    if score is None:
        score = 0.0
    if isinstance(score, bool) or not isinstance(score, int | float) or not isinstance(inside, bool):
        raise CircuitError(f"entry {number:,} has no usable score and in_graph")
    try:
        value = float(score)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise CircuitError(f"entry {number:,} has a score that is no finite number")
    return value, inside
