"""The FP32 capture of a low-precision model holds one layer's weights, not the model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.random_checkpoint import write
from pahq_hf.precision.formats.float8 import Float8Weight
from pahq_hf.precision.memory import read_memory
from pahq_hf.precision.products import native_fp8
from tests.forked import run_forked


@pytest.mark.skipif(not read_memory(), reason="needs Linux's /proc")
def test_capture_streams_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, layers=10, d_model=512, heads=8, groups=2, d_mlp=2048, vocab=256)
    ended = run_forked("from benchmarks.capture_memory import main\nmain()", str(tmp_path), "--length", "8")
    assert ended.code == 0, ended.stderr
    figures = json.loads(ended.stdout)
    model, layer = figures["linear weights FP32"], figures["one layer FP32"]
    assert figures["rise"] - figures["captured activations"] < 1.5 * layer < 0.2 * model


@pytest.mark.cuda
def test_dynamic_fp8_product_is_the_low_precision_product() -> None:
    device = torch.device("cuda")
    if not native_fp8(device):
        pytest.skip("needs compute capability 8.9")
    torch.manual_seed(0)
    weight = Float8Weight(torch.randn(64, 96)).to(device)
    x = torch.randn(3, 32, 96, device=device)
    rows, cols = slice(16, 64), slice(0, 32)
    expected = x[..., cols] @ weight.dense(rows, cols).t()
    found = weight.dynamic(rows, cols)(x[..., cols])
    assert (found - expected).norm() < 0.05 * expected.norm()  # E4M3 rounds the input by 2.5 % on average
