"""Circuits in other tools' formats: EAP-IG / MIB JSON, lists of edges, CSV, GraphML, DOT, all plain text."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np

from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.edge_lists import is_edge_list, read_edge_list
from pahq_hf.circuit.files import output_path, write_text
from pahq_hf.circuit.fitting import fits, fitted, regrouped, uneven_edges
from pahq_hf.circuit.graph import Graph, GraphSpec
from pahq_hf.circuit.identity import ModelIdentity
from pahq_hf.circuit.json_reader import parse_json, read_regular
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

    Both know heads only: a key/value group that heads share becomes an edge to each of these heads. How many
    groups there are, and whether heads are coupled, is said in `cfg` beside what they read, for `from_mib`.

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
        **({"n_key_value_heads": spec.kv_groups} if spec.kv_groups != spec.heads else {}),
        **({"split_kv_groups": True} if spec.split_kv_groups else {}),
        **({"coupled_heads": True} if spec.coupled else {}),
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
        The circuit, every head with key and value readers of its own unless `to_mib` wrote the file and said
        how heads share them. Edges with a score other than 0 count as tested.

    Raises:
        CircuitError: If it is no such file, or names edges that its graph does not have.
    """
    return _from_mib(_read_document(Path(path)), Path(path))


def _from_mib(document: object, path: Path) -> Circuit:
    found = document if isinstance(document, dict) else {}
    cfg, edges = found.get("cfg"), found.get("edges")
    if not isinstance(cfg, dict) or not isinstance(edges, dict):
        raise CircuitError(f"{path} has no 'cfg' and 'edges': it is not an EAP-IG or MIB graph")
    try:
        heads = int(cfg["n_heads"])
        spec = GraphSpec(
            layers=int(cfg["n_layers"]),
            heads=heads,
            kv_groups=heads,
            parallel=bool(cfg.get("parallel_attn_mlp", False)),
        )
        told = replace(
            spec,
            kv_groups=int(cfg.get("n_key_value_heads", heads)),
            split_kv_groups=bool(cfg.get("split_kv_groups", False)),
            coupled=bool(cfg.get("coupled_heads", False)),
        )
    except (KeyError, TypeError, ValueError, OverflowError, ConfigError) as error:
        raise CircuitError(f"{path}: unusable cfg ({error!r})") from error
    graph = Graph(spec)
    kept, scores = graph.no_edges(), np.zeros(graph.all_edges.shape)
    for name, facts in edges.items():
        r, w = graph.parse_edge(name)
        try:
            scores[r, w] = _finite(float(facts.get("score") or 0.0))
            kept[r, w] = _said(facts.get("in_graph", False))
        except (AttributeError, TypeError, ValueError) as error:
            raise CircuitError(f"{path}: edge {name[:80]!r} has no usable score and in_graph") from error
    model = {"d_model": cfg["d_model"]} if isinstance(cfg.get("d_model"), int) else {}
    circuit = Circuit(graph, kept, scores, scores != 0, model, {})
    return circuit if told == spec else fitted(circuit, told)


def _said(value: object) -> bool:
    if value not in (True, False):  # 1 and 0 are
        raise ValueError(f"{value!r} is neither true nor false")
    return bool(value)


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError(f"{number} is no score")
    return number


# -- any of them ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Imported:
    """A circuit of another tool.

    Attributes:
        circuit: The circuit.
        folded: Edges of key/value groups that the file keeps for some heads of the group only.
    """

    circuit: Circuit
    folded: int = 0


def import_circuit(path: str | Path, spec: GraphSpec, identity: ModelIdentity) -> Imported:
    """Read another tool's circuit of a model.

    Edges of single heads are folded into the groups of keys and values that there are: one is kept where
    one of its heads keeps it.

    Args:
        path: A JSON file, as for `read_circuit_file`.
        spec: The shape of the model's graph.
        identity: What identifies the model.

    Returns:
        The circuit in that graph.

    Raises:
        CircuitError: If it is no such file, or of another model.
    """
    circuit, graph = read_circuit_file(path, spec), Graph(spec)
    if not fits(circuit, spec):
        own = circuit.graph.spec
        raise CircuitError(f"{path} is of another model: its graph is {own}, the model's is {spec}")
    found = replace(regrouped(circuit, graph), model=identity.to_json())
    return Imported(found, uneven_edges(circuit, graph))


def read_circuit_file(path: str | Path, spec: GraphSpec | None = None) -> Circuit:
    """Read another tool's circuit: an EAP-IG or MIB graph, or a list of edges (`edge_lists`).

    Args:
        path: A JSON file.
        spec: The shape of the model's graph, which a list of edges needs.

    Returns:
        The circuit, in the graph that the file tells, or of a list in one with a key and value for each head.

    Raises:
        CircuitError: If it is no such file.
    """
    path = Path(path)
    document = _read_document(path)
    if isinstance(document, dict) and "cfg" in document:
        return _from_mib(document, path)
    if not is_edge_list(document):
        raise CircuitError(f"{path} is no circuit: it has neither 'cfg' and 'edges' nor a list of edges")
    if spec is None:
        raise CircuitError(
            f"{path} is a list of edges, which does not say of what: give the model they are of (--model)"
        )
    try:
        return read_edge_list(document, spec)
    except CircuitError as error:
        raise CircuitError(f"{path}: {error}") from error


def _read_document(path: Path) -> object:
    """What a JSON file holds.

    Raises:
        CircuitError: If it is none.
    """
    try:
        document: object = parse_json(read_regular(path))
    except OSError as error:
        raise CircuitError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CircuitError(
            f"{path} is no EAP-IG or MIB graph, which is a JSON file with 'cfg' and 'edges', such as pahq "
            f"export --format mib writes, and no list of edges in JSON; CSV, GraphML and DOT are not read "
            f"back, nor are pickles ({error})"
        ) from error
    return document


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
