"""What was measured about a circuit, as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from pahq_hf.cli.tables import facts_table
from pahq_hf.evaluation.audit import Audited

_ENDS = 5  # edges shown at each end of the drop-one effects
_OWN_TABLE = ("curve", "minimality", "completeness", "audit", "reference")


def evaluation_tables(facts: dict[str, Any]) -> list[Table]:
    """Tables of what `pahq_hf.evaluation.report.evaluate` found.

    Args:
        facts: Its result.

    Returns:
        The facts, and one table for each further measure there is.
    """
    tables = [facts_table({name: value for name, value in facts.items() if name not in _OWN_TABLE})]
    if "curve" in facts:
        tables.append(_curve_table(facts["curve"]))
    if "minimality" in facts:
        tables.append(_minimality_table(facts["minimality"]))
    if "completeness" in facts:
        table = facts_table(facts["completeness"])
        table.title, table.title_justify = "Completeness", "left"
        tables.append(table)
    if "audit" in facts:
        tables.append(_audit_table(Audited(**facts["audit"])))
    if "reference" in facts:
        tables.append(_reference_table(facts["reference"]))
    return tables


def _curve_table(curve: dict[str, Any]) -> Table:
    table = Table(title="Faithfulness over circuit size", title_justify="left")
    for title in ("share", "edges", "by score", "by |score|"):
        table.add_column(title, justify="right")
    signed, absolute = curve["signed"], curve["absolute"]
    rows = zip(
        signed["fractions"], signed["edges"], signed["faithfulness"], absolute["faithfulness"], strict=True
    )
    for share, count, first, second in rows:
        table.add_row(f"{share:g}", f"{count:,}", f"{first:.4f}", f"{second:.4f}")
    table.caption = (
        f"CPR {curve['cpr']:.4f}, CMD {curve['cmd']:.4f} "
        f"(over log size {curve['cpr_log']:.4f}, {curve['cmd_log']:.4f}); ranked by {curve['ranking']}"
    )
    return table


def _minimality_table(found: dict[str, Any]) -> Table:
    table = Table(title="What removing one edge does", title_justify="left")
    table.add_column("edge")
    table.add_column("effect", justify="right")
    effects = sorted(found["effects"].items(), key=lambda item: -item[1])
    shown = effects if len(effects) <= 2 * _ENDS else [*effects[:_ENDS], None, *effects[-_ENDS:]]
    for item in shown:
        if item is None:
            table.add_row("…", "")
        else:
            table.add_row(Text(item[0]), f"{item[1]:+.4g}")
    if found["could_go"] is not None:
        table.caption = f"edges that could go (effect below {found['threshold']:g}): {found['could_go']:,}"
    return table


def _audit_table(found: Audited) -> Table:
    said = f"{found.text} ({found.estimated:,} were estimates)"
    if not found.edges:  # no row to show
        return facts_table({"decisions like ACDC's": said})
    table = Table(title="Removed edges, tested again in FP32 where they were decided", title_justify="left")
    table.add_column("decided otherwise")
    for title in ("score", "exact"):
        table.add_column(title, justify="right")
    for name, scores in found.edges.items():
        table.add_row(Text(name), f"{scores['score']:+.4g}", f"{scores['exact']:+.4g}")
    table.caption = f"decisions like ACDC's: {said}"
    return table


def _reference_table(reference: dict[str, Any]) -> Table:
    table = Table(title="Against the reference", title_justify="left")
    table.add_column("of")
    for title in ("total", "truth", "precision", "recall", "AUC step", "AUC trapezoid"):
        table.add_column(title, justify="right")
    for name in ("edges", "nodes"):
        row = reference[name]
        auc = row["roc"]["auc"] if row["roc"] else {"step": None, "trapezoid": None}
        measures = (row["precision"], row["recall"], auc["step"], auc["trapezoid"])
        shown = ("–" if value is None else f"{value:.4f}" for value in measures)
        table.add_row(name, f"{row['total']:,}", f"{row['truth']:,}", *shown)
    return table
