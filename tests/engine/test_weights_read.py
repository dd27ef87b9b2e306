"""How much of the checkpoint a circuit's state reads, and how it reaches a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from benchmarks.random_checkpoint import write
from pahq_hf import EngineConfig, PAHQConfig, PAHQModel
from pahq_hf.engine.build import make_engine
from pahq_hf.engine.setting import Setting
from pahq_hf.precision.fp32.source import SourceBlock
from tests.models import random_task
from tests.pretend.process import BEST, rehearsed

BF16: dict[str, Any] = {
    "model": "llama",
    "dtype": "bfloat16",
    "config": {"regime": "pahq", "compute": "bf16"},
    "search": {"readers": "logits,m1,a1.kv0<v>"},
}


def test_a_circuit_reads_of_output_projections_what_its_edges_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reader's input sums what kept heads add: of each layer a head or two, not the whole projection."""
    write(tmp_path, layers=8, d_model=32, heads=8, groups=4, d_mlp=64, vocab=128)
    model = PAHQModel.from_pretrained(str(tmp_path), PAHQConfig(compute="fp32"))
    graph, setting = model.graph, Setting(model.patched, random_task(), "kl", "corrupted", model.pahq_config)
    engine = make_engine(setting, EngineConfig())
    kept = graph.all_edges & (np.random.default_rng(0).random(graph.all_edges.shape) < 0.05)
    read = 0
    views = SourceBlock.views

    def counted(block: SourceBlock, rows: slice, cols: slice) -> Iterator[Tensor]:
        nonlocal read
        read += (rows.stop - rows.start) * (cols.stop - cols.start)
        yield from views(block, rows, cols)

    monkeypatch.setattr(SourceBlock, "views", counted)
    engine.begin(kept)
    assert 0 < read <= sum(linear.whole.size for linear in model.patched.linears())


def test_weights_reach_a_gpu_as_they_lie_in_the_checkpoint() -> None:
    """In half the bytes, and widened there: the CPU would take three times as long as the copy."""
    outcome = rehearsed(BEST, BF16)
    assert not outcome["failed"], outcome["failed"]
    assert outcome["same"]
    assert outcome["sent"]["float32"] < outcome["sent"]["bfloat16"] / 10
