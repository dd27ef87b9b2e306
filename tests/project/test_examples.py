"""The examples run, on the demo model and on any checkpoint, and print what they promise."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pahq_hf import Circuit
from pahq_hf.checkpoint.demo_path import demo_path
from pahq_hf.errors import AblationWarning
from tests.hub_server import HubServer, client_environment, run_client

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figure(pattern: str, printed: str) -> float:
    """The number after a text."""
    found = re.search(pattern + r" (-?[\d.,]*\d)", printed)
    assert found, printed
    return float(found[1].replace(",", ""))


def test_all_are_here_and_in_the_table() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    names = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert names == sorted(re.findall(r"\| `(\w+\.py)` \|", table))
    tested = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in names if name.removesuffix(".py") not in tested] == []


def test_discover_gpt2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # By default the demo; here as any checkpoint: by its folder.
    example("discover_gpt2").main([str(demo_path()), "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    circuit = Circuit.from_pretrained(tmp_path / "run")
    assert f"kept {circuit.edge_count} edges" in printed and circuit.edge_count > 5
    assert figure("faithfulness", printed) > 0.8
    assert max(circuit.edges, key=lambda edge: edge[1])[0] in printed


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that reads the demo's language."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": len(tokenizer)}
    LlamaForCausalLM(LlamaConfig(**heads, **sizes, initializer_range=0.3)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("split", [False, True])
def test_discover_llama(llama: Path, split: bool, capsys: pytest.CaptureFixture[str]) -> None:
    example("discover_llama").main(
        [str(llama), "--threshold", "0.001", *(["--split-kv-groups"] if split else [])]
    )
    printed = capsys.readouterr().out
    assert "2 layers, 4 heads that share 2 groups of keys and values" in printed
    assert figure("take", printed) < 0.3 * figure("instead of", printed)
    assert figure("kept", printed) > 0


@pytest.mark.exhaustive
@pytest.mark.smollm2
def test_discover_llama_on_smollm2(smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("discover_llama").main([str(smollm2_path)])
    printed = capsys.readouterr().out
    assert "30 layers, 9 heads that share 3 groups" in printed and "70,651 edges" in printed
    assert figure("kept", printed) > 3


def test_generate_under_circuit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(AblationWarning):
        example("generate_under_circuit").main([])
    printed = capsys.readouterr().out
    assert figure("the model:", printed) == 1
    assert figure("beside corrupted prompts:", printed) >= 0.8
    assert 0 <= figure("with means:", printed) <= 1
    assert "Patricia sent a hat to Warren" in printed


def test_own_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example("own_dataset").main([])
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and set(rows[0]) == {"clean", "corrupted", "answer", "distractor"}
    assert figure("logit difference", printed) > 0.5 * figure("of the model", printed) > 1
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    example("own_dataset").main(["demo", "--data", "mine.jsonl"])
    assert "wrote" not in capsys.readouterr().out


def test_share_on_hub(tmp_path: Path) -> None:
    with HubServer({"secret": "me"}) as hub:
        code = f"""
        import runpy, sys
        sys.argv[1:] = ["me/demo-ioi"]
        runpy.run_path({str(EXAMPLES / "share_on_hub.py")!r}, run_name="__main__")
        """
        ended = run_client(code, client_environment(hub, tmp_path, "secret"))
        assert ended.code == 0, ended.stderr
        repo = hub.repos["me/demo-ioi"]
        assert repo.private and {"circuit.json", "README.md", "means.safetensors"} <= set(repo.files())
        assert figure("faithfulness on unseen prompts", ended.stdout) > 0.8
        kept = json.loads(repo.files()["circuit.json"])["edges"]
        assert f"{len(kept)} edges came back" in ended.stdout
