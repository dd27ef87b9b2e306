"""What a folder holds of a circuit, and how it is written and read so that no damage goes unseen."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from pahq_hf.circuit.files import (
    CIRCUIT_NAME,
    DISCOVERY_NAME,
    JOURNAL_NAME,
    MEANS_NAME,
    SCORES_NAME,
    SWEEP_PREFIX,
    Write,
    text_writer,
    write_together,
)
from pahq_hf.circuit.gates import fits
from pahq_hf.circuit.graph import Graph, GraphSpec, edge_list
from pahq_hf.circuit.identity import ModelIdentity
from pahq_hf.circuit.json_reader import MAX_BYTES, check_regular, parse_json, read_json
from pahq_hf.circuit.nodes import NODE_TENSORS, node_tensors, read_nodes
from pahq_hf.circuit.run_record import RunRecord
from pahq_hf.circuit.scored_edges import ScoredEdges
from pahq_hf.errors import CircuitError, ConfigError, RunError, first_line

logger = logging.getLogger(__name__)
FORMAT_VERSION = 1
_SCORE_NAMES = ("score", "tested", "in_graph")
# What safetensors raises of a file that is none, and of numbers that numpy does not have: bf16, f8, f4.
_NO_ARRAYS = (SafetensorError, TypeError, ValueError, KeyError, AttributeError)

_SPEC_KEYS = (
    "format_version",
    "n_layers",
    "n_heads",
    "n_key_value_heads",
    "split_kv_groups",
    "has_mlps",
    "parallel_attn_mlp",
    "coupled_heads",
)


@dataclass(frozen=True)
class StoredCircuit:
    """A circuit as its files have it.

    Attributes:
        edges: Its graph, edges and scores (circuit.json, scores.safetensors).
        model: What identifies the base model (`cfg` in circuit.json).
        discovery: What ran and what came out (discovery.json).
        means: Mean activations (means.safetensors).
    """

    edges: ScoredEdges
    model: dict[str, Any] = field(default_factory=dict)
    discovery: dict[str, Any] = field(default_factory=dict)
    means: dict[str, NDArray[np.float32]] | None = None

    def to_json(self) -> dict[str, Any]:
        """The EAP-IG / MIB style document: config, nodes, kept edges."""
        spec, edges = self.edges.graph.spec, self.edges
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
            "nodes": {name: {"in_graph": True, **edges.more_of_node(name)} for name in edges.nodes},
            "edges": {
                edges.graph.edge_name(r, w): {
                    "score": float(edges.scores[r, w]),
                    "in_graph": True,
                    **edges.more_of(r, w),
                }
                for r, w in edge_list(edges.kept)
            },
        }


# -- writing ----------------------------------------------------------------------------------------


def write_circuit(stored: StoredCircuit, folder: Path) -> None:
    """Write a circuit's files; nothing is replaced before all of them are on disk.

    Args:
        stored: The circuit.
        folder: A folder that is there.

    Raises:
        RunError: If one cannot be written.
    """
    checksums: dict[str, str] = {}

    def tensors(name: str, write: Write) -> dict[Path, Write]:
        def write_and_sum(path: Path) -> None:
            write(path)
            checksums[name] = _checksum(path)

        return {folder / name: write_and_sum}

    def write_facts(path: Path) -> None:  # after what it has the checksums of
        text_writer(_json(stored.discovery | {"checksums": checksums}, indent=2))(path)

    means = stored.means
    files = tensors(SCORES_NAME, lambda path: _write_scores(stored.edges, path))
    if means is not None:
        files |= tensors(MEANS_NAME, lambda path: _save_tensors(means, path))
    files[folder / DISCOVERY_NAME] = write_facts
    # Last: its presence says that the folder is complete.
    files[folder / CIRCUIT_NAME] = text_writer(_json(stored.to_json(), indent=1))
    write_together(files)


def _write_scores(edges: ScoredEdges, path: Path) -> None:
    graph = edges.graph
    tensors: dict[str, NDArray[Any]] = {
        "score": edges.scores,
        "in_graph": edges.kept.astype(np.uint8),
        "tested": edges.tested.astype(np.uint8),
        "exists": graph.all_edges.astype(np.uint8),
    }
    if edges.estimated is not None:
        tensors["estimated"] = edges.estimated.astype(np.uint8)
    if edges.found_by is not None:
        tensors["found_by"] = edges.found_by.astype(np.uint8)
    if edges.frequencies is not None:
        tensors["frequency"] = edges.frequencies.astype(np.float64)
    if edges.scored_nodes is not None:
        tensors |= node_tensors(edges.scored_nodes)
    layout = {
        "axes": "readers, writers",
        "readers": [reader.name for reader in graph.readers],
        "writers": [writer.name for writer in graph.writers],
        "checksums": DISCOVERY_NAME,  # where this file's is
    }
    # One key: safetensors writes several in a random order, and files could not be compared.
    _save_tensors(tensors, path, {"layout": json.dumps(layout)})


# -- reading ----------------------------------------------------------------------------------------


def read_circuit(folder: Path) -> StoredCircuit:
    """Read a circuit's files.

    Args:
        folder: Where they are.

    Raises:
        CircuitError: If one is missing, damaged, of a newer format, or says something else than another.
    """
    _refuse_sweep(folder)
    document = read_json(folder / CIRCUIT_NAME)
    cfg, edges = document.get("cfg"), document.get("edges")
    if not isinstance(cfg, dict) or not isinstance(edges, dict):
        raise CircuitError(f"{folder / CIRCUIT_NAME} has no 'cfg' and 'edges'; it is not a circuit")
    spec = _spec_from(cfg, folder)
    discovery = _read_discovery(folder)
    tensors = _read_scores(folder / SCORES_NAME, spec)
    graph = Graph(spec)
    kept = graph.no_edges()
    for name, facts in edges.items():
        if not isinstance(facts, dict):
            raise CircuitError(f"{folder / CIRCUIT_NAME}: edge {name[:80]!r} has no facts")
        place = graph.parse_edge(name)
        kept[place] |= bool(facts.get("in_graph", True))
        if "score" in facts and not _is_number(facts["score"], tensors["score"][place]):
            raise CircuitError(f"{folder}: {SCORES_NAME} and {CIRCUIT_NAME} disagree on the score of {name}")
    if not np.array_equal(tensors["in_graph"].astype(bool), kept):
        raise CircuitError(f"{folder}: {SCORES_NAME} and {CIRCUIT_NAME} disagree on the kept edges")
    tested = tensors["tested"].astype(bool)
    estimated = tensors["estimated"].astype(bool) if "estimated" in tensors else None
    if estimated is not None and (estimated & ~tested).any():
        raise CircuitError(f"{folder / SCORES_NAME}: an edge is marked as estimated and not as tested")
    found_by = tensors["found_by"].astype(np.uint8) if "found_by" in tensors else None
    if found_by is not None and not fits(found_by, kept):
        raise CircuitError(f"{folder / SCORES_NAME}: 'found_by' does not tell who found which kept edges")
    frequencies = tensors["frequency"].astype(np.float64) if "frequency" in tensors else None
    if frequencies is not None and not ((frequencies >= 0) & (frequencies <= graph.all_edges)).all():
        raise CircuitError(f"{folder / SCORES_NAME}: 'frequency' has no shares of resamples from 0 to 1")
    return StoredCircuit(
        ScoredEdges(
            graph,
            kept,
            tensors["score"].astype(np.float64),
            tested,
            estimated,
            found_by,
            frequencies,
            read_nodes(tensors, document.get("nodes"), graph, kept, folder),
        ),
        model={key: value for key, value in cfg.items() if key not in _SPEC_KEYS},
        discovery=discovery,
        means=_load_tensors(folder / MEANS_NAME) if os.path.exists(folder / MEANS_NAME) else None,
    )


def _refuse_sweep(folder: Path) -> None:
    """A sweep's folder holds circuits and is none.

    Raises:
        CircuitError: Naming them, if it is one.
    """
    if os.path.exists(folder / CIRCUIT_NAME):
        return
    try:
        found = sorted(path.parent.name for path in folder.glob(f"{SWEEP_PREFIX}*/{CIRCUIT_NAME}"))
    except OSError:  # a name that is too long, for one
        return
    if found:
        raise CircuitError(
            f"{folder} holds a sweep, not one circuit: give the folder of a threshold in it, one of "
            f"{', '.join(found)}"
        )


def _spec_from(cfg: dict[str, Any], folder: Path) -> GraphSpec:
    known = {*_SPEC_KEYS, *ModelIdentity.names()}
    unknown = sorted(set(cfg) - known)
    if unknown:
        logger.warning("%s: unknown keys in cfg are ignored: %s", folder, ", ".join(k[:40] for k in unknown))
    version = cfg.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CircuitError(
            f"{folder} has circuit format {version!r:.40}; this version reads up to {FORMAT_VERSION}"
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
    tensors = _load_tensors(path)
    missing = [name for name in _SCORE_NAMES if name not in tensors]
    if missing:
        raise CircuitError(f"cannot read {path}: it has no {missing[0]!r}")
    # Only some searches have these; earlier versions had none.
    names = [*_SCORE_NAMES, *(name for name in ("estimated", "found_by", "frequency") if name in tensors)]
    found = {name: tensors[name] for name in names}
    mlp = int(spec.mlps)
    shape = (
        1 + spec.layers * (spec.heads + 2 * spec.kv_readers + mlp),
        1 + spec.layers * (spec.heads + mlp),
    )
    found |= {name: tensors[name] for name in NODE_TENSORS if name in tensors}
    for name, tensor in found.items():
        if tensor.dtype.kind not in "buif":
            raise CircuitError(f"{path}: {name} has numbers of type {tensor.dtype}")
        wanted = shape[1:] if name in NODE_TENSORS else shape
        if tensor.shape != wanted:
            raise CircuitError(
                f"{path}: {name} has shape {tensor.shape}; the graph in {CIRCUIT_NAME} has {wanted}"
            )
    return found


def _read_discovery(folder: Path) -> dict[str, Any]:
    """What ran, if that is known; the tensors beside it are checked by the checksums in it."""
    path = folder / DISCOVERY_NAME
    facts = read_json(path) if os.path.exists(path) else {}
    try:
        RunRecord.from_json(facts)
    except CircuitError as error:
        raise CircuitError(f"{path} is damaged: {error}") from error
    if not isinstance(facts.get("checksums", {}), dict):
        raise CircuitError(f"{path} is damaged: 'checksums' does not hold an object")
    checksums = facts.pop("checksums", None)
    if checksums is None and os.path.exists(path) and _is_listed(folder / SCORES_NAME):
        raise CircuitError(
            f"{path} is damaged: the checksums of scores and means that were in it are gone; {_mend(folder)}"
        )
    for name in (SCORES_NAME, MEANS_NAME):
        if name not in (checksums or {}):
            continue
        if not os.path.exists(folder / name):
            raise CircuitError(f"{folder / name} is missing: {DISCOVERY_NAME} lists it; {_mend(folder)}")
        if _checksum(folder / name) != checksums[name]:
            raise CircuitError(f"{folder / name} is damaged: its checksum is not that in {DISCOVERY_NAME}")
    return facts


def _mend(folder: Path) -> str:
    """What to do about a run's damaged file."""
    if os.path.exists(folder / JOURNAL_NAME):
        return f"put it back, or remove {CIRCUIT_NAME} and --resume to make it again from {JOURNAL_NAME}"
    return "put it back, or make the circuit again in another folder"


def _is_listed(path: Path) -> bool:
    """Whether scores were written together with a list of checksums; earlier versions had none."""
    try:
        check_regular(path)
        with safe_open(path, framework="numpy") as file:
            layout = parse_json((file.metadata() or {}).get("layout", "{}"))
    except (OSError, SafetensorError, ValueError):
        return False  # whoever reads them says what is wrong
    return isinstance(layout, dict) and layout.get("checksums") == DISCOVERY_NAME


def _is_number(found: object, value: float) -> bool:
    return isinstance(found, (int, float)) and (found == value or (np.isnan(found) and np.isnan(value)))


# -- tensors ----------------------------------------------------------------------------------------


def _load_tensors(path: Path) -> dict[str, NDArray[Any]]:
    try:
        check_regular(path)
        if path.stat().st_size > MAX_BYTES:
            raise CircuitError(f"{path} is larger than any circuit; not read")
        tensors: dict[str, NDArray[Any]] = load_file(path)
    except OSError as error:
        raise CircuitError(f"cannot read {path}: {error.strerror or error}") from error
    except _NO_ARRAYS as error:
        raise CircuitError(f"cannot read {path}: {first_line(error)}") from error
    return tensors


def _save_tensors(tensors: dict[str, NDArray[Any]], path: Path, notes: dict[str, str] | None = None) -> None:
    try:
        save_file(tensors, path, metadata=notes)
    except SafetensorError as error:
        raise RunError(f"cannot write tensors to {path.parent}: {error}") from error


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        check_regular(path)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise CircuitError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def _json(document: dict[str, Any], indent: int) -> str:
    return json.dumps(document, indent=indent) + "\n"
