"""Find the circuit of a task in a GPT-2, and judge it on prompts the search has not seen.

$ python examples/discover_gpt2.py                  # the bundled demo model
$ python examples/discover_gpt2.py gpt2 --n 50      # GPT-2 small from the Hub
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pahq_hf import PAHQModel, load_task


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="demo", help="Hub id or folder (default: demo)")
    parser.add_argument("--task", default="ioi")
    parser.add_argument("--n", type=int, default=20, help="prompt pairs (default: 20)")
    parser.add_argument("--threshold", type=float, default=0.05, help="tau (default: .05)")
    parser.add_argument("--out", help="folder for the run; give one for what is worth keeping")
    options = parser.parse_args(arguments)

    # The checkpoint as Hugging Face has it; its weights are kept in FP8, and FP32 is read when it is needed.
    model = PAHQModel.from_pretrained(options.model)
    print(f"{options.model}: {model.graph.edge_count:,} edges between {len(model.graph.writers)} nodes")

    # Pairs of a clean and a corrupted prompt: "When Mary and John went ..., John gave a drink to".
    task = load_task(options.task, model.tokenizer, n=options.n)
    circuit = model.discover(task, threshold=options.threshold, out=options.out)
    print(f"kept {circuit.edge_count} edges; the best of them:")
    for name, score in sorted(circuit.edges, key=lambda edge: -edge[1])[:10]:
        print(f"  {score:.3f}  {name}")

    unseen = load_task(options.task, model.tokenizer, n=options.n, seed=1)
    report = model.evaluate(circuit, unseen)
    print(
        f"on unseen prompts: faithfulness {report['faithfulness']:.3f}, KL {report['kl']:.3f}, "
        f"accuracy {report['accuracy']:.2f} of the model's {report['accuracy_full']:.2f}"
    )


if __name__ == "__main__":
    main()
