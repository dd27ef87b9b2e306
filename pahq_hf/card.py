"""The model card (README.md) of a circuit."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCardData

from pahq_hf.circuit import Circuit

_TEMPLATE = """---
{metadata}
---

# Circuit of {base_model} on {task}

{kept:,} of {total:,} edges ({share:.2%}), found by ACDC with activation patching.

| | |
|---|---|
| base model | {base_model} |
| revision | {revision} |
| task | {task} ({examples} pairs) |
| metric | {metric} |
| threshold | {threshold} |
| precision | {precision} |
| edges | {kept:,} kept ({live:,} live), {tested:,} tested, {total:,} in all |
| {metric} of the full model, FP32 | {full} |
| {metric} of the circuit, FP32 | {final} |
| {metric} without any edge | {empty} |

## Load it

```python
from pahq_hf import Circuit

circuit = Circuit.from_pretrained("path/to/this/folder")
circuit.edges          # [("a0.h1->a2.h3<q>", 0.02), ...]
circuit.to_networkx()
```
"""


def render_card(circuit: Circuit) -> str:
    """The text of a circuit's README.md."""
    run = circuit.discovery
    metric: dict[str, Any] = run.get("metric", {})
    edges: dict[str, Any] = run.get("edges", {})
    arguments: dict[str, Any] = run.get("arguments", {})
    base_model = str(circuit.model.get("base_model", "unknown"))
    data = ModelCardData(
        base_model=base_model if "/" in base_model and not base_model.startswith(("/", ".")) else None,
        library_name="pahq_hf",
        license=circuit.model.get("license") or "other",
        tags=["circuit", "pahq", "mechanistic-interpretability"],
    )
    task: dict[str, Any] = run.get("task", {})
    return _TEMPLATE.format(
        metadata=data.to_yaml(),
        base_model=base_model,
        revision=circuit.model.get("revision") or "unknown",
        task=task.get("name", "unknown"),
        examples=task.get("examples", "?"),
        metric=metric.get("name", "metric"),
        threshold=arguments.get("threshold", "?"),
        precision=_precision(run.get("precision", {})),
        kept=circuit.edge_count,
        live=int(circuit.live.sum()),
        tested=edges.get("tested", 0),
        total=circuit.graph.edge_count,
        share=circuit.edge_count / circuit.graph.edge_count,
        full=_number(metric.get("full")),
        final=_number(metric.get("fp32")),
        empty=_number(metric.get("empty")),
    )


def _precision(precision: dict[str, Any]) -> str:
    regime = str(precision.get("regime", "?"))
    return regime if regime in ("fp32", "?") else f"{regime}, {precision.get('format')}"


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, (int, float)) else "?"
