"""What is shared says which model a circuit is of, and not where on whose machine that lay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pahq_hf import Circuit, PAHQModel
from pahq_hf.circuit.card import render_card
from pahq_hf.circuit.naming import shared_name
from pahq_hf.errors import ConfigError
from tests.helpers import FP32, files_of, id_rows, run_main, save_tiny, write_rows
from tests.models import padded_prompts, random_task

TASK = random_task()
FAST = ["--precision", "fp32", "--readers", "logits", "--json"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data, whose path is a secret."""
    root = tmp_path_factory.mktemp("secret-place")
    save_tiny(root / "my-model", "gpt2")
    write_rows(root / "data.jsonl", id_rows(TASK))
    return root


def assert_kept_secret(folder: Path) -> None:
    """Assert that no file says where the model was; names of folders are told."""
    files = files_of(folder)
    assert files
    for name, content in files.items():
        assert b"secret-place" not in content, name


def front(card: str) -> str:
    return card.split("---")[1]


@pytest.mark.crossing
@pytest.mark.parametrize("command", ["discover", "attribute", "sweep"])
@pytest.mark.parametrize("hub", [None, "owner/name"])
def test_no_path_in_what_a_run_writes(
    command: str, hub: str | None, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = {
        "discover": ["--threshold", "0.1", *FAST],
        "sweep": ["--thresholds", "0.1", *FAST],
        "attribute": ["--topn", "9", "--precision", "fp32"],
    }
    given = [] if hub is None else ["--base-model", hub]
    where = [str(home / "my-model"), "--task", str(home / "data.jsonl"), "--out", str(out)]
    assert run_main(command, *where, *more[command], *given) == 0
    assert_kept_secret(out)
    run = out if command != "sweep" else out / "tau-0.1"
    model = Circuit.from_pretrained(run).model
    assert (model["base_model"], model["local"]) == ((hub, False) if hub else ("my-model", True))
    card = (run / "README.md").read_text()
    assert (f"base_model: {hub}" in front(card)) == (hub is not None)
    assert ("my-model (a local folder)" in card) == (hub is None) and model["fingerprint"] in card
    shown = tmp_path / "shown"
    shown.mkdir()
    assert run_main("show", str(run), "--html", str(shown / "page.html"), "--svg", str(shown / "c.svg")) == 0
    for fmt in ("mib", "csv", "graphml", "dot"):
        assert run_main("export", str(run), "--format", fmt, "--out", str(shown / f"c.{fmt}")) == 0
    assert_kept_secret(shown)
    assert run_main("evaluate", str(run), "--model", where[0], "--task", where[2], "--json") == 0
    capsys.readouterr()


@pytest.mark.parametrize("name", ["/home/me/model", "./model", "a/b/c", "", "demo", "no spaces"])
def test_a_base_model_is_an_id(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--task", "ioi", "--out", str(tmp_path / "out"), "--base-model", name]
    assert run_main("discover", "demo", *where) == 2
    assert "owner/name" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="such as owner/name"):
        PAHQModel.from_pretrained("demo", FP32, base_model=name)


def test_a_card_of_an_earlier_version_is_mended(home: Path, tmp_path: Path) -> None:
    """Their circuits hold the path; what is read, shown and saved again does not."""
    model = PAHQModel.from_pretrained(home / "my-model", FP32)
    circuit = model.attribute(TASK, topn=5)
    circuit.save_pretrained(tmp_path / "run")
    path = tmp_path / "run" / "circuit.json"
    document = json.loads(path.read_text())
    del document["cfg"]["local"]
    document["cfg"]["base_model"] = str(home / "my-model")
    path.write_text(json.dumps(document))
    found = Circuit.from_pretrained(tmp_path / "run")
    assert found.model == circuit.model
    assert "secret-place" not in render_card(found) + repr(found) + json.dumps(found.to_json())
    assert model.evaluate(found, TASK)["edges"] == 5


@pytest.mark.parametrize("finished", [True, False])
def test_runs_of_earlier_versions_are_resumed(finished: bool, home: Path, tmp_path: Path) -> None:
    model = PAHQModel.from_pretrained(home / "my-model", FP32)
    options: dict[str, Any] = {"threshold": 0.1, "out": tmp_path, "progress": False}
    circuit = model.discover(TASK, **options)
    if finished:
        document = json.loads((tmp_path / "circuit.json").read_text())
        del document["cfg"]["local"]
        document["cfg"]["base_model"] = str(home / "my-model")
        (tmp_path / "circuit.json").write_text(json.dumps(document))
    else:
        for name in ("circuit.json", "discovery.json", "scores.safetensors"):
            (tmp_path / name).unlink()
    again = model.discover(TASK, resume=True, **options)
    assert again.edges == circuit.edges and again.model == circuit.model


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = f"/home/me/.cache/huggingface/hub/models--meta--llama/snapshots/{commit}"
    (tmp_path / "owner" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "owner" / "here")
    (Path("me") / "mine").mkdir(parents=True)
    expected = {
        "gpt2": ("gpt2", False),
        "meta/llama": ("meta/llama", False),
        "demo": ("demo", False),
        "unknown": ("unknown", False),
        "me/mine": ("mine", True),
        ".": ("here", True),
        "/nowhere/gone": ("gone", True),
        "~/models/gpt2/": ("gpt2", True),
        "../../other": ("other", True),
        r"C:\Users\me\model": ("model", True),
        "a/b/c": ("c", True),
    }
    for name, (base_model, local) in expected.items():
        assert shared_name(name) == {"base_model": base_model, "local": local}, name
    assert shared_name(cached) == {"base_model": "meta/llama", "local": False, "revision": commit}


@torch.no_grad()
def test_a_wrapper_finds_its_model_again(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From anywhere on this machine, also when it was loaded by a relative path."""
    monkeypatch.chdir(home)
    model = PAHQModel.from_pretrained("my-model", FP32)
    assert model.identity.base_model == "my-model" and model.identity.local
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    again = PAHQModel.from_pretrained(tmp_path / "saved")
    ids = padded_prompts()["input_ids"]
    assert torch.equal(again(ids).logits, model(ids).logits)
    for subject in (model, again):
        with pytest.raises(ConfigError, match="say which model it is on the Hub") as caught:
            subject.push_to_hub("me/patched")
        assert "secret-place" not in str(caught.value)
