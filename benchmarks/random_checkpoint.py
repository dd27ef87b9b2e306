"""Write a random Llama checkpoint of any shape: sharded, in BF16, as large models come, shard by shard."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

_SPREAD = 0.02  # standard deviation of the weights, as Llama is initialised
_SHARD = 10**9  # bytes


def write(
    folder: Path,
    *,
    layers: int,
    d_model: int,
    heads: int,
    groups: int,
    d_mlp: int,
    vocab: int,
    tied: bool = False,
    device: torch.device | str = "cpu",
) -> int:
    """Write the checkpoint; never more than one shard of it is in memory.

    Args:
        folder: Where it goes.
        layers: Decoder layers.
        d_model: Width of the residual stream.
        heads: Query heads.
        groups: Key/value groups.
        d_mlp: Hidden width of the MLP.
        vocab: Number of tokens.
        tied: Whether embedding and unembedding are the same.
        device: Where weights are drawn: a card does it many times faster, and draws others.

    Returns:
        Number of parameters.
    """
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=d_model, intermediate_size=d_mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=tied,
        max_position_embeddings=2048, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(config)
    model.tie_weights()
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    where = {}
    for number, shard in enumerate(_shards(shapes, torch.device(device))):
        file = f"model-{number:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": 2 * count}, "weight_map": where}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index))
    return count


def _shards(shapes: dict[str, tuple[int, ...]], device: torch.device) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator(device).manual_seed(0)
    shard: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            shard[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            drawn = torch.empty(shape, dtype=torch.bfloat16, device=device)
            shard[name] = drawn.normal_(0, _SPREAD, generator=generator).cpu()
        if sum(tensor.nbytes for tensor in shard.values()) > _SHARD:
            yield shard
            shard = {}
    if shard:
        yield shard


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a checkpoint; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.random_checkpoint", description=__doc__)
    parser.add_argument("out", type=Path)
    for name, value in {"layers": 22, "d-model": 2048, "heads": 32, "groups": 4, "d-mlp": 5632}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--vocab", type=int, default=32000, help="default: 32000")
    parser.add_argument("--tied", action="store_true", help="embedding and unembedding are the same")
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    print(f"{write(out, **options):,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
