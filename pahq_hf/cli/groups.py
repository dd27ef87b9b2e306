"""Options that belong together: the fields of each group are options of every command that takes it.

A group may be one of groups.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pahq_hf.cli.options import (
    ActiveOption,
    AnswerOption,
    BaseModelOption,
    BudgetOption,
    ChatOption,
    ColumnsOption,
    ComputeOption,
    CountOption,
    DataSplitOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    FamilyOption,
    FormatOption,
    GgufOption,
    MismatchOption,
    ModelArgument,
    OffsetOption,
    PolicyOption,
    PrecisionOption,
    RevisionOption,
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
    check_format,
    load_arguments,
    read_bytes,
    read_columns,
    read_policy,
)
from pahq_hf.cli.output import JsonOption
from pahq_hf.config import EngineConfig, PAHQConfig

if TYPE_CHECKING:
    from pahq_hf.tasks.base import Task


@dataclass(frozen=True)
class SourceChoice:
    """Which files of a model are read, and how."""

    gguf_file: GgufOption = None
    revision: RevisionOption = None
    token: TokenOption = None
    trust_remote_code: TrustOption = False
    assume_family: FamilyOption = None

    def arguments(self, **more: Any) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`; `more` are further ones of `load_arguments`."""
        more["assume_family"] = self.assume_family
        return load_arguments(self.gguf_file, self.revision, self.token, self.trust_remote_code, **more)


@dataclass(frozen=True)
class ModelChoice:
    """Which model, and where it goes."""

    model: ModelArgument
    source: SourceChoice
    device: DeviceOption = None
    dtype: DtypeOption = "float32"
    base_model: BaseModelOption = None


@dataclass(frozen=True)
class TaskChoice:
    """Which prompts."""

    task: TaskOption
    n: CountOption = None
    seed: SeedOption = None
    split: DataSplitOption = None
    offset: OffsetOption = 0
    shuffle: ShuffleOption = False
    columns: ColumnsOption = None
    on_mismatch: MismatchOption = None
    answer_tokens: AnswerOption = "one"
    chat_template: ChatOption = False

    def check(self) -> None:
        """Check what can be checked before a model is loaded.

        Raises:
            TaskError: If an option means nothing for this task.
        """
        from pahq_hf.tasks.loading import check_choice
        from pahq_hf.tasks.options import DataOptions

        check_choice(self.task, **self._chosen, options=DataOptions(**self._data))

    def source(self) -> dict[str, object]:
        """What is known of where the prompts will be from, before they are made."""
        from pahq_hf.tasks.loading import foreseen_source

        return foreseen_source(self.task, n=self.n, seed=self.seed)

    def count(self) -> int | None:
        """How many pairs there are at most, where a file or `n` tells.

        Raises:
            TaskError: If the file cannot be used.
        """
        path = Path(os.path.expanduser(self.task))
        if not os.path.isfile(path):
            return self.n
        from pahq_hf.tasks.choice import Choice
        from pahq_hf.tasks.reading import read_rows

        choice, columns = Choice(offset=self.offset), read_columns(self.columns)
        rows = read_rows(path, choice, split=self.split, columns=columns).rows
        return len(rows) if self.n is None else min(self.n, len(rows))

    def load(self, tokenizer: Any) -> Task:
        """The prompts, as a model's tokenizer reads them."""
        from pahq_hf.tasks.loading import load_task

        return load_task(self.task, tokenizer, **self._chosen, **self._data)

    @property
    def _chosen(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("n", "seed", "split", "offset", "shuffle")}

    @property
    def _data(self) -> dict[str, Any]:
        """Options of data that is not generated."""
        return {
            "columns": read_columns(self.columns),
            "on_mismatch": self.on_mismatch,
            "answer_tokens": self.answer_tokens,
            "chat_template": self.chat_template,
        }


@dataclass(frozen=True)
class PrecisionChoice:
    """How weights are kept and computed."""

    precision: PrecisionOption = "pahq"
    fmt: FormatOption = "fp8"
    active: ActiveOption = "receiver"
    compute: ComputeOption = "auto"
    policy: PolicyOption = None
    quantize_embeddings: TablesOption = False
    split_kv_groups: SplitOption = False

    def config(self) -> PAHQConfig:
        """The configuration.

        Raises:
            ConfigError: If options contradict each other.
        """
        check_format(self.precision, self.fmt)
        return PAHQConfig(
            self.precision,
            self.fmt,
            self.split_kv_groups,
            self.active,
            self.compute,
            read_policy(self.policy),
            self.quantize_embeddings,
        )


@dataclass(frozen=True)
class EngineChoice:
    """What computes metrics, and what it may take."""

    engine: EngineOption = None
    memory_budget: BudgetOption = None
    activation_store: StoreOption = "ram"

    def config(self, batch: int | None = None) -> EngineConfig:
        """The limits.

        Args:
            batch: Candidates tried at once.

        Raises:
            ConfigError: If one cannot be read.
        """
        return EngineConfig(self.engine, batch, read_bytes(self.memory_budget), self.activation_store)


@dataclass(frozen=True)
class RunChoice:
    """How a run goes on, and what is said of it."""

    resume: Annotated[bool, typer.Option("--resume", help="Continue what --out holds.")] = False
    take_over: TakeOverOption = False
    threads: ThreadsOption = None
    as_json: JsonOption = False


@dataclass(frozen=True)
class SearchChoice:
    """What every command that searches takes."""

    model: ModelChoice
    task: TaskChoice
    precision: PrecisionChoice
    limits: EngineChoice
    run: RunChoice
