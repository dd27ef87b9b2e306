"""Options that several commands of `pahq` share, and how their texts are read."""

from __future__ import annotations

import logging
import re
from typing import Annotated, Any, Literal

import typer

from pahq_hf.config import Ablation, Active, Compute, EngineName, PAHQConfig, Regime, StoreName
from pahq_hf.errors import ConfigError, MetricError, PAHQError, first_line
from pahq_hf.precision.formats.registry import find_format, known_formats
from pahq_hf.search.settings import RunSettings
from pahq_hf.tasks.metrics import find_metric, known_metrics
from pahq_hf.tasks.names import check_columns
from pahq_hf.tasks.options import AnswerTokens, OnMismatch

logger = logging.getLogger(__name__)


def read_columns(text: str | None) -> dict[str, str] | None:
    """Parse `NAME=COLUMN,...`.

    Args:
        text: As given on the command line, or None.

    Returns:
        Columns by our names, or None.

    Raises:
        ConfigError: If it is not of this form.
        TaskError: If a name is none of ours.
    """
    if text is None:
        return None
    found: dict[str, str] = {}
    for entry in text.split(","):
        name, equals, column = (part.strip() for part in entry.partition("="))
        if not (name and equals and column):
            raise ConfigError(f"cannot read the columns {text!r}; write them like clean=Q,answer=A")
        found[name] = column
    check_columns(found)
    return found


def _columns(text: str | None) -> str | None:
    """Columns, checked as soon as they are read."""
    try:
        read_columns(text)
    except PAHQError as error:
        raise typer.BadParameter(str(error)) from error
    return text


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, or 'demo'.")]
GgufOption = Annotated[str | None, typer.Option("--gguf-file", help="GGUF file inside MODEL.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
TokenOption = Annotated[str | None, typer.Option(help="Hub token for private or gated models.")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
FamilyOption = Annotated[
    str | None,
    typer.Option(
        "--assume-family",
        metavar="FAMILY",
        help="Read MODEL as one of this known family; the self-check decides. For families without a row.",
    ),
]
TakeOverOption = Annotated[
    bool, typer.Option("--take-over", help="Take the place of another machine's process that holds --out.")
]
BaseModelOption = Annotated[
    str | None,
    typer.Option(metavar="ID", help="The model's id on the Hub, stored where MODEL is a folder."),
]
DeviceOption = Annotated[str | None, typer.Option(help="Torch device, for instance cuda:0.")]
DtypeOption = Annotated[
    Literal["float32", "float64"], typer.Option(help="Dtype of the FP32 regime's weights.")
]
TaskOption = Annotated[str, typer.Option(help="Task name, data file, dataset folder or Hub dataset id.")]
CountOption = Annotated[int | None, typer.Option("--n", min=1, help="Number of prompt pairs.")]
SeedOption = Annotated[
    int | None, typer.Option(help="Seed of the task generator, 0 if unset, or of --shuffle.")
]
OffsetOption = Annotated[int, typer.Option(min=0, help="Pass over so many prompt pairs of the data.")]
ShuffleOption = Annotated[
    bool, typer.Option("--shuffle", help="Put the data into another order first, drawn from --seed.")
]
ColumnsOption = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="NAME=COLUMN,...",
        callback=_columns,
        help="Which columns of the data are which: clean=Q,corrupted=X,answer=A.",
    ),
]
MismatchOption = Annotated[
    OnMismatch | None,
    typer.Option(
        "--on-mismatch",
        help="With pairs of the data that cannot be used, as of different token lengths: error, the default; "
        "skip leaves them out; pad fills shorter corrupted prompts and leaves out the rest.",
        show_default=False,
    ),
]
AnswerOption = Annotated[
    AnswerTokens,
    typer.Option(
        "--answer-tokens",
        help="Of answers of several tokens in the data: one refuses them, first scores the first token in "
        "which answers and distractors differ, whole all tokens.",
    ),
]
ChatOption = Annotated[
    bool, typer.Option("--chat-template", help="Put the data's prompts into the tokenizer's chat template.")
]
DataSplitOption = Annotated[str | None, typer.Option("--split", help="Split of a dataset that has several.")]
SplitOption = Annotated[
    bool, typer.Option("--split-kv-groups", help="Give each query head its own key and value readers.")
]
PrecisionOption = Annotated[Regime, typer.Option(help="Precision regime.")]


def _known_format(name: str) -> str:
    """A format's name, checked as soon as it is read."""
    try:
        return find_format(name).name
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


FormatOption = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="NAME",
        callback=_known_format,
        help=f"Low-precision format: {', '.join(known_formats())}, or a registered one.",
    ),
]


def check_format(precision: Regime, name: str) -> None:
    """Say so where a format is given that the precision has no use for.

    It is no error: programs that choose a precision give a format with all of them.
    """
    if precision == "fp32" and name != PAHQConfig().format:
        logger.warning("--format %s is of a low-precision regime, and not used in fp32", name)


BudgetOption = Annotated[
    str | None, typer.Option(help="Memory for candidates and decoded weights, e.g. 4GiB.")
]
StoreOption = Annotated[
    StoreName, typer.Option(help="Keep captured activations in memory or in a temporary file.")
]
PolicyOption = Annotated[
    list[str] | None,
    typer.Option("--policy", metavar="PATTERN=FORMAT", help="Format of some components: 'm*=bf16'; repeat."),
]
TablesOption = Annotated[
    bool, typer.Option("--quantize-embeddings", help="Embedding and unembedding in low precision too.")
]


# What every search takes; the rest of its options it declares itself.
def _known(metric: str | None) -> str | None:
    """A metric's name, checked as soon as it is read."""
    if metric is not None:
        try:
            find_metric(metric)
        except MetricError as error:
            raise typer.BadParameter(str(error)) from error
    return metric


_METRICS = f"{', '.join(known_metrics())}, or a registered one"
MetricOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", callback=_known, help=f"What is minimised: {_METRICS}; the task's own if unset."
    ),
]
JudgedMetricOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        callback=_known,
        help=f"Metric: {_METRICS}; the circuit's own if unset.",
    ),
]
ActiveOption = Annotated[Active, typer.Option(help="What is FP32 while an edge is tested (precision pahq).")]
ComputeOption = Annotated[Compute, typer.Option(help="Dtype of products with differences (precision pahq).")]
AblationOption = Annotated[Ablation, typer.Option(help="What stands in for removed edges.")]
EngineOption = Annotated[
    EngineName | None,
    typer.Option(
        help="sparse, the default, computes what an edge can change, hooks the whole model.",
        show_default=False,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Threads of the processor; by default OMP_NUM_THREADS, or as many as cores are free."
    ),
]
BatchOption = Annotated[int | None, typer.Option(min=1, help="Candidates tried at once; adaptive if unset.")]


def load_arguments(
    gguf_file: str | None,
    revision: str | None,
    token: str | None,
    trust_remote_code: bool,
    device: str | None = None,
    dtype: str | None = None,
    resumed: RunSettings | None = None,
    *,
    base_model: str | None = None,
    assume_family: str | None = None,
) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained`; what was not asked for stays away."""
    import torch

    from pahq_hf.checkpoint.placement import usable_device

    arguments: dict[str, Any] = {
        "gguf_file": gguf_file,
        "revision": revision,
        "token": token,
        "trust_remote_code": trust_remote_code,
        "dtype": getattr(torch, dtype) if dtype else None,
        "device": device,
        "base_model": base_model,
        "assume_family": assume_family,
    }
    if device is None and resumed is not None and resumed.device not in (None, "cpu"):
        try:
            arguments["device"] = str(usable_device(str(resumed.device)))
        except ConfigError as error:
            reason = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise ConfigError(
                f"the run began on device {resumed.device!r}, which cannot be used here "
                f"({first_line(reason)}): --device continues it elsewhere"
            ) from error
    return {key: value for key, value in arguments.items() if value is not None}


def read_policy(entries: list[str] | None) -> dict[str, Any]:
    """Parse `PATTERN=FORMAT` entries.

    Args:
        entries: As given on the command line.

    Returns:
        Formats by pattern, in the given order.

    Raises:
        ConfigError: If an entry is not of this form.
    """
    found = {}
    for entry in entries or ():
        pattern, equals, fmt = entry.partition("=")
        if not (pattern and equals and fmt):
            raise ConfigError(f"cannot read the policy {entry!r}; write it like 'm*=bf16'")
        found[pattern] = fmt
    return found


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_MOST_BYTES = 2**60


def read_bytes(text: str | None) -> int | None:
    """Parse a size such as `500MB` or `4GiB`.

    Args:
        text: As given on the command line, or None.

    Returns:
        Bytes, or None.

    Raises:
        ConfigError: If it is not a size.
    """
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*", text.lower())
    if found is None or found[2] not in _UNITS:
        raise ConfigError(f"cannot read the size {text!r}; write it like 500MB or 4GiB")
    size = float(found[1]) * _UNITS[found[2]]
    if size > _MOST_BYTES:
        raise ConfigError(f"the size {text:.40} is more than any machine has; write it like 500MB or 4GiB")
    return int(size)
