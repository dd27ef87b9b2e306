"""Nine circuits for MIB's leaderboard: their sizes, which edges they have, and what stands in the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pahq_hf import Circuit
from pahq_hf.circuit.fitting import fitted
from pahq_hf.circuit.graph import Graph, GraphSpec
from pahq_hf.circuit.interchange import from_mib
from pahq_hf.errors import CircuitError, ConfigError, RunError
from pahq_hf.evaluation.mib_circuits import export_mib_circuits
from tests.helpers import run_main

PERCENT = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


def scored(spec: GraphSpec, discovery: dict[str, Any] | None = None) -> Circuit:
    graph = Graph(spec)
    scores = np.where(graph.all_edges, np.random.default_rng(0).normal(size=graph.all_edges.shape), 0.0)
    kept = graph.no_edges()
    kept[graph.logits_reader, 1:3] = True
    model = {"base_model": "me/model", "d_model": 16}
    return Circuit(graph, kept, scores, graph.all_edges.copy(), model, discovery or {"method": "eap-ig"})


def read(folder: Path) -> list[Circuit]:
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"circuit_{p}.json" for p in PERCENT)
    return [from_mib(folder / f"circuit_{p}.json") for p in PERCENT]


@pytest.mark.parametrize("rank", ["signed", "absolute"])
def test_each_has_the_best_edges_that_its_share_allows(rank: Any, tmp_path: Path) -> None:
    circuit = scored(GraphSpec(4, 4, 4))
    sizes = export_mib_circuits(circuit, tmp_path / "ioi_gpt2", rank)
    total, found = circuit.graph.edge_count, read(tmp_path / "ioi_gpt2")
    assert sizes == [int(p / 100 * total) for p in PERCENT] == [each.edge_count for each in found]
    values = np.abs(circuit.scores) if rank == "absolute" else circuit.scores
    for each in found[3:]:
        assert values[each.kept].min() > values[circuit.graph.all_edges & ~each.kept].max()


def test_shared_groups_count_as_mib_counts_them(tmp_path: Path) -> None:
    circuit = scored(GraphSpec(3, 8, 2))
    sizes = export_mib_circuits(circuit, tmp_path)
    found = read(tmp_path)
    total = GraphSpec(3, 8, 8).edge_count  # every head with keys and values of its own
    by_heads = [fitted(each, GraphSpec(3, 8, 2, split_kv_groups=True)) for each in found]
    assert total == by_heads[0].graph.edge_count > circuit.graph.edge_count
    assert sizes == [each.edge_count for each in by_heads]
    for percent, size in zip(PERCENT, sizes, strict=True):
        assert percent / 100 * total - 4 < size <= percent / 100 * total


@pytest.mark.parametrize(
    ("spec", "edges"),
    [
        (GraphSpec(12, 12, 12), 32_491),
        (GraphSpec(24, 14, 14), 179_749),
        (GraphSpec(26, 8, 8), 74_218),
        (GraphSpec(32, 32, 32), 1_592_881),
    ],
    ids=["gpt2", "qwen2.5", "gemma2", "llama3"],
)
def test_mibs_models_have_as_many_edges_as_its_program_says(spec: GraphSpec, edges: int) -> None:
    assert spec.edge_count == edges


def test_what_a_greedy_search_kept_comes_first(tmp_path: Path) -> None:
    circuit = scored(GraphSpec(4, 4, 4), {"method": "acdc"})
    export_mib_circuits(circuit, tmp_path)
    assert all((circuit.kept & ~each.kept).sum() == 0 for each in read(tmp_path)[3:])


def test_files_have_memberships_and_no_scores(tmp_path: Path) -> None:
    export_mib_circuits(scored(GraphSpec(2, 2, 2)), tmp_path)
    document = json.loads((tmp_path / "circuit_50.json").read_text(encoding="utf-8"))
    assert document["cfg"] == {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 16}
    assert {*document} == {"cfg", "nodes", "edges"}
    assert all(
        {*facts} == {"in_graph"} for facts in (*document["edges"].values(), *document["nodes"].values())
    )
    used = {
        end.partition("<")[0]
        for name, facts in document["edges"].items()
        if facts["in_graph"]
        for end in name.split("->")
    }
    assert used == {name for name, facts in document["nodes"].items() if facts["in_graph"]}


def test_other_circuits_in_the_folder(tmp_path: Path) -> None:
    circuit = scored(GraphSpec(2, 2, 2))
    export_mib_circuits(circuit, tmp_path)
    export_mib_circuits(circuit, tmp_path)  # the same nine again
    (tmp_path / "other.pt").write_bytes(b"")
    with pytest.raises(RunError, match=r"has other\.pt, which MIB would read as a circuit, too"):
        export_mib_circuits(circuit, tmp_path)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank must be signed or absolute"):
        export_mib_circuits(scored(GraphSpec(2, 2, 2)), tmp_path, "best")  # type: ignore[arg-type]
    with pytest.raises(CircuitError, match="MLP in every layer"):
        export_mib_circuits(scored(GraphSpec(2, 2, 2, mlps=False)), tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    circuit = scored(GraphSpec(4, 4, 4))
    circuit.save_pretrained(tmp_path / "run")
    ask = ["export", str(tmp_path / "run"), "--format", "mib-circuits", "--out"]
    assert run_main(*ask, str(tmp_path / "ioi_gpt2"), "--rank", "absolute", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["format"] == "mib-circuits" and facts["edges"] == [
        c.edge_count for c in read(tmp_path / "ioi_gpt2")
    ]
    assert run_main(*ask, str(tmp_path / "run")) == 2  # where there is a circuit.json
    assert "choose another folder" in capsys.readouterr().err
