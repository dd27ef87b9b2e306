"""Memory of a discovery from load to circuit, by precision regime and format, each in its own process."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.capture_memory import random_task
from benchmarks.rows import settled_memory
from benchmarks.variants import Variant
from pahq_hf import PAHQModel, load_task
from pahq_hf.config import EngineConfig
from pahq_hf.errors import PAHQError
from pahq_hf.precision.memory import PeakMemory, read_memory
from pahq_hf.search.acdc import search
from pahq_hf.search.acdc_options import ACDCConfig
from pahq_hf.search.batches import AdaptiveBatch
from pahq_hf.search.pipeline import Run
from pahq_hf.search.registry import find_search
from pahq_hf.search.subject import Subject
from pahq_hf.tasks.base import Task

_EPILOG = """\
rows, given as REGIME[:FORMAT][:tables][:compute=..][:margin=..]
  tables           Embedding and unembedding are in the format too.

figures, in MB (10^6 bytes)
  linear           Resident bytes of linear weights, and their share of FP32's.
  resident         Rise of anonymous memory by loading the model, above interpreter and libraries.
  load             Its peak while loading.
  run              Its peak from the start of loading to the finished circuit.
  process          The same with the interpreter and its libraries (280 MB).
  RSS              Peak of mapped and anonymous pages; mapped checkpoint pages can be dropped at any time.
  tests, s, ms     Tests of the run, seconds of load and search, milliseconds per test.

FP32 weights of an FP32 checkpoint on the CPU are mapped from their file by transformers and so are not
anonymous; compare regimes on BF16 checkpoints, which FP32 has to convert.
"""


@dataclass
class MemoryRow:
    """A row of figures; see --help."""

    name: str
    linear: float
    linear_share: float
    resident: float
    load: float
    run: float
    process: float
    rss: float
    tests: int
    kept: int
    load_seconds: float
    search_seconds: float


def measure(options: argparse.Namespace, variant: Variant) -> MemoryRow:
    """Load and discover in this process."""
    before = settled_memory()
    started = time.perf_counter()
    with PeakMemory() as whole:
        with PeakMemory() as loading:
            model = PAHQModel.from_pretrained(options.model, variant.pahq)
        loaded = settled_memory()
        load_seconds = time.perf_counter() - started
        task = _task(options, model)
        acdc = ACDCConfig(
            threshold=options.threshold, metric=options.metric, readers=options.readers, margin=variant.margin
        )
        budget = None if options.memory_budget is None else int(options.memory_budget * 1e6)
        engine = EngineConfig(memory_budget=budget, activation_store=options.activation_store)
        subject = Subject(model.patched, model.identity, task, model.pahq_config, engine)
        run = Run(find_search("acdc"), acdc, subject, progress=False)
        tests, kept, seconds = _search(run, options.stop_after)
    weights = model.patched.precision
    return MemoryRow(
        name=variant.name,
        linear=weights.nbytes / 1e6,
        linear_share=weights.nbytes / weights.nbytes_fp32,
        resident=(loaded - before) / 1e6,
        load=(loading.anonymous - before) / 1e6,
        run=(whole.anonymous - before) / 1e6,
        process=whole.anonymous / 1e6,
        rss=read_memory().get("rss", 0) / 1e6,
        tests=tests,
        kept=kept,
        load_seconds=load_seconds,
        search_seconds=seconds,
    )


class _Enough(Exception):
    """The search has tested as many edges as were asked for."""


def _search(run: Run[ACDCConfig], stop_after: int | None) -> tuple[int, int, float]:
    """Tests, kept edges and seconds of a whole run, or of a search from the top up to some tests."""
    if stop_after is None:
        circuit = run.run()
        seconds: float = circuit.discovery["seconds"]["search"]
        return int(circuit.tested.sum()), circuit.edge_count, seconds
    engine = run.bench.engine
    decided: list[int] = []

    def on_batch(_: int, count: int) -> None:
        decided.append(count)
        if sum(decided) >= stop_after:
            raise _Enough

    started = time.perf_counter()
    try:
        search(engine, run.options, batch=AdaptiveBatch(), on_batch=on_batch)
    except _Enough:
        engine.finish()
    return sum(decided), 0, time.perf_counter() - started


def _task(options: argparse.Namespace, model: PAHQModel) -> Task:
    if options.task == "random":
        return random_task(model.patched.vocab_size, options.n, options.length)
    return load_task(options.task, model.tokenizer, n=options.n)


def _in_process(arguments: Sequence[str], row: str) -> MemoryRow:
    command = [sys.executable, "-m", "benchmarks.memory", *arguments, "--only", row]
    environment = os.environ | {"TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return MemoryRow(**json.loads(done.stdout.splitlines()[-1]))


def _print(rows: list[MemoryRow]) -> None:
    table = Table()
    columns = ("row", "linear MB", "of FP32", "resident", "load", "run", "of first", "process", "RSS")
    for title in (*columns, "tests", "kept", "load s", "search s", "ms/test"):
        table.add_column(title, justify="left" if title == "row" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name, f"{row.linear:,.1f}", f"{row.linear_share:.1%}", f"{row.resident:,.0f}",
            f"{row.load:,.0f}", f"{row.run:,.0f}", f"{row.run / rows[0].run:.0%}", f"{row.process:,.0f}",
            f"{row.rss:,.0f}", f"{row.tests:,}", f"{row.kept:,}", f"{row.load_seconds:.1f}",
            f"{row.search_seconds:.1f}", f"{1e3 * row.search_seconds / max(1, row.tests):.1f}",
        )  # fmt: skip
    Console(width=170).print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", help="Hub id, folder, or 'demo'")
    parser.add_argument("--rows", nargs="+", default=["fp32", "pahq", "pahq:tables", "pahq:int8", "rtn"])
    parser.add_argument("--task", default="random", help="a task's name; by default random tokens")
    parser.add_argument("--n", type=int, default=4, help="prompt pairs")
    parser.add_argument("--length", type=int, default=12, help="tokens of a random prompt")
    parser.add_argument("--threshold", type=float, default=0.01)
    parser.add_argument("--metric", default="kl")
    parser.add_argument("--readers", help="search only readers matching these globs")
    parser.add_argument("--stop-after", type=int, help="end the search after so many tests from the top")
    parser.add_argument("--memory-budget", type=float, help="MB for candidates and decoded weights")
    parser.add_argument("--activation-store", default="ram", choices=("ram", "disk"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    try:
        if options.only is not None:
            row: dict[str, Any] = asdict(measure(options, Variant.parse(options.only)))
            print(json.dumps(row))
            return 0
        for name in options.rows:
            Variant.parse(name)
    except PAHQError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [_in_process(given, name) for name in options.rows]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        _print(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
