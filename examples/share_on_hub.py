"""Publish a circuit on the Hugging Face Hub, and load it back as anybody would.

$ hf auth login
$ python examples/share_on_hub.py me/demo-ioi                  # a private repository of yours
$ python examples/share_on_hub.py me/gpt2-ioi gpt2
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pahq_hf import Circuit, PAHQModel, load_task


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repo", help="where to: NAME/REPOSITORY")
    parser.add_argument("model", nargs="?", default="demo", help="Hub id or folder (default: demo)")
    parser.add_argument("--public", action="store_true", help="let everybody see it")
    options = parser.parse_args(arguments)

    model = PAHQModel.from_pretrained(options.model)
    task = load_task("ioi", model.tokenizer, n=20)
    circuit = model.discover(task, threshold=0.05)
    # One commit: circuit, scores, what ran, means, a picture and a model card.
    print(circuit.push_to_hub(options.repo, private=not options.public))

    theirs = Circuit.from_pretrained(options.repo)
    assert theirs.edges == circuit.edges
    # It knows the fingerprint of the weights it was found on; another model is refused.
    report = model.evaluate(theirs, load_task("ioi", model.tokenizer, n=20, seed=1))
    print(f"{theirs.edge_count} edges came back; faithfulness on unseen prompts {report['faithfulness']:.3f}")


if __name__ == "__main__":
    main()
