"""`PAHQModel`: a Hugging Face causal LM ready for circuit discovery."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import Unpack

from pahq_hf import checkpoint
from pahq_hf.ablation import notice
from pahq_hf.accounting import MemoryReport, report
from pahq_hf.apply import applied, substitute_of
from pahq_hf.attribution.run import Attribution
from pahq_hf.circuit import Circuit
from pahq_hf.config import Ablation, ACDCConfig, AttributionConfig, EngineConfig, MetricName, PAHQConfig
from pahq_hf.discovery import Discovery
from pahq_hf.engine.rule import PrecisionRule
from pahq_hf.errors import (
    AblationWarning,
    ConfigError,
    ModelLoadError,
    UnsupportedModelError,
    check_place,
    describe,
)
from pahq_hf.evaluation import EvaluationOptions, Evaluator, check_fits, evaluate
from pahq_hf.files import output_path
from pahq_hf.fingerprint import identity_of
from pahq_hf.graph import Graph
from pahq_hf.guard import WeightGuard, evaluating
from pahq_hf.lowering import lower
from pahq_hf.means import Means
from pahq_hf.memory import trim
from pahq_hf.naming import with_base_model
from pahq_hf.options import (
    AttributeOptions,
    DiscoverOptions,
    EvaluateOptions,
    LoadOptions,
    SearchOptions,
    check_model,
    check_task,
    check_work,
    read_load_options,
    with_fields,
)
from pahq_hf.originals import OriginalCheckpoint
from pahq_hf.patch import PatchedModel
from pahq_hf.precision import CheckpointSource, WeightSource, exact_products, resolve_compute
from pahq_hf.saved_config import find_saved_config
from pahq_hf.selfcheck import check_patched, probe_task, untouched_logits
from pahq_hf.settings import RunSettings
from pahq_hf.sweep import Sweep, SweepRun
from pahq_hf.tasks.base import Task
from pahq_hf.untouched import check_supported, repair_empty_mlps, resident_device


class PAHQModel(nn.Module):
    """A thin wrapper around a causal LM whose attention is cut into heads.

    Attribute access falls through to the wrapped model, as with PEFT: `generate`, `config`, `device`
    and the rest work as before.

    Args:
        model: A Hugging Face causal LM of a supported family; patched in place.
        config: Precision regime and format; `pahq` in FP8 by default.
        tokenizer: The model's tokenizer, used by tasks.
        base_model: Name stored with circuits, of a folder its last part; by default the model's own.
        source: Where FP32 weights can be read again; a temporary file is written when there is none.

    Raises:
        UnsupportedModelError: If the family is unknown.
        SelfCheckError: If the patched model does not reproduce the untouched forward pass.
        ConfigError: If the model is not in float32 (or float64, FP32 regime only).

    Example:
        ```python
        model = PAHQModel.from_pretrained("gpt2")
        task = load_task("ioi", model.tokenizer, n=50)
        circuit = model.discover(task, threshold=0.01)
        ```
    """

    @exact_products()
    def __init__(
        self,
        model: PreTrainedModel,
        config: PAHQConfig | None = None,
        *,
        tokenizer: Any = None,
        base_model: str | None = None,
        source: WeightSource | None = None,
    ) -> None:
        super().__init__()
        check_model(model)
        empty = any(parameter.is_meta for parameter in model.parameters())
        origin = source if empty and isinstance(source, CheckpointSource) else None
        streamed = origin is not None
        check_supported(model, streamed=streamed)
        self._asked = config or PAHQConfig()
        self.pahq_config = _resolved(config or PAHQConfig(), resident_device(model))
        self.base_model = model
        self.tokenizer = tokenizer
        model.eval()
        self._loaded_from: str = base_model or model.config.name_or_path or "unknown"
        self.identity = identity_of(model, self._loaded_from, origin)
        repair_empty_mlps(model)
        probe = probe_task(model)
        reference = untouched_logits(model, probe, origin)
        self.patched = PatchedModel(
            model, split_kv_groups=self.pahq_config.split_kv_groups, streamed=streamed
        )
        OriginalCheckpoint(self.patched).install()
        if streamed:  # in full precision every projection reads the checkpoint again
            self._lower(source)
            with self.patched.precision.full_precision():
                check_patched(self.patched, probe, reference)
        else:
            check_patched(self.patched, probe, reference)
            if self.pahq_config.is_low:
                self._lower(source)
        self._guard = WeightGuard(model)
        trim()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Inside, the model computes what its circuits are about: in eval mode, with the weights it had."""
        self._guard.check(self.base_model)
        with evaluating(self.base_model):
            yield

    def _lower(self, source: WeightSource | None) -> None:
        config = self.pahq_config
        lower(
            self.patched,
            config.format,
            source,
            PrecisionRule.of(config, self.patched.device).compute,
            policy=config.policy,
            tables=config.format if config.quantize_embeddings else None,
        )

    @classmethod
    def from_pretrained(
        cls, model: str | Path, pahq_config: PAHQConfig | None = None, **options: Unpack[LoadOptions]
    ) -> PAHQModel:
        """Load a checkpoint and patch it.

        Args:
            model: Hub id, folder, or `demo` for the bundled checkpoint; also of what `save_pretrained` wrote.
            pahq_config: Precision regime and format; `pahq` in FP8 by default. Alternatively give its fields
                as keywords, as on the command line: `precision="fp32"`, `format="int8"`.
            **options: Further: `device`; `base_model`, the model's id on the Hub, where it is loaded from a
                folder; and as for `AutoModelForCausalLM.from_pretrained` `revision`, `token`, `dtype`,
                `device_map`, `gguf_file`, `trust_remote_code`, ... (`options.LoadOptions`).

        Returns:
            The patched model with its tokenizer.

        Raises:
            ConfigError: If an option is unknown or out of range.
            ModelLoadError: If the checkpoint is missing or damaged.
            UnsupportedModelError: If the family is unknown.
            SelfCheckError: If the patched model does not reproduce the untouched forward pass.
        """
        check_place(model)
        arguments, fields = read_load_options(options, pahq_config)
        return cls._load(str(model), pahq_config, fields, arguments)

    @classmethod
    def _load(
        cls, name: str, given: PAHQConfig | None, fields: dict[str, Any], arguments: dict[str, Any]
    ) -> PAHQModel:
        config = given or PAHQConfig(**fields)
        base_model = arguments.get("base_model")
        if base_model is not None:
            with_base_model({}, base_model)  # fails before anything is loaded
        kwargs = {key: value for key, value in arguments.items() if key != "base_model"}
        try:
            hf, source = checkpoint.load(
                name, streamed=config.is_low, quantize_tables=config.quantize_embeddings, **kwargs
            )
        except (ModelLoadError, UnsupportedModelError):
            saved = find_saved_config(name, kwargs)
            if saved is None or saved.base_model is None:
                raise
            rest = {key: value for key, value in arguments.items() if key not in ("revision", "subfolder")}
            return cls._load(
                saved.base_model,
                given or with_fields(saved, fields),
                {},
                rest | {"revision": saved.revision},
            )
        tokenizer = checkpoint.load_tokenizer(name, **kwargs)
        wrapped = cls(hf, config, tokenizer=tokenizer, base_model=name, source=source)
        if base_model is not None:
            wrapped.identity = with_base_model(wrapped.identity, base_model)
        return wrapped

    # -- the wrapped model ------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Fall through to the wrapped model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not set yet: no wrapped model to ask
                raise
            return getattr(super().__getattr__("base_model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward."""
        return self._wrapped(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's generate."""
        return self._wrapped.generate(*args, **kwargs)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `pahq_config.json`: the base model's name and how it is patched, no weights.

        As with PEFT, `PAHQModel.from_pretrained` of that folder loads the base model again; where that is a
        folder too, its path is in the file, so share it with `push_to_hub`, which writes none.

        Args:
            folder: Created if needed.

        Raises:
            RunError: If it cannot be written.
        """
        self._reloading().save_pretrained(folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish `pahq_config.json` on the Hub; options as for `Circuit.push_to_hub`.

        Returns:
            Where the commit can be seen.

        Raises:
            ConfigError: If the base model is a local folder, and nobody said what it is on the Hub.
            HubError: If the Hub refuses.
        """
        if self.identity["local"] or self.identity["base_model"] == "unknown":
            raise ConfigError(
                f"nobody else has the base model's folder, {self.identity['base_model']}: say which model "
                "it is on the Hub, base_model='owner/name'"
            )
        name, revision = self.identity["base_model"], self.identity["revision"]
        return replace(self.pahq_config, base_model=name, revision=revision).push_to_hub(repo_id, **options)

    def _reloading(self) -> PAHQConfig:
        """The configuration that reloads this model on this machine."""
        name, revision = self._loaded_from, self.identity["revision"]
        if name != "demo" and os.path.exists(name):
            name, revision = os.path.abspath(name), None
        return replace(self.pahq_config, base_model=name, revision=revision)

    @property
    def _wrapped(self) -> Any:
        return self.base_model

    @property
    def graph(self) -> Graph:
        """The residual-stream graph."""
        return self.patched.graph

    # -- precision --------------------------------------------------------------------------------

    def activate(self, *components: str) -> bool:
        """Compute exactly these components (`a3.h1`, `m0`) in FP32. Returns whether anything changed."""
        return self.patched.precision.activate(*components)

    def deactivate(self) -> None:
        """Free the FP32 weights of the active components."""
        self.patched.precision.deactivate()

    def memory_report(
        self, *, n: int = 16, length: int = 16, engine: EngineConfig | None = None
    ) -> MemoryReport:
        """Bytes of this model by part and format, and of a run on it.

        Args:
            n: Prompt pairs of the run.
            length: Tokens of a prompt.
            engine: Its limits.

        Returns:
            The report; `print(report.to_dict())`, or `pahq info` for a table.
        """
        limits = engine or EngineConfig()
        return report(
            self.patched,
            self.pahq_config,
            n=n,
            length=length,
            budget=limits.memory_budget,
            stored=limits.activation_store,
        )

    def _resumed(self, out: str | Path | None, engine: EngineConfig | None) -> EngineConfig:
        """Limits with what a run in a folder began with; `auto` products become what they were there."""
        engine = engine or EngineConfig()
        if out is None:
            return engine
        found = RunSettings.of_run(output_path(out))
        low = self.pahq_config.regime == "pahq" and self._asked.compute == "auto"
        if low and found.compute not in (None, self.pahq_config.compute):
            self.pahq_config = _resolved(replace(self._asked, compute=found.compute), self.patched.device)
            self.patched.compute_in(PrecisionRule.of(self.pahq_config, self.patched.device).compute)
        return replace(engine, engine=engine.engine or found.engine)

    # -- circuits ---------------------------------------------------------------------------------

    def discover(
        self,
        task: Task,
        *,
        config: ACDCConfig | None = None,
        engine: EngineConfig | None = None,
        out: str | Path | None = None,
        resume: bool = False,
        take_over: bool = False,
        progress: bool = True,
        **options: Unpack[DiscoverOptions],
    ) -> Circuit:
        """Find the circuit of a task with ACDC.

        Args:
            task: The prompts.
            config: The search; alternatively give its fields as keywords (`threshold=0.01`).
            engine: Which engine computes metrics, and its limits; decisions do not depend on it.
            out: Folder for the journal and the result; nothing is written without it.
            resume: Continue the run in `out`.
            take_over: Take the place of another machine's process that works in `out`.
            progress: Say on stderr how far it is.
            **options: Fields of `ACDCConfig`.

        Returns:
            The circuit.

        Raises:
            ConfigError: If `task` is no task, or an option is unknown or out of range.
            MetricError: If the metric needs answers the task lacks, or came out as NaN.
            RunError: If `out` cannot be written or holds another run.
        """
        check_work(
            options, DiscoverOptions, "discover", config=(config, ACDCConfig), engine=(engine, EngineConfig)
        )
        check_task(task, "discover")
        acdc = _search_config(config, options)
        engine = self._resumed(out, engine) if resume else engine
        run = Discovery(self.patched, self.identity, task, self.pahq_config, acdc, engine, progress=progress)
        with self._at_work():
            return run.run(out, resume=resume, take_over=take_over)

    def sweep(
        self,
        task: Task,
        *,
        thresholds: Sequence[float],
        config: ACDCConfig | None = None,
        engine: EngineConfig | None = None,
        out: str | Path | None = None,
        resume: bool = False,
        take_over: bool = False,
        progress: bool = True,
        **options: Unpack[SearchOptions],
    ) -> Sweep:
        """Find a task's circuits at several thresholds, in one run that computes what they share once.

        Args:
            task: The prompts.
            thresholds: They, in any order. The circuits are, to the bit, those of `discover` at each.
            config: The search, but for its threshold; or give its fields as keywords.
            engine: Which engine computes metrics, and its limits.
            out: Folder for a run's folder per threshold, `sweep.json` and plots.
            resume: Continue the sweep in `out`, or add thresholds to it.
            take_over: Take the place of another machine's process that works in `out`.
            progress: Say on stderr how far it is.
            **options: Fields of `ACDCConfig`.

        Returns:
            Circuits by threshold.

        Raises:
            ConfigError: If an option is unknown or out of range, or a threshold is given twice.
            MetricError: If the metric needs answers the task lacks, or came out as NaN.
            RunError: If `out` cannot be written or holds a sweep already.
        """
        if "threshold" in options:
            raise ConfigError("a sweep takes thresholds, not a threshold")
        check_work(
            options, SearchOptions, "sweep", config=(config, ACDCConfig), engine=(engine, EngineConfig)
        )
        check_task(task, "sweep")
        acdc = _search_config(config, options)
        engine = self._resumed(out, engine) if resume else engine
        where = self.patched, self.identity, task, self.pahq_config
        sweep = SweepRun(*where, acdc, thresholds, engine, progress=progress)
        with self._at_work():
            return sweep.run(out, resume=resume, take_over=take_over)

    def attribute(
        self,
        task: Task,
        *,
        engine: EngineConfig | None = None,
        out: str | Path | None = None,
        take_over: bool = False,
        progress: bool = True,
        **options: Unpack[AttributeOptions],
    ) -> Circuit:
        """Score every edge by attribution, and keep the best or all of them.

        Args:
            task: The prompts.
            engine: Which engine method `exact` uses, and its limits.
            out: Folder for the result; nothing is written without it.
            take_over: Take the place of another machine's process that works in `out`.
            progress: Say on stderr how far it is.
            **options: Fields of `AttributionConfig`: `method` (`eap-ig` by default), `metric`, `steps`,
                `topn`, `threshold`, `absolute`, `ablation`, `seed`.

        Returns:
            The circuit; `scores` holds the score of every edge, positive where removing it would hurt.

        Raises:
            ConfigError: If `task` is no task, or an option is unknown or out of range.
            MetricError: If the method means nothing for the metric, or the metric came out as NaN.
            RunError: If `out` cannot be written or holds another run.
        """
        check_work(options, AttributeOptions, "attribute", engine=(engine, EngineConfig))
        check_task(task, "attribute")
        config = AttributionConfig.from_dict(dict(options))
        where = self.patched, self.identity, task, self.pahq_config
        run = Attribution(*where, config, engine, progress=progress)
        with self._at_work():
            return run.run(out, take_over=take_over)

    @exact_products()
    def evaluate(
        self,
        circuit: Circuit,
        task: Task,
        *,
        metric: MetricName | None = None,
        any_weights: bool = False,
        **options: Unpack[EvaluateOptions],
    ) -> dict[str, Any]:
        """Judge a circuit on a task, in FP32.

        Args:
            circuit: A circuit of this model.
            task: The prompts.
            metric: The metric whose faithfulness is reported; the circuit's own by default.
            any_weights: Accept a circuit that was found on other weights of the same shape.
            **options: Fields of `evaluation.EvaluationOptions`: `curve`, `minimality`, `completeness`, ...

        Returns:
            `kl`, `accuracy`, `faithfulness`, `edges` and more; see `evaluation.evaluate`.

        Raises:
            CircuitError: If the circuit is of another model.
        """
        check_work(options, EvaluateOptions, "evaluate", circuit=(circuit, Circuit))
        check_task(task, "evaluate")
        wanted = EvaluationOptions.from_dict(dict(options))
        check_fits(circuit, self.patched, self.identity, any_weights=any_weights)
        ran = circuit.record.arguments
        chosen = metric or ran.metric or task.metric
        ablation = cast("Ablation", ran.ablation or "corrupted")
        with self._at_work():
            evaluator = Evaluator(self.patched, task, chosen, ablation)
            return evaluate(evaluator, circuit, wanted)

    def apply(  # type: ignore[override]
        self,
        circuit: Circuit,
        *,
        corrupted: Tensor | Mapping[str, Any] | None = None,
        corrupted_mask: Tensor | None = None,
        means: Means | None = None,
        exact: bool = True,
        any_weights: bool = False,
    ) -> AbstractContextManager[PAHQModel]:
        """Run the model as a circuit: inside, forward, generate and pipelines use nothing but its edges.

        Removed edges carry what the corrupted prompts write. Without them they carry what is kept with the
        circuit: the ablation it was found under if that needs no prompts (`mean`, `mean-corrupted`, `zero`),
        else means of its corrupted prompts. How well it answers so was measured when it was found; an
        `AblationWarning` tells when this is another ablation than it was found under, or when it is poor.

        Corrupted prompts run along as the circuit's partner, with a cache of their own where it has one.
        Beyond their end it reads the tokens that the circuit reads: what is generated continues both.

        Args:
            circuit: A circuit of this model.
            corrupted: Token ids of corrupted prompts, laid out as the prompts are, or what a tokenizer
                returns for them (`tokenizer(prompts, return_tensors="pt")`), with its mask. [batch, pos]
            corrupted_mask: Which of them are real; the prompts' own mask by default. [batch, pos]
            means: Other mean activations (`pahq_hf.means.means_of`).
            exact: Compute in FP32; False computes at the model's precision, faster.
            any_weights: Accept a circuit that was found on other weights of the same shape.

        Returns:
            A context that gives this model.

        Raises:
            ConfigError: If `circuit` is none, if one is applied already, if nothing says what removed edges
                carry, or the corrupted prompts are no token ids.
            TaskError: If a token id is outside the vocabulary.
            CircuitError: If the circuit, or the means, are of another model.
        """
        if not isinstance(circuit, Circuit):
            if not callable(circuit):  # type: ignore[unreachable]
                raise ConfigError(
                    f"apply takes a Circuit (Circuit.from_pretrained(...)); got {describe(circuit)}"
                )
            return super().apply(circuit)  # `nn.Module.apply`, which calls a function on every module
        return self._applied(circuit, corrupted, corrupted_mask, means, exact, any_weights)

    @contextmanager
    def _applied(
        self,
        circuit: Circuit,
        corrupted: Tensor | Mapping[str, Any] | None,
        corrupted_mask: Tensor | None,
        means: Means | None,
        exact: bool,
        any_weights: bool,
    ) -> Iterator[PAHQModel]:
        check_fits(circuit, self.patched, self.identity, any_weights=any_weights)
        with self._at_work(), exact_products():
            substitute, ablation = substitute_of(self.patched, circuit, corrupted, corrupted_mask, means)
            text = notice(circuit.record, ablation)
            if text is not None:
                warnings.warn(text, AblationWarning, stacklevel=3)  # of the caller's `with`
            with applied(self.patched, circuit.kept, substitute, exact=exact):
                yield self


def _search_config(config: ACDCConfig | None, options: Mapping[str, Any]) -> ACDCConfig:
    if config is not None and options:
        raise ConfigError("give either config or its fields as keywords, not both")
    return config or ACDCConfig.from_dict(dict(options))


def _resolved(config: PAHQConfig, device: torch.device) -> PAHQConfig:
    """The configuration with what `auto` means here, so that it pins a run."""
    if config.regime != "pahq":
        return replace(config, compute="fp32")
    return replace(config, compute=resolve_compute(config.compute, config.format, device))
