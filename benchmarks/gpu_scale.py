"""A search's pieces on random Llamas of real shapes: milliseconds, launches, waits, bytes and memory."""

from __future__ import annotations

import gc
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_products import settle
from benchmarks.random_checkpoint import write
from pahq_hf import PAHQModel
from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.config import EngineConfig, PAHQConfig
from pahq_hf.engine.build import make_engine
from pahq_hf.engine.setting import Setting
from pahq_hf.search.attribution.scoring import edge_scores
from pahq_hf.search.bench import Bench
from pahq_hf.tasks.base import Task


@dataclass(frozen=True)
class Shape:
    """A Llama's shape, and how much of the work is done on it.

    Attributes:
        name: What it is like.
        layers: Decoder layers.
        d_model: Width of the residual stream.
        heads: Query heads.
        groups: Key/value groups.
        d_mlp: Hidden width of the MLP.
        vocab: Number of tokens.
        tied: Whether embedding and unembedding are the same.
        computes: Dtypes of products with differences.
        n: Prompt pairs.
        length: Tokens of a prompt.
    """

    name: str
    layers: int
    d_model: int
    heads: int
    groups: int
    d_mlp: int
    vocab: int
    tied: bool
    computes: tuple[str, ...] = ("bf16", "fp8")
    n: int = 20
    length: int = 16


SHAPES = (
    Shape("smollm2-135m", 30, 576, 9, 3, 1536, 49152, True, ("bf16",)),
    Shape("llama-1b", 16, 2048, 32, 8, 8192, 128256, True),
    Shape("llama-8b", 32, 4096, 32, 8, 14336, 128256, False, ("bf16",)),
)
TINY = Shape("tiny", 3, 64, 4, 2, 128, 500, True, ("fp32",), n=3, length=8)
_BATCH = 64  # candidates
_KEPT = 0.02  # share of edges that stay above the reader under test
_PAIRS, _STEPS = 2, 2  # of attribution: its cost grows with both
_CHANGED = 8  # position at which the prompts differ


def measure(shape: Shape, device: torch.device, until: float = math.inf) -> dict[str, Any]:
    """Load, capture and pieces of a search, for each compute dtype, beside EAP-IG and the hooks engine.

    Args:
        shape: The model's.
        device: The card.
        until: On `time.perf_counter`'s clock: no piece is begun after it.

    Returns:
        Seconds and bytes by phase, a row for each reader under test, a row for each rival, and, if there are
        any, the pieces there was no time for.
    """
    with tempfile.TemporaryDirectory(prefix="pahq-gpu-") as folder:
        started = time.perf_counter()
        write(
            Path(folder), layers=shape.layers, d_model=shape.d_model, heads=shape.heads,
            groups=shape.groups, d_mlp=shape.d_mlp, vocab=shape.vocab, tied=shape.tied, device=device,
        )  # fmt: skip
        result: dict[str, Any] = {"write_seconds": time.perf_counter() - started}
        phases, readers, rivals, left_out = [], [], [], []

        def begun(rows: list[dict[str, Any]], name: str, piece: Callable[[], dict[str, Any]]) -> None:
            if time.perf_counter() < until:
                rows.append(piece())
            else:
                left_out.append(name)

        for compute in shape.computes:
            search = _Pieces(shape, Path(folder), device, compute)
            for name in search.names():
                begun(readers, f"{name} in {compute}", partial(search.reader, name))
            search.engine.finish()
            if compute == shape.computes[0]:
                result["edges"] = search.model.graph.edge_count
                begun(rivals, "both engines", search.drift)
                begun(rivals, "the hooks engine", search.hooks)
                begun(rivals, "EAP-IG", search.attribution)
            phases += search.phases
            del search
            _forget(device)
    result |= {"phases": phases, "readers": readers, "rivals": rivals}
    return result | ({"left_out": left_out} if left_out else {})


def random_task(shape: Shape) -> Task:
    """Random prompts that differ at one position."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, shape.vocab, (shape.n, shape.length), generator=generator)
    corrupted = clean.clone()
    changed = min(_CHANGED, shape.length // 2)
    corrupted[:, changed] = torch.randint(0, shape.vocab, (shape.n,), generator=generator)
    answers = tuple((int(token),) for token in torch.randint(0, shape.vocab, (shape.n,), generator=generator))
    others = answers[1:] + answers[:1]
    last = torch.full((shape.n,), shape.length - 1)
    ones = torch.ones_like(clean)
    return Task("random", clean, corrupted, ones, torch.arange(shape.n), last, answers, others)


class _Pieces:
    """One loaded model and its engine; what is timed of them."""

    def __init__(self, shape: Shape, folder: Path, device: torch.device, compute: str) -> None:
        self.shape, self.device, self.compute = shape, device, compute
        self.phases: list[dict[str, Any]] = []
        self.task = random_task(shape)
        config = PAHQConfig(compute=compute)
        where: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
        # Loading includes the self-check: its tolerance holds at this depth, or this step fails and says how.
        self.model = self._phase("load", lambda: PAHQModel.from_pretrained(str(folder), config, **where))
        self.engine: Any = self._phase("capture", lambda: self._engine("sparse"))
        self.kept = _random_kept(self.model.graph)

    def _engine(self, name: str) -> Any:
        limits = EngineConfig(name)
        setting = Setting(self.model.patched, self.task, "kl", "corrupted", self.model.pahq_config)
        return make_engine(setting, limits)

    def _phase(self, name: str, function: Callable[[], Any]) -> Any:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        made = function()
        settle(self.device)
        row = {"compute": self.compute, "phase": name, "seconds": time.perf_counter() - started}
        if cuda:
            row["GB_after"] = torch.cuda.memory_allocated(self.device) / 1e9
            row["GB_peak"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        self.phases.append(row)
        return made

    def names(self) -> tuple[str, ...]:
        """Readers under test, from the top of the model to its bottom."""
        middle, top = self.shape.layers // 2, self.shape.layers - 1
        return ("logits", f"m{top}", f"m{middle}", f"a{middle}.h0<q>", "m0", "a0.h0<q>")

    def reader(self, name: str) -> dict[str, Any]:
        """Its row: taking up a circuit there, focus, a batch of candidates, a second look."""
        engine, graph = self.engine, self.model.graph
        reader = graph.reader_index(name)
        kept = graph.all_edges.copy()
        order = graph.reader_order()
        for above in order[: order.index(reader)]:
            kept[above] = self.kept[above]
        begin = self._seconds(lambda: engine.begin(kept))
        focus = self._seconds(lambda: engine.focus(reader))
        edges = list(graph.in_edges(reader))[:_BATCH]
        candidates = [edges[: number + 1] for number in range(len(edges))]
        engine.try_(reader, candidates)
        batch = self._seconds(lambda: engine.try_(reader, candidates))
        looks = [candidates[0], candidates[-1]] * 4
        look = self._seconds(lambda: engine.look_again(reader, looks))
        return {
            "compute": self.compute,
            "reader": name,
            "begin_ms": 1000 * begin,
            "focus_ms": 1000 * focus,
            "candidates": len(candidates),
            "ms_per_edge": 1000 * batch / len(candidates),
            "look_ms": 1000 * look / len(looks),
        } | self._counts(lambda: engine.try_(reader, candidates))

    def _seconds(self, function: Callable[[], object]) -> float:
        settle(self.device)
        started = time.perf_counter()
        function()
        settle(self.device)
        return time.perf_counter() - started

    def _counts(self, function: Callable[[], object]) -> dict[str, Any]:
        """Launches, waits and traffic of one call, from the profiler's trace."""
        if self.device.type != "cuda":
            return {}
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            function()
            settle(self.device)
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            profiled.export_chrome_trace(file.name)
            events = json.loads(Path(file.name).read_bytes())["traceEvents"]
        kernels = [event for event in events if event.get("cat") == "kernel"]
        copies = [event for event in events if event.get("cat") == "gpu_memcpy"]
        waits = [
            event
            for event in events
            if event.get("cat") == "cuda_runtime" and "Synchronize" in event.get("name", "")
        ]
        to_card = [event for event in copies if "HtoD" in event["name"]]
        return {
            "launches": len(kernels),
            "waits": len(waits) - 1,  # the last is the benchmark's own
            "busy_ms": sum(event["dur"] for event in kernels) / 1000,
            "copies": len(copies),
            "MB_to_card": sum(event["args"].get("bytes", 0) for event in to_card) / 1e6,
        }

    # -- rivals -------------------------------------------------------------------------------------

    def drift(self) -> dict[str, Any]:
        """One circuit's metric by both engines: whether the limit on drift holds at this depth."""
        ours = self.engine.metric_of(self.kept)
        with_hooks = self._engine("hooks")
        theirs = with_hooks.metric_of(self.kept)
        error = abs(ours - theirs)
        return {"what": "one circuit, both engines", "sparse": ours, "hooks": theirs, "difference": error}

    def hooks(self) -> dict[str, Any]:
        """Milliseconds an edge of unaccelerated ACDC: one patched forward pass."""
        engine = self._engine("hooks")
        reader = self.model.graph.reader_index(f"m{self.shape.layers // 2}")
        engine.begin(self.kept)
        engine.focus(reader)
        candidates = [[writer] for writer in list(self.model.graph.in_edges(reader))[:2]]
        engine.try_(reader, candidates[:1])
        seconds = self._seconds(lambda: engine.try_(reader, candidates))
        engine.finish()
        return {"what": "hooks engine, an edge", "ms": 1000 * seconds / len(candidates)}

    def attribution(self) -> dict[str, Any]:
        """Milliseconds that EAP-IG takes for a pair and a step, capture of the two runs included."""
        few, _ = self.task.part(0, _PAIRS)
        model, pahq = self.model.patched, self.model.pahq_config
        seconds = self._seconds(
            lambda: edge_scores(
                "eap-ig", Bench(Setting(model, few, "logit_diff", "corrupted", pahq)), steps=_STEPS
            )
        )
        return {"what": "EAP-IG, a pair and a step", "ms": 1000 * seconds / (_PAIRS * _STEPS)}


def _random_kept(graph: Graph) -> BoolArray:
    """A sparse random circuit, the same on every machine."""
    random = np.random.default_rng(0)
    kept: BoolArray = graph.all_edges & (random.random(graph.all_edges.shape) < _KEPT)
    return kept


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
