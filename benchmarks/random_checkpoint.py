"""Write a random Llama checkpoint of any shape: sharded, in BF16, as large models come."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def write(folder: Path, *, layers: int, d_model: int, heads: int, groups: int, d_mlp: int, vocab: int) -> int:
    """Write the checkpoint.

    Args:
        folder: Where it goes.
        layers: Decoder layers.
        d_model: Width of the residual stream.
        heads: Query heads.
        groups: Key/value groups.
        d_mlp: Hidden width of the MLP.
        vocab: Number of tokens.

    Returns:
        Number of parameters.
    """
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=d_model, intermediate_size=d_mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=True,
        max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1GB")
    return sum(parameter.numel() for parameter in model.parameters())


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a checkpoint; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.random_checkpoint", description=__doc__)
    parser.add_argument("out", type=Path)
    for name, value in {"layers": 22, "d-model": 2048, "heads": 32, "groups": 4, "d-mlp": 5632}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--vocab", type=int, default=32000, help="default: 32000")
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    print(f"{write(out, **options):,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
