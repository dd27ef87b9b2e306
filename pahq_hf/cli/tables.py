"""Circuits as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from pahq_hf.circuit.bootstrap_facts import of_resamples
from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.graph import READER_KINDS, BoolArray, ReaderKind, edge_list
from pahq_hf.circuit.render.facts import run_facts
from pahq_hf.circuit.verdict import Verdict

if TYPE_CHECKING:  # these rooms need torch, which takes longer to import than most tables to print
    from pahq_hf.engine.memory_plan import MemoryReport
    from pahq_hf.modeling.architectures.shipped import FamilyFacts
    from pahq_hf.search.sweep_result import SweepRow

_TOP = 15


def facts_table(facts: dict[str, Any]) -> Table:
    """Names and values in two columns; nested facts are flattened."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in _flat(facts):
        table.add_row(Text(name), Text(_text(value)))
    return table


def families_table(families: Sequence[FamilyFacts]) -> Table:
    """What families there are, and how they differ."""
    table = Table(title="Model families", title_justify="left")
    for title in ("family", "blocks", "positions", "also"):
        table.add_column(title)
    for family in families:
        table.add_row(*map(Text, (family.name, family.blocks, family.positions, family.also)))
    return table


def memory_table(report: MemoryReport, n: int, length: int) -> Table:
    """Bytes by part and format, and what a run will need."""
    table = Table(title="Memory", title_justify="left")
    table.add_column("part")
    table.add_column("format")
    for title in ("MB", "MB in FP32", "share"):
        table.add_column(title, justify="right")

    def row(part: str, fmt: str, size: int, full: int | None = None) -> None:
        against = "" if full is None else f"{full / 1e6:,.1f}"
        share = "" if not full else f"{size / full:.1%}"
        table.add_row(part, fmt, f"{size / 1e6:,.1f}", against, share)

    for share in report.shares:
        row(share.part, share.format, share.bytes, share.bytes_fp32)
    row("all weights", "", report.weights, report.weights_fp32)
    table.add_section()
    row(f"activations, {n} pairs of {length} tokens", report.stored, report.activations)
    row("working memory", "", report.working)
    row("Python and its libraries", "", report.interpreter)
    row("expected peak", "", report.peak)
    return table


def run_table(circuit: Circuit) -> Table:
    """What ran and what came out."""
    return facts_table(run_facts(circuit))


def layer_table(circuit: Circuit) -> Table:
    """Kept edges per layer and kind of reader, and which heads take part."""
    table = Table(title="Kept edges by layer", title_justify="left")
    table.add_column("layer")
    for kind in READER_KINDS[:-1]:
        table.add_column(kind, justify="right")
    table.add_column("heads")
    graph = circuit.graph
    written: BoolArray = np.any(circuit.kept, axis=0)
    for layer in reversed(range(graph.spec.layers)):
        counts = [_count(circuit, layer, kind) for kind in READER_KINDS[:-1]]
        heads = [str(h) for h in range(graph.spec.heads) if written[graph.head_writer(layer, h)]]
        table.add_row(str(layer), *(str(count) if count else "·" for count in counts), " ".join(heads))
    table.caption = f"logits: {_count(circuit, 0, 'logits')} edges"
    return table


def edge_table(circuit: Circuit, count: int = _TOP) -> Table:
    """The kept edges with the largest scores; those that lead nowhere are marked, and grey."""
    pairs = edge_list(circuit.kept)
    scores = np.array([circuit.scores[r, w] for r, w in pairs])
    order = np.argsort(-np.abs(scores), kind="stable")[:count]
    table = Table(title=f"Strongest {len(order)} edges", title_justify="left")
    table.add_column("edge")
    table.add_column("score", justify="right")
    for number in order:
        r, w = pairs[number]
        mark = " (estimate)" if circuit.scored.is_estimate(r, w) else ""
        gate = circuit.scored.gate(r, w)
        mark += "" if gate is None else f" {gate}"
        share = circuit.scored.frequency(r, w)
        mark += "" if share is None else f" in {of_resamples(share)}"
        dead = not circuit.live[r, w]
        mark += " dead" if dead else ""
        name = Text(circuit.graph.edge_name(r, w))
        table.add_row(name, f"{scores[number]:+.4g}{mark}", style="dim" if dead else "")
    return table


def node_table(circuit: Circuit, count: int = _TOP) -> Table | None:
    """The kept heads and MLPs with the largest scores; None where edges were kept or removed."""
    nodes = circuit.scored_nodes
    if nodes is None:
        return None
    kept = np.flatnonzero(nodes.kept & nodes.tested)
    order = kept[np.argsort(-np.abs(nodes.scores[kept]), kind="stable")[:count]]
    table = Table(title=f"Strongest {len(order)} nodes", title_justify="left")
    table.add_column("node")
    table.add_column("score", justify="right")
    for node in order.tolist():
        table.add_row(Text(circuit.graph.writers[node].name), f"{nodes.scores[node]:+.4g}")
    return table


def sweep_table(rows: Sequence[SweepRow]) -> Table:
    """A sweep's circuits, one a line."""
    table = Table(
        title="Circuits by threshold", title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0)
    )
    metrics = list(dict.fromkeys((rows[0].name, "kl")))
    # Short, and no column more: a terminal has 80 of them.
    of_nodes = rows[0].nodes is not None  # all of their edges are live
    counts = ("nodes", "edges") if of_nodes else ("kept", "live")
    for title in ("tau", *counts, "tested", "computed", "reused", *metrics, "faithful", "top-1", "seconds"):
        table.add_column(title, justify="right")
    table.add_column("verdict")
    for row in rows:
        values = [row.metric, row.kl][: len(metrics)]
        table.add_row(
            f"{row.threshold:g}",
            *(f"{count:,}" for count in (*_sizes(row), row.evaluations, row.reused)),
            *(f"{value:.4g}" for value in values),
            "" if row.faithfulness is None else f"{row.faithfulness:.4f}",
            "" if row.verdict is None else f"{row.verdict.accuracy:.4g}",
            f"{row.seconds:.1f}",
            "" if row.verdict is None else _verdict_word(row.verdict),
        )
    doubtful = [f"{row.threshold:g}" for row in rows if row.verified is False]
    notes = [f"NOT VERIFIED by the hooks engine: tau {', '.join(doubtful)}"] if doubtful else []
    audits = [f"  tau {row.threshold:g}: {row.estimates.text}" for row in rows if row.estimates is not None]
    if audits:
        notes += ["Decisions like ACDC's:", *audits]
    if notes:
        table.caption, table.caption_justify = "\n".join(notes), "left"
    return table


def _sizes(row: SweepRow) -> tuple[int, int, int]:
    """What a circuit has, twice, and how many were tested: edges, or nodes where these are the units."""
    if row.nodes is None or row.nodes_tested is None:
        return row.kept, row.live, row.tested
    return row.nodes, row.kept, row.nodes_tested


def _verdict_word(verdict: Verdict) -> str:
    kind = {"empty": "empty", "disconnected": "no path", "whole": "whole"}.get(verdict.kind)
    return kind or ("poor" if verdict.poor else "faithful")


def _count(circuit: Circuit, layer: int, kind: ReaderKind) -> int:
    readers = circuit.graph.layer_readers(layer, kind)
    return int(circuit.kept[readers.start : readers.stop].sum())


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in facts.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
