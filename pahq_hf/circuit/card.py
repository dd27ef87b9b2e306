"""The model card (README.md) of a circuit."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import jinja2
from huggingface_hub import ModelCardData

from pahq_hf.circuit.ablation import accuracies, carried_under, works_under
from pahq_hf.circuit.files import PICTURE_NAME
from pahq_hf.circuit.identity import ModelIdentity
from pahq_hf.circuit.render.asked import asked_facts, own_facts
from pahq_hf.circuit.render.facts import Described, gates_text, swapped_text
from pahq_hf.circuit.render.layout import DRAWN_EDGES
from pahq_hf.circuit.run_record import PrecisionFacts, RunRecord, TaskFacts
from pahq_hf.circuit.terminal import printable

_GENERATED = re.compile(r"\w+:\w+", re.ASCII)  # what goes into a code block
_MARKUP = "\\`*<>[]|"
_LONGEST = 200  # characters of a text that comes from files
_TEMPLATE = Path(__file__).parent / "render" / "templates" / "card.md.jinja"


def render_card(
    circuit: Described,
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
    run, edges, model = circuit.record, circuit.scored, circuit.identity
    task, metric, asked, plain = run.task, run.metric, run.arguments, circuit.plain_ablation
    base_model = model.base_model or "unknown"
    where = [repr(repo_id or "path/to/this/folder")]
    if subfolder is not None:
        where.append(f"subfolder={subfolder!r}")
    text = _template().render(
        metadata=_metadata(model),
        base_model=(f"{base_model} (a local folder)" if model.local else base_model)
        + ("" if model.adapter is None else f" with the adapter {model.adapter}"),
        fingerprint=model.fingerprint,
        revision=model.revision or "unknown",
        task=task.name or "unknown",
        examples="?" if task.examples is None else task.examples,
        metric=metric.name or "metric",
        ablation=asked.ablation or "?",
        method=run.title,
        asked=_asked(run),
        own={name: value for name, value in own_facts(run).items() if value is not None}
        | run.bootstrap.texts,
        screen=asked.screen,
        direction=None if asked.direction == "noising" else asked.direction,
        gates=gates_text(edges),
        swapped=swapped_text(run),
        criterion=None if asked.criterion == "signed" else asked.criterion,
        precision=_precision(run.precision),
        nodes=run.nodes,
        kept=edges.edge_count,
        live=int(edges.live.sum()),
        tested=run.edges.tested or 0,
        estimates=run.estimates,
        total=edges.graph.edge_count,
        full=metric.full,
        final=metric.fp32,
        empty=metric.empty,
        verdict=run.verdict,
        confirmation=run.confirmation,
        versions=run.versions,
        picture=PICTURE_NAME if has_picture else None,
        drawn=DRAWN_EDGES,
        where=", ".join(where),
        model_argument=_model_argument(model, split=edges.graph.spec.split_kv_groups),
        accuracies=accuracies(run),
        carried=carried_under(plain) if works_under(run, plain) else None,
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


def _metadata(model: ModelIdentity) -> str:
    data = ModelCardData(
        base_model=model.hub_id,
        library_name="pahq_hf",
        license=model.license or "other",
        tags=["circuit", "pahq", "mechanistic-interpretability"],
    )
    return str(data.to_yaml())


def _model_argument(model: ModelIdentity, *, split: bool) -> str:
    known = "demo" if model.base_model == "demo" else model.hub_id
    if model.adapter is not None:
        known = model.adapter if "/" in model.adapter else None
    argument = repr(known or "path/to/the/model")
    return f"{argument}, PAHQConfig(split_kv_groups=True)" if split else argument


def _prompts(task: TaskFacts) -> str | None:
    """The name by which `load_task` gives the task's prompts; None for data of one's own."""
    name = f"{task.generator}:{task.corruption}"
    made = task.generator is not None and task.corruption is not None
    return repr(name) if made and _GENERATED.fullmatch(name) else None


def _cell(value: object) -> str:
    """Text that stays in its table cell and is not markup."""
    text = " ".join(printable(str(value)).split())
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "…"
    return "".join(f"\\{letter}" if letter in _MARKUP else letter for letter in text)


def _asked(run: RunRecord) -> dict[str, object]:
    """What the search was asked for, its threshold first if it takes one."""
    asked, facts = run.arguments, asked_facts(run)
    units = f"{asked.level}s"
    threshold, topn = facts.pop("threshold"), facts.pop(f"best {units}")
    found = {name: value for name, value in facts.items() if value is not None}
    if threshold is None and "topn" in asked:
        threshold = "none" if topn is None else f"that of the best {topn} {units}"
    if threshold is None and asked.keys and "threshold" not in asked.keys:
        return found  # it takes none
    return {"threshold": "?" if threshold is None else threshold, **found}


def _precision(precision: PrecisionFacts) -> str:
    regime = precision.regime or "?"
    return regime if regime in ("fp32", "?") else f"{regime}, {precision.format}"


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, (int, float)) else "?"
