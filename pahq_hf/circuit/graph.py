"""The residual-stream graph: writers, readers and edges as index arithmetic (docs/semantics.md, section 1).

Writers are numbered in the order they add to the stream: `input`, then layer by layer the heads and
the MLP. Whatever a reader sees was written before it, so its in-edges are always a *prefix* of the
writers. An edge set is a boolean matrix over readers and writers; edge `(r, w)` exists when
`w < prefix[r]`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pahq_hf.errors import CircuitError, ConfigError

ReaderKind = Literal["q", "k", "v", "mlp", "logits"]
READER_KINDS: tuple[ReaderKind, ...] = get_args(ReaderKind)
ReaderOrder = Literal["acdc", "head"]
BoolArray = NDArray[np.bool_]
EDGE_SEPARATOR = "->"
# The most that a graph may have; Llama 3.1 405B has 16,128 heads, and 4 * 10**8 edges with readers of each.
_MOST_HEADS, _MOST_EDGES = 2**17, 2**29


@dataclass(frozen=True)
class GraphSpec:
    """What of a model decides its graph.

    Attributes:
        layers: Number of decoder layers.
        heads: Query heads per layer.
        kv_groups: Key/value groups per layer; equals `heads` without grouped-query attention.
        mlps: Whether layers have an MLP (attention-only models do not).
        parallel: Whether attention and MLP of a layer read the same stream.
        split_kv_groups: Give every query head key and value readers of its own.
        coupled: Whether the heads of a layer depend on each other, through a norm that spans them: of
            the attention's output (Gemma 2), or of all queries or keys (OLMo 2).
    """

    layers: int
    heads: int
    kv_groups: int
    mlps: bool = True
    parallel: bool = False
    split_kv_groups: bool = False
    coupled: bool = False

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.kv_groups) < 1:
            raise ConfigError("a graph needs at least one layer, head and key/value group")
        if self.heads % self.kv_groups:
            raise ConfigError(f"{self.heads} heads cannot be shared evenly by {self.kv_groups} groups")
        if self.layers * self.heads > _MOST_HEADS or self.edge_count > _MOST_EDGES:
            raise ConfigError(
                f"{self.layers:,} layers of {self.heads:,} heads are more than any language model has"
            )

    @property
    def kv_readers(self) -> int:
        """Key (and value) readers per layer."""
        return self.heads if self.split_kv_groups else self.kv_groups

    @property
    def edge_count(self) -> int:
        """Number of edges, by formula."""
        layers, mlps = self.layers, int(self.mlps)
        per_layer = self.heads + mlps
        before = layers + per_layer * layers * (layers - 1) // 2  # writers before each layer, over all layers
        own = 0 if self.parallel else mlps * layers * self.heads
        return 1 + layers * per_layer + before * (self.heads + 2 * self.kv_readers + mlps) + own


@dataclass(frozen=True)
class Writer:
    """A node that adds to the residual stream. `head` is None for the MLP, `layer` -1 for the input."""

    name: str
    layer: int
    head: int | None = None

    @property
    def is_input(self) -> bool:
        """Whether this is the embedding output."""
        return self.layer < 0


@dataclass(frozen=True)
class Reader:
    """A place that reads the residual stream.

    Attributes:
        name: Name as in EAP-IG and MIB.
        layer: Decoder layer; the number of layers for `logits`.
        kind: What is computed from it.
        index: Query head, or key/value reader, within its layer; 0 for MLP and logits.
        nodes: Writers this reader belongs to; empty for `logits`.
        feeds: Writers that depend on it: its nodes, and where heads are coupled all heads of the layer.
    """

    name: str
    layer: int
    kind: ReaderKind
    index: int
    nodes: tuple[int, ...]
    feeds: tuple[int, ...]


class Graph:
    """Ordered writers and readers of one model, and the edges between them.

    Args:
        spec: The model's shape.

    Attributes:
        spec: The model's shape.
        writers: All writers in model order.
        readers: All readers in model order: per layer q, k, v, then the MLP; last `logits`.
        prefix: How many writers each reader sees. [readers]
    """

    def __init__(self, spec: GraphSpec) -> None:
        self.spec = spec
        self.writers = tuple(self._make_writers())
        self.readers = tuple(self._make_readers())
        self.prefix = np.array([self._prefix(reader) for reader in self.readers])
        self.prefix.setflags(write=False)  # all who have the graph share it
        self._writer_index = {writer.name: i for i, writer in enumerate(self.writers)}
        self._reader_index = {reader.name: i for i, reader in enumerate(self.readers)}

    # -- construction ---------------------------------------------------------------------------

    def _make_writers(self) -> Iterator[Writer]:
        yield Writer("input", -1)
        for layer in range(self.spec.layers):
            for head in range(self.spec.heads):
                yield Writer(f"a{layer}.h{head}", layer, head)
            if self.spec.mlps:
                yield Writer(f"m{layer}", layer)

    def _make_readers(self) -> Iterator[Reader]:
        spec = self.spec
        per_head = spec.kv_readers == spec.heads
        for layer in range(spec.layers):
            together = tuple(self.head_writer(layer, head) for head in range(spec.heads))
            for head in range(spec.heads):
                own = (together[head],)
                yield Reader(f"a{layer}.h{head}<q>", layer, "q", head, own, together if spec.coupled else own)
            kinds: tuple[ReaderKind, ReaderKind] = ("k", "v")
            for kind in kinds:
                for index in range(spec.kv_readers):
                    name = f"a{layer}.{'h' if per_head else 'kv'}{index}<{kind}>"
                    heads = self.heads_of_kv(index)
                    nodes = tuple(together[head] for head in heads)
                    yield Reader(name, layer, kind, index, nodes, together if spec.coupled else nodes)
            if spec.mlps:
                mlp = (self.mlp_writer(layer),)
                yield Reader(f"m{layer}", layer, "mlp", 0, mlp, mlp)
        yield Reader("logits", spec.layers, "logits", 0, (), ())

    def _prefix(self, reader: Reader) -> int:
        before_layer = self.head_writer(reader.layer, 0)
        own_heads = reader.kind == "mlp" and not self.spec.parallel
        return before_layer + (self.spec.heads if own_heads else 0)

    # -- index arithmetic -----------------------------------------------------------------------

    def head_writer(self, layer: int, head: int) -> int:
        """Writer index of query head `head` of `layer`."""
        return 1 + layer * (self.spec.heads + int(self.spec.mlps)) + head

    def mlp_writer(self, layer: int) -> int:
        """Writer index of the MLP of `layer`."""
        if not self.spec.mlps:
            raise ConfigError("this model has no MLPs")
        return self.head_writer(layer, self.spec.heads)

    def heads_of_kv(self, index: int) -> tuple[int, ...]:
        """Query heads that use key/value reader `index` of their layer."""
        size = self.spec.heads // self.spec.kv_readers
        return tuple(range(index * size, (index + 1) * size))

    def kv_of_head(self, head: int) -> int:
        """Key/value reader index that query head `head` uses."""
        return head // (self.spec.heads // self.spec.kv_readers)

    def layer_readers(self, layer: int, kind: ReaderKind) -> range:
        """Reader indices of one kind in one layer, in order."""
        first = layer * self._readers_per_layer
        heads, kvs = self.spec.heads, self.spec.kv_readers
        start, count = {
            "q": (first, heads),
            "k": (first + heads, kvs),
            "v": (first + heads + kvs, kvs),
            "mlp": (first + heads + 2 * kvs, int(self.spec.mlps)),
            "logits": (len(self.readers) - 1, 1),
        }[kind]
        return range(start, start + count)

    @property
    def _readers_per_layer(self) -> int:
        return self.spec.heads + 2 * self.spec.kv_readers + int(self.spec.mlps)

    @property
    def logits_reader(self) -> int:
        """Index of the last reader."""
        return len(self.readers) - 1

    # -- edges ----------------------------------------------------------------------------------

    @property
    def edge_count(self) -> int:
        """Number of edges."""
        return int(self.prefix.sum())

    @cached_property
    def all_edges(self) -> BoolArray:
        """Every edge; read-only, copy it to change it. [readers, writers]"""
        edges: BoolArray = np.arange(len(self.writers))[None, :] < self.prefix[:, None]
        edges.setflags(write=False)
        return edges

    def no_edges(self) -> BoolArray:
        """An empty edge set. [readers, writers]"""
        return np.zeros((len(self.readers), len(self.writers)), dtype=bool)

    def edge_name(self, reader: int, writer: int) -> str:
        """`writer->reader`, as in EAP-IG's JSON."""
        return f"{self.writers[writer].name}{EDGE_SEPARATOR}{self.readers[reader].name}"

    def parse_edge(self, name: str) -> tuple[int, int]:
        """Indices `(reader, writer)` of an edge's name.

        Raises:
            CircuitError: If the name is not an edge of this graph.
        """
        writer, _, reader = name.partition(EDGE_SEPARATOR)
        r, w = self._reader_index.get(reader), self._writer_index.get(writer)
        if r is None or w is None or w >= self.prefix[r]:
            raise CircuitError(f"{name[:80]!r} is not an edge of this model's graph")
        return r, w

    def reader_index(self, name: str) -> int:
        """Index of a reader by name."""
        return self._reader_index[name]

    def writer_index(self, name: str) -> int:
        """Index of a writer by name."""
        return self._writer_index[name]

    def match_readers(self, pattern: str | None) -> BoolArray:
        """Readers whose name matches a comma-separated list of globs.

        Args:
            pattern: For instance `"logits,m*"`; None matches all.

        Returns:
            A mask over the readers. [readers]

        Raises:
            ConfigError: If a glob matches no reader, or it is no text.
        """
        if pattern is None:
            return np.ones(len(self.readers), dtype=bool)
        given: object = pattern
        if not isinstance(given, str):
            raise ConfigError(f"readers must be globs such as 'logits,m*'; got {given!r}")
        mask = np.zeros(len(self.readers), dtype=bool)
        for glob in pattern.split(","):
            hits = np.array([fnmatch.fnmatchcase(reader.name, glob.strip()) for reader in self.readers])
            if not hits.any():
                example = ", ".join(reader.name for reader in self.readers[-3:])
                raise ConfigError(f"no reader matches {glob.strip()!r}; readers are named like {example}")
            mask |= hits
        return mask

    # -- traversal ------------------------------------------------------------------------------

    def reader_order(self, order: ReaderOrder = "acdc") -> list[int]:
        """Reader indices in the order ACDC visits them, from the output to the input.

        Args:
            order: `"acdc"`: logits; per layer from the top the MLP, all v, all k, all q, heads
                descending. `"head"`: logits; per layer the MLP, then head by head descending q, k, v;
                a group of heads that shares keys and values comes as one block (its q descending,
                then its k and v), which changes the active component least often.

        Returns:
            All reader indices, once each.
        """
        visit = [self.logits_reader]
        for layer in reversed(range(self.spec.layers)):
            visit += self.layer_readers(layer, "mlp")
            q, k, v = (self.layer_readers(layer, kind) for kind in ("q", "k", "v"))
            if order == "acdc":
                visit += [*reversed(v), *reversed(k), *reversed(q)]
            elif order == "head":
                for kv in reversed(range(self.spec.kv_readers)):
                    visit += [q[head] for head in reversed(self.heads_of_kv(kv))]
                    visit += [k[kv], v[kv]]
            else:
                raise ConfigError(f"order must be 'acdc' or 'head', not {order!r}")
        return visit

    def in_edges(self, reader: int) -> range:
        """Writers seen by a reader in the order ACDC tests them: latest first, `input` last."""
        return range(int(self.prefix[reader]) - 1, -1, -1)

    def has_out_edge(self, kept: BoolArray, reader: int) -> bool:
        """Whether what this reader feeds still reaches anyone. Always true for `logits`."""
        feeds = self.readers[reader].feeds
        return not feeds or bool(kept[:, list(feeds)].any())

    def live_edges(self, kept: BoolArray) -> BoolArray:
        """Kept edges that lie on some path from `input` to `logits`.

        A head conducts when any of its q, k, v readers receives something and someone reads it.

        Args:
            kept: An edge set. [readers, writers]

        Returns:
            Its live part. [readers, writers]
        """
        return kept & self._alive(kept)

    def addable_edges(self, kept: BoolArray) -> BoolArray:
        """Edges that would lie on some path from `input` to `logits` if they came back alone.

        Args:
            kept: An edge set. [readers, writers]

        Returns:
            Those that are not in it. [readers, writers]
        """
        return self.all_edges & ~kept & self._alive(kept)

    def _alive(self, kept: BoolArray) -> BoolArray:
        """Whether a writer is reached from `input` and a reader reaches `logits`. [readers, writers]"""
        fed = np.zeros(len(self.writers), dtype=bool)
        fed[0] = True
        for r, reader in enumerate(self.readers):  # model order is topological
            if reader.feeds and (kept[r] & fed).any():
                fed[list(reader.feeds)] = True
        read = np.zeros(len(self.writers), dtype=bool)
        for r in reversed(range(len(self.readers))):
            feeds = list(self.readers[r].feeds)
            if not feeds or read[feeds].any():
                read |= kept[r]
        needed = np.array([not r.feeds or bool(read[list(r.feeds)].any()) for r in self.readers])
        alive: BoolArray = fed[None, :] & needed[:, None]
        return alive


def edge_list(kept: BoolArray) -> Sequence[tuple[int, int]]:
    """Index pairs `(reader, writer)` of an edge set, in model order."""
    return [(int(r), int(w)) for r, w in np.argwhere(kept)]
