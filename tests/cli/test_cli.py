"""The command line: what it prints and what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from pahq_hf import Circuit, load_task
from pahq_hf.precision.products import resolve_compute
from tests.cli.world import Result, World, in_process, only_json
from tests.helpers import named, referee, run_main

UNIFORM = {"policy": {}, "quantize_embeddings": False}
FINE: dict[str, Callable[[World], list[str]]] = {
    "info": lambda w: ["info", w.path("bare")],
    "info json": lambda w: ["info", w.path("bare"), "--json"],
    "info split": lambda w: ["info", w.path("bare"), "--json", "--split-kv-groups"],
    "discover json": lambda w: w.discover("model", "ids.jsonl", "--threshold=0.05", "--json", out="fine/a"),
    "discover": lambda w: w.discover("words", "good.jsonl", "--metric", "logit_diff", out="fine/b"),
    "discover again": lambda w: [*FINE["discover json"](w), "--resume"],
    "discover more": lambda w: w.discover(
        "model", "ids.jsonl", "--precision", "rtn", "--format", "int8", "--order", "head", "--ablation",
        "mean", "--split-kv-groups", "--n", "2", "--readers", "logits,m*", "--absolute", "--resume", "--json",
        "--device", "cpu", "--engine", "hooks", "--batch", "5", "--memory-budget", "1G", out="fine/c",
    ),
    "discover pahq": lambda w: w.discover(
        "model", "ids.jsonl", "--threshold=0.05", "--format", "int8", "--active", "both", "--compute", "fp32",
        "--margin", "inf", "--json", out="fine/d",
    ),
    "evaluate json": lambda w: w.evaluate("run", "model", "--json"),
    "evaluate": lambda w: w.evaluate("run", "model", "--metric", "logit_diff"),
    "evaluate split": lambda w: w.evaluate("fine/c", "model", "--json"),
    "show": lambda w: ["show", w.path("run")],
    "show json": lambda w: ["show", w.path("run"), "--json"],
    "help": lambda w: ["--help"],
    "help discover": lambda w: ["discover", "--help"],
}  # fmt: skip


@pytest.fixture(scope="module")
def results(world: World) -> dict[str, Result]:
    """What every command of `FINE` left, one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        return {name: in_process(*command(world)) for name, command in FINE.items()}


def test_info(results: dict[str, Result]) -> None:
    facts = only_json(results["info json"])
    memory, threads = facts.pop("memory"), facts.pop("threads")
    assert threads["count"] >= 1
    assert memory["weights"] == sum(part["bytes"] for part in memory["parts"]) < memory["weights_fp32"]
    assert memory["peak"] > memory["weights"] + memory["activations"]
    assert facts == {
        "family": "llama", "layers": 2, "heads": 4, "kv_groups": 2, "writers": 11, "readers": 19, "edges": 82,
    }  # fmt: skip
    split = only_json(results["info split"])
    assert split.pop("threads").keys() == threads.keys()
    assert split.pop("memory")["weights"] == memory["weights"]
    assert split == facts | {"readers": 27, "edges": 110}
    assert results["info"].code == 0
    graph, _, table = results["info"].out.partition("Memory")
    assert "attention" in table and "expected peak" in table
    shown = dict(line.split() for line in graph.splitlines())
    assert shown == {name: str(value) for name, value in facts.items()}


@pytest.mark.parametrize(
    ("config", "more", "edges"),
    [
        (GPT2Config(), [], 32_491),
        (GPT2Config(n_layer=4, n_head=8, n_embd=256, n_inner=0), [], 1_281),
        (LlamaConfig(num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8), [], 195_865),
        (
            LlamaConfig(num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8),
            ["--split-kv-groups"],
            386_713,
        ),
        (
            LlamaConfig(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576),
            [],
            70_651,
        ),
    ],
    ids=["gpt2", "attention-only", "llama-3.2-1b", "llama-3.2-1b-split", "smollm2"],
)
def test_info_counts_the_edges_of_known_models(
    config: Any, more: list[str], edges: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From config.json alone."""
    config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert run_main("info", str(tmp_path), "--json", *more) == 0
    assert json.loads(capsys.readouterr().out)["edges"] == edges


def test_discover_prints_what_it_wrote(world: World, results: dict[str, Result]) -> None:
    facts = only_json(results["discover json"])
    out = world.root / "fine" / "a"
    assert facts["next"].startswith("pahq ")
    written = json.loads((out / "discovery.json").read_text())
    assert written.pop("checksums").keys() == {"means.safetensors", "scores.safetensors"}  # of files
    assert facts == {"out": str(out), "next": facts["next"], **written}
    assert (out / "circuit.json").read_bytes() == (world.run / "circuit.json").read_bytes()
    assert only_json(results["discover again"]) == facts
    circuit = Circuit.from_pretrained(out)
    expected = referee("llama", load_task(str(world.ids))).acdc(0.05)
    assert named(circuit.graph, circuit.kept) == expected.kept
    assert facts["metric"]["fp32"] == pytest.approx(expected.final, abs=1e-5)
    assert circuit.model["base_model"] == world.model.name


def test_discover_prints_a_table(world: World, results: dict[str, Result]) -> None:
    result = results["discover"]
    assert result.code == 0
    circuit = Circuit.from_pretrained(world.root / "fine" / "b")
    assert f"{circuit.edge_count} of 82" in result.out
    assert "logit_diff" in result.out and "good" in result.out
    assert "ACDC, tau 0.01: " in result.err and "tests in" in result.err  # and not on stdout
    assert "\r" not in result.err
    assert "ACDC" not in result.out and "Loading" not in result.err


def test_discover_takes_its_options(results: dict[str, Result]) -> None:
    facts = only_json(results["discover more"])
    precision = {"regime": "rtn", "format": "int8", "split_kv_groups": True} | UNIFORM
    assert facts["precision"] == precision | {"active": "receiver", "compute": "fp32"}
    assert facts["second_looks"] == {"margin": None, "tests": 0, "changed": 0}
    arguments = facts["arguments"]
    assert (arguments["order"], arguments["ablation"], arguments["absolute"]) == ("head", "mean", True)
    assert arguments["readers"] == "logits,m*"
    assert facts["task"]["examples"] == 2 and facts["engine"] == "hooks"
    assert facts["edges"]["total"] == 110
    assert facts["edges"]["tested"] <= 11 + 10 + 5


def test_discover_is_anchored_by_default(results: dict[str, Result]) -> None:
    facts = only_json(results["discover json"])
    precision = {"regime": "pahq", "format": "fp8", "split_kv_groups": False, "active": "receiver"} | UNIFORM
    native = resolve_compute("auto", "fp8", torch.device("cpu"))
    assert facts["precision"] == facts["header"]["precision"] == precision | {"compute": native}
    assert facts["arguments"]["margin"] == facts["second_looks"]["margin"] == 0.2
    assert 0 <= facts["second_looks"]["changed"] <= facts["second_looks"]["tests"] < facts["edges"]["tested"]


def test_discover_can_look_at_everything_again(world: World, results: dict[str, Result]) -> None:
    """Then precision is of no consequence."""
    facts = only_json(results["discover pahq"])
    precision = {"regime": "pahq", "format": "int8", "split_kv_groups": False, "active": "both"} | UNIFORM
    assert facts["precision"] == precision | {"compute": "fp32"}
    assert facts["arguments"]["margin"] == facts["second_looks"]["margin"] == "inf"
    assert facts["second_looks"]["tests"] >= facts["edges"]["tested"]
    circuit = Circuit.from_pretrained(world.root / "fine" / "d")
    judge = referee("llama", load_task(str(world.ids))).acdc(0.05)
    assert named(circuit.graph, circuit.kept) == judge.kept
    for (writer, reader), score in judge.scores.items():
        r, w = circuit.graph.parse_edge(f"{writer}->{reader}")
        assert circuit.scores[r, w] == pytest.approx(score, abs=1e-5)


def test_evaluate(world: World, results: dict[str, Result]) -> None:
    facts = only_json(results["evaluate json"])
    circuit = Circuit.from_pretrained(world.run)
    task = load_task(str(world.ids))
    judge = referee("llama", task)
    removed = judge.edge_set - named(circuit.graph, circuit.kept)
    assert facts["kl"] == pytest.approx(judge.metric(removed), abs=1e-5)
    assert facts["metric"]["name"] == "kl"
    assert facts["metric"]["value"] == facts["kl"]
    assert facts["faithfulness"] == pytest.approx(1 - facts["kl"] / facts["metric"]["empty"], abs=1e-6)
    assert facts["edges"] == circuit.edge_count and facts["edges_total"] == 82 and facts["examples"] == 3
    logits = judge.circuit_logits(removed)
    hits = [int(logits[i].argmax()) in task.answers[i] for i in range(3)]
    assert facts["accuracy"] == pytest.approx(sum(hits) / 3)
    assert 0 <= facts["accuracy_full"] <= 1


def test_evaluate_as_a_table_with_another_metric(world: World, results: dict[str, Result]) -> None:
    result = results["evaluate"]
    assert result.code == 0 and result.err == ""
    shown = dict(line.split() for line in result.out.splitlines())
    assert shown["metric.name"] == "logit_diff"
    judge = referee("llama", load_task(str(world.ids)), metric="logit_diff")
    assert float(shown["metric.full"]) == pytest.approx(judge.metric(set()), abs=1e-4)
    assert float(shown["kl"]) == pytest.approx(only_json(results["evaluate json"])["kl"], abs=1e-5)


def test_evaluate_splits_groups_as_the_circuit_does(results: dict[str, Result]) -> None:
    assert only_json(results["evaluate split"])["edges_total"] == 110


def test_show(world: World, results: dict[str, Result]) -> None:
    result = results["show"]
    assert result.code == 0 and result.err == ""
    circuit = Circuit.from_pretrained(world.run)
    assert f"{circuit.edge_count} of 82" in result.out
    strongest = max(circuit.edges, key=lambda edge: abs(edge[1]))
    assert strongest[0] in result.out and f"{strongest[1]:+.4g}" in result.out
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in result.out.splitlines() if "│" in line
    ]
    into = [name.partition("->")[2] for name, _ in circuit.edges]
    for layer in ("1", "0"):
        counts = [sum(f"a{layer}." in r and f"<{kind}>" in r for r in into) for kind in "qkv"]
        counts.append(into.count(f"m{layer}"))
        heads = [str(h) for h in range(4) if any(f"a{layer}.h{h}->" in name for name, _ in circuit.edges)]
        assert [layer, *(str(count) if count else "·" for count in counts), " ".join(heads)] in rows
    assert f"logits: {into.count('logits')} edges" in result.out
    document = only_json(results["show json"])
    assert document["edges"] == json.loads((world.run / "circuit.json").read_text())["edges"]
    assert document["discovery"]["edges"]["kept"] == circuit.edge_count


def test_help(results: dict[str, Result]) -> None:
    assert results["help"].code == results["help discover"].code == 0
    for command in ("info", "discover", "evaluate", "show"):
        assert command in results["help"].out
    for option in (
        "--task", "--n", "--seed", "--threshold", "--metric", "--precision", "--format", "--order",
        "--active", "--compute", "--margin", "--ablation", "--split-kv-groups", "--device", "--resume",
        "--json", "--out",
    ):  # fmt: skip
        assert option in results["help discover"].out, option


def test_every_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    from pahq_hf.cli.app import app

    names = [command.name for command in app.registered_commands]
    assert len(names) == 13 and {"export", "import", "show"} <= set(names)
    for name in names:
        assert run_main(str(name), "--help") == 0
        assert "--json" in capsys.readouterr().out, name


def test_the_installed_script(world: World, results: dict[str, Result]) -> None:
    """`pahq` itself, as a user starts it."""
    script = Path(sys.executable).parent / "pahq"
    ended = subprocess.run([script, "show", world.path("run"), "--json"], capture_output=True, text=True)
    assert only_json(Result(ended.returncode, ended.stdout, ended.stderr)) == only_json(results["show json"])
