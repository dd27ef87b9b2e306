"""`pahq sweep`: circuits at several thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pahq_hf.circuit.files import output_path
from pahq_hf.cli.ending import again, evaluation, print_end, shifted
from pahq_hf.cli.options import (
    AblationOption,
    AbsoluteOption,
    ActiveOption,
    BaseModelOption,
    BatchOption,
    BudgetOption,
    ComputeOption,
    CountOption,
    DataSplitOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    FormatOption,
    GgufOption,
    MarginOption,
    MetricOption,
    ModelArgument,
    OffsetOption,
    OrderOption,
    PolicyOption,
    PrecisionOption,
    ReadersOption,
    RevisionOption,
    ScreenOption,
    SeedOption,
    ShuffleOption,
    SplitOption,
    StoreOption,
    TablesOption,
    TakeOverOption,
    TaskOption,
    ThreadsOption,
    TokenOption,
    TrustOption,
    load_arguments,
    read_bytes,
    read_policy,
)
from pahq_hf.cli.output import JsonOption, exit_unverified, keeps_journal, print_json, print_rich
from pahq_hf.errors import ConfigError
from pahq_hf.precision.threads import take_threads
from pahq_hf.search.progress import make_progress
from pahq_hf.search.settings import RunSettings

if TYPE_CHECKING:
    from pahq_hf.search.sweep_result import Sweep


@keeps_journal
def sweep(
    context: typer.Context,
    model: ModelArgument,
    task: TaskOption,
    thresholds: Annotated[str, typer.Option(metavar="A,B,...", help="tau of every circuit.")],
    out: Annotated[
        Path,
        typer.Option(
            parser=output_path, metavar="<path>", help="Folder for a run per threshold, sweep.json and plots."
        ),
    ],
    n: CountOption = None,
    seed: SeedOption = None,
    split: DataSplitOption = None,
    offset: OffsetOption = 0,
    shuffle: ShuffleOption = False,
    metric: MetricOption = None,
    precision: PrecisionOption = "pahq",
    fmt: FormatOption = "fp8",
    active: ActiveOption = "receiver",
    margin: MarginOption = None,
    compute: ComputeOption = "auto",
    order: OrderOption = "acdc",
    ablation: AblationOption = "corrupted",
    absolute: AbsoluteOption = False,
    readers: ReadersOption = None,
    screen: ScreenOption = None,
    engine: EngineOption = None,
    batch: BatchOption = None,
    memory_budget: BudgetOption = None,
    activation_store: StoreOption = "ram",
    policy: PolicyOption = None,
    quantize_embeddings: TablesOption = False,
    split_kv_groups: SplitOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    base_model: BaseModelOption = None,
    threads: ThreadsOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the sweep in --out, or add thresholds to it.")
    ] = False,
    take_over: TakeOverOption = False,
    as_json: JsonOption = False,
    gguf_file: GgufOption = None,
    revision: RevisionOption = None,
    token: TokenOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Find a task's circuits at several thresholds, computing once what the searches share."""
    from pahq_hf import PAHQModel, load_task
    from pahq_hf.cli.tables import sweep_table
    from pahq_hf.config import EngineConfig, PAHQConfig
    from pahq_hf.search.acdc_options import ACDCConfig
    from pahq_hf.search.lock import check_free
    from pahq_hf.search.sweep_result import check_thresholds
    from pahq_hf.tasks.loading import check_choice

    check_choice(
        task, n=n, seed=seed, split=split, offset=offset, shuffle=shuffle
    )  # before a model is loaded
    values = check_thresholds(read_thresholds(thresholds))  # before a model is loaded
    acdc = ACDCConfig(
        metric=metric,
        order=order,
        ablation=ablation,
        absolute=absolute,
        readers=readers,
        margin=margin,
        screen=screen,
    )
    pahq = PAHQConfig(
        precision, fmt, split_kv_groups, active, compute, read_policy(policy), quantize_embeddings
    )
    limits = EngineConfig(engine, batch, read_bytes(memory_budget), activation_store)
    check_free(out, take_over=take_over)
    found = RunSettings.of_run(out) if resume else RunSettings()
    take_threads(threads, found.threads)
    arguments = load_arguments(
        gguf_file, revision, token, trust_remote_code, device, dtype, found, base_model=base_model
    )
    with make_progress(not as_json).phase(f"loading {model}"):
        wrapped = PAHQModel.from_pretrained(model, pahq, **arguments)
    data = load_task(task, wrapped.tokenizer, n=n, seed=seed, split=split, offset=offset, shuffle=shuffle)
    swept = wrapped.sweep(
        data,
        thresholds=values,
        config=acdc,
        engine=limits,
        out=out,
        resume=resume,
        take_over=take_over,
        progress=not as_json,
    )
    command = _next(context, swept, out)
    if as_json:
        print_json({"out": str(out), **swept.to_json(), "next": command})
    else:
        print_rich(sweep_table(swept.rows))
        print_end(out, command)
    exit_unverified(*swept.values())


def _next(context: typer.Context, found: Sweep, out: Path) -> str:
    """Judge the smallest circuit that does what the model does; without one, more thresholds."""
    from pahq_hf.search.sweep_result import threshold_folder

    rows = [row for row in found.rows if row.verdict is None or row.verdict.kind != "whole"]
    good = [row.threshold for row in rows if row.verdict is None or not row.verdict.poor]
    if good:
        return evaluation(context, threshold_folder(out, good[-1]), found[good[-1]])
    values = list(found)
    first = shifted(values[0] or 0.001, 1 / 3 if rows else 3)
    values = sorted({*values, first, shifted(first, 1 / 3 if rows else 3)})
    return again(context, thresholds=",".join(map(str, values)), resume=True)


def read_thresholds(text: str) -> list[float]:
    """Parse `0.001,0.01`.

    Raises:
        ConfigError: If it is not a list of numbers.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"cannot read the thresholds {text!r}; write them like 0.001,0.01") from error
