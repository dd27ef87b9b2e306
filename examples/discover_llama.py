"""Find a circuit in a Llama: grouped queries, key/value groups as nodes, and what FP8 saves.

$ python examples/discover_llama.py HuggingFaceTB/SmolLM2-135M-Instruct
$ python examples/discover_llama.py ~/.cache/pahq_hf/smollm2-135m      # the same, after `make smollm2`
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence

from pahq_hf import PAHQConfig, PAHQModel, load_task


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="Hub id or folder of a Llama, Mistral, Qwen, Gemma, ...")
    parser.add_argument("--task", default="ioi")
    parser.add_argument("--n", type=int, default=4, help="prompt pairs (default: 4)")
    parser.add_argument("--threshold", type=float, default=0.2, help="tau (default: .2)")
    parser.add_argument("--split-kv-groups", action="store_true", help="keys and values for each head")
    parser.add_argument("--out", help="folder for the run")
    options = parser.parse_args(arguments)

    config = PAHQConfig(regime="pahq", format="fp8", split_kv_groups=options.split_kv_groups)
    model = PAHQModel.from_pretrained(options.model, config)
    spec = model.graph.spec
    print(
        f"{spec.layers} layers, {spec.heads} heads that share {spec.kv_groups} groups of keys and values: "
        f"{model.graph.edge_count:,} edges"
    )
    # Linear weights are FP8 and only ever multiply differences, so decisions are those of FP32.
    low, full = model.patched.precision.nbytes, model.patched.precision.nbytes_fp32
    print(f"linear weights take {low / 1e6:.1f} MB instead of {full / 1e6:.1f}")

    task = load_task(options.task, model.tokenizer, n=options.n)
    circuit = model.discover(task, threshold=options.threshold, out=options.out)
    kinds = Counter(name.split("<")[1][0] if "<" in name else "other" for name, _ in circuit.edges)
    print(
        f"kept {circuit.edge_count} edges: " + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    )
    report = model.evaluate(circuit, load_task(options.task, model.tokenizer, n=options.n, seed=1))
    print(f"on unseen prompts: faithfulness {report['faithfulness']:.3f}, KL {report['kl']:.3f}")


if __name__ == "__main__":
    main()
