"""The model card (README.md) of a circuit."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from pahq_hf.circuit import Circuit

_MARKUP = "\\`*<>[]|"
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
        base_model=base_model if _is_hub_id(base_model) else None,
        library_name="pahq_hf",
        license=circuit.model.get("license") or "other",
        tags=["circuit", "pahq", "mechanistic-interpretability"],
    )
    task: dict[str, Any] = run.get("task", {})
    return _TEMPLATE.format(
        metadata=data.to_yaml(),
        base_model=_cell(base_model),
        revision=_cell(circuit.model.get("revision") or "unknown"),
        task=_cell(task.get("name", "unknown")),
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


def _is_hub_id(name: str) -> bool:
    """Whether a model's name can stand for a Hub model; folders and the bundled demo cannot."""
    if name in ("demo", "unknown") or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _cell(value: object) -> str:
    """Text that stays in its table cell and is not markup."""
    text = " ".join(str(value).encode("utf-8", "replace").decode().split())
    return "".join(f"\\{letter}" if letter in _MARKUP else letter for letter in text)


def _precision(precision: dict[str, Any]) -> str:
    regime = str(precision.get("regime", "?"))
    return regime if regime in ("fp32", "?") else f"{regime}, {precision.get('format')}"


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, (int, float)) else "?"
