"""Search on prompts of your own: a JSONL file with a clean and a corrupted prompt, and the answers.

    $ python examples/own_dataset.py                          # writes such a file, and uses it
    $ python examples/own_dataset.py gpt2 --data mine.jsonl

CSV, Parquet and Hub datasets with the same columns work too, and so does `pahq discover --task mine.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from pahq_hf import PAHQModel, load_task

NAMES = ("Mary", "John", "Tom", "Anna", "Paul", "Kate")


def write_pairs(path: Path, n: int) -> None:
    """Write pairs that differ in who gives: the other one receives."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(n):
            first, second = rng.sample(NAMES, 2)
            start = f"When {first} and {second} went to the store,"
            row = {
                "clean": f"{start} {second} gave a drink to",
                "corrupted": f"{start} {first} gave a drink to",  # as many tokens as the clean one
                "answer": f" {first}",  # with its space: one token
                "distractor": f" {second}",
            }
            file.write(json.dumps(row) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="demo", help="Hub id or folder (default: demo)")
    parser.add_argument("--data", type=Path, default=Path("pairs.jsonl"), help="default: pairs.jsonl")
    parser.add_argument("--threshold", type=float, default=0.1, help="tau (default: .1)")
    options = parser.parse_args(arguments)
    if not options.data.exists():
        write_pairs(options.data, n=24)
        print(f"wrote {options.data}")

    model = PAHQModel.from_pretrained(options.model)
    # Searched on the first pairs; the answers say what logit_diff is.
    task = load_task(str(options.data), model.tokenizer, n=16, metric="logit_diff")
    circuit = model.discover(task, threshold=options.threshold)
    report = model.evaluate(circuit, task)
    print(
        f"kept {circuit.edge_count} of {model.graph.edge_count:,} edges; "
        f"logit difference {report['logit_diff']:.2f}, of the model {report['logit_diff_full']:.2f}"
    )


if __name__ == "__main__":
    main()
