"""The model card (README.md) of a circuit."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from pahq_hf.ablation import accuracies, plain_carries, works_plainly
from pahq_hf.circuit import PICTURE_NAME, Circuit
from pahq_hf.naming import hub_id_of, without_place
from pahq_hf.render.layout import DRAWN_EDGES
from pahq_hf.tasks.catalog import DESCRIPTIONS
from pahq_hf.terminal import printable

_METHODS = {
    "acdc": "ACDC with activation patching",
    "eap": "edge attribution patching (EAP)",
    "eap-ig": "edge attribution patching with integrated gradients (EAP-IG)",
    "hisp": "head importance (HISP)",
    "exact": "removing each edge alone",
    "random": "random scores",
}
_MARKUP = "\\`*<>[]|"
_LONGEST = 200  # characters of a text that comes from files
_TEMPLATE = Path(__file__).parent / "render" / "templates" / "card.md.jinja"


def render_card(
    circuit: Circuit,
    *,
    repo_id: str | None = None,
    subfolder: str | None = None,
    has_picture: bool = True,
) -> str:
    """The text of a circuit's README.md.

    Args:
        circuit: The circuit.
        repo_id: Where it is going to be on the Hub.
        subfolder: Folder inside that repository.
        has_picture: Whether its picture lies beside it.

    Returns:
        Markdown with metadata on top.
    """
    run = circuit.discovery
    metric: dict[str, Any] = run.get("metric", {})
    edges: dict[str, Any] = run.get("edges", {})
    arguments: dict[str, Any] = run.get("arguments", {})
    task: dict[str, Any] = run.get("task", {})
    model = without_place(circuit.model)
    base_model = str(model.get("base_model", "unknown"))
    where = [repr(repo_id or "path/to/this/folder")]
    if subfolder is not None:
        where.append(f"subfolder={subfolder!r}")
    text = _template().render(
        metadata=_metadata(circuit),
        base_model=f"{base_model} (a local folder)" if model.get("local") else base_model,
        fingerprint=model.get("fingerprint"),
        revision=circuit.model.get("revision") or "unknown",
        task=task.get("name", "unknown"),
        examples=task.get("examples", "?"),
        metric=metric.get("name", "metric"),
        ablation=arguments.get("ablation", "?"),
        method=_METHODS.get(str(run.get("method", "acdc")), run.get("method")),
        threshold=_threshold(arguments),
        screen=arguments.get("screen"),
        precision=_precision(run.get("precision", {})),
        kept=circuit.edge_count,
        live=int(circuit.live.sum()),
        tested=edges.get("tested", 0),
        total=circuit.graph.edge_count,
        full=metric.get("full"),
        final=metric.get("fp32"),
        empty=metric.get("empty"),
        verdict=circuit.verdict,
        confirmation=circuit.confirmation,
        versions=run.get("versions", {}) if isinstance(run.get("versions", {}), dict) else {},
        picture=PICTURE_NAME if has_picture else None,
        drawn=DRAWN_EDGES,
        where=", ".join(where),
        model_argument=_model_argument(circuit, base_model),
        accuracies=accuracies(circuit),
        carried=plain_carries(circuit) if works_plainly(circuit) else None,
        prompts=_prompts(task),
    )
    return printable(text)


@cache
def _template() -> jinja2.Template:
    # Markdown, not HTML: every value passes `cell`, which escapes what is markup there.
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"cell": _cell, "number": _number}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _metadata(circuit: Circuit) -> str:
    data = ModelCardData(
        base_model=hub_id_of(circuit.model),
        library_name="pahq_hf",
        license=circuit.model.get("license") or "other",
        tags=["circuit", "pahq", "mechanistic-interpretability"],
    )
    return str(data.to_yaml())


def _model_argument(circuit: Circuit, base_model: str) -> str:
    known = "demo" if base_model == "demo" else hub_id_of(circuit.model)
    argument = repr(known or "path/to/the/model")
    return f"{argument}, PAHQConfig(split_kv_groups=True)" if circuit.graph.spec.split_kv_groups else argument


def _prompts(task: dict[str, Any]) -> str | None:
    """The name by which `load_task` gives the task's prompts; None for data of one's own."""
    for known in DESCRIPTIONS:
        if task.get("generator") == known.name and task.get("corruption") in known.corruptions:
            first = task["corruption"] == known.corruptions[0]
            return repr(known.name if first else f"{known.name}:{task['corruption']}")
    return None


def _cell(value: object) -> str:
    """Text that stays in its table cell and is not markup."""
    text = " ".join(printable(str(value)).split())
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "…"
    return "".join(f"\\{letter}" if letter in _MARKUP else letter for letter in text)


def _threshold(arguments: dict[str, Any]) -> object:
    if "topn" not in arguments or arguments.get("threshold") is not None:
        return arguments.get("threshold", "?")
    return "none" if arguments["topn"] is None else f"that of the best {arguments['topn']} edges"


def _precision(precision: dict[str, Any]) -> str:
    regime = str(precision.get("regime", "?"))
    return regime if regime in ("fp32", "?") else f"{regime}, {precision.get('format')}"


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, (int, float)) else "?"
