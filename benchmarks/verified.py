"""ACDC with verified estimates beside ACDC that tests every edge: decisions, tests and seconds by row."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.variants import Variant
from pahq_hf import PAHQModel, load_task
from pahq_hf.circuit.estimates import most_wrong
from pahq_hf.config import EngineConfig
from pahq_hf.engine.build import make_engine
from pahq_hf.engine.protocol import Engine
from pahq_hf.engine.setting import Setting
from pahq_hf.errors import PAHQError
from pahq_hf.search.acdc import search
from pahq_hf.search.acdc_options import ACDCConfig
from pahq_hf.search.acdc_run import with_margin
from pahq_hf.search.batches import AdaptiveBatch, BatchSize, FixedBatch
from pahq_hf.search.state import Search

_DESCRIPTION = """\
Search the same circuit twice, with every edge tested and with verified estimates, and compare. Rows that are
in --out already are not searched again, nor is what `all` found, which is kept beside it."""

_EPILOG = """\
figures
  tested      Edges decided; all of them are tested by `all`.
  kept        Edges of the circuit, by either.
  flips       Edges that one keeps and the other does not.
  J           Jaccard index of the two circuits.
  values      Metric values that the engine computed, by either, audits and slopes included.
  slopes      Circuits among them whose slopes were measured.
  exact       Edges that `verified` tested.
  audit       Wrong of audited estimates, and the most of the others that are wrong (95 %).
  seconds     Capture and search, by either. Only comparable on a quiet machine.
  CPU         The same in seconds of processor time.
"""

_TASKS = (
    "ioi/kl=0.05",
    "ioi/logit_diff=0.1",
    "greater_than/kl=0.02",
    "greater_than/prob_diff=0.01",
    "gendered_pronoun/kl=0.02",
    "gendered_pronoun/logit_diff=0.1",
    "sva/kl=0.02",
    "sva/logit_diff=0.1",
    "induction/kl=0.05",
    "induction/match_nll=0.2",
    "ioi/kl=0.01",
    "ioi/logit_diff=0.02",
    "greater_than/kl=0.005",
    "greater_than/prob_diff=0.0025",
    "gendered_pronoun/kl=0.005",
    "gendered_pronoun/logit_diff=0.02",
    "sva/kl=0.005",
    "sva/logit_diff=0.02",
    "induction/kl=0.01",
    "induction/match_nll=0.05",
)


@dataclass(frozen=True)
class Job:
    """A row: what is searched.

    Attributes:
        task: Generated task.
        metric: What is minimised.
        threshold: tau.
        precision: Regime and format.
    """

    task: str
    metric: str
    threshold: float
    precision: str

    @classmethod
    def parse(cls, text: str, precision: str) -> Job:
        """Read `ioi/kl=0.05`."""
        match = re.fullmatch(r"(\w+)/(\w+)=([0-9.e-]+)", text)
        if match is None:
            raise SystemExit(f"a task is TASK/METRIC=THRESHOLD, such as ioi/kl=0.05; got {text!r}")
        return cls(match[1], match[2], float(match[3]), precision)


@dataclass(frozen=True)
class Side:
    """One of the two searches.

    Attributes:
        kept: Edges of its circuit.
        values: Metric values computed.
        seconds: Capture and search.
        cpu: The same in processor time.
        metric: Of its circuit.
        phases: Seconds by phase of the engine.
    """

    kept: int
    values: int
    seconds: float
    cpu: float
    metric: float
    phases: dict[str, float]


def main() -> None:
    """Run the rows that are asked for."""
    args = _parser().parse_args()
    jobs = [Job.parse(task, precision) for precision in args.precisions for task in args.tasks]
    try:
        rows = list(_rows(args, jobs))
    except PAHQError as error:
        sys.exit(f"error: {error}")
    Console(width=190).print(_table(args, rows))


def _rows(args: argparse.Namespace, jobs: list[Job]) -> Iterator[dict[str, Any]]:
    out: Path = args.out
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    models: dict[str, PAHQModel] = {}
    for job in jobs:
        key = {**asdict(job), "model": args.model, "n": args.n, "audit": args.audit, "readers": args.readers}
        known = [row for row in done if all(row.get(name) == value for name, value in key.items())]
        if known:
            yield known[0]
            continue
        if job.precision not in models:
            models.clear()
            gc.collect()
            config = Variant.parse(job.precision).pahq
            models[job.precision] = PAHQModel.from_pretrained(args.model, config, device=args.device)
        name = f"{Path(args.model).name}-{job.task}-{job.metric}-{job.threshold:g}-{job.precision}-n{args.n}"
        kept = out.with_suffix("") / f"{name}-{args.seed}.npz"
        row = key | {"processor": processor(args.device)} | _compared(models[job.precision], job, args, kept)
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), file=sys.stderr)
        yield row


def _compared(model: PAHQModel, job: Job, args: argparse.Namespace, kept: Path) -> dict[str, Any]:
    """A row of a generated task."""
    task = load_task(job.task, model.tokenizer, n=args.n, seed=args.seed)
    setting = Setting(model.patched, task, job.metric, "corrupted", model.pahq_config)
    config = ACDCConfig(job.threshold, job.metric, readers=args.readers, tests="verified", audit=args.audit)
    return compared(setting, config, kept)


def compared(setting: Setting, config: ACDCConfig, kept: Path) -> dict[str, Any]:
    """Both searches, that of all edges taken from an earlier attempt where there is one.

    Args:
        setting: What is searched.
        config: The search by estimates.
        kept: Where the search of all edges is kept.

    Returns:
        What they found and took.
    """
    graph = setting.model.graph
    chosen = graph.match_readers(config.readers)[:, None] & graph.all_edges
    if kept.exists():
        with np.load(kept) as held:
            every, tested, side = held["kept"], int(held["tested"].sum()), json.loads(str(held["side"]))
    else:
        found, side = _searched(setting, replace(config, tests="all", audit=None))
        every, tested = found.kept, int(found.tested.sum())
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(kept, kept=every, tested=found.tested, scores=found.scores, side=json.dumps(side))
    ours, own_side = _searched(setting, config)
    counts = [record.counts for record in ours.records]
    estimated = sum(len(record.estimated) for record in ours.records)
    audited, wrong = sum(c.audited for c in counts), sum(c.wrong for c in counts)
    both, either = every & ours.kept & chosen, (every | ours.kept) & chosen
    return {
        "tested": tested,
        "kept": [int((side & chosen).sum()) for side in (every, ours.kept)],
        "flips": int((every != ours.kept).sum()),
        "jaccard": float(both.sum() / max(1, either.sum())),
        "slopes": sum(c.gradients for c in counts),
        "exact": int(ours.tested.sum()) - estimated,
        "estimated": estimated,
        "audited": audited,
        "wrong": wrong,
        "at_most": most_wrong(audited, wrong),
        "sides": {"all": side, "verified": own_side},
    }


def _searched(setting: Setting, config: ACDCConfig) -> tuple[Search, dict[str, Any]]:
    """One search, and what it took."""
    start, cpu = time.perf_counter(), time.process_time()
    engine = make_engine(setting, EngineConfig())
    found = search(engine, with_margin(config, setting.precision), batch=_batch(engine))
    side = Side(
        int(found.kept.sum()),
        engine.evaluations,
        round(time.perf_counter() - start, 2),
        round(time.process_time() - cpu, 2),
        found.metric,
        {phase: round(seconds, 2) for phase, seconds in engine.phases.take().items()},
    )
    del engine
    gc.collect()
    return found, asdict(side)


def processor(device: str) -> str:
    """What the processor is, and how many threads run on it; or what the card is."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).name
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def _batch(engine: Engine) -> BatchSize:
    return AdaptiveBatch() if engine.gains_by_batches else FixedBatch(1)


def _table(args: argparse.Namespace, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{Path(args.model).name}, n {args.n}, {rows[0]['processor'] if rows else ''}")
    for name in ("task", "precision", "tested", "kept", "flips", "J", "values", "slopes", "exact", "audit"):
        table.add_column(name)
    for name in ("seconds", "CPU", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        every, ours = row["sides"]["all"], row["sides"]["verified"]
        table.add_row(
            f"{row['task']} {row['metric']} {row['threshold']:g}",
            row["precision"],
            str(row["tested"]),
            "/".join(map(str, row["kept"])),
            str(row["flips"]),
            f"{row['jaccard']:.3f}",
            f"{every['values']}/{ours['values']}",
            str(row["slopes"]),
            str(row["exact"]),
            f"{row['wrong']} of {row['audited']}, {row['at_most']:.1%}",
            f"{every['seconds']:.1f}/{ours['seconds']:.1f}",
            f"{every['cpu']:.1f}/{ours['cpu']:.1f}",
            f"{every['cpu'] / max(0.01, ours['cpu']):.1f}",
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder or a name that PAHQModel.from_pretrained takes")
    parser.add_argument("--tasks", nargs="+", default=_TASKS, metavar="TASK/METRIC=TAU")
    parser.add_argument("--precisions", nargs="+", default=("fp32", "pahq"), metavar="REGIME[:FORMAT]")
    parser.add_argument("--n", type=int, default=8, help="prompt pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--audit", type=float, default=0.02, help="share of estimates that are audited")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--readers", default=None, help="globs of the readers that are searched")
    parser.add_argument("--out", type=Path, default=Path("verified.jsonl"), help="where rows are kept")
    return parser


if __name__ == "__main__":
    main()
