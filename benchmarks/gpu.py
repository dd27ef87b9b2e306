"""What only a real GPU can tell: correctness, repeatability, true errors, speed and memory, in minutes."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

_NEEDED = ("accelerate", "datasets", "numpy", "safetensors", "torch", "torchao", "transformers")
_DESCRIPTION = """\
Run the product on a GPU and write down what was seen: whether circuits are the CPU's in every precision
regime, whether runs repeat to the bit, how exact FP32, BF16 and FP8 products are, how fast weights reach the
card, and, for random Llamas of the shapes of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B, milliseconds per
edge, kernel launches, host waits, bytes moved and memory by phase, beside EAP-IG and the hooks engine in
the same run. Needs nothing but the repository, the installed packages and a card: no network.

Every finished step is written to the JSON file at once. Called again with the same file, only what is
missing, failed or ran out of time is run."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", type=Path, default=Path("gpu.json"), metavar="FILE", help="default: gpu.json")
    made.add_argument("--steps", type=lambda text: text.split(","), metavar="A,B", help="only these steps")
    made.add_argument("--skip", type=lambda text: text.split(","), default=[], metavar="A,B")
    made.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="begin nothing after this (default: 8)",
    )
    made.add_argument("--model", metavar="MODEL", help="a real checkpoint to search on card and CPU too")
    made.add_argument("--device", default="cuda", help="default: cuda; cpu tests the benchmark itself")
    made.add_argument("--list", action="store_true", help="print the names of the steps")
    return made


Step = Callable[[torch.device, argparse.Namespace], dict[str, Any]]


def steps(options: argparse.Namespace) -> dict[str, Step]:
    """All steps by name, in the order in which they are worth a short lease of a card."""
    from benchmarks import gpu_agreement, gpu_products, gpu_scale

    found: dict[str, Step] = {
        "machine": lambda device, _: gpu_products.machine(device),
        "products": lambda device, _: gpu_products.products(device),
        "fp8": lambda device, _: gpu_products.fp8(device),
        "demo": lambda device, _: gpu_agreement.agreement("demo", device, gpu_agreement.DEMO),
        "loads": lambda device, _: gpu_agreement.loads(device),
        "commands": lambda device, _: gpu_agreement.commands(device),
        "transfers": lambda device, _: gpu_products.transfers(device),
    }
    for shape in gpu_scale.SHAPES:
        found[shape.name] = lambda device, its, shape=shape: gpu_scale.measure(shape, device, its.until)
    if options.model:
        found["model"] = lambda device, its: gpu_agreement.agreement(its.model, device, gpu_agreement.MODEL)
    return found


def missing(device: str) -> list[str]:
    """What the machine lacks, in words; empty when all is there."""
    lacks = [f"the package {name}" for name in _NEEDED if importlib.util.find_spec(name) is None]
    if not lacks and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        lacks.append(f"a CUDA device (torch {torch.__version__} sees none)")
    return lacks


def conditions(device: torch.device) -> dict[str, Any]:
    """What figures depend on: card, versions, processor."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _NEEDED},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "card": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = f"{properties.major}.{properties.minor}"
        found |= {"card": properties.name, "memory": properties.total_memory, "capability": capability}
        found |= {"cuda": torch.version.cuda}
    return found


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the steps that are wanted and not done yet.

    Args:
        options: Of `parser`.
        say: Takes a line of progress.

    Returns:
        The document, also in `options.json`.
    """
    device = torch.device(options.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    here = conditions(device)
    document = _read(options.json, here)
    options.until = time.perf_counter() + 60 * options.minutes
    for name, step in steps(options).items():
        done = document["steps"].get(name)
        if (options.steps and name not in options.steps) or name in options.skip:
            continue
        if done is not None and not {"failed", "left_out"} & set(done):
            say(f"{name}: done before")
            continue
        if time.perf_counter() > options.until:
            say(f"{name}: no time left; call again to run it")
            continue
        result = _run_step(step, device, options)
        document["steps"][name] = result
        _write(options.json, document)
        left = ", ".join(result.get("left_out", ()))
        outcome = f"done but for {left}; call again to run it" if left else result.get("failed", "done")
        say(f"{name}: {outcome} ({result['seconds']:.1f} s)")
    return document


def _run_step(step: Step, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """A step's figures, or how it failed: the next one runs all the same."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    try:
        result = step(device, options)
    except Exception as error:
        trace = traceback.format_exc(limit=-8)
        result = {"failed": f"{type(error).__name__}: {error}"[:500], "traceback": trace}
    result["seconds"] = round(time.perf_counter() - started, 3)
    if cuda:
        result["peak_device_memory"] = torch.cuda.max_memory_allocated(device)
    return result


def _read(file: Path, here: dict[str, Any]) -> dict[str, Any]:
    """An earlier document, if it is of the same card and versions."""
    if file.exists():
        document: dict[str, Any] = json.loads(file.read_text())
        if document.get("conditions") == here:
            return document
    return {"benchmark": "gpu", "conditions": here, "steps": {}}


def _write(file: Path, document: dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=file.absolute().parent, delete=False) as temporary:
        json.dump(document, temporary, indent=1)
    os.replace(temporary.name, file)


# -- showing ----------------------------------------------------------------------------------------


def show(document: dict[str, Any], console: Console) -> None:
    """Print a document as tables: one of all steps, one for each list of rows in a step."""
    here = document["conditions"]
    versions = ", ".join(f"{name} {here[name]}" for name in ("torch", "torchao", "transformers"))
    console.print(f"{here['card'] or 'CPU'}, CUDA {here.get('cuda')}; {versions}; {here['cores']} cores")
    for name, result in document["steps"].items():
        plain = {key: value for key, value in result.items() if not isinstance(value, list | dict)}
        plain.pop("traceback", None)
        console.print(f"[b]{name}[/b] " + ", ".join(f"{key} {_text(value)}" for key, value in plain.items()))
        for key, rows in result.items():
            if isinstance(rows, list) and rows and isinstance(rows[0], dict):
                console.print(_table(f"{name}: {key}", rows))


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(_text(row.get(column)) for column in columns))
    return table


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns the exit code: 1 when a step failed, 2 when nothing can run."""
    options = parser().parse_args(arguments)
    lacks = missing(options.device)
    if lacks:
        sys.stderr.write(f"gpu: this machine lacks {', '.join(lacks)}\n")
        return 2
    known = steps(options)
    if options.list:
        print(*known, sep="\n")
        return 0
    unknown = [name for name in [*(options.steps or []), *options.skip] if name not in known]
    if unknown:
        sys.stderr.write(f"gpu: no step {unknown[0]!r}; there are {', '.join(known)}\n")
        return 2
    document = run(options, lambda text: print(text, file=sys.stderr, flush=True))
    console = Console()
    show(document, console if console.is_terminal else Console(width=160))
    return int(any("failed" in result for result in document["steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
