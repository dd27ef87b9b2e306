"""Circuits in other tools' formats: EAP-IG / MIB JSON, CSV, GraphML and Graphviz DOT, all plain text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np

from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.files import output_path, read_json, write_text
from pahq_hf.circuit.graph import Graph, GraphSpec
from pahq_hf.circuit.render.palette import LIGHT
from pahq_hf.circuit.terminal import printable
from pahq_hf.errors import CircuitError, ConfigError

_CSV_COLUMNS = ("writer", "reader", "kind", "score", "in_graph", "tested", "estimated")


def export(circuit: Circuit, path: str | Path, fmt: str) -> None:
    """Write a circuit in another tool's format.

    Args:
        circuit: The circuit.
        path: The file.
        fmt: `mib` (EAP-IG and MIB JSON), `csv` (every edge), `graphml` or `dot` (kept edges).

    Raises:
        RunError: If the file cannot be written.
        ConfigError: If the format is unknown.
        CircuitError: If the format cannot hold this circuit.
    """
    if fmt not in _WRITERS:
        raise ConfigError(f"format must be one of {', '.join(_WRITERS)}, not {fmt!r}")
    write_text(output_path(path), _WRITERS[fmt](circuit))


# -- EAP-IG and MIB ---------------------------------------------------------------------------------


def to_mib(circuit: Circuit) -> dict[str, Any]:
    """The document that EAP-IG's `Graph.from_json` and the MIB benchmark read: every node, every edge.

    Both know heads only: a key/value group that heads share becomes an edge to each of these heads.

    Args:
        circuit: The circuit.

    Returns:
        `{"cfg": ..., "nodes": ..., "edges": ...}`.

    Raises:
        CircuitError: If the model has no MLPs, which EAP-IG's graphs always have.
    """
    spec = circuit.graph.spec
    if not spec.mlps:
        raise CircuitError("EAP-IG's graphs have an MLP in every layer; this model has none: export csv")
    kept_nodes = set(circuit.nodes)
    names = [writer.name for writer in circuit.graph.writers] + ["logits"]
    cfg = {
        "n_layers": spec.layers,
        "n_heads": spec.heads,
        "parallel_attn_mlp": spec.parallel,
        "d_model": circuit.identity.d_model,
    }
    return {
        "cfg": cfg,
        "nodes": {
            name: {"in_graph": name in kept_nodes, **circuit.scored.more_of_node(name)} for name in names
        },
        "edges": dict(_mib_edges(circuit)),
    }


def _mib_edges(circuit: Circuit) -> Iterator[tuple[str, dict[str, Any]]]:
    graph, edges = circuit.graph, circuit.scored
    for r, reader in enumerate(graph.readers):
        inside = edges.targets(r)  # of whole nodes not every head that reads there is
        targets = {reader.name: bool(inside)}
        if reader.kind in ("k", "v"):
            names = [graph.writers[node].name for node in reader.nodes]
            targets = {f"{name}<{reader.kind}>": name in inside for name in names}
        for w in range(int(graph.prefix[r])):
            for target, is_in in targets.items():
                facts = {"score": float(circuit.scores[r, w]), "in_graph": is_in and bool(circuit.kept[r, w])}
                yield f"{graph.writers[w].name}->{target}", facts


def from_mib(path: str | Path) -> Circuit:
    """Read an EAP-IG or MIB graph.

    Args:
        path: A JSON file with `cfg`, `nodes` and `edges`.

    Returns:
        The circuit, every head with key and value readers of its own. Edges with a score other than 0
        count as tested.

    Raises:
        CircuitError: If it is no such file, or names edges that its graph does not have.
    """
    document = _read_graph(Path(path))
    cfg, edges = document.get("cfg"), document.get("edges")
    if not isinstance(cfg, dict) or not isinstance(edges, dict):
        raise CircuitError(f"{path} has no 'cfg' and 'edges': it is not an EAP-IG or MIB graph")
    try:
        spec = GraphSpec(
            layers=int(cfg["n_layers"]),
            heads=int(cfg["n_heads"]),
            kv_groups=int(cfg["n_heads"]),
            parallel=bool(cfg.get("parallel_attn_mlp", False)),
        )
    except (KeyError, TypeError, ValueError, OverflowError, ConfigError) as error:
        raise CircuitError(f"{path}: unusable cfg ({error!r})") from error
    graph = Graph(spec)
    kept, scores = graph.no_edges(), np.zeros(graph.all_edges.shape)
    for name, facts in edges.items():
        r, w = graph.parse_edge(name)
        try:
            scores[r, w] = float(facts.get("score") or 0.0)
            kept[r, w] = bool(facts.get("in_graph", False))
        except (AttributeError, TypeError, ValueError) as error:
            raise CircuitError(f"{path}: edge {name[:80]!r} has no usable score and in_graph") from error
    model = {"d_model": cfg["d_model"]} if isinstance(cfg.get("d_model"), int) else {}
    return Circuit(graph, kept, scores, scores != 0, model, {})


def _read_graph(path: Path) -> dict[str, Any]:
    """The document of a graph.

    Raises:
        CircuitError: If there is none.
    """
    try:
        return read_json(path)
    except CircuitError as error:
        if not isinstance(error.__cause__, ValueError | RecursionError):
            raise
        raise CircuitError(
            f"{path} is no EAP-IG or MIB graph, which is a JSON file with 'cfg' and 'edges', such as pahq "
            f"export --format mib writes; CSV, GraphML and DOT are not read back ({error.__cause__})"
        ) from error


# -- edges as rows ----------------------------------------------------------------------------------


def _to_csv(circuit: Circuit) -> str:
    """Every edge of the graph, one per row."""
    graph, text = circuit.graph, io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_CSV_COLUMNS)
    for r, reader in enumerate(graph.readers):
        for w in range(int(graph.prefix[r])):
            estimated = circuit.scored.is_estimate(r, w)
            tested = bool(circuit.tested[r, w]) and not estimated
            facts = float(circuit.scores[r, w]), int(circuit.kept[r, w]), int(tested), int(estimated)
            table.writerow((graph.writers[w].name, reader.name, reader.kind, *facts))
    return text.getvalue()


# -- kept edges as graphs ---------------------------------------------------------------------------


def _to_graphml(circuit: Circuit) -> str:
    return "\n".join(nx.generate_graphml(circuit.to_networkx())) + "\n"


def _to_dot(circuit: Circuit) -> str:
    lines = ["digraph circuit {", "  rankdir=BT;", '  node [shape=box, fontname="sans-serif"];']
    lines += [f"  {_quoted(name)};" for name in circuit.nodes]
    for writer, target, facts in circuit.to_networkx().edges(data=True):
        look = f'color="{LIGHT.edges[facts["kind"]]}", label="{facts["kind"]} {facts["score"]:.3g}"'
        lines.append(f"  {_quoted(writer)} -> {_quoted(target)} [{look}];")
    return printable("\n".join([*lines, "}"]) + "\n")


def _quoted(name: str) -> str:
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


_WRITERS: dict[str, Callable[[Circuit], str]] = {
    "mib": lambda circuit: json.dumps(to_mib(circuit), indent=1) + "\n",
    "csv": _to_csv,
    "graphml": _to_graphml,
    "dot": _to_dot,
}
