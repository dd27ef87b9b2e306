"""What the raised component writes in the corrupted run, at its new precision.

Other components' corrupted activations are constants of the run (docs/semantics.md, section 5).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pahq_hf.capture.activations import Activations
from pahq_hf.capture.substitutes import with_streams, written_heads
from pahq_hf.modeling.patched_model import PatchedModel


class RaisedSubstitute:
    """Puts a raised component's corrupted activations in the place of the captured ones.

    Args:
        model: The patched model.
        corrupted: The run on corrupted prompts.
        substitute: What stands in for removed edges; changed in place.
        fixed: Whether that is no run of the model, so that no weight changes it.
    """

    def __init__(
        self, model: PatchedModel, corrupted: Activations, substitute: Activations, *, fixed: bool
    ) -> None:
        self._model = model
        self._corrupted = corrupted
        self._substitute = substitute
        self._fixed = fixed
        self._restore: list[tuple[list[Tensor], int, Tensor]] = []

    def recompute(self, reader: int) -> Activations:
        """Substitutes with those of the node of a reader made anew, with the streams they add up to."""
        self.undo()
        if not self._fixed and self._model.graph.readers[reader].nodes:
            self._replace(reader)
        return with_streams(self._model, self._substitute)

    def _replace(self, reader: int) -> None:
        node = self._model.graph.readers[reader]
        layer, corrupted = self._model.layers[node.layer], self._corrupted
        with torch.no_grad():
            if node.kind == "mlp":
                values = layer.mlp(layer.mlp_norm(corrupted.mlp_in[node.layer]))
                store = self._substitute.mlp
            else:
                values = written_heads(layer, corrupted, node.layer)
                store = self._substitute.z
        self._restore.append((store, node.layer, store[node.layer]))
        store[node.layer] = values

    def undo(self) -> None:
        """Put the captured ones back."""
        while self._restore:
            store, number, values = self._restore.pop()
            store[number] = values
