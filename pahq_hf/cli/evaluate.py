"""`pahq evaluate`: is the circuit right?"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pahq_hf.circuit.files import output_path
from pahq_hf.cli.declared import Command
from pahq_hf.cli.groups import SourceChoice, TaskChoice
from pahq_hf.cli.options import DeviceOption, JudgedMetricOption, ThreadsOption
from pahq_hf.cli.output import JsonOption, print_json, print_rich
from pahq_hf.errors import ConfigError
from pahq_hf.precision.threads import take_threads
from pahq_hf.search.progress import make_progress
from pahq_hf.tasks.catalog import foreseen_metric

if TYPE_CHECKING:
    from pahq_hf.circuit.circuit import Circuit

SAMPLES = 20


def evaluate(
    circuit: Annotated[str, typer.Argument(metavar="DIR", help="Folder or Hub id of a circuit.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, or 'demo'.")],
    prompts: TaskChoice,
    source: SourceChoice,
    metric: JudgedMetricOption = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="CPR, CMD and faithfulness over circuit size, by score.")
    ] = False,
    minimality: Annotated[
        bool, typer.Option("--minimality", help="What removing each kept edge alone does.")
    ] = False,
    completeness: Annotated[
        bool, typer.Option("--completeness", help="The complement, and damage to circuit and model alike.")
    ] = False,
    samples: Annotated[int, typer.Option(min=0, help="Random subsets for --completeness.")] = SAMPLES,
    audit: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Test N removed edges again, in FP32, where the search decided them, on its prompts.",
        ),
    ] = 0,
    reference: Annotated[
        Path | None,
        typer.Option(help="A known circuit (folder, or another tool's JSON): ROC, precision and recall."),
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(
            parser=output_path,
            metavar="<path>",
            help="Folder for PNG, SVG and HTML of --curve and --reference.",
        ),
    ] = None,
    any_weights: Annotated[
        bool, typer.Option("--any-weights", help="Accept other weights of the same shape.")
    ] = False,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge a circuit on a task, in FP32."""
    from pahq_hf.circuit.circuit import Circuit
    from pahq_hf.circuit.files import make_folder
    from pahq_hf.config import PAHQConfig
    from pahq_hf.evaluation.audit import check_auditable
    from pahq_hf.evaluation.report import reference_facts
    from pahq_hf.model import PAHQModel
    from pahq_hf.tasks.loading import is_generated

    seed = prompts.seed or 0
    if (completeness or audit) and not prompts.shuffle and not is_generated(prompts.task):
        prompts = replace(
            prompts, seed=None
        )  # that of --completeness and --audit has a use of its own, whatever the prompts
    prompts.check()
    if plots is not None and not curve and reference is None:
        raise ConfigError("--plots draws what --curve and --reference measure: give one of them")
    if samples != SAMPLES and not completeness:
        raise ConfigError("--samples are random subsets of --completeness: give it too")
    found = Circuit.from_pretrained(circuit, token=source.token)
    foreseen_metric(prompts.task, metric or found.record.arguments.metric)
    known = None if reference is None else _read_reference(reference, found)
    if known is not None:
        reference_facts(found, known)  # what does not fit should fail before the model runs
    if audit:
        check_auditable(found)
    if plots is not None:
        make_folder(plots)
    take_threads(threads)
    arguments = source.arguments(device=device)
    pahq = PAHQConfig(regime="fp32", split_kv_groups=_splits(found, model, arguments))
    with make_progress(not as_json).phase(f"loading {model}"):
        wrapped = PAHQModel.from_pretrained(model, pahq, **arguments)
    data = prompts.load(wrapped.tokenizer)
    with make_progress(not as_json).phase("evaluating"):
        facts = wrapped.evaluate(
            found,
            data,
            metric=metric,
            any_weights=any_weights,
            curve=curve,
            minimality=minimality,
            completeness=completeness,
            audit=audit,
            samples=samples,
            seed=seed,
            reference=known,
        )
    if as_json:
        print_json(facts)
    else:
        from pahq_hf.cli.evaluation_tables import evaluation_tables

        print_rich(*evaluation_tables(facts))
    if plots is not None:
        from pahq_hf.circuit.extras import spared

        with spared(plots):  # what was measured is printed by now
            from pahq_hf.circuit.render.plots import write_plots

            write_plots(facts, plots)


evaluate_command = Command(evaluate)


def _read_reference(path: Path, found: Circuit) -> Circuit:
    """A circuit's folder, or another tool's file of one in the same graph."""
    from pahq_hf.circuit.circuit import Circuit
    from pahq_hf.circuit.interchange import read_circuit_file

    if not os.path.isfile(path):
        return Circuit.from_pretrained(path)
    return read_circuit_file(path, found.graph.spec)


def _splits(circuit: Circuit, model: str, arguments: dict[str, Any]) -> bool:
    """Whether the model gives each head its own key and value, as the circuit does or as it needs it."""
    from pahq_hf.circuit.fitting import fits, is_of_heads, uneven_edges
    from pahq_hf.circuit.graph import Graph

    if not is_of_heads(circuit):
        return circuit.graph.spec.split_kv_groups
    from pahq_hf.checkpoint.saved_config import load_config_of
    from pahq_hf.modeling.architectures.lookup import graph_spec

    spec = graph_spec(load_config_of(model, **arguments))
    return fits(circuit, spec) and uneven_edges(circuit, Graph(spec)) > 0
