"""Configuration: how weights are kept (`PAHQConfig`), with its file, and how metrics are computed."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack, get_args

from pahq_hf.circuit.files import make_folder, write_text
from pahq_hf.circuit.json_reader import read_json
from pahq_hf.errors import CircuitError, ConfigError, check_names, check_place
from pahq_hf.precision.threads import check_threads

if TYPE_CHECKING:
    from pahq_hf.circuit.hub import PushOptions

Regime = Literal["fp32", "pahq", "pahq-literal", "rtn"]
Active = Literal["receiver", "both"]
Compute = Literal["auto", "fp32", "bf16", "fp8"]
Ablation = Literal["corrupted", "zero", "mean", "mean-corrupted"]
Criterion = Literal["signed", "absolute", "gap"]  # by what of an edge searches decide
Level = Literal["edge", "node"]  # what searches keep or remove
Direction = Literal["noising", "denoising", "both"]  # in which prompts are patched into each other
EngineName = Literal["sparse", "hooks"]
StoreName = Literal["ram", "disk"]
CONFIG_NAME = "pahq_config.json"
_CONFIG_VERSION = 1  # of that file

SelfT = TypeVar("SelfT", bound="JsonConfig")


@dataclass(frozen=True)
class JsonConfig:
    """A frozen dataclass that validates itself and goes to JSON and back."""

    def __post_init__(self) -> None:
        self.validate()
        for entry in fields(self):  # numpy's numbers do not go to JSON
            value: Any = getattr(self, entry.name)
            if isinstance(value, (bool, int, float)) or not isinstance(value, numbers.Real):
                continue
            plain = int(value) if isinstance(value, numbers.Integral) else float(value)
            object.__setattr__(self, entry.name, plain)

    def validate(self) -> None:
        """Raise `ConfigError` when a value is out of range."""

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls: type[SelfT], values: dict[str, Any]) -> SelfT:
        """Build from `to_dict`'s output.

        Raises:
            ConfigError: If a key is unknown or a value is out of range.
        """
        check_names(values, [f.name for f in fields(cls)], cls.__name__)
        return cls(**values)


def check_metric_name(name: object) -> None:
    """Check that a metric is registered.

    Raises:
        ConfigError: If not.
    """
    from pahq_hf.tasks.metrics import known_metrics

    if name not in known_metrics():
        raise ConfigError(f"metric must be one of {', '.join(known_metrics())}; got {name!r}")


def _format(name: str, value: object) -> None:
    from pahq_hf.precision.formats.registry import known_formats

    if value not in known_formats():
        raise ConfigError(f"{name} must be one of {', '.join(known_formats())}; got {value!r}")


def check_choice(name: str, value: object, choices: object) -> None:
    """Check that a value is one of a `Literal`'s.

    Raises:
        ConfigError: If not.
    """
    allowed = get_args(choices)
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def check_number(
    name: str, value: object, *, whole: bool = False, least: float | None = None, most: float = math.inf
) -> None:
    """Check that a value is a number, and no truth value.

    Args:
        name: What it is called.
        value: The value.
        whole: Whether it has to be a whole number.
        least: The least that it may be; None bounds it nowhere.
        most: The most, where there is a least.

    Raises:
        ConfigError: If not.
    """
    what = "a whole number" if whole else "a number"
    if least is not None:
        what += f" from {least:g} on" if most == math.inf else f" from {least:g} to {most:g}"
    is_number = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
    number: Any = value
    if not is_number or (least is not None and not least <= number <= most):
        raise ConfigError(f"{name} must be {what}; got {value!r}")


@dataclass(frozen=True)
class PAHQConfig(JsonConfig):
    """How a model's linear weights are kept and computed (docs/semantics.md, section 5).

    Attributes:
        regime: `pahq`, low-precision weights that only multiply differences from FP32 anchors; `fp32`,
            everything full; `pahq-literal`, the paper's rule: the active component FP32, the rest low;
            `rtn`, uniform rounding to nearest, the comparison.
        format: Low-precision format of every linear weight but the unembedding.
        policy: Other formats for some components, by glob: `{"m*": "bf16", "a0.*": "int8"}`. The first
            pattern that matches counts; weights that heads share get the finest of their formats.
        quantize_embeddings: Keep embedding and unembedding in `format` too. Discovery reads their FP32
            rows from the checkpoint all the same: only `generate` and plain forwards see the rounding.
        base_model: Hub id or folder of the model that a saved configuration is of, as in PEFT; None for a
            configuration alone. It and its revision say nothing of precision: equality and `to_dict` leave
            them out.
        revision: The base model's revision on the Hub.
    """

    regime: Regime = "pahq"
    format: str = "fp8"
    split_kv_groups: bool = False
    active: Active = "receiver"
    compute: Compute = "auto"
    policy: Mapping[str, str] = field(default_factory=dict, hash=False)
    quantize_embeddings: bool = False
    base_model: str | None = field(default=None, compare=False, kw_only=True)
    revision: str | None = field(default=None, compare=False, kw_only=True)

    def to_dict(self) -> dict[str, Any]:
        """How weights are kept and computed, as JSON-ready values: what pins a run."""
        return {name: value for name, value in asdict(self).items() if name not in ("base_model", "revision")}

    def with_fields(self, fields: Mapping[str, Any]) -> PAHQConfig:
        """This configuration with some fields given anew; another regime starts from its own defaults."""
        if fields.get("regime", self.regime) != self.regime:
            return replace(PAHQConfig(fields["regime"], split_kv_groups=self.split_kv_groups), **fields)
        return replace(self, **fields)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `pahq_config.json` into a folder.

        Raises:
            RunError: If it cannot be written.
        """
        document = {
            "format_version": _CONFIG_VERSION,
            "base_model": self.base_model,
            "revision": self.revision,
            "precision": self.to_dict(),
        }
        write_text(make_folder(folder) / CONFIG_NAME, json.dumps(document, indent=2) + "\n")

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Publish `pahq_config.json` on the Hub.

        Args:
            repo_id: `owner/name`, or a name for the token's owner.
            **options: As for `Circuit.push_to_hub`: `private`, `token`, `revision`, `create_pr`,
                `commit_message`, `subfolder`.

        Returns:
            Where the commit can be seen.

        Raises:
            ConfigError: If an option is unknown.
            HubError: If the Hub refuses.
        """
        from pahq_hf.circuit.hub import PushOptions, push

        check_names(options, list(PushOptions.__annotations__), "push_to_hub")
        options.setdefault("commit_message", "Configuration of a patched model (pahq_hf)")
        return push(self.save_pretrained, repo_id, **options)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> PAHQConfig:
        """Read `pahq_config.json` from a folder or from the Hub.

        Args:
            name: Folder or Hub id.
            **options: `revision`, `subfolder`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            ConfigError: If it is missing, damaged, or of a newer format.
            HubError: If the repository cannot be read.
        """
        check_place(name)
        if os.path.isdir(name):
            return cls._read(Path(name) / (options.get("subfolder") or ""))
        from pahq_hf.circuit.hub import HubPlace, pull

        return cls._read(pull(HubPlace(str(name), **options), (CONFIG_NAME,)))

    @classmethod
    def _read(cls, folder: Path) -> PAHQConfig:
        path = folder / CONFIG_NAME
        try:
            document = read_json(path)
        except CircuitError as error:
            raise ConfigError(str(error)) from error
        version, precision = document.get("format_version"), document.get("precision")
        if version not in range(1, _CONFIG_VERSION + 1) or not isinstance(precision, dict):
            raise ConfigError(f"{path} has format {version!r}; this version reads up to {_CONFIG_VERSION}")
        base, revision = (
            None if document.get(name) is None else str(document[name]) for name in ("base_model", "revision")
        )
        return replace(cls.from_dict(precision), base_model=base, revision=revision)

    def validate(self) -> None:
        """Raise `ConfigError` when a value is not one of the choices."""
        check_choice("precision", self.regime, Regime)
        _format("format", self.format)
        check_choice("active", self.active, Active)
        check_choice("compute", self.compute, Compute)
        given: object = self.policy
        if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
            raise ConfigError(f"policy must map patterns to formats; got {self.policy!r}")
        for pattern, fmt in self.policy.items():
            _format(f"the policy's format for {pattern!r}", fmt)
        if self.regime == "fp32" and (self.policy or self.quantize_embeddings):
            raise ConfigError("a policy and quantize_embeddings need a low-precision regime, not fp32")
        if self.regime != "pahq" and self.active == "both":
            raise ConfigError(f"active=both needs precision pahq; in {self.regime} every writer is as it is")
        if self.regime != "pahq" and self.compute not in ("auto", "fp32"):
            raise ConfigError(f"compute={self.compute} needs precision pahq; {self.regime} computes in FP32")

    @property
    def is_low(self) -> bool:
        """Whether any weight is kept in low precision."""
        return self.regime != "fp32"


@dataclass(frozen=True)
class EngineConfig(JsonConfig):
    """How metrics are computed. Nothing here changes a decision, so a run may resume with other values.

    Attributes:
        engine: `sparse` computes what an edge can change; `hooks` runs the whole model for every test. None
            takes `sparse`, or that of the run that is resumed.
        batch: Candidates tried at once; None adapts to how often edges stay.
        memory_budget: Bytes for candidates side by side and for decoded weights; None takes a share
            of what is free.
        activation_store: Where captured activations are kept: `ram`, or a memory-mapped file on `disk`.
        threads: Threads of the processor while it runs; None leaves them as the program has them.
    """

    engine: EngineName | None = None
    batch: int | None = None
    memory_budget: int | None = None
    activation_store: StoreName = "ram"
    threads: int | None = None

    def validate(self) -> None:
        """Raise `ConfigError` when a value is out of range."""
        if self.engine is not None:
            check_choice("engine", self.engine, EngineName)
        check_choice("activation_store", self.activation_store, StoreName)
        for name in ("batch", "memory_budget"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), whole=True, least=1)
        if self.threads is not None:
            check_number("threads", self.threads, whole=True)
            check_threads(self.threads)
