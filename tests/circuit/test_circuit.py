"""The circuit artefact: its files, what of them is refused, its card, and atomic writing."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.files import write_atomically, write_text
from pahq_hf.circuit.graph import Graph, GraphSpec
from pahq_hf.errors import CircuitError, RunError
from tests.circuit.small import small
from tests.helpers import files_of, small_disk
from tests.tiers import examples

FILES = {"circuit.json", "scores.safetensors", "discovery.json", "circuit.png", "README.md"}


@st.composite
def circuits(draw: st.DrawFn) -> Circuit:
    """Any shape of graph with any edges, scores and flags."""
    groups = draw(st.integers(1, 3))
    graph = Graph(
        GraphSpec(
            layers=draw(st.integers(1, 3)),
            heads=groups * draw(st.integers(1, 3)),
            kv_groups=groups,
            mlps=draw(st.booleans()),
            parallel=draw(st.booleans()),
            split_kv_groups=draw(st.booleans()),
        )
    )
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = graph.all_edges.shape
    tested = graph.all_edges & (numbers.random(shape) < draw(st.sampled_from([0.1, 0.9])))
    return Circuit(
        graph=graph,
        kept=graph.all_edges & (numbers.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))),
        scores=np.where(tested, numbers.normal(size=shape) * 10.0 ** numbers.integers(-9, 3, shape), 0.0),
        tested=tested,
        model={"base_model": draw(st.text(max_size=20)), "d_model": 8, "revision": None},
        discovery={"arguments": {"threshold": draw(st.floats(0, 1))}, "note": draw(st.text())},
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small().save_pretrained(tmp_path / "circuit")
    return tmp_path / "circuit"


# -- round trip -----------------------------------------------------------------------------------------


@examples(60)
@given(circuits())
def test_a_saved_circuit_comes_back_the_same(circuit: Circuit) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "new" / "folder"
        circuit.save_pretrained(folder)
        assert set(files_of(folder)) == FILES
        again = Circuit.from_pretrained(folder)
    assert again.graph.spec == circuit.graph.spec
    assert np.array_equal(again.kept, circuit.kept)
    assert np.array_equal(again.tested, circuit.tested)
    assert np.array_equal(again.scores, circuit.scores)  # to the last bit
    assert again.scores.dtype == np.float64 and again.kept.dtype == again.tested.dtype == np.bool_
    assert again.model == circuit.model
    assert again.discovery == circuit.discovery
    assert again.nodes == circuit.nodes and again.edges == circuit.edges


@examples(60)
@given(circuits())
def test_nodes_edges_and_live_edges_agree(circuit: Circuit) -> None:
    assert circuit.edge_count == len(circuit.edges) == int(circuit.kept.sum())
    for name, score in circuit.edges:
        r, w = circuit.graph.parse_edge(name)
        assert circuit.kept[r, w] and circuit.scores[r, w] == score
    touched = set()
    for name, _ in circuit.edges:
        writer, _, reader = name.partition("->")
        touched.add(writer)
        touched |= heads_reading(circuit.graph, reader)
    assert set(circuit.nodes) == touched
    order = [*(w.name for w in circuit.graph.writers), "logits"]
    assert circuit.nodes == sorted(circuit.nodes, key=order.index)
    assert not (circuit.live & ~circuit.kept).any()
    # An edge is live exactly when the multigraph has a way from the input through it to the logits.
    drawn = circuit.to_networkx()
    for r, w in np.argwhere(circuit.kept):
        source, targets = (
            circuit.graph.writers[w].name,
            heads_reading(circuit.graph, circuit.graph.readers[r].name),
        )
        fed = source == "input" or (drawn.has_node("input") and nx.has_path(drawn, "input", source))
        used = any(t == "logits" or ("logits" in drawn and nx.has_path(drawn, t, "logits")) for t in targets)
        assert circuit.live[r, w] == (fed and used)


def heads_reading(graph: Graph, reader: str) -> set[str]:
    """Nodes computed from a reader, worked out from its name alone."""
    if reader in ("logits",) or reader.startswith("m"):
        return {reader}
    place, _, _ = reader.partition("<")
    layer, _, unit = place.partition(".")
    if unit.startswith("h"):
        return {place}
    size = graph.spec.heads // graph.spec.kv_groups
    first = int(unit[2:]) * size
    return {f"{layer}.h{head}" for head in range(first, first + size)}


def test_networkx_expands_a_group_to_its_heads() -> None:
    graph = Graph(GraphSpec(2, 4, 2))
    kept = graph.no_edges()
    scores = np.zeros(kept.shape)
    for name, score in (("m0->a1.kv1<k>", 0.5), ("input->a1.h3<q>", 0.25), ("a1.h3->logits", -1.0)):
        kept[graph.parse_edge(name)] = True
        scores[graph.parse_edge(name)] = score
    circuit = Circuit(graph, kept, scores, kept)
    found = circuit.to_networkx()
    assert isinstance(found, nx.MultiDiGraph)
    assert sorted(found.edges(data=True), key=str) == [
        ("a1.h3", "logits", {"score": -1.0, "reader": "logits", "kind": "logits"}),
        ("input", "a1.h3", {"score": 0.25, "reader": "a1.h3<q>", "kind": "q"}),
        ("m0", "a1.h2", {"score": 0.5, "reader": "a1.kv1<k>", "kind": "k"}),
        ("m0", "a1.h3", {"score": 0.5, "reader": "a1.kv1<k>", "kind": "k"}),
    ]
    assert set(found) == set(circuit.nodes) == {"input", "m0", "a1.h2", "a1.h3", "logits"}
    assert repr(circuit) == f"Circuit('model', 3 of {graph.edge_count} edges)"


def test_files_follow_the_contract(saved: Path) -> None:
    circuit = Circuit.from_pretrained(saved)
    document = json.loads((saved / "circuit.json").read_text())
    assert set(document) == {"cfg", "nodes", "edges"}
    assert document["cfg"] | {"n_layers": 2, "n_heads": 4, "n_key_value_heads": 2} == document["cfg"]
    assert document["nodes"] == {name: {"in_graph": True} for name in circuit.nodes}
    assert document["edges"] == {n: {"score": s, "in_graph": True} for n, s in circuit.edges}
    tensors = load_file(saved / "scores.safetensors")
    assert {name: t.shape for name, t in tensors.items()} == dict.fromkeys(
        ("score", "in_graph", "tested", "exists"), circuit.kept.shape
    )
    assert np.array_equal(tensors["exists"].astype(bool), circuit.graph.all_edges)


# -- what is refused ------------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


CFG: dict[str, Any] = {
    "newer format": {"format_version": 2},
    "format is a text": {"format_version": "one"},
    "no layers": {"n_layers": 0},
    "layers are a text": {"n_layers": "two"},
    "layers are missing": {"n_layers": None},
    "infinitely many layers": {"n_layers": float("inf")},
    "more layers than memory": {"n_layers": 10**9},
    "one layer less": {"n_layers": 1},
    "groups that do not divide": {"n_key_value_heads": 3},
    "other groups": {"n_key_value_heads": 4},
    "no MLPs": {"has_mlps": False},
}


@pytest.mark.parametrize("change", CFG.values(), ids=CFG)
def test_a_wrong_cfg_is_refused(saved: Path, change: dict[str, Any]) -> None:
    edit(saved / "circuit.json", lambda document: document["cfg"].update(change))
    with pytest.raises(CircuitError) as error:
        Circuit.from_pretrained(saved)
    assert "\n" not in str(error.value)


def test_a_newer_format_says_so(saved: Path) -> None:
    edit(saved / "circuit.json", lambda document: document["cfg"].update(format_version=7))
    with pytest.raises(CircuitError, match="circuit format 7; this version reads up to 1"):
        Circuit.from_pretrained(saved)


@pytest.mark.parametrize(
    "name",
    [
        "m1->m0", "m0->m0", "logits->m1", "a0.h9->m1", "input->a0.h0<k>", "input", "->", "a0.h0->a1.kv2<k>",
        "a0.h0->" + "x" * 9000, "input->input",
    ],
)  # fmt: skip
def test_edges_that_do_not_exist_are_refused(saved: Path, name: str) -> None:
    edit(saved / "circuit.json", lambda document: document["edges"].update({name: {"in_graph": True}}))
    with pytest.raises(CircuitError, match="is not an edge of this model's graph") as error:
        Circuit.from_pretrained(saved)
    assert len(str(error.value)) < 200


def test_edges_out_of_the_graph_are_not_kept(saved: Path) -> None:
    """EAP-IG writes all edges, each with its flag."""
    circuit = Circuit.from_pretrained(saved)
    out = next(
        iter({f"input->{r.name}" for r in circuit.graph.readers} - {name for name, _ in circuit.edges})
    )
    edit(saved / "circuit.json", lambda document: document["edges"].update({out: {"in_graph": False}}))
    assert np.array_equal(Circuit.from_pretrained(saved).kept, circuit.kept)


@pytest.mark.parametrize("name", ["circuit.json", "scores.safetensors"])
def test_a_missing_file_is_refused(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(
        CircuitError, match=f"cannot read .*{name}|{name} is missing: discovery.json lists it"
    ):
        Circuit.from_pretrained(saved)


@pytest.mark.parametrize("raw", [b"{}", b'{"method": "acdc"}'])
def test_lost_checksums_are_damage(saved: Path, raw: bytes) -> None:
    (saved / "discovery.json").write_bytes(raw)
    with pytest.raises(CircuitError, match=r"discovery\.json is damaged: the checksums .* are gone"):
        Circuit.from_pretrained(saved)


def test_circuits_of_earlier_versions_have_no_checksums(saved: Path) -> None:
    """They had neither the list nor the note that there is one."""
    circuit = Circuit.from_pretrained(saved)
    edit(saved / "discovery.json", lambda facts: facts.pop("checksums"))
    save_file(load_file(saved / "scores.safetensors"), saved / "scores.safetensors")
    assert Circuit.from_pretrained(saved).edges == circuit.edges


@pytest.mark.parametrize("name", ["circuit.json", "scores.safetensors", "discovery.json"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved: Path, name: str, share: float) -> None:
    raw = (saved / name).read_bytes()
    (saved / name).write_bytes(raw[: min(int(share * len(raw)), len(raw) - 2)])
    with pytest.raises(CircuitError, match=name):
        Circuit.from_pretrained(saved)


GARBAGE = {
    "binary": b"\xff\xfe\x00" * 50,
    "another object": b'{"edges": 3}',
    "a list": b"[1, 2]",
    "depth": b"[" * 200_000,
    "no cfg": b'{"cfg": [], "nodes": {}, "edges": {}}',
    "edges as a list": b'{"cfg": {"n_layers": 2, "n_heads": 4}, "edges": ["input->m0"]}',
    "an edge without facts": b'{"cfg": {"n_layers": 2, "n_heads": 4, "n_key_value_heads": 2}, '
    b'"edges": {"input->m0": true}}',
}


@pytest.mark.parametrize("raw", GARBAGE.values(), ids=GARBAGE)
def test_a_replaced_circuit_file_is_refused(saved: Path, raw: bytes) -> None:
    (saved / "circuit.json").write_bytes(raw)
    with pytest.raises(CircuitError) as error:
        Circuit.from_pretrained(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("raw", [b"[1]", b"[" * 200_000, b'{"metric": 3}', b'{"arguments": null}', b"\xff"])
def test_a_replaced_discovery_file_is_refused(saved: Path, raw: bytes) -> None:
    (saved / "discovery.json").write_bytes(raw)
    with pytest.raises(CircuitError, match=r"discovery\.json"):
        Circuit.from_pretrained(saved)


def test_a_circuit_needs_no_discovery_file(saved: Path) -> None:
    (saved / "discovery.json").unlink()
    assert Circuit.from_pretrained(saved).discovery == {}


SCORES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an edge more": lambda t: t["in_graph"].__setitem__((-1, 0), 1 - t["in_graph"][-1, 0]),
    "a tensor less": lambda t: t.pop("tested"),
    "a row less": lambda t: t.update(score=t["score"][1:].copy()),
    "flags of another shape": lambda t: t.update(tested=t["tested"].T.copy()),
    "scores without axes": lambda t: t.update(score=np.zeros(())),
}


@pytest.mark.parametrize("change", SCORES.values(), ids=SCORES)
def test_scores_of_another_circuit_are_refused(saved: Path, change: Callable[[Any], Any]) -> None:
    tensors = load_file(saved / "scores.safetensors")
    change(tensors)
    save_file(tensors, saved / "scores.safetensors")
    with pytest.raises(CircuitError, match=r"scores\.safetensors"):
        Circuit.from_pretrained(saved)


def test_a_file_is_not_a_folder(saved: Path) -> None:
    with pytest.raises(CircuitError, match="cannot read"):
        Circuit.from_pretrained(saved / "circuit.json")
    with pytest.raises(RunError, match="cannot create the output folder"):
        small().save_pretrained(saved / "circuit.json" / "below")


# -- atomic writing -------------------------------------------------------------------------------------


def test_writing_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old and long")
    write_text(path, "né")
    assert files_of(tmp_path) == {"file.txt": "né".encode()}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    seen: list[tuple[int, bool]] = []
    monkeypatch.setattr(os, "fsync", lambda number: seen.append((os.fstat(number).st_size, path.exists())))
    write_text(path, "text")
    assert seen == [(4, False)]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail(temporary: Path) -> None:
        assert temporary.parent == tmp_path
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise error

    with pytest.raises(RunError if isinstance(error, OSError) else type(error)) as caught:
        write_atomically(path, fail)
    assert files_of(tmp_path) == {"file.txt": b"old"}
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot write {path}: No space left on device"


def test_a_full_disk_is_an_error_of_the_run(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with small_disk(1000), pytest.raises(RunError, match="cannot write"):
        write_text(path, "x" * 5000)
    assert files_of(tmp_path) == {}


@pytest.mark.parametrize("limit", [100, 3000])
def test_a_circuit_on_a_full_disk_is_none_or_the_old_one(tmp_path: Path, limit: int) -> None:
    """circuit.json comes last: where it is, the folder is complete."""
    with small_disk(limit), pytest.raises(RunError, match="cannot write"):
        small().save_pretrained(tmp_path / "new")
    assert "circuit.json" not in files_of(tmp_path / "new")
    assert not list((tmp_path / "new").glob(".*"))
    old = tmp_path / "old"
    small().save_pretrained(old)
    before = files_of(old)
    with small_disk(limit), pytest.raises(RunError, match="cannot write"):
        small().save_pretrained(old)
    assert files_of(old) == before


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file.txt").mkdir()
    with pytest.raises(RunError, match="cannot write"):
        write_text(tmp_path / "file.txt", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
    with pytest.raises(RunError, match=r"cannot write to .*nowhere"):
        write_text(tmp_path / "nowhere" / "file.txt", "x")
