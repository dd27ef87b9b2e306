"""The constants of a sparse search: what the clean and substituted runs wrote and read.

Heads are kept as z, `d_model / d_head` times smaller than what they add to the stream; a contribution
`z W_O` is computed when it is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pahq_hf.capture.activations import Activations
from pahq_hf.capture.store import ActivationStore, stored
from pahq_hf.circuit.graph import Graph
from pahq_hf.engine.sparse.positions import Liveness, TokenPlan
from pahq_hf.modeling.patched_model import PatchedModel

TERMS = 64  # of a sum that are computed at once


@dataclass(frozen=True)
class Carried:
    """What edges of the first writers carry.

    Attributes:
        values: `a_w - c_w`; shared, not to be written to. [writer, tokens, d_model]
        lengths: Of each, over all tokens. [writer] in float64
    """

    values: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Carried:
        """Measure them."""
        return cls(values, torch.linalg.vector_norm(values.flatten(1), dim=1).to("cpu", torch.float64))

    def first(self, count: int) -> Carried:
        """What edges of fewer writers carry."""
        return Carried(self.values[:count], self.lengths[:count])


class Captured:
    """Captured activations at the tokens that matter.

    Args:
        model: The patched model.
        plan: The tokens.
        clean: The clean run.
        substitute: What takes the place of removed edges.
        store: Where activations go.

    Attributes:
        terms: How many terms of a sum are computed at once.
    """

    def __init__(
        self,
        model: PatchedModel,
        plan: TokenPlan,
        clean: Activations,
        substitute: Activations,
        store: ActivationStore,
    ) -> None:
        self._model = model
        self._graph: Graph = model.graph
        self.plan = plan
        self.terms = TERMS
        window = plan.window
        self.width = clean.embedding.shape[-1]  # d_model
        self.attention_in = clean.attention_in  # per layer [batch, pos, d_model]
        self._clean = clean
        self.z = [stored(store, window.pick(z)) for z in clean.z]  # per layer [tokens, head, d_head]
        self.mlp = [stored(store, window.pick(m)) for m in clean.mlp]  # per layer [tokens, d_model]
        self._substitute = substitute
        changes = zip(self.z, substitute.z, strict=True)
        self._dz = [stored(store, z - window.pick(c)) for z, c in changes]
        changes = zip(self.mlp, substitute.mlp, strict=True)
        self._dmlp = [stored(store, m - window.pick(c)) for m, c in changes]
        self._dembedding = window.pick(clean.embedding - substitute.embedding)
        self._every: dict[tuple[Liveness, bool], Carried] = {}  # by tokens, and whether in full precision

    def zeros(self, *shape: int) -> Tensor:
        """Zeros of the activations' dtype, on their device."""
        return self._dembedding.new_zeros(shape)

    def differences(self, writers: Sequence[int], liveness: Liveness, out: Tensor | None = None) -> Tensor:
        """`a_w - c_w` of the clean run for some writers.

        Args:
            writers: Which.
            liveness: At which tokens.
            out: Where they go; new memory by default. [writer, tokens, d_model]

        Returns:
            [writer, tokens, d_model]
        """
        graph, plan = self._graph, self.plan
        if out is None:
            out = self._dembedding.new_empty(len(writers), len(plan.at(liveness)), self.width)
        start = 0
        while start < len(writers):  # runs of heads of one layer become one batched product
            writer = graph.writers[writers[start]]
            stop = start + 1
            if writer.is_input:
                values = plan.narrow(self._dembedding, Liveness.WINDOW, liveness)[None]
            elif writer.head is None:
                values = plan.narrow(self._dmlp[writer.layer], Liveness.WINDOW, liveness)[None]
            else:
                heads = [writer.head]
                while stop < len(writers) and self._is_head_of(writers[stop], writer.layer):
                    heads.append(graph.writers[writers[stop]].head or 0)
                    stop += 1
                dz = self._dz[writer.layer][:, heads].transpose(0, 1)
                narrow = plan.narrow(dz, Liveness.WINDOW, liveness)
                values = self._stored(writer.layer, heads, narrow)
            out[start:stop] = values
            start = stop
        return out

    def every_difference(self, count: int, liveness: Liveness) -> Carried:
        """`a_w - c_w` of the clean run for the first writers, kept for readers that read fewer of them.

        Args:
            count: How many writers.
            liveness: At which tokens.
        """
        key = liveness, self._model.precision.mode.is_full
        if key not in self._every or len(self._every[key].lengths) < count:
            self._every.pop(key, None)  # what was smaller makes room first
            self._every[key] = Carried.of(self.differences(range(count), liveness))
        return self._every[key].first(count)

    def forget(self) -> None:
        """Let go of what can be computed again."""
        self._every.clear()

    def _is_head_of(self, index: int, layer: int) -> bool:
        writer = self._graph.writers[index]
        return writer.layer == layer and writer.head is not None

    def contribute(self, layer: int, heads: Sequence[int], z: Tensor) -> Tensor:
        """What heads add to the stream at the present precision.

        Args:
            layer: The layer.
            heads: Heads.
            z: What they read out. [head, tokens, d_head]

        Returns:
            [head, tokens, d_model]
        """
        attention = self._model.layers[layer].attention
        return attention.output.weighted(attention.packed_head_outputs(z, heads))

    def change(self, layer: int, heads: Sequence[int], new: Tensor, captured: Tensor) -> Tensor:
        """What heads add now against what they added at capture; a raised weight may be another one.

        Args:
            layer: The layer.
            heads: Heads.
            new: Their z now. [head, tokens, d_head]
            captured: Their z in a captured run. [head, tokens, d_head]

        Returns:
            [head, tokens, d_model]
        """
        linear = self._model.layers[layer].attention.o_proj
        if self._model.precision.mode.is_full or not linear.is_raised:
            return self.contribute(layer, heads, new - captured)
        return self.contribute(layer, heads, new) - self._stored(layer, heads, captured)

    def _stored(self, layer: int, heads: Sequence[int], z: Tensor) -> Tensor:
        """What heads would add with the weight as it is stored. [head, tokens, d_head or d_model]"""
        attention = self._model.layers[layer].attention
        return attention.stored_contributions(z.transpose(0, 1), heads).transpose(0, 1)

    def base_input(self, reader: int, kept: np.ndarray, liveness: Liveness) -> Tensor:
        """A reader's input as far as the clean run decides it.

        Either the clean stream without the removed differences or the substituted one with the kept
        differences, which are equal; the one with fewer terms has fewer roundings.

        Args:
            reader: Reader index.
            kept: Its row of the edge set. [writers]
            liveness: At which tokens.

        Returns:
            [tokens, d_model]
        """
        row = kept[: self._graph.prefix[reader]]
        stays, goes = np.flatnonzero(row), np.flatnonzero(~row)
        # Against zeros the kept terms alone are exact: there is nothing to cancel.
        against_zero = len(goes) > 0 and not self._substitute.embedding.any()
        if len(goes) <= len(stays) and not against_zero:
            base, terms, sign = self._input(self._clean, reader, liveness), goes, -1
        else:
            base, terms, sign = self._input(self._substitute, reader, liveness), stays, 1
        for chunk in np.array_split(terms, max(1, len(terms) // self.terms)):
            if len(chunk):
                base = base + sign * self.differences(chunk.tolist(), liveness).sum(0)
        return base

    def _input(self, run: Activations, reader: int, liveness: Liveness) -> Tensor:
        """What a reader reads in a captured run. [tokens, d_model]"""
        node, tokens = self._graph.readers[reader], self.plan.at(liveness)
        if node.kind == "logits":
            return tokens.pick(run.final_in)
        return tokens.pick((run.mlp_in if node.kind == "mlp" else run.attention_in)[node.layer])
