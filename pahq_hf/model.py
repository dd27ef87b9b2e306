"""`PAHQModel`: a Hugging Face causal LM ready for circuit discovery."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast, overload

from transformers import PreTrainedModel
from typing_extensions import Unpack

from pahq_hf.capture.preparation import compute_dtype, prepare, resolved
from pahq_hf.checkpoint.adapters import without_adapters
from pahq_hf.checkpoint.arguments import LoadOptions, check_model, read_load_options
from pahq_hf.checkpoint.saved_config import load_by_name
from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.files import output_path
from pahq_hf.circuit.identity import ModelIdentity
from pahq_hf.config import Ablation, EngineConfig, PAHQConfig
from pahq_hf.errors import ConfigError, check_place
from pahq_hf.evaluation.evaluator import Evaluator
from pahq_hf.evaluation.fits import fit
from pahq_hf.evaluation.report import EvaluationOptions, evaluate
from pahq_hf.evaluation.runnable import RunnableModel
from pahq_hf.precision.flags import exact_products
from pahq_hf.precision.fp32.source import WeightSource
from pahq_hf.search.acdc_options import ACDCConfig
from pahq_hf.search.arguments import (
    AttributeOptions,
    DiscoverOptions,
    EvaluateOptions,
    SweepOptions,
    check_task,
    check_work,
    wanted_options,
)
from pahq_hf.search.attribution.options import AttributionConfig
from pahq_hf.search.bootstrap import BootstrapRun
from pahq_hf.search.bootstrap_options import BootstrapConfig
from pahq_hf.search.directions import make_run
from pahq_hf.search.kind import Options, OptionsT, SearchKind
from pahq_hf.search.registry import default_search, find_search
from pahq_hf.search.settings import RunSettings
from pahq_hf.search.subject import Subject
from pahq_hf.search.sweep import SweepRun
from pahq_hf.search.sweep_result import Sweep
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.own_metric import OwnMetric, metric_name, with_named_metric


class PAHQModel(RunnableModel):
    """A thin wrapper around a causal LM whose attention is cut into heads.

    Attribute access falls through to the wrapped model, as with PEFT: `generate`, `config`, `device`
    and the rest work as before.

    Args:
        model: A Hugging Face causal LM of a supported family, patched in place; or one of PEFT with LoRA, of
            which a copy is patched that has the active adapters merged into its weights.
        config: Precision regime and format; `pahq` in FP8 by default.
        tokenizer: The model's tokenizer, used by tasks.
        base_model: Name stored with circuits, of a folder its last part; by default the model's own.
        source: Where FP32 weights can be read again; a temporary file is written when there is none.
        assume_family: Known family by whose row the model is read, if its own family has none.

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
        assume_family: str | None = None,
    ) -> None:
        check_model(model)
        plain, adapter = without_adapters(model)
        model = cast("PreTrainedModel", plain)
        asked, name = config or PAHQConfig(), base_model or model.config.name_or_path or "unknown"
        prepared = prepare(model, asked, name, source, assume_family)
        super().__init__(model, name, prepared)
        self.identity = replace(self.identity, adapter=adapter)
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls, model: str | Path, pahq_config: PAHQConfig | None = None, **options: Unpack[LoadOptions]
    ) -> PAHQModel:
        """Load a checkpoint and patch it.

        Args:
            model: Hub id, folder, or `demo` for the bundled checkpoint; also of what `save_pretrained` wrote,
                or of a LoRA adapter (`adapter_config.json`), which is merged into its base.
            pahq_config: Precision regime and format; `pahq` in FP8 by default. Alternatively give its fields
                as keywords, as on the command line: `precision="fp32"`, `format="int8"`.
            **options: Further: `device`; `base_model`, the model's id on the Hub, where it is loaded from a
                folder; `assume_family`, by whose row an unknown family is read; and as for
                `AutoModelForCausalLM.from_pretrained` `revision`, `token`, `dtype`, `device_map`,
                `gguf_file`, `trust_remote_code`, ... (`options.LoadOptions`).

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
        base_model = arguments.pop("base_model", None)
        if base_model is not None:
            ModelIdentity().with_base_model(base_model)  # fails before anything is loaded
        found = load_by_name(str(model), pahq_config, fields, arguments)
        wrapped = cls(
            found.model, found.config, tokenizer=found.tokenizer, base_model=found.name, source=found.source
        )
        if found.adapter is not None:
            wrapped.identity = found.adapter.identify(wrapped.config, wrapped.identity.fingerprint)
        if base_model is not None:
            wrapped.identity = wrapped.identity.with_base_model(base_model)
        return wrapped

    @contextmanager
    def _resumed(
        self, out: str | Path | None, engine: EngineConfig | None, resume: bool, take_over: bool
    ) -> Iterator[EngineConfig]:
        """Limits with what a run in a folder began with; inside, `auto` products are what they were there."""
        for name, given in (("resume", resume), ("take_over", take_over)):
            if given and out is None:
                raise ConfigError(f"{name}=True is about the run in a folder: say which, out=...")
        self._settle()
        engine, own = engine or EngineConfig(), self.pahq_config
        found = RunSettings.of_run(output_path(out)) if resume and out is not None else RunSettings()
        low = own.regime == "pahq" and self._asked.compute == "auto"
        if not low or found.compute in (None, own.compute):
            yield replace(engine, engine=engine.engine or found.engine)
            return
        try:
            self._compute_as(resolved(replace(self._asked, compute=found.compute), self.patched.device))
            yield replace(engine, engine=engine.engine or found.engine)
        finally:
            self._compute_as(own)

    def _subject(self, task: Task, limits: EngineConfig) -> Subject:
        return Subject(self.patched, self.identity, task, self.pahq_config, limits)

    def _compute_as(self, config: PAHQConfig) -> None:
        self.pahq_config = config
        self.patched.compute_in(compute_dtype(config, self.patched.device))

    # -- circuits ---------------------------------------------------------------------------------

    @overload
    def discover(
        self,
        task: Task,
        *,
        search: Literal["acdc"] | None = None,
        config: ACDCConfig | None = None,
        engine: EngineConfig | None = None,
        bootstrap: int | BootstrapConfig | None = None,
        out: str | Path | None = None,
        resume: bool = False,
        take_over: bool = False,
        progress: bool = True,
        **options: Unpack[DiscoverOptions],
    ) -> Circuit: ...

    @overload
    def discover(
        self,
        task: Task,
        *,
        edges: int,
        engine: EngineConfig | None = None,
        bootstrap: int | BootstrapConfig | None = None,
        out: str | Path | None = None,
        resume: bool = False,
        take_over: bool = False,
        progress: bool = True,
        **options: Any,
    ) -> Circuit: ...

    @overload
    def discover(
        self,
        task: Task,
        *,
        search: str,
        config: Options | None = None,
        engine: EngineConfig | None = None,
        bootstrap: int | BootstrapConfig | None = None,
        out: str | Path | None = None,
        resume: bool = False,
        take_over: bool = False,
        progress: bool = True,
        **options: Any,
    ) -> Circuit: ...

    def discover(
        self,
        task: Task,
        *,
        search: str | None = None,
        config: Options | None = None,
        engine: EngineConfig | None = None,
        bootstrap: int | BootstrapConfig | None = None,
        out: str | Path | None = None,
        resume: bool = False,
        take_over: bool = False,
        progress: bool = True,
        **options: Any,
    ) -> Circuit:
        """Find the circuit of a task, with ACDC or another search.

        Args:
            task: The prompts.
            search: Name of the search: `acdc`, `budget`, `refine`, `edge-pruning`, `ugs`, a method of
                attribution, or one of your own (`register_search`). By default `refine` where `edges` are
                given and no `threshold`, else `acdc`.
            config: Its options, for ACDC an `ACDCConfig`; or give its fields as keywords (`threshold=0.01`).
            engine: Which engine computes metrics, and its limits; decisions do not depend on it.
            bootstrap: Searches on so many resamples of the pairs, too: the circuit is the same, and has
                `frequencies`. Each is a whole search.
            out: Folder for the journal and the result; nothing is written without it.
            resume: Continue the run in `out`.
            take_over: Take the place of another machine's process that works in `out`.
            progress: Say on stderr how far it is.
            **options: Fields of the search's options.

        Returns:
            The circuit.

        Raises:
            ConfigError: If `task` is no task, there is no such search, or an option is unknown or out of
                range.
            MetricError: If the metric needs answers the task lacks, or came out as NaN.
            RunError: If `out` cannot be written or holds another run.
        """
        kind = find_search(default_search(options) if search is None else search)
        wanted = wanted_options(kind, task, config, engine, options, "discover")
        drawn = None if bootstrap is None else BootstrapConfig.of(bootstrap)
        return self._run(kind, wanted, task, engine, out, resume, take_over, progress, drawn)

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
        **options: Unpack[SweepOptions],
    ) -> Sweep:
        """Find a task's circuits at several thresholds, in one run that computes what they share once.

        Args:
            task: The prompts.
            thresholds: Values of tau, in any order; each gives, to the bit, the circuit of `discover`.
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
        kind = find_search("acdc")
        wanted = wanted_options(kind, task, config, engine, options, "sweep")
        with self._resumed(out, engine, resume, take_over) as limits:
            sweep = SweepRun(kind, wanted, thresholds, self._subject(task, limits), progress=progress)
            with self._at_work("the sweep"):
                return sweep.run(out, resume=resume, take_over=take_over)

    def attribute(
        self,
        task: Task,
        *,
        engine: EngineConfig | None = None,
        out: str | Path | None = None,
        resume: bool = False,
        take_over: bool = False,
        progress: bool = True,
        **options: Unpack[AttributeOptions],
    ) -> Circuit:
        """Score every edge by attribution, and keep the best or all of them.

        Args:
            task: The prompts.
            engine: Which engine method `exact` uses, and its limits.
            out: Folder for the result; nothing is written without it.
            resume: Continue the run in `out`; only method `exact` has steps to go on from.
            take_over: Take the place of another machine's process that works in `out`.
            progress: Say on stderr how far it is.
            **options: Fields of `AttributionConfig`: `method` (`eap-ig` by default), `metric`, `steps`,
                `topn`, `threshold`, `absolute`, `ablation`, `seed`, `criterion`, `members`,
                `direction`, `level`.

        Returns:
            The circuit; `scores` holds the score of every edge, positive where removing it would hurt.

        Raises:
            ConfigError: If `task` is no task, or an option is unknown or out of range.
            MetricError: If the method means nothing for the metric, or the metric came out as NaN.
            RunError: If `out` cannot be written or holds another run.
        """
        check_work(options, AttributeOptions.__annotations__, "attribute", engine=(engine, EngineConfig))
        check_task(task, "attribute")
        wanted = AttributionConfig.from_dict(with_named_metric(options))
        kind = find_search(wanted.method)
        return self._run(kind, wanted, task, engine, out, resume, take_over, progress)

    def _run(
        self,
        kind: SearchKind[OptionsT],
        wanted: OptionsT,
        task: Task,
        engine: EngineConfig | None,
        out: str | Path | None,
        resume: bool,
        take_over: bool,
        progress: bool,
        drawn: BootstrapConfig | None = None,
    ) -> Circuit:
        with self._resumed(out, engine, resume, take_over) as limits:
            subject = self._subject(task, limits)
            if drawn is None:
                run = make_run(kind, wanted, subject, progress=progress)
            else:
                run = BootstrapRun(kind, wanted, subject, drawn, progress=progress)
            with self._at_work("the search"):
                return run.run(out, resume=resume, take_over=take_over)

    @exact_products()
    def evaluate(
        self,
        circuit: Circuit,
        task: Task,
        *,
        metric: str | OwnMetric | None = None,
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
        check_work(options, EvaluateOptions.__annotations__, "evaluate", circuit=(circuit, Circuit))
        check_task(task, "evaluate")
        wanted = EvaluationOptions.from_dict(dict(options))
        circuit = fit(circuit, self.patched, self.identity, any_weights=any_weights)
        ran = circuit.record.arguments
        chosen = metric_name(metric) or ran.metric or task.metric
        ablation = cast("Ablation", ran.ablation or "corrupted")
        with self._at_work("the evaluation"):
            evaluator = Evaluator(self.patched, task, chosen, ablation)
            return evaluate(evaluator, circuit, wanted)
