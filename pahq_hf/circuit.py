"""`Circuit`: the artefact of a discovery, and its files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pahq_hf.errors import CircuitError, ConfigError, RunError
from pahq_hf.files import write_atomically, write_text
from pahq_hf.graph import BoolArray, Graph, GraphSpec, edge_list

FORMAT_VERSION = 1
CIRCUIT_NAME = "circuit.json"
SCORES_NAME = "scores.safetensors"
DISCOVERY_NAME = "discovery.json"
CARD_NAME = "README.md"
_MAX_JSON_BYTES = 1 << 30
_SECTIONS = ("header", "arguments", "precision", "task", "edges", "metric", "seconds")


@dataclass
class Circuit:
    """A subgraph of a model, with the score of every edge.

    Attributes:
        graph: The model's whole graph.
        kept: Edges of the circuit. [readers, writers]
        scores: What removing an edge did to the metric when it was tested, else 0. [readers, writers]
        tested: Edges that were tested. [readers, writers]
        model: What identifies the base model: id, revision, family, width, fingerprint.
        discovery: What ran and what came out (`discovery.json`).
    """

    graph: Graph
    kept: BoolArray
    scores: NDArray[np.float64]
    tested: BoolArray
    model: dict[str, Any] = field(default_factory=dict)
    discovery: dict[str, Any] = field(default_factory=dict)

    # -- what is in it ----------------------------------------------------------------------------

    @property
    def edge_count(self) -> int:
        """Number of kept edges."""
        return int(self.kept.sum())

    @cached_property
    def live(self) -> BoolArray:
        """Kept edges on some path from `input` to `logits`. [readers, writers]"""
        return self.graph.live_edges(self.kept)

    @property
    def edges(self) -> list[tuple[str, float]]:
        """Kept edges by name with their scores, in model order."""
        return [(self.graph.edge_name(r, w), float(self.scores[r, w])) for r, w in edge_list(self.kept)]

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that a kept edge touches, in model order, `logits` last."""
        touched: BoolArray = np.any(self.kept, axis=0)
        for r in np.flatnonzero(self.kept.any(axis=1)):
            touched[list(self.graph.readers[r].nodes)] = True
        names = [writer.name for writer, inside in zip(self.graph.writers, touched, strict=True) if inside]
        return [*names, "logits"] if self.kept[self.graph.logits_reader].any() else names

    def to_networkx(self) -> nx.MultiDiGraph:
        """The circuit as a directed multigraph of nodes.

        An edge carries `score`, `reader` (its full name) and `kind` (q, k, v, mlp, logits). A shared
        key/value group becomes one edge to each of its heads.

        Returns:
            The graph.
        """
        result = nx.MultiDiGraph()
        result.add_nodes_from(self.nodes)
        for r, w in edge_list(self.kept):
            reader = self.graph.readers[r]
            targets = [self.graph.writers[node].name for node in reader.nodes] or ["logits"]
            for target in targets:
                result.add_edge(
                    self.graph.writers[w].name,
                    target,
                    score=float(self.scores[r, w]),
                    reader=reader.name,
                    kind=reader.kind,
                )
        return result

    def __repr__(self) -> str:
        """Model and size on one line."""
        name = self.model.get("base_model", "model")
        return f"Circuit({name!r}, {self.edge_count:,} of {self.graph.edge_count:,} edges)"

    # -- files ------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write circuit.json, scores.safetensors, discovery.json and README.md.

        Args:
            folder: Created if needed. An existing README.md is kept.

        Raises:
            RunError: If the folder cannot be written.
        """
        folder = make_folder(folder)
        write_atomically(folder / SCORES_NAME, self._write_scores)
        write_text(folder / DISCOVERY_NAME, json.dumps(self.discovery, indent=2) + "\n")
        if not (folder / CARD_NAME).exists():
            from pahq_hf.card import render_card

            write_text(folder / CARD_NAME, render_card(self))
        # Last: its presence says that the folder is complete.
        write_text(folder / CIRCUIT_NAME, json.dumps(self.to_json(), indent=1) + "\n")

    def to_json(self) -> dict[str, Any]:
        """The EAP-IG / MIB style document: config, nodes, kept edges."""
        spec = self.graph.spec
        return {
            "cfg": {
                "format_version": FORMAT_VERSION,
                "n_layers": spec.layers,
                "n_heads": spec.heads,
                "n_key_value_heads": spec.kv_groups,
                "split_kv_groups": spec.split_kv_groups,
                "has_mlps": spec.mlps,
                "parallel_attn_mlp": spec.parallel,
                "coupled_heads": spec.coupled,
                **self.model,
            },
            "nodes": {name: {"in_graph": True} for name in self.nodes},
            "edges": {name: {"score": score, "in_graph": True} for name, score in self.edges},
        }

    def _write_scores(self, path: Path) -> None:
        tensors: dict[str, NDArray[Any]] = {
            "score": self.scores,
            "in_graph": self.kept.astype(np.uint8),
            "tested": self.tested.astype(np.uint8),
            "exists": self.graph.all_edges.astype(np.uint8),
        }
        notes = {
            "axes": "readers, writers",
            "readers": json.dumps([reader.name for reader in self.graph.readers]),
            "writers": json.dumps([writer.name for writer in self.graph.writers]),
        }
        try:
            save_file(tensors, path, metadata=notes)
        except SafetensorError as error:
            raise RunError(f"cannot write the scores to {path.parent}: {error}") from error

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Circuit:
        """Read a circuit written by `save_pretrained`.

        Args:
            folder: Its folder.

        Returns:
            The circuit.

        Raises:
            CircuitError: If a file is missing, damaged, or of a newer format.
        """
        folder = Path(folder)
        document = _read_json(folder / CIRCUIT_NAME)
        cfg, edges = document.get("cfg"), document.get("edges")
        if not isinstance(cfg, dict) or not isinstance(edges, dict):
            raise CircuitError(f"{folder / CIRCUIT_NAME} has no 'cfg' and 'edges'; it is not a circuit")
        spec = _spec_from(cfg, folder)
        tensors = _read_scores(folder / SCORES_NAME, spec)
        graph = Graph(spec)
        kept = graph.no_edges()
        for name, facts in edges.items():
            if not isinstance(facts, dict):
                raise CircuitError(f"{folder / CIRCUIT_NAME}: edge {name[:80]!r} has no facts")
            if facts.get("in_graph", True):
                kept[graph.parse_edge(name)] = True
        if not np.array_equal(tensors["in_graph"].astype(bool), kept):
            raise CircuitError(f"{folder}: {SCORES_NAME} and {CIRCUIT_NAME} disagree on the kept edges")
        return cls(
            graph=graph,
            kept=kept,
            scores=tensors["score"].astype(np.float64),
            tested=tensors["tested"].astype(bool),
            model={key: value for key, value in cfg.items() if key not in _SPEC_KEYS},
            discovery=_read_discovery(folder / DISCOVERY_NAME),
        )


_SPEC_KEYS = {
    "format_version": FORMAT_VERSION,
    "n_layers": None,
    "n_heads": None,
    "n_key_value_heads": None,
    "split_kv_groups": False,
    "has_mlps": True,
    "parallel_attn_mlp": False,
    "coupled_heads": False,
}


def _spec_from(cfg: dict[str, Any], folder: Path) -> GraphSpec:
    version = cfg.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CircuitError(
            f"{folder} has circuit format {version}; this version reads up to {FORMAT_VERSION}"
        )
    try:
        return GraphSpec(
            layers=int(cfg["n_layers"]),
            heads=int(cfg["n_heads"]),
            kv_groups=int(cfg.get("n_key_value_heads", cfg["n_heads"])),
            mlps=bool(cfg.get("has_mlps", True)),
            parallel=bool(cfg.get("parallel_attn_mlp", False)),
            split_kv_groups=bool(cfg.get("split_kv_groups", False)),
            coupled=bool(cfg.get("coupled_heads", False)),
        )
    except (KeyError, TypeError, ValueError, OverflowError, ConfigError) as error:
        raise CircuitError(f"{folder / CIRCUIT_NAME}: unusable cfg ({error!r})") from error


def _read_scores(path: Path, spec: GraphSpec) -> dict[str, NDArray[Any]]:
    """The tensors of a circuit, checked against the shape of its graph before that is built."""
    try:
        tensors = load_file(path)
        found = {name: tensors[name] for name in ("score", "tested", "in_graph")}
    except (OSError, SafetensorError, KeyError) as error:
        raise CircuitError(f"cannot read {path}: {error}") from error
    mlp = int(spec.mlps)
    shape = (
        1 + spec.layers * (spec.heads + 2 * spec.kv_readers + mlp),
        1 + spec.layers * (spec.heads + mlp),
    )
    for name, tensor in found.items():
        if tensor.shape != shape:
            raise CircuitError(
                f"{path}: {name} has shape {tensor.shape}; the graph in {CIRCUIT_NAME} has {shape}"
            )
    return found


def _read_discovery(path: Path) -> dict[str, Any]:
    facts = _read_json(path) if path.exists() else {}
    for name in _SECTIONS:
        if not isinstance(facts.get(name, {}), dict):
            raise CircuitError(f"{path} is damaged: {name!r} does not hold an object")
    return facts


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CircuitError(f"{path} is larger than any circuit; not read")
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CircuitError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CircuitError(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict):
        raise CircuitError(f"{path} does not hold a JSON object")
    return document


def make_folder(folder: str | Path) -> Path:
    """Create an output folder.

    Raises:
        RunError: If it cannot be created or written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create the output folder {folder}: {error.strerror}") from error
    return folder
