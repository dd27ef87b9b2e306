"""Gradients at a reader in low precision, against autograd of PyTorch's own through the same weights.

The judge is a float64 model for each of the weights there are: the FP32 ones, the low ones, and the low ones
with the node in focus raised. It keeps one graph from the reader to the metric, in plain products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pahq_hf import PAHQConfig, PAHQModel
from pahq_hf.capture.activations import Activations
from pahq_hf.capture.recording import answer_logits, capture, forward_to_answers
from pahq_hf.capture.substitutes import with_streams, written_heads
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.config import EngineConfig
from pahq_hf.engine.build import make_engine
from pahq_hf.engine.hooks.patched_run import MLPAnchor, PatchedRun, RunAnchors, record_linears
from pahq_hf.engine.protocol import Engine
from pahq_hf.engine.setting import Setting
from pahq_hf.modeling.hooks import hooks
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.anchors import Anchor
from pahq_hf.precision.linear import PAHQLinear
from pahq_hf.tasks.metrics import Metric
from tests.engine.test_slopes import KINDS, close, removed_by, some_candidates, some_readers
from tests.families import ALL_FAMILIES
from tests.helpers import ALL_GRAPHS, random_edges
from tests.models import random_task

pytestmark = pytest.mark.crossing

TASK = random_task(padding="left", seed=5, rows=2)
FAMILIES = ("gpt2", "llama_split", "gemma2", "olmo2_split", "falcon", "qwen3_moe", "granite")
CONFIGS = {
    "pahq": PAHQConfig("pahq", compute="fp32"),
    "pahq, writers in FP32": PAHQConfig("pahq", compute="fp32", active="both"),
    "pahq, tables low": PAHQConfig("pahq", compute="fp32", quantize_embeddings=True),
    "pahq-literal": PAHQConfig("pahq-literal", compute="fp32"),
    "rtn": PAHQConfig("rtn", compute="fp32"),
    "rtn, int8": PAHQConfig("rtn", compute="fp32", format="int8"),
}


def plain_forward(self: PAHQLinear, x: Tensor) -> Tensor:
    """`PAHQLinear.forward` as its docstring has it, of a model whose weights are resident."""
    assert self.weight is not None
    anchor = self.shared.mode.anchors.get(self)
    if anchor is None:
        return self._noted(x, F.linear(x, self.weight, self.bias))
    assert anchor.y is not None
    return anchor.y + F.linear(x - anchor.x, self.weight)


class Probed(PatchedRun):
    """A run whose reader reads a leaf more."""

    probe: Tensor
    reader: int

    def _streams(self, readers: range, stream: Tensor, ablated: Tensor) -> Tensor | None:
        streams = super()._streams(readers, stream, ablated)
        if self.reader not in readers:
            return streams
        each = list((stream.expand(len(readers), *stream.shape) if streams is None else streams).unbind(0))
        each[self.reader - readers.start] = each[self.reader - readers.start] + self.probe
        return torch.stack(each)


@dataclass
class Judge:
    """Float64 models with the weights of one in low precision, whose node in focus is raised."""

    exact: PatchedModel
    low: PatchedModel
    raised: PatchedModel
    config: PAHQConfig
    metric: str

    @classmethod
    def of(cls, name: str, model: PAHQModel, metric: str) -> Judge:
        family, split = ALL_GRAPHS.get(name, (name, False))
        reads: tuple[Callable[[PAHQLinear], Tensor], ...] = (
            lambda linear: linear.exact(),
            lambda linear: linear.base(),
            lambda linear: linear.dense(),
        )
        made = []
        for read in reads:
            hf = ALL_FAMILIES[family](dtype=torch.float64)
            twin = PAHQModel(hf, PAHQConfig("fp32", split_kv_groups=split)).patched
            for ours, theirs in zip(twin.linears(), model.patched.linears(), strict=True):
                assert ours.weight is not None
                ours.weight.data = read(theirs).double()
            made.append(twin)
        return cls(*made, model.pahq_config, metric)

    @property
    def is_anchored(self) -> bool:
        return self.config.regime == "pahq"

    def _substitute(self, reader: int) -> Activations:
        """What stands in for removed edges; without anchors the raised node writes something else."""
        base = self.exact if self.is_anchored else self.low
        corrupted = capture(base, TASK, TASK.corrupted_ids)
        node, number = self.low.graph.readers[reader], self.low.graph.readers[reader].layer
        if self.is_anchored or not node.nodes:
            return corrupted
        layer = self.raised.layers[number]
        changed = replace(corrupted, z=[*corrupted.z], mlp=[*corrupted.mlp])
        with torch.no_grad():
            if node.kind == "mlp":
                changed.mlp[number] = layer.mlp(layer.mlp_norm(corrupted.mlp_in[number]))
            else:
                changed.z[number] = written_heads(layer, corrupted, number)
        return with_streams(self.raised, changed)

    def _anchors(self, removed: BoolArray, substitute: Activations, room: Tensor) -> RunAnchors:
        """The exact run of the circuit in which the reader came into focus."""
        run = PatchedRun(self.exact, substitute, removed, room, separate=True)
        with record_linears(self.exact) as found, hooks(*run.register()):
            answer_logits(self.exact, TASK, TASK.clean_ids)
        twins = dict(zip(self.exact.linears(), self.raised.linears(), strict=True))
        linears: dict[PAHQLinear, Anchor] = {twins[linear]: anchor for linear, anchor in found.items()}
        mlps = {}
        for number, (stream, output) in run._mlp_runs.items():
            layer = self.raised.layers[number]
            with torch.no_grad():
                mlps[number] = MLPAnchor(output, layer.mlp(layer.mlp_norm(stream)))
        full = self.config.active == "both"
        return RunAnchors(linears, run.heads, mlps, room.clone(), removed, full)

    def effects(
        self, before: BoolArray, removed: BoolArray, reader: int, writers: Sequence[int]
    ) -> tuple[float, list[float]]:
        """The metric, and what removing edges into a reader adds to first order."""
        graph, substitute = self.low.graph, self._substitute(reader)
        room = torch.zeros(len(graph.writers), *substitute.embedding.shape, dtype=torch.float64)
        anchors = self._anchors(before, substitute, room) if self.is_anchored else None
        reference = answer_logits(self.exact if self.is_anchored else self.low, TASK, TASK.clean_ids)
        run = Probed(self.raised, substitute, removed, torch.zeros_like(room), anchors)
        run.probe, run.reader = torch.zeros_like(substitute.embedding).requires_grad_(), reader
        mode = self.raised.precision.mode
        with mode.anchored({} if anchors is None else anchors.linears), hooks(*run.register()):
            logits = forward_to_answers(self.raised, TASK, TASK.clean_ids)
        value = Metric(self.metric, TASK, reference).followed(logits)
        (gradient,) = torch.autograd.grad(value, run.probe)
        found = []
        for writer in writers:
            carried, node = run._differences.detach()[writer], graph.writers[writer]
            if anchors is not None and node.head is not None and not anchors.full_writers:
                z = anchors.heads[node.layer].written - substitute.z[node.layer]
                carried = self.low.layers[node.layer].attention.contributions(z)[:, :, node.head]
            found.append(float(-(gradient * carried).sum()))
        return float(value.detach()), found


def engine_of(kind: Any, name: str, config: PAHQConfig, metric: str) -> tuple[PAHQModel, Engine]:
    family, split = ALL_GRAPHS.get(name, (name, False))
    model = PAHQModel(ALL_FAMILIES[family](), replace(config, split_kv_groups=split))
    setting = Setting(model.patched, TASK, metric, "corrupted", model.pahq_config)
    return model, make_engine(setting, EngineConfig(kind))


@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_slopes_are_those_of_the_dequantised_weights(
    kind: str, name: str, config: str, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of edges that were gone when the reader came into focus, that went since, and that came back.

    As in a search nothing is removed upstream: else the engines' tested edges carry other roundings.
    """
    model, engine = engine_of(kind, name, CONFIGS[config], metric)
    graph = engine.graph
    ours: list[NDArray[np.float64]] = []
    theirs: list[list[float]] = []
    for reader in some_readers(graph):
        kept = random_edges(graph, 0.7, seed=6)
        upstream = [r for r in range(len(graph.readers)) if graph.prefix[r] <= graph.prefix[reader]]
        upstream.remove(reader)
        kept[upstream] = graph.all_edges[upstream]
        before = graph.all_edges & ~kept
        engine.begin(kept)
        engine.focus(reader)
        candidates, writers = some_candidates(graph, reader), list(graph.in_edges(reader))
        slopes = engine.slopes(reader, candidates, writers)
        ours.append(slopes.effects.flatten())
        with engine.session():  # what it raises is its own
            judge = Judge.of(name, model, metric)
        with monkeypatch.context() as patch:
            patch.setattr(PAHQLinear, "forward", plain_forward)
            for gone, value in zip(candidates, slopes.trial.values, strict=True):
                expected, effects = judge.effects(
                    before, removed_by(graph, kept, reader, gone), reader, writers
                )
                assert value == pytest.approx(expected, abs=1e-4)
                theirs.append(effects)
    assert np.abs(np.concatenate(theirs)).max() > 1e-3
    close(np.concatenate(ours), np.concatenate(theirs), 1e-4)
    engine.finish()
