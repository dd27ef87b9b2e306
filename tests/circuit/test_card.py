"""The card of a circuit: what it says, and that no text from outside becomes markup in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pahq_hf.circuit.card import render_card
from tests.circuit.small import small
from tests.helpers import files_of


def card_parts(text: str) -> tuple[dict[str, Any], str, dict[str, str]]:
    """Front matter, body, and the two-column table."""
    _, front, body = text.split("---\n", 2)
    rows = [line for line in body.splitlines() if line.startswith("| ") and line != "| | |"]
    cells = [row.replace("\\|", "\0").strip("|").split("|") for row in rows]
    assert all(len(row) == 2 for row in cells), rows
    return yaml.safe_load(front), body, {k.strip(): v.strip().replace("\0", "|") for k, v in cells}


def test_card_says_what_ran() -> None:
    circuit = small(
        task={"name": "ioi", "examples": 20},
        metric={"name": "kl", "full": 0.0, "empty": 3.25, "fp32": 0.125},
        arguments={"threshold": 0.05},
        precision={"regime": "rtn", "format": "int8"},
        edges={"tested": 77},
    )
    front, body, table = card_parts(render_card(circuit))
    assert front["base_model"] == "me/model"
    assert front["library_name"] == "pahq_hf" and front["license"] and "circuit" in front["tags"]
    assert table["task"] == "ioi (20 pairs)"
    assert "| task | ioi (1 pair) |" in render_card(small(task={"name": "ioi", "examples": 1}))
    assert table["threshold"] == "0.05"
    assert table["precision"] == "rtn, int8"
    assert table["kl of the circuit, FP32"] == "0.125"
    assert table["kl without any edge"] == "3.25"
    total = circuit.graph.edge_count
    live = int(circuit.live.sum())
    assert table["edges"] == f"{circuit.edge_count} kept ({live} live), 77 tested, {total} in all"
    assert "# Circuit of me/model on ioi\n" in body
    assert "Circuit.from_pretrained" in body


@pytest.mark.parametrize(
    "text", ["a|b", "x\n---\nevil: true", "{kept} {0} %s", "<b>[l](u)`*", "a: b # c", "é…"]
)
def test_card_survives_any_name(text: str) -> None:
    circuit = small(task={"name": text, "examples": 1}, metric={"name": "kl"})
    circuit.model = {"base_model": text, "revision": text}
    front, body, table = card_parts(render_card(circuit))
    assert "base_model" not in front  # such a thing is no Hub id
    assert "evil" not in front
    shown = " ".join(text.split())
    assert table["revision"].replace("\\", "") == shown
    prose = body.split("## Load it")[0].replace("![The circuit, layers from bottom to top](circuit.png)", "")
    for letter in "<[`*":
        assert letter not in prose.replace(f"\\{letter}", "")


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("gpt2", True), ("me/model", True), ("demo", False), ("/tmp/model", False), ("./model", False),
        ("a/b/c", False), ("unknown", False), ("tests", False),
    ],
)  # fmt: skip
def test_card_links_hub_models_only(name: str, hub: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])  # there `tests` is a folder
    circuit = small()
    circuit.model = {"base_model": name}
    assert card_parts(render_card(circuit))[0].get("base_model") == (name if hub else None)


def test_card_of_a_circuit_that_nobody_discovered() -> None:
    circuit = small()
    circuit.model = {}
    _, _, table = card_parts(render_card(circuit))
    assert table["base model"] == "unknown" and table["threshold"] == "?"


def test_an_existing_readme_is_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    small().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "circuit.json" in files_of(tmp_path)
