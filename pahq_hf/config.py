"""Configuration: how weights are kept (`PAHQConfig`) and how a circuit is searched (`ACDCConfig`)."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pahq_hf.circuit.files import make_folder, read_json, write_text
from pahq_hf.errors import CircuitError, ConfigError, check_names, check_place
from pahq_hf.precision.threads import check_threads

Regime = Literal["fp32", "pahq", "pahq-literal", "rtn"]
Active = Literal["receiver", "both"]
Compute = Literal["auto", "fp32", "bf16", "fp8"]
Ablation = Literal["corrupted", "zero", "mean", "mean-corrupted"]
Order = Literal["acdc", "head"]
MethodName = Literal["eap", "eap-ig", "hisp", "exact", "random"]
EngineName = Literal["sparse", "hooks"]
StoreName = Literal["ram", "disk"]
CONFIG_NAME = "pahq_config.json"
_CONFIG_VERSION = 1  # of that file

SelfT = TypeVar("SelfT", bound="_JsonConfig")


@dataclass(frozen=True)
class _JsonConfig:
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


def _metric(name: object) -> None:
    from pahq_hf.tasks.metrics import known_metrics

    if name not in known_metrics():
        raise ConfigError(f"metric must be one of {', '.join(known_metrics())}; got {name!r}")


def _format(name: str, value: object) -> None:
    from pahq_hf.precision.formats.registry import known_formats

    if value not in known_formats():
        raise ConfigError(f"{name} must be one of {', '.join(known_formats())}; got {value!r}")


def _choice(name: str, value: object, choices: object) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def check_number(name: str, value: object, *, whole: bool = False) -> None:
    """Check that a value is a number, and no truth value.

    Raises:
        ConfigError: If not.
    """
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ConfigError(f"{name} must be {'a whole number' if whole else 'a number'}; got {value!r}")


@dataclass(frozen=True)
class PAHQConfig(_JsonConfig):
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

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish `pahq_config.json` on the Hub; options as for `Circuit.push_to_hub`.

        Returns:
            Where the commit can be seen.

        Raises:
            HubError: If the Hub refuses.
        """
        from pahq_hf.circuit.hub import push

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
        if Path(name).is_dir():
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
        if not isinstance(version, int) or version > _CONFIG_VERSION or not isinstance(precision, dict):
            raise ConfigError(f"{path} has format {version!r}; this version reads up to {_CONFIG_VERSION}")
        base, revision = (
            None if document.get(name) is None else str(document[name]) for name in ("base_model", "revision")
        )
        return replace(cls.from_dict(precision), base_model=base, revision=revision)

    def validate(self) -> None:
        """Raise `ConfigError` when a value is not one of the choices."""
        _choice("precision", self.regime, Regime)
        _format("format", self.format)
        _choice("active", self.active, Active)
        _choice("compute", self.compute, Compute)
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
class AttributionConfig(_JsonConfig):
    """How edges are scored, and which of them make the circuit (docs/semantics.md, section 7).

    Attributes:
        method: `eap`; `eap-ig`, with integrated gradients over the inputs; `hisp`, head importance; `exact`,
            every edge removed alone from the full model; `random`.
        metric: What is minimised; None takes the task's own.
        steps: Runs whose gradients `eap-ig` averages.
        topn: Keep so many edges; by default all, or those of the threshold.
        threshold: Keep edges with at least this score.
        absolute: Compare magnitudes of scores.
        ablation: What takes the place of a removed edge.
        seed: Of `random`.
    """

    method: MethodName = "eap-ig"
    metric: str | None = None
    steps: int = 5
    topn: int | None = None
    threshold: float | None = None
    absolute: bool = False
    ablation: Ablation = "corrupted"
    seed: int = 0

    def validate(self) -> None:
        """Raise `ConfigError` when a value is out of range."""
        _choice("method", self.method, MethodName)
        if self.metric is not None:
            _metric(self.metric)
        _choice("ablation", self.ablation, Ablation)
        for name in ("steps", "topn", "seed"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), whole=True)
        if self.threshold is not None:
            check_number("threshold", self.threshold)
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1; got {self.steps}")
        if self.topn is not None and self.threshold is not None:
            raise ConfigError("give either topn or a threshold, not both")
        if self.topn is not None and self.topn < 1:
            raise ConfigError(f"topn must be at least 1; got {self.topn}")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"threshold must be a finite number; got {self.threshold}")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0; got {self.seed}")


@dataclass(frozen=True)
class ACDCConfig(_JsonConfig):
    """How ACDC searches (docs/semantics.md, section 3).

    Attributes:
        threshold: tau; an edge goes when its removal raises the metric by less than this.
        metric: What is minimised; None takes the task's own.
        order: Reader order.
        ablation: What takes the place of a removed edge.
        absolute: Compare `|new - cur|` instead of `new - cur`.
        readers: Comma-separated globs; only matching readers are searched, others keep all edges.
        margin: Test an edge again in FP32 when its score is within `margin * threshold` of the threshold;
            `inf` tests every edge again. None takes the default of precision `pahq`; the other regimes
            have no second look.
        screen: `METHOD:FRACTION`, such as `eap-ig:0.1`: score all edges by attribution first and test only
            this fraction of them, those with the largest magnitudes. The others are removed untested when
            their reader is visited. None tests all.
    """

    threshold: float = 0.01
    metric: str | None = None
    order: Order = "acdc"
    ablation: Ablation = "corrupted"
    absolute: bool = False
    readers: str | None = None
    margin: float | None = None
    screen: str | None = None

    def validate(self) -> None:
        """Raise `ConfigError` when a value is out of range."""
        check_number("threshold", self.threshold)
        if self.margin is not None:
            check_number("margin", self.margin)
        if not math.isfinite(self.threshold) or self.threshold < 0:
            raise ConfigError(f"threshold must be a finite number >= 0; got {self.threshold}")
        if self.metric is not None:
            _metric(self.metric)
        _choice("order", self.order, Order)
        _choice("ablation", self.ablation, Ablation)
        if self.margin is not None and not self.margin >= 0:
            raise ConfigError(f"margin must be a number >= 0 or inf; got {self.margin}")
        if self.screen is not None:
            parse_screen(self.screen)

    def stays(self, score: float) -> bool:
        """Whether an edge with this score is kept."""
        return (abs(score) if self.absolute else score) >= self.threshold

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values; JSON has no infinity, and most runs no screen."""
        values = asdict(self)
        if self.screen is None:
            del values["screen"]
        return values | {"margin": "inf"} if self.margin == math.inf else values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ACDCConfig:
        """Build from `to_dict`'s output."""
        if values.get("margin") == "inf":
            values = values | {"margin": math.inf}
        return super().from_dict(values)


def parse_screen(text: str) -> tuple[MethodName, float]:
    """Method and fraction of a screen.

    Args:
        text: `METHOD:FRACTION`.

    Raises:
        ConfigError: If it is something else.
    """
    method, _, rest = text.partition(":")
    try:
        fraction = float(rest)
    except ValueError:
        fraction = math.nan
    for known in get_args(MethodName):
        if method == known and 0 < fraction <= 1:
            return known, fraction
    methods = ", ".join(get_args(MethodName))
    raise ConfigError(
        f"screen must be METHOD:FRACTION, such as eap-ig:0.1, with a method of {methods} and a fraction "
        f"above 0 and up to 1; got {text!r}"
    )


@dataclass(frozen=True)
class EngineConfig(_JsonConfig):
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
            _choice("engine", self.engine, EngineName)
        _choice("activation_store", self.activation_store, StoreName)
        for name in ("batch", "memory_budget", "threads"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), whole=True)
        if self.batch is not None and self.batch < 1:
            raise ConfigError(f"batch must be at least 1; got {self.batch}")
        if self.memory_budget is not None and self.memory_budget < 1:
            raise ConfigError(f"memory_budget must be at least 1 byte; got {self.memory_budget}")
        if self.threads is not None:
            check_threads(self.threads)
