"""The graph that a search over whole nodes sees."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.graph import BoolArray, Graph, Reader, ReaderOrder
from pahq_hf.errors import ConfigError


class NodeGraph(Graph):
    """A graph whose edges are the heads and MLPs of another one.

    In the place of readers stand *blocks*, the heads of a layer or its MLP, and an "edge" `(block, node)` is
    a node of the block. Writers have their numbers. `input` is in no block, so that it is never removed.

    Args:
        whole: The model's graph.

    Attributes:
        whole: The model's graph.
    """

    def __init__(self, whole: Graph) -> None:
        super().__init__(whole.spec)
        self.whole = whole
        self.readers = tuple(self._make_blocks())
        self.prefix = np.array([block.nodes[-1] + 1 for block in self.readers])
        self.prefix.setflags(write=False)
        self._reader_index = {block.name: i for i, block in enumerate(self.readers)}

    def _make_blocks(self) -> Iterator[Reader]:
        spec = self.spec
        for layer in range(spec.layers):
            heads = tuple(self.head_writer(layer, head) for head in range(spec.heads))
            yield Reader(f"a{layer}", layer, "v", 0, heads, ())
            if spec.mlps:
                yield Reader(f"m{layer}", layer, "mlp", 0, (self.mlp_writer(layer),), ())

    # -- nodes as edges ---------------------------------------------------------------------------

    @property
    def edge_count(self) -> int:
        """Number of heads and MLPs."""
        return len(self.writers) - 1

    @cached_property
    def all_edges(self) -> BoolArray:
        """Every node in its block; read-only. [blocks, writers]"""
        edges = self.no_edges()
        for number, block in enumerate(self.readers):
            edges[number, list(block.nodes)] = True
        edges.setflags(write=False)
        return edges

    def edge_name(self, reader: int, writer: int) -> str:
        """A node's name."""
        return self.writers[writer].name

    def in_edges(self, reader: int) -> range:
        """Nodes of a block in the order in which they are tested: the last head first."""
        nodes = self.readers[reader].nodes
        return range(nodes[-1], nodes[0] - 1, -1)

    def match_readers(self, pattern: str | None) -> BoolArray:
        """All blocks.

        Raises:
            ConfigError: If a pattern is given.
        """
        if pattern is not None:
            raise ConfigError("readers choose among edges: level node has none")
        return np.ones(len(self.readers), dtype=bool)

    def reader_order(self, order: ReaderOrder = "acdc") -> list[int]:
        """Blocks from the output to the input: of each layer the MLP, then the heads."""
        return list(reversed(range(len(self.readers))))

    def has_out_edge(self, kept: BoolArray, reader: int) -> bool:
        """Always: `logits` reads every node."""
        return True

    def live_edges(self, kept: BoolArray) -> BoolArray:
        """All that are kept: every node reads `input` and is read by `logits`. [blocks, writers]"""
        return kept.copy()

    def addable_edges(self, kept: BoolArray) -> BoolArray:
        """All that are not kept. [blocks, writers]"""
        absent: BoolArray = self.all_edges & ~kept
        return absent

    # -- to and fro -------------------------------------------------------------------------------

    def gathered(self, values: NDArray[np.generic]) -> NDArray[np.float64]:
        """Values of nodes in their blocks by node; 0 for `input`. [blocks, writers] -> [writers]"""
        found: NDArray[np.float64] = np.where(self.all_edges, values, 0.0).sum(axis=0)
        return found

    def spread(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values of nodes in their blocks. [writers] -> [blocks, writers]"""
        found: NDArray[np.float64] = np.where(self.all_edges, values[None, :], 0.0)
        return found

    def opened(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """What each edge of the model's graph has of its writer's share; `input` has all.

        What a node that is out reads stays: it goes nowhere, and says what the node would write.

        Args:
            shares: 1 for a node that is in, 0 for one that is out. [blocks, writers]

        Returns:
            [readers, writers]
        """
        nodes = self.gathered(shares)
        nodes[0] = 1.0
        found: NDArray[np.float64] = np.where(self.whole.all_edges, nodes[None, :], 0.0)
        return found
