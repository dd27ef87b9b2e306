"""`pahq info`: how large a model's graph is, and what a run on it takes."""

from __future__ import annotations

from typing import Annotated

import typer

from pahq_hf.cli.declared import Command
from pahq_hf.cli.groups import SourceChoice
from pahq_hf.cli.options import (
    BudgetOption,
    FormatOption,
    ModelArgument,
    PolicyOption,
    PrecisionOption,
    SplitOption,
    StoreOption,
    TablesOption,
    check_format,
    read_bytes,
    read_policy,
)
from pahq_hf.cli.output import JsonOption, print_json, print_rich
from pahq_hf.precision.threads import thread_facts


def info(
    model: ModelArgument,
    source: SourceChoice,
    precision: PrecisionOption = "pahq",
    fmt: FormatOption = "fp8",
    policy: PolicyOption = None,
    quantize_embeddings: TablesOption = False,
    n: Annotated[int, typer.Option("--n", min=1, help="Prompt pairs of the run to plan.")] = 16,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 16,
    memory_budget: BudgetOption = None,
    activation_store: StoreOption = "ram",
    split_kv_groups: SplitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Size of a model's graph and of a run on it, from its config and the headers of its files."""
    from pahq_hf.checkpoint.saved_config import load_config_of
    from pahq_hf.checkpoint.weight_files import local_files
    from pahq_hf.circuit.graph import Graph
    from pahq_hf.cli.tables import facts_table, memory_table
    from pahq_hf.config import PAHQConfig
    from pahq_hf.modeling.architectures.lookup import graph_spec

    check_format(precision, fmt)
    arguments = source.arguments()
    pahq = PAHQConfig(
        precision,
        fmt,
        split_kv_groups,
        policy=read_policy(policy),
        quantize_embeddings=quantize_embeddings,
    )
    budget = read_bytes(memory_budget)
    config = load_config_of(model, **arguments)
    graph = Graph(graph_spec(config, split_kv_groups=split_kv_groups))
    facts = {
        "family": config.model_type,
        "layers": graph.spec.layers,
        "heads": graph.spec.heads,
        "kv_groups": graph.spec.kv_groups,
        "writers": len(graph.writers),
        "readers": len(graph.readers),
        "edges": graph.edge_count,
    }
    if not as_json:
        print_rich(facts_table(facts))  # known at once; the plan takes longer
    from pahq_hf.engine.memory_plan import empty_model, report
    from pahq_hf.precision.fp32.source import CheckpointSource

    files = local_files(model, **arguments)
    needs = report(
        empty_model(config, split_kv_groups=split_kv_groups, trust_remote_code=source.trust_remote_code),
        pahq,
        n=n,
        length=length,
        budget=budget,
        stored=activation_store,
        source=CheckpointSource(files) if files else None,
    )
    if as_json:
        print_json({**facts, "memory": needs.to_dict(), "threads": thread_facts()})
    else:
        print_rich(memory_table(needs, n, length), facts_table({"threads": thread_facts()}))


info_command = Command(info)
