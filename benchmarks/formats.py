"""How far rounding weights moves a model: mean KL from FP32 at the last token, by format, weights only."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pahq_hf import PAHQConfig, PAHQModel, load_task
from pahq_hf.capture.recording import answer_logits
from pahq_hf.errors import PAHQError
from pahq_hf.precision.formats.registry import quantize
from pahq_hf.precision.linear import PAHQLinear
from pahq_hf.tasks.base import Task

_E4M3_MAX = 448.0
_TASKS = ("ioi", "greater_than")  # half of the prompts each


def raw_cast(weight: Tensor) -> Tensor:
    """E4M3 without any scale."""
    return weight.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)


def per_tensor(weight: Tensor) -> Tensor:
    """E4M3 with one scale for the whole matrix."""
    scale = weight.abs().max() / _E4M3_MAX
    return (weight / scale).to(torch.float8_e4m3fn).to(torch.float32) * scale


def as_kept(fmt: str) -> Callable[[Tensor], Tensor]:
    """What the package keeps in a format, decoded."""

    def rounded(weight: Tensor) -> Tensor:
        rows, cols = weight.shape
        return quantize(weight, fmt).dense(slice(0, rows), slice(0, cols))  # type: ignore[arg-type]

    return rounded


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "raw e4m3 cast": raw_cast,
    "e4m3 per tensor": per_tensor,
    "fp8 (e4m3 per row)": as_kept("fp8"),
    "fp8-e5m2 (per row)": as_kept("fp8-e5m2"),
    "mx (e4m3 per 32)": as_kept("mx"),
    "int8 (per row)": as_kept("int8"),
    "bf16": as_kept("bf16"),
}


@contextmanager
def replaced(linears: Sequence[PAHQLinear], rounding: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, weights are rounded."""
    before = [linear.weight for linear in linears]
    for linear in linears:
        assert linear.weight is not None
        linear.weight = torch.nn.Parameter(rounding(linear.weight.detach()), requires_grad=False)
    try:
        yield
    finally:
        for linear, weight in zip(linears, before, strict=True):
            linear.weight = weight


def divergence(exact: Tensor, other: Tensor) -> float:
    """Mean KL(exact || other). [rows, vocab]"""
    p, q = (logits.double().log_softmax(-1) for logits in (exact, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def measure(model: PAHQModel, tasks: Sequence[Task]) -> dict[str, dict[str, float]]:
    """Mean KL by what is rounded and how."""
    patched = model.patched

    def logits() -> Tensor:
        return torch.cat([answer_logits(patched, task, task.clean_ids) for task in tasks])

    attention = [layer.attention for layer in patched.layers]
    groups = {
        "all linear weights but the unembedding": list(patched.linears()),
        "q, k, v only": [p for a in attention for p in (a.q_proj, a.k_proj, a.v_proj)],
    }
    exact = logits()
    found: dict[str, dict[str, float]] = {}
    for group, linears in groups.items():
        found[group] = {}
        for name, rounding in ROUNDINGS.items():
            with replaced(linears, rounding):
                found[group][name] = divergence(exact, logits())
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.formats", description=__doc__)
    parser.add_argument("model", help="Hub id, folder, or 'demo'")
    parser.add_argument("--n", type=int, default=64, help="prompts, half of them ioi, half greater_than")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        model = PAHQModel.from_pretrained(options.model, PAHQConfig(regime="fp32"))
        tasks = [load_task(name, model.tokenizer, n=options.n // 2) for name in _TASKS]
    except PAHQError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = measure(model, tasks)
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    table = Table()
    for title in ("rounding", *found):
        table.add_column(title, justify="left" if title == "rounding" else "right")
    for name in ROUNDINGS:
        table.add_row(name, *(f"{values[name]:.2g}" for values in found.values()))
    Console(width=110).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
