"""Nine circuits of one ranking, as the leaderboard of the MIB benchmark takes them.

A submission has one folder for each task and model, named such as `ioi_gpt2`, with the scores of all edges in
one file (`pahq export --format mib`), or with nine circuits of at most .1, .2, .5, 1, 2, 5, 10, 20 and 50 %
of the edges (hannamw/MIB-circuit-track, README). MIB's program reads every `.json` and `.pt` of the folder,
and puts the circuits in order by their size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np

from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.files import make_folder, text_writer, write_together
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.circuit.interchange import to_mib
from pahq_hf.errors import ConfigError, RunError
from pahq_hf.evaluation.curves import MIB_FRACTIONS, rank_edges

Rank = Literal["signed", "absolute"]
SHARES = MIB_FRACTIONS[:-1]  # all but the whole model


def file_name(share: float) -> str:
    """The file of a circuit of at most such a share of the edges."""
    return f"circuit_{100 * share:g}.json"


def export_mib_circuits(circuit: Circuit, folder: str | Path, rank: Rank = "signed") -> list[int]:
    """Write the nine circuits that a ranking makes.

    Sizes count as MIB's graph has edges: one for each head that shares a key or value group.

    Args:
        circuit: Its scores rank the edges; those of a greedy search rank what it kept first.
        folder: The folder, such as `ioi_gpt2`; other circuits must not be in it.
        rank: `signed`, from what helps most to what hurts most, as MIB's CPR asks; or `absolute`, by size, as
            its CMD does.

    Returns:
        Their sizes, in edges of MIB's graph.

    Raises:
        ConfigError: If the ranking is none.
        CircuitError: If the model has no MLPs, which MIB's graphs always have.
        RunError: If the folder has other circuits, or cannot be written.
    """
    if rank not in ("signed", "absolute"):
        raise ConfigError(f"rank must be signed or absolute, not {rank!r}")
    where, names = make_folder(folder), [file_name(share) for share in SHARES]
    others = sorted(path.name for path in where.iterdir() if path.suffix in (".json", ".pt"))
    strange = [name for name in others if name not in names]
    if strange:
        raise RunError(
            f"{where} has {strange[0]}, which MIB would read as a circuit, too: choose another folder"
        )
    circuits = mib_circuits(circuit, rank)
    texts = [json.dumps(_without_scores(circuit, kept)) + "\n" for kept in circuits]
    write_together({where / name: text_writer(text) for name, text in zip(names, texts, strict=True)})
    return [_size(circuit, kept) for kept in circuits]


def mib_circuits(circuit: Circuit, rank: Rank = "signed") -> list[BoolArray]:
    """The best edges of a ranking, as many as each of MIB's shares allows; arguments as above.

    Returns:
        Each [readers, writers].
    """
    graph = circuit.graph
    first = circuit.kept if circuit.record.ranks_kept_first else None
    ranked = rank_edges(graph, circuit.scores, absolute=rank == "absolute", first=first)
    sizes = np.cumsum(_weights(circuit)[ranked[:, 0]])
    found = []
    for share in SHARES:
        count = int(np.searchsorted(sizes, int(share * sizes[-1]), side="right"))
        kept = graph.no_edges()
        kept[ranked[:count, 0], ranked[:count, 1]] = True
        found.append(kept)
    return found


def _weights(circuit: Circuit) -> np.ndarray:
    """How many edges of MIB's graph an edge into each reader is. [readers]"""
    shared = ("k", "v")
    return np.array([len(r.nodes) if r.kind in shared else 1 for r in circuit.graph.readers])


def _size(circuit: Circuit, kept: BoolArray) -> int:
    return int((_weights(circuit)[:, None] * kept).sum())


def _without_scores(circuit: Circuit, kept: BoolArray) -> dict[str, object]:
    document = to_mib(Circuit(circuit.graph, kept, circuit.scores, circuit.tested, circuit.model, {}))
    edges = {name: {"in_graph": facts["in_graph"]} for name, facts in document["edges"].items()}
    return {**document, "edges": edges}
