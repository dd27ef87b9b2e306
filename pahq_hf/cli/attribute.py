"""`pahq attribute`: score every edge of a model at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pahq_hf.circuit.files import output_path
from pahq_hf.cli.ending import after, again, beside, evaluation, print_end, shifted
from pahq_hf.cli.options import (
    AblationOption,
    BaseModelOption,
    BudgetOption,
    CountOption,
    DataSplitOption,
    DeviceOption,
    DtypeOption,
    FormatOption,
    GgufOption,
    MetricOption,
    ModelArgument,
    OffsetOption,
    PolicyOption,
    PrecisionOption,
    RevisionOption,
    SeedOption,
    ShuffleOption,
    SplitOption,
    TakeOverOption,
    TaskOption,
    ThreadsOption,
    TokenOption,
    TrustOption,
    load_arguments,
    read_bytes,
    read_policy,
)
from pahq_hf.cli.output import JsonOption, print_json, print_rich
from pahq_hf.config import EngineName
from pahq_hf.precision.threads import take_threads
from pahq_hf.search.attribution.options import MethodName
from pahq_hf.search.progress import make_progress


def attribute(
    context: typer.Context,
    model: ModelArgument,
    task: TaskOption,
    out: Annotated[Path, typer.Option(parser=output_path, metavar="<path>", help="Folder for the circuit.")],
    method: Annotated[MethodName, typer.Option(help="How edges are scored.")] = "eap-ig",
    n: CountOption = None,
    seed: SeedOption = None,
    split: DataSplitOption = None,
    offset: OffsetOption = 0,
    shuffle: ShuffleOption = False,
    steps: Annotated[int, typer.Option(min=1, help="Runs whose gradients eap-ig averages.")] = 5,
    topn: Annotated[int | None, typer.Option(min=1, help="Keep so many edges; all if unset.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Keep edges with at least this score, in place of --topn.")
    ] = None,
    absolute: Annotated[bool, typer.Option("--absolute", help="Compare magnitudes of scores.")] = False,
    metric: MetricOption = None,
    ablation: AblationOption = "corrupted",
    score_seed: Annotated[int, typer.Option(min=0, help="Seed of the scores of method random.")] = 0,
    precision: PrecisionOption = "pahq",
    fmt: FormatOption = "fp8",
    policy: PolicyOption = None,
    engine: Annotated[EngineName, typer.Option(help="What computes metrics of method exact.")] = "sparse",
    memory_budget: BudgetOption = None,
    split_kv_groups: SplitOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    base_model: BaseModelOption = None,
    threads: ThreadsOption = None,
    take_over: TakeOverOption = False,
    as_json: JsonOption = False,
    gguf_file: GgufOption = None,
    revision: RevisionOption = None,
    token: TokenOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Score every edge by attribution, and write the best as a circuit to a folder."""
    from pahq_hf import PAHQModel, load_task
    from pahq_hf.circuit.files import refuse_overwrite
    from pahq_hf.cli.tables import run_table
    from pahq_hf.config import EngineConfig, PAHQConfig
    from pahq_hf.search.attribution.options import AttributionConfig
    from pahq_hf.search.lock import check_free
    from pahq_hf.tasks.loading import check_choice

    check_choice(
        task, n=n, seed=seed, split=split, offset=offset, shuffle=shuffle
    )  # before a model is loaded
    config = AttributionConfig(method, metric, steps, topn, threshold, absolute, ablation, score_seed)
    pahq = PAHQConfig(precision, fmt, split_kv_groups, policy=read_policy(policy))
    limits = EngineConfig(engine, memory_budget=read_bytes(memory_budget))
    check_free(out, take_over=take_over)
    refuse_overwrite(out)
    take_threads(threads)
    arguments = load_arguments(
        gguf_file, revision, token, trust_remote_code, device, dtype, base_model=base_model
    )
    with make_progress(not as_json).phase(f"loading {model}"):
        wrapped = PAHQModel.from_pretrained(model, pahq, **arguments)
    data = load_task(task, wrapped.tokenizer, n=n, seed=seed, split=split, offset=offset, shuffle=shuffle)
    circuit = wrapped.attribute(
        data,
        engine=limits,
        out=out,
        take_over=take_over,
        progress=not as_json,
        **config.to_dict(),
    )
    total = circuit.graph.edge_count

    def more() -> str:
        if threshold is not None:
            return again(context, threshold=shifted(threshold, 1 / 3), out=beside(out, "more"))
        return again(context, topn=min(2 * circuit.edge_count, total), out=beside(out, "more"))

    command = after(
        circuit.verdict,
        good=lambda: evaluation(context, out, circuit),
        more=more,
        fewer=lambda: again(context, topn=max(1, total // 20), threshold=None, out=beside(out, "fewer")),
    )
    if as_json:
        print_json({"out": str(out), **circuit.discovery, "next": command})
    else:
        print_rich(run_table(circuit))
        print_end(out, command)
