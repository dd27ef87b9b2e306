"""ACDC by the hooks engine (unaccelerated) against the sparse engine, on one model and one task."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as hf_logging

from benchmarks.rows import ENGINES, HOOKS, SEQUENTIAL, SPECULATIVE, Regime, Row, compare, settled_memory
from benchmarks.variants import Variant
from pahq_hf import ACDCConfig, PAHQModel, load_task
from pahq_hf.checkpoint.load import load_model, load_tokenizer
from pahq_hf.errors import ConfigError, PAHQError
from pahq_hf.search.acdc_run import with_margin
from pahq_hf.search.versions import versions
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.metrics import known_metrics

_FORWARDS = 7
_DESCRIPTION = """\
Time ACDC in one run on one model and one task: the hooks engine, one whole forward pass per test,
which is what ACDC costs without acceleration; the sparse engine, one candidate at a time; and the
sparse engine with speculation, the product's default. Within a precision regime all decide
the same edges."""

_EPILOG = """\
engines
  hooks          The Hugging Face model with forward hooks, once per test: unaccelerated ACDC.
  sequential     The sparse engine, one candidate at a time.
  speculative    The sparse engine, batches of cumulative removals. Always run: the tests that the
                 others' samples repeat are its.

figures
  forward        Median seconds of a bare forward pass: AutoModelForCausalLM as it comes, FP32, eager
                 attention, no cache, logits at every position, on the clean prompts.
  tests          Edges whose removal was tried and decided. Edges into a reader that nobody reads any
                 longer go without a test, as in ACDC.
  total s        Capturing the clean and corrupted runs, and the search; loading is not in it. With a ~
                 it is extrapolated: capture + tests x mean time of the sampled tests, and for
                 the sparse engine the speculative run's refresh, which is the same work.
  ms/test        total s over tests.
  x hooks        ms/test of the first hooks row over this row's.
  x forward      tests x forward / total s: how much cheaper a test is than a bare forward pass.
  evaluations    Metric values computed, those for a start or a component's change of precision included.
  candidates     Metric values computed to decide an edge.
  batches        Batches the candidates came in; one at a time, there are as many as tests.
  acceptance     tests over candidates. Candidates after the first edge of a batch that stays are waste.
  kept, final    Edges left at the end, and the metric then. A ! marks other edges than speculation's.
  peak, before   Anonymous memory of the process in MB: its peak during the row, and just before it (the
                 model, libraries and data). Mapped checkpoint pages are not in it.

phases (seconds, sparse engine; what is left is `other`)
  capture        The clean and the corrupted run, and constants from them.
  refresh        On turning to a reader: bringing the current circuit's activations up to date.
  node           What each candidate changes in the reader's input.
  propagation    The reader's node and the live nodes above it, for all candidates.
  metric         Final norm, unembedding, metric.
  tests          Hooks engine, and extrapolations: the tests.

samples
  Of the hooks and the sequential engine, --sample tests evenly spaced over the speculative run are made
  first, each at exactly its place in that run (the edges gone by then, the same component active), and
  only the test itself is timed. When capture + tests x mean is within --slow-limit seconds, the whole
  search is run and timed too, and is what the row shows; else the extrapolation is. Extrapolations
  leave out raising components, which happens once per reader; this favours them.
  `deviation` is the largest difference of these values from those of the speculative run, `agrees` that
  none exceeds 1e-5 (relative to values above 1).
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.acdc_speed",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("model", metavar="MODEL", help="Hub id, folder, or 'demo'")
    made.add_argument("--task", default="ioi", help="task name or data (default: ioi)")
    made.add_argument("--n", type=int, default=16, help="prompt pairs (default: 16)")
    made.add_argument("--seed", type=int, help="seed of the task generator (default: 0)")
    made.add_argument("--threshold", type=float, default=0.05, help="tau (default: 0.05)")
    made.add_argument("--metric", choices=known_metrics(), default="kl", help="default: kl")
    made.add_argument("--readers", help="search only readers that match these globs")
    made.add_argument(
        "--regimes", type=_variants, default=_variants("fp32,pahq,rtn,pahq-literal"),
        metavar="A,B", help="precision regimes, each REGIME[:FORMAT][:compute=fp32|bf16][:active=both]"
        "[:margin=M] (default: fp32,pahq,rtn,pahq-literal)",
    )  # fmt: skip
    made.add_argument(
        "--engines", type=_names(ENGINES), default=list(ENGINES), metavar="A,B",
        help=f"what runs beside speculative (default: {','.join(ENGINES)})",
    )  # fmt: skip
    made.add_argument(
        "--hooks-regimes", type=lambda text: text.split(","), default=["fp32"], metavar="A,B",
        help="regimes in which the hooks engine is timed, and checked against (default: fp32)",
    )  # fmt: skip
    made.add_argument("--sample", type=positive, default=40, help="tests timed one by one (default: 40)")
    made.add_argument(
        "--slow-limit", type=float, default=300.0, metavar="SECONDS",
        help="run a slow engine whole when it takes no longer than this (default: 300)",
    )  # fmt: skip
    made.add_argument("--memory-budget", type=int, metavar="BYTES", help="for candidates and weights")
    made.add_argument("--threads", type=positive, help="PyTorch's threads (default: its own choice)")
    made.add_argument("--json", type=output_file, metavar="FILE", help="write everything measured there")
    return made


def _variants(text: str) -> list[Variant]:
    try:
        return [Variant.parse(name) for name in text.split(",")]
    except (ConfigError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _names(known: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        wrong = [name for name in names if name not in known]
        if wrong or not names:
            raise argparse.ArgumentTypeError(f"choose from {', '.join(known)}")
        return names

    return parse


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def output_file(text: str) -> Path:
    """A file to be written at the end; a wrong folder should not be noticed only then."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write to {text}")
    return path


# -- measuring --------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that was asked for.

    Args:
        options: What `parser` parsed.

    Returns:
        A JSON-ready document.
    """
    task = load_task(
        options.task, load_tokenizer(options.model), n=options.n, seed=options.seed, metric=options.metric
    )
    forwards = time_forward(options.model, task, _FORWARDS)
    forward = statistics.median(forwards)
    _say(f"forward: {forward:.4f} s")
    rows: list[Row] = []
    graph = {}
    for variant in options.regimes:
        model = PAHQModel.from_pretrained(options.model, variant.pahq)
        graph = {"writers": len(model.graph.writers), "readers": len(model.graph.readers)}
        graph["edges"] = model.graph.edge_count
        rows += _regime_rows(model, task, options, variant)
        del model
    compare(rows, forward)
    return {
        "benchmark": "acdc_speed",
        "arguments": {name: _plain(value) for name, value in vars(options).items()},
        "graph": graph,
        "task": {"name": task.name, "examples": len(task), "tokens": task.length},
        "forward": {"seconds": forward, "all": forwards},
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
    }


def time_forward(model: str, task: Task, repeats: int) -> list[float]:
    """Seconds of untouched forward passes on the clean prompts, after one that is not counted."""
    hf = load_model(model)
    hf.eval()
    seconds = []
    with torch.inference_mode():
        for _ in range(1 + repeats):
            started = time.perf_counter()
            hf(
                input_ids=task.clean_ids,
                attention_mask=task.attention_mask,
                position_ids=task.position_ids,
                use_cache=False,
            )
            seconds.append(time.perf_counter() - started)
    return seconds[1:]


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, Variant):
        return value.name
    return str(value) if isinstance(value, Path) else value


def _regime_rows(model: PAHQModel, task: Task, options: argparse.Namespace, variant: Variant) -> list[Row]:
    settled_memory()
    acdc = ACDCConfig(
        threshold=options.threshold, metric=options.metric, readers=options.readers, margin=variant.margin
    )
    regime = Regime(
        model=model.patched,
        task=task,
        metric=options.metric,
        name=variant.name,
        pahq=model.pahq_config,
        acdc=with_margin(acdc, variant.pahq),
        sample=options.sample,
        limit=options.slow_limit,
        memory_budget=options.memory_budget,
    )
    wanted = [SPECULATIVE]
    if SEQUENTIAL in options.engines:
        wanted.append(SEQUENTIAL)
    if HOOKS in options.engines and variant.name in options.hooks_regimes:
        wanted.append(HOOKS)
    rows = []
    for engine in wanted:
        row = regime.row(engine)
        rows.append(row)
        mark = "" if row.complete else " (extrapolated)"
        _say(f"{row.regime} {engine}: {row.tests} tests, {row.seconds:.1f} s{mark}")
    return rows[::-1]  # slowest first


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


# -- showing ----------------------------------------------------------------------------------------


def show(document: dict[str, Any], console: Console) -> None:
    """Print a document of `measure` as tables."""
    arguments, task = document["arguments"], document["task"]
    console.print(
        f"{arguments['model']}, {document['graph']['edges']:,} edges; {task['name']}, {task['examples']} x "
        f"{task['tokens']} tokens, {arguments['metric']}, tau {arguments['threshold']:g}; "
        f"{document['versions']['threads']} thread(s); bare forward {document['forward']['seconds']:.4f} s",
        highlight=False,
    )
    rows = document["rows"]
    for table in (_speed_table(rows), _work_table(rows), _phase_table(rows), _sample_table(rows)):
        if table.row_count:
            console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(("regime", "engine", *columns)):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
    return table


def _speed_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("Speed", "ms/test", "total s", "x hooks", "x forward", "peak", "before")
    for row in rows:
        mark = "" if row["complete"] else "~"
        table.add_row(
            row["regime"],
            row["engine"],
            f"{mark}{row['ms_per_test']:.3f}",
            f"{mark}{row['seconds']:.2f}",
            _number(row["hooks_ratio"], ".1f"),
            _number(row["forward_ratio"], ".2f"),
            f"{row['anonymous'] / 1e6:.0f}",
            f"{row['anonymous_before'] / 1e6:.0f}",
        )
    return table


def _work_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("Work", "tests", "evaluations", "candidates", "batches", "acceptance", "kept", "final")
    for row in rows:
        mark = "!" if row["same_edges"] is False else ""
        table.add_row(
            row["regime"],
            row["engine"],
            _number(row["tests"], ","),
            _number(row["evaluations"], ","),
            _number(row["candidates"], ","),
            _number(row["batches"], ","),
            _number(row["acceptance"], ".3f"),
            mark + _number(row["kept"], ","),
            _number(row["final"], ".6g"),
        )
    return table


def _phase_table(rows: list[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows[::-1] for name in row["phases"]))
    table = _table("Seconds by phase", *names)
    for row in rows:
        seconds = [_number(row["phases"].get(name), ".3f") for name in names]
        table.add_row(row["regime"], row["engine"], *seconds)
    return table


def _sample_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("Sampled tests", "tests", "mean ms", "min", "max", "deviation", "relative", "agrees")
    for row in rows:
        sample = row["sample"]
        if sample is None:
            continue
        times = [f"{sample[name]:.3f}" for name in ("mean_ms", "min_ms", "max_ms")]
        deviations = [f"{sample[name]:.1e}" for name in ("deviation", "relative_deviation")]
        agrees = "yes" if sample["agrees"] else "NO"
        table.add_row(row["regime"], row["engine"], str(sample["tests"]), *times, *deviations, agrees)
    return table


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns the exit code."""
    options = parser().parse_args(arguments)
    if not sys.stderr.isatty():
        hf_logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        document = measure(options)
    except PAHQError as error:
        _say(f"acdc_speed: {error}")
        return 2
    console = Console()
    show(document, console if console.is_terminal else Console(width=120))
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
