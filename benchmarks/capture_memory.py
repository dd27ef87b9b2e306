"""Anonymous memory that capturing clean and corrupted runs takes, against one layer and the model."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence

import torch

from benchmarks.rows import settled_memory
from pahq_hf import PAHQConfig, PAHQModel
from pahq_hf.capture.recording import capture
from pahq_hf.config import Regime
from pahq_hf.precision.memory import PeakMemory
from pahq_hf.tasks.base import Task


def random_task(vocab: int, examples: int, length: int) -> Task:
    """Prompt pairs of random tokens that differ in their second half; scored at the end."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(1, vocab, (examples, length), generator=generator)
    corrupted = clean.clone()
    half = length // 2
    corrupted[:, half:-1] = torch.randint(1, vocab, (examples, length - 1 - half), generator=generator)
    mask = torch.ones_like(clean)
    return Task(
        name="random", clean_ids=clean, corrupted_ids=corrupted, attention_mask=mask,
        answer_rows=torch.arange(examples),
        answer_positions=torch.full((examples,), length - 1), answers=tuple((1,) for _ in clean),
        distractors=tuple((2,) for _ in clean), metric="kl",
    )  # fmt: skip


def measure(model: str, regime: Regime, examples: int, length: int) -> dict[str, float]:
    """Bytes, in MB (10^6), before and at the peak of a capture in FP32."""
    wrapped = PAHQModel.from_pretrained(model, PAHQConfig(regime=regime))
    patched = wrapped.patched
    task = random_task(patched.vocab_size, examples, length)
    gc.collect()
    before = settled_memory()
    with PeakMemory() as peak, patched.precision.full_precision(), torch.no_grad():
        run = capture(patched, task, task.clean_ids)
    held = sum(t.nbytes for t in (*run.z, *run.mlp, *run.attention_in, *run.mlp_in, run.logits))
    layers = len(patched.layers)
    return {
        "before": before / 1e6,
        "peak": peak.anonymous / 1e6,
        "rise": (peak.anonymous - before) / 1e6,
        "captured activations": held / 1e6,
        "linear weights resident": patched.precision.nbytes / 1e6,
        "linear weights FP32": patched.precision.nbytes_fp32 / 1e6,
        "one layer FP32": patched.precision.nbytes_fp32 / layers / 1e6,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capture_memory", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--regime", default="pahq")
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--length", type=int, default=16)
    options = parser.parse_args(arguments)
    figures = measure(options.model, options.regime, options.examples, options.length)
    print(json.dumps({name: round(value, 1) for name, value in figures.items()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
