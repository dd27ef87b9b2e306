"""Circuits of other tools on models: what their files leave open, lists of edges, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pahq_hf import Circuit, PAHQModel
from pahq_hf.circuit.comparison import compare_circuits
from pahq_hf.circuit.fitting import fitted, in_one_graph
from pahq_hf.circuit.graph import Graph, GraphSpec
from pahq_hf.circuit.identity import ModelIdentity
from pahq_hf.circuit.interchange import import_circuit, read_circuit_file
from pahq_hf.errors import CircuitError
from pahq_hf.evaluation.report import reference_facts
from tests.circuit.test_interchange import foreign, random_circuit
from tests.helpers import id_rows, random_edges, run_main, save_tiny, wrapped, write_rows
from tests.models import random_task

TASK = random_task(batch=2, seed=3)


def circuit_of(model: PAHQModel, seed: int = 0) -> Circuit:
    kept = random_edges(model.graph, 0.5, seed)
    return Circuit(model.graph, kept, np.where(kept, 0.5, 0.0), kept.copy(), model.identity.to_json())


def uneven_circuit(spec: GraphSpec) -> Circuit:
    """A circuit of heads, of which it keeps an edge into the key of one in a group."""
    graph = Graph(GraphSpec(spec.layers, spec.heads, spec.heads, parallel=spec.parallel))
    kept = graph.all_edges.copy()
    kept[graph.parse_edge("input->a1.h1<k>")] = False
    return Circuit(graph, kept, np.zeros(kept.shape), kept.copy())


# -- on models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama_split", "gemma2", "falcon"])
def test_a_graph_of_heads_is_a_circuit_of_its_model(name: str, tmp_path: Path) -> None:
    """Nothing in EAP-IG's file says how heads share keys and values, or are coupled: the model does."""
    model = wrapped(name)
    ours = circuit_of(model)
    theirs = foreign(ours, tmp_path / "mib.json")
    assert theirs.graph.spec != ours.graph.spec
    wanted, found = (model.evaluate(circuit, TASK, reference=ours) for circuit in (ours, theirs))
    assert found == wanted and wanted["reference"]["edges"]["precision"] == 1
    assert reference_facts(ours, theirs) == reference_facts(ours, ours)
    logits = []
    for circuit in (ours, theirs):
        with model.apply(circuit, corrupted=TASK.corrupted_ids):
            logits.append(model(TASK.clean_ids).logits)
    assert (logits[0] == logits[1]).all()
    a, b = in_one_graph(theirs, ours)
    assert compare_circuits(a.scored, b.scored)["jaccard"] == 1 and a.graph.spec == model.graph.spec


def test_heads_of_a_group_that_differ_need_a_model_split_by_heads() -> None:
    grouped, split = wrapped("llama"), wrapped("llama_split")
    circuit = uneven_circuit(grouped.graph.spec)
    with pytest.raises(CircuitError, match=r"keeps 1 edges, such as input->a1\.kv0<k>.*--split-kv-groups"):
        grouped.evaluate(circuit, TASK)
    facts = split.evaluate(circuit, TASK)
    assert facts["edges"] == split.graph.edge_count - 1 and facts["kl"] > 0
    # Of one graph with a circuit of groups, too: that of heads.
    a, b = in_one_graph(circuit, circuit_of(grouped))
    assert a.graph.spec == b.graph.spec == split.graph.spec
    assert compare_circuits(a.scored, b.scored)["edges"]["first"] == circuit.edge_count


def test_circuits_of_groups_and_of_their_heads_are_each_others() -> None:
    """What a model says with groups it says with heads that all keep the same."""
    grouped, split = wrapped("llama"), wrapped("llama_split")
    ours = circuit_of(grouped)
    by_heads = fitted(ours, split.graph.spec)
    assert by_heads.graph.spec == split.graph.spec and by_heads.edge_count > ours.edge_count
    assert np.array_equal(fitted(by_heads, grouped.graph.spec).kept, ours.kept)
    wanted, found = grouped.evaluate(ours, TASK), split.evaluate(ours, TASK)
    assert found["kl"] == pytest.approx(wanted["kl"], rel=1e-5) and wanted["kl"] > 0.01


def test_scores_of_a_group_are_its_heads_or_their_sum() -> None:
    circuit = uneven_circuit(GraphSpec(2, 4, 2))
    places = [circuit.graph.parse_edge(f"input->a0.h{head}<v>") for head in range(4)]
    for place, score in zip(places, (1.0, 2.0, 3.0, 3.0), strict=True):
        circuit.scores[place] = score
    circuit.kept[:] = circuit.graph.all_edges
    found = fitted(circuit, GraphSpec(2, 4, 2))
    assert [found.scores[found.graph.parse_edge(f"input->a0.kv{g}<v>")] for g in (0, 1)] == [3.0, 3.0]


def test_another_models_graph_is_no_division() -> None:
    """A circuit whose family is known, or with other heads or layers, is not bent to fit."""
    of_gpt2 = circuit_of(wrapped("gpt2"))
    deep, odd = (uneven_circuit(GraphSpec(*shape)) for shape in ((3, 4, 4), (2, 3, 3)))
    for circuit, match in ((of_gpt2, "kv_groups=4"), (deep, "layers=3"), (odd, "heads=3")):
        with pytest.raises(CircuitError, match=match):
            wrapped("llama").evaluate(circuit, TASK)


# -- lists of edges ---------------------------------------------------------------------------------


def acdc(name: str, *, reads: bool) -> list[Any]:
    """A node's name and index in TransformerLens' terms, as ACDC keeps them."""
    if name in ("input", "logits"):
        return [
            f"blocks.{0 if name == 'input' else 1}.hook_resid_{'pre' if name == 'input' else 'post'}",
            [None],
        ]
    layer = name[1:].split(".")[0]
    if name.startswith("m"):
        return [f"blocks.{layer}.hook_mlp_{'in' if reads else 'out'}", [None]]
    head, _, kind = name.partition(".h")[2].partition("<")
    place = f"hook_{kind[0]}_input" if reads else "attn.hook_result"
    return [f"blocks.{layer}.{place}", [None, None, int(head)]]


def by_script(name: str) -> str:
    head = name.replace("<", ".").replace(">", "").replace(".h", ".")
    return {"logits": "resid_post", "input": "blocks.0.hook_resid_pre"}.get(
        name, f"mlp.{name[1:]}" if name.startswith("m") else f"head.{head[1:]}"
    )


def autocircuit(name: str) -> str:
    head = name.replace("<", ".").replace(">", "").replace(".h", ".").upper()
    ends = {"input": "Resid Start", "logits": "Resid End"}
    return ends.get(name, f"MLP {name[1:]}" if name.startswith("m") else head)


def edge_pruning(name: str) -> str:
    return {"input": "embeds", "logits": "resid_post"}.get(name, name.replace("<", ".").replace(">", ""))


def as_acdc(pairs: list[tuple[str, str]]) -> Any:
    inside = [["blocks.0.attn.hook_q", [None, None, 1], "blocks.0.hook_q_input", [None, None, 1]]]
    inside += [["blocks.0.hook_mlp_out", [None], "blocks.0.hook_mlp_in", [None]]]
    return inside + [[*acdc(reader, reads=True), *acdc(writer, reads=False)] for writer, reader in pairs]


def as_texts(pairs: list[tuple[str, str]]) -> Any:
    def text(name: str, *, reads: bool) -> str:
        node, index = acdc(name, reads=reads)
        return f"{node}[{', '.join(':' if part is None else str(part) for part in index)}]"

    return [f"{text(w, reads=False)}->{text(r, reads=True)}" for w, r in pairs]


def as_script(pairs: list[tuple[str, str]]) -> Any:
    edges = [{"from": by_script(w), "to": by_script(r)} for w, r in pairs]
    inside = {"from": "blocks.0.hook_q_input", "to": "blocks.0.attn.hook_q", "head_num": 1}
    extra = [edge for edge in edges if edge["from"].startswith("blocks")]
    return {"original": [edge for edge in edges if edge not in extra], "extra": [inside, *extra]}


LISTS = {
    "ACDC": as_acdc,
    "ACDC with scores": lambda pairs: [[edge, 0.25] for edge in as_acdc(pairs)],
    "ACDC as texts": as_texts,
    "ACDC by script": as_script,
    "AutoCircuit": lambda pairs: [f"{autocircuit(w)}->{autocircuit(r)}" for w, r in pairs],
    "AutoCircuit by name": lambda pairs: {f"{autocircuit(w)}->{autocircuit(r)}": 0.25 for w, r in pairs},
    "Edge Pruning": lambda pairs: [[edge_pruning(w), edge_pruning(r)] for w, r in pairs],
    "names of ours": lambda pairs: {"edges": [{"writer": w, "reader": r} for w, r in pairs]},
}


def pairs_of(circuit: Circuit) -> list[tuple[str, str]]:
    return [tuple(name.split("->")) for name, _ in circuit.edges]  # type: ignore[misc]


@pytest.mark.parametrize("write", LISTS.values(), ids=LISTS)
def test_a_list_of_edges_is_the_circuit(write: Any, tmp_path: Path) -> None:
    circuit = random_circuit(GraphSpec(2, 3, 3), seed=4)
    path = tmp_path / "edges.json"
    path.write_text(json.dumps(write(pairs_of(circuit))))
    found = import_circuit(path, circuit.graph.spec, ModelIdentity())
    assert np.array_equal(found.circuit.kept, circuit.kept) and not found.folded
    scored = {0.25} if "0.25" in path.read_text() else set()
    assert {
        found.circuit.scores[place] for place in zip(*np.nonzero(found.circuit.tested), strict=True)
    } == scored
    with pytest.raises(CircuitError, match=r"give the model they are of \(--model\)"):
        read_circuit_file(path)


GROUPED = GraphSpec(2, 4, 2)


@pytest.mark.parametrize(
    ("edges", "wanted", "folded"),
    [
        (["Resid Start->A1.1.K"], ["input->a1.kv0<k>"], 1),  # one of two heads
        (["Resid Start->A1.2.V", "Resid Start->A1.3.V"], ["input->a1.kv1<v>"], 0),
        (["A0.3->A1.2"], ["a0.h3->a1.h2<q>", "a0.h3->a1.kv1<k>", "a0.h3->a1.kv1<v>"], 2),  # q, k, v in one
        ([["embeds", "a1.h1.k"]], ["input->a1.kv1<k>"], 0),  # Edge Pruning numbers groups
        ([["embeds", "a1.h2.k"], ["embeds", "a1.h3.k"]], ["input->a1.kv1<k>"], 0),  # or heads, beyond them
        ([["tok_embeds", "a1.h0.q"], ["pos_embeds", "a1.h0.q"]], ["input->a1.h0<q>"], 0),
        (["input->a1.kv1<v>"], ["input->a1.kv1<v>"], 0),
    ],
)
def test_heads_are_folded_into_groups(edges: Any, wanted: list[str], folded: int, tmp_path: Path) -> None:
    path = tmp_path / "edges.json"
    path.write_text(json.dumps(edges))
    found = import_circuit(path, GROUPED, ModelIdentity())
    assert [name for name, _ in found.circuit.edges] == wanted and found.folded == folded


def test_edge_pruning_without_embeddings_has_their_edges(tmp_path: Path) -> None:
    """Its edges of the embedding can only go where that is a node of its own."""
    path = tmp_path / "edges.json"
    path.write_text(json.dumps([["a0.h1", "m1"], ["m1", "resid_post"]]))
    circuit = read_circuit_file(path, GROUPED)
    assert circuit.kept[:, 0].all() and circuit.edge_count == len(circuit.graph.readers) + 2


REFUSED = {
    "no edge": ('["Resid Start"]', "entry 1 is no edge: 'Resid Start'"),
    "a number": ('["A0.0->A1.0.Q", 7]', "entry 2 is no edge: 7"),
    "an unknown node": ('["Block 0->Resid End"]', "'Block 0->Resid End' is not an edge of this model's"),
    "backwards": ('[["a1.h0", "a0.h1.q"]]', "'a1.h0->a0.h1.q' is not an edge"),
    "a layer too many": ('[["m2", "resid_post"]]', "not an edge"),
    "a head too many": ('["A0.4->Resid End"]', "not an edge"),
    "a long number": (f'["A0.{"9" * 50}->Resid End"]', "not an edge"),
    "another last layer": ('["A0.1->blocks.0.hook_resid_post[:]"]', "not an edge"),
    "a position": (
        '[["blocks.1.hook_mlp_in", [null, 3, 1], "blocks.0.hook_mlp_out", [null]]]',
        "single positions",
    ),
    "no score": ('{"m0->m1": "large"}', "entry 1 has no usable score"),
    "no finite score": ('{"m0->m1": NaN}', "no finite number"),
    "a long score": (f'{{"m0->m1": {"9" * 400}}}', "a whole number in it is larger than"),
    "no names": ('[{"from": 1, "to": 2}]', "entry 1 has no name of a node: 1"),
    "nothing": ("[]", "neither 'cfg' and 'edges' nor a list of edges"),
    "something else": ('{"a": 1}', "neither 'cfg' and 'edges' nor a list"),
    "of other layers": ('{"cfg": {"n_layers": 3, "n_heads": 4}, "edges": {}}', "is of another model"),
}


@pytest.mark.parametrize(("text", "match"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_list_of_a_models_edges_is_refused(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "edges.json"
    path.write_text(text)
    with pytest.raises(CircuitError, match=r"edges\.json") as caught:
        import_circuit(path, GROUPED, ModelIdentity())
    assert match in str(caught.value) and "\n" not in str(caught.value)


# -- command line -----------------------------------------------------------------------------------


def test_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, data = str(save_tiny(tmp_path / "model")), tmp_path / "ids.jsonl"
    write_rows(data, id_rows(TASK))
    edges, heads = tmp_path / "edges.json", tmp_path / "mib.json"
    edges.write_text(json.dumps(["Resid Start->A1.1.K", "A1.1->Resid End"]))
    foreign(uneven_circuit(GROUPED), heads)

    def run(*arguments: str | Path) -> Any:
        assert run_main(*map(str, arguments), "--json") == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    def judge(folder: str, *more: str | Path) -> Any:
        return run("evaluate", tmp_path / folder, "--model", model, "--task", data, "--any-weights", *more)

    assert run_main("import", str(edges), "--model", model, "--out", str(tmp_path / "whole")) == 0
    assert "1 edges into keys or values that heads share" in caplog.text and not capsys.readouterr().out
    split = run("import", edges, "--model", model, "--split-kv-groups", "--out", tmp_path / "split")
    assert split["folded"] == 0 and Circuit.from_pretrained(tmp_path / "whole").identity.model_type == "llama"
    assert run("import", heads, "--out", tmp_path / "heads")["edges"] == uneven_circuit(GROUPED).edge_count
    whole = judge("whole", "--reference", edges)
    assert whole["edges"] == 2 and whole["reference"]["edges"]["recall"] == 1
    assert judge("split")["edges_total"] == judge("heads")["edges_total"] > whole["edges_total"]
    assert run("compare", tmp_path / "whole", tmp_path / "split")["edges"]["both"] == 2
    assert run("compare", tmp_path / "heads", tmp_path / "whole")["edges"]["both"] == 2
    assert run_main("import", str(heads), "--split-kv-groups", "--out", str(tmp_path / "x")) == 2
    assert "--split-kv-groups is about the model" in capsys.readouterr().err
