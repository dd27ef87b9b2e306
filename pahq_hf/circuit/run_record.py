"""`RunRecord`: what ran to find a circuit, and what came out (discovery.json)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pahq_hf.circuit.bootstrap_facts import BootstrapFacts
from pahq_hf.circuit.confirmation import Confirmation
from pahq_hf.circuit.estimates import EstimateFacts
from pahq_hf.circuit.nodes import ScoredNodes
from pahq_hf.circuit.sections import Section
from pahq_hf.circuit.verdict import Verdict, faithfulness
from pahq_hf.errors import CircuitError

GREEDY = "acdc"  # the method of files that name none
# Titles of the methods there were before a record carried its own.
TITLES = {
    GREEDY: "ACDC with activation patching",
    "eap": "edge attribution patching (EAP)",
    "eap-ig": "edge attribution patching with integrated gradients (EAP-IG)",
    "hisp": "head importance (HISP)",
    "exact": "removing each edge alone",
    "random": "random scores",
}
_OBJECTS = ("header", "arguments", "precision", "task", "edges", "nodes", "metric", "seconds")


@dataclass(frozen=True, kw_only=True)
class MetricFacts(Section):
    """The minimised metric of a circuit and of what it is compared with.

    Attributes:
        name: The metric.
        full: Of the full model.
        empty: Of no edges.
        final: Of the circuit, by the engine of its search at the search's precision.
        final_recomputed: Of the circuit, by the hooks engine at the search's precision.
        tolerance: How far rounding may bring these two apart.
        fp32: Of the circuit, by the hooks engine in FP32.
    """

    name: str | None = None
    full: float | None = None
    empty: float | None = None
    final: float | None = None
    final_recomputed: float | None = None
    tolerance: float | None = None
    fp32: float | None = None

    @property
    def faithfulness(self) -> float | None:
        """How far a circuit is on the way from no edges to the full model; None where that is not known."""
        if self.full is None or self.empty is None or self.fp32 is None:
            return None
        return faithfulness(self.fp32, self.full, self.empty)

    @property
    def confirmation(self) -> Confirmation | None:
        """The circuit's metric by its search and by the hooks engine; None where a value is missing."""
        if self.name is None or self.final is None or self.final_recomputed is None or self.tolerance is None:
            return None
        return Confirmation(self.name, self.final, self.final_recomputed, self.tolerance)

    @property
    def verified(self) -> bool:
        """Whether there are two such values, and they agree."""
        return self.confirmation is not None and self.confirmation.verified


@dataclass(frozen=True, kw_only=True)
class EdgeCounts(Section):
    """How many edges there are.

    Attributes:
        total: In the graph.
        tested: Edges decided by their score, measured or estimated (`EstimateFacts` tells how many); where
            whole nodes are, by those of the nodes at their ends.
        untested: Edges that none decided: into readers that nobody reads, passed over by a screen or by
            learning, or only ranked, as by masks.
        kept: In the circuit.
        live: Kept edges on a path from `input` to `logits`.
    """

    total: int | None = None
    tested: int | None = None
    untested: int | None = None
    kept: int | None = None
    live: int | None = None


@dataclass(frozen=True, kw_only=True)
class NodeCounts(Section):
    """How many heads and MLPs there are, where whole nodes are kept or removed.

    Attributes:
        total: In the graph.
        tested: Heads and MLPs with a score.
        kept: In the circuit.
    """

    total: int | None = None
    tested: int | None = None
    kept: int | None = None

    @classmethod
    def of(cls, nodes: ScoredNodes | None) -> NodeCounts:
        """Of the nodes of a circuit; None has none."""
        if nodes is None:
            return cls()
        return cls(total=len(nodes.kept) - 1, tested=int(nodes.tested.sum()), kept=nodes.count)

    @property
    def text(self) -> str | None:
        """The same in words; None where edges are kept or removed."""
        return None if self.kept is None or self.total is None else f"{self.kept:,} of {self.total:,}"


@dataclass(frozen=True, kw_only=True)
class TaskFacts(Section):
    """The prompts in words; `more` holds the rest of their `Task.source`.

    Attributes:
        name: The task.
        examples: Pairs of prompts.
        generator: What made them, if something did.
        corruption: By which corruption.
        total: Rows of the data they are from.
        skipped: Rows that could not be used and were left out, where that was asked for.
        padded: Corrupted prompts that were filled to the clean ones' length, where that was asked for.
    """

    name: str | None = None
    examples: int | None = None
    generator: str | None = None
    corruption: str | None = None
    total: int | None = None
    skipped: int | None = None
    padded: int | None = None

    @property
    def pairs(self) -> str | None:
        """How many pairs of prompts there are, and what of the data was not used as it is."""
        if self.examples is None:
            return None
        notes = {"left out": self.skipped, "filled": self.padded}
        told = ", ".join(f"{count:,} {what}" for what, count in notes.items() if count)
        return f"{self.examples:,}" + (f" ({told})" if told else "")


@dataclass(frozen=True, kw_only=True)
class SearchArguments(Section):
    """What a search was asked for; `more` holds arguments that only it and its own file know.

    Attributes:
        threshold: Scores from which edges are kept.
        topn: Number of edges that are kept.
        metric: What was minimised.
        ablation: What took the place of removed edges.
        screen: `METHOD:FRACTION` of the edges that were tested at all.
        readers: Globs of the readers that were searched.
        order: Of the readers.
    """

    threshold: float | None = None
    topn: int | None = None
    metric: str | None = None
    ablation: str | None = None
    screen: str | None = None
    readers: str | None = None
    order: str | None = None

    @property
    def criterion(self) -> str:
        """What of an edge was held against the threshold: `signed`, `absolute` or `gap`."""
        if self.more.get("criterion") == "gap":
            return "gap"
        return "absolute" if self.more.get("absolute") is True else "signed"

    @property
    def level(self) -> str:
        """What was kept or removed: `edge` or `node`."""
        return "node" if self.more.get("level") == "node" else "edge"

    @property
    def direction(self) -> str:
        """`noising`, `denoising` or `both`."""
        found = self.more.get("direction")
        return found if found in ("denoising", "both") else "noising"

    def __contains__(self, name: str) -> bool:
        """Whether the search has an argument of this name, be it None."""
        return name in self.more or getattr(self, name, None) is not None


@dataclass(frozen=True, kw_only=True)
class PrecisionFacts(Section):
    """How weights were kept and computed: the run's `PAHQConfig.to_dict()`.

    Attributes:
        regime: `pahq`, `fp32`, ...
        format: Low-precision format of the weights.
        compute: Dtype of products with differences.
    """

    regime: str | None = None
    format: str | None = None
    compute: str | None = None


@dataclass(frozen=True, kw_only=True)
class AppliedFacts(Section):
    """How well a circuit answers inside `PAHQModel.apply` (`Evaluator.applied`).

    Attributes:
        ablation: What stands in for removed edges when no corrupted prompts are given.
        accuracy: By ablation, and `full` for the full model.
    """

    ablation: str | None = None
    accuracy: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Reused(Section):
    """What another search of the same sweep had answered already.

    Attributes:
        evaluations: Values of the metric.
        readers: Readers whose tests were all answered.
    """

    evaluations: int | None = None
    readers: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunRecord(Section):
    """What ran and what came out.

    Attributes:
        method: Name of the search, such as `acdc` or `eap-ig`.
        title: What it is, in words.
        ranks_kept_first: Whether kept edges rank before all others: a greedy search's scores of the two do
            not compare.
        header: What pinned the run (`Discovery.header`).
        arguments: What the search was asked for.
        precision: How weights were kept and computed.
        engine: `sparse` or `hooks`.
        settings: How the run computed (`RunSettings`).
        task: The prompts in words.
        versions: Of everything that could change a number, and the device.
        hardware: The GPU.
        edges: How many were tested, kept, ...
        nodes: The same of heads and MLPs, where these are the units.
        second_looks: Tests made again in FP32.
        estimates: Decisions taken by estimates, and their audit.
        screen: What a screen passed over.
        resumed_readers: Readers that an interrupted run had decided.
        evaluations: Values of the metric that were computed, by all parts of an interrupted run.
        reused: Values that another search of the same sweep had computed.
        apply: How well the circuit answers in `apply`.
        seconds: By phase, and `total`, of all parts of an interrupted run.
        peak_memory: Bytes by kind, of the process that finished it.
        metric: The minimised metric.
        swapped: The same with clean and corrupted prompts swapped, of a search by denoising.
        directions: Of a search in both directions, what each came to, by its name.
        bootstrap: What resamples of the prompts came to, of a search with a bootstrap.
        verified: Whether the hooks engine confirmed the search's value.
        verdict: Whether the circuit does what the model does.
        kl: KL from the full model in FP32, in a sweep.
    """

    method: str | None = None
    title: str
    ranks_kept_first: bool
    header: Mapping[str, Any] = field(default_factory=dict)
    arguments: SearchArguments = field(default_factory=SearchArguments)
    precision: PrecisionFacts = field(default_factory=PrecisionFacts)
    engine: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    task: TaskFacts = field(default_factory=TaskFacts)
    versions: Mapping[str, Any] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    edges: EdgeCounts = field(default_factory=EdgeCounts)
    nodes: NodeCounts = field(default_factory=NodeCounts)
    second_looks: Mapping[str, Any] = field(default_factory=dict)
    estimates: EstimateFacts = field(default_factory=EstimateFacts)
    screen: Mapping[str, Any] = field(default_factory=dict)
    peak_memory: Mapping[str, Any] = field(default_factory=dict)
    resumed_readers: int | None = None
    evaluations: int | None = None
    reused: Reused = field(default_factory=Reused)
    apply: AppliedFacts = field(default_factory=AppliedFacts)
    seconds: Mapping[str, Any] = field(default_factory=dict)
    metric: MetricFacts = field(default_factory=MetricFacts)
    swapped: MetricFacts = field(default_factory=MetricFacts)
    directions: Mapping[str, Any] = field(default_factory=dict)
    bootstrap: BootstrapFacts = field(default_factory=BootstrapFacts)
    verified: bool | None = None
    verdict: Verdict | None = None
    kl: float | None = None

    @property
    def total_seconds(self) -> float | None:
        """How long the run took."""
        found = self.seconds.get("total")
        return found if isinstance(found, (int, float)) and not isinstance(found, bool) else None

    @property
    def unparted(self) -> bool:
        """Whether masks were learned, and too little for their ranks to mean much."""
        parts = (part.get("masks") for part in self.directions.values() if isinstance(part, Mapping))
        told = (each for each in (self.more.get("masks"), *parts) if isinstance(each, Mapping))
        return any(each.get("parted") is False for each in told)

    @property
    def confirmation(self) -> Confirmation | None:
        """The metric by the search and by the hooks engine; None where the run compared no such two.

        Of several, as with swapped prompts, it is one where they do not agree, if there is one.

        Raises:
            CircuitError: If the record says that it did, and lacks a value.
        """
        if self.verified is None:
            return None
        found = self.metric.confirmation
        if found is None:
            raise CircuitError("a circuit's facts of verification are damaged: a value is missing")
        parts = (part for part in self.directions.values() if isinstance(part, Mapping))
        told = (part.get(name) for part in parts for name in ("metric", "swapped"))
        others = [self.swapped, *(MetricFacts.from_json(each) for each in told if isinstance(each, Mapping))]
        measured = [found, *(facts.confirmation for facts in others)]
        return next((each for each in measured if each is not None and not each.verified), found)

    @property
    def doubt(self) -> str | None:
        """What a user is told, on one line, of a circuit that the hooks engine did not confirm; else None."""
        found, threshold = self.confirmation, self.arguments.threshold
        if found is None or found.verified:
            return self.bootstrap.doubt
        where = "" if threshold is None else f"tau {threshold:g}: "
        return f"{where}the result is kept, but not verified: {found.text}; please report it"

    def to_json(self) -> dict[str, Any]:
        """The document of discovery.json, without what says nothing."""
        document = super().to_json()
        for name, value in _by_name(self.method).items():
            if document[name] == value:  # files of earlier versions tell it by the method's name
                del document[name]
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> RunRecord:
        """Read the document of discovery.json, of this version, an earlier one or a newer one.

        Raises:
            CircuitError: If what should be an object is none, or the verdict is damaged.
        """
        for name in _OBJECTS:
            if not isinstance(document.get(name, {}), Mapping):
                raise CircuitError(f"{name!r} does not hold an object")
        told = _by_name(document.get("method"))
        own = {name: document[name] for name in told if isinstance(document.get(name), type(told[name]))}
        return super().from_json({**document, **told, **own})


def _by_name(method: object) -> dict[str, Any]:
    """What a method's name tells of it where its record does not say."""
    name = method if isinstance(method, str) and method else GREEDY
    return {"title": TITLES.get(name, name), "ranks_kept_first": name == GREEDY}
