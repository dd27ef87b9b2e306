"""A sweep of thresholds against a run per threshold: in one process, and as commands."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.acdc_speed import output_file, positive
from benchmarks.variants import Variant
from pahq_hf import Circuit, PAHQModel, Sweep, load_task
from pahq_hf.errors import PAHQError
from pahq_hf.search.sweep_result import check_thresholds
from pahq_hf.search.versions import versions
from pahq_hf.tasks.metrics import known_metrics

_THRESHOLDS = "0.3,0.1,0.05,0.03,0.01,0.005,0.002,0.001"
_EPILOG = """\
ways, which take turns --repeats times; every one writes the same circuits to a new folder
  sweep           PAHQModel.sweep in this process; the model is loaded already.
  runs            PAHQModel.discover at every threshold in this process, the model loaded once, too.
  sweep command   `pahq sweep` as a process of its own: start, imports and loading are in it.
  run commands    `pahq discover` at every threshold, each a process of its own.

figures
  s               Wall-clock seconds, the median of the repeats; all are in the JSON.
  / sweep         Over the sweep's of the same kind (in this process, or as a command).
  search s        Seconds of the searches alone, without capturing, evaluating, writing.
  evaluations     Metric values the engine computed in the searches.

thresholds
  reused          Metric values known from another threshold's search; computed + reused can exceed a
                  separate run's evaluations by the one or two that take a search up where it parts.
"""
Circuits = Mapping[float, Circuit]


@dataclass
class Way:
    """One way to the circuits of all thresholds.

    Attributes:
        name: Its name.
        seconds: Of every repeat.
        search_seconds: Of the searches alone, of every repeat.
        evaluations: Metric values computed.
        same: Whether it found the sweep's circuits, to the bit.
    """

    name: str
    seconds: list[float]
    search_seconds: list[float]
    evaluations: int = 0
    same: bool = True

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that was asked for. Returns a JSON-ready document."""
    taus = check_thresholds([float(tau) for tau in options.thresholds.split(",")])
    variant: Variant = options.precision
    model = PAHQModel.from_pretrained(options.model, variant.pahq)
    task = load_task(options.task, model.tokenizer, n=options.n, seed=options.seed)
    settings: dict[str, Any] = {"metric": options.metric, "readers": options.readers, "progress": False}
    if variant.margin is not None:
        settings["margin"] = variant.margin

    def sweep(out: Path) -> Circuits:
        return model.sweep(task, thresholds=taus, out=out / "sweep", **settings)

    def runs(out: Path) -> Circuits:
        return {tau: model.discover(task, threshold=tau, out=out / str(tau), **settings) for tau in taus}

    def sweep_command(out: Path) -> Circuits:
        _command(options, variant, "sweep", out / "sweep", "--thresholds", ",".join(map(str, taus)))
        return Sweep.from_pretrained(out / "sweep")

    def run_commands(out: Path) -> Circuits:
        for tau in taus:
            _command(options, variant, "discover", out / str(tau), "--threshold", str(tau))
        return {tau: Circuit.from_pretrained(out / str(tau)) for tau in taus}

    ways: dict[str, Callable[[Path], Circuits]] = {"sweep": sweep, "runs": runs}
    if not options.no_commands:
        ways |= {"sweep command": sweep_command, "run commands": run_commands}
    model.discover(task, threshold=taus[-1], **settings)  # the first run in a process is slower
    measured = {name: Way(name, [], []) for name in ways}
    first: Circuits | None = None
    separate: Circuits = {}
    for _ in range(options.repeats):
        for name, way in ways.items():
            found = _time(way, measured[name])
            if first is None:
                first = found
            if name == "runs":
                separate = found
            measured[name].same &= all(_same(found[tau], first[tau]) for tau in taus)
    assert isinstance(first, Sweep)
    return {
        "benchmark": "sweep",
        "arguments": {**vars(options), "precision": variant.name, "json": None},
        "graph": {"edges": model.graph.edge_count},
        "task": {"name": task.name, "examples": len(task), "tokens": task.length},
        "versions": versions(),
        "ways": [
            {**asdict(way), "median": way.median, "ratio": way.median / measured[_base(way)].median}
            for way in measured.values()
        ],
        "rows": [
            {**asdict(row), "separate": separate[row.threshold].discovery["evaluations"]}
            for row in first.rows
        ],
    }


def _base(way: Way) -> str:
    return "sweep command" if "command" in way.name else "sweep"


def _time(way: Callable[[Path], Circuits], into: Way) -> Circuits:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        found = way(Path(folder))
        into.seconds.append(time.perf_counter() - started)
    facts = [circuit.discovery for circuit in found.values()]
    into.search_seconds.append(sum(one["seconds"]["search"] for one in facts))
    into.evaluations = sum(one["evaluations"] for one in facts)
    sys.stderr.write(f"{into.name}: {into.seconds[-1]:.2f} s\n")
    return found


def _same(ours: Circuit, theirs: Circuit) -> bool:
    pairs = ((ours.kept, theirs.kept), (ours.scores, theirs.scores), (ours.tested, theirs.tested))
    return all(np.array_equal(a, b) for a, b in pairs)


def _command(options: argparse.Namespace, variant: Variant, command: str, out: Path, *more: str) -> None:
    """Run `pahq` in a process of its own.

    Raises:
        SystemExit: If it fails; it has said why.
    """
    pahq = variant.pahq
    wanted = {
        "--task": options.task,
        "--n": options.n,
        "--seed": options.seed,
        "--metric": options.metric,
        "--readers": options.readers,
        "--precision": pahq.regime,
        "--format": pahq.format,
        "--compute": pahq.compute,
        "--active": pahq.active,
        "--margin": variant.margin,
    }
    arguments = [f"{name}={value}" for name, value in wanted.items() if value is not None]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pahq_hf",
            command,
            options.model,
            *arguments,
            f"--out={out}",
            "--json",
            *more,
        ],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1"},
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.returncode)


def show(document: dict[str, Any], console: Console) -> None:
    """Print a document of `measure` as tables."""
    arguments, task = document["arguments"], document["task"]
    console.print(
        f"{arguments['model']}, {document['graph']['edges']:,} edges; {task['name']}, {task['examples']} x "
        f"{task['tokens']} tokens; {arguments['precision']}; {len(document['rows'])} thresholds; "
        f"{document['versions']['threads']} thread(s)",
        highlight=False,
    )
    table = Table(title="Ways", title_justify="left")
    for number, title in enumerate(("way", "s", "/ sweep", "search s", "evaluations", "same circuits")):
        table.add_column(title, justify="right" if number else "left")
    for way in document["ways"]:
        table.add_row(
            way["name"],
            f"{way['median']:.2f}",
            f"{way['ratio']:.2f}",
            f"{statistics.median(way['search_seconds']):.2f}",
            f"{way['evaluations']:,}",
            "yes" if way["same"] else "NO",
        )
    console.print(table)
    table = Table(title="Thresholds", title_justify="left")
    for title in ("tau", "kept", "tested", "computed", "reused", "separate run's", "metric"):
        table.add_column(title, justify="right")
    for row in document["rows"]:
        counts = (row[name] for name in ("kept", "tested", "evaluations", "reused", "separate"))
        table.add_row(f"{row['threshold']:g}", *(f"{count:,}" for count in counts), f"{row['metric']:.4g}")
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep", description=__doc__, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("model", metavar="MODEL", help="Hub id, folder, or 'demo'")
    made.add_argument("--task", default="ioi", help="task name or data (default: ioi)")
    made.add_argument("--n", type=int, default=16, help="prompt pairs (default: 16)")
    made.add_argument("--seed", type=int, help="seed of the task generator (default: 0)")
    made.add_argument("--thresholds", default=_THRESHOLDS, help=f"default: {_THRESHOLDS}")
    made.add_argument("--metric", choices=known_metrics(), default="kl", help="default: kl")
    made.add_argument("--readers", help="search only readers that match these globs")
    made.add_argument(
        "--precision", type=Variant.parse, default=Variant.parse("pahq"),
        help="REGIME[:FORMAT][:compute=..][:active=both][:margin=M] (default: pahq)",
    )  # fmt: skip
    made.add_argument("--repeats", type=positive, default=3, help="turns (default: 3)")
    made.add_argument("--no-commands", action="store_true", help="in this process only")
    made.add_argument("--json", type=output_file, metavar="FILE", help="write everything measured there")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        document = measure(options)
    except (PAHQError, ValueError) as error:
        sys.stderr.write(f"sweep: {error}\n")
        return 2
    console = Console()
    show(document, console if console.is_terminal else Console(width=100))
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
