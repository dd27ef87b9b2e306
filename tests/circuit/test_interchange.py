"""Circuits in other tools' formats, and two circuits against each other."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest

from pahq_hf import Circuit
from pahq_hf.circuit.comparison import compare_circuits
from pahq_hf.circuit.graph import Graph, GraphSpec
from pahq_hf.circuit.interchange import export, from_mib, to_mib
from pahq_hf.errors import CircuitError, ConfigError
from tests.helpers import random_edges, run_main

SPECS = {
    "heads": GraphSpec(2, 3, 3),
    "groups": GraphSpec(2, 4, 2),
    "one group": GraphSpec(1, 4, 1),
    "split": GraphSpec(2, 4, 2, split_kv_groups=True),
    "parallel": GraphSpec(2, 2, 2, parallel=True),
    "coupled": GraphSpec(2, 4, 2, coupled=True),
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def random_circuit(spec: GraphSpec, seed: int = 0, share: float = 0.3) -> Circuit:
    graph, draw = Graph(spec), np.random.default_rng(seed)
    tested = random_edges(graph, 0.8, seed + 1)
    scores = np.where(tested, draw.normal(size=tested.shape), 0.0)
    kept = random_edges(graph, share, seed) & tested
    return Circuit(graph, kept, scores, tested, {"base_model": "me/model", "d_model": 16}, {})


def per_head(circuit: Circuit, values: Any) -> dict[tuple[str, str], Any]:
    """Values of edges by writer and head: a group's edge counts for each of its heads."""
    graph, found = circuit.graph, {}
    for r, reader in enumerate(graph.readers):
        for w in range(int(graph.prefix[r])):
            for target in [graph.writers[n].name for n in reader.nodes] or ["logits"]:
                found[graph.writers[w].name, f"{target}{reader.kind}"] = values[r, w]
    return found


def arrays(circuit: Circuit) -> tuple[Any, Any, Any]:
    return circuit.kept, circuit.scores, circuit.tested


def foreign(circuit: Circuit, path: Path) -> Circuit:
    """A circuit through a file that says of its graph what EAP-IG says, and no more."""
    document = to_mib(circuit)
    for name in ("n_key_value_heads", "split_kv_groups", "coupled_heads"):
        document["cfg"].pop(name, None)
    path.write_text(json.dumps(document))
    return from_mib(path)


# -- EAP-IG and MIB ---------------------------------------------------------------------------------


@specs
def test_every_edge_comes_back_from_the_mib_schema(spec: GraphSpec, tmp_path: Path) -> None:
    circuit = random_circuit(spec)
    export(circuit, tmp_path / "mib.json", "mib")
    back = from_mib(tmp_path / "mib.json")
    assert back.graph.spec == spec and back.model["d_model"] == 16
    for ours, theirs in zip((back.kept, back.scores, back.tested), arrays(circuit), strict=True):
        assert np.array_equal(ours, theirs)
    plain = foreign(circuit, tmp_path / "plain.json")  # as EAP-IG itself would have written it
    assert plain.graph.spec == GraphSpec(spec.layers, spec.heads, spec.heads, parallel=spec.parallel)
    for ours, theirs in zip((plain.kept, plain.scores, plain.tested), arrays(circuit), strict=True):
        assert per_head(plain, ours) == per_head(circuit, theirs)


@specs
def test_the_document_is_what_eap_ig_reads(spec: GraphSpec) -> None:
    """Its `Graph.from_json` makes all nodes and edges from cfg, then looks each of them up."""
    document = to_mib(random_circuit(spec))
    layers, heads = spec.layers, spec.heads
    assert document["cfg"] == {
        "n_layers": layers,
        "n_heads": heads,
        "parallel_attn_mlp": spec.parallel,
        "d_model": 16,
        **({"n_key_value_heads": spec.kv_groups} if spec.kv_groups < heads else {}),
        **({"split_kv_groups": True} if spec.split_kv_groups else {}),
        **({"coupled_heads": True} if spec.coupled else {}),
    }
    names = ["input"]
    edges = set()
    for layer in range(layers):
        row = [f"a{layer}.h{head}" for head in range(heads)]
        edges |= {f"{w}->{head}<{kind}>" for w in names for head in row for kind in "qkv"}
        seen = names if spec.parallel else [*names, *row]
        edges |= {f"{w}->m{layer}" for w in seen}
        names = [*names, *row, f"m{layer}"]
    edges |= {f"{w}->logits" for w in names}
    assert set(document["edges"]) == edges
    assert list(document["nodes"]) == [*names, "logits"]
    for facts in document["edges"].values():
        assert set(facts) == {"score", "in_graph"} and isinstance(facts["in_graph"], bool)


def test_models_without_mlps_have_no_mib_graph(tmp_path: Path) -> None:
    with pytest.raises(CircuitError, match=r"MLP in every layer.*csv"):
        export(random_circuit(GraphSpec(2, 2, 2, mlps=False)), tmp_path / "x.json", "mib")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("document", "match"),
    [
        ("[]", "not an EAP-IG or MIB graph"),
        ("{}", "not an EAP-IG or MIB graph"),
        ('{"cfg": {}, "edges": {}}', "unusable cfg"),
        ('{"cfg": {"n_layers": 1, "n_heads": 0}, "edges": {}}', "unusable cfg"),
        ('{"cfg": {"n_layers": 1, "n_heads": 2}, "edges": {"m0->input": {}}}', "not an edge"),
        ('{"cfg": {"n_layers": 1, "n_heads": 2}, "edges": {"input->m0": []}}', "no usable score"),
        (
            '{"cfg": {"n_layers": 1, "n_heads": 2}, "edges": {"input->m0": {"in_graph": "false"}}}',
            "no usable score and in_graph",
        ),
        ('{"cfg": {"n_layers": 1, "n_heads": 2}, "edges": {"input->m0": {"score": "x"}}}', "no usable"),
    ],
)
def test_other_documents_are_refused(tmp_path: Path, document: str, match: str) -> None:
    path = tmp_path / "graph.json"
    path.write_text(document)
    with pytest.raises(CircuitError, match=match):
        from_mib(path)


def test_what_is_no_json_is_told_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "circuit.csv"
    export(random_circuit(SPECS["heads"]), path, "csv")
    with pytest.raises(CircuitError, match=r"is no EAP-IG or MIB graph.*CSV, GraphML and DOT are not read"):
        from_mib(path)
    with pytest.raises(CircuitError, match="cannot read"):
        from_mib(tmp_path / "nothing.json")


# -- other formats ----------------------------------------------------------------------------------


@specs
def test_csv_has_every_edge(spec: GraphSpec, tmp_path: Path) -> None:
    circuit = random_circuit(spec)
    circuit.estimated = circuit.tested & (circuit.scores > 0)
    export(circuit, tmp_path / "edges.csv", "csv")
    with (tmp_path / "edges.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == circuit.graph.edge_count
    for row in rows:
        r, w = circuit.graph.parse_edge(f"{row['writer']}->{row['reader']}")
        assert float(row["score"]) == circuit.scores[r, w]
        assert bool(int(row["in_graph"])) == circuit.kept[r, w]
        assert bool(int(row["estimated"])) == circuit.estimated[r, w]
        assert bool(int(row["tested"])) == (circuit.tested[r, w] and not circuit.estimated[r, w])
        assert row["kind"] == circuit.graph.readers[r].kind


@specs
def test_graphml_is_the_networkx_graph(spec: GraphSpec, tmp_path: Path) -> None:
    circuit = random_circuit(spec)
    export(circuit, tmp_path / "circuit.graphml", "graphml")
    back, ours = nx.read_graphml(tmp_path / "circuit.graphml"), circuit.to_networkx()
    assert set(back.nodes) == set(ours.nodes)

    def facts(graph: Any) -> list[Any]:
        return sorted((a, b, d["reader"], d["kind"], d["score"]) for a, b, d in graph.edges(data=True))

    assert facts(back) == facts(ours) and facts(ours)


def test_dot_names_every_node_and_edge(tmp_path: Path) -> None:
    circuit = random_circuit(SPECS["groups"])
    export(circuit, tmp_path / "circuit.dot", "dot")
    text = (tmp_path / "circuit.dot").read_text()
    assert text.startswith("digraph circuit {") and text.endswith("}\n")
    assert text.count(" -> ") == circuit.to_networkx().number_of_edges()
    assert all(f'"{name}"' in text for name in circuit.nodes)
    if shutil.which("dot"):
        done = subprocess.run(["dot", "-Tsvg", str(tmp_path / "circuit.dot")], capture_output=True)
        assert done.returncode == 0, done.stderr


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mib, csv, graphml, dot"):
        export(random_circuit(SPECS["heads"]), tmp_path / "x", "pt")  # type: ignore[arg-type]


# -- comparison -------------------------------------------------------------------------------------


def test_comparison_counts_by_hand() -> None:
    a, b = (random_circuit(SPECS["groups"], seed) for seed in (0, 0))
    b.kept[:] = False
    edges = np.argwhere(a.kept)
    for r, w in edges[: len(edges) // 2]:
        b.kept[r, w] = True
    extra = tuple(np.argwhere(a.graph.all_edges & ~a.kept)[0])
    b.kept[extra] = True
    facts = compare_circuits(a.scored, b.scored)
    half = len(edges) // 2
    assert facts["edges"] == {
        "first": len(edges),
        "second": half + 1,
        "both": half,
        "only first": len(edges) - half,
        "only second": 1,
    }
    assert facts["jaccard"] == half / (len(edges) + 1)
    assert facts["scores"]["pearson"] == pytest.approx(1)
    assert facts["scores"]["tested by both"] == a.tested.sum()
    assert "estimated by one" not in facts["scores"]
    b.estimated = b.tested & (b.scores > 0)
    told = compare_circuits(a.scored, b.scored)["scores"]
    both = a.tested & b.tested
    assert told["estimated by one"] == (both & b.estimated).sum() > 0
    assert told["tested by both"] == both.sum() - told["estimated by one"]


def test_the_ends_of_every_circuit_are_no_overlap() -> None:
    """Two circuits without a head or MLP in common share nothing, although all have input and logits."""
    a, b = (random_circuit(SPECS["heads"], 0) for _ in range(2))
    graph = a.graph
    for circuit, writer in ((a, 1), (b, 2)):
        circuit.kept[:] = False
        circuit.kept[graph.logits_reader, [0, writer]] = True
    assert compare_circuits(a.scored, b.scored)["jaccard of nodes"] == 0
    b.kept[graph.logits_reader, 1] = True
    assert compare_circuits(a.scored, b.scored)["jaccard of nodes"] == 0.5


def test_correlations_are_those_of_the_textbook() -> None:
    a, b = random_circuit(SPECS["heads"], 0), random_circuit(SPECS["heads"], 1)
    b.tested = a.tested
    b.scores = np.where(a.tested, np.exp(a.scores), 0)  # another scale, the same order
    facts = compare_circuits(a.scored, b.scored)["scores"]
    x, y = a.scores[a.tested], b.scores[a.tested]
    assert facts["spearman"] == pytest.approx(1) and facts["pearson"] < 0.99
    assert facts["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    b.scores[:] = 0
    assert compare_circuits(a.scored, b.scored)["scores"]["pearson"] is None


def test_circuits_of_different_graphs_are_not_compared() -> None:
    with pytest.raises(CircuitError, match="different graphs"):
        compare_circuits(random_circuit(SPECS["heads"]).scored, random_circuit(SPECS["groups"]).scored)


# -- command line -----------------------------------------------------------------------------------


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = random_circuit(SPECS["groups"], 0), random_circuit(SPECS["groups"], 1)
    a.save_pretrained(tmp_path / "a")
    b.save_pretrained(tmp_path / "b")
    mib, back = str(tmp_path / "mib.json"), str(tmp_path / "back")
    assert run_main("export", str(tmp_path / "a"), "--out", mib) == 0
    assert run_main("import", mib, "--out", back) == 0
    assert Circuit.from_pretrained(back).edge_count == a.edge_count
    for fmt in ("csv", "graphml", "dot"):
        out = tmp_path / f"a.{fmt}"
        assert run_main("export", str(tmp_path / "a"), "--format", fmt, "--out", str(out)) == 0
        assert out.stat().st_size
    capsys.readouterr()
    for command, facts in (
        (["export", str(tmp_path / "a")], {"out": mib, "format": "mib", "edges": a.edge_count}),
        (["import", mib], {"out": f"{back}-2", "edges": a.edge_count, "folded": 0}),
    ):
        assert run_main(*command, "--out", str(facts["out"]), "--json") == 0
        assert json.loads(capsys.readouterr().out) == facts
    assert run_main("compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == compare_circuits(a.scored, b.scored)
    random_circuit(SPECS["heads"]).save_pretrained(tmp_path / "heads")
    assert run_main("compare", str(tmp_path / "a"), str(tmp_path / "heads")) == 2
    assert "different graphs" in capsys.readouterr().err
    page, both = tmp_path / "page.html", tmp_path / "both.html"
    assert run_main("show", str(tmp_path / "a"), "--html", str(page)) == 0
    assert run_main("compare", str(tmp_path / "a"), str(tmp_path / "b"), "--html", str(both)) == 0
    for path in (page, both):
        assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert run_main("show", str(tmp_path / "a"), "--html", str(tmp_path / "no" / "page.html")) == 2
    for flag in ("png", "svg"):
        out = tmp_path / f"picture.{flag}"
        assert run_main("show", str(tmp_path / "a"), f"--{flag}", str(out)) == 0
        assert out.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_pictures_of_one_circuit_are_the_same_and_of_any_circuit_possible(tmp_path: Path) -> None:
    from pahq_hf.circuit.render.picture import draw

    circuit = random_circuit(SPECS["groups"])
    for name in ("one", "two"):
        draw(circuit.scored, tmp_path / name, "png")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    circuit.kept[:] = False
    draw(circuit.scored, tmp_path / "empty", "svg")
    large = random_circuit(GraphSpec(30, 9, 3), share=0.03)
    draw(large.scored, tmp_path / "large", "png")
    assert (tmp_path / "large").stat().st_size < 2_000_000


@pytest.mark.parametrize("spec", [GraphSpec(30, 9, 3), GraphSpec(4, 4, 4), GraphSpec(12, 2, 2)])
def test_no_edge_of_a_picture_is_cut_off(spec: GraphSpec, tmp_path: Path) -> None:
    from matplotlib.image import imread

    from pahq_hf.circuit.render.picture import draw

    draw(random_circuit(spec, share=0.02 if spec.layers > 4 else 0.3).scored, tmp_path / "picture.png")
    pixels = imread(tmp_path / "picture.png")[..., :3]
    assert (pixels < 0.99).any()
    for border in (pixels[:, :10], pixels[:, -10:]):
        assert (border > 0.99).all()


def test_a_notebook_shows_the_circuit_and_no_markup_of_its_names() -> None:
    circuit = random_circuit(SPECS["heads"])
    circuit.model["base_model"] = "<script>alert(1)</script>" * 100
    circuit.discovery = {"task": {"name": "<img src=x onerror=alert(1)>"}}
    shown = circuit._repr_html_()
    assert "<svg" in shown and "edges kept" in shown
    assert "<script" not in shown and "<img" not in shown
    assert "&lt;script&gt;" in shown
