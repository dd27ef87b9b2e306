"""Code that comes with a model runs when `trust_remote_code` is given, and never else: nobody is asked."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pahq_hf import PAHQConfig, PAHQModel
from pahq_hf.errors import ConfigError, ModelLoadError, UnsupportedModelError
from pahq_hf.modeling.architectures.families import TABLE
from tests.helpers import FP32, run_main, save_tiny

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({ran!r}).write_text("ran")

class MineConfig(LlamaConfig):
    model_type = {family!r}

class Mine(LlamaForCausalLM):
    config_class = MineConfig

class Tokens(PreTrainedTokenizerFast):
    pass
"""


class Hostile:
    """A checkpoint that brings code, and whether that ran."""

    def __init__(self, root: Path, family: str) -> None:
        self.folder, self.ran = root / "hostile", root / "ran"
        save_tiny(self.folder)
        (self.folder / "code.py").write_text(CODE.format(ran=str(self.ran), family=family))
        self.change("config.json", model_type=family, auto_map=_map("AutoConfig", "AutoModelForCausalLM"))

    def change(self, name: str, **values: Any) -> None:
        path = self.folder / name
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | values))


def _map(*kinds: str) -> dict[str, Any]:
    known = {
        "AutoConfig": "code.MineConfig",
        "AutoModelForCausalLM": "code.Mine",
        "AutoTokenizer": ["code.Tokens", "code.Tokens"],
    }
    return {kind: known[kind] for kind in kinds}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Questions on stdin; each is answered with yes."""
    questions: list[str] = []

    def answer(question: str = "") -> str:
        questions.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    return questions


@pytest.fixture
def known_family(monkeypatch: pytest.MonkeyPatch) -> str:
    """A registered family whose config class only the model's own code has."""
    monkeypatch.setitem(TABLE, "mine", TABLE["llama"])
    return "mine"


COMMANDS: dict[str, Callable[[str, str], list[str]]] = {
    "info": lambda model, out: ["info", model, "--json"],
    "tasks": lambda model, out: ["tasks", "--model", model, "--json"],
    "discover": lambda model, out: ["discover", model, "--task", "ioi", "--out", out, "--json"],
    "sweep": lambda model, out: [
        "sweep",
        model,
        "--task",
        "ioi",
        "--thresholds",
        "1",
        "--out",
        out,
        "--json",
    ],
    "attribute": lambda model, out: ["attribute", model, "--task", "ioi", "--out", out, "--json"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_it_in_one_line(
    command: str,
    tmp_path: Path,
    known_family: str,
    asked: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    hostile = Hostile(tmp_path, known_family)
    capfd.readouterr()
    code = run_main(*COMMANDS[command](str(hostile.folder), str(tmp_path / "out")))
    out, err = capfd.readouterr()
    assert code == 2 and out == "" and asked == []
    assert "--trust-remote-code" in err and err.startswith("pahq: ") and err.count("\n") == 1
    assert not hostile.ran.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [FP32, PAHQConfig()], ids=["fp32", "pahq"])
@pytest.mark.parametrize("options", [{}, {"trust_remote_code": None}, {"trust_remote_code": False}], ids=str)
def test_python_refuses_it(
    config: PAHQConfig, options: dict[str, Any], tmp_path: Path, known_family: str, asked: list[str]
) -> None:
    hostile = Hostile(tmp_path, known_family)
    with pytest.raises(ModelLoadError, match="trust_remote_code=True"):
        PAHQModel.from_pretrained(hostile.folder, config, **options)
    assert asked == [] and not hostile.ran.exists()


@pytest.mark.parametrize("config", [FP32, PAHQConfig()], ids=["fp32", "pahq"])
def test_it_runs_when_trusted(
    config: PAHQConfig, tmp_path: Path, known_family: str, asked: list[str]
) -> None:
    hostile = Hostile(tmp_path, known_family)
    model = PAHQModel.from_pretrained(hostile.folder, config, trust_remote_code=True)
    assert type(model.base_model).__name__ == "Mine" and hostile.ran.exists() and asked == []


def test_a_family_nobody_knows_is_told_before_its_code_is_asked_for(tmp_path: Path, asked: list[str]) -> None:
    """Trusting the code would not help."""
    hostile = Hostile(tmp_path, "novel")
    with pytest.raises(UnsupportedModelError, match="'novel' is not supported"):
        PAHQModel.from_pretrained(hostile.folder)
    assert asked == [] and not hostile.ran.exists()


@pytest.mark.parametrize("config", [FP32, PAHQConfig()], ids=["fp32", "pahq"])
def test_a_known_model_is_loaded_by_known_code(config: PAHQConfig, tmp_path: Path, asked: list[str]) -> None:
    hostile = Hostile(tmp_path, "llama")
    model = PAHQModel.from_pretrained(hostile.folder, config)
    assert type(model.base_model).__name__ == "LlamaForCausalLM"
    assert asked == [] and not hostile.ran.exists()


def test_a_tokenizer_with_code_is_refused(
    tmp_path: Path, asked: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    hostile = Hostile(tmp_path, "llama")
    settings = {"tokenizer_class": "Tokens", "auto_map": _map("AutoTokenizer")}
    hostile.change("tokenizer_config.json", **settings)
    with pytest.raises(ModelLoadError, match=r"tokenizer.*trust_remote_code=True"):
        PAHQModel.from_pretrained(hostile.folder)
    assert run_main("tasks", "--model", str(hostile.folder), "--json") == 2
    assert asked == [] and not hostile.ran.exists() and capfd.readouterr().out == ""


@pytest.mark.parametrize("value", ["False", "no", 1])
def test_trust_is_yes_or_no(value: Any, tmp_path: Path, known_family: str) -> None:
    """A text is true in Python, whatever it says."""
    hostile = Hostile(tmp_path, known_family)
    with pytest.raises(ConfigError, match="trust_remote_code must be True or False"):
        PAHQModel.from_pretrained(hostile.folder, trust_remote_code=value)
    assert not hostile.ran.exists()


def test_evaluate_refuses_it(
    tmp_path: Path, known_family: str, asked: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    small = ["--task", "ioi", "--n", "2", "--readers", "logits", "--precision", "fp32"]
    assert run_main("discover", "demo", *small, "--out", str(run)) == 0
    hostile = Hostile(tmp_path, known_family)
    capfd.readouterr()
    assert run_main("evaluate", str(run), "--model", str(hostile.folder), "--task", "ioi", "--json") == 2
    out, err = capfd.readouterr()
    assert out == "" and "--trust-remote-code" in err and asked == [] and not hostile.ran.exists()
