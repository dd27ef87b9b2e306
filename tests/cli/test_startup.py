"""What a command or an import costs before anything is done: what is imported, and what is printed."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import pahq_hf.engine.memory_plan
from pahq_hf import Circuit
from pahq_hf.circuit.graph import Graph, GraphSpec
from tests.helpers import run_main

DRIVER = """
import contextlib, io, json, sys
from pahq_hf.cli.app import main
found = {}
for name, arguments in json.loads(sys.argv[1]).items():
    sys.argv = ["pahq", *arguments]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main()
    found[name] = [out.getvalue(), [name for name in ("torch", "transformers") if name in sys.modules]]
print(json.dumps(found))
"""


def python(code: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ if env is None else env,
    )


@pytest.fixture(scope="module")
def circuit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A circuit's folder."""
    graph = Graph(GraphSpec(layers=2, heads=2, kv_groups=1))
    kept = graph.no_edges()
    kept[graph.parse_edge("input->logits")] = True
    folder = tmp_path_factory.mktemp("startup") / "circuit"
    Circuit(graph, kept, kept * 0.5, graph.all_edges, {"base_model": "tiny"}).save_pretrained(folder)
    return folder


LIGHT: dict[str, Callable[[Path], list[str]]] = {
    "show": lambda folder: ["show", str(folder)],
    "a page": lambda folder: ["show", str(folder), "--html", str(folder.parent / "page.html")],
    "families": lambda folder: ["families"],
    "one family": lambda folder: ["families", "olmo2", "--json"],
    "tasks": lambda folder: ["tasks"],
    "compare": lambda folder: ["compare", str(folder), str(folder), "--json"],
    "export": lambda folder: [
        "export",
        str(folder),
        "--out",
        str(folder.parent / "edges.csv"),
        "--format",
        "csv",
    ],
    "help": lambda folder: ["discover", "--help"],
    "a MIB graph": lambda folder: ["export", str(folder), "--out", str(folder.parent / "mib.json")],
    "back": lambda folder: ["import", str(folder.parent / "mib.json"), "--out", str(folder.parent / "back")],
}


@pytest.fixture(scope="module")
def light(circuit: Path) -> dict[str, tuple[str, list[str]]]:
    """What each command of `LIGHT` printed, and what was imported by then: all in one process, in order."""
    commands = {name: command(circuit) for name, command in LIGHT.items()}
    found: dict[str, tuple[str, list[str]]] = json.loads(python(DRIVER, json.dumps(commands)).stdout)
    return found


@pytest.mark.parametrize("name", LIGHT)
def test_commands_that_need_no_model_import_no_torch(
    name: str, light: dict[str, tuple[str, list[str]]]
) -> None:
    printed, imported = light[name]
    assert imported == []
    assert printed or name in ("a page", "export", "a MIB graph", "back")


def test_import_brings_a_mib_graph_without_torch(
    circuit: Path, light: dict[str, tuple[str, list[str]]]
) -> None:
    assert light["back"][1] == []
    assert Circuit.from_pretrained(circuit.parent / "back").edges == Circuit.from_pretrained(circuit).edges


def test_info_prints_the_graph_before_it_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is still in a buffer by then."""

    class Planning(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise Planning

    monkeypatch.setattr(pahq_hf.engine.memory_plan, "report", fail)
    for more, said in ([], True), (["--json"], False):
        with (tmp_path / "out").open("w") as out, redirect_stdout(out):
            assert run_main("info", "demo", *more) == 70  # of an error that is not foreseen
            printed = (tmp_path / "out").read_text()
        assert ("edges" in printed and "479" in printed) if said else printed == ""


LEVELS = """
names = ("torchao", "torch.utils._pytree", "transformers")
print(json.dumps([logging.getLogger(name).level for name in names]))
"""
PLAIN = "import json, logging, torch, transformers; from transformers import AutoModel" + LEVELS
QUIET = f"""
import json, logging
from pahq_hf import PAHQConfig, PAHQModel
PAHQModel.from_pretrained("demo", PAHQConfig(regime="fp32")){LEVELS}
PAHQModel.from_pretrained("demo", PAHQConfig(regime="pahq")){LEVELS}
"""


def test_python_is_as_quiet_as_the_command_line() -> None:
    loud = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHAO_", "HF_HUB_DIS"))}
    done = python(QUIET, env=loud)
    assert done.stderr == ""
    levels = [json.loads(line) for line in done.stdout.splitlines()]
    assert levels[0][0] == levels[1][0] == logging.NOTSET, "torchao may warn again once it is imported"
    plain = json.loads(python(PLAIN, env=loud).stdout)
    assert levels == [plain, plain], "loggers are left as they were"
