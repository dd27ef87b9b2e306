"""What a command or an import costs before anything is done: what is imported, and what is printed."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pahq_hf import Circuit
from pahq_hf.circuit.graph import Graph, GraphSpec

DRIVER = """
import sys
from pahq_hf.cli.app import main
sys.argv = ["pahq", *sys.argv[1:]]
try:
    main()
finally:
    print("imported:", *(name for name in ("torch", "transformers") if name in sys.modules), file=sys.stderr)
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
}


@pytest.mark.parametrize("name", LIGHT)
def test_commands_that_need_no_model_import_no_torch(name: str, circuit: Path) -> None:
    done = python(DRIVER, *LIGHT[name](circuit))
    assert done.stderr.splitlines()[-1] == "imported:", done.stderr
    assert done.stdout or name in ("a page", "export")


def test_import_brings_a_mib_graph_without_torch(circuit: Path, tmp_path: Path) -> None:
    python(DRIVER, "export", str(circuit), "--out", str(tmp_path / "mib.json"))
    done = python(DRIVER, "import", str(tmp_path / "mib.json"), "--out", str(tmp_path / "back"))
    assert done.stderr.splitlines()[-1] == "imported:"
    assert Circuit.from_pretrained(tmp_path / "back").edges == Circuit.from_pretrained(circuit).edges


INFO = """
import os, sys
from pahq_hf import PAHQModel
import pahq_hf.engine.memory_plan
def fail(*args, **kwargs):
    os.write(2, b"planning")
    os._exit(3)  # nothing that is still in a buffer gets out
pahq_hf.engine.memory_plan.report = fail
from pahq_hf.cli.app import main
sys.argv = ["pahq", "info", "demo", *sys.argv[1:]]
main()
"""


def test_info_prints_the_graph_before_it_plans() -> None:
    done = subprocess.run([sys.executable, "-c", INFO], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "planning")
    assert "edges" in done.stdout and "479" in done.stdout
    done = subprocess.run([sys.executable, "-c", INFO, "--json"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "")


QUIET = """
import json, logging, sys
from pahq_hf import PAHQConfig, PAHQModel
PAHQModel.from_pretrained("demo", PAHQConfig(regime=sys.argv[1]))
levels = [logging.getLogger(name).level for name in ("torchao", "torch.utils._pytree", "transformers")]
print(json.dumps(levels))
"""


@pytest.mark.parametrize("regime", ["pahq", "fp32"])
def test_python_is_as_quiet_as_the_command_line(regime: str) -> None:
    loud = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHAO_", "HF_HUB_DIS"))}
    done = python(QUIET, regime, env=loud)
    assert done.stderr == ""
    plain = "import json, logging, torch, transformers; from transformers import AutoModel\n"
    plain += QUIET.splitlines()[-2] + "\n" + QUIET.splitlines()[-1]
    assert json.loads(done.stdout)[0] == logging.NOTSET, "torchao may warn again once it is imported"
    assert done.stdout == python(plain, env=loud).stdout, "loggers are left as they were"
