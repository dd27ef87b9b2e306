"""What a precision regime asks of an engine (docs/semantics.md, section 5)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from pahq_hf.config import PAHQConfig
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.products import COMPUTE_DTYPES, resolve_compute


@dataclass(frozen=True)
class RegimeRule:
    """How an engine uses a model that is kept in low precision.

    Attributes:
        raise_active: Compute the node of the reader in focus in FP32.
        anchored: Capture runs and compute the current circuit in FP32; let low-precision weights multiply
            differences from it only.
        full_writers: Compute `a_w - c_w` of the tested edges' writers with FP32 weights too.
        compute: Dtype of products of low-precision weights with differences.
        full: Compute everything in FP32, whatever weights are kept in.
    """

    raise_active: bool = False
    anchored: bool = False
    full_writers: bool = False
    compute: torch.dtype = torch.float32
    full: bool = False

    @classmethod
    def of(cls, config: PAHQConfig, device: torch.device) -> RegimeRule:
        """The rule of a regime."""
        if config.regime == "pahq-literal":
            return cls(raise_active=True)
        if config.regime != "pahq":
            return cls()
        compute = COMPUTE_DTYPES[resolve_compute(config.compute, config.format, device)]
        return cls(True, True, config.active == "both", compute)

    def exactly(self, model: PatchedModel) -> AbstractContextManager[None]:
        """The precision of captured runs and of the current circuit."""
        return model.precision.full_precision() if self.anchored else nullcontext()

    def always(self, model: PatchedModel) -> AbstractContextManager[None]:
        """The precision of whatever an engine computes, where it says nothing else."""
        return model.precision.full_precision() if self.full else nullcontext()


EXACT = RegimeRule(full=True)
