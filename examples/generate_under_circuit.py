"""Let a model speak with nothing but its circuit, and count its right answers.

$ python examples/generate_under_circuit.py                   # the bundled demo model
$ python examples/generate_under_circuit.py gpt2 --n 50 --threshold 0.01
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch import Tensor

from pahq_hf import PAHQModel, Task, load_task


def share_right(task: Task, tokens: Tensor) -> float:
    """How often the first generated token is an answer."""
    first = tokens[:, task.length].tolist()
    return sum(token in answers for token, answers in zip(first, task.answers, strict=True)) / len(first)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="demo", help="Hub id or folder (default: demo)")
    parser.add_argument("--n", type=int, default=20, help="prompt pairs (default: 20)")
    parser.add_argument("--threshold", type=float, default=0.01, help="tau (default: .01)")
    options = parser.parse_args(arguments)

    model = PAHQModel.from_pretrained(options.model)
    circuit = model.discover(load_task("ioi", model.tokenizer, n=options.n), threshold=options.threshold)
    print(f"kept {circuit.edge_count} of {model.graph.edge_count:,} edges")

    # To be continued, prompts end in the same place.
    unseen = load_task("ioi", model.tokenizer, n=options.n, seed=1, padding_side="left")
    prompts = {"input_ids": unseen.clean_ids, "attention_mask": unseen.attention_mask}
    kinds = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}

    def show(name: str, tokens: Tensor) -> None:
        said = model.tokenizer.decode(tokens[0])
        print(f"{name}: {share_right(unseen, tokens):.2f} right, such as {said!r}")

    show("the model", model.generate(**prompts, **kinds))
    # Removed edges carry what they write on corrupted prompts, which run along: as in the search.
    partner = {"corrupted": unseen.corrupted_ids, "corrupted_mask": unseen.attention_mask}
    with model.apply(circuit, **partner):
        show("its circuit, beside corrupted prompts", model.generate(**prompts, **kinds))
    # Without those they carry means kept with the circuit, under which it was not found: this warns.
    with model.apply(circuit):
        show("its circuit, with means", model.generate(**prompts, **kinds))


if __name__ == "__main__":
    main()
