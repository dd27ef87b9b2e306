"""The active component of the sparse engine: the node in focus in FP32 (docs/semantics.md, section 5)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pahq_hf.capture.activations import Activations
from pahq_hf.capture.substitutes import written_heads
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.engine.sparse.budget import Fitting
from pahq_hf.engine.sparse.captured import Captured
from pahq_hf.engine.sparse.state import CircuitState
from pahq_hf.modeling.patched_model import PatchedModel


class RaisedNode:
    """Raises the node of the reader in focus, and what it writes in the corrupted run with it.

    Args:
        model: The patched model.
        rule: How low precision is used.
        captured: The captured constants.
        corrupted: The run on corrupted prompts.
        substitute: What stands in for removed edges.
        fitting: Goes on with less when memory runs out.
        fixed: Whether that is no run of the model, so that no weight changes it.
    """

    def __init__(
        self,
        model: PatchedModel,
        rule: RegimeRule,
        captured: Captured,
        corrupted: Activations,
        substitute: Activations,
        fitting: Fitting,
        *,
        fixed: bool,
    ) -> None:
        self._model = model
        self._graph = model.graph
        self._rule = rule
        self._captured = captured
        self._corrupted = corrupted
        self._substitute = substitute
        self._fitting = fitting
        self._fixed = fixed

    def turn_to(self, reader: int, state: CircuitState) -> set[int]:
        """Raise the node of a reader. Returns nodes whose output in the state may differ now."""
        if not self._rule.raise_active:
            return set()
        precision, nodes = self._model.precision, self._graph.readers[reader].nodes
        before = self._touched(precision.active)
        names = [self._graph.writers[node].name for node in nodes]
        changed = self._fitting(lambda: precision.activate(*names))
        if not changed or self._rule.anchored:
            return set()  # with anchors the state is FP32 whatever component is active
        state.substitute_shifts.clear()
        touched = self._touched(precision.active)
        if touched and not self._fixed:
            self._fitting(lambda: self._recompute_substitute(reader, touched, state))
        return before | touched

    @contextmanager
    def lowered(self, state: CircuitState | None) -> Iterator[None]:
        """Inside, no node is raised: what is measured does not depend on who is in focus.

        Args:
            state: State of the current circuit. What is packed for it is so afterwards: products that are
                packed differ from others in their last bits.
        """
        precision = self._model.precision
        active = precision.active
        precision.deactivate()
        try:
            yield
        finally:
            precision.activate(*active)
        if state is not None:
            self._fitting(state.hold_weights)

    def _touched(self, components: frozenset[str]) -> set[int]:
        """Nodes that compute with weights of some components: heads share k, v and maybe a norm."""
        graph = self._graph
        size = graph.spec.heads // graph.spec.kv_groups
        touched = set()
        for name in components:
            writer = graph.writers[graph.writer_index(name)]
            if writer.head is None:
                touched.add(graph.writer_index(name))
            else:
                first = writer.head // size * size
                together = range(graph.spec.heads) if graph.spec.coupled else range(first, first + size)
                touched |= {graph.head_writer(writer.layer, h) for h in together}
        return touched

    def _recompute_substitute(self, reader: int, nodes: set[int], state: CircuitState) -> None:
        number = self._graph.readers[reader].layer
        layer, window, shifts = self._model.layers[number], state.plan.window, state.substitute_shifts
        if self._graph.readers[reader].kind == "mlp":
            new = layer.mlp(layer.mlp_norm(window.pick(self._corrupted.mlp_in[number])))
            shifts[self._graph.mlp_writer(number)] = new - window.pick(self._substitute.mlp[number])
            return
        heads = sorted(self._graph.writers[node].head or 0 for node in nodes)
        new = window.pick(written_heads(layer, self._corrupted, number))[:, heads].transpose(0, 1)
        old = window.pick(self._substitute.z[number])[:, heads].transpose(0, 1)
        change = self._captured.change(number, heads, new, old)
        for head, value in zip(heads, change, strict=True):
            shifts[self._graph.head_writer(number, head)] = value
